/* cuda/sm80/bias_gradient.cuh: the gradient of attn_bias; a block owns a tile of its elements.
 *
 *     dbias = sum of P (Z dP - delta)  over the sequences, heads, queries and keys that share an element
 *
 * The block visits the score tiles that share its own, one after the other, and works out S = Q K^T and dP = dO V^T of each anew. The
 * sum stays in fp32 registers and its order is fixed: no atomics, the same bits every time. Where the bias has few elements `parts`
 * blocks share the visits of a tile, and a second kernel adds their sums in order. Channels come in chunks of 128 bytes a row, two
 * stages of them, so one tile serves every head dimension and device, and one kernel every variant: flags of the call, no templates.
 *     per chunk:   barrier | the next chunk starts loading | S, dP += this one's products | after the last: P, sum */
#ifndef FA_SM80_BIAS_GRADIENT_CUH
#define FA_SM80_BIAS_GRADIENT_CUH

#include "../dq_layout.cuh"
#include "fp32.cuh"

FA_DEVICE void store_bias(const fa_scores &t, int64_t at, float x)
{
    if (t.dtype == FA_FLOAT64) ((double *)t.ptr)[at] = x;
    else if (t.dtype == FA_FLOAT32) ((float *)t.ptr)[at] = x;
    else ((uint16_t *)t.ptr)[at] = (uint16_t)(t.dtype == FA_FLOAT16 ? pack<FA_FLOAT16>(x, 0.0f) : pack<FA_BFLOAT16>(x, 0.0f));
}

