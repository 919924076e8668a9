/* cuda/sm80/instance.cuh: FA_SM80_INSTANCES(forward, bf16, FA_BFLOAT16, 64) compiles the kernels of one pass, type and head-dim
 * bucket in all variants, and defines fa_sm80_forward_bf16_64(variant, small), which finds them; FA_SM80_FIND(forward, 64) defines
 * what launch.c calls, fa_sm80_forward_64(dtype, variant, small). One type a file: two take a compiler more than ten seconds. A
 * small tile is compiled where it takes less shared memory than the default one; elsewhere `small` finds the default. */
#ifndef FA_SM80_INSTANCE_CUH
#define FA_SM80_INSTANCE_CUH

#include "../args.h"

template <bool FIRST, class A, class B> struct select_tile { using type = A; };
template <class A, class B> struct select_tile<false, A, B> { using type = B; };

/* The small tile where it is one, else the default, which is not compiled twice. */
#define FA_SM80_TILE(pass, D, VARIANT, SMALL) select_tile< \
    SMALL && (pass<FA_FLOAT16, D, VARIANT, pass##_tile<D, VARIANT, true>>::SHARED_BYTES \
              < pass<FA_FLOAT16, D, VARIANT, pass##_tile<D, VARIANT, false>>::SHARED_BYTES), \
    pass##_tile<D, VARIANT, true>, pass##_tile<D, VARIANT, false>>::type

template <class Tile, class Block> struct kernel_facts {
    static constexpr fa_cuda_kernel with(const void *function)
    {
        return { function, Block::THREADS, Block::SHARED_BYTES, Tile::BLOCK_M, Tile::BLOCK_N, Tile::BLOCKS, Block::BIAS_BYTES };
    }
};

#define FA_SM80_KERNEL(pass, T, D, VARIANT, SMALL) \
    kernel_facts<FA_SM80_TILE(pass, D, VARIANT, SMALL), pass<T, D, VARIANT, FA_SM80_TILE(pass, D, VARIANT, SMALL)>>::with( \
        (const void *)pass##_kernel<T, D, VARIANT, FA_SM80_TILE(pass, D, VARIANT, SMALL)>)

#define FA_SM80_VARIANTS(pass, T, D, SMALL) { \
    FA_SM80_KERNEL(pass, T, D, FA_PLAIN, SMALL), \
    FA_SM80_KERNEL(pass, T, D, FA_SCORE_MOD, SMALL), \
    FA_SM80_KERNEL(pass, T, D, FA_DROPOUT, SMALL), \
    FA_SM80_KERNEL(pass, T, D, FA_PLAIN_DROPOUT, SMALL) }

#define FA_SM80_INSTANCES(pass, type, T, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm80_##pass##_##type##_##D(enum fa_variant variant, bool small) \
    { \
        static const struct fa_cuda_kernel kernels[2][FA_SM80_VARIANTS] = { \
            FA_SM80_VARIANTS(pass, T, D, false), FA_SM80_VARIANTS(pass, T, D, true) }; \
        return &kernels[small][variant]; \
    }

#define FA_SM80_FIND(pass, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm80_##pass##_bf16_##D(enum fa_variant variant, bool small); \
    extern "C" const struct fa_cuda_kernel *fa_sm80_##pass##_##D(enum fa_dtype dtype, enum fa_variant variant, bool small) \
    { \
        return dtype == FA_BFLOAT16 ? fa_sm80_##pass##_bf16_##D(variant, small) : fa_sm80_##pass##_fp16_##D(variant, small); \
    }

#endif
