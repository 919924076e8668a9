/* cuda/sm90/forward.cuh: forward attention on Hopper: TMA and wgmma, one persistent block a multiprocessor.
 *
 *     S = Q K^T    P = exp2(c S - m)    l = rowsum P    O = P V / l    lse = ln 2 (m + log2 l)        c = scale log2 e
 *
 * Roles. One producer thread loads Q, K and V by TMA. GROUPS consumer warpgroups own 64 query rows each, all keys, all channels:
 * softmax needs no other warpgroup. K and V have rings of their own, full and empty barriers. Another thread may hand finished rows to
 * TMA. With dropout warps beside the producer may draw the mask.
 *
 * Pipeline. A block works through a stream of key blocks that does not end where a tile does: while the tensor cores multiply
 * P(n) V(n), S(n + 1) = Q K(n + 1)^T has been issued before, and softmax(n + 1) runs behind both,
 *
 *     issue S(n + 1) | issue O += P(n) V(n) | wait S | softmax(n + 1) | wait O | rescale O | P(n + 1) to 16 bits
 *
 * also where n is a tile's last block and n + 1 the next tile's first: O then goes out while the other warpgroups keep the tensor
 * cores busy. With one place for Q, O += P(n) V(n) comes first there, and O goes out beside S(n + 1). With PING_PONG the warpgroups
 * issue in turn, so that one's softmax runs behind another's products. Key blocks that some row does not see whole take a copy of the
 * step with masks. Keys run from last to first. With SKIPS a warpgroup starts with the last block that its own rows see, at most STAGES
 * after the others, since it holds the last V of the tile before; a tile in which it has no rows passes by.
 *
 * Limit: the tensor cores, 76 % busy at d 128 and 4k keys, as far as the power limit lets the clock go; at 512 keys the length of
 * what a warpgroup does between its products, and at d 64 that warpgroups do it at the same time. No branch that only some warps or
 * lanes take may stand in a loop with products: ptxas would keep their descriptors in vector registers.
 * H100, bf16, 16k tokens: d 64, 128, 256 reach 558, 711, 811 TFLOP/s. */
#ifndef FA_SM90_FORWARD_CUH
#define FA_SM90_FORWARD_CUH

