/* The gradients of multihead_wrapper.c: its steps in reverse. */
#include "matmul.h"
#include "multihead_wrapper.h"

/* Rows, or keys, worked on at a time, as in forward. */
enum { BLOCK = 128 };

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

void causal_head_backward(float *d_x, const HeadGradient *d_head, float *d_q, float *d_k, float *d_v,
                          float *d_scores, const float *d_context, const float *weights, const float *softmax,
                          const float *q, const float *k, const float *v, const float *x, const Head *head,
                          int h, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, C = s->embed, HS = s->head_size, C_out = s->embed_out;

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int t0 = 0; t0 < T; t0 += BLOCK) {
            /* Rows t0 .. t1-1, which see keys 0 .. t1-1 */
            int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
            size_t row = (size_t)b * T + t0, first = lse_index(s, b, h, t0) * T;
            const float *k_b = k + (size_t)b * T * HS, *v_b = v + (size_t)b * T * HS;
            /* context = weights V: d_weights = d_context V^T */
            matmul('N', 'T', t1 - t0, t1, HS, 1, d_context + row * C_out, C_out, v_b, HS, 0,
                   d_scores + row * T, T);
            for (int t = 0; t < t1 - t0; t++)
                softmax_row_backward(d_scores + (row + t) * T, weights + first + (size_t)t * T,
                                     softmax + first + (size_t)t * T, t0 + t + 1, t1);
            /* scores = scale Q K^T: d_q = scale d_scores K */
            matmul('N', 'N', t1 - t0, HS, t1, s->scale, d_scores + row * T, T, k_b, HS, 0, d_q + row * HS,
                   HS);
        }

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int t0 = 0; t0 < T; t0 += BLOCK) {
            /* Keys t0 .. t1-1, which are seen by rows t0 .. T-1 */
            int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
            size_t row = (size_t)b * T + t0, first = lse_index(s, b, h, t0) * T;
            /* d_v = weights^T d_context, d_k = scale d_scores^T Q */
            matmul('T', 'N', t1 - t0, HS, T - t0, 1, weights + first + t0, T, d_context + row * C_out, C_out,
                   0, d_v + row * HS, HS);
            matmul('T', 'N', t1 - t0, HS, T - t0, s->scale, d_scores + row * T + t0, T, q + row * HS, HS, 0,
                   d_k + row * HS, HS);
        }

    /* x went to three matrices of every head, so its gradient is a sum */
    size_t rows = (size_t)B * T;
    linear_backward(d_x, h > 0, d_head->query_weight, NULL, d_q, HS, x, head->query_weight, rows, C, HS);
    linear_backward(d_x, 1, d_head->key_weight, NULL, d_k, HS, x, head->key_weight, rows, C, HS);
    linear_backward(d_x, 1, d_head->value_weight, NULL, d_v, HS, x, head->value_weight, rows, C, HS);
}

void stacked_heads_backward(float *d_x, const HeadGradient *d_heads, float *d_q, float *d_k, float *d_v,
                            float *d_scores, const float *d_out, const float *weights, const float *softmax,
                            const float *q, const float *k, const float *v, const float *x, const Head *heads,
                            const AttentionShape *s)
{
    size_t size = (size_t)s->batch * s->tokens * s->head_size;
    for (int h = 0; h < s->heads; h++)
        causal_head_backward(d_x, &d_heads[h], d_q, d_k, d_v, d_scores, d_out + (size_t)h * s->head_size,
                             weights, softmax, q + h * size, k + h * size, v + h * size, x, &heads[h], h, s);
}

void multihead_wrapper_backward(float *d_x, const HeadGradient *d_heads, float *d_out_weight,
                                float *d_out_bias, float *d_q, float *d_k, float *d_v, float *d_context,
                                float *d_scores, const float *d_out, const float *weights,
                                const float *softmax, const float *q, const float *k, const float *v,
                                const float *context, const float *x, const Head *heads,
                                const float *out_weight, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C_out = s->embed_out;
    linear_backward(d_context, 0, d_out_weight, d_out_bias, d_out, C_out, context, out_weight, rows, C_out,
                    C_out);
    stacked_heads_backward(d_x, d_heads, d_q, d_k, d_v, d_scores, d_context, weights, softmax, q, k, v, x,
                           heads, s);
}
