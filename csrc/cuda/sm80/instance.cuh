/* cuda/sm80/instance.cuh: FA_SM80_INSTANCES(forward, 64) compiles the kernels of one pass and head-dim bucket, both types and all
 * variants, and defines the function by which launch.c finds them: fa_sm80_forward_64(dtype, variant, small). A small tile is
 * compiled where it takes less shared memory than the default one; elsewhere `small` finds the default. */
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
    FA_SM80_KERNEL(pass, T, D, FA_DROPOUT, SMALL) }

#define FA_SM80_INSTANCES(pass, D) \
    extern "C" const struct fa_cuda_kernel *fa_sm80_##pass##_##D(enum fa_dtype dtype, enum fa_variant variant, bool small) \
    { \
        static const struct fa_cuda_kernel kernels[2][2][FA_VARIANTS] = { \
            { FA_SM80_VARIANTS(pass, FA_FLOAT16, D, false), FA_SM80_VARIANTS(pass, FA_BFLOAT16, D, false) }, \
            { FA_SM80_VARIANTS(pass, FA_FLOAT16, D, true), FA_SM80_VARIANTS(pass, FA_BFLOAT16, D, true) } }; \
        return &kernels[small][dtype == FA_BFLOAT16][variant]; \
    }

#endif
