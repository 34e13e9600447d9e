/* The twin of block_sparse.c's attention_block_sparse on a GPU, and FlexAttention's module on it. A block of threads takes
 * a block of queries along its list; within it each row belongs to one warp. The backward is in
 * block_sparse_backward_cuda.h, the mask as a tensor in dense_mask.cu. The shapes are in block_sparse.h, and the pointers
 * are the device's. */
#include "block_sparse_backward_cuda.h"
#include "block_strips_cuda.h"
#include "cuda_linear.h"
#include "cuda_thread.h"
#include "kernel.h"

/* ---- The lists are made on the device too: lengths and documents lie there. ---- */

/* A thread to each list. The closed form answers from either side, so the transposed lists need no lists to start from.
 * The book's masks look at no head. */
__global__ static void fill_kernel(BlockMask mask, bool transposed, AttentionShape shape, size_t lists)
{
    const AttentionShape *s = &shape;
    int N = mask.block;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;
    for (size_t index = thread; index < lists; index += threads) {
        ListedBlock *list = mask.listed + index * mask.key_blocks;
        int row = (int)(index % mask.query_blocks), b = (int)(index / mask.query_blocks), count = 0;
        for (int n = 0; n < mask.key_blocks; n++) {
            int i = transposed ? n : row, j = transposed ? row : n;
            int q_end = smaller(i * N + N, s->tokens), kv_end = smaller(j * N + N, s->key_tokens);
            BlockKind kind = closed_form(s, b, i * N, q_end, j * N, kv_end);
            if (kind != BLOCK_EMPTY)
                list[count++] = {n, kind};
        }
        mask.count[index] = count;
    }
}

static void fill_from_closed_form_on_device(const BlockMask *mask, bool transposed, const AttentionShape *s)
{
    size_t lists = (size_t)mask->batch * mask->heads * mask->query_blocks;
    LAUNCH(fill_kernel, blocks_for(lists / WARP + 1), MOST_WARPS * WARP, 0, *mask, transposed, *s, lists);
}

/* ---- Forward ---- */

/* Row (b,h,t) meets the keys first <= t2 < end, STRIP at most: one warp. ask: only those that attends() allows. score has
 * room for them. */
__device__ static void meet_keys(float *out_bht, float *m, float *l, float *score, const float *q_bht, Rows k,
                                 Rows v, bool ask, const AttentionShape *s, int b, int h, int t, int first,
                                 int end)
{
    int HS = s->head_size, lane = threadIdx.x % WARP;
    size_t row = lse_index(s, b, h, t);

    /* The scores, a key to each lane, and the largest. */
    float m_old = m[row], l_old = l[row], m_new = m_old;
    for (int t2 = first + lane; t2 < end; t2 += WARP) {
        float *score_t2 = &score[t2 - first];
        *score_t2 = -INFINITY;
        if (!ask || attends(s, b, h, t, t2))
            *score_t2 = s->scale * dot(q_bht, row_of(k, t2 - first), HS) + bias_at(s, b, h, t, t2);
        m_new = larger(m_new, *score_t2);
    }
    m_new = warp_largest(m_new);
    if (m_new == -INFINITY)
        return; /* nothing allowed yet, and -inf - -inf would be NaN */

    float mend = expf(m_old - m_new), sum = 0; /* 1 while the maximum stands, 0 the first time */
    for (int t2 = first + lane; t2 < end; t2 += WARP) {
        if (score[t2 - first] == -INFINITY)
            continue;
        float p = expf(score[t2 - first] - m_new);
        sum += p;
        if (s->dropout > 0)
            p *= dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
        score[t2 - first] = p;
    }
    sum = warp_sum(sum);
    __syncwarp(); /* the other lanes' weights are there */

    /* The values, a column to each lane. What is still -inf is forbidden: 0 times a value of NaN would be NaN. */
    for (int c = lane; c < HS; c += WARP) {
        float value = mend * out_bht[c];
        for (int j = 0; j < end - first; j++)
            if (score[j] != -INFINITY)
                value += score[j] * row_of(v, j)[c];
        out_bht[c] = value;
    }
    if (lane == 0) {
        m[row] = m_new;
        l[row] = mend * l_old + sum;
    }
    __syncwarp(); /* m and l are written, score may be used again */
}

