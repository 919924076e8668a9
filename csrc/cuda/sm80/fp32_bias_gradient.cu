/* cuda/sm80/fp32_bias_gradient.cu: the bias gradient of fp32 tensors, whatever the head dimension. */
#include "../launch.h"
#include "bias_gradient.cuh"

extern "C" const struct fa_cuda_kernel *fa_sm80_fp32_bias_gradient(enum fa_dtype)
{
    static const struct fa_cuda_kernel kernel = FA_SM80_BIAS_GRADIENT(FA_FLOAT32);
    return &kernel;
}
