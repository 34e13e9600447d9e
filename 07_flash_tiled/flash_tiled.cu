/* The twins of flash_tiled.c's attention_tiled and its backward on a GPU: the same functions, the same loops. A block of
 * threads walks one tile of rows along the keys; within it each row belongs to one warp. The shapes are in flash_tiled.h,
 * and the pointers are the device's. */
#include "cuda_thread.h"
#include "flash_tiled_backward.h"
#include "kernel.h"
#include "philox.h"

enum {
    WARP = 32,
    MOST_WARPS = 8,
    SHARED_FLOATS = 12288, /* 48 KiB: what every GPU gives a block without being asked */
    MOST_BLOCKS = 1 << 20, /* a block takes one tile after the other where there are more */
};

HOST_DEVICE static int smaller(int a, int b)
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

/* Some keys or values, `stride` floats from one to the next: in shared memory, or where the tensor lies. */
typedef struct {
    const float *row;
    int stride;
} Tile;

/* How a block divides its shared memory: a tile of k, a tile of v, a row of scores for each warp. Rows of k lie an odd
 * number of floats apart, so that the 32 lanes, each with a key of its own, read from 32 banks. A head too wide for one
 * key to fit is read where it lies. */
typedef struct {
    int Br, Bc, warps, row_tiles;
    int k_stride, v_stride; /* 0: not in shared memory */
    size_t tiles, bytes;
} Plan;

static Plan plan_tiles(const AttentionShape *s)
{
    Plan plan;
    int HS = s->head_size, k_stride = HS | 1;
    plan.Br = smaller(s->tile_rows, s->tokens);
    plan.warps = smaller(MOST_WARPS, plan.Br);
    plan.row_tiles = (s->tokens + plan.Br - 1) / plan.Br;
    plan.tiles = (size_t)s->batch * s->heads * plan.row_tiles;

    bool fits = k_stride + HS + plan.warps <= SHARED_FLOATS;
    plan.k_stride = fits ? k_stride : 0;
    plan.v_stride = fits ? HS : 0;
    int per_key = plan.k_stride + plan.v_stride + plan.warps;
    plan.Bc = smaller(smaller(s->tile_columns, s->key_tokens), SHARED_FLOATS / per_key);
    plan.bytes = (size_t)per_key * plan.Bc * sizeof(float);
    return plan;
}

/* The block copies `count` rows of HS numbers, which lie behind one another, to rows `stride` apart. */
__device__ static void copy_rows(float *to, int stride, const float *from, int count, int HS)
{
    for (int i = threadIdx.x; i < count * HS; i += blockDim.x)
        to[i / HS * stride + i % HS] = from[i];
}

/* Row (b,h,t) meets the keys from <= t2 < to: one warp. scores has room for them. */
__device__ static void meet_keys(float *out, float *m, float *l, float *scores, const float *q, Tile k,
                                 Tile v, const AttentionShape *s, int b, int h, int t, int from, int to)
{
    int HS = s->head_size, lane = threadIdx.x % WARP;
    size_t row = lse_index(s, b, h, t);
    const float *q_bht = q + query_row(s, b, h, t);
    float *out_bht = out + query_row(s, b, h, t);

    /* The scores of this row of the tile, a key to each lane, and the largest. */
    float m_old = m[row], l_old = l[row], m_new = m_old;
    for (int t2 = from + lane; t2 < to; t2 += WARP) {
        float score = -INFINITY;
        if (attends(s, b, h, t, t2))
            score =
                s->scale * dot(q_bht, k.row + (size_t)(t2 - from) * k.stride, HS) + bias_at(s, b, h, t, t2);
        scores[t2 - from] = score;
        m_new = larger(m_new, score);
    }
    m_new = warp_largest(m_new);
    if (m_new == -INFINITY)
        return; /* nothing allowed yet, and -inf - -inf would be NaN */

    /* What came before was measured from m; one factor a tile, not one a key, measures it from m_new. */
    float mend = expf(m_old - m_new), sum = 0;
    for (int t2 = from + lane; t2 < to; t2 += WARP) {
        if (scores[t2 - from] == -INFINITY)
            continue;
        float p = expf(scores[t2 - from] - m_new);
        sum += p;
        /* Dropout zeroes weights after the softmax: the sum counts every key. */
        if (s->dropout > 0)
            p *= dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
        scores[t2 - from] = p;
    }
    sum = warp_sum(sum);
    __syncwarp(); /* the other lanes' weights are there */

    /* The values, a column to each lane. What is still -inf is a forbidden key. */
    for (int i = lane; i < HS; i += WARP) {
        float value = mend * out_bht[i];
        for (int t2 = from; t2 < to; t2++)
            if (scores[t2 - from] != -INFINITY)
                value += scores[t2 - from] * v.row[(size_t)(t2 - from) * v.stride + i];
        out_bht[i] = value;
    }
    if (lane == 0) {
        m[row] = m_new;
        l[row] = mend * l_old + sum;
    }
    __syncwarp(); /* m and l are written, scores may be used again */
}

