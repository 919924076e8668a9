/* common/philox.h: the dropout mask, a pure function of (seed, offset, b*H + h, i, j).
 *
 * One Philox-4x32-7 call gives 16 bytes for the 16 elements of a group: rows {i, i+1, i+8, i+9} x columns
 * {j, j+1, j+8, j+9} of a 16x16 piece of S, i and j even and < 8. In the mma and wgmma fragments of S and of its
 * transpose a group lies in two lanes, each holding two whole words of the call:
 *
 *     word = 2 (i & 1) + (j & 1)      byte of the word = 2 (i >> 3 & 1) + (j >> 3 & 1)      (i, j within the piece)
 *
 * An element is kept iff its byte < keep256 and is then scaled by 256 / keep256, so the expectation is exact.
 * Philox: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Host and device include this file. */
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define FA_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE static inline __attribute__((always_inline))
#endif

/* Kept values of a byte: p acts in steps of 1/256; p < 1/512 drops nothing. */
FA_HOST_DEVICE int fa_keep256(double dropout_p)
{
    double kept = 256.0 * (1.0 - dropout_p) + 0.5;
    return kept < 1.0 ? 1 : kept > 256.0 ? 256 : (int)kept;
}

struct fa_philox { uint32_t word[4]; };

/* Said to ptxas in one word: it makes of the 64-bit product two instructions, one of which adds zero. */
FA_HOST_DEVICE uint64_t fa_philox_product(uint32_t x, uint32_t y)
{
#ifdef __CUDA_ARCH__
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
    return product;
#else
    return (uint64_t)x * y;
#endif
}

FA_HOST_DEVICE struct fa_philox fa_philox_call(uint64_t seed, struct fa_philox counter)
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    for (int round = 0; round < 7; round++) {
        uint64_t product0 = fa_philox_product(c0, 0xD2511F53u), product1 = fa_philox_product(c2, 0xCD9E8D57u);
        uint32_t next0 = (uint32_t)(product1 >> 32) ^ c1 ^ key0, next2 = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
        c1 = (uint32_t)product1;
        c3 = (uint32_t)product0;
        c0 = next0;
        c2 = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    struct fa_philox out = {{ c0, c1, c2, c3 }};
    return out;
}

/* Counter of a group: piece = (i / 16, j / 16), group = 4 (i / 2 & 3) + (j / 2 & 3). */
FA_HOST_DEVICE struct fa_philox fa_dropout_counter(uint64_t offset, uint32_t batch_head,
                                                   uint32_t piece_i, uint32_t piece_j, uint32_t group)
{
    struct fa_philox counter = {{ piece_j << 4 | group, piece_i, batch_head + (uint32_t)(offset >> 32), (uint32_t)offset }};
    return counter;
}

/* The random byte of one element: the definition. Kernels draw whole groups at a time. */
FA_HOST_DEVICE int fa_dropout_byte(uint64_t seed, uint64_t offset, uint32_t batch_head, int64_t i, int64_t j)
{
    uint32_t group = (uint32_t)(4 * (i >> 1 & 3) + (j >> 1 & 3));
    struct fa_philox random = fa_philox_call(seed, fa_dropout_counter(
        offset, batch_head, (uint32_t)(i >> 4), (uint32_t)(j >> 4), group));
    uint32_t word = random.word[2 * (i & 1) + (j & 1)];
    return (int)(word >> 8 * (2 * (i >> 3 & 1) + (j >> 3 & 1)) & 255);
}

#endif
