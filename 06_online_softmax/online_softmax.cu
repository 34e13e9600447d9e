/* The twins of online_softmax.c on a GPU: a warp to each row. What keeps no matrix is in online_softmax_cuda.h, and its
 * backward in online_softmax_backward_cuda.h; chapter 8 calls both. The shapes are in online_softmax.h, and the pointers
 * are the device's. */
#include "cuda_broadcast.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "cublas.h"
#endif
#include "online_softmax.h"

#include "online_softmax_cuda.h"

#include "online_softmax_backward_cuda.h"

/* ---- With the matrix: three steps, the first and the last by cuBLAS (on the stand-in by the CPU's product). ---- */

#if defined(SIMT) || defined(HAVE_CUBLAS)
/* What masks and bias do to the scores of one row, then softmax, in place; returns its lse. One warp. */
__device__ static float softmax_of_allowed(float *row, const AttentionShape *s, int b, int h, int t)
{
    int lane = threadIdx.x % WARP, end = keys_end(s, b, t);
    float m = -INFINITY, l = 0;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        bool allowed = t2 < end && attends(s, b, h, t, t2);
        row[t2] = allowed ? row[t2] + bias_at(s, b, h, t, t2) : -INFINITY;
        m = larger(m, row[t2]);
    }
    m = warp_largest(m);
    float subtract = m == -INFINITY ? 0 : m; /* nothing is allowed: -inf - -inf would be NaN */
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        row[t2] = expf(row[t2] - subtract);
        l += row[t2];
    }
    l = warp_sum(l);
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP)
        row[t2] *= one_over_l;
    return m + logf(l);
}

/* weights hold the scores; softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, float *lse, AttentionShape shape,
                                      size_t rows)
{
    const AttentionShape *s = &shape;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows; i += (size_t)gridDim.x * warps) {
        int t = (int)(i % s->tokens), h = (int)(i / s->tokens % s->heads),
            b = (int)(i / s->tokens / s->heads);
        float *row = weights + i * s->key_tokens;
        float row_lse = softmax_of_allowed(row, s, b, h, t);
        if (lane == 0)
            lse[i] = row_lse;
        for (int t2 = lane; s->dropout > 0 && t2 < s->key_tokens; t2 += WARP) {
            softmax[i * s->key_tokens + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(s->dropout_seed, i, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

/* dS = P * (dP - delta) = D * dD - P * delta: d_scores holds dD. */
__global__ static void d_scores_kernel(float *d_scores, const float *weights, const float *softmax,
                                       const float *dout, const float *out, int TK, int HS, size_t rows)
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        float delta = 0;
        for (int i = lane; i < HS; i += WARP)
            delta += dout[row * HS + i] * out[row * HS + i];
        delta = warp_sum(delta);
        for (size_t i = row * TK + lane; i < (row + 1) * TK; i += WARP)
            d_scores[i] = weights[i] * d_scores[i] - softmax[i] * delta;
    }
}
#endif

/* ---- The table: what is left out is as in main.c. ---- */

static void forward_online(const Tensors *t, const AttentionShape *s)
{
    size_t rows = lse_count(s);
    LAUNCH(online_kernel, blocks_for(rows), MOST_WARPS * WARP, MOST_WARPS * WARP * sizeof(float), t->out,
           t->lse, t->q, t->k, t->v, *s, rows);
}

#if defined(SIMT) || defined(HAVE_CUBLAS)
static void forward_materialised(const Tensors *t, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK,
           rows = lse_count(s);

    /* 1. scores = scale Q K^T, 2. weights = softmax(scores + bias), 3. out = weights V */
    device_matmul_strided_batch('N', 'T', T, TK, HS, s->scale, t->q, HS, q_head, t->k, HS, k_head, 0,
                                t->weights, TK, weights_head, heads);
    LAUNCH(softmax_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->weights, t->workspace[0], t->lse, *s,
           rows);
    device_matmul_strided_batch('N', 'N', T, HS, TK, 1, t->weights, TK, weights_head, t->v, HS, k_head, 0,
                                t->out, HS, q_head, heads);
}

static void backward_materialised(const Tensors *t, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK,
           rows = lse_count(s);
    float *dS = t->backward_workspace[0];
    const float *softmax = s->dropout > 0 ? t->workspace[0] : t->weights;

    /* 3. dV = D^T dO, and dD = dO V^T, which waits in dS */
    device_matmul_strided_batch('T', 'N', TK, HS, T, 1, t->weights, TK, weights_head, t->dout, HS, q_head, 0,
                                t->dv, HS, k_head, heads);
    device_matmul_strided_batch('N', 'T', T, TK, HS, 1, t->dout, HS, q_head, t->v, HS, k_head, 0, dS, TK,
                                weights_head, heads);
    /* 2. softmax and dropout */
    LAUNCH(d_scores_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, dS, t->weights, softmax, t->dout, t->out,
           TK, HS, rows);
    /* 1. dQ = scale dS K, dK = scale dS^T Q, dbias = dS */
    device_matmul_strided_batch('N', 'N', T, HS, TK, s->scale, dS, TK, weights_head, t->k, HS, k_head, 0,
                                t->dq, HS, q_head, heads);
    device_matmul_strided_batch('T', 'N', TK, HS, T, s->scale, dS, TK, weights_head, t->q, HS, q_head, 0,
                                t->dk, HS, k_head, heads);
    if (s->bias)
        device_bias_gradient(t->dbias, dS, s);
}
#endif

DEVICE_TABLE(online_softmax) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "materialised",
     .what = "the T x TK matrix in memory, softmax over its rows, a warp to a row",
     .forward = forward_materialised,
     .backward = backward_materialised,
     .dropout = DROPOUT_POSITION},
#endif
    {.name = "online",
     .what = "one pass over the keys, a warp to a row, 32 keys at a time",
     .forward = forward_online,
     .backward = backward_recomputed,
     .dropout = DROPOUT_POSITION},
    {.name = "split-keys",
     .what = "the same, the keys of a row cut into parts that are merged: for few rows and many keys",
     .takes = TAKES_QKV,
     .forward = forward_split_keys,
     .backward = backward_recomputed,
     .backward_workspace = workspace_recomputed,
     .workspace = workspace_split_keys,
     .dropout = DROPOUT_POSITION},
    {},
};
