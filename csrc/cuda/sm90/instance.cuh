/* cuda/sm90/instance.cuh: FA_SM90_FORWARD(bf16, FA_BFLOAT16, 64) compiles the forward kernels of a type and head-dim bucket, all
 * variants, and defines the function by which forward.c finds them: fa_sm90_forward_bf16_64(variant). */
#ifndef FA_SM90_INSTANCE_CUH
#define FA_SM90_INSTANCE_CUH

#include "forward.cuh"
#include "kernels.h"

template <enum fa_dtype T, int D, enum fa_variant V> constexpr fa_cuda_kernel forward_facts()
{
    using shape = forward_shape<D, sm90_forward_tile<D, V>>;
    return { (const void *)forward_kernel<T, D, V, sm90_forward_tile<D, V>>, shape::THREADS, shape::SHARED_BYTES,
             shape::BLOCK_M, shape::BLOCK_N, 1 };
}

#define FA_SM90_FORWARD(type, T, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_forward_##type##_##D(enum fa_variant variant) \
    { \
        static const struct fa_cuda_kernel kernels[FA_VARIANTS] = { \
            forward_facts<T, D, FA_PLAIN>(), forward_facts<T, D, FA_SCORE_MOD>(), forward_facts<T, D, FA_DROPOUT>() }; \
        return &kernels[variant]; \
    }

#endif
