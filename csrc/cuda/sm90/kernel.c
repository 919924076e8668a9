/* cuda/sm90/kernel.c: the row of the kernel table for Hopper: which calls its kernels take; the others go to sm80. */
#include "../device.h"
#include "kernels.h"

enum { HOPPER = 90, SPLIT_KEYS = 1024, SPLIT_SHARE = 3 };

/* TMA reads rows that start at multiples of 16 bytes and lie apart. */
static bool is_readable(const struct fa_params *p, const struct fa_tensor *t, int64_t heads, int64_t rows, int64_t batch)
{
    const int64_t chunk = 16 / (int64_t)fa_sizeof(p->dtype);
    return (uintptr_t)t->ptr % 16 == 0
        && (rows <= 1  || (t->stride_s > 0 && t->stride_s % chunk == 0))
        && (heads <= 1 || (t->stride_h > 0 && t->stride_h % chunk == 0))
        && (batch <= 1 || (t->stride_b > 0 && t->stride_b % chunk == 0));
}

/* Long keys and so few tiles that most of the device would idle: sm80 lets several blocks share a tile's keys. */
static bool is_better_split(const struct fa_params *p, const struct fa_cuda_kernel *kernel, const struct fa_cuda_device *device)
{
    const int64_t block = kernel->block_m, tiles = p->b * p->h * ((p->sq + block - 1) / block);
    return p->sk >= SPLIT_KEYS && SPLIT_SHARE * tiles <= device->multiprocessors;
}

/* What keeps a call with attn_bias or attn_mask from the kernels for it, or NULL. */
static const char *added_problem(enum fa_pass pass, const struct fa_params *p)
{
    const struct fa_scores *t = &p->bias;
    const struct fa_tensor rows = fa_sm90_bias_rows(p);
    if (p->d > 128 || p->d_v > 128) return "serves attn_bias and attn_mask up to head dimension 128";
    if (fa_cuda_has_score_mod(p) || fa_cuda_variant(p) == FA_DROPOUT)
        return "serves attn_bias and attn_mask without softcap, ALiBi, scale <= 0 and dropout";
    if (pass == FA_BACKWARD && p->deterministic && p->mask.ptr) return "serves attn_mask where dq need not be deterministic";
    if (p->cu_q || p->cu_k || p->seqused_k) return "serves attn_bias and attn_mask without lengths";
    if (t->ptr && (t->dtype != p->dtype || t->stride_k != 1 || !is_readable(p, &rows, t->stride_h ? p->h : 1, p->sq, t->stride_b ? p->b : 1)))
        return "needs an attn_bias of q's dtype whose rows start at multiples of 16 bytes, a row for each query";
    return NULL;
}

/* What keeps a call from these kernels, or NULL. */
static const char *problem(enum fa_pass pass, const struct fa_params *p, const struct fa_cuda_device *device)
{
    const int64_t q_rows = p->cu_q ? p->total_q : p->sq, k_rows = p->cu_k ? p->total_k : p->sk;
    const int64_t q_batch = p->cu_q ? 1 : p->b, k_batch = p->cu_k ? 1 : p->b;
    if (device->capability != HOPPER) return "needs a GPU of compute capability 9.0";
    if (p->dtype != FA_FLOAT16 && p->dtype != FA_BFLOAT16) return "serves float16 and bfloat16";
    if (pass == FA_FORWARD && (p->d > 192 || p->d_v > 192) && fa_cuda_variant(p) == FA_DROPOUT && fa_cuda_has_score_mod(p))
        return "serves dropout beside softcap, ALiBi or a scale <= 0 up to head dimension 192";
    if (p->sq == 0 || k_rows == 0 || p->b == 0) return "has nothing to do for an empty tensor";
    if (!is_readable(p, &p->q, p->h, q_rows, q_batch) || !is_readable(p, &p->k, p->hk, k_rows, k_batch)
        || !is_readable(p, &p->v, p->hk, k_rows, k_batch))
        return "needs rows of q, k and v that start at multiples of 16 bytes, none of them expanded";
    if (pass == FA_BACKWARD && !is_readable(p, &p->dout, p->h, q_rows, q_batch))
        return "needs rows of dout that start at multiples of 16 bytes, none of them expanded";
    const struct fa_cuda_kernel *kernel = pass == FA_FORWARD ? fa_sm90_forward_kernel(p) : fa_sm90_backward_kernel(p);
    if (fa_cuda_shared_limit(device) < kernel->shared_bytes)
        return "needs more shared memory than a block may take (FLASH_ATTN_SMEM_KB lowers it)";
    if (pass == FA_FORWARD && is_better_split(p, kernel, device)) return "has too few tiles to fill the device, and does not split keys";
    return fa_sm90_is_added(p) ? added_problem(pass, p) : NULL;
}

static bool supports(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    const struct fa_cuda_device *device = fa_cuda_device(p->device_index, why);
    if (!device || fa_cuda_check_sizes(p, why)) return false;
    const char *reason = problem(pass, p, device);
    if (reason) fa_fail(why, FA_UNSUPPORTED, "%s", reason);
    return !reason;
}

static int64_t workspace(enum fa_pass pass, const struct fa_params *p)
{
    return pass == FA_FORWARD ? fa_sm90_forward_workspace(p) : fa_sm90_backward_workspace(p);
}

const struct fa_kernel fa_kernel_sm90 = { "sm90", supports, workspace, fa_sm90_forward, fa_sm90_backward };
