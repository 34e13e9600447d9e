/* The twins of multihead_wrapper.c and multihead_wrapper_backward.c on a GPU: head after head, each in a handful of launches.
 * The shapes are in multihead_wrapper.h, and the pointers are the device's. */
#include "kernel.h"
#include "multihead_wrapper.h"
#include "philox.h"
#include "cuda_linear.h"

#if defined(SIMT) || defined(HAVE_CUBLAS)

/* Softmax in place over the first n of a row's T scores; the rest, which the row may not see, become 0. One warp. */
__device__ static void softmax_row(float *row, int n, int T)
{
    int lane = threadIdx.x % WARP;
    float m = -INFINITY, l = 0;
    for (int t2 = lane; t2 < n; t2 += WARP)
        m = larger(m, row[t2]);
    m = warp_largest(m);
    for (int t2 = lane; t2 < n; t2 += WARP) {
        row[t2] = expf(row[t2] - m);
        l += row[t2];
    }
    l = warp_sum(l);
    for (int t2 = lane; t2 < T; t2 += WARP)
        row[t2] = t2 < n ? row[t2] / l : 0;
}

/* Head h's rows, a warp to each. softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, int h, AttentionShape shape)
{
    const AttentionShape *s = &shape;
    int T = s->tokens, lane = threadIdx.x % WARP;
    size_t rows = (size_t)s->batch * T, step = (size_t)gridDim.x * MOST_WARPS;
    for (size_t i = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; i < rows; i += step) {
        int b = (int)(i / T), t = (int)(i % T);
        size_t bht = lse_index(s, b, h, t);
        float *row = weights + bht * T;
        softmax_row(row, t + 1, T);
        for (int t2 = lane; s->dropout > 0 && t2 < T; t2 += WARP) {
            softmax[bht * T + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(s->dropout_seed, bht, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

static void device_causal_head(float *context, float *weights, float *softmax, float *q, float *k, float *v,
                               const float *x, const Head *head, int h, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, C = s->embed, HS = s->head_size, C_out = s->embed_out;
    size_t rows = (size_t)B * T, head_size = (size_t)T * HS, head_weights = (size_t)T * T;
    size_t next_entry = s->heads * head_weights; /* from one batch entry's weights to the next one's */

    device_linear(q, x, head->query_weight, NULL, rows, C, HS);
    device_linear(k, x, head->key_weight, NULL, rows, C, HS);
    device_linear(v, x, head->value_weight, NULL, rows, C, HS);

    /* weights = softmax(scale Q K^T); the half that is hidden is computed too, and then set to 0 */
    device_matmul_strided_batch('N', 'T', T, T, HS, s->scale, q, HS, head_size, k, HS, head_size, 0,
                                weights + h * head_weights, T, next_entry, B);
    LAUNCH(softmax_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, weights, softmax, h, *s);

    /* context = weights V, straight to this head's columns */
    device_matmul_strided_batch('N', 'N', T, HS, T, 1, weights + h * head_weights, T, next_entry, v, HS,
                                head_size, 0, context, C_out, (size_t)T * C_out, B);
}

/* ---- The gradients: the same steps in reverse. ---- */

/* On entry a row of d_scores is the gradient of its n weights, on return that of its scores: one warp. dS = D * dD - P *
 * delta, where D itself says what was dropped; what the row may not see becomes 0. */
__device__ static void softmax_row_backward(float *d_row, const float *weights, const float *softmax, int n,
                                            int T)
{
    int lane = threadIdx.x % WARP;
    float delta = 0;
    for (int t2 = lane; t2 < n; t2 += WARP)
        delta += weights[t2] * d_row[t2];
    delta = warp_sum(delta);
    for (int t2 = lane; t2 < T; t2 += WARP)
        d_row[t2] = t2 < n ? weights[t2] * d_row[t2] - softmax[t2] * delta : 0;
}

__global__ static void softmax_backward_kernel(float *d_scores, const float *weights, const float *softmax,
                                               int h, AttentionShape shape)
{
    const AttentionShape *s = &shape;
    int T = s->tokens;
    size_t rows = (size_t)s->batch * T, step = (size_t)gridDim.x * MOST_WARPS;
    for (size_t i = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; i < rows; i += step) {
        int b = (int)(i / T), t = (int)(i % T);
        size_t row = lse_index(s, b, h, t) * T;
        softmax_row_backward(d_scores + i * T, weights + row, softmax + row, t + 1, T);
    }
}