__global__ static void tiled_kernel(float *out, float *lse, float *m, float *l, const float *q,
                                    const float *k, const float *v, AttentionShape shape, Plan plan)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *k_tile = shared, *v_tile = k_tile + plan.Bc * plan.k_stride;
    float *scores = v_tile + plan.Bc * plan.v_stride + warp * plan.Bc;

    for (size_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        size_t bh = tile / plan.row_tiles;
        int b = (int)(bh / s->heads), h = (int)(bh % s->heads);
        int first = (int)(tile % plan.row_tiles) * plan.Br, past = smaller(first + plan.Br, s->tokens);

        for (int t = first + warp; t < past; t += plan.warps) {
            for (int i = lane; i < HS; i += WARP)
                out[query_row(s, b, h, t) + i] = 0;
            if (lane == 0) {
                m[lse_index(s, b, h, t)] = -INFINITY;
                l[lse_index(s, b, h, t)] = 0;
            }
        }
        __syncwarp();

        /* No row of the tile sees further than its last. A tile of k and v is fetched once for all of its rows. */
        int end = keys_end(s, b, past - 1);
        for (int from = 0; from < end; from += plan.Bc) {
            int to = smaller(from + plan.Bc, end);
            Tile keys = {k + key_row(s, b, h, from), HS}, values = {v + key_row(s, b, h, from), HS};
            if (plan.k_stride) {
                __syncthreads(); /* every warp is done with the tile before */
                copy_rows(k_tile, plan.k_stride, keys.row, to - from, HS);
                copy_rows(v_tile, plan.v_stride, values.row, to - from, HS);
                __syncthreads();
                keys = {k_tile, plan.k_stride};
                values = {v_tile, plan.v_stride};
            }
            for (int t = first + warp; t < past; t += plan.warps)
                meet_keys(out, m, l, scores, q, keys, values, s, b, h, t, from, to);
        }

        for (int t = first + warp; t < past; t += plan.warps) {
            size_t row = lse_index(s, b, h, t);
            float one_over_l = l[row] == 0 ? 0 : 1 / l[row];
            for (int i = lane; i < HS; i += WARP)
                out[query_row(s, b, h, t) + i] *= one_over_l;
            if (lane == 0)
                lse[row] = m[row] + logf(l[row]);
        }
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

/* ---- The table ---- */

static int workspace_tiled(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = lse_count(s);
    return 2;
}

static void forward_tiled(const Tensors *t, const AttentionShape *s)
{
    Plan plan = plan_tiles(s);
    int blocks = plan.tiles < MOST_BLOCKS ? (int)plan.tiles : MOST_BLOCKS;
    LAUNCH(tiled_kernel, blocks, plan.warps * WARP, plan.bytes, t->out, t->lse, t->workspace[0],
           t->workspace[1], t->q, t->k, t->v, *s, plan);
}

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

static void backward_tiled(const Tensors *t, const AttentionShape *s)
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

DEVICE_TABLE(flash_tiled) = {
    {.name = "tiled",
     .what = "flash attention in tiles: a warp to a row, keys and values in shared memory",
     .takes = TAKES_QKV,
     .forward = forward_tiled,
     .backward = backward_tiled,
     .backward_workspace = delta,
     .workspace = workspace_tiled,
     .dropout = DROPOUT_POSITION,
     .tiled = true},
    {},
};
