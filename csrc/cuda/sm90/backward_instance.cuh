/* cuda/sm90/backward_instance.cuh: FA_SM90_BACKWARD(64) compiles the backward kernels of a head-dim bucket, both types and all
 * variants, and defines the function by which backward.c finds them: fa_sm90_backward_64(dtype, score_mod, dropout). */
#ifndef FA_SM90_BACKWARD_INSTANCE_CUH
#define FA_SM90_BACKWARD_INSTANCE_CUH

#include "backward.cuh"

template <enum fa_dtype T, int D, bool MODS, bool DROPOUT> constexpr fa_cuda_kernel sm90_backward_facts()
{
    using Tile = sm90_backward_tile<D, !MODS && !DROPOUT>;
    using kernel = sm90_backward<T, D, MODS, DROPOUT, Tile>;
    return { (const void *)sm90_backward_kernel<T, D, MODS, DROPOUT, Tile>, kernel::THREADS, kernel::Shared::BYTES,
             kernel::BLOCK_M, kernel::BLOCK_N, kernel::TAKES_TICKETS, 0 };
}

#define FA_SM90_BACKWARD_VARIANTS(T, D) { \
    { sm90_backward_facts<T, D, false, false>(), sm90_backward_facts<T, D, false, true>() }, \
    { sm90_backward_facts<T, D, true, false>(), sm90_backward_facts<T, D, true, true>() } }

#define FA_SM90_BACKWARD(D) \
    extern "C" const struct fa_cuda_kernel *fa_sm90_backward_##D(enum fa_dtype dtype, bool score_mod, bool dropout) \
    { \
        static const struct fa_cuda_kernel kernels[2][2][2] = { \
            FA_SM90_BACKWARD_VARIANTS(FA_FLOAT16, D), FA_SM90_BACKWARD_VARIANTS(FA_BFLOAT16, D) }; \
        return &kernels[dtype == FA_BFLOAT16][score_mod][dropout]; \
    }

#endif
