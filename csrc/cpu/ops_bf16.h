/* cpu/ops_bf16.h: micro-kernels whose operands are bfloat16, for bfloat16 tensors: half the bytes, and products that take
 * pairs of them. A file that sets the lanes of lanes_avx512.h includes this, defines gemm_bf16, and fills its table.
 *
 * The right operand lies in tiles of 32 (inner) x 16: dword (p, j) = (B[2p][j], B[2p+1][j]). Which operand is a plain copy
 * and which is packed:
 *
 *     S = Q K^T      dP = dO V^T      Q, dO rows        K, V: dwords transposed, once per key block
 *     O = P V        dQ = dS K        P, dS rows        V, K: pairs of rows, once per key block
 *     dV^T = dO^T P  dK^T = Q^T dS    Q, dO transposed, once per block of S; P, dS: pairs of rows
 *
 * so that no part of S is ever transposed: softmax_backward rounds two rows at a time and writes what each product takes. */
#pragma GCC diagnostic ignored "-Wunused-function"      /* the fp32 operands */
#include "ops_simd.h"

enum {
    TILE = 16,                      /* rows, and dwords of a row */
    K_STEP = 32,                    /* bfloat16 of a row of A */
    TILE_ELEMENTS = TILE * K_STEP,
    AHEAD = 6,                      /* rows to prefetch */
};

typedef uint16_t bf16;

static void gemm_bf16(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate);

/* ------------------------------------------------------------------------------------------------------- packing */

INLINE __m512i load_part(const bf16 *p, int64_t n)              /* n of 32 elements, 0 beyond; reads no further */
{
    if (n >= K_STEP) return _mm512_loadu_si512(p);
    return n > 0 ? _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p) : _mm512_setzero_si512();
}

/* Rows of one head often lie a page apart, where the hardware does not prefetch. */
INLINE void prefetch_row(const bf16 *p, int64_t n)
{
    for (int64_t c = 0; c < n; c += K_STEP) __builtin_prefetch(p + c);
}

INLINE void transpose_dwords(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {                           /* r[i + c]: column c of each lane, of rows i .. i + 3 */
        r[i]     = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {                               /* lanes: a 4 x 4 transpose of 128-bit pieces */
        t[c]      = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44);
        t[4 + c]  = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xEE);
        t[8 + c]  = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xEE);
    }
    for (int c = 0; c < 4; c++) {
        r[c]      = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[4 + c]  = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xDD);
        r[8 + c]  = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xDD);
    }
}

/* Words of two rows side by side: columns 0..15 of both, and columns 16..31. */
INLINE __m512i pairs_low(__m512i even, __m512i odd)
{
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
}

INLINE __m512i pairs_high(__m512i even, __m512i odd)
{
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
}

static void load_rows_bf16(void *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n)
{
    (void)dtype;                                                /* bfloat16: fa_cpu_ops chose */
    const bf16 *from = src;
    for (bf16 *to = dst; rows > 0; rows--, to += ld, from += stride) {
        if (rows > AHEAD) prefetch_row(from + AHEAD * stride, n);
        for (int64_t c = 0; c < ld; c += K_STEP) _mm512_storeu_si512(to + c, load_part(from + c, n - c));
    }
}

/* Tiles (rows / 32, ld / 16); rows up to the next multiple of 32 are 0. */
static void load_right_bf16(void *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n)
{
    (void)dtype;
    const bf16 *from = src;
    for (bf16 *to = dst; rows > 0; rows -= K_STEP, to += K_STEP * ld, from += K_STEP * stride)
        for (int p = 0; p < TILE; p++) {
            if (rows > 2 * p + AHEAD + 1) {
                prefetch_row(from + (2 * p + AHEAD) * stride, n);
                prefetch_row(from + (2 * p + AHEAD + 1) * stride, n);
            }
            for (int64_t c = 0; c < ld; c += K_STEP) {
                const __m512i even = load_part(from + 2 * p * stride + c, 2 * p < rows ? n - c : 0);
                const __m512i odd = load_part(from + (2 * p + 1) * stride + c, 2 * p + 1 < rows ? n - c : 0);
                bf16 *row = to + c / TILE * TILE_ELEMENTS + p * K_STEP;
                _mm512_storeu_si512(row, pairs_low(even, odd));
                _mm512_storeu_si512(row + TILE_ELEMENTS, pairs_high(even, odd));
            }
        }
}

