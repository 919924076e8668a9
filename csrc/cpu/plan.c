/* cpu/plan.c: items, scratch, and what a block of rows sees (plan.h); and the CPU's row of the kernel table. */
#include <math.h>
#include <string.h>

#include "plan.h"
#include "../common/philox.h"

void *fa_cpu_take(struct cpu_arena *arena, int64_t bytes)
{
    void *start = arena->base ? arena->base + arena->used : NULL;
    arena->used += fa_pad(bytes, 64);
    return start;
}

struct cpu_plan fa_cpu_make_plan(enum fa_pass pass, const struct fa_params *p, struct cpu_arena *arena)
{
    /* Scores pass through natural units; also where lse / scale might overflow. */
    const bool natural = p->softcap > 0 || p->alibi || p->bias.ptr || p->scale < 1e-20;
    const bool bias_first = p->bias.ptr && !p->alibi && !(p->softcap > 0);
    struct cpu_plan plan = {
        .p = p, .ops = fa_cpu_ops(p->dtype), .group = p->h / p->hk,
        .exponent_scale = (float)(natural ? FA_LOG2E : p->scale * FA_LOG2E),
        .scale_first = natural && !(p->softcap > 0) && !bias_first,
        .bias_factor = bias_first ? (float)p->scale : 1,
        .keep256 = fa_keep256(p->dropout_p),
    };
    plan.is_plain = (!natural || bias_first) && plan.keep256 == 256;
    plan.block = pass == FA_FORWARD ? plan.ops->forward : plan.ops->backward;
    if (p->dbias.ptr) plan.block.strip = plan.block.m;          /* which takes whole blocks of dS */
    /* Tiles are 16 rows: at a power of two apart they would share few of L1's sets. */
    plan.s_row = plan.block.n + (plan.ops->element == 2 ? plan.ops->pad : 0);
    plan.d_pad = fa_pad(p->d, plan.ops->pad);
    plan.dv_pad = fa_pad(p->d_v, plan.ops->pad);
    plan.d_row = plan.d_pad + (plan.d_pad % 128 ? 0 : plan.ops->pad);
    plan.dv_row = plan.dv_pad + (plan.dv_pad % 128 ? 0 : plan.ops->pad);
    plan.d_right = plan.ops->load_right == plan.ops->load_rows ? plan.d_row : plan.d_pad;
    plan.dv_right = plan.ops->load_right == plan.ops->load_rows ? plan.dv_row : plan.dv_pad;
    if (plan.keep256 < 256 && arena->base) {
        plan.seed = (uint64_t)p->rng[0];
        plan.offset = (uint64_t)p->rng[1];
    }
    plan.before = fa_cpu_take(arena, p->b * (int64_t)sizeof *plan.before);
    for (int64_t b = 0; b < p->b; b++) {
        const struct fa_sequence seq = fa_sequence_of(p, b);
        if (plan.before) plan.before[b] = plan.total;
        plan.total.row_blocks += p->hk * fa_blocks(plan.group * seq.sq, plan.block.m);
        plan.total.key_blocks += p->hk * fa_blocks(seq.sk, plan.block.n);
        plan.total.rows += p->hk * fa_head_rows(&plan, seq.sq);
        plan.total.keys += p->hk * fa_head_keys(&plan, seq.sk);
    }
    return plan;
}

/* The last sequence whose items start at or before `index`; sequences without items are passed over. */
static struct cpu_item locate(const struct cpu_plan *plan, int64_t index, bool of_keys)
{
    int64_t low = 0, high = plan->p->b - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        const int64_t start = of_keys ? plan->before[middle].key_blocks : plan->before[middle].row_blocks;
        if (start <= index) low = middle;
        else high = middle - 1;
    }
    struct cpu_item item = { .b = low, .seq = fa_sequence_of(plan->p, low) };
    index -= of_keys ? plan->before[low].key_blocks : plan->before[low].row_blocks;
    item.kv_head = index % plan->p->hk;
    item.block = index / plan->p->hk;
    item.first_row = plan->before[low].rows + item.kv_head * fa_head_rows(plan, item.seq.sq);
    return item;
}

/* Rows run from the last block to the first: causal attention's longest rows come first. */
struct cpu_item fa_cpu_row_item(const struct cpu_plan *plan, int64_t index)
{
    struct cpu_item item = locate(plan, index, false);
    item.block = fa_blocks(plan->group * item.seq.sq, plan->block.m) - 1 - item.block;
    return item;
}

/* Keys run from the first block to the last, for the same reason. */
struct cpu_item fa_cpu_key_item(const struct cpu_plan *plan, int64_t index)
{
    return locate(plan, index, true);
}

void fa_cpu_make_rows(const struct cpu_plan *plan, const struct cpu_item *item, int64_t block, struct cpu_rows *rows)
{
    const int64_t start = block * plan->block.m, left = plan->group * item->seq.sq - start;
    rows->b = item->b;
    rows->seq = item->seq;
    rows->count = left < plan->block.m ? left : plan->block.m;
    rows->hull = (struct fa_range){ item->seq.sk, 0 };
    int64_t head = item->kv_head * plan->group + start / item->seq.sq, i = start % item->seq.sq;
    for (int64_t r = 0; r < rows->count; r++) {
        const struct fa_range keys = fa_visible(plan->p, item->seq.sq, item->seq.sk, i);
        rows->head[r] = head;
        rows->i[r] = i;
        rows->keys[r] = keys;
        if (keys.first < keys.last) {
            if (keys.first < rows->hull.first) rows->hull.first = keys.first;
            if (keys.last > rows->hull.last) rows->hull.last = keys.last;
        }
        if (++i == item->seq.sq) { i = 0; head++; }
    }
}

