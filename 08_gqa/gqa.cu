/* The twins of gqa.c and gqa_backward.c on a GPU, and one for few queries and many keys, as when a model writes token by
 * token. A warp takes a row; what a block holds in shared memory serves all heads of a group. The shapes are in gqa.h, and
 * the pointers are the device's. */
#include "cuda_warp.h"
#include "kernel.h"
#include "philox.h"

#include "../07_flash_tiled/flash_tiled_backward.h"

#include "../06_online_softmax/online_softmax_backward_cuda.h"
#include "../06_online_softmax/online_softmax_cuda.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "llama_cuda.h"
#endif

enum {
    SHARED_FLOATS = 12288, /* 48 KiB: what every GPU gives a block without being asked */
    ROWS = 32,             /* of a block's tile, unless a group alone has more */
};

/* o (HS) = 0: one warp. */
__device__ static void clear(float *o, int HS)
{
    for (int i = threadIdx.x % WARP; i < HS; i += WARP)
        o[i] = 0;
}

/* ---- With copies: repeat, then head by head ---- */

/* repeated (B,NH,TK,HS) = each head of kv `group` times in a row: a thread to each number. */
__global__ static void repeat_kv_kernel(float *repeated, const float *kv, int group, size_t head,
                                        size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x)
        repeated[i] = kv[i / head / group * head + i % head];
}

static size_t copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * s->key_tokens * s->head_size;
}

/* The shape of attention over the copies: as many key/value heads as query heads. */
static AttentionShape with_copies(const AttentionShape *s)
{
    AttentionShape repeated = *s;
    repeated.kv_heads = s->heads;
    return repeated;
}

static void forward_repeat_kv(const Tensors *t, const AttentionShape *s)
{
    float *const *repeated = t->workspace;
    const float *const original[2] = {t->k, t->v};
    size_t head = (size_t)s->key_tokens * s->head_size, rows = lse_count(s);
    for (int i = 0; i < 2; i++)
        LAUNCH(repeat_kv_kernel, blocks_for(copies(s) / WARP + 1), MOST_WARPS * WARP, 0, repeated[i],
               original[i], s->heads / s->kv_heads, head, copies(s));
    LAUNCH(online_kernel, blocks_for(rows), MOST_WARPS * WARP, MOST_WARPS * WARP * sizeof(float), t->out,
           t->lse, t->q, repeated[0], repeated[1], with_copies(s), rows);
}

/* d_kv = the sum over each head's copies, in their order: a thread to each number. */
__global__ static void repeat_kv_backward_kernel(float *d_kv, const float *d_repeated, int group, size_t head,
                                                 size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        float sum = 0;
        for (int g = 0; g < group; g++)
            sum += d_repeated[(i / head * group + g) * head + i % head];
        d_kv[i] = sum;
    }
}

/* Chapter 6's backward over the copies, then the copies' gradients added up. */
static void backward_repeat_kv(const Tensors *t, const AttentionShape *s)
{
    Tensors over_copies = *t;
    AttentionShape repeated = with_copies(s);
    over_copies.k = t->workspace[0];
    over_copies.v = t->workspace[1];
    over_copies.dk = t->backward_workspace[1];
    over_copies.dv = t->backward_workspace[2];
    backward_recomputed(&over_copies, &repeated);
    float *const gradient[2] = {t->dk, t->dv};
    const float *const of_copies[2] = {over_copies.dk, over_copies.dv};
    size_t head = (size_t)s->key_tokens * s->head_size;
    for (int i = 0; i < 2; i++)
        LAUNCH(repeat_kv_backward_kernel, blocks_for(key_count(s) / WARP + 1), MOST_WARPS * WARP, 0,
               gradient[i], of_copies[i], s->heads / s->kv_heads, head, key_count(s));
}

/* ---- Without: a block has some tokens of all heads of a group, and each key and value that it fetches serves all of
 * them. ---- */

