/* cuda/sm90/backward_added_instance.cuh: FA_SM90_ADDED_BACKWARD(64) compiles the backward kernels for biases and masks of a head-dim
 * bucket, both types, and defines the function by which backward.c finds them: fa_sm90_added_backward_64(dtype). */
#ifndef FA_SM90_BACKWARD_ADDED_INSTANCE_CUH
#define FA_SM90_BACKWARD_ADDED_INSTANCE_CUH

#include "backward.cuh"
#include "kernels.h"

template <enum fa_dtype T, int D> constexpr fa_cuda_kernel sm90_added_backward_facts()
{
    using Tile = sm90_added_backward_tile<D>;
    using kernel = sm90_backward<T, D, false, false, Tile>;
    return { (const void *)sm90_backward_kernel<T, D, false, false, Tile>, kernel::THREADS, kernel::Shared::BYTES, kernel::BLOCK_M,
             kernel::BLOCK_N, kernel::TAKES_TICKETS, 0 };
}

#define FA_SM90_ADDED_BACKWARD(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_added_backward_##D(enum fa_dtype dtype) \
    { \
        static const struct fa_cuda_kernel kernels[] = { sm90_added_backward_facts<FA_FLOAT16, D>(), sm90_added_backward_facts<FA_BFLOAT16, D>() }; \
        return &kernels[dtype == FA_BFLOAT16]; \
    }

#endif
