/* The gradients over the listed blocks on a GPU: the twin of block_sparse_backward.c. dQ walks the lists of the query
 * blocks, dK and dV those of the key blocks; what is wanted of P is computed again from lse, once in each walk. A block
 * of threads owns the rows that it writes, and each row belongs to one of its warps: no two add to one number. */
#ifndef BLOCK_SPARSE_BACKWARD_CUDA_H
#define BLOCK_SPARSE_BACKWARD_CUDA_H

#include "../07_flash_tiled/flash_tiled_backward.h" /* AttentionBackward */
#include "cuda_broadcast.h"
#include "block_strips_cuda.h"
#include "philox.h"

/* What is the same for all blocks. */
typedef struct {
    AttentionBackward tensors;
    Layout at;
    float *delta; /* (B,NH,T) */
    AttentionShape shape;
} Walk;

typedef struct {
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS */
} Pair;

/* One number of the matrix and its gradient, from lse and delta and the rows of q and dout, k and v. ask: only if
 * attends() allows it. False for a pair that is forbidden. */
__device__ static bool recompute(Pair *pair, const Walk *w, const float *q, const float *dout, const float *k,
                                 const float *v, bool ask, int b, int h, int t, int t2)
{
    const AttentionShape *s = &w->shape;
    if (ask && !attends(s, b, h, t, t2))
        return false;
    float score = s->scale * dot(q, k, s->head_size) + bias_at(s, b, h, t, t2);
    if (score == -INFINITY) /* forbidden by the bias */
        return false;

    size_t row = lse_index(s, b, h, t);
    float p = expf(score - w->tensors.lse[row]); /* a row that sees a key has an lse: no -inf - -inf here */
    float kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
    float d_p = kept * dot(dout, v, s->head_size);
    pair->weight = kept * p;
    pair->d_score = p * (d_p - w->delta[row]);
    return true;
}

/* What each of a warp's 32 lanes found, for the others to read. */
typedef struct {
    float weight[WARP], d_score[WARP];
    bool allowed[WARP];
} Pairs;
enum { PAIRS_FLOATS = sizeof(Pairs) / sizeof(float) };

__device__ static void share(Pairs *pairs, bool allowed, Pair pair)
{
    int lane = threadIdx.x % WARP;
    __syncwarp(); /* the pairs before have been read */
    pairs->allowed[lane] = allowed;
    pairs->weight[lane] = pair.weight;
    pairs->d_score[lane] = pair.d_score;
    __syncwarp();
}

/* Query (b,h,t) meets the keys from <= t2 < to of a strip: one warp, a key to each lane, then a column. */
__device__ static void add_to_dq(const Walk *w, Pairs *pairs, Rows k, Rows v, bool ask, int b, int h, int t,
                                 int from, int to)
{
    const AttentionBackward *g = &w->tensors;
    const AttentionShape *s = &w->shape;
    int lane = threadIdx.x % WARP;
    const float *q_bht = g->q + query_at(&w->at, b, h, t), *dout_bht = g->dout + out_at(&w->at, b, h, t);
    float *dq_bht = g->dq + query_at(&w->at, b, h, t);

    for (int first = 0; first < to - from; first += WARP) {
        int c = first + lane, count = smaller(WARP, to - from - first);
        Pair pair = {0, 0};
        bool allowed = lane < count && recompute(&pair, w, q_bht, dout_bht, row_of(k, c), row_of(v, c), ask,
                                                 b, h, t, from + c);
        share(pairs, allowed, pair);
        for (int i = lane; i < s->head_size; i += WARP) {
            float dq = dq_bht[i];
            for (int j = 0; j < count; j++)
                if (pairs->allowed[j])
                    dq += s->scale * pairs->d_score[j] * row_of(k, first + j)[i];
            dq_bht[i] = dq;
        }
    }
}

