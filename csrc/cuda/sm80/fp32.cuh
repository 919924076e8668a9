/* cuda/sm80/fp32.cuh: products accurate to fp32 on the tensor cores, and the tiles of fp32 rows that feed them.
 *
 *     x = big + small         big: x rounded to the 11 bits of tf32; small = x - big, exact
 *     a b ~ small_a big_b + big_a small_b + big_a big_b        what is left out is below 2^-22 a b
 *
 * tf32 ends where fp32's subnormal numbers have 13 bits more, so the tensor cores see 2^13 small: what x has below big is above
 * their last bit then, down to the smallest x.
 * Tensor cores round sums towards zero, a bias that grows with their number: summed there throughout, 130 keys could cost 16 eps
 * instead of 2. So they sum 16 products at a time, small terms first, and fp32 adds, rounded to nearest, carry these sums on. Where the
 * sum is no exponent, the small terms, whose own rounding does not show, are summed apart there for longer.
 *
 * mma.sync of Hopper and other arithmetic do not overlap: a product of 16 x 8 x 16 takes six instructions of 6.2 cycles, and all
 * others add about 1.2 cycles each. So what several warps read is split once, by those who copy it, into a SPLIT tile: one of the
 * big parts, one of the small ones behind it. Where shared memory has no room for that, every warp splits what it reads.
 *
 * A tile is ROWS rows of D floats, D / 4 chunks of 16 bytes. Lane (g, t) = (l / 4, l % 4) reads a chunk at a time, two ways:
 *
 *     by rows         the contraction runs along a row: row g, chunk t of each four                            Q, K of Q K^T
 *     by columns      the contraction runs down the rows: rows 2t, 2t + 1, chunk g / 2 + 4 (g % 2) of each eight      V of P V
 *
 * Within a contraction any order will do, if left and right operand have the same. By rows, a lane's four floats are its slots t
 * and t + 4 of two k-steps. Down the rows, 2t and 2t + 1 are its slots t and t + 4, so accumulators are left operands as they
 * stand, and right ones of the transposed product. By columns, column 4t + 16 (e % 2) + j of 32 is element e of accumulator j: four
 * accumulators hold 16 bytes of a row. Split tiles want two elements of a column in neighbouring registers: see split_fp32_pairs()
 * and, where a tile is read both ways, multiply_column_pairs().
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

/* C = A B: mma_tf32 without what C was. */
FA_DEVICE void first_mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

/* C (16 MT, 8 N) += A (16 MT, 16) B (16, 8 N), for the N accumulators from j on. A chain's next product comes after one of each other
 * chain: it waits for the one before it some 20 cycles. */
template <bool CUT = false, int MT, int N, int NT>
FA_DEVICE void multiply(float (&c)[MT][NT][4], int j, const left_operand (&a)[MT], const right_operand (&b)[N])
{
    float sum[MT][N][4];
    #pragma unroll
    for (int stage = 0; stage < 6; stage++)
        #pragma unroll
        for (int x = 0; x < MT * N; x++) {
            const int m = x % MT, n = x / MT;
            if (stage == 0) first_mma_tf32(sum[m][n], a[m].small[0], b[n].big[0]);
            if (stage == 1) mma_tf32(sum[m][n], a[m].small[1], b[n].big[1]);
            if (stage == 2) mma_tf32(sum[m][n], a[m].big[0], b[n].small[0]);
            if (stage == 3) mma_tf32(sum[m][n], a[m].big[1], b[n].small[1]);
            #pragma unroll
            for (int e = 0; e < 4; e++)
                if (stage == 4) sum[m][n][e] *= CUT ? 1.0f : 1.0f / SMALL_FACTOR;
            if (stage == 4) mma_tf32(sum[m][n], a[m].big[0], b[n].big[0]);
            if (stage == 5) mma_tf32(sum[m][n], a[m].big[1], b[n].big[1]);
        }
    #pragma unroll
    for (int x = 0; x < MT * N * 4; x++) c[x / 4 / N][j + x / 4 % N][x % 4] += sum[x / 4 / N][x / 4 % N][x % 4];
}
/* The same but for the small terms: `small` sums these up, FIRST anew, for as many products as the caller likes, until add_small()
 * adds them. Not for S: it is an exponent, and the passes must round it alike, so that its error cancels in S - lse. */
