/* cpu/ops_simd.h: every micro-kernel, written once over a vector of VL floats. An ISA file sets its #pragma target,
 * defines VL lanes, NV vectors a panel, vf, vi and the few operations where intrinsics beat vector code, and includes this.
 *
 * Product: a 6 x NV tile of C stays in registers over the whole k loop; per k it costs NV loads, 6 broadcasts, 6 NV FMAs.
 *   AVX-512 (24 accumulators of 32): 185-192 GFLOP/s on a 3 GHz Xeon core; 8x2 172-183, 8x3 173-182, 4x4 165-173,
 *   14x2 182-198 but a tail of 14 rows. AVX2 (12 of 16): 6x2.
 * exp2: x = n + f, 2^f = 1 + f q(f) with q of degree 4, relative error 1e-7; results below 2^-126 are exactly 0.
 * Its argument is (s - max) scale, not one FMA of s: with scores of 1e12 the rounding of max scale would be the result. */

#include <string.h>
#include "ops.h"
#include "../common/convert.h"
#include "../common/philox.h"

enum { MR = 6, CHANNEL_PAD = 16 };
#define NR (NV * VL)

typedef uint32_t v32 __attribute__((vector_size(4 * VL)));
typedef float vf_unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE vf load(const float *p) { return (vf)*(const vf_unaligned *)p; }
INLINE void store(float *p, vf x) { *(vf_unaligned *)p = (vf_unaligned)x; }
INLINE vf abs_of(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* Lanes i and i ^ width change places. */
INLINE vf swap(vf x, int width)
{
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i ^ width;
    return __builtin_shuffle(x, lane);
}

INLINE float sum_of(vf x)
{
    if (VL > 8) x = x + swap(x, 8);
    if (VL > 4) x = x + swap(x, 4);
    x = x + swap(x, 2);
    return x[0] + x[1];
}

INLINE float max_of(vf x)
{
    if (VL > 8) x = vmax(x, swap(x, 8));
    if (VL > 4) x = vmax(x, swap(x, 4));
    x = vmax(x, swap(x, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

/* n and f with x = n + f, |f| <= 1/2, for |x| < 2^22; 2^n comes back as the float it is. NaN stays NaN in f. */
INLINE vf split(vf x, vf *power)
{
    const vf magic = broadcast(0x1.8p23f + 127);    /* the sum's low bits hold n + 127 */
    vf t = x + magic;
    *power = (vf)((vi)t << 23);
    return x - (t - magic);
}

/* 2^f - 1, relative error 1e-7 also near 0. */
INLINE vf exp2_minus_1(vf f)
{
    vf q = broadcast(0.00132647088f);
    q = vfma(q, f, broadcast(0.00967151147f));
    q = vfma(q, f, broadcast(0.0555073378f));
    q = vfma(q, f, broadcast(0.240222421f));
    q = vfma(q, f, broadcast(0.693146978f));
    return q * f;
}

/* 2^x for x <= 0, where rounding may have left it a little above. The constant is the first argument of max and min: a NaN
 * in x comes through. */
INLINE vf exp2_of(vf x)
{
    vf power, f = split(vmin(broadcast(0), vmax(broadcast(-127), x)), &power);
    return vfma(exp2_minus_1(f), power, power);
}

/* (e^2x - 1) / (e^2x + 1) without cancellation near 0. */
INLINE vf tanh_of(vf x)
{
    vf power, f = split(vmin(broadcast(30), abs_of(x) * broadcast(2.88539008f)), &power);
    vf expm1 = vfma(exp2_minus_1(f), power, power - broadcast(1));
    return (vf)((vi)(expm1 / (expm1 + broadcast(2))) | ((vi)x & INT32_MIN));
}

/* ------------------------------------------------------------------------------------------------ conversions */


/* The 64-bit products x m, as high and low words. */
INLINE void multiply_wide(v32 x, uint32_t m, v32 *high, v32 *low)
{
    const v64 even = multiply_even((v64)x, m), odd = multiply_even((v64)x >> 32, m);
    *high = (v32)((even >> 32) | (odd >> 32 << 32));
    *low = (v32)((even & 0xffffffff) | odd << 32);
}

INLINE vf load_bfloat16(const uint16_t *p)
{
    v16 x;
    memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, v32) << 16);
}

/* Round to nearest even; NaN becomes the quiet one. */
INLINE v16 to_bfloat16(vf x)
{
    v32 bits = (v32)x, nan = (v32)(x != x);
    v32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), v16);
}

