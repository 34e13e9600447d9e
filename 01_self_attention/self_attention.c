/* Self-attention, from one token's three steps to a whole batch. Contracts: self_attention.h. */
#include "self_attention.h"

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>
#include <string.h>

/* ---- One token, in three steps. ----
 *
 * `omp simd reduction` allows the compiler to keep several partial sums, one for each lane of a vector, and
 * to add them up at the end. Without that leave C has it add one number after another. */

/* 1. How well does each key match the query? A dot product is large where two vectors point the same way. */
void score_keys(float *scores, const float *query, const float *keys, int n, int width, float scale)
{
    for (int i = 0; i < n; i++) {
        const float *key = keys + (size_t)i * width;
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int c = 0; c < width; c++)
            score += query[c] * key[c];
        scores[i] = scale * score;
    }
}

/* 2. Scores become weights: positive, and 1 in all. Subtracting the largest score changes no weight, for
 * e^(a - m) / e^(b - m) = e^a / e^b, and keeps every exponent at or below 0, where exp cannot overflow. */
float softmax_row(float *row, int n)
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
    return largest + logf(sum);
}

/* 3. The token's new content: a mean of all values, each counted as much as its key matched. */
void mix_values(float *out, const float *weights, const float *values, int n, int width)
{
    for (int c = 0; c < width; c++)
        out[c] = 0;
    for (int i = 0; i < n; i++)
        for (int c = 0; c < width; c++)
            out[c] += weights[i] * values[(size_t)i * width + c];
}

/* Backward through 2. A weight gains where its gradient is above the weighted mean of all, delta, and loses
 * where it is below: they share one whole. */
void softmax_row_backward(float *row, const float *weights, int n)
{
    float delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int i = 0; i < n; i++)
        delta += weights[i] * row[i];
    for (int i = 0; i < n; i++)
        row[i] = weights[i] * (row[i] - delta);
}

/* ---- All tokens, nothing to learn: the three steps for each token of each batch entry. ---- */

void attention_dot_product(float *out, float *weights, const float *x, const AttentionShape *s)
{
    int T = s->tokens, C = s->embed;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            size_t bt = (size_t)b * T + t;
            const float *x_b = x + (size_t)b * T * C;
            const float *query = x + bt * C;
            float *weights_bt = weights + bt * T;

            score_keys(weights_bt, query, x_b, T, C, s->scale);
            softmax_row(weights_bt, T);
            mix_values(out + bt * C, weights_bt, x_b, T, C);
        }
}

void attention_dot_product_backward(float *dx, float *dscores, const float *dout, const float *weights,
                                    const float *x, const AttentionShape *s)
{
    int T = s->tokens, C = s->embed;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            size_t bt = (size_t)b * T + t;
            float *dscores_bt = dscores + bt * T;
            score_keys(dscores_bt, dout + bt * C, x + (size_t)b * T * C, T, C, 1);
            softmax_row_backward(dscores_bt, weights + bt * T, T);
        }

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++) {
            size_t bt = (size_t)b * T + t;
            float *dx_bt = dx + bt * C;
            for (int c = 0; c < C; c++)
                dx_bt[c] = 0;
            for (int t2 = 0; t2 < T; t2++) {
                /* In score (t, t2) token t is the query; in (t2, t) it is the key, and then the value. */
                size_t bt2 = (size_t)b * T + t2;
                float as_query = s->scale * dscores[bt * T + t2];
                float as_key = s->scale * dscores[bt2 * T + t];
                float as_value = weights[bt2 * T + t];
                for (int c = 0; c < C; c++)
                    dx_bt[c] += (as_query + as_key) * x[bt2 * C + c] + as_value * dout[bt2 * C + c];
            }
        }
}

/* ---- The same three steps as two matrix products: all scores are Q K^T, all mixing is weights V. ---- */

