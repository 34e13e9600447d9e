/* The twins of causal_attention.c on a GPU. A warp takes a row in `renormalise` and `minus-inf`; in `causal`, the module
 * of the notebook, a whole block does. The shapes are in causal_attention.h, and the pointers are the device's. */
#include "kernel.h"
#include "philox.h"
#include "cuda_linear.h"

#if defined(SIMT) || defined(HAVE_CUBLAS)

/* ---- A row at a time, by `threads` threads, of which this is number `me`. The steps ask for the sum or the largest of what
 * all of them hold; who answers is the only difference between a warp and a block. ---- */

struct WarpRow {
    static const int threads = WARP;

    __device__ int me() const
    {
        return threadIdx.x % WARP;
    }
    __device__ float sum(float own) const
    {
        return warp_sum(own);
    }
    __device__ float largest(float own) const
    {
        return warp_largest(own);
    }
};

struct BlockRow {
    static const int threads = MOST_WARPS * WARP;
    float *part; /* (MOST_WARPS) in shared memory */

    __device__ int me() const
    {
        return threadIdx.x;
    }
    /* Each warp's share, for every thread to read. */
    __device__ void share(float of_warp) const
    {
        __syncthreads(); /* the shares before have been read */
        if (threadIdx.x % WARP == 0)
            part[threadIdx.x / WARP] = of_warp;
        __syncthreads();
    }
    __device__ float sum(float own) const
    {
        share(warp_sum(own));
        float sum = 0;
        for (int i = 0; i < MOST_WARPS; i++)
            sum += part[i];
        return sum;
    }
    __device__ float largest(float own) const
    {
        share(warp_largest(own));
        float largest = -INFINITY;
        for (int i = 0; i < MOST_WARPS; i++)
            largest = larger(largest, part[i]);
        return largest;
    }
};

template <typename Row> __device__ static void softmax_row(Row all, float *row, int n)
{
    float largest = -INFINITY, sum = 0;
    for (int i = all.me(); i < n; i += all.threads)
        largest = larger(largest, row[i]);
    largest = all.largest(largest);
    if (largest == -INFINITY)
        largest = 0; /* nothing to attend to: every exp(-inf) below is 0 */

    for (int i = all.me(); i < n; i += all.threads) {
        row[i] = expf(row[i] - largest);
        sum += row[i];
    }
    sum = all.sum(sum);

    float share = sum == 0 ? 0 : 1 / sum;
    for (int i = all.me(); i < n; i += all.threads)
        row[i] *= share;
}

template <typename Row> __device__ static void renormalise_row(Row all, float *row, int n, int allowed)
{
    float sum = 0;
    for (int i = all.me(); i < allowed; i += all.threads)
        sum += row[i];
    sum = all.sum(sum);
    for (int i = all.me(); i < n; i += all.threads)
        row[i] = i < allowed ? row[i] / sum : 0;
}

template <typename Row> __device__ static void mask_row(Row all, float *row, int n, int allowed)
{
    for (int i = all.me(); i < n; i += all.threads)
        if (i >= allowed)
            row[i] = -INFINITY;
}

/* ---- What the three kernels share. ---- */

static void project(const Tensors *t, const AttentionShape *s)
{
    for (int i = 0; i < 3; i++) /* queries, keys, values */
        device_linear(t->workspace[i], t->x, t->parameter[i], NULL, (size_t)s->batch * s->tokens, s->embed,
                      s->embed_out);
}

/* scores (B,T,T) = scale * Q K^T */
static void score(float *scores, const float *queries, const float *keys, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    device_matmul_strided_batch('N', 'T', T, T, C_out, s->scale, queries, C_out, rows, keys, C_out, rows, 0,
                                scores, T, square, s->batch);
}

/* out (B,T,C_out) = weights V */
static void mix(float *out, const float *weights, const float *values, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    device_matmul_strided_batch('N', 'N', T, C_out, T, 1, weights, T, square, values, C_out, rows, 0, out,
                                C_out, rows, s->batch);
}

/* ---- Mask after the softmax. ---- */

__global__ static void renormalise_kernel(float *weights, int T, size_t rows)
{
    for (size_t bt = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bt < rows;
         bt += (size_t)gridDim.x * MOST_WARPS) {
        softmax_row(WarpRow(), weights + bt * T, T);
        renormalise_row(WarpRow(), weights + bt * T, T, (int)(bt % T) + 1);
    }
}

static void forward_renormalise(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    project(t, s);
    score(t->weights, t->workspace[0], t->workspace[1], s);
    LAUNCH(renormalise_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->weights, s->tokens, rows);
    mix(t->out, t->weights, t->workspace[2], s);
}

/* ---- Mask before the softmax. ---- */

__global__ static void minus_inf_kernel(float *weights, int T, size_t rows)
{
    for (size_t bt = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bt < rows;
         bt += (size_t)gridDim.x * MOST_WARPS) {
        mask_row(WarpRow(), weights + bt * T, T, (int)(bt % T) + 1);
        softmax_row(WarpRow(), weights + bt * T, T);
    }
}