INLINE void store_bfloat16(uint16_t *p, vf x)
{
    v16 half = to_bfloat16(x);
    memcpy(p, &half, sizeof half);
}

INLINE vf load_as(const void *src, enum fa_dtype dtype, int64_t at)
{
    if (dtype == FA_FLOAT32) return load((const float *)src + at);
    if (dtype == FA_FLOAT16) return load_half((const uint16_t *)src + at);
    return load_bfloat16((const uint16_t *)src + at);
}

INLINE void store_as(void *dst, enum fa_dtype dtype, int64_t at, vf x)
{
    if (dtype == FA_FLOAT32) store((float *)dst + at, x);
    else if (dtype == FA_FLOAT16) store_half((uint16_t *)dst + at, x);
    else store_bfloat16((uint16_t *)dst + at, x);
}

INLINE void load_rows_as(float *dst, int64_t ld, const char *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n)
{
    const int64_t size = dtype == FA_FLOAT32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++, dst += ld, src += stride * size) {
        /* Rows of one head often lie a page apart, where the hardware does not prefetch. */
        if (r + 4 < rows)
            for (int64_t line = 0; line < n * size; line += 64) __builtin_prefetch(src + 4 * stride * size + line);
        int64_t at = 0;
        for (; at + VL <= n; at += VL) store(dst + at, load_as(src, dtype, at));
        if (at < n) {
            float tail[VL] = {0};                               /* never read past the row's end */
            memcpy(tail, src + at * size, (n - at) * size);
            store(dst + at, load_as(tail, dtype, 0));
            at += VL;
        }
        for (; at < ld; at += VL) store(dst + at, broadcast(0));
    }
}

static void load_rows(void *dst, int64_t ld, const void *src, enum fa_dtype dtype, int64_t stride, int64_t rows, int64_t n)
{
    if (dtype == FA_FLOAT32) load_rows_as(dst, ld, src, FA_FLOAT32, stride, rows, n);
    else if (dtype == FA_FLOAT16) load_rows_as(dst, ld, src, FA_FLOAT16, stride, rows, n);
    else load_rows_as(dst, ld, src, FA_BFLOAT16, stride, rows, n);
}

INLINE void store_row_as(char *dst, enum fa_dtype dtype, const float *src, int64_t n, float factor)
{
    const int64_t size = dtype == FA_FLOAT32 ? 4 : 2;
    int64_t at = 0;
    for (; at + VL <= n; at += VL) store_as(dst, dtype, at, load(src + at) * broadcast(factor));
    if (at < n) {
        float tail[VL];
        store_as(tail, dtype, 0, load(src + at) * broadcast(factor));       /* src is padded */
        memcpy(dst + at * size, tail, (n - at) * size);
    }
}

static void store_row(void *dst, enum fa_dtype dtype, const float *src, int64_t n, float factor)
{
    if (dtype == FA_FLOAT32) store_row_as(dst, FA_FLOAT32, src, n, factor);
    else if (dtype == FA_FLOAT16) store_row_as(dst, FA_FLOAT16, src, n, factor);
    else store_row_as(dst, FA_BFLOAT16, src, n, factor);
}

static void stream_rows(void *dst, enum fa_dtype dtype, int64_t stride, struct fa_result src, int64_t rows, int64_t n)
{
    const int64_t size = dtype == FA_FLOAT32 ? 4 : 2;
    char *to = dst;
    for (int64_t r = 0; r < rows; r++, to += stride * size, src.ptr += src.row) {
        if (((uintptr_t)to | (uintptr_t)(n * size)) % (uintptr_t)(VL * size) || dtype == FA_FLOAT16)
            store_row(to, dtype, src.ptr, n, 1);
        else if (dtype == FA_FLOAT32)
            for (int64_t j = 0; j < n; j += VL) stream((float *)to + j, load(src.ptr + j));
        else
            for (int64_t j = 0; j < n; j += VL) stream_halves((uint16_t *)to + j, to_bfloat16(load(src.ptr + j)));
    }
    stream_end();
}

