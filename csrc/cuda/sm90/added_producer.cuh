/* cuda/sm90/added_producer.cuh: the threads that feed added.cuh's consumers: one which tile comes next, its Q, K and V; one a warpgroup
 * its bias. Both pass over the key blocks that the mask hides from the whole tile.
 *
 * Rings: Q, K and V with two places each, the bias with Tile::BIAS_PLACES boxes of 64 queries x 64 keys a warpgroup. An empty barrier
 * counts a lane of every warp that reads the place, a full one the bytes of TMA. */
#ifndef FA_SM90_ADDED_PRODUCER_CUH
#define FA_SM90_ADDED_PRODUCER_CUH

#include "../mask.cuh"
#include "../sequence.cuh"
#include "added_args.h"
#include "ptx.cuh"

/* 64 GROUPS queries, a consumer warpgroup each, BLOCK_N keys at a time. PING_PONG: the warpgroups issue their products in turn.
 * BIAS_AHEAD boxes of a block are read before its scores come. */
template <int G, int BN, bool P, int PLACES, int AHEAD> struct sm90_added_row {
    enum { GROUPS = G, BLOCK_N = BN, PING_PONG = P, BIAS_PLACES = PLACES, BIAS_AHEAD = AHEAD };
};
template <int D> struct sm90_added_tile;
template <> struct sm90_added_tile< 64> : sm90_added_row<3, 128, true, 4, 0> {};        /* 211 KB */
template <> struct sm90_added_tile<128> : sm90_added_row<2, 128, false, 2, 1> {};       /* 225 KB */

/* One tile of the stream. */
struct added_tile_info {
    int b, head, i0, unused;        /* i0: first query; b < 0: the stream is over */
    int sq, sk, n_first, n_last;    /* key blocks [first, last), of which the last is the first to work with */
};

/* A key block of the stream: its number, and flags below. MORE: the tile has another; BOUNDED: lengths or window hide a key of it;
 * HIDDEN: the mask does. */
enum : int { MORE = 1, BOUNDED = 2, HIDDEN = 4, FLAG_BITS = 3 };

template <int D, class Tile> struct added_shape {
    enum : int {
        STAGES = 2, INFOS = 4, GROUPS = Tile::GROUPS, BLOCK_M = 64 * GROUPS, BLOCK_N = Tile::BLOCK_N, THREADS = 128 * (GROUPS + 1),
        PANELS = D / 64, PLACES = Tile::BIAS_PLACES, BOX_BYTES = 64 * 128, BOXES = BLOCK_N / 64,
        PRODUCER_REGISTERS = GROUPS == 2 ? 40 : 32, CONSUMER_REGISTERS = GROUPS == 2 ? 232 : 160,
        Q_BYTES = BLOCK_M * PANELS * 128, KV_BYTES = BLOCK_N * PANELS * 128,
        Q_AT = 0, K_AT = Q_AT + STAGES * Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, BIAS_AT = V_AT + STAGES * KV_BYTES,
        INFO_AT = BIAS_AT + GROUPS * PLACES * BOX_BYTES, BLOCKS_AT = INFO_AT + INFOS * (int)sizeof(added_tile_info), BARRIERS_AT = BLOCKS_AT + 4 * STAGES,
        Q_FULL = 0, K_FULL = Q_FULL + STAGES, V_FULL = K_FULL + STAGES, INFO_FULL = V_FULL + STAGES, BIAS_FULL = INFO_FULL + INFOS,
        Q_EMPTY = BIAS_FULL + GROUPS * PLACES, K_EMPTY = Q_EMPTY + STAGES, V_EMPTY = K_EMPTY + STAGES, BIAS_EMPTY = V_EMPTY + STAGES,
        BARRIERS = BIAS_EMPTY + GROUPS * PLACES, SHARED_BYTES = BARRIERS_AT + 8 * BARRIERS,
    };
    static_assert(BLOCK_N % 64 == 0 && PLACES % BOXES == 0 && SHARED_BYTES <= 227 * 1024, "a tile that fits");

    static __device__ __forceinline__ void init_barriers(uint32_t shared)
    {
        for (int n = 0; n < BARRIERS; n++) mbarrier_init(shared + BARRIERS_AT + 8 * n, n >= BIAS_EMPTY ? 4 : n >= Q_EMPTY ? 4 * GROUPS : 1);
        mbarrier_init_fence();
    }
};

/* The block to work with after n, below n_first if there is none. */
FA_DEVICE int block_after(const fa_cuda_args &a, int b, int head, int outer, int n_first, int n)
{
    return a.mask.bits ? last_visible_tile(a.mask, mask_plane(a.mask, b, head), outer, n_first, n) : n - 1;
}

