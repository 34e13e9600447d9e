/* The gradients of attention, with the T x TK matrix and without it. The shapes are in the header.
 *
 * Forward was S = scale Q K^T + bias, P = softmax(S), D = dropout(P), O = D V. Backwards, given dO:
 *
 *     product      dV = D^T dO            dD = dO V^T
 *     dropout      dP = dD / (1 - p) where a weight was kept, 0 where it was dropped
 *     softmax      dS = P * (dP - delta)  delta = rowsum(P * dP) = rowsum(dO * O)
 *     scores       dQ = scale dS K        dK = scale dS^T Q        dbias = dS, summed where it was broadcast
 *
 * A row with no key allowed has P = 0, and so adds nothing to any of them.
 */
#include "online_softmax.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* sum += factor * row */
static void add_scaled(float *restrict sum, float factor, const float *restrict row, int n)
{
    for (int i = 0; i < n; i++)
        sum[i] += factor * row[i];
}

/* ---- With the matrix: forward's three steps, backwards. ---- */

enum { BLOCK = 128 }; /* rows, or keys, to a task */

/* dbias from dS: each row of the bias is one task, which adds up the rows of dS that it was added to. */
static void sum_scores_into_bias(float *dbias, const float *d_scores, const AttentionShape *s)
{
    const Broadcast axes = broadcast_of(s);
    const size_t *stride = s->bias_stride;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b0 = 0; b0 < axes.own[0]; b0++)
        for (int h0 = 0; h0 < axes.own[1]; h0++)
            for (int t0 = 0; t0 < axes.own[2]; t0++) {
                float *row = dbias + b0 * stride[0] + h0 * stride[1] + t0 * stride[2];
                memset(row, 0, axes.own[3] * sizeof *row);
                for (int b = b0; b < b0 + axes.shared[0]; b++)
                    for (int h = h0; h < h0 + axes.shared[1]; h++)
                        for (int t = t0; t < t0 + axes.shared[2]; t++) {
                            const float *d_score = d_scores + lse_index(s, b, h, t) * s->key_tokens;
                            float sum = 0; /* of the keys that share one number, where they do */
                            for (int t2 = 0; t2 < s->key_tokens; t2++)
                                if (stride[3])
                                    row[t2] += d_score[t2];
                                else
                                    sum += d_score[t2];
                            row[0] += sum;
                        }
            }
}

void attention_materialised_backward(const AttentionBackward *g, const float *weights, const float *softmax,
                                     float *d_scores, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size;

    /* dS and dQ, some rows to a task. */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int first = 0; first < T; first += BLOCK) {
                int rows = first + BLOCK < T ? BLOCK : T - first;
                int end =
                    keys_end(s, b, first + rows - 1); /* no row of the block sees further than its last */
                size_t matrix = lse_index(s, b, h, first) * TK, q_rows = query_row(s, b, h, first);

                /* 3. out = weights V: dD = dO V^T, which waits in d_scores */
                matmul('N', 'T', rows, end, HS, 1, g->dout + q_rows, HS, g->v + key_row(s, b, h, 0), HS, 0,
                       d_scores + matrix, TK);

                /* 2. softmax and dropout: dS = P * (dP - delta) = D * dD - P * delta. Dropout did to dP what
                 * it did to P, so that P * dP = D * dD. */
                for (int r = 0; r < rows; r++) {
                    size_t q_bht = q_rows + (size_t)r * HS, row = matrix + (size_t)r * TK;
                    float delta = dot(g->dout + q_bht, g->out + q_bht, HS);
                    int row_end = keys_end(s, b, first + r);
                    for (int t2 = 0; t2 < row_end; t2++)
                        d_scores[row + t2] =
                            weights[row + t2] * d_scores[row + t2] - softmax[row + t2] * delta;
                    for (int t2 = row_end; t2 < TK; t2++)
                        d_scores[row + t2] = 0;
                }

                /* 1. scores = scale Q K^T: dQ = scale dS K */
                matmul('N', 'N', rows, HS, end, s->scale, d_scores + matrix, TK, g->k + key_row(s, b, h, 0),
                       HS, 0, g->dq + q_rows, HS);
            }

            /* dV = D^T dO and dK = scale dS^T Q, some keys to a task. */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int first = 0; first < TK; first += BLOCK) {
                int keys = first + BLOCK < TK ? BLOCK : TK - first, t = 0;
                while (t < T && keys_end(s, b, t) <= first)
                    t++; /* rows before t see none of these keys */
                size_t matrix = lse_index(s, b, h, t) * TK + first, q_rows = query_row(s, b, h, t);

                matmul('T', 'N', keys, HS, T - t, 1, weights + matrix, TK, g->dout + q_rows, HS, 0,
                       g->dv + key_row(s, b, h, first), HS);
                matmul('T', 'N', keys, HS, T - t, s->scale, d_scores + matrix, TK, g->q + q_rows, HS, 0,
                       g->dk + key_row(s, b, h, first), HS);
            }

    if (s->bias)
        sum_scores_into_bias(g->dbias, d_scores, s);
}