/* 4x4 blocks: four loads, eight shuffles, four stores for 16 elements. */
INLINE void transpose_4x4(float *dst, int64_t dst_ld, const float *const rows[4], int64_t column)
{
    typedef float v4 __attribute__((vector_size(16)));
    typedef float v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t i4 __attribute__((vector_size(16)));
    v4 r0 = (v4)*(const v4_unaligned *)(rows[0] + column), r1 = (v4)*(const v4_unaligned *)(rows[1] + column);
    v4 r2 = (v4)*(const v4_unaligned *)(rows[2] + column), r3 = (v4)*(const v4_unaligned *)(rows[3] + column);
    v4 low01 = __builtin_shuffle(r0, r1, (i4){ 0, 4, 1, 5 }), high01 = __builtin_shuffle(r0, r1, (i4){ 2, 6, 3, 7 });
    v4 low23 = __builtin_shuffle(r2, r3, (i4){ 0, 4, 1, 5 }), high23 = __builtin_shuffle(r2, r3, (i4){ 2, 6, 3, 7 });
    *(v4_unaligned *)(dst + 0 * dst_ld) = (v4_unaligned)__builtin_shuffle(low01, low23, (i4){ 0, 1, 4, 5 });
    *(v4_unaligned *)(dst + 1 * dst_ld) = (v4_unaligned)__builtin_shuffle(low01, low23, (i4){ 2, 3, 6, 7 });
    *(v4_unaligned *)(dst + 2 * dst_ld) = (v4_unaligned)__builtin_shuffle(high01, high23, (i4){ 0, 1, 4, 5 });
    *(v4_unaligned *)(dst + 3 * dst_ld) = (v4_unaligned)__builtin_shuffle(high01, high23, (i4){ 2, 3, 6, 7 });
}

/* Rows past the end are read from a row of zeros. k is rounded up to 4, inside the padding of src and of a panel. */
static void pack_transposed(void *panels, const void *operand, int64_t ld, int64_t rows, int64_t k)
{
    float *dst = panels;
    const float *src = operand;
    static const float zeros[FA_MAX_CHANNELS] = {0};
    const int64_t k_pad = (k + CHANNEL_PAD - 1) / CHANNEL_PAD * CHANNEL_PAD;
    for (int64_t r0 = 0; r0 < rows; r0 += NR, dst += k_pad * NR)
        for (int64_t r = r0; r < r0 + NR; r += 4)
            for (int64_t column = 0; column < k; column += 4) {
                const float *four[4];
                for (int64_t i = 0; i < 4; i++) four[i] = r + i < rows ? src + (r + i) * ld : zeros;
                transpose_4x4(dst + column * NR + r - r0, NR, four, column);
            }
}

/* ---------------------------------------------------------------------------------------------------- product */

/* C tile (m, nv VL): constants m, nv and transposed unroll it into registers. */
INLINE void gemm_tile(const int m, const int nv, const bool transposed, float *c, int64_t c_row, const float *a, int64_t a_stride,
                      const float *b, int64_t b_row, int64_t k, bool accumulate)
{
    vf acc[MR][NV];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < nv; v++) acc[i][v] = accumulate ? load(c + i * c_row + v * VL) : broadcast(0);
    const float *a_at[MR];
    for (int i = 0; i < m; i++) a_at[i] = transposed ? a + i : a + i * a_stride;
    for (int64_t p = 0; p < k; p++, b += b_row) {
        vf row[NV];
        for (int v = 0; v < nv; v++) row[v] = load(b + v * VL);
        for (int i = 0; i < m; i++) {
            vf x = broadcast(transposed ? a[p * a_stride + i] : a_at[i][p]);
            for (int v = 0; v < nv; v++) acc[i][v] = vfma(x, row[v], acc[i][v]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < nv; v++) store(c + i * c_row + v * VL, acc[i][v]);
}

INLINE void gemm_panel(const int nv, const bool transposed, float *c, int64_t c_row, const float *a, int64_t a_stride,
                       const float *b, int64_t b_row, int64_t m, int64_t k, bool accumulate)
{
    const int64_t step = transposed ? 1 : a_stride;
    int64_t i = 0;
#define ROWS(count)                                                                                                      \
    for (; i + count <= m; i += count)                                                                                   \
        gemm_tile(count, nv, transposed, c + i * c_row, c_row, a + i * step, a_stride, b, b_row, k, accumulate)
    ROWS(6);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}

INLINE void product(const bool transposed, struct fa_result c, const float *a, int64_t a_stride, const float *b, int64_t b_row,
                    int64_t b_panel, int64_t m, int64_t n, int64_t k, bool accumulate)
{
    for (int64_t j = 0; j < n; j += NR, c.ptr += NR, b += b_panel) {
        const int nv = n - j >= NR ? NV : (int)((n - j) / VL);
#define PANEL(vectors)                                                                                                   \
    case vectors: gemm_panel(vectors, transposed, c.ptr, c.row, a, a_stride, b, b_row, m, k, accumulate); break
        switch (nv) {
            PANEL(NV);
#if NV > 2
            PANEL(1);
            PANEL(2);
            PANEL(3);
#endif
        }
#undef PANEL
    }
}

static void gemm(struct fa_result c, struct fa_left a, struct fa_right b, int64_t m, int64_t n, int64_t k, bool accumulate)
{
    product(false, c, a.ptr, a.row, b.ptr, b.row, b.panel, m, n, k, accumulate);
}

static void sum_rows(struct fa_result c, struct fa_left p, struct fa_left x, int64_t keys, int64_t channels, int64_t rows)
{
    product(true, c, p.ptr, p.row, x.ptr, x.row, NR, keys, channels, rows, true);
}

static void store_sums(void *dst, enum fa_dtype dtype, int64_t stride, struct fa_result c, int64_t keys, int64_t n, float factor)
{
    const int64_t size = dtype == FA_FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < keys; j++)
        store_row((char *)dst + j * stride * size, dtype, c.ptr + j * c.row, n, factor);
}

