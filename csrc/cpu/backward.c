/* cpu/backward.c: the gradients, five products per tile, each computed once (the paper's algorithm 4).
 *
 *     P = exp(S - lse)    dV += P^T dO    dP = dO V^T    dS = P (dP - delta)    dK += dS^T Q    dQ += dS K
 *     delta = rowsum(dO O) - dlse
 *
 * The first items work out delta, a block of rows each. Each of the others is one block of keys of a key/value head: it
 * owns dK and dV (so grouped heads need no reduction) and walks over the row blocks that see it, last first. dQ is summed
 * in fp32 scratch, block after block of keys: an item adds to a row block only after the item before it has, and the last
 * one stores it. That order never depends on the threads, so dq is bit-reproducible, and items run one row block apart,
 * so that all threads can work on one head without repeating a product. */
#include <math.h>
#include <string.h>

#include "dbias.h"
#include "parallel.h"

struct scratch {
    void *k, *k_panels, *v_panels;              /* (N, d) to sum over keys, K^T and V^T in panels: of the item */
    void *rows;                                 /* (N, d) (N, dv) on their way to panels */
    float *dk, *dv;                             /* (N, d) (N, dv) sums */
    void *q, *dout;                             /* (M, d) (M, dv): of the row block, unless they are packed */
    float *s, *dp;                              /* (strip, N): scores and dP */
    struct fa_gradients to;                     /* (M, N): P and dS as operands */
    float *z, *derivative;                      /* (strip, N) with dropout; with softcap */
};

struct backward {
    struct cpu_plan plan;
    float *dq;                                  /* (rows, d_row), the rows of a head padded */
    void *q, *dout, *q_columns, *dout_columns;  /* (rows, d_row) ..., with pack_columns: packed once, not per tile */
    float *lse, *delta;                         /* (rows,), lse in units of the scores that P is made of */
    int32_t *added;                             /* (row blocks,) items that have added to dq */
    int32_t *prepared;                          /* (b, hk) row blocks whose delta is ready */
    struct cpu_dbias dbias;
    char *scratch;
    int64_t scratch_bytes;
};

static struct scratch take_scratch(const struct cpu_plan *plan, struct cpu_arena *arena)
{
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t m = plan->block.m, n = plan->block.n, element = ops->element, strip = 4 * plan->block.strip * plan->s_row;
    const int64_t d = plan->d_row, dv = plan->dv_row, widest = d > dv ? d : dv;
    struct scratch t;
    t.k = fa_cpu_take(arena, element * n * plan->d_right);
    t.k_panels = fa_cpu_take(arena, element * n * plan->d_pad);
    t.v_panels = fa_cpu_take(arena, element * n * plan->dv_pad);
    t.rows = fa_cpu_take(arena, element * (n > m ? n : m) * widest);           /* delta's pass loads out here */
    t.dk = fa_cpu_take(arena, 4 * plan->s_row * d);
    t.dv = fa_cpu_take(arena, 4 * plan->s_row * dv);
    t.q = ops->pack_columns ? NULL : fa_cpu_take(arena, element * m * d);
    t.dout = ops->pack_columns ? NULL : fa_cpu_take(arena, element * m * dv);
    t.s = fa_cpu_take(arena, strip);
    t.dp = fa_cpu_take(arena, strip);
    t.to = (struct fa_gradients){ t.s, t.dp, t.dp, false };
    if (element != 4) {
        t.to.p = fa_cpu_take(arena, element * m * plan->s_row);
        t.to.ds = fa_cpu_take(arena, element * m * plan->s_row);
        t.to.ds_sum = fa_cpu_take(arena, element * m * plan->s_row);
    }
    t.z = plan->keep256 < 256 ? fa_cpu_take(arena, strip) : NULL;
    t.derivative = plan->p->softcap > 0 ? fa_cpu_take(arena, strip) : NULL;
    return t;
}

