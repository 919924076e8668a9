/* cuda/sm90/instance.cuh: FA_SM90_FORWARD(bf16, FA_BFLOAT16, 64) compiles the forward kernels of a type and head-dim bucket, all
 * variants, and defines the function by which forward.c finds them: fa_sm90_forward_bf16_64(variant, brief). */
#ifndef FA_SM90_INSTANCE_CUH
#define FA_SM90_INSTANCE_CUH

#include "forward.cuh"
#include "kernels.h"

template <enum fa_dtype T, int D, enum fa_variant V, class Tile = sm90_forward_tile<D, V>> constexpr fa_cuda_kernel forward_facts()
{
    using shape = forward_shape<D, Tile>;
    return { (const void *)forward_kernel<T, D, V, Tile>, shape::THREADS, shape::SHARED_BYTES,
             shape::BLOCK_M, shape::BLOCK_N, Tile::BLOCKS };
}

#define FA_SM90_FORWARD(type, T, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_forward_##type##_##D(enum fa_variant variant, bool brief) \
    { \
        static const struct fa_cuda_kernel kernels[FA_VARIANTS] = { \
            forward_facts<T, D, FA_PLAIN>(), forward_facts<T, D, FA_SCORE_MOD>(), forward_facts<T, D, FA_DROPOUT>() }; \
        static const struct fa_cuda_kernel smaller = forward_facts<T, D, FA_PLAIN, typename sm90_forward_brief<D>::tile>(); \
        return brief ? &smaller : &kernels[variant]; \
    }

#endif
