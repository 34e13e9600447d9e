/* Self-attention, from one token's three steps to a whole batch. Contracts: self_attention.h. */
#include "self_attention.h"

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>

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

/* ---- The same three steps as two matrix products: all scores are Q K^T, all mixing is weights V. ---- */

void attention_sdpa(float *out, float *lse, float *weights, const float *q, const float *k, const float *v,
                    const AttentionShape *s)
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

    if (s->dropout > 0)
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);

    /* out (B,NH,T,HS) = weights V */
    matmul_strided_batch('N', 'N', T, HS, TK, 1, weights, TK, weights_size, v, HS, key_size, 0, out, HS,
                         query_size, count);
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
    attention_sdpa(out, NULL, weights, queries, keys, values, s);
}

void self_attention_v2(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                       const float *w_query, const float *w_key, const float *w_value,
                       const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    linear(queries, x, w_query, NULL, rows, s->embed, s->embed_out);
    linear(keys, x, w_key, NULL, rows, s->embed, s->embed_out);
    linear(values, x, w_value, NULL, rows, s->embed, s->embed_out);
    attention_sdpa(out, NULL, weights, queries, keys, values, s);
}
