/* The gradients of attention under a mask, over all pairs and over the listed blocks. The shapes are in the
 * header.
 *
 * Forward was S = scale Q K^T + bias, P = softmax(S), D = dropout(P), O = D V. Backwards, given dO:
 *
 *     product      dV = D^T dO            dD = dO V^T
 *     dropout      dP = dD / (1 - p) where a weight was kept, 0 where it was dropped
 *     softmax      dS = P * (dP - delta)  delta = rowsum(P * dP) = rowsum(dO * O)
 *     scores       dQ = scale dS K        dK = scale dS^T Q        dbias = dS, summed where it was broadcast
 *
 * P = 0 where the mask forbids, and so is dS: a block that forward left out adds nothing to any of them.
 */
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

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Adds the gradients of n neighbouring scores to those of the numbers that were added to them: n, or one. */
static void add_to_bias(float *dbias, const float *d_score, int n, const AttentionShape *s)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        if (s->bias_stride[3])
            dbias[i] += d_score[i];
        else
            sum += d_score[i];
    dbias[0] += sum;
}

/* ---- The mask as a tensor: all pairs again, most of them zeros. ---- */

enum { BLOCK_ROWS = 64 }; /* rows, or keys, to a task */

static void sum_scores_into_bias(float *dbias, const float *d_scores, const AttentionShape *s)
{
    const Broadcast axes = broadcast_of(s);
    const size_t *stride = s->bias_stride;
    int TK = s->key_tokens;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b0 = 0; b0 < axes.own[0]; b0++)
        for (int h0 = 0; h0 < axes.own[1]; h0++)
            for (int t0 = 0; t0 < axes.own[2]; t0++) {
                float *row = dbias + b0 * stride[0] + h0 * stride[1] + t0 * stride[2];
                memset(row, 0, axes.own[3] * sizeof *row);
                for (int b = b0; b < b0 + axes.shared[0]; b++)
                    for (int h = h0; h < h0 + axes.shared[1]; h++)
                        for (int t = t0; t < t0 + axes.shared[2]; t++)
                            add_to_bias(row, d_scores + lse_index(s, b, h, t) * TK, TK, s);
            }
}

void attention_dense_mask_backward(const AttentionBackward *g, const float *weights, const float *softmax,
                                   float *d_scores, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, group = s->heads / s->kv_heads;

    /* dS and dQ, some rows to a task. */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int first = 0; first < T; first += BLOCK_ROWS) {
                int rows = smaller(BLOCK_ROWS, T - first);
                size_t q_rows = query_row(s, b, h, first), keys = key_row(s, b, h, 0);
                float *d_rows = d_scores + lse_index(s, b, h, first) * TK;

                /* dD = dO V^T */
                matmul('N', 'T', rows, TK, HS, 1, g->dout + q_rows, HS, g->v + keys, HS, 0, d_rows, TK);
                /* dS = P * (dP - delta) = D * dD - P * delta: dropout did to dP what it did to P */
                for (int r = 0; r < rows; r++) {
                    size_t q_bht = q_rows + (size_t)r * HS, row = lse_index(s, b, h, first + r) * TK;
                    float delta = dot(g->dout + q_bht, g->out + q_bht, HS);
                    for (size_t i = row; i < row + TK; i++)
                        d_scores[i] = weights[i] * d_scores[i] - softmax[i] * delta;
                }
                /* dQ = scale dS K */
                matmul('N', 'N', rows, HS, TK, s->scale, d_rows, TK, g->k + keys, HS, 0, g->dq + q_rows, HS);
            }

            /* dV = D^T dO and dK = scale dS^T Q, some keys to a task, summed over the heads that read them. */
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < s->batch; b++)
        for (int kv_head = 0; kv_head < s->kv_heads; kv_head++)
            for (int first = 0; first < TK; first += BLOCK_ROWS)
                for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
                    int keys = smaller(BLOCK_ROWS, TK - first);
                    float sum_so_far = h > kv_head * group;
                    size_t q_rows = query_row(s, b, h, 0), kv = key_row(s, b, h, first);
                    size_t columns = lse_index(s, b, h, 0) * TK + first;
                    matmul('T', 'N', keys, HS, T, 1, weights + columns, TK, g->dout + q_rows, HS, sum_so_far,
                           g->dv + kv, HS);
                    matmul('T', 'N', keys, HS, T, s->scale, d_scores + columns, TK, g->q + q_rows, HS,
                           sum_so_far, g->dk + kv, HS);
                }

    if (s->bias)
        sum_scores_into_bias(g->dbias, d_scores, s);
}

