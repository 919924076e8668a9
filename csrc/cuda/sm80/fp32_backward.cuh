/* cuda/sm80/fp32_backward.cuh: the gradients of fp32 tensors; a block owns BLOCK_N keys of one key/value head.
 *
 *     S^T = K Q^T    P = exp2(c S - lse2)    dV += P^T dO    dP^T = V dO^T    dS = P (dP - delta)    dK += dS^T Q    dQ += dS K
 *
 * backward.cuh with the products of fp32.cuh: the block walks over the query tiles that see its keys, for each query head of the
 * group, last tile first. A warp owns 16 keys and all BLOCK_M queries: P^T and dS^T are right operands of dV^T and dK^T as they
 * stand, and only dS passes through shared memory, for dQ, in dO's place. Q and dO have room for one tile each, are split where that
 * may be, and load behind work:
 *
 *     split Q | barrier | S^T   split dO | barrier | dP^T   P, dS   dV   dK | barrier | load next Q   store dS
 *             | barrier | dQ | barrier | load next dO
 *
 * D = 256: dK and dV of 16 keys do not fit a warp's registers. Two warps share the keys and have half the channels each; both
 * compute S and dP, so the price is two products on top of five. */
#ifndef FA_SM80_FP32_BACKWARD_CUH
#define FA_SM80_FP32_BACKWARD_CUH

#include "../dq_layout.cuh"
#include "fp32.cuh"

