/* common/reference.c: exact attention as defined, in double: the meaning of every call, and what every kernel
 * is tested against. It also serves float64 tensors. Slow and obvious on purpose: one query row at a time, in
 * the order of the equations, any strides, nothing shared between rows but the sums over queries.
 *
 *     forward     lse_i = log sum_j exp(s_ij)        P_ij = exp(s_ij - lse_i)       o_i = sum_j Z_ij P_ij v_j
 *     backward    delta_i = dout_i . o_i - dlse_i    dS_ij = P_ij (Z_ij dout_i . v_j - delta_i) s'_ij
 *                 dv_j = sum_i Z_ij P_ij dout_i      dq_i = sum_j dS_ij k_j         dk_j = sum_i dS_ij q_i
 *                 dbias = sum of dS_ij / s'_ij over the scores that share an element of it
 *
 * with j over the visible keys of i and s'_ij the derivative of s_ij by q_i . k_j. Backward takes P from the
 * lse it is given, so that out and lse may come from a merge of several calls; an infinite lse of either sign
 * means a row with no visible key. */
#include <math.h>
#include <string.h>

#include "convert.h"
#include "philox.h"

/* Query i of one head of one sequence, and the keys it sees. */
struct row {
    const struct fa_params *p;
    struct fa_sequence sequence;
    struct fa_range keys;
    int64_t b, head, kv_head, i;
};

static struct row row_of(const struct fa_params *p, int64_t b, int64_t head, int64_t i)
{
    struct fa_sequence sequence = fa_sequence_of(p, b);
    struct fa_range keys = fa_visible(p, sequence.sq, sequence.sk, i);
    return (struct row){ p, sequence, keys, b, head, head / (p->h / p->hk), i };
}

/* Element offsets of this query and of key j. */
static int64_t at_query(const struct row *r, const struct fa_tensor *t)
{
    return fa_offset(t, r->b, r->sequence.q0, r->i, r->head);
}

static int64_t at_key(const struct row *r, const struct fa_tensor *t, int64_t j)
{
    return fa_offset(t, r->b, r->sequence.k0, j, r->kv_head);
}

static double dot(enum fa_dtype dtype, const void *x, int64_t at_x, const void *y, int64_t at_y, int64_t n)
{
    double sum = 0;
    for (int64_t c = 0; c < n; c++) sum += fa_load(dtype, x, at_x + c) * fa_load(dtype, y, at_y + c);
    return sum;
}

/* s_ij and its derivative by q_i . k_j. */
struct score { double value, slope; };

static int64_t at_score(const struct row *r, const struct fa_scores *t, int64_t j)
{
    return r->b * t->stride_b + r->head * t->stride_h + r->i * t->stride_q + j * t->stride_k;
}

/* The one place where scores are modified: a key that the mask hides has a value of -inf. */
static struct score score_of(const struct row *r, int64_t j)
{
    const struct fa_params *p = r->p;
    double product = dot(p->dtype, p->q.ptr, at_query(r, &p->q), p->k.ptr, at_key(r, &p->k, j), p->d);
    struct score s = { p->scale * product, p->scale };
    if (p->softcap > 0) {
        double capped = tanh(s.value / p->softcap);
        s.value = p->softcap * capped;
        s.slope *= 1 - capped * capped;
    }
    if (p->alibi) {
        int64_t distance = r->i + r->sequence.sk - r->sequence.sq - j;
        s.value -= (double)p->alibi[r->b * p->alibi_stride_b + r->head] * fabs((double)distance);
    }
    if (p->bias.ptr) s.value += fa_load(p->bias.dtype, p->bias.ptr, at_score(r, &p->bias, j));
    if (p->mask.ptr && !((const uint8_t *)p->mask.ptr)[at_score(r, &p->mask, j)]) s.value = -INFINITY;
    return s;
}

/* Z_ij: 0 for a dropped element, 1 / (share kept) for a kept one. */
static double dropout_of(const struct row *r, int64_t j)
{
    const struct fa_params *p = r->p;
    if (p->dropout_p == 0) return 1;
    int keep256 = fa_keep256(p->dropout_p);
    uint32_t batch_head = (uint32_t)(r->b * p->h + r->head);
    int byte = fa_dropout_byte((uint64_t)p->rng[0], (uint64_t)p->rng[1], batch_head, r->i, j);
    return byte < keep256 ? 256.0 / keep256 : 0;
}

/* Largest score of the row: -inf if it sees no key, NaN if any score is. */
static double row_max(const struct row *r)
{
    double max = -INFINITY;
    for (int64_t j = r->keys.first; j < r->keys.last; j++) {
        double s = score_of(r, j).value;
        if (s > max || isnan(s)) max = s;
    }
    return max;
}

static double row_lse(const struct row *r)
{
    double max = row_max(r), sum = 0;
    if (max == -INFINITY) return max;
    for (int64_t j = r->keys.first; j < r->keys.last; j++) sum += exp(score_of(r, j).value - max);
    return max + log(sum);
}

