/* The twins of self_attention.c on a GPU: products of matrices are cuBLAS', a warp takes a row in all that lies between
 * them. The shapes are in self_attention.h, and the pointers are the device's. */
#include "kernel.h"
#include "philox.h"
#include "cuda_broadcast.h"
#include "cuda_linear.h"

/* ---- One token, in three steps: one warp. ---- */

/* 1. A key to each lane, 32 at a time. */
__device__ static void score_keys(float *scores, const float *query, const float *keys, int n, int width,
                                  float scale)
{
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        scores[i] = scale * dot(query, keys + (size_t)i * width, width);
}

/* 2. Each lane has read and will write every 32nd number of the row: only the largest and the sum are everyone's. */
__device__ static float softmax_row(float *row, int n)
{
    int lane = threadIdx.x % WARP;
    float largest = -INFINITY, sum = 0;
    for (int i = lane; i < n; i += WARP)
        largest = larger(largest, row[i]);
    largest = warp_largest(largest);
    if (largest == -INFINITY)
        largest = 0; /* nothing to attend to: every exp(-inf) below is 0 */

    for (int i = lane; i < n; i += WARP) {
        row[i] = expf(row[i] - largest);
        sum += row[i];
    }
    sum = warp_sum(sum);

    float share = sum == 0 ? 0 : 1 / sum;
    for (int i = lane; i < n; i += WARP)
        row[i] *= share;
    return largest + logf(sum);
}

/* 3. A number of the output to each lane, which reads all weights. */
__device__ static void mix_values(float *out, const float *weights, const float *values, int n, int width)
{
    for (int c = threadIdx.x % WARP; c < width; c += WARP) {
        float sum = 0;
        for (int i = 0; i < n; i++)
            sum += weights[i] * values[(size_t)i * width + c];
        out[c] = sum;
    }
}

/* Backward through 2. */
__device__ static void softmax_row_backward(float *row, const float *weights, int n)
{
    float delta = 0;
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        delta += weights[i] * row[i];
    delta = warp_sum(delta);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        row[i] = weights[i] * (row[i] - delta);
}

/* A warp's first row, and how far it is to its next. */
#define FIRST_ROW ((size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP)
#define NEXT_ROW ((size_t)gridDim.x * MOST_WARPS)

/* ---- All tokens, nothing to learn. ---- */

__global__ static void dot_product_kernel(float *out, float *weights, const float *x, int T, int C,
                                          float scale, size_t rows)
{
    for (size_t bt = FIRST_ROW; bt < rows; bt += NEXT_ROW) {
        const float *x_b = x + bt / T * T * C;
        float *weights_bt = weights + bt * T;

        score_keys(weights_bt, x + bt * C, x_b, T, C, scale);
        softmax_row(weights_bt, T);
        __syncwarp(); /* the other lanes' weights are there */
        mix_values(out + bt * C, weights_bt, x_b, T, C);
    }
}

__global__ static void dot_product_dscores_kernel(float *dscores, const float *dout, const float *weights,
                                                  const float *x, int T, int C, size_t rows)
{
    for (size_t bt = FIRST_ROW; bt < rows; bt += NEXT_ROW) {
        score_keys(dscores + bt * T, dout + bt * C, x + bt / T * T * C, T, C, 1);
        softmax_row_backward(dscores + bt * T, weights + bt * T, T);
    }
}

__global__ static void dot_product_dx_kernel(float *dx, const float *dscores, const float *dout,
                                             const float *weights, const float *x, int T, int C, float scale,
                                             size_t rows)
{
    for (size_t bt = FIRST_ROW; bt < rows; bt += NEXT_ROW) {
        size_t first = bt / T * T, t = bt % T;
        for (int c = threadIdx.x % WARP; c < C; c += WARP) {
            float sum = 0;
            for (size_t bt2 = first; bt2 < first + T; bt2++) {
                /* In score (t, t2) token t is the query; in (t2, t) it is the key, and then the value. */
                float as_query = scale * dscores[bt * T + bt2 - first];
                float as_key = scale * dscores[bt2 * T + t];
                float as_value = weights[bt2 * T + t];
                sum += (as_query + as_key) * x[bt2 * C + c] + as_value * dout[bt2 * C + c];
            }
            dx[bt * C + c] = sum;
        }
    }
}

static void forward_dot_product(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    LAUNCH(dot_product_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->out, t->weights, t->x, s->tokens,
           s->embed, s->scale, rows);
}

