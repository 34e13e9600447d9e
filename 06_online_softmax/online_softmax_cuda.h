/* Attention by a warp to each row that keeps no matrix, on a GPU: the twin of online_softmax.c's online softmax and merging, for
 * chapter 6 and for chapter 8, whose heads may share keys. The pointers are the device's. */
#ifndef ONLINE_SOFTMAX_CUDA_H
#define ONLINE_SOFTMAX_CUDA_H

#include "cuda_warp.h"
#include "kernel.h"
#include "philox.h"

/* What one query row knows of the keys it has seen: every lane of its warp knows m and l; o is shared by columns. */
typedef struct {
    float m;  /* the largest score; -inf before the first */
    float l;  /* the sum of exp(score - m) */
    float *o; /* (HS) the sum of exp(score - m) * value, not yet divided by l */
} Row;

/* Some keys or values, `stride` floats from one to the next: where the tensor lies, or in shared memory. */
typedef struct {
    const float *row;
    int stride;
} Tile;

__device__ static Tile where_they_lie(const float *k, const AttentionShape *s, int b, int h, int from)
{
    return {k + key_row(s, b, h, from), s->head_size};
}

__device__ static Row empty_row_of_warp(float *o, int head_size)
{
    for (int i = threadIdx.x % WARP; i < head_size; i += WARP)
        o[i] = 0;
    return {-INFINITY, 0, o};
}

/* Shows the keys from <= t2 < to, 32 at most, to row (b, h, t): a key to each lane, then a column of the values to each. k and
 * v start with number `from`; weights has room for 32. */
__device__ static void add_32_keys(Row *row, float *weights, const float *q, Tile k, Tile v,
                                   const AttentionShape *s, int b, int h, int t, int from, int to)
{
    int HS = s->head_size, lane = threadIdx.x % WARP, t2 = from + lane;
    float score = -INFINITY;
    if (t2 < to && attends(s, b, h, t, t2))
        score = s->scale * dot(q + query_row(s, b, h, t), k.row + (size_t)lane * k.stride, HS) +
                bias_at(s, b, h, t, t2);
    float m_new = larger(row->m, warp_largest(score));
    if (m_new == -INFINITY)
        return; /* nothing allowed yet, and -inf - -inf would be NaN */

    /* Dropout zeroes weights after the softmax: l, which is the softmax's, counts every key. */
    float mend = expf(row->m - m_new), p = score == -INFINITY ? 0 : expf(score - m_new), kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps_pair(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) / (1 - s->dropout);
    weights[lane] = score == -INFINITY ? -INFINITY : p * kept; /* still -inf: a forbidden key */
    row->l = mend * row->l + warp_sum(p);
    row->m = m_new;
    __syncwarp(); /* the other lanes' weights are there */

    for (int i = lane; i < HS; i += WARP) {
        float o = mend * row->o[i];
        for (int j = 0; j < to - from; j++)
            if (weights[j] != -INFINITY)
                o += weights[j] * v.row[(size_t)j * v.stride + i];
        row->o[i] = o;
    }
    __syncwarp(); /* the weights may be used again */
}

/* Divides o by l; returns the row's lse. */
__device__ static float finish_row(const Row *row, int HS)
{
    float one_over_l = row->l == 0 ? 0 : 1 / row->l;
    for (int i = threadIdx.x % WARP; i < HS; i += WARP)
        row->o[i] *= one_over_l;
    return row->m + logf(row->l);
}

__global__ static void online_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                                     AttentionShape shape, size_t rows)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;

    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows; i += (size_t)gridDim.x * warps) {
        int t = (int)(i % s->tokens), h = (int)(i / s->tokens % s->heads),
            b = (int)(i / s->tokens / s->heads);
        Row row = empty_row_of_warp(out + i * HS, HS);
        int end = keys_end(s, b, t);
        for (int from = 0; from < end; from += WARP)
            add_32_keys(&row, shared + warp * WARP, q, where_they_lie(k, s, b, h, from),
                        where_they_lie(v, s, b, h, from), s, b, h, t, from, smaller(from + WARP, end));
        float row_lse = finish_row(&row, HS);
        if (lane == 0)
            lse[i] = row_lse;
    }
}

