/* cuda/sm90/config.h: tiles of the Hopper kernels, by head-dim bucket and variant. No row, no kernel. */
#ifndef FA_SM90_CONFIG_H
#define FA_SM90_CONFIG_H

#include "../args.h"

/* Forward. BLOCK_M = 64 GROUPS queries, a consumer warpgroup each; Q_STAGES 2: the next tile's Q is here before this one ends.
 * PING_PONG: the warpgroups issue their products in turn. */
template <int G, int BN, int Q, bool P, bool F = true, bool K = true> struct sm90_forward_row {
    enum { GROUPS = G, BLOCK_N = BN, Q_STAGES = Q, PING_PONG = P, PREFETCH = F, KEEP = K };
};
template <int D, fa_variant V> struct sm90_forward_tile;
/*                                                               GROUPS  BLOCK_N  Q_STAGES  PING_PONG       KB */
template <fa_variant V> struct sm90_forward_tile< 64, V> : sm90_forward_row<2, 128, 2, true> {};
template <> struct sm90_forward_tile< 64, FA_PLAIN>      : sm90_forward_row<3, 128, 2, true> {};
template <fa_variant V> struct sm90_forward_tile< 96, V> : sm90_forward_row<2, 128, 2, false> {};
template <fa_variant V> struct sm90_forward_tile<128, V> : sm90_forward_row<2, 128, 2, false> {};
template <fa_variant V> struct sm90_forward_tile<192, V> : sm90_forward_row<2,  96, 1, false> {};
template <fa_variant V> struct sm90_forward_tile<256, V> : sm90_forward_row<2,  64, 1, false> {};
template <> struct sm90_forward_tile<256, FA_PLAIN>      : sm90_forward_row<2,  80, 1, false> {};

#endif
