#include "packed_qkv.h"
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

void attend_heads(float *context, float *weights, float *softmax, const float *q, const float *k,
                  const float *v, int row_stride, const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size;
    int C_out = NH * HS;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t0 = 0; t0 < T; t0 += BLOCK) {
                int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
                const float *q_bh = q + (size_t)b * T * row_stride + h * HS;
                const float *k_bh = k + (size_t)b * T * row_stride + h * HS;
                float *weights_bh = weights + lse_index(s, b, h, 0) * T;
                /* weights = softmax(scale Q K^T) */
                matmul('N', 'T', t1 - t0, t1, HS, s->scale, q_bh + (size_t)t0 * row_stride, row_stride, k_bh,
                       row_stride, 0, weights_bh + (size_t)t0 * T, T);
                for (int t = t0; t < t1; t++)
                    softmax_row(weights_bh + (size_t)t * T, t + 1, T);
            }

    /* Dropout draws a number for every pair, the forbidden ones too, and in memory order: one thread, one
     * stream. The gradient needs the weights as they were before, too. */
    if (s->dropout > 0) {
        memcpy(softmax, weights, weights_count(s) * sizeof *weights);
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    }

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t0 = 0; t0 < T; t0 += BLOCK) {
                int t1 = t0 + BLOCK < T ? t0 + BLOCK : T;
                const float *weights_bh = weights + lse_index(s, b, h, 0) * T;
                const float *v_bh = v + (size_t)b * T * row_stride + h * HS;
                float *context_bh = context + (size_t)b * T * C_out + h * HS;
                /* context = weights V, straight to the head's columns: concatenation costs nothing */
                matmul('N', 'N', t1 - t0, HS, t1, 1, weights_bh + (size_t)t0 * T, T, v_bh, row_stride, 0,
                       context_bh + (size_t)t0 * C_out, C_out);
            }
}

void split_heads(float *out, float *weights, float *softmax, float *q, float *k, float *v, float *context,
                 const float *x, const float *query_weight, const float *key_weight,
                 const float *value_weight, const float *out_weight, const float *out_bias,
                 const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed, C_out = s->embed_out;

    linear(q, x, query_weight, NULL, rows, C, C_out);
    linear(k, x, key_weight, NULL, rows, C, C_out);
    linear(v, x, value_weight, NULL, rows, C, C_out);
    attend_heads(context, weights, softmax, q, k, v, C_out, s);
    linear(out, context, out_weight, out_bias, rows, C_out, C_out);
}

void packed_qkv(float *out, float *weights, float *softmax, float *qkv, float *context, const float *x,
                const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed, C_out = s->embed_out;

    linear(qkv, x, qkv_weight, NULL, rows, C, 3 * C_out);
    attend_heads(context, weights, softmax, qkv, qkv + C_out, qkv + 2 * C_out, 3 * C_out, s);
    linear(out, context, proj_weight, proj_bias, rows, C_out, C_out);
}

/* averaged (B,T,T) = the mean of weights (B,NH,T,T) over the heads. */
static void average_heads(float *averaged, const float *weights, const AttentionShape *s)
{
    int T = s->tokens, NH = s->heads;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            float *averaged_bt = averaged + ((size_t)b * T + t) * T;
            for (int t2 = 0; t2 < T; t2++)
                averaged_bt[t2] = 0;
            for (int h = 0; h < NH; h++) {
                const float *weights_bht = weights + lse_index(s, b, h, t) * T;
                for (int t2 = 0; t2 <= t; t2++)
                    averaged_bt[t2] += weights_bht[t2] / NH;
            }
        }
}

void torch_mha(float *out, float *averaged, float *weights, float *softmax, float *qkv, float *context,
               float *attended, const float *x, const float *in_proj_weight, const float *inner_weight,
               const float *proj_weight, const float *proj_bias, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed;

    linear(qkv, x, in_proj_weight, NULL, rows, C, 3 * C);
    attend_heads(context, weights, softmax, qkv, qkv + C, qkv + 2 * C, 3 * C, s);
    average_heads(averaged, weights, s);
    linear(attended, context, inner_weight, NULL, rows, C, C);
    linear(out, attended, proj_weight, proj_bias, rows, C, C);
}
