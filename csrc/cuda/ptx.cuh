/* cuda/ptx.cuh: one instruction each. Names follow the PTX manual; shapes are those of a warp. */
#ifndef FA_PTX_CUH
#define FA_PTX_CUH

#include <stdint.h>
#include "../flash_attn.h"

#define FA_DEVICE        static __device__ __forceinline__
#define FA_DEVICE_MEMBER __device__ __forceinline__

/* ------------------------------------------------------------------------------------------- shared memory */

FA_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes to shared memory, bypassing L1; bytes beyond `valid` become 0, and none of them is read. */
FA_DEVICE void cp_async_16(uint32_t dst, const void *src, int valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(valid) : "memory");
}
/* 4 bytes, or 0 where not `valid`. */
FA_DEVICE void cp_async_4(uint32_t dst, const void *src, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
FA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most `PENDING` of this thread's newest groups are under way. */
template <int PENDING> FA_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }

FA_DEVICE void store_shared_16(uint32_t dst, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
FA_DEVICE uint4 load_shared_16(uint32_t src)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(src) : "memory");
    return x;
}
FA_DEVICE float2 load_shared_8(uint32_t src)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(src) : "memory");
    return x;
}
FA_DEVICE uint32_t load_shared_4(uint32_t src)
{
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(src) : "memory");
    return x;
}
FA_DEVICE void store_shared_4(uint32_t dst, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(dst), "r"(x) : "memory"); }

/* Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Lane (g, t) = (l / 4, l % 4)
 * gets elements (g, 2t) and (g, 2t + 1) of each, or with _trans (2t, g) and (2t + 1, g). */
FA_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
FA_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

/* -------------------------------------------------------------------------------------------------- product */

/* C (16, 8) += A (16, 16) B (16, 8). Lane (g, t): c = (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1);
 * a = (g, 2t..) (g + 8, 2t..) (g, 2t + 8..) (g + 8, 2t + 8..); b = (2t.., g) (2t + 8.., g). */
template <enum fa_dtype T> FA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    if constexpr (T == FA_FLOAT16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* C (16, 8) += A (16, 8) B (8, 8), tf32: the upper 19 bits of each float. Lane (g, t): c as above;
 * a = (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4); b = (t, g) (t + 4, g). */
FA_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Two floats to two 16-bit elements, round to nearest even; `low` goes to the lower half. */
template <enum fa_dtype T> FA_DEVICE uint32_t pack(float low, float high)
{
    uint32_t x;
    if constexpr (T == FA_FLOAT16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

/* One 16-bit element, in the low half of x, as a float. */
template <enum fa_dtype T> FA_DEVICE float unpack(uint32_t x)
{
    float f;
    if constexpr (T == FA_FLOAT16) asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(x));
    else f = __uint_as_float(x << 16);
    return f;
}

/* x and y, times scale, plus a pair of 16-bit elements. */
template <enum fa_dtype T> FA_DEVICE void add_pair(float &x, float &y, uint32_t two, float scale)
{
    x = fmaf(x, scale, unpack<T>(two & 0xffff));
    if constexpr (T == FA_BFLOAT16) y = fmaf(y, scale, __uint_as_float(two & 0xffff0000));
    else y = fmaf(y, scale, unpack<T>(two >> 16));
}

/* --------------------------------------------------------------------------------------------------- scalars */

FA_DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FA_DEVICE float log2_approx(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FA_DEVICE float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

/* threadIdx.x, read anew: what follows from it is worked out where it is needed and holds no registers before. */
FA_DEVICE int thread_anew() { int x; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x)); return x; }

/* x, of which the compiler knows nothing: what follows from it is worked out in the loop, and holds no registers around it. */
FA_DEVICE int opaque(int x) { asm volatile("" : "+r"(x)); return x; }

/* Four bytes of the eight of y:x, one per nibble of `selector`; with its top bit set, the byte's sign eight times. */
FA_DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector)
{
    uint32_t z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(selector));
    return z;
}

FA_DEVICE float2 unpack_pair(uint32_t x)                    /* of fp16 */
{
    float2 f;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(f.x), "=f"(f.y) : "r"(x));
    return f;
}

/* Pairs of fp16: x - y between 0 and 1. */
FA_DEVICE uint32_t subtract_saturated(uint32_t x, uint32_t y)
{
    uint32_t z;
    asm("sub.rn.sat.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
/* Products of pairs. */
template <enum fa_dtype T> FA_DEVICE uint32_t multiply_pair(uint32_t x, uint32_t y)
{
    uint32_t z;
    if constexpr (T == FA_FLOAT16) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0));
    return z;
}

FA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }

/* Sum and maximum over the four lanes that share rows of a fragment. */
FA_DEVICE float quad_max(float x)
{
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
FA_DEVICE float quad_sum(float x)
{
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

#endif
