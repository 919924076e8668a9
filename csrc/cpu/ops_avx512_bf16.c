/* cpu/ops_avx512_bf16.c: bfloat16 attention on vdpbf16ps, which adds the products of two pairs to each of sixteen lanes.
 *
 * AMD's Zen 5 starts two a cycle, so that a product runs at twice the rate of fp32 multiply-adds (573 against 283 GFLOP/s on
 * one core); Intel's cores run it at half of theirs, and are left to the fp32 table unless FLASH_ATTN_CPU_ISA asks.
 * The instruction reads subnormal bfloat16 as 0. */
#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#include "lanes_avx512.h"
#include "ops_bf16.h"

enum { TILE_M = 8, TILE_PANELS = 2 };                   /* 16 accumulators; 12 x 2, 6 x 4 and 4 x 4 are no faster */

/* Rows of A and C past the last belong to their padding. */
INLINE void product_tile(float *c, int64_t c_row, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_step, int64_t b_panel,
                         int64_t steps, bool accumulate)
{
    vf acc[TILE_M][TILE_PANELS];
    for (int i = 0; i < TILE_M; i++)
        for (int v = 0; v < TILE_PANELS; v++) acc[i][v] = accumulate ? load(c + i * c_row + v * VL) : broadcast(0);
    for (int64_t step = 0; step < steps; step++, a += K_STEP, b += b_step)
#pragma GCC unroll 4
        for (int p = 0; p < TILE; p++) {
            __m512i row[TILE_PANELS];
            for (int v = 0; v < TILE_PANELS; v++) row[v] = _mm512_loadu_si512(b + v * b_panel + p * K_STEP);
            for (int i = 0; i < TILE_M; i++) {
                int32_t pair;
                memcpy(&pair, a + i * a_row + 2 * p, sizeof pair);
                for (int v = 0; v < TILE_PANELS; v++)
                    acc[i][v] = (vf)_mm512_dpbf16_ps((__m512)acc[i][v], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)row[v]);
            }
        }
    for (int i = 0; i < TILE_M; i++)
        for (int v = 0; v < TILE_PANELS; v++) store(c + i * c_row + v * VL, acc[i][v]);
}

static void gemm_bf16(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate)
{
    const int64_t steps = (k + K_STEP - 1) / K_STEP;
    for (int64_t j = 0; j < n; j += TILE_PANELS * TILE)
        for (int64_t i = 0; i < m; i += TILE_M)
            product_tile(c.ptr + i * c.row + j, c.row, (const bf16 *)a.ptr + i * a.row, a.row,
                         (const bf16 *)b.ptr + j / TILE * b.panel, K_STEP * b.row, b.panel, steps, accumulate);
}

const struct fa_cpu_ops fa_cpu_ops_avx512_bf16 = FA_CPU_OPS_TABLE_BF16("avx512_bf16", .forward = { 128, 256, 32 }, .backward = { 128, 256, 32 });
#endif