/* Panels of 16 rows, tiles (k / 32) in each; an even number of panels. */
static void pack_transposed_bf16(void *dst, const void *src, int64_t ld, int64_t rows, int64_t k)
{
    bf16 *to = dst;
    for (int64_t r0 = 0; r0 < (rows + K_STEP - 1) / K_STEP * K_STEP; r0 += TILE)
        for (int64_t c = 0; c < k; c += K_STEP, to += TILE_ELEMENTS) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = r0 + i < rows ? _mm512_loadu_si512((const bf16 *)src + (r0 + i) * ld + c) : _mm512_setzero_si512();
            transpose_dwords(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * K_STEP, r[i]);
        }
}

static void pack_columns(void *dst, int64_t ld, const void *src, int64_t src_ld, int64_t rows, int64_t k)
{
    for (int64_t r0 = 0; r0 < rows; r0 += K_STEP)
        for (int64_t c = 0; c < k; c += K_STEP) {
            __m512i low[16], high[16];
            for (int p = 0; p < 16; p++) {
                const bf16 *row = (const bf16 *)src + (r0 + 2 * p) * src_ld + c;
                const __m512i even = load_part(row, r0 + 2 * p < rows ? K_STEP : 0);
                const __m512i odd = load_part(row + src_ld, r0 + 2 * p + 1 < rows ? K_STEP : 0);
                low[p] = pairs_low(even, odd);
                high[p] = pairs_high(even, odd);
            }
            transpose_dwords(low);
            transpose_dwords(high);
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512((bf16 *)dst + (c + i) * ld + r0, low[i]);
                _mm512_storeu_si512((bf16 *)dst + (c + 16 + i) * ld + r0, high[i]);
            }
        }
}

/* ----------------------------------------------------------------------------------------------- sums over rows */

/* Transposed: C (channels, keys) = X^T (channels, rows) P (rows, keys). */
static void sum_rows_bf16(struct fa_result c, struct fa_left p, struct fa_left x, int64_t keys, int64_t channels, int64_t rows)
{
    gemm_bf16(c, x, (struct fa_right){ p.ptr, p.row, TILE_ELEMENTS }, channels, keys, rows, true);
}

static void store_sums_bf16(void *dst, enum fa_dtype dtype, int64_t stride, struct fa_result c, int64_t keys, int64_t n, float factor)
{
    float rows[TILE][FA_MAX_CHANNELS];
    for (int64_t j = 0; j < keys; j += TILE) {
        for (int64_t channel = 0; channel < n; channel += TILE) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(c.ptr + (channel + i) * c.row + j);
            transpose_dwords(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(&rows[i][channel], r[i]);
        }
        for (int64_t i = 0; i < TILE && j + i < keys; i++)
            store_row((bf16 *)dst + (j + i) * stride, dtype, rows[i], n, factor);
    }
}

/* ------------------------------------------------------------------------------------------------------- softmax */

/* 2^x for x <= 8: relative error 1e-4, below bfloat16's 2e-3; 2^-inf is 0, NaN stays. x = n + f, 0 <= f < 1. */
INLINE vf exp2_bf16(vf x)
{
    const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf q = broadcast(0.0780245466f);
    q = vfma(q, f, broadcast(0.226067177f));
    q = vfma(q, f, broadcast(0.695833487f));
    q = vfma(q, f, broadcast(0.999925232f));
    return (vf)_mm512_scalef_ps((__m512)q, (__m512)x);
}

