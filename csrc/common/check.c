/* common/check.c: the only validation in the core: what passes here, every kernel may rely on.
 *
 * One rule, one message: the argument by the name its caller knows, its value, what is expected, the way out.
 * What a kernel cannot do (a head dimension, a type) is not judged here but by its own supports(). Values in
 * device memory are read on the CPU only; CUDA kernels clamp them instead. */
#include <math.h>

#include "internal.h"

/* Below these bounds no 64-bit offset can overflow anywhere; real tensors are smaller still. */
#define LARGEST_SIZE   ((int64_t)1 << 40)
#define LARGEST_EXTENT 0x1p56

#define REFUSE(...) return fa_fail(error, FA_INVALID, __VA_ARGS__)
#define LONG(value) ((long long)(value))

static enum fa_status check_kind(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    if (pass != FA_FORWARD && pass != FA_BACKWARD)
        REFUSE("pass must be FA_FORWARD (0) or FA_BACKWARD (1), got %d", (int)pass);
    if (p->device != FA_CPU && p->device != FA_CUDA)
        REFUSE("device must be FA_CPU (0) or FA_CUDA (1), got %d", (int)p->device);
    if ((int)p->dtype < FA_FLOAT32 || (int)p->dtype > FA_FLOAT64)
        REFUSE("dtype must be float32, float16, bfloat16 or float64 (0 to 3), got %d", (int)p->dtype);
    return FA_OK;
}

static enum fa_status check_sizes(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    const struct { const char *name; int64_t value, least; } sizes[] = {
        { "the batch size", p->b, 0 },             { "the number of query heads", p->h, 1 },
        { "the number of key heads", p->hk, 1 },   { "the head dimension of q and k", p->d, 1 },
        { "the head dimension of v", p->d_v, 1 },  { "the (longest) query length", p->sq, 0 },
        { "the (longest) key length", p->sk, 0 },  { "the total of query rows", p->total_q, 0 },
        { "the total of key rows", p->total_k, 0 },
        { "the number of threads", p->n_threads, 0 },
    };
    (void)pass;
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        if (sizes[n].value < sizes[n].least || sizes[n].value > LARGEST_SIZE)
            REFUSE("%s must lie between %lld and 2^40, got %lld",
                   sizes[n].name, LONG(sizes[n].least), LONG(sizes[n].value));
    if (p->h % p->hk != 0)
        REFUSE("the number of query heads must be a multiple of the number of key heads, got %lld and %lld; "
               "repeat or drop key heads", LONG(p->h), LONG(p->hk));
    if ((double)p->b * (double)p->h > INT32_MAX)
        REFUSE("batch size x query heads must be below 2^31, got %lld x %lld; split the batch",
               LONG(p->b), LONG(p->h));
    return FA_OK;
}

static enum fa_status check_scalars(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    (void)pass;
    if (!isfinite(p->scale)) REFUSE("softmax_scale must be finite, got %g", p->scale);
    if (!isfinite(p->softcap) || p->softcap < 0)
        REFUSE("softcap must be finite and not negative, got %g; 0 switches it off", p->softcap);
    if (!(p->dropout_p >= 0 && p->dropout_p < 1))
        REFUSE("dropout_p must lie in [0, 1), got %g", p->dropout_p);
    if (p->dropout_p > 0 && !p->rng)
        REFUSE("dropout_p = %g needs rng_state, an int64 tensor (seed, offset)", p->dropout_p);
    if (p->window_left > LARGEST_SIZE || p->window_right > LARGEST_SIZE)
        REFUSE("window_size must not exceed 2^40, got (%lld, %lld); -1 means unlimited",
               LONG(p->window_left), LONG(p->window_right));
    if (fabs((double)p->alibi_stride_b) > (double)LARGEST_SIZE)
        REFUSE("the batch stride of alibi_slopes must not exceed 2^40, got %lld", LONG(p->alibi_stride_b));
    return FA_OK;
}

/* What a pass does with a tensor. */
enum use { UNUSED, READ, READ_IF_GIVEN, WRITTEN };

struct operand {
    const char *name;
    const struct fa_tensor *tensor;
    int64_t batch, rows, heads, channels;
    size_t element;
    enum use use;
};

static enum fa_status check_layout(const struct operand *o, bool packed, struct fa_error *error)
{
    const struct fa_tensor *t = o->tensor;
    double reach = (double)(o->batch - 1) * fabs((double)t->stride_b) + (double)o->channels
                 + (double)(o->rows - 1) * fabs((double)t->stride_s)
                 + (double)(o->heads - 1) * fabs((double)t->stride_h);
    bool overlaps = (o->batch > 1 && t->stride_b == 0) || (o->rows > 1 && t->stride_s == 0)
                 || (o->heads > 1 && t->stride_h == 0);
    if (packed && t->stride_b != 0)
        REFUSE("%s is packed by cu_seqlens, so its batch stride must be 0, got %lld",
               o->name, LONG(t->stride_b));
    if (reach > LARGEST_EXTENT)
        REFUSE("%s must reach no further than 2^56 elements, got strides (%lld, %lld, %lld)",
               o->name, LONG(t->stride_b), LONG(t->stride_s), LONG(t->stride_h));
    if (o->use == WRITTEN && overlaps)
        REFUSE("%s is written, so its elements must not overlap, got strides (%lld, %lld, %lld); "
               "pass a tensor that was not expanded",
               o->name, LONG(t->stride_b), LONG(t->stride_s), LONG(t->stride_h));
    return FA_OK;
}

