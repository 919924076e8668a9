/* cuda/sm80/config.h: tiles, by head-dim bucket and variant. No row, no kernel. SMALL ones fit the 99 KB that a block gets on
 * RTX 30/40, L4 and sm_120; where the default tile does anyway there is no other. launch.c takes the first that fits the device. */
#ifndef FA_SM80_CONFIG_H
#define FA_SM80_CONFIG_H

#include "../args.h"

/* Forward. BLOCKS blocks share a multiprocessor, which bounds the registers. */
template <int D, fa_variant V, bool SMALL> struct forward_tile : forward_tile<D, V, false> {};
template <int BM, int BN, int S, int W, int B> struct forward_row {
    enum { BLOCK_M = BM, BLOCK_N = BN, STAGES = S, WARPS = W, BLOCKS = B };
};
/*                                                              BLOCK_M  BLOCK_N  STAGES  WARPS  BLOCKS      KB */
template <fa_variant V> struct forward_tile< 32, V, false>        : forward_row<128,  64, 2, 4, 2> {};      /*  24 */
template <fa_variant V> struct forward_tile< 64, V, false>        : forward_row<128,  64, 2, 4, 2> {};      /*  48 */
template <fa_variant V> struct forward_tile< 96, V, false>        : forward_row<128,  32, 2, 4, 2> {};      /*  48; 64 keys spill */
template <> struct forward_tile< 96, FA_PLAIN, false>             : forward_row<128,  64, 2, 4, 2> {};      /*  72 */
template <> struct forward_tile< 96, FA_PLAIN_DROPOUT, false>     : forward_tile< 96, FA_PLAIN, false> {};
template <fa_variant V> struct forward_tile<128, V, false>        : forward_row<128,  32, 2, 4, 2> {};      /*  64; 64 keys spill */
template <> struct forward_tile<128, FA_PLAIN, false>             : forward_row<128,  64, 2, 4, 2> {};      /*  96 */
template <fa_variant V> struct forward_tile<192, V, false>        : forward_row< 64,  64, 1, 4, 2> {};      /*  72 */
template <fa_variant V> struct forward_tile<256, V, false>        : forward_row< 64,  64, 1, 4, 2> {};      /*  96 */

/* Backward. Q_WARPS warps share keys, see backward.cuh; dQ is worked out 8 DQ_STEP channels at a time. */
template <int D, fa_variant V, bool SMALL> struct backward_tile : backward_tile<D, V, false> {};
template <int BM, int BN, int S, int W, int QW, int DQ, int B> struct backward_row {
    enum { BLOCK_M = BM, BLOCK_N = BN, STAGES = S, WARPS = W, Q_WARPS = QW, DQ_STEP = DQ, BLOCKS = B };
};
/*                                                              BLOCK_M  BLOCK_N  STAGES  WARPS  Q_WARPS  DQ_STEP  BLOCKS      KB */
template <fa_variant V> struct backward_tile< 32, V, false>        : backward_row< 64, 64, 2, 4, 1, 2, 2> {};
template <fa_variant V> struct backward_tile< 64, V, false>        : backward_row< 64, 64, 2, 4, 2, 4, 2> {};
template <>             struct backward_tile< 64, FA_PLAIN, false> : backward_row< 32, 128, 2, 4, 1, 2, 2> {};
template <>             struct backward_tile< 64, FA_PLAIN_DROPOUT, false> : backward_tile< 64, FA_PLAIN, false> {};
template <fa_variant V> struct backward_tile< 96, V, false>        : backward_row< 64, 32, 2, 4, 2, 6, 2> {};
template <>             struct backward_tile< 96, FA_PLAIN, false> : backward_row< 64, 64, 2, 4, 2, 6, 2> {};
template <>             struct backward_tile< 96, FA_PLAIN_DROPOUT, false> : backward_tile< 96, FA_PLAIN, false> {};
template <fa_variant V> struct backward_tile<128, V, false>        : backward_row< 64, 64, 2, 8, 4, 4, 1> {};  /* 113 */
template <>             struct backward_tile<128, FA_PLAIN, false> : backward_row< 64, 128, 2, 8, 2, 4, 1> {}; /* 161 */
template <>             struct backward_tile<128, FA_PLAIN_DROPOUT, false> : backward_tile<128, FA_PLAIN, false> {};
template <fa_variant V> struct backward_tile<192, V, false>        : backward_row< 64, 64, 2, 8, 4, 6, 1> {};  /* 161 */
template <fa_variant V> struct backward_tile<256, V, false>        : backward_row< 64, 64, 2, 8, 4, 4, 1> {};  /* 209 */
template <fa_variant V> struct backward_tile<128, V, true>         : backward_row< 32, 64, 2, 4, 2, 4, 2> {};
template <fa_variant V> struct backward_tile<192, V, true>         : backward_row< 32, 32, 1, 4, 2, 6, 1> {};
template <fa_variant V> struct backward_tile<256, V, true>         : backward_row< 32, 32, 1, 4, 2, 4, 1> {};

/* fp32. A warp has 16 or 32 queries forward, 16 keys backward; see fp32_backward.cuh for D = 256. SPLIT: tiles that every warp
 * reads lie split in shared memory, see fp32.cuh. */
template <int D, bool SMALL> struct fp32_forward_tile : fp32_forward_tile<D, false> {};
template <int D, bool SMALL> struct fp32_backward_tile : fp32_backward_tile<D, false> {};
template <int BM, int BN, bool S, int W, int B> struct fp32_row { enum { BLOCK_M = BM, BLOCK_N = BN, SPLIT = S, WARPS = W, BLOCKS = B }; };
/*                                                BLOCK_M  BLOCK_N  SPLIT  WARPS  BLOCKS      KB */
template <> struct fp32_forward_tile< 64, false>  : fp32_row<128,  32, true,  4, 2> {};     /*  64 */
template <> struct fp32_forward_tile<128, false>  : fp32_row<128,  64, true,  8, 1> {};     /* 192 */
template <> struct fp32_forward_tile<128, true>   : fp32_row< 64,  64, false, 4, 2> {};     /*  96; 128 x 32 spills */
template <> struct fp32_forward_tile<256, false>  : fp32_row< 64,  16, false, 4, 2> {};     /*  96 */
template <> struct fp32_backward_tile< 64, false> : fp32_row< 64,  64, true,  4, 2> {};     /*  97 */
template <> struct fp32_backward_tile< 64, true>  : fp32_row< 64,  64, false, 4, 2> {};     /*  65 */
template <> struct fp32_backward_tile<128, false> : fp32_row< 32, 128, true,  8, 1> {};     /* 192 */
template <> struct fp32_backward_tile<128, true>  : fp32_row< 32,  64, false, 4, 2> {};     /*  97 */
template <> struct fp32_backward_tile<256, false> : fp32_row< 16,  32, false, 4, 2> {};     /*  97 */

#endif
