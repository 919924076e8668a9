/* common/fill.c: what the tensors hold outside the data.
 *
 * Rows after the last packed sequence, and keys beyond seqused_k, belong to no sequence: no kernel sees them.
 * They still lie in tensors that the caller left uninitialised, so they are written here, once: output and
 * gradient rows as 0, lse as -inf (an empty row). What they held before, NaN included, never gets out. */
#include <math.h>
#include <string.h>

#include "convert.h"

struct rows { int64_t b, first, last; };

static void fill_zero(const struct fa_params *p, const struct fa_tensor *t, struct rows rows,
                      int64_t heads, int64_t channels)
{
    int64_t size = (int64_t)fa_sizeof(p->dtype);
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t head = 0; head < heads; head++)
            memset((char *)t->ptr + fa_offset(t, rows.b, 0, row, head) * size, 0, (size_t)(channels * size));
}

static void fill_empty_lse(const struct fa_params *p, struct rows rows)
{
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t head = 0; head < p->h; head++)
            fa_store(fa_lse_dtype(p->dtype), p->lse.ptr, fa_offset(&p->lse, rows.b, 0, row, head), -INFINITY);
}

static void fill_key_gradients(const struct fa_params *p, struct rows rows)
{
    fill_zero(p, &p->dk, rows, p->hk, p->d);
    fill_zero(p, &p->dv, rows, p->hk, p->d_v);
}

void fa_fill_outside(enum fa_pass pass, const struct fa_params *p)
{
    struct rows after_q = { 0, p->cu_q ? p->cu_q[p->b] : 0, p->cu_q ? p->total_q : 0 };
    struct rows after_k = { 0, p->cu_k ? p->cu_k[p->b] : 0, p->cu_k ? p->total_k : 0 };
    if (pass == FA_FORWARD) {
        fill_zero(p, &p->out, after_q, p->h, p->d_v);
        fill_empty_lse(p, after_q);
        return;
    }
    fill_zero(p, &p->dq, after_q, p->h, p->d);
    fill_key_gradients(p, after_k);
    for (int64_t b = 0; p->seqused_k && b < p->b; b++) {
        int64_t first = p->cu_k ? p->cu_k[b] : 0, last = p->cu_k ? p->cu_k[b + 1] : p->sk;
        fill_key_gradients(p, (struct rows){ b, first + p->seqused_k[b], last });
    }
}
