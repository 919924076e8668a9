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
#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,xsave,prefer-vector-width=512")
#include "lanes_avx512.h"
#include "ops_bf16.h"

enum { ROW_BYTES = 64 };

/* Tiles 0..3 are C, 4 and 5 rows of A, 6 and 7 panels of B. */
INLINE void clear_tiles(const bool two)
{
    _tile_zero(0);
    _tile_zero(1);
    if (two) _tile_zero(2);
    if (two) _tile_zero(3);
}

INLINE void product_step(const bool two, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_panel)
{
    const int64_t a_bytes = 2 * a_row;
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

INLINE void store_tiles(const bool two, float *c, int64_t c_row)
{
    const int64_t c_bytes = 4 * c_row;
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + TILE, c_bytes);
    if (two) _tile_stored(2, c + TILE * c_row, c_bytes);
    if (two) _tile_stored(3, c + TILE * c_row + TILE, c_bytes);
}

INLINE void product_tile(const bool two, float *c, int64_t c_row, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_step,
                         int64_t b_panel, int64_t steps, bool accumulate)
{
    const int64_t c_bytes = 4 * c_row;
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + TILE, c_bytes);
        if (two) _tile_loadd(2, c + TILE * c_row, c_bytes);
        if (two) _tile_loadd(3, c + TILE * c_row + TILE, c_bytes);
    } else {
        clear_tiles(two);
    }
    for (int64_t step = 0; step < steps; step++) product_step(two, a + step * K_STEP, a_row, b + step * b_step, b_panel);
    store_tiles(two, c, c_row);
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

/* ------------------------------------------------------------------------------------- products and softmax in one */

/* Q K^T and softmax by squares of 32 x 32 scores, which never leave L1: while the tile unit works on a square, the vector
 * units turn the one before it into P, a few rows between two steps of the product. No row's maximum is looked for: its
 * reference is one of its first scores, and follows only when a block's sum shows that it is far too low.
 *
 * One thread, S 512 and 2048, whole calls through torch, times the speed of products and softmax apart: forward d 64 1.10 to 1.21,
 * d 128 1.04 to 1.18; backward d 64 0.98 to 1.07, d 128 0.94 to 1.00. Where the square is stored and how finely the two are
 * interleaved is worth less than 5 % either way; benchmarks/results/cpu-tuning.md. */
enum { SQUARE = 2 * TILE };

enum { MOST_CHANNELS = 192 };           /* d + dv: with more the products of backward are better off alone */
static const float MOST_SUM = 0x1p10f;                          /* over a block: beyond it the reference follows */
static const float MOST_SHIFT = 0x1p12f;                        /* as a power of two: its rounding is to be nothing */

/* Lane i: the sum over x[i]. */
INLINE vf sums_of_rows(const vf x[TILE])
{
    __m512i r[TILE];
    vf sum = broadcast(0);
    for (int i = 0; i < TILE; i++) r[i] = (__m512i)x[i];
    transpose_dwords(r);
    for (int i = 0; i < TILE; i++) sum = sum + (vf)r[i];
    return sum;
}

/* Row r's terms from column j on: rows lie pages apart, and a square takes only a line of each. */
INLINE void prefetch_terms(const struct fa_score_terms *terms, int64_t r, int64_t j)
{
    if (terms->has_mask) __builtin_prefetch(terms->mask[r] + j);
    if (!terms->has_bias) return;
    const int64_t size = terms->dtype == FA_FLOAT32 ? 4 : 2;
    __builtin_prefetch((const char *)terms->bias[r] + j * size);
    if (size == 4) __builtin_prefetch((const char *)terms->bias[r] + j * size + 64);
}

enum { TERMS_AHEAD = 2 * SQUARE };      /* columns */

static void prefetch_first_terms(const struct fa_score_terms *terms, int64_t m)
{
    for (int64_t j = 0; j < TERMS_AHEAD; j += SQUARE)
        for (int64_t r = 0; r < m; r++) prefetch_terms(terms, r, j);
}

/* A row of a square. */
INLINE void probabilities(const float *s, vf factor, float scale, float shift, const struct fa_score_terms *terms, int64_t r,
                          int64_t j, vf *sum, bf16 *p)
{
    vf p0 = broadcast(shift), p1 = broadcast(shift);
    if (terms) {
        const void *bias = terms->has_bias ? terms->bias[r] : NULL;
        const uint8_t *mask = terms->has_mask ? terms->mask[r] : NULL;
        prefetch_terms(terms, r, j + TERMS_AHEAD);
        p0 = with_terms(p0, scale, bias, terms->dtype, mask, j);
        p1 = with_terms(p1, scale, bias, terms->dtype, mask, j + VL);
    }
    p0 = exp2_bf16(vfma(load(s), factor, p0));
    p1 = exp2_bf16(vfma(load(s + VL), factor, p1));
    *sum = *sum + (p0 + p1);
    _mm512_storeu_si512(p, round_two(p0, p1));
}

