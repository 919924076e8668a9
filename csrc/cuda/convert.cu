/* cuda/convert.cu: dq = scale * dq_accum, in the tensors' type and strides. dq_layout.cuh says where an element lies. */
#include "dq_layout.cuh"
#include "row.cuh"

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) convert_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const helper_row r = helper_row_of(a, (int)p.sq);
    const sequence s = sequence_of(p, r.b);
    if (r.i >= s.sq) return;
    const int64_t row = padded_row(a, s, r.b, r.head) + r.i;
    for (int c = r.lane * CHUNK; c < p.d; c += ROW_LANES * CHUNK) {
        const float *block = a.dq_accum + dq_block(a, row / 16 * 16, c / CHUNK);
        float dq[CHUNK];
        #pragma unroll
        for (int e = 0; e < CHUNK; e++) dq[e] = a.scale * block[dq_element(r.i % 8 * 4 + e / 2, r.i / 8 % 2 * 2 + e % 2)];
        store_chunk<T>(row_at<T>(p.dq, r.b, s.q0 + r.i, r.head) + c, dq, (int)p.d - c, a.aligned_dq);
    }
}

FA_CUDA_HELPER(convert, HELPER_ROWS)
