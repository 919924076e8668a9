/* cpu/forward.c: tiled exact attention (the paper's algorithm 1) on the CPU.
 *
 *     S = Q K^T    m' = max(m, rowmax S)    P = exp2(scale (S - m'))    l = alpha l + rowsum P    O = alpha O + P V
 *
 * The first items turn every key block into fp32 operands once: K transposed in panels, V in rows; 4 (d + dv) bytes a key
 * and key/value head. Each of the others is one block of rows, which waits for its head's keys, then walks over those it
 * can see. S (96 KB) and O stay in L2. The products take about 85 % of the time at d = 64, exp2 most of the rest. */
#include <math.h>
#include <string.h>

#include "parallel.h"
#include "plan.h"

struct scratch { float *q, *s, *o, *z; };       /* one thread's: (M, d) (M, N) (M, dv), z (M, N) with dropout */

struct forward {
    struct cpu_plan plan;
    float *k_panels, *v_rows;                   /* (keys, d_pad) in panels, (keys, dv_row) */
    int32_t *packed;                            /* (b, hk) key blocks that are ready */
    char *scratch;
    int64_t scratch_bytes;
};

static struct scratch take_scratch(const struct cpu_plan *plan, struct cpu_arena *arena)
{
    struct scratch t;
    const int64_t channels = plan->d_row > plan->dv_row ? plan->d_row : plan->dv_row;
    t.q = fa_cpu_take(arena, 4 * FORWARD_M * plan->d_row);
    t.s = fa_cpu_take(arena, 4 * FORWARD_M * FORWARD_N);
    t.o = fa_cpu_take(arena, 4 * FORWARD_M * channels);           /* pack_keys loads K rows here */
    t.z = plan->keep256 < 256 ? fa_cpu_take(arena, 4 * FORWARD_M * FORWARD_N) : NULL;
    return t;
}

static struct forward make_forward(const struct fa_params *p, struct cpu_arena *arena)
{
    struct forward job = { .plan = fa_cpu_make_plan(FA_FORWARD, p, arena) };
    job.k_panels = fa_cpu_take(arena, 4 * job.plan.total.keys * job.plan.d_pad);
    job.v_rows = fa_cpu_take(arena, 4 * job.plan.total.keys * job.plan.dv_row);
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
    return plan->before[item->b].keys + item->kv_head * fa_pad(item->seq.sk, plan->ops->nr);
}

static void pack_keys(const struct forward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_params *p = plan->p;
    const struct cpu_item item = fa_cpu_key_item(plan, index);
    const int64_t j0 = item.block * FORWARD_N, left = item.seq.sk - j0, count = left < FORWARD_N ? left : FORWARD_N;
    const int64_t key = first_key(plan, &item) + j0, size = (int64_t)fa_sizeof(p->dtype);
    const char *k = (char *)p->k.ptr + size * fa_offset(&p->k, item.b, item.seq.k0, j0, item.kv_head);
    const char *v = (char *)p->v.ptr + size * fa_offset(&p->v, item.b, item.seq.k0, j0, item.kv_head);
    float *rows = scratch_of(job, thread).o;
    plan->ops->load_rows(rows, plan->d_row, k, p->dtype, p->k.stride_s, count, p->d);
    plan->ops->pack_transposed(job->k_panels + key * plan->d_pad, rows, plan->d_row, count, p->d);
    plan->ops->load_rows(job->v_rows + key * plan->dv_row, plan->dv_row, v, p->dtype, p->v.stride_s, count, p->d_v);
    fa_advance(&job->packed[item.b * p->hk + item.kv_head]);
}

static void store_rows(const struct cpu_plan *plan, const struct cpu_rows *rows, const float *o, const float *max, const float *sum)
{
    const struct fa_params *p = plan->p;
    for (int64_t r = 0; r < rows->count; r++) {
        const bool empty = sum[r] == 0;                         /* no visible key; NaN is not empty */
        plan->ops->store_row(fa_cpu_row_at(plan, rows, &p->out, r), p->dtype, o + r * plan->dv_row, p->d_v, empty ? 0 : 1 / sum[r]);
        const double lse = (double)max[r] * plan->exponent_scale * FA_LN2 + log(sum[r]);
        ((float *)p->lse.ptr)[fa_offset(&p->lse, rows->b, rows->seq.q0, rows->i[r], rows->head[r])] = empty ? -INFINITY : (float)lse;
    }
}

static void attend(const struct forward *job, int64_t thread, int64_t index)
{
    const struct cpu_plan *plan = &job->plan;
    const struct fa_cpu_ops *ops = plan->ops;
    const struct scratch t = scratch_of(job, thread);
    const struct cpu_item item = fa_cpu_row_item(plan, index);
    const int64_t key = first_key(plan, &item), nr = ops->nr;
    struct cpu_rows rows;
    fa_cpu_make_rows(plan, &item, item.block, &rows);
    fa_cpu_load_rows(plan, &rows, &plan->p->q, plan->p->d, t.q, plan->d_row);

    const struct fa_result s = { t.s, FORWARD_N };
    const bool causal_run = rows.head[0] == rows.head[rows.count - 1];      /* one head: later rows see no fewer keys */
    float max[FORWARD_M], sum[FORWARD_M] = {0};
    for (int64_t r = 0; r < rows.count; r++) max[r] = -INFINITY;
    memset(t.o, 0, (size_t)(4 * rows.count * plan->dv_row));
    fa_wait_for(&job->packed[item.b * plan->p->hk + item.kv_head], (int32_t)fa_blocks(item.seq.sk, FORWARD_N));

    int64_t first = 0, step;                                    /* rows before see none of the keys from j0 on */
    for (int64_t j0 = rows.hull.first / KEY_ALIGN * KEY_ALIGN; j0 < rows.hull.last; j0 += step) {
        while (causal_run && rows.keys[first].last <= j0) first++;
        step = rows.keys[first].last < j0 + FORWARD_N ? KEY_ALIGN : FORWARD_N;      /* small steps along the diagonal */
        const int64_t left = rows.hull.last - j0;
        const struct cpu_view view = fa_cpu_view(plan, &rows, first, j0, left < step ? left : step);
        const int64_t count = view.count;
        if (count == 0) continue;                               /* mask and bias hide it */
        const int64_t m = rows.count - first, n = fa_pad(count, FA_CHANNEL_PAD);
        const struct fa_right k = { job->k_panels + (key + j0) * plan->d_pad, nr, nr * plan->d_pad };
        const struct fa_right v = { job->v_rows + (key + j0) * plan->dv_row, plan->dv_row, nr };
        const struct fa_result o = { t.o + first * plan->dv_row, plan->dv_row };
        ops->gemm(s, (struct fa_left){ t.q + first * plan->d_row, plan->d_row, 1 }, k, m, n, plan->p->d, false);    /* S = Q K^T */
        fa_cpu_modify_scores(plan, &rows, first, s, j0, view, NULL);
        ops->online_softmax(s, m, n, plan->exponent_scale, max + first, sum + first, o, plan->dv_pad);
        if (t.z) {
            fa_cpu_dropout_mask(plan, &rows, first, t.z, FORWARD_N, j0, n);
            ops->multiply(s, m, n, t.z);
        }
        ops->gemm(o, (struct fa_left){ t.s, FORWARD_N, 1 }, v, m, plan->dv_pad, count, true);                       /* O += P V */
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
    fa_parallel(p->n_threads, job.plan.total.key_blocks + job.plan.total.row_blocks, work, &job);
    fa_fill_outside(FA_FORWARD, p);
    if (p->s_dmask) fa_reference_dmask(p);
    return FA_OK;
}
