/* cpu/forward.c: tiled exact attention (the paper's algorithm 1) on the CPU.
 *
 *     S = Q K^T    m' = max(m, rowmax S)    P = exp2(scale (S - m'))    l = alpha l + rowsum P    O = alpha O + P V
 *
 * The first items turn every key block into operands once: K transposed in panels, V in rows; (d + dv) elements a key and
 * key/value head. Each of the others is one block of rows, which waits for its head's keys, then walks over those it
 * can see, a strip at a time. S and O stay in L1 and L2. With fp32 operands the products take about 85 % of the time at d = 64, exp2 most of the rest. */
#include <math.h>
#include <string.h>

#include "parallel.h"
#include "plan.h"

struct scratch {                                /* one thread's */
    void *q, *k;                                /* (M, d) of rows, (N, d) of keys to pack */
    float *s, *o, *z;                           /* (strip, N) (M, dv), z (strip, N) with dropout */
    void *p;                                    /* (strip, N) */
};

struct forward {
    struct cpu_plan plan;
    void *k_panels, *v_rows;                    /* (keys, d_pad) in panels, (keys, dv_right) */
    int32_t *packed;                            /* (b, hk) key blocks that are ready */
    char *scratch;
    int64_t scratch_bytes;
};

static struct scratch take_scratch(const struct cpu_plan *plan, struct cpu_arena *arena)
{
    const int64_t rows = plan->block.m + FA_ROW_PAD, element = plan->ops->element, tile = plan->block.strip * plan->s_row;
    const int64_t channels = plan->d_row > plan->dv_row ? plan->d_row : plan->dv_row;
    const int64_t most = plan->block.n > rows ? plan->block.n : rows;
    struct scratch t;
    t.q = fa_cpu_take(arena, element * rows * plan->d_row);
    t.s = fa_cpu_take(arena, 4 * tile);
    t.o = fa_cpu_take(arena, 4 * most * channels);
    t.k = t.o;
    t.p = element == 4 ? t.s : fa_cpu_take(arena, element * tile);
    t.z = plan->keep256 < 256 ? fa_cpu_take(arena, 4 * tile) : NULL;
    return t;
}

static struct forward make_forward(const struct fa_params *p, struct cpu_arena *arena)
{
    struct forward job = { .plan = fa_cpu_make_plan(FA_FORWARD, p, arena) };
    job.k_panels = fa_cpu_take(arena, job.plan.ops->element * job.plan.total.keys * job.plan.d_pad);
    job.v_rows = fa_cpu_take(arena, job.plan.ops->element * job.plan.total.keys * job.plan.dv_right);
    job.packed = fa_cpu_take(arena, 4 * p->b * p->hk);
    struct cpu_arena one = { NULL, 0 };
    take_scratch(&job.plan, &one);
    job.scratch_bytes = one.used;
    job.scratch = fa_cpu_take(arena, one.used * (p->n_threads > 1 ? p->n_threads : 1));
    return job;
}

static struct scratch scratch_of(const struct forward *job, int64_t thread)
{
    struct cpu_arena arena = { job->scratch + thread * job->scratch_bytes, 0 };
    return take_scratch(&job->plan, &arena);
}

/* First packed key of an item's key/value head. */
static int64_t first_key(const struct cpu_plan *plan, const struct cpu_item *item)
{
    return plan->before[item->b].keys + item->kv_head * fa_head_keys(plan, item->seq.sk);
}

static void pack_keys(const struct forward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const struct cpu_item item = fa_cpu_key_item(plan, index);
    const int64_t j0 = item.block * plan->block.n, left = item.seq.sk - j0;
    const int64_t count = fa_cpu_used_keys(plan, &item, j0, left < plan->block.n ? left : plan->block.n);
    const int64_t key = first_key(plan, &item) + j0, size = (int64_t)fa_sizeof(p->dtype);
    const char *k = (char *)p->k.ptr + size * fa_offset(&p->k, item.b, item.seq.k0, j0, item.kv_head);
    const char *v = (char *)p->v.ptr + size * fa_offset(&p->v, item.b, item.seq.k0, j0, item.kv_head);
    void *rows = scratch_of(job, thread).k;
    plan->ops->load_rows(rows, plan->d_row, k, p->dtype, p->k.stride_s, count, p->d);
    plan->ops->pack_transposed(fa_operand(plan, job->k_panels, key * plan->d_pad), rows, plan->d_row, count, p->d);
    plan->ops->load_right(fa_operand(plan, job->v_rows, key * plan->dv_right), plan->dv_right, v, p->dtype, p->v.stride_s, count, p->d_v);
    fa_advance(&job->packed[item.b * p->hk + item.kv_head]);
}

static void store_rows(const struct cpu_plan *plan, const struct cpu_rows *rows, const float *o, const float *max, const float *sum)
{
    const struct fa_params *p = plan->p;
    for (int64_t r = 0; r < rows->count; r++) {
        const bool empty = sum[r] == 0;                         /* no visible key; NaN is not empty */
        plan->ops->store_row(fa_cpu_row_at(plan, rows, &p->out, r), p->dtype, o + r * plan->dv_row, p->d_v, empty ? 0 : 1 / sum[r]);
        const double lse = (double)max[r] * plan->exponent_scale * FA_LN2 + logf(sum[r]);
        ((float *)p->lse.ptr)[fa_offset(&p->lse, rows->b, rows->seq.q0, rows->i[r], rows->head[r])] = empty ? -INFINITY : (float)lse;
    }
}

