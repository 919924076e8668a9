/* cuda/sm90/config.h: tiles of the Hopper kernels, by head-dim bucket and variant. No row, no kernel. */
#ifndef FA_SM90_CONFIG_H
#define FA_SM90_CONFIG_H

#include "../args.h"

/* Forward. BLOCK_M = 64 GROUPS queries, a consumer warpgroup each; Q_STAGES 2: the next tile's Q is here before this one ends.
 * PING_PONG: the warpgroups issue their products in turn. */
template <int G, int BN, int Q, bool P> struct sm90_forward_row {
    enum { GROUPS = G, BLOCK_N = BN, Q_STAGES = Q, PING_PONG = P };
};
template <int D, fa_variant V> struct sm90_forward_tile;
/*                                                               GROUPS  BLOCK_N  Q_STAGES  PING_PONG */
template <fa_variant V> struct sm90_forward_tile< 64, V> : sm90_forward_row<2, 128, 2, true> {};        /* 3 groups spill score mods */
template <> struct sm90_forward_tile< 64, FA_PLAIN>      : sm90_forward_row<3, 128, 2, true> {};        /* 2 groups -15 %, 96 keys -5 % */
template <> struct sm90_forward_tile< 64, FA_DROPOUT>    : sm90_forward_row<3,  96, 2, true> {};        /* 2 groups -18 %, 64 keys -7 % */
template <fa_variant V> struct sm90_forward_tile< 96, V> : sm90_forward_row<2, 128, 2, false> {};
template <fa_variant V> struct sm90_forward_tile<128, V> : sm90_forward_row<2, 128, 2, false> {};       /* 160 keys -12 %, 3 groups -10 % */
template <fa_variant V> struct sm90_forward_tile<192, V> : sm90_forward_row<2,  96, 1, false> {};
template <fa_variant V> struct sm90_forward_tile<256, V> : sm90_forward_row<2,  64, 1, false> {};       /* 80 keys -3 % */

#endif
