/* cuda/sm90/forward.cuh: forward attention on Hopper: TMA and wgmma, one persistent block a multiprocessor.
 *
 *     S = Q K^T    P = exp2(c S - m)    l = rowsum P    O = P V / l    lse = ln 2 (m + log2 l)        c = scale log2 e
 *
 * Roles. One producer thread loads Q, K and V by TMA. GROUPS consumer warpgroups own 64 query rows each, all keys, all channels:
 * softmax needs no other warpgroup. K and V have rings of their own, two stages, full and empty barriers.
 *
 * Pipeline. A block works through a stream of key blocks that does not end where a tile does: while the tensor cores multiply
 * P(n) V(n), S(n + 1) = Q K(n + 1)^T has been issued before, and softmax(n + 1) runs behind both,
 *
 *     issue S(n + 1) | issue O += P(n) V(n) | wait S | softmax(n + 1) | wait O | rescale O | P(n + 1) to 16 bits
 *
 * also where n is a tile's last block and n + 1 the next tile's first: O then goes out while the other warpgroups keep the tensor
 * cores busy. With PING_PONG the warpgroups issue in turn, so that one's softmax runs behind another's products.
 * Key blocks that some row does not see whole take a copy of the step with masks. Keys run from last to first. */
#ifndef FA_SM90_FORWARD_CUH
#define FA_SM90_FORWARD_CUH

#include "../score.cuh"
#include "args.h"
#include "config.h"
#include "ptx.cuh"

/* One tile of the stream, as the producer hands it to the consumers. */
struct forward_tile_info {
    int b, head, i0, q0;            /* i0: first query within the sequence; b < 0: the stream is over */
    int sq, sk, n_first, n_last;    /* key blocks [first, last) */
};

template <int D, class Tile> struct forward_shape {
    enum : int {
        STAGES = 2, GROUPS = Tile::GROUPS, BLOCK_M = 64 * GROUPS, BLOCK_N = Tile::BLOCK_N, Q_STAGES = Tile::Q_STAGES,
        THREADS = 128 * (GROUPS + 1), PANELS = (D + 63) / 64,
        PRODUCER_REGISTERS = GROUPS == 2 ? 40 : 32, CONSUMER_REGISTERS = GROUPS == 1 ? 240 : GROUPS == 2 ? 232 : 160,
        Q_BYTES = BLOCK_M * PANELS * 128, KV_BYTES = BLOCK_N * PANELS * 128,
        Q_AT = 0, K_AT = Q_AT + Q_STAGES * Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, INFO_AT = V_AT + STAGES * KV_BYTES,
        BARRIERS_AT = INFO_AT + 2 * (int)sizeof(forward_tile_info),
        Q_FULL = 0, Q_EMPTY = Q_FULL + Q_STAGES, K_FULL = Q_EMPTY + Q_STAGES, K_EMPTY = K_FULL + STAGES, V_FULL = K_EMPTY + STAGES,
        V_EMPTY = V_FULL + STAGES, BARRIERS = V_EMPTY + STAGES,
        ALIGNMENT = 1024, SHARED_BYTES = BARRIERS_AT + 8 * BARRIERS + ALIGNMENT,
    };
    static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 256 && D % 16 == 0 && SHARED_BYTES <= 227 * 1024, "a tile that fits");
};

/* ---- the producer ---- */

