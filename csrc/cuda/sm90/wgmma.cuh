/* cuda/sm90/wgmma.cuh: the warpgroup's matrix product, D (64, N) (+)= A (64, 16) B (16, N), for every N.
 *
 * PTX wants each accumulator named in the text, so the text is put together per N: FA_NAMES_<N> names them, FA_OPERANDS_<N>
 * binds them, and a row of the table at the end gives the numbers of the operands that follow. Lane (g, t) = (l / 4, l % 4) of
 * warp w holds d[4j], d[4j + 1] = D(16 w + g, 8 j + 2 t..) and d[4j + 2], d[4j + 3] = D(16 w + g + 8, the same).
 *
 *     wgmma<T, N, TRANS_A, TRANS_B>::ss(d, a, b, accumulate)      A and B described (descriptor() of ptx.cuh)
 *     wgmma<T, N, 0, TRANS_B>::rs(d, a, b, accumulate)            A (64, 16) in four registers a thread, as mma.sync has it
 *
 * TRANS: 0 where the 16 of the contraction lie side by side in memory, 1 where it is the 64 or N. Without `accumulate` D = A B. */
#ifndef FA_SM90_WGMMA_CUH
#define FA_SM90_WGMMA_CUH

#include "../ptx.cuh"

template <enum fa_dtype T, int N, int TRANS_A = 0, int TRANS_B = 0> struct wgmma;

#define FA_FLOATS(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FA_NAMES_8 "%0, %1, %2, %3"
#define FA_NAMES_16 FA_NAMES_8 ", %4, %5, %6, %7"
#define FA_NAMES_24 FA_NAMES_16 ", %8, %9, %10, %11"
#define FA_NAMES_32 FA_NAMES_24 ", %12, %13, %14, %15"
#define FA_NAMES_40 FA_NAMES_32 ", %16, %17, %18, %19"
#define FA_NAMES_48 FA_NAMES_40 ", %20, %21, %22, %23"
#define FA_NAMES_56 FA_NAMES_48 ", %24, %25, %26, %27"
#define FA_NAMES_64 FA_NAMES_56 ", %28, %29, %30, %31"
#define FA_NAMES_72 FA_NAMES_64 ", %32, %33, %34, %35"
#define FA_NAMES_80 FA_NAMES_72 ", %36, %37, %38, %39"
#define FA_NAMES_88 FA_NAMES_80 ", %40, %41, %42, %43"
#define FA_NAMES_96 FA_NAMES_88 ", %44, %45, %46, %47"
#define FA_NAMES_104 FA_NAMES_96 ", %48, %49, %50, %51"
#define FA_NAMES_112 FA_NAMES_104 ", %52, %53, %54, %55"
#define FA_NAMES_120 FA_NAMES_112 ", %56, %57, %58, %59"
#define FA_NAMES_128 FA_NAMES_120 ", %60, %61, %62, %63"
#define FA_NAMES_136 FA_NAMES_128 ", %64, %65, %66, %67"
#define FA_NAMES_144 FA_NAMES_136 ", %68, %69, %70, %71"
#define FA_NAMES_152 FA_NAMES_144 ", %72, %73, %74, %75"
#define FA_NAMES_160 FA_NAMES_152 ", %76, %77, %78, %79"
#define FA_NAMES_168 FA_NAMES_160 ", %80, %81, %82, %83"
#define FA_NAMES_176 FA_NAMES_168 ", %84, %85, %86, %87"
#define FA_NAMES_184 FA_NAMES_176 ", %88, %89, %90, %91"
#define FA_NAMES_192 FA_NAMES_184 ", %92, %93, %94, %95"
#define FA_NAMES_200 FA_NAMES_192 ", %96, %97, %98, %99"
#define FA_NAMES_208 FA_NAMES_200 ", %100, %101, %102, %103"
#define FA_NAMES_216 FA_NAMES_208 ", %104, %105, %106, %107"
#define FA_NAMES_224 FA_NAMES_216 ", %108, %109, %110, %111"
#define FA_NAMES_232 FA_NAMES_224 ", %112, %113, %114, %115"
#define FA_NAMES_240 FA_NAMES_232 ", %116, %117, %118, %119"
#define FA_NAMES_248 FA_NAMES_240 ", %120, %121, %122, %123"
#define FA_NAMES_256 FA_NAMES_248 ", %124, %125, %126, %127"
#define FA_OPERANDS_8(d) FA_FLOATS(d, 0)
#define FA_OPERANDS_16(d) FA_OPERANDS_8(d), FA_FLOATS(d, 4)
#define FA_OPERANDS_24(d) FA_OPERANDS_16(d), FA_FLOATS(d, 8)
#define FA_OPERANDS_32(d) FA_OPERANDS_24(d), FA_FLOATS(d, 12)
#define FA_OPERANDS_40(d) FA_OPERANDS_32(d), FA_FLOATS(d, 16)
#define FA_OPERANDS_48(d) FA_OPERANDS_40(d), FA_FLOATS(d, 20)
#define FA_OPERANDS_56(d) FA_OPERANDS_48(d), FA_FLOATS(d, 24)
#define FA_OPERANDS_64(d) FA_OPERANDS_56(d), FA_FLOATS(d, 28)
#define FA_OPERANDS_72(d) FA_OPERANDS_64(d), FA_FLOATS(d, 32)
#define FA_OPERANDS_80(d) FA_OPERANDS_72(d), FA_FLOATS(d, 36)
#define FA_OPERANDS_88(d) FA_OPERANDS_80(d), FA_FLOATS(d, 40)
#define FA_OPERANDS_96(d) FA_OPERANDS_88(d), FA_FLOATS(d, 44)
#define FA_OPERANDS_104(d) FA_OPERANDS_96(d), FA_FLOATS(d, 48)
#define FA_OPERANDS_112(d) FA_OPERANDS_104(d), FA_FLOATS(d, 52)
#define FA_OPERANDS_120(d) FA_OPERANDS_112(d), FA_FLOATS(d, 56)
#define FA_OPERANDS_128(d) FA_OPERANDS_120(d), FA_FLOATS(d, 60)
#define FA_OPERANDS_136(d) FA_OPERANDS_128(d), FA_FLOATS(d, 64)
#define FA_OPERANDS_144(d) FA_OPERANDS_136(d), FA_FLOATS(d, 68)
#define FA_OPERANDS_152(d) FA_OPERANDS_144(d), FA_FLOATS(d, 72)
#define FA_OPERANDS_160(d) FA_OPERANDS_152(d), FA_FLOATS(d, 76)
#define FA_OPERANDS_168(d) FA_OPERANDS_160(d), FA_FLOATS(d, 80)
#define FA_OPERANDS_176(d) FA_OPERANDS_168(d), FA_FLOATS(d, 84)
#define FA_OPERANDS_184(d) FA_OPERANDS_176(d), FA_FLOATS(d, 88)
#define FA_OPERANDS_192(d) FA_OPERANDS_184(d), FA_FLOATS(d, 92)
#define FA_OPERANDS_200(d) FA_OPERANDS_192(d), FA_FLOATS(d, 96)
#define FA_OPERANDS_208(d) FA_OPERANDS_200(d), FA_FLOATS(d, 100)
#define FA_OPERANDS_216(d) FA_OPERANDS_208(d), FA_FLOATS(d, 104)
#define FA_OPERANDS_224(d) FA_OPERANDS_216(d), FA_FLOATS(d, 108)
#define FA_OPERANDS_232(d) FA_OPERANDS_224(d), FA_FLOATS(d, 112)
#define FA_OPERANDS_240(d) FA_OPERANDS_232(d), FA_FLOATS(d, 116)
#define FA_OPERANDS_248(d) FA_OPERANDS_240(d), FA_FLOATS(d, 120)
#define FA_OPERANDS_256(d) FA_OPERANDS_248(d), FA_FLOATS(d, 124)

