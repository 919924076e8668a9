/* cuda/sm90/backward_instance.cuh: FA_SM90_BACKWARD(64) compiles the backward kernels of a head-dim bucket, both types and all
 * variants, and defines the function by which backward.c finds them: fa_sm90_backward_64(dtype, variant). */
#ifndef FA_SM90_BACKWARD_INSTANCE_CUH
#define FA_SM90_BACKWARD_INSTANCE_CUH

#include "backward.cuh"

template <enum fa_dtype T, int D, enum fa_variant V> constexpr fa_cuda_kernel sm90_backward_facts()
{
    using kernel = sm90_backward<T, D, V, sm90_backward_tile<D>>;
    return { (const void *)sm90_backward_kernel<T, D, V, sm90_backward_tile<D>>, kernel::THREADS, kernel::Shared::BYTES,
             kernel::BLOCK_M, kernel::BLOCK_N, 1 };
}

#define FA_SM90_BACKWARD_VARIANTS(T, D) { \
    sm90_backward_facts<T, D, FA_PLAIN>(), sm90_backward_facts<T, D, FA_SCORE_MOD>(), sm90_backward_facts<T, D, FA_DROPOUT>() }

#define FA_SM90_BACKWARD(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_backward_##D(enum fa_dtype dtype, enum fa_variant variant) \
    { \
        static const struct fa_cuda_kernel kernels[2][FA_VARIANTS] = { \
            FA_SM90_BACKWARD_VARIANTS(FA_FLOAT16, D), FA_SM90_BACKWARD_VARIANTS(FA_BFLOAT16, D) }; \
        return &kernels[dtype == FA_BFLOAT16][variant]; \
    }

#endif