static void make_backward(struct backward *job, const struct fa_params *p, struct cpu_arena *arena)
{
    job->plan = fa_cpu_make_plan(FA_BACKWARD, p, arena);
    job->dq = fa_cpu_take(arena, 4 * job->plan.total.rows * job->plan.d_row);
    if (job->plan.ops->pack_columns) {
        const int64_t bytes = job->plan.ops->element * job->plan.total.rows;
        job->q = fa_cpu_take(arena, bytes * job->plan.d_row);
        job->dout = fa_cpu_take(arena, bytes * job->plan.dv_row);
        job->q_columns = fa_cpu_take(arena, bytes * job->plan.d_pad);
        job->dout_columns = fa_cpu_take(arena, bytes * job->plan.dv_pad);
    }
    job->lse = fa_cpu_take(arena, 4 * job->plan.total.rows);
    job->delta = fa_cpu_take(arena, 4 * job->plan.total.rows);
    job->added = fa_cpu_take(arena, 4 * job->plan.total.row_blocks);
    job->prepared = fa_cpu_take(arena, 4 * p->b * p->hk);
    job->dbias = fa_cpu_make_dbias(&job->plan, arena);
    struct cpu_arena one = { NULL, 0 };
    take_scratch(&job->plan, &one);
    job->scratch_bytes = one.used;
    job->scratch = fa_cpu_take(arena, one.used * (p->n_threads > 1 ? p->n_threads : 1));
}

static struct scratch scratch_of(const struct backward *job, int64_t thread)
{
    struct cpu_arena arena = { job->scratch + thread * job->scratch_bytes, 0 };
    return take_scratch(&job->plan, &arena);
}

/* The counter of a row block of an item's key/value head. */
static int32_t *added_to(const struct backward *job, const struct cpu_item *item, int64_t block)
{
    const int64_t per_head = fa_blocks(job->plan.group * item->seq.sq, job->plan.block.m);
    return job->added + job->plan.before[item->b].row_blocks + item->kv_head * per_head + block;
}

/* A row block as operands: rows, and what sum_rows takes of them. */
struct block { struct fa_left q, dout, q_sum, dout_sum; };

static struct block block_of(const struct backward *job, const struct scratch *t, int64_t first, int64_t m)
{
    const struct cpu_plan *plan = &job->plan;
    const int64_t d = plan->d_row, dv = plan->dv_row, ld = fa_pad(m, FA_ROW_PAD);
    if (!plan->ops->pack_columns) return (struct block){ { t->q, d }, { t->dout, dv }, { t->q, d }, { t->dout, dv } };
    return (struct block){ { fa_operand(plan, job->q, first * d), d }, { fa_operand(plan, job->dout, first * dv), dv },
                           { fa_operand(plan, job->q_columns, first * plan->d_pad), ld },
                           { fa_operand(plan, job->dout_columns, first * plan->dv_pad), ld } };
}

/* dst <- rows of q or dout, whether for this tile or for all. */
static void load_block(const struct backward *job, const struct cpu_rows *rows, const struct block *block)
{
    const struct cpu_plan *plan = &job->plan;
    fa_cpu_load_rows(plan, rows, &plan->p->q, plan->p->d, (void *)block->q.ptr, plan->d_row);
    fa_cpu_load_rows(plan, rows, &plan->p->dout, plan->p->d_v, (void *)block->dout.ptr, plan->dv_row);
    if (!plan->ops->pack_columns) return;
    plan->ops->pack_columns((void *)block->q_sum.ptr, block->q_sum.row, block->q.ptr, plan->d_row, rows->count, plan->d_pad);
    plan->ops->pack_columns((void *)block->dout_sum.ptr, block->dout_sum.row, block->dout.ptr, plan->dv_row, rows->count, plan->dv_pad);
}

static float load_lse(const struct fa_tensor *t, const struct cpu_rows *rows, int64_t r)
{
    return ((const float *)t->ptr)[fa_offset(t, rows->b, rows->seq.q0, rows->i[r], rows->head[r])];
}

/* These rows of dq, in its dtype. */
static void store_dq(const struct backward *job, const struct cpu_rows *rows, const float *dq)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    for (int64_t r = 0; r < rows->count; r++)
        plan->ops->store_row(fa_cpu_row_at(plan, rows, &p->dq, r), p->dtype, dq + r * plan->d_row, p->d, (float)p->scale);
}

