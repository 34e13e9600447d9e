/* How the tasks of a backward pass add to one dq. A task is a block of keys of a head, and all queries that see any of them. It
 * adds to dq of a query when all tasks of earlier keys are done with that query: so the bits are the same for any number of
 * threads, and no task needs a dq for itself. Queries are taken from the last to the first. So under a causal mask and under a
 * window a task meets those first that the one before does not see, and seldom waits.
 *
 * Tasks are to be taken in their order, as by `omp for schedule(monotonic : dynamic)`: of those not yet done the first is then
 * under way, and waits for none. */
#ifndef KEY_ORDER_H
#define KEY_ORDER_H

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

/* Task n: as many heads as there are threads, `abreast`, are taken block by block; then the next. So threads seldom wait for each
 * other, and what is read again for the next block of a head may still lie in a cache. Blocks ascend: under a causal mask the
 * first have most to do. */
typedef struct {
    size_t head;
    int block;
} KeyTask;

static inline KeyTask key_task(size_t n, size_t heads, int blocks, size_t abreast)
{
    size_t of_all = abreast * blocks, first = n / of_all * abreast;
    size_t here = heads - first < abreast ? heads - first : abreast;
    return (KeyTask){first + n % of_all % here, (int)(n % of_all / here)};
}

/* done: the task is done with this query of its head and those after it. Waits until that is so of query t. */
static inline void wait_for(const atomic_int *done, int t)
{
    while (atomic_load_explicit(done, memory_order_acquire) > t)
        sched_yield();
}

static inline void tell_done(atomic_int *done, int t)
{
    atomic_store_explicit(done, t, memory_order_release);
}

#endif