static enum fa_status check_operand(const struct operand *o, bool packed, struct fa_error *error)
{
    if (o->use == UNUSED || (o->use == READ_IF_GIVEN && !o->tensor->ptr)) return FA_OK;
    double in_batch = (double)o->rows * (double)o->heads * (double)o->channels;
    double elements = (double)o->batch * in_batch;
    if (in_batch > LARGEST_EXTENT || elements > LARGEST_EXTENT)
        REFUSE("%s must have at most 2^56 elements, got (%lld, %lld, %lld, %lld)",
               o->name, LONG(o->batch), LONG(o->rows), LONG(o->heads), LONG(o->channels));
    if (elements == 0) return FA_OK;        /* torch gives an empty tensor a null pointer */
    if (!o->tensor->ptr) REFUSE("%s is required, got none", o->name);
    if ((uintptr_t)o->tensor->ptr % o->element)
        REFUSE("%s must be aligned to its element size of %d bytes, got address %p",
               o->name, (int)o->element, o->tensor->ptr);
    return check_layout(o, packed, error);
}

static enum fa_status check_tensors(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    const bool forward = pass == FA_FORWARD;
    const enum use given = forward ? UNUSED : READ, result = forward ? WRITTEN : READ;
    const enum use optional = forward ? UNUSED : READ_IF_GIVEN, gradient = forward ? UNUSED : WRITTEN;
    const int64_t bq = p->cu_q ? 1 : p->b, sq = p->cu_q ? p->total_q : p->sq;
    const int64_t bk = p->cu_k ? 1 : p->b, sk = p->cu_k ? p->total_k : p->sk;
    const size_t data = fa_sizeof(p->dtype), lse = fa_sizeof(fa_lse_dtype(p->dtype));
    const struct operand queries[] = {
        { "q",    &p->q,    bq, sq, p->h,  p->d,   data, READ },
        { "out",  &p->out,  bq, sq, p->h,  p->d_v, data, result },
        { "lse",  &p->lse,  bq, sq, p->h,  1,      lse,  result },
        { "dout", &p->dout, bq, sq, p->h,  p->d_v, data, given },
        { "dlse", &p->dlse, bq, sq, p->h,  1,      lse,  optional },
        { "dq",   &p->dq,   bq, sq, p->h,  p->d,   data, gradient },
    };
    const struct operand keys[] = {
        { "k",    &p->k,    bk, sk, p->hk, p->d,   data, READ },
        { "v",    &p->v,    bk, sk, p->hk, p->d_v, data, READ },
        { "dk",   &p->dk,   bk, sk, p->hk, p->d,   data, gradient },
        { "dv",   &p->dv,   bk, sk, p->hk, p->d_v, data, gradient },
    };
    enum fa_status status = FA_OK;
    for (size_t n = 0; !status && n < sizeof queries / sizeof *queries; n++)
        status = check_operand(&queries[n], p->cu_q != NULL, error);
    for (size_t n = 0; !status && n < sizeof keys / sizeof *keys; n++)
        status = check_operand(&keys[n], p->cu_k != NULL, error);
    return status;
}

/* A tensor over the scores. Where it has stride 0 it is shared, also when written. */
static enum fa_status check_score_tensor(const char *name, const struct fa_scores *t, size_t element,
                                         const struct fa_params *p, struct fa_error *error)
{
    double reach = (double)(p->b - 1) * fabs((double)t->stride_b) + (double)(p->h - 1) * fabs((double)t->stride_h)
                 + (double)(p->sq - 1) * fabs((double)t->stride_q) + (double)(p->sk - 1) * fabs((double)t->stride_k);
    if (!t->ptr) return FA_OK;
    if (p->cu_q || p->cu_k)
        REFUSE("%s is not supported with packed sequences; pad them, and hide the padding by seqused_k or a mask", name);
    if ((uintptr_t)t->ptr % element)
        REFUSE("%s must be aligned to its element size of %d bytes, got address %p", name, (int)element, t->ptr);
    if (reach > LARGEST_EXTENT)
        REFUSE("%s must reach no further than 2^56 elements, got strides (%lld, %lld, %lld, %lld)", name,
               LONG(t->stride_b), LONG(t->stride_h), LONG(t->stride_q), LONG(t->stride_k));
    return FA_OK;
}

