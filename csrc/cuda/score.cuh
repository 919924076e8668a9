/* cuda/score.cuh: what happens to a fragment of scores between Q K^T and the softmax, and the dropout mask.
 *
 * A piece is 16 rows x 16 columns: fragment elements c[0][0..3], c[1][0..3] of two 8-column accumulators. Lane (g, t) holds rows
 * g, g + 8 and columns 2t, 2t + 1 of each. With `transposed`, rows are keys and columns queries. */
#ifndef FA_SCORE_CUH
#define FA_SCORE_CUH

#include "sequence.cuh"
#include "../common/philox.h"

/* tanh through exp2: absolute error 1e-7, which tanh.approx (5e-4) would multiply by the cap. */
FA_DEVICE float tanh_of(float x)
{
    return 1.0f - 2.0f * rcp_approx(exp2_approx(x * 2.88539008f) + 1.0f);
}

/* The score in natural units: scale, softcap, ALiBi. `derivative` <- d score / d (scale q.k). EXACT: to the last bits of fp32. */
template <bool EXACT = false>
FA_DEVICE float modify_score(const fa_cuda_args &a, float qk, float slope, int distance, float &derivative)
{
    float s = qk * a.scale;
    derivative = 1.0f;
    if (a.softcap > 0) {
        const float t = EXACT ? tanhf(s / a.softcap) : tanh_of(s * rcp_approx(a.softcap));
        s = t * a.softcap;
        derivative = 1.0f - t * t;
    }
    return s - slope * (float)abs(distance);
}

/* Whether this call has softcap, ALiBi or a scale <= 0; masks and biases: below. Known when compiling only where it has none. */
template <enum fa_variant VARIANT> FA_DEVICE bool has_score_mod(const fa_cuda_args &a) { return FA_HAS_MODS(VARIANT) && a.score_mod; }
template <enum fa_variant VARIANT> FA_DEVICE bool has_bias(const fa_cuda_args &a) { return FA_HAS_MODS(VARIANT) && a.p.bias.ptr; }
template <enum fa_variant VARIANT> FA_DEVICE bool has_mask(const fa_cuda_args &a) { return FA_HAS_MODS(VARIANT) && a.mask.bits; }

/* Which tile of which head of which sequence a block works on. Tiles of a head follow each other: its K and V, or Q and dO, stay in
 * L2. With a bias that all sequences share, the sequences of a tile do: the bias tile stays there. */
struct block_place { int b, head, tile; };
template <enum fa_variant VARIANT> FA_DEVICE block_place place_of_block(const fa_cuda_args &a, int heads, int tiles)
{
    const int x = blockIdx.x, sequences = (int)a.p.b;
    if (FA_HAS_MODS(VARIANT) && a.batch_fastest) return { x % sequences, x / sequences / tiles, x / sequences % tiles };
    return { x / tiles / heads, x / tiles % heads, x % tiles };
}

FA_DEVICE float alibi_slope(const fa_cuda_args &a, int b, int head)
{
    return a.p.alibi ? a.p.alibi[b * a.p.alibi_stride_b + head] : 0.0f;
}

/* Bytes of common/philox.h for this lane's eight elements of two pieces, by one Philox call a lane: lanes g and g ^ 1 need the
 * same two calls, make one each and swap halves. bytes[piece]: element (row half, column half, column parity c) is byte
 * 2 (row half) + (column half) of word c; transposed: rows are keys, and the halves change places. */