/* ---------------------------------------------------------------------------------------------------- softmax */

static void scale_rows(struct fa_result s, int64_t rows, int64_t n, float factor)
{
    for (int64_t r = 0; r < rows; r++, s.ptr += s.row)
        for (int64_t j = 0; j < n; j += VL) store(s.ptr + j, load(s.ptr + j) * broadcast(factor));
}

static void online_softmax(struct fa_result s, int64_t rows, int64_t n, float scale, float *max, float *sum,
                           struct fa_result o, int64_t channels, const float *z, void *p)
{
    (void)p;                                                    /* S itself */
    for (int64_t r = 0; r < rows; r++, s.ptr += s.row, o.ptr += o.row) {
        vf top = load(s.ptr);
        for (int64_t j = VL; j < n; j += VL) top = vmax(top, load(s.ptr + j));
        const float block_max = max_of(top);
        if (!(block_max <= max[r])) {                      /* a new maximum, or NaN */
            float alpha = exp2_of(broadcast((max[r] - block_max) * scale))[0];     /* 0 for the first block */
            scale_rows((struct fa_result){ o.ptr, o.row }, 1, channels, alpha);
            sum[r] *= alpha;
            max[r] = block_max;
        }
        const float shift = max[r] == -__builtin_inff() ? 0 : max[r];             /* no visible key yet: every p is 0 */
        vf row_sum = broadcast(0);
        for (int64_t j = 0; j < n; j += VL) {
            vf e = exp2_of((load(s.ptr + j) - broadcast(shift)) * broadcast(scale));
            store(s.ptr + j, z ? e * load(z + j) : e);
            row_sum = row_sum + e;
        }
        sum[r] += sum_of(row_sum);
        if (z) z += s.row;
    }
}

INLINE void softmax_backward_rows(struct fa_result s, struct fa_result dp, int64_t rows, int64_t n, float scale,
                                  const float *lse, const float *delta, const float *z, const float *d)
{
    for (int64_t r = 0; r < rows; r++) {
        float *s_row = s.ptr + r * s.row, *dp_row = dp.ptr + r * dp.row;
        for (int64_t j = 0; j < n; j += VL) {
            vf p = exp2_of((load(s_row + j) - broadcast(lse[r])) * broadcast(scale));
            vf g = load(dp_row + j), kept = p;
            if (z) {
                vf mask = load(z + r * s.row + j);
                g = g * mask;
                kept = p * mask;
            }
            g = (g - broadcast(delta[r])) * p;
            if (d) g = g * load(d + r * s.row + j);
            store(s_row + j, kept);
            store(dp_row + j, g);
        }
    }
}