static void forward_minus_inf(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    project(t, s);
    score(t->weights, t->workspace[0], t->workspace[1], s);
    LAUNCH(minus_inf_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->weights, s->tokens, rows);
    mix(t->out, t->weights, t->workspace[2], s);
}

/* ---- The same, with dropout, a block to a row: the module of the notebook. ---- */

__global__ static void causal_kernel(float *weights, float *softmax, int T, float dropout, uint64_t seed,
                                     size_t rows)
{
    __shared__ float part[MOST_WARPS];
    for (size_t bt = blockIdx.x; bt < rows; bt += gridDim.x) {
        BlockRow all = {part};
        float *row = weights + bt * T;
        mask_row(all, row, T, (int)(bt % T) + 1);
        softmax_row(all, row, T);
        for (int i = all.me(); dropout > 0 && i < T; i += all.threads) {
            softmax[bt * T + i] = row[i];
            row[i] *= dropout_keeps_pair(seed, bt, i, dropout) / (1 - dropout);
        }
    }
}

static void forward_causal(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    project(t, s);
    score(t->weights, t->workspace[0], t->workspace[1], s);
    LAUNCH(causal_kernel, rows < MOST_BLOCKS ? (int)rows : MOST_BLOCKS, BlockRow::threads, 0, t->weights,
           t->workspace[3], s->tokens, s->dropout, s->dropout_seed, rows);
    mix(t->out, t->weights, t->workspace[2], s);
}

/* ---- Backward: the steps of forward, last one first. ---- */

__device__ static void dropout_row_backward(float *row, const float *weights, int n, float p)
{
    float scale = 1 / (1 - p);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        row[i] *= weights[i] == 0 ? 0 : scale;
}

__device__ static void softmax_row_backward(float *row, const float *weights, int n)
{
    float delta = 0;
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        delta += weights[i] * row[i];
    delta = warp_sum(delta);
    for (int i = threadIdx.x % WARP; i < n; i += WARP)
        row[i] = weights[i] * (row[i] - delta);
}

/* dscores hold the gradient of the weights. Row by row it becomes that of the scores: a warp to a row. */
__global__ static void softmax_backward_kernel(float *dscores, const float *weights, const float *softmax,
                                               int T, float dropout, size_t rows)
{
    for (size_t bt = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bt < rows;
         bt += (size_t)gridDim.x * MOST_WARPS) {
        if (dropout > 0)
            dropout_row_backward(dscores + bt * T, weights + bt * T, T, dropout);
        softmax_row_backward(dscores + bt * T, (dropout > 0 ? softmax : weights) + bt * T, T);
    }
}

/* out = weights V:  dvalues (B,T,C_out) = weights^T dout,  dweights (B,T,T) = dout V^T */
static void mix_backward(float *dvalues, float *dweights, const float *dout, const float *weights,
                         const float *values, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    device_matmul_strided_batch('T', 'N', T, C_out, T, 1, weights, T, square, dout, C_out, rows, 0, dvalues,
                                C_out, rows, s->batch);
    device_matmul_strided_batch('N', 'T', T, T, C_out, 1, dout, C_out, rows, values, C_out, rows, 0, dweights,
                                T, square, s->batch);
}

/* scores = scale * Q K^T:  dqueries = scale * dscores K,  dkeys = scale * dscores^T Q, both (B,T,C_out) */
static void score_backward(float *dqueries, float *dkeys, const float *dscores, const float *queries,
                           const float *keys, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    device_matmul_strided_batch('N', 'N', T, C_out, T, s->scale, dscores, T, square, keys, C_out, rows, 0,
                                dqueries, C_out, rows, s->batch);
    device_matmul_strided_batch('T', 'N', T, C_out, T, s->scale, dscores, T, square, queries, C_out, rows, 0,
                                dkeys, C_out, rows, s->batch);
}

static void backward(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    float *const *kept = t->workspace; /* queries, keys, values, and with dropout the softmax */
    float *const *d = t->backward_workspace, *dscores = d[3];
    mix_backward(d[2], dscores, t->dout, t->weights, kept[2], s);
    LAUNCH(softmax_backward_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, dscores, t->weights, kept[3],
           s->tokens, s->dropout, rows);
    score_backward(d[0], d[1], dscores, kept[0], kept[1], s);
    for (int i = 0; i < 3; i++)
        device_linear_backward(t->dx, i > 0, t->d_parameter[i], d[i], t->x, t->parameter[i], rows, s->embed,
                               s->embed_out);
}
#endif

/* ---- The table: all else is as in main.c. ---- */

DEVICE_TABLE(causal_attention) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "renormalise", .forward = forward_renormalise, .backward = backward},
    {.name = "minus-inf", .forward = forward_minus_inf, .backward = backward},
    {.name = "causal", .forward = forward_causal, .backward = backward, .dropout = DROPOUT_POSITION},
#endif
    {},
};