void attention_sdpa(float *out, float *lse, float *weights, float *softmax, const float *q, const float *k,
                    const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, count = s->batch * s->heads;
    size_t query_size = (size_t)T * HS, key_size = (size_t)TK * HS, weights_size = (size_t)T * TK;

    /* scores (B,NH,T,TK) = scale * Q K^T, kept where the weights will be */
    matmul_strided_batch('N', 'T', T, TK, HS, s->scale, q, HS, query_size, k, HS, key_size, 0, weights, TK,
                         weights_size, count);

#pragma omp parallel for collapse(3)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < T; t++) {
                size_t bht = lse_index(s, b, h, t);
                float *weights_bht = weights + bht * TK;
                if (s->bias || !attends_to_all(s))
                    for (int t2 = 0; t2 < TK; t2++)
                        weights_bht[t2] =
                            attends(s, b, h, t, t2) ? weights_bht[t2] + bias_at(s, b, h, t, t2) : -INFINITY;
                float lse_bht = softmax_row(weights_bht, TK);
                if (lse)
                    lse[bht] = lse_bht;
            }

    if (s->dropout > 0) {
        if (softmax)
            memcpy(softmax, weights, weights_count(s) * sizeof *weights);
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    }

    /* out (B,NH,T,HS) = weights V */
    matmul_strided_batch('N', 'N', T, HS, TK, 1, weights, TK, weights_size, v, HS, key_size, 0, out, HS,
                         query_size, count);
}

/* ---- Its gradient: the same steps, last one first. ---- */

/* What dropout did to a weight it does to the weight's gradient. One that is 0 was dropped, or was 0 before
 * and passes nothing on. */
static void dropout_row_backward(float *row, const float *weights, int n, float p)
{
    float scale = 1 / (1 - p);
    for (int i = 0; i < n; i++)
        row[i] *= weights[i] == 0 ? 0 : scale;
}

/* The bias is added to the scores, so its gradient is theirs. An element that was broadcast along an axis
 * (stride 0) stood in many places, and is given the sum. */
static void bias_backward(float *dbias, const float *dscores, const AttentionShape *s)
{
    const size_t *stride = s->bias_stride;
    const int size[3] = {s->batch, s->heads, s->tokens};
    int own[3], shared[3]; /* along each axis: elements of the bias, and how many places share one */
    for (int axis = 0; axis < 3; axis++) {
        own[axis] = stride[axis] ? size[axis] : 1;
        shared[axis] = stride[axis] ? 1 : size[axis];
    }
#pragma omp parallel for collapse(3)
    for (int b = 0; b < own[0]; b++)
        for (int h = 0; h < own[1]; h++)
            for (int t = 0; t < own[2]; t++) {
                float *dbias_bht = dbias + b * stride[0] + h * stride[1] + t * stride[2];
                for (int t2 = 0; t2 < s->key_tokens; t2++)
                    dbias_bht[t2 * stride[3]] = 0;
                for (int b2 = b; b2 < b + shared[0]; b2++)
                    for (int h2 = h; h2 < h + shared[1]; h2++)
                        for (int row = t; row < t + shared[2]; row++)
                            for (int t2 = 0; t2 < s->key_tokens; t2++)
                                dbias_bht[t2 * stride[3]] +=
                                    dscores[lse_index(s, b2, h2, row) * s->key_tokens + t2];
            }
}

void attention_sdpa_backward(float *dq, float *dk, float *dv, float *dbias, float *dscores, const float *dout,
                             const float *weights, const float *softmax, const float *q, const float *k,
                             const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, count = s->batch * s->heads;
    size_t query_size = (size_t)T * HS, key_size = (size_t)TK * HS, weights_size = (size_t)T * TK;

    /* out = weights V:  dv (B,NH,TK,HS) = weights^T dout,  dweights (B,NH,T,TK) = dout V^T */
    matmul_strided_batch('T', 'N', TK, HS, T, 1, weights, TK, weights_size, dout, HS, query_size, 0, dv, HS,
                         key_size, count);
    matmul_strided_batch('N', 'T', T, TK, HS, 1, dout, HS, query_size, v, HS, key_size, 0, dscores, TK,
                         weights_size, count);

    /* From the gradient of the weights to that of the scores, in place. The mask needs no step: a forbidden
     * pair has weight 0, and so has its score's gradient. */
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++) {
        float *dscores_bht = dscores + row * TK;
        if (s->dropout > 0)
            dropout_row_backward(dscores_bht, weights + row * TK, TK, s->dropout);
        softmax_row_backward(dscores_bht, (s->dropout > 0 ? softmax : weights) + row * TK, TK);
    }

    if (dbias)
        bias_backward(dbias, dscores, s);

    /* scores = scale * Q K^T:  dq (B,NH,T,HS) = scale * dscores K,  dk (B,NH,TK,HS) = scale * dscores^T Q */
    matmul_strided_batch('N', 'N', T, HS, TK, s->scale, dscores, TK, weights_size, k, HS, key_size, 0, dq, HS,
                         query_size, count);
    matmul_strided_batch('T', 'N', TK, HS, T, s->scale, dscores, TK, weights_size, q, HS, query_size, 0, dk,
                         HS, key_size, count);
}