/* Has few registers: what it knows of a tile it reads anew where it wrote it down. */
template <int D, class Tile> struct added_producer : added_shape<D, Tile> {
    using shape = added_shape<D, Tile>;
    using shape::STAGES, shape::BLOCK_M, shape::BLOCK_N, shape::PANELS;

    const fa_sm90_forward_args &f;
    const uint32_t shared;
    int unit, following;                        /* the unit at hand, and the one after */
    int keys, tiles;                            /* places of K taken so far; tiles handed out */

    __device__ __forceinline__ added_producer(const fa_sm90_forward_args &args, uint32_t smem) : f(args), shared(smem), unit(blockIdx.x), keys(0), tiles(0) {}

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }
    __device__ __forceinline__ uint32_t info_at(int tile) const { return shared + shape::INFO_AT + tile % shape::INFOS * sizeof(added_tile_info); }
    __device__ __forceinline__ sequence lengths() const { const int sq = (int)f.a.p.sq, sk = (int)f.a.p.sk; return { 0, 0, sq, sk, sq, sk }; }
    __device__ __forceinline__ int next_unit() const { return f.counter ? gridDim.x + atomicAdd(f.counter, 1) : unit + gridDim.x; }

    /* Writes down tile `tiles`, or the end. Tiles come in sections of heads, the longest first; see forward.c's schedule. */
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
            if (tiles) prefetch(i0, (n_last - 1) * BLOCK_N, b, head);
            unit = following;
            following = next_unit();
        } else {
            store_shared_16(at, make_uint4(~0u, 0, 0, 0));
        }
        mbarrier_arrive(barrier(shape::INFO_FULL + tiles % shape::INFOS));
        return found;
    }

    __device__ __forceinline__ void prefetch(int q_row, int k_row, int b, int head) const
    {
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) {
            tma_prefetch_box(f.q, 64 * panel, q_row, head, b);
            tma_prefetch_box(f.k, 64 * panel, k_row, head / f.a.group, b);
            tma_prefetch_box(f.v, 64 * panel, k_row, head / f.a.group, b);
        }
    }

    /* The place in the ring of Q for tile `tiles`: its barrier, when it is free. */
    __device__ __forceinline__ uint32_t free_q()
    {
        mbarrier_wait(barrier(shape::Q_EMPTY + tiles % STAGES), (tiles / STAGES & 1) ^ 1);
        return barrier(shape::Q_FULL + tiles % STAGES);
    }
    __device__ __forceinline__ void load_panels(uint32_t dst, int rows, const fa_tensor_map &map, int row, int head, int b, uint32_t full, uint64_t policy)
    {
        mbarrier_arrive_expect(full, rows * PANELS * 128);
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) tma_load(dst + panel * rows * 128, map, 64 * panel, row, head, b, full, policy);
    }
    __device__ __forceinline__ void load_q()
    {
        const uint32_t full = free_q();
        const uint4 t = load_shared_16(info_at(tiles));
        load_panels(shared + shape::Q_AT + tiles % STAGES * shape::Q_BYTES, BLOCK_M, f.q, t.z, t.y, t.x, full, EVICT_FIRST);
    }
    /* K of block n of tile `tile`, and what the consumers must know of it: when the place is free, then K's barrier guards both. */
    __device__ __forceinline__ void load_k(int tile, int n, bool more)
    {
        const fa_cuda_args &a = f.a;
        const sequence s = lengths();
        const uint4 t = load_shared_16(info_at(tile));
        const int stage = keys % STAGES, i0 = t.z;
        const bool bounded = n * BLOCK_N < first_key(a, s, min(i0 + BLOCK_M, s.sq) - 1) || (n + 1) * BLOCK_N > last_key(a, s, i0);
        const bool hidden = a.mask.bits && !tile_is_whole(a.mask, mask_plane(a.mask, t.x, t.y), i0 / BLOCK_M, n);
        mbarrier_wait(barrier(shape::K_EMPTY + stage), (keys / STAGES & 1) ^ 1);
        store_shared_4(shared + shape::BLOCKS_AT + stage * 4, n << FLAG_BITS | (more ? MORE : 0) | (bounded ? BOUNDED : 0) | (hidden ? HIDDEN : 0));
        load_panels(shared + shape::K_AT + stage * shape::KV_BYTES, BLOCK_N, f.k, n * BLOCK_N, t.y / a.group, t.x, barrier(shape::K_FULL + stage), EVICT_LAST);
        keys++;
    }
    __device__ __forceinline__ void load_v(int tile, int n, int position)
    {
        const uint4 t = load_shared_16(info_at(tile));
        const int stage = position % STAGES;
        mbarrier_wait(barrier(shape::V_EMPTY + stage), (position / STAGES & 1) ^ 1);
        load_panels(shared + shape::V_AT + stage * shape::KV_BYTES, BLOCK_N, f.v, n * BLOCK_N, t.y / f.a.group, t.x, barrier(shape::V_FULL + stage),
                    EVICT_LAST);
    }

    /* K(n) before V of the block before it: the order in which they are used. */
    __device__ __forceinline__ void run()
    {
        int before = 0;                                         /* the block whose V is due */
        following = next_unit();
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
        mbarrier_arrive(free_q());
    }
};

/* The thread that loads a warpgroup's bias: the same stream of tiles and blocks. */
template <int D, class Tile> FA_DEVICE void load_bias(const fa_sm90_added_args &g, uint32_t shared, int group)
{
    using shape = added_shape<D, Tile>;
    const fa_cuda_args &a = g.f.a;
    const uint32_t barriers = shared + shape::BARRIERS_AT;
    const uint64_t policy = a.batch_fastest ? EVICT_NORMAL : EVICT_FIRST;
    for (int tiles = 0, at = 0;; tiles++) {
        const uint32_t info = shared + shape::INFO_AT + tiles % shape::INFOS * sizeof(added_tile_info);
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

#endif
