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
    float *k, *k_panels, *v_panels;             /* (N, d), K^T and V^T in panels: of the item */
    float *dk, *dv;                             /* (N, d) (N, dv) */
    float *q, *dout;                            /* (M, d) (M, dv): of the row block */
    float *s, *ds;                              /* (M, N): scores, then P; dP, then dS */
    float *z, *derivative;                      /* (M, N) with dropout; with softcap */
};

struct backward {
    struct cpu_plan plan;
    float *dq;                                  /* (rows, d_row) */
    float *lse, *delta;                         /* (rows,), lse in units of the scores that P is made of */
    int32_t *added;                             /* (row blocks,) items that have added to dq */
    int32_t *prepared;                          /* (b, hk) row blocks whose delta is ready */
    struct cpu_dbias dbias;
    char *scratch;
    int64_t scratch_bytes;
};

static struct scratch take_scratch(const struct cpu_plan *plan, struct cpu_arena *arena)
{
    const int64_t d = 4 * plan->d_row, dv = 4 * plan->dv_row, tile = 4 * BACKWARD_M * BACKWARD_N;
    const int64_t widest = d > dv ? d : dv;
    struct scratch t;
    t.k = fa_cpu_take(arena, BACKWARD_N * widest);                 /* V rows pass through it first */
    t.k_panels = fa_cpu_take(arena, BACKWARD_N * d);
    t.v_panels = fa_cpu_take(arena, BACKWARD_N * dv);
    t.dk = fa_cpu_take(arena, BACKWARD_N * d);
    t.dv = fa_cpu_take(arena, BACKWARD_N * dv);
    t.q = fa_cpu_take(arena, BACKWARD_M * widest);                 /* delta's pass loads out here */
    t.dout = fa_cpu_take(arena, BACKWARD_M * dv);
    t.s = fa_cpu_take(arena, tile);
    t.ds = fa_cpu_take(arena, tile);
    t.z = plan->keep256 < 256 ? fa_cpu_take(arena, tile) : NULL;
    t.derivative = plan->p->softcap > 0 ? fa_cpu_take(arena, tile) : NULL;
    return t;
}

static void make_backward(struct backward *job, const struct fa_params *p, struct cpu_arena *arena)
{
    job->plan = fa_cpu_make_plan(FA_BACKWARD, p, arena);
    job->dq = fa_cpu_take(arena, 4 * job->plan.total.rows * job->plan.d_row);
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
    const int64_t per_head = fa_blocks(job->plan.group * item->seq.sq, BACKWARD_M);
    return job->added + job->plan.before[item->b].row_blocks + item->kv_head * per_head + block;
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
    const int64_t first = item.first_row + item.block * BACKWARD_M;
    struct cpu_rows rows;
    fa_cpu_make_rows(plan, &item, item.block, &rows);
    fa_cpu_load_rows(plan, &rows, &p->out, p->d_v, t.q, plan->dv_row);
    fa_cpu_load_rows(plan, &rows, &p->dout, p->d_v, t.dout, plan->dv_row);
    for (int64_t r = 0; r < rows.count; r++) {
        const float lse = load_lse(&p->lse, &rows, r), dlse = p->dlse.ptr ? load_lse(&p->dlse, &rows, r) : 0;
        const bool empty = isinf(lse);
        job->lse[first + r] = empty ? INFINITY : (float)(lse * FA_LOG2E / plan->exponent_scale);
        job->delta[first + r] = empty ? 0 : plan->ops->dot(t.q + r * plan->dv_row, t.dout + r * plan->dv_row, plan->dv_pad) - dlse;
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
    const int32_t turn = (int32_t)(item->block - rows->hull.first / BACKWARD_N);   /* items that add before this one */
    int32_t *added = added_to(job, item, block);
    float *dq = job->dq + (item->first_row + block * BACKWARD_M) * d;
    fa_wait_for(added, turn);
    if (count > 0) {
        plan->ops->gemm((struct fa_result){ dq, d }, (struct fa_left){ t->ds, BACKWARD_N, 1 },
                        (struct fa_right){ t->k, d, plan->ops->nr }, rows->count, plan->d_pad, count, turn > 0);
        fa_cpu_add_row_sums(&job->dbias, rows, row_sums);
    } else if (turn == 0) {
        memset(dq, 0, (size_t)(4 * rows->count * d));
    }
    if (item->block == (rows->hull.last - 1) / BACKWARD_N) store_dq(job, rows, dq);
    else fa_advance(added);
}

/* One tile: rows x the item's keys from column 0 to `count`. */
static void tile(const struct backward *job, const struct scratch *t, const struct cpu_rows *rows, const struct cpu_item *item,
                 int64_t block, struct cpu_view view)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t j0 = item->block * BACKWARD_N, m = rows->count, count = view.count, n = fa_pad(count, FA_CHANNEL_PAD), nr = ops->nr;
    const int64_t d = plan->d_row, dv = plan->dv_row, row = item->first_row + block * BACKWARD_M;
    const struct fa_result s = { t->s, BACKWARD_N }, ds = { t->ds, BACKWARD_N };
    fa_cpu_load_rows(plan, rows, &plan->p->q, plan->p->d, t->q, d);
    fa_cpu_load_rows(plan, rows, &plan->p->dout, plan->p->d_v, t->dout, dv);

    ops->gemm(s, (struct fa_left){ t->q, d, 1 }, (struct fa_right){ t->k_panels, nr, nr * plan->d_pad }, m, n, plan->p->d, false);
    ops->gemm(ds, (struct fa_left){ t->dout, dv, 1 }, (struct fa_right){ t->v_panels, nr, nr * plan->dv_pad }, m, n, plan->p->d_v, false);
    fa_cpu_modify_scores(plan, rows, 0, s, j0, view, t->derivative);
    if (t->z) fa_cpu_dropout_mask(plan, rows, 0, t->z, BACKWARD_N, j0, n);
    const bool bias_next = t->derivative && job->dbias.kind != NO_DBIAS;        /* dbias takes dS before softcap's derivative */
    ops->softmax_backward(s, ds, m, n, plan->exponent_scale, job->lse + row, job->delta + row, t->z, bias_next ? NULL : t->derivative);
    fa_cpu_add_tile(&job->dbias, rows, item, block, ds, count);
    float row_sums[BACKWARD_M];
    fa_cpu_sum_rows(&job->dbias, rows, ds, count, row_sums);
    if (bias_next) ops->multiply(ds, m, n, t->derivative);

    const struct fa_left p_t = { t->s, 1, BACKWARD_N }, ds_t = { t->ds, 1, BACKWARD_N };
    ops->gemm((struct fa_result){ t->dv, dv }, p_t, (struct fa_right){ t->dout, dv, nr }, count, plan->dv_pad, m, true);
    ops->gemm((struct fa_result){ t->dk, d }, ds_t, (struct fa_right){ t->q, d, nr }, count, plan->d_pad, m, true);
    add_dq(job, rows, item, block, t, count, row_sums);
}