/* ---- The listed blocks: dQ walks the lists of the query blocks, dK and dV those of the key blocks. ---- */

/* How far apart neighbours of each axis lie in memory; the numbers of a head are side by side. */
typedef struct {
    size_t batch, head, token;
} Steps;

/* What is the same for all blocks. */
typedef struct {
    const AttentionBackward *tensors;
    Steps query, key, out; /* of q and dq; of k, v, dk, dv; of out and dout */
    float *delta;
    MaskPredicate *predicate;
    int N;
    const AttentionShape *s;
} Walk;

static size_t query_at(const Walk *w, int b, int h, int t)
{
    return b * w->query.batch + h * w->query.head + t * w->query.token;
}

static size_t out_at(const Walk *w, int b, int h, int t)
{
    return b * w->out.batch + h * w->out.head + t * w->out.token;
}

static size_t key_at(const Walk *w, int b, int h, int t2)
{
    return b * w->key.batch + h / (w->s->heads / w->s->kv_heads) * w->key.head + t2 * w->key.token;
}

/* Up to SIDE queries by as many keys of a block, with what forward knew of them and their gradient. */
enum { SIDE = 64 };
typedef struct {
    int b, h, t, rows, t2, keys;
    bool holes;                  /* some of the pairs are forbidden */
    float weight[SIDE][SIDE];    /* D: what the value was multiplied by; 0 in a hole */
    float d_score[SIDE][SIDE];   /* dS; 0 in a hole */
    bool may_attend[SIDE][SIDE]; /* of partial blocks only */
} Piece;

/* Asks about each pair. False if none may attend. */
static bool ask_piece(Piece *piece, const Walk *w)
{
    int allowed = 0;
    for (int r = 0; r < piece->rows; r++)
        for (int c = 0; c < piece->keys; c++)
            allowed += piece->may_attend[r][c] =
                w->predicate(w->s, piece->b, piece->h, piece->t + r, piece->t2 + c);
    piece->holes = allowed < piece->rows * piece->keys;
    return allowed > 0;
}

/* Scores of row r that mask or bias forbid become -inf; the others get their bias. */
static void finish_scores(Piece *piece, const Walk *w, int r, bool partial)
{
    float *score = piece->weight[r];
    for (int c = 0; c < piece->keys; c++) {
        if (partial && !piece->may_attend[r][c])
            score[c] = -INFINITY;
        else
            score[c] += bias_at(w->s, piece->b, piece->h, piece->t + r, piece->t2 + c);
        piece->holes = piece->holes || score[c] == -INFINITY;
    }
}

/* D and dS of a piece whose place is given: P from lse, dS from delta. False if no pair in it may attend. */
static bool recompute(Piece *piece, const Walk *w, bool partial)
{
    const AttentionBackward *g = w->tensors;
    const AttentionShape *s = w->s;
    int b = piece->b, h = piece->h, HS = s->head_size;
    piece->holes = false;
    if (partial && !ask_piece(piece, w))
        return false;

    size_t keys = key_at(w, b, h, piece->t2);
    matmul('N', 'T', piece->rows, piece->keys, HS, s->scale, g->q + query_at(w, b, h, piece->t),
           (int)w->query.token, g->k + keys, (int)w->key.token, 0, piece->weight[0], SIDE);
    matmul('N', 'T', piece->rows, piece->keys, HS, 1, g->dout + out_at(w, b, h, piece->t), (int)w->out.token,
           g->v + keys, (int)w->key.token, 0, piece->d_score[0], SIDE);

    for (int r = 0; r < piece->rows; r++) {
        size_t row = lse_index(s, b, h, piece->t + r);
        float *weight = piece->weight[r], *d_score = piece->d_score[r], kept[SIDE];
        if (partial || s->bias)
            finish_scores(piece, w, r, partial);
        for (int c = 0; c < piece->keys; c++)
            kept[c] = s->dropout > 0
                          ? dropout_keeps(s->dropout_seed, row, piece->t2 + c, s->dropout) / (1 - s->dropout)
                          : 1;
        float lse = g->lse[row] == -INFINITY ? 0 : g->lse[row], delta = w->delta[row];
        for (int c = 0; c < piece->keys; c++) {
            bool hole = weight[c] == -INFINITY; /* where V, lse and delta may be anything */
            float p = fast_exp(weight[c] - lse), d = p * (kept[c] * d_score[c] - delta);
            weight[c] = hole ? 0 : p * kept[c];
            d_score[c] = hole ? 0 : d;
        }
    }
    return true;
}

