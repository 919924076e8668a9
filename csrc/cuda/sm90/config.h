/* cuda/sm90/config.h: tiles of the Hopper kernels, by head-dim bucket and variant. No row, no kernel. */
#ifndef FA_SM90_CONFIG_H
#define FA_SM90_CONFIG_H

#include "../args.h"

/* Forward. BLOCK_M = 64 GROUPS queries, a consumer warpgroup each. Q_STAGES > 1: the next tile's Q is here before this one ends, and
 * finished rows leave by way of the tile's own; 1: by way of O_PANELS panels of 64 channels. PING_PONG: the warpgroups issue their
 * products in turn; 2: where no key is hidden on the right. DRAWN: pieces of 16 keys whose dropout flags are drawn beside, by
 * forward_dropout.cuh. BY_TMA: a thread beside the producer hands finished rows to TMA. BLOCKS share a multiprocessor. STAGES: places
 * in the rings of K and V. SKIPS: a warpgroup lets go of key blocks that none of its rows sees. LATE: dropout is drawn when the product
 * with V is over, where there are no registers for it before. */
template <int G, int BN, int Q, int P, int O = 0, int W = 0, bool TMA = false, int B = 1, int S = 2, bool SK = false, bool L = false>
struct sm90_forward_row {
    enum { GROUPS = G, BLOCK_N = BN, Q_STAGES = Q, PING_PONG = P, O_PANELS = O, DRAWN = W, BY_TMA = TMA, BLOCKS = B, STAGES = S, SKIPS = SK,
           LATE = L };
};
template <int D, fa_variant V> struct sm90_forward_tile;
/*                                                               GROUPS  BLOCK_N  Q_STAGES  PING_PONG  O_PANELS  DRAWN  BY_TMA */
template <fa_variant V> struct sm90_forward_tile< 64, V> : sm90_forward_row<2, 128, 2, 1> {};        /* 3 groups spill score mods */
template <> struct sm90_forward_tile< 64, FA_PLAIN>      : sm90_forward_row<3, 128, 2, 1> {};        /* 2 groups -15 %, 96 keys -5 % */
template <> struct sm90_forward_tile< 64, FA_DROPOUT>    : sm90_forward_row<3,  96, 2, 1> {};
template <fa_variant V> struct sm90_forward_tile< 96, V> : sm90_forward_row<2, 128, 2, 0> {};
template <> struct sm90_forward_tile< 96, FA_DROPOUT>    : sm90_forward_row<2, 128, 2, 0, 0, 8> {};
template <fa_variant V> struct sm90_forward_tile<128, V> : sm90_forward_row<2, 128, 2, 0> {};
template <> struct sm90_forward_tile<128, FA_PLAIN>      : sm90_forward_row<2, 128, 3, 0, 0, 0, true> {};    /* 64 keys -15 %, 3 groups -10 % */
template <> struct sm90_forward_tile<128, FA_DROPOUT>    : sm90_forward_row<2, 128, 2, 0, 0, 8> {};
template <fa_variant V> struct sm90_forward_tile<192, V> : sm90_forward_row<2,  96, 1, 0, 2> {};
template <> struct sm90_forward_tile<192, FA_DROPOUT>    : sm90_forward_row<2,  96, 1, 0, 1, 6> {};
template <fa_variant V> struct sm90_forward_tile<256, V> : sm90_forward_row<2,  64, 1, 0, 2> {};
template <> struct sm90_forward_tile<256, FA_PLAIN>      : sm90_forward_row<2,  64, 1, 0, 2, 0, true> {};    /* 80 keys -3 % */
template <> struct sm90_forward_tile<256, FA_DROPOUT>    : sm90_forward_row<2,  64, 1, 0, 1, 4> {};          /* none drawn beside: -2 to -8 % */

/* Dropout where nothing modifies scores: a kernel of its own. */
template <int D> constexpr bool sm90_forward_has_plain_dropout = D == 64 || D == 128;
template <> struct sm90_forward_tile< 64, FA_PLAIN_DROPOUT> : sm90_forward_row<4, 64, 3, 2, 0, 0, true, 1, 4, true, true> {};  /* 2 x 128 keys -6 % */
template <> struct sm90_forward_tile<128, FA_PLAIN_DROPOUT> : sm90_forward_row<2, 128, 3, 1, 0, 0, true> {};    /* flags drawn beside -7 % */

/* Plain kernels for short sequences, where a tile of many rows wastes less, and for few queries. */
template <int D> struct sm90_forward_brief { typedef sm90_forward_tile<D, FA_PLAIN> tile; };
template <> struct sm90_forward_brief< 64> { struct tile : sm90_forward_row<4, 64, 3, 2, 0, 0, true, 1, 4, true> {}; };   /* 3 groups -15 % */
template <int D> struct sm90_forward_small { typedef sm90_forward_tile<D, FA_PLAIN> tile; };
template <> struct sm90_forward_small< 64> { struct tile : sm90_forward_row<1, 64, 3, 0, 0, 0, true, 3> {}; };

#endif
