/* cuda/sm80/bias_gradient.cu: the kernels of the bias gradient: one for each type, whatever the head dimension. */
#include "../launch.h"
#include "bias_gradient.cuh"

template <enum fa_dtype T> static constexpr fa_cuda_kernel facts()
{
    using block = bias_gradient<T>;
    return { (const void *)bias_gradient_kernel<T>, block::THREADS, block::SHARED_BYTES, block::BLOCK_M, block::BLOCK_N, 2, 0 };
}

extern "C" const struct fa_cuda_kernel *fa_sm80_bias_gradient(enum fa_dtype dtype)
{
    static const struct fa_cuda_kernel kernels[] = { facts<FA_FLOAT32>(), facts<FA_FLOAT16>(), facts<FA_BFLOAT16>() };
    return &kernels[dtype];
}

extern "C" const struct fa_cuda_kernel *fa_sm80_bias_parts(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = { (const void *)bias_parts_kernel, 256, 0, 256, 0, 0, 0 };
    return &kernel;
}
