/* cuda/narrow.cu: attn_bias from float64 to fp32, in which it is added, once a call: the kernels read no float64. A thread an element. */
#include "row.cuh"

__global__ void __launch_bounds__(HELPER_THREADS) narrow_kernel(const __grid_constant__ fa_cuda_args a)
{
    const fa_scores &from = a.wide_bias, &to = a.p.bias;
    const int64_t keys = from.stride_k ? a.p.sk : 1, rows = from.stride_q ? a.p.sq : 1, heads = from.stride_h ? a.p.h : 1;
    const int64_t count = (from.stride_b ? a.p.b : 1) * heads * rows * keys, step = (int64_t)gridDim.x * HELPER_THREADS;
    for (int64_t at = (int64_t)blockIdx.x * HELPER_THREADS + threadIdx.x; at < count; at += step) {
        const int64_t row = at / keys, plane = row / rows;
        const int64_t element = plane / heads * from.stride_b + plane % heads * from.stride_h + row % rows * from.stride_q + at % keys * from.stride_k;
        ((float *)to.ptr)[at] = (float)((const double *)from.ptr)[element];
    }
}

extern "C" const struct fa_cuda_kernel *fa_cuda_narrow(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)narrow_kernel, HELPER_THREADS, 0, HELPER_THREADS, 0, 0, 0 };
    return &kernel;
}