/* sum (n,HS) += scale A X with A (n,m), X (m,HS): A is a piece's matrix, or its transpose. Around holes, where
 * A is 0, X may hold NaN, and 0 times NaN is NaN: there row by row, zeros left out. */
static void add_product(float *sum, Steps sum_step, float scale, bool transpose, const float a[SIDE][SIDE],
                        const float *x, Steps x_step, int n, int m, bool holes, int HS)
{
    if (!holes) {
        matmul(transpose ? 'T' : 'N', 'N', n, HS, m, scale, a[0], SIDE, x, (int)x_step.token, 1, sum,
               (int)sum_step.token);
        return;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++) {
            float factor = scale * (transpose ? a[j][i] : a[i][j]);
            float *restrict sum_i = sum + i * sum_step.token;
            const float *restrict x_j = x + j * x_step.token;
            if (factor != 0)
                for (int c = 0; c < HS; c++)
                    sum_i[c] += factor * x_j[c];
        }
}

static void add_to_dq(const Piece *p, const Walk *w)
{
    const AttentionBackward *g = w->tensors;
    add_product(g->dq + query_at(w, p->b, p->h, p->t), w->query, w->s->scale, false, p->d_score,
                g->k + key_at(w, p->b, p->h, p->t2), w->key, p->rows, p->keys, p->holes, w->s->head_size);
}

static void add_to_dk_dv(const Piece *p, const Walk *w)
{
    const AttentionBackward *g = w->tensors;
    size_t keys = key_at(w, p->b, p->h, p->t2);
    add_product(g->dv + keys, w->key, 1, true, p->weight, g->dout + out_at(w, p->b, p->h, p->t), w->out,
                p->keys, p->rows, p->holes, w->s->head_size);
    add_product(g->dk + keys, w->key, w->s->scale, true, p->d_score, g->q + query_at(w, p->b, p->h, p->t),
                w->query, p->keys, p->rows, p->holes, w->s->head_size);
}

static void add_to_dbias(const Piece *p, const Walk *w)
{
    const size_t *stride = w->s->bias_stride;
    for (int r = 0; r < p->rows; r++)
        add_to_bias(w->tensors->dbias + p->b * stride[0] + p->h * stride[1] + (p->t + r) * stride[2] +
                        p->t2 * stride[3],
                    p->d_score[r], p->keys, w->s);
}

/* Computes block (i, j) of (b, h) again, a piece at a time, and hands each on. */
static void each_piece(const Walk *w, int b, int h, int i, int j, BlockKind kind,
                       void (*use)(const Piece *, const Walk *))
{
    int t_end = smaller((i + 1) * w->N, w->s->tokens), t2_end = smaller((j + 1) * w->N, w->s->key_tokens);
    Piece piece = {.b = b, .h = h};
    for (piece.t = i * w->N; piece.t < t_end; piece.t += SIDE)
        for (piece.t2 = j * w->N; piece.t2 < t2_end; piece.t2 += SIDE) {
            piece.rows = smaller(SIDE, t_end - piece.t);
            piece.keys = smaller(SIDE, t2_end - piece.t2);
            if (recompute(&piece, w, kind == BLOCK_PARTIAL))
                use(&piece, w);
        }
}