/* ---- Something to learn: what a token asks for, what it answers to, and what it hands over. ----
 *
 * With one head (B,T,C_out) and (B,1,T,HS) are the same numbers in the same places, so what follows the three
 * projections is attention_sdpa() as it stands. */

/* out (B,T,C_out) = x (B,T,C) W, with W (C,C_out) */
static void multiply_right(float *out, const float *x, const float *w, const AttentionShape *s)
{
    int T = s->tokens, C = s->embed, C_out = s->embed_out;
    for (int b = 0; b < s->batch; b++)
        matmul('N', 'N', T, C_out, C, 1, x + (size_t)b * T * C, C, w, C_out, 0, out + (size_t)b * T * C_out,
               C_out);
}

void self_attention_v1(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                       const float *w_query, const float *w_key, const float *w_value,
                       const AttentionShape *s)
{
    multiply_right(queries, x, w_query, s);
    multiply_right(keys, x, w_key, s);
    multiply_right(values, x, w_value, s);
    attention_sdpa(out, NULL, weights, NULL, queries, keys, values, s);
}

void self_attention_v2(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                       const float *w_query, const float *w_key, const float *w_value,
                       const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    linear(queries, x, w_query, NULL, rows, s->embed, s->embed_out);
    linear(keys, x, w_key, NULL, rows, s->embed, s->embed_out);
    linear(values, x, w_value, NULL, rows, s->embed, s->embed_out);
    attention_sdpa(out, NULL, weights, NULL, queries, keys, values, s);
}

/* ---- Backward: through attention, then through the projections. x has a part in all three, and its gradient
 * is the sum of theirs: the first writes dx, the others add (beta 0 or 1). ---- */

/* out = x W:  dw (C,C_out) = x^T dout, summed over the batch;  dx (B,T,C) = dout W^T + beta * dx */
static void multiply_right_backward(float *dw, float *dx, float beta, const float *dout, const float *x,
                                    const float *w, const AttentionShape *s)
{
    int T = s->tokens, C = s->embed, C_out = s->embed_out;
    size_t x_size = (size_t)T * C, out_size = (size_t)T * C_out;
    for (int b = 0; b < s->batch; b++)
        matmul('T', 'N', C, C_out, T, 1, x + b * x_size, C, dout + b * out_size, C_out, b > 0, dw, C_out);
    matmul_strided_batch('N', 'T', T, C, C_out, 1, dout, C_out, out_size, w, C_out, 0, beta, dx, C, x_size,
                         s->batch);
}

void self_attention_v1_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                                float *dkeys, float *dvalues, float *dscores, const float *dout,
                                const float *weights, const float *queries, const float *keys,
                                const float *values, const float *x, const float *w_query, const float *w_key,
                                const float *w_value, const AttentionShape *s)
{
    attention_sdpa_backward(dqueries, dkeys, dvalues, NULL, dscores, dout, weights, NULL, queries, keys,
                            values, s);
    multiply_right_backward(dw_query, dx, 0, dqueries, x, w_query, s);
    multiply_right_backward(dw_key, dx, 1, dkeys, x, w_key, s);
    multiply_right_backward(dw_value, dx, 1, dvalues, x, w_value, s);
}

void self_attention_v2_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                                float *dkeys, float *dvalues, float *dscores, const float *dout,
                                const float *weights, const float *queries, const float *keys,
                                const float *values, const float *x, const float *w_query, const float *w_key,
                                const float *w_value, const AttentionShape *s)
{
    attention_sdpa_backward(dqueries, dkeys, dvalues, NULL, dscores, dout, weights, NULL, queries, keys,
                            values, s);
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed, C_out = s->embed_out;
    linear_backward(dx, 0, dw_query, NULL, dqueries, C_out, x, w_query, rows, C, C_out);
    linear_backward(dx, 1, dw_key, NULL, dkeys, C_out, x, w_key, rows, C, C_out);
    linear_backward(dx, 1, dw_value, NULL, dvalues, C_out, x, w_value, rows, C, C_out);
}
