/* cuda/sm90/instance.cuh: FA_SM90_FORWARD(bf16, FA_BFLOAT16, 64) compiles the forward kernels of a type and head-dim bucket, all
 * variants, and defines the function by which forward.c finds them: fa_sm90_forward_bf16_64(variant, size). */
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

template <enum fa_dtype T, int D> constexpr fa_cuda_kernel plain_dropout_facts()
{
    if constexpr (sm90_forward_has_plain_dropout<D>) return forward_facts<T, D, FA_PLAIN_DROPOUT>();
    else return forward_facts<T, D, FA_DROPOUT>();
}

#define FA_SM90_FORWARD(type, T, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_forward_##type##_##D(enum fa_variant variant, enum fa_sm90_size size) \
    { \
        static const struct fa_cuda_kernel kernels[] = { \
            forward_facts<T, D, FA_PLAIN>(), forward_facts<T, D, FA_SCORE_MOD>(), forward_facts<T, D, FA_DROPOUT>(), plain_dropout_facts<T, D>() }; \
        static const struct fa_cuda_kernel brief = forward_facts<T, D, FA_PLAIN, typename sm90_forward_brief<D>::tile>(); \
        static const struct fa_cuda_kernel small = forward_facts<T, D, FA_PLAIN, typename sm90_forward_small<D>::tile>(); \
        return size == FA_SM90_SMALL ? &small : size == FA_SM90_BRIEF ? &brief : &kernels[variant]; \
    }

#endif
