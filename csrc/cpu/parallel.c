/* cpu/parallel.c: torch loads an OpenMP runtime of its own, under a name that differs from release to release. GOMP's
 * entry point is therefore a weak symbol: in a process with torch it is torch's, so that one pool of threads serves both;
 * where there is none the items run on the calling thread. */
#include <sched.h>
#include <stddef.h>

#include "parallel.h"

extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));

struct team {
    const struct fa_cpu_ops *ops;
    void (*work)(void *job, int64_t thread, int64_t item);
    void *job;
    int64_t items, next_item, next_thread;
};

static void member(void *data)
{
    struct team *team = data;
    const int64_t thread = __atomic_fetch_add(&team->next_thread, 1, __ATOMIC_RELAXED);
    int64_t item;
    if (team->ops->enter) team->ops->enter();
    while ((item = __atomic_fetch_add(&team->next_item, 1, __ATOMIC_RELAXED)) < team->items)
        team->work(team->job, thread, item);
    if (team->ops->leave) team->ops->leave();
}

void fa_parallel(const struct fa_cpu_ops *ops, int64_t threads, int64_t items, void (*work)(void *, int64_t, int64_t), void *job)
{
    struct team team = { ops, work, job, items, 0, 0 };
    if (threads > items) threads = items;
    if (threads > 1 && GOMP_parallel) GOMP_parallel(member, &team, (unsigned)threads, 0);
    else if (items > 0) member(&team);
}

void fa_wait_for(const int32_t *count, int32_t value)
{
    for (int spins = 0; __atomic_load_n(count, __ATOMIC_ACQUIRE) != value; spins++) {
        if (spins > 1000) sched_yield();        /* more threads than cores: let the one we wait for run */
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }
}

void fa_advance(int32_t *count)
{
    __atomic_fetch_add(count, 1, __ATOMIC_RELEASE);
}
