/* cpu/bias.c: biases and masks on tiles of scores (their gradient: dbias.c).
 *
 * Both are read where the caller has them: a bias costs one fused multiply-add a score, a mask one byte a score. Before a tile
 * is computed its mask is looked at: columns that nobody sees are cut off its end, and a tile of none is not computed, nor is
 * one whose bias is all -inf. A padding mask, the same for all rows, is looked at once a tile, and keys at the end of a block that
 * it hides are not turned into operands. */
#include <math.h>
#include <string.h>

#include "plan.h"
#include "../common/convert.h"

/* The score of row r and key j. */
static int64_t offset_of(const struct fa_scores *t, const struct cpu_rows *rows, int64_t r, int64_t j)
{
    return rows->b * t->stride_b + rows->head[r] * t->stride_h + rows->i[r] * t->stride_q + j * t->stride_k;
}

/* Where the rows of one head end that start at r, before `last`: they follow each other at stride_q. */
static int64_t end_of_run(const struct cpu_rows *rows, int64_t r, int64_t last)
{
    const int64_t head = rows->head[r];
    while (++r < last && rows->head[r] == head) {}
    return r;
}

/* A row of the mask; copied where its bytes do not lie side by side. */
static const uint8_t *mask_row(const struct fa_scores *t, int64_t at, int64_t count, uint8_t *copy)
{
    const uint8_t *row = (const uint8_t *)t->ptr + at;
    if (t->stride_k == 1) return row;
    for (int64_t j = 0; j < count; j++) copy[j] = row[j * t->stride_k];
    return copy;
}

/* A tile of which everything is known before its end is left there: the last column is seen, and something is hidden. */
static struct cpu_view view_of_mask(const struct fa_scores *t, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count)
{
    uint8_t any[MOST_KEYS] = {0}, copy[MOST_KEYS];
    bool masked = false;
    for (int64_t r = row, before = INT64_MIN; r < row + m && !(masked && any[count - 1]); r++) {
        const int64_t at = offset_of(t, rows, r, j0);
        if (at == before) continue;
        before = at;
        const uint8_t *seen = mask_row(t, at, count, copy);
        uint8_t all = 1;
        for (int64_t j = 0; j < count; j++) {
            any[j] |= seen[j];
            all &= seen[j] != 0;
        }
        masked |= !all;
    }
    while (count > 0 && !any[count - 1]) count--;
    return (struct cpu_view){ count, masked };
}

/* Whether `count` elements from `at` on are all -inf; nearly always the first one is not. */
static bool is_hidden_row(const struct fa_scores *t, int64_t at, int64_t count, const void *hidden)
{
    const int64_t size = (int64_t)fa_sizeof(t->dtype);
    if (fa_load(t->dtype, t->ptr, at) != -INFINITY) return false;
    if (t->stride_k == 1) return memcmp((const char *)t->ptr + at * size, hidden, (size_t)(count * size)) == 0;
    for (int64_t j = 1; j < count && t->stride_k; j++)
        if (fa_load(t->dtype, t->ptr, at + j * t->stride_k) != -INFINITY) return false;
    return true;
}

static bool is_hidden_tile(const struct fa_scores *t, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count)
{
    double hidden[MOST_KEYS];                                /* -inf, in the bias's dtype */
    if (fa_load(t->dtype, t->ptr, offset_of(t, rows, row, j0)) != -INFINITY) return false;
    for (int64_t j = 0; j < count; j++) fa_store(t->dtype, hidden, j, -INFINITY);
    for (int64_t r = row, before = INT64_MIN; r < row + m; r++) {
        const int64_t at = offset_of(t, rows, r, j0);
        if (at != before && !is_hidden_row(t, at, count, hidden)) return false;
        before = at;
    }
    return true;
}

struct cpu_view fa_cpu_view(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count)
{
    const struct fa_params *p = plan->p;
    struct cpu_view view = { count, false };
    if (p->mask.ptr) view = view_of_mask(&p->mask, rows, row, m, j0, count);
    if (p->bias.ptr && view.count > 0 && is_hidden_tile(&p->bias, rows, row, m, j0, view.count)) view.count = 0;
    return view;
}

int64_t fa_cpu_used_keys(const struct cpu_plan *plan, const struct cpu_item *item, int64_t j0, int64_t count)
{
    const struct fa_scores *t = &plan->p->mask;
    if (!t->ptr || t->stride_q) return count;
    const uint8_t *mask = (const uint8_t *)t->ptr + item->b * t->stride_b + item->kv_head * plan->group * t->stride_h + j0 * t->stride_k;
    for (; count > 0; count--)
        for (int64_t head = 0; head < (t->stride_h ? plan->group : 1); head++)
            if (mask[head * t->stride_h + (count - 1) * t->stride_k]) return count;
    return 0;
}

void fa_cpu_add_bias(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                     int64_t j0, int64_t count)
{
    const struct fa_scores *t = &plan->p->bias;
    const bool side_by_side = t->stride_k == 1 && t->dtype != FA_FLOAT64;
    for (int64_t r = row, end; r < row + m; r = end) {
        const int64_t at = offset_of(t, rows, r, j0);
        const struct fa_result to = { s.ptr + (r - row) * s.row, s.row };
        float copy[MOST_KEYS];
        end = side_by_side ? end_of_run(rows, r, row + m) : r + 1;
        for (int64_t j = 0; j < count && !side_by_side; j++) copy[j] = (float)fa_load(t->dtype, t->ptr, at + j * t->stride_k);
        const void *from = side_by_side ? (const char *)t->ptr + at * (int64_t)fa_sizeof(t->dtype) : (const char *)copy;
        plan->ops->add_bias(to, end - r, count, plan->bias_factor, from, side_by_side ? t->dtype : FA_FLOAT32, t->stride_q);
    }
}

void fa_cpu_apply_mask(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                       int64_t j0, int64_t count)
{
    const struct fa_scores *t = &plan->p->mask;
    for (int64_t r = row, end; r < row + m; r = end) {
        uint8_t copy[MOST_KEYS];
        const struct fa_result to = { s.ptr + (r - row) * s.row, s.row };
        end = t->stride_k == 1 ? end_of_run(rows, r, row + m) : r + 1;
        plan->ops->apply_mask(to, end - r, count, mask_row(t, offset_of(t, rows, r, j0), count, copy), t->stride_q);
    }
}

void fa_cpu_fill_terms(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count,
                       bool masked, struct cpu_terms *terms)
{
    const struct fa_scores *bias = &plan->p->bias, *mask = &plan->p->mask;
    const bool side_by_side = bias->stride_k == 1 && bias->dtype != FA_FLOAT64;
    terms->rows.has_bias = bias->ptr;
    terms->rows.has_mask = masked;
    terms->rows.dtype = side_by_side ? bias->dtype : FA_FLOAT32;
    for (int64_t r = 0; r < m && bias->ptr; r++) {
        const int64_t at = offset_of(bias, rows, row + r, j0);
        terms->rows.bias[r] = side_by_side ? (const char *)bias->ptr + at * (int64_t)fa_sizeof(bias->dtype) : (const char *)terms->bias[r];
        for (int64_t j = 0; j < count && !side_by_side; j++) terms->bias[r][j] = (float)fa_load(bias->dtype, bias->ptr, at + j * bias->stride_k);
    }
    for (int64_t r = 0; r < m && masked; r++)
        terms->rows.mask[r] = mask_row(mask, offset_of(mask, rows, row + r, j0), count, terms->mask[r]);
}