/* delta and dQ of the queries of block i. */
__device__ static void query_block(const Walk *w, const BlockMask *mask, const Plan *plan, float *shared,
                                   int b, int h, int i)
{
    const AttentionBackward *g = &w->tensors;
    const AttentionShape *s = &w->shape;
    int HS = s->head_size, N = mask->block, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, listed;
    int t0 = i * N, t_end = smaller(t0 + N, s->tokens);
    float *k_strip = shared, *v_strip = k_strip + plan->strip * plan->step;
    Pairs *pairs = (Pairs *)(v_strip + plan->strip * plan->step) + warp;

    for (int t = t0 + warp; t < t_end; t += plan->warps) {
        size_t at = out_at(&w->at, b, h, t);
        float delta = 0;
        for (int c = lane; c < HS; c += WARP) {
            delta += g->dout[at + c] * g->out[at + c];
            g->dq[query_at(&w->at, b, h, t) + c] = 0;
        }
        delta = warp_sum(delta);
        if (lane == 0)
            w->delta[lse_index(s, b, h, t)] = delta;
    }
    __syncwarp(); /* the other lanes read delta too */

    const ListedBlock *list = block_list(mask, b, h, i, &listed);
    for (int n = 0; n < listed; n++) {
        int end = smaller((list[n].key_block + 1) * N, s->key_tokens);
        for (int from = list[n].key_block * N; from < end; from += plan->strip) {
            int to = smaller(from + plan->strip, end);
            size_t keys = key_at(&w->at, s, b, h, from);
            __syncthreads(); /* every warp is done with the strips before */
            Rows k = fetch(k_strip, plan, g->k + keys, w->at.key.token, to - from, HS);
            Rows v = fetch(v_strip, plan, g->v + keys, w->at.key.token, to - from, HS);
            __syncthreads();
            for (int t = t0 + warp; t < t_end; t += plan->warps)
                add_to_dq(w, pairs, k, v, list[n].kind == BLOCK_PARTIAL, b, h, t, from, to);
        }
    }
}

/* Key (b,h,t2) meets the queries from <= t < to of a strip: one warp, a query to each lane, then a column. */
__device__ static void add_to_dk_dv(const Walk *w, Pairs *pairs, Rows q, Rows dout, bool ask, int b, int h,
                                    int t2, int from, int to)
{
    const AttentionBackward *g = &w->tensors;
    const AttentionShape *s = &w->shape;
    int lane = threadIdx.x % WARP;
    size_t at = key_at(&w->at, s, b, h, t2);

    for (int first = 0; first < to - from; first += WARP) {
        int r = first + lane, count = smaller(WARP, to - from - first);
        Pair pair = {0, 0};
        bool allowed = lane < count && recompute(&pair, w, row_of(q, r), row_of(dout, r), g->k + at,
                                                 g->v + at, ask, b, h, from + r, t2);
        share(pairs, allowed, pair);
        for (int i = lane; i < s->head_size; i += WARP) {
            float dk = g->dk[at + i], dv = g->dv[at + i];
            for (int j = 0; j < count; j++)
                if (pairs->allowed[j]) {
                    dk += s->scale * pairs->d_score[j] * row_of(q, first + j)[i];
                    dv += pairs->weight[j] * row_of(dout, first + j)[i];
                }
            g->dk[at + i] = dk;
            g->dv[at + i] = dv;
        }
    }
}

/* dK and dV of the keys of block j, from the queries of all heads that read them. */
__device__ static void key_block(const Walk *w, const BlockMask *transposed, const Plan *plan, float *shared,
                                 int b, int kv_head, int j)
{
    const AttentionBackward *g = &w->tensors;
    const AttentionShape *s = &w->shape;
    int HS = s->head_size, N = transposed->block, group = s->heads / s->kv_heads, listed;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int key0 = j * N, key_end = smaller(key0 + N, s->key_tokens);
    float *q_strip = shared, *dout_strip = q_strip + plan->strip * plan->step;
    Pairs *pairs = (Pairs *)(dout_strip + plan->strip * plan->step) + warp;

    for (int t2 = key0 + warp; t2 < key_end; t2 += plan->warps)
        for (int c = lane; c < HS; c += WARP) {
            size_t at = key_at(&w->at, s, b, kv_head * group, t2) + c;
            g->dk[at] = g->dv[at] = 0;
        }

    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        const ListedBlock *list = block_list(transposed, b, h, j, &listed);
        for (int n = 0; n < listed; n++) {
            int end = smaller((list[n].key_block + 1) * N, s->tokens); /* the number of a query block here */
            for (int from = list[n].key_block * N; from < end; from += plan->strip) {
                int to = smaller(from + plan->strip, end);
                __syncthreads(); /* every warp is done with the strips before */
                Rows q = fetch(q_strip, plan, g->q + query_at(&w->at, b, h, from), w->at.query.token,
                               to - from, HS);
                Rows dout = fetch(dout_strip, plan, g->dout + out_at(&w->at, b, h, from), w->at.out.token,
                                  to - from, HS);
                __syncthreads();
                for (int t2 = key0 + warp; t2 < key_end; t2 += plan->warps)
                    add_to_dk_dv(w, pairs, q, dout, list[n].kind == BLOCK_PARTIAL, b, h, t2, from, to);
            }
        }
    }
}

