/* cpu/ops_avx512.c: the micro-kernels on sixteen lanes, for CPUs with AVX-512 F, BW, DQ and VL. */
#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "lanes_avx512.h"
#include "ops_simd.h"

const struct fa_cpu_ops fa_cpu_ops_avx512 = FA_CPU_OPS_TABLE("avx512");
#endif
