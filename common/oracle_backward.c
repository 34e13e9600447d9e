#include "oracle_internal.h"
#include "memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A pair's weight after dropout, and the gradient of its score; false where the query does not attend. */
static bool pair_gradient(double *weight, double *dscore, OracleQuery query, OracleKey key,
                          const OracleGradient *g)
{
    const AttentionShape *s = g->s;
    size_t row = query.row, tokens = s->tokens, heads = s->heads;
    int t = (int)(row % tokens), h = (int)(row / tokens % heads), b = (int)(row / tokens / heads);
    double bias = bias_at(s, b, h, t, key.t2);
    if (!attends(s, b, h, t, key.t2) || bias == -INFINITY)
        return false;
    double p = exp(s->scale * oracle_dot(query.q, key.k, s->head_size) + bias - g->lse[row]);
    double dropout = oracle_dropout(row, key.t2, g->keep, s);
    *weight = p * dropout;
    *dscore = p * (dropout * oracle_dot(query.dout, key.v, s->head_size) - g->delta[row]);
    return true;
}

void oracle_dq_row(double *dq, OracleQuery query, const double *k, const double *v, const OracleGradient *g)
{
    size_t size = g->s->head_size;
    memset(dq, 0, size * sizeof *dq);
    for (int t2 = 0; t2 < g->s->key_tokens; t2++) {
        double weight, dscore;
        OracleKey key = {k + t2 * size, v + t2 * size, t2};
        if (!pair_gradient(&weight, &dscore, query, key, g))
            continue;
        for (size_t d = 0; d < size; d++)
            dq[d] += g->s->scale * dscore * key.k[d];
    }
}

void oracle_dkv_row(double *dk, double *dv, OracleKey key, OracleQuery queries, size_t rows,
                    const OracleGradient *g)
{
    size_t size = g->s->head_size;
    memset(dk, 0, size * sizeof *dk);
    memset(dv, 0, size * sizeof *dv);
    for (size_t i = 0; i < rows; i++) {
        double weight, dscore;
        OracleQuery query = {queries.q + i * size, queries.dout + i * size, queries.row + i};
        if (!pair_gradient(&weight, &dscore, query, key, g))
            continue;
        for (size_t d = 0; d < size; d++) {
            dk[d] += g->s->scale * dscore * query.q[d];
            dv[d] += weight * query.dout[d];
        }
    }
}

void oracle_dq(double *dq, const size_t *rows, size_t count, const OracleGradient *g)
{
    const AttentionShape *s = g->s;
    size_t size = s->head_size, group = s->heads / s->kv_heads, slab_size = s->key_tokens * size;
    double *k = allocate_zeroed(slab_size, sizeof *k); /* one key/value head, in double */
    double *v = allocate_zeroed(slab_size, sizeof *v);
    if (!rows)
        count = lse_count(s);

    /* Rows that follow one another and share a key/value head are done together. */
    for (size_t first = 0, end; first < count; first = end) {
        size_t slab = (rows ? rows[first] : first) / s->tokens / group;
        for (end = first + 1; end < count && (rows ? rows[end] : end) / s->tokens / group == slab;)
            end++;
        oracle_widen(k, g->k + slab * slab_size, slab_size);
        oracle_widen(v, g->v + slab * slab_size, slab_size);
#pragma omp parallel for schedule(dynamic) if ((end - first) * slab_size > SMALL)
        for (size_t i = first; i < end; i++) {
            size_t row = rows ? rows[i] : i;
            double *q = allocate_zeroed(2 * size, sizeof *q), *dout = q + size;
            oracle_widen(q, g->q + row * size, size);
            oracle_widen(dout, g->dout + row * size, size);
            oracle_dq_row(dq + i * size, (OracleQuery){q, dout, row}, k, v, g);
            free(q);
        }
    }
    free(k);
    free(v);
}

void oracle_dkv(double *dk, double *dv, const size_t *rows, size_t count, const OracleGradient *g)
{
    const AttentionShape *s = g->s;
    size_t size = s->head_size, keys = s->key_tokens;
    size_t queries = (size_t)(s->heads / s->kv_heads) * s->tokens; /* those that share a key/value head */
    double *q = allocate_zeroed(queries * size, sizeof *q);
    double *dout = allocate_zeroed(queries * size, sizeof *dout);
    if (!rows)
        count = (size_t)s->batch * s->kv_heads * keys;

    for (size_t first = 0, end; first < count; first = end) {
        size_t slab = (rows ? rows[first] : first) / keys;
        for (end = first + 1; end < count && (rows ? rows[end] : end) / keys == slab;)
            end++;
        oracle_widen(q, g->q + slab * queries * size, queries * size);
        oracle_widen(dout, g->dout + slab * queries * size, queries * size);
#pragma omp parallel for schedule(dynamic) if ((end - first) * queries * size > SMALL)
        for (size_t i = first; i < end; i++) {
            size_t row = rows ? rows[i] : i;
            double *k = allocate_zeroed(2 * size, sizeof *k), *v = k + size;
            oracle_widen(k, g->k + row * size, size);
            oracle_widen(v, g->v + row * size, size);
            oracle_dkv_row(dk + i * size, dv + i * size, (OracleKey){k, v, (int)(row % keys)},
                           (OracleQuery){q, dout, slab * queries}, queries, g);
            free(k);
        }
    }
    free(q);
    free(dout);
}

size_t bias_elements(const AttentionShape *s)
{
    const size_t size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    size_t last = 0;
    for (int axis = 0; axis < 4; axis++)
        last += (size[axis] - 1) * s->bias_stride[axis];
    return s->bias ? last + 1 : 0;
}

/* The score's gradient of one pair, straight from the floats; 0 where the query does not attend. */
static double dscore_at(int b, int h, int t, int t2, double *room, const OracleGradient *g)
{
    size_t size = g->s->head_size, query = query_row(g->s, b, h, t), key = key_row(g->s, b, h, t2);
    const float *from[4] = {g->q + query, g->dout + query, g->k + key, g->v + key};
    for (int i = 0; i < 4; i++)
        for (size_t d = 0; d < size; d++)
            room[i * size + d] = from[i][d];
    double weight, dscore;
    bool attends_to =
        pair_gradient(&weight, &dscore, (OracleQuery){room, room + size, lse_index(g->s, b, h, t)},
                      (OracleKey){room + 2 * size, room + 3 * size, t2}, g);
    return attends_to ? dscore : 0;
}

void oracle_dbias(double *dbias, const size_t *elements, size_t count, const OracleGradient *g)
{
    const AttentionShape *s = g->s;
    const int size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    if (!elements)
        count = bias_elements(s);
#pragma omp parallel for schedule(dynamic) if (weights_count(s) > SMALL)
    for (size_t i = 0; i < count; i++) {
        /* The element's place on each axis; on those it is broadcast along, all places. */
        size_t rest = elements ? elements[i] : i;
        int from[4], to[4];
        for (int axis = 0; axis < 4; axis++) {
            size_t stride = s->bias_stride[axis];
            from[axis] = stride ? (int)(rest / stride) : 0;
            to[axis] = stride ? from[axis] + 1 : size[axis];
            rest = stride ? rest % stride : rest;
        }
        double *room = allocate_zeroed(4 * (size_t)s->head_size, sizeof *room), sum = 0;
        for (int b = from[0]; b < to[0]; b++)
            for (int h = from[1]; h < to[1]; h++)
                for (int t = from[2]; t < to[2]; t++)
                    for (int t2 = from[3]; t2 < to[3]; t2++)
                        sum += dscore_at(b, h, t, t2, room, g);
        dbias[i] = sum;
        free(room);
    }
}
