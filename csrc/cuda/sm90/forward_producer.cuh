/* cuda/sm90/forward_producer.cuh: the thread that feeds forward.cuh's consumers: which tile comes next, its Q, its K and V.
 *
 * Rings: Q with Q_STAGES places, K and V with STAGES each. An empty barrier counts a lane of every consumer warp, or forward_storer's
 * where that has the place last, a full one the bytes of TMA. Tiles come in sections, in pairs, or one after the other: see forward.c's schedule. */
#ifndef FA_SM90_FORWARD_PRODUCER_CUH
#define FA_SM90_FORWARD_PRODUCER_CUH

#include "../sequence.cuh"
#include "args.h"
#include "config.h"
#include "ptx.cuh"

/* One tile of the stream, as the producer hands it to the consumers. */
struct forward_tile_info {
    int b, head, i0, q0;            /* i0: first query within the sequence; b < 0: the stream is over */
    int sq, sk, n_first, n_last;    /* key blocks [first, last) */
    int whole_first, whole_last;    /* key blocks that every row sees whole */
    int k0, unused;                 /* the producer's */
};

template <int D, class Tile> struct forward_shape {
    enum : int {
        DRAWN = Tile::DRAWN, STAGES = Tile::STAGES, INFOS = 4, SKIPS = Tile::SKIPS, GROUPS = Tile::GROUPS, BLOCK_M = 64 * GROUPS,
        BLOCK_N = Tile::BLOCK_N, Q_STAGES = Tile::Q_STAGES, THREADS = 128 * (GROUPS + 1), PANELS = (D + 63) / 64,
        BY_TMA = Tile::BY_TMA,
        PRODUCER_REGISTERS = Tile::BLOCKS > 1 || GROUPS == 4 ? 32 : DRAWN ? 56 : GROUPS == 2 ? 40 : 32,
        CONSUMER_REGISTERS = Tile::BLOCKS > 1 ? 128 : GROUPS == 4 ? 112 : GROUPS == 3 ? (DRAWN ? 152 : 160) : DRAWN ? 224 : 232,
        Q_BYTES = BLOCK_M * PANELS * 128, KV_BYTES = BLOCK_N * PANELS * 128,
        Q_AT = 0, K_AT = Q_AT + Q_STAGES * Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, O_AT = V_AT + STAGES * KV_BYTES,
        FLAG_STAGES = DRAWN ? 4 : 0, FLAG_WORDS = (DRAWN + 3) / 4, FLAGS_BYTES = 128 * GROUPS * FLAG_WORDS * 4,
        O_PANELS = Tile::O_PANELS, FLAGS_AT = O_AT + BLOCK_M * O_PANELS * 128, INFO_AT = FLAGS_AT + FLAG_STAGES * FLAGS_BYTES,
        BARRIERS_AT = INFO_AT + INFOS * (int)sizeof(forward_tile_info),
        Q_FULL = 0, Q_EMPTY = Q_FULL + Q_STAGES, K_FULL = Q_EMPTY + Q_STAGES, K_EMPTY = K_FULL + STAGES, V_FULL = K_EMPTY + STAGES,
        V_EMPTY = V_FULL + STAGES, O_FULL = V_EMPTY + STAGES, O_EMPTY = O_FULL + (BY_TMA ? Q_STAGES : 0),
        INFO_FULL = O_EMPTY + (BY_TMA && Q_STAGES == 1), FLAGS_FULL = INFO_FULL + INFOS, FLAGS_EMPTY = FLAGS_FULL + FLAG_STAGES,
        BARRIERS = DRAWN ? FLAGS_EMPTY + FLAG_STAGES : INFO_FULL,
        ALIGNMENT = 1024, SHARED_BYTES = BARRIERS_AT + 8 * BARRIERS + ALIGNMENT,
    };
    static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 256 && D % 16 == 0 && SHARED_BYTES <= 227 * 1024, "a tile that fits");
};

/* Whether TMA takes 16 rows out: all of them, or dense ones, of which it writes those that there are. */
FA_DEVICE bool leaves_by_tma(const fa_sm90_forward_args &f, int first, int sq)
{
    return f.store && first < sq && (!f.a.p.cu_q || first + 16 <= sq);
}

