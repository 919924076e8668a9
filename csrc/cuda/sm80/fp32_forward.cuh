/* cuda/sm80/fp32_forward.cuh: forward attention of fp32 tensors; a block owns BLOCK_M query rows of one head.
 *
 *     S = Q K^T    P = exp2(c S - m)    l = rowsum P    O = P V / l    lse = ln 2 (m + log2 l)        c = scale log2 e
 *
 * forward.cuh with the products of fp32.cuh: each warp owns 16 or 32 of the rows, all keys and all channels. K and V have room
 * for one tile each, and one loads while the other is worked with:
 *
 *     split K(n) | barrier | load V(n)   S = Q K(n)^T   split V(n) | barrier | load K(n - 1)   softmax   O += P V(n)
 *
 * A thread splits what it has copied itself, so that this costs no barrier. 32 rows a warp halve what it reads of K and V; from
 * D = 128 on the registers do not allow it. Channels beyond d and d_v are passed over by 16 and 32, so that few buckets suffice. */
#ifndef FA_SM80_FP32_FORWARD_CUH
#define FA_SM80_FP32_FORWARD_CUH

#include "fp32.cuh"

template <int D, enum fa_variant VARIANT, class Tile> struct fp32_forward {
    enum : int {
        WARPS = Tile::WARPS, THREADS = 32 * WARPS, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N,
        ROWS = BLOCK_M / WARPS, MT = ROWS / 16,             /* rows of a warp; 16-row pieces of them */
        NT = BLOCK_N / 8, DT = D / 8, SPLIT = Tile::SPLIT,
        STEPS = MT * NT > 2 ? 1 : 2,                        /* of S's product at once */
        PAUSE = MT == 2 && VARIANT != FA_PLAIN ? 2 : 0,        /* in a step, see scores() */
        KEYS_AT_ONCE = VARIANT == FA_PLAIN ? 2 : 1,         /* 16 each, of O's product */
        ROW_BYTES = 4 * D, Q_BYTES = BLOCK_M * ROW_BYTES,
        KV_BYTES = BLOCK_N * ROW_BYTES, KV_PLACE = (SPLIT ? 2 : 1) * KV_BYTES, SHARED_BYTES = Q_BYTES + 2 * KV_PLACE, BIAS_BYTES = 0,
    };
    static_assert(BLOCK_M % (16 * WARPS) == 0 && BLOCK_N % 16 == 0 && D % 64 == 0, "whole fragments");

    const fa_cuda_args &a;
    const int lane, warp, b, head, kv_head, i0;             /* i0: first query of the block */
    const sequence seq;
    const uint32_t q_tile, k_tile, v_tile;
    int n_first, n_last;                                    /* key tiles [first, last) */
    const float *k_at, *v_at;                               /* this thread's start in the next tile to load */

    float o[DT / 4][MT][4][4];                                    /* columns as fp32.cuh says */
    float row_max[MT][2], row_sum[MT][2];                   /* rows g and g + 8 of each piece; the sum is this lane's share */

    __device__ __forceinline__ fp32_forward(const fa_cuda_args &args, int batch, int h, int m, uint32_t shared)
        : a(args), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), b(batch), head(h), kv_head(h / args.group), i0(m * BLOCK_M),
          seq(sequence_of(args.p, batch)), q_tile(shared), k_tile(shared + Q_BYTES), v_tile(k_tile + KV_PLACE)
    {
        #pragma unroll
        for (int m_ = 0; m_ < MT; m_++) {
            #pragma unroll
            for (int half = 0; half < 2; half++) row_max[m_][half] = -INFINITY, row_sum[m_][half] = 0.0f;
            #pragma unroll
            for (int j = 0; j < DT; j++)
                #pragma unroll
                for (int e = 0; e < 4; e++) o[j / 4][m_][j % 4][e] = 0.0f;
        }
    }

    template <bool PAIRS> using rows = whole_fp32_tile<D, THREADS, PAIRS>;
    __device__ __forceinline__ void load_queries()
    {
        const fa_tensor &q = a.p.q;
        const float *from = (const float *)q.ptr + b * q.stride_b + (seq.q0 + i0) * q.stride_s + head * q.stride_h;
        if (a.whole_q && i0 + BLOCK_M <= seq.sq) rows<false>::template load<BLOCK_M>(q_tile, from + rows<false>::first(q.stride_s), q.stride_s);
        else load_fp32_tile<BLOCK_M, D, THREADS>(q_tile, { from, q.stride_s, seq.sq - i0, (int)a.p.d, a.aligned_q });
    }
    /* Tile n of K or V, if there is one, from this thread's place in it, which moves on. Tiles come in descending order: all but the
     * first exist whole. */
    template <bool PAIRS> __device__ __forceinline__ const float *place(const fa_tensor &t, int n) const
    {
        return (const float *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + n * BLOCK_N) * t.stride_s + kv_head * t.stride_h
             + rows<PAIRS>::first(t.stride_s);
    }
    template <bool PAIRS>
    __device__ __forceinline__ void load_keys(uint32_t tile, int n, const float *&at, const fa_tensor &t, int d, bool whole, bool aligned)
    {
        if (n >= n_first) {
            if (has_mask<VARIANT>(a)) at = place<PAIRS>(t, n);      /* the tile before may have been passed over */
            if (whole && n < n_last - 1) rows<PAIRS>::template load<BLOCK_N>(tile, at, t.stride_s);
            else load_fp32_tile<BLOCK_N, D, THREADS, PAIRS>(
                     tile, { at - rows<PAIRS>::first(t.stride_s), t.stride_s, seq.sk - n * BLOCK_N, d, aligned });
            at -= BLOCK_N * t.stride_s;
        }
        cp_async_commit();
    }
    __device__ __forceinline__ void load_k(int n)
    {
        load_keys<false>(k_tile, n, k_at, a.p.k, (int)a.p.d, a.whole_k, a.aligned_k);
    }
    __device__ __forceinline__ void load_v(int n)
    {
        load_keys<SPLIT>(v_tile, n, v_at, a.p.v, (int)a.p.d_v, a.whole_v, a.aligned_v);
    }

    __device__ __forceinline__ void load_keys_cut(right_operand &keys, int tile, int row, int channel) const
    {
        const fa_tensor &k = a.p.k;
        const int j = tile * BLOCK_N + row;
        load_right_cut(keys, (const float *)k.ptr + b * k.stride_b + (int64_t)(seq.k0 + j) * k.stride_s + kv_head * k.stride_h + channel,
                       j < seq.sk ? (int)a.p.d - channel : 0);
    }

    /* S (ROWS, BLOCK_N) = Q K^T, for the keys of a tile. Summed as the backward pass sums it: how S is rounded cancels in S - lse. */
    template <bool CUT> __device__ __forceinline__ void scores(float (&s)[MT][NT][4], int tile)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
        const uint32_t q_at = q_tile + warp * ROWS * ROW_BYTES + lane_rows<D>(lane), k_at = k_tile + lane_rows<D>(lane);
        #pragma unroll STEPS
        for (int channel = 0; channel < (int)a.p.d; channel += 16) {
            left_operand q[MT];
            #pragma unroll
            for (int m = 0; m < MT; m++) load_left<D, CUT>(q[m], step_rows(q_at, channel) + m * 16 * ROW_BYTES);
            #pragma unroll
            for (int n = 0; n < NT; n += 2) {
                if (n > 0 && n == PAUSE && opaque(channel) >= (int)a.p.d) break;    /* never: bounds what is loaded ahead, and registers */
                right_operand keys[2];
                #pragma unroll
                for (int x = 0; x < 2; x++) {
                    const uint32_t from = step_rows(k_at, channel) + (n + x) * 8 * ROW_BYTES;
                    if (!SPLIT) load_right<CUT>(keys[x], from);
                    else if (CUT) load_keys_cut(keys[x], tile, (n + x) * 8 + (lane >> 2), channel + (lane & 3) * 4);
                    else load_split_right<BLOCK_N, D>(keys[x], from);
                }
                multiply<CUT>(s, n, q, keys);
            }
        }
    }

    /* The tile to work with after n: the one before it that the mask shows a key of. */
    __device__ __forceinline__ int tile_after(int n) const
    {
        if (!has_mask<VARIANT>(a)) return n - 1;
        return last_visible_tile(a.mask, mask_plane(a.mask, b, head), i0 / BLOCK_M, n_first, n);
    }
    __device__ __forceinline__ bool needs_no_mask(int n) const
    {
        return !has_mask<VARIANT>(a) || tile_is_whole(a.mask, mask_plane(a.mask, b, head), i0 / BLOCK_M, n);
    }

    __device__ __forceinline__ int query(int m, int half) const { return i0 + warp * ROWS + m * 16 + half * 8 + (lane >> 2); }

    /* Score mods, then -inf where row and column do not see each other. j0: key of column 0. */
    template <bool MASKED> __device__ __forceinline__ void modify(float (&s)[MT][NT][4], int j0)
    {
        const bool mods = has_score_mod<VARIANT>(a);
        const float slope = mods ? alibi_slope(a, b, head) : 0.0f;
        const int j = j0 + (lane & 3) * 2;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half), diagonal = i + seq.sk - seq.sq - j;
                if (mods) {
                    #pragma unroll
                    for (int x = 0; x < 2 * NT; x++) {
                        float &score = s[m][x / 2][2 * half + x % 2], unused;
                        score = modify_score<true>(a, score, slope, diagonal - (x / 2 * 8 + x % 2), unused);
                    }
                }
                if (has_bias<VARIANT>(a)) {
                    bias_walk bias = bias_from(a, seq, b, head, i, j);
                    #pragma unroll
                    for (int x = 0; x < 2 * NT; x++) {
                        float &score = s[m][x / 2][2 * half + x % 2];
                        score = fmaf(score, a.bias_scale, bias_next(bias, x % 2 ? 7 : 1));
                    }
                }
                if (!MASKED) continue;
                const int first = first_key(a, seq, i) - j, last = last_key(a, seq, i) - j;
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++)
                    if (x / 2 * 8 + x % 2 < first || x / 2 * 8 + x % 2 >= last) s[m][x / 2][2 * half + x % 2] = -INFINITY;
            }
        if (MASKED && has_mask<VARIANT>(a)) hide(s, j0);
    }

    /* -inf where the mask hides the key. A word has the keys of up to four accumulators. */
    __device__ __forceinline__ void hide(float (&s)[MT][NT][4], int j0)
    {
        const int plane = mask_plane(a.mask, b, head);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int n = 0; n < NT; n += 4) {
                    const int j = j0 + n * 8;
                    const uint32_t word = mask_word(a.mask, plane, min(query(m, half), seq.sq - 1), j) >> (j % 32 + (lane & 3) * 2);
                    #pragma unroll
                    for (int x = 0; x < 8 && n + x / 2 < NT; x++)
                        if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[m][n + x / 2][2 * half + x % 2] = -INFINITY;
                }
    }

    /* S becomes P; max, sum and O follow. O is rescaled only where some row of the warp has a new maximum. The maximum is taken
     * off before scores are scaled: they may be as large as floats are. */
    __device__ __forceinline__ void softmax(float (&s)[MT][NT][4])
    {
        const float c = a.exponent_scale;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = row_max[m][half];
                #pragma unroll
                for (int n = 0; n < NT; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top = quad_max(top);
                const float shift = top == -INFINITY ? 0.0f : top;                  /* no visible key yet: every P is 0 */
                if (__any_sync(0xffffffff, top > row_max[m][half])) {
                    const float alpha = exp2_approx((row_max[m][half] - shift) * c); /* 0 for the first keys */
                    row_sum[m][half] *= alpha;
                    #pragma unroll
                    for (int j = 0; j < DT; j++) o[j / 4][m][j % 4][2 * half] *= alpha, o[j / 4][m][j % 4][2 * half + 1] *= alpha;
                }
                row_max[m][half] = top;
                float sum = 0.0f;
                #pragma unroll
                for (int n = 0; n < NT; n++)
                    #pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[m][n][2 * half + e];
                        x = exp2_approx((x - shift) * c);
                        sum += x;
                    }
                row_sum[m][half] += sum;
            }
    }

    /* Zeroes what dropout drops, two pieces at a time. The sum above does not see it. */
    __device__ __forceinline__ void drop(float (&s)[MT][NT][4], int j0)
    {
        const uint64_t seed = a.p.rng[0], offset = a.p.rng[1];
        const uint32_t batch_head = b * (int)a.p.h + head, first_i = (i0 + warp * ROWS) / 16, first_j = j0 / 16;
        constexpr int PIECES = MT * NT / 2;
        #pragma unroll
        for (int at = 0; at < PIECES; at += 2) {
            uint32_t bytes[2][2], piece_i[2], piece_j[2];
            #pragma unroll
            for (int x = 0; x < 2; x++) piece_i[x] = first_i + (at + x) % MT, piece_j[x] = first_j + (at + x) / MT;
            dropout_bytes(bytes, seed, offset, batch_head, piece_i, piece_j, lane, false);
            #pragma unroll
            for (int x = 0; x < 2 && at + x < PIECES; x++)
                #pragma unroll
                for (int column = 0; column < 2; column++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!dropout_keeps(bytes[x], e / 2, column, e % 2, a.keep256, false))
                            s[(at + x) % MT][(at + x) / MT * 2 + column][e] = 0.0f;
        }
    }

    /* O += P V */
    __device__ __forceinline__ void accumulate(const float (&s)[MT][NT][4])
    {
        const uint32_t v_at = v_tile + lane_columns<D>(lane);
        constexpr int KEYS = SPLIT && MT == 1 ? KEYS_AT_ONCE : 1;
        #pragma unroll
        for (int k0 = 0; k0 < BLOCK_N / 16; k0 += KEYS) {
            left_operand p[KEYS][MT];
            #pragma unroll
            for (int k = 0; k < KEYS; k++)
                #pragma unroll
                for (int m = 0; m < MT; m++) left_of(p[k][m], s[m][2 * (k0 + k)], s[m][2 * (k0 + k) + 1]);
            #pragma unroll
            for (int j = 0; j < DT / 4; j++) {
                if (j * 32 >= (int)a.p.d_v) break;
                float small[MT][4][4] = {};
                #pragma unroll
                for (int k = 0; k < KEYS; k++) {
                    const uint32_t at = v_at + (k0 + k) * 16 * ROW_BYTES + j * 128;
                    if constexpr (SPLIT) multiply_split_columns<BLOCK_N, D>(o[j], small, p[k], at);
                    else multiply_columns<D>(o[j], small, p[k], at);
                }
                add_small(o[j], small);
            }
        }
    }

    /* The number of the tile after n comes back. */
    template <bool MASKED> __device__ __forceinline__ int tile(int n)
    {
        float s[MT][NT][4];
        const int after = tile_after(n);
        cp_async_wait<0>();
        if (SPLIT) split_fp32_tile<BLOCK_N, D, THREADS>(k_tile);
        __syncthreads();                            /* K(n) is here for all, and all are done with V(n + 1) */
        load_v(n);
        scores<false>(s, n);
        if (warp_overflows(s)) scores<true>(s, n);
        cp_async_wait<0>();
        if (SPLIT) split_fp32_pairs<BLOCK_N, D, THREADS>(v_tile);
        __syncthreads();                            /* V(n) is here for all, and all are done with K(n) */
        load_k(after);
        if (MASKED || VARIANT != FA_PLAIN) modify<MASKED>(s, n * BLOCK_N);
        softmax(s);
        if (VARIANT == FA_DROPOUT && a.keep256 < 256) drop(s, n * BLOCK_N);
        accumulate(s);
        return after;
    }

    /* Tiles from `n_last - 1` down to `n_first`; those in [whole_first, whole_last) every row of the block sees whole. */
    __device__ __forceinline__ void run()
    {
        const int i_end = min(i0 + BLOCK_M, seq.sq) - 1;
        const int whole_first = (first_key(a, seq, i_end) + BLOCK_N - 1) / BLOCK_N;
        const int whole_last = max(last_key(a, seq, i0), 0) / BLOCK_N;
        load_queries();
        k_at = place<false>(a.p.k, n_last - 1);
        v_at = place<SPLIT>(a.p.v, n_last - 1);
        int n = tile_after(n_last);
        load_k(n);
        while (n >= n_first) {
            while (n >= n_first && (n >= whole_last || n < whole_first || !needs_no_mask(n))) n = tile<true>(n);
            while (n >= n_first && n >= whole_first && needs_no_mask(n)) n = tile<false>(n);
        }
        cp_async_wait<0>();
    }

    /* Normalises O; lse of row g + 8 half of piece m comes back, in two parts as in forward.cuh. */
    __device__ __forceinline__ float2 finish_row(int m, int half)
    {
        const float sum = quad_sum(row_sum[m][half]);
        const bool empty = row_max[m][half] == -INFINITY && sum == 0.0f;
        const float factor = empty ? 0.0f : (VARIANT == FA_DROPOUT ? a.kept : 1.0f) / sum;
        #pragma unroll
        for (int j = 0; j < DT; j++) o[j / 4][m][j % 4][2 * half] *= factor, o[j / 4][m][j % 4][2 * half + 1] *= factor;
        return empty ? make_float2(-INFINITY, 0.0f)
                     : make_float2(row_max[m][half] * (0.69314718f * a.exponent_scale), 0.69314718f * log2_approx(sum));
    }

    /* This lane's share of a row: `d` columns. */
    __device__ __forceinline__ void store_row(float *row, int m, int half, int d, bool aligned) const
    {
        #pragma unroll
        for (int j = 0; j < DT; j += 4)
            #pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++)
                store_chunk(row, j * 8 + e % 2 * 16 + (lane & 3) * 4, d, aligned,
                            make_float4(o[j / 4][m][0][e], o[j / 4][m][1][e], o[j / 4][m][2][e], o[j / 4][m][3][e]));
    }

    __device__ __forceinline__ void store()
    {
        const fa_params &p = a.p;
        float *lse = (float *)p.lse.ptr + b * p.lse.stride_b + head * p.lse.stride_h;
        float *out = (float *)p.out.ptr + b * p.out.stride_b + head * p.out.stride_h;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half);
                const float2 value = finish_row(m, half);
                if (i >= seq.sq) continue;
                if ((lane & 3) == 0) lse[(seq.q0 + i) * p.lse.stride_s] = value.x + value.y;
                store_row(out + (seq.q0 + i) * p.out.stride_s, m, half, (int)p.d_v, a.aligned_out);
            }
    }

    /* A split's share of the keys: normalised within the split; combine.cu merges. Rows count as lse's do. */
    __device__ __forceinline__ void store_partial(int split)
    {
        const fa_params &p = a.p;
        const int64_t rows = p.cu_q ? p.total_q * p.h : p.b * p.h * p.sq;
        const int64_t row0 = p.cu_q ? head * p.total_q + seq.q0 : ((int64_t)b * p.h + head) * p.sq;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half);
                const float2 value = finish_row(m, half);
                if (i >= seq.sq) continue;
                const int64_t row = split * rows + row0 + i;
                if ((lane & 3) == 0) ((float2 *)a.partial_lse)[row] = value;
                store_row(a.partial_out + row * D, m, half, D, true);
            }
    }
};

/* Blocks of one head follow each other, longest rows first: its K and V stay in L2. */
template <int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(32 * Tile::WARPS, Tile::BLOCKS)
fp32_forward_kernel(const __grid_constant__ fa_cuda_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    using kernel = fp32_forward<D, VARIANT, Tile>;
    const block_place place = place_of_block<VARIANT>(a, (int)a.p.h, a.m_tiles);
    kernel block(a, place.b, place.head, a.m_tiles - 1 - place.tile, shared_address(shared));
    if (block.i0 >= block.seq.sq) return;
    const int i_end = min(block.i0 + kernel::BLOCK_M, block.seq.sq) - 1;
    const int first = first_key(a, block.seq, block.i0) / kernel::BLOCK_N;
    const int last = (max(last_key(a, block.seq, i_end), 0) + kernel::BLOCK_N - 1) / kernel::BLOCK_N;
    const int share = (last - first + a.splits - 1) / a.splits;
    block.n_first = first + blockIdx.y * share;
    block.n_last = min(block.n_first + share, last);
    block.run();
    if (a.splits > 1) block.store_partial(blockIdx.y);
    else block.store();
}

#endif
