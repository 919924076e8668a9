/* cuda/sm90/added.cuh: the forward kernel for calls with attn_bias or attn_mask: forward.cuh's roles and pipeline, and
 *
 *     S = bias_scale Q K^T + bias, -inf where the mask hides the key        behind the products of the block before
 *
 * The bias comes by TMA, 64 queries x 64 keys at a time, a thread and a ring of places for each consumer warpgroup; ldmatrix has the
 * layout of the accumulators, so a piece of 16 x 16 takes four registers for a moment. A word of the mask, 32 keys of a row, is read
 * from memory while the tensor cores are busy. Key blocks that the mask hides from the whole tile are passed over: which block is
 * next, and what must be done to it, the producer writes down beside K.
 *
 * Bounds, biases and masks are branches of one step: each is the same for the whole warpgroup. */
#ifndef FA_SM90_ADDED_CUH
#define FA_SM90_ADDED_CUH

#include "../bias.cuh"
#include "../mask.cuh"
#include "added_args.h"
#include "forward.cuh"

/* GROUPS, BLOCK_N, Q_STAGES, PING_PONG as in config.h; BIAS_PLACES boxes of bias a warpgroup; BIAS_AHEAD boxes of a block are read before
 * its scores come. */
template <int D> struct sm90_added_tile;
template <int G, int BN, bool P, int PLACES, int AHEAD> struct sm90_added_row : sm90_forward_row<G, BN, 2, P> {
    enum { BIAS_PLACES = PLACES, BIAS_AHEAD = AHEAD };
};
template <> struct sm90_added_tile< 64> : sm90_added_row<3, 128, true, 4, 0> {};
template <> struct sm90_added_tile<128> : sm90_added_row<2, 128, false, 2, 1> {};

template <int D, class Tile> struct added_shape : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    enum : int {
        PLACES = Tile::BIAS_PLACES, BOX_BYTES = 64 * 128, BOXES = shape::BLOCK_N / 64,
        BLOCKS_AT = shape::BARRIERS_AT + (shape::BARRIERS + 1) / 2 * 16, ADDED_BARRIERS_AT = BLOCKS_AT + 16,
        INFO_FULL = 0, BIAS_FULL = INFO_FULL + shape::INFOS, BIAS_EMPTY = BIAS_FULL + shape::GROUPS * PLACES,
        ADDED_BARRIERS = BIAS_EMPTY + shape::GROUPS * PLACES,
        BIAS_AT = (ADDED_BARRIERS_AT + 8 * ADDED_BARRIERS + 1023) / 1024 * 1024, BIAS_BYTES = shape::GROUPS * PLACES * BOX_BYTES,
        SHARED_BYTES = BIAS_AT + shape::ALIGNMENT,
    };
    static_assert(shape::BLOCK_N % 64 == 0 && PLACES % BOXES == 0 && SHARED_BYTES + BIAS_BYTES <= 227 * 1024, "a tile that fits");
};

/* A key block as the producer hands it to the consumers: its number, and flags below. MORE: the tile has another; BOUNDED: lengths or
 * window hide a key of it; HIDDEN: the mask does. */
enum : int { MORE = 1, BOUNDED = 2, HIDDEN = 4, FLAG_BITS = 3 };

/* The block to work with after n, below n_first if there is none. */
FA_DEVICE int block_after(const fa_cuda_args &a, int b, int head, int outer, int n_first, int n)
{
    return a.mask.bits ? last_visible_tile(a.mask, mask_plane(a.mask, b, head), outer, n_first, n) : n - 1;
}

