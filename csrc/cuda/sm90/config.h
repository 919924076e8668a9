/* cuda/sm90/config.h: tiles of the Hopper kernels, by head-dim bucket and variant. No row, no kernel. */
#ifndef FA_SM90_CONFIG_H
#define FA_SM90_CONFIG_H

#include "../args.h"

/* Forward. BLOCK_M = 64 GROUPS queries, a consumer warpgroup each. Q_STAGES > 1: the next tile's Q is here before this one ends, and
 * finished rows leave by way of the tile's own; 1: by way of O_PANELS panels of 64 channels. PING_PONG: the warpgroups issue their
 * products in turn. DRAWN: pieces of 16 keys whose dropout flags are drawn beside, by forward_dropout.cuh. BY_TMA: TMA takes finished
 * rows out. BLOCKS share a multiprocessor. */
template <int G, int BN, int Q, bool P, int O = 0, int W = 0, bool TMA = false, int B = 1> struct sm90_forward_row {
    enum { GROUPS = G, BLOCK_N = BN, Q_STAGES = Q, PING_PONG = P, O_PANELS = O, DRAWN = W, BY_TMA = TMA, BLOCKS = B };
};
template <int D, fa_variant V> struct sm90_forward_tile;
/*                                                               GROUPS  BLOCK_N  Q_STAGES  PING_PONG  O_PANELS  DRAWN */
template <fa_variant V> struct sm90_forward_tile< 64, V> : sm90_forward_row<2, 128, 2, true> {};        /* 3 groups spill score mods */
template <> struct sm90_forward_tile< 64, FA_PLAIN>      : sm90_forward_row<3, 128, 2, true> {};        /* 2 groups -15 %, 96 keys -5 % */
template <> struct sm90_forward_tile< 64, FA_DROPOUT>    : sm90_forward_row<3,  96, 2, true> {};        /* 2 groups -18 %, 64 keys -7 %, all drawn beside -25 % */
template <fa_variant V> struct sm90_forward_tile< 96, V> : sm90_forward_row<2, 128, 2, false> {};
template <> struct sm90_forward_tile< 96, FA_DROPOUT>    : sm90_forward_row<2, 128, 2, false, 0, 8> {};
template <fa_variant V> struct sm90_forward_tile<128, V> : sm90_forward_row<2, 128, 2, false> {};       /* 160 keys -12 %, 3 groups -10 % */
template <> struct sm90_forward_tile<128, FA_DROPOUT>    : sm90_forward_row<2, 128, 2, false, 0, 8> {}; /* none drawn beside: -8 % at 512, +4 % from 2k */
template <fa_variant V> struct sm90_forward_tile<192, V> : sm90_forward_row<2,  96, 1, false, 2> {};
template <> struct sm90_forward_tile<192, FA_DROPOUT>    : sm90_forward_row<2,  96, 1, false, 1, 6> {};
template <fa_variant V> struct sm90_forward_tile<256, V> : sm90_forward_row<2,  64, 1, false, 2> {};    /* 80 keys -3 % */
template <> struct sm90_forward_tile<256, FA_DROPOUT>    : sm90_forward_row<2,  64, 1, false, 1, 4> {}; /* none drawn beside: -2 to -8 % */

/* Plain kernels for short sequences: where a tile changes costs less, and a step somewhat more. */
template <int D> struct sm90_forward_brief { typedef sm90_forward_tile<D, FA_PLAIN> tile; };
template <> struct sm90_forward_brief< 64> { struct tile : sm90_forward_row<1,  64, 3, false, 0, 0, true, 3> {}; };  /* 80 keys -10 %, 2 groups x 128 -2 to -7 % */
template <> struct sm90_forward_brief<128> { struct tile : sm90_forward_row<2, 128, 3, false, 0, 0, true> {}; };     /* 1 group x 64, two blocks -10 % */
template <> struct sm90_forward_brief<256> { struct tile : sm90_forward_row<2,  64, 1, false, 2, 0, true> {}; };

#endif