static void device_causal_head_backward(float *d_x, const HeadGradient *d_head, float *d_q, float *d_k,
                                        float *d_v, float *d_scores, const float *d_context,
                                        const float *weights, const float *softmax, const float *q,
                                        const float *k, const float *v, const float *x, const Head *head,
                                        int h, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, C = s->embed, HS = s->head_size, C_out = s->embed_out;
    size_t rows = (size_t)B * T, head_size = (size_t)T * HS, head_weights = (size_t)T * T;
    size_t next_entry = s->heads * head_weights, next_context = (size_t)T * C_out;

    /* context = weights V: d_weights = d_context V^T, d_v = weights^T d_context */
    device_matmul_strided_batch('N', 'T', T, T, HS, 1, d_context, C_out, next_context, v, HS, head_size, 0,
                                d_scores, T, head_weights, B);
    device_matmul_strided_batch('T', 'N', T, HS, T, 1, weights + h * head_weights, T, next_entry, d_context,
                                C_out, next_context, 0, d_v, HS, head_size, B);
    LAUNCH(softmax_backward_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, d_scores, weights, softmax, h,
           *s);
    /* scores = scale Q K^T: d_q = scale d_scores K, d_k = scale d_scores^T Q */
    device_matmul_strided_batch('N', 'N', T, HS, T, s->scale, d_scores, T, head_weights, k, HS, head_size, 0,
                                d_q, HS, head_size, B);
    device_matmul_strided_batch('T', 'N', T, HS, T, s->scale, d_scores, T, head_weights, q, HS, head_size, 0,
                                d_k, HS, head_size, B);

    /* x went to three matrices of every head, so its gradient is a sum */
    device_linear_backward(d_x, h > 0, d_head->query_weight, d_q, x, head->query_weight, rows, C, HS);
    device_linear_backward(d_x, 1, d_head->key_weight, d_k, x, head->key_weight, rows, C, HS);
    device_linear_backward(d_x, 1, d_head->value_weight, d_v, x, head->value_weight, rows, C, HS);
}

/* ---- The table: all else is as in main.c. ---- */

static Head head_of(const Tensors *t, int h)
{
    return {t->parameter[3 * h], t->parameter[3 * h + 1], t->parameter[3 * h + 2]};
}

static HeadGradient gradient_of(const Tensors *t, int h)
{
    return {t->d_parameter[3 * h], t->d_parameter[3 * h + 1], t->d_parameter[3 * h + 2]};
}

/* The heads of t, into context (B,T,C_out). */
static void forward_heads(float *context, const Tensors *t, const AttentionShape *s)
{
    float *const *kept = t->workspace; /* q, k, v (NH,B,T,HS) each, and with dropout the softmax */
    size_t size = (size_t)s->batch * s->tokens * s->head_size;
    for (int h = 0; h < s->heads; h++) {
        Head head = head_of(t, h);
        device_causal_head(context + (size_t)h * s->head_size, t->weights, kept[3], kept[0] + h * size,
                           kept[1] + h * size, kept[2] + h * size, t->x, &head, h, s);
    }
}

static void backward_heads(const float *d_context, const Tensors *t, const AttentionShape *s)
{
    float *const *kept = t->workspace, *const *d = t->backward_workspace;
    const float *softmax = s->dropout > 0 ? kept[3] : t->weights;
    size_t size = (size_t)s->batch * s->tokens * s->head_size;
    for (int h = 0; h < s->heads; h++) {
        Head head = head_of(t, h);
        HeadGradient d_head = gradient_of(t, h);
        device_causal_head_backward(
            t->dx, &d_head, d[0], d[1], d[2], d[3], d_context + (size_t)h * s->head_size, t->weights, softmax,
            kept[0] + h * size, kept[1] + h * size, kept[2] + h * size, t->x, &head, h, s);
    }
}

static void forward_stacked(const Tensors *t, const AttentionShape *s)
{
    forward_heads(t->out, t, s);
}

static void backward_stacked(const Tensors *t, const AttentionShape *s)
{
    backward_heads(t->dout, t, s);
}

static void forward_wrapper(const Tensors *t, const AttentionShape *s)
{
    const float *out_weight = t->parameter[3 * s->heads], *out_bias = t->parameter[3 * s->heads + 1];
    forward_heads(t->workspace[4], t, s);
    device_linear(t->out, t->workspace[4], out_weight, out_bias, (size_t)s->batch * s->tokens, s->embed_out,
                  s->embed_out);
}

static void backward_wrapper(const Tensors *t, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    const float *context = t->workspace[4], *out_weight = t->parameter[3 * s->heads];
    float *d_out_weight = t->d_parameter[3 * s->heads], *d_out_bias = t->d_parameter[3 * s->heads + 1];
    float *d_context = t->backward_workspace[4];
    device_linear_backward(d_context, 0, d_out_weight, t->dout, context, out_weight, rows, s->embed_out,
                           s->embed_out);
    device_sum_rows(d_out_bias, t->dout, rows, s->embed_out);
    backward_heads(d_context, t, s);
}
#endif

DEVICE_TABLE(multihead_wrapper) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "stacked",
     .forward = forward_stacked,
     .backward = backward_stacked,
     .dropout = DROPOUT_POSITION},
    {.name = "wrapper",
     .forward = forward_wrapper,
     .backward = backward_wrapper,
     .dropout = DROPOUT_POSITION},
#endif
    {},
};