/* ---- Few rows and many keys: the keys are cut into parts, a warp to each part of each row, and the partial results are
 * merged. ---- */

enum {
    PART_KEYS = 128,  /* the least that a part has */
    PART_ROWS = 8192, /* so many partial rows at most, or one a row */
};

static int parts_of(const AttentionShape *s)
{
    size_t rows = lse_count(s), most = rows < PART_ROWS ? PART_ROWS / rows : 1;
    int parts = (s->key_tokens + PART_KEYS - 1) / PART_KEYS;
    return most < (size_t)parts ? (int)most : parts;
}

/* Warp i has part i / rows of row i % rows. o (parts,rows,HS), m and l (parts,rows): the partial results. */
__global__ static void part_kernel(float *o, float *m, float *l, const float *q, const float *k,
                                   const float *v, AttentionShape shape, int parts, size_t rows)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int keys = (s->key_tokens + parts - 1) / parts; /* of a part */

    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows * parts; i += (size_t)gridDim.x * warps) {
        size_t bht = i % rows;
        int t = (int)(bht % s->tokens), h = (int)(bht / s->tokens % s->heads);
        int b = (int)(bht / s->tokens / s->heads), part = (int)(i / rows);
        Row row = empty_row_of_warp(o + i * HS, HS);
        int end = smaller((part + 1) * keys, keys_end(s, b, t));
        for (int from = part * keys; from < end; from += WARP)
            add_32_keys(&row, shared + warp * WARP, q, where_they_lie(k, s, b, h, from),
                        where_they_lie(v, s, b, h, from), s, b, h, t, from, smaller(from + WARP, end));
        if (threadIdx.x % WARP == 0) {
            m[i] = row.m;
            l[i] = row.l;
        }
    }
}

/* Two sums over different keys become one once both are measured from the same maximum. */
__device__ static void merge_partials(Row *into, const Row *other, int HS)
{
    float m = larger(into->m, other->m);
    float mend_into = into->m == m ? 1 : expf(into->m - m),
          mend_other = other->m == m ? 1 : expf(other->m - m);
    into->l = mend_into * into->l + mend_other * other->l;
    for (int i = threadIdx.x % WARP; i < HS; i += WARP)
        into->o[i] = mend_into * into->o[i] + mend_other * other->o[i];
    into->m = m;
}

/* A warp to each row: its parts in their order, so that the bits are the same every time. */
__global__ static void merge_kernel(float *out, float *lse, float *o, const float *m, const float *l,
                                    int parts, int HS, size_t rows)
{
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t i = (size_t)blockIdx.x * warps + threadIdx.x / WARP; i < rows;
         i += (size_t)gridDim.x * warps) {
        Row row = empty_row_of_warp(out + i * HS, HS);
        for (int part = 0; part < parts; part++) {
            size_t partial = part * rows + i;
            Row other = {m[partial], l[partial], o + partial * HS};
            merge_partials(&row, &other, HS);
        }
        float row_lse = finish_row(&row, HS);
        if (lane == 0)
            lse[i] = row_lse;
    }
}

/* ---- For the table of kernels ---- */

/* o, m and l of every part of every row */
static int workspace_split_keys(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = parts_of(s) * query_count(s);
    floats[1] = floats[2] = parts_of(s) * lse_count(s);
    return 3;
}

static void forward_split_keys(const Tensors *t, const AttentionShape *s)
{
    float *o = t->workspace[0], *m = t->workspace[1], *l = t->workspace[2];
    int parts = parts_of(s), threads = MOST_WARPS * WARP;
    size_t rows = lse_count(s);
    LAUNCH(part_kernel, blocks_for(rows * parts), threads, MOST_WARPS * WARP * sizeof(float), o, m, l, t->q,
           t->k, t->v, *s, parts, rows);
    LAUNCH(merge_kernel, blocks_for(rows), threads, 0, t->out, t->lse, o, m, l, parts, s->head_size, rows);
}

#endif