/* A block of threads to each (b, h, query block). */
__global__ static void block_sparse_kernel(float *out, float *lse, float *m, float *l, const float *q,
                                           const float *k, const float *v, Layout layout, BlockMask mask,
                                           AttentionShape shape, Plan plan, size_t tasks)
{
    DYNAMIC_SHARED(float, shared);
    const AttentionShape *s = &shape;
    const Layout *at = &layout;
    int HS = s->head_size, N = mask.block, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *k_strip = shared, *v_strip = k_strip + plan.strip * plan.step;
    float *score = v_strip + plan.strip * plan.step + warp * STRIP;

    for (size_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        size_t bh = task / mask.query_blocks;
        int b = (int)(bh / s->heads), h = (int)(bh % s->heads), i = (int)(task % mask.query_blocks), listed;
        int t0 = i * N, t_end = smaller(t0 + N, s->tokens);

        for (int t = t0 + warp; t < t_end; t += plan.warps) {
            for (int c = lane; c < HS; c += WARP)
                out[out_at(at, b, h, t) + c] = 0;
            if (lane == 0) {
                m[lse_index(s, b, h, t)] = -INFINITY;
                l[lse_index(s, b, h, t)] = 0;
            }
        }
        __syncwarp();

        const ListedBlock *list = block_list(&mask, b, h, i, &listed);
        for (int n = 0; n < listed; n++) {
            int past = smaller((list[n].key_block + 1) * N, s->key_tokens);
            for (int first = list[n].key_block * N; first < past; first += plan.strip) {
                int end = smaller(first + plan.strip, past);
                size_t keys = key_at(at, s, b, h, first);
                __syncthreads(); /* every warp is done with the strips before */
                Rows k_rows = fetch(k_strip, &plan, k + keys, at->key.token, end - first, HS);
                Rows v_rows = fetch(v_strip, &plan, v + keys, at->key.token, end - first, HS);
                __syncthreads();
                for (int t = t0 + warp; t < t_end; t += plan.warps)
                    meet_keys(out + out_at(at, b, h, t), m, l, score, q + query_at(at, b, h, t), k_rows,
                              v_rows, list[n].kind == BLOCK_PARTIAL, s, b, h, t, first, end);
            }
        }

        for (int t = t0 + warp; t < t_end; t += plan.warps) {
            size_t row = lse_index(s, b, h, t);
            float one_over_l = l[row] == 0 ? 0 : 1 / l[row];
            for (int c = lane; c < HS; c += WARP)
                out[out_at(at, b, h, t) + c] *= one_over_l;
            if (lane == 0)
                lse[row] = m[row] + logf(l[row]);
        }
    }
}

static void attention_block_sparse(float *out, float *lse, float *m, float *l, const float *q, const float *k,
                                   const float *v, const Layout *layout, const BlockMask *mask,
                                   const AttentionShape *s)
{
    size_t tasks = (size_t)s->batch * s->heads * mask->query_blocks;
    Plan plan = plan_strips(s, smaller(mask->block, s->tokens), STRIP);
    LAUNCH(block_sparse_kernel, grid_for(tasks), plan.warps * WARP, plan.bytes, out, lse, m, l, q, k, v,
           *layout, *mask, *s, plan, tasks);
}

/* ---- For the table: the kernel on contiguous tensors ---- */

enum { LISTS, M, L, QKV, CONTEXT, LSE };      /* workspace */
enum { TRANSPOSED, DELTA, D_QKV, D_CONTEXT }; /* and what backward needs more */

static int workspace_block_sparse(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[LISTS] = block_mask_floats(s, false, false);
    floats[M] = floats[L] = lse_count(s);
    return 3;
}

static int backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[TRANSPOSED] = transposed_mask_floats(s, false, false);
    floats[DELTA] = lse_count(s);
    return 2;
}

/* The lists are made anew in each call: what they cost is in the time. */
static BlockMask lists(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = block_mask_in(t->workspace[LISTS], s, false, false);
    fill_from_closed_form_on_device(&mask, false, s);
    return mask;
}

static BlockMask transposed_lists(const Tensors *t, const BlockMask *mask, const AttentionShape *s)
{
    BlockMask transposed = transposed_mask_in(t->backward_workspace[TRANSPOSED], mask);
    fill_from_closed_form_on_device(&transposed, true, s);
    return transposed;
}

