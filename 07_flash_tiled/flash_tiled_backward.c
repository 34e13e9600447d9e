/* The gradients of attention, with the T x TK matrix and in tiles. The shapes are in the header.
 *
 * Forward was S = scale Q K^T + bias, P = softmax(S), D = dropout(P), O = D V. Backwards, given dO:
 *
 *     product      dV = D^T dO            dD = dO V^T
 *     dropout      dP = dD / (1 - p) where a weight was kept, 0 where it was dropped
 *     softmax      dS = P * (dP - delta)  delta = rowsum(P * dP) = rowsum(dO * O)
 *     scores       dQ = scale dS K        dK = scale dS^T Q        dbias = dS, summed where it was broadcast
 */
#include "flash_tiled_backward.h"

#include <math.h>
#include <string.h>

#include "matmul.h"
#include "random.h"
#include "vector_math.h"

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

/* sum += factor * row */
static void add_scaled(float *restrict sum, float factor, const float *restrict row, int n)
{
    for (int i = 0; i < n; i++)
        sum[i] += factor * row[i];
}

/* ---- With the matrix: forward's three steps, backwards, each over all T x TK scores. ---- */

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
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK;

    /* 3. out = weights V: dV = D^T dO, and dD = dO V^T, which waits in d_scores */
    matmul_strided_batch('T', 'N', TK, HS, T, 1, weights, TK, weights_head, g->dout, HS, q_head, 0, g->dv, HS,
                         k_head, heads);
    matmul_strided_batch('N', 'T', T, TK, HS, 1, g->dout, HS, q_head, g->v, HS, k_head, 0, d_scores, TK,
                         weights_head, heads);

    /* 2. softmax and dropout: dS = P * (dP - delta) = D * dD - P * delta. Dropout did to dP what it did to P,
     * so that P * dP = D * dD. */
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++) {
        float delta = dot(g->dout + row * HS, g->out + row * HS, HS);
        for (size_t i = row * TK; i < (row + 1) * TK; i++)
            d_scores[i] = weights[i] * d_scores[i] - softmax[i] * delta;
    }

    /* 1. scores = scale Q K^T + bias: dQ = scale dS K, dK = scale dS^T Q, dbias = dS */
    matmul_strided_batch('N', 'N', T, HS, TK, s->scale, d_scores, TK, weights_head, g->k, HS, k_head, 0,
                         g->dq, HS, q_head, heads);
    matmul_strided_batch('T', 'N', TK, HS, T, s->scale, d_scores, TK, weights_head, g->q, HS, q_head, 0,
                         g->dk, HS, k_head, heads);
    if (s->bias)
        sum_scores_into_bias(g->dbias, d_scores, s);
}

/* ---- In tiles: what is wanted of P is computed again, once from the side of the queries and once from the
 * side of the keys. ---- */

enum {
    KEYS = 32, /* a block of keys, beside each other in the vectors that one query meets */
    SHORT_SUM =
        64, /* products of a score that are added up before they join the rest: less is lost to rounding */
};

/* Where the block that holds key (b, h, t2) starts in key_blocks or value_blocks. */
static size_t block_start(const AttentionShape *s, int b, int h, int t2)
{
    size_t blocks = (s->key_tokens + KEYS - 1) / KEYS;
    return (((size_t)b * s->heads + h) * blocks + t2 / KEYS) * s->head_size * KEYS;
}

size_t key_block_count(const AttentionShape *s)
{
    return block_start(s, s->batch, 0, 0);
}

/* Where the block that holds t2 ends, or the range that is walked. */
static int block_end(int t2, int range_end)
{
    return smaller((t2 / KEYS + 1) * KEYS, range_end);
}

/* A block turned on its side, (HS,KEYS), so that numbers of neighbouring keys are neighbours. Zeros follow
 * the last key. */
static void transpose_block(float *restrict block, const float *restrict rows, int keys, int HS)
{
    for (int d = 0; d < HS; d++)
        for (int j = 0; j < KEYS; j++)
            block[d * KEYS + j] = j < keys ? rows[(size_t)j * HS + d] : 0;
}