/* Rows `row` .. `row + m` of the block against keys j0 .. j0 + view.count of the item's head. */
static void strip(const struct forward *job, const struct scratch *t, const struct cpu_rows *rows, int64_t row, int64_t m,
                  int64_t key, int64_t j0, struct cpu_view view, float *max, float *sum)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t ld = plan->s_row;
    const struct fa_result s = { t->s, ld }, o = { t->o + row * plan->dv_row, plan->dv_row };
    const struct fa_left q = { fa_operand(plan, t->q, row * plan->d_row), plan->d_row }, p = { t->p, ld };
    const struct fa_right k = { fa_operand(plan, job->k_panels, (key + j0) * plan->d_pad), ops->nr, ops->nr * plan->d_pad };
    const struct fa_right v = { fa_operand(plan, job->v_rows, (key + j0) * plan->dv_right), plan->dv_right, ops->row_panel };
    struct cpu_terms terms;
    const int64_t plain = ops->softmax_of_products ? fa_cpu_plain_columns(plan, rows, row, m, j0, view, &terms) : 0;
    if (plain > 0 && ops->softmax_of_products(q, k, m, plain, plan->p->d, plan->bias_factor, &terms.rows, plan->exponent_scale, max + row,
                                              sum + row, o, plan->dv_pad, p)) {
        ops->gemm(o, p, v, m, plan->dv_pad, plain, true);                                                             /* O += P V */
        if (plain < view.count)
            strip(job, t, rows, row, m, key, j0 + plain, (struct cpu_view){ view.count - plain, view.masked }, max, sum);
        return;
    }
    const int64_t n = fa_pad(view.count, ops->pad);
    ops->gemm(s, q, k, m, n, plan->p->d, false);                                                                    /* S = Q K^T */
    fa_cpu_modify_scores(plan, rows, row, m, s, j0, view, NULL);
    if (t->z) fa_cpu_dropout_mask(plan, rows, row, m, t->z, ld, j0, n);
    ops->online_softmax(s, m, n, plan->exponent_scale, max + row, sum + row, o, plan->dv_pad, t->z, t->p);
    ops->gemm(o, p, v, m, plan->dv_pad, view.count, true);                                                               /* O += P V */
}

static void attend(const struct forward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct scratch t = scratch_of(job, thread);
    const struct cpu_item item = fa_cpu_row_item(plan, index);
    const int64_t key = first_key(plan, &item), most = plan->block.n;
    struct cpu_rows rows;
    fa_cpu_make_rows(plan, &item, item.block, &rows);
    fa_cpu_load_rows(plan, &rows, &plan->p->q, plan->p->d, t.q, plan->d_row);

    const bool causal_run = rows.head[0] == rows.head[rows.count - 1];      /* one head: later rows see no fewer keys */
    float max[MOST_ROWS], sum[MOST_ROWS] = {0};
    for (int64_t r = 0; r < rows.count; r++) max[r] = -INFINITY;
    memset(t.o, 0, (size_t)(4 * rows.count * plan->dv_row));
    fa_wait_for(&job->packed[item.b * plan->p->hk + item.kv_head], (int32_t)fa_blocks(item.seq.sk, most));

    const int64_t strip_rows = plan->ops->softmax_of_products ? FA_ROW_PAD : plan->block.strip;
    int64_t first = 0, step;                                    /* rows before see none of the keys from j0 on */
    for (int64_t j0 = rows.hull.first / KEY_ALIGN * KEY_ALIGN; j0 < rows.hull.last; j0 += step) {
        while (causal_run && rows.keys[first].last <= j0) first++;
        const bool diagonal = plan->block.strip == plan->block.m && rows.keys[first].last < j0 + most;
        step = diagonal ? KEY_ALIGN : plan->p->mask.ptr ? most - j0 % most : most;      /* small steps along the diagonal, or narrower
                                                                 * strips; of a block that a mask cuts short its end is no operand */
        for (int64_t row = first, m; row < rows.count; row += m) {
            m = rows.count - row < strip_rows ? rows.count - row : strip_rows;
            const int64_t left = (causal_run ? rows.keys[row + m - 1].last : rows.hull.last) - j0;
            const struct cpu_view view = fa_cpu_view(plan, &rows, row, m, j0, left < step ? left : step);
            if (view.count > 0) strip(job, &t, &rows, row, m, key, j0, view, max, sum);      /* else mask or bias hide it */
        }
    }
    store_rows(plan, &rows, t.o, max, sum);
}

static void work(void *data, int64_t thread, int64_t index)
{
    const struct forward *job = data;
    const int64_t packs = job->plan.total.key_blocks;
    if (index < packs) pack_keys(job, thread, index);
    else attend(job, thread, index - packs);
}

int64_t fa_cpu_forward_workspace(const struct fa_params *p)
{
    struct cpu_arena arena = { NULL, 0 };
    make_forward(p, &arena);
    return arena.used;
}

enum fa_status fa_cpu_forward(const struct fa_params *p, struct fa_error *error)
{
    (void)error;
    struct cpu_arena arena = { p->workspace, 0 };
    struct forward job = make_forward(p, &arena);
    memset(job.packed, 0, (size_t)(4 * p->b * p->hk));
    fa_parallel(job.plan.ops, p->n_threads, job.plan.total.key_blocks + job.plan.total.row_blocks, work, &job);
    fa_fill_outside(FA_FORWARD, p);
    if (p->s_dmask) fa_reference_dmask(p);
    return FA_OK;
}