static enum fa_status check_scores(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    enum fa_status status = check_score_tensor("attn_mask", &p->mask, 1, p, error);
    if (status || (!p->bias.ptr && !p->dbias.ptr)) return status;
    if ((int)p->bias.dtype < FA_FLOAT32 || (int)p->bias.dtype > FA_FLOAT64)
        REFUSE("the dtype of attn_bias must be float32, float16, bfloat16 or float64 (0 to 3), got %d",
               (int)p->bias.dtype);
    status = check_score_tensor("attn_bias", &p->bias, fa_sizeof(p->bias.dtype), p, error);
    if (status || pass == FA_FORWARD || !p->dbias.ptr) return status;
    if (!p->bias.ptr) REFUSE("the gradient of attn_bias needs attn_bias, got none");
    if (p->dbias.dtype != p->bias.dtype)
        REFUSE("the gradient of attn_bias must have its dtype (%d), got %d", (int)p->bias.dtype,
               (int)p->dbias.dtype);
    return check_score_tensor("the gradient of attn_bias", &p->dbias, fa_sizeof(p->bias.dtype), p, error);
}

static enum fa_status check_dmask(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    if (pass != FA_FORWARD || !p->s_dmask) return FA_OK;
    const int64_t rows = p->dmask_sq, columns = p->dmask_sk;
    if (rows < p->sq || columns < p->sk || rows > LARGEST_SIZE || columns > LARGEST_SIZE)
        REFUSE("s_dmask must hold at least (%lld, %lld) scores a head, got (%lld, %lld)",
               LONG(p->sq), LONG(p->sk), LONG(rows), LONG(columns));
    if ((double)p->b * (double)p->h * (double)rows * (double)columns > LARGEST_EXTENT)
        REFUSE("s_dmask must have at most 2^56 elements, got (%lld, %lld, %lld, %lld)",
               LONG(p->b), LONG(p->h), LONG(rows), LONG(columns));
    return FA_OK;
}

/* `side` is q or k; `total` the rows of the packed tensor. */
static enum fa_status check_offsets(char side, const int32_t *offsets, int64_t b, int64_t total,
                                    struct fa_error *error)
{
    if (offsets[0] != 0) REFUSE("cu_seqlens_%c[0] must be 0, got %d", side, (int)offsets[0]);
    for (int64_t n = 0; n < b; n++)
        if (offsets[n + 1] < offsets[n])
            REFUSE("cu_seqlens_%c must not decrease, got cu_seqlens_%c[%lld] = %d after %d; it holds the "
                   "cumulative sum of the lengths, from 0",
                   side, side, LONG(n + 1), (int)offsets[n + 1], (int)offsets[n]);
    if (offsets[b] > total)
        REFUSE("cu_seqlens_%c must end within the %lld rows of the packed tensor, got cu_seqlens_%c[-1] = %d",
               side, LONG(total), side, (int)offsets[b]);
    return FA_OK;
}

/* The lengths that the kernels will see: offsets are known to be good by now. */
static enum fa_status check_lengths(const struct fa_params *p, int64_t b, struct fa_error *error)
{
    int64_t stored = p->cu_k ? (int64_t)p->cu_k[b + 1] - p->cu_k[b] : p->sk;
    if (p->seqused_k && (p->seqused_k[b] < 0 || p->seqused_k[b] > stored))
        REFUSE("seqused_k[%lld] must lie between 0 and the sequence's own length %lld, got %d",
               LONG(b), LONG(stored), (int)p->seqused_k[b]);
    struct fa_sequence s = fa_sequence_of(p, b);
    if (s.sq > p->sq)
        REFUSE("max_seqlen_q must be at least the longest sequence's length, got %lld, but sequence %lld has "
               "%lld queries", LONG(p->sq), LONG(b), LONG(s.sq));
    if (s.sk > p->sk)
        REFUSE("max_seqlen_k must be at least the longest sequence's length, got %lld, but sequence %lld has "
               "%lld keys", LONG(p->sk), LONG(b), LONG(s.sk));
    return FA_OK;
}

enum fa_status fa_check_sequences(const struct fa_params *p, struct fa_error *error)
{
    enum fa_status status = FA_OK;
    if (p->cu_q) status = check_offsets('q', p->cu_q, p->b, p->total_q, error);
    if (p->cu_k && !status) status = check_offsets('k', p->cu_k, p->b, p->total_k, error);
    bool own_lengths = p->cu_q || p->cu_k || p->seqused_k;
    for (int64_t b = 0; own_lengths && !status && b < p->b; b++) status = check_lengths(p, b, error);
    return status;
}

static enum fa_status check_host_sequences(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    (void)pass;
    return p->device == FA_CPU ? fa_check_sequences(p, error) : FA_OK;
}

enum fa_status fa_check(enum fa_pass pass, const struct fa_params *p, struct fa_error *error)
{
    static enum fa_status (*const rules[])(enum fa_pass, const struct fa_params *, struct fa_error *) = {
        check_kind, check_sizes, check_scalars, check_tensors, check_scores, check_dmask, check_host_sequences,
    };
    enum fa_status status = FA_OK;
    for (size_t n = 0; !status && n < sizeof rules / sizeof *rules; n++) status = rules[n](pass, p, error);
    return status;
}
