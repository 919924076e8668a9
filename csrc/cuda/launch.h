/* cuda/launch.h: where launch.c finds the compiled kernels. Plain C. All take one struct fa_cuda_args.
 *
 * Helper kernels serve fp32, fp16 and bf16, and work on block_m rows of one head a block, whatever the head dimension:
 *
 *     fill       rows that belong to no sequence: 0, lse -inf          grid: see fill.cu
 *     pack       attn_mask as bits, and bits of its tiles, see mask.cuh     grid: block_m tiles a block
 *     narrow     a float64 attn_bias as fp32                          grid: enough for an element a thread, or fewer
 *     combine    out and lse from the partial results of key splits    grid: b h ceil(sq / block_m)
 *     dmask      s_dmask                                               grid: b h ceil(dmask_sq / block_m)
 *     prepare    lse2 and delta; dq_accum, turns, counters become 0    grid: b h ceil(padded sq / block_m)
 *     convert    dq from dq_accum                                      grid: b h ceil(sq / block_m) */
#ifndef FA_CUDA_LAUNCH_H
#define FA_CUDA_LAUNCH_H

#include "args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef const struct fa_cuda_kernel *fa_cuda_helper(enum fa_dtype dtype);

fa_cuda_helper fa_cuda_fill_forward, fa_cuda_fill_backward, fa_cuda_combine, fa_cuda_dmask, fa_cuda_prepare, fa_cuda_convert,
               fa_cuda_pack, fa_cuda_narrow;

/* The gradient of attn_bias, for every head dim, and the sum of its parts: see sm80/bias_gradient.cuh. */
fa_cuda_helper fa_sm80_bias_gradient, fa_sm80_fp32_bias_gradient, fa_sm80_bias_parts;

struct fa_cuda_device;

/* What the kernel families share: how a call becomes arguments, and how it is launched. None of it waits for the device. */
bool fa_cuda_has_score_mod(const struct fa_params *p);
enum fa_variant fa_cuda_variant(const struct fa_params *p);
struct fa_cuda_args fa_cuda_arguments(const struct fa_params *p);
int fa_cuda_shared_limit(const struct fa_cuda_device *device);
enum fa_status fa_cuda_check_sizes(const struct fa_params *p, struct fa_error *why);

/* One kernel over a grid of blocks x splits; a helper over `rows` rows of every head; a fill kernel. Nothing where blocks = 0. */
enum fa_status fa_cuda_launch(const char *name, const struct fa_cuda_kernel *kernel, int64_t blocks, int splits,
                              const void *args, void *stream, struct fa_error *error);
enum fa_status fa_cuda_launch_rows(const char *name, fa_cuda_helper *helper, int64_t rows, const struct fa_cuda_args *args,
                                   struct fa_error *error);
enum fa_status fa_cuda_launch_fill(fa_cuda_helper *helper, const struct fa_cuda_args *args, struct fa_error *error);

/* What a kernel with tiles of block_m x block_n reads in place of attn_mask: its pieces of the workspace, behind *bytes, which grows,
 * and the launch that fills them. m_tiles and n_tiles are known. Likewise for the gradient of attn_bias, if it is wanted. */
void fa_cuda_plan_mask(enum fa_pass pass, struct fa_cuda_args *a, int block_m, int block_n, int64_t *bytes);
void fa_cuda_plan_bias_gradient(struct fa_cuda_args *a, const struct fa_cuda_device *device, int64_t *bytes);
enum fa_status fa_cuda_launch_mask(const struct fa_cuda_args *a, struct fa_error *error);

/* The backward's pieces of the workspace, by the sizes and the d_bucket in `a`, behind *bytes, which grows; rows are padded to
 * row_pad, the kernel's query tile. Then its launches: prepare | the kernel, over `blocks` blocks and with `args` for its
 * parameter | convert, unless dq_is_made | bias gradient, if wanted | fill, if packed or seqused_k. `overlaps`: the kernel waits for
 * prepare itself, see overlap.cuh. */
void fa_cuda_plan_backward(struct fa_cuda_args *a, int row_pad, int64_t *bytes);
enum fa_status fa_cuda_run_backward(const struct fa_cuda_kernel *kernel, int64_t blocks, const void *args, bool overlaps,
                                    const struct fa_cuda_args *a, struct fa_error *error);

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
