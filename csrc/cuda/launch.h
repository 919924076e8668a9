/* cuda/launch.h: where launch.c finds the compiled kernels. Plain C. All take one struct fa_cuda_args.
 *
 * Helper kernels serve fp32, fp16 and bf16, and work on block_m rows of one head a block, whatever the head dimension:
 *
 *     fill       rows that belong to no sequence: 0, lse -inf          grid: see fill.cu
 *     pack       attn_mask as bits, and                               grid: enough for a word a thread, or fewer
 *     narrow     a float64 attn_bias as fp32                          grid: as pack
 *     flags      bits of its tiles, see mask.cuh                      grid: words of flags / block_m
 *     combine    out and lse from the partial results of key splits    grid: b h ceil(sq / block_m)
 *     dmask      s_dmask                                               grid: b h ceil(dmask_sq / block_m)
 *     prepare    lse2 and delta; dq_accum and turns become 0           grid: b h ceil(padded sq / block_m)
 *     convert    dq from dq_accum                                      grid: b h ceil(sq / block_m) */
#ifndef FA_CUDA_LAUNCH_H
#define FA_CUDA_LAUNCH_H

#include "args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef const struct fa_cuda_kernel *fa_cuda_helper(enum fa_dtype dtype);

fa_cuda_helper fa_cuda_fill_forward, fa_cuda_fill_backward, fa_cuda_combine, fa_cuda_dmask, fa_cuda_prepare, fa_cuda_convert,
               fa_cuda_pack, fa_cuda_flags, fa_cuda_narrow;

/* The gradient of attn_bias, for every head dim, and the sum of its parts: see sm80/bias_gradient.cuh. */
fa_cuda_helper fa_sm80_bias_gradient, fa_sm80_fp32_bias_gradient, fa_sm80_bias_parts;

/* One head-dim bucket of a pass; `small` finds the tile for devices with little shared memory. */
typedef const struct fa_cuda_kernel *fa_cuda_find(enum fa_dtype dtype, enum fa_variant variant, bool small);

fa_cuda_find fa_sm80_forward_32, fa_sm80_forward_64, fa_sm80_forward_96, fa_sm80_forward_128, fa_sm80_forward_192,
             fa_sm80_forward_256;
fa_cuda_find fa_sm80_backward_32, fa_sm80_backward_64, fa_sm80_backward_96, fa_sm80_backward_128, fa_sm80_backward_192,
             fa_sm80_backward_256;
fa_cuda_find fa_sm80_fp32_forward_64, fa_sm80_fp32_forward_128, fa_sm80_fp32_forward_256;
fa_cuda_find fa_sm80_fp32_backward_64, fa_sm80_fp32_backward_128, fa_sm80_fp32_backward_256;

#ifdef __cplusplus
}
#endif
#endif
