/* The twin of flash_tiled.c's attention_tiled on a GPU: the same functions, the same loops. A block of threads walks one
 * tile of rows along the keys; within it each row belongs to one warp. Its backward is chapter 6's. The shapes are in
 * flash_tiled.h, and the pointers are the device's. */
#include "cuda_thread.h"
#include "flash_tiled_backward.h"
#include "kernel.h"
#include "philox.h"

#include "../06_online_softmax/online_softmax_backward_cuda.h"

#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "flash_modules_cuda.h"
#endif

enum { SHARED_FLOATS = 12288 }; /* 48 KiB: what every GPU gives a block without being asked */

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

DEVICE_TABLE(flash_tiled) = {
    {.name = "tiled",
     .what = "flash attention in tiles: a warp to a row, keys and values in shared memory",
     .takes = TAKES_QKV,
     .forward = forward_tiled,
     .backward = backward_recomputed,
     .backward_workspace = workspace_recomputed,
     .workspace = workspace_tiled,
     .dropout = DROPOUT_POSITION,
     .tiled = true},
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "sdpa",
     .forward = forward_sdpa,
     .backward = backward_sdpa,
     .backward_workspace = backward_workspace_sdpa,
     .workspace = workspace_sdpa,
     .dropout = DROPOUT_POSITION},
    {.name = "sdpa-mask",
     .forward = forward_sdpa,
     .backward = backward_sdpa,
     .backward_workspace = backward_workspace_sdpa,
     .workspace = workspace_sdpa,
     .dropout = DROPOUT_POSITION},
    {.name = "torch-mha-noweights",
     .forward = forward_torch_mha,
     .backward = backward_torch_mha,
     .backward_workspace = backward_workspace_torch_mha,
     .workspace = workspace_torch_mha,
     .dropout = DROPOUT_POSITION},
#endif
    {},
};