/* delta and dQ of the queries of block i. */
static void query_block(const Walk *w, const BlockMask *mask, int b, int h, int i)
{
    const AttentionBackward *g = w->tensors;
    int HS = w->s->head_size, listed;
    for (int t = i * w->N; t < smaller((i + 1) * w->N, w->s->tokens); t++) {
        size_t at = out_at(w, b, h, t);
        w->delta[lse_index(w->s, b, h, t)] = dot(g->dout + at, g->out + at, HS);
        memset(g->dq + query_at(w, b, h, t), 0, HS * sizeof *g->dq);
    }
    const ListedBlock *list = block_list(mask, b, h, i, &listed);
    for (int n = 0; n < listed; n++)
        each_piece(w, b, h, i, list[n].key_block, list[n].kind, add_to_dq);
}

/* dK and dV of the keys of block j, from the queries of all heads that read them. */
static void key_block(const Walk *w, const BlockMask *transposed, int b, int kv_head, int j)
{
    const AttentionBackward *g = w->tensors;
    int HS = w->s->head_size, group = w->s->heads / w->s->kv_heads, listed;
    for (int t2 = j * w->N; t2 < smaller((j + 1) * w->N, w->s->key_tokens); t2++) {
        size_t at = key_at(w, b, kv_head * group, t2);
        memset(g->dk + at, 0, HS * sizeof *g->dk);
        memset(g->dv + at, 0, HS * sizeof *g->dv);
    }
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        const ListedBlock *list = block_list(transposed, b, h, j, &listed);
        for (int n = 0; n < listed; n++)
            each_piece(w, b, h, list[n].key_block, j, list[n].kind, add_to_dk_dv);
    }
}

/* A task takes the numbers of the bias that one block of queries meets, or all queries where they share. */
static void bias_gradient(const Walk *w, const BlockMask *mask)
{
    const AttentionShape *s = w->s;
    const Broadcast axes = broadcast_of(s);
    const size_t *stride = s->bias_stride;
    int blocks = mask->query_blocks, together = stride[2] ? 1 : blocks;

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b0 = 0; b0 < axes.own[0]; b0++)
        for (int h0 = 0; h0 < axes.own[1]; h0++)
            for (int i0 = 0; i0 < blocks; i0 += together) {
                float *own = w->tensors->dbias + b0 * stride[0] + h0 * stride[1];
                for (int t = i0 * w->N; t < smaller((i0 + 1) * w->N, axes.own[2]); t++)
                    memset(own + t * stride[2], 0, axes.own[3] * sizeof *own);

                for (int b = b0; b < b0 + axes.shared[0]; b++)
                    for (int h = h0; h < h0 + axes.shared[1]; h++)
                        for (int i = i0; i < i0 + together; i++) {
                            int listed;
                            const ListedBlock *list = block_list(mask, b, h, i, &listed);
                            for (int n = 0; n < listed; n++)
                                each_piece(w, b, h, i, list[n].key_block, list[n].kind, add_to_dbias);
                        }
            }
}

static void walk_backward(const Walk *w, const BlockMask *mask, const BlockMask *transposed)
{
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < w->s->batch; b++)
        for (int h = 0; h < w->s->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++)
                query_block(w, mask, b, h, i);

#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < w->s->batch; b++)
        for (int kv_head = 0; kv_head < w->s->kv_heads; kv_head++)
            for (int j = 0; j < mask->key_blocks; j++)
                key_block(w, transposed, b, kv_head, j);

    if (w->s->bias)
        bias_gradient(w, mask);
}

void attention_block_sparse_backward(const AttentionBackward *g, float *delta, const BlockMask *mask,
                                     const BlockMask *transposed, const AttentionShape *s)
{
    size_t HS = s->head_size;
    Steps query = {s->heads * s->tokens * HS, s->tokens * HS, HS};
    Steps key = {s->kv_heads * s->key_tokens * HS, s->key_tokens * HS, HS};
    Walk walk = {g, query, key, query, delta, mask->predicate, mask->block, s};
    walk_backward(&walk, mask, transposed);
}
