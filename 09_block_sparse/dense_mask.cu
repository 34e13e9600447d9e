/* The twin of block_sparse.c's attention_dense_mask on a GPU: the products by cuBLAS (on the stand-in by the CPU's
 * product), the softmax a warp to a row. The shapes are in block_sparse.h, and the pointers are the device's.
 *
 * The query heads of a group lie behind one another and read one key/value head. So they are one matrix of group * T
 * rows, and there is a product for each key/value head: no key is copied, and dK and dV are summed over the group by
 * the product itself. */
#include "cuda_thread.h"
#include "kernel.h"

#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "cuda_broadcast.h"
#include "cublas.h"
#include "cuda_warp.h"
#include "philox.h"

static size_t dense_mask_floats(const AttentionShape *s)
{
    return (size_t)(s->lengths ? s->batch : 1) * s->tokens * s->key_tokens;
}

/* Zeros where a pair may attend, -inf where it may not; one matrix for all heads. A thread to each. */
__global__ static void write_mask(float *mask, AttentionShape shape, size_t floats)
{
    const AttentionShape *s = &shape;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;
    for (size_t i = thread; i < floats; i += threads) {
        int t2 = (int)(i % s->key_tokens), t = (int)(i / s->key_tokens % s->tokens);
        int b = (int)(i / s->key_tokens / s->tokens);
        mask[i] = attends(s, b, 0, t, t2) ? 0 : -INFINITY;
    }
}

/* Adds mask and bias to a row of scores and normalises it in place; returns its lse. One warp. */
__device__ static float softmax_row(float *row, const float *mask, const AttentionShape *s, int b, int h,
                                    int t)
{
    int lane = threadIdx.x % WARP;
    float m = -INFINITY, l = 0;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        row[t2] += bias_at(s, b, h, t, t2) + mask[t2];
        m = larger(m, row[t2]);
    }
    m = warp_largest(m);
    if (m == -INFINITY)
        m = 0; /* nothing allowed: -inf - -inf would be NaN, and exp(-inf - 0) is 0 */
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        row[t2] = expf(row[t2] - m);
        l += row[t2];
    }
    l = warp_sum(l);
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP)
        row[t2] *= one_over_l;
    return m + logf(l); /* log 0 = -inf */
}

/* weights hold the scores; softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, float *lse, const float *mask,
                                      AttentionShape shape, size_t rows)
{
    const AttentionShape *s = &shape;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP, TK = s->key_tokens;
    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows; i += (size_t)gridDim.x * warps) {
        int t = (int)(i % s->tokens), h = (int)(i / s->tokens % s->heads),
            b = (int)(i / s->tokens / s->heads);
        const float *mask_bt = mask + ((size_t)(s->lengths ? b : 0) * s->tokens + t) * TK;
        float *row = weights + i * TK, row_lse = softmax_row(row, mask_bt, s, b, h, t);
        if (lane == 0)
            lse[i] = row_lse;
        for (int t2 = lane; s->dropout > 0 && t2 < TK; t2 += WARP) {
            softmax[i * TK + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(s->dropout_seed, i, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

/* ---- Backward: the equations are in block_sparse_backward.c. ---- */

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

/* ---- Products of whole heads ---- */

enum { MASK, SOFTMAX }; /* workspace, as on the CPU */

/* The matrices of one key/value head, and how far it is from each to the next head's. */
typedef struct {
    int rows, TK, HS, count;
    size_t query, key, weight;
} Matrices;

static Matrices matrices(const AttentionShape *s)
{
    Matrices m = {
        s->heads / s->kv_heads * s->tokens, s->key_tokens, s->head_size, s->batch * s->kv_heads, 0, 0, 0};
    m.query = (size_t)m.rows * m.HS;
    m.key = (size_t)m.TK * m.HS;
    m.weight = (size_t)m.rows * m.TK;
    return m;
}

static void forward_dense_mask(const Tensors *t, const AttentionShape *s)
{
    Matrices m = matrices(s);
    size_t floats = dense_mask_floats(s), rows = lse_count(s);
    int threads = MOST_WARPS * WARP;
    LAUNCH(write_mask, blocks_for(floats / WARP + 1), threads, 0, t->workspace[MASK], *s, floats);

    /* weights = softmax(scale Q K^T + mask + bias), of all T x TK pairs */
    device_matmul_strided_batch('N', 'T', m.rows, m.TK, m.HS, s->scale, t->q, m.HS, m.query, t->k, m.HS,
                                m.key, 0, t->weights, m.TK, m.weight, m.count);
    LAUNCH(softmax_kernel, blocks_for(rows), threads, 0, t->weights, t->workspace[SOFTMAX], t->lse,
           t->workspace[MASK], *s, rows);

    /* out = weights V: most of the products are with zero */
    device_matmul_strided_batch('N', 'N', m.rows, m.HS, m.TK, 1, t->weights, m.TK, m.weight, t->v, m.HS,
                                m.key, 0, t->out, m.HS, m.query, m.count);
}

static void backward_dense_mask(const Tensors *t, const AttentionShape *s)
{
    Matrices m = matrices(s);
    size_t rows = lse_count(s);
    float *dS = t->backward_workspace[0];
    const float *softmax = s->dropout > 0 ? t->workspace[SOFTMAX] : t->weights;

    /* dD = dO V^T, which waits in dS */
    device_matmul_strided_batch('N', 'T', m.rows, m.TK, m.HS, 1, t->dout, m.HS, m.query, t->v, m.HS, m.key, 0,
                                dS, m.TK, m.weight, m.count);
    LAUNCH(d_scores_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, dS, t->weights, softmax, t->dout, t->out,
           m.TK, m.HS, rows);
    /* dQ = scale dS K */
    device_matmul_strided_batch('N', 'N', m.rows, m.HS, m.TK, s->scale, dS, m.TK, m.weight, t->k, m.HS, m.key,
                                0, t->dq, m.HS, m.query, m.count);
    /* dV = D^T dO and dK = scale dS^T Q, summed over the heads that read them */
    device_matmul_strided_batch('T', 'N', m.TK, m.HS, m.rows, 1, t->weights, m.TK, m.weight, t->dout, m.HS,
                                m.query, 0, t->dv, m.HS, m.key, m.count);
    device_matmul_strided_batch('T', 'N', m.TK, m.HS, m.rows, s->scale, dS, m.TK, m.weight, t->q, m.HS,
                                m.query, 0, t->dk, m.HS, m.key, m.count);
    if (s->bias)
        device_bias_gradient(t->dbias, dS, s);
}
#endif

/* ---- The table: all else is as in main.c. ---- */

DEVICE_TABLE(dense_mask) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "dense-mask",
     .forward = forward_dense_mask,
     .backward = backward_dense_mask,
     .dropout = DROPOUT_POSITION},
#endif
    {},
};
