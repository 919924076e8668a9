/* check/amx_emulation.h: the tile unit in plain C, so that ops_amx.c is proven on CPUs without it: packing, indexing, tails
 * and results. Only for checks: compile with `-include` of this file; the product never sees it.
 *
 * Kept faithful where results depend on it: eight tiles a thread, undefined until configured; pairs of products summed apart
 * (even and odd elements of the inner dimension), each step fused; subnormal inputs and results are 0. */
#ifndef FA_AMX_EMULATION_H
#define FA_AMX_EMULATION_H

#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FA_AMX_EMULATED

static __thread struct { bool configured; uint8_t tile[8][16][64]; } amx_emulated;

static inline void amx_require(void)
{
    if (!amx_emulated.configured) abort();              /* the real one raises #UD */
}

/* Volatile copies keep the compiler from fusing away what flushing to zero changes. */
static inline float amx_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static inline float amx_bf16(const uint8_t *p)
{
    const uint32_t bits = (uint32_t)p[1] << 24 | (uint32_t)p[0] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return amx_flush(x);
}

static inline void amx_configure(const void *config)
{
    const uint8_t *bytes = config;
    if (bytes[0] != 1 || bytes[1] != 0) abort();
    for (int tile = 0; tile < 8; tile++)                /* ops_amx.c uses whole tiles only */
        if (bytes[16 + 2 * tile] != 64 || bytes[17 + 2 * tile] != 0 || bytes[48 + tile] != 16) abort();
    memset(&amx_emulated, 0xff, sizeof amx_emulated);
    amx_emulated.configured = true;
}

static inline void amx_load(int tile, const void *base, int64_t stride)
{
    amx_require();
    for (int row = 0; row < 16; row++) memcpy(amx_emulated.tile[tile][row], (const char *)base + row * stride, 64);
}

static inline void amx_store(int tile, void *base, int64_t stride)
{
    amx_require();
    for (int row = 0; row < 16; row++) memcpy((char *)base + row * stride, amx_emulated.tile[tile][row], 64);
}

static inline void amx_zero(int tile)
{
    amx_require();
    memset(amx_emulated.tile[tile], 0, sizeof amx_emulated.tile[tile]);
}

static inline void amx_product(int c, int a, int b)
{
    amx_require();
    float left[16][32], right[16][2][16];
    for (int row = 0; row < 16; row++)
        for (int x = 0; x < 32; x++) {
            left[row][x] = amx_bf16(amx_emulated.tile[a][row] + 2 * x);
            right[row][x % 2][x / 2] = amx_bf16(amx_emulated.tile[b][row] + 2 * x);
        }
    for (int row = 0; row < 16; row++) {
        float sums[2][16] = {{0}}, result[16];
        for (int pair = 0; pair < 16; pair++)
            for (int odd = 0; odd < 2; odd++)
                for (int column = 0; column < 16; column++)
                    sums[odd][column] += left[row][2 * pair + odd] * right[pair][odd][column];
        memcpy(result, amx_emulated.tile[c][row], 64);
        for (int column = 0; column < 16; column++) result[column] = amx_flush(result[column] + (sums[0][column] + sums[1][column]));
        memcpy(amx_emulated.tile[c][row], result, 64);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config)            amx_configure(config)
#define _tile_release()                     ((void)(amx_emulated.configured = false))
#define _tile_loadd(tile, base, stride)     amx_load(tile, base, stride)
#define _tile_stored(tile, base, stride)    amx_store(tile, base, stride)
#define _tile_zero(tile)                    amx_zero(tile)
#define _tile_dpbf16ps(c, a, b)             amx_product(c, a, b)

/* The rounding instruction, for CPUs with AVX-512 but without its bfloat16 part. */
static inline uint32_t amx_round(float value)
{
    uint32_t bits;
    value = amx_flush(value);
    memcpy(&bits, &value, sizeof bits);
    return value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

typedef uint16_t amx_words __attribute__((vector_size(64)));
#define _mm512_cvtne2ps_pbh(high, low)                                                             \
    ({                                                                                             \
        typedef float lanes_ __attribute__((vector_size(64)));                                     \
        const lanes_ high_ = (lanes_)(high), low_ = (lanes_)(low);                                 \
        amx_words words_ = {0};                                                                          \
        for (int i_ = 0; i_ < 16; i_++) words_[i_] = (uint16_t)amx_round(low_[i_]), words_[16 + i_] = (uint16_t)amx_round(high_[i_]); \
        words_;                                                                                    \
    })

#endif
