/* cuda/prepare.cu: what the backward pass wants to know of each query row before it starts.
 *
 *     lse2 = lse log2 e        delta = sum_c dout_c out_c - dlse
 *
 * With a bias lse2 = lse: P takes it off before it goes to powers of two, since both may be as large as floats are. Rows without visible
 * keys (lse2 of either infinity, dq_layout.cuh's padding) get lse2 = +inf, which makes every P zero, and delta = 0. dq_accum and the turns start at 0. */
#include "dq_layout.cuh"
#include "row.cuh"

/* sum_c dout_c out_c of a row, in all its lanes. The whole warp takes part; rows without channels read nothing. */
template <enum fa_dtype T> FA_DEVICE float dot_product(const fa_cuda_args &a, const helper_row &r, int64_t row, int channels)
{
    const auto *dout = row_at<T>(a.p.dout, r.b, row, r.head), *out = row_at<T>(a.p.out, r.b, row, r.head);
    float sum = 0.0f;
    for (int c = r.lane * CHUNK; c < channels; c += ROW_LANES * CHUNK) {
        float x[CHUNK], y[CHUNK];
        load_chunk<T>(x, dout + c, channels - c, a.aligned_dout);
        load_chunk<T>(y, out + c, channels - c, a.aligned_out);
        #pragma unroll
        for (int e = 0; e < CHUNK; e++) sum += x[e] * y[e];
    }
    return row_sum(sum);
}

FA_DEVICE int padded(int rows, int to) { return (rows + to - 1) / to * to; }

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) prepare_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const helper_row r = helper_row_of(a, padded((int)p.sq, a.row_pad));
    const sequence s = sequence_of(p, r.b);
    if (r.i >= padded(s.sq, a.row_pad)) return;
    const int64_t row = padded_row(a, s, r.b, r.head) + r.i;

    const float sum = dot_product<T>(a, r, s.q0 + r.i, r.i < s.sq ? (int)p.d_v : 0);
    const float lse = r.i < s.sq ? *row_at<FA_FLOAT32>(p.lse, r.b, s.q0 + r.i, r.head) : -INFINITY;
    float lse2 = INFINITY, delta = 0.0f;
    const float finite = p.bias.ptr ? lse : lse * 1.44269504f;
    if (!isinf(finite)) {
        lse2 = finite;
        delta = sum - (p.dlse.ptr ? *row_at<FA_FLOAT32>(p.dlse, r.b, s.q0 + r.i, r.head) : 0.0f);
    }
    for (int c = r.lane * 4; c < a.d_bucket; c += ROW_LANES * 4)
        *(float4 *)(a.dq_accum + row * a.d_bucket + c) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (r.lane != 0) return;
    a.lse2[row] = lse2;
    a.delta[row] = delta;
    if (p.deterministic && row % 16 == 0) a.turns[row / 16] = 0;
}

FA_CUDA_HELPER(prepare, HELPER_ROWS)
