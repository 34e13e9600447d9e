/* The twins of online_softmax.c's attention_online and its backward on a GPU: a warp to each row. The shapes are in
 * online_softmax.h, and the pointers are the device's. */
#include "cuda_thread.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "cublas.h"
#endif
#include "kernel.h"
#include "online_softmax.h"
#include "philox.h"

enum {
    WARP = 32,
    MOST_WARPS = 8,
    MOST_BLOCKS = 1 << 20, /* a warp takes one row after the other where there are more */
};

__device__ static int smaller(int a, int b)
{
    return a < b ? a : b;
}

__device__ static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* The larger of two; a NaN wins, and stays. */
__device__ static float larger(float a, float b)
{
    return b <= a || isnan(a) ? a : b;
}

/* Over the warp's lanes, in a fixed order; every lane gets it. */
__device__ static float warp_largest(float value)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, apart));
    return value;
}

__device__ static float warp_sum(float value)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
    return value;
}

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

/* ---- Backward: what is wanted of P is computed again, once from the side of the queries and once from the side of the
 * keys. ---- */

typedef struct {
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS */
} Pair;

/* One number of the matrix and its gradient, from lse and delta. False for a pair that is forbidden. */
__device__ static bool recompute(Pair *pair, const AttentionBackward *g, const float *delta,
                                 const AttentionShape *s, int b, int h, int t, int t2)
{
    if (!attends(s, b, h, t, t2))
        return false;
    size_t row = lse_index(s, b, h, t), q_bht = query_row(s, b, h, t), k_bht2 = key_row(s, b, h, t2);
    float score = s->scale * dot(g->q + q_bht, g->k + k_bht2, s->head_size) + bias_at(s, b, h, t, t2);
    if (score == -INFINITY) /* forbidden by the bias */
        return false;

    float p = expf(score - g->lse[row]); /* a row that sees a key has an lse: no -inf - -inf here */
    float kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
    float d_p = kept * dot(g->dout + q_bht, g->v + k_bht2, s->head_size);
    pair->weight = kept * p;
    pair->d_score = p * (d_p - delta[row]);
    return true;
}

/* What each of a warp's 32 lanes found, for the others to read. */
typedef struct {
    float weight[WARP], d_score[WARP];
    bool allowed[WARP];
} Pairs;

/* Every lane recomputes a pair (t, t2) of its own, if it is inside the matrix. */
__device__ static void recompute_32(Pairs *pairs, const AttentionBackward *g, const float *delta,
                                    const AttentionShape *s, int b, int h, int t, int t2, bool inside)
{
    int lane = threadIdx.x % WARP;
    Pair pair = {0, 0};
    __syncwarp(); /* the pairs before have been read */
    pairs->allowed[lane] = inside && recompute(&pair, g, delta, s, b, h, t, t2);
    pairs->weight[lane] = pair.weight;
    pairs->d_score[lane] = pair.d_score;
    __syncwarp();
}

/* Queries outside: a warp to each row, which meets 32 keys at a time. */
__global__ static void query_kernel(AttentionBackward gradients, float *delta, AttentionShape shape,
                                    size_t rows)
{
    DYNAMIC_SHARED(Pairs, shared_pairs);
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    Pairs *pairs = &shared_pairs[warp];

    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        int t = (int)(row % s->tokens), h = (int)(row / s->tokens % s->heads);
        int b = (int)(row / s->tokens / s->heads);
        const float *dout_bht = g->dout + row * HS, *out_bht = g->out + row * HS;
        float *dq_bht = g->dq + row * HS;
        float sum = 0;
        for (int i = lane; i < HS; i += WARP) {
            sum += dout_bht[i] * out_bht[i];
            dq_bht[i] = 0;
        }
        sum = warp_sum(sum);
        if (lane == 0)
            delta[row] = sum;
        __syncwarp();

        int end = keys_end(s, b, t);
        for (int from = 0; from < end; from += WARP) {
            recompute_32(pairs, g, delta, s, b, h, t, from + lane, from + lane < end);
            for (int i = lane; i < HS; i += WARP) {
                float dq = dq_bht[i];
                for (int j = 0; j < WARP; j++)
                    if (pairs->allowed[j])
                        dq += s->scale * pairs->d_score[j] * g->k[key_row(s, b, h, from + j) + i];
                dq_bht[i] = dq;
            }
        }
    }
}

/* Keys outside: a warp to each key, which meets 32 queries at a time. */
__global__ static void key_kernel(AttentionBackward gradients, const float *delta, AttentionShape shape,
                                  size_t rows)
{
    DYNAMIC_SHARED(Pairs, shared_pairs);
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    Pairs *pairs = &shared_pairs[warp];

    for (size_t row = (size_t)blockIdx.x * warps + warp; row < rows; row += (size_t)gridDim.x * warps) {
        int t2 = (int)(row % s->key_tokens), h = (int)(row / s->key_tokens % s->heads);
        int b = (int)(row / s->key_tokens / s->heads);
        float *dk_bht2 = g->dk + row * HS, *dv_bht2 = g->dv + row * HS;
        for (int i = lane; i < HS; i += WARP)
            dk_bht2[i] = dv_bht2[i] = 0;

        for (int from = 0; from < s->tokens; from += WARP) {
            if (keys_end(s, b, smaller(from + WARP, s->tokens) - 1) <= t2)
                continue; /* none of these rows sees as far as this key */
            recompute_32(pairs, g, delta, s, b, h, from + lane, t2, from + lane < s->tokens);
            for (int i = lane; i < HS; i += WARP) {
                float dk = dk_bht2[i], dv = dv_bht2[i];
                for (int j = 0; j < WARP; j++)
                    if (pairs->allowed[j]) {
                        size_t q_bht = query_row(s, b, h, from + j);
                        dk += s->scale * pairs->d_score[j] * g->q[q_bht + i];
                        dv += pairs->weight[j] * g->dout[q_bht + i];
                    }
                dk_bht2[i] = dk;
                dv_bht2[i] = dv;
            }
        }
    }
}