template <enum fa_dtype T> struct bias_gradient {
    enum : int {
        WARPS = 4, THREADS = 32 * WARPS, MT = T == FA_FLOAT32 ? 1 : 2, ROWS = 16 * MT, BLOCK_M = WARPS * ROWS, BLOCK_N = 64,
        NT = BLOCK_N / 8, CHANNELS = T == FA_FLOAT32 ? 32 : 64, ROW_BYTES = 128,
        Q_BYTES = BLOCK_M * ROW_BYTES, K_BYTES = BLOCK_N * ROW_BYTES, STAGE_BYTES = 2 * (Q_BYTES + K_BYTES), SHARED_BYTES = 2 * STAGE_BYTES,
    };
    static_assert(SHARED_BYTES <= 99 << 10, "fits every device");

    /* Which scores share an element: all along an index of stride 0. */
    struct share { int b, heads, m, n; };
    /* A score tile: its visits are numbered, keys first. */
    struct place { int b, head, m, n; };

    const fa_cuda_args &a;
    const int lane, warp, chunks;
    const uint32_t stages;
    const share each;                                       /* visits along each index */
    const place own;                                        /* the first of them */
    float sum[MT][NT][4], s[MT][NT][4], dp[MT][NT][4];

    __device__ __forceinline__ bias_gradient(const fa_cuda_args &args, const share &shared_by, const place &first, uint32_t shared)
        : a(args), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), chunks((max((int)a.p.d, (int)a.p.d_v) + CHANNELS - 1) / CHANNELS),
          stages(shared), each(shared_by), own(first)
    {
        clear(sum);
    }

    __device__ __forceinline__ void clear(float (&x)[MT][NT][4])
    {
        #pragma unroll
        for (int n = 0; n < MT * NT; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) x[n / NT][n % NT][e] = 0.0f;
    }

    __device__ __forceinline__ int visits() const { return each.b * each.heads * each.m * each.n; }
    __device__ __forceinline__ place place_of(int visit) const
    {
        const int n = visit % each.n, rest = visit / each.n, m = rest % each.m, batch_head = rest / each.m;
        return { own.b + batch_head / each.heads, own.head + batch_head % each.heads, own.m + m, own.n + n };
    }
    /* From `visit` on, the first one in which some query may see some key. */
    __device__ __forceinline__ int next_visit(int visit, int end) const
    {
        for (; visit < end; visit++) {
            const place at = place_of(visit);
            const sequence seq = sequence_of(a.p, at.b);
            const int i0 = at.m * BLOCK_M, i_end = min(i0 + BLOCK_M, seq.sq) - 1, j0 = at.n * BLOCK_N;
            if (j0 < seq.sk && first_key(a, seq, i0) < j0 + BLOCK_N && last_key(a, seq, i_end) > j0) break;
        }
        return visit;
    }

    template <int N> __device__ __forceinline__ void load_rows(uint32_t tile, const fa_tensor &t, int b, int head, int row, int rows, int channel,
                                                               int d, bool aligned)
    {
        const int64_t at = b * t.stride_b + row * t.stride_s + head * t.stride_h + channel;
        const int left = rows - row, width = min(d - channel, (int)CHANNELS);
        if constexpr (T == FA_FLOAT32) load_fp32_tile<N, CHANNELS, THREADS>(tile, { (const float *)t.ptr + at, t.stride_s, left, width, aligned });
        else load_tile<N, CHANNELS, THREADS>(tile, { (const uint16_t *)t.ptr + at, t.stride_s, left, width, aligned });
    }
    __device__ __forceinline__ void load_chunk(int visit, int end, int chunk, int stage)
    {
        if (visit < end) {
            const place at = place_of(visit);
            const int sk = sequence_of(a.p, at.b).sk, kv = at.head / a.group, channel = chunk * CHANNELS, d = (int)a.p.d, d_v = (int)a.p.d_v;
            const uint32_t q_tile = stages + stage * STAGE_BYTES, k_tile = q_tile + 2 * Q_BYTES;
            if (channel < d) {
                load_rows<BLOCK_M>(q_tile, a.p.q, at.b, at.head, at.m * BLOCK_M, (int)a.p.sq, channel, d, a.aligned_q);
                load_rows<BLOCK_N>(k_tile, a.p.k, at.b, kv, at.n * BLOCK_N, sk, channel, d, a.aligned_k);
            }
            if (channel < d_v) {
                load_rows<BLOCK_M>(q_tile + Q_BYTES, a.p.dout, at.b, at.head, at.m * BLOCK_M, (int)a.p.sq, channel, d_v, a.aligned_dout);
                load_rows<BLOCK_N>(k_tile + K_BYTES, a.p.v, at.b, kv, at.n * BLOCK_N, sk, channel, d_v, a.aligned_v);
            }
        }
        cp_async_commit();
    }

    /* C (ROWS, BLOCK_N) += left right^T: this warp's rows of a query tile, a key tile. */
    template <bool CUT> __device__ __forceinline__ void product(float (&c)[MT][NT][4], uint32_t left, uint32_t right)
    {
        if constexpr (T == FA_FLOAT32) {
            const uint32_t x_at = left + warp * ROWS * ROW_BYTES + lane_rows<CHANNELS>(lane), y_at = right + lane_rows<CHANNELS>(lane);
            #pragma unroll
            for (int channel = 0; channel < CHANNELS; channel += 16) {
                left_operand x[1];
                load_left<CHANNELS, CUT>(x[0], step_rows(x_at, channel));
                #pragma unroll
                for (int n = 0; n < NT; n++) {
                    right_operand y[1];
                    load_right<CUT>(y[0], step_rows(y_at, channel) + n * 8 * ROW_BYTES);
                    multiply<CUT>(c, n, x, y);
                }
            }
        } else {
            const uint32_t x_at = left + warp * ROWS * ROW_BYTES + lane_a<CHANNELS>(lane), y_at = right + lane_b<CHANNELS>(lane);
            #pragma unroll
            for (int k = 0; k < CHANNELS / 16; k++) {
                uint32_t x[MT][4];
                #pragma unroll
                for (int m = 0; m < MT; m++) ldmatrix(x[m], step<CHANNELS>(x_at, k) + m * 16 * ROW_BYTES);
                #pragma unroll
                for (int n = 0; n < NT; n += 2) {
                    uint32_t y[4];
                    ldmatrix(y, step<CHANNELS>(y_at, k) + n * 8 * ROW_BYTES);
                    #pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma<T>(c[m][n], x[m], y[0], y[1]);
                        mma<T>(c[m][n + 1], x[m], y[2], y[3]);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ int query(const place &at, int m, int half) const
    {
        return at.m * BLOCK_M + warp * ROWS + m * 16 + half * 8 + (lane >> 2);
    }

    /* Bias of two neighbours of row i: staged biases have rows of whole words. */
    __device__ __forceinline__ void add_bias(float &x, float &y, const sequence &seq, const place &at, int i, int j)
    {
        bias_walk walk = bias_from(a, seq, at.b, at.head, i, j);
        if (a.bias_staged && walk.left > 1) {
            if constexpr (T != FA_FLOAT32) add_pair<T>(x, y, *(const uint32_t *)walk.at, a.bias_scale);
        } else {
            x = fmaf(x, a.bias_scale, bias_next(walk, 1));
            y = fmaf(y, a.bias_scale, bias_next(walk, 0));
        }
    }

    /* S becomes P. */
    __device__ __forceinline__ void probabilities(const sequence &seq, const place &at)
    {
        const int j = at.n * BLOCK_N + (lane & 3) * 2;
        const float slope = alibi_slope(a, at.b, at.head);
        const int64_t row0 = padded_row(a, seq, at.b, at.head);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(at, m, half), first = first_key(a, seq, i) - j, last = last_key(a, seq, i) - j;
                const float lse2 = i < seq.sq ? __ldg(a.lse2 + row0 + i) : INFINITY;
                #pragma unroll
                for (int n = 0; n < NT; n++) {
                    float &x = s[m][n][2 * half], &y = s[m][n][2 * half + 1], unused;
                    if (a.score_mod) {
                        x = modify_score<T == FA_FLOAT32>(a, x, slope, i + seq.sk - seq.sq - j - n * 8, unused);
                        y = modify_score<T == FA_FLOAT32>(a, y, slope, i + seq.sk - seq.sq - j - n * 8 - 1, unused);
                    }
                    add_bias(x, y, seq, at, i, j + n * 8);
                    x = exp2_approx(fmaf(x, a.lse_scale, -lse2) * a.lse_exponent);
                    y = exp2_approx(fmaf(y, a.lse_scale, -lse2) * a.lse_exponent);
                    if (n * 8 < first || n * 8 >= last) x = 0.0f;
                    if (n * 8 + 1 < first || n * 8 + 1 >= last) y = 0.0f;
                }
            }
    }

    /* 0 where the mask hides the key. */
    __device__ __forceinline__ void hide(const place &at)
    {
        const int plane = mask_plane(a.mask, at.b, at.head);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int n = 0; n < NT; n += 4) {
                    const int i = min(query(at, m, half), (int)a.p.sq - 1);
                    const uint32_t word = mask_word(a.mask, plane, i, at.n * BLOCK_N + n * 8) >> (lane & 3) * 2;
                    #pragma unroll
                    for (int x = 0; x < 8; x++)
                        if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[m][n + x / 2][2 * half + x % 2] = 0.0f;
                }
    }

    /* dP becomes Z dP, two pieces of 16 x 16 at a time. */
    __device__ __forceinline__ void drop(const place &at)
    {
        const uint32_t batch_head = at.b * (int)a.p.h + at.head, first_i = (at.m * BLOCK_M + warp * ROWS) / 16, first_j = at.n * BLOCK_N / 16;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int n = 0; n < NT / 2; n += 2) {
                const uint32_t piece_i[2] = { first_i + m, first_i + m }, piece_j[2] = { first_j + n, first_j + n + 1 };
                uint32_t bytes[2][2];
                dropout_bytes(bytes, a.p.rng[0], a.p.rng[1], batch_head, piece_i, piece_j, lane, false);
                #pragma unroll
                for (int x = 0; x < 16; x++) {
                    const bool keeps = dropout_keeps(bytes[x / 8], x % 4 / 2, x / 4 % 2, x % 2, a.keep256, false);
                    float &y = dp[m][2 * n + x / 4][x % 4];
                    y = keeps ? y * a.kept : 0.0f;
                }
            }
    }

    __device__ __forceinline__ void add(const place &at)
    {
        const sequence seq = sequence_of(a.p, at.b);
        const int64_t row0 = padded_row(a, seq, at.b, at.head);
        probabilities(seq, at);
        if (a.mask.bits) hide(at);
        if (a.keep256 < 256) drop(at);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float delta = query(at, m, half) < seq.sq ? __ldg(a.delta + row0 + query(at, m, half)) : 0.0f;
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) {
                    const int n = x / 2, e = 2 * half + x % 2;
                    sum[m][n][e] = fmaf(s[m][n][e], dp[m][n][e] - delta, sum[m][n][e]);
                }
            }
    }

    /* Visits [visit, end). fp32: a visit whose scores overflow is repeated as fp32.cuh says. */
    __device__ __forceinline__ void run(int visit, int end)
    {
        visit = next_visit(visit, end);
        load_chunk(visit, end, 0, 0);
        for (int stage = 0, cut = 0; visit < end;) {
            const int after = next_visit(visit + 1, end);
            clear(s);
            clear(dp);
            for (int chunk = 0; chunk < chunks; chunk++, stage ^= 1) {
                const uint32_t q_tile = stages + stage * STAGE_BYTES, k_tile = q_tile + 2 * Q_BYTES;
                cp_async_wait<0>();
                __syncthreads();                    /* the chunk is here for all, and all are done with the one before */
                if (chunk + 1 < chunks) load_chunk(visit, end, chunk + 1, stage ^ 1);
                else load_chunk(after, end, 0, stage ^ 1);
                if (chunk * CHANNELS < (int)a.p.d) {
                    if (T == FA_FLOAT32 && cut) product<true>(s, q_tile, k_tile);
                    else product<false>(s, q_tile, k_tile);
                }
                if (chunk * CHANNELS < (int)a.p.d_v) product<false>(dp, q_tile + Q_BYTES, k_tile + K_BYTES);
            }
            if constexpr (T == FA_FLOAT32) {
                if (!cut && __syncthreads_or(warp_overflows(s))) {
                    cut = 1;
                    cp_async_wait<0>();
                    __syncthreads();                /* the next visit's chunk makes room */
                    load_chunk(visit, end, 0, stage);
                    continue;
                }
                cut = 0;
            }
            add(place_of(visit));
            visit = after;
        }
        cp_async_wait<0>();
    }

    /* ---- the sum goes out ---- */

    __device__ __forceinline__ void store_element(int part, int i, int j, float x) const
    {
        const fa_scores &t = a.p.dbias;
        if (a.parts > 1) {
            const int heads = t.stride_h ? (int)a.p.h : 1, rows = t.stride_q ? (int)a.p.sq : 1, keys = t.stride_k ? (int)a.p.sk : 1;
            const int64_t count = (int64_t)(t.stride_b ? (int)a.p.b : 1) * heads * rows * keys;
            a.partial_dbias[part * count + (((int64_t)own.b * heads + own.head) * rows + i) * keys + j] = x;
        } else {
            store_bias(t, own.b * t.stride_b + own.head * t.stride_h + i * t.stride_q + j * t.stride_k, x);
        }
    }

    /* One element a score. Neighbours in one word where they can. */
    __device__ __forceinline__ void store(int part)
    {
        const fa_scores &t = a.p.dbias;
        const bool words = a.parts == 1 && t.dtype != FA_FLOAT32 && t.dtype != FA_FLOAT64 && t.stride_k == 1 && (t.stride_q | t.stride_h | t.stride_b) % 2 == 0
                        && (uintptr_t)t.ptr % 4 == 0;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(own, m, half);
                if (i >= (int)a.p.sq) continue;
                #pragma unroll
                for (int n = 0; n < NT; n++) {
                    const int j = own.n * BLOCK_N + n * 8 + (lane & 3) * 2;
                    const float x = sum[m][n][2 * half], y = sum[m][n][2 * half + 1];
                    if (words && j + 1 < (int)a.p.sk) {
                        uint16_t *at = (uint16_t *)t.ptr + own.b * t.stride_b + own.head * t.stride_h + i * t.stride_q + j;
                        *(uint32_t *)at = t.dtype == FA_FLOAT16 ? pack<FA_FLOAT16>(x, y) : pack<FA_BFLOAT16>(x, y);
                    } else {
                        if (j < (int)a.p.sk) store_element(part, i, j, x);
                        if (j + 1 < (int)a.p.sk) store_element(part, i, j + 1, y);
                    }
                }
            }
    }

    /* One element a query: the sum over the row. */
    __device__ __forceinline__ void store_row_sums(int part)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = 0.0f;
                #pragma unroll
                for (int n = 0; n < NT; n++) x += sum[m][n][2 * half] + sum[m][n][2 * half + 1];
                x = quad_sum(x);
                const int i = query(own, m, half);
                if (i < (int)a.p.sq && (lane & 3) == 0) store_element(part, i, 0, x);
            }
    }

    /* One element a key, or one in all: the warps' sums over their rows meet in shared memory. */
    __device__ __forceinline__ void store_column_sums(int part, float *sums)
    {
        __syncthreads();                            /* all are done with the stages */
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                float x = 0.0f;
                #pragma unroll
                for (int m = 0; m < MT; m++) x += sum[m][n][c] + sum[m][n][2 + c];
                #pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
                if (lane < 4) sums[warp * BLOCK_N + n * 8 + lane * 2 + c] = x;
            }
        __syncthreads();
        const int thread = threadIdx.x, j = own.n * BLOCK_N + thread;
        float x = 0.0f;
        if (thread < BLOCK_N)
            for (int w = 0; w < WARPS; w++) x += sums[w * BLOCK_N + thread];
        if (a.p.dbias.stride_k) {
            if (thread < BLOCK_N && j < (int)a.p.sk) store_element(part, 0, j, x);
            return;
        }
        __syncthreads();
        if (thread < BLOCK_N) sums[thread] = x;
        __syncthreads();
        if (thread != 0) return;
        for (int n = 1; n < BLOCK_N; n++) x += sums[n];
        store_element(part, 0, 0, x);
    }
};

