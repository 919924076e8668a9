/* cuda/sm90/kernels.h: where the host code of the Hopper kernels finds what it launches. Plain C. */
#ifndef FA_SM90_KERNELS_H
#define FA_SM90_KERNELS_H

#include "../launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One type and head-dim bucket of the forward pass; BRIEF: the plain kernel for short sequences, SMALL: for few queries too. */
enum fa_sm90_size { FA_SM90_USUAL, FA_SM90_BRIEF, FA_SM90_SMALL };
typedef const struct fa_cuda_kernel *fa_sm90_find(enum fa_variant variant, enum fa_sm90_size size);

fa_sm90_find fa_sm90_forward_fp16_64, fa_sm90_forward_fp16_96, fa_sm90_forward_fp16_128, fa_sm90_forward_fp16_192,
             fa_sm90_forward_fp16_256;
fa_sm90_find fa_sm90_forward_bf16_64, fa_sm90_forward_bf16_96, fa_sm90_forward_bf16_128, fa_sm90_forward_bf16_192,
             fa_sm90_forward_bf16_256;

/* The kernels of a bucket for attn_bias and attn_mask. */
fa_cuda_helper fa_sm90_added_64, fa_sm90_added_128, fa_sm90_added_backward_64, fa_sm90_added_backward_128;
fa_cuda_helper fa_sm90_bias_gradient_64, fa_sm90_bias_gradient_128;

/* The backward kernels of a bucket, with and without modified scores and dropout. */
typedef const struct fa_cuda_kernel *fa_sm90_find_backward(enum fa_dtype dtype, bool score_mod, bool dropout);

fa_sm90_find_backward fa_sm90_backward_64, fa_sm90_backward_96, fa_sm90_backward_128, fa_sm90_backward_192, fa_sm90_backward_256;

/* attn_bias or attn_mask: kernels of their own, and the bias for TMA: keys are its channels; an index of stride 0 has one row. */
static inline bool fa_sm90_is_added(const struct fa_params *p) { return p->bias.ptr || p->mask.ptr; }
static inline struct fa_tensor fa_sm90_bias_rows(const struct fa_params *p)
{
    return (struct fa_tensor){ .ptr = p->bias.ptr, .stride_b = p->bias.stride_b, .stride_s = p->bias.stride_q, .stride_h = p->bias.stride_h };
}

/* forward.c */
const struct fa_cuda_kernel *fa_sm90_forward_kernel(const struct fa_params *p);
int64_t fa_sm90_forward_workspace(const struct fa_params *p);
enum fa_status fa_sm90_forward(const struct fa_params *p, struct fa_error *error);

/* backward.c */
const struct fa_cuda_kernel *fa_sm90_backward_kernel(const struct fa_params *p);
int64_t fa_sm90_backward_workspace(const struct fa_params *p);
enum fa_status fa_sm90_backward(const struct fa_params *p, struct fa_error *error);

#ifdef __cplusplus
}
#endif
#endif
