/* cuda/sm90/backward_block.cuh: what a backward block has and does, apart from its walk over the query tiles (backward.cuh): its
 * shared memory, the producer, one function a product, the scores' way to P and dS, dQ's way out, and the results'. */
#ifndef FA_SM90_BACKWARD_BLOCK_CUH
#define FA_SM90_BACKWARD_BLOCK_CUH

#include "../dq_layout.cuh"
#include "../mask.cuh"
#include "../overlap.cuh"
#include "../score.cuh"
#include "backward_args.h"
#include "backward_config.h"
#include "ptx.cuh"

/* What lies where in shared memory: tiles as ptx.cuh's panels, then rows of floats, then barriers. */
template <int D, class Tile> struct sm90_backward_shared {
    enum : int {
        BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, STAGES = 2, PANELS = (D + 63) / 64,
        K_BYTES = BLOCK_N * PANELS * 128, Q_BYTES = BLOCK_M * PANELS * 128, DS_BYTES = BLOCK_N * BLOCK_M * 2,
        DQ_BYTES = Tile::BULK_DQ ? 64 * D * 4 : 0, P_BYTES = Tile::ROLES == 2 ? BLOCK_N * BLOCK_M * 2 : 0,
        BOX_BYTES = 64 * 128, BIAS_BYTES = Tile::ADDED ? BLOCK_M * BLOCK_N * 2 : 0, MASK_BYTES = Tile::ADDED ? BLOCK_M * 16 : 0,
        K = 0, V = K + K_BYTES, Q = V + K_BYTES, DO = Q + STAGES * Q_BYTES, DS = DO + STAGES * Q_BYTES,
        DQ = DS + 2 * DS_BYTES, P = DQ + Tile::GROUPS * DQ_BYTES, BIAS = P + 2 * P_BYTES,
        MASK = BIAS + STAGES * BIAS_BYTES, LSE2 = MASK + STAGES * MASK_BYTES, DELTA = LSE2 + STAGES * BLOCK_M * 4,
        BARRIERS = DELTA + STAGES * BLOCK_M * 4,
        K_FULL = BARRIERS, V_FULL = K_FULL + 8, K_FREE = V_FULL + 8, V_FREE = K_FREE + 8, Q_FULL = V_FREE + 8, DO_FULL = Q_FULL + 8 * STAGES,
        Q_FREE = DO_FULL + 8 * STAGES, DO_FREE = Q_FREE + 8 * STAGES, DS_FULL = DO_FREE + 8 * STAGES, DS_FREE = DS_FULL + 16,
        DQ_FULL = DS_FREE + 16, DQ_FREE = DQ_FULL + 8 * Tile::GROUPS,
        P_FULL = DQ_FREE + 8 * Tile::GROUPS, P_FREE = P_FULL + 16, DONE = P_FREE + 16, ZEROED = DONE + 16,
        DQ_NOTE = (ZEROED + 8 + 15) / 16 * 16, HIDDEN = DQ_NOTE + 16 * Tile::GROUPS,
        TICKET = HIDDEN + (Tile::ADDED ? 4 * STAGES : 0), BYTES = TICKET + 4,
    };
    static_assert(BYTES <= 232448, "a block's limit");
};

