/* Step 5 of the ladder: both products on tensor cores, in bf16, added up in float32. Four warps, 16 rows of the tile each,
 * walk along the keys; S and O lie in registers, and S becomes the left factor of P V without moving. Forward only, causal
 * or not. D is the head size, padded with zeros. The pointers are the device's. */
#include "tensor_tiles.h"

enum { Br = 64, Bc = 64, THREADS = Br / 16 * WARP };

/* The block copies `count` rows of HS numbers to 64 rows of D; zeros fill up the rest. */
template <int D> __device__ static void copy_rows(bf16 *to, const bf16 *from, int count, int HS)
{
    for (int i = threadIdx.x; i < Bc * D / 8; i += THREADS) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool there = row < count && 8 * chunk < HS;
        *(uint4 *)place<D>(to, row, chunk) =
            there ? *(const uint4 *)(from + (size_t)row * HS + 8 * chunk) : make_uint4(0, 0, 0, 0);
    }
}

template <int D>
__global__ static void __launch_bounds__(THREADS)
    mma_kernel(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, AttentionShape shape)
{
    DYNAMIC_SHARED(uint4, shared);
    const AttentionShape *s = &shape;
    bf16 *q_tile = (bf16 *)shared, *k_tile = q_tile + Br * D, *v_tile = k_tile + Bc * D;
    int HS = s->head_size, warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t4 = threadIdx.x % 4;
    int row_tiles = (s->tokens + Br - 1) / Br;
    size_t bh = blockIdx.x / row_tiles;
    int b = (int)(bh / s->heads), h = (int)(bh % s->heads);
    int first = (row_tiles - 1 - (int)(blockIdx.x % row_tiles)) * Br, past = smaller(first + Br, s->tokens);
    float factor = s->scale * LOG2_E;

    copy_rows<D>(q_tile, q + query_row(s, b, h, first), past - first, HS);
    float O[1][D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    int end = keys_end(s, b, past - 1);
    for (int from = 0; from < end; from += Bc) {
        __syncthreads(); /* every warp is done with the tile before */
        copy_rows<D>(k_tile, k + key_row(s, b, h, from), end - from, HS);
        copy_rows<D>(v_tile, v + key_row(s, b, h, from), end - from, HS);
        __syncthreads();

        float S[1][Bc / 8][4] = {};
        multiply_rows<1, Bc, D>(S, q_tile, warp * 16, k_tile);
        bool whole = attends_to_tile(s, b, first, from + Bc);
        UNROLL for (int r = 0; r < 2; r++)
        {
            int t = first + warp * 16 + g + 8 * r;
            float m_new = m[r];
            UNROLL for (int n = 0; n < Bc / 8; n++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
            {
                int t2 = from + 8 * n + 2 * t4 + i % 2;
                if (!whole && (t2 >= end || t2 >= keys_end(s, b, t)))
                    S[0][n][i] = -INFINITY;
                m_new = fmaxf(m_new, S[0][n][i]);
            }
            m_new = row_largest(m_new);
            /* Nothing allowed yet: measured from 0, as -inf - -inf would be NaN. */
            float base = m_new == -INFINITY ? 0 : m_new * factor, mend = exp2_fast(m[r] * factor - base);
            m[r] = m_new;
            l[r] *= mend; /* this lane's part of the sum */
            UNROLL for (int n = 0; n < Bc / 8; n++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
            {
                S[0][n][i] = exp2_fast(S[0][n][i] * factor - base);
                l[r] += S[0][n][i];
            }
            UNROLL for (int n = 0; n < D / 8; n++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
                O[0][n][i] *= mend;
        }
        multiply_add<1, Bc, D>(O, S, v_tile);
    }

    UNROLL for (int r = 0; r < 2; r++)
    {
        int t = first + warp * 16 + g + 8 * r;
        float sum = row_sum(l[r]);
        if (t >= s->tokens)
            continue;
        store_row<D>(out + query_row(s, b, h, t), O[0], r, sum == 0 ? 0 : 1 / sum, HS);
        if (t4 == 0)
            lse[lse_index(s, b, h, t)] = m[r] * s->scale + logf(sum);
    }
}

/* ---- The table ---- */

template <int D> static void launch(const Tensors *t, const AttentionShape *s)
{
    size_t tiles = (size_t)s->batch * s->heads * ((s->tokens + Br - 1) / Br);
    size_t bytes = sizeof(bf16) * D * (Br + 2 * Bc);
    auto kernel = mma_kernel<D>;
    allow_shared(kernel, bytes);
    LAUNCH(kernel, (unsigned)tiles, THREADS, bytes, (bf16 *)t->out, t->lse, (const bf16 *)t->q,
           (const bf16 *)t->k, (const bf16 *)t->v, *s);
}

static void forward_mma(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64 ? launch<64>(t, s) : s->head_size <= 128 ? launch<128>(t, s) : launch<256>(t, s);
}

static const char *refuses(const AttentionShape *s)
{
    if (s->mask.kind != MASK_NONE && s->mask.kind != MASK_CAUSAL)
        return "takes no --mask but causal";
    if (s->lengths || s->bias)
        return "takes no --lengths and no --bias";
    if (!(s->scale > 0))
        return "takes a --scale above 0";
    return refuses_head_size(s, 256);
}

DEVICE_TABLE(mma) = {
    {.name = "mma",
     .what = "step 5: bf16 on tensor cores",
     .takes = TAKES_QKV,
     .forward = forward_mma,
     .bf16 = true,
     .refuses = refuses},
    {},
};
