/* The twins of gqa.c and gqa_backward.c on a GPU, and one for few queries and many keys, as when a model writes token by
 * token. A warp takes a row; what a block holds in shared memory serves all heads of a group. The shapes are in gqa.h, and
 * the pointers are the device's. */
#include "cuda_warp.h"
#include "kernel.h"
#include "philox.h"

#include "../07_flash_tiled/flash_tiled_backward.h"

#include "../06_online_softmax/online_softmax_backward_cuda.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "llama_cuda.h"
#endif

enum {
    SHARED_FLOATS = 12288, /* 48 KiB: what every GPU gives a block without being asked */
    ROWS = 32,             /* of a block's tile, unless a group alone has more */
    PART_KEYS = 128,       /* split keys: the least that a part has */
    PART_ROWS = 8192,      /* split keys: so many partial rows at most, or one a row */
};

/* Some keys or values, `stride` floats from one to the next: in shared memory, or where the tensor lies. */
typedef struct {
    const float *row;
    int stride;
} Tile;

/* What one query row knows of the keys it has seen: chapter 6's m, l and o. */
typedef struct {
    float m, l;
    float *o; /* (HS), divided up among the lanes */
} Row;

/* Shows the keys from <= t2 < to, 32 at most, to row (b, h, t): a key to each lane, then a column to each. k and v hold
 * them from number `from` on; weights has room for 32. */
__device__ static void meet_keys(Row *row, float *weights, const float *q, Tile k, Tile v,
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

/* out is o / l; returns lse. */
__device__ static float finish(const Row *row, int HS)
{
    float one_over_l = row->l == 0 ? 0 : 1 / row->l;
    for (int i = threadIdx.x % WARP; i < HS; i += WARP)
        row->o[i] *= one_over_l;
    return row->m + logf(row->l);
}

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

/* A warp to each row, which reads its keys where they lie. */
__global__ static void rows_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                                   AttentionShape shape, size_t rows)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows; i += (size_t)gridDim.x * warps) {
        int t = (int)(i % s->tokens), h = (int)(i / s->tokens % s->heads),
            b = (int)(i / s->tokens / s->heads);
        Row row = {-INFINITY, 0, out + i * HS};
        clear(row.o, HS);
        int end = keys_end(s, b, t);
        for (int from = 0; from < end; from += WARP) {
            Tile keys = {k + key_row(s, b, h, from), HS}, values = {v + key_row(s, b, h, from), HS};
            meet_keys(&row, shared + warp * WARP, q, keys, values, s, b, h, t, from,
                      smaller(from + WARP, end));
        }
        float row_lse = finish(&row, HS);
        if (threadIdx.x % WARP == 0)
            lse[i] = row_lse;
    }
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
    LAUNCH(rows_kernel, blocks_for(rows), MOST_WARPS * WARP, MOST_WARPS * WARP * sizeof(float), t->out,
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
            Tile keys = {k + key_row(s, b, first_head, from), HS};
            Tile values = {v + key_row(s, b, first_head, from), HS};
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
                meet_keys(&row, weights, q, keys, values, s, b, h, t, from, to);
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
            float row_lse = finish(&row, HS);
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

/* ---- Few queries, many keys: the keys are cut into parts, so that there is work for all of the GPU, and each row's partial
 * results are merged as in chapter 6. ---- */

static int parts_of(const AttentionShape *s)
{
    size_t rows = lse_count(s), most = rows < PART_ROWS ? PART_ROWS / rows : 1;
    int parts = (s->key_tokens + PART_KEYS - 1) / PART_KEYS;
    return most < (size_t)parts ? (int)most : parts;
}

/* A warp to one part of one row. Neighbouring warps have the heads of one group, and so read the same keys, which the first of
 * them brings into the cache. o (parts,rows,HS), m and l (parts,rows): the partial results. */
__global__ static void part_kernel(float *o, float *m, float *l, const float *q, const float *k,
                                   const float *v, AttentionShape shape, int parts, size_t rows)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    int HS = s->head_size, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int part_keys = ((s->key_tokens + parts - 1) / parts + WARP - 1) / WARP * WARP;
    for (size_t i = (size_t)blockIdx.x * warps + warp; i < rows * parts; i += (size_t)gridDim.x * warps) {
        /* The head runs fastest, then the token, then the part. */
        int h = (int)(i % s->heads), t = (int)(i / s->heads % s->tokens);
        size_t rest = i / s->heads / s->tokens;
        int part = (int)(rest % parts), b = (int)(rest / parts);
        size_t partial = part * rows + lse_index(s, b, h, t);
        Row row = {-INFINITY, 0, o + partial * HS};
        clear(row.o, HS);
        int end = smaller((part + 1) * part_keys, keys_end(s, b, t));
        for (int from = part * part_keys; from < end; from += WARP) {
            Tile keys = {k + key_row(s, b, h, from), HS}, values = {v + key_row(s, b, h, from), HS};
            meet_keys(&row, shared + warp * WARP, q, keys, values, s, b, h, t, from,
                      smaller(from + WARP, end));
        }
        if (threadIdx.x % WARP == 0) {
            m[partial] = row.m;
            l[partial] = row.l;
        }
    }
}

/* Two sums over different keys become one once both are measured from the same maximum: chapter 6. */
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
    int warps = blockDim.x / WARP;
    for (size_t i = (size_t)blockIdx.x * warps + threadIdx.x / WARP; i < rows;
         i += (size_t)gridDim.x * warps) {
        Row row = {-INFINITY, 0, out + i * HS};
        clear(row.o, HS);
        for (int part = 0; part < parts; part++) {
            size_t partial = part * rows + i;
            Row other = {m[partial], l[partial], o + partial * HS};
            merge_partials(&row, &other, HS);
        }
        float row_lse = finish(&row, HS);
        if (threadIdx.x % WARP == 0)
            lse[i] = row_lse;
    }
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
