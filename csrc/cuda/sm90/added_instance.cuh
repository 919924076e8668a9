/* cuda/sm90/added_instance.cuh: FA_SM90_ADDED(64) compiles the forward kernels for biases and masks of a head-dim bucket, both types,
 * and defines the function by which forward.c finds them: fa_sm90_added_64(dtype). */
#ifndef FA_SM90_ADDED_INSTANCE_CUH
#define FA_SM90_ADDED_INSTANCE_CUH

#include "added.cuh"
#include "kernels.h"

template <enum fa_dtype T, int D> constexpr fa_cuda_kernel added_facts()
{
    using Tile = sm90_added_tile<D>;
    using shape = added_shape<D, Tile>;
    return { (const void *)added_kernel<T, D, Tile>, shape::THREADS, shape::SHARED_BYTES, shape::BLOCK_M, shape::BLOCK_N, 1 };
}

#define FA_SM90_ADDED(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_added_##D(enum fa_dtype dtype) \
    { \
        static const struct fa_cuda_kernel kernels[] = { added_facts<FA_FLOAT16, D>(), added_facts<FA_BFLOAT16, D>() }; \
        return &kernels[dtype == FA_BFLOAT16]; \
    }

#endif
