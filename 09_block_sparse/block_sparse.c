/* Two ways to attend under a mask, in plain C: over all pairs, and over the blocks worth visiting. The shapes
 * are in the header. */
#include "block_sparse.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* ---- The mask as a tensor: every score is computed, then most are thrown away. ---- */

enum { BLOCK_ROWS = 64 }; /* rows of the matrix to a task, as in chapter 6 */

size_t dense_mask_floats(const AttentionShape *s)
{
    return (size_t)(s->lengths ? s->batch : 1) * s->tokens * s->key_tokens;
}

/* Zeros where a pair may attend, -inf where it may not; one matrix for all heads. */
static void write_mask(float *mask, const AttentionShape *s)
{
    int masks = s->lengths ? s->batch : 1;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < masks; b++)
        for (int t = 0; t < s->tokens; t++) {
            float *row = mask + ((size_t)b * s->tokens + t) * s->key_tokens;
            for (int t2 = 0; t2 < s->key_tokens; t2++)
                row[t2] = attends(s, b, 0, t, t2) ? 0 : -INFINITY;
        }
}

/* Adds mask and bias to a row of scores and normalises it in place; returns its lse. */
static float softmax_row(float *row, const float *mask, const AttentionShape *s, int b, int h, int t)
{
    if (s->bias)
        for (int t2 = 0; t2 < s->key_tokens; t2++)
            row[t2] += bias_at(s, b, h, t, t2);
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        row[t2] += mask[t2];

    float m = largest_of(row, s->key_tokens), l = 0;
    if (m == -INFINITY)
        m = 0; /* nothing allowed: -inf - -inf would be NaN, and exp(-inf - 0) is 0 */
#pragma omp simd reduction(+ : l)
    for (int t2 = 0; t2 < s->key_tokens; t2++) {
        row[t2] = fast_exp(row[t2] - m);
        l += row[t2];
    }
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        row[t2] *= one_over_l;
    return m + logf(l); /* log 0 = -inf */
}

void attention_dense_mask(float *out, float *lse, float *weights, float *softmax, float *mask, const float *q,
                          const float *k, const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, blocks = (T - 1) / BLOCK_ROWS + 1;
    size_t mask_of_batch = s->lengths ? (size_t)T * TK : 0;
    write_mask(mask, s);

    /* weights = softmax(scale Q K^T + mask + bias), of all T x TK pairs */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int block = 0; block < blocks; block++) {
                int first = block * BLOCK_ROWS, past = smaller(first + BLOCK_ROWS, T);
                matmul('N', 'T', past - first, TK, HS, s->scale, q + query_row(s, b, h, first), HS,
                       k + key_row(s, b, h, 0), HS, 0, weights + lse_index(s, b, h, first) * TK, TK);
                for (int t = first; t < past; t++) {
                    size_t row = lse_index(s, b, h, t);
                    const float *mask_bt = mask + b * mask_of_batch + (size_t)t * TK;
                    lse[row] = softmax_row(weights + row * TK, mask_bt, s, b, h, t);
                }
            }

    if (s->dropout > 0) {
        memcpy(softmax, weights, weights_count(s) * sizeof *softmax);
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    }

    /* out = weights V: most of the products are with zero */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int block = 0; block < blocks; block++) {
                int first = block * BLOCK_ROWS, past = smaller(first + BLOCK_ROWS, T);
                matmul('N', 'N', past - first, HS, TK, 1, weights + lse_index(s, b, h, first) * TK, TK,
                       v + key_row(s, b, h, 0), HS, 0, out + query_row(s, b, h, first), HS);
            }
}

/* ---- The listed blocks: what is in no list is never loaded. ---- */

enum { STRIP = 64 }; /* keys that a row meets at a time: one maximum, one mending for all of them */

/* Query (b,h,t) on its way along the keys: m and l as in chapter 6, out (HS) not yet divided by l. */
typedef struct {
    int b, h, t;
    const float *q;
    float m, l, *out;
} Row;

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* NaN if either is: a maximum that forgets NaN would hide it. */
static float larger(float a, float b)
{
    return a > b || isnan(a) ? a : b;
}

/* The row meets up to STRIP keys first <= t2 < end. may_attend NULL: all of them are allowed. */
static void meet_keys(Row *row, MaskPredicate *may_attend, const float *k, const float *v,
                      const AttentionShape *s, int first, int end)
{
    int HS = s->head_size, b = row->b, h = row->h, t = row->t;
    float score[STRIP], m = row->m;

    for (int t2 = first; t2 < end; t2++) {
        float *score_t2 = &score[t2 - first];
        *score_t2 = -INFINITY;
        if (!may_attend || may_attend(s, b, h, t, t2))
            *score_t2 = s->scale * dot(row->q, k + key_row(s, b, h, t2), HS) + bias_at(s, b, h, t, t2);
        m = larger(m, *score_t2);
    }
    if (m == -INFINITY)
        return; /* nothing allowed yet, and -inf - -inf would be NaN */

    float mend = expf(row->m - m); /* 1 while the maximum stands, 0 the first time */
    row->m = m;
    row->l *= mend;
    for (int c = 0; c < HS; c++)
        row->out[c] *= mend;

    for (int t2 = first; t2 < end; t2++) {
        if (score[t2 - first] == -INFINITY)
            continue; /* forbidden: 0 times a value of NaN would be NaN */
        float p = fast_exp(score[t2 - first] - m);
        row->l += p;
        if (s->dropout > 0)
            p *= dropout_keeps(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) / (1 - s->dropout);
        const float *v_bht2 = v + key_row(s, b, h, t2);
        for (int c = 0; c < HS; c++)
            row->out[c] += p * v_bht2[c];
    }
}

void attention_block_sparse(float *out, float *lse, const float *q, const float *k, const float *v,
                            const BlockMask *mask, const AttentionShape *s)
{
    int HS = s->head_size, N = mask->block;

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t at = query_row(s, b, h, t);
                Row row = {.b = b, .h = h, .t = t, .q = q + at, .m = -INFINITY, .l = 0, .out = out + at};
                memset(row.out, 0, HS * sizeof *row.out);

                int listed;
                const ListedBlock *list = block_list(mask, b, h, t / N, &listed);
                for (int n = 0; n < listed; n++) {
                    int first = list[n].key_block * N, end = smaller(first + N, s->key_tokens);
                    MaskPredicate *may_attend = list[n].kind == BLOCK_PARTIAL ? mask->predicate : NULL;
                    for (int t2 = first; t2 < end; t2 += STRIP)
                        meet_keys(&row, may_attend, k, v, s, t2, smaller(t2 + STRIP, end));
                }

                for (int c = 0; c < HS; c++)
                    row.out[c] = row.l == 0 ? 0 : row.out[c] / row.l;
                lse[lse_index(s, b, h, t)] = row.m + logf(row.l);
            }
}