static void softmax_backward(struct fa_result s, struct fa_result dp, int64_t rows, int64_t n, float scale,
                             const float *lse, const float *delta, const float *z, const float *d, struct fa_gradients t)
{
    (void)t;                                                    /* S and dP themselves */
    if (!z && !d) softmax_backward_rows(s, dp, rows, n, scale, lse, delta, NULL, NULL);
    else softmax_backward_rows(s, dp, rows, n, scale, lse, delta, z, d);
}

/* ------------------------------------------------------------------------------------------------- score rows */

static void softcap(struct fa_result s, int64_t rows, int64_t n, float inner, float outer, float *derivative)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j += VL) {
            vf t = tanh_of(load(s.ptr + r * s.row + j) * broadcast(inner));
            store(s.ptr + r * s.row + j, t * broadcast(outer));
            if (derivative) store(derivative + r * s.row + j, vfma(-t, t, broadcast(1)));
        }
}

static void multiply(struct fa_result s, int64_t rows, int64_t n, const float *z)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j += VL)
            store(s.ptr + r * s.row + j, load(s.ptr + r * s.row + j) * load(z + r * s.row + j));
}

static void alibi_row(float *s, int64_t n, float slope, float distance)
{
    vf lane;
    for (int i = 0; i < VL; i++) lane[i] = (float)i;
    for (int64_t j = 0; j < n; j += VL) {
        vf gap = abs_of(broadcast(distance - (float)j) - lane);
        store(s + j, vfma(broadcast(-slope), gap, load(s + j)));
    }
}

INLINE void add_bias_as(struct fa_result s, int64_t rows, int64_t n, float factor, const char *bias, enum fa_dtype dtype, int64_t stride)
{
    const int64_t size = dtype == FA_FLOAT32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++, s.ptr += s.row, bias += stride * size) {
        if (r + 4 < rows)                                       /* rows lie pages apart */
            for (int64_t line = 0; line < n * size; line += 64) __builtin_prefetch(bias + 4 * stride * size + line);
        int64_t j = 0;
        for (; j + VL <= n; j += VL) store(s.ptr + j, vfma(load(s.ptr + j), broadcast(factor), load_as(bias, dtype, j)));
        if (j < n) {
            float tail[VL] = {0};                               /* never read past the row's end */
            memcpy(tail, bias + j * size, (n - j) * size);
            store(s.ptr + j, vfma(load(s.ptr + j), broadcast(factor), load_as(tail, dtype, 0)));
        }
    }
}

static void add_bias(struct fa_result s, int64_t rows, int64_t n, float factor, const void *bias, enum fa_dtype dtype, int64_t stride)
{
    if (dtype == FA_FLOAT32) add_bias_as(s, rows, n, factor, bias, FA_FLOAT32, stride);
    else if (dtype == FA_FLOAT16) add_bias_as(s, rows, n, factor, bias, FA_FLOAT16, stride);
    else add_bias_as(s, rows, n, factor, bias, FA_BFLOAT16, stride);
}

INLINE void mask_vector(float *s, const uint8_t *mask)
{
    const vi hidden = load_bytes(mask) == 0, infinite = (vi)broadcast(-__builtin_inff());
    store(s, (vf)(((vi)load(s) & ~hidden) | (infinite & hidden)));
}

static void apply_mask(struct fa_result s, int64_t rows, int64_t n, const uint8_t *mask, int64_t stride)
{
    for (int64_t r = 0; r < rows; r++, s.ptr += s.row, mask += stride) {
        if (r + 8 < rows)
            for (int64_t line = 0; line < n; line += 64) __builtin_prefetch(mask + 8 * stride + line);
        int64_t j = 0;
        for (; j + VL <= n; j += VL) mask_vector(s.ptr + j, mask + j);
        if (j < n) {
            uint8_t tail[VL] = {0};
            memcpy(tail, mask + j, n - j);
            mask_vector(s.ptr + j, tail);
        }
    }
}

static float dot(const void *left, const void *right, int64_t n)
{
    const float *x = left, *y = right;
    vf sum = broadcast(0);
    for (int64_t j = 0; j < n; j += VL) sum = vfma(load(x + j), load(y + j), sum);
    return sum_of(sum);
}

static float sum(const float *x, int64_t n)
{
    vf total = broadcast(0);
    for (int64_t j = 0; j < n; j += VL) total = total + load(x + j);
    return sum_of(total);
}