FA_DEVICE void dropout_bytes(uint32_t (&bytes)[2][2], uint64_t seed, uint64_t offset, uint32_t batch_head,
                             const uint32_t (&piece_i)[2], const uint32_t (&piece_j)[2], int lane, bool transposed)
{
    const int g = lane >> 2, t = lane & 3, odd = g & 1;
    const uint32_t group = transposed ? 4 * t + (g >> 1) : 4 * (g >> 1) + t;
    const fa_philox mine = fa_philox_call(seed, fa_dropout_counter(
        offset, batch_head, odd ? piece_i[1] : piece_i[0], odd ? piece_j[1] : piece_j[0], group));
    /* Words for row parity r: {2r, 2r + 1}; transposed, for key parity r: {r, r + 2}. Keep those of parity `odd`, send the rest. */
    const int step = transposed ? 2 : 1, stride = transposed ? 1 : 2;
    const uint32_t low[2]  = { mine.word[0], mine.word[step] };                        /* parity 0 */
    const uint32_t high[2] = { mine.word[stride], mine.word[stride + step] };          /* parity 1 */
    #pragma unroll
    for (int w = 0; w < 2; w++) {
        const uint32_t keep = odd ? high[w] : low[w], send = odd ? low[w] : high[w];
        const uint32_t got = __shfl_xor_sync(0xffffffff, send, 4);
        bytes[0][w] = odd ? got : keep;
        bytes[1][w] = odd ? keep : got;
    }
}

FA_DEVICE bool dropout_keeps(const uint32_t (&bytes)[2], int row_half, int column_half, int parity, int keep256, bool transposed)
{
    const int byte = transposed ? 2 * column_half + row_half : 2 * row_half + column_half;
    return (int)(bytes[parity] >> 8 * byte & 255) < keep256;
}

/* The same for four elements at once: the top bit of each byte says dropped, byte >= keep256, which is the carry out of
 * byte + (256 - keep256). */
FA_DEVICE uint32_t dropped_flags(uint32_t bytes, int keep256)
{
    const uint32_t add = (256 - keep256) * 0x01010101u, top = add & 0x80808080u;
    const uint32_t low = (bytes & 0x7f7f7f7fu) + (add & 0x7f7f7f7fu);
    return (bytes & top) | ((bytes | top) & low);
}

/* All ones where element `byte` of flags is dropped: of one element in 32 bits, or of a pair of 16-bit elements, one of each word. */
FA_DEVICE uint32_t dropped_one(uint32_t flags, int byte) { return permute_bytes(flags, 0, 0x1111 * (byte | 8)); }
FA_DEVICE uint32_t dropped_pair(const uint32_t (&flags)[2], int byte)
{
    return permute_bytes(flags[0], flags[1], 0x11 * (byte | 8) + 0x1100 * (byte | 12));
}

/* The same by arithmetic on pairs of fp16, which takes half of the instructions and few from the pipe for integers, which binds:
 * 1024 + byte is the byte behind 0x64, and Z = saturate((1024 + keep256) - (1024 + byte)) is 1 where kept, else 0. Pair `byte` of Z
 * has the elements of byte `byte` of two words. */
FA_DEVICE uint32_t dropout_threshold(int keep256) { return 0x64006400u + keep256 * 0x10001u; }
FA_DEVICE void kept_pairs(uint32_t (&z)[4], uint32_t word0, uint32_t word1, uint32_t threshold)
{
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t bytes = permute_bytes(word0, word1, half ? 0x7632 : 0x5410);
        z[2 * half] = subtract_saturated(threshold, permute_bytes(bytes, 0x64646464u, 0x4240));
        z[2 * half + 1] = subtract_saturated(threshold, permute_bytes(bytes, 0x64646464u, 0x4341));
    }
}

/* Z P of a pair. fp16's 1.0 is 2^-7 to bf16: what follows from the product is to be multiplied by kept_factor(). */
template <enum fa_dtype T> FA_DEVICE uint32_t keep_pair(uint32_t p, uint32_t z) { return multiply_pair<T>(p, z); }
template <enum fa_dtype T> FA_DEVICE constexpr float kept_factor() { return T == FA_BFLOAT16 ? 128.0f : 1.0f; }

/* Rows of S in a warp's 32, so that a lane's four rows are those of one group of the mask and it draws for itself: the row that lies
 * at place 16 a + 8 b + 4 c + d of the fragments (d < 4) is 16 c + 8 b + 2 d + a. Linear: of a sum of bits, the sum. */
struct in_groups {
    static FA_DEVICE_MEMBER constexpr int row(int place)
    {
        return (place & ~31) | (place & 4) << 2 | (place & 8) | (place & 3) << 1 | (place >> 4 & 1);
    }
};

#endif