template <int D, class Tile> struct forward_producer : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::STAGES, shape::BLOCK_M, shape::BLOCK_N, shape::PANELS, shape::Q_STAGES;

    const fa_sm90_forward_args &f;
    const uint32_t shared;
    int blocks, tiles;                          /* loaded so far */

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }

    __device__ __forceinline__ void load_panels(uint32_t dst, int panel_bytes, const fa_tensor_map &map, int row, int head, int b, uint32_t full,
                                                uint64_t policy)
    {
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) tma_load(dst + panel * panel_bytes, map, 64 * panel, row, head, b, full, policy);
    }

    __device__ __forceinline__ void load_block(const fa_tensor_map &map, int at, int full, int empty, int block, int row, int head, int b)
    {
        const int stage = block % STAGES, parity = block / STAGES & 1;
        mbarrier_wait(barrier(empty + stage), parity ^ 1);
        mbarrier_arrive_expect(barrier(full + stage), shape::KV_BYTES);
        load_panels(shared + at + stage * shape::KV_BYTES, BLOCK_N * 128, map, row, head, b, barrier(full + stage), EVICT_LAST);
    }

    /* Longest tiles of a section of heads first; their keys and values stay in L2. */
    __device__ __forceinline__ void decode(int tile, int &batch_head, int &m) const
    {
        const int m_tiles = f.a.m_tiles, heads = (int)(f.a.p.b * f.a.p.h), first = tile / (f.section * m_tiles) * f.section;
        const int width = min(f.section, heads - first), at = tile - first * m_tiles;
        m = m_tiles - 1 - at / width;
        batch_head = first + at % width;
    }

    __device__ __forceinline__ void publish(const forward_tile_info &info, int batch, int row)
    {
        const int stage = tiles % Q_STAGES, parity = tiles / Q_STAGES & 1;
        const uint32_t full = barrier(shape::Q_FULL + stage);
        mbarrier_wait(barrier(shape::Q_EMPTY + stage), parity ^ 1);
        const uint32_t at = shared + shape::INFO_AT + tiles % 2 * sizeof info;
        store_shared_16(at, make_uint4(info.b, info.head, info.i0, info.q0));
        store_shared_16(at + 16, make_uint4(info.sq, info.sk, info.n_first, info.n_last));
        tiles++;
        if (info.b < 0) return mbarrier_arrive(full);
        mbarrier_arrive_expect(full, shape::Q_BYTES);
        load_panels(shared + shape::Q_AT + stage * shape::Q_BYTES, BLOCK_M * 128, f.q, row, info.head, batch, full, EVICT_FIRST);
    }

    /* K(n) before V(n + 1): the order in which they are used. */
    __device__ __forceinline__ void run()
    {
        const fa_cuda_args &a = f.a;
        int v_row = -1, v_head = 0, v_batch = 0;                /* the V that is due */
        blocks = tiles = 0;
        for (int tile = blockIdx.x; tile < f.tiles;) {
            const int following = f.counter ? gridDim.x + atomicAdd(f.counter, 1) : tile + gridDim.x;
            int batch_head, m;
            decode(tile, batch_head, m);
            const int b = batch_head / (int)a.p.h, head = batch_head % (int)a.p.h, i0 = m * BLOCK_M, kv_head = head / a.group;
            const sequence s = sequence_of(a.p, b);
            tile = following;
            if (i0 >= s.sq) continue;
            const int i_end = min(i0 + BLOCK_M, s.sq) - 1;
            int n_first = first_key(a, s, i0) / BLOCK_N, n_last = (max(last_key(a, s, i_end), 0) + BLOCK_N - 1) / BLOCK_N;
            if (n_first >= n_last) {                            /* no key is visible: one block, all of it masked */
                n_first = min(n_first, max(s.sk - 1, 0) / BLOCK_N);
                n_last = n_first + 1;
            }
            publish({ b, head, i0, s.q0, s.sq, s.sk, n_first, n_last }, a.p.cu_q ? 0 : b, s.q0 + i0);
            const int batch = a.p.cu_k ? 0 : b;
            for (int n = n_last - 1; n >= n_first; n--) {
                const int row = s.k0 + n * BLOCK_N;
                load_block(f.k, shape::K_AT, shape::K_FULL, shape::K_EMPTY, blocks, row, kv_head, batch);
                if (blocks) load_block(f.v, shape::V_AT, shape::V_FULL, shape::V_EMPTY, blocks - 1, v_row, v_head, v_batch);
                blocks++;
                v_row = row, v_head = kv_head, v_batch = batch;
            }
        }
        if (blocks) load_block(f.v, shape::V_AT, shape::V_FULL, shape::V_EMPTY, blocks - 1, v_row, v_head, v_batch);
        publish({ -1, 0, 0, 0, 0, 0, 0, 0 }, 0, 0);
    }
};