/* Has few registers: what it knows of a tile it reads anew where it wrote it down. */
template <int D, class Tile> struct added_producer : forward_producer<D, Tile> {
    using base = forward_producer<D, Tile>;
    using shape = added_shape<D, Tile>;
    using base::f, base::shared, base::unit, base::following, base::keys, base::tiles, base::barrier, base::BLOCK_M, base::BLOCK_N;

    __device__ __forceinline__ uint32_t info_at(int tile) const { return shared + shape::INFO_AT + tile % shape::INFOS * sizeof(forward_tile_info); }
    __device__ __forceinline__ sequence lengths() const { const int sq = (int)f.a.p.sq, sk = (int)f.a.p.sk; return { 0, 0, sq, sk, sq, sk }; }

    /* Writes down tile `tiles` or the end. As forward_producer has it; with a mask n_last follows the last block that it shows a key of. */
    __device__ __forceinline__ bool find()
    {
        const fa_cuda_args &a = f.a;
        const uint32_t at = info_at(tiles);
        const bool found = unit < f.units;
        if (found) {
            const sequence s = lengths();
            const int sequences = (int)a.p.b, heads = (int)a.p.h, m_tiles = a.m_tiles;
            const int first = unit / (f.section * m_tiles) * f.section, width = min(f.section, heads * sequences - first), rest = unit - first * m_tiles;
            const int m = m_tiles - 1 - rest / width, batch_head = first + rest % width, i0 = m * BLOCK_M;
            const int b = a.batch_fastest ? batch_head % sequences : batch_head / heads;
            const int head = a.batch_fastest ? batch_head / sequences : batch_head % heads;
            int n_first = first_key(a, s, i0) / BLOCK_N, n_last = (max(last_key(a, s, min(i0 + BLOCK_M, s.sq) - 1), 0) + BLOCK_N - 1) / BLOCK_N;
            if (n_first < n_last && a.mask.bits) n_last = block_after(a, b, head, m, n_first, n_last) + 1;
            if (n_first >= n_last) {                            /* no key is visible: one block, all of it masked */
                n_first = min(n_first, max(s.sk - 1, 0) / BLOCK_N);
                n_last = n_first + 1;
            }
            store_shared_16(at, make_uint4(b, head, i0, 0));
            store_shared_16(at + 16, make_uint4(s.sq, s.sk, n_first, n_last));
            if (tiles) base::prefetch(i0, (n_last - 1) * BLOCK_N, b, head);
            unit = following;
            following = f.counter ? gridDim.x + atomicAdd(f.counter, 1) : unit + gridDim.x;
        } else {
            store_shared_16(at, make_uint4(~0u, 0, 0, 0));
        }
        mbarrier_arrive(shared + shape::ADDED_BARRIERS_AT + 8 * (shape::INFO_FULL + tiles % shape::INFOS));
        return found;
    }

    __device__ __forceinline__ void load_q()
    {
        const uint32_t full = base::free_q();
        const uint4 t = load_shared_16(info_at(tiles));
        mbarrier_arrive_expect(full, shape::Q_BYTES);
        base::load_panels(shared + shape::Q_AT + tiles % shape::Q_STAGES * shape::Q_BYTES, BLOCK_M * 128, f.q, t.z, t.y, t.x, full, EVICT_FIRST);
    }
    /* K of block n of tile `tile`, and what the consumers must know of it: when the place is free, then K's barrier guards both. */
    __device__ __forceinline__ void load_k(int tile, int n, bool more)
    {
        const fa_cuda_args &a = f.a;
        const sequence s = lengths();
        const uint4 t = load_shared_16(info_at(tile));
        const int stage = keys % shape::STAGES, i0 = t.z;
        const bool bounded = n * BLOCK_N < first_key(a, s, min(i0 + BLOCK_M, s.sq) - 1) || (n + 1) * BLOCK_N > last_key(a, s, i0);
        const bool hidden = a.mask.bits && !tile_is_whole(a.mask, mask_plane(a.mask, t.x, t.y), i0 / BLOCK_M, n);
        mbarrier_wait(barrier(shape::K_EMPTY + stage), (keys / shape::STAGES & 1) ^ 1);
        store_shared_4(shared + shape::BLOCKS_AT + stage * 4, n << FLAG_BITS | (more ? MORE : 0) | (bounded ? BOUNDED : 0) | (hidden ? HIDDEN : 0));
        base::load_block(f.k, shape::K_AT, shape::K_FULL, shape::K_EMPTY, keys++, n * BLOCK_N, t.y / a.group, t.x);
    }
    __device__ __forceinline__ void load_v(int tile, int n, int position)
    {
        const uint4 t = load_shared_16(info_at(tile));
        base::load_block(f.v, shape::V_AT, shape::V_FULL, shape::V_EMPTY, position, n * BLOCK_N, t.y / f.a.group, t.x);
    }

    /* K(n) before V of the block before it: the order in which they are used. */
    __device__ __forceinline__ void run()
    {
        int before = 0;                                         /* the block whose V is due */
        unit = blockIdx.x, keys = tiles = 0;
        following = f.counter ? gridDim.x + atomicAdd(f.counter, 1) : unit + gridDim.x;
        bool more = find();
        while (more) {
            const uint4 y = load_shared_16(info_at(tiles) + 16);
            const int n_first = y.z;
            bool begun = false;
            load_q();
            #pragma unroll 1
            for (int n = y.w - 1; n >= n_first;) {
                const uint4 x = load_shared_16(info_at(begun ? tiles - 1 : tiles));
                const int after = block_after(f.a, x.x, x.y, x.z / BLOCK_M, n_first, n);
                load_k(begun ? tiles - 1 : tiles, n, after >= n_first);
                if (keys > 1) load_v(tiles - 1, before, keys - 2);
                if (!begun) {
                    begun = true;
                    tiles++;
                    more = find();
                }
                before = n;
                n = after;
            }
        }
        if (keys) load_v(tiles - 1, before, keys - 1);
        mbarrier_arrive(base::free_q());
    }
};