template <enum fa_dtype T> __global__ void __launch_bounds__(bias_gradient<T>::THREADS, 2) bias_gradient_kernel(const __grid_constant__ fa_cuda_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    using kernel = bias_gradient<T>;
    const fa_scores &t = a.p.dbias;
    const int m_tiles = ((int)a.p.sq + kernel::BLOCK_M - 1) / kernel::BLOCK_M, n_tiles = ((int)a.p.sk + kernel::BLOCK_N - 1) / kernel::BLOCK_N;
    const typename kernel::share each = { t.stride_b ? 1 : (int)a.p.b, t.stride_h ? 1 : (int)a.p.h, t.stride_q ? 1 : m_tiles, t.stride_k ? 1 : n_tiles };
    int at = blockIdx.x;
    typename kernel::place own = {};
    if (t.stride_k) own.n = at % n_tiles, at /= n_tiles;
    if (t.stride_q) own.m = at % m_tiles, at /= m_tiles;
    if (t.stride_h) own.head = at % (int)a.p.h, at /= (int)a.p.h;
    own.b = at;
    kernel block(a, each, own, shared_address(shared));
    const int64_t visits = block.visits(), part = blockIdx.y;
    block.run((int)(visits * part / a.parts), (int)(visits * (part + 1) / a.parts));
    if (!t.stride_q) block.store_column_sums((int)part, (float *)shared);
    else if (!t.stride_k) block.store_row_sums((int)part);
    else block.store((int)part);
}

template <enum fa_dtype T> static constexpr fa_cuda_kernel bias_gradient_facts(const void *function)
{
    using block = bias_gradient<T>;
    return { function, block::THREADS, block::SHARED_BYTES, block::BLOCK_M, block::BLOCK_N, 2, 0 };
}
#define FA_SM80_BIAS_GRADIENT(T) bias_gradient_facts<T>((const void *)bias_gradient_kernel<T>)

#endif