static void backward_dot_product(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    float *dscores = t->backward_workspace[0];
    LAUNCH(dot_product_dscores_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, dscores, t->dout, t->weights,
           t->x, s->tokens, s->embed, rows);
    LAUNCH(dot_product_dx_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->dx, dscores, t->dout, t->weights,
           t->x, s->tokens, s->embed, s->scale, rows);
}

#if defined(SIMT) || defined(HAVE_CUBLAS)
/* ---- The same three steps as two matrix products. ---- */

/* weights hold the scores. softmax, the weights before dropout, is written only where there is dropout; lse may be
 * NULL. */
__global__ static void softmax_kernel(float *weights, float *softmax, float *lse, AttentionShape shape,
                                      size_t rows)
{
    const AttentionShape *s = &shape;
    int TK = s->key_tokens, lane = threadIdx.x % WARP;
    for (size_t bht = FIRST_ROW; bht < rows; bht += NEXT_ROW) {
        int t = (int)(bht % s->tokens), h = (int)(bht / s->tokens % s->heads),
            b = (int)(bht / s->tokens / s->heads);
        float *weights_bht = weights + bht * TK;
        for (int t2 = lane; t2 < TK; t2 += WARP)
            weights_bht[t2] = attends(s, b, h, t, t2) ? weights_bht[t2] + bias_at(s, b, h, t, t2) : -INFINITY;
        float lse_bht = softmax_row(weights_bht, TK);
        if (lse && lane == 0)
            lse[bht] = lse_bht;
        for (int t2 = lane; s->dropout > 0 && t2 < TK; t2 += WARP) {
            softmax[bht * TK + t2] = weights_bht[t2];
            weights_bht[t2] *= dropout_keeps_pair(s->dropout_seed, bht, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

static void attention_sdpa(float *out, float *lse, float *weights, float *softmax, const float *q,
                           const float *k, const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, count = s->batch * s->heads;
    size_t query_size = (size_t)T * HS, key_size = (size_t)TK * HS, weights_size = (size_t)T * TK;

    /* scores (B,NH,T,TK) = scale * Q K^T, kept where the weights will be */
    device_matmul_strided_batch('N', 'T', T, TK, HS, s->scale, q, HS, query_size, k, HS, key_size, 0, weights,
                                TK, weights_size, count);
    LAUNCH(softmax_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, weights, softmax, lse, *s,
           lse_count(s));
    /* out (B,NH,T,HS) = weights V */
    device_matmul_strided_batch('N', 'N', T, HS, TK, 1, weights, TK, weights_size, v, HS, key_size, 0, out,
                                HS, query_size, count);
}

/* ---- Its gradient: the same steps, last one first. ---- */

/* What dropout did to a weight it does to the weight's gradient. One that is 0 was dropped, or was 0 before and passes
 * nothing on. */
__device__ static void dropout_row_backward(float *row, const float *weights, int n, float p)
{
    float scale = 1 / (1 - p);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        row[i] *= weights[i] == 0 ? 0 : scale;
}

__global__ static void softmax_backward_kernel(float *dscores, const float *weights, const float *softmax,
                                               int TK, float dropout, size_t rows)
{
    for (size_t bht = FIRST_ROW; bht < rows; bht += NEXT_ROW) {
        if (dropout > 0)
            dropout_row_backward(dscores + bht * TK, weights + bht * TK, TK, dropout);
        softmax_row_backward(dscores + bht * TK, (dropout > 0 ? softmax : weights) + bht * TK, TK);
    }
}

static void attention_sdpa_backward(float *dq, float *dk, float *dv, float *dbias, float *dscores,
                                    const float *dout, const float *weights, const float *softmax,
                                    const float *q, const float *k, const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, count = s->batch * s->heads;
    size_t query_size = (size_t)T * HS, key_size = (size_t)TK * HS, weights_size = (size_t)T * TK;

    /* out = weights V:  dv (B,NH,TK,HS) = weights^T dout,  dweights (B,NH,T,TK) = dout V^T */
    device_matmul_strided_batch('T', 'N', TK, HS, T, 1, weights, TK, weights_size, dout, HS, query_size, 0,
                                dv, HS, key_size, count);
    device_matmul_strided_batch('N', 'T', T, TK, HS, 1, dout, HS, query_size, v, HS, key_size, 0, dscores, TK,
                                weights_size, count);

    /* From the gradient of the weights to that of the scores, in place. */
    LAUNCH(softmax_backward_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, dscores, weights, softmax,
           TK, s->dropout, lse_count(s));
    if (dbias) /* the bias is added to the scores, so its gradient is theirs */
        device_bias_gradient(dbias, dscores, s);

    /* scores = scale * Q K^T:  dq (B,NH,T,HS) = scale * dscores K,  dk (B,NH,TK,HS) = scale * dscores^T Q */
    device_matmul_strided_batch('N', 'N', T, HS, TK, s->scale, dscores, TK, weights_size, k, HS, key_size, 0,
                                dq, HS, query_size, count);
    device_matmul_strided_batch('T', 'N', TK, HS, T, s->scale, dscores, TK, weights_size, q, HS, query_size,
                                0, dk, HS, key_size, count);
}

static void forward_sdpa(const Tensors *t, const AttentionShape *s)
{
    attention_sdpa(t->out, t->lse, t->weights, t->workspace[0], t->q, t->k, t->v, s);
}

static void backward_sdpa(const Tensors *t, const AttentionShape *s)
{
    attention_sdpa_backward(t->dq, t->dk, t->dv, t->dbias, t->backward_workspace[0], t->dout, t->weights,
                            t->workspace[0], t->q, t->k, t->v, s);
}

/* ---- Something to learn: three projections, then attention_sdpa() as it stands. ---- */

/* out (B,T,C_out) = x (B,T,C) W, with W (C,C_out) */
static void multiply_right(float *out, const float *x, const float *w, const AttentionShape *s)
{
    int rows = s->batch * s->tokens, C = s->embed, C_out = s->embed_out;
    device_matmul('N', 'N', rows, C_out, C, 1, x, C, w, C_out, 0, out, C_out);
}

static void multiply_right_backward(float *dw, float *dx, float beta, const float *dout, const float *x,
                                    const float *w, const AttentionShape *s)
{
    int rows = s->batch * s->tokens, C = s->embed, C_out = s->embed_out;
    device_matmul('T', 'N', C, C_out, rows, 1, x, C, dout, C_out, 0, dw, C_out);
    device_matmul('N', 'T', rows, C, C_out, 1, dout, C_out, w, C_out, beta, dx, C);
}

static void forward_v1(const Tensors *t, const AttentionShape *s)
{
    for (int i = 0; i < 3; i++) /* queries, keys, values */
        multiply_right(t->workspace[i], t->x, t->parameter[i], s);
    attention_sdpa(t->out, NULL, t->weights, NULL, t->workspace[0], t->workspace[1], t->workspace[2], s);
}

static void forward_v2(const Tensors *t, const AttentionShape *s)
{
    for (int i = 0; i < 3; i++)
        device_linear(t->workspace[i], t->x, t->parameter[i], NULL, (size_t)s->batch * s->tokens, s->embed,
                      s->embed_out);
    attention_sdpa(t->out, NULL, t->weights, NULL, t->workspace[0], t->workspace[1], t->workspace[2], s);
}

/* x has a part in all three, and its gradient is the sum of theirs: the first writes dx, the others add. */
static void backward_v1(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace; /* dqueries, dkeys, dvalues, dscores */
    attention_sdpa_backward(d[0], d[1], d[2], NULL, d[3], t->dout, t->weights, NULL, t->workspace[0],
                            t->workspace[1], t->workspace[2], s);
    for (int i = 0; i < 3; i++)
        multiply_right_backward(t->d_parameter[i], t->dx, i > 0, d[i], t->x, t->parameter[i], s);
}

static void backward_v2(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace;
    attention_sdpa_backward(d[0], d[1], d[2], NULL, d[3], t->dout, t->weights, NULL, t->workspace[0],
                            t->workspace[1], t->workspace[2], s);
    for (int i = 0; i < 3; i++)
        device_linear_backward(t->dx, i > 0, t->d_parameter[i], d[i], t->x, t->parameter[i],
                               (size_t)s->batch * s->tokens, s->embed, s->embed_out);
}
#endif

/* ---- The table: all else is as in main.c. ---- */

DEVICE_TABLE(self_attention) = {
    {.name = "dot-product", .forward = forward_dot_product, .backward = backward_dot_product},
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "v1", .forward = forward_v1, .backward = backward_v1},
    {.name = "v2", .forward = forward_v2, .backward = backward_v2},
    {.name = "sdpa", .forward = forward_sdpa, .backward = backward_sdpa, .dropout = DROPOUT_POSITION},
#endif
    {},
};
