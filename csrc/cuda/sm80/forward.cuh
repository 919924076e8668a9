/* cuda/sm80/forward.cuh: forward attention with mma.sync; a block owns BLOCK_M query rows of one head.
 *
 *     S = Q K^T    P = exp2(c S - m)    l = rowsum P    O = P V / l    lse = ln 2 (m + log2 l)        c = scale log2 e
 *
 * Each warp owns 16 or 32 of the rows, all keys and all channels: softmax needs no other warp. K and V tiles come by cp.async,
 * through two stages with one barrier a tile, or through one, where V loads behind S and the next K behind O:
 *
 *     S = Q K^T | maxima | P(0) | P(1)  O += P(0) V(0) | P(2)  O += P(1) V(1) | ...          P(k): 16 keys
 *
 * so the tensor cores work on O while the next exponents are taken, and the registers of S are free as soon as they are P.
 * m is any number near the row's maximum: it moves, and O with it, only where the maximum exceeds it by LAG, rarely after a few tiles.
 * 32 rows a warp halve the shared-memory reads per product; from D = 192 on O does not leave registers for that.
 * Tiles that some row does not see whole take a second copy of the loop body with masks. Keys run from last to first. */
#ifndef FA_SM80_FORWARD_CUH
#define FA_SM80_FORWARD_CUH

#include "../bias.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "../tile.cuh"
#include "config.h"
#include "instance.cuh"

