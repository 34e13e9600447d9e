/* Two ways to compute out = softmax(scale Q K^T + bias) V. The shapes are in the header. */
#include "online_softmax.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

/* ---- With the matrix: three steps, each over all T x TK scores. ---- */

/* Rows of the matrix to a task: few enough to stay in a cache, enough for a fast product. */
enum { BLOCK_ROWS = 128 };

/* Softmax over row[0 .. n), in place; returns log(sum(exp(row))). Subtracting the largest score changes
 * nothing, as it cancels, but keeps every exp() at 1 or below. */
static float softmax_of(float *row, int n)
{
    float m = largest_of(row, n);
    if (m == -INFINITY)
        m = 0; /* nothing is allowed: -inf - -inf would be NaN, and exp(-inf - 0) is 0 */

    float l = 0;
#pragma omp simd reduction(+ : l)
    for (int i = 0; i < n; i++) {
        row[i] = fast_exp(row[i] - m);
        l += row[i];
    }

    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int i = 0; i < n; i++)
        row[i] *= one_over_l;
    return m + logf(l); /* log 0 = -inf */
}

/* What masks and bias do to the scores of one row, then softmax. Keys from keys_end() on weigh nothing. */
static float softmax_of_allowed(float *row, const AttentionShape *s, int b, int h, int t)
{
    int end = keys_end(s, b, t);
    bool end_says_all = s->mask.kind == MASK_NONE || s->mask.kind == MASK_CAUSAL;
    if (s->bias)
        for (int t2 = 0; t2 < end; t2++)
            row[t2] += bias_at(s, b, h, t, t2);
    if (!end_says_all)
        for (int t2 = 0; t2 < end; t2++)
            row[t2] = attends(s, b, h, t, t2) ? row[t2] : -INFINITY;
    for (int t2 = end; t2 < s->key_tokens; t2++)
        row[t2] = 0;
    return softmax_of(row, end);
}

void attention_materialised(float *out, float *lse, float *weights, float *softmax, const float *q,
                            const float *k, const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size;
    int blocks = (T + BLOCK_ROWS - 1) / BLOCK_ROWS;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int block = 0; block < blocks; block++) {
                int first = block * BLOCK_ROWS, past = first + BLOCK_ROWS < T ? first + BLOCK_ROWS : T;
                int end = keys_end(s, b, past - 1); /* no row of the block sees further than its last */
                float *scores = weights + lse_index(s, b, h, first) * TK;

                /* 1. scores = scale Q K^T */
                matmul('N', 'T', past - first, end, HS, s->scale, q + query_row(s, b, h, first), HS,
                       k + key_row(s, b, h, 0), HS, 0, scores, TK);
                /* 2. weights = softmax(scores + bias) */
                for (int t = first; t < past; t++)
                    lse[lse_index(s, b, h, t)] =
                        softmax_of_allowed(weights + lse_index(s, b, h, t) * TK, s, b, h, t);
            }

    if (s->dropout > 0) {
        memcpy(softmax, weights, weights_count(s) * sizeof *softmax); /* for the backward pass */
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    }

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int block = 0; block < blocks; block++) {
                int first = block * BLOCK_ROWS, past = first + BLOCK_ROWS < T ? first + BLOCK_ROWS : T;
                int end = keys_end(s, b, past - 1);

                /* 3. out = weights V */
                matmul('N', 'N', past - first, HS, end, 1, weights + lse_index(s, b, h, first) * TK, TK,
                       v + key_row(s, b, h, 0), HS, 0, out + query_row(s, b, h, first), HS);
            }
}

/* ---- Without it: a row keeps m, l and o, and mends them when a larger score comes. ---- */

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* o = mend * o + p * value */
static void scale_add(float *restrict o, float mend, float p, const float *restrict value, int n)
{
    for (int i = 0; i < n; i++)
        o[i] = mend * o[i] + p * value[i];
}

/* A sum of exp(score - m_old), times this, is the sum of exp(score - m_new). It is 1 while the maximum
 * stands, also before the first score, where -inf - -inf would be NaN; at the first score it is exp(-inf) =
 * 0. */
static float mend(float m_old, float m_new)
{
    return m_old == m_new ? 1 : expf(m_old - m_new);
}

PartialRow empty_row(float *o, int head_size)
{
    for (int i = 0; i < head_size; i++)
        o[i] = 0;
    return (PartialRow){.m = -INFINITY, .l = 0, .o = o};
}

/* Milakov and Gimelshein 2018, algorithm 3, with the values summed along. */
void add_keys(PartialRow *row, const float *q, const float *k, const float *v, const AttentionShape *s, int b,
              int h, int t, int from, int to)
{
    const float *q_bht = q + query_row(s, b, h, t);
    float m = row->m, l = row->l;

    for (int t2 = from; t2 < to; t2++) {
        if (!attends(s, b, h, t, t2))
            continue;
        float score = s->scale * dot(q_bht, k + key_row(s, b, h, t2), s->head_size) + bias_at(s, b, h, t, t2);
        if (score == -INFINITY) /* forbidden by the bias */
            continue;

        float m_new = fmaxf(m, score);
        float p = expf(score - m_new);
        float mend_old = mend(m, m_new);
        l = mend_old * l + p;
        m = m_new;

        /* Dropout zeroes weights after the softmax: l, which is the softmax's, counts every key. */
        if (s->dropout > 0)
            p *= dropout_keeps(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) / (1 - s->dropout);
        scale_add(row->o, mend_old, p, v + key_row(s, b, h, t2), s->head_size);
    }
    row->m = m;
    row->l = l;
}

/* Two sums over different keys become one once both are measured from the same maximum. */
void merge_partials(PartialRow *into, const PartialRow *other, int head_size)
{
    float m = fmaxf(into->m, other->m);
    float mend_into = mend(into->m, m), mend_other = mend(other->m, m);
    into->l = mend_into * into->l + mend_other * other->l;
    scale_add(into->o, mend_into, mend_other, other->o, head_size);
    into->m = m;
}

float finish_row(PartialRow *row, int head_size)
{
    float one_over_l = row->l == 0 ? 0 : 1 / row->l;
    for (int i = 0; i < head_size; i++)
        row->o[i] *= one_over_l;
    return row->m + logf(row->l);
}

void attention_online(float *out, float *lse, const float *q, const float *k, const float *v,
                      const AttentionShape *s)
{
#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                PartialRow row = empty_row(out + query_row(s, b, h, t), s->head_size);
                add_keys(&row, q, k, v, s, b, h, t, 0, keys_end(s, b, t));
                lse[lse_index(s, b, h, t)] = finish_row(&row, s->head_size);
            }
}
