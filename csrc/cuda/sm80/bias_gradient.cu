/* cuda/sm80/bias_gradient.cu: the bias gradient of 16-bit types, whatever the head dimension, and the sum of its parts for all. */
#include "../launch.h"
#include "bias_gradient.cuh"

/* The sum of the parts, in order: a thread an element. */
__global__ void __launch_bounds__(256) bias_parts_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_scores &t = a.p.dbias;
    const int heads = t.stride_h ? (int)a.p.h : 1, rows = t.stride_q ? (int)a.p.sq : 1, keys = t.stride_k ? (int)a.p.sk : 1;
    const int64_t count = (int64_t)(t.stride_b ? (int)a.p.b : 1) * heads * rows * keys, at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    float x = 0.0f;
    for (int part = 0; part < a.parts; part++) x += a.partial_dbias[part * count + at];
    const int64_t row = at / keys, plane = row / rows;
    store_bias(t, plane / heads * t.stride_b + plane % heads * t.stride_h + row % rows * t.stride_q + at % keys * t.stride_k, x);
}

extern "C" const struct fa_cuda_kernel *fa_sm80_bias_gradient(enum fa_dtype dtype)
{
    static const struct fa_cuda_kernel kernels[] = { FA_SM80_BIAS_GRADIENT(FA_FLOAT16), FA_SM80_BIAS_GRADIENT(FA_BFLOAT16) };
    return dtype == FA_FLOAT32 ? fa_sm80_fp32_bias_gradient(dtype) : &kernels[dtype == FA_BFLOAT16];
}

extern "C" const struct fa_cuda_kernel *fa_sm80_bias_parts(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)bias_parts_kernel, 256, 0, 256, 0, 0, 0 };
    return &kernel;
}