template <enum fa_dtype T, int D, bool MODS, bool DROPOUT, class Tile> struct sm90_backward {
    using Shared = sm90_backward_shared<D, Tile>;
    enum : int {
        GROUPS = Tile::GROUPS, THREADS = 128 * (GROUPS + 1), CONSUMERS = 128 * GROUPS,
        ROLES = Tile::ROLES, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, STAGES = Shared::STAGES, PANELS = Shared::PANELS,
        ADDED = Tile::ADDED,
        NT = BLOCK_M / 8, QT = BLOCK_M / 16, DT = D / 8, KV_STEPS = Tile::KV_REGISTERS ? D / 16 : 1,
        ALTERNATE = BLOCK_M == 64,      /* the warpgroups take turns at dQ, else each has 64 of its rows */
        DK_BEHIND = BLOCK_M == 64 && (D < 128 || !(MODS || DROPOUT || Tile::ADDED)),  /* dK runs into the next step: where registers last */
        TAKES_TICKETS = !Tile::ADDED,   /* takes any number of key tiles, one by one */
        GROUP = 1,                      /* named barriers, of a warpgroup each */
    };

    const fa_sm90_backward_args &args;
    const fa_cuda_args &a;
    const uint32_t shared;
    const int b, kv_head, j0;
    const sequence seq;
    int m_first, m_last;                    /* query tiles [first, last) */
    int &parities;                          /* bit 0: of the key tiles that this block has worked off, bit 1: of its zeroings */

    __device__ __forceinline__ sm90_backward(const fa_sm90_backward_args &args_, uint32_t shared_, int batch, int kv, int n, int &parities_)
        : args(args_), a(args_.a), shared(shared_), b(batch), kv_head(kv), j0(n * BLOCK_N), seq(sequence_of(a.p, batch)), parities(parities_)
    {
        const int j_end = min(j0 + BLOCK_N, seq.sk) - 1;
        const bool used = j0 < seq.sk;
        m_first = used ? first_query(a, seq, j0) / BLOCK_M : 0;
        m_last = used ? (max(last_query(a, seq, j_end), 0) + BLOCK_M - 1) / BLOCK_M : 0;
        m_first = min(m_first, m_last);
    }

    __device__ __forceinline__ bool skips() const { return Tile::ADDED && a.mask.bits; }
    __device__ __forceinline__ int steps() const
    {
        if (!skips()) return (m_last - m_first) * a.group;
        int count = 0;
        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; head++)
            count += visible_inner_tiles(a.mask, mask_plane(a.mask, b, head), j0 / BLOCK_N, m_first, m_last);
        return count;
    }

    /* Where a walk over the query tiles of the group's heads is; those that the mask shows nothing of are passed over. */
    struct position { int head, m, step; };         /* step counts on from one key tile to the block's next */
    __device__ __forceinline__ position start(int step) const
    {
        position at = { kv_head * a.group, m_first, step };
        if (skips()) find_visible(at);
        return at;
    }
    __device__ __forceinline__ void advance_to_next(position &at) const
    {
        at.step++;
        at.m++;
        if (skips()) find_visible(at);
        else if (at.m == m_last) { at.m = m_first; at.head++; }
    }
    __device__ __forceinline__ position before(const position &at) const        /* where no tile is passed over */
    {
        const bool first = at.m == m_first;
        return { at.head - first, (first ? m_last : at.m) - 1, at.step - 1 };
    }
    __device__ __forceinline__ void find_visible(position &at) const
    {
        for (; at.head < (kv_head + 1) * a.group; at.head++, at.m = m_first) {
            at.m = first_visible_tile(a.mask, mask_plane(a.mask, b, at.head), j0 / BLOCK_N, at.m, m_last);
            if (at.m < m_last) break;
        }
    }

    __device__ __forceinline__ static void init_barriers(uint32_t shared, bool tickets)
    {
        mbarrier_init(shared + Shared::K_FULL, 1);
        mbarrier_init(shared + Shared::V_FULL, 1);
        mbarrier_init(shared + Shared::K_FREE, 4 * GROUPS + tickets);
        mbarrier_init(shared + Shared::V_FREE, 4 * GROUPS);
        mbarrier_init(shared + Shared::ZEROED, 4 * GROUPS);
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(shared + Shared::Q_FULL + 8 * s, 1);
            mbarrier_init(shared + Shared::DO_FULL + 8 * s, 1);
            mbarrier_init(shared + Shared::Q_FREE + 8 * s, 4 * GROUPS);
            mbarrier_init(shared + Shared::DO_FREE + 8 * s, 4 * GROUPS);
        }
        for (int s = 0; s < 2; s++) {
            mbarrier_init(shared + Shared::DS_FULL + 8 * s, ROLES == 2 ? 4 : 4 * GROUPS);
            mbarrier_init(shared + Shared::DS_FREE + 8 * s, ALTERNATE ? 4 : 4 * GROUPS);
            mbarrier_init(shared + Shared::P_FULL + 8 * s, 4);
            mbarrier_init(shared + Shared::P_FREE + 8 * s, 4);
            mbarrier_init(shared + Shared::DONE + 8 * s, 4 * GROUPS);
        }
        for (int g = 0; g < GROUPS; g++) {
            mbarrier_init(shared + Shared::DQ_FULL + 8 * g, 4);
            mbarrier_init(shared + Shared::DQ_FREE + 8 * g, 1);
        }
        mbarrier_init_fence();
    }

    /* ---- producer: one thread ---- */

    __device__ __forceinline__ void load_keys(const fa_tensor_map &map, uint32_t tile, uint32_t barrier)
    {
        mbarrier_arrive_expect(barrier, Shared::K_BYTES);
        #pragma unroll
        for (int p = 0; p < PANELS; p++)
            tma_load(tile + p * BLOCK_N * 128, map, 64 * p, seq.k0 + j0, kv_head, a.p.cu_k ? 0 : b, barrier, EVICT_NORMAL);
    }
    __device__ __forceinline__ void load_queries(const fa_tensor_map &map, uint32_t tile, const float *rows, uint32_t rows_at,
                                                 const position &at, uint32_t barrier)
    {
        mbarrier_arrive_expect(barrier, Shared::Q_BYTES + BLOCK_M * 4);
        #pragma unroll
        for (int p = 0; p < PANELS; p++)
            tma_load(tile + p * BLOCK_M * 128, map, 64 * p, seq.q0 + at.m * BLOCK_M, at.head, a.p.cu_q ? 0 : b, barrier, EVICT_LAST);
        bulk_load(rows_at, rows + padded_row(a, seq, b, at.head) + at.m * BLOCK_M, BLOCK_M * 4, barrier);
    }

    /* The bias tile of a step, a box for a warpgroup's keys, its mask, and whether the mask hides any of it: they come and go with Q. */
    __device__ __forceinline__ void load_added(const position &at, int stage, uint32_t barrier)
    {
        const int plane = a.mask.bits ? mask_plane(a.mask, b, at.head) : 0;
        const bool hidden = a.mask.bits && !tile_is_whole(a.mask, plane, j0 / BLOCK_N, at.m);
        store_shared_4(shared + Shared::HIDDEN + 4 * stage, hidden);
        if (hidden && args.mask_boxes) {
            mbarrier_expect(barrier, Shared::MASK_BYTES);
            tma_load(shared + Shared::MASK + stage * Shared::MASK_BYTES, args.mask, j0 / 32, at.m * BLOCK_M, plane, 0, barrier, EVICT_NORMAL);
        }
        if (!a.p.bias.ptr) return;
        mbarrier_expect(barrier, Shared::BIAS_BYTES);
        #pragma unroll
        for (int g = 0; g < GROUPS; g++)
            tma_load(shared + Shared::BIAS + stage * Shared::BIAS_BYTES + g * Shared::BOX_BYTES, args.bias, j0 + 64 * g, at.m * BLOCK_M,
                     at.head * args.bias_h, b * args.bias_b, barrier, EVICT_NORMAL);
    }

    /* For those who walk behind the producer; a number beyond the last key tile's says that none is left. */
    __device__ __forceinline__ static void announce(uint32_t shared, int ticket, int parities)
    {
        mbarrier_wait(shared + Shared::K_FREE, parities & 1 ^ 1);
        store_shared_4(shared + Shared::TICKET, ticket);
    }

    /* `ticket` is this key tile's number; `first` counts the steps before it. */
    __device__ __forceinline__ void produce(int ticket, int first)
    {
        const int end = first + steps();
        announce(shared, ticket, parities);
        if (end == first) {                     /* no query sees these keys */
            mbarrier_arrive(shared + Shared::K_FULL);
            mbarrier_wait(shared + Shared::V_FREE, parities & 1 ^ 1);
            mbarrier_arrive(shared + Shared::V_FULL);
            return;
        }
        load_keys(args.k, shared + Shared::K, shared + Shared::K_FULL);
        #pragma unroll 1
        for (position at = start(first); at.step < end; advance_to_next(at)) {
            const int s = at.step % STAGES, parity = at.step / STAGES % 2 ^ 1;
            mbarrier_wait(shared + Shared::Q_FREE + 8 * s, parity);
            if (Tile::ADDED) load_added(at, s, shared + Shared::Q_FULL + 8 * s);
            load_queries(args.q, shared + Shared::Q + s * Shared::Q_BYTES, a.lse2, shared + Shared::LSE2 + s * BLOCK_M * 4,
                         at, shared + Shared::Q_FULL + 8 * s);
            if (at.step == first) {
                mbarrier_wait(shared + Shared::V_FREE, parities & 1 ^ 1);
                load_keys(args.v, shared + Shared::V, shared + Shared::V_FULL);
            }
            mbarrier_wait(shared + Shared::DO_FREE + 8 * s, parity);
            load_queries(args.dout, shared + Shared::DO + s * Shared::Q_BYTES, a.delta, shared + Shared::DELTA + s * BLOCK_M * 4,
                         at, shared + Shared::DO_FULL + 8 * s);
        }
    }

    /* ---- consumers ---- */

    /* One arrival a warp, for what all its lanes did before. */
    __device__ __forceinline__ void warp_arrive(int barrier) const
    {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared + barrier);
        __syncwarp();                           /* bar.sync and wgmma want a warp's lanes together */
    }

    /* Rows of a tile from `rows` on become 0: TMA brought what lies behind the sequence. All consumers together. */
    template <int ROWS> __device__ __forceinline__ void zero_rows(uint32_t tile, int rows)
    {
        #pragma unroll 1
        for (int p = 0; p < PANELS; p++)
            #pragma unroll 1
            for (int at = rows * 128 + (threadIdx.x - 128) * 16; at < ROWS * 128; at += CONSUMERS * 16)
                store_shared_16(tile + p * ROWS * 128 + at, make_uint4(0, 0, 0, 0));
        fence_proxy_async();
        warp_arrive(Shared::ZEROED);
        mbarrier_wait(shared + Shared::ZEROED, parities >> 1);
        parities ^= 2;
    }

    /* S^T or dP^T (64 keys, BLOCK_M) = keys queries^T. */
    __device__ __forceinline__ void product(float (&c)[BLOCK_M / 2], uint32_t keys, uint32_t queries)
    {
        const uint32_t x = matrix_at(keys), y = matrix_at(queries);
        #pragma unroll
        for (int k = 0; k < D / 16; k++)
            wgmma<T, BLOCK_M, 0, 0>::ss(c, descriptor(advance(x, k / 4 * BLOCK_N * 128 + k % 4 * 32)),
                                        descriptor(advance(y, k / 4 * BLOCK_M * 128 + k % 4 * 32)), k > 0);
        wgmma_commit();
    }

    /* The same with the keys in registers. */
    __device__ __forceinline__ void product(float (&c)[BLOCK_M / 2], const uint32_t (&keys)[KV_STEPS][4], uint32_t queries)
    {
        const uint32_t y = matrix_at(queries);
        #pragma unroll
        for (int k = 0; k < D / 16; k++)
            wgmma<T, BLOCK_M, 0, 0>::rs(c, keys[k], descriptor(advance(y, k / 4 * BLOCK_M * 128 + k % 4 * 32)), k > 0);
        wgmma_commit();
    }
    __device__ __forceinline__ void read_keys(uint32_t (&keys)[KV_STEPS][4], uint32_t tile, int row16)
    {
        const int lane = threadIdx.x & 31, row = row16 + (lane & 15);
        #pragma unroll
        for (int k = 0; k < KV_STEPS; k++)
            ldmatrix(keys[k], tile + k / 4 * BLOCK_N * 128 + row * 128 + (((k % 4 * 2 + (lane >> 4)) ^ (row & 7)) << 4));
    }

    /* sum (64 keys, D) += x (64, BLOCK_M) queries (BLOCK_M, D). */
    __device__ __forceinline__ void accumulate(float (&sum)[D / 2], const uint32_t (&x)[QT][4], uint32_t queries)
    {
        const uint32_t y = matrix_at(queries, BLOCK_M * 128);
        #pragma unroll
        for (int k = 0; k < QT; k++) wgmma<T, D, 0, 1>::rs(sum, x[k], descriptor(advance(y, k * 2048)), true);
        wgmma_commit();
    }

    /* dQ (64 queries, N channels from `channel`) = dS (64, BLOCK_N) K (BLOCK_N, N); dS lies as dS^T. */
    template <int N> __device__ __forceinline__ void query_product(float (&dq)[N / 2], uint32_t ds_tile, int channel)
    {
        const uint32_t x = matrix_at(ds_tile, BLOCK_N * 128);
        const uint32_t y = matrix_at(shared + Shared::K + channel / 64 * BLOCK_N * 128, BLOCK_N * 128);
        #pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++)
            wgmma<T, N, 1, 1>::ss(dq, descriptor(advance(x, k * 2048)), descriptor(advance(y, k * 2048)), k > 0);
        wgmma_commit();
    }

    /* What dropout drops of the 16x16 pieces along the queries: score.cuh's flags. */
    __device__ __forceinline__ void dropout_flags(uint32_t (&flags)[QT][2], const position &at, int key)
    {
        #pragma unroll
        for (int q = 0; q < QT; q += 2) {
            const uint32_t piece_j = (uint32_t)key / 16, first = at.m * BLOCK_M / 16 + q;
            const uint32_t pieces_i[2] = { first, first + 1 }, pieces_j[2] = { piece_j, piece_j };
            uint32_t bytes[2][2];
            dropout_bytes(bytes, a.p.rng[0], a.p.rng[1], b * (int)a.p.h + at.head, pieces_i, pieces_j, threadIdx.x & 31, true);
            #pragma unroll
            for (int x = 0; x < 4; x++) flags[q + x / 2][x % 2] = dropped_flags(bytes[x / 2][x % 2], a.keep256);
        }
    }

    /* bias_scale S^T + bias^T, -inf where the mask hides the key. A piece is 16 keys, `key` the first of this lane's two, x 16 queries. */
    __device__ __forceinline__ void add_scores(float (&s)[BLOCK_M / 2], const position &at, int row16)
    {
        const int lane = thread_anew() & 31;
        if (a.p.bias.ptr) {
            const uint32_t box = shared + Shared::BIAS + at.step % STAGES * Shared::BIAS_BYTES + row16 / 64 * Shared::BOX_BYTES;
            const uint32_t from = box + ((lane & 7) + (lane >> 4 << 3)) * 128 + ((row16 % 64 / 8 + (lane >> 3 & 1)) << 4 ^ (lane & 7) << 4);
            #pragma unroll
            for (int q = 0; q < QT; q++) {
                uint32_t x[4];
                ldmatrix_trans(x, from + q * 2048);
                #pragma unroll
                for (int r = 0; r < 4; r++) add_pair<T>(s[8 * q + 2 * r], s[8 * q + 2 * r + 1], x[r], a.bias_scale);
            }
        }
        if (!load_shared_4(shared + Shared::HIDDEN + at.step % STAGES * 4)) return;
        const int i0 = (lane & 3) * 2, j = j0 + row16, plane = mask_plane(a.mask, b, at.head), shift = j % 32 + (lane >> 2);
        const uint32_t words = shared + Shared::MASK + at.step % STAGES * Shared::MASK_BYTES + i0 * 16 + row16 / 32 * 4;
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint32_t word = (args.mask_boxes ? load_shared_4(words + (8 * n + c) * 16)
                                       : mask_word(a.mask, plane, min(at.m * BLOCK_M + i0 + 8 * n + c, seq.sq - 1), j)) >> shift;
                if (!(word & 1)) s[4 * n + c] = -INFINITY;
                if (!(word & 256)) s[4 * n + 2 + c] = -INFINITY;
            }
    }

    /* S^T becomes P^T: packed for dV in `left`, and times the score's derivative in s for dS, negative where dropped. */
    __device__ __forceinline__ void probabilities(float (&s)[BLOCK_M / 2], uint32_t (&left)[QT][4], const uint32_t (&flags)[QT][2],
                                                  const position &at, int key, bool masked, uint32_t lse2)
    {
        const float slope = MODS ? alibi_slope(a, b, at.head) : 0.0f;
        const int lane = thread_anew() & 31, i0 = at.m * BLOCK_M + (lane & 3) * 2;
        int first[2], last[2];                  /* queries that see the keys `key` and key + 8 */
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int j = key + 8 * half;
            first[half] = first_query(a, seq, j);
            last[half] = j < seq.sk ? last_query(a, seq, j) : 0;
        }
        if (!MODS && masked) {
            #pragma unroll
            for (int e = 0; e < BLOCK_M / 2; e++) {
                const int i = i0 + e / 4 * 8 + e % 2;
                if (i < first[e / 2 % 2] || i >= last[e / 2 % 2]) s[e] = -INFINITY;
            }
        }
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            const float2 shift = load_shared_8(lse2 + (8 * n + (lane & 3) * 2) * 4);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float p[2];
                #pragma unroll
                for (int c = 0; c < 2; c++) {
                    float &x = s[4 * n + 2 * half + c], derivative = 1.0f;
                    const int i = i0 + 8 * n + c, j = key + 8 * half;
                    if (MODS) x = modify_score(a, x, slope, i + seq.sk - seq.sq - j, derivative);
                    x = fmaf(x, Tile::ADDED ? a.lse_scale : a.exponent_scale, -(c ? shift.y : shift.x));
                    x = exp2_approx(Tile::ADDED ? x * a.lse_exponent : x);
                    if (MODS && masked && (i < first[half] || i >= last[half])) x = 0.0f;
                    p[c] = x;
                    if (MODS) x *= derivative;
                }
                uint32_t &packed = left[n / 2][n % 2 * 2 + half];
                packed = pack<T>(p[0], p[1]);
                if (DROPOUT) {
                    packed &= ~dropped_pair(flags[n / 2], 2 * (n % 2) + half);
                    #pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float &x = s[4 * n + 2 * half + c];
                        x = __uint_as_float(__float_as_uint(x) | (dropped_one(flags[n / 2][c], 2 * (n % 2) + half) & 0x80000000u));
                    }
                }
            }
        }
    }

    /* dS = P (Z dP - delta), packed; s holds P times the score's derivative. */
    __device__ __forceinline__ void score_gradients(uint32_t (&left)[QT][4], const float (&dp)[BLOCK_M / 2],
                                                    const float (&s)[BLOCK_M / 2], uint32_t delta)
    {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            const float2 shift = load_shared_8(delta + (8 * n + (threadIdx.x & 3) * 2) * 4);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float ds[2];
                #pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float p = s[4 * n + 2 * half + c];
                    float x = dp[4 * n + 2 * half + c];
                    if (DROPOUT) x = (int)__float_as_uint(p) < 0 ? 0.0f : x * a.kept;
                    ds[c] = (DROPOUT ? fabsf(p) : p) * (x - (c ? shift.y : shift.x));
                }
                left[n / 2][n % 2 * 2 + half] = pack<T>(ds[0], ds[1]);
            }
        }
    }

    /* P^T again out of its 16 bits. */
    __device__ __forceinline__ static void unpack_left(float (&s)[BLOCK_M / 2], const uint32_t (&left)[QT][4])
    {
        #pragma unroll
        for (int e = 0; e < BLOCK_M / 2; e++) {
            const uint32_t pair = left[e / 8][e / 2 % 4];
            s[e] = unpack<T>(e % 2 ? pair >> 16 : pair & 0xffff);
        }
    }

    /* This warp's 16 keys of dS^T, as the left operand of dQ: panels of 64 queries. */
    __device__ __forceinline__ void store_ds(uint32_t ds_tile, const uint32_t (&ds)[QT][4], int row16)
    {
        const int lane = threadIdx.x & 31, row = row16 + (lane >> 3 & 1) * 8 + (lane & 7);
        #pragma unroll
        for (int q = 0; q < QT; q++)
            stmatrix(ds_tile + q / 4 * BLOCK_N * 128 + row * 128 + (((q % 4 * 2 + (lane >> 4)) ^ (row & 7)) << 4),
                     ds[q][0], ds[q][1], ds[q][2], ds[q][3]);
    }

    /* Deterministic dq: key tiles add to rows of queries in descending order. Blocks start in that order too, so the one that is
     * waited for is running or done. How many adds come before this block's to query tile m: */
    __device__ __forceinline__ int turn(int m) const
    {
        return ((last_key(a, seq, min((m + 1) * BLOCK_M, seq.sq) - 1) - 1) / BLOCK_N - j0 / BLOCK_N) * ROLES;
    }
    __device__ __forceinline__ static void wait_for_turn(const int *turns, int turn)
    {
        while (*(const volatile int *)turns < turn) {}
        __threadfence();
    }
    __device__ __forceinline__ static void pass_turn(int *turns)
    {
        __threadfence();
        atomicAdd(turns, 1);
    }

    /* This warp's 16 queries of dQ into dq_accum: with BULK_DQ through shared memory, where deterministic by add_in_turn's warp,
     * else by this one; without, a red.v4 a block. `n` such products of this warpgroup came before. */
    template <int N> __device__ __forceinline__ void add_dq(const float (&dq)[N / 2], const position &at, int group, int n, int channel)
    {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
        const int64_t row = padded_row(a, seq, b, at.head) + at.m * BLOCK_M + dq_row(group) + warp * 16;
        float *sums = a.dq_accum + dq_block<D>(row, channel / 8);
        if constexpr (Tile::BULK_DQ) {
            const uint32_t buffer = shared + Shared::DQ + group * Shared::DQ_BYTES + warp * 64 * D;
            if (a.p.deterministic) mbarrier_wait(shared + Shared::DQ_FREE + 8 * group, n % 2 ^ 1);
            else bulk_wait_read<0>();
            __syncwarp();
            #pragma unroll
            for (int j = 0; j < N / 8; j++)
                store_shared_16(buffer + j * 512 + lane * 16,
                                make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                                           __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
            fence_proxy_async();
            if (a.p.deterministic) {
                if (threadIdx.x % 128 == 0)
                    store_shared_16(shared + Shared::DQ_NOTE + 16 * group, make_uint4((uint32_t)(row >> 32), (uint32_t)row, turn(at.m), 0));
                warp_arrive(Shared::DQ_FULL + 8 * group);
            } else {
                __syncwarp();
                if (lane == 0) {
                    bulk_add(sums, buffer, 64 * D);
                    bulk_commit();
                }
            }
        } else {
            if (a.p.deterministic) {
                if (lane == 0) wait_for_turn(a.turns + row / 16, turn(at.m));
                __syncwarp();
            }
            #pragma unroll
            for (int j = 0; j < N / 8; j++) {
                const float c[4] = { dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3] };
                dq_add(sums + j * 128, lane, c);
            }
            if (a.p.deterministic) {
                __threadfence();
                __syncwarp();
                if (lane == 0) pass_turn(a.turns + row / 16);
            }
        }
    }

    /* This warp's sums of the key tile are there. */
    __device__ __forceinline__ void say_done() const
    {
        if (!args.tickets) return;
        if (Tile::BULK_DQ) bulk_wait<0>();
        warp_arrive(Shared::DONE + 8 * (parities & 1));
    }
    /* One thread of the producer's tells other blocks, when all warps have said so of this block's `tile`th key tile. */
    __device__ __forceinline__ void pass_on(int tile) const
    {
        mbarrier_arrive(shared + Shared::K_FREE);               /* has read the ticket */
        mbarrier_wait(shared + Shared::DONE + 8 * (tile % 2), tile / 2 % 2);
        fence_proxy_async_global();
        __threadfence();
        atomicAdd(a.counters + FA_TICKETS + b * (int)a.p.hk + kv_head, 1);
    }

    /* The deterministic sums of one consumer warpgroup, by one thread of the producer's. */
    __device__ __forceinline__ void add_in_turn(int group, int first) const
    {
        #pragma unroll 1
        for (int n = products_before(group, first); n < products_before(group, first + steps()); n++) {
            mbarrier_wait(shared + Shared::DQ_FULL + 8 * group, n % 2);
            const uint4 note = load_shared_16(shared + Shared::DQ_NOTE + 16 * group);
            const int64_t row = (int64_t)note.x << 32 | note.y;
            wait_for_turn(a.turns + row / 16, note.z);
            bulk_add(a.dq_accum + row * D, shared + Shared::DQ + group * Shared::DQ_BYTES, Shared::DQ_BYTES);
            bulk_commit();
            bulk_wait<0>();
            pass_turn(a.turns + row / 16);
            mbarrier_arrive(shared + Shared::DQ_FREE + 8 * group);
        }
    }

    /* dK or dV of this warp's 16 keys from `row16` of the block, through 16 rows of panels of PANEL_ROWS rows at `place`, which no
     * other warp touches. Keys in no use get 0. */
    template <int PANEL_ROWS>
    __device__ __forceinline__ void store(const float (&x)[D / 2], uint32_t place, int row16, float factor, const fa_tensor &t, int d,
                                          bool aligned)
    {
        const int lane = threadIdx.x & 31;
        const int row = (lane >> 3 & 1) * 8 + (lane & 7), key = j0 + row16 + (lane >> 2);
        const float scale[2] = { key < seq.sk ? factor : 0.0f, key + 8 < seq.sk ? factor : 0.0f };
        #pragma unroll
        for (int q = 0; q < DT / 2; q++)
            stmatrix(place + q / 4 * PANEL_ROWS * 128 + row * 128 + (((q % 4 * 2 + (lane >> 4)) ^ (row & 7)) << 4),
                     pack<T>(x[8 * q] * scale[0], x[8 * q + 1] * scale[0]), pack<T>(x[8 * q + 2] * scale[1], x[8 * q + 3] * scale[1]),
                     pack<T>(x[8 * q + 4] * scale[0], x[8 * q + 5] * scale[0]), pack<T>(x[8 * q + 6] * scale[1], x[8 * q + 7] * scale[1]));
        __syncwarp();
        uint16_t *to = (uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + j0 + row16) * t.stride_s + kv_head * t.stride_h;
        #pragma unroll 4
        for (int at = lane; at < 16 * DT; at += 32) {
            const int r = at / DT, chunk = at % DT, left = d - chunk * 8;
            if (j0 + row16 + r >= seq.k_rows || left <= 0) continue;
            const uint4 words = load_shared_16(place + chunk / 8 * PANEL_ROWS * 128 + r * 128 + ((chunk % 8 ^ (r & 7)) << 4));
            uint16_t *dst = to + r * t.stride_s + chunk * 8;
            if (aligned && left >= 8) {
                *(uint4 *)dst = words;
            } else {
                const uint32_t w[4] = { words.x, words.y, words.z, words.w };
                #pragma unroll
                for (int e = 0; e < 8; e++)
                    if (e < left) dst[e] = (uint16_t)(w[e / 2] >> 16 * (e % 2));
            }
        }
        __syncwarp();
    }

    /* The same out of registers: the lanes of a row trade their pairs, so that each has eight channels together. */
    __device__ __forceinline__ void store_direct(const float (&x)[D / 2], int row16, float factor, const fa_tensor &t, int d, bool aligned)
    {
        const int lane = threadIdx.x & 31, quad = lane & 3;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row16 + (lane >> 2) + 8 * half, key = j0 + r;
            const float scale = key < seq.sk ? factor : 0.0f;
            uint16_t *to = (uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + key) * t.stride_s + kv_head * t.stride_h + quad * 8;
            #pragma unroll
            for (int n = 0; n < DT; n += 4) {
                uint32_t w[4];
                #pragma unroll
                for (int e = 0; e < 4; e++) w[e] = pack<T>(x[4 * (n + e) + 2 * half] * scale, x[4 * (n + e) + 2 * half + 1] * scale);
                #pragma unroll
                for (int bit = 1; bit < 4; bit *= 2) {
                    const bool high = quad & bit;
                    #pragma unroll
                    for (int e = 0; e < 4; e++) {
                        if (e & bit) continue;
                        const uint32_t got = __shfl_xor_sync(0xffffffff, high ? w[e] : w[e + bit], bit);
                        if (high) w[e] = got;
                        else w[e + bit] = got;
                    }
                }
                const int left = d - n * 8 - quad * 8;
                if (key >= seq.k_rows || left <= 0) continue;
                uint16_t *dst = to + n * 8;
                if (aligned && left >= 8) {
                    *(uint4 *)dst = make_uint4(w[0], w[1], w[2], w[3]);
                } else {
                    #pragma unroll
                    for (int e = 0; e < 8; e++)
                        if (e < left) dst[e] = (uint16_t)(w[e / 2] >> 16 * (e % 2));
                }
            }
        }
    }

    /* Left operands that a product has been reading until now. */
    __device__ __forceinline__ static void keep(uint32_t (&x)[QT][4])
    {
        #pragma unroll
        for (int i = 0; i < 4 * QT; i++) asm volatile("" : "+r"(x[i / 4][i % 4]) :: "memory");
    }

    /* How many (shares) of dQ a warpgroup makes in the steps before `step`. */
    __device__ __forceinline__ static int products_before(int group, int step)
    {
        return ALTERNATE ? (step + GROUPS - 1 - group) / GROUPS : step;
    }
    /* Whether a warpgroup makes (its share of) a step's dQ, which 64 of its rows, and their dS. */
    __device__ __forceinline__ static bool makes_dq(int group, int step) { return !ALTERNATE || group == step % GROUPS; }
    __device__ __forceinline__ static int dq_row(int group) { return ALTERNATE ? 0 : 64 * group; }
    __device__ __forceinline__ uint32_t ds_rows(int group, int step) const
    {
        return shared + Shared::DS + step % 2 * Shared::DS_BYTES + dq_row(group) / 64 * BLOCK_N * 128;
    }

    /* Zeroes what lies behind the sequences in the tiles that are here. */
    __device__ __forceinline__ void zero_keys()
    {
        mbarrier_wait(shared + Shared::K_FULL, parities & 1);
        mbarrier_wait(shared + Shared::V_FULL, parities & 1);
        if ((a.p.cu_k || a.p.seqused_k) && j0 < seq.sk && j0 + BLOCK_N > seq.sk) {      /* of unused keys nothing was loaded */
            zero_rows<BLOCK_N>(shared + Shared::K, seq.sk - j0);
            zero_rows<BLOCK_N>(shared + Shared::V, seq.sk - j0);
        }
    }
    __device__ __forceinline__ void zero_queries(int i0, int stage, int parity)
    {
        if (!a.p.cu_q || i0 + BLOCK_M <= seq.sq) return;
        mbarrier_wait(shared + Shared::Q_FULL + 8 * stage, parity);
        mbarrier_wait(shared + Shared::DO_FULL + 8 * stage, parity);
        zero_rows<BLOCK_M>(shared + Shared::Q + stage * Shared::Q_BYTES, seq.sq - i0);
        zero_rows<BLOCK_M>(shared + Shared::DO + stage * Shared::Q_BYTES, seq.sq - i0);
    }

    /* ---- the walks: backward.cuh, backward_roles.cuh ---- */

    enum : int { DQ_VALUES = D <= 192 ? 64 : 128, DQ_KEYS = D - DQ_VALUES };     /* channels of dQ by role */

    __device__ void consume(int first);
    __device__ void consume_values(int first);
    __device__ void consume_keys(int first);
    __device__ void values_dq(float (&dq)[DQ_VALUES / 2], const position &at);
};

/* Opens the definition of a walk. */
#define FA_SM90_BACKWARD_WALK \
    template <enum fa_dtype T, int D, bool MODS, bool DROPOUT, class Tile> \
    __device__ __forceinline__ void sm90_backward<T, D, MODS, DROPOUT, Tile>

#endif
