/* The twins of online_softmax.c on a GPU: a warp to each row. Its backward is in online_softmax_backward_cuda.h. The shapes
 * are in online_softmax.h, and the pointers are the device's. */
#include "cuda_thread.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "cublas.h"
#endif
#include "kernel.h"
#include "online_softmax.h"
#include "philox.h"

#include "online_softmax_backward_cuda.h"

/* What one query row knows of the keys it has seen: every lane of its warp knows m and l; o is shared by columns. */
typedef struct {
    float m;  /* the largest score; -inf before the first */
    float l;  /* the sum of exp(score - m) */
    float *o; /* (HS) the sum of exp(score - m) * value, not yet divided by l */
} Row;

__device__ static Row empty_row_of_warp(float *o, int head_size)
{
    for (int i = threadIdx.x % WARP; i < head_size; i += WARP)
        o[i] = 0;
    return {-INFINITY, 0, o};
}

/* Shows the keys from <= t2 < to, 32 at most, to row (b, h, t): a key to each lane. weights has room for 32. */
__device__ static void add_32_keys(Row *row, float *weights, const float *q, const float *k, const float *v,
                                   const AttentionShape *s, int b, int h, int t, int from, int to)
{
    int HS = s->head_size, lane = threadIdx.x % WARP, t2 = from + lane;
    float score = -INFINITY;
    if (t2 < to && attends(s, b, h, t, t2))
        score =
            s->scale * dot(q + query_row(s, b, h, t), k + key_row(s, b, h, t2), HS) + bias_at(s, b, h, t, t2);
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
                o += weights[j] * v[key_row(s, b, h, from + j) + i];
        row->o[i] = o;
    }
    __syncwarp(); /* the weights may be used again */
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
            add_32_keys(&row, shared + warp * WARP, q, k, v, s, b, h, t, from, smaller(from + WARP, end));
        float one_over_l = row.l == 0 ? 0 : 1 / row.l;
        for (int column = lane; column < HS; column += WARP)
            row.o[column] *= one_over_l;
        if (lane == 0)
            lse[i] = row.m + logf(row.l);
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
            add_32_keys(&row, shared + warp * WARP, q, k, v, s, b, h, t, from, smaller(from + WARP, end));
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
        float one_over_l = row.l == 0 ? 0 : 1 / row.l;
        for (int column = lane; column < HS; column += WARP)
            row.o[column] *= one_over_l;
        if (lane == 0)
            lse[i] = row.m + logf(row.l);
    }
}

/* ---- With the matrix: three steps, the first and the last by cuBLAS (on the stand-in by the CPU's product). ---- */

#if defined(SIMT) || defined(HAVE_CUBLAS)
/* What masks and bias do to the scores of one row, then softmax, in place; returns its lse. One warp. */
__device__ static float softmax_of_allowed(float *row, const AttentionShape *s, int b, int h, int t)
{
    int lane = threadIdx.x % WARP, end = keys_end(s, b, t);
    float m = -INFINITY, l = 0;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        bool allowed = t2 < end && attends(s, b, h, t, t2);
        row[t2] = allowed ? row[t2] + bias_at(s, b, h, t, t2) : -INFINITY;
        m = larger(m, row[t2]);
    }
    m = warp_largest(m);
    float subtract = m == -INFINITY ? 0 : m; /* nothing is allowed: -inf - -inf would be NaN */
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP) {
        row[t2] = expf(row[t2] - subtract);
        l += row[t2];
    }
    l = warp_sum(l);
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int t2 = lane; t2 < s->key_tokens; t2 += WARP)
        row[t2] *= one_over_l;
    return m + logf(l);
}

/* weights hold the scores; softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, float *lse, AttentionShape shape,
                                      size_t rows)
{
    const AttentionShape *s = &shape;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows; i += (size_t)gridDim.x * warps) {
        int t = (int)(i % s->tokens), h = (int)(i / s->tokens % s->heads),
            b = (int)(i / s->tokens / s->heads);
        float *row = weights + i * s->key_tokens;
        float row_lse = softmax_of_allowed(row, s, b, h, t);
        if (lane == 0)
            lse[i] = row_lse;
        for (int t2 = lane; s->dropout > 0 && t2 < s->key_tokens; t2 += WARP) {
            softmax[i * s->key_tokens + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(s->dropout_seed, i, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

/* dS = P * (dP - delta) = D * dD - P * delta: d_scores holds dD. */
__global__ static void d_scores_kernel(float *d_scores, const float *weights, const float *softmax,
                                       const float *dout, const float *out, int TK, int HS, size_t rows)
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        float delta = 0;
        for (int i = lane; i < HS; i += WARP)
            delta += dout[row * HS + i] * out[row * HS + i];
        delta = warp_sum(delta);
        for (size_t i = row * TK + lane; i < (row + 1) * TK; i += WARP)
            d_scores[i] = weights[i] * d_scores[i] - softmax[i] * delta;
    }
}