template <bool FIRST = false, int MT, int N, int NT>
FA_DEVICE void multiply(float (&c)[MT][NT][4], float (&small)[MT][NT][4], int j, const left_operand (&a)[MT], const right_operand (&b)[N])
{
    float big[MT][N][4];
    #pragma unroll
    for (int stage = 0; stage < 6; stage++)
        #pragma unroll
        for (int x = 0; x < MT * N; x++) {
            const int m = x % MT, n = x / MT;
            if (stage == 0 && FIRST) first_mma_tf32(small[m][j + n], a[m].small[0], b[n].big[0]);
            if (stage == 0 && !FIRST) mma_tf32(small[m][j + n], a[m].small[0], b[n].big[0]);
            if (stage == 1) first_mma_tf32(big[m][n], a[m].big[0], b[n].big[0]);
            if (stage == 2) mma_tf32(small[m][j + n], a[m].small[1], b[n].big[1]);
            if (stage == 3) mma_tf32(big[m][n], a[m].big[1], b[n].big[1]);
            if (stage == 4) mma_tf32(small[m][j + n], a[m].big[0], b[n].small[0]);
            if (stage == 5) mma_tf32(small[m][j + n], a[m].big[1], b[n].small[1]);
        }
    #pragma unroll
    for (int x = 0; x < MT * N * 4; x++) c[x / 4 / N][j + x / 4 % N][x % 4] += big[x / 4 / N][x / 4 % N][x % 4];
}
template <int MT, int NT> FA_DEVICE void add_small(float (&c)[MT][NT][4], const float (&small)[MT][NT][4])
{
    #pragma unroll
    for (int x = 0; x < MT * NT * 4; x++) {
        float &sum = c[x / 4 / NT][x / 4 % NT][x % 4];
        sum = fmaf(small[x / 4 / NT][x / 4 % NT][x % 4], 1.0f / SMALL_FACTOR, sum);
    }
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

FA_DEVICE void store_shared_8(uint32_t dst, uint32_t x, uint32_t y)
{
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(dst), "r"(x), "r"(y) : "memory");
}

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

/* The i-th row that thread row `first` of STEP copies: every STEP-th, or of every STEP-th pair both. */
template <int STEP, bool PAIRS> FA_DEVICE int row_of(int first, int i)
{
    return PAIRS ? (first + i / 2 * STEP) * 2 + i % 2 : first + i * STEP;
}