/* How a block divides its shared memory: Bc keys and values, then 32 weights for each warp, then m and l of its rows. Keys
 * lie an odd number of floats apart, so that the 32 lanes, each with a key of its own, read from 32 banks. */
typedef struct {
    int group, tokens, rows; /* rows = group * tokens */
    int Bc, k_stride;        /* k_stride 0: a head too wide for shared memory is read where it lies */
    int token_tiles;
    size_t tiles, bytes;
} Plan;

static Plan plan_tiles(const AttentionShape *s)
{
    Plan plan;
    int HS = s->head_size;
    plan.group = s->heads / s->kv_heads;
    plan.tokens = smaller(plan.group < ROWS ? ROWS / plan.group : 1, s->tokens);
    plan.rows = plan.group * plan.tokens;
    plan.token_tiles = (s->tokens + plan.tokens - 1) / plan.tokens;
    plan.tiles = (size_t)s->batch * s->kv_heads * plan.token_tiles;

    int rest = MOST_WARPS * WARP + 2 * plan.rows, per_key = (HS | 1) + HS;
    bool fits = rest + per_key <= SHARED_FLOATS;
    plan.k_stride = fits ? HS | 1 : 0;
    plan.Bc = fits ? smaller(WARP, (SHARED_FLOATS - rest) / per_key) : WARP;
    plan.bytes = sizeof(float) * (rest + (fits ? (size_t)plan.Bc * per_key : 0));
    return plan;
}

/* The block copies `count` rows of HS numbers, which lie behind one another, to rows `stride` apart. */
__device__ static void copy_rows(float *to, int stride, const float *from, int count, int HS)
{
    for (int i = threadIdx.x; i < count * HS; i += blockDim.x)
        to[i / HS * stride + i % HS] = from[i];
}

__global__ static void grouped_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                                      AttentionShape shape, Plan plan)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *weights = shared + warp * WARP, *m = shared + MOST_WARPS * WARP, *l = m + plan.rows;
    float *k_tile = l + plan.rows, *v_tile = k_tile + plan.Bc * plan.k_stride;

    for (size_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        int kv_head = (int)(tile / plan.token_tiles % s->kv_heads);
        int b = (int)(tile / plan.token_tiles / s->kv_heads), first_head = kv_head * plan.group;
        int first = (int)(tile % plan.token_tiles) * plan.tokens,
            past = smaller(first + plan.tokens, s->tokens);
        int rows =
            (past - first) * plan.group; /* row r: head first_head + r % group, token first + r / group */

        for (int r = warp; r < rows; r += MOST_WARPS) {
            clear(out + query_row(s, b, first_head + r % plan.group, first + r / plan.group), HS);
            if (lane == 0) {
                m[r] = -INFINITY;
                l[r] = 0;
            }
        }
        int end = keys_end(s, b, past - 1); /* no row sees further than the last token's */
        for (int from = 0; from < end; from += plan.Bc) {
            int to = smaller(from + plan.Bc, end);
            Tile keys = where_they_lie(k, s, b, first_head, from),
                 values = where_they_lie(v, s, b, first_head, from);
            if (plan.k_stride) {
                __syncthreads(); /* every warp is done with the tile before */
                copy_rows(k_tile, plan.k_stride, keys.row, to - from, HS);
                copy_rows(v_tile, HS, values.row, to - from, HS);
                __syncthreads();
                keys = {k_tile, plan.k_stride};
                values = {v_tile, HS};
            }
            for (int r = warp; r < rows; r += MOST_WARPS) {
                int h = first_head + r % plan.group, t = first + r / plan.group;
                __syncwarp(); /* m and l are there */
                Row row = {m[r], l[r], out + query_row(s, b, h, t)};
                add_32_keys(&row, weights, q, keys, values, s, b, h, t, from, to);
                if (lane == 0) {
                    m[r] = row.m;
                    l[r] = row.l;
                }
            }
        }
        for (int r = warp; r < rows; r += MOST_WARPS) {
            int h = first_head + r % plan.group, t = first + r / plan.group;
            __syncwarp();
            Row row = {m[r], l[r], out + query_row(s, b, h, t)};
            float row_lse = finish_row(&row, HS);
            if (lane == 0)
                lse[lse_index(s, b, h, t)] = row_lse;
        }
    }
}

