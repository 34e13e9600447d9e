/* Step 1 of the ladder: a thread to each query row, which keeps q and o to itself and reads every key and value from
 * global memory. D is the head size, padded with zeros to what the arrays are compiled for. The pointers are the
 * device's. */
#include "cuda_warp.h"
#include "kernel.h"

enum { Br = 128, MOST_COLUMNS = 256 };

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; /* exp(x) is exp2(x * LOG2_E), and cheaper so */

/* Of out the columns from `column` on, D at most: a head wider than MOST_COLUMNS takes several launches. */
template <int D>
__global__ static void rows_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                                   AttentionShape shape, int row_tiles, size_t tiles, int column)
{
    const AttentionShape *s = &shape;
    int HS = s->head_size, width = smaller(D, HS - column);
    float scale = s->scale * LOG2_E;

    for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int h = (int)(tile / row_tiles % s->heads), b = (int)(tile / row_tiles / s->heads);
        int first = (row_tiles - 1 - (int)(tile % row_tiles)) * Br; /* causal: the longest rows go first */
        int t = first + threadIdx.x;
        if (t >= s->tokens)
            continue;

        float q_row[D], o[D], m = -INFINITY, l = 0;
        UNROLL for (int i = 0; i < D; i++)
        {
            q_row[i] = i < width ? q[query_row(s, b, h, t) + column + i] : 0;
            o[i] = 0;
        }
        int end = keys_end(s, b, t);
        for (int t2 = 0; t2 < end; t2++) {
            const float *key = k + key_row(s, b, h, t2) + column, *value = v + key_row(s, b, h, t2) + column;
            float score = 0;
            UNROLL for (int i = 0; i < D; i++) score += q_row[i] * (i < width ? key[i] : 0);
            if constexpr (D == MOST_COLUMNS)
                score += dot_outside(q + query_row(s, b, h, t), k + key_row(s, b, h, t2), column, width, HS);
            score *= scale;

            float m_new = fmaxf(m, score), mend = exp2f(m - m_new), p = exp2f(score - m_new);
            UNROLL for (int i = 0; i < D; i++) o[i] = mend * o[i] + p * (i < width ? value[i] : 0);
            l = mend * l + p;
            m = m_new;
        }

        UNROLL for (int i = 0; i < D; i++) if (i < width) out[query_row(s, b, h, t) + column + i] =
            l == 0 ? 0 : o[i] / l;
        lse[lse_index(s, b, h, t)] = (m + log2f(l)) * LN_2;
    }
}

/* ---- The table ---- */

template <int D> static void launch_rows(const Tensors *t, const AttentionShape *s)
{
    int row_tiles = (s->tokens + Br - 1) / Br;
    size_t tiles = (size_t)s->batch * s->heads * row_tiles;
    int blocks = tiles < MOST_BLOCKS ? (int)tiles : MOST_BLOCKS;
    for (int column = 0; column < s->head_size; column += D)
        LAUNCH(rows_kernel<D>, blocks, Br, 0, t->out, t->lse, t->q, t->k, t->v, *s, row_tiles, tiles, column);
}

static void forward_rows(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64    ? launch_rows<64>(t, s)
    : s->head_size <= 128 ? launch_rows<128>(t, s)
                          : launch_rows<256>(t, s);
}

static const char *refuses(const AttentionShape *s)
{
    if (s->mask.kind != MASK_NONE && s->mask.kind != MASK_CAUSAL)
        return "takes no --mask but causal";
    return s->bias ? "takes no --bias" : s->lengths ? "takes no --lengths" : NULL;
}

DEVICE_TABLE(rows) = {
    {.name = "rows",
     .what = "the ladder, 1: a thread to a row, keys from global memory",
     .takes = TAKES_QKV,
     .forward = forward_rows,
     .refuses = refuses},
    {},
};