/* Delta, and the lse as the scores count. A row without keys gets lse = +inf: every P is 0. */
static void prepare_rows(const struct backward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const struct scratch t = scratch_of(job, thread);
    const struct cpu_item item = fa_cpu_row_item(plan, index);
    const int64_t first = item.first_row + item.block * plan->block.m;
    struct cpu_rows rows;
    fa_cpu_make_rows(plan, &item, item.block, &rows);
    fa_cpu_load_rows(plan, &rows, &p->out, p->d_v, t.rows, plan->dv_row);
    const struct block operands = block_of(job, &t, first, rows.count);
    if (plan->ops->pack_columns) load_block(job, &rows, &operands);
    else fa_cpu_load_rows(plan, &rows, &p->dout, p->d_v, t.dout, plan->dv_row);
    for (int64_t r = 0; r < rows.count; r++) {
        const float lse = load_lse(&p->lse, &rows, r), dlse = p->dlse.ptr ? load_lse(&p->dlse, &rows, r) : 0;
        const bool empty = isinf(lse);
        job->lse[first + r] = empty ? INFINITY : (float)(lse * FA_LOG2E / plan->exponent_scale);
        job->delta[first + r] = empty ? 0 : plan->ops->dot(fa_operand(plan, t.rows, r * plan->dv_row), fa_operand(plan, operands.dout.ptr, r * plan->dv_row), plan->dv_pad) - dlse;
    }
    *added_to(job, &item, item.block) = 0;
    if (rows.hull.first >= rows.hull.last) {                    /* no item will come by */
        float *dq = job->dq + first * plan->d_row;
        memset(dq, 0, (size_t)(4 * rows.count * plan->d_row));
        store_dq(job, &rows, dq);
    }
    fa_advance(&job->prepared[item.b * p->hk + item.kv_head]);
}

/* The item's share of dq, from dS (rows, count), none of it where count is 0; the last item to meet these rows stores them. */
static void add_dq(const struct backward *job, const struct cpu_rows *rows, const struct cpu_item *item, int64_t block,
                   const struct scratch *t, int64_t count, const float *row_sums)
{
    const struct cpu_plan *plan = &job->plan;
    const int64_t d = plan->d_row;
    const int32_t turn = (int32_t)(item->block - rows->hull.first / plan->block.n);    /* items that add before this one */
    int32_t *added = added_to(job, item, block);
    float *dq = job->dq + (item->first_row + block * plan->block.m) * d;
    fa_wait_for(added, turn);
    if (count > 0) {
        plan->ops->gemm((struct fa_result){ dq, d }, (struct fa_left){ t->to.ds, plan->s_row },
                        (struct fa_right){ t->k, plan->d_right, plan->ops->row_panel }, rows->count, plan->d_pad, count, turn > 0);
        fa_cpu_add_row_sums(&job->dbias, rows, row_sums);
    } else if (turn == 0) {
        memset(dq, 0, (size_t)(4 * rows->count * d));
    }
    if (item->block == (rows->hull.last - 1) / plan->block.n) store_dq(job, rows, dq);
    else fa_advance(added);
}

/* Sums over rows lie as sum_rows likes them: with pack_columns transposed, (channels, N). */
static struct fa_result sums_of(const struct cpu_plan *plan, float *sums, int64_t row)
{
    return (struct fa_result){ sums, plan->ops->pack_columns ? plan->s_row : row };
}

/* dbias wants dS before softcap's derivative; where that is an operand in place, the derivative comes after. */
static bool takes_derivative_last(const struct backward *job, const struct scratch *t)
{
    return t->derivative && job->dbias.kind != NO_DBIAS && job->plan.ops->element == 4;
}

