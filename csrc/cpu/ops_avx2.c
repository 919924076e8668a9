/* cpu/ops_avx2.c: the micro-kernels on eight lanes, for CPUs with AVX2, FMA and F16C. */
#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include "../common/convert.h"

#define VL 8
#define NV 2
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint16_t v16 __attribute__((vector_size(16)));
typedef uint64_t v64 __attribute__((vector_size(32)));

INLINE vf broadcast(float x) { return _mm256_set1_ps(x); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_half(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void stream(float *p, vf x) { _mm256_stream_ps(p, x); }
INLINE void stream_halves(uint16_t *p, v16 x) { _mm_stream_si128((__m128i *)p, (__m128i)x); }
INLINE void stream_end(void) { _mm_sfence(); }
INLINE vi load_bytes(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE v64 multiply_even(v64 x, uint32_t m) { return (v64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32((int)m)); }

#include "ops_simd.h"

const struct fa_cpu_ops fa_cpu_ops_avx2 = FA_CPU_OPS_TABLE("avx2");
#endif