INLINE __m512i round_two(vf low, vf high)
{
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* Beyond this a product's rounding is a power of two that shows, and x is worked out as (s - reference) scale. */
static const float EXACT_FROM = 0x1p20f;

INLINE float softmax_row(const bool exact, const float *s, int64_t n, float scale, float reference, const float *z, bf16 *p)
{
    const vf shift = broadcast(exact ? reference : -reference * scale), c = broadcast(scale);
    vf sum0 = broadcast(0), sum1 = broadcast(0);
    for (int64_t j = 0; j < n; j += 2 * VL) {
        const vf s0 = load(s + j), s1 = load(s + j + VL);
        vf p0 = exp2_bf16(exact ? (s0 - shift) * c : vfma(s0, c, shift));
        vf p1 = exp2_bf16(exact ? (s1 - shift) * c : vfma(s1, c, shift));
        sum0 = sum0 + p0;
        sum1 = sum1 + p1;
        if (z) {
            p0 = p0 * load(z + j);
            p1 = p1 * load(z + j + VL);
        }
        _mm512_storeu_si512(p + j, round_two(p0, p1));
    }
    return sum_of(sum0 + sum1);
}

/* The reference follows the maximum only when a score exceeds it by 8 in the exponent: P stays below 2^8, and rows of O
 * are seldom rescaled. */
static void online_softmax_bf16(struct fa_result s, int64_t rows, int64_t n, float scale, float *max, float *sum,
                               struct fa_result o, int64_t channels, const float *z, void *p)
{
    const float slack = 8 / scale;
    bf16 *p_row = p;
    for (int64_t r = 0; r < rows; r++, s.ptr += s.row, o.ptr += o.row, p_row += s.row) {
        vf top = load(s.ptr);
        for (int64_t j = VL; j < n; j += VL) top = vmax(top, load(s.ptr + j));
        if (_mm512_cmp_ps_mask((__m512)top, _mm512_set1_ps(max[r] + slack), _CMP_NLE_UQ)) {
            const float block_max = max_of(top);
            const float alpha = exp2_of(broadcast((max[r] - block_max) * scale))[0];       /* 0 for the first block */
            scale_rows((struct fa_result){ o.ptr, o.row }, 1, channels, alpha);
            sum[r] *= alpha;
            max[r] = block_max;
        }
        const float reference = max[r] == -__builtin_inff() ? 0 : max[r];                  /* no visible key yet: every p is 0 */
        const bool exact = !(__builtin_fabsf(reference * scale) < EXACT_FROM);
        sum[r] += exact ? softmax_row(true, s.ptr, n, scale, reference, z, p_row)
                : z     ? softmax_row(false, s.ptr, n, scale, reference, z, p_row)
                        : softmax_row(false, s.ptr, n, scale, reference, NULL, p_row);
        if (z) z += s.row;
    }
}

/* Two rows of 16 words each, in the halves of x, side by side. */
INLINE __m512i interleave_halves(__m512i x)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, x);
}

struct gradient_row {
    const float *s, *dp, *z, *d;
    float lse, shift, delta;
    float *ds;                                                  /* where dS goes before it is rounded, or NULL */
    const void *bias;
    enum fa_dtype dtype;
    const uint8_t *mask;
};

/* A score's exponent before its row's shift: with its bias, and where the mask hides it -inf. */
INLINE vf with_terms(vf x, float scale, const void *bias, enum fa_dtype dtype, const uint8_t *mask, int64_t j)
{
    if (bias) x = vfma(load_as(bias, dtype, j), broadcast(scale), x);
    return mask ? (vf)_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), _mm_test_epi8_mask(_mm_loadu_si128((const __m128i *)(mask + j)), _mm_set1_epi8(-1)), (__m512)x) : x;
}

INLINE vf gradient_of(const struct gradient_row *row, bool exact, bool modified, int64_t j, float factor, float scale, vf *kept)
{
    const vf s = load(row->s + j), c = broadcast(scale);
    const vf shift = modified && !exact ? with_terms(broadcast(row->shift), scale, row->bias, row->dtype, row->mask, j) : broadcast(row->shift);
    vf p = exp2_bf16(exact ? vmin(broadcast(0), (s - broadcast(row->lse)) * c) : vfma(s, broadcast(factor), shift));
    vf g = load(row->dp + j);
    *kept = p;
    if (modified && row->z) {
        const vf mask = load(row->z + j);
        g = g * mask;
        *kept = p * mask;
    }
    g = (g - broadcast(row->delta)) * p;
    if (modified && row->ds) store(row->ds + j, g);
    if (modified && row->d) g = g * load(row->d + j);
    return g;
}

INLINE void two_rows(const bool exact, const bool modified, const struct gradient_row row[2], int64_t n, float factor, float scale,
                     bf16 *p, bf16 *ds, int64_t ds_row, bf16 *ds_sum)
{
    for (int64_t j = 0; j < n; j += VL, p += TILE_ELEMENTS, ds_sum += TILE_ELEMENTS) {
        vf kept[2], g[2];
        for (int i = 0; i < 2; i++) g[i] = gradient_of(&row[i], exact, modified, j, factor, scale, &kept[i]);
        const __m512i both = round_two(g[0], g[1]);
        _mm512_storeu_si512(p, interleave_halves(round_two(kept[0], kept[1])));
        _mm512_storeu_si512(ds_sum, interleave_halves(both));
        _mm256_storeu_si256((__m256i *)(ds + j), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i *)(ds + ds_row + j), _mm512_extracti64x4_epi64(both, 1));
    }
}