static Layout contiguous(const AttentionShape *s)
{
    size_t HS = s->head_size, query_head = s->tokens * HS, key_head = s->key_tokens * HS;
    Steps query = {s->heads * query_head, query_head, HS}, key = {s->kv_heads * key_head, key_head, HS};
    return {query, key, query};
}

static void forward_block_sparse(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    Layout layout = contiguous(s);
    attention_block_sparse(t->out, t->lse, t->workspace[M], t->workspace[L], t->q, t->k, t->v, &layout, &mask,
                           s);
}

static void backward_block_sparse(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s), transposed = transposed_lists(t, &mask, s);
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
    Walk walk = {g, contiguous(s), t->backward_workspace[DELTA], *s};
    walk_backward(&walk, &mask, &transposed);
}

/* ---- FlexAttention's module: the same kernels on columns of the packed projection ---- */

#if defined(SIMT) || defined(HAVE_CUBLAS)
static int workspace_flex(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t row = (size_t)s->batch * s->tokens * s->embed_out;
    workspace_block_sparse(s, floats);
    floats[QKV] = 3 * row;
    floats[CONTEXT] = row;
    floats[LSE] = lse_count(s);
    return 6;
}

static int backward_workspace_flex(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t row = (size_t)s->batch * s->tokens * s->embed_out;
    backward_workspace(s, floats);
    floats[D_QKV] = 3 * row;
    floats[D_CONTEXT] = row;
    return 4;
}

/* A head's queries are HS columns of qkv, its keys and values HS others: nothing is copied. */
static Layout packed(const AttentionShape *s)
{
    size_t T = s->tokens, HS = s->head_size, C_out = s->embed_out;
    Steps column = {3 * T * C_out, HS, 3 * C_out};
    return {column, column, {T * C_out, HS, C_out}};
}

static void forward_flex(const Tensors *t, const AttentionShape *s)
{
    int C = s->embed, C_out = s->embed_out;
    size_t rows = (size_t)s->batch * s->tokens;
    float *qkv = t->workspace[QKV], *context = t->workspace[CONTEXT];
    BlockMask mask = lists(t, s);
    Layout layout = packed(s);

    device_linear(qkv, t->x, t->parameter[0], NULL, rows, C, 3 * C_out);
    attention_block_sparse(context, t->workspace[LSE], t->workspace[M], t->workspace[L], qkv, qkv + C_out,
                           qkv + 2 * C_out, &layout, &mask, s);
    device_linear(t->out, context, t->parameter[1], t->parameter[2], rows, C_out, C_out);
}

static void backward_flex(const Tensors *t, const AttentionShape *s)
{
    int C = s->embed, C_out = s->embed_out;
    size_t rows = (size_t)s->batch * s->tokens;
    const float *qkv = t->workspace[QKV], *context = t->workspace[CONTEXT];
    float *d_qkv = t->backward_workspace[D_QKV], *d_context = t->backward_workspace[D_CONTEXT];
    float *const *d_w = t->d_parameter;
    BlockMask mask = lists(t, s), transposed = transposed_lists(t, &mask, s);

    device_linear_backward(d_context, 0, d_w[1], t->dout, context, t->parameter[1], rows, C_out, C_out);
    device_sum_rows(d_w[2], t->dout, rows, C_out);

    /* As forward read its columns of qkv, so backward writes those of d_qkv. */
    AttentionBackward g = {qkv,       qkv + C_out, qkv + 2 * C_out, context,           t->workspace[LSE],
                           d_context, d_qkv,       d_qkv + C_out,   d_qkv + 2 * C_out, NULL};
    Walk walk = {g, packed(s), t->backward_workspace[DELTA], *s};
    walk_backward(&walk, &mask, &transposed);

    device_linear_backward(t->dx, 0, d_w[0], d_qkv, t->x, t->parameter[0], rows, C, 3 * C_out);
}
#endif

/* ---- The table: all else is as in main.c. ---- */

DEVICE_TABLE(block_sparse) = {
    {.name = "block-sparse",
     .what = "online softmax over the listed blocks, keys and values in shared memory",
     .forward = forward_block_sparse,
     .backward = backward_block_sparse,
     .backward_workspace = backward_workspace,
     .workspace = workspace_block_sparse,
     .dropout = DROPOUT_POSITION},
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "flex",
     .forward = forward_flex,
     .backward = backward_flex,
     .backward_workspace = backward_workspace_flex,
     .workspace = workspace_flex,
     .dropout = DROPOUT_POSITION},
#endif
    {},
};
