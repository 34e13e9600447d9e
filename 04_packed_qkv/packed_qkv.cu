/* The twins of packed_qkv.c and packed_qkv_backward.c on a GPU: all heads in one launch, found where the projection left them, by
 * pointers forward and by strides backward. The shapes are in packed_qkv.h, and the pointers are the device's. */
#include "kernel.h"
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

/* A warp to each of the B NH T rows. softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, int T, float dropout, uint64_t seed,
                                      size_t rows)
{
    int lane = threadIdx.x % WARP;
    for (size_t bht = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bht < rows;
         bht += (size_t)gridDim.x * MOST_WARPS) {
        float *row = weights + bht * T;
        softmax_row(row, (int)(bht % T) + 1, T);
        for (int t2 = lane; dropout > 0 && t2 < T; t2 += WARP) {
            softmax[bht * T + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(seed, bht, t2, dropout) / (1 - dropout);
        }
    }
}

/* Where each head of each batch entry begins, for cuBLAS to find: `entry` numbers from one entry to the next, `head` from one
 * head to the next. */
__global__ static void point_to_heads_kernel(const float **at, const float *first, size_t entry, size_t head,
                                             int NH, int count)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        at[i] = first + i / NH * entry + i % NH * head;
}

enum { Q_AT, K_AT, V_AT, WEIGHTS_AT, CONTEXT_AT, TENSORS };

/* The workspace of their pointers, two floats each. */
static size_t pointer_floats(const AttentionShape *s)
{
    return (size_t)TENSORS * s->batch * s->heads * 2;
}

static const float *const *point_to_heads(float *pointers, int tensor, const float *first, size_t entry,
                                          size_t head, const AttentionShape *s)
{
    int count = s->batch * s->heads;
    const float **at = (const float **)pointers + (size_t)tensor * count;
    LAUNCH(point_to_heads_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, at, first, entry, head,
           s->heads, count);
    return at;
}

static void attend_heads(float *context, float *weights, float *softmax, float *pointers, const float *q,
                         const float *k, const float *v, int row_stride, const AttentionShape *s)
{
    int T = s->tokens, NH = s->heads, HS = s->head_size, C_out = NH * HS, count = s->batch * NH;
    size_t square = (size_t)T * T, entry = (size_t)T * row_stride;

    /* From one head to the next it is HS columns, from one entry to the next T rows. */
    const float *const *q_bh = point_to_heads(pointers, Q_AT, q, entry, HS, s);
    const float *const *k_bh = point_to_heads(pointers, K_AT, k, entry, HS, s);
    const float *const *v_bh = point_to_heads(pointers, V_AT, v, entry, HS, s);
    const float *const *weights_bh = point_to_heads(pointers, WEIGHTS_AT, weights, NH * square, square, s);
    const float *const *context_bh = point_to_heads(pointers, CONTEXT_AT, context, (size_t)T * C_out, HS, s);

    /* weights = softmax(scale Q K^T) */
    device_matmul_pointer_batch('N', 'T', T, T, HS, s->scale, q_bh, row_stride, k_bh, row_stride, 0,
                                (float *const *)weights_bh, T, count);
    LAUNCH(softmax_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, weights, softmax, T, s->dropout,
           s->dropout_seed, lse_count(s));
    /* context = weights V, straight to the head's columns: concatenation costs nothing */
    device_matmul_pointer_batch('N', 'N', T, HS, T, 1, weights_bh, T, v_bh, row_stride, 0,
                                (float *const *)context_bh, C_out, count);
}

/* averaged (B,T,T) = the mean of weights (B,NH,T,T) over the heads: a thread to each number, always in the same order. */
__global__ static void average_heads_kernel(float *averaged, const float *weights, int NH, size_t square,
                                            size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        size_t b = i / square, pair = i % square;
        float sum = 0;
        for (int h = 0; h < NH; h++)
            sum += weights[(b * NH + h) * square + pair] / NH;
        averaged[i] = sum;
    }
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
                                               int T, size_t rows)
{
    for (size_t bht = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bht < rows;
         bht += (size_t)gridDim.x * MOST_WARPS)
        softmax_row_backward(d_scores + bht * T, weights + bht * T, softmax + bht * T, (int)(bht % T) + 1, T);
}