template <int D, enum fa_variant VARIANT, class Tile> struct fp32_backward {
    enum : int {
        WARPS = Tile::WARPS, THREADS = 32 * WARPS, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N,
        KEY_WARPS = BLOCK_N / 16, CHANNELS = D / (WARPS / KEY_WARPS),       /* of dK and dV in a warp's registers */
        NT = BLOCK_M / 8, DT = CHANNELS / 8, STEPS = NT > 2 ? 1 : 2,        /* of S's and dP's products at once */
        QUERIES_AT_ONCE = VARIANT == FA_PLAIN || D > 64 ? 2 : 1,            /* 16 each, of dV's and dK's */
        DQ_WM = BLOCK_M / 16, DQ_CHANNELS = D / (WARPS / DQ_WM),            /* a warp's dQ: 16 queries, these channels */
        ROW_BYTES = 4 * D, KV_BYTES = BLOCK_N * ROW_BYTES, Q_BYTES = BLOCK_M * ROW_BYTES,
        SPLIT = Tile::SPLIT, Q_PLACE = (SPLIT ? 2 : 1) * Q_BYTES, DQ_AT_ONCE = SPLIT && DQ_CHANNELS == 64 ? 64 : 32,     /* channels */
        SHARED_BYTES = 2 * KV_BYTES + 2 * Q_PLACE + 2 * 4 * BLOCK_M, BIAS_BYTES = 0,
    };
    static_assert(WARPS % KEY_WARPS == 0 && WARPS % DQ_WM == 0 && CHANNELS % 32 == 0 && DQ_CHANNELS % 32 == 0, "whole fragments");
    static_assert(BLOCK_N <= D, "dS fits dO's place");

    const fa_cuda_args &a;
    const int lane, warp, key_warp, b, kv_head, j0;                         /* j0: first key of the block */
    const sequence seq;
    const uint32_t k_tile, v_tile, q_tile, dout_tile, ds_tile, lse2_row, delta_row;
    int m_first, m_last;                                                    /* query tiles [first, last) */
    float dk[DT / 4][2][2][4], dv[DT / 4][2][2][4];                         /* transposed: 32 channels, two times 8 keys each */

    __device__ __forceinline__ fp32_backward(const fa_cuda_args &args, int batch, int kv, int n, uint32_t shared)
        : a(args), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), key_warp(warp % KEY_WARPS), b(batch), kv_head(kv),
          j0(n * BLOCK_N), seq(sequence_of(args.p, batch)), k_tile(shared), v_tile(k_tile + KV_BYTES), q_tile(v_tile + KV_BYTES),
          dout_tile(q_tile + Q_PLACE), ds_tile(dout_tile), lse2_row(dout_tile + Q_PLACE), delta_row(lse2_row + 4 * BLOCK_M)
    {
        #pragma unroll
        for (int e = 0; e < 4 * DT; e++) dk[e / 16][e / 8 % 2][e / 4 % 2][e % 4] = dv[e / 16][e / 8 % 2][e / 4 % 2][e % 4] = 0.0f;
    }

    /* Where a walk over the query tiles of the group's heads is: the last tile of the first head first. */
    struct position { int head, m; };
    __device__ __forceinline__ bool done(const position &at) const { return at.head >= (kv_head + 1) * a.group; }
    __device__ __forceinline__ position next(position at) const
    {
        if (!has_mask<VARIANT>(a)) return at.m > m_first ? position{ at.head, at.m - 1 } : position{ at.head + 1, m_last - 1 };
        for (; !done(at); at = { at.head + 1, m_last }) {          /* past tiles that the mask shows nothing of */
            at.m = last_visible_tile(a.mask, mask_plane(a.mask, b, at.head), j0 / BLOCK_N, m_first, at.m);
            if (at.m >= m_first) break;
        }
        return at;
    }
    __device__ __forceinline__ position start() const
    {
        if (m_first >= m_last) return { (kv_head + 1) * a.group, 0 };
        const position at = { kv_head * a.group, m_last };
        return has_mask<VARIANT>(a) ? next(at) : position{ at.head, m_last - 1 };
    }
    __device__ __forceinline__ bool needs_no_mask(const position &at) const
    {
        return !has_mask<VARIANT>(a) || tile_is_whole(a.mask, mask_plane(a.mask, b, at.head), j0 / BLOCK_N, at.m);
    }

    __device__ __forceinline__ void load_keys(uint32_t tile, const fa_tensor &t, int d, bool aligned)
    {
        load_fp32_tile<BLOCK_N, D, THREADS>(tile, {
            (const float *)t.ptr + b * t.stride_b + (seq.k0 + j0) * t.stride_s + kv_head * t.stride_h, t.stride_s,
            seq.sk - j0, d, aligned });
    }
    /* A tile of Q or dO, and of lse2 or delta. */
    using rows = whole_fp32_tile<D, THREADS>;
    __device__ __forceinline__ void load_queries(uint32_t tile, const fa_tensor &t, int d, bool whole, bool aligned,
                                                 uint32_t scalar_row, const float *scalars, const position &at)
    {
        if (!done(at)) {
            const int i0 = at.m * BLOCK_M;
            const float *from = (const float *)t.ptr + b * t.stride_b + (seq.q0 + i0) * t.stride_s + at.head * t.stride_h;
            if (whole && i0 + BLOCK_M <= seq.sq) rows::template load<BLOCK_M>(tile, from + rows::first(t.stride_s, thread_anew()), t.stride_s);
            else load_fp32_tile<BLOCK_M, D, THREADS>(tile, { from, t.stride_s, seq.sq - i0, d, aligned });
            const int thread = thread_anew();
            if (thread < BLOCK_M / 4)
                cp_async_16(scalar_row + thread * 16, scalars + padded_row(a, seq, b, at.head) + i0 + thread * 4, 16);
        }
        cp_async_commit();
    }
    __device__ __forceinline__ void load_q(const position &at)
    {
        load_queries(q_tile, a.p.q, (int)a.p.d, a.whole_q, a.aligned_q, lse2_row, a.lse2, at);
    }
    __device__ __forceinline__ void load_dout(const position &at)
    {
        load_queries(dout_tile, a.p.dout, (int)a.p.d_v, a.whole_dout, a.aligned_dout, delta_row, a.delta, at);
    }

    __device__ __forceinline__ void load_query_cut(right_operand &y, const position &at, int row, int channel) const
    {
        const fa_tensor &q = a.p.q;
        const int i = at.m * BLOCK_M + row;
        load_right_cut(y, (const float *)q.ptr + b * q.stride_b + (int64_t)(seq.q0 + i) * q.stride_s + at.head * q.stride_h + channel,
                       i < seq.sq ? (int)a.p.d - channel : 0);
    }

    /* C^T (16, BLOCK_M) = left right^T: left is this warp's rows of a key tile, right a query tile; both have d channels. CUT is for
     * Q, of the tile `at`. APART: the small terms are summed apart, in registers of their own. Those of S are not: S rounds as it did
     * in the forward pass, which cancels in S - lse. */
    template <bool CUT, bool APART>
    __device__ __forceinline__ void product(float (&c)[1][NT][4], uint32_t left, uint32_t right, int d, const position &at)
    {
        constexpr bool PAUSE = NT > 4 && (APART || VARIANT != FA_PLAIN);
        float small[1][APART ? NT : 1][4] = {};
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) c[0][n][e] = 0.0f;
        const int thread = thread_anew(), row = thread / 32 % KEY_WARPS * 16;
        const uint32_t y_at = right + lane_rows<D>(thread & 31), x_at = y_at - right + left + row * ROW_BYTES;
        #pragma unroll STEPS
        for (int channel = 0; channel < d; channel += 16) {
            left_operand x[1];
            load_left<D, CUT>(x[0], step_rows(x_at, channel));
            #pragma unroll
            for (int n = 0; n < NT; n += 2) {
                if (PAUSE && n == 4 && opaque(channel) >= d) break;         /* never: bounds what is loaded ahead, and registers */
                right_operand y[2];
                #pragma unroll
                for (int z = 0; z < 2; z++) {
                    const uint32_t from = step_rows(y_at, channel) + (n + z) * 8 * ROW_BYTES;
                    if (!SPLIT) load_right<CUT>(y[z], from);
                    else if (CUT) load_query_cut(y[z], at, (n + z) * 8 + (lane >> 2), channel + (lane & 3) * 4);
                    else load_split_right<BLOCK_M, D>(y[z], from);
                }
                if constexpr (APART) multiply(c, small, n, x, y);
                else multiply<CUT>(c, n, x, y);
            }
        }
        if constexpr (APART) add_small(c, small);
    }

    /* out^T (CHANNELS, 16) += right^T (D, BLOCK_M) x^T (BLOCK_M, 16): this warp's channels, as far as d. */
    __device__ __forceinline__ void accumulate(float (&out)[DT / 4][2][2][4], const float (&x)[NT][4], uint32_t right, int d)
    {
        const int thread = thread_anew(), channel = thread / 32 / KEY_WARPS * CHANNELS;
        const uint32_t y_at = right + lane_column_pairs<D>(thread & 31) + channel * 4;
        constexpr int AT_ONCE = SPLIT ? (NT / 2 < QUERIES_AT_ONCE ? NT / 2 : QUERIES_AT_ONCE) : 1;
        #pragma unroll
        for (int q0 = 0; q0 < NT / 2; q0 += AT_ONCE) {
            right_operand keys[AT_ONCE][2];
            #pragma unroll
            for (int q = 0; q < AT_ONCE; q++) right_of(keys[q], x[2 * (q0 + q)], x[2 * (q0 + q) + 1]);
            #pragma unroll
            for (int j = 0; j < DT / 4; j++) {
                if (channel + j * 32 >= d) break;
                const uint32_t at = y_at + q0 * 16 * ROW_BYTES + j * 128;
                float small[2][2][4];
                multiply_column_pairs<SPLIT ? BLOCK_M : 0, D, true>(out[j], small, keys[0], at);
                #pragma unroll
                for (int q = 1; q < AT_ONCE; q++)
                    multiply_column_pairs<SPLIT ? BLOCK_M : 0, D, false>(out[j], small, keys[q], at + q * 16 * ROW_BYTES);
                add_small(out[j], small);
            }
        }
    }

    /* S^T becomes (Z P)^T but for Z's factor, dP^T becomes dS^T, two pieces of 16 queries at a time. */
    template <bool MASKED> __device__ __forceinline__ void differentiate(float (&s)[NT][4], float (&dp)[NT][4], int head, int i0)
    {
        const bool mods = has_score_mod<VARIANT>(a);
        const float slope = mods ? alibi_slope(a, b, head) : 0.0f;
        const int j = j0 + key_warp * 16 + (lane >> 2);                                 /* key of row g */
        int first[2], last[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            first[half] = MASKED ? first_query(a, seq, j + half * 8) : 0;
            last[half] = MASKED && j + half * 8 < seq.sk ? last_query(a, seq, j + half * 8) : 0;
        }
        #pragma unroll
        for (int at = 0; at < NT / 2; at += 2) {
            uint32_t bytes[2][2] = {};                                                  /* 0: kept */
            if (VARIANT == FA_DROPOUT && a.keep256 < 256) {
                const uint32_t keys = j0 / 16 + key_warp, queries = i0 / 16 + at;
                const uint32_t piece_i[2] = { queries, queries + 1 }, piece_j[2] = { keys, keys };
                dropout_bytes(bytes, a.p.rng[0], a.p.rng[1], b * (int)a.p.h + head, piece_i, piece_j, lane, true);
            }
            #pragma unroll
            for (int n = 2 * at; n < 2 * at + 4 && n < NT; n++) {
                const int column = n * 8 + (lane & 3) * 2;
                const float2 lse2 = load_shared_8(lse2_row + column * 4), delta = load_shared_8(delta_row + column * 4);
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int half = e / 2, i = i0 + column + e % 2;
                    float x = s[n][e], y = dp[n][e], derivative = 1.0f;
                    if (mods) x = modify_score<true>(a, x, slope, i + seq.sk - seq.sq - j - half * 8, derivative);
                    if (has_bias<VARIANT>(a)) {
                        bias_walk bias = bias_from(a, seq, b, head, i, j + half * 8);
                        x = fmaf(x, a.bias_scale, bias_next(bias, 0));
                    }
                    x = exp2_approx(fmaf(x, a.lse_scale, e % 2 ? -lse2.y : -lse2.x) * a.lse_exponent);
                    if (MASKED && (i < first[half] || i >= last[half])) x = 0.0f;
                    if (MASKED && has_mask<VARIANT>(a) && !shows(head, i, j + half * 8)) x = 0.0f;
                    const bool keeps = dropout_keeps(bytes[n / 2 - at], half, n % 2, e % 2, a.keep256, true);
                    if (VARIANT == FA_DROPOUT) y = keeps ? y * a.kept : 0.0f;
                    s[n][e] = VARIANT == FA_DROPOUT && !keeps ? 0.0f : x;
                    dp[n][e] = x * (y - (e % 2 ? delta.y : delta.x)) * derivative;
                }
            }
        }
    }

    __device__ __forceinline__ bool shows(int head, int i, int j) const
    {
        return mask_word(a.mask, mask_plane(a.mask, b, head), min(i, seq.sq - 1), j) >> j % 32 & 1;
    }

    /* dS (BLOCK_M, BLOCK_N) lies as load_ds() reads it: 16 queries x 8 keys are 512 bytes, 16 of each lane, which take turns so that
     * store_ds() touches every bank. Split if dO was, in whose place it lies. */
    __device__ __forceinline__ uint32_t ds_block(int i, int j) const { return ds_tile + (i / 16 * (BLOCK_N / 8) + j / 8) * 512; }
    __device__ __forceinline__ void store_ds(const float (&ds)[NT][4])
    {
        const int thread = thread_anew(), lane = thread & 31, key = thread / 32 * 16;
        if (key >= BLOCK_N) return;
        const int g = lane >> 2, t = lane & 3;                          /* key g is slot g / 2 of its eight, its queries are 2t and 2t + 1 */
        #pragma unroll
        for (int n = 0; n < NT; n += 2)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const uint32_t at = ds_block(n * 8, key + e / 2 * 8) + ((2 * t + e % 2) * 4 + g / 2 ^ 2 * t) * 16 + g % 2 * 8;
                if (SPLIT) {
                    uint32_t big[2], small[2];
                    split(ds[n][e], big[0], small[0]);
                    split(ds[n + 1][e], big[1], small[1]);
                    store_shared_8(at, big[0], big[1]);
                    store_shared_8(at + Q_BYTES, small[0], small[1]);
                } else {
                    store_shared_8(at, __float_as_uint(ds[n][e]), __float_as_uint(ds[n + 1][e]));
                }
            }
    }
    /* 16 queries x keys 16 k..: keys 2t and 2t + 1 of eight are slots t and t + 4. */
    __device__ __forceinline__ void load_ds(left_operand &x, int i0, int k)
    {
        const int lane = thread_anew() & 31;
        #pragma unroll
        for (int step = 0; step < 2; step++) {
            const uint32_t at = ds_block(i0, k * 16 + step * 8) + (lane ^ (lane >> 3) * 2) * 16;
            const uint4 four = load_shared_16(at), rest = SPLIT ? load_shared_16(at + Q_BYTES) : uint4();
            const uint32_t value[4] = { four.x, four.y, four.z, four.w }, small[4] = { rest.x, rest.y, rest.z, rest.w };
            #pragma unroll
            for (int e = 0; e < 4; e++)
                if (SPLIT) x.big[step][e] = value[e], x.small[step][e] = small[e];
                else split(__uint_as_float(value[e]), x.big[step][e], x.small[step][e]);
        }
    }

    /* dQ (BLOCK_M, D) += dS K: this warp's 16 queries x DQ_CHANNELS, 32 at a time. Elements c and c + 2 of accumulators 2x and
     * 2x + 1 are what dq_layout.cuh gives to lane 2 (t % 2) + x of block t / 2 + 2c. */
    __device__ __forceinline__ void add_dq(const position &at)
    {
        const int part = thread_anew() / 32, i0 = part % DQ_WM * 16, channel = part / DQ_WM * DQ_CHANNELS;
        const uint32_t y_at = k_tile + lane_columns<D>(lane) + channel * 4;
        const int64_t row = padded_row(a, seq, b, at.head) + at.m * BLOCK_M + i0;
        #pragma unroll 1
        for (int j = 0; j < DQ_CHANNELS && channel + j < (int)a.p.d; j += DQ_AT_ONCE) {
            float dq[DQ_AT_ONCE / 32][1][4][4] = {}, small[DQ_AT_ONCE / 32][1][4][4] = {};
            #pragma unroll 1
            for (int k = 0; k < BLOCK_N / 16; k++) {
                left_operand x[1];
                load_ds(x[0], i0, k);
                #pragma unroll
                for (int part = 0; part < DQ_AT_ONCE / 32; part++)
                    multiply_columns<D>(dq[part], small[part], x, y_at + k * 16 * ROW_BYTES + (j + part * 32) * 4);
            }
            #pragma unroll
            for (int part = 0; part < DQ_AT_ONCE / 32; part++) {
                add_small(dq[part], small[part]);
                #pragma unroll
                for (int x = 0; x < 2; x++)
                    #pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const float factor = dq_factor<FA_FLOAT32>();
                        const float (&one)[4] = dq[part][0][2 * x], (&other)[4] = dq[part][0][2 * x + 1];
                        const float four[4] = { one[c] * factor, other[c] * factor, one[c + 2] * factor, other[c + 2] * factor };
                        const int column8 = (channel + j) / 8 + part * 4 + lane % 4 / 2 + 2 * c;
                        dq_add(a.dq_accum + dq_block<D>(row, column8), lane / 4 * 4 + lane % 2 * 2 + x, four);
                    }
            }
        }
    }

    /* Deterministic dq: key tiles add to a query tile in ascending order. Tiles start in that order too, so the one waited for is
     * running or done. */
    __device__ __forceinline__ int *turn_of(const position &at) const
    {
        return a.turns + (padded_row(a, seq, b, at.head) + at.m * BLOCK_M) / 16;
    }
    __device__ __forceinline__ void wait_for_turn(const position &at) const
    {
        const int first = first_key(a, seq, at.m * BLOCK_M) / BLOCK_N;
        int before = j0 / BLOCK_N - first;
        if (has_mask<VARIANT>(a)) before = visible_tiles(a.mask, mask_plane(a.mask, b, at.head), first, j0 / BLOCK_N, at.m);
        if (threadIdx.x == 0) {
            while (*(volatile int *)turn_of(at) < before) __nanosleep(64);
            __threadfence();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void pass_turn(const position &at) const
    {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(turn_of(at), 1);
    }

    __device__ __forceinline__ void step(const position &at)
    {
        const int i0 = at.m * BLOCK_M, i_end = min(i0 + BLOCK_M, seq.sq) - 1;
        float s[1][NT][4], dp[1][NT][4];
        cp_async_wait<1>();
        if (SPLIT) split_fp32_tile<BLOCK_M, D, THREADS>(q_tile);
        __syncthreads();                            /* Q is here for all */
        product<false, false>(s, k_tile, q_tile, (int)a.p.d, at);
        if (warp_overflows(s)) product<true, false>(s, k_tile, q_tile, (int)a.p.d, at);
        cp_async_wait<0>();
        if (SPLIT) split_fp32_tile<BLOCK_M, D, THREADS>(dout_tile);
        __syncthreads();                            /* dO is here for all */
        product<false, VARIANT == FA_PLAIN || NT <= 4>(dp, v_tile, dout_tile, (int)a.p.d_v, at);
        const bool whole = first_key(a, seq, i_end) <= j0 && last_key(a, seq, i0) >= j0 + BLOCK_N && needs_no_mask(at);
        if (whole) differentiate<false>(s[0], dp[0], at.head, i0);
        else differentiate<true>(s[0], dp[0], at.head, i0);
        accumulate(dv, s[0], dout_tile, (int)a.p.d_v);
        accumulate(dk, dp[0], q_tile, (int)a.p.d);
        __syncthreads();                            /* all are done with Q and dO */
        load_q(next(at));
        store_ds(dp[0]);
        __syncthreads();                            /* dS is here for all */
        if (a.p.deterministic) wait_for_turn(at);
        add_dq(at);
        if (a.p.deterministic) pass_turn(at);
        __syncthreads();                            /* all are done with dS */
        load_dout(next(at));
    }

    __device__ __forceinline__ void run()
    {
        position at = start();
        load_keys(k_tile, a.p.k, (int)a.p.d, a.aligned_k);
        load_keys(v_tile, a.p.v, (int)a.p.d_v, a.aligned_v);
        load_q(at);
        load_dout(at);
        for (; !done(at); at = next(at)) step(at);
        cp_async_wait<0>();
    }

    /* dK or dV of this warp's keys and channels. Keys in no use get 0. */
    __device__ __forceinline__ void store(const float (&sum)[DT / 4][2][2][4], float factor, const fa_tensor &t, int d, bool aligned)
    {
        const sequence seq = sequence_of(a.p, opaque(b));       /* anew: registers of the loop */
        const int thread = thread_anew(), lane = thread & 31, warp = thread / 32, key_warp = warp % KEY_WARPS;
        #pragma unroll
        for (int x = 0; x < 4; x++) {
            const int j = j0 + key_warp * 16 + x / 2 * 8 + (lane & 3) * 2 + x % 2;
            if (j >= seq.k_rows) continue;
            float *row = (float *)t.ptr + b * t.stride_b + (seq.k0 + j) * t.stride_s + kv_head * t.stride_h;
            #pragma unroll
            for (int c = 0; c < DT / 2; c++) {
                const float (&four)[4] = sum[c / 2][c % 2][x / 2];
                const int column = warp / KEY_WARPS * CHANNELS + c / 2 * 32 + column_of(lane, c % 2);
                const float2 two = j < seq.sk ? make_float2(four[x % 2] * factor, four[x % 2 + 2] * factor) : make_float2(0.0f, 0.0f);
                if (aligned && column + 2 <= d) {
                    *(float2 *)(row + column) = two;
                } else {
                    if (column < d) row[column] = two.x;
                    if (column + 1 < d) row[column + 1] = two.y;
                }
            }
        }
    }
};

/* Key tiles of one head follow each other, ascending: the longest first if causal. */
template <int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(32 * Tile::WARPS, Tile::BLOCKS)
fp32_backward_kernel(const __grid_constant__ fa_cuda_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    using kernel = fp32_backward<D, VARIANT, Tile>;
    const block_place place = place_of_block<VARIANT>(a, (int)a.p.hk, a.n_tiles);
    kernel block(a, place.b, place.head, place.tile, shared_address(shared));
    if (block.j0 >= block.seq.k_rows) return;
    const int j_end = min(block.j0 + kernel::BLOCK_N, block.seq.sk) - 1;
    const bool used = block.j0 < block.seq.sk;
    block.m_first = used ? first_query(a, block.seq, block.j0) / kernel::BLOCK_M : 0;
    block.m_last = used ? (max(last_query(a, block.seq, j_end), 0) + kernel::BLOCK_M - 1) / kernel::BLOCK_M : 0;
    block.run();
    block.store(block.dv, VARIANT == FA_DROPOUT ? a.kept : 1.0f, a.p.dv, (int)a.p.d_v, a.aligned_dv);
    block.store(block.dk, a.scale, a.p.dk, (int)a.p.d, a.aligned_dk);
}

#endif
