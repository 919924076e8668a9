/* common/internal.h: what the parts of the core share: the kernel table, sequence geometry, error texts. */
#ifndef FA_INTERNAL_H
#define FA_INTERNAL_H

#include "../flash_attn.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Writes the message and returns `status`, so that a refusal is one statement. */
enum fa_status fa_fail(struct fa_error *error, enum fa_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* check.c: everything a kernel may rely on; the only validation in the core. */
enum fa_status fa_check(enum fa_pass pass, const struct fa_params *p, struct fa_error *error);

/* Its part about cu_seqlens and seqused_k, which must lie in host memory. */
enum fa_status fa_check_sequences(const struct fa_params *p, struct fa_error *error);

/* One row of dispatch.c's table. `supports` says why not, in words the user reads, through `why`. */
struct fa_kernel {
    const char *name;
    bool           (*supports)(enum fa_pass pass, const struct fa_params *p, struct fa_error *why);
    int64_t        (*workspace)(enum fa_pass pass, const struct fa_params *p);
    enum fa_status (*forward)(const struct fa_params *p, struct fa_error *error);
    enum fa_status (*backward)(const struct fa_params *p, struct fa_error *error);
};

extern const struct fa_kernel fa_kernel_reference, fa_kernel_cpu;
extern const struct fa_kernel fa_kernel_sm80;       /* with FA_WITH_CUDA */
extern const struct fa_kernel fa_kernel_sm90;       /* with FA_WITH_SM90: machine code for Hopper is asked for */

/* dispatch.c: whether the environment variable FLASH_ATTN_KERNEL asks for this kernel by a prefix of its name. */
bool fa_is_pinned(const char *name);

/* reference.c: fills p->s_dmask. Host memory only. */
void fa_reference_dmask(const struct fa_params *p);

/* The instruction set that the CPU kernels would use now, e.g. "avx512". */
const char *fa_cpu_isa(void);

/* CUDA's part of fa_info, with FA_WITH_CUDA: the build, the driver, the devices. */
size_t fa_cuda_info(char *text, size_t size);

/* One sequence of the batch: its first rows in the tensors and its own lengths. Host memory only. */
struct fa_sequence { int64_t q0, k0, sq, sk; };

static inline struct fa_sequence fa_sequence_of(const struct fa_params *p, int64_t b)
{
    struct fa_sequence s = { 0, 0, p->sq, p->sk };
    if (p->cu_q) { s.q0 = p->cu_q[b]; s.sq = p->cu_q[b + 1] - p->cu_q[b]; }
    if (p->cu_k) { s.k0 = p->cu_k[b]; s.sk = p->cu_k[b + 1] - p->cu_k[b]; }
    if (p->seqused_k) s.sk = p->seqused_k[b];
    return s;
}

/* Element offset of (b, row, head) in a tensor, where row counts from the sequence's first row `row0`. */
static inline int64_t fa_offset(const struct fa_tensor *t, int64_t b, int64_t row0, int64_t row, int64_t head)
{
    return b * t->stride_b + (row0 + row) * t->stride_s + head * t->stride_h;
}

/* Visible keys of query i: [first, last), empty where first >= last. */
struct fa_range { int64_t first, last; };

static inline struct fa_range fa_visible(const struct fa_params *p, int64_t sq, int64_t sk, int64_t i)
{
    struct fa_range keys = { 0, sk };
    int64_t diagonal = i + sk - sq;
    if (p->window_left  >= 0 && diagonal - p->window_left > 0) keys.first = diagonal - p->window_left;
    if (p->window_right >= 0 && diagonal + p->window_right + 1 < sk) keys.last = diagonal + p->window_right + 1;
    return keys;
}

static inline size_t fa_sizeof(enum fa_dtype dtype)
{
    return dtype == FA_FLOAT64 ? 8 : dtype == FA_FLOAT32 ? 4 : 2;
}

static inline enum fa_dtype fa_lse_dtype(enum fa_dtype dtype)
{
    return dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32;
}

/* fill.c: rows that belong to no sequence (beyond cu_seqlens, seqused_k) get 0, lse gets -inf. Host memory only. */
void fa_fill_outside(enum fa_pass pass, const struct fa_params *p);

#ifdef __cplusplus
}
#endif
#endif