struct StoredScore {
    const float *d_scores;
    const AttentionShape *s;

    __device__ float operator()(int b, int h, int t, int t2) const
    {
        return d_scores[lse_index(s, b, h, t) * s->key_tokens + t2];
    }
};

/* dbias from dS. */
__global__ static void sum_scores_kernel(float *dbias, const float *d_scores, AttentionShape shape,
                                         Broadcast axes)
{
    sum_broadcast(dbias, &shape, axes, StoredScore{d_scores, &shape});
}
#endif

/* ---- The table ---- */

static void forward_online(const Tensors *t, const AttentionShape *s)
{
    size_t rows = lse_count(s);
    LAUNCH(online_kernel, blocks_for(rows), MOST_WARPS * WARP, MOST_WARPS * WARP * sizeof(float), t->out,
           t->lse, t->q, t->k, t->v, *s, rows);
}

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

#if defined(SIMT) || defined(HAVE_CUBLAS)
static int softmax_if_dropout(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return s->dropout > 0 ? 1 : 0;
}

static int d_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return 1;
}

static void forward_materialised(const Tensors *t, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK,
           rows = lse_count(s);

    /* 1. scores = scale Q K^T, 2. weights = softmax(scores + bias), 3. out = weights V */
    device_matmul_strided_batch('N', 'T', T, TK, HS, s->scale, t->q, HS, q_head, t->k, HS, k_head, 0,
                                t->weights, TK, weights_head, heads);
    LAUNCH(softmax_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, t->weights, t->workspace[0], t->lse, *s,
           rows);
    device_matmul_strided_batch('N', 'N', T, HS, TK, 1, t->weights, TK, weights_head, t->v, HS, k_head, 0,
                                t->out, HS, q_head, heads);
}

static void backward_materialised(const Tensors *t, const AttentionShape *s)
{
    int T = s->tokens, TK = s->key_tokens, HS = s->head_size, heads = s->batch * s->heads;
    size_t q_head = (size_t)T * HS, k_head = (size_t)TK * HS, weights_head = (size_t)T * TK,
           rows = lse_count(s);
    float *dS = t->backward_workspace[0];
    const float *softmax = s->dropout > 0 ? t->workspace[0] : t->weights;

    /* 3. dV = D^T dO, and dD = dO V^T, which waits in dS */
    device_matmul_strided_batch('T', 'N', TK, HS, T, 1, t->weights, TK, weights_head, t->dout, HS, q_head, 0,
                                t->dv, HS, k_head, heads);
    device_matmul_strided_batch('N', 'T', T, TK, HS, 1, t->dout, HS, q_head, t->v, HS, k_head, 0, dS, TK,
                                weights_head, heads);
    /* 2. softmax and dropout */
    LAUNCH(d_scores_kernel, blocks_for(rows), MOST_WARPS * WARP, 0, dS, t->weights, softmax, t->dout, t->out,
           TK, HS, rows);
    /* 1. dQ = scale dS K, dK = scale dS^T Q, dbias = dS */
    device_matmul_strided_batch('N', 'N', T, HS, TK, s->scale, dS, TK, weights_head, t->k, HS, k_head, 0,
                                t->dq, HS, q_head, heads);
    device_matmul_strided_batch('T', 'N', TK, HS, T, s->scale, dS, TK, weights_head, t->q, HS, q_head, 0,
                                t->dk, HS, k_head, heads);
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(sum_scores_kernel, blocks_for(axes.elements), MOST_WARPS * WARP, 0, t->dbias, dS, *s, axes);
    }
}
#endif

DEVICE_TABLE(online_softmax) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "materialised",
     .what = "the T x TK matrix in memory, softmax over its rows, a warp to a row",
     .takes = TAKES_QKV,
     .forward = forward_materialised,
     .backward = backward_materialised,
     .backward_workspace = d_scores,
     .workspace = softmax_if_dropout,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_POSITION},
#endif
    {.name = "online",
     .what = "one pass over the keys, a warp to a row, 32 keys at a time",
     .takes = TAKES_QKV,
     .forward = forward_online,
     .backward = backward_recomputed,
     .backward_workspace = workspace_recomputed,
     .dropout = DROPOUT_POSITION},
    {.name = "split-keys",
     .what = "the same, the keys of a row cut into parts that are merged: for few rows and many keys",
     .takes = TAKES_QKV,
     .forward = forward_split_keys,
     .backward = backward_recomputed,
     .backward_workspace = workspace_recomputed,
     .workspace = workspace_split_keys,
     .dropout = DROPOUT_POSITION},
    {},
};
