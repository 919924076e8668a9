/* cpu/plan.h: how a call is cut into items, where its scratch lies, and what a block of rows sees.
 *
 * The query rows of a group (the heads that share a key/value head) are one run of group * sq rows: row r is position
 * r % sq of head r / sq. A row block is so many such rows, a key block so many keys; both depend on the problem alone,
 * never on the threads, so results are bit-reproducible. */
#ifndef FA_CPU_PLAN_H
#define FA_CPU_PLAN_H

#include "ops.h"

#define FA_LOG2E 1.4426950408889634
#define FA_LN2   0.6931471805599453

enum {
    MOST_ROWS = 256, MOST_KEYS = 512,   /* of a block */
    KEY_ALIGN = 64,     /* key blocks start at multiples of this: of any panel and of a dropout piece */
};

struct cpu_sums {
    int64_t row_blocks, key_blocks;     /* times key/value heads */
    int64_t rows, keys;                 /* key/value heads * their rows, * their keys; padded, see head_rows, head_keys */
};

struct cpu_plan {
    const struct fa_params *p;
    const struct fa_cpu_ops *ops;
    struct fa_cpu_blocks block;         /* of this pass */
    int64_t s_row;                      /* row stride of S, of its operands, and of sums that lie transposed */
    int64_t group;                      /* query heads per key/value head */
    int64_t d_pad, dv_pad;              /* channels of operands */
    int64_t d_row, dv_row;              /* row strides: not 512 bytes, where a panel of rows would share half of L1's sets */
    int64_t d_right, dv_right;          /* those of load_right's operands */
    float exponent_scale;               /* P = exp2(exponent_scale (score - ...)) */
    bool scale_first;                   /* scores are multiplied by `scale` before anything else */
    float bias_factor;                  /* or as the bias is added: by this */
    bool is_plain;                      /* nothing comes between product and softmax but what fa_score_terms say */
    uint64_t seed, offset;              /* dropout */
    int keep256;
    struct cpu_sums *before;            /* (b,) sums over the sequences before each */
    struct cpu_sums total;
};

/* The scratch handed in, cut off from the front. With base = NULL it only counts. */
struct cpu_arena { char *base; int64_t used; };
void *fa_cpu_take(struct cpu_arena *arena, int64_t bytes);

struct cpu_plan fa_cpu_make_plan(enum fa_pass pass, const struct fa_params *p, struct cpu_arena *arena);

/* One item: block `block` of key/value head `kv_head` of sequence `b`. Blocks come last first: longest first if causal. */
struct cpu_item { int64_t b, kv_head, block, first_row; struct fa_sequence seq; };
struct cpu_item fa_cpu_row_item(const struct cpu_plan *plan, int64_t index);
struct cpu_item fa_cpu_key_item(const struct cpu_plan *plan, int64_t index);

/* The element `at` of an array of operands. */
static inline void *fa_operand(const struct cpu_plan *plan, const void *base, int64_t at)
{
    return (char *)base + plan->ops->element * at;
}

static inline int64_t fa_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
static inline int64_t fa_pad(int64_t n, int64_t to) { return fa_blocks(n, to) * to; }

/* Rows and packed keys of a key/value head: products write whole tiles, and read whole panels. */
static inline int64_t fa_head_rows(const struct cpu_plan *plan, int64_t sq) { return fa_pad(plan->group * sq, FA_ROW_PAD); }
static inline int64_t fa_head_keys(const struct cpu_plan *plan, int64_t sk)
{
    return fa_pad(sk, plan->ops->nr > plan->ops->pad ? plan->ops->nr : plan->ops->pad);
}

struct cpu_rows {
    int64_t b, count;
    struct fa_sequence seq;
    int64_t head[MOST_ROWS], i[MOST_ROWS];
    struct fa_range keys[MOST_ROWS];     /* visible to each row */
    struct fa_range hull;               /* and to any of them */
};
void fa_cpu_make_rows(const struct cpu_plan *plan, const struct cpu_item *item, int64_t block, struct cpu_rows *rows);

/* dst (count, ld), a left operand, <- these rows of a tensor indexed by query head. */
void fa_cpu_load_rows(const struct cpu_plan *plan, const struct cpu_rows *rows, const struct fa_tensor *t, int64_t n,
                      void *dst, int64_t ld);
static inline void *fa_cpu_row_at(const struct cpu_plan *plan, const struct cpu_rows *rows, const struct fa_tensor *t, int64_t r)
{
    return (char *)t->ptr + fa_offset(t, rows->b, rows->seq.q0, rows->i[r], rows->head[r]) * (int64_t)fa_sizeof(plan->p->dtype);
}

/* What mask and bias let see of the keys j0 .. j0 + count: none of the block's rows `row` .. `row + m` sees those after the first
 * `count`; `masked`: not every row sees all of these. */
struct cpu_view { int64_t count; bool masked; };
struct cpu_view fa_cpu_view(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count);

/* How many of the keys j0 .. j0 + count of an item's head are operands at all: a mask that is the same for all rows hides the others. */
int64_t fa_cpu_used_keys(const struct cpu_plan *plan, const struct cpu_item *item, int64_t j0, int64_t count);

/* Every change of a score between Q K^T and the softmax, in the order of DESIGN's equations: scale, softcap, ALiBi, bias,
 * then -inf for each key that its row does not see. Rows of s are `row` .. `row + m` of the block, columns are the keys
 * j0 .. j0 + view.count, padded to n. `derivative` (softcap only) is optional. */
void fa_cpu_modify_scores(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                          int64_t j0, struct cpu_view view, float *derivative);
/* A strip's terms, with room for rows that do not lie side by side. */
struct cpu_terms {
    struct fa_score_terms rows;
    float bias[FA_ROW_PAD][MOST_KEYS];
    uint8_t mask[FA_ROW_PAD][MOST_KEYS];
};

/* How many of a view's columns, from the first on and in multiples of `pad`, need no more than terms, which it fills in: all the
 * rows see all of them, but for what mask and bias hide. */
int64_t fa_cpu_plain_columns(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0,
                             struct cpu_view view, struct cpu_terms *terms);
void fa_cpu_fill_terms(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, int64_t j0, int64_t count,
                       bool masked, struct cpu_terms *terms);
void fa_cpu_add_bias(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                     int64_t j0, int64_t count);
void fa_cpu_apply_mask(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t m, struct fa_result s,
                       int64_t j0, int64_t count);
/* z, laid out as S, <- 0 or 256 / keep256. j0 is a multiple of KEY_ALIGN. */
void fa_cpu_dropout_mask(const struct cpu_plan *plan, const struct cpu_rows *rows, int64_t row, int64_t count,
                         float *z, int64_t ld, int64_t j0, int64_t n);

int64_t fa_cpu_forward_workspace(const struct fa_params *p);
int64_t fa_cpu_backward_workspace(const struct fa_params *p);
enum fa_status fa_cpu_forward(const struct fa_params *p, struct fa_error *error);
enum fa_status fa_cpu_backward(const struct fa_params *p, struct fa_error *error);

#endif
