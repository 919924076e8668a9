/* cuda/mask.cu: makes of attn_mask what mask.cuh describes, in one launch a call.
 *
 * A block owns eight inner tiles of an outer one: its threads read the bytes of 32 keys of a row each and write their word, and what
 * the words hold of each tile comes together as a byte of `some` and a byte of `all`.
 * A mask that is the same for all queries (for padding: batch and keys only) or all keys takes one row or one word. */
#include "mask.cuh"
#include "row.cuh"

enum : int { PACK_THREADS = 512, TILES = 8, WORD = 32, AT_ONCE = 4 };

/* A bit for each byte of x that is not 0. */
FA_DEVICE uint32_t nonzero_bytes(uint32_t x)
{
    const uint32_t top = (x | (x & 0x7f7f7f7fu) + 0x7f7f7f7fu) & 0x80808080u;
    return (top >> 7) * 0x10204080u >> 28;
}
FA_DEVICE uint32_t nonzero_bytes(const uint4 &x)
{
    return nonzero_bytes(x.x) | nonzero_bytes(x.y) << 4 | nonzero_bytes(x.z) << 8 | nonzero_bytes(x.w) << 12;
}

/* Bytes of up to 32 keys, one by one or as vectors of 16; none beyond the last key is read. */
FA_DEVICE uint32_t pack_word(const uint8_t *bytes, int64_t stride, int keys)
{
    uint32_t word = 0;
    for (int j = 0; j < min(keys, (int)WORD); j++) word |= (uint32_t)(bytes[j * stride] != 0) << j;
    return word;
}
FA_DEVICE uint32_t pack_vectors(const uint8_t *bytes, int keys)
{
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const uint4 low = keys > 0 ? __ldg((const uint4 *)bytes) : zero, high = keys > 16 ? __ldg((const uint4 *)bytes + 1) : zero;
    return nonzero_bytes(low) | nonzero_bytes(high) << 16;
}

/* Rows and words [first, end) of a block. */
struct pack_region { int row, row_end, word, word_end; };
FA_DEVICE pack_region region_of(const fa_cuda_args &a, int outer, int inner)
{
    const fa_cuda_mask &m = a.mask;
    const int m0 = m.outer_is_keys ? inner : outer, m_count = m.outer_is_keys ? TILES : 1;
    const int n0 = m.outer_is_keys ? outer : inner, n_count = m.outer_is_keys ? 1 : TILES;
    const bool last = m.outer_is_keys && outer == m.outer - 1;      /* words beyond the last tile are its */
    pack_region r = { 0, 1, 0, 1 };
    if (m.rows > 1) r.row = m0 * m.block_m, r.row_end = min((m0 + m_count) * m.block_m, m.rows);
    if (m.words > 1) r.word = n0 * m.block_n / WORD, r.word_end = last ? m.words : min((n0 + n_count) * m.block_n / WORD, m.words);
    return r;
}

__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_cuda_mask &m = a.mask;
    const fa_scores &t = a.p.mask;
    const bool alike = (m.outer_is_keys ? m.rows : m.words) == 1;   /* inner tiles: a block for all of them */
    const int groups = alike ? 1 : m.tile_words * 4, group = blockIdx.x % groups, sk = (int)a.p.sk;
    const int outer = blockIdx.x / groups % m.outer, plane = blockIdx.x / groups / m.outer, heads = m.plane_h ? (int)a.p.h : 1;
    const pack_region r = region_of(a, outer, group * TILES);
    const int width = max(r.word_end - r.word, 0), count = max(r.row_end - r.row, 0) * width;
    const uint8_t *bytes = (const uint8_t *)t.ptr + plane / heads * t.stride_b + plane % heads * t.stride_h;
    const bool vectors = m.words > 1 && t.stride_k == 1 && sk % 16 == 0 && ((uintptr_t)bytes | t.stride_q) % 16 == 0;
    uint32_t *bits = m.bits + (int64_t)plane * m.rows * m.words;
    uint32_t found = 0;                                             /* tiles with a visible key; 8 bits on, with a hidden one */
    __shared__ uint32_t found_by_all;
    if (threadIdx.x == 0) found_by_all = 0;
    __syncthreads();

    auto finish = [&](int i, int w, uint32_t word) {
        const int j = w * WORD, keys = min(sk - j, (int)WORD), piece = min(m.block_n, (int)WORD);
        bits[(int64_t)i * m.words + w] = word;
        for (int first = 0; first < keys; first += piece) {
            const int tile = alike ? 0 : (m.outer_is_keys ? i / m.block_m : (j + first) / m.block_n) - group * TILES;
            const uint32_t these = ~0u >> (WORD - min(piece, keys - first)) << first;
            found |= (uint32_t)((word & these) != 0) << tile | (uint32_t)((~word & these) != 0) << (tile + TILES);
        }
    };
    if (vectors) {
        for (int first = threadIdx.x; first < count; first += AT_ONCE * PACK_THREADS) {
            uint32_t word[AT_ONCE];
            #pragma unroll
            for (int x = 0; x < AT_ONCE; x++) {
                const int at = first + x * PACK_THREADS, j = (r.word + at % width) * WORD;
                word[x] = pack_vectors(bytes + (r.row + at / width) * t.stride_q + j, at < count ? sk - j : 0);
            }
            #pragma unroll
            for (int x = 0; x < AT_ONCE; x++) {
                const int at = first + x * PACK_THREADS;
                if (at < count) finish(r.row + at / width, r.word + at % width, word[x]);
            }
        }
    } else {
        for (int at = threadIdx.x; at < count; at += PACK_THREADS) {
            const int i = r.row + at / width, w = r.word + at % width;
            const uint8_t *from = bytes + i * t.stride_q + (int64_t)w * WORD * t.stride_k;
            finish(i, w, m.words == 1 ? (*from ? ~0u : 0) : pack_word(from, t.stride_k, sk - w * WORD));
        }
    }

    found = __reduce_or_sync(0xffffffff, found);
    if (threadIdx.x % 32 == 0 && found) atomicOr(&found_by_all, found);
    __syncthreads();
    if (threadIdx.x != 0) return;
    const uint32_t some = found_by_all & 0xff, all = some & ~(found_by_all >> TILES);
    const int64_t flags = ((int64_t)plane * m.outer + outer) * m.tile_words;
    if (alike) {                                                    /* one word for every inner tile */
        m.some[flags] = some ? ~0u : 0;
        m.all[flags] = all ? ~0u : 0;
    } else {
        ((uint8_t *)(m.some + flags))[group] = (uint8_t)some;
        ((uint8_t *)(m.all + flags))[group] = (uint8_t)all;
    }
}

extern "C" const struct fa_cuda_kernel *fa_cuda_pack(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)pack_kernel, PACK_THREADS, 0, TILES, 0, 0, 0 };
    return &kernel;
}
