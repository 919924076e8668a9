/* cuda/sm80/fp32.cuh: products accurate to fp32 on the tensor cores, and the tiles of fp32 rows that feed them.
 *
 *     x = big + small         big: x rounded to the 11 bits of tf32; small = x - big, exact
 *     a b ~ small_a big_b + big_a small_b + big_a big_b        what is left out is below 2^-22 a b
 *
 * tf32 ends where fp32's subnormal numbers have 13 bits more, so the tensor cores see 2^13 small: what x has below big is above
 * their last bit then, down to the smallest x.
 * Tensor cores round sums towards zero, a bias that grows with their number: summed there throughout, 130 keys could cost 16 eps
 * instead of 2. So they sum 16 products at a time, small terms first, and fp32 adds, rounded to nearest, carry these sums on.
 *
 * A tile is ROWS rows of D floats, D / 4 chunks of 16 bytes. Lane (g, t) = (l / 4, l % 4) reads a chunk at a time, two ways:
 *
 *     by rows         the contraction runs along a row: row g, chunk t of each four                            Q, K of Q K^T
 *     by columns      the contraction runs down the rows: rows 2t, 2t + 1, chunk g / 2 + 4 (g % 2) of each eight      V of P V
 *
 * Within a contraction any order will do, if left and right operand have the same. By rows, a lane's four floats are its slots t
 * and t + 4 of two k-steps. Down the rows, 2t and 2t + 1 are its slots t and t + 4, so accumulators are left operands as they
 * stand. By columns, column 4t + 16 (e % 2) + j of 32 is element e of accumulator j: four accumulators hold 16 bytes of a row.
 * Chunk c of row r lies at chunk c ^ (r / 2 % 4 + 4 (r % 2)): the eight lanes that read at once then touch every bank once. */
#ifndef FA_SM80_FP32_CUH
#define FA_SM80_FP32_CUH

#include "../bias.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "config.h"
#include "instance.cuh"

/* --------------------------------------------------------------------------------------------------- operands */

constexpr float SMALL_FACTOR = 8192.0f;

struct left_operand  { uint32_t big[2][4], small[2][4]; };      /* (16, 16): two k-steps of eight */
struct right_operand { uint32_t big[2][2], small[2][2]; };      /* (16, 8) */

/* Rounded by hand: cvt.rna.tf32 takes two instructions more for Inf and NaN, and would again for `small`. That has up to 12 bits,
 * of which mma reads 11: the error is at most the last bit of x. CUT, not rounded, gives both parts the sign of x at the price of
 * two bits: where products overflow, the parts' products are then infinities of one sign, not a NaN or the wrong infinity. */
template <bool CUT = false> FA_DEVICE void split(float x, uint32_t &big, uint32_t &small)
{
    big = (__float_as_uint(x) + (CUT ? 0 : 0x1000)) & 0xffffe000;
    small = __float_as_uint((x - __uint_as_float(big)) * (CUT ? 1.0f : SMALL_FACTOR));
}

/* C (16, 8) += A (16, 16) B (16, 8) */
template <bool CUT = false> FA_DEVICE void multiply(float (&c)[4], const left_operand &a, const right_operand &b)
{
    float sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    #pragma unroll
    for (int k = 0; k < 2; k++) mma_tf32(sum, a.small[k], b.big[k]);
    #pragma unroll
    for (int k = 0; k < 2; k++) mma_tf32(sum, a.big[k], b.small[k]);
    #pragma unroll
    for (int e = 0; e < 4; e++) sum[e] *= CUT ? 1.0f : 1.0f / SMALL_FACTOR;
    #pragma unroll
    for (int k = 0; k < 2; k++) mma_tf32(sum, a.big[k], b.big[k]);
    #pragma unroll
    for (int e = 0; e < 4; e++) c[e] += sum[e];
}