/* The largest score of a square's row. */
INLINE float row_max(const float *s, float factor, const struct fa_score_terms *terms, int64_t r)
{
    vf s0 = broadcast(0), s1 = broadcast(0);
    if (terms) {
        const void *bias = terms->has_bias ? terms->bias[r] : NULL;
        const uint8_t *mask = terms->has_mask ? terms->mask[r] : NULL;
        s0 = with_terms(s0, 1, bias, terms->dtype, mask, 0);
        s1 = with_terms(s1, 1, bias, terms->dtype, mask, VL);
    }
    return max_of(vmax(vfma(load(s), broadcast(factor), s0), vfma(load(s + VL), broadcast(factor), s1)));
}

/* A row whose sum over this block grew too large: P, sum and O down by a power of two, which rounds nothing, the reference up. */
static void lower_row(float *block, int64_t n, float scale, float *max, float *sum, float *o, int64_t channels, bf16 *p)
{
    int exponent;
    frexpf(*block, &exponent);
    const float factor = ldexpf(1, -exponent);
    for (int64_t j = 0; j < n; j += 2 * VL)
        _mm512_storeu_si512(p + j, round_two(load_bfloat16(p + j) * broadcast(factor), load_bfloat16(p + j + VL) * broadcast(factor)));
    scale_rows((struct fa_result){ o, 0 }, 1, channels, factor);
    *block *= factor;
    *sum *= factor;
    *max += (float)exponent / scale;
}

INLINE bool softmax_of_products(const bool two, struct fa_left q, struct fa_right k, int64_t m, int64_t n, int64_t d, float factor,
                                const struct fa_score_terms *terms, float scale, float *max, float *sum, struct fa_result o,
                                int64_t channels, struct fa_left p)
{
    float square[2][SQUARE * SQUARE] __attribute__((aligned(64)));
    float shift[SQUARE], block[SQUARE];
    vf sums[SQUARE] = {{0}};
    const int64_t steps = (d + K_STEP - 1) / K_STEP, b_step = K_STEP * k.row;
    bool first = false;
    if (terms) prefetch_first_terms(terms, m);
    for (int64_t r = 0; r < m; r++) first |= max[r] == -__builtin_inff();
    __asm__ volatile("" ::: "memory");                          /* tile loads do not tell the compiler what they read */
    if (first) {                                                /* the largest of a few scores is reference enough */
        product_tile(two, square[0], SQUARE, q.ptr, q.row, k.ptr, b_step, k.panel, steps, false);
        for (int64_t r = 0; r < m; r++)
            if (max[r] == -__builtin_inff()) max[r] = row_max(square[0] + r * SQUARE, factor, terms, r);
    }
    for (int64_t r = 0; r < m; r++) {
        shift[r] = -max[r] * scale;
        if (!(__builtin_fabsf(shift[r]) < MOST_SHIFT)) return false;
    }
    const int64_t rows = (m + steps - 1) / steps;               /* of softmax after a step */
    for (int64_t j = 0; j <= n; j += SQUARE) {                  /* this square's product, the softmax of the one before */
        const float *s = square[j / SQUARE % 2 ^ 1];
        const bf16 *b = (const bf16 *)k.ptr + j / TILE * k.panel;
        int64_t r = j > 0 ? 0 : m;
        if (j < n) clear_tiles(two);
        for (int64_t step = 0; step < steps; step++) {
            if (j < n) product_step(two, (const bf16 *)q.ptr + step * K_STEP, q.row, b + step * b_step, k.panel);
            for (const int64_t end = r + rows < m ? r + rows : m; r < end; r++)
                probabilities(s + r * SQUARE, broadcast(factor * scale), scale, shift[r], terms, r, j - SQUARE, &sums[r],
                              (bf16 *)p.ptr + r * p.row + j - SQUARE);
        }
        if (j < n) store_tiles(two, square[j / SQUARE % 2], SQUARE);
    }
    store(block, sums_of_rows(sums));
    store(block + TILE, sums_of_rows(sums + TILE));
    for (int64_t r = 0; r < m; r++)
        if (!(block[r] < __builtin_inff())) return false;
    for (int64_t r = 0; r < m; r++) {
        if (block[r] > MOST_SUM)
            lower_row(&block[r], n, scale, max + r, sum + r, o.ptr + r * o.row, channels, (bf16 *)p.ptr + r * p.row);
        sum[r] += block[r];
    }
    return true;
}

static bool softmax_of_products_amx(struct fa_left q, struct fa_right k, int64_t m, int64_t n, int64_t d, float factor,
                                    const struct fa_score_terms *terms, float scale, float *max, float *sum, struct fa_result o,
                                    int64_t channels, struct fa_left p)
{
    if (terms->has_bias || terms->has_mask)
        return m > TILE ? softmax_of_products(true, q, k, m, n, d, factor, terms, scale, max, sum, o, channels, p)
                        : softmax_of_products(false, q, k, m, n, d, factor, terms, scale, max, sum, o, channels, p);
    return m > TILE ? softmax_of_products(true, q, k, m, n, d, factor, NULL, scale, max, sum, o, channels, p)
                    : softmax_of_products(false, q, k, m, n, d, factor, NULL, scale, max, sum, o, channels, p);
}

