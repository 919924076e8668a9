/* cpu/dbias.c: the gradient of a bias: dS summed over the scores that share an element, each sum in one order, whatever the
 * threads.
 *
 *     varies along q and k       tiles of dS are added to fp32 sums of dbias's own shape. Where items (b, kv head) share an
 *                                element, they add in turns, first item first, each row block by itself, as dq's do. The
 *                                first stores instead, and the last stores into dbias: where nothing is shared, dS itself.
 *     along k only               an item owns its keys: it adds up their columns, (b, h, sk)
 *     along q only, or not       rows are added up in dq's turns, (b, h, sq)
 *
 * The last two are then summed over b, h and q, in double. A tile costs one pass over dS, where working out S and dP again
 * for a pass of its own would cost two of backward's five products. */
#define _DEFAULT_SOURCE 1
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "dbias.h"
#include "parallel.h"
#include "../common/convert.h"

enum {
    CHUNK = 64,                     /* rows of sums that are cleared or converted as one item */
    LARGE = 8 << 20,                /* bytes of a dbias that no cache is going to keep */
};

static bool shares_batch(const struct fa_params *p) { return p->dbias.stride_b == 0 && p->b > 1; }
static bool shares_heads(const struct fa_params *p) { return p->dbias.stride_h == 0 && p->h > 1; }
static int64_t row_blocks(const struct cpu_plan *plan) { return fa_blocks(plan->group * plan->p->sq, plan->block.m); }
static int64_t key_blocks(const struct cpu_plan *plan) { return fa_blocks(plan->p->sk, plan->block.n); }

/* Elements along an index of dbias. */
static int64_t elements(int64_t stride, int64_t size) { return stride ? size : 1; }

static void take_line_sums(struct cpu_dbias *g, int64_t line, struct cpu_arena *arena)
{
    const struct fa_params *p = g->plan->p;
    g->stride_b = p->h * line;
    g->stride_h = line;
    g->stride_q = g->kind == DBIAS_ROWS;
    g->is_cleared = true;
    g->sums = fa_cpu_take(arena, 4 * p->b * p->h * line);
}

static void take_tile_sums(struct cpu_dbias *g, struct cpu_arena *arena)
{
    const struct fa_params *p = g->plan->p;
    const struct fa_scores *t = &p->dbias;
    const int64_t matrix = p->sq * p->sk, heads = elements(t->stride_h, p->h), batch = elements(t->stride_b, p->b);
    const bool shared = shares_batch(p) || shares_heads(p);
    /* The rows of a group's heads that share an element lie in different row blocks; a sequence may end before another; of
     * an empty batch there is no term. */
    g->by_item = shares_heads(p) && g->plan->group > 1;
    g->is_cleared = g->by_item || p->seqused_k || p->b == 0;
    g->is_apart = t->stride_k != 1 || t->dtype != FA_FLOAT32;
    g->stride_b = g->is_apart ? (batch > 1 ? heads * matrix : 0) : t->stride_b;
    g->stride_h = g->is_apart ? (heads > 1 ? matrix : 0) : t->stride_h;
    g->stride_q = g->is_apart ? p->sk : t->stride_q;
    g->is_streamed = !shared && !g->is_cleared && t->stride_k == 1 && t->dtype != FA_FLOAT64
                  && batch * heads * matrix * (int64_t)fa_sizeof(t->dtype) >= LARGE;
    g->sums = t->ptr;
    if (g->is_apart) g->sums = fa_cpu_take(arena, shared || g->is_cleared ? 4 * batch * heads * matrix : 0);
    if (shared) g->turns = fa_cpu_take(arena, 4 * p->b * p->hk * key_blocks(g->plan) * row_blocks(g->plan));
}

struct cpu_dbias fa_cpu_make_dbias(const struct cpu_plan *plan, struct cpu_arena *arena)
{
    const struct fa_params *p = plan->p;
    struct cpu_dbias g = { .plan = plan };
    if (!p->dbias.ptr) return g;
    g.kind = p->dbias.stride_k == 0 ? DBIAS_ROWS : p->dbias.stride_q == 0 ? DBIAS_COLUMNS : DBIAS_TILES;
    if (g.kind == DBIAS_TILES) take_tile_sums(&g, arena);
    else take_line_sums(&g, g.kind == DBIAS_ROWS ? p->sq : p->sk, arena);
    return g;
}