typedef struct {
    int key;       /* t2 */
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS */
} Pair;

/* What query (b, h, t) has with the keys from <= t2 < to, all of one block: numbers of the matrix and their
 * gradients, from lse and delta. Forbidden pairs are left out; returns how many there are. */
static int recompute(Pair *pairs, const AttentionBackward *g, const TiledScratch *scratch,
                     const AttentionShape *s, int b, int h, int t, int from, int to)
{
    to = smaller(to, keys_end(s, b, t));
    if (from >= to)
        return 0;
    size_t row = lse_index(s, b, h, t), q_bht = query_row(s, b, h, t), block = block_start(s, b, h, from);
    const float *key = scratch->key_blocks + block, *value = scratch->value_blocks + block;

    /* The query's dot products with the whole block, and those of dO with the values */
    float score[KEYS] = {0}, d_weight[KEYS] = {0}, p[KEYS];
    for (int d0 = 0; d0 < s->head_size; d0 += SHORT_SUM) {
        float part[KEYS] = {0};
        for (int d = d0; d < smaller(d0 + SHORT_SUM, s->head_size); d++)
            for (int j = 0; j < KEYS; j++) {
                part[j] += g->q[q_bht + d] * key[d * KEYS + j];
                d_weight[j] += g->dout[q_bht + d] * value[d * KEYS + j];
            }
        for (int j = 0; j < KEYS; j++)
            score[j] += s->scale * part[j];
    }
    for (int t2 = from; s->bias && t2 < to; t2++)
        score[t2 % KEYS] += bias_at(s, b, h, t, t2);
    for (int j = 0; j < KEYS; j++)
        p[j] = fast_exp(score[j] - g->lse[row]);

    int count = 0;
    for (int t2 = from; t2 < to; t2++) {
        int j = t2 % KEYS;
        if (!attends(s, b, h, t, t2) || score[j] == -INFINITY)
            continue;
        float kept = 1;
        if (s->dropout > 0)
            kept = dropout_keeps(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
        Pair *pair = pairs + count++;
        pair->key = t2;
        pair->weight = kept * p[j];
        pair->d_score = p[j] * (kept * d_weight[j] - scratch->delta[row]);
    }
    return count;
}

/* Queries outside: the rows first <= t < past meet the keys, Bc at a time, as in forward. */
static void query_tile(const AttentionBackward *g, const TiledScratch *scratch, const AttentionShape *s,
                       int b, int h, int first, int past)
{
    int HS = s->head_size;
    for (int t = first; t < past; t++) {
        size_t q_bht = query_row(s, b, h, t);
        scratch->delta[lse_index(s, b, h, t)] = dot(g->dout + q_bht, g->out + q_bht, HS);
        memset(g->dq + q_bht, 0, HS * sizeof *g->dq);
    }
    int end = keys_end(s, b, past - 1), Bc = smaller(s->tile_columns, s->key_tokens);
    for (int from = 0; from < end; from += Bc)
        for (int t = first; t < past; t++)
            for (int t2 = from, to = smaller(from + Bc, end); t2 < to; t2 = block_end(t2, to)) {
                Pair pairs[KEYS];
                int count = recompute(pairs, g, scratch, s, b, h, t, t2, block_end(t2, to));
                for (const Pair *pair = pairs; pair < pairs + count; pair++)
                    add_scaled(g->dq + query_row(s, b, h, t), s->scale * pair->d_score,
                               g->k + key_row(s, b, h, pair->key), HS);
            }
}

/* Keys outside: the keys first <= t2 < past meet the queries, Br at a time. */
static void key_tile(const AttentionBackward *g, const TiledScratch *scratch, const AttentionShape *s, int b,
                     int h, int first, int past)
{
    int HS = s->head_size, Br = smaller(s->tile_rows, s->tokens);
    memset(g->dk + key_row(s, b, h, first), 0, (size_t)(past - first) * HS * sizeof *g->dk);
    memset(g->dv + key_row(s, b, h, first), 0, (size_t)(past - first) * HS * sizeof *g->dv);
    for (int from = 0; from < s->tokens; from += Br)
        for (int t2 = first; t2 < past; t2 = block_end(t2, past))
            for (int t = from; t < smaller(from + Br, s->tokens); t++) {
                size_t q_bht = query_row(s, b, h, t);
                Pair pairs[KEYS];
                int count = recompute(pairs, g, scratch, s, b, h, t, t2, block_end(t2, past));
                for (const Pair *pair = pairs; pair < pairs + count; pair++) {
                    size_t k_bht2 = key_row(s, b, h, pair->key);
                    add_scaled(g->dk + k_bht2, s->scale * pair->d_score, g->q + q_bht, HS);
                    add_scaled(g->dv + k_bht2, pair->weight, g->dout + q_bht, HS);
                }
            }
}

/* A number of the bias was added to one score, or to many where it was broadcast: so are the gradients. */
static void bias_gradient(const AttentionBackward *g, const TiledScratch *scratch, const AttentionShape *s)
{
    const Broadcast axes = broadcast_of(s);
    const size_t *stride = s->bias_stride;

#pragma omp parallel for collapse(4) schedule(dynamic)
    for (int b0 = 0; b0 < axes.own[0]; b0++)
        for (int h0 = 0; h0 < axes.own[1]; h0++)
            for (int t0 = 0; t0 < axes.own[2]; t0++)
                for (int k0 = 0; k0 < axes.own[3]; k0 += KEYS) {
                    float sum[KEYS] = {0}; /* a block's numbers, or the one that all keys share */
                    int past = stride[3] ? block_end(k0, s->key_tokens) : s->key_tokens;
                    for (int b = b0; b < b0 + axes.shared[0]; b++)
                        for (int h = h0; h < h0 + axes.shared[1]; h++)
                            for (int t = t0; t < t0 + axes.shared[2]; t++) {
                                float row_sum = 0; /* a sum of sums loses less to rounding */
                                for (int t2 = k0; t2 < past; t2 += KEYS) {
                                    Pair pairs[KEYS];
                                    int count =
                                        recompute(pairs, g, scratch, s, b, h, t, t2, block_end(t2, past));
                                    for (const Pair *pair = pairs; pair < pairs + count; pair++)
                                        if (stride[3])
                                            sum[pair->key - k0] += pair->d_score;
                                        else
                                            row_sum += pair->d_score;
                                }
                                sum[0] += row_sum;
                            }
                    float *dbias = g->dbias + b0 * stride[0] + h0 * stride[1] + t0 * stride[2];
                    for (int k = k0; k < block_end(k0, axes.own[3]); k++)
                        dbias[k * stride[3]] = sum[k - k0];
                }
}

void attention_tiled_backward(const AttentionBackward *g, const TiledScratch *scratch,
                              const AttentionShape *s)
{
    int Br = smaller(s->tile_rows, s->tokens), Bc = smaller(s->tile_columns, s->key_tokens);
    int row_tiles = (s->tokens + Br - 1) / Br, key_tiles = (s->key_tokens + Bc - 1) / Bc;

#pragma omp parallel for collapse(3)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t2 = 0; t2 < s->key_tokens; t2 += KEYS) {
                size_t rows = key_row(s, b, h, t2), block = block_start(s, b, h, t2);
                int keys = block_end(t2, s->key_tokens) - t2;
                transpose_block(scratch->key_blocks + block, g->k + rows, keys, s->head_size);
                transpose_block(scratch->value_blocks + block, g->v + rows, keys, s->head_size);
            }

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int i = 0; i < row_tiles; i++)
                query_tile(g, scratch, s, b, h, i * Br, smaller((i + 1) * Br, s->tokens));

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int j = 0; j < key_tiles; j++)
                key_tile(g, scratch, s, b, h, j * Bc, smaller((j + 1) * Bc, s->key_tokens));

    if (s->bias)
        bias_gradient(g, scratch, s);
}
