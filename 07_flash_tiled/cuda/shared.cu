/* Step 2 of the ladder: still a thread to each query row, but the block fetches each tile of Bc keys and values into
 * shared memory, once for all its rows. D is the head size, padded with zeros to what the arrays are compiled for. The
 * pointers are the device's. */
#include "cuda_warp.h"
#include "kernel.h"

enum { Br = 128, MOST_COLUMNS = 256 };

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; /* exp(x) is exp2(x * LOG2_E), and cheaper so */

/* The block copies `width` of the HS numbers of `count` rows to rows of D; zeros fill up the rest. Neighbouring threads read
 * neighbouring numbers, so that a warp's 32 are one piece of 128 bytes. */
template <int D>
__device__ static void fetch_rows(float (*to)[D], const float *from, int count, int width, int HS)
{
    for (int i = threadIdx.x; i < count * D; i += Br)
        to[i / D][i % D] = i % D < width ? from[(size_t)(i / D) * HS + i % D] : 0;
}

/* Of out the columns from `column` on, D at most: a head wider than MOST_COLUMNS takes several launches. */
template <int D, int Bc>
__global__ static void shared_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                                     AttentionShape shape, int row_tiles, size_t tiles, int column)
{
    __shared__ float k_tile[Bc][D], v_tile[Bc][D]; /* all lanes read one number: no two banks collide */
    const AttentionShape *s = &shape;
    int HS = s->head_size, width = smaller(D, HS - column);
    float scale = s->scale * LOG2_E;

    for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int h = (int)(tile / row_tiles % s->heads), b = (int)(tile / row_tiles / s->heads);
        int first = (row_tiles - 1 - (int)(tile % row_tiles)) * Br; /* causal: the longest rows go first */
        int t = first + threadIdx.x, past = smaller(first + Br, s->tokens);

        float q_row[D], o[D], m = -INFINITY, l = 0;
        UNROLL for (int i = 0; i < D; i++)
        {
            q_row[i] = t < past && i < width ? q[query_row(s, b, h, t) + column + i] : 0;
            o[i] = 0;
        }
        int end = t < past ? keys_end(s, b, t) : 0, tile_end = keys_end(s, b, past - 1);
        for (int from = 0; from < tile_end; from += Bc) {
            int to = smaller(from + Bc, tile_end);
            __syncthreads(); /* all rows are done with the tile before */
            fetch_rows<D>(k_tile, k + key_row(s, b, h, from) + column, to - from, width, HS);
            fetch_rows<D>(v_tile, v + key_row(s, b, h, from) + column, to - from, width, HS);
            __syncthreads();

            for (int t2 = from; t2 < smaller(to, end); t2++) {
                const float *key = k_tile[t2 - from], *value = v_tile[t2 - from];
                float score = 0;
                UNROLL for (int i = 0; i < D; i++) score += q_row[i] * key[i];
                if constexpr (D == MOST_COLUMNS)
                    score +=
                        dot_outside(q + query_row(s, b, h, t), k + key_row(s, b, h, t2), column, width, HS);
                score *= scale;

                float m_new = fmaxf(m, score), mend = exp2f(m - m_new), p = exp2f(score - m_new);
                UNROLL for (int i = 0; i < D; i++) o[i] = mend * o[i] + p * value[i];
                l = mend * l + p;
                m = m_new;
            }
        }

        if (t >= past)
            continue;
        UNROLL for (int i = 0; i < D; i++) if (i < width) out[query_row(s, b, h, t) + column + i] =
            l == 0 ? 0 : o[i] / l;
        lse[lse_index(s, b, h, t)] = (m + log2f(l)) * LN_2;
    }
}

/* ---- The table ---- */

template <int D, int Bc> static void launch_shared(const Tensors *t, const AttentionShape *s)
{
    int row_tiles = (s->tokens + Br - 1) / Br;
    size_t tiles = (size_t)s->batch * s->heads * row_tiles;
    int blocks = tiles < MOST_BLOCKS ? (int)tiles : MOST_BLOCKS;
    auto kernel = shared_kernel<D, Bc>;
    for (int column = 0; column < s->head_size; column += D)
        LAUNCH(kernel, blocks, Br, 0, t->out, t->lse, t->q, t->k, t->v, *s, row_tiles, tiles, column);
}

static void forward_shared(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64    ? launch_shared<64, 32>(t, s)
    : s->head_size <= 128 ? launch_shared<128, 32>(t, s)
                          : launch_shared<256, 16>(t, s);
}

static const char *refuses(const AttentionShape *s)
{
    if (s->mask.kind != MASK_NONE && s->mask.kind != MASK_CAUSAL)
        return "takes no --mask but causal";
    return s->bias ? "takes no --bias" : s->lengths ? "takes no --lengths" : NULL;
}

DEVICE_TABLE(shared) = {
    {.name = "shared",
     .what = "the ladder, 2: a thread to a row, tiles of keys in shared memory",
     .takes = TAKES_QKV,
     .forward = forward_shared,
     .refuses = refuses},
    {},
};