template <int D, class Tile> struct forward_producer : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::STAGES, shape::BLOCK_M, shape::BLOCK_N, shape::PANELS, shape::Q_STAGES;

    const fa_sm90_forward_args &f;
    const uint32_t shared;
    int unit, second, following;                /* the unit at hand, whether its second tile is due, the unit after */
    int keys, values, tiles;                    /* places taken so far in the rings of K and V; tiles handed out */
    int kv_head, kv_batch;                      /* of the tile at hand */

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }

    __device__ __forceinline__ void load_panels(uint32_t dst, int panel_bytes, const fa_tensor_map &map, int row, int head, int b, uint32_t full,
                                                uint64_t policy)
    {
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) tma_load(dst + panel * panel_bytes, map, 64 * panel, row, head, b, full, policy);
    }
    __device__ __forceinline__ void load_block(const fa_tensor_map &map, int at, int full, int empty, int position, int row, int head, int b)
    {
        const int stage = position % STAGES, parity = position / STAGES & 1;
        mbarrier_wait(barrier(empty + stage), parity ^ 1);
        mbarrier_arrive_expect(barrier(full + stage), shape::KV_BYTES);
        load_panels(shared + at + stage * shape::KV_BYTES, BLOCK_N * 128, map, row, head, b, barrier(full + stage), EVICT_LAST);
    }
    __device__ __forceinline__ void load_k(int row) { load_block(f.k, shape::K_AT, shape::K_FULL, shape::K_EMPTY, keys++, row, kv_head, kv_batch); }
    __device__ __forceinline__ void load_v(int row) { load_block(f.v, shape::V_AT, shape::V_FULL, shape::V_EMPTY, values++, row, kv_head, kv_batch); }

    /* Sections: the longest tiles of all their heads first, keys and values stay in L2. Pairs: all units are equally long. */
    __device__ __forceinline__ void decode(int &batch_head, int &m) const
    {
        const int m_tiles = f.a.m_tiles, heads = (int)(f.a.p.b * f.a.p.h);
        if (f.section) {
            const int first = unit / (f.section * m_tiles) * f.section, width = min(f.section, heads - first);
            int at = unit - first * m_tiles;
            /* A head's last tile may be short: rounds of blocks start with one tile and another, lest some blocks get all of these. */
            if (shape::SKIPS && f.section == 1 && !f.counter) at = (at + first * m_tiles / (int)gridDim.x) % m_tiles;
            m = m_tiles - 1 - at / width;
            batch_head = first + at % width;
        } else {
            const int pairs = (m_tiles + 1) / 2, pair = unit % pairs;
            m = second ? pair : m_tiles - 1 - pair;
            batch_head = unit / pairs;
        }
    }
    __device__ __forceinline__ void advance_unit()
    {
        if (!f.section && !second) {
            second = 1;
        } else {
            second = 0;
            unit = following;
        }
        if (!second) following = f.counter ? gridDim.x + atomicAdd(f.counter, 1) : unit + gridDim.x;
    }
    /* Writes down the next tile that has rows, or the end. Its place was last needed four tiles ago. */
    __device__ __forceinline__ bool find()
    {
        const fa_cuda_args &a = f.a;
        const uint32_t at = shared + shape::INFO_AT + tiles % shape::INFOS * sizeof(forward_tile_info);
        for (; unit < f.units; advance_unit()) {
            int batch_head, m;
            decode(batch_head, m);
            const int b = batch_head / (int)a.p.h, head = batch_head % (int)a.p.h, i0 = m * BLOCK_M;
            const sequence s = sequence_of(a.p, b);
            if (i0 >= s.sq || (second && 2 * m + 1 == a.m_tiles)) continue;
            const int i_end = min(i0 + BLOCK_M, s.sq) - 1;
            int n_first = first_key(a, s, i0) / BLOCK_N, n_last = (max(last_key(a, s, i_end), 0) + BLOCK_N - 1) / BLOCK_N;
            if (n_first >= n_last) {                            /* no key is visible: one block, all of it masked */
                n_first = min(n_first, max(s.sk - 1, 0) / BLOCK_N);
                n_last = n_first + 1;
            }
            store_shared_16(at, make_uint4(b, head, i0, s.q0));
            store_shared_16(at + 16, make_uint4(s.sq, s.sk, n_first, n_last));
            const int whole_first = (first_key(a, s, i_end) + BLOCK_N - 1) / BLOCK_N, whole_last = max(last_key(a, s, i0), 0) / BLOCK_N;
            store_shared_16(at + 32, make_uint4(whole_first, whole_last, s.k0, 0));
            if (shape::DRAWN) mbarrier_arrive(barrier(shape::INFO_FULL + tiles % shape::INFOS));
            advance_unit();
            return true;
        }
        store_shared_16(at, make_uint4(~0u, 0, 0, 0));
        if (shape::DRAWN) mbarrier_arrive(barrier(shape::INFO_FULL + tiles % shape::INFOS));
        return false;
    }
    /* The place in the ring of Q for the tile that find() wrote down: its barrier, when it is free. */
    __device__ __forceinline__ uint32_t free_q()
    {
        mbarrier_wait(barrier(shape::Q_EMPTY + tiles % Q_STAGES), (tiles / Q_STAGES & 1) ^ 1);
        return barrier(shape::Q_FULL + tiles % Q_STAGES);
    }

    /* K(n) before V(n + 1): the order in which they are used; where there is one Q, it comes when its place is free, and holds up neither. */
    __device__ __forceinline__ void run()
    {
        int row = 0;                                            /* the key block at hand */
        unit = blockIdx.x, second = 0, keys = values = tiles = 0;
        following = f.counter ? gridDim.x + atomicAdd(f.counter, 1) : unit + gridDim.x;
        bool more = find();
        while (more) {
            const uint32_t at = shared + shape::INFO_AT + tiles % shape::INFOS * sizeof(forward_tile_info);
            const uint4 x = load_shared_16(at), y = load_shared_16(at + 16), z = load_shared_16(at + 32);
            const int head = x.y / f.a.group, batch = f.a.p.cu_k ? 0 : x.x, last_row = z.z + (y.w - 1) * BLOCK_N;
            if (Q_STAGES == 1) {
                if (tiles) load_v(row);
                load_block(f.k, shape::K_AT, shape::K_FULL, shape::K_EMPTY, keys++, last_row, head, batch);
            }
            const uint32_t full = free_q();
            mbarrier_arrive_expect(full, shape::Q_BYTES);
            load_panels(shared + shape::Q_AT + tiles % Q_STAGES * shape::Q_BYTES, BLOCK_M * 128, f.q, x.w + x.z, x.y, f.a.p.cu_q ? 0 : x.x,
                        full, EVICT_FIRST);
            if (Q_STAGES > 1) {
                load_block(f.k, shape::K_AT, shape::K_FULL, shape::K_EMPTY, keys++, last_row, head, batch);
                if (tiles) load_v(row);
            }
            kv_head = head, kv_batch = batch, row = last_row, tiles++;
            more = find();
            #pragma unroll 1
            for (int left = y.w - 1 - y.z; left > 0; left--, row -= BLOCK_N) {
                load_k(row - BLOCK_N);
                load_v(row);
            }
        }
        if (tiles) load_v(row);
        mbarrier_arrive(free_q());
    }
};