/* ------------------------------------------------------------------------------------------------------ turns */

/* The counter of an item's row block. */
static int32_t *turn_of(const struct cpu_dbias *g, const struct cpu_item *item, int64_t block)
{
    const struct fa_params *p = g->plan->p;
    const int64_t b = shares_batch(p) ? 0 : item->b, head = shares_heads(p) ? 0 : item->kv_head;
    const int64_t keys = (b * p->hk + head) * key_blocks(g->plan) + item->block;
    return g->turns + keys * row_blocks(g->plan) + (g->by_item ? 0 : block);
}

/* How many items that share with this one come before it: those of shorter sequences may end before its keys. */
static int32_t items_before(const struct cpu_dbias *g, const struct cpu_item *item)
{
    const struct fa_params *p = g->plan->p;
    int64_t sequences = 0;
    for (int64_t b = 0; b < item->b && shares_batch(p); b++)
        sequences += fa_sequence_of(p, b).sk > item->block * g->plan->block.n;
    return (int32_t)(shares_heads(p) ? sequences * p->hk + item->kv_head : sequences);
}

/* And how many there are, where all sequences are of one length. */
static int32_t items_sharing(const struct fa_params *p)
{
    return (int32_t)((shares_batch(p) ? p->b : 1) * (shares_heads(p) ? p->hk : 1));
}

void fa_cpu_end_item(const struct cpu_dbias *g, const struct cpu_item *item)
{
    if (!g->turns || !g->by_item) return;
    fa_wait_for(turn_of(g, item, 0), items_before(g, item));
    fa_advance(turn_of(g, item, 0));
}

/* ----------------------------------------------------------------------------------------------------- adding */

/* A row of dbias, n of its elements from index `at` on. */
static void store_row(const struct cpu_dbias *g, int64_t at, const float *from, int64_t n)
{
    const struct fa_scores *t = &g->plan->p->dbias;
    if (t->stride_k == 1 && t->dtype != FA_FLOAT64)
        g->plan->ops->store_row((char *)t->ptr + at * (int64_t)fa_sizeof(t->dtype), t->dtype, from, n, 1);
    else
        for (int64_t j = 0; j < n; j++) fa_store(t->dtype, t->ptr, at + j * t->stride_k, from[j]);
}

/* Where row r's sums lie, from key j0 on. */
static float *sums_at(const struct cpu_dbias *g, const struct cpu_rows *rows, int64_t r, int64_t j0)
{
    return g->sums + rows->b * g->stride_b + rows->head[r] * g->stride_h + rows->i[r] * g->stride_q + j0;
}

static void prefetch(const float *x, int64_t n)
{
    for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(x + j, 1);
}

static void add_rows(const struct cpu_dbias *g, const struct cpu_rows *rows, int64_t j0, struct fa_result ds, int64_t count)
{
    for (int64_t r = 0; r < rows->count; r++) {
        float *to = sums_at(g, rows, r, j0);
        g->plan->ops->add_row(to, to, ds.ptr + r * ds.row, count);
    }
}

/* The same where nothing is shared and no key is hidden: dS itself is stored. */
static void stream_tile(const struct cpu_dbias *g, const struct cpu_rows *rows, int64_t j0, struct fa_result ds, int64_t width)
{
    const struct fa_scores *t = &g->plan->p->dbias;
    for (int64_t r = 0, end; r < rows->count; r = end) {
        const int64_t at = rows->b * t->stride_b + rows->head[r] * t->stride_h + rows->i[r] * t->stride_q + j0;
        for (end = r + 1; end < rows->count && rows->head[end] == rows->head[r]; end++) {}
        g->plan->ops->stream_rows((char *)t->ptr + at * (int64_t)fa_sizeof(t->dtype), t->dtype, t->stride_q,
                                  (struct fa_result){ ds.ptr + r * ds.row, ds.row }, end - r, width);
    }
}