static void forward_row(const struct row *r, double *out)
{
    const struct fa_params *p = r->p;
    double lse = row_lse(r);
    memset(out, 0, (size_t)p->d_v * sizeof *out);
    for (int64_t j = r->keys.first; j < r->keys.last && lse != -INFINITY; j++) {
        double weight = dropout_of(r, j) * exp(score_of(r, j).value - lse);
        int64_t v = at_key(r, &p->v, j);
        for (int64_t c = 0; c < p->d_v; c++) out[c] += weight * fa_load(p->dtype, p->v.ptr, v + c);
    }
    for (int64_t c = 0; c < p->d_v; c++) fa_store(p->dtype, p->out.ptr, at_query(r, &p->out) + c, out[c]);
    fa_store(fa_lse_dtype(p->dtype), p->lse.ptr, at_query(r, &p->lse), lse);
}

static enum fa_status forward(const struct fa_params *p, struct fa_error *error)
{
    (void)error;
    for (int64_t b = 0; b < p->b; b++)
        for (int64_t head = 0; head < p->h; head++)
            for (int64_t i = 0; i < fa_sequence_of(p, b).sq; i++) {
                struct row r = row_of(p, b, head, i);
                forward_row(&r, p->workspace);
            }
    fa_fill_outside(FA_FORWARD, p);
    if (p->s_dmask) fa_reference_dmask(p);
    return FA_OK;
}

/* Gradients in double: of all keys of one kv head, (sk, d) and (sk, d_v), and of one query, (d,). */
struct gradients { double *dk, *dv, *dq; };

static double load_lse(const struct row *r)
{
    return fa_load(fa_lse_dtype(r->p->dtype), r->p->lse.ptr, at_query(r, &r->p->lse));
}

static double delta_of(const struct row *r)
{
    const struct fa_params *p = r->p;
    double delta = dot(p->dtype, p->dout.ptr, at_query(r, &p->dout), p->out.ptr, at_query(r, &p->out), p->d_v);
    return p->dlse.ptr ? delta - fa_load(fa_lse_dtype(p->dtype), p->dlse.ptr, at_query(r, &p->dlse)) : delta;
}

/* P_ij (Z_ij dout_i . v_j - delta_i), the gradient of a score whose P_ij is `probability`. */
static double score_gradient(const struct row *r, int64_t j, double probability, double delta)
{
    const struct fa_params *p = r->p;
    double dp = dot(p->dtype, p->dout.ptr, at_query(r, &p->dout), p->v.ptr, at_key(r, &p->v, j), p->d_v);
    return probability * (dropout_of(r, j) * dp - delta);
}

static void backward_key(const struct row *r, int64_t j, double lse, double delta, const struct gradients *g)
{
    const struct fa_params *p = r->p;
    int64_t q = at_query(r, &p->q), dout = at_query(r, &p->dout), k = at_key(r, &p->k, j);
    struct score s = score_of(r, j);
    double probability = exp(s.value - lse), z = dropout_of(r, j);
    double ds = score_gradient(r, j, probability, delta) * s.slope;
    for (int64_t c = 0; c < p->d; c++) {
        g->dq[c] += ds * fa_load(p->dtype, p->k.ptr, k + c);
        g->dk[j * p->d + c] += ds * fa_load(p->dtype, p->q.ptr, q + c);
    }
    for (int64_t c = 0; c < p->d_v; c++)
        g->dv[j * p->d_v + c] += z * probability * fa_load(p->dtype, p->dout.ptr, dout + c);
}

static void backward_row(const struct row *r, const struct gradients *g)
{
    const struct fa_params *p = r->p;
    double lse = load_lse(r), delta = delta_of(r);
    memset(g->dq, 0, (size_t)p->d * sizeof *g->dq);
    for (int64_t j = r->keys.first; j < r->keys.last && !isinf(lse); j++)
        backward_key(r, j, lse, delta, g);
    for (int64_t c = 0; c < p->d; c++) fa_store(p->dtype, p->dq.ptr, at_query(r, &p->dq) + c, g->dq[c]);
}

/* dk and dv of one kv head: the sum over its group of query heads and over all queries. */
static void backward_kv_head(const struct fa_params *p, int64_t b, int64_t kv_head, const struct gradients *g)
{
    struct fa_sequence sequence = fa_sequence_of(p, b);
    int64_t group = p->h / p->hk;
    memset(g->dk, 0, (size_t)(sequence.sk * p->d) * sizeof *g->dk);
    memset(g->dv, 0, (size_t)(sequence.sk * p->d_v) * sizeof *g->dv);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t i = 0; i < sequence.sq; i++) {
            struct row r = row_of(p, b, head, i);
            backward_row(&r, g);
        }
    for (int64_t j = 0; j < sequence.sk; j++) {
        int64_t dk = fa_offset(&p->dk, b, sequence.k0, j, kv_head);
        int64_t dv = fa_offset(&p->dv, b, sequence.k0, j, kv_head);
        for (int64_t c = 0; c < p->d; c++) fa_store(p->dtype, p->dk.ptr, dk + c, g->dk[j * p->d + c]);
        for (int64_t c = 0; c < p->d_v; c++) fa_store(p->dtype, p->dv.ptr, dv + c, g->dv[j * p->d_v + c]);
    }
}