#define FA_WGMMA_SS(N, TYPE, X0, X1, X2, X3, X4) \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #X2 ", 0; " \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" FA_NAMES_##N "}, %" #X0 ", %" #X1 ", p, 1, 1, %" #X3 ", %" #X4 "; }" \
                 : FA_OPERANDS_##N(d) : "l"(a), "l"(b), "r"((int)accumulate), "n"(TRANS_A), "n"(TRANS_B))
#define FA_WGMMA_RS(N, TYPE, X0, X1, X2, X3, X4, X5, X6) \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #X5 ", 0; " \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" FA_NAMES_##N "}, " \
                 "{%" #X0 ", %" #X1 ", %" #X2 ", %" #X3 "}, %" #X4 ", p, 1, 1, %" #X6 "; }" \
                 : FA_OPERANDS_##N(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(TRANS_B))

/* X0..X6: N / 2, N / 2 + 1, ... */
#define FA_WGMMA(N, X0, X1, X2, X3, X4, X5, X6) \
    template <enum fa_dtype T, int TRANS_A, int TRANS_B> struct wgmma<T, N, TRANS_A, TRANS_B> { \
        static __device__ __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) \
        { \
            if constexpr (T == FA_FLOAT16) FA_WGMMA_SS(N, "f16.f16", X0, X1, X2, X3, X4); \
            else FA_WGMMA_SS(N, "bf16.bf16", X0, X1, X2, X3, X4); \
        } \
        static __device__ __forceinline__ void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) \
        { \
            static_assert(TRANS_A == 0, "registers hold A row by row"); \
            if constexpr (T == FA_FLOAT16) FA_WGMMA_RS(N, "f16.f16", X0, X1, X2, X3, X4, X5, X6); \
            else FA_WGMMA_RS(N, "bf16.bf16", X0, X1, X2, X3, X4, X5, X6); \
        } \
    };

FA_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
FA_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
FA_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
FA_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
FA_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
FA_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
FA_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
FA_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
FA_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
FA_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
FA_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
FA_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
FA_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
FA_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
FA_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
FA_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
FA_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
FA_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
FA_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
FA_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
FA_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
FA_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
FA_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
FA_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
FA_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
FA_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
FA_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
FA_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
FA_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
FA_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
FA_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
FA_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#endif