template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile> struct forward {
    enum : int {
        WARPS = Tile::WARPS, THREADS = 32 * WARPS, BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, STAGES = Tile::STAGES,
        ROWS = BLOCK_M / WARPS, MT = ROWS / 16,             /* rows of a warp; 16-row pieces of them */
        NT = BLOCK_N / 8, KT = BLOCK_N / 16, DT = D / 8,    /* keys by 8 and by 16, channels by 8 */
        AHEAD = MT == 1 ? 3 : 1,                            /* operands of S load so many products ahead */
        DROPS = FA_HAS_DROPOUT(VARIANT), MODS = FA_HAS_MODS(VARIANT),
        Q_HELD = D <= 64 && !MODS, HELD_STEPS = Q_HELD ? D / 16 : 1,       /* Q stays in registers */
        GROUPED = DROPS && !MODS && MT == 2,                /* a lane's rows are a group of the dropout mask, see score.cuh */
        LATE = D > 64, DRAW = MT == 1 ? 2 : 1,            /* the mask is drawn behind S, for DRAW 16 keys at a time: registers */
        ROW_BYTES = 2 * D, KV_BYTES = BLOCK_N * ROW_BYTES, Q_BYTES = BLOCK_M * ROW_BYTES,
        HUGE_BYTES = THREADS * 2 * MT * 4, SHARED_BYTES = Q_BYTES + 2 * STAGES * KV_BYTES + HUGE_BYTES,
        BIAS_TILE_BYTES = BLOCK_M * BLOCK_N * 2, BIAS_BYTES = STAGES * BIAS_TILE_BYTES,
    };
    static constexpr float LARGEST_SHIFT = 4096.0f;         /* rounded to 2^-13: fp16 has 11 bits */
    static constexpr float NO_KEY = -3.4e38f;               /* the shift of a row that has seen none: any score is far above, -inf below */
    static constexpr float LAG = 8.0f;                      /* exponents may so exceed the shift: P up to 256 */
    using order = typename select_tile<GROUPED, in_groups, in_order>::type;
    static_assert(BLOCK_M % (16 * WARPS) == 0 && BLOCK_N % 32 == 0 && D % 32 == 0, "whole fragments");

    const fa_cuda_args &a;
    const int lane, warp, b, head, kv_head, i0;             /* i0: first query of the block */
    const sequence seq;
    const uint32_t q_tile, k_tiles, v_tiles, bias_tiles;
    int n_first, n_last;                                    /* tiles [first, last) */
    const uint16_t *k_at, *v_at;                            /* this thread's start in the next tile to load */

    uint64_t seed, offset;                                  /* of dropout: loads cannot move over the loop's barriers */
    uint32_t q_held[HELD_STEPS][MT][4];
    float o[MT][DT][4];
    float row_shift[MT][2], row_sum[MT][2];                 /* rows g and g + 8 of each piece; the sum is this lane's share */
    uint32_t huge;                                          /* bit 2 m + half: the row's shift is 0, its maximum in shared memory */

    __device__ __forceinline__ forward(const fa_cuda_args &args, int batch, int h, int m, uint32_t shared)
        : a(args), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), b(batch), head(h), kv_head(h / args.group), i0(m * BLOCK_M),
          seq(sequence_of(args.p, batch)), q_tile(shared), k_tiles(shared + Q_BYTES), v_tiles(k_tiles + STAGES * KV_BYTES),
          bias_tiles(shared + SHARED_BYTES)
    {
        if (DROPS) seed = a.p.rng[0], offset = a.p.rng[1];
        huge = 0;
        #pragma unroll
        for (int m_ = 0; m_ < MT; m_++) {
            #pragma unroll
            for (int half = 0; half < 2; half++) row_shift[m_][half] = NO_KEY, row_sum[m_][half] = 0.0f;
            #pragma unroll
            for (int j = 0; j < DT; j++)
                #pragma unroll
                for (int e = 0; e < 4; e++) o[m_][j][e] = 0.0f;
        }
    }

    /* Tile n of K or V, if there is one, from this thread's place in it, which moves on. Tiles come in descending order: all but the
     * first exist whole. */
    using whole_rows = whole_tile<D, THREADS>;
    __device__ __forceinline__ const uint16_t *place(const fa_tensor &t, int n) const
    {
        return (const uint16_t *)t.ptr + b * t.stride_b + (int64_t)(seq.k0 + n * BLOCK_N) * t.stride_s + kv_head * t.stride_h
             + whole_rows::first(t.stride_s);
    }
    template <bool FIRST>                                   /* the one that may not */
    __device__ __forceinline__ void load_keys(uint32_t tile, int n, const uint16_t *&at, const fa_tensor &t, int d, bool whole, bool aligned)
    {
        if (n < n_first) return;
        if (has_mask<VARIANT>(a)) at = place(t, n);         /* the tile before may have been passed over */
        if (whole && (!FIRST || (n + 1) * BLOCK_N <= seq.sk)) whole_rows::template load<BLOCK_N>(tile, at, t.stride_s);
        else load_tile<BLOCK_N, D, THREADS>(tile, { at - whole_rows::first(t.stride_s), t.stride_s, seq.sk - n * BLOCK_N, d, aligned });
        at -= BLOCK_N * t.stride_s;
    }
    template <bool FIRST> __device__ __forceinline__ void load_k(int n, int stage)
    {
        load_keys<FIRST>(k_tiles + stage * KV_BYTES, n, k_at, a.p.k, (int)a.p.d, a.whole_k, a.aligned_k);
    }
    /* And the bias, which is wanted no sooner. */
    template <bool FIRST> __device__ __forceinline__ void load_v(int n, int stage)
    {
        load_keys<FIRST>(v_tiles + stage * KV_BYTES, n, v_at, a.p.v, (int)a.p.d_v, a.whole_v, a.aligned_v);
        if (MODS && a.bias_staged && n >= n_first)
            load_bias_tile<BLOCK_M, BLOCK_N, THREADS>(bias_tiles + stage * BIAS_TILE_BYTES, a, seq, b, head, i0, n * BLOCK_N);
    }

    /* The tile to work with after n: the one before it that the mask shows a key of. */
    __device__ __forceinline__ int tile_after(int n) const
    {
        if (!has_mask<VARIANT>(a)) return n - 1;
        return last_visible_tile(a.mask, mask_plane(a.mask, b, head), i0 / BLOCK_M, n_first, n);
    }
    __device__ __forceinline__ bool needs_no_mask(int n) const
    {
        if (has_bias<VARIANT>(a) && !a.bias_staged) return false;       /* biases that are not staged share the masks' copy of the loop */
        return !has_mask<VARIANT>(a) || tile_is_whole(a.mask, mask_plane(a.mask, b, head), i0 / BLOCK_M, n);
    }

    /* S (ROWS, BLOCK_N) = Q K^T */
    __device__ __forceinline__ void scores(float (&s)[MT][NT][4], uint32_t k_tile)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
        const int thread = D > 64 ? thread_anew() : threadIdx.x, lane = thread & 31, warp = thread >> 5;
        const uint32_t q_at = q_tile + warp * ROWS * ROW_BYTES + lane_a<D>(lane);
        const uint32_t k_at = k_tile + lane_b<D>(lane);
        constexpr int STEPS = D / 16, PAIRS = NT / 2;
        uint32_t q[2][MT][4], keys[AHEAD + 1][4];           /* operands in use, and what comes AHEAD of use */
        auto load_q = [&](int k) {
            #pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix(q[k % 2][m], step<D>(q_at, k) + m * 16 * ROW_BYTES);
        };
        auto load_keys = [&](int x) { ldmatrix(keys[x % (AHEAD + 1)], step<D>(k_at, x / PAIRS) + x % PAIRS * 16 * ROW_BYTES); };
        if (!Q_HELD) load_q(0);
        #pragma unroll
        for (int x = 0; x < AHEAD; x++) load_keys(x);
        #pragma unroll (D == 128 ? 2 * PAIRS : STEPS * PAIRS)       /* more at a time spills */
        for (int x = 0; x < STEPS * PAIRS; x++) {           /* 16 channels of 16 keys at a time */
            if (!Q_HELD && x % PAIRS == 0 && x / PAIRS + 1 < STEPS) load_q(x / PAIRS + 1);
            if (x + AHEAD < STEPS * PAIRS) load_keys(x + AHEAD);
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int m = 0; m < MT; m++) {
                    const uint32_t (&left)[4] = Q_HELD ? q_held[x / PAIRS % HELD_STEPS][m] : q[x / PAIRS % 2][m];
                    mma<T>(s[m][x % PAIRS * 2 + n], left, keys[x % (AHEAD + 1)][n * 2], keys[x % (AHEAD + 1)][n * 2 + 1]);
                }
        }
    }

    __device__ __forceinline__ int query(int m, int half) const { return i0 + warp * ROWS + row_of(m, half); }
    __device__ __forceinline__ int row_of(int m, int half) const { return order::row(m * 16 + half * 8 + (lane >> 2)); }

    __device__ __forceinline__ void add_staged_bias(float (&s)[MT][NT][4], uint32_t bias_tile)
    {
        const uint32_t at = bias_tile + warp * ROWS * BLOCK_N * 2 + lane_a<BLOCK_N>(lane);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t x[4];
                ldmatrix(x, step<BLOCK_N>(at, n / 2) + m * 16 * BLOCK_N * 2);
                add_piece<T>(s[m][n], s[m][n + 1], x, a.bias_scale);
            }
    }
    __device__ __forceinline__ void add_bias(float (&s)[MT][NT][4], int j)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                bias_walk bias = bias_from(a, seq, b, head, query(m, half), j);
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) {
                    float &score = s[m][x / 2][2 * half + x % 2];
                    score = fmaf(score, a.bias_scale, bias_next(bias, x % 2 ? 7 : 1));
                }
            }
    }

    /* Score mods and bias, then -inf where row and column do not see each other. j0: key of column 0. */
    template <bool MASKED> __device__ __forceinline__ void modify(float (&s)[MT][NT][4], int j0, uint32_t bias_tile, bool bounded)
    {
        const int j = j0 + (lane & 3) * 2;
        if (has_score_mod<VARIANT>(a)) {
            const float slope = alibi_slope(a, b, head);
            #pragma unroll
            for (int m = 0; m < MT; m++)
                #pragma unroll
                for (int x = 0; x < 4 * NT; x++) {
                    const int distance = query(m, x % 4 / 2) + seq.sk - seq.sq - (j + x / 4 * 8 + x % 2);
                    float unused;
                    s[m][x / 4][x % 4] = modify_score(a, s[m][x / 4][x % 4], slope, distance, unused);
                }
        }
        if (MODS && a.bias_staged) add_staged_bias(s, bias_tile);
        else if (MASKED && has_bias<VARIANT>(a)) add_bias(s, j);
        if (!MASKED) return;
        if (!MODS || bounded) {
            if (!MODS && a.window_left < 0) bound<false>(s, j);
            else bound<true>(s, j);
        }
        if (has_mask<VARIANT>(a)) hide(s, j0);
    }

    /* -inf behind a row's last key, and with a WINDOW before its first. */
    template <bool WINDOW> __device__ __forceinline__ void bound(float (&s)[MT][NT][4], int j)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half), first = WINDOW ? first_key(a, seq, i) - j : 0, last = last_key(a, seq, i) - j;
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++)
                    if ((WINDOW && x / 2 * 8 + x % 2 < first) || x / 2 * 8 + x % 2 >= last) s[m][x / 2][2 * half + x % 2] = -INFINITY;
            }
    }

    /* -inf where the mask hides the key. A word has the keys of four accumulators. */
    __device__ __forceinline__ void hide(float (&s)[MT][NT][4], int j0)
    {
        const int plane = mask_plane(a.mask, b, head);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int n = 0; n < NT; n += 4) {
                    const uint32_t word = mask_word(a.mask, plane, min(query(m, half), seq.sq - 1), j0 + n * 8) >> (lane & 3) * 2;
                    #pragma unroll
                    for (int x = 0; x < 8; x++)
                        if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[m][n + x / 2][2 * half + x % 2] = -INFINITY;
                }
    }

    /* Where a lane keeps a huge row's maximum, which registers have no room for. */
    __device__ __forceinline__ float &huge_top(int m, int half) const
    {
        return *(float *)__cvta_shared_to_generic(bias_tiles - HUGE_BYTES + ((2 * m + half) * THREADS + threadIdx.x) * 4);
    }

    /* P = exp2(c S - shift), any shift near the row's maximum: sums and O follow only where some row of the warp exceeds its own by LAG,
     * to the maximum so far. Lanes compare for themselves; nearly always that is all. One FMA is exact enough while the rounding of
     * the shift is; of larger scores the maximum is taken off here. */
    __device__ __forceinline__ void maxima(float (&s)[MT][NT][4])
    {
        float top[MT][2];
        bool moved = huge;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = s[m][0][2 * half], y = s[m][0][2 * half + 1];
                #pragma unroll
                for (int n = 1; n < NT; n++) {
                    x = fmaxf(x, s[m][n][2 * half]);
                    y = fmaxf(y, s[m][n][2 * half + 1]);
                }
                top[m][half] = fmaxf(x, y);
                moved |= fmaf(top[m][half], a.exponent_scale, -row_shift[m][half]) > LAG;
                if (MODS) moved |= row_shift[m][half] == NO_KEY && top[m][half] > -INFINITY;    /* a bias may be as low as NO_KEY */
            }
        if (!__any_sync(0xffffffff, moved)) return;
        rescale(top);
        if (!huge) return;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float largest = huge >> (2 * m + half) & 1 ? huge_top(m, half) : 0.0f;
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) s[m][x / 2][2 * half + x % 2] -= largest;
            }
    }

    /* S becomes P, keys 16 k.. */
    __device__ __forceinline__ void exponents(float (&s)[MT][NT][4], int k)
    {
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    float &p = s[m][2 * k + x / 2][2 * half + x % 2];
                    p = exp2_approx(fmaf(p, a.exponent_scale, -row_shift[m][half]));
                }
                row_sum[m][half] += (s[m][2 * k][2 * half] + s[m][2 * k][2 * half + 1])
                                  + (s[m][2 * k + 1][2 * half] + s[m][2 * k + 1][2 * half + 1]);
            }
    }

    /* Rows whose maximum has grown go by it from here on. */
    __device__ __forceinline__ void rescale(const float (&lane_top)[MT][2])
    {
        const float c = a.exponent_scale;
        float top[MT][2];
        bool any_huge = huge;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                top[m][half] = quad_max(lane_top[m][half]);
                any_huge |= is_huge(top[m][half]);
            }
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float now = __fmul_rn(top[m][half], c);
                if (!any_huge && !(now > row_shift[m][half])) continue;
                float alpha = row_shift[m][half] - now;
                if (any_huge) alpha = move_huge(m, half, top[m][half]);
                else row_shift[m][half] = now;
                alpha = exp2_approx(alpha);
                row_sum[m][half] *= alpha;
                #pragma unroll
                for (int j = 0; j < DT; j++) o[m][j][2 * half] *= alpha, o[m][j][2 * half + 1] *= alpha;
            }
    }
    __device__ __forceinline__ bool is_huge(float score) const
    {
        return fabsf(score * a.exponent_scale) > LARGEST_SHIFT && score != -INFINITY;
    }
    /* The same where scores are, or were, huge: log2 of what a row's sums are to be multiplied by. */
    __device__ __forceinline__ float move_huge(int m, int half, float top)
    {
        const float c = a.exponent_scale, shift = row_shift[m][half], now = __fmul_rn(top, c);
        const uint32_t bit = 1u << (2 * m + half);
        const bool was = huge & bit, is = is_huge(top);
        const bool first = shift == NO_KEY && top > -INFINITY;
        const float before = was ? huge_top(m, half) : 0.0f, growth = was ? (top - before) * c : first ? INFINITY : fmaf(top, c, -shift);
        if (!(growth > 0.0f)) return 0.0f;
        row_shift[m][half] = is ? 0.0f : now;
        huge = is ? huge | bit : huge & ~bit;
        if (is) huge_top(m, half) = top;
        return is ? -growth : was ? fmaf(before, c, -now) : shift - now;
    }

    /* The bytes of dropout for this lane's elements: [m][k][column parity], byte 2 (row half) + (column half); grouped rows: all of one
     * call for keys 16 k.., else two pieces at a time. */
    __device__ __forceinline__ void dropout_draw(uint32_t (&bytes)[MT][KT][2], int j0, int first_k, int last_k)
    {
        const uint32_t batch_head = b * (int)a.p.h + head, first_i = (i0 + warp * ROWS) / 16, first_j = j0 / 16;
        if constexpr (GROUPED) {
            const int g = lane >> 2, t = lane & 3;
            uint64_t key = seed;
            asm volatile("" : "+l"(key));           /* else a loop keeps the keys of all rounds */
            #pragma unroll
            for (int k = first_k; k < last_k; k++) {
                const fa_philox random = fa_philox_call(key, fa_dropout_counter(
                    offset, batch_head, first_i + g / 4, first_j + k, g % 4 * 4 + t));
                #pragma unroll
                for (int x = 0; x < 4; x++) bytes[x / 2][k][x % 2] = random.word[x];
            }
        } else {
            #pragma unroll
            for (int at = MT * first_k; at < MT * last_k; at += 2) {
                uint32_t two[2][2], piece_i[2], piece_j[2];
                #pragma unroll
                for (int x = 0; x < 2; x++) piece_i[x] = first_i + (at + x) % MT, piece_j[x] = first_j + (at + x) / MT;
                constexpr bool SPILLS = MODS && D == 128;       /* with seed and offset in registers */
                dropout_bytes(two, SPILLS ? a.p.rng[0] : seed, SPILLS ? a.p.rng[1] : offset, batch_head, piece_i, piece_j, lane, false);
                #pragma unroll
                for (int x = 0; x < 4; x++) bytes[(at + x / 2) % MT][(at + x / 2) / MT][x % 2] = two[x / 2][x % 2];
            }
        }
    }

    /* O += P V, keys 16 k.. Register r of a left operand: rows' half r % 2, keys' half r / 2. */
    __device__ __forceinline__ void accumulate(const float (&s)[MT][NT][4], const uint32_t (&bytes)[MT][KT][2], uint32_t v_tile, int k)
    {
        const uint32_t v_at = v_tile + lane_b_trans<D>(lane);
        uint32_t p[MT][4];
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            uint32_t z[4];
            if (DROPS) kept_pairs(z, bytes[m][k][0], bytes[m][k][1], dropout_threshold(a.keep256));
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                p[m][r] = pack<T>(s[m][2 * k + r / 2][r % 2 * 2], s[m][2 * k + r / 2][r % 2 * 2 + 1]);
                if (DROPS) p[m][r] = keep_pair<T>(p[m][r], z[2 * (r % 2) + r / 2]);
            }
        }
        #pragma unroll
        for (int j = 0; j < DT; j += 2) {
            uint32_t v[4];
            ldmatrix_trans(v, step<D>(v_at, j / 2) + k * 16 * ROW_BYTES);
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(o[m][j], p[m], v[0], v[1]);
                mma<T>(o[m][j + 1], p[m], v[2], v[3]);
            }
        }
    }

    /* Whether some row of this warp sees a key from j0 of a tile, and every row all of them. */
    struct sight { bool some, all; };
    __device__ __forceinline__ sight sight_of(int j0) const
    {
        const int first = i0 + warp * ROWS, last = first + ROWS - 1;
        return { last_key(a, seq, last) > j0 && first_key(a, seq, first) < j0 + BLOCK_N,
                 last_key(a, seq, first) >= j0 + BLOCK_N && first_key(a, seq, last) <= j0 };
    }

    /* Tile n, while the one after it loads, whose number comes back. Stages alternate; where no tile is passed over n says which it is.
     * `bounded`: some row does not see all of it, whatever the mask says. */
    template <bool MASKED> __device__ __forceinline__ int tile(int n, int turn, bool bounded)
    {
        const int stage = !MODS ? (uint32_t)n % STAGES : turn;
        const uint32_t k_tile = k_tiles + stage * KV_BYTES, v_tile = v_tiles + stage * KV_BYTES;
        const int after = tile_after(n), other = stage ^ (STAGES - 1);
        cp_async_wait<0>();
        __syncthreads();                            /* tile n (one stage: K(n)) is here for all, and all are done with the one before */
        if (STAGES > 1) load_k<false>(after, other), load_v<false>(after, other);
        else if (n == n_last - 1) load_v<true>(n, other);
        else load_v<false>(n, other);
        cp_async_commit();
        float s[MT][NT][4];
        uint32_t random[MT][KT][2];
        const sight seen = MASKED && !MODS && MT > 1 ? sight_of(n * BLOCK_N) : sight{ true, false };
        if (seen.some) {
            if (DROPS && !LATE) dropout_draw(random, n * BLOCK_N, 0, KT);
            scores(s, k_tile);
        }
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads();                        /* V(n) is here for all, and all are done with K(n) */
            load_k<false>(after, other);
            cp_async_commit();
        }
        if (!seen.some) return after;
        if (!seen.all && (MASKED || MODS)) modify<MASKED>(s, n * BLOCK_N, bias_tiles + stage * BIAS_TILE_BYTES, bounded);
        maxima(s);
        exponents(s, 0);
        #pragma unroll
        for (int k = 0; k < KT; k++) {
            if (k + 1 < KT) exponents(s, k + 1);
            if (DROPS && LATE && k % DRAW == 0) dropout_draw(random, n * BLOCK_N, k, k + DRAW);
            accumulate(s, random, v_tile, k);
        }
        return after;
    }

    /* Tiles from `n_last - 1` down to `n_first`; those in [whole_first, whole_last) every row of the block sees whole but for the mask. */
    __device__ __forceinline__ void run()
    {
        const int i_end = min(i0 + BLOCK_M, seq.sq) - 1;
        const int whole_first = (first_key(a, seq, i_end) + BLOCK_N - 1) / BLOCK_N, whole_last = max(last_key(a, seq, i0), 0) / BLOCK_N;
        int n = tile_after(n_last), stage = (uint32_t)n % STAGES;
        if (n < n_first) return;                    /* no key is visible; Q must not arrive where O will lie */
        load_queries();
        k_at = place(a.p.k, n_last - 1);
        v_at = place(a.p.v, n_last - 1);
        load_k<true>(n, stage);
        if (STAGES > 1) load_v<true>(n, stage);
        cp_async_commit();
        if (Q_HELD) hold_queries();
        while (n >= n_first) {
            for (; n >= n_first && (n >= whole_last || n < whole_first || !needs_no_mask(n)); stage ^= STAGES - 1) n = tile<true>(n, stage, n >= whole_last || n < whole_first);
            for (; n >= n_first && n >= whole_first && needs_no_mask(n); stage ^= STAGES - 1) n = tile<false>(n, stage, false);
        }
        cp_async_wait<0>();
    }

    __device__ __forceinline__ void hold_queries()
    {
        const uint32_t q_at = q_tile + warp * ROWS * ROW_BYTES + lane_a<D>(lane);
        cp_async_wait<0>();
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < HELD_STEPS; k++)
            #pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix(q_held[k][m], step<D>(q_at, k) + m * 16 * ROW_BYTES);
    }
    __device__ __forceinline__ void load_queries()
    {
        const fa_tensor &q = a.p.q;
        const uint16_t *from = (const uint16_t *)q.ptr + b * q.stride_b + (int64_t)(seq.q0 + i0) * q.stride_s + head * q.stride_h;
        if (a.whole_q && i0 + BLOCK_M <= seq.sq)
            whole_rows::template load<BLOCK_M, order>(q_tile, from + whole_rows::template first<order>(q.stride_s), q.stride_s);
        else
            load_tile<BLOCK_M, D, THREADS, order>(q_tile, { from, q.stride_s, seq.sq - i0, (int)a.p.d, a.aligned_q });
    }

    /* Normalises O; of row g + 8 half of piece m comes back what its exponentials are relative to, and the logarithm of their sum: lse
     * in two parts. */
    __device__ __forceinline__ float2 finish_row(int m, int half)
    {
        const float sum = quad_sum(row_sum[m][half]);
        const bool empty = row_shift[m][half] == NO_KEY && sum == 0.0f;
        const float factor = empty ? 0.0f : (DROPS ? a.kept * kept_factor<T>() : 1.0f) / sum;
        #pragma unroll
        for (int j = 0; j < DT; j++) o[m][j][2 * half] *= factor, o[m][j][2 * half + 1] *= factor;
        const float log_sum = 0.69314718f * log2_approx(sum);
        if (huge >> (2 * m + half) & 1) return make_float2(huge_top(m, half) * (0.69314718f * a.exponent_scale), log_sum);
        return empty ? make_float2(-INFINITY, 0.0f) : make_float2(0.69314718f * row_shift[m][half], log_sum);
    }

    __device__ __forceinline__ void store()
    {
        const fa_params &p = a.p;
        float *lse = (float *)p.lse.ptr + b * p.lse.stride_b + head * p.lse.stride_h;
        const uint32_t own = q_tile + warp * ROWS * ROW_BYTES;                      /* this warp's rows of Q: no one else's */
        __syncwarp();
        #pragma unroll
        for (int m = 0; m < MT; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = query(m, half), row = row_of(m, half);
                const float2 value = finish_row(m, half);
                if (i < seq.sq && (lane & 3) == 0) lse[(int64_t)(seq.q0 + i) * p.lse.stride_s] = value.x + value.y;
                #pragma unroll
                for (int j = 0; j < DT; j++)
                    store_shared_4(own + tile_offset<D>(row, j) + (lane & 3) * 4, pack<T>(o[m][j][2 * half], o[m][j][2 * half + 1]));
            }
        __syncwarp();
        const int first = i0 + warp * ROWS;
        uint16_t *out = (uint16_t *)p.out.ptr + b * p.out.stride_b + (int64_t)(seq.q0 + first) * p.out.stride_s + head * p.out.stride_h;
        store_tile<ROWS, D, 32>(own, lane, out, p.out.stride_s, seq.sq - first, (int)p.d_v, a.aligned_out);
    }

    /* A split's share of the keys: fp32, normalised within the split; combine.cu merges. Rows count as lse's do. */
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
                #pragma unroll
                for (int j = 0; j < DT; j++)
                    *(float2 *)(a.partial_out + row * D + j * 8 + (lane & 3) * 2) = make_float2(o[m][j][2 * half], o[m][j][2 * half + 1]);
            }
    }
};

/* Blocks of one head follow each other, longest rows first: its K and V stay in L2. */
template <enum fa_dtype T, int D, enum fa_variant VARIANT, class Tile>
__global__ void __launch_bounds__(32 * Tile::WARPS, Tile::BLOCKS) forward_kernel(const __grid_constant__ fa_cuda_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    using kernel = forward<T, D, VARIANT, Tile>;
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