/* The thread that hands finished rows to TMA, and their place on when they have been read: Q's next tile gets it, or the next rows.
 * Consumers that did so themselves would keep descriptors in vector registers, 40 instructions a block: after a branch that not all
 * warps or lanes take ptxas has no more use for uniform ones. */
template <int D, class Tile> struct forward_storer : forward_shape<D, Tile> {
    using shape = forward_shape<D, Tile>;
    using shape::Q_STAGES, shape::PANELS;

    const fa_sm90_forward_args &f;
    const uint32_t shared;

    __device__ __forceinline__ uint32_t barrier(int n) const { return shared + shape::BARRIERS_AT + 8 * n; }

    /* Panels [FIRST, PANELS) of 16 rows of a tile. */
    __device__ __forceinline__ void store(int place, int row, const uint4 &tile) const
    {
        constexpr int FIRST = Q_STAGES > 1 ? 0 : PANELS - shape::O_PANELS;
        const uint32_t from = shared + (Q_STAGES > 1 ? shape::Q_AT + place * shape::Q_BYTES + row * 128
                                                     : shape::O_AT + row * shape::O_PANELS * 128);
        const int pitch = Q_STAGES > 1 ? shape::BLOCK_M * 128 : 16 * 128;
        #pragma unroll
        for (int panel = FIRST; panel < PANELS; panel++)
            tma_store(from + (panel - FIRST) * pitch, f.out, 64 * panel, tile.w + tile.z + row, tile.y, f.a.p.cu_q ? 0 : tile.x);
    }
    __device__ __forceinline__ void run() const
    {
        for (int n = 0; ; n++) {
            const int place = n % Q_STAGES;
            mbarrier_wait(barrier(shape::O_FULL + place), n / Q_STAGES & 1);
            const uint32_t at = shared + shape::INFO_AT + n % shape::INFOS * sizeof(forward_tile_info);
            const uint4 x = load_shared_16(at), y = load_shared_16(at + 16);
            if ((int)x.x < 0) return;
            #pragma unroll 1
            for (int row = 0; row < shape::BLOCK_M; row += 16)
                if (leaves_by_tma(f, (int)x.z + row, (int)y.x)) store(place, row, x);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(barrier(Q_STAGES > 1 ? shape::Q_EMPTY + place : shape::O_EMPTY));
        }
    }
};

#endif