/* By cp.async: commit and wait are the caller's. A rolled loop and a thread index read anew leave registers to accumulators. */
template <int ROWS, int D, int THREADS, bool PAIRS = false> FA_DEVICE void load_fp32_tile(uint32_t tile, const fp32_rows &from)
{
    constexpr int CHUNKS = D / 4, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a thread keeps its chunk");
    const int thread = thread_anew(), chunk = thread % CHUNKS, first = thread / CHUNKS, width = min(from.d - chunk * 4, 4);
    #pragma unroll 1
    for (int i = 0; i < ROWS / STEP; i++) {
        const int row = row_of<STEP, PAIRS>(first, i), valid = row < from.rows ? max(width, 0) : 0;
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

/* Tiles that exist whole, nearly all, as tile.cuh's whole_tile: a thread keeps its chunk and takes the rows of row_of. */
template <int D, int THREADS, bool PAIRS = false> struct whole_fp32_tile {
    enum : int { CHUNKS = D / 4, STEP = THREADS / CHUNKS };
    static_assert(THREADS % CHUNKS == 0 && (STEP & (STEP - 1)) == 0, "a thread keeps its chunk, rows their order in the swizzle");

    static __device__ __forceinline__ int64_t first(int64_t stride, int thread = threadIdx.x)
    {
        return row_of<STEP, PAIRS>(thread / CHUNKS, 0) * stride + thread % CHUNKS * 4;
    }
    static __device__ __forceinline__ uint32_t place(uint32_t tile, int thread)
    {
        return tile + fp32_offset<D>(row_of<STEP, PAIRS>(thread / CHUNKS, 0), thread % CHUNKS);
    }
    static __device__ __forceinline__ uint32_t step(uint32_t place, int i)
    {
        const int row = row_of<STEP, PAIRS>(0, i);
        return (place ^ fp32_swizzle(row) << 4) + row * 4 * D;
    }
    template <int ROWS> static __device__ __forceinline__ void load(uint32_t tile, const float *from, int64_t stride)
    {
        const uint32_t at = place(tile, thread_anew());
        #pragma unroll
        for (int i = 0; i < ROWS / STEP; i++) {
            cp_async_16(step(at, i), from, 16);
            from += (row_of<STEP, PAIRS>(0, i + 1) - row_of<STEP, PAIRS>(0, i)) * stride;
        }
    }
};

/* A tile that this thread's copies have filled becomes a split one: big parts in its place, small ones right behind it. The thread
 * takes what it has copied itself, so that it need not wait for others; they wait for it before they read. */
template <int ROWS, int D, int THREADS> FA_DEVICE void split_fp32_tile(uint32_t tile)
{
    using rows = whole_fp32_tile<D, THREADS>;
    const uint32_t first = rows::place(tile, thread_anew());
    #pragma unroll
    for (int i = 0; i < ROWS / rows::STEP; i++) {
        const uint32_t at = rows::step(first, i);
        const uint4 x = load_shared_16(at);
        uint4 big, small;
        split(__uint_as_float(x.x), big.x, small.x);
        split(__uint_as_float(x.y), big.y, small.y);
        split(__uint_as_float(x.z), big.z, small.z);
        split(__uint_as_float(x.w), big.w, small.w);
        store_shared_16(at, big);
        store_shared_16(at + ROWS * 4 * D, small);
    }
}
/* The same, for reads by columns: rows 2r and 2r + 1 take turns in the 32 bytes of a chunk of both, so that what one product takes
 * of them arrives in neighbouring registers. */
template <int ROWS, int D, int THREADS> FA_DEVICE void split_fp32_pairs(uint32_t tile)
{
    using rows = whole_fp32_tile<D, THREADS, true>;
    const uint32_t first = rows::place(tile, thread_anew());
    #pragma unroll
    for (int i = 0; i < ROWS / rows::STEP; i += 2) {
        const uint32_t at[2] = { rows::step(first, i), rows::step(first, i + 1) };
        const uint4 x = load_shared_16(at[0]), y = load_shared_16(at[1]);
        uint4 big, small;
        split(__uint_as_float(x.x), big.x, small.x);
        split(__uint_as_float(y.x), big.y, small.y);
        split(__uint_as_float(x.y), big.z, small.z);
        split(__uint_as_float(y.y), big.w, small.w);
        store_shared_16(at[0], big);
        store_shared_16(at[0] + ROWS * 4 * D, small);
        split(__uint_as_float(x.z), big.x, small.x);
        split(__uint_as_float(y.z), big.y, small.y);
        split(__uint_as_float(x.w), big.z, small.z);
        split(__uint_as_float(y.w), big.w, small.w);
        store_shared_16(at[1], big);
        store_shared_16(at[1] + ROWS * 4 * D, small);
    }
}

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
/* Of a split tile of ROWS rows. */
template <int ROWS, int D> FA_DEVICE void load_split_right(right_operand &b, uint32_t address)
{
    const uint4 big = load_shared_16(address), small = load_shared_16(address + ROWS * 4 * D);
    b.big[0][0] = big.x, b.big[0][1] = big.y, b.big[1][0] = big.z, b.big[1][1] = big.w;
    b.small[0][0] = small.x, b.small[0][1] = small.y, b.small[1][0] = small.z, b.small[1][1] = small.w;
}
/* CUT, from global memory, as the parts in a split tile are rounded: four floats of a row, of which `valid` exist. */
FA_DEVICE void load_right_cut(right_operand &b, const float *row, int valid)
{
    #pragma unroll
    for (int e = 0; e < 4; e++) split<true>(e < valid ? row[e] : 0.0f, b.big[e / 2][e % 2], b.small[e / 2][e % 2]);
}

/* Columns as left operands: C^T (32, 16) += B^T (32, 16) A^T (16, 16), B (16, 32) of a tile of ROWS rows that lies split, or of one
 * as it is: ROWS = 0. Rows g and g + 8 of 16 in C^T are two neighbouring columns, so that 8 bytes of a row of B are neighbours in a
 * left operand: columns column_of() of each 16. */
FA_DEVICE int column_of(int lane, int m) { return ((lane >> 3 & 1) * 4 + (lane >> 4) + 2 * m) * 4 + (lane >> 2 & 1) * 2; }
template <int D> FA_DEVICE uint32_t lane_column_pairs(int lane)
{
    return fp32_offset<D>((lane & 3) * 2, column_of(lane, 0) / 4) + (lane >> 2 & 1) * 8;
}
template <int ROWS, int D, bool FIRST>
FA_DEVICE void multiply_column_pairs(float (&c)[2][2][4], float (&small)[2][2][4], const right_operand (&b)[2], uint32_t address)
{
    left_operand a[2];
    #pragma unroll
    for (int m = 0; m < 2; m++)
        #pragma unroll
        for (int k = 0; k < 2; k++)
            #pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const uint32_t at = (address ^ (slot * 64 + m * 32)) + (k * 8 + slot) * 4 * D;
                const float2 x = load_shared_8(at);
                if (ROWS == 0) {
                    split(x.x, a[m].big[k][slot * 2], a[m].small[k][slot * 2]);
                    split(x.y, a[m].big[k][slot * 2 + 1], a[m].small[k][slot * 2 + 1]);
                } else {
                    const float2 y = load_shared_8(at + ROWS * 4 * D);
                    a[m].big[k][slot * 2] = __float_as_uint(x.x), a[m].big[k][slot * 2 + 1] = __float_as_uint(x.y);
                    a[m].small[k][slot * 2] = __float_as_uint(y.x), a[m].small[k][slot * 2 + 1] = __float_as_uint(y.y);
                }
            }
    multiply<FIRST>(c, small, 0, a, b);
}
/* Accumulators of 16 columns, transposed, as right operands of a product that sums over these columns: rows 0-7 and 8-15. */
FA_DEVICE void right_of(right_operand (&b)[2], const float (&c0)[4], const float (&c1)[4])
{
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        split(c0[e], b[e / 2].big[0][e % 2], b[e / 2].small[0][e % 2]);
        split(c1[e], b[e / 2].big[1][e % 2], b[e / 2].small[1][e % 2]);
    }
}