/* P and dS of rows `row` .. `row + m` of the block, as operands. `first` is the block's first row in lse and delta. */
static void strip(const struct backward *job, const struct scratch *t, const struct cpu_rows *rows, const struct block *from,
                  int64_t row, int64_t m, int64_t first, int64_t j0, struct cpu_view view)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t d = plan->d_row, dv = plan->dv_row, ld = plan->s_row, nr = ops->nr, at = row % plan->block.strip * ld;
    const bool keep_ds = job->dbias.kind != NO_DBIAS;
    const struct fa_left q = { fa_operand(plan, from->q.ptr, row * d), d }, dout = { fa_operand(plan, from->dout.ptr, row * dv), dv };
    struct fa_right k = { t->k_panels, nr, nr * plan->d_pad }, v = { t->v_panels, nr, nr * plan->dv_pad };
    struct fa_gradients to = { fa_operand(plan, t->to.p, row * ld), fa_operand(plan, t->to.ds, row * ld),
                               fa_operand(plan, t->to.ds_sum, row * ld), keep_ds };
    struct fa_result s = { t->s + at, ld }, dp = { t->dp + at, ld };
    const float *lse = job->lse + first + row, *delta = job->delta + first + row;
    struct cpu_terms terms;
    const int64_t plain = ops->gradients_of_products ? fa_cpu_plain_columns(plan, rows, row, m, j0, view, &terms) : 0;
    if (plain > 0 && ops->gradients_of_products(q, k, dout, v, m, plain, plan->p->d, plan->p->d_v, plan->bias_factor, &terms.rows,
                                                plan->exponent_scale, lse, delta, keep_ds ? dp.ptr : NULL, to, ld)) {
        if (plain == view.count) return;
        k.ptr = fa_operand(plan, k.ptr, plain * plan->d_pad), v.ptr = fa_operand(plan, v.ptr, plain * plan->dv_pad);
        to.p = fa_operand(plan, to.p, plain * FA_ROW_PAD), to.ds = fa_operand(plan, to.ds, plain);
        to.ds_sum = fa_operand(plan, to.ds_sum, plain * FA_ROW_PAD);
        s.ptr += plain, dp.ptr += plain;
        j0 += plain;
        view.count -= plain;
    }
    const int64_t n = fa_pad(view.count, ops->pad);
    float *const z = t->z ? t->z + at : NULL, *const derivative = t->derivative ? t->derivative + at : NULL;
    ops->gemm(s, q, k, m, n, plan->p->d, false);
    ops->gemm(dp, dout, v, m, n, plan->p->d_v, false);
    fa_cpu_modify_scores(plan, rows, row, m, s, j0, view, derivative);
    if (z) fa_cpu_dropout_mask(plan, rows, row, m, z, ld, j0, n);
    ops->softmax_backward(s, dp, m, n, plan->exponent_scale, lse, delta, z, takes_derivative_last(job, t) ? NULL : derivative, to);
}

/* One tile: rows x the item's keys from column 0 to `count`. */
static void tile(const struct backward *job, const struct scratch *t, const struct cpu_rows *rows, const struct cpu_item *item,
                 int64_t block, struct cpu_view view)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t j0 = item->block * plan->block.n, m = rows->count, count = view.count, n = fa_pad(count, ops->pad), ld = plan->s_row;
    const int64_t d = plan->d_row, dv = plan->dv_row, first = item->first_row + block * plan->block.m;
    const struct fa_result ds = { t->dp, ld };
    const struct block from = block_of(job, t, first, m);
    if (!ops->pack_columns) load_block(job, rows, &from);
    const int64_t most = ops->gradients_of_products ? FA_ROW_PAD : plan->block.strip;
    for (int64_t row = 0, size; row < m; row += size) {
        size = m - row < most ? m - row : most;
        strip(job, t, rows, &from, row, size, first, j0, view);
    }
    float row_sums[MOST_ROWS];
    fa_cpu_add_tile(&job->dbias, rows, item, block, ds, count);
    fa_cpu_sum_rows(&job->dbias, rows, ds, count, row_sums);
    if (takes_derivative_last(job, t)) ops->multiply(ds, m, n, t->derivative);
    ops->sum_rows(sums_of(plan, t->dv, dv), (struct fa_left){ t->to.p, ld }, from.dout_sum, count, plan->dv_pad, m);
    ops->sum_rows(sums_of(plan, t->dk, d), (struct fa_left){ t->to.ds_sum, ld }, from.q_sum, count, plan->d_pad, m);
    add_dq(job, rows, item, block, t, count, row_sums);
}