INLINE bool gradients_of_products(const bool two, struct fa_left q, struct fa_right k, struct fa_left dout, struct fa_right v,
                                  int64_t m, int64_t n, int64_t d, int64_t dv, float factor, const struct fa_score_terms *terms,
                                  float scale, const float *lse, const float *delta, float *ds, struct fa_gradients t, int64_t ld)
{
    float squares[2][2][SQUARE * SQUARE] __attribute__((aligned(64)));      /* [which][S, dP] */
    const int64_t s_steps = (d + K_STEP - 1) / K_STEP, steps = s_steps + (dv + K_STEP - 1) / K_STEP;
    if (terms) prefetch_first_terms(terms, m);
    const int64_t bias_size = terms && terms->dtype != FA_FLOAT32 ? 2 : 4;
    for (int64_t r = 0; r < m; r++)
        if (!(__builtin_fabsf(lse[r] * scale) < EXACT_FROM) && lse[r] != __builtin_inff()) return false;
    __asm__ volatile("" ::: "memory");                          /* tile loads do not tell the compiler what they read */
    const int64_t rows = ((m + steps - 1) / steps + 1) / 2 * 2; /* of softmax after a step */
    for (int64_t j = 0; j <= n; j += SQUARE) {                  /* this square's products, the softmax of the one before */
        float (*const now)[SQUARE * SQUARE] = squares[j / SQUARE % 2], (*const before)[SQUARE * SQUARE] = squares[j / SQUARE % 2 ^ 1];
        int64_t r = j > 0 ? 0 : m;
        for (int64_t step = 0; step < steps; step++) {
            const bool is_s = step < s_steps;
            const struct fa_left a = is_s ? q : dout;
            const struct fa_right b = is_s ? k : v;
            const int64_t inner = is_s ? step : step - s_steps;
            if (j < n) {
                if (inner == 0) clear_tiles(two);
                product_step(two, (const bf16 *)a.ptr + inner * K_STEP, a.row,
                             (const bf16 *)b.ptr + j / TILE * b.panel + inner * K_STEP * b.row, b.panel);
                if (step == s_steps - 1) store_tiles(two, now[0], SQUARE);
                if (step == steps - 1) store_tiles(two, now[1], SQUARE);
            }
            for (const int64_t end = r + rows < m ? r + rows : m; r < end; r += 2) {
                struct gradient_row row[2];
                for (int64_t i = 0; i < 2; i++) {
                    row[i] = gradient_row_at((struct fa_result){ before[0], SQUARE }, (struct fa_result){ before[1], SQUARE }, r + i, m, scale,
                                             lse, delta);
                    const int64_t at = r + i < m ? r + i : r;
                    if (terms) prefetch_terms(terms, at, j - SQUARE + TERMS_AHEAD);
                    if (terms && terms->has_bias) row[i].bias = (const char *)terms->bias[at] + (j - SQUARE) * bias_size, row[i].dtype = terms->dtype;
                    if (terms && terms->has_mask) row[i].mask = terms->mask[at] + j - SQUARE;
                    if (ds && r + i < m) row[i].ds = ds + (r + i) * ld + j - SQUARE;
                }
                const int64_t at = r / K_STEP * K_STEP * ld + r % K_STEP / 2 * K_STEP + (j - SQUARE) / TILE * TILE_ELEMENTS;
                two_rows(false, terms, row, SQUARE, factor * scale, scale, (bf16 *)t.p + at, (bf16 *)t.ds + r * ld + j - SQUARE, ld,
                         (bf16 *)t.ds_sum + at);
            }
        }
    }
    clear_pairs(t, m, n, ld);
    return true;
}

static bool gradients_of_products_amx(struct fa_left q, struct fa_right k, struct fa_left dout, struct fa_right v, int64_t m, int64_t n,
                                      int64_t d, int64_t dv, float factor, const struct fa_score_terms *terms, float scale,
                                      const float *lse, const float *delta, float *ds, struct fa_gradients t, int64_t ld)
{
    if (d + dv > MOST_CHANNELS) return false;
    if (terms->has_bias || terms->has_mask)
        return m > TILE ? gradients_of_products(true, q, k, dout, v, m, n, d, dv, factor, terms, scale, lse, delta, ds, t, ld)
                        : gradients_of_products(false, q, k, dout, v, m, n, d, dv, factor, terms, scale, lse, delta, ds, t, ld);
    return m > TILE ? gradients_of_products(true, q, k, dout, v, m, n, d, dv, factor, NULL, scale, lse, delta, NULL, t, ld)
                    : gradients_of_products(false, q, k, dout, v, m, n, d, dv, factor, NULL, scale, lse, delta, NULL, t, ld);
}

/* ------------------------------------------------------------------------------------------------------ the unit */

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
    FA_CPU_OPS_TABLE_BF16("amx", .forward = { 128, 256, 32 }, .backward = { 128, 256, 32 }, .enter = enter, .leave = leave,
                          .softmax_of_products = softmax_of_products_amx, .gradients_of_products = gradients_of_products_amx);
#endif
