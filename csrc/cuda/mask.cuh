/* cuda/mask.cuh: attn_mask as the kernels read it. mask.cu has made bits of its bytes: a row of keys takes sk / 8 bytes, and a word
 * serves 32 keys of a row at once. A second set of bits says of each tile whether some or every key of it is visible, so that tiles
 * without one are passed over and whole ones read no mask. */
#ifndef FA_MASK_CUH
#define FA_MASK_CUH

#include "args.h"
#include "ptx.cuh"

FA_DEVICE int mask_plane(const fa_cuda_mask &m, int b, int head) { return opaque(b) * m.plane_b + opaque(head) * m.plane_h; }

/* The word that holds key j of query i: its bit j % 32. */
FA_DEVICE uint32_t mask_word(const fa_cuda_mask &m, int plane, int i, int j)
{
    const int64_t row = (int64_t)plane * m.rows + (m.rows > 1 ? i : 0);
    return __ldg(m.bits + row * m.words + (m.words > 1 ? j / 32 : 0));
}

/* Bits of `some` or `all` for an outer tile; word 0 is all there is where inner tiles are alike. */
FA_DEVICE const uint32_t *tile_flags(const fa_cuda_mask &m, const uint32_t *flags, int plane, int outer)
{
    return flags + ((int64_t)plane * m.outer + (m.outer > 1 ? outer : 0)) * m.tile_words;
}
FA_DEVICE uint32_t flag_word(const fa_cuda_mask &m, const uint32_t *flags, int tile)
{
    return __ldg(flags + (m.tile_words > 1 ? tile / 32 : 0));
}

FA_DEVICE bool tile_is_whole(const fa_cuda_mask &m, int plane, int outer, int tile)
{
    return flag_word(m, tile_flags(m, m.all, plane, outer), tile) >> tile % 32 & 1;
}

/* The last tile of [first, end) that has a visible key, first - 1 if there is none. */
FA_DEVICE int last_visible_tile(const fa_cuda_mask &m, int plane, int outer, int first, int end)
{
    const uint32_t *flags = tile_flags(m, m.some, plane, outer);
    while (end > first) {
        const int tile = end - 1;
        const uint32_t bits = flag_word(m, flags, tile) & 0xffffffffu >> (31 - tile % 32);
        if (bits) return max(tile / 32 * 32 + 31 - __clz(bits), first - 1);
        end = tile / 32 * 32;
    }
    return first - 1;
}

/* The first tile of [first, end) that has a visible key, `end` if there is none. */
FA_DEVICE int first_visible_tile(const fa_cuda_mask &m, int plane, int outer, int first, int end)
{
    const uint32_t *flags = tile_flags(m, m.some, plane, outer);
    while (first < end) {
        const uint32_t bits = flag_word(m, flags, first) & 0xffffffffu << first % 32;
        if (bits) return min(first / 32 * 32 + __ffs(bits) - 1, end);
        first = (first / 32 + 1) * 32;
    }
    return end;
}
/* How many of them have. */
FA_DEVICE int visible_inner_tiles(const fa_cuda_mask &m, int plane, int outer, int first, int end)
{
    const uint32_t *flags = tile_flags(m, m.some, plane, outer);
    int count = 0;
    for (; first < end; first = (first / 32 + 1) * 32) {
        const uint32_t beyond = end - first / 32 * 32 < 32 ? 0xffffffffu << (end - first / 32 * 32) : 0;
        count += __popc(flag_word(m, flags, first) & 0xffffffffu << first % 32 & ~beyond);
    }
    return count;
}

/* How many of the outer tiles [first, end) have a visible key in an inner tile. All lanes of a warp take part. */
FA_DEVICE int visible_tiles(const fa_cuda_mask &m, int plane, int first, int end, int tile)
{
    int count = 0;
    for (int outer = first; outer < end; outer += 32) {
        const int mine = outer + (int)threadIdx.x % 32;
        const bool some = mine < end && (flag_word(m, tile_flags(m, m.some, plane, mine), tile) >> tile % 32 & 1);
        count += __popc(__ballot_sync(0xffffffff, some));
    }
    return count;
}

#endif