static void load_keys(const struct backward *job, const struct scratch *t, const struct cpu_item *item, int64_t count)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const int64_t j0 = item->block * plan->block.n, size = (int64_t)fa_sizeof(p->dtype);
    const char *k = (char *)p->k.ptr + size * fa_offset(&p->k, item->b, item->seq.k0, j0, item->kv_head);
    const char *v = (char *)p->v.ptr + size * fa_offset(&p->v, item->b, item->seq.k0, j0, item->kv_head);
    plan->ops->load_rows(t->rows, plan->dv_row, v, p->dtype, p->v.stride_s, count, p->d_v);
    plan->ops->pack_transposed(t->v_panels, t->rows, plan->dv_row, count, p->d_v);
    plan->ops->load_rows(t->rows, plan->d_row, k, p->dtype, p->k.stride_s, count, p->d);
    plan->ops->pack_transposed(t->k_panels, t->rows, plan->d_row, count, p->d);
    plan->ops->load_right(t->k, plan->d_right, k, p->dtype, p->k.stride_s, count, p->d);
}

static void differentiate(const struct backward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const struct scratch t = scratch_of(job, thread);
    const struct cpu_item item = fa_cpu_key_item(plan, index);
    const int64_t n = plan->block.n, j0 = item.block * n, left = item.seq.sk - j0, count = left < n ? left : n;
    const int64_t row_blocks = fa_blocks(plan->group * item.seq.sq, plan->block.m);
    load_keys(job, &t, &item, fa_cpu_used_keys(plan, &item, j0, count));
    const int64_t cleared = plan->ops->pack_columns ? plan->s_row : count;
    memset(t.dk, 0, (size_t)(4 * cleared * plan->d_row));
    memset(t.dv, 0, (size_t)(4 * cleared * plan->dv_row));

    fa_wait_for(&job->prepared[item.b * p->hk + item.kv_head], (int32_t)row_blocks);
    for (int64_t block = row_blocks - 1; block >= 0; block--) {
        struct cpu_rows rows;
        fa_cpu_make_rows(plan, &item, block, &rows);
        const bool meets = rows.hull.last > j0 && rows.hull.first < j0 + count;
        const int64_t seen = rows.hull.last - j0;
        struct cpu_view view = { 0, false };
        if (meets) view = fa_cpu_view(plan, &rows, 0, rows.count, j0, seen < count ? seen : count);
        if (view.count > 0) {
            tile(job, &t, &rows, &item, block, view);
            continue;
        }
        fa_cpu_add_tile(&job->dbias, &rows, &item, block, (struct fa_result){ t.dp, plan->s_row }, 0);   /* others wait for it */
        if (meets) add_dq(job, &rows, &item, block, &t, 0, NULL);
    }
    fa_cpu_end_item(&job->dbias, &item);
    const int64_t size = (int64_t)fa_sizeof(p->dtype);
    char *dk = (char *)p->dk.ptr + size * fa_offset(&p->dk, item.b, item.seq.k0, j0, item.kv_head);
    char *dv = (char *)p->dv.ptr + size * fa_offset(&p->dv, item.b, item.seq.k0, j0, item.kv_head);
    plan->ops->store_sums(dk, p->dtype, p->dk.stride_s, sums_of(plan, t.dk, plan->d_row), count, p->d, (float)p->scale);
    plan->ops->store_sums(dv, p->dtype, p->dv.stride_s, sums_of(plan, t.dv, plan->dv_row), count, p->d_v, 1);
}

static void work(void *data, int64_t thread, int64_t index)
{
    const struct backward *job = data;
    const int64_t preparations = job->plan.total.row_blocks;
    if (index < preparations) prepare_rows(job, thread, index);
    else differentiate(job, thread, index - preparations);
}

int64_t fa_cpu_backward_workspace(const struct fa_params *p)
{
    struct cpu_arena arena = { NULL, 0 };
    struct backward job;
    make_backward(&job, p, &arena);
    return arena.used;
}

enum fa_status fa_cpu_backward(const struct fa_params *p, struct fa_error *error)
{
    (void)error;
    struct cpu_arena arena = { p->workspace, 0 };
    struct backward job;
    make_backward(&job, p, &arena);
    memset(job.prepared, 0, (size_t)(4 * p->b * p->hk));
    fa_cpu_begin_dbias(&job.dbias);
    fa_parallel(job.plan.ops, p->n_threads, job.plan.total.row_blocks + job.plan.total.key_blocks, work, &job);
    fa_cpu_finish_dbias(&job.dbias);
    fa_fill_outside(FA_BACKWARD, p);
    return FA_OK;
}
