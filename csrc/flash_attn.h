/* flash_attn.h: the C interface of exact attention. One struct describes a call, for every backend.
 *
 *     s_ij  = scale * (q_i . k_j)                          then softcap * tanh(s / softcap)  if softcap > 0
 *     s_ij -= slope_h * |i + sk - sq - j|                  if alibi
 *     s_ij += bias_ij                                      if bias; -inf hides j from i
 *     j is visible to i  <=>  0 <= j < sk  and  i + sk - sq - left <= j <= i + sk - sq + right  and  mask_ij
 *     lse_i = log sum_{visible j} exp(s_ij)                o_i = sum_{visible j} Z_ij exp(s_ij - lse_i) v_j
 *
 * A row with no visible key has o = 0, lse = -inf and zero gradients. Z is the dropout mask of common/philox.h.
 * The definition in code is common/reference.c. No Python, torch or CUDA types appear here; the core never
 * prints, never exits, keeps no state, and allocates nothing: scratch comes in through `workspace`. */
#ifndef FLASH_ATTN_H
#define FLASH_ATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fa_pass   { FA_FORWARD, FA_BACKWARD };
enum fa_device { FA_CPU, FA_CUDA };
enum fa_dtype  { FA_FLOAT32, FA_FLOAT16, FA_BFLOAT16, FA_FLOAT64 };
enum fa_status {
    FA_OK,
    FA_INVALID,         /* an argument has a value that no kernel could serve */
    FA_UNSUPPORTED,     /* a legal call for which this build or machine has no kernel; the message says the way out */
    FA_FAILED,          /* the device reported an error; the message carries the call and its text */
};

struct fa_error { char text[512]; };

/* A tensor with indices (batch, position, head, channel); strides count elements, channels are contiguous.
 * Packed variable-length tensors (total, head, channel) have stride_b = 0: sequence b starts at row cu_seqlens[b].
 * lse and dlse have no channel. ptr = NULL: absent. */
struct fa_tensor { void *ptr; int64_t stride_b, stride_s, stride_h; };

/* A tensor over the scores, with indices (batch, head, query, key), for dense calls. Stride 0 along an index: the same for all of
 * it; where such a tensor is written, the sum over it. ptr = NULL: absent. */
struct fa_scores { void *ptr; enum fa_dtype dtype; int64_t stride_b, stride_h, stride_q, stride_k; };

struct fa_params {
    enum fa_device device;
    enum fa_dtype  dtype;                       /* of q, k, v, out and their gradients */
    int64_t b, h, hk;                           /* sequences, query heads, key/value heads: h % hk == 0 */
    int64_t sq, sk;                             /* rows of q and k; packed: the longest sequence's */
    int64_t d, d_v;                             /* channels of q, k and of v, out */
    int64_t total_q, total_k;                   /* packed: rows of the whole tensors */

    struct fa_tensor q, k, v, out;              /* (b, sq, h, d) (b, sk, hk, d) (b, sk, hk, d_v) (b, sq, h, d_v) */
    struct fa_tensor lse;                       /* (b, h, sq) or (h, total_q), fp32 (fp64 for FA_FLOAT64) */
    struct fa_tensor dout, dlse, dq, dk, dv;    /* backward; dlse is optional */
    void *s_dmask;                              /* (b, h, dmask_sq, dmask_sk), dtype: exp(s - rowmax), negative = dropped */
    int64_t dmask_sq, dmask_sk;

    const int32_t *cu_q, *cu_k;                 /* (b + 1,) offsets of packed sequences, or NULL */
    const int32_t *seqused_k;                   /* (b,) keys in use, replaces sk of each sequence, or NULL */

    double  scale, softcap;
    int64_t window_left, window_right;          /* inclusive bounds, negative = unlimited; causal is right = 0 */
    const float *alibi;                         /* slopes (h,) or (b, h) */
    int64_t alibi_stride_b;                     /* 0 for (h,) */
    struct fa_scores bias, dbias;               /* any float dtype, the same for both; dbias is optional */
    struct fa_scores mask;                      /* one byte an element, its dtype ignored: not 0 = visible */
    double  dropout_p;
    const int64_t *rng;                         /* (2,) seed and offset, on the data's device */

    bool    deterministic;                      /* dq bit-reproducible too */
    bool    debug;                              /* check device values, at the cost of a sync */
    int64_t n_threads;                          /* CPU */
    int64_t device_index;                       /* CUDA */
    void   *stream;
    void   *workspace;                          /* 64-byte aligned, at least as large as fa_workspace says */
    int64_t workspace_bytes;
};

/* Scratch bytes that the kernel chosen for this call wants. Validates like the call itself. */
enum fa_status fa_workspace(enum fa_pass pass, const struct fa_params *p, int64_t *bytes, struct fa_error *error);

enum fa_status fa_forward(const struct fa_params *p, struct fa_error *error);
enum fa_status fa_backward(const struct fa_params *p, struct fa_error *error);

/* Name of the kernel that would run, into `name`; refusals on the way there, one a line, into `why`. */
enum fa_status fa_choose(enum fa_pass pass, const struct fa_params *p, const char **name, struct fa_error *why);

/* The machine and the kernel table, as text; returns the length it needs. */
size_t fa_info(char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