/* How the bias was broadcast: along each axis it holds `own` numbers, each shared by `shared` pairs. */
typedef struct {
    int own[4], shared[4];
    size_t elements;
} Broadcast;

static Broadcast broadcast_of(const AttentionShape *s)
{
    const int size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    Broadcast axes;
    axes.elements = 1;
    for (int i = 0; i < 4; i++) {
        axes.own[i] = s->bias_stride[i] ? size[i] : 1;
        axes.shared[i] = s->bias_stride[i] ? 1 : size[i];
        axes.elements *= axes.own[i];
    }
    return axes;
}

/* A number of the bias was added to one score, or to many where it was broadcast: so are the gradients. A
 * thread to each number; a warp where it is shared along the keys, whose lanes divide them always in the same way. */
__global__ static void bias_kernel(AttentionBackward gradients, const float *delta, AttentionShape shape,
                                   Broadcast axes)
{
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    const size_t *stride = s->bias_stride;
    int lanes = axes.shared[3] > 1 ? WARP : 1, lane = threadIdx.x % lanes;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;

    for (size_t i = thread / lanes; i < axes.elements; i += threads / lanes) {
        int k0 = (int)(i % axes.own[3]), t0 = (int)(i / axes.own[3] % axes.own[2]);
        int h0 = (int)(i / axes.own[3] / axes.own[2] % axes.own[1]);
        int b0 = (int)(i / axes.own[3] / axes.own[2] / axes.own[1]);
        float sum = 0;
        for (int b = b0; b < b0 + axes.shared[0]; b++)
            for (int h = h0; h < h0 + axes.shared[1]; h++)
                for (int t = t0; t < t0 + axes.shared[2]; t++) {
                    float row_sum = 0; /* a sum of sums loses less to rounding than one long one */
                    for (int t2 = k0 + lane; t2 < k0 + axes.shared[3]; t2 += lanes) {
                        Pair pair;
                        if (recompute(&pair, g, delta, s, b, h, t, t2))
                            row_sum += pair.d_score;
                    }
                    sum += row_sum;
                }
        if (lanes > 1)
            sum = warp_sum(sum);
        if (lane == 0)
            g->dbias[b0 * stride[0] + h0 * stride[1] + t0 * stride[2] + k0 * stride[3]] = sum;
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

/* dbias from dS: a thread to each number of the bias, a warp where it is shared along the keys. */
__global__ static void sum_scores_kernel(float *dbias, const float *d_scores, AttentionShape shape,
                                         Broadcast axes)
{
    const AttentionShape *s = &shape;
    const size_t *stride = s->bias_stride;
    int lanes = axes.shared[3] > 1 ? WARP : 1, lane = threadIdx.x % lanes;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;

    for (size_t i = thread / lanes; i < axes.elements; i += threads / lanes) {
        int k0 = (int)(i % axes.own[3]), t0 = (int)(i / axes.own[3] % axes.own[2]);
        int h0 = (int)(i / axes.own[3] / axes.own[2] % axes.own[1]);
        int b0 = (int)(i / axes.own[3] / axes.own[2] / axes.own[1]);
        float sum = 0;
        for (int b = b0; b < b0 + axes.shared[0]; b++)
            for (int h = h0; h < h0 + axes.shared[1]; h++)
                for (int t = t0; t < t0 + axes.shared[2]; t++) {
                    const float *row = d_scores + lse_index(s, b, h, t) * s->key_tokens;
                    float row_sum = 0;
                    for (int t2 = k0 + lane; t2 < k0 + axes.shared[3]; t2 += lanes)
                        row_sum += row[t2];
                    sum += row_sum;
                }
        if (lanes > 1)
            sum = warp_sum(sum);
        if (lane == 0)
            dbias[b0 * stride[0] + h0 * stride[1] + t0 * stride[2] + k0 * stride[3]] = sum;
    }
}
#endif

/* ---- The table ---- */

static int delta(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

/* Blocks of MOST_WARPS warps for `tasks` of a warp each. */
static int blocks_for(size_t tasks)
{
    size_t blocks = (tasks + MOST_WARPS - 1) / MOST_WARPS;
    return blocks < MOST_BLOCKS ? (int)blocks : MOST_BLOCKS;
}

static void forward_online(const Tensors *t, const AttentionShape *s)
{
    size_t rows = lse_count(s);
    LAUNCH(online_kernel, blocks_for(rows), MOST_WARPS * WARP, MOST_WARPS * WARP * sizeof(float), t->out,
           t->lse, t->q, t->k, t->v, *s, rows);
}

static void backward_online(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
    float *delta_of_rows = t->backward_workspace[0];
    size_t queries = lse_count(s), keys = (size_t)s->batch * s->heads * s->key_tokens;
    int threads = MOST_WARPS * WARP;
    LAUNCH(query_kernel, blocks_for(queries), threads, MOST_WARPS * sizeof(Pairs), g, delta_of_rows, *s,
           queries);
    LAUNCH(key_kernel, blocks_for(keys), threads, MOST_WARPS * sizeof(Pairs), g, delta_of_rows, *s, keys);
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(bias_kernel, blocks_for(axes.elements), threads, 0, g, delta_of_rows, *s, axes);
    }
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
     .backward = backward_online,
     .backward_workspace = delta,
     .dropout = DROPOUT_POSITION},
    {},
};
