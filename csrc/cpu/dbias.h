/* cpu/dbias.h: the gradient of a bias, a part of the backward pass. */
#ifndef FA_CPU_DBIAS_H
#define FA_CPU_DBIAS_H

#include "plan.h"

enum cpu_dbias_kind { NO_DBIAS, DBIAS_ROWS, DBIAS_COLUMNS, DBIAS_TILES };

struct cpu_dbias {
    const struct cpu_plan *plan;
    enum cpu_dbias_kind kind;
    float *sums;                                    /* fp32, contiguous along keys; dbias itself where it is that */
    int64_t stride_b, stride_h, stride_q;           /* of the sums; 0 where shared */
    bool is_apart;                                  /* the sums are not dbias itself */
    bool is_cleared;                                /* they start at 0 and go to dbias at the end, not with the last term */
    bool is_streamed;                               /* tiles of dS go to dbias as they are, past the caches */
    int32_t *turns;                                 /* items that have added, where several share an element */
    bool by_item;                                   /* a turn is an item's whole walk, not one row block */
};

struct cpu_dbias fa_cpu_make_dbias(const struct cpu_plan *plan, struct cpu_arena *arena);

/* Before the pass: nothing has been added. After it: from sums to dbias. */
void fa_cpu_begin_dbias(const struct cpu_dbias *g);
void fa_cpu_finish_dbias(const struct cpu_dbias *g);

/* Adds an item's tile of dS, `count` columns from its first key on (none where it is hidden), in the item's turn. */
void fa_cpu_add_tile(const struct cpu_dbias *g, const struct cpu_rows *rows, const struct cpu_item *item, int64_t block,
                     struct fa_result ds, int64_t count);
/* The same for DBIAS_ROWS in two steps: sums (rows,) of a tile, added in the turn of dq. */
void fa_cpu_sum_rows(const struct cpu_dbias *g, const struct cpu_rows *rows, struct fa_result ds, int64_t count, float *sums);
void fa_cpu_add_row_sums(const struct cpu_dbias *g, const struct cpu_rows *rows, const float *sums);
/* The item has added all its tiles. */
void fa_cpu_end_item(const struct cpu_dbias *g, const struct cpu_item *item);

#endif
