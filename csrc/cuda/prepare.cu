/* cuda/prepare.cu: what the backward pass wants to know of each query row before it starts.
 *
 *     lse2 = lse log2 e        delta = sum_c dout_c out_c - dlse
 *
 * With a bias lse2 = lse: P takes it off before it goes to powers of two, since both may be as large as floats are. Rows without visible
 * keys (lse2 of either infinity, dq_layout.cuh's padding) get lse2 = +inf, which makes every P zero, and delta = 0. dq_accum, turns
 * and counters start at 0.
 *
 * Bound by memory: all loads of a thread are under way before the first is used. The last rows come first and out is not to stay, so
 * that L2 holds dout of the rows that the next kernel starts with. */
#include "dq_layout.cuh"
#include "overlap.cuh"
#include "row.cuh"

/* Eight lanes take ROWS rows, HELPER_ROWS apart, two chunks of each at a time. */
enum : int { ROWS = 2, PREPARE_ROWS = ROWS * HELPER_ROWS, AT_ONCE = 2 };

/* sum_c dout_c out_c of the rows that exist, in all their lanes; meanwhile(), once, while loads are under way. The whole warp takes part. */
template <enum fa_dtype T, class Meanwhile>
FA_DEVICE void dot_products(float (&sum)[ROWS], const fa_cuda_args &a, const helper_row &r, int64_t row0, const bool (&exists)[ROWS],
                            Meanwhile meanwhile)
{
    const int channels = (int)a.p.d_v;
    const typename element<T>::type *dout[ROWS], *out[ROWS];
    #pragma unroll
    for (int n = 0; n < ROWS; n++) {
        dout[n] = row_at<T>(a.p.dout, r.b, row0 + n * HELPER_ROWS, r.head);
        out[n] = row_at<T>(a.p.out, r.b, row0 + n * HELPER_ROWS, r.head);
        sum[n] = 0.0f;
    }
    if (T != FA_FLOAT32 && a.aligned_dout && a.aligned_out && channels % CHUNK == 0) {
        #pragma unroll 1
        for (int c0 = 0; c0 < channels; c0 += AT_ONCE * ROW_LANES * CHUNK) {
            uint4 x[ROWS][AT_ONCE], y[ROWS][AT_ONCE];
            #pragma unroll
            for (int at = 0; at < ROWS * AT_ONCE; at++) {
                const int n = at % ROWS, k = at / ROWS, c = c0 + (k * ROW_LANES + r.lane) * CHUNK;
                const bool is_there = exists[n] && c < channels;
                x[n][k] = is_there ? __ldg((const uint4 *)(dout[n] + c)) : make_uint4(0, 0, 0, 0);
                y[n][k] = is_there ? __ldcs((const uint4 *)(out[n] + c)) : make_uint4(0, 0, 0, 0);
            }
            if (c0 == 0) meanwhile();
            #pragma unroll
            for (int at = 0; at < ROWS * AT_ONCE; at++) {
                const auto *u = (const typename element<T>::type *)&x[at % ROWS][at / ROWS];
                const auto *v = (const typename element<T>::type *)&y[at % ROWS][at / ROWS];
                #pragma unroll
                for (int e = 0; e < CHUNK; e++)
                    if constexpr (T != FA_FLOAT32) sum[at % ROWS] += to_float<T>(u[e]) * to_float<T>(v[e]);
            }
        }
    } else {
        meanwhile();
        #pragma unroll
        for (int n = 0; n < ROWS; n++)
            for (int c = r.lane * CHUNK; c < (exists[n] ? channels : 0); c += ROW_LANES * CHUNK) {
                float x[CHUNK], y[CHUNK];
                load_chunk<T>(x, dout[n] + c, channels - c, a.aligned_dout);
                load_chunk<T>(y, out[n] + c, channels - c, a.aligned_out);
                #pragma unroll
                for (int e = 0; e < CHUNK; e++) sum[n] += x[e] * y[e];
            }
    }
    #pragma unroll
    for (int n = 0; n < ROWS; n++) sum[n] = row_sum(sum[n]);
}

FA_DEVICE int padded(int rows, int to) { return (rows + to - 1) / to * to; }

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS, 3) prepare_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const helper_row r = helper_row_of(a, (int)(gridDim.x - 1 - blockIdx.x), padded((int)p.sq, a.row_pad), PREPARE_ROWS);
    const sequence s = sequence_of(p, r.b);
    const int64_t row0 = padded_row(a, s, r.b, r.head);
    const int i0 = r.i - (int)threadIdx.x / ROW_LANES, rows = min(padded(s.sq, a.row_pad) - i0, (int)PREPARE_ROWS);     /* of this block */
    bool exists[ROWS];
    float lse[ROWS], dlse[ROWS], sum[ROWS];
    next_kernel_may_start();
    for (int64_t n = blockIdx.x * (int64_t)HELPER_THREADS + threadIdx.x; n < a.counts; n += gridDim.x * (int64_t)HELPER_THREADS) a.counters[n] = 0;
    if (rows <= 0) return;
    #pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const int i = r.i + n * HELPER_ROWS;
        exists[n] = i < s.sq;
        lse[n] = exists[n] ? *row_at<FA_FLOAT32>(p.lse, r.b, s.q0 + i, r.head) : -INFINITY;
        dlse[n] = exists[n] && p.dlse.ptr ? *row_at<FA_FLOAT32>(p.dlse, r.b, s.q0 + i, r.head) : 0.0f;
    }
    dot_products<T>(sum, a, r, s.q0 + r.i, exists, [&] {
        float4 *to = (float4 *)(a.dq_accum + (row0 + i0) * a.d_bucket);
        for (int at = threadIdx.x; at < rows * a.d_bucket / 4; at += HELPER_THREADS) to[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (p.deterministic && threadIdx.x < rows / 16) a.turns[(row0 + i0) / 16 + threadIdx.x] = 0;
    });
    if (r.lane != 0) return;
    #pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const int i = r.i + n * HELPER_ROWS;
        if (i - i0 >= rows) return;
        const int64_t row = row0 + i;
        const float lse2 = p.bias.ptr ? lse[n] : lse[n] * 1.44269504f;
        a.lse2[row] = isinf(lse2) ? INFINITY : lse2;
        a.delta[row] = isinf(lse2) ? 0.0f : sum[n] - dlse[n];
    }
}

FA_CUDA_HELPER(prepare, PREPARE_ROWS)