#include "../score.cuh"
#include "forward_dropout.cuh"

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile> struct forward_consumer : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::STAGES, shape::GROUPS, shape::BLOCK_M, shape::BLOCK_N, shape::Q_STAGES, shape::PANELS;
    enum : int { OVER, ROWS, NO_ROWS };
    enum : int { S_COUNT = BLOCK_N / 2, O_COUNT = D / 2, NT = BLOCK_N / 8, PIECES = BLOCK_N / 16, PIECE_BYTES = 16 * 128,
                 DRAWN = shape::DRAWN, OWN_PIECES = FA_HAS_DROPOUT(VARIANT) && DRAWN < PIECES ? PIECES - DRAWN : 1 };
    static_assert(Q_STAGES > 1 || shape::O_PANELS > 0, "finished rows leave by way of Q, or of a place of their own");
    static_assert(!FA_HAS_DROPOUT(VARIANT) || DRAWN == 0 || DRAWN == PIECES, "factors differ");
    static_assert(!shape::SKIPS || (Tile::BY_TMA && Q_STAGES > 1 && !DRAWN), "a tile without rows of a warpgroup");
    static_assert(!Tile::BY_TMA || Q_STAGES > 1 || PANELS % shape::O_PANELS == 0, "forward_storer takes O_PANELS panels");
    static_assert(Q_STAGES != 2 || !Tile::BY_TMA, "one Q at hand, one to come, and one on its way out");

    const fa_sm90_forward_args &f;
    const fa_cuda_args &a;
    const uint32_t shared;
    const int group, warp, lane;
    int n_first, n_last;                        /* key blocks [first, last) of the tile at hand */
    int keys, values, tiles;                    /* places used so far in the rings of K and V; tiles begun */

    float s[S_COUNT];                           /* (64, BLOCK_N) */
    float o[O_COUNT];                           /* (64, D) */
    uint32_t p[PIECES][4];                      /* (64, BLOCK_N), left operands */
    float row_max[2], row_sum[2];               /* rows g and g + 8; the sum is this lane's share */

    __device__ __forceinline__ forward_consumer(const fa_sm90_forward_args &args, uint32_t smem)
        : f(args), a(args.a), shared(smem), group(__shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1), warp(threadIdx.x / 32 % 4),
          lane(threadIdx.x % 32), keys(0), values(0), tiles(0) {}

    /* d 256 has no registers for score mods beside dropout: kernel.c refuses such calls. */
    __device__ __forceinline__ bool modifies() const { return (VARIANT != FA_DROPOUT || D < 256) && has_score_mod<VARIANT>(a); }
    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }
    __device__ __forceinline__ void release(int n) { if (lane == 0) mbarrier_arrive(barrier(n)); }

    /* The n-th tile of the stream; its place is taken again when n has long been stored. */
    __device__ __forceinline__ forward_tile_info info(int n) const
    {
        const uint32_t at = shared + shape::INFO_AT + n % shape::INFOS * sizeof(forward_tile_info);
        const uint4 x = load_shared_16(at), y = load_shared_16(at + 16);
        const float2 z = load_shared_8(at + 32);
        return { (int)x.x, (int)x.y, (int)x.z, (int)x.w, (int)y.x, (int)y.y, (int)y.z, (int)y.w, __float_as_int(z.x), __float_as_int(z.y) };
    }
    /* SKIPS: the last key blocks of the tile, that none of this warpgroup's rows sees; below 0: it has no rows. */
    __device__ __forceinline__ int unseen() const
    {
        if (!shape::SKIPS) return 0;
        const forward_tile_info t = info(tiles - 1);
        const sequence seq = { t.q0, 0, t.sq, t.sk, t.sq, t.sk };
        const int first = t.i0 + group * 64, seen = (max(last_key(a, seq, min(first + 64, t.sq) - 1), 0) + BLOCK_N - 1) / BLOCK_N;
        return first < t.sq ? min(t.n_last - max(seen, t.n_first + 1), STAGES) : -1;
    }
    /* Goes on to the next tile, its Q in shared memory: ROWS, NO_ROWS of this warpgroup, or that was the last. */
    __device__ __forceinline__ int next_tile()
    {
        const int stage = tiles % Q_STAGES, parity = tiles / Q_STAGES & 1;
        mbarrier_wait(barrier(shape::Q_FULL + stage), parity);
        const forward_tile_info t = info(tiles++);
        const int left = unseen();
        n_first = t.n_first, n_last = t.n_last - max(left, 0);
        return t.b < 0 ? OVER : left < 0 ? NO_ROWS : ROWS;
    }
    /* Key blocks that every row sees whole, of the tile or, with SKIPS, of this warpgroup. */
    __device__ __forceinline__ void whole_blocks(int &first, int &last) const
    {
        const forward_tile_info t = info(tiles - 1);
        first = t.whole_first, last = t.whole_last;
        if (!shape::SKIPS) return;
        const sequence seq = { t.q0, 0, t.sq, t.sk, t.sq, t.sk };
        const int i = t.i0 + group * 64;
        first = (first_key(a, seq, min(i + 64, t.sq) - 1) + BLOCK_N - 1) / BLOCK_N;
        last = max(last_key(a, seq, i), 0) / BLOCK_N;
    }
    /* Lengths and first query of the tile at hand, read anew: kept over the main loop they would cost registers. */
    __device__ __forceinline__ sequence current(int &i0) const
    {
        const forward_tile_info t = info(tiles - 1);
        i0 = t.i0;
        return { t.q0, 0, t.sq, t.sk, t.sq, t.sk };
    }

    /* S = Q K^T of the next key block. */
    __device__ __forceinline__ void issue_scores()
    {
        const uint32_t q = matrix_at(shared + shape::Q_AT + (tiles - 1) % Q_STAGES * shape::Q_BYTES + group * 64 * 128);
        const uint32_t k = matrix_at(shared + shape::K_AT + keys % STAGES * shape::KV_BYTES);
        #pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            wgmma<T, BLOCK_N>::ss(s, descriptor(advance(q, kk / 4 * BLOCK_M * 128 + kk % 4 * 32)),
                                  descriptor(advance(k, kk / 4 * BLOCK_N * 128 + kk % 4 * 32)), kk > 0);
        wgmma_commit();
    }
    /* O += P V of the block before; the first of a tile starts O anew. */
    __device__ __forceinline__ void issue_output(bool accumulate)
    {
        const uint32_t v = matrix_at(shared + shape::V_AT + values % STAGES * shape::KV_BYTES, BLOCK_N * 128);
        #pragma unroll
        for (int kk = 0; kk < PIECES; kk++)
            wgmma<T, D, 0, 1>::rs(o, p[kk], descriptor(advance(v, kk * 2048)), accumulate || kk > 0);
        wgmma_commit();
    }
    /* The place for finished rows, for those of the n-th tile. */
    __device__ __forceinline__ void wait_o(int n) { mbarrier_wait(barrier(shape::O_EMPTY), (n & 1) ^ 1); }
    __device__ __forceinline__ void wait_k() { mbarrier_wait(barrier(shape::K_FULL + keys % STAGES), keys / STAGES & 1); }
    __device__ __forceinline__ void wait_v() { mbarrier_wait(barrier(shape::V_FULL + values % STAGES), values / STAGES & 1); }

    /* Blocks that this warpgroup does not see are let go when they are here. */
    __device__ __forceinline__ void pass_keys()
    {
        #pragma unroll 1
        for (int left = unseen(); left > 0; left--) {
            turn(), pass_turn();
            wait_k();
            release(shape::K_EMPTY + keys++ % STAGES);
        }
    }
    __device__ __forceinline__ void pass_values()
    {
        #pragma unroll 1
        for (int left = unseen(); left > 0; left--) {
            wait_v();
            release(shape::V_EMPTY + values++ % STAGES);
        }
    }

    /* Rows of V beyond the sequence: P is 0 there, and 0 times another sequence's NaN is NaN. Every warpgroup zeroes them all. */
    __device__ __forceinline__ void clear_tail(int left)
    {
        const uint32_t v = shared + shape::V_AT + values % STAGES * shape::KV_BYTES;
        const int thread = thread_anew();
        for (int at = max(left, 0) * 8 + thread % 128; at < BLOCK_N * 8; at += 128)
            #pragma unroll
            for (int panel = 0; panel < PANELS; panel++) store_shared_16(v + panel * BLOCK_N * 128 + at * 16, make_uint4(0, 0, 0, 0));
        fence_proxy_async();
        __syncwarp();                               /* lanes may have gone round a different number of times */
        barrier_sync(7 + thread / 128, 128);
    }
    __device__ __forceinline__ bool has_tail(int n) const
    {
        return (a.p.cu_k || a.p.seqused_k) && (n + 1) * BLOCK_N > info(tiles - 1).sk;
    }

    /* Bits of this lane's columns 0, 1, 8, 9, 16, ... of a row that lie below `end`. */
    static __device__ __forceinline__ uint32_t columns_below(int end)
    {
        static_assert(2 * NT <= 32, "a bit a column");
        const int count = end <= 0 ? 0 : 2 * (end / 8) + min(end % 8, 2);
        return count < 32 ? (1u << count) - 1 : ~0u;
    }

    /* Score mods, then -inf where row and column do not see each other. j0: key of column 0. */
    template <bool MASKED> __device__ __forceinline__ void modify(int n)
    {
        int i0;
        const sequence seq = current(i0);
        const int j0 = n * BLOCK_N + lane % 4 * 2;
        const float slope = modifies() ? alibi_slope(a, info(tiles - 1).b, info(tiles - 1).head) : 0.0f;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = i0 + group * 64 + warp * 16 + half * 8 + lane / 4, diagonal = i + seq.sk - seq.sq;
            if (modifies()) {
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) {
                    float unused, &score = s[x / 2 * 4 + 2 * half + x % 2];
                    score = modify_score(a, score, slope, diagonal - (j0 + x / 2 * 8 + x % 2), unused);
                }
            }
            if (!MASKED) continue;
            const uint32_t seen = columns_below(last_key(a, seq, i) - j0) & ~columns_below(first_key(a, seq, i) - j0);
            #pragma unroll
            for (int x = 0; x < 2 * NT; x++)
                if (!(seen >> x & 1)) s[x / 2 * 4 + 2 * half + x % 2] = -INFINITY;
        }
    }

    /* S becomes P in fp32; sums follow. O is to be multiplied by alpha where this says so: a maximum that grew by less than 2^LAG is
     * left as it is, and P may be that much larger than 1. */
    template <bool MASKED> __device__ __forceinline__ bool softmax(float (&alpha)[2])
    {
        const float c = a.exponent_scale, LAG = 8.0f;
        float top[2];
        bool moved = false;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = row_max[half], y = s[2 * half + 1];
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                x = fmaxf(x, s[4 * n + 2 * half]);
                if (n) y = fmaxf(y, s[4 * n + 2 * half + 1]);
            }
            top[half] = quad_max(fmaxf(x, y));
            moved |= (top[half] - row_max[half]) * c > LAG;
        }
        moved = __any_sync(0xffffffff, moved);
        float sum[2] = { 0.0f, 0.0f };
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            alpha[half] = row_max[half];
            row_max[half] = moved ? top[half] : row_max[half];
            const float shift = MASKED && row_max[half] == -INFINITY ? 0.0f : row_max[half] * c;     /* no visible key yet: P = 0 */
            float odd = 0.0f;
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                float &x = s[4 * n + 2 * half], &y = s[4 * n + 2 * half + 1];
                x = exp2_approx(fmaf(x, c, -shift));
                y = exp2_approx(fmaf(y, c, -shift));
                sum[half] += x;
                odd += y;
            }
            sum[half] += odd;
        }
        /* The condition waits for the sums, else the compiler moves the exponentials below the next wait for the tensor cores. They
         * are never below 0, but NaN in one row must not keep the other from being rescaled. */
        if (moved & !(sum[0] + sum[1] < 0.0f)) {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                alpha[half] = row_max[half] == -INFINITY ? 0.0f : exp2_approx((alpha[half] - row_max[half]) * c);
                row_sum[half] *= alpha[half];
            }
        }
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
        return moved;
    }

    /* Bytes of the dropout mask of two 16x16 pieces, `at` and the next of those that nobody draws beside. */
    __device__ __forceinline__ void draw(uint32_t (&bytes)[2][2], uint64_t seed, int n, int at)
    {
        const forward_tile_info t = info(tiles - 1);
        const uint32_t row = (t.i0 + group * 64 + warp * 16) / 16, first = n * PIECES + DRAWN + at;
        const uint32_t piece_i[2] = { row, row }, piece_j[2] = { first, first + 1 };
        dropout_bytes(bytes, seed, a.p.rng[1], t.b * (int)a.p.h + t.head, piece_i, piece_j, lane, false);
    }
    /* Of all of them, where there are registers for it beside products in flight. */
    __device__ __forceinline__ void dropout_flags(uint32_t (&flags)[OWN_PIECES][2], int n)
    {
        static_assert(!FA_HAS_DROPOUT(VARIANT) || (PIECES - DRAWN) % 2 == 0, "pieces are drawn in pairs");
        if (!FA_HAS_DROPOUT(VARIANT) || OWN_PIECES < 2 || Tile::LATE) return;
        uint64_t seed = a.p.rng[0];
        asm volatile("" : "+l"(seed));              /* else a loop keeps the keys of all rounds in registers: spills */
        #pragma unroll
        for (int at = 0; at < OWN_PIECES; at += 2) {
            uint32_t bytes[2][2];
            draw(bytes, seed, n, at);
            #pragma unroll
            for (int x = 0; x < 4; x++) flags[at + x / 2][x % 2] = bytes[x / 2][x % 2];
        }
    }
    /* P as left operands of the product with V, without what dropout drops. */
    __device__ __forceinline__ void pack_p(const uint32_t (&own)[OWN_PIECES][2], int n)
    {
        uint32_t late[2][2];
        uint64_t seed = FA_HAS_DROPOUT(VARIANT) && Tile::LATE ? a.p.rng[0] : 0;
        if (FA_HAS_DROPOUT(VARIANT) && Tile::LATE) asm volatile("" : "+l"(seed));
        uint32_t drawn[DRAWN ? shape::FLAG_WORDS : 1];
        if constexpr (DRAWN > 0) {
            const int place = keys - 1, stage = place % shape::FLAG_STAGES;     /* keys: scores_done() was here */
            mbarrier_wait(barrier(shape::FLAGS_FULL + stage), place / shape::FLAG_STAGES & 1);
            #pragma unroll
            for (int w = 0; w < shape::FLAG_WORDS; w++)
                drawn[w] = load_shared_4(shared + shape::FLAGS_AT + stage * shape::FLAGS_BYTES
                                         + (w * 128 * GROUPS + (group * 4 + warp) * 32 + lane) * 4);
            __syncwarp();
            release(shape::FLAGS_EMPTY + stage);
        }
        #pragma unroll
        for (int k = 0; k < PIECES; k++) {
            uint32_t z[4], flags[2] = {};
            if constexpr (FA_HAS_DROPOUT(VARIANT)) {
                if (Tile::LATE && k % 2 == 0) draw(late, seed, n, k);
                if (Tile::LATE) kept_pairs(z, late[k % 2][0], late[k % 2][1], dropout_threshold(a.keep256));
                else if (k >= DRAWN) kept_pairs(z, own[max(k - DRAWN, 0)][0], own[max(k - DRAWN, 0)][1], dropout_threshold(a.keep256));
                else for (int c = 0; c < 2; c++) flags[c] = drawn[DRAWN ? k / 4 : 0] << 2 * k % 8 + c;
            }
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                p[k][r] = pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
                if (!FA_HAS_DROPOUT(VARIANT)) continue;
                if (k >= DRAWN) p[k][r] = keep_pair<T>(p[k][r], z[2 * (r % 2) + r / 2]);
                else p[k][r] &= ~dropped_pair(flags, 2 * (r % 2) + r / 2);
            }
        }
    }

    /* Factors that normalise rows g and g + 8 of a finished tile; lse goes out. */
    __device__ __forceinline__ void finish_rows(float (&factor)[2], int n)
    {
        const forward_tile_info t = info(n);
        const int first = t.i0 + group * 64 + warp * 16;
        const fa_tensor &to = a.p.lse;
        float *lse = (float *)to.ptr + t.b * to.stride_b + t.head * to.stride_h;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(row_sum[half]);
            const bool empty = row_max[half] == -INFINITY && sum == 0.0f;
            const int i = first + half * 8 + lane / 4;
            factor[half] = empty ? 0.0f : (FA_HAS_DROPOUT(VARIANT) ? a.kept * (DRAWN ? 1.0f : kept_factor<T>()) : 1.0f) * rcp_approx(sum);
            if (i < t.sq && lane % 4 == 0)
                lse[(int64_t)(t.q0 + i) * to.stride_s] = empty ? -INFINITY : 0.69314718f * (row_max[half] * a.exponent_scale + log2_approx(sum));
        }
    }

    static __device__ __forceinline__ constexpr int width_of(int panel) { return panel * 64 + 64 <= D ? 64 : D % 64; }

    /* 64 columns of this warp's rows of O, to shared memory as 16-bit elements, and from there to memory, full lines. */
    __device__ __forceinline__ void stage(uint32_t piece, int panel, const float (&factor)[2])
    {
        #pragma unroll
        for (int j = panel * 4; j < panel * 4 + width_of(panel) / 16; j++) {
            uint32_t x[4];
            #pragma unroll
            for (int r = 0; r < 4; r++) x[r] = pack<T>(o[8 * j + 2 * r] * factor[r % 2], o[8 * j + 2 * r + 1] * factor[r % 2]);
            stmatrix(piece + lane % 16 * 128 + ((2 * j + lane / 16) % 8 * 16 ^ lane % 8 * 16), x[0], x[1], x[2], x[3]);
        }
    }
    __device__ __forceinline__ void store_panel(uint32_t piece, int panel, uint16_t *out, int rows) const
    {
        const int chunks = width_of(panel) / 8, step = 32 / chunks, row = lane / chunks, chunk = lane % chunks;
        const int left = (int)a.p.d_v - panel * 64 - chunk * 8;
        const uint32_t from = piece + row * 128;
        uint16_t *to = out + row * a.p.out.stride_s + panel * 64 + chunk * 8;
        if (a.aligned_out && a.p.d_v % 8 == 0) {
            uint4 x[4];
            #pragma unroll
            for (int i = 0; i < 16; i += step) x[i / step] = load_shared_16(from + i * 128 + (chunk * 16 ^ (row + i) % 8 * 16));
            #pragma unroll
            for (int i = 0; i < 16; i += step)
                if (row + i < rows && left > 0) store_global_16(to + i * a.p.out.stride_s, x[i / step]);
        } else {
            #pragma unroll 1
            for (int i = 0; i < 16; i += step) {
                const uint4 x = load_shared_16(from + i * 128 + (chunk * 16 ^ (row + i) % 8 * 16));
                const uint32_t words[4] = { x.x, x.y, x.z, x.w };
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    if (row + i < rows && e < left) to[i * a.p.out.stride_s + e] = (uint16_t)(words[e / 2] >> 16 * (e % 2));
            }
        }
    }

    /* O of a finished tile, normalised, by way of this warp's rows of its Q, or of a place of its own. With BY_TMA what is there last
     * leaves while the warp goes on; rows beside another sequence's leave by hand. */
    __device__ __forceinline__ void store(int n, const float (&factor)[2])
    {
        constexpr int BATCH = Q_STAGES > 1 ? PANELS : shape::O_PANELS;      /* panels that there is room for at a time */
        const forward_tile_info t = info(n);
        const fa_tensor &to = a.p.out;
        const int first = t.i0 + group * 64 + warp * 16;
        uint16_t *out = (uint16_t *)to.ptr + t.b * to.stride_b + (int64_t)(t.q0 + first) * to.stride_s + t.head * to.stride_h;
        const uint32_t own = Q_STAGES > 1 ? shared + shape::Q_AT + n % Q_STAGES * shape::Q_BYTES + (group * 64 + warp * 16) * 128
                           : shared + shape::O_AT + (group * 4 + warp) * BATCH * PIECE_BYTES;
        const int pitch = Q_STAGES > 1 ? BLOCK_M * 128 : PIECE_BYTES;
        if (Q_STAGES == 1 && Tile::BY_TMA) wait_o(n);
        __syncwarp();
        #pragma unroll
        for (int batch = 0; batch < PANELS; batch += BATCH) {
            #pragma unroll
            for (int panel = batch; panel < min(batch + BATCH, PANELS); panel++) stage(own + (panel - batch) * pitch, panel, factor);
            fence_proxy_async();                                            /* TMA reads or writes here next */
            __syncwarp();
            const bool leaves = Tile::BY_TMA && batch + BATCH >= PANELS;    /* see forward_storer */
            if (!leaves || !f.store || a.p.cu_q) {                          /* the same for all warps */
                const int rows = leaves && leaves_by_tma(f, first, t.sq) ? 0 : t.sq - first;
                #pragma unroll
                for (int panel = batch; panel < min(batch + BATCH, PANELS); panel++) store_panel(own + (panel - batch) * pitch, panel, out, rows);
                __syncwarp();
            }
        }
        if (Tile::BY_TMA || Q_STAGES > 1) release((Tile::BY_TMA ? shape::O_FULL : shape::Q_EMPTY) + n % Q_STAGES);
    }
    __device__ __forceinline__ void scores_done(int n)
    {
        wgmma_result(s);
        release(shape::K_EMPTY + keys % STAGES);
        keys++;
        if (Q_STAGES == 1 && n == n_first) release(shape::Q_EMPTY);
    }

    /* The scores of key block n beside the products of the block before, whose P is in registers. */
    template <bool MASKED> __device__ __forceinline__ void step(int n, bool accumulate)
    {
        uint32_t flags[OWN_PIECES][2];
        float alpha[2];
        if (MASKED && has_tail(n + 1)) {
            wait_v();
            clear_tail(info(tiles - 1).sk - (n + 1) * BLOCK_N);
        }
        wait_k();
        turn();
        wgmma_fence();
        issue_scores();
        wait_v();
        wgmma_fence();
        issue_output(accumulate);
        pass_turn();
        dropout_flags(flags, n);
        wgmma_wait<1>();
        scores_done(n);
        if (MASKED || modifies()) modify<MASKED>(n);
        const bool moved = softmax<MASKED>(alpha);
        wgmma_wait<0>();
        wgmma_result(o);
        wgmma_result(s);
        release(shape::V_EMPTY + values++ % STAGES);
        if (moved) {
            #pragma unroll
            for (int j = 0; j < O_COUNT; j++) o[j] *= alpha[j / 2 % 2];
        }
        pack_p(flags, n);
    }

    __device__ __forceinline__ bool takes_turns() const { return Tile::PING_PONG == 1 || (Tile::PING_PONG == 2 && a.window_right < 0); }
    __device__ __forceinline__ void turn() { if (Tile::PING_PONG) barrier_sync_if(takes_turns(), 1 + group, 256); }
    __device__ __forceinline__ void pass_turn() { if (Tile::PING_PONG) barrier_arrive_if(takes_turns(), 1 + (group + 1) % GROUPS, 256); }

    __device__ __forceinline__ bool is_whole(int n) const
    {
        int first, last;
        whole_blocks(first, last);
        return n >= first && n < last;
    }
    /* Softmax of a tile's first block. */
    __device__ __forceinline__ void begin_rows(int n)
    {
        float unused[2];
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0.0f;
        if (!is_whole(n)) modify<true>(n);
        else if (modifies()) modify<false>(n);
        softmax<true>(unused);
    }

    /* From the last block of a tile to the first of the next; false where that was the last tile. Where the next Q can only come now,
     * the last product with V does not wait for it. */
    __device__ __forceinline__ int next(bool accumulate)
    {
        uint32_t flags[OWN_PIECES][2];
        const int finished = tiles - 1;
        float factor[2];
        if (has_tail(n_first)) {
            wait_v();
            clear_tail(info(tiles - 1).sk - n_first * BLOCK_N);
        }
        if (Q_STAGES == 1) {
            wait_v();
            wgmma_fence();
            issue_output(accumulate);
        }
        const int then = next_tile();
        if (then != ROWS) {
            if (Q_STAGES > 1) {
                turn();
                wait_v();
                wgmma_fence();
                issue_output(accumulate);
                pass_turn();
            }
            finish_rows(factor, finished);
            wgmma_wait<0>();
            wgmma_result(o);
            release(shape::V_EMPTY + values++ % STAGES);
            store(finished, factor);
            return then;
        }
        const int n = n_last - 1;
        pass_keys();
        wait_k();
        turn();
        wgmma_fence();
        issue_scores();
        if (Q_STAGES > 1) {
            wait_v();
            wgmma_fence();
            issue_output(accumulate);
        }
        pass_turn();
        finish_rows(factor, finished);
        if (Q_STAGES > 1) dropout_flags(flags, n);
        wgmma_wait<1>();
        if (Q_STAGES == 1) {
            wgmma_result(o);
            release(shape::V_EMPTY + values++ % STAGES);
            store(finished, factor);
            dropout_flags(flags, n);
            wgmma_wait<0>();
        }
        scores_done(n);
        begin_rows(n);
        if (Q_STAGES > 1) {
            wgmma_wait<0>();
            wgmma_result(o);
            wgmma_result(s);
            release(shape::V_EMPTY + values++ % STAGES);
        }
        pack_p(flags, n);
        if (Q_STAGES > 1) store(finished, factor);
        pass_values();
        return ROWS;
    }

    /* A tile beyond this warpgroup's rows. */
    __device__ __forceinline__ void pass_tile()
    {
        release(shape::O_FULL + (tiles - 1) % Q_STAGES);
        #pragma unroll 1
        for (int n = n_first; n < n_last; n++) {
            turn(), pass_turn();
            wait_k();
            release(shape::K_EMPTY + keys++ % STAGES);
            wait_v();
            release(shape::V_EMPTY + values++ % STAGES);
        }
    }

    __device__ __forceinline__ void run()
    {
        uint32_t flags[OWN_PIECES][2];
        if (group == GROUPS - 1 && takes_turns()) barrier_arrive(1, 256);
        int then = next_tile();
        while (then != OVER) {
            if (shape::SKIPS && then == NO_ROWS) {
                pass_tile();
                then = next_tile();
                continue;
            }
            pass_keys();
            wait_k();
            wgmma_fence();
            issue_scores();
            dropout_flags(flags, n_last - 1);
            wgmma_wait<0>();
            scores_done(n_last - 1);
            begin_rows(n_last - 1);
            pack_p(flags, n_last - 1);
            pass_values();
            do {
                int whole_first, whole_last;
                whole_blocks(whole_first, whole_last);
                bool accumulate = false;
                int n = n_last - 2;
                /* The first step clears the tail, whether the block after is whole or not. */
                while (n >= n_first) {
                    for (; n >= n_first && (n >= whole_last || n < whole_first || has_tail(n + 1)); n--) step<true>(n, accumulate), accumulate = true;
                    for (; n >= n_first && n >= whole_first; n--) step<false>(n, accumulate), accumulate = true;
                }
                then = next(accumulate);
            } while (then == ROWS);
            if (!shape::SKIPS) break;
        }
        if constexpr (Tile::BY_TMA) {                                      /* there is no tile more */
            if (Q_STAGES == 1) wait_o(tiles - 1);
            release(shape::O_FULL + (tiles - 1) % Q_STAGES);
        }
    }
};

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(forward_shape<D, Tile>::THREADS, Tile::BLOCKS) forward_kernel(const __grid_constant__ fa_sm90_forward_args f)
{
    extern __shared__ uint8_t dynamic[];
    using shape = forward_shape<D, Tile>;
    const uint32_t shared = (shared_address(dynamic) + shape::ALIGNMENT - 1) / shape::ALIGNMENT * shape::ALIGNMENT;
    if (threadIdx.x == 0) {
        const uint32_t barriers = shared + shape::BARRIERS_AT;
        for (int n = 0; n < shape::BARRIERS; n++) {
            const bool q_empty = n >= shape::Q_EMPTY && n < shape::K_FULL;
            const bool by_one = Tile::BY_TMA && (shape::Q_STAGES > 1 ? q_empty : n == shape::O_EMPTY);
            const bool empty = q_empty || (n >= shape::K_EMPTY && n < shape::V_FULL) || (n >= shape::V_EMPTY && n < shape::INFO_FULL)
                            || n >= shape::FLAGS_EMPTY;
            const bool flags = n >= shape::FLAGS_FULL && n < shape::FLAGS_EMPTY;
            mbarrier_init(barriers + 8 * n, by_one ? 1 : empty ? 4 * shape::GROUPS : flags ? forward_dropout<D, Tile>::DRAWERS : 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<shape::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            tma_prefetch(f.q);
            tma_prefetch(f.k);
            tma_prefetch(f.v);
            forward_producer<D, Tile> producer{ {}, f, shared };
            producer.run();
        }
        if constexpr (Tile::BY_TMA) {
            if (threadIdx.x == 32) forward_storer<D, Tile>{ {}, f, shared }.run();
        }
        if constexpr (shape::DRAWN > 0) {
            if (threadIdx.x >= 32) forward_dropout<D, Tile>{ {}, f.a, shared }.run();
        }
    } else {
        more_registers<shape::CONSUMER_REGISTERS>();
        forward_consumer<T, D, VARIANT, Tile> consumer(f, shared);
        consumer.run();
    }
}

#endif
