/* Two ways to attend under a mask, in plain C: over all pairs, and over the blocks worth visiting. The shapes
 * are in the header. */
#include "block_sparse.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

/* ---- The mask as a tensor: every score is computed, then most are thrown away. ---- */

size_t dense_mask_floats(const AttentionShape *s)
{
    return (size_t)(s->lengths ? s->batch : 1) * s->tokens * s->key_tokens;
}

/* Adds mask and bias to a row of scores and normalises it in place; returns its lse. */
static float softmax_row(float *row, const float *mask, const AttentionShape *s, int b, int h, int t)
{
    float m = -INFINITY, l = 0;
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        row[t2] += mask[t2];
    if (s->bias)
        for (int t2 = 0; t2 < s->key_tokens; t2++)
            row[t2] += bias_at(s, b, h, t, t2);
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        m = row[t2] > m ? row[t2] : m;
    float subtract = m == -INFINITY ? 0 : m; /* nothing allowed: -inf - -inf would be NaN */
#pragma omp simd reduction(+ : l)
    for (int t2 = 0; t2 < s->key_tokens; t2++) {
        row[t2] = fast_exp(row[t2] - subtract);
        l += row[t2];
    }
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = 0; t2 < s->key_tokens; t2++)
        row[t2] *= one_over_l;
    return m + logf(l);
}

void attention_dense_mask(float *out, float *lse, float *weights, float *mask, const float *q, const float *k,
                          const float *v, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size;
    int masks = s->lengths ? s->batch : 1;

    /* The mask, written out once: zeros where a pair may attend, -inf where it may not. */
#pragma omp parallel for collapse(2)
    for (int b = 0; b < masks; b++)
        for (int t = 0; t < T; t++)
            for (int t2 = 0; t2 < TK; t2++)
                mask[((size_t)b * T + t) * TK + t2] = attends(s, b, 0, t, t2) ? 0 : -INFINITY;

                /* scores = scale Q K^T, all of them; then the softmax */
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++) {
            float *weights_bh = weights + lse_index(s, b, h, 0) * TK;
            const float *mask_b = mask + (masks > 1 ? (size_t)b * T * TK : 0);
            matmul('N', 'T', T, TK, HS, s->scale, q + query_row(s, b, h, 0), HS, k + key_row(s, b, h, 0), HS,
                   0, weights_bh, TK);
            for (int t = 0; t < T; t++)
                lse[lse_index(s, b, h, t)] =
                    softmax_row(weights_bh + (size_t)t * TK, mask_b + (size_t)t * TK, s, b, h, t);
        }
    if (s->dropout > 0)
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);

        /* out = weights V: most of the products are with zero */
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            matmul('N', 'N', T, HS, TK, 1, weights + lse_index(s, b, h, 0) * TK, TK, v + key_row(s, b, h, 0),
                   HS, 0, out + query_row(s, b, h, 0), HS);
}

/* ---- Over the listed blocks: what is empty is never seen, what is full is never asked about. ---- */

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

void attention_block_sparse(float *out, float *lse, const float *q, const float *k, const float *v,
                            const BlockMask *mask, const AttentionShape *s)
{
    int HS = s->head_size, N = mask->block;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                int listed, past = (i + 1) * N < s->tokens ? (i + 1) * N : s->tokens;
                const ListedBlock *list = block_list(mask, b, h, i, &listed);

                for (int t = i * N; t < past; t++) {
                    const float *q_bht = q + query_row(s, b, h, t);
                    float *out_bht = out + query_row(s, b, h, t);
                    float m = -INFINITY, l = 0;
                    memset(out_bht, 0, HS * sizeof *out_bht);

                    for (int j = 0; j < listed; j++) {
                        int first = list[j].key_block * N,
                            end = first + N < s->key_tokens ? first + N : s->key_tokens;
                        bool ask = list[j].kind == BLOCK_PARTIAL;
                        for (int t2 = first; t2 < end; t2++) {
                            if (ask && !attends(s, b, h, t, t2))
                                continue;
                            float score =
                                s->scale * dot(q_bht, k + key_row(s, b, h, t2), HS) + bias_at(s, b, h, t, t2);
                            if (score == -INFINITY)
                                continue;
                            if (!(score <= m)) { /* a larger score mends all that came before; a NaN passes */
                                float mend = expf(m - score);
                                l *= mend;
                                for (int c = 0; c < HS; c++)
                                    out_bht[c] *= mend;
                                m = score;
                            }
                            float p = expf(score - m);
                            l += p;
                            if (s->dropout > 0)
                                p *= dropout_keeps(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) /
                                     (1 - s->dropout);
                            const float *v_bht2 = v + key_row(s, b, h, t2);
                            for (int c = 0; c < HS; c++)
                                out_bht[c] += p * v_bht2[c];
                        }
                    }
                    for (int c = 0; c < HS; c++)
                        out_bht[c] = l == 0 ? 0 : out_bht[c] / l;
                    lse[lse_index(s, b, h, t)] = m + logf(l);
                }
            }
}
