/* The backward pass of kernels that keep no matrix, on a GPU: the twin of online_softmax_backward.c, and chapter 7's as
 * well. What is wanted of P is computed again from lse, once from the side of the queries and once from the side of
 * the keys. To be included behind the chapter's header, whose AttentionBackward it takes. */
#ifndef ONLINE_SOFTMAX_BACKWARD_CUDA_H
#define ONLINE_SOFTMAX_BACKWARD_CUDA_H

#include "cuda_broadcast.h"
#include "kernel.h"
#include "philox.h"

typedef struct {
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS */
} Pair;

/* One number of the matrix and its gradient, from lse and delta. False for a pair that is forbidden. */
__device__ static bool recompute(Pair *pair, const AttentionBackward *g, const float *delta,
                                 const AttentionShape *s, int b, int h, int t, int t2)
{
    if (!attends(s, b, h, t, t2))
        return false;
    size_t row = lse_index(s, b, h, t), q_bht = query_row(s, b, h, t), k_bht2 = key_row(s, b, h, t2);
    float score = s->scale * dot(g->q + q_bht, g->k + k_bht2, s->head_size) + bias_at(s, b, h, t, t2);
    if (score == -INFINITY) /* forbidden by the bias */
        return false;

    float p = expf(score - g->lse[row]); /* a row that sees a key has an lse: no -inf - -inf here */
    float kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
    float d_p = kept * dot(g->dout + q_bht, g->v + k_bht2, s->head_size);
    pair->weight = kept * p;
    pair->d_score = p * (d_p - delta[row]);
    return true;
}

/* What each of a warp's 32 lanes found, for the others to read. */
typedef struct {
    float weight[WARP], d_score[WARP];
    bool allowed[WARP];
} Pairs;

/* Every lane recomputes a pair (t, t2) of its own, if it is inside the matrix. */
__device__ static void recompute_32(Pairs *pairs, const AttentionBackward *g, const float *delta,
                                    const AttentionShape *s, int b, int h, int t, int t2, bool inside)
{
    int lane = threadIdx.x % WARP;
    Pair pair = {0, 0};
    __syncwarp(); /* the pairs before have been read */
    pairs->allowed[lane] = inside && recompute(&pair, g, delta, s, b, h, t, t2);
    pairs->weight[lane] = pair.weight;
    pairs->d_score[lane] = pair.d_score;
    __syncwarp();
}

/* Queries outside: a warp to each row, which meets 32 keys at a time. */
__global__ static void query_kernel(AttentionBackward gradients, float *delta, AttentionShape shape,
                                    size_t rows)
{
    DYNAMIC_SHARED(Pairs, shared_pairs);
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    Pairs *pairs = &shared_pairs[warp];

    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        int t = (int)(row % s->tokens), h = (int)(row / s->tokens % s->heads);
        int b = (int)(row / s->tokens / s->heads);
        const float *dout_bht = g->dout + row * HS, *out_bht = g->out + row * HS;
        float *dq_bht = g->dq + row * HS;
        float sum = 0;
        for (int i = lane; i < HS; i += WARP) {
            sum += dout_bht[i] * out_bht[i];
            dq_bht[i] = 0;
        }
        sum = warp_sum(sum);
        if (lane == 0)
            delta[row] = sum;
        __syncwarp();

        int end = keys_end(s, b, t);
        for (int from = 0; from < end; from += WARP) {
            recompute_32(pairs, g, delta, s, b, h, t, from + lane, from + lane < end);
            for (int i = lane; i < HS; i += WARP) {
                float dq = dq_bht[i];
                for (int j = 0; j < WARP; j++)
                    if (pairs->allowed[j])
                        dq += s->scale * pairs->d_score[j] * g->k[key_row(s, b, h, from + j) + i];
                dq_bht[i] = dq;
            }
        }
    }
}

/* Keys outside: a warp to each key, which meets 32 queries at a time. */
__global__ static void key_kernel(AttentionBackward gradients, const float *delta, AttentionShape shape,
                                  size_t rows)
{
    DYNAMIC_SHARED(Pairs, shared_pairs);
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    Pairs *pairs = &shared_pairs[warp];

    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        int t2 = (int)(row % s->key_tokens), h = (int)(row / s->key_tokens % s->heads);
        int b = (int)(row / s->key_tokens / s->heads);
        float *dk_bht2 = g->dk + row * HS, *dv_bht2 = g->dv + row * HS;
        for (int i = lane; i < HS; i += WARP)
            dk_bht2[i] = dv_bht2[i] = 0;

        for (int from = 0; from < s->tokens; from += WARP) {
            if (keys_end(s, b, smaller(from + WARP, s->tokens) - 1) <= t2)
                continue; /* none of these rows sees as far as this key */
            recompute_32(pairs, g, delta, s, b, h, from + lane, t2, from + lane < s->tokens);
            for (int i = lane; i < HS; i += WARP) {
                float dk = dk_bht2[i], dv = dv_bht2[i];
                for (int j = 0; j < WARP; j++)
                    if (pairs->allowed[j]) {
                        size_t q_bht = query_row(s, b, h, from + j);
                        dk += s->scale * pairs->d_score[j] * g->q[q_bht + i];
                        dv += pairs->weight[j] * g->dout[q_bht + i];
                    }
                dk_bht2[i] = dk;
                dv_bht2[i] = dv;
            }
        }
    }
}

/* dS computed again, pair by pair. */
struct RecomputedScores {
    const AttentionBackward *g;
    const float *delta;
    const AttentionShape *s;

    __device__ float operator()(const Rectangle &r) const
    {
        return sum_of_pairs(r, [&](int t, int t2) {
            Pair pair;
            return recompute(&pair, g, delta, s, r.b, r.h, t, t2) ? pair.d_score : 0;
        });
    }
};

__global__ static void bias_kernel(AttentionBackward gradients, const float *delta, AttentionShape shape,
                                   Broadcast axes)
{
    sum_into_bias(gradients.dbias, &shape, axes, RecomputedScores{&gradients, delta, &shape});
}

/* ---- For the table of kernels ---- */

/* The workspace: delta, one number a row. */
static int workspace_recomputed(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

static void backward_recomputed(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
    float *delta = t->backward_workspace[0];
    size_t queries = lse_count(s), keys = (size_t)s->batch * s->heads * s->key_tokens;
    int threads = MOST_WARPS * WARP;
    LAUNCH(query_kernel, blocks_for(queries), threads, MOST_WARPS * sizeof(Pairs), g, delta, *s, queries);
    LAUNCH(key_kernel, blocks_for(keys), threads, MOST_WARPS * sizeof(Pairs), g, delta, *s, keys);
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(bias_kernel, blocks_for(axes.elements), threads, 0, g, delta, *s, axes);
    }
}

#endif
