/* cuda/mask.cu: makes of attn_mask what mask.cuh describes, once a call.
 *
 *     pack     a thread reads the bytes of 32 keys of a row and writes their word
 *     flags    a warp reads the words of 32 inner tiles, a lane each, and writes two words of flags
 *
 * A mask that is the same for all queries (for padding: batch and keys only) or all keys takes one row or one word. */
#include "mask.cuh"
#include "row.cuh"

/* A bit for each byte of x that is not 0. */
FA_DEVICE uint32_t nonzero_bytes(uint32_t x)
{
    const uint32_t top = (x | (x & 0x7f7f7f7fu) + 0x7f7f7f7fu) & 0x80808080u;
    return (top >> 7) * 0x10204080u >> 28;
}

FA_DEVICE uint32_t pack_word(const uint8_t *bytes, int64_t stride, int keys)
{
    uint32_t word = 0;
    if (keys == 32 && stride == 1 && (uintptr_t)bytes % 16 == 0) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 x = ((const uint4 *)bytes)[half];
            word |= (nonzero_bytes(x.x) | nonzero_bytes(x.y) << 4 | nonzero_bytes(x.z) << 8 | nonzero_bytes(x.w) << 12) << 16 * half;
        }
    } else {
        for (int j = 0; j < keys; j++) word |= (uint32_t)(bytes[j * stride] != 0) << j;
    }
    return word;
}

__global__ void __launch_bounds__(HELPER_THREADS) pack_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_cuda_mask &m = a.mask;
    const fa_scores &t = a.p.mask;
    const int heads = m.plane_h ? (int)a.p.h : 1, planes = heads * (m.plane_b ? (int)a.p.b : 1);
    const int64_t words = (int64_t)planes * m.rows * m.words, step = (int64_t)gridDim.x * HELPER_THREADS;
    for (int64_t at = (int64_t)blockIdx.x * HELPER_THREADS + threadIdx.x; at < words; at += step) {
        const int j = (int)(at % m.words) * 32;
        const int64_t row = at / m.words, plane = row / m.rows;
        const uint8_t *bytes = (const uint8_t *)t.ptr + plane / heads * t.stride_b + plane % heads * t.stride_h
                             + row % m.rows * t.stride_q + j * t.stride_k;
        if (m.words == 1) m.bits[at] = *bytes ? 0xffffffffu : 0;
        else m.bits[at] = pack_word(bytes, t.stride_k, min((int)a.p.sk - j, 32));
    }
}

__global__ void __launch_bounds__(HELPER_THREADS) flags_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_cuda_mask &m = a.mask;
    const int lane = threadIdx.x % 32, block_m = m.block_m, block_n = m.block_n;
    const int64_t at = (int64_t)blockIdx.x * (HELPER_THREADS / 32) + threadIdx.x / 32, row = at / m.tile_words;
    const int plane = (int)(row / m.outer), outer = (int)(row % m.outer);
    const int planes = (m.plane_h ? (int)a.p.h : 1) * (m.plane_b ? (int)a.p.b : 1);
    if (plane >= planes) return;
    const bool alike = (m.outer_is_keys ? m.rows : m.words) == 1;
    const int inner = alike ? 0 : (int)(at % m.tile_words) * 32 + lane;
    const int i0 = (m.outer_is_keys ? inner : outer) * block_m, i_end = m.rows == 1 ? i0 + 1 : min(i0 + block_m, (int)a.p.sq);
    const int j0 = (m.outer_is_keys ? outer : inner) * block_n, j_end = min(j0 + block_n, (int)a.p.sk);
    uint32_t some = 0, missing = i0 < i_end && j0 < j_end ? 0 : 1;
    for (int i = i0; i < i_end && !(some && missing); i++)
        for (int j = j0; j < j_end; j = (j / 32 + 1) * 32) {
            const int keys = min(j_end, (j / 32 + 1) * 32) - j;
            const uint32_t word = mask_word(m, plane, i, j), these = 0xffffffffu >> (32 - keys) << j % 32;
            some |= word & these;
            missing |= ~word & these;
        }
    some = __ballot_sync(0xffffffff, some != 0);
    const uint32_t all = __ballot_sync(0xffffffff, missing == 0);
    if (lane != 0) return;
    m.some[at] = some;
    m.all[at] = all;
}

extern "C" const struct fa_cuda_kernel *fa_cuda_pack(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)pack_kernel, HELPER_THREADS, 0, HELPER_THREADS, 0, 0, 0 };
    return &kernel;
}

extern "C" const struct fa_cuda_kernel *fa_cuda_flags(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)flags_kernel, HELPER_THREADS, 0, HELPER_THREADS / 32, 0, 0, 0 };
    return &kernel;
}