/* The thread that loads a warpgroup's bias: the same stream of tiles and blocks. */
template <int D, class Tile> FA_DEVICE void load_bias(const fa_sm90_added_args &g, uint32_t shared, int group)
{
    using shape = added_shape<D, Tile>;
    const fa_cuda_args &a = g.f.a;
    const uint32_t barriers = shared + shape::ADDED_BARRIERS_AT;
    const uint64_t policy = a.batch_fastest ? EVICT_NORMAL : EVICT_FIRST;
    for (int tiles = 0, at = 0;; tiles++) {
        const uint32_t info = shared + shape::INFO_AT + tiles % shape::INFOS * sizeof(forward_tile_info);
        mbarrier_wait(barriers + 8 * (shape::INFO_FULL + tiles % shape::INFOS), tiles / shape::INFOS & 1);
        const uint4 x = load_shared_16(info), y = load_shared_16(info + 16);
        if ((int)x.x < 0) return;
        const int n_first = y.z;
        for (int n = y.w - 1; n >= n_first; n = block_after(a, x.x, x.y, x.z / shape::BLOCK_M, n_first, n)) {
            #pragma unroll
            for (int box = 0; box < shape::BOXES; box++, at++) {
                const int place = group * shape::PLACES + at % shape::PLACES;
                const uint32_t full = barriers + 8 * (shape::BIAS_FULL + place);
                if (n - 2 >= n_first)                           /* two blocks on: what comes from memory takes longer than a block */
                    tma_prefetch_box(g.bias, (n - 2) * shape::BLOCK_N + box * 64, x.z + group * 64, x.y * g.bias_h, x.x * g.bias_b);
                mbarrier_wait(barriers + 8 * (shape::BIAS_EMPTY + place), (at / shape::PLACES & 1) ^ 1);
                mbarrier_arrive_expect(full, shape::BOX_BYTES);
                tma_load(shared + shape::BIAS_AT + place * shape::BOX_BYTES, g.bias, n * shape::BLOCK_N + box * 64, x.z + group * 64,
                         x.y * g.bias_h, x.x * g.bias_b, full, policy);
            }
        }
    }
}

