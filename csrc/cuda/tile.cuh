/* cuda/tile.cuh: a tile of rows of 16-bit elements in shared memory: its swizzle, its loads and stores, its fragments.
 *
 * A row of D elements is D / 8 chunks of 16 bytes. Chunk c of row r lies at chunk c ^ (r & 7), or c ^ (r / 2 & 3) where rows are
 * an odd number of 64-byte halves (D = 32, 96): the eight rows that an ldmatrix reads then fall into different banks. */
#ifndef FA_TILE_CUH
#define FA_TILE_CUH

#include "ptx.cuh"

template <int D> FA_DEVICE uint32_t swizzle(int row)       /* in bytes, to be xor-ed into the offset of a chunk */
{
    return D % 64 == 0 ? (row & 7) << 4 : (row >> 1 & 3) << 4;
}
template <int D> FA_DEVICE uint32_t tile_offset(int row, int chunk)
{
    return row * (2 * D) + (chunk << 4 ^ swizzle<D>(row));
}

/* Rows of one head in global memory. `aligned`: every row starts at a multiple of 16 bytes. */
struct rows_of {
    const uint16_t *ptr;        /* the tile's first row */
    int64_t stride;             /* elements */
    int rows, d;                /* beyond these the tile is 0 and nothing is read */
    bool aligned;
};

/* Which row of a tensor lies at a place of its tile: an Order::row() that permutes bits. */
struct in_order { static FA_DEVICE_MEMBER constexpr int row(int place) { return place; } };

/* Any tile, chunk by chunk, threads of the block side by side. Aligned rows travel by cp.async: commit and wait are the caller's. */
template <int ROWS, int D, int THREADS, class Order = in_order> FA_DEVICE void load_tile(uint32_t tile, const rows_of &from)
{
    constexpr int CHUNKS = D / 8, TOTAL = ROWS * CHUNKS;
    const int64_t stride = from.stride;
    #pragma unroll 1
    for (int at = threadIdx.x; at < TOTAL; at += THREADS) {
        const int place = at / CHUNKS, row = Order::row(place), chunk = at % CHUNKS;
        const int left = row < from.rows ? max(min(from.d - chunk * 8, 8), 0) : 0;      /* elements of this chunk that exist */
        const uint16_t *src = from.ptr + row * stride + chunk * 8;
        const uint32_t dst = tile + tile_offset<D>(place, chunk);
        if (from.aligned) {
            cp_async_16(dst, src, left * 2);
        } else {
            uint32_t x[4] = { 0, 0, 0, 0 };
            #pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < left) x[e / 2] |= (uint32_t)src[e] << 16 * (e % 2);
            store_shared_16(dst, make_uint4(x[0], x[1], x[2], x[3]));
        }
    }
}

/* Tiles that exist whole, nearly all: a thread keeps its chunk and takes every STEP-th row, so that a pointer and an offset in the
 * tile are all it needs. Worked out anew, addresses were a quarter of the forward pass's instructions. */
template <int D, int THREADS> struct whole_tile {
    enum : int { CHUNKS = D / 8, FIT = THREADS / CHUNKS, STEP = FIT >= 32 ? 32 : FIT >= 16 ? 16 : FIT >= 8 ? 8 : 4 };
    static_assert(FIT >= 4, "chunks change places by rows modulo 4 or 8");

    /* The element where this thread starts, relative to the tile's first. */
    template <class Order = in_order> static __device__ __forceinline__ int64_t first(int64_t stride)
    {
        return Order::row(threadIdx.x / CHUNKS) * stride + threadIdx.x % CHUNKS * 8;
    }
    template <int ROWS, class Order = in_order>
    static __device__ __forceinline__ void load(uint32_t tile, const uint16_t *from, int64_t stride)
    {
        static_assert(ROWS % STEP == 0, "whole steps");
        const int thread = threadIdx.x;
        if (STEP * CHUNKS < THREADS && thread >= STEP * CHUNKS) return;
        const uint32_t at = tile + tile_offset<D>(thread / CHUNKS, thread % CHUNKS);
        #pragma unroll
        for (int i = 0; i < ROWS / STEP; i++) {
            cp_async_16((STEP == 4 && i % 2 ? at ^ 64 : at) + i * STEP * 2 * D, from, 16);
            from += (Order::row((i + 1) * STEP) - Order::row(i * STEP)) * stride;
        }
    }
};

/* The first `rows` rows and `d` columns back to global memory, by THREADS threads of which this is `thread`. */
template <int ROWS, int D, int THREADS>
FA_DEVICE void store_tile(uint32_t tile, int thread, uint16_t *to, int64_t stride, int rows, int d, bool aligned)
{
    constexpr int CHUNKS = D / 8, TOTAL = ROWS * CHUNKS;
    #pragma unroll
    for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; i++) {
        const int at = i * THREADS + thread, row = at / CHUNKS, chunk = at % CHUNKS, left = d - chunk * 8;
        if (at >= TOTAL || row >= rows || left <= 0) continue;
        const uint4 x = load_shared_16(tile + tile_offset<D>(row, chunk));
        uint16_t *dst = to + row * stride + chunk * 8;
        if (aligned && left >= 8) {
            *(uint4 *)dst = x;
        } else {
            const uint32_t words[4] = { x.x, x.y, x.z, x.w };
            #pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < left) dst[e] = (uint16_t)(words[e / 2] >> 16 * (e % 2));
        }
    }
}

/* Where a lane points ldmatrix for 16 rows x 16 columns; further rows are 2 D bytes each away, further columns step(). */
template <int D> FA_DEVICE uint32_t lane_a(int lane)        /* left operand, row by row: a0..a3 */
{
    return tile_offset<D>(lane & 15, lane >> 4);
}
template <int D> FA_DEVICE uint32_t lane_b(int lane)        /* right operand stored [n][k]: b0 b1 of n 0..7, then of n 8..15 */
{
    return tile_offset<D>((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}
template <int D> FA_DEVICE uint32_t lane_b_trans(int lane)  /* right operand stored [k][n], through ldmatrix_trans: the same */
{
    return tile_offset<D>(lane & 15, lane >> 4);
}
template <int D> FA_DEVICE uint32_t lane_a_trans(int lane)  /* left operand stored [k][m], through ldmatrix_trans: a0..a3 */
{
    return tile_offset<D>((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}

/* Columns 16 k.. of the same rows. Row offsets leave the xor-ed bits free, so the step is a xor there and a sum above. */
template <int D> FA_DEVICE uint32_t step(uint32_t address, int k)
{
    return D % 64 == 0 ? (address ^ k % 4 * 32) + k / 4 * 128 : (address ^ k % 2 * 32) + k / 2 * 64;
}

#endif
