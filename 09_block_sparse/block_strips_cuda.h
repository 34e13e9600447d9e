/* What the walks over block lists share on a GPU, forward and backward: where the rows of a tensor lie, and how a block
 * of threads brings a strip of them into its shared memory. */
#ifndef BLOCK_STRIPS_CUDA_H
#define BLOCK_STRIPS_CUDA_H

#include "block_mask.h"
#include "cuda_warp.h"

/* How far apart neighbours of each axis lie in memory; the numbers of a head are side by side. */
typedef struct {
    size_t batch, head, token;
} Steps;

typedef struct {
    Steps query, key, out; /* of q and dq; of k, v, dk, dv; of out and dout */
} Layout;

__device__ static inline size_t query_at(const Layout *at, int b, int h, int t)
{
    return b * at->query.batch + h * at->query.head + t * at->query.token;
}

__device__ static inline size_t out_at(const Layout *at, int b, int h, int t)
{
    return b * at->out.batch + h * at->out.head + t * at->out.token;
}

/* h counts query heads. */
__device__ static inline size_t key_at(const Layout *at, const AttentionShape *s, int b, int h, int t2)
{
    return b * at->key.batch + h / (s->heads / s->kv_heads) * at->key.head + t2 * at->key.token;
}

/* ---- Strips: of a listed block some rows at a time wait in shared memory, k and v, or q and dout. ---- */

enum {
    STRIP = 64,            /* rows of a strip, where they fit */
    SHARED_FLOATS = 12288, /* 48 KiB: what every GPU gives a block without being asked */
};

/* How a block divides its shared memory: two strips, and for each warp a few floats of its own. Rows lie an odd number of
 * floats apart, so that the 32 lanes, each with a row of its own, read from 32 banks. */
typedef struct {
    int warps, strip;
    int step; /* from row to row; 0: not even one row fits, and rows are read where they lie */
    size_t bytes;
} Plan;

/* Blocks for `tasks` of a block each. */
static inline int grid_for(size_t tasks)
{
    return tasks < MOST_BLOCKS ? (int)tasks : MOST_BLOCKS;
}

/* rows: how many a block has to divide among its warps. */
static Plan plan_strips(const AttentionShape *s, int rows, int floats_of_warp)
{
    Plan plan;
    int step = s->head_size | 1, room = SHARED_FLOATS - MOST_WARPS * floats_of_warp;
    plan.warps = smaller(MOST_WARPS, rows);
    plan.strip = smaller(smaller(STRIP, s->block), room / 2 / step);
    if (plan.strip > WARP)
        plan.strip -= plan.strip % WARP; /* a row to each lane: no lane should be idle */
    plan.step = plan.strip > 0 ? step : 0;
    if (plan.strip == 0)
        plan.strip = smaller(STRIP, s->block);
    plan.bytes = (2 * (size_t)plan.strip * plan.step + plan.warps * floats_of_warp) * sizeof(float);
    return plan;
}

typedef struct {
    const float *first;
    size_t step; /* from one to the next */
} Rows;

/* Row r of those. */
__device__ static inline const float *row_of(Rows rows, int r)
{
    return rows.first + r * rows.step;
}

/* The block copies `count` rows of HS numbers to `strip`, a warp to a row; returns where to read them from then on, which
 * is where they were if they do not fit. Barriers before and after are the caller's. */
__device__ static Rows fetch(float *strip, const Plan *plan, const float *from, size_t token, int count,
                             int HS)
{
    if (plan->step == 0)
        return {from, token};
    for (int r = threadIdx.x / WARP; r < count; r += plan->warps)
        for (int i = threadIdx.x % WARP; i < HS; i += WARP)
            strip[r * plan->step + i] = from[r * token + i];
    return {strip, (size_t)plan->step};
}

#endif
