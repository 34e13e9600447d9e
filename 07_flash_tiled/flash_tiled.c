/* Two ways to compute out = softmax(scale Q K^T + bias) V. The shapes are in the header. */
#include "flash_tiled.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

/* ---- With the matrix: chapter 6's three steps, each over all T x TK scores. ---- */

/* Masks and normalises one row of scores in place; returns its lse. Keys from keys_end() on weigh nothing. */
static float softmax_row(float *row, const AttentionShape *s, int b, int h, int t)
{
    int end = keys_end(s, b, t);
    bool end_says_all = s->mask.kind == MASK_NONE || s->mask.kind == MASK_CAUSAL;
    for (int t2 = 0; s->bias && t2 < end; t2++)
        row[t2] += bias_at(s, b, h, t, t2);
    for (int t2 = 0; !end_says_all && t2 < end; t2++)
        row[t2] = attends(s, b, h, t, t2) ? row[t2] : -INFINITY;

    float m = largest_of(row, end), l = 0;
    float subtract = m == -INFINITY ? 0 : m; /* nothing allowed: -inf - -inf would be NaN */
#pragma omp simd reduction(+ : l)
    for (int t2 = 0; t2 < end; t2++) {
        row[t2] = fast_exp(row[t2] - subtract);
        l += row[t2];
    }
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        row[t2] = t2 < end ? row[t2] * one_over_l : 0;
    return m + logf(l);
}

void attention_materialised(float *out, float *lse, float *weights, float *softmax, const float *q,
                            const float *k, const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK;

    /* 1. scores = scale Q K^T */
    matmul_strided_batch('N', 'T', T, TK, HS, s->scale, q, HS, q_head, k, HS, k_head, 0, weights, TK,
                         weights_head, heads);

    /* 2. weights = softmax(scores + bias) */
#pragma omp parallel for collapse(3)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < T; t++) {
                size_t row = lse_index(s, b, h, t);
                lse[row] = softmax_row(weights + row * TK, s, b, h, t);
            }
    if (s->dropout > 0) {
        memcpy(softmax, weights, weights_count(s) * sizeof *softmax);
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    }

    /* 3. out = weights V */
    matmul_strided_batch('N', 'N', T, HS, TK, 1, weights, TK, weights_head, v, HS, k_head, 0, out, HS, q_head,
                         heads);
}

/* ---- In tiles: Br rows walk along the keys together, Bc keys at a time. ---- */

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* out += p * value */
static void add_scaled(float *restrict out, float p, const float *restrict value, int n)
{
    for (int i = 0; i < n; i++)
        out[i] += p * value[i];
}

static void scale(float *row, float factor, int n)
{
    for (int i = 0; i < n; i++)
        row[i] *= factor;
}

/* Row (b,h,t) meets the keys from <= t2 < to. scores has room for them. */
static void meet_keys(float *out, float *m, float *l, float *scores, const float *q, const float *k,
                      const float *v, const AttentionShape *s, int b, int h, int t, int from, int to)
{
    int HS = s->head_size;
    size_t row = lse_index(s, b, h, t);
    const float *q_bht = q + query_row(s, b, h, t), *k_bh = k + key_row(s, b, h, 0),
                *v_bh = v + key_row(s, b, h, 0);
    float *out_bht = out + query_row(s, b, h, t);

    /* The scores of this row of the tile, and the largest. */
    float m_new = m[row];
    for (int t2 = from; t2 < to; t2++) {
        float score = -INFINITY;
        if (attends(s, b, h, t, t2))
            score = s->scale * dot(q_bht, k_bh + (size_t)t2 * HS, HS) + bias_at(s, b, h, t, t2);
        scores[t2 - from] = score;
        m_new = score <= m_new || isnan(m_new) ? m_new : score; /* NaN wins, and stays */
    }
    if (m_new == -INFINITY)
        return; /* nothing allowed yet, and -inf - -inf would be NaN */

    /* What came before was measured from m; one factor a tile, not one a key, measures it from m_new. */
    float mend = expf(m[row] - m_new);
    scale(out_bht, mend, HS);
    float sum = mend * l[row];

    for (int t2 = from; t2 < to; t2++) {
        if (scores[t2 - from] == -INFINITY)
            continue;
        float p = fast_exp(scores[t2 - from] - m_new);
        sum += p;
        /* Dropout zeroes weights after the softmax: the sum counts every key. */
        if (s->dropout > 0)
            p *= dropout_keeps(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
        add_scaled(out_bht, p, v_bh + (size_t)t2 * HS, HS);
    }
    m[row] = m_new;
    l[row] = sum;
}

size_t tile_scores(const AttentionShape *s)
{
    size_t Br = smaller(s->tile_rows, s->tokens), Bc = smaller(s->tile_columns, s->key_tokens);
    return (size_t)s->batch * s->heads * ((s->tokens + Br - 1) / Br) * Bc;
}

void attention_tiled(float *out, float *lse, float *m, float *l, float *scores, const float *q,
                     const float *k, const float *v, const AttentionShape *s)
{
    int Br = smaller(s->tile_rows, s->tokens), Bc = smaller(s->tile_columns, s->key_tokens);
    int row_tiles = (s->tokens + Br - 1) / Br;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int i = 0; i < row_tiles; i++) {
                int first = i * Br, past = smaller(first + Br, s->tokens);
                float *tile_row = scores + (((size_t)b * s->heads + h) * row_tiles + i) * Bc;

                for (int t = first; t < past; t++) {
                    m[lse_index(s, b, h, t)] = -INFINITY;
                    l[lse_index(s, b, h, t)] = 0;
                    memset(out + query_row(s, b, h, t), 0, s->head_size * sizeof *out);
                }

                /* No row of the tile sees further than its last: with a causal mask half of the tiles are
                 * never touched. A tile of k and v stays in the cache while Br rows walk over it. */
                int end = keys_end(s, b, past - 1);
                for (int from = 0; from < end; from += Bc)
                    for (int t = first; t < past; t++)
                        meet_keys(out, m, l, tile_row, q, k, v, s, b, h, t, from, smaller(from + Bc, end));

                for (int t = first; t < past; t++) {
                    size_t row = lse_index(s, b, h, t);
                    scale(out + query_row(s, b, h, t), l[row] == 0 ? 0 : 1 / l[row], s->head_size);
                    lse[row] = m[row] + logf(l[row]);
                }
            }
}