/* A block of threads to each (b, h, query block). */
__global__ static void query_blocks_kernel(Walk walk, BlockMask mask, Plan plan, size_t tasks)
{
    DYNAMIC_SHARED(float, shared);
    for (size_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        size_t bh = task / mask.query_blocks;
        query_block(&walk, &mask, &plan, shared, (int)(bh / walk.shape.heads), (int)(bh % walk.shape.heads),
                    (int)(task % mask.query_blocks));
    }
}

/* A block of threads to each (b, key/value head, key block). */
__global__ static void key_blocks_kernel(Walk walk, BlockMask transposed, Plan plan, size_t tasks)
{
    DYNAMIC_SHARED(float, shared);
    for (size_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        size_t bh = task / transposed.query_blocks;
        key_block(&walk, &transposed, &plan, shared, (int)(bh / walk.shape.kv_heads),
                  (int)(bh % walk.shape.kv_heads), (int)(task % transposed.query_blocks));
    }
}

/* dS over the pairs of a rectangle, N x N of them at a time: of those the closed form says whether there is any need to
 * look. */
struct RecomputedScores {
    const Walk *w;

    __device__ float operator()(const Rectangle &r) const
    {
        const AttentionBackward *g = &w->tensors;
        const AttentionShape *s = &w->shape;
        int N = s->block;
        float sum = 0;
        for (int t0 = r.t; t0 < r.t_end; t0 += N)
            for (int key0 = r.t2; key0 < r.t2_end; key0 += N) {
                int t_end = smaller(t0 + N, r.t_end), key_end = smaller(key0 + N, r.t2_end);
                BlockKind kind = closed_form(s, r.b, t0, t_end, key0, key_end);
                float block_sum = 0; /* a sum of sums loses less to rounding than one long one */
                for (int t = t0; kind != BLOCK_EMPTY && t < t_end; t++)
                    for (int t2 = key0 + r.lane; t2 < key_end; t2 += r.lanes) {
                        Pair pair = {0, 0};
                        size_t key = key_at(&w->at, s, r.b, r.h, t2);
                        recompute(&pair, w, g->q + query_at(&w->at, r.b, r.h, t),
                                  g->dout + out_at(&w->at, r.b, r.h, t), g->k + key, g->v + key,
                                  kind == BLOCK_PARTIAL, r.b, r.h, t, t2);
                        block_sum += pair.d_score;
                    }
                sum += block_sum;
            }
        return sum;
    }
};

__global__ static void bias_kernel(Walk walk, Broadcast axes)
{
    sum_into_bias(walk.tensors.dbias, &walk.shape, axes, RecomputedScores{&walk});
}

/* All launches: the second walk needs the delta of the first. */
static void walk_backward(const Walk *w, const BlockMask *mask, const BlockMask *transposed)
{
    const AttentionShape *s = &w->shape;
    size_t queries = (size_t)s->batch * s->heads * mask->query_blocks;
    size_t keys = (size_t)s->batch * s->kv_heads * mask->key_blocks;
    Plan plan = plan_strips(s, smaller(mask->block, s->tokens), PAIRS_FLOATS);
    LAUNCH(query_blocks_kernel, grid_for(queries), plan.warps * WARP, plan.bytes, *w, *mask, plan, queries);
    plan = plan_strips(s, smaller(mask->block, s->key_tokens), PAIRS_FLOATS);
    LAUNCH(key_blocks_kernel, grid_for(keys), plan.warps * WARP, plan.bytes, *w, *transposed, plan, keys);
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(bias_kernel, blocks_for(axes.elements), MOST_WARPS * WARP, 0, *w, axes);
    }
}

#endif
