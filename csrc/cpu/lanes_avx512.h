/* cpu/lanes_avx512.h: sixteen lanes for ops_simd.h: what ops_avx512.c and ops_amx.c share. */
#include <immintrin.h>
#include "../common/convert.h"

#define VL 16
#define NV 4
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t v16 __attribute__((vector_size(32)));
typedef uint64_t v64 __attribute__((vector_size(64)));

INLINE vf broadcast(float x) { return _mm512_set1_ps(x); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_half(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void stream(float *p, vf x) { _mm512_stream_ps(p, x); }
INLINE void stream_halves(uint16_t *p, v16 x) { _mm256_stream_si256((__m256i *)p, (__m256i)x); }
INLINE void stream_end(void) { _mm_sfence(); }
INLINE vi load_bytes(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE v64 multiply_even(v64 x, uint32_t m) { return (v64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32((int)m)); }