/* Whether a lane of the warp holds an infinity or a NaN: from the data, or from products that overflow. */
template <int MT, int NT> FA_DEVICE bool warp_overflows(const float (&c)[MT][NT][4])
{
    bool does = false;
    #pragma unroll
    for (int n = 0; n < MT * NT; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) does |= !(fabsf(c[n / NT][n % NT][e]) < INFINITY);
    return __any_sync(0xffffffff, does);
}

/* Accumulators of 16 columns as the left operand of a product that sums over these columns. */
FA_DEVICE void left_of(left_operand &a, const float (&c0)[4], const float (&c1)[4])
{
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        const int at = e % 2 * 2 + e / 2;
        split(c0[e], a.big[0][at], a.small[0][at]);
        split(c1[e], a.big[1][at], a.small[1][at]);
    }
}

/* ------------------------------------------------------------------------------------------------------- tiles */

FA_DEVICE uint32_t fp32_swizzle(int row) { return (row >> 1 & 3) + (row & 1) * 4; }

template <int D> FA_DEVICE uint32_t fp32_offset(int row, int chunk)
{
    return row * (4 * D) + ((chunk ^ fp32_swizzle(row)) << 4);
}

/* Rows of one head in global memory. `aligned`: every row starts at a multiple of 16 bytes. */
struct fp32_rows {
    const float *ptr;           /* the tile's first row */
    int64_t stride;             /* elements */
    int rows, d;                /* beyond these the tile is 0 and nothing is read */
    bool aligned;
};

/* By cp.async: commit and wait are the caller's. A rolled loop and a thread index read anew leave registers to accumulators. */
template <int ROWS, int D, int THREADS> FA_DEVICE void load_fp32_tile(uint32_t tile, const fp32_rows &from)
{
    constexpr int CHUNKS = D / 4, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a thread keeps its chunk");
    const int thread = thread_anew(), chunk = thread % CHUNKS, first = thread / CHUNKS, width = min(from.d - chunk * 4, 4);
    #pragma unroll 1
    for (int i = 0; i < ROWS / STEP; i++) {
        const int row = first + i * STEP, valid = row < from.rows ? max(width, 0) : 0;
        const float *src = from.ptr + (valid ? row * from.stride + chunk * 4 : 0);
        const uint32_t dst = tile + fp32_offset<D>(row, chunk);
        if (from.aligned) {
            cp_async_16(dst, src, valid * 4);
        } else {
            #pragma unroll
            for (int e = 0; e < 4; e++) cp_async_4(dst + e * 4, src + (e < valid ? e : 0), e < valid);
        }
    }
}

/* Tiles that exist whole, nearly all, as tile.cuh's whole_tile: a thread keeps its chunk and takes every STEP-th row. */
template <int D, int THREADS> struct whole_fp32_tile {
    enum : int { CHUNKS = D / 4, STEP = THREADS / CHUNKS };
    static_assert(THREADS % CHUNKS == 0 && (STEP & (STEP - 1)) == 0, "a thread keeps its chunk, rows their order in the swizzle");

    static __device__ __forceinline__ int64_t first(int64_t stride)
    {
        return threadIdx.x / CHUNKS * stride + threadIdx.x % CHUNKS * 4;
    }
    template <int ROWS> static __device__ __forceinline__ void load(uint32_t tile, const float *from, int64_t stride)
    {
        const int thread = thread_anew();
        const uint32_t at = tile + fp32_offset<D>(thread / CHUNKS, thread % CHUNKS);
        #pragma unroll
        for (int i = 0; i < ROWS / STEP; i++) {
            cp_async_16((at ^ fp32_swizzle(i * STEP) << 4) + i * STEP * 4 * D, from, 16);
            from += STEP * stride;
        }
    }
};

/* Where a lane starts to read 8 (right) or 16 (left) rows by rows, or columns by columns. */
template <int D> FA_DEVICE uint32_t lane_rows(int lane) { return fp32_offset<D>(lane >> 2, lane & 3); }
template <int D> FA_DEVICE uint32_t lane_columns(int lane)
{
    return fp32_offset<D>((lane & 3) * 2, (lane >> 3) + (lane >> 2 & 1) * 4);
}