template <enum fa_dtype T, int D, class Tile> struct added_consumer : forward_consumer<T, D, FA_PLAIN, Tile> {
    using base = forward_consumer<T, D, FA_PLAIN, Tile>;
    using shape = added_shape<D, Tile>;
    using base::a, base::shared, base::group, base::warp, base::lane, base::keys, base::values, base::tiles, base::s, base::o,
          base::row_max, base::row_sum, base::barrier, base::release, base::O_COUNT, base::NT, base::BLOCK_N, base::STAGES;
    enum : int { WORDS = BLOCK_N / 32 };
    static_assert(WORDS == 4, "a row's words are one vector");
    static constexpr float LARGEST_SHIFT = 4096.0f;         /* rounded to 2^-13: fp16 has 11 bits */

    int block;                                  /* the one whose scores are at hand, as load_k writes it */

    __device__ __forceinline__ added_consumer(const fa_cuda_args &args, uint32_t smem) : base(args, smem) {}

    __device__ __forceinline__ void read_block() { block = load_shared_4(shared + shape::BLOCKS_AT + keys % STAGES * 4); }

    /* This lane's rows' words of the block at hand, if it has any hidden key. */
    __device__ __forceinline__ void load_words(uint32_t (&words)[2][WORDS]) const
    {
        if (!(block & HIDDEN)) return;
        const forward_tile_info t = base::info(tiles - 1);
        const fa_cuda_mask &m = a.mask;
        const int thread = thread_anew() - 128;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = min(t.i0 + thread / 32 * 16 + half * 8 + thread % 32 / 4, t.sq - 1);
            const uint32_t *row = m.bits + ((int64_t)mask_plane(m, t.b, t.head) * m.rows + (m.rows > 1 ? i : 0)) * m.words;
            if (m.words > 1) {
                asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[half][0]), "=r"(words[half][1]), "=r"(words[half][2]),
                             "=r"(words[half][3]) : "l"(row + (block >> FLAG_BITS) * WORDS));
            } else {
                const uint32_t word = __ldg(row);
                #pragma unroll
                for (int w = 0; w < WORDS; w++) words[half][w] = word;
            }
        }
    }

    /* Boxes [first, end) of the bias of key block `at` of the stream: `use` gets their pieces of 16 x 16, then they may go. */
    template <class Use> __device__ __forceinline__ void with_boxes(int at, int first, int end, Use use) const
    {
        const int thread = thread_anew(), lane = thread % 32, group = thread / 128 - 1;      /* no address is kept over the products */
        const uint32_t from = shared + shape::BIAS_AT + (thread / 32 % 4 * 16 + lane % 16) * 128 + (lane / 16 * 16 ^ lane % 8 * 16);
        #pragma unroll
        for (int box = first; box < end; box++) {
            const int boxes = at * shape::BOXES + box, place = group * shape::PLACES + boxes % shape::PLACES;
            mbarrier_wait(shared + shape::ADDED_BARRIERS_AT + 8 * (shape::BIAS_FULL + place), boxes / shape::PLACES & 1);
            #pragma unroll
            for (int piece = 0; piece < 4; piece++) {
                uint32_t x[4];
                ldmatrix(x, (from ^ piece * 32) + place * shape::BOX_BYTES);
                use(box * 4 + piece, x);
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(shared + shape::ADDED_BARRIERS_AT + 8 * (shape::BIAS_EMPTY + place));
        }
    }
    __device__ __forceinline__ void add_piece(int piece, const uint32_t (&bias)[4])
    {
        #pragma unroll
        for (int r = 0; r < 4; r++) add_pair<T>(s[8 * piece + 2 * r], s[8 * piece + 2 * r + 1], bias[r], a.bias_scale);
    }

    /* Bias, bounds and mask of the block at hand. */
    template <int AHEAD> __device__ __forceinline__ void modify_block(const uint32_t (&words)[2][WORDS], const uint32_t (&ahead)[4 * AHEAD + 1][4])
    {
        if (a.p.bias.ptr) {
            #pragma unroll
            for (int piece = 0; piece < 4 * AHEAD; piece++) add_piece(piece, ahead[piece]);
            with_boxes(keys - 1, AHEAD, shape::BOXES, [&](int piece, const uint32_t (&bias)[4]) { add_piece(piece, bias); });
        }
        if (block & BOUNDED) base::template modify<true>(block >> FLAG_BITS);
        if (!(block & HIDDEN)) return;
        #pragma unroll
        for (int half = 0; half < 2; half++)
            #pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const uint32_t word = words[half][w] >> thread_anew() % 4 * 2;
                #pragma unroll
                for (int x = 0; x < 8; x++)
                    if (!(word >> (x / 2 * 8 + x % 2) & 1)) s[(w * 4 + x / 2) * 4 + 2 * half + x % 2] = -INFINITY;
            }
    }

    /* forward.cuh's softmax, for scores of any size: of huge ones the maximum is taken off before they are scaled. */
    __device__ __forceinline__ bool softmax_of_any(float (&alpha)[2])
    {
        const float c = a.exponent_scale, LAG = 8.0f;
        float top[2], shift[2], sum[2] = { 0.0f, 0.0f };
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
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            alpha[half] = row_max[half];
            row_max[half] = moved ? top[half] : row_max[half];
            shift[half] = row_max[half] == -INFINITY ? 0.0f : row_max[half] * c;        /* no visible key yet: P = 0 */
            if (fabsf(shift[half]) > LARGEST_SHIFT) {
                #pragma unroll
                for (int x = 0; x < 2 * NT; x++) s[x / 2 * 4 + 2 * half + x % 2] -= row_max[half];
                shift[half] = 0.0f;
            }
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float odd = 0.0f;
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                float &x = s[4 * n + 2 * half], &y = s[4 * n + 2 * half + 1];
                x = exp2_approx(fmaf(x, c, -shift[half]));
                y = exp2_approx(fmaf(y, c, -shift[half]));
                sum[half] += x;
                odd += y;
            }
            sum[half] += odd;
        }
        /* The condition waits for the sums, as there. */
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

    /* The products of a step: scores of the next block, and O += P V of the one before. */
    __device__ __forceinline__ void issue(bool accumulate)
    {
        values = keys - 1;                                  /* V is one block behind: no register for it */
        base::wait_k();
        read_block();
        base::turn();
        wgmma_fence();
        base::issue_scores();
        base::wait_v();
        wgmma_fence();
        base::issue_output(accumulate);
        base::pass_turn();
    }
    __device__ __forceinline__ void output_done()
    {
        wgmma_wait<0>();
        wgmma_result(o);
        wgmma_result(s);
        release(shape::V_EMPTY + (keys - 2) % STAGES);
    }

    /* The next block of the tile at hand. */
    __device__ __forceinline__ void step(bool accumulate)
    {
        uint32_t words[2][WORDS], ahead[4 * Tile::BIAS_AHEAD + 1][4], unused[base::PIECES][2];
        float alpha[2];
        issue(accumulate);
        load_words(words);
        if (Tile::BIAS_AHEAD && a.p.bias.ptr)
            with_boxes(keys, 0, Tile::BIAS_AHEAD, [&](int piece, const uint32_t (&bias)[4]) {
                #pragma unroll
                for (int r = 0; r < 4; r++) ahead[piece][r] = bias[r];
            });
        wgmma_wait<1>();
        base::scores_done(0);
        modify_block<Tile::BIAS_AHEAD>(words, ahead);
        const bool moved = softmax_of_any(alpha);
        output_done();
        if (moved) {
            #pragma unroll
            for (int j = 0; j < O_COUNT; j++) o[j] *= alpha[j / 2 % 2];
        }
        base::pack_p(unused);
    }

    __device__ __forceinline__ void begin_rows(const uint32_t (&words)[2][WORDS])
    {
        const uint32_t none[1][4] = {};
        float unused[2];
        row_max[0] = row_max[1] = -INFINITY;
        row_sum[0] = row_sum[1] = 0.0f;
        modify_block<0>(words, none);
        softmax_of_any(unused);
    }

    /* From the last block of a tile to the first of the next; false where that was the last tile. */
    __device__ __forceinline__ bool next(bool accumulate)
    {
        uint32_t words[2][WORDS], unused[base::PIECES][2];
        const int finished = tiles - 1;
        const float top[2] = { row_max[0], row_max[1] }, share[2] = { row_sum[0], row_sum[1] };
        if (!base::next_tile()) {
            values = keys - 1;
            base::turn();
            base::wait_v();
            wgmma_fence();
            base::issue_output(accumulate);
            base::pass_turn();
            wgmma_wait<0>();
            wgmma_result(o);
            base::store(finished, top, share);
            return false;
        }
        issue(accumulate);
        wgmma_wait<1>();
        base::scores_done(0);
        load_words(words);
        begin_rows(words);
        output_done();
        base::pack_p(unused);
        lane = thread_anew() % 32, warp = thread_anew() / 32 % 4;       /* the addresses of a store are not kept over the loop */
        base::store(finished, top, share);
        return true;
    }

    __device__ __forceinline__ void run()
    {
        uint32_t words[2][WORDS], unused[base::PIECES][2];
        if (Tile::PING_PONG && group == Tile::GROUPS - 1) barrier_arrive(1, 256);
        if (!base::next_tile()) return;
        base::wait_k();
        read_block();
        wgmma_fence();
        base::issue_scores();
        load_words(words);
        wgmma_wait<0>();
        base::scores_done(0);
        begin_rows(words);
        base::pack_p(unused);
        bool more;
        do {
            bool accumulate = false;
            while (block & MORE) step(accumulate), accumulate = true;
            more = next(accumulate);
        } while (more);
    }
};