/* d_scores (B,NH,T,T): all of them, where the C holds a block of rows at a time. */
static void attend_heads_backward(float *d_q, float *d_k, float *d_v, float *d_scores, const float *d_context,
                                  const float *weights, const float *softmax, const float *q, const float *k,
                                  const float *v, int row_stride, const AttentionShape *s)
{
    int T = s->tokens, NH = s->heads, HS = s->head_size, C_out = NH * HS;
    size_t square = (size_t)T * T, entry = (size_t)T * row_stride, context_entry = (size_t)T * C_out;

    /* context = weights V: d_weights = d_context V^T, d_v = weights^T d_context */
    for (int b = 0; b < s->batch; b++) {
        const float *d_context_b = d_context + b * context_entry;
        device_matmul_strided_batch('N', 'T', T, T, HS, 1, d_context_b, C_out, HS, v + b * entry, row_stride,
                                    HS, 0, d_scores + b * NH * square, T, square, NH);
        device_matmul_strided_batch('T', 'N', T, HS, T, 1, weights + b * NH * square, T, square, d_context_b,
                                    C_out, HS, 0, d_v + b * entry, row_stride, HS, NH);
    }
    LAUNCH(softmax_backward_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, d_scores, weights,
           softmax, T, lse_count(s));
    /* scores = scale Q K^T: d_q = scale d_scores K, d_k = scale d_scores^T Q */
    for (int b = 0; b < s->batch; b++) {
        const float *d_scores_b = d_scores + b * NH * square;
        device_matmul_strided_batch('N', 'N', T, HS, T, s->scale, d_scores_b, T, square, k + b * entry,
                                    row_stride, HS, 0, d_q + b * entry, row_stride, HS, NH);
        device_matmul_strided_batch('T', 'N', T, HS, T, s->scale, d_scores_b, T, square, q + b * entry,
                                    row_stride, HS, 0, d_k + b * entry, row_stride, HS, NH);
    }
}

/* ---- split-heads: three projections. ---- */

/* What the C calls rows: B T tokens. */
static size_t tokens_of(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens;
}

static const float *softmax_of(const float *weights, const float *before_dropout, const AttentionShape *s)
{
    return s->dropout > 0 ? before_dropout : weights;
}

/* q, k, v, context, the weights before dropout, and pointers. */
static int workspace_split(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = tokens_of(s) * s->embed_out;
    floats[4] = s->dropout > 0 ? weights_count(s) : 0;
    floats[5] = pointer_floats(s);
    return 6;
}

static void forward_split(const Tensors *t, const AttentionShape *s)
{
    float *const *kept = t->workspace;
    int C = s->embed, C_out = s->embed_out;
    for (int i = 0; i < 3; i++)
        device_linear(kept[i], t->x, t->parameter[i], NULL, tokens_of(s), C, C_out);
    attend_heads(kept[3], t->weights, kept[4], kept[5], kept[0], kept[1], kept[2], C_out, s);
    device_linear(t->out, kept[3], t->parameter[3], t->parameter[4], tokens_of(s), C_out, C_out);
}

/* The gradients of q, k, v and context, and of scores */
static int backward_workspace_split(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = tokens_of(s) * s->embed_out;
    floats[4] = weights_count(s);
    return 5;
}

static void backward_split(const Tensors *t, const AttentionShape *s)
{
    float *const *kept = t->workspace, *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    int C = s->embed, C_out = s->embed_out;
    device_linear_backward(d[3], 0, d_w[3], t->dout, kept[3], t->parameter[3], tokens_of(s), C_out, C_out);
    device_sum_rows(d_w[4], t->dout, tokens_of(s), C_out);
    attend_heads_backward(d[0], d[1], d[2], d[4], d[3], t->weights, softmax_of(t->weights, kept[4], s),
                          kept[0], kept[1], kept[2], C_out, s);
    for (int i = 0; i < 3; i++) /* x went three ways, so its gradient is the sum of three */
        device_linear_backward(t->dx, i > 0, d_w[i], d[i], t->x, t->parameter[i], tokens_of(s), C, C_out);
}

/* ---- packed-qkv: one projection, three times as wide. ---- */

/* qkv, context, the weights before dropout, and pointers. */
static int workspace_packed(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = tokens_of(s) * 3 * s->embed_out;
    floats[1] = tokens_of(s) * s->embed_out;
    floats[2] = s->dropout > 0 ? weights_count(s) : 0;
    floats[3] = pointer_floats(s);
    return 4;
}

static void forward_packed(const Tensors *t, const AttentionShape *s)
{
    float *qkv = t->workspace[0], *context = t->workspace[1], *softmax = t->workspace[2];
    int C = s->embed, C_out = s->embed_out;
    device_linear(qkv, t->x, t->parameter[0], NULL, tokens_of(s), C, 3 * C_out);
    attend_heads(context, t->weights, softmax, t->workspace[3], qkv, qkv + C_out, qkv + 2 * C_out, 3 * C_out,
                 s);
    device_linear(t->out, context, t->parameter[1], t->parameter[2], tokens_of(s), C_out, C_out);
}

/* The gradients of qkv and context, and of scores */
static int backward_workspace_packed(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = tokens_of(s) * 3 * s->embed_out;
    floats[1] = tokens_of(s) * s->embed_out;
    floats[2] = weights_count(s);
    return 3;
}

