/* The gradients of packed_qkv.c: its steps in reverse. */
#include "matmul.h"
#include "packed_qkv.h"

/* The gradient of one row's softmax and dropout, in place: on entry the gradient of its n weights, on return
 * that of its scores. With P the softmax and D = P * keep / (1-p) the weights after dropout,
 *
 *   dP = dD * keep / (1-p)      dS = P * (dP - delta) = D * dD - P * delta      delta = sum of P * dP = D * dD
 *
 * so that D itself says what was dropped. What the row may not see, up to `end`, becomes 0. */
static void softmax_row_backward(float *d_row, const float *weights, const float *softmax, int n, int end)
{
    float delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int t2 = 0; t2 < n; t2++)
        delta += weights[t2] * d_row[t2];
    for (int t2 = 0; t2 < n; t2++)
        d_row[t2] = weights[t2] * d_row[t2] - softmax[t2] * delta;
    for (int t2 = n; t2 < end; t2++)
        d_row[t2] = 0;
}

void attend_heads_backward(float *d_q, float *d_k, float *d_v, float *d_scores, const float *d_context,
                           const float *weights, const float *softmax, const float *q, const float *k,
                           const float *v, int row_stride, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size;
    int C_out = NH * HS, block = T < BACKWARD_ROWS ? T : BACKWARD_ROWS;

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++) {
            size_t head = (size_t)b * T * row_stride + h * HS;
            const float *q_bh = q + head, *k_bh = k + head, *v_bh = v + head;
            float *d_q_bh = d_q + head, *d_k_bh = d_k + head, *d_v_bh = d_v + head;
            float *d_scores_bh = d_scores + ((size_t)b * NH + h) * block * T;

            /* Blocks of rows t0 .. t1-1, which see keys 0 .. t1-1. The last block comes first: it sees every
             * key, and so writes the gradients that the others add to. */
            for (int t1 = T, t0; t1 > 0; t1 = t0) {
                t0 = (t1 - 1) / block * block;
                float sum_so_far = t1 < T;
                size_t rows = (size_t)t0 * row_stride;
                const float *weights_bh = weights + lse_index(s, b, h, t0) * T;
                const float *softmax_bh = softmax + lse_index(s, b, h, t0) * T;
                const float *d_context_bh = d_context + ((size_t)b * T + t0) * C_out + h * HS;

                /* context = weights V: d_weights = d_context V^T, d_v = weights^T d_context */
                matmul('N', 'T', t1 - t0, t1, HS, 1, d_context_bh, C_out, v_bh, row_stride, 0, d_scores_bh,
                       T);
                matmul('T', 'N', t1, HS, t1 - t0, 1, weights_bh, T, d_context_bh, C_out, sum_so_far, d_v_bh,
                       row_stride);
                for (int t = t0; t < t1; t++) {
                    size_t row = (size_t)(t - t0) * T;
                    softmax_row_backward(d_scores_bh + row, weights_bh + row, softmax_bh + row, t + 1, t1);
                }
                /* scores = scale Q K^T: d_q = scale d_scores K, d_k = scale d_scores^T Q */
                matmul('N', 'N', t1 - t0, HS, t1, s->scale, d_scores_bh, T, k_bh, row_stride, 0,
                       d_q_bh + rows, row_stride);
                matmul('T', 'N', t1, HS, t1 - t0, s->scale, d_scores_bh, T, q_bh + rows, row_stride,
                       sum_so_far, d_k_bh, row_stride);
            }
        }
}

void split_heads_backward(float *d_x, float *d_query_weight, float *d_key_weight, float *d_value_weight,
                          float *d_out_weight, float *d_out_bias, float *d_q, float *d_k, float *d_v,
                          float *d_context, float *d_scores, const float *d_out, const float *weights,
                          const float *softmax, const float *q, const float *k, const float *v,
                          const float *context, const float *x, const float *query_weight,
                          const float *key_weight, const float *value_weight, const float *out_weight,
                          const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed, C_out = s->embed_out;

    linear_backward(d_context, 0, d_out_weight, d_out_bias, d_out, C_out, context, out_weight, rows, C_out,
                    C_out);
    attend_heads_backward(d_q, d_k, d_v, d_scores, d_context, weights, softmax, q, k, v, C_out, s);
    /* x went three ways, so its gradient is the sum of three */
    linear_backward(d_x, 0, d_query_weight, NULL, d_q, C_out, x, query_weight, rows, C, C_out);
    linear_backward(d_x, 1, d_key_weight, NULL, d_k, C_out, x, key_weight, rows, C, C_out);
    linear_backward(d_x, 1, d_value_weight, NULL, d_v, C_out, x, value_weight, rows, C, C_out);
}

void packed_qkv_backward(float *d_x, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                         float *d_qkv, float *d_context, float *d_scores, const float *d_out,
                         const float *weights, const float *softmax, const float *qkv, const float *context,
                         const float *x, const float *qkv_weight, const float *proj_weight,
                         const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed, C_out = s->embed_out;

    linear_backward(d_context, 0, d_proj_weight, d_proj_bias, d_out, C_out, context, proj_weight, rows, C_out,
                    C_out);
    attend_heads_backward(d_qkv, d_qkv + C_out, d_qkv + 2 * C_out, d_scores, d_context, weights, softmax, qkv,
                          qkv + C_out, qkv + 2 * C_out, 3 * C_out, s);
    linear_backward(d_x, 0, d_qkv_weight, NULL, d_qkv, 3 * C_out, x, qkv_weight, rows, C, 3 * C_out);
}

void torch_mha_backward(float *d_x, float *d_in_proj_weight, float *d_inner_weight, float *d_proj_weight,
                        float *d_proj_bias, float *d_qkv, float *d_context, float *d_attended,
                        float *d_scores, const float *d_out, const float *weights, const float *softmax,
                        const float *qkv, const float *context, const float *attended, const float *x,
                        const float *in_proj_weight, const float *inner_weight, const float *proj_weight,
                        const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed;

    linear_backward(d_attended, 0, d_proj_weight, d_proj_bias, d_out, C, attended, proj_weight, rows, C, C);
    linear_backward(d_context, 0, d_inner_weight, NULL, d_attended, C, context, inner_weight, rows, C, C);
    attend_heads_backward(d_qkv, d_qkv + C, d_qkv + 2 * C, d_scores, d_context, weights, softmax, qkv,
                          qkv + C, qkv + 2 * C, 3 * C, s);
    linear_backward(d_x, 0, d_in_proj_weight, NULL, d_qkv, 3 * C, x, in_proj_weight, rows, C, 3 * C);
}