/* C (16 MT, 32) += A (16 MT, 16) B (16, 32), B read by columns. */
template <int D, int MT>
FA_DEVICE void multiply_columns(float (&c)[MT][4][4], float (&small)[MT][4][4], const left_operand (&a)[MT], uint32_t address)
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
    for (int n = 0; n < 4; n += 2) {
        right_operand b[2];
        #pragma unroll
        for (int at = 0; at < 8; at++)
            split(__uint_as_float(x[at / 2 % 2][at % 2][n + at / 4]), b[at / 4].big[at / 2 % 2][at % 2], b[at / 4].small[at / 2 % 2][at % 2]);
        multiply(c, small, n, a, b);
    }
}
/* The same of a tile of ROWS rows that lies split in pairs. */
template <int ROWS, int D, int MT>
FA_DEVICE void multiply_split_columns(float (&c)[MT][4][4], float (&small)[MT][4][4], const left_operand (&a)[MT], uint32_t address)
{
    right_operand b[4];
    #pragma unroll
    for (int slot = 0; slot < 2; slot++)
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint32_t at = (address ^ slot * 64) + (k * 8 + slot) * 4 * D;
            const uint4 big = load_shared_16(at), small = load_shared_16(at + ROWS * 4 * D);
            right_operand &x = b[2 * slot], &y = b[2 * slot + 1];
            x.big[k][0] = big.x, x.big[k][1] = big.y, y.big[k][0] = big.z, y.big[k][1] = big.w;
            x.small[k][0] = small.x, x.small[k][1] = small.y, y.small[k][0] = small.z, y.small[k][1] = small.w;
        }
    multiply(c, small, 0, a, b);
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

/* FA_SM80_FP32_INSTANCES(forward, 64) defines fa_sm80_fp32_forward_64(dtype, variant, small), by which launch.c finds kernels. The
 * kernel that does dropout does score mods, biases and masks too. A small tile is compiled where it takes less shared memory. */
#define FA_SM80_FP32_BYTES(pass, D, SMALL) (fp32_##pass<D, FA_PLAIN, fp32_##pass##_tile<D, SMALL>>::SHARED_BYTES)
#define FA_SM80_FP32_TILE(pass, D, SMALL) select_tile< \
    SMALL && (FA_SM80_FP32_BYTES(pass, D, true) < FA_SM80_FP32_BYTES(pass, D, false)), \
    fp32_##pass##_tile<D, true>, fp32_##pass##_tile<D, false>>::type

#define FA_SM80_FP32_KERNEL(pass, D, VARIANT, SMALL) \
    kernel_facts<FA_SM80_FP32_TILE(pass, D, SMALL), fp32_##pass<D, VARIANT, FA_SM80_FP32_TILE(pass, D, SMALL)>>::with( \
        (const void *)fp32_##pass##_kernel<D, VARIANT, FA_SM80_FP32_TILE(pass, D, SMALL)>)

#define FA_SM80_FP32_INSTANCES(pass, D) \
    static_assert(FA_SM80_FP32_BYTES(pass, D, true) <= 99 << 10, "fits every device"); \
    extern "C" const struct fa_cuda_kernel *fa_sm80_fp32_##pass##_##D(enum fa_dtype, enum fa_variant variant, bool small) \
    { \
        static const struct fa_cuda_kernel kernels[2][2] = { \
            { FA_SM80_FP32_KERNEL(pass, D, FA_PLAIN, false), FA_SM80_FP32_KERNEL(pass, D, FA_DROPOUT, false) }, \
            { FA_SM80_FP32_KERNEL(pass, D, FA_PLAIN, true), FA_SM80_FP32_KERNEL(pass, D, FA_DROPOUT, true) } }; \
        return &kernels[small][variant != FA_PLAIN]; \
    }

#endif
