/* Causal attention: two ways to hide the future, and dropout. Contracts: causal_attention.h. */
#include "causal_attention.h"

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>
#include <string.h>

/* ---- A row at a time. ---- */

void softmax_row(float *row, int n)
{
    float largest = -INFINITY;
    for (int i = 0; i < n; i++)
        largest = row[i] > largest ? row[i] : largest;
    if (largest == -INFINITY)
        largest = 0; /* nothing to attend to: every exp(-inf) below is 0 */

    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        row[i] = fast_exp(row[i] - largest);
        sum += row[i];
    }

    float share = sum == 0 ? 0 : 1 / sum;
    for (int i = 0; i < n; i++)
        row[i] *= share;
}

/* The softmax divided e^s_i by Z, the sum over all keys. Divided again by the sum of what is left it is
 * e^s_i / Z / (sum of e^s_j / Z): Z cancels, and the future with it. */
void renormalise_row(float *row, int n, int allowed)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < allowed; i++)
        sum += row[i];
    for (int i = 0; i < allowed; i++)
        row[i] /= sum;
    for (int i = allowed; i < n; i++)
        row[i] = 0;
}

/* e^-inf = 0: the future never enters the sum. */
void mask_row(float *row, int n, int allowed)
{
    for (int i = allowed; i < n; i++)
        row[i] = -INFINITY;
}

/* ---- What the three kernels share, as chapter 1 had it. ---- */

static void project(float *queries, float *keys, float *values, const float *x, const float *w_query,
                    const float *w_key, const float *w_value, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    linear(queries, x, w_query, NULL, rows, s->embed, s->embed_out);
    linear(keys, x, w_key, NULL, rows, s->embed, s->embed_out);
    linear(values, x, w_value, NULL, rows, s->embed, s->embed_out);
}

/* scores (B,T,T) = scale * Q K^T */
static void score(float *scores, const float *queries, const float *keys, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    matmul_strided_batch('N', 'T', T, T, C_out, s->scale, queries, C_out, rows, keys, C_out, rows, 0, scores,
                         T, square, s->batch);
}

/* out (B,T,C_out) = weights V */
static void mix(float *out, const float *weights, const float *values, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    matmul_strided_batch('N', 'N', T, C_out, T, 1, weights, T, square, values, C_out, rows, 0, out, C_out,
                         rows, s->batch);
}

/* ---- Mask after the softmax. ---- */

void attention_renormalise(float *out, float *weights, float *queries, float *keys, float *values,
                           const float *x, const float *w_query, const float *w_key, const float *w_value,
                           const AttentionShape *s)
{
    int T = s->tokens;
    project(queries, keys, values, x, w_query, w_key, w_value, s);
    score(weights, queries, keys, s);

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            float *weights_bt = weights + ((size_t)b * T + t) * T;
            softmax_row(weights_bt, T);
            renormalise_row(weights_bt, T, t + 1);
        }

    mix(out, weights, values, s);
}

/* ---- Mask before the softmax. ---- */

void attention_minus_inf(float *out, float *weights, float *queries, float *keys, float *values,
                         const float *x, const float *w_query, const float *w_key, const float *w_value,
                         const AttentionShape *s)
{
    int T = s->tokens;
    project(queries, keys, values, x, w_query, w_key, w_value, s);
    score(weights, queries, keys, s);

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            float *weights_bt = weights + ((size_t)b * T + t) * T;
            mask_row(weights_bt, T, t + 1);
            softmax_row(weights_bt, T);
        }

    mix(out, weights, values, s);
}

/* ---- The same, with dropout: the module of the notebook. ---- */

void causal_attention(float *out, float *weights, float *softmax, float *queries, float *keys, float *values,
                      const float *x, const float *w_query, const float *w_key, const float *w_value,
                      const AttentionShape *s)
{
    int T = s->tokens;
    project(queries, keys, values, x, w_query, w_key, w_value, s);
    score(weights, queries, keys, s);

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            float *weights_bt = weights + ((size_t)b * T + t) * T;
            mask_row(weights_bt, T, t + 1);
            softmax_row(weights_bt, T);
        }

    if (s->dropout > 0) {
        memcpy(softmax, weights, (size_t)s->batch * T * T * sizeof *weights);
        apply_dropout(s->dropout_stream, weights, (size_t)s->batch * T * T, s->dropout);
    }

    mix(out, weights, values, s);
}

/* ---- Backward, a row at a time. ---- */

void dropout_row_backward(float *row, const float *weights, int n, float p)
{
    float scale = 1 / (1 - p);
    for (int i = 0; i < n; i++)
        row[i] *= weights[i] == 0 ? 0 : scale;
}

void softmax_row_backward(float *row, const float *weights, int n)
{
    float delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int i = 0; i < n; i++)
        delta += weights[i] * row[i];
    for (int i = 0; i < n; i++)
        row[i] = weights[i] * (row[i] - delta);
}

/* ---- And for all rows: the steps of forward, last one first. ---- */

/* out = weights V:  dvalues (B,T,C_out) = weights^T dout,  dweights (B,T,T) = dout V^T */
static void mix_backward(float *dvalues, float *dweights, const float *dout, const float *weights,
                         const float *values, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    matmul_strided_batch('T', 'N', T, C_out, T, 1, weights, T, square, dout, C_out, rows, 0, dvalues, C_out,
                         rows, s->batch);
    matmul_strided_batch('N', 'T', T, T, C_out, 1, dout, C_out, rows, values, C_out, rows, 0, dweights, T,
                         square, s->batch);
}

/* scores = scale * Q K^T:  dqueries = scale * dscores K,  dkeys = scale * dscores^T Q, both (B,T,C_out) */
static void score_backward(float *dqueries, float *dkeys, const float *dscores, const float *queries,
                           const float *keys, const AttentionShape *s)
{
    int T = s->tokens, C_out = s->embed_out;
    size_t rows = (size_t)T * C_out, square = (size_t)T * T;
    matmul_strided_batch('N', 'N', T, C_out, T, s->scale, dscores, T, square, keys, C_out, rows, 0, dqueries,
                         C_out, rows, s->batch);
    matmul_strided_batch('T', 'N', T, C_out, T, s->scale, dscores, T, square, queries, C_out, rows, 0, dkeys,
                         C_out, rows, s->batch);
}

void causal_attention_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                               float *dkeys, float *dvalues, float *dscores, const float *dout,
                               const float *weights, const float *softmax, const float *queries,
                               const float *keys, const float *values, const float *x, const float *w_query,
                               const float *w_key, const float *w_value, const AttentionShape *s)
{
    int T = s->tokens;
    mix_backward(dvalues, dscores, dout, weights, values, s);

    /* Until here dscores holds the gradient of the weights. Row by row it becomes that of the scores. */
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            size_t row = ((size_t)b * T + t) * T;
            if (s->dropout > 0)
                dropout_row_backward(dscores + row, weights + row, T, s->dropout);
            softmax_row_backward(dscores + row, (s->dropout > 0 ? softmax : weights) + row, T);
        }

    score_backward(dqueries, dkeys, dscores, queries, keys, s);
    size_t rows = (size_t)s->batch * T;
    int C = s->embed, C_out = s->embed_out;
    linear_backward(dx, 0, dw_query, NULL, dqueries, C_out, x, w_query, rows, C, C_out);
    linear_backward(dx, 1, dw_key, NULL, dkeys, C_out, x, w_key, rows, C, C_out);
    linear_backward(dx, 1, dw_value, NULL, dvalues, C_out, x, w_value, rows, C, C_out);
}