static void backward_packed(const Tensors *t, const AttentionShape *s)
{
    const float *qkv = t->workspace[0], *context = t->workspace[1], *softmax = t->workspace[2];
    float *d_qkv = t->backward_workspace[0], *d_context = t->backward_workspace[1];
    float *d_scores = t->backward_workspace[2], *const *d_w = t->d_parameter;
    int C = s->embed, C_out = s->embed_out;
    device_linear_backward(d_context, 0, d_w[1], t->dout, context, t->parameter[1], tokens_of(s), C_out,
                           C_out);
    device_sum_rows(d_w[2], t->dout, tokens_of(s), C_out);
    attend_heads_backward(d_qkv, d_qkv + C_out, d_qkv + 2 * C_out, d_scores, d_context, t->weights,
                          softmax_of(t->weights, softmax, s), qkv, qkv + C_out, qkv + 2 * C_out, 3 * C_out,
                          s);
    device_linear_backward(t->dx, 0, d_w[0], d_qkv, t->x, t->parameter[0], tokens_of(s), C, 3 * C_out);
}

/* ---- torch-mha: packed, one projection more, and the weights averaged over the heads. ---- */

/* qkv, context, attended, the weights of every head, and before dropout, and pointers. */
static int workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    workspace_packed(s, floats);
    floats[5] = floats[3];
    floats[4] = floats[2];
    floats[3] = weights_count(s);
    floats[2] = floats[1];
    return 6;
}

static void forward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    float *qkv = t->workspace[0], *context = t->workspace[1], *attended = t->workspace[2];
    float *weights = t->workspace[3], *softmax = t->workspace[4], *averaged = t->weights;
    const float *inner_weight = t->parameter[0], *in_proj_weight = t->parameter[1];
    int C = s->embed;
    size_t square = (size_t)s->tokens * s->tokens, count = s->batch * square;
    device_linear(qkv, t->x, in_proj_weight, NULL, tokens_of(s), C, 3 * C);
    attend_heads(context, weights, softmax, t->workspace[5], qkv, qkv + C, qkv + 2 * C, 3 * C, s);
    LAUNCH(average_heads_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, averaged, weights,
           s->heads, square, count);
    device_linear(attended, context, inner_weight, NULL, tokens_of(s), C, C);
    device_linear(t->out, attended, t->parameter[2], t->parameter[3], tokens_of(s), C, C);
}

/* The gradients of qkv, context and attended, and of scores */
static int backward_workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = tokens_of(s) * 3 * s->embed;
    floats[1] = floats[2] = tokens_of(s) * s->embed;
    floats[3] = weights_count(s);
    return 4;
}

/* The averaged weights are returned to be looked at; the loss is out's. */
static void backward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    const float *qkv = t->workspace[0], *context = t->workspace[1], *attended = t->workspace[2];
    const float *weights = t->workspace[3], *softmax = softmax_of(weights, t->workspace[4], s);
    float *d_qkv = t->backward_workspace[0], *d_context = t->backward_workspace[1];
    float *d_attended = t->backward_workspace[2], *d_scores = t->backward_workspace[3];
    float *const *d_w = t->d_parameter;
    int C = s->embed;
    device_linear_backward(d_attended, 0, d_w[2], t->dout, attended, t->parameter[2], tokens_of(s), C, C);
    device_sum_rows(d_w[3], t->dout, tokens_of(s), C);
    device_linear_backward(d_context, 0, d_w[0], d_attended, context, t->parameter[0], tokens_of(s), C, C);
    attend_heads_backward(d_qkv, d_qkv + C, d_qkv + 2 * C, d_scores, d_context, weights, softmax, qkv,
                          qkv + C, qkv + 2 * C, 3 * C, s);
    device_linear_backward(t->dx, 0, d_w[1], d_qkv, t->x, t->parameter[1], tokens_of(s), C, 3 * C);
}
#endif

/* ---- The table: all else is as in main.c. ---- */

DEVICE_TABLE(packed_qkv) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "split-heads",
     .forward = forward_split,
     .backward = backward_split,
     .backward_workspace = backward_workspace_split,
     .workspace = workspace_split,
     .dropout = DROPOUT_POSITION},
    {.name = "packed-qkv",
     .forward = forward_packed,
     .backward = backward_packed,
     .backward_workspace = backward_workspace_packed,
     .workspace = workspace_packed,
     .dropout = DROPOUT_POSITION},
    {.name = "torch-mha",
     .forward = forward_torch_mha,
     .backward = backward_torch_mha,
     .backward_workspace = backward_workspace_torch_mha,
     .workspace = workspace_torch_mha,
     .dropout = DROPOUT_POSITION},
#endif
    {},
};