/* The same rows, further columns: a multiple of 16. */
FA_DEVICE uint32_t step_rows(uint32_t address, int column) { return (address ^ (column & 16) * 4) + (column >> 5) * 128; }

template <int D, bool CUT> FA_DEVICE void load_left(left_operand &a, uint32_t address)
{
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 x = load_shared_16(address + half * 8 * 4 * D);
        split<CUT>(__uint_as_float(x.x), a.big[0][half], a.small[0][half]);
        split<CUT>(__uint_as_float(x.y), a.big[0][half + 2], a.small[0][half + 2]);
        split<CUT>(__uint_as_float(x.z), a.big[1][half], a.small[1][half]);
        split<CUT>(__uint_as_float(x.w), a.big[1][half + 2], a.small[1][half + 2]);
    }
}
template <bool CUT> FA_DEVICE void load_right(right_operand &b, uint32_t address)
{
    const uint4 x = load_shared_16(address);
    split<CUT>(__uint_as_float(x.x), b.big[0][0], b.small[0][0]);
    split<CUT>(__uint_as_float(x.y), b.big[0][1], b.small[0][1]);
    split<CUT>(__uint_as_float(x.z), b.big[1][0], b.small[1][0]);
    split<CUT>(__uint_as_float(x.w), b.big[1][1], b.small[1][1]);
}

/* C (16 MT, 32) += A (16 MT, 16) B (16, 32), B read by columns. C: the four accumulators from j on. */
template <int D, int MT, int DT>
FA_DEVICE void multiply_columns(float (&c)[MT][DT][4], int j, const left_operand (&a)[MT], uint32_t address)
{
    uint32_t x[2][2][4];
    #pragma unroll
    for (int k = 0; k < 2; k++)
        #pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const uint4 four = load_shared_16((address ^ slot * 64) + (k * 8 + slot) * 4 * D);
            x[k][slot][0] = four.x, x[k][slot][1] = four.y, x[k][slot][2] = four.z, x[k][slot][3] = four.w;
        }
    #pragma unroll
    for (int n = 0; n < 4; n++) {
        right_operand b;
        #pragma unroll
        for (int k = 0; k < 2; k++)
            #pragma unroll
            for (int slot = 0; slot < 2; slot++) split(__uint_as_float(x[k][slot][n]), b.big[k][slot], b.small[k][slot]);
        #pragma unroll
        for (int m = 0; m < MT; m++) multiply(c[m][j + n], a[m], b);
    }
}

/* Four columns from `column` of a row, as far as the row has them. */
FA_DEVICE void store_chunk(float *row, int column, int d, bool aligned, float4 x)
{
    if (aligned && column + 4 <= d) {
        *(float4 *)(row + column) = x;
    } else {
        if (column + 0 < d) row[column + 0] = x.x;
        if (column + 1 < d) row[column + 1] = x.y;
        if (column + 2 < d) row[column + 2] = x.z;
        if (column + 3 < d) row[column + 3] = x.w;
    }
}

/* ---------------------------------------------------------------------------------------------------- instances */

/* FA_SM80_FP32_INSTANCES(forward, 64) defines fa_sm80_fp32_forward_64(dtype, variant, small), by which launch.c finds kernels.
 * One tile serves every device; the kernel that does dropout does score mods, biases and masks too. */
#define FA_SM80_FP32_KERNEL(pass, D, VARIANT) \
    kernel_facts<fp32_##pass##_tile<D>, fp32_##pass<D, VARIANT>>::with((const void *)fp32_##pass##_kernel<D, VARIANT>)

#define FA_SM80_FP32_INSTANCES(pass, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm80_fp32_##pass##_##D(enum fa_dtype, enum fa_variant variant, bool) \
    { \
        static const struct fa_cuda_kernel kernels[2] = { \
            FA_SM80_FP32_KERNEL(pass, D, FA_PLAIN), FA_SM80_FP32_KERNEL(pass, D, FA_DROPOUT) }; \
        return &kernels[variant != FA_PLAIN]; \
    }

#endif