template <enum fa_dtype T, int D, class Tile>
__global__ void __launch_bounds__(128 * (Tile::GROUPS + 1), 1) added_kernel(const __grid_constant__ fa_sm90_added_args g)
{
    extern __shared__ uint8_t dynamic[];
    using shape = added_shape<D, Tile>;
    const uint32_t shared = (shared_address(dynamic) + shape::ALIGNMENT - 1) / shape::ALIGNMENT * shape::ALIGNMENT;
    if (threadIdx.x == 0) {
        for (int n = 0; n < shape::BARRIERS; n++) {
            const bool empty = (n >= shape::Q_EMPTY && n < shape::K_FULL) || (n >= shape::K_EMPTY && n < shape::V_FULL) || n >= shape::V_EMPTY;
            mbarrier_init(shared + shape::BARRIERS_AT + 8 * n, empty ? 4 * shape::GROUPS : 1);
        }
        for (int n = 0; n < shape::ADDED_BARRIERS; n++)
            mbarrier_init(shared + shape::ADDED_BARRIERS_AT + 8 * n, n >= shape::BIAS_EMPTY ? 4 : 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<shape::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            tma_prefetch(g.f.q);
            tma_prefetch(g.f.k);
            tma_prefetch(g.f.v);
            added_producer<D, Tile> producer{ { {}, g.f, shared } };
            producer.run();
        } else if (g.f.a.p.bias.ptr && threadIdx.x % 32 == 0 && threadIdx.x / 32 <= Tile::GROUPS) {
            load_bias<D, Tile>(g, shared, threadIdx.x / 32 - 1);
        }
    } else {
        more_registers<shape::CONSUMER_REGISTERS>();
        added_consumer<T, D, Tile> consumer(g.f.a, shared);
        consumer.run();
    }
}

#endif
