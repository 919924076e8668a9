/* cuda/fill.cu: what the tensors hold outside the data, as common/fill.c: rows that belong to no sequence, are cut off by
 * max_seqlen, or lie beyond seqused_k become 0, in lse -inf.
 *
 * Packed rows: gap n lies between what sequence n - 1 uses and the start of sequence n, gap 0 before the first, gap b after the
 * last. Dense keys: gap n is what sequence n does not use. The grid has the same number of blocks for each of the b + 1 gaps;
 * almost all find theirs empty. */
#include "row.cuh"

struct gap { int b; int64_t first, last; };

FA_DEVICE gap query_gap(const fa_params &p, int n)
{
    gap rows = { 0, 0, p.cu_q ? p.total_q : 0 };
    if (!p.cu_q) return rows;
    if (n > 0) { const sequence s = sequence_of(p, n - 1); rows.first = s.q0 + s.sq; }
    if (n < p.b) rows.last = sequence_of(p, n).q0;
    return rows;
}

FA_DEVICE gap key_gap(const fa_params &p, int n)
{
    if (!p.cu_k) return { n, n < p.b ? sequence_of(p, n).sk : 0, n < p.b ? p.sk : 0 };
    gap rows = { 0, 0, p.total_k };
    if (n > 0) { const sequence s = sequence_of(p, n - 1); rows.first = s.k0 + s.sk; }
    if (n < p.b) rows.last = sequence_of(p, n).k0;
    return rows;
}

/* Calls write(row, head) for each row and head of a gap, spread over the gap's blocks and their groups of eight lanes. */
template <class Write> FA_DEVICE void for_rows(const gap &rows, int64_t heads, int block, int blocks, Write write)
{
    const int64_t count = (rows.last - rows.first) * heads;
    for (int64_t at = block * HELPER_ROWS + threadIdx.x / ROW_LANES; at < count; at += (int64_t)blocks * HELPER_ROWS)
        write(rows.first + at / heads, (int)(at % heads));
}

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) fill_forward_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const int blocks = gridDim.x / ((int)p.b + 1), lane = threadIdx.x % ROW_LANES;
    const gap rows = query_gap(p, blockIdx.x / blocks);
    for_rows(rows, p.h, blockIdx.x % blocks, blocks, [&](int64_t row, int head) {
        zero_row<T>(row_at<T>(p.out, rows.b, row, head), (int)p.d_v, a.aligned_out, lane);
        if (lane == 0) *row_at<FA_FLOAT32>(p.lse, rows.b, row, head) = -INFINITY;
    });
}

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) fill_backward_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const int blocks = gridDim.x / ((int)p.b + 1), n = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int lane = threadIdx.x % ROW_LANES;
    const gap queries = query_gap(p, n), keys = key_gap(p, n);
    for_rows(queries, p.h, block, blocks, [&](int64_t row, int head) {
        zero_row<T>(row_at<T>(p.dq, queries.b, row, head), (int)p.d, a.aligned_dq, lane);
    });
    for_rows(keys, p.hk, block, blocks, [&](int64_t row, int head) {
        zero_row<T>(row_at<T>(p.dk, keys.b, row, head), (int)p.d, a.aligned_dk, lane);
        zero_row<T>(row_at<T>(p.dv, keys.b, row, head), (int)p.d_v, a.aligned_dv, lane);
    });
}

FA_CUDA_HELPER(fill_forward, HELPER_ROWS)
FA_CUDA_HELPER(fill_backward, HELPER_ROWS)
