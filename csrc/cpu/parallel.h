/* cpu/parallel.h: run items on torch's own OpenMP threads. */
#ifndef FA_PARALLEL_H
#define FA_PARALLEL_H

#include <stdint.h>

#include "ops.h"

/* Calls work(job, thread, item) once for every item in [0, items). Items are handed out in ascending order, so an item
 * may wait for one with a lower number. thread < threads names the caller's scratch. Each thread enters and leaves the table's
 * instruction set around its items. */
void fa_parallel(const struct fa_cpu_ops *ops, int64_t threads, int64_t items, void (*work)(void *job, int64_t thread, int64_t item), void *job);

/* Until *count reaches `value`, which a lower item will see to; acquires what was released with it. */
void fa_wait_for(const int32_t *count, int32_t value);
void fa_advance(int32_t *count);

#endif