static void forward_grouped(const Tensors *t, const AttentionShape *s)
{
    Plan plan = plan_tiles(s);
    LAUNCH(grouped_kernel, plan.tiles < MOST_BLOCKS ? (int)plan.tiles : MOST_BLOCKS, MOST_WARPS * WARP,
           plan.bytes, t->out, t->lse, t->q, t->k, t->v, *s, plan);
}

/* Keys outside: a warp to each key, which meets the queries of all heads of its group, 32 at a time. */
__global__ static void grouped_key_kernel(AttentionBackward gradients, const float *delta,
                                          AttentionShape shape, size_t keys)
{
    DYNAMIC_SHARED(Pairs, shared_pairs);
    const AttentionBackward *g = &gradients;
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    int group = s->heads / s->kv_heads;
    Pairs *pairs = &shared_pairs[warp];

    for (size_t key = (size_t)blockIdx.x * warps + warp; key < keys; key += (size_t)gridDim.x * warps) {
        int t2 = (int)(key % s->key_tokens), kv_head = (int)(key / s->key_tokens % s->kv_heads);
        int b = (int)(key / s->key_tokens / s->kv_heads);
        float *dk_bt2 = g->dk + key * HS, *dv_bt2 = g->dv + key * HS;
        clear(dk_bt2, HS);
        clear(dv_bt2, HS);
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int from = 0; from < s->tokens; from += WARP) {
                if (keys_end(s, b, smaller(from + WARP, s->tokens) - 1) <= t2)
                    continue; /* none of these rows sees as far as this key */
                recompute_32(pairs, g, delta, s, b, h, from + lane, t2, from + lane < s->tokens);
                for (int i = lane; i < HS; i += WARP) {
                    float dk = dk_bt2[i], dv = dv_bt2[i];
                    for (int j = 0; j < WARP; j++)
                        if (pairs->allowed[j]) {
                            size_t q_bht = query_row(s, b, h, from + j);
                            dk += s->scale * pairs->d_score[j] * g->q[q_bht + i];
                            dv += pairs->weight[j] * g->dout[q_bht + i];
                        }
                    dk_bt2[i] = dk;
                    dv_bt2[i] = dv;
                }
            }
    }
}

static void backward_grouped(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
    float *delta = t->backward_workspace[0];
    size_t queries = lse_count(s), keys = (size_t)s->batch * s->kv_heads * s->key_tokens;
    int threads = MOST_WARPS * WARP;
    LAUNCH(query_kernel, blocks_for(queries), threads, MOST_WARPS * sizeof(Pairs), g, delta, *s, queries);
    LAUNCH(grouped_key_kernel, blocks_for(keys), threads, MOST_WARPS * sizeof(Pairs), g, delta, *s, keys);
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(bias_kernel, blocks_for(axes.elements), threads, 0, g, delta, *s, axes);
    }
}

/* ---- The table: what is left out is as in main.c. ---- */

DEVICE_TABLE(gqa) = {
    {.name = "repeat-kv",
     .forward = forward_repeat_kv,
     .backward = backward_repeat_kv,
     .dropout = DROPOUT_POSITION},
    {.name = "grouped",
     .forward = forward_grouped,
     .backward = backward_grouped,
     .dropout = DROPOUT_POSITION},
    {.name = "split-keys",
     .what = "keys cut into parts, merged at the end: for few queries and many keys, as in decoding",
     .takes = TAKES_QKV,
     .forward = forward_split_keys,
     .backward = backward_grouped,
     .backward_workspace = workspace_recomputed,
     .workspace = workspace_split_keys,
     .dropout = DROPOUT_POSITION,
     .grouped = true},
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "llama", .forward = forward_llama, .backward = backward_llama, .workspace = llama_buffers},
#endif
    {},
};
