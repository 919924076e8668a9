/* cuda/convert.cu: dq = scale * dq_accum, in the tensors' type and strides. dq_layout.cuh says where an element lies. */
#include "dq_layout.cuh"
#include "overlap.cuh"
#include "row.cuh"

/* Eight lanes take two rows of a block of 16, which share its lines. */
enum : int { CONVERT_ROWS = 2 * HELPER_ROWS };

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) convert_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const int per_head = ((int)p.sq + CONVERT_ROWS - 1) / CONVERT_ROWS, batch_head = blockIdx.x / per_head;
    const int b = batch_head / (int)p.h, head = batch_head % (int)p.h, pair = threadIdx.x / ROW_LANES, row8 = pair % 8;
    const int i = (int)(blockIdx.x % per_head) * CONVERT_ROWS + pair / 8 * 16 + row8;
    const sequence s = sequence_of(p, b);
    if (i >= s.sq) return;
    wait_for_last_kernel();
    const int64_t row = padded_row(a, s, b, head) + i - row8;
    const float factor = a.scale / dq_factor<T>();
    for (int c = threadIdx.x % ROW_LANES * CHUNK; c < p.d; c += ROW_LANES * CHUNK) {
        float dq[2][CHUNK];
        dq_rows(dq, a.dq_accum + dq_block(a, row, c / CHUNK), row8);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            if (i + 8 * half >= s.sq) break;
            #pragma unroll
            for (int e = 0; e < CHUNK; e++) dq[half][e] *= factor;
            store_chunk<T>(row_at<T>(p.dq, b, s.q0 + i + 8 * half, head) + c, dq[half], (int)p.d - c, a.aligned_dq);
        }
    }
}

FA_CUDA_HELPER(convert, CONVERT_ROWS)