static void load_keys(const struct backward *job, const struct scratch *t, const struct cpu_item *item, int64_t count)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const int64_t j0 = item->block * BACKWARD_N, size = (int64_t)fa_sizeof(p->dtype);
    const char *k = (char *)p->k.ptr + size * fa_offset(&p->k, item->b, item->seq.k0, j0, item->kv_head);
    const char *v = (char *)p->v.ptr + size * fa_offset(&p->v, item->b, item->seq.k0, j0, item->kv_head);
    plan->ops->load_rows(t->k, plan->dv_row, v, p->dtype, p->v.stride_s, count, p->d_v);
    plan->ops->pack_transposed(t->v_panels, t->k, plan->dv_row, count, p->d_v);
    plan->ops->load_rows(t->k, plan->d_row, k, p->dtype, p->k.stride_s, count, p->d);
    plan->ops->pack_transposed(t->k_panels, t->k, plan->d_row, count, p->d);
}

static void differentiate(const struct backward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const struct scratch t = scratch_of(job, thread);
    const struct cpu_item item = fa_cpu_key_item(plan, index);
    const int64_t j0 = item.block * BACKWARD_N, left = item.seq.sk - j0, count = left < BACKWARD_N ? left : BACKWARD_N;
    const int64_t row_blocks = fa_blocks(plan->group * item.seq.sq, BACKWARD_M);
    load_keys(job, &t, &item, count);
    memset(t.dk, 0, (size_t)(4 * count * plan->d_row));
    memset(t.dv, 0, (size_t)(4 * count * plan->dv_row));

    fa_wait_for(&job->prepared[item.b * p->hk + item.kv_head], (int32_t)row_blocks);
    for (int64_t block = row_blocks - 1; block >= 0; block--) {
        struct cpu_rows rows;
        fa_cpu_make_rows(plan, &item, block, &rows);
        const bool meets = rows.hull.last > j0 && rows.hull.first < j0 + count;
        const int64_t seen = rows.hull.last - j0;
        struct cpu_view view = { 0, false };
        if (meets) view = fa_cpu_view(plan, &rows, 0, j0, seen < count ? seen : count);
        if (view.count > 0) {
            tile(job, &t, &rows, &item, block, view);
            continue;
        }
        fa_cpu_add_tile(&job->dbias, &rows, &item, block, (struct fa_result){ t.ds, BACKWARD_N }, 0);   /* others wait for it */
        if (meets) add_dq(job, &rows, &item, block, &t, 0, NULL);
    }
    fa_cpu_end_item(&job->dbias, &item);
    const int64_t size = (int64_t)fa_sizeof(p->dtype);
    for (int64_t j = 0; j < count; j++) {
        char *dk = (char *)p->dk.ptr + size * fa_offset(&p->dk, item.b, item.seq.k0, j0 + j, item.kv_head);
        char *dv = (char *)p->dv.ptr + size * fa_offset(&p->dv, item.b, item.seq.k0, j0 + j, item.kv_head);
        plan->ops->store_row(dk, p->dtype, t.dk + j * plan->d_row, p->d, (float)p->scale);
        plan->ops->store_row(dv, p->dtype, t.dv + j * plan->dv_row, p->d_v, 1);
    }
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
    fa_parallel(p->n_threads, job.plan.total.row_blocks + job.plan.total.key_blocks, work, &job);
    fa_cpu_finish_dbias(&job.dbias);
    fa_fill_outside(FA_BACKWARD, p);
    return FA_OK;
}