/* Rows of one head follow each other at the tensor's stride: one call a run. */
void fa_cpu_load_rows(const struct cpu_plan *plan, const struct cpu_rows *rows, const struct fa_tensor *t, int64_t n,
                      void *dst, int64_t ld)
{
    for (int64_t r = 0, end; r < rows->count; r = end) {
        for (end = r + 1; end < rows->count && rows->head[end] == rows->head[r]; end++) {}
        plan->ops->load_rows(fa_operand(plan, dst, r * ld), ld, fa_cpu_row_at(plan, rows, t, r), plan->p->dtype, t->stride_s, end - r, n);
    }
}

static void hide(float *s, int64_t from, int64_t to)
{
    for (int64_t j = from; j < to; j++) s[j] = -INFINITY;
}

void fa_cpu_modify_scores(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                          int64_t j0, struct cpu_view view, float *derivative)
{
    const struct fa_params *p = plan->p;
    const struct fa_cpu_ops *ops = plan->ops;
    const int64_t n = fa_pad(view.count, ops->pad);
    if (p->softcap > 0)
        ops->softcap(s, m, n, (float)(p->scale / p->softcap), (float)p->softcap, derivative);
    else if (plan->scale_first)
        ops->scale(s, m, n, (float)p->scale);
    for (int64_t r = row; p->alibi && r < row + m; r++)
        ops->alibi_row(s.ptr + (r - row) * s.row, n, p->alibi[rows->b * p->alibi_stride_b + rows->head[r]],
                       (float)(rows->i[r] + rows->seq.sk - rows->seq.sq - j0));
    if (p->bias.ptr) fa_cpu_add_bias(plan, rows, row, m, s, j0, view.count);
    if (view.masked) fa_cpu_apply_mask(plan, rows, row, m, s, j0, view.count);
    for (int64_t r = row; r < row + m; r++, s.ptr += s.row) {
        const int64_t first = rows->keys[r].first - j0, seen = rows->keys[r].last - j0;
        const int64_t last = seen < view.count ? seen : view.count;
        if (first > 0) hide(s.ptr, 0, first < n ? first : n);
        if (last < n) hide(s.ptr, last > 0 ? last : 0, n);
    }
}

int64_t fa_cpu_plain_columns(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0,
                             struct cpu_view view, struct cpu_terms *terms)
{
    int64_t first = 0, last = j0 + view.count;
    if (!plan->is_plain) return 0;
    for (int64_t r = row; r < row + m; r++) {
        if (rows->keys[r].first > first) first = rows->keys[r].first;
        if (rows->keys[r].last < last) last = rows->keys[r].last;
    }
    const int64_t columns = first <= j0 && last > j0 ? (last - j0) / plan->ops->pad * plan->ops->pad : 0;
    if (columns > 0) fa_cpu_fill_terms(plan, rows, row, m, j0, columns, view.masked, terms);
    return columns;
}

void fa_cpu_dropout_mask(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t count,
                         float *z, int64_t ld, int64_t j0, int64_t n)
{
    const float kept = 256.0f / (float)plan->keep256;
    for (int64_t r = row, end; r < row + count; r = end) {      /* runs of rows in one piece */
        const int64_t head = rows->head[r], piece_i = rows->i[r] / FA_PIECE;
        for (end = r + 1; end < row + count && rows->head[end] == head && rows->i[end] / FA_PIECE == piece_i; end++) {}
        for (int64_t j = 0; j < n; j += FA_PIECE) {
            float piece[FA_PIECE * FA_PIECE];
            plan->ops->dropout_piece(piece, plan->seed, plan->offset, (uint32_t)(rows->b * plan->p->h + head),
                                     (uint32_t)piece_i, (uint32_t)((j0 + j) / FA_PIECE), plan->keep256, kept);
            for (int64_t x = r; x < end; x++)
                memcpy(z + (x - row) * ld + j, piece + rows->i[x] % FA_PIECE * FA_PIECE, FA_PIECE * sizeof *z);
        }
    }
}

/* -------------------------------------------------------------------------------------------- kernel table row */

static bool supports(enum fa_pass pass, const struct fa_params *p, struct fa_error *why)
{
    (void)pass;
    if (p->device != FA_CPU) return fa_fail(why, FA_UNSUPPORTED, "runs on the CPU's memory only"), false;
    if (p->dtype == FA_FLOAT64) return fa_fail(why, FA_UNSUPPORTED, "computes in fp32; float64 runs on the reference kernel"), false;
    if (p->d > FA_MAX_CHANNELS || p->d_v > FA_MAX_CHANNELS)
        return fa_fail(why, FA_UNSUPPORTED, "head dims of at most %d; q has %lld, v has %lld", FA_MAX_CHANNELS,
                       (long long)p->d, (long long)p->d_v), false;
    return true;
}

static int64_t workspace(enum fa_pass pass, const struct fa_params *p)
{
    return pass == FA_FORWARD ? fa_cpu_forward_workspace(p) : fa_cpu_backward_workspace(p);
}

const struct fa_kernel fa_kernel_cpu = { "cpu", supports, workspace, fa_cpu_forward, fa_cpu_backward };