static void add_row(float *to, const float *x, const float *y, int64_t n)
{
    int64_t j = 0;
    for (; j + VL <= n; j += VL) store(to + j, load(x + j) + load(y + j));
    for (; j < n; j++) to[j] = x[j] + y[j];
}

/* ---------------------------------------------------------------------------------------------------- dropout */

/* VL Philox calls side by side, counting up from `counter`: common/philox.h in vectors. */
INLINE void philox_calls(v32 word[4], uint64_t seed, struct fa_philox counter)
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < VL; i++) word[0][i] = counter.word[0] + (uint32_t)i;
    for (int w = 1; w < 4; w++) word[w] = (v32){0} + counter.word[w];
    for (int round = 0; round < 7; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        v32 high0, low0, high1, low1;
        multiply_wide(word[0], 0xD2511F53u, &high0, &low0);
        multiply_wide(word[2], 0xCD9E8D57u, &high1, &low1);
        word[0] = high1 ^ word[1] ^ key0;
        word[1] = low1;
        word[2] = high0 ^ word[3] ^ key1;
        word[3] = low0;
    }
}

/* Words 2 (i & 1) and 2 (i & 1) + 1 of groups 4 (i >> 1 & 3) + 0..3, interleaved, are the columns of row i in order:
 * one byte of each for columns 0..7, the next byte for columns 8..15. */
static void dropout_piece(float *z, uint64_t seed, uint64_t offset, uint32_t batch_head, uint32_t piece_i, uint32_t piece_j,
                          int keep256, float kept)
{
    typedef uint32_t v8 __attribute__((vector_size(32)));
    typedef int32_t v8_signed __attribute__((vector_size(32)));
    typedef uint32_t v8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
    uint32_t pairs[2][4][8];                                    /* [i & 1][i >> 1 & 3][column] */
    for (uint32_t group = 0; group < 16; group += VL) {
        v32 word[4];
        philox_calls(word, seed, fa_dropout_counter(offset, batch_head, piece_i, piece_j, group));
        for (int odd = 0; odd < 2; odd++) {
            uint64_t both[VL];
            for (int i = 0; i < VL; i++) both[i] = word[2 * odd][i] | (uint64_t)word[2 * odd + 1][i] << 32;
            memcpy(pairs[odd][group / 4], both, sizeof both);
        }
    }
    uint32_t kept_bits;
    memcpy(&kept_bits, &kept, sizeof kept_bits);
    for (int i = 0; i < FA_PIECE; i++) {
        const v8 columns = *(const v8_unaligned *)pairs[i & 1][i >> 1 & 3] >> 16 * (i >> 3);
        const v8_signed left = (v8_signed)(columns & 255) < keep256, right = (v8_signed)(columns >> 8 & 255) < keep256;
        *(v8_unaligned *)(z + FA_PIECE * i)     = (v8_unaligned)((v8)left & kept_bits);
        *(v8_unaligned *)(z + FA_PIECE * i + 8) = (v8_unaligned)((v8)right & kept_bits);
    }
}

/* Blocks have multiples of the product's 6 rows. Measured at S 512 and 1k, d 64 and 128, one Xeon core:
 *   forward     192 x 128 (S 96 KB) 161-176 GFLOP/s; 96 x 128 161-171; 96 x 192 144-169; 48 x 192 140-158
 *   backward    96 x 192 (P and dS 144 KB) 163-187; 96 x 256 181-191 but fewer items; 96 x 128 184-186 */
#define FA_CPU_OPS_TABLE(name)                                                                                           \
    {                                                                                                                    \
        .isa = name, .nr = NR, .element = 4, .pad = CHANNEL_PAD, .row_panel = NR,                                        \
        .forward = { 192, 128, 192 }, .backward = { 96, 192, 96 },                                                       \
        .load_rows = load_rows, .load_right = load_rows, .pack_transposed = pack_transposed, .store_row = store_row,     \
        .stream_rows = stream_rows,                                                                                      \
        .gemm = gemm, .sum_rows = sum_rows, .store_sums = store_sums, .online_softmax = online_softmax,                  \
        .softmax_backward = softmax_backward, .softcap = softcap, .scale = scale_rows, .alibi_row = alibi_row,           \
        .multiply = multiply, .add_bias = add_bias, .apply_mask = apply_mask, .dot = dot, .sum = sum,                    \
        .add_row = add_row, .dropout_piece = dropout_piece,                                                                                  \
    }