/* ---- Without it: what is wanted of P is computed again, once from the side of the queries and once from the
 * side of the keys, so that every sum belongs to one task. ---- */

typedef struct {
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS */
} Pair;

/* One number of the matrix and its gradient, from lse and delta. False for a pair that is forbidden. */
static bool recompute(Pair *pair, const AttentionBackward *g, const float *delta, const AttentionShape *s,
                      int b, int h, int t, int t2)
{
    if (!attends(s, b, h, t, t2))
        return false;
    size_t row = lse_index(s, b, h, t), q_bht = query_row(s, b, h, t), k_bht2 = key_row(s, b, h, t2);
    float score = s->scale * dot(g->q + q_bht, g->k + k_bht2, s->head_size) + bias_at(s, b, h, t, t2);
    if (score == -INFINITY) /* forbidden by the bias */
        return false;

    float p = expf(score - g->lse[row]);
    float kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
    float d_p = kept * dot(g->dout + q_bht, g->v + k_bht2, s->head_size);
    pair->weight = kept * p;
    pair->d_score = p * (d_p - delta[row]);
    return true;
}

/* A number of the bias was added to one score, or to many where it was broadcast: so are the gradients. */
static void bias_gradient(const AttentionBackward *g, const float *delta, const AttentionShape *s)
{
    const Broadcast axes = broadcast_of(s);
    const size_t *stride = s->bias_stride;

#pragma omp parallel for collapse(4) schedule(dynamic, 16)
    for (int b0 = 0; b0 < axes.own[0]; b0++)
        for (int h0 = 0; h0 < axes.own[1]; h0++)
            for (int t0 = 0; t0 < axes.own[2]; t0++)
                for (int k0 = 0; k0 < axes.own[3]; k0++) {
                    float sum = 0;
                    for (int b = b0; b < b0 + axes.shared[0]; b++)
                        for (int h = h0; h < h0 + axes.shared[1]; h++)
                            for (int t = t0; t < t0 + axes.shared[2]; t++) {
                                float row_sum =
                                    0; /* a sum of sums loses less to rounding than one long one */
                                for (int t2 = k0; t2 < k0 + axes.shared[3]; t2++) {
                                    Pair pair;
                                    if (recompute(&pair, g, delta, s, b, h, t, t2))
                                        row_sum += pair.d_score;
                                }
                                sum += row_sum;
                            }
                    g->dbias[b0 * stride[0] + h0 * stride[1] + t0 * stride[2] + k0 * stride[3]] = sum;
                }
}

void attention_online_backward(const AttentionBackward *g, float *delta, const AttentionShape *s)
{
    int HS = s->head_size;

    /* Queries outside: delta and dQ. */
#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t q_bht = query_row(s, b, h, t);
                delta[lse_index(s, b, h, t)] = dot(g->dout + q_bht, g->out + q_bht, HS);
                memset(g->dq + q_bht, 0, HS * sizeof *g->dq);
                for (int t2 = 0; t2 < keys_end(s, b, t); t2++) {
                    Pair pair;
                    if (recompute(&pair, g, delta, s, b, h, t, t2))
                        add_scaled(g->dq + q_bht, s->scale * pair.d_score, g->k + key_row(s, b, h, t2), HS);
                }
            }

            /* Keys outside: dK and dV. */
#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t2 = 0; t2 < s->key_tokens; t2++) {
                size_t k_bht2 = key_row(s, b, h, t2);
                memset(g->dk + k_bht2, 0, HS * sizeof *g->dk);
                memset(g->dv + k_bht2, 0, HS * sizeof *g->dv);
                for (int t = 0; t < s->tokens; t++) {
                    Pair pair;
                    if (!recompute(&pair, g, delta, s, b, h, t, t2))
                        continue;
                    add_scaled(g->dk + k_bht2, s->scale * pair.d_score, g->q + query_row(s, b, h, t), HS);
                    add_scaled(g->dv + k_bht2, pair.weight, g->dout + query_row(s, b, h, t), HS);
                }
            }

    if (s->bias)
        bias_gradient(g, delta, s);
}
