/* cuda/sm80/backward.cuh: the gradients with mma.sync; a block owns BLOCK_N keys of one key/value head.
 *
 *     S^T = K Q^T    P = exp2(c S - lse2)    dV += P^T dO    dP^T = V dO^T    dS = P (dP - delta)    dK += dS^T Q    dQ += dS K
 *
 * The block walks over the query tiles that see its keys, for each query head of the group, last tile first. A warp owns 16 or 32
 * keys. Q_WARPS warps share them: each computes S and dP of its share of the queries, and sums dV and dK of its share of the
 * channels. P^T and dS^T come out of the products as left operands of dV's and dK's; those of the other warps' queries, and dS for
 * dQ, pass through shared memory. Nearly square pieces of S, dV and dK read the fewest bytes of shared memory, which is what binds.
 * dK and dV stay in registers to the end, so grouped heads need no second sum. dQ goes to fp32 scratch: by atomic adds, or in the
 * order of key tiles when dq must be deterministic.
 *     per query tile:   Q, dO of the next tile start loading | S, dP | P, dS; dV, dK of own queries | barrier | of the others | dQ */
#ifndef FA_SM80_BACKWARD_CUH
#define FA_SM80_BACKWARD_CUH

#include "../bias.cuh"
#include "../dq_layout.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "../tile.cuh"
#include "config.h"
#include "instance.cuh"

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile> struct backward {
    enum : int {
        WARPS = Tile::WARPS, Q_WARPS = Tile::Q_WARPS, KEY_WARPS = WARPS / Q_WARPS, THREADS = 32 * WARPS,
        BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, STAGES = Tile::STAGES,
        KEYS = BLOCK_N / KEY_WARPS, KT = KEYS / 16,                 /* keys of a warp; 16-key pieces of them */
        QUERIES = BLOCK_M / Q_WARPS, NT = QUERIES / 8,              /* of a warp's S and dP */
        CHANNELS = D / Q_WARPS, DT = CHANNELS / 8,                  /* of a warp's dV and dK */
        DQ_M = 32, DQ_WM = BLOCK_M / DQ_M, DQ_WN = WARPS / DQ_WM, DQ_DT = D / 8 / DQ_WN, DQ_STEP = Tile::DQ_STEP,
        KV_BYTES = BLOCK_N * D * 2, Q_BYTES = BLOCK_M * D * 2, STAGE_BYTES = 2 * Q_BYTES + 2 * 4 * BLOCK_M,
        DS_BYTES = BLOCK_N * BLOCK_M * 2, P_BYTES = Q_WARPS > 1 ? DS_BYTES : 0,
        SHARED_BYTES = 2 * KV_BYTES + STAGES * STAGE_BYTES + DS_BYTES + P_BYTES,
        BIAS_TILE_BYTES = BLOCK_M * BLOCK_N * 2, BIAS_BYTES = STAGES * BIAS_TILE_BYTES,
        DROPS = FA_HAS_DROPOUT(VARIANT), MODS = FA_HAS_MODS(VARIANT),
        GROUPED = DROPS && !MODS && KT == 2,                        /* a lane's keys are a group of the dropout mask, see score.cuh */
    };
    using order = typename select_tile<GROUPED, in_groups, in_order>::type;     /* of a warp's keys in K's and V's tiles */
    static_assert(KEYS % 16 == 0 && QUERIES % 16 == 0 && CHANNELS % 16 == 0, "whole fragments of S, dP, dV, dK");
    static_assert(BLOCK_M % DQ_M == 0 && DQ_WM * DQ_WN == WARPS && DQ_DT % DQ_STEP == 0 && DQ_STEP % 2 == 0, "and of dQ");

    const fa_cuda_args &a;
    const int lane, key_warp, q_warp, b, kv_head, j0;               /* j0: first key of the block */
    const sequence seq;
    const uint32_t k_tile, v_tile, ds_tile, p_tile, stages, bias_tiles;
    int m_first, m_last;                                            /* query tiles [first, last) */
    const uint16_t *q_at, *dout_at;                                 /* this thread's start in the next tile to load */
    const float *row_at;                                            /* and its four of lse2 or delta */
    float dv[KT][DT][4], dk[KT][DT][4];

    __device__ __forceinline__ backward(const fa_cuda_args &args, int batch, int kv, int n, uint32_t shared)
        : a(args), lane(threadIdx.x & 31), key_warp((threadIdx.x >> 5) % KEY_WARPS), q_warp((threadIdx.x >> 5) / KEY_WARPS),
          b(batch), kv_head(kv), j0(n * BLOCK_N), seq(sequence_of(args.p, batch)), k_tile(shared), v_tile(shared + KV_BYTES),
          ds_tile(shared + 2 * KV_BYTES), p_tile(ds_tile + DS_BYTES), stages(p_tile + P_BYTES), bias_tiles(shared + SHARED_BYTES)
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int j = 0; j < DT; j++)
                #pragma unroll
                for (int e = 0; e < 4; e++) dv[k][j][e] = dk[k][j][e] = 0.0f;
    }

    __device__ __forceinline__ rows_of keys(const fa_tensor &t, int d, bool aligned) const
    {
        return { (const uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + j0) * t.stride_s + kv_head * t.stride_h, t.stride_s,
                 seq.sk - j0, d, aligned };
    }
    __device__ __forceinline__ rows_of queries(const fa_tensor &t, int head, int i0, int d, bool aligned) const
    {
        return { (const uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.q0 + i0) * t.stride_s + head * t.stride_h, t.stride_s,
                 seq.sq - i0, d, aligned };
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
    __device__ __forceinline__ bool needs_no_mask(const position &at) const
    {
        if (has_bias<VARIANT>(a) && !a.bias_staged) return false;       /* biases that are not staged share the masks' copy of the code */
        return !has_mask<VARIANT>(a) || tile_is_whole(a.mask, mask_plane(a.mask, b, at.head), j0 / BLOCK_N, at.m);
    }
    __device__ __forceinline__ position start() const
    {
        if (m_first >= m_last) return { (kv_head + 1) * a.group, 0 };
        const position at = { kv_head * a.group, m_last };
        return has_mask<VARIANT>(a) ? next(at) : position{ at.head, m_last - 1 };
    }

    /* Q, dO, lse2 and delta of a query tile. Tiles of a head come in descending order, each from a place before the last one's. */
    using whole = whole_tile<D, THREADS>;
    __device__ __forceinline__ void load_stage(const position &at, uint32_t tile, uint32_t bias_tile)
    {
        if (!done(at)) {
            const int i0 = at.m * BLOCK_M, thread = threadIdx.x;
            if (at.m == m_last - 1 || has_mask<VARIANT>(a)) {       /* the tile before may have been passed over */
                q_at = queries(a.p.q, at.head, i0, 0, true).ptr + whole::first(a.p.q.stride_s);
                dout_at = queries(a.p.dout, at.head, i0, 0, true).ptr + whole::first(a.p.dout.stride_s);
                const int own = thread_anew();                      /* held over the loop it would spill */
                row_at = (own < BLOCK_M / 4 ? a.lse2 : a.delta) + padded_row(a, seq, b, at.head) + i0 + own % (BLOCK_M / 4) * 4;
            }
            const bool exists = i0 + BLOCK_M <= seq.sq;
            if (a.whole_q && exists) whole::template load<BLOCK_M>(tile, q_at, a.p.q.stride_s);
            else load_tile<BLOCK_M, D, THREADS>(tile, queries(a.p.q, at.head, i0, (int)a.p.d, a.aligned_q));
            if (a.whole_dout && exists) whole::template load<BLOCK_M>(tile + Q_BYTES, dout_at, a.p.dout.stride_s);
            else load_tile<BLOCK_M, D, THREADS>(tile + Q_BYTES, queries(a.p.dout, at.head, i0, (int)a.p.d_v, a.aligned_dout));
            if (thread < BLOCK_M / 2) cp_async_16(tile + 2 * Q_BYTES + thread * 16, row_at, 16);
            if (MODS && a.bias_staged)
                load_bias_tile<BLOCK_M, BLOCK_N, THREADS>(bias_tile, a, seq, b, at.head, i0, j0);
            q_at -= BLOCK_M * a.p.q.stride_s;
            dout_at -= BLOCK_M * a.p.dout.stride_s;
            row_at -= BLOCK_M;
        }
        cp_async_commit();
    }

    /* C^T (KEYS, QUERIES) = left right^T: this warp's rows of a key tile and of a query tile. */
    __device__ __forceinline__ void product(float (&c)[KT][NT][4], uint32_t left, uint32_t right)
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) c[k][n][e] = 0.0f;
        const uint32_t x_at = left + key_warp * KEYS * D * 2 + lane_a<D>(lane), y_at = right + q_warp * QUERIES * D * 2 + lane_b<D>(lane);
        uint32_t x[2][KT][4], y[2][NT / 2][4];              /* operands of this step and of the next */
        auto load = [&](int d) {
            #pragma unroll
            for (int k = 0; k < KT; k++) ldmatrix(x[d % 2][k], step<D>(x_at, d) + k * 16 * D * 2);
            #pragma unroll
            for (int n = 0; n < NT / 2; n++) ldmatrix(y[d % 2][n], step<D>(y_at, d) + n * 16 * D * 2);
        };
        load(0);
        #pragma unroll
        for (int d = 0; d < D / 16; d++) {
            if (d + 1 < D / 16) load(d + 1);
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int k = 0; k < KT; k++) mma<T>(c[k][n], x[d % 2][k], y[d % 2][n / 2][n % 2 * 2], y[d % 2][n / 2][n % 2 * 2 + 1]);
        }
    }

    /* out (KEYS, CHANNELS) += x (KEYS, 16) right (16, CHANNELS): 16 queries from row `query` of the tile. */
    __device__ __forceinline__ void accumulate(float (&out)[KT][DT][4], const uint32_t (&x)[KT][4], uint32_t right, int query)
    {
        const uint32_t y_at = right + query * D * 2 + lane_b_trans<D>(lane);
        #pragma unroll
        for (int j = 0; j < DT; j += 2) {
            uint32_t y[4];
            ldmatrix_trans(y, step<D>(y_at, q_warp * (DT / 2) + j / 2));
            #pragma unroll
            for (int k = 0; k < KT; k++) {
                mma<T>(out[k][j], x[k], y[0], y[1]);
                mma<T>(out[k][j + 1], x[k], y[2], y[3]);
            }
        }
    }
    /* The share of this warp's own queries, x packed as left operands. */
    __device__ __forceinline__ void accumulate_own(float (&out)[KT][DT][4], const uint32_t (&x)[NT / 2][KT][4], uint32_t right)
    {
        #pragma unroll
        for (int q = 0; q < NT / 2; q++) accumulate(out, x[q], right, q_warp * QUERIES + q * 16);
    }
    /* The share of the other warps' queries, x (BLOCK_N, BLOCK_M) in shared memory. */
    __device__ __forceinline__ void accumulate_others(float (&out)[KT][DT][4], uint32_t x_tile, uint32_t right)
    {
        const uint32_t x_at = x_tile + key_warp * KEYS * BLOCK_M * 2 + lane_a<BLOCK_M>(lane);
        #pragma unroll
        for (int other = 1; other < Q_WARPS; other++) {
            const int warp = (q_warp + other) % Q_WARPS;
            #pragma unroll
            for (int q = 0; q < NT / 2; q++) {
                uint32_t x[KT][4];
                #pragma unroll
                for (int k = 0; k < KT; k++) ldmatrix(x[k], step<BLOCK_M>(x_at, warp * (NT / 2) + q) + k * 16 * BLOCK_M * 2);
                accumulate(out, x, right, warp * QUERIES + q * 16);
            }
        }
    }

    __device__ __forceinline__ void pack_left(uint32_t (&x)[NT / 2][KT][4], const float (&c)[KT][NT][4])
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                x[n / 2][k][n % 2 * 2] = pack<T>(c[k][n][0], c[k][n][1]);
                x[n / 2][k][n % 2 * 2 + 1] = pack<T>(c[k][n][2], c[k][n][3]);
            }
    }

    /* Query and key of element e of accumulator (k, n); i0: this warp's first query. */
    __device__ __forceinline__ int query(int i0, int n, int e) const { return i0 + n * 8 + (lane & 3) * 2 + e % 2; }
    __device__ __forceinline__ int key(int k, int e) const { return j0 + key_warp * KEYS + order::row(k * 16 + e / 2 * 8 + (lane >> 2)); }

    /* To a piece of 16 keys x 16 queries: accumulators n and n + 1. */
    __device__ __forceinline__ void add_staged_bias(float (&c0)[4], float (&c1)[4], int k, int n, uint32_t bias_tile)
    {
        uint32_t x[4];
        const uint32_t at = step<BLOCK_N>(bias_tile + lane_a_trans<BLOCK_N>(lane), key_warp * KT + k);
        ldmatrix_trans(x, at + (q_warp * QUERIES + n * 8) * BLOCK_N * 2);
        add_piece<T>(c0, c1, x, a.bias_scale);
    }
    __device__ __forceinline__ void add_bias(float (&c0)[4], float (&c1)[4], int k, int n, int head, int i0)
    {
        #pragma unroll
        for (int x = 0; x < 4; x++) {
            bias_walk bias = bias_from(a, seq, b, head, query(i0, n + x / 2, x), key(k, 0));
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float &score = (x / 2 ? c1 : c0)[2 * half + x % 2];
                score = fmaf(score, a.bias_scale, bias_next(bias, 8));
            }
        }
    }

    /* 0 where the mask hides the key: from P^T, and from P^T times the score's derivative. */
    __device__ __forceinline__ void hide(float (&s)[KT][NT][4], uint32_t (&left)[NT / 2][KT][4], int head, int i0)
    {
        const int plane = mask_plane(a.mask, b, head);
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                const int i = min(query(i0, n, c), seq.sq - 1), j = j0 + key_warp * KEYS;
                uint32_t word = 0;
                #pragma unroll
                for (int k = 0; k < KT; k++) {
                    if (k % 2 == 0) word = mask_word(a.mask, plane, i, j + k * 16) >> (j % 32 + (lane >> 2));   /* KT > 1: j % 32 = 0 */
                    #pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (!(word >> (k % 2 * 16 + half * 8) & 1)) {
                            s[k][n][2 * half + c] = 0.0f;
                            left[n / 2][k][n % 2 * 2 + half] &= c ? 0x0000ffff : 0xffff0000;
                        }
                }
            }
    }

    /* S^T becomes P^T: packed for dV in `left`, and times the score's derivative in s for dS. With dropout alone it is kept P^T: dropout's
     * factor then costs nothing. */
    template <bool MASKED> __device__ __forceinline__ void probabilities(float (&s)[KT][NT][4], uint32_t (&left)[NT / 2][KT][4],
                                                                        int head, int i0, uint32_t lse2_row, uint32_t bias_tile)
    {
        const bool mods = has_score_mod<VARIANT>(a);
        const float slope = mods ? alibi_slope(a, b, head) : 0.0f, kept_log2 = DROPS && !MODS ? log2_approx(a.kept) : 0.0f;
        const int i = i0 + (lane & 3) * 2, j = key(0, 0);
        int first[KT][2], last;                         /* queries, less i, that see key j + row: [first, last + row) */
        if (MASKED) {
            #pragma unroll
            for (int x = 0; x < 2 * KT; x++) {
                const int key = j + order::row(x * 8);
                first[x / 2][x % 2] = key < seq.sk ? first_query(a, seq, key) - i : BLOCK_M;
            }
            last = a.window_left < 0 ? BLOCK_M : j + a.window_left - seq.sk + seq.sq + 1 - i;
        }
        constexpr int WIDE = MODS ? 2 : 1;               /* accumulators at a time: a bias comes by 16 x 16 */
        #pragma unroll
        for (int n = 0; n < NT; n += WIDE) {
            float2 lse2[WIDE];
            #pragma unroll
            for (int x = 0; x < WIDE; x++) {
                lse2[x] = load_shared_8(lse2_row + (n + x) * 32 + (lane & 3) * 8);
                if (DROPS && !MODS) lse2[x].x -= kept_log2, lse2[x].y -= kept_log2;
            }
            #pragma unroll
            for (int k = 0; k < KT; k++) {
                float derivative[4 * WIDE];
                if (mods) {
                    #pragma unroll
                    for (int x = 0; x < 4 * WIDE; x++) {
                        float &score = s[k][n + x / 4][x % 4];
                        const int column = (n + x / 4) * 8 + x % 2, row = order::row(k * 16 + x % 4 / 2 * 8);
                        score = modify_score(a, score, slope, i + column + seq.sk - seq.sq - j - row, derivative[x]);
                    }
                }
                if constexpr (MODS) {
                    if (a.bias_staged) add_staged_bias(s[k][n], s[k][n + 1], k, n, bias_tile);
                    else if (MASKED && a.p.bias.ptr) add_bias(s[k][n], s[k][n + 1], k, n, head, i0);
                }
                #pragma unroll
                for (int r = 0; r < 2 * WIDE; r++) {
                    const int half = r % 2, row = order::row(k * 16 + half * 8);
                    float (&pair)[4] = s[k][n + r / 2];
                    #pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int column = (n + r / 2) * 8 + c;
                        float &x = pair[2 * half + c];
                        x = fmaf(x, MODS ? a.lse_scale : a.exponent_scale, c ? -lse2[r / 2].y : -lse2[r / 2].x);
                        x = exp2_approx(MODS ? x * a.lse_exponent : x);
                        if (MASKED && (column < first[k][half] || column - row >= last)) x = 0.0f;
                    }
                    left[(n + r / 2) / 2][k][(n + r / 2) % 2 * 2 + half] = pack<T>(pair[2 * half], pair[2 * half + 1]);
                }
                if (mods) {
                    #pragma unroll
                    for (int x = 0; x < 4 * WIDE; x++) s[k][n + x / 4][x % 4] *= derivative[x];
                }
            }
        }
        if (MASKED && has_mask<VARIANT>(a)) hide(s, left, head, i0);
    }

    /* The bytes of dropout for this lane's elements: [k][queries by 16][query parity], byte 2 (query half) + (key half). */
    __device__ __forceinline__ void dropout_draw(uint32_t (&bytes)[KT][NT / 2][2], int head, int i0)
    {
        const uint32_t batch_head = b * (int)a.p.h + head, first_i = i0 / 16u, first_j = (j0 + key_warp * KEYS) / 16u;
        const auto *rng = (const unsigned long long *)a.p.rng;
        const uint64_t seed = __ldg(rng + opaque(0)), offset = __ldg(rng + opaque(1));
        if constexpr (GROUPED) {
            const int lane = thread_anew() & 31, g = lane >> 2, t = lane & 3;
            #pragma unroll
            for (int q = 0; q < NT / 2; q++) {
                const fa_philox random = fa_philox_call(seed, fa_dropout_counter(
                    offset, batch_head, first_i + q, first_j + g / 4, t * 4 + g % 4));
                #pragma unroll
                for (int x = 0; x < 4; x++) bytes[x % 2][q][x / 2] = random.word[x];
            }
        } else {
            constexpr int PIECES = KT * NT / 2;
            #pragma unroll
            for (int at = 0; at < PIECES; at += 2) {
                uint32_t two[2][2], piece_i[2], piece_j[2];
                #pragma unroll
                for (int x = 0; x < 2; x++) piece_i[x] = first_i + (at + x) / KT, piece_j[x] = first_j + (at + x) % KT;
                dropout_bytes(two, seed, offset, batch_head, piece_i, piece_j, lane, true);
                #pragma unroll
                for (int x = 0; x < 4 && at + x / 2 < PIECES; x++) bytes[(at + x / 2) % KT][(at + x / 2) / KT][x % 2] = two[x / 2][x % 2];
            }
        }
    }

    /* This warp's part of P^T or dS^T (BLOCK_N, BLOCK_M) to shared memory. */
    __device__ __forceinline__ void share(uint32_t tile, const uint32_t (&x)[NT / 2][KT][4])
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = key_warp * KEYS + k * 16 + half * 8 + (lane >> 2);
                    store_shared_4(tile + tile_offset<BLOCK_M>(row, q_warp * NT + n) + (lane & 3) * 4, x[n / 2][k][n % 2 * 2 + half]);
                }
    }

    /* dQ (BLOCK_M, D) += dS K: this warp's DQ_M queries x 8 DQ_DT channels, 8 DQ_STEP at a time. */
    __device__ __forceinline__ void add_dq(int head, int m)
    {
        int lane = this->lane, warp = q_warp * KEY_WARPS + key_warp;
        if (Q_WARPS == 1) lane = thread_anew() & 31, warp = thread_anew() >> 5;         /* registers held over the loop would spill */
        const int row0 = warp % DQ_WM * DQ_M, column0 = warp / DQ_WM * DQ_DT;
        const int64_t row = padded_row(a, seq, b, head) + m * BLOCK_M + row0;
        const uint32_t x_at = ds_tile + lane_a_trans<BLOCK_M>(lane), y_at = k_tile + lane_b_trans<D>(lane);
        #pragma unroll 1
        for (int column = column0; column < column0 + DQ_DT; column += DQ_STEP) {
            float dq[DQ_M / 16][DQ_STEP][4] = {};
            uint32_t x[2][DQ_M / 16][4], y[2][DQ_STEP / 2][4];
            auto load = [&](int k) {
                #pragma unroll
                for (int i = 0; i < DQ_M / 16; i++) ldmatrix_trans(x[k % 2][i], step<BLOCK_M>(x_at, row0 / 16 + i) + k * 16 * BLOCK_M * 2);
                #pragma unroll
                for (int j = 0; j < DQ_STEP / 2; j++) ldmatrix_trans(y[k % 2][j], step<D>(y_at, column / 2 + j) + k * 16 * D * 2);
            };
            load(0);
            #pragma unroll
            for (int k = 0; k < BLOCK_N / 16; k++) {
                if (k + 1 < BLOCK_N / 16) load(k + 1);
                #pragma unroll
                for (int j = 0; j < DQ_STEP; j++)
                    #pragma unroll
                    for (int i = 0; i < DQ_M / 16; i++)
                        mma<T>(dq[i][j], x[k % 2][i], y[k % 2][j / 2][j % 2 * 2], y[k % 2][j / 2][j % 2 * 2 + 1]);
            }
            float *sums = a.dq_accum + dq_block<D>(row, column);
            #pragma unroll
            for (int i = 0; i < DQ_M / 16; i++)
                #pragma unroll
                for (int j = 0; j < DQ_STEP; j++) dq_add(sums + dq_block<D>(i * 16, j), lane, dq[i][j]);
        }
    }

    /* Deterministic dq: key tiles add to a query tile in ascending order. Tiles start in that order too, so the one that is waited
     * for is running or done. */
    __device__ __forceinline__ int *turn_of(int head, int m) const
    {
        return a.turns + (padded_row(a, seq, b, head) + m * BLOCK_M) / 16;
    }
    __device__ __forceinline__ void wait_for_turn(int head, int m) const
    {
        const int first = first_key(a, seq, m * BLOCK_M) / BLOCK_N;
        int before = j0 / BLOCK_N - first;
        if (has_mask<VARIANT>(a)) before = visible_tiles(a.mask, mask_plane(a.mask, b, head), first, j0 / BLOCK_N, m);
        if (threadIdx.x == 0) {
            while (*(volatile int *)turn_of(head, m) < before) __nanosleep(64);
            __threadfence();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void pass_turn(int head, int m) const
    {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(turn_of(head, m), 1);
    }

    /* Register r of a left operand: keys' half r % 2, queries' half r / 2, as the bytes have it. */
    __device__ __forceinline__ void drop(uint32_t (&left)[NT / 2][KT][4], const uint32_t (&bytes)[KT][NT / 2][2])
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int q = 0; q < NT / 2; q++) {
                uint32_t z[4];
                kept_pairs(z, bytes[k][q][0], bytes[k][q][1], dropout_threshold(a.keep256));
                #pragma unroll
                for (int r = 0; r < 4; r++) left[q][k][r] = keep_pair<T>(left[q][k][r], z[r]);
            }
    }

    /* dS = P (Z kept dP - delta), in dp; s holds P times the score's derivative, with dropout alone times kept. */
    __device__ __forceinline__ void score_gradients(float (&dp)[KT][NT][4], const float (&s)[KT][NT][4],
                                                    const uint32_t (&bytes)[KT][NT / 2][2], uint32_t delta_row)
    {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 delta = load_shared_8(delta_row + n * 32 + (lane & 3) * 8);
            if (DROPS && !MODS) delta.x *= a.keep256 / 256.0f, delta.y *= a.keep256 / 256.0f;
            #pragma unroll
            for (int k = 0; k < KT; k++) {
                uint32_t pairs[4];
                if (DROPS) kept_pairs(pairs, bytes[k][n / 2][0], bytes[k][n / 2][1], dropout_threshold(a.keep256));
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 z = make_float2(1.0f, 1.0f);
                    if (DROPS) z = unpack_pair(pairs[n % 2 * 2 + half]);
                    if (DROPS && MODS) z.x *= a.kept, z.y *= a.kept;
                    float &x = dp[k][n][2 * half], &y = dp[k][n][2 * half + 1];
                    x = s[k][n][2 * half] * fmaf(x, z.x, -delta.x);
                    y = s[k][n][2 * half + 1] * fmaf(y, z.y, -delta.y);
                }
            }
        }
    }

    /* P, dS, and what follows from them without other warps. i0: this warp's first query. */
    template <bool MASKED> __device__ __forceinline__ void gradients(int head, int i0, uint32_t q_tile, uint32_t bias_tile)
    {
        const uint32_t dout_tile = q_tile + Q_BYTES, lse2_row = dout_tile + Q_BYTES + q_warp * QUERIES * 4;
        float s[KT][NT][4], dp[KT][NT][4];
        uint32_t random[KT][NT / 2][2], left[NT / 2][KT][4];
        product(s, k_tile, q_tile);
        product(dp, v_tile, dout_tile);
        probabilities<MASKED>(s, left, head, i0, lse2_row, bias_tile);
        if (DROPS) dropout_draw(random, head, i0);
        if (DROPS) drop(left, random);
        if (Q_WARPS > 1) share(p_tile, left);
        accumulate_own(dv, left, dout_tile);
        score_gradients(dp, s, random, lse2_row + BLOCK_M * 4);
        pack_left(left, dp);
        share(ds_tile, left);
        accumulate_own(dk, left, q_tile);
    }

    __device__ __forceinline__ void load_keys(uint32_t tile, const rows_of &from, bool whole_rows)
    {
        if (whole_rows && from.rows >= BLOCK_N)
            whole::template load<BLOCK_N, order>(tile, from.ptr + whole::template first<order>(from.stride), from.stride);
        else
            load_tile<BLOCK_N, D, THREADS, order>(tile, from);
    }

    __device__ __forceinline__ void run()
    {
        load_keys(k_tile, keys(a.p.k, (int)a.p.d, a.aligned_k), a.whole_k);
        load_keys(v_tile, keys(a.p.v, (int)a.p.d_v, a.aligned_v), a.whole_v);
        position at = start(), ahead = at;
        load_stage(ahead, stages, bias_tiles);
        for (int stage = 0; !done(at); at = ahead, stage ^= STAGES - 1) {
            const int i0 = at.m * BLOCK_M, i_end = min(i0 + BLOCK_M, seq.sq) - 1;
            const uint32_t here = stages + stage * STAGE_BYTES;
            cp_async_wait<0>();
            __syncthreads();                        /* the tile is here for all, and all are done with the one before */
            ahead = next(at);
            if (STAGES > 1) load_stage(ahead, stages + (stage ^ 1) * STAGE_BYTES, bias_tiles + (stage ^ 1) * BIAS_TILE_BYTES);
            const bool whole = first_key(a, seq, i_end) <= j0 && last_key(a, seq, i0) >= j0 + BLOCK_N && needs_no_mask(at);
            if (whole) gradients<false>(at.head, i0 + q_warp * QUERIES, here, bias_tiles + stage * BIAS_TILE_BYTES);
            else gradients<true>(at.head, i0 + q_warp * QUERIES, here, bias_tiles + stage * BIAS_TILE_BYTES);
            __syncthreads();                        /* P and dS are here for all */
            accumulate_others(dv, p_tile, here + Q_BYTES);
            accumulate_others(dk, ds_tile, here);
            if (STAGES == 1) {
                if (Q_WARPS > 1) __syncthreads();   /* all are done with Q and dO */
                load_stage(ahead, stages, bias_tiles);
            }
            if (a.p.deterministic) wait_for_turn(at.head, at.m);
            add_dq(at.head, at.m);
            if (a.p.deterministic) pass_turn(at.head, at.m);
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    /* dK or dV of this block's keys, through a tile that no one reads any more. Keys in no use get 0. */
    __device__ __forceinline__ void store(const float (&x)[KT][DT][4], uint32_t tile, float factor, const fa_tensor &t, int d, bool aligned)
    {
        #pragma unroll
        for (int k = 0; k < KT; k++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = key_warp * KEYS + order::row(k * 16 + half * 8 + (lane >> 2));
                const float scale = j0 + row < seq.sk ? factor : 0.0f;
                #pragma unroll
                for (int j = 0; j < DT; j++)
                    store_shared_4(tile + tile_offset<D>(row, q_warp * DT + j) + (lane & 3) * 4,
                                   pack<T>(x[k][j][2 * half] * scale, x[k][j][2 * half + 1] * scale));
            }
        __syncthreads();
        uint16_t *to = (uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + j0) * t.stride_s + kv_head * t.stride_h;
        store_tile<BLOCK_N, D, THREADS>(tile, threadIdx.x, to, t.stride_s, seq.k_rows - j0, d, aligned);
    }
};

/* Key tiles of one head follow each other, ascending: the longest first if causal. */
template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(32 * Tile::WARPS, Tile::BLOCKS) backward_kernel(const __grid_constant__ fa_cuda_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    using kernel = backward<T, D, VARIANT, Tile>;
    const block_place place = place_of_block<VARIANT>(a, (int)a.p.hk, a.n_tiles);
    kernel block(a, place.b, place.head, place.tile, shared_address(shared));
    if (block.j0 >= block.seq.k_rows) return;
    const int j_end = min(block.j0 + kernel::BLOCK_N, block.seq.sk) - 1;
    const bool used = block.j0 < block.seq.sk;
    block.m_first = used ? first_query(a, block.seq, block.j0) / kernel::BLOCK_M : 0;
    block.m_last = used ? (max(last_query(a, block.seq, j_end), 0) + kernel::BLOCK_M - 1) / kernel::BLOCK_M : 0;
    block.run();
    const float dv_factor = kernel::DROPS ? (kernel::MODS ? a.kept : 1.0f) * kept_factor<T>() : 1.0f;
    block.store(block.dv, block.v_tile, dv_factor, a.p.dv, (int)a.p.d_v, a.aligned_dv);
    block.store(block.dk, block.k_tile, a.scale, a.p.dk, (int)a.p.d, a.aligned_dk);
}

#endif
