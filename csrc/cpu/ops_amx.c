/* cpu/ops_amx.c: bfloat16 attention on Intel's tile unit (AMX-BF16), with AVX-512 for everything between the products.
 *
 * A tile is 16 rows of 64 bytes. One instruction adds A (16 x 32 bfloat16) B (32 x 16, in pairs) to C (16 x 16 fp32). 2 x 2
 * tiles of C stay in registers over the inner dimension, so that four loads feed four products. The unit reads subnormal
 * bfloat16 as 0.
 *
 * Measured on one core of a Xeon that reaches 2480 GFLOP/s in registers, 2200 with the loads:
 *     S = Q K^T, 32 x 256      d 64: 940, d 128: 1640: storing a tile of C takes as long as a product
 *     a strip of the forward   d 64: 660, d 128: 1030, where the softmax takes 0.16 ns a score of 0.39 and 0.50
 *     sum_rows by rows         32: 400, 128: 1200, 256: 1500: the sums go in and out once for all of them
 * Neither 1 x 4, 4 x 1 nor tiles of A that stay, nor stores put off by a tile, make S faster. Whole calls do not tell blocks of
 * 64 to 256 rows by 128 to 512 keys apart: geometric means differ by 10 %, the order changes with threads and pass. */
#ifdef __x86_64__
#define _GNU_SOURCE                                     /* syscall */
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,xsave,prefer-vector-width=512")
#include "lanes_avx512.h"
#include "ops_bf16.h"

enum { ROW_BYTES = 64 };

/* Tiles 0..3 are C, 4 and 5 rows of A, 6 and 7 panels of B. */
INLINE void product_tile(const bool two, float *c, int64_t c_row, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_step,
                         int64_t b_panel, int64_t steps, bool accumulate)
{
    const int64_t c_bytes = 4 * c_row, a_bytes = 2 * a_row;
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + TILE, c_bytes);
        if (two) _tile_loadd(2, c + TILE * c_row, c_bytes);
        if (two) _tile_loadd(3, c + TILE * c_row + TILE, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++, a += K_STEP, b += b_step) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, ROW_BYTES);
        _tile_loadd(7, b + b_panel, ROW_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, a + TILE * a_row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + TILE, c_bytes);
    if (two) _tile_stored(2, c + TILE * c_row, c_bytes);
    if (two) _tile_stored(3, c + TILE * c_row + TILE, c_bytes);
}

static void gemm_bf16(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate)
{
    const int64_t steps = (k + K_STEP - 1) / K_STEP, b_step = K_STEP * b.row;
    __asm__ volatile("" ::: "memory");                          /* tile loads do not tell the compiler what they read */
    for (int64_t j = 0; j < n; j += 2 * TILE) {
        const bf16 *panel = (const bf16 *)b.ptr + j / TILE * b.panel;
        int64_t i = 0;
        for (; i + TILE < m; i += 2 * TILE)
            product_tile(true, c.ptr + i * c.row + j, c.row, (const bf16 *)a.ptr + i * a.row, a.row, panel, b_step, b.panel, steps,
                         accumulate);
        if (i < m)
            product_tile(false, c.ptr + i * c.row + j, c.row, (const bf16 *)a.ptr + i * a.row, a.row, panel, b_step, b.panel, steps,
                         accumulate);
    }
}

/* Eight whole tiles. In memory for good: the compiler believes that the instruction reads eight bytes of it, and would leave
 * out what fills the rest of a local one. */
static const struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } whole_tiles = {
    .palette = 1, .row_bytes = { 64, 64, 64, 64, 64, 64, 64, 64 }, .rows = { TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE },
};

static void enter(void)
{
    _tile_loadconfig(&whole_tiles);
}

static void leave(void)
{
    _tile_release();                                            /* or the kernel saves 8 KB at each switch of this thread */
}

/* The unit is there, the system saves its state, and this process may use it: asked for once. */
bool fa_cpu_amx_usable(void)
{
#ifdef FA_AMX_EMULATED
    return true;
#else
    enum { UNKNOWN, NO, YES, TILE_DATA = 18, REQUEST_PERMISSION = 0x1023 };
    static int usable;
    int known = __atomic_load_n(&usable, __ATOMIC_RELAXED);
    if (known == UNKNOWN) {
        unsigned a, b, c, d;
        const unsigned features = 1u << 22 | 1u << 24, saved = 1u << 17 | 1u << 18;       /* AMX-BF16, AMX-TILE; their state */
        known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & features) == features && __builtin_cpu_supports("avx512bf16")
                && (_xgetbv(0) & saved) == saved && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? YES : NO;
        __atomic_store_n(&usable, known, __ATOMIC_RELAXED);
    }
    return known == YES;
#endif
}

const struct fa_cpu_ops fa_cpu_ops_amx =
    FA_CPU_OPS_TABLE_BF16("amx", .forward = { 128, 256, 32 }, .backward = { 128, 256, 32 }, .enter = enter, .leave = leave);
#endif
