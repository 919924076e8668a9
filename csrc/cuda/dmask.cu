/* cuda/dmask.cu: s_dmask as common/reference.c defines it: exp(s - largest s of the row), negative where dropped, 0 outside the
 * visible keys. One warp a row, scores in fp32 from q and k, computed twice: for tests, slow and simple. */
#include "bias.cuh"
#include "row.cuh"
#include "score.cuh"

enum : int { DMASK_ROWS = HELPER_THREADS / 32 };

template <enum fa_dtype T> FA_DEVICE float score_of(const fa_cuda_args &a, const typename element<T>::type *q,
                                                    const typename element<T>::type *k, float slope, int distance)
{
    float product = 0.0f, unused;
    for (int c = 0; c < a.p.d; c++) product = fmaf(to_float<T>(q[c]), to_float<T>(k[c]), product);
    return modify_score(a, product, slope, distance, unused);
}

template <enum fa_dtype T>
__global__ void __launch_bounds__(HELPER_THREADS) dmask_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_params &p = a.p;
    const int per_head = ((int)p.dmask_sq + DMASK_ROWS - 1) / DMASK_ROWS, batch_head = blockIdx.x / per_head;
    const int b = batch_head / (int)p.h, head = batch_head % (int)p.h, lane = threadIdx.x % 32;
    const int i = blockIdx.x % per_head * DMASK_ROWS + threadIdx.x / 32;
    if (i >= p.dmask_sq) return;
    const sequence s = sequence_of(p, b);
    const int first = i < s.sq ? first_key(a, s, i) : 0, last = i < s.sq ? last_key(a, s, i) : 0;
    const auto *q = row_at<T>(p.q, b, s.q0 + i, head);
    const float slope = alibi_slope(a, b, head);
    auto score = [&](int j) {
        const fa_scores &t = p.mask;
        const auto *byte = (const uint8_t *)t.ptr + b * t.stride_b + head * t.stride_h + i * t.stride_q + j * t.stride_k;
        if (t.ptr && !*byte) return -INFINITY;
        const float x = score_of<T>(a, q, row_at<T>(p.k, b, s.k0 + j, head / a.group), slope, i + s.sk - s.sq - j);
        if (!p.bias.ptr) return x;
        bias_walk bias = bias_from(a, s, b, head, i, j);
        return x + bias_next(bias, 0);
    };

    float top = -INFINITY;
    for (int j = first + lane; j < last; j += 32) top = fmaxf(top, score(j));
    #pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));

    auto *to = (typename element<T>::type *)p.s_dmask + ((int64_t)batch_head * p.dmask_sq + i) * p.dmask_sk;
    for (int64_t j = lane; j < p.dmask_sk; j += 32) {
        float weight = 0.0f;
        if (j >= first && j < last && top != -INFINITY) {
            weight = expf(score((int)j) - top);
            const bool kept = a.keep256 == 256 || fa_dropout_byte(p.rng[0], p.rng[1], batch_head, i, j) < a.keep256;
            if (!kept) weight = -weight;
        }
        to[j] = from_float<T>(weight);
    }
}

FA_CUDA_HELPER(dmask, DMASK_ROWS)
