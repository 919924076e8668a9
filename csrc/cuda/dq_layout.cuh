/* cuda/dq_layout.cuh: the backward's scratch by rows: lse2, delta, and dq summed up in fp32 before convert.cu casts it.
 *
 * Every sequence of every head starts at a multiple of row_pad, the rows of a query tile, so that tiles never overlap: dense,
 * padded_rows = sq padded to row_pad for each sequence and head; packed, padded_rows = total_q padded to row_pad, + row_pad b, for
 * each head. prepare.cu fills the padding.
 * dq's rows are cut into blocks of 16 x 8 channels: the C fragment of one mma. A lane's four elements of a block lie together, so
 * that sm_90 adds them with one instruction; before sm_90 the lanes of one element do. Adds to global memory flush subnormal sums to
 * 0: those of fp32 tensors are of dq times 2^24. */
#ifndef FA_DQ_LAYOUT_CUH
#define FA_DQ_LAYOUT_CUH

#include "sequence.cuh"

template <enum fa_dtype T> FA_DEVICE float dq_factor() { return T == FA_FLOAT32 ? 16777216.0f : 1.0f; }

/* Row 0 of a sequence and head, a multiple of row_pad, which is one of 16. */
FA_DEVICE int64_t padded_row(const fa_cuda_args &a, const sequence &s, int b, int head)
{
    if (a.p.cu_q) return (int64_t)head * a.padded_rows + (s.q0 / a.row_pad + b) * (int64_t)a.row_pad;
    return ((int64_t)b * a.p.h + head) * a.padded_rows;
}

/* First float of the block of 16 rows from `row` (a multiple of 16) and eight channels from 8 column8. */
template <int D> FA_DEVICE int64_t dq_block(int64_t row, int column8)
{
    return (row / 16 * (D / 8) + column8) * 128;
}
FA_DEVICE int64_t dq_block(const fa_cuda_args &a, int64_t row, int column8)
{
    return (row / 16 * (a.d_bucket / 8) + column8) * 128;
}

/* Element e of a lane's fragment, within its block; element e is row lane / 4 + 8 (e / 2), channel 2 (lane % 4) + e % 2. */
FA_DEVICE int dq_element(int lane, int e)
{
#if __CUDA_ARCH__ >= 900
    return 4 * lane + e;
#else
    return 32 * e + lane;
#endif
}

/* Rows row8 and row8 + 8 of a block, row8 < 8. */
FA_DEVICE void dq_rows(float (&x)[2][8], const float *block, int row8)
{
    #pragma unroll
    for (int n = 0; n < 4; n++) {
#if __CUDA_ARCH__ >= 900
        const float4 four = *(const float4 *)(block + 16 * row8 + 4 * n);       /* lane 4 row8 + n */
        x[0][2 * n] = four.x, x[0][2 * n + 1] = four.y, x[1][2 * n] = four.z, x[1][2 * n + 1] = four.w;
#else
        const float4 four = *(const float4 *)(block + 32 * n + 4 * row8);       /* element n of four lanes */
        x[n / 2][n % 2] = four.x, x[n / 2][2 + n % 2] = four.y, x[n / 2][4 + n % 2] = four.z, x[n / 2][6 + n % 2] = four.w;
#endif
    }
}

FA_DEVICE void dq_add(float *block, int lane, const float (&c)[4])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(block + dq_element(lane, 0)), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]) : "memory");
#else
    #pragma unroll
    for (int e = 0; e < 4; e++) atomicAdd(block + dq_element(lane, e), c[e]);
#endif
}

#endif