/* The item's `width` keys, of which the first `count` have a term; `before` of `all` terms are in the sums. */
static void pass_rows(const struct cpu_dbias *g, const struct cpu_rows *rows, int64_t j0, struct fa_result ds, int64_t count,
                      int64_t width, int32_t before, int32_t all)
{
    const struct fa_scores *t = &g->plan->p->dbias;
    const bool goes_apart = g->is_apart && before + 1 == all;   /* else the sums are where it goes */
    enum { AHEAD = 4 };                                         /* rows lie pages apart */
    for (int64_t r = 0; r < rows->count; r++) {
        float total[MOST_KEYS], *sums = goes_apart && before == 0 ? NULL : sums_at(g, rows, r, j0), *to = goes_apart ? total : sums;
        const float *from = ds.ptr + r * ds.row;
        if (before == 0) {
            memcpy(to, from, (size_t)(4 * count));
            memset(to + count, 0, (size_t)(4 * (width - count)));
        } else {
            if (r + AHEAD < rows->count) prefetch(sums_at(g, rows, r + AHEAD, j0), width);
            g->plan->ops->add_row(to, sums, from, count);
            if (goes_apart) memcpy(to + count, sums + count, (size_t)(4 * (width - count)));
        }
        if (goes_apart) store_row(g, rows->b * t->stride_b + rows->head[r] * t->stride_h + rows->i[r] * t->stride_q + j0 * t->stride_k, total, width);
    }
}

void fa_cpu_add_tile(const struct cpu_dbias *g, const struct cpu_rows *rows, const struct cpu_item *item, int64_t block,
                     struct fa_result ds, int64_t count)
{
    const int64_t j0 = item->block * g->plan->block.n, left = item->seq.sk - j0;
    if (g->kind != DBIAS_TILES && g->kind != DBIAS_COLUMNS) return;
    const int32_t before = g->turns ? items_before(g, item) : 0;
    if (g->turns) fa_wait_for(turn_of(g, item, block), before);
    const int64_t width = left < g->plan->block.n ? left : g->plan->block.n;
    if (g->is_cleared) add_rows(g, rows, j0, ds, count);
    else if (g->is_streamed && count == width) stream_tile(g, rows, j0, ds, width);
    else pass_rows(g, rows, j0, ds, count, width, before, items_sharing(g->plan->p));
    if (g->turns && !g->by_item) fa_advance(turn_of(g, item, block));
}

void fa_cpu_sum_rows(const struct cpu_dbias *g, const struct cpu_rows *rows, struct fa_result ds, int64_t count, float *sums)
{
    const int64_t whole = count / 16 * 16;                      /* what lies after the tile may be NaN */
    for (int64_t r = 0; r < rows->count && g->kind == DBIAS_ROWS; r++) {
        const float *row = ds.ptr + r * ds.row;
        sums[r] = g->plan->ops->sum(row, whole);
        for (int64_t j = whole; j < count; j++) sums[r] += row[j];
    }
}

void fa_cpu_add_row_sums(const struct cpu_dbias *g, const struct cpu_rows *rows, const float *sums)
{
    for (int64_t r = 0; r < rows->count && g->kind == DBIAS_ROWS; r++)
        g->sums[rows->b * g->stride_b + rows->head[r] * g->stride_h + rows->i[r]] += sums[r];
}

/* ------------------------------------------------------------------------------------------- before and after */

/* Runs of rows (b, h, i) of a dbias that is summed in tiles. */
static int64_t chunks(const struct cpu_dbias *g)
{
    const struct fa_params *p = g->plan->p;
    return elements(p->dbias.stride_b, p->b) * elements(p->dbias.stride_h, p->h) * fa_blocks(p->sq, CHUNK);
}

struct chunk { int64_t b, head, first, last; };

static struct chunk chunk_of(const struct cpu_dbias *g, int64_t index)
{
    const struct fa_params *p = g->plan->p;
    const int64_t per_head = fa_blocks(p->sq, CHUNK), heads = elements(p->dbias.stride_h, p->h), first = index % per_head * CHUNK;
    const int64_t end = first + CHUNK;
    return (struct chunk){ index / per_head / heads, index / per_head % heads, first, end < p->sq ? end : p->sq };
}

static void clear_rows(void *data, int64_t thread, int64_t index)
{
    const struct cpu_dbias *g = data;
    const struct chunk c = chunk_of(g, index);
    (void)thread;
    for (int64_t i = c.first; i < c.last; i++)
        memset(g->sums + c.b * g->stride_b + c.head * g->stride_h + i * g->stride_q, 0, (size_t)(4 * g->plan->p->sk));
}

