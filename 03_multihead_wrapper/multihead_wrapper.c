#include "multihead_wrapper.h"
#include "matmul.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>
#include <string.h>

/* Query rows worked on at a time. Row t sees keys 0 .. t: a block of rows is multiplied with the keys up to
 * its own last row and with no others, so that nearly half of the T x T scores are never computed. */
enum { BLOCK = 128 };

/* Softmax in place over the first n of a row's T scores; the rest, which the row may not see, become 0. */
static void softmax_row(float *row, int n, int T)
{
    float m = largest_of(row, n), l = 0;
#pragma omp simd reduction(+ : l)
    for (int t2 = 0; t2 < n; t2++) {
        row[t2] = fast_exp(row[t2] - m);
        l += row[t2];
    }
    for (int t2 = 0; t2 < n; t2++)
        row[t2] /= l;
    for (int t2 = n; t2 < T; t2++)
        row[t2] = 0;
}

void causal_head(float *context, float *weights, float *softmax, float *q, float *k, float *v, const float *x,
                 const Head *head, int h, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, C = s->embed, HS = s->head_size, C_out = s->embed_out;
    size_t head_weights = (size_t)T * T;
    size_t next_entry = s->heads * head_weights; /* from one batch entry's weights to the next one's */
    weights += h * head_weights;

    linear(q, x, head->query_weight, NULL, (size_t)B * T, C, HS);
    linear(k, x, head->key_weight, NULL, (size_t)B * T, C, HS);
    linear(v, x, head->value_weight, NULL, (size_t)B * T, C, HS);

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int t0 = 0; t0 < T; t0 += BLOCK) {
            int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
            const float *q_b = q + (size_t)b * T * HS, *k_b = k + (size_t)b * T * HS;
            float *weights_b = weights + b * next_entry;
            /* weights = softmax(scale Q K^T) */
            matmul('N', 'T', t1 - t0, t1, HS, s->scale, q_b + (size_t)t0 * HS, HS, k_b, HS, 0,
                   weights_b + (size_t)t0 * T, T);
            for (int t = t0; t < t1; t++)
                softmax_row(weights_b + (size_t)t * T, t + 1, T);
        }

    /* Dropout draws a number for every pair, the forbidden ones too, and in memory order: one thread, one
     * stream. The gradient needs the weights as they were before, too. */
    for (int b = 0; b < B && s->dropout > 0; b++) {
        float *weights_b = weights + b * next_entry;
        memcpy(softmax + h * head_weights + b * next_entry, weights_b, head_weights * sizeof *weights_b);
        apply_dropout(s->dropout_stream, weights_b, head_weights, s->dropout);
    }

#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int t0 = 0; t0 < T; t0 += BLOCK) {
            int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
            const float *v_b = v + (size_t)b * T * HS, *weights_b = weights + b * next_entry;
            /* context = weights V, straight to this head's columns */
            matmul('N', 'N', t1 - t0, HS, t1, 1, weights_b + (size_t)t0 * T, T, v_b, HS, 0,
                   context + ((size_t)b * T + t0) * C_out, C_out);
        }
}

void stacked_heads(float *out, float *weights, float *softmax, float *q, float *k, float *v, const float *x,
                   const Head *heads, const AttentionShape *s)
{
    size_t size = (size_t)s->batch * s->tokens * s->head_size;
    for (int h = 0; h < s->heads; h++)
        causal_head(out + (size_t)h * s->head_size, weights, softmax, q + h * size, k + h * size,
                    v + h * size, x, &heads[h], h, s);
}

void multihead_wrapper(float *out, float *weights, float *softmax, float *q, float *k, float *v,
                       float *context, const float *x, const Head *heads, const float *out_weight,
                       const float *out_bias, const AttentionShape *s)
{
    stacked_heads(context, weights, softmax, q, k, v, x, heads, s);
    linear(out, context, out_weight, out_bias, (size_t)s->batch * s->tokens, s->embed_out, s->embed_out);
}
