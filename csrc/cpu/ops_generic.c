/* cpu/ops_generic.c: the micro-kernels for any CPU, in plain C over the compiler's own vectors of four. */
#include "../common/convert.h"

#define VL 4
#define NV 2
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint16_t v16 __attribute__((vector_size(8)));
typedef uint64_t v64 __attribute__((vector_size(16)));

INLINE vf broadcast(float x) { return (vf){ x, x, x, x }; }
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }

/* As x86 has them: the second argument unless the comparison holds, so that its NaN comes through. */
INLINE vf vmax(vf a, vf b) { vi first = a > b; return (vf)(((vi)a & first) | ((vi)b & ~first)); }
INLINE vf vmin(vf a, vf b) { vi first = a < b; return (vf)(((vi)a & first) | ((vi)b & ~first)); }

INLINE vf load_half(const uint16_t *p)
{
    return (vf){ fa_half_to_float(p[0]), fa_half_to_float(p[1]), fa_half_to_float(p[2]), fa_half_to_float(p[3]) };
}

INLINE void store_half(uint16_t *p, vf x)
{
    for (int i = 0; i < VL; i++) p[i] = fa_float_to_half(x[i]);
}

/* Through the caches: plain C knows no other way. */
INLINE void stream(float *p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE void stream_halves(uint16_t *p, v16 x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE void stream_end(void) {}

INLINE vi load_bytes(const uint8_t *p) { return (vi){ p[0], p[1], p[2], p[3] }; }

/* Products of the even 32-bit lanes. */
INLINE v64 multiply_even(v64 x, uint32_t m) { return (x & 0xffffffff) * m; }

#include "ops_simd.h"

const struct fa_cpu_ops fa_cpu_ops_generic = FA_CPU_OPS_TABLE("generic");