/* ---- the consumers ---- */

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile> struct forward_consumer : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::STAGES, shape::GROUPS, shape::BLOCK_M, shape::BLOCK_N, shape::Q_STAGES, shape::PANELS;
    enum : int { S_COUNT = BLOCK_N / 2, O_COUNT = D / 2, NT = BLOCK_N / 8, PIECES = BLOCK_N / 16 };

    const fa_cuda_args &a;
    const uint32_t shared;
    const int group, warp, lane;
    forward_tile_info tile;
    int blocks, tiles;                          /* key blocks whose scores were asked for, tiles begun */

    float s[S_COUNT];                           /* (64, BLOCK_N) */
    float o[O_COUNT];                           /* (64, D) */
    uint32_t p[PIECES][4];                      /* (64, BLOCK_N), left operands */
    float row_max[2], row_sum[2];               /* rows g and g + 8; the sum is this lane's share */

    __device__ __forceinline__ forward_consumer(const fa_cuda_args &args, uint32_t smem)
        : a(args), shared(smem), group(__shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), blocks(0), tiles(0) {}

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }
    __device__ __forceinline__ void release(int n) { if (lane == 0) mbarrier_arrive(barrier(n)); }
    __device__ __forceinline__ int query(int half) const { return tile.i0 + group * 64 + warp * 16 + half * 8 + lane / 4; }

    /* The n-th tile of the stream; its place is taken again when tile n + 2 is due, and n has been stored. */
    __device__ __forceinline__ forward_tile_info info(int n) const
    {
        const uint32_t at = shared + shape::INFO_AT + n % 2 * sizeof tile;
        const uint4 x = load_shared_16(at), y = load_shared_16(at + 16);
        return { (int)x.x, (int)x.y, (int)x.z, (int)x.w, (int)y.x, (int)y.y, (int)y.z, (int)y.w };
    }
    /* Goes on to the next tile, its Q in shared memory; false at the end. */
    __device__ __forceinline__ bool next_tile()
    {
        const int stage = tiles % Q_STAGES, parity = tiles / Q_STAGES & 1;
        mbarrier_wait(barrier(shape::Q_FULL + stage), parity);
        tile = info(tiles);
        tiles++;
        return tile.b >= 0;
    }
    __device__ __forceinline__ sequence current() const { return { tile.q0, 0, tile.sq, tile.sk, tile.sq, tile.sk }; }

    /* S = Q K^T of the next key block. */
    __device__ __forceinline__ void issue_scores()
    {
        const uint32_t q = matrix_at(shared + shape::Q_AT + (tiles - 1) % Q_STAGES * shape::Q_BYTES + group * 64 * 128);
        const uint32_t k = matrix_at(shared + shape::K_AT + blocks % STAGES * shape::KV_BYTES);
        #pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            wgmma<T, BLOCK_N>::ss(s, descriptor(advance(q, kk / 4 * BLOCK_M * 128 + kk % 4 * 32)),
                                  descriptor(advance(k, kk / 4 * BLOCK_N * 128 + kk % 4 * 32)), kk > 0);
        wgmma_commit();
    }
    /* O += P V of the block before; the first of a tile starts O anew. */
    __device__ __forceinline__ void issue_output(int block, bool accumulate)
    {
        const uint32_t v = matrix_at(shared + shape::V_AT + block % STAGES * shape::KV_BYTES, BLOCK_N * 128);
        #pragma unroll
        for (int kk = 0; kk < PIECES; kk++)
            wgmma<T, D, 0, 1>::rs(o, p[kk], descriptor(advance(v, kk * 2048)), accumulate || kk > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void wait_k() { mbarrier_wait(barrier(shape::K_FULL + blocks % STAGES), blocks / STAGES & 1); }
    __device__ __forceinline__ void wait_v(int block) { mbarrier_wait(barrier(shape::V_FULL + block % STAGES), block / STAGES & 1); }

    /* Rows of V beyond the sequence: P is 0 there, and 0 times another sequence's NaN is NaN. Every warpgroup zeroes them all. */
    __device__ __forceinline__ void clear_tail(int block, int left)
    {
        const uint32_t v = shared + shape::V_AT + block % STAGES * shape::KV_BYTES;
        for (int at = max(left, 0) * 8 + threadIdx.x % 128; at < BLOCK_N * 8; at += 128)
            #pragma unroll
            for (int panel = 0; panel < PANELS; panel++) store_shared_16(v + panel * BLOCK_N * 128 + at * 16, make_uint4(0, 0, 0, 0));
        fence_proxy_async();
        barrier_sync(8 + group, 128);
    }
    __device__ __forceinline__ bool has_tail(const forward_tile_info &t, int n) const
    {
        return (a.p.cu_k || a.p.seqused_k) && (n + 1) * BLOCK_N > t.sk;
    }

    /* Score mods, then -inf where row and column do not see each other. j0: key of column 0. */
    template <bool MASKED> __device__ __forceinline__ void modify(int n)
    {
        const sequence seq = current();
        const int j0 = n * BLOCK_N + lane % 4 * 2;
        const float slope = has_score_mod<VARIANT>(a) ? alibi_slope(a, tile.b, tile.head) : 0.0f;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = query(half), diagonal = i + seq.sk - seq.sq;
            if (has_score_mod<VARIANT>(a)) {
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) {
                    float unused, &score = s[x / 2 * 4 + 2 * half + x % 2];
                    score = modify_score(a, score, slope, diagonal - (j0 + x / 2 * 8 + x % 2), unused);
                }
            }
            if (!MASKED) continue;
            const int first = first_key(a, seq, i) - j0, last = last_key(a, seq, i) - j0;
            #pragma unroll
            for (int x = 0; x < 2 * NT; x++)
                if (x / 2 * 8 + x % 2 < first || x / 2 * 8 + x % 2 >= last) s[x / 2 * 4 + 2 * half + x % 2] = -INFINITY;
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
        /* The condition waits for the sums, else the compiler moves the exponentials below the next wait for the tensor cores. */
        if (moved & (sum[0] + sum[1] >= 0.0f)) {
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

    /* Flags of what dropout drops, per 16x16 piece. */
    __device__ __forceinline__ void dropout_flags(uint32_t (&flags)[PIECES][2], int n)
    {
        static_assert(VARIANT != FA_DROPOUT || PIECES % 2 == 0, "pieces are drawn in pairs");
        uint64_t seed = a.p.rng[0];
        asm volatile("" : "+l"(seed));              /* else a loop keeps the keys of all rounds in registers: spills */
        const uint32_t batch_head = tile.b * (int)a.p.h + tile.head, row = (tile.i0 + group * 64 + warp * 16) / 16;
        const uint32_t piece_i[2] = { row, row };
        #pragma unroll
        for (int at = 0; at < PIECES; at += 2) {
            uint32_t bytes[2][2];
            const uint32_t piece_j[2] = { (uint32_t)(n * PIECES + at), (uint32_t)(n * PIECES + at + 1) };
            dropout_bytes(bytes, seed, a.p.rng[1], batch_head, piece_i, piece_j, lane, false);
            #pragma unroll
            for (int x = 0; x < 4; x++) flags[at + x / 2][x % 2] = dropped_flags(bytes[x / 2][x % 2], a.keep256);
        }
    }

    __device__ __forceinline__ void pack_p(const uint32_t (&flags)[PIECES][2])
    {
        #pragma unroll
        for (int k = 0; k < PIECES; k++)
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                p[k][r] = pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
                if (VARIANT == FA_DROPOUT) p[k][r] &= ~dropped_pair(flags[k], 2 * (r % 2) + r / 2);
            }
    }

    /* O of a finished tile, normalised, by way of this warp's rows of its Q, and lse. */
    __device__ __forceinline__ void store(int n, const float (&top)[2], const float (&share)[2])
    {
        const forward_tile_info t = info(n);
        const int q_stage = n % Q_STAGES;
        const fa_params &call = a.p;
        const int first = t.i0 + group * 64 + warp * 16, g = lane / 4;
        float *lse = (float *)call.lse.ptr + t.b * call.lse.stride_b + t.head * call.lse.stride_h;
        uint16_t *out = (uint16_t *)call.out.ptr + t.b * call.out.stride_b + (int64_t)(t.q0 + first) * call.out.stride_s
                      + t.head * call.out.stride_h;
        float factor[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(share[half]);
            const bool empty = top[half] == -INFINITY && sum == 0.0f;
            const int i = first + half * 8 + g;
            factor[half] = empty ? 0.0f : (VARIANT == FA_DROPOUT ? a.kept : 1.0f) / sum;
            if (i < t.sq && lane % 4 == 0)
                lse[(int64_t)(t.q0 + i) * call.lse.stride_s] =
                    empty ? -INFINITY : 0.69314718f * (top[half] * a.exponent_scale + log2_approx(sum));
        }
        if constexpr (Q_STAGES == 2) {
            const uint32_t own = shared + shape::Q_AT + q_stage * shape::Q_BYTES + (group * 64 + warp * 16) * 128;
            #pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t x[4];
                #pragma unroll
                for (int r = 0; r < 4; r++) x[r] = pack<T>(o[8 * j + 2 * r] * factor[r % 2], o[8 * j + 2 * r + 1] * factor[r % 2]);
                stmatrix(own + j / 4 * BLOCK_M * 128 + lane % 16 * 128 + ((2 * j + lane / 16) % 8 * 16 ^ lane % 8 * 16), x[0], x[1], x[2], x[3]);
            }
            __syncwarp();
            constexpr int CHUNKS = D / 8;
            #pragma unroll
            for (int at = lane; at < 16 * CHUNKS; at += 32) {
                const int row = at / CHUNKS, chunk = at % CHUNKS;
                const uint4 x = load_shared_16(own + chunk / 8 * BLOCK_M * 128 + row * 128 + (chunk % 8 * 16 ^ row % 8 * 16));
                if (first + row < t.sq) store_chunk(out + row * call.out.stride_s + chunk * 8, x, (int)call.d_v - chunk * 8);
            }
        } else {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                uint16_t *row = out + (half * 8 + g) * call.out.stride_s + lane % 4 * 2;
                if (first + half * 8 + g >= t.sq) continue;
                #pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    const uint32_t x = pack<T>(o[4 * j + 2 * half] * factor[half], o[4 * j + 2 * half + 1] * factor[half]);
                    const int left = (int)call.d_v - (8 * j + lane % 4 * 2);
                    if (a.aligned_out && left >= 2) *(uint32_t *)(row + 8 * j) = x;
                    else {
                        if (left > 0) row[8 * j] = (uint16_t)x;
                        if (left > 1) row[8 * j + 1] = (uint16_t)(x >> 16);
                    }
                }
            }
        }
    }
    __device__ __forceinline__ void store_chunk(uint16_t *to, uint4 x, int left) const
    {
        if (a.aligned_out && left >= 8) {
            *(uint4 *)to = x;
        } else {
            const uint32_t words[4] = { x.x, x.y, x.z, x.w };
            #pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < left) to[e] = (uint16_t)(words[e / 2] >> 16 * (e % 2));
        }
    }

    __device__ __forceinline__ void scores_done(int n)
    {
        wgmma_result(s);
        release(shape::K_EMPTY + blocks % STAGES);
        blocks++;
        if (Q_STAGES == 1 && n == tile.n_first) release(shape::Q_EMPTY);
    }

    /* The scores of key block n beside the products of the block before, whose P is in registers. */
    template <bool MASKED> __device__ __forceinline__ void step(int n, bool accumulate)
    {
        uint32_t flags[PIECES][2];
        float alpha[2];
        const int before = blocks - 1;
        if (MASKED && has_tail(tile, n + 1)) {
            wait_v(before);
            clear_tail(before, tile.sk - (n + 1) * BLOCK_N);
        }
        wait_k();
        turn();
        wgmma_fence();
        issue_scores();
        wait_v(before);
        wgmma_fence();
        issue_output(before, accumulate);
        pass_turn();
        if (VARIANT == FA_DROPOUT) dropout_flags(flags, n);
        wgmma_wait<1>();
        scores_done(n);
        if (MASKED || has_score_mod<VARIANT>(a)) modify<MASKED>(n);
        const bool moved = softmax<MASKED>(alpha);
        wgmma_wait<0>();
        wgmma_result(o);
        wgmma_result(s);
        release(shape::V_EMPTY + before % STAGES);
        if (moved) {
            #pragma unroll
            for (int j = 0; j < O_COUNT; j++) o[j] *= alpha[j / 2 % 2];
        }
        pack_p(flags);
    }

    __device__ __forceinline__ void turn() { if (Tile::PING_PONG) barrier_sync(1 + group, 256); }
    __device__ __forceinline__ void pass_turn() { if (Tile::PING_PONG) barrier_arrive(1 + (group + 1) % GROUPS, 256); }

    __device__ __forceinline__ bool is_whole(int n) const
    {
        const sequence seq = current();
        const int i_end = min(tile.i0 + BLOCK_M, seq.sq) - 1;
        return n * BLOCK_N >= first_key(a, seq, i_end) && (n + 1) * BLOCK_N <= last_key(a, seq, tile.i0);
    }
    /* Softmax of a tile's first block. */
    __device__ __forceinline__ void begin_rows(int n)
    {
        float unused[2];
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0.0f;
        if (!is_whole(n)) modify<true>(n);
        else if (has_score_mod<VARIANT>(a)) modify<false>(n);
        softmax<true>(unused);
    }

    /* From the last block of a tile to the first of the next; false where that was the last tile. */
    __device__ __forceinline__ bool next(bool accumulate)
    {
        uint32_t flags[PIECES][2];
        const int before = blocks - 1, finished = tiles - 1;
        const float top[2] = { row_max[0], row_max[1] }, share[2] = { row_sum[0], row_sum[1] };
        if (has_tail(tile, tile.n_first)) {
            wait_v(before);
            clear_tail(before, tile.sk - tile.n_first * BLOCK_N);
        }
        if (!next_tile()) {
            turn();
            wait_v(before);
            wgmma_fence();
            issue_output(before, accumulate);
            pass_turn();
            wgmma_wait<0>();
            wgmma_result(o);
            store(finished, top, share);
            return false;
        }
        const int n = tile.n_last - 1;
        wait_k();
        turn();
        wgmma_fence();
        issue_scores();
        wait_v(before);
        wgmma_fence();
        issue_output(before, accumulate);
        pass_turn();
        if (VARIANT == FA_DROPOUT) dropout_flags(flags, n);
        wgmma_wait<1>();
        scores_done(n);
        begin_rows(n);
        wgmma_wait<0>();
        wgmma_result(o);
        wgmma_result(s);
        release(shape::V_EMPTY + before % STAGES);
        pack_p(flags);
        store(finished, top, share);
        if (Q_STAGES == 2) {
            fence_proxy_async();
            __syncwarp();
            release(shape::Q_EMPTY + finished % Q_STAGES);
        }
        return true;
    }

    __device__ __forceinline__ void run()
    {
        uint32_t flags[PIECES][2];
        if (!next_tile()) return;
        if (Tile::PING_PONG && group == GROUPS - 1) barrier_arrive(1, 256);
        wait_k();
        wgmma_fence();
        issue_scores();
        if (VARIANT == FA_DROPOUT) dropout_flags(flags, tile.n_last - 1);
        wgmma_wait<0>();
        scores_done(tile.n_last - 1);
        begin_rows(tile.n_last - 1);
        pack_p(flags);
        bool more;
        do {
            const sequence seq = current();
            const int i_end = min(tile.i0 + BLOCK_M, seq.sq) - 1;
            const int whole_first = (first_key(a, seq, i_end) + BLOCK_N - 1) / BLOCK_N, whole_last = max(last_key(a, seq, tile.i0), 0) / BLOCK_N;
            bool accumulate = false;
            int n = tile.n_last - 2;
            /* The first step clears the tail, whether the block after is whole or not. */
            while (n >= tile.n_first) {
                for (; n >= tile.n_first && (n >= whole_last || n < whole_first || has_tail(tile, n + 1)); n--) step<true>(n, accumulate), accumulate = true;
                for (; n >= tile.n_first && n >= whole_first; n--) step<false>(n, accumulate), accumulate = true;
            }
            more = next(accumulate);
        } while (more);
    }
};

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(128 * (Tile::GROUPS + 1), 1) forward_kernel(const __grid_constant__ fa_sm90_forward_args f)
{
    extern __shared__ uint8_t dynamic[];
    using shape = forward_shape<D, Tile>;
    const uint32_t shared = (shared_address(dynamic) + shape::ALIGNMENT - 1) / shape::ALIGNMENT * shape::ALIGNMENT;
    if (threadIdx.x == 0) {
        const uint32_t barriers = shared + shape::BARRIERS_AT;
        for (int n = 0; n < shape::BARRIERS; n++) {
            const bool empty = (n >= shape::Q_EMPTY && n < shape::K_FULL) || (n >= shape::K_EMPTY && n < shape::V_FULL) || n >= shape::V_EMPTY;
            mbarrier_init(barriers + 8 * n, empty ? 4 * shape::GROUPS : 1);
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
            forward_producer<D, Tile> producer{ {}, f, shared, 0, 0 };
            producer.run();
        }
    } else {
        more_registers<shape::CONSUMER_REGISTERS>();
        forward_consumer<T, D, VARIANT, Tile> consumer(f.a, shared);
        consumer.run();
    }
}

#endif
