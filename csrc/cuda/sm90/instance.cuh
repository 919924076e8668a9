/* cuda/sm90/instance.cuh: FA_SM90_FORWARD(64) compiles the forward kernels of a head-dim bucket, both types and all variants, and
 * defines the function by which forward.c finds them. */
#ifndef FA_SM90_INSTANCE_CUH
#define FA_SM90_INSTANCE_CUH

#include "forward.cuh"
#include "kernels.h"

#define FA_SM90_FORWARD_KERNEL(T, D, VARIANT) { \
    (const void *)forward_kernel<T, D, VARIANT, sm90_forward_tile<D, VARIANT>>, \
    forward_shape<D, sm90_forward_tile<D, VARIANT>>::THREADS, forward_shape<D, sm90_forward_tile<D, VARIANT>>::SHARED_BYTES, \
    forward_shape<D, sm90_forward_tile<D, VARIANT>>::BLOCK_M, forward_shape<D, sm90_forward_tile<D, VARIANT>>::BLOCK_N, 1 }

#define FA_SM90_FORWARD(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_forward_##D(enum fa_dtype dtype, enum fa_variant variant) \
    { \
        static const struct fa_cuda_kernel kernels[2][FA_VARIANTS] = { \
            { FA_SM90_FORWARD_KERNEL(FA_FLOAT16, D, FA_PLAIN), FA_SM90_FORWARD_KERNEL(FA_FLOAT16, D, FA_SCORE_MOD), \
              FA_SM90_FORWARD_KERNEL(FA_FLOAT16, D, FA_DROPOUT) }, \
            { FA_SM90_FORWARD_KERNEL(FA_BFLOAT16, D, FA_PLAIN), FA_SM90_FORWARD_KERNEL(FA_BFLOAT16, D, FA_SCORE_MOD), \
              FA_SM90_FORWARD_KERNEL(FA_BFLOAT16, D, FA_DROPOUT) } }; \
        return &kernels[dtype == FA_BFLOAT16][variant]; \
    }

#endif
