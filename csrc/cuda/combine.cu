/* cuda/combine.cu: out and lse from the partial results of key splits.
 *
 *     w_s = exp(m_s - m + log l_s - log l)        lse = m + log l + log sum_s w_s        out = sum_s w_s out_s / sum_s w_s
 *
 * A split's lse comes as m_s, what its exponentials are relative to, and log l_s, of their sum: of a row whose scores are huge, all of
 * them the least finite number for one, the sum of the two would forget how many keys a split has. (m, log l) is the pair of the
 * largest m_s. A split that saw no key of a row has m_s = -inf and weight 0; a row that no split saw a key of is empty: 0 and -inf. */
#include "row.cuh"

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) combine_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const helper_row r = helper_row_of(a, (int)p.sq);
    if (r.i >= p.sq) return;
    const sequence s = sequence_of(p, r.b);
    if (r.i >= s.sq) return;
    const int64_t rows = p.cu_q ? p.total_q * p.h : p.b * p.h * p.sq;
    const int64_t row = p.cu_q ? r.head * p.total_q + s.q0 + r.i : ((int64_t)r.b * p.h + r.head) * p.sq + r.i;

    const float2 *lse = (const float2 *)a.partial_lse + row;                       /* (splits, rows) */
    float2 top = lse[0];
    float sum = 0.0f;
    for (int split = 1; split < a.splits; split++)
        if (lse[split * rows].x > top.x) top = lse[split * rows];
    if (top.x == -INFINITY) top.x = 0.0f;                   /* an empty row: every weight is 0 */
    for (int split = 0; split < a.splits; split++) sum += expf(lse[split * rows].x - top.x + (lse[split * rows].y - top.y));
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;

    for (int c = r.lane * CHUNK; c < p.d_v; c += ROW_LANES * CHUNK) {
        float out[CHUNK] = {};
        for (int split = 0; split < a.splits; split++) {
            const float weight = expf(lse[split * rows].x - top.x + (lse[split * rows].y - top.y)) * factor;
            float part[CHUNK];
            load_chunk<FA_FLOAT32>(part, a.partial_out + (split * rows + row) * a.d_bucket + c, CHUNK, true);
            #pragma unroll
            for (int e = 0; e < CHUNK; e++) out[e] += weight * part[e];
        }
        store_chunk<T>(row_at<T>(p.out, r.b, s.q0 + r.i, r.head) + c, out, (int)p.d_v - c, a.aligned_out);
    }
    if (r.lane == 0) *row_at<FA_FLOAT32>(p.lse, r.b, s.q0 + r.i, r.head) = sum == 0.0f ? -INFINITY : top.x + top.y + logf(sum);
}

FA_CUDA_HELPER(combine, HELPER_ROWS)