/* Row r of a strip of `rows`; beyond them one whose P and dS are 0. */
INLINE struct gradient_row gradient_row_at(struct fa_result s, struct fa_result dp, int64_t r, int64_t rows, float scale,
                                           const float *lse, const float *delta)
{
    const int64_t at = r < rows ? r : rows - 1;
    struct gradient_row row = { .s = s.ptr + at * s.row, .dp = dp.ptr + at * dp.row, .lse = lse[at], .shift = -lse[at] * scale, .delta = delta[at] };
    if (r >= rows) row.lse = __builtin_inff(), row.shift = -__builtin_inff(), row.delta = 0;
    return row;
}

/* p and ds_sum: tiles (rows / 32, row stride / 16); rows up to the next multiple of 32 are 0, as if their lse were infinite. */
INLINE void clear_pairs(struct fa_gradients t, int64_t rows, int64_t n, int64_t ld)
{
    for (int64_t r = (rows + 1) / 2 * 2; r % K_STEP; r += 2) {
        const int64_t tile_row = r / K_STEP * K_STEP * ld + r % K_STEP / 2 * K_STEP;
        for (int64_t j = 0; j < n; j += VL) {
            _mm512_storeu_si512((bf16 *)t.p + tile_row + j / TILE * TILE_ELEMENTS, _mm512_setzero_si512());
            _mm512_storeu_si512((bf16 *)t.ds_sum + tile_row + j / TILE * TILE_ELEMENTS, _mm512_setzero_si512());
        }
    }
}

static void softmax_backward_bf16(struct fa_result s, struct fa_result dp, int64_t rows, int64_t n, float scale,
                                 const float *lse, const float *delta, const float *z, const float *d, struct fa_gradients t)
{
    for (int64_t r = 0; r < rows; r += 2) {
        struct gradient_row row[2];
        bool exact = false;
        for (int i = 0; i < 2; i++) {
            const int64_t at = r + i < rows ? r + i : r;
            row[i] = gradient_row_at(s, dp, r + i, rows, scale, lse, delta);
            row[i].z = z ? z + at * s.row : NULL;
            row[i].d = d ? d + at * s.row : NULL;
            row[i].ds = t.keep_ds && r + i < rows ? dp.ptr + at * dp.row : NULL;
            exact |= !(__builtin_fabsf(row[i].shift) < EXACT_FROM) && row[i].lse != __builtin_inff();
        }
        const int64_t tile_row = r / K_STEP * K_STEP * s.row + r % K_STEP / 2 * K_STEP;
        bf16 *p = (bf16 *)t.p + tile_row, *ds_sum = (bf16 *)t.ds_sum + tile_row, *ds = (bf16 *)t.ds + r * s.row;
        if (exact) two_rows(true, true, row, n, scale, scale, p, ds, s.row, ds_sum);
        else if (z || d || t.keep_ds) two_rows(false, true, row, n, scale, scale, p, ds, s.row, ds_sum);
        else two_rows(false, false, row, n, scale, scale, p, ds, s.row, ds_sum);
    }
    clear_pairs(t, rows, n, s.row);
}

static float dot_bf16(const void *left, const void *right, int64_t n)
{
    const bf16 *x = left, *y = right;
    vf sum = broadcast(0);
    for (int64_t j = 0; j < n; j += VL) sum = vfma(load_bfloat16(x + j), load_bfloat16(y + j), sum);
    return sum_of(sum);
}

#define FA_CPU_OPS_TABLE_BF16(name, ...)                                                                                \
    {                                                                                                                    \
        .isa = name, .nr = TILE, .element = 2, .pad = K_STEP, .row_panel = TILE_ELEMENTS,                                \
        .load_rows = load_rows_bf16, .load_right = load_right_bf16, .pack_transposed = pack_transposed_bf16,             \
        .pack_columns = pack_columns, .store_row = store_row, .stream_rows = stream_rows, .gemm = gemm_bf16, .sum_rows = sum_rows_bf16,              \
        .store_sums = store_sums_bf16, .online_softmax = online_softmax_bf16, .softmax_backward = softmax_backward_bf16, \
        .softcap = softcap, .scale = scale_rows, .alibi_row = alibi_row, .multiply = multiply, .add_bias = add_bias,    \
        .apply_mask = apply_mask, .dot = dot_bf16, .sum = sum, .add_row = add_row, .dropout_piece = dropout_piece,       \
        __VA_ARGS__                                                                                                      \
    }
