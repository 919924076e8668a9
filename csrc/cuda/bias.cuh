/* cuda/bias.cuh: score = bias_scale * score + bias, on fragments, by one of two ways.
 *
 *     staged      a tile (queries, keys) in the data's 16-bit type came by cp.async beside Q's or K's; ldmatrix has the layout of the
 *                 accumulators, with _trans that of their transpose: four elements a register pair, no address arithmetic
 *     direct      any type, strides and alignment, element by element: fp32 biases, views, and tiles without room in shared memory */
#ifndef FA_BIAS_CUH
#define FA_BIAS_CUH

#include "sequence.cuh"
#include "tile.cuh"

/* One element, 0 where it does not exist. The type is the same for all of a call: predicates, no branch. */
FA_DEVICE float bias_element(enum fa_dtype dtype, const char *at, bool exists)
{
    uint32_t x;
    float f;
    asm volatile("{ .reg .pred wide, narrow; .reg .b16 h; mov.b16 h, 0; mov.b32 %0, 0; setp.ne.u32 wide, %2, 0; setp.ne.u32 narrow, %3, 0; "
                 "@wide ld.global.b32 %0, [%1]; @narrow ld.global.b16 h, [%1]; @narrow mov.b32 %0, {h, h}; }"
                 : "=r"(x) : "l"(at), "r"((int)(exists && dtype == FA_FLOAT32)), "r"((int)(exists && dtype != FA_FLOAT32)));
    asm("{ .reg .b16 h, unused; mov.b32 {h, unused}, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(x));
    return dtype == FA_FLOAT16 ? f : __uint_as_float(dtype == FA_FLOAT32 ? x : x & 0xffff0000);
}

/* A walk along row i from key j on. */
struct bias_walk { const char *at; int64_t stride; enum fa_dtype dtype; int left; };
FA_DEVICE bias_walk bias_from(const fa_cuda_args &a, const sequence &s, int b, int head, int i, int j)
{
    const fa_scores &t = a.p.bias;
    const int size = t.dtype == FA_FLOAT32 ? 4 : 2;
    return { (const char *)t.ptr + size * (opaque(b) * t.stride_b + opaque(head) * t.stride_h + i * t.stride_q + j * t.stride_k), size * t.stride_k,
             t.dtype, i < s.sq ? s.sk - j : 0 };
}
/* The element here; the walk goes `keys` on. */
FA_DEVICE float bias_next(bias_walk &walk, int keys)
{
    const float x = bias_element(walk.dtype, walk.at, walk.left > 0);
    walk.at += keys * walk.stride;
    walk.left -= keys;
    return x;
}

/* A piece of 16 x 16. */
template <enum fa_dtype T> FA_DEVICE void add_piece(float (&c0)[4], float (&c1)[4], const uint32_t (&x)[4], float scale)
{
    add_pair<T>(c0[0], c0[1], x[0], scale);
    add_pair<T>(c0[2], c0[3], x[1], scale);
    add_pair<T>(c1[0], c1[1], x[2], scale);
    add_pair<T>(c1[2], c1[3], x[3], scale);
}

/* Queries from i0, keys from j0 to shared memory, as load_tile does: commit and wait are the caller's. The thread index is read anew
 * and the loop stays one, so that the main loops keep no addresses for it. */
template <int ROWS, int KEYS, int THREADS>
FA_DEVICE void load_bias_tile(uint32_t tile, const fa_cuda_args &a, const sequence &s, int b, int head, int i0, int j0)
{
    constexpr int CHUNKS = KEYS / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a thread keeps its chunk");
    const fa_scores &t = a.p.bias;
    const int thread = thread_anew(), chunk = thread % CHUNKS, first = thread / CHUNKS;
    const int left = max(min(s.sk - j0 - chunk * 8, 8), 0) * 2;
    const uint16_t *from = (const uint16_t *)t.ptr + opaque(b) * t.stride_b + opaque(head) * t.stride_h + (i0 + first) * t.stride_q + j0 + chunk * 8;
    #pragma unroll 1
    for (int row = first; row < ROWS; row += STEP, from += STEP * t.stride_q)
        cp_async_16(tile + tile_offset<KEYS>(row, chunk), from, i0 + row < s.sq ? left : 0);
}

#endif