/* A large new dbias comes from the system page by page as rows of tiles are written, far apart. Writing 64 MB of it takes 57 ms
 * in pages of 4 KB, 23 in pages of 2 MB, 15 past the caches as well, of which 12 are the system's; without dbias a backward
 * pass that makes so much takes 130. It is advice, and may be refused. */
static void advise_large_pages(const struct fa_params *p)
{
#ifdef MADV_HUGEPAGE
    const struct fa_scores *t = &p->dbias;
    const uintptr_t large = 2 << 20, start = ((uintptr_t)t->ptr + large - 1) / large * large;
    const int64_t last = (p->b - 1) * t->stride_b + (p->h - 1) * t->stride_h + (p->sq - 1) * t->stride_q + (p->sk - 1) * t->stride_k;
    const uintptr_t end = ((uintptr_t)t->ptr + (uintptr_t)last * fa_sizeof(t->dtype)) / large * large;
    if (last > 0 && end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)p;
#endif
}

void fa_cpu_begin_dbias(const struct cpu_dbias *g)
{
    const struct fa_params *p = g->plan->p;
    if (g->kind == DBIAS_TILES) advise_large_pages(p);
    if (g->turns) memset(g->turns, 0, (size_t)(4 * p->b * p->hk * key_blocks(g->plan) * row_blocks(g->plan)));
    if (g->kind == DBIAS_TILES && g->is_cleared) fa_parallel(g->plan->ops, p->n_threads, chunks(g), clear_rows, (void *)g);
    if (g->kind == DBIAS_ROWS || g->kind == DBIAS_COLUMNS) memset(g->sums, 0, (size_t)(4 * p->b * g->stride_b));
}

static void convert_rows(void *data, int64_t thread, int64_t index)
{
    const struct cpu_dbias *g = data;
    const struct fa_scores *t = &g->plan->p->dbias;
    const struct chunk c = chunk_of(g, index);
    (void)thread;
    for (int64_t i = c.first; i < c.last; i++)
        store_row(g, c.b * t->stride_b + c.head * t->stride_h + i * t->stride_q,
                  g->sums + c.b * g->stride_b + c.head * g->stride_h + i * g->stride_q, g->plan->p->sk);
}

/* Sums over lines (b, h) from first to below last, at positions x0 to below x1. */
static double sum_lines(const struct cpu_dbias *g, int64_t b0, int64_t b1, int64_t h0, int64_t h1, int64_t x0, int64_t x1)
{
    double sum = 0;
    for (int64_t b = b0; b < b1; b++)
        for (int64_t head = h0; head < h1; head++)
            for (int64_t x = x0; x < x1; x++) sum += g->sums[b * g->stride_b + head * g->stride_h + x];
    return sum;
}

static void sum_all_lines(const struct cpu_dbias *g)
{
    const struct fa_params *p = g->plan->p;
    const struct fa_scores *t = &p->dbias;
    const int64_t stride_x = g->kind == DBIAS_ROWS ? t->stride_q : t->stride_k, line = g->stride_h;
    const int64_t each_b = t->stride_b ? 1 : p->b, each_h = t->stride_h ? 1 : p->h, each_x = stride_x ? 1 : line;
    for (int64_t b = 0; b < elements(t->stride_b, p->b); b++)
        for (int64_t head = 0; head < elements(t->stride_h, p->h); head++)
            for (int64_t x = 0; x < elements(stride_x, line); x++)
                fa_store(t->dtype, t->ptr, b * t->stride_b + head * t->stride_h + x * stride_x,
                         sum_lines(g, b, b + each_b, head, head + each_h, x, x + each_x));
}

void fa_cpu_finish_dbias(const struct cpu_dbias *g)
{
    if (g->kind == DBIAS_TILES && g->is_cleared && g->is_apart) fa_parallel(g->plan->ops, g->plan->p->n_threads, chunks(g), convert_rows, (void *)g);
    else if (g->kind == DBIAS_ROWS || g->kind == DBIAS_COLUMNS) sum_all_lines(g);
}