/* One index of dbias: `elements` along it, each shared by `each` scores. */
struct axis { int64_t elements, each, stride; };

static struct axis axis_of(int64_t stride, int64_t size)
{
    return stride ? (struct axis){ size, 1, stride } : (struct axis){ 1, size, 0 };
}

struct score_index { int64_t b, head, i, j; };

/* Sum of the gradients of the scores from `from` to below `to`. */
static double bias_gradient(const struct fa_params *p, struct score_index from, struct score_index to)
{
    double sum = 0;
    for (int64_t b = from.b; b < to.b; b++)
        for (int64_t head = from.head; head < to.head; head++)
            for (int64_t i = from.i; i < to.i; i++) {
                struct row r = row_of(p, b, head, i);
                double lse = load_lse(&r), delta = delta_of(&r);
                int64_t first = from.j > r.keys.first ? from.j : r.keys.first;
                int64_t last = to.j < r.keys.last ? to.j : r.keys.last;
                for (int64_t j = first; j < last && !isinf(lse); j++)
                    sum += score_gradient(&r, j, exp(score_of(&r, j).value - lse), delta);
            }
    return sum;
}

static void backward_bias(const struct fa_params *p)
{
    const struct fa_scores *t = &p->dbias;
    const struct axis ab = axis_of(t->stride_b, p->b), ah = axis_of(t->stride_h, p->h);
    const struct axis aq = axis_of(t->stride_q, p->sq), ak = axis_of(t->stride_k, p->sk);
    for (int64_t b = 0; b < ab.elements; b++)
        for (int64_t head = 0; head < ah.elements; head++)
            for (int64_t i = 0; i < aq.elements; i++)
                for (int64_t j = 0; j < ak.elements; j++) {
                    struct score_index from = { b, head, i, j };
                    struct score_index to = { b + ab.each, head + ah.each, i + aq.each, j + ak.each };
                    int64_t at = b * ab.stride + head * ah.stride + i * aq.stride + j * ak.stride;
                    fa_store(t->dtype, t->ptr, at, bias_gradient(p, from, to));
                }
}

static enum fa_status backward(const struct fa_params *p, struct fa_error *error)
{
    (void)error;
    double *dk = p->workspace, *dv = dk + p->sk * p->d;
    struct gradients g = { dk, dv, dv + p->sk * p->d_v };
    for (int64_t b = 0; b < p->b; b++)
        for (int64_t kv_head = 0; kv_head < p->hk; kv_head++) backward_kv_head(p, b, kv_head, &g);
    if (p->dbias.ptr) backward_bias(p);
    fa_fill_outside(FA_BACKWARD, p);
    return FA_OK;
}

static int64_t workspace(enum fa_pass pass, const struct fa_params *p)
{
    int64_t doubles = pass == FA_FORWARD ? p->d_v : p->sk * (p->d + p->d_v) + p->d;
    return doubles * (int64_t)sizeof(double);
}

/* float64 is this kernel's own; other types would be served far too slowly, unless someone asks by name. */
static bool supports(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    (void)pass;
    if (p->dtype == FA_FLOAT64 || p->bias.ptr || p->mask.ptr || fa_is_pinned(fa_kernel_reference.name)) return true;
    fa_fail(why, FA_UNSUPPORTED,
            "serves float64 only; FLASH_ATTN_KERNEL=reference lets it take any type, slowly");
    return false;
}

void fa_reference_dmask(const struct fa_params *p)
{
    size_t rows = (size_t)(p->b * p->h * p->dmask_sq);
    memset(p->s_dmask, 0, rows * (size_t)p->dmask_sk * fa_sizeof(p->dtype));
    for (int64_t b = 0; b < p->b; b++)
        for (int64_t head = 0; head < p->h; head++)
            for (int64_t i = 0; i < fa_sequence_of(p, b).sq; i++) {
                struct row r = row_of(p, b, head, i);
                int64_t to = ((b * p->h + head) * p->dmask_sq + i) * p->dmask_sk;
                double max = row_max(&r);
                for (int64_t j = r.keys.first; j < r.keys.last && max != -INFINITY; j++) {
                    double weight = exp(score_of(&r, j).value - max);
                    fa_store(p->dtype, p->s_dmask, to + j, dropout_of(&r, j) > 0 ? weight : -weight);
                }
            }
}

const struct fa_kernel fa_kernel_reference = { "reference", supports, workspace, forward, backward };
