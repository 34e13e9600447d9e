/* Step 6 of the ladder: step 5 with the next tile of keys and values on its way while this one is met, 32 rows to a warp so
 * that what is read from shared memory serves twice, masks asked only where a tile needs it, and a backward. D is the head
 * size, padded with zeros. The pointers are the device's. */
#include "pipelined_backward.h"

enum { WARPS = 4 };

/* 16 rows at a time: two to a warp, or one where O takes the registers of two. */
template <int D> constexpr int SIXTEENS = D <= 128 ? 2 : 1;

template <int D> constexpr int Br = 16 * SIXTEENS<D> *WARPS;

/* PLAIN: causal or not, nothing else to ask or to add. The rest takes registers, and its tiles are half as wide. */
template <int D, bool PLAIN> constexpr int Bc = 8192 / D / (PLAIN ? 1 : 2);

/* Forbidden pairs become -inf; a bias is added, in the powers of two that exp2 takes. */
template <int M, int N, bool PLAIN>
__device__ static void change_scores(float (&S)[M][N / 8][4], const AttentionShape *s, int b, int h,
                                     int first, int from, bool whole, bool folded)
{
    int g = threadIdx.x % WARP / 4, t4 = threadIdx.x % 4;
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N / 8; n++)
        UNROLL for (int i = 0; i < 4; i++)
    {
        int t = first + 16 * m + g + i / 2 * 8, t2 = from + 8 * n + 2 * t4 + i % 2;
        bool outside = t2 >= s->key_tokens || (PLAIN && s->causal && t2 > t + s->key_tokens - s->tokens);
        if (!whole && (outside || (!PLAIN && (t >= s->tokens || !attends(s, b, h, t, t2)))))
            S[m][n][i] = -INFINITY;
        else if (!PLAIN && !folded)
            S[m][n][i] = LOG2_E * (s->scale * S[m][n][i] + (t < s->tokens ? bias_at(s, b, h, t, t2) : 0));
    }
}

template <int D, bool PLAIN>
__global__ static void __launch_bounds__(WARPS *WARP, 2)
    pipelined_kernel(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, AttentionShape shape)
{
    DYNAMIC_SHARED(uint4, shared);
    const int M = SIXTEENS<D>, N = Bc<D, PLAIN>;
    const AttentionShape *s = &shape;
    bf16 *q_tile = (bf16 *)shared, *k_tiles = q_tile + Br<D> * D, *v_tiles = k_tiles + 2 * N * D;
    int HS = s->head_size, warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t4 = threadIdx.x % 4;
    int row_tiles = (s->tokens + Br<D> - 1) / Br<D>;
    size_t bh = blockIdx.x / row_tiles;
    int b = (int)(bh / s->heads), h = (int)(bh % s->heads);
    int first = (row_tiles - 1 - (int)(blockIdx.x % row_tiles)) * Br<D>,
        past = smaller(first + Br<D>, s->tokens);
    int mine = first + warp * 16 * M, end = keys_end(s, b, past - 1);
    const bf16 *k_bh = k + key_row(s, b, h, 0), *v_bh = v + key_row(s, b, h, 0);

    /* The largest of the raw scores is the largest score, where the scale is above 0 and nothing is added. */
    bool folded = PLAIN || (s->scale > 0 && !s->bias);
    float factor = folded ? s->scale * LOG2_E : 1, one_over_kept = 1 / (1 - s->dropout);

    fetch_rows<Br<D>, D>(q_tile, q + query_row(s, b, h, first), past - first, HS);
    fetch_rows<N, D>(k_tiles, k_bh, end, HS);
    fetch_rows<N, D>(v_tiles, v_bh, end, HS);
    copy_async_commit();

    float O[M][D / 8][4] = {}, m[M][2], l[M][2] = {};
    UNROLL for (int j = 0; j < M; j++) m[j][0] = m[j][1] = -INFINITY;
    for (int from = 0, tile = 0; from < end; from += N, tile ^= 1) {
        copy_async_wait<0>(); /* this tile is there */
        __syncthreads();      /* for everyone, and everyone is done with the one before */
        if (from + N < end) {
            fetch_rows<N, D>(k_tiles + (tile ^ 1) * N * D, k_bh + (size_t)(from + N) * HS, end - from - N,
                             HS);
            fetch_rows<N, D>(v_tiles + (tile ^ 1) * N * D, v_bh + (size_t)(from + N) * HS, end - from - N,
                             HS);
            copy_async_commit();
        }

        float S[M][N / 8][4] = {};
        multiply_rows<M, N, D>(S, q_tile, warp * 16 * M, k_tiles + tile * N * D);
        bool whole = attends_to_tile(s, b, mine, from + N);
        if (!whole || !folded)
            change_scores<M, N, PLAIN>(S, s, b, h, mine, from, whole, folded);

        UNROLL for (int j = 0; j < M; j++) UNROLL for (int r = 0; r < 2; r++)
        {
            float m_new = m[j][r];
            UNROLL for (int n = 0; n < N / 8; n++) m_new =
                fmaxf(m_new, fmaxf(S[j][n][2 * r], S[j][n][2 * r + 1]));
            m_new = row_largest(m_new);
            /* Nothing allowed yet: measured from 0, as -inf - -inf would be NaN. */
            float base = m_new == -INFINITY ? 0 : m_new * factor, mend = exp2_fast(m[j][r] * factor - base);
            m[j][r] = m_new;
            l[j][r] *= mend; /* this lane's part of the sum */
            UNROLL for (int n = 0; n < N / 8; n++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
            {
                S[j][n][i] = exp2_fast(S[j][n][i] * factor - base);
                l[j][r] += S[j][n][i];
            }
            UNROLL for (int n = 0; n < D / 8; n++) UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
                O[j][n][i] *= mend;
        }

        /* Dropout zeroes weights after the softmax: the sum counts every key. */
        if (!PLAIN && s->dropout > 0)
            UNROLL for (int j = 0; j < M; j++) UNROLL for (int n = 0; n < N / 8; n++)
                UNROLL for (int i = 0; i < 4; i++)
            {
                size_t row = lse_index(s, b, h, mine + 16 * j + g + i / 2 * 8);
                if (!dropout_keeps_pair(s->dropout_seed, row, from + 8 * n + 2 * t4 + i % 2, s->dropout))
                    S[j][n][i] = 0;
            }
        multiply_add<M, N, D>(O, S, v_tiles + tile * N * D);
    }
    copy_async_wait<0>();

    UNROLL for (int j = 0; j < M; j++) UNROLL for (int r = 0; r < 2; r++)
    {
        int t = mine + 16 * j + g + 8 * r;
        float sum = row_sum(l[j][r]);
        if (t >= s->tokens)
            continue;
        store_row<D>(out + query_row(s, b, h, t), O[j], r, sum == 0 ? 0 : one_over_kept / sum, HS);
        if (t4 == 0)
            lse[lse_index(s, b, h, t)] = m[j][r] * factor * LN_2 + logf(sum);
    }
}

/* ---- The table ---- */

template <int D, bool PLAIN> static void launch_as(const Tensors *t, const AttentionShape *s)
{
    size_t tiles = (size_t)s->batch * s->heads * ((s->tokens + Br<D> - 1) / Br<D>);
    size_t bytes = sizeof(bf16) * D * (Br<D> + 4 * Bc<D, PLAIN>);
    auto kernel = pipelined_kernel<D, PLAIN>;
    allow_shared(kernel, bytes);
    LAUNCH(kernel, (unsigned)tiles, WARPS * WARP, bytes, (bf16 *)t->out, t->lse, (const bf16 *)t->q,
           (const bf16 *)t->k, (const bf16 *)t->v, *s);
}

template <int D> static void launch(const Tensors *t, const AttentionShape *s)
{
    AttentionShape plain = *s;
    plain.causal = s->causal || s->mask.kind == MASK_CAUSAL;
    bool is_plain = s->mask.kind <= MASK_CAUSAL && !s->lengths && !s->bias && s->dropout == 0 && s->scale > 0;
    is_plain ? launch_as<D, true>(t, &plain) : launch_as<D, false>(t, s);
}

static void forward_pipelined(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64 ? launch<64>(t, s) : s->head_size <= 128 ? launch<128>(t, s) : launch<256>(t, s);
}

static const char *refuses(const AttentionShape *s)
{
    return refuses_head_size(s, 256);
}

static const char *refuses_backward(const AttentionShape *s)
{
    return s->head_size > 128 ? "has a backward for --head-size 8, 16 .. 128 only" : NULL;
}

DEVICE_TABLE(pipelined) = {
    {.name = "pipelined",
     .what = "step 6: the same with copies under way, masks, bias, dropout and a backward",
     .takes = TAKES_QKV,
     .forward = forward_pipelined,
     .backward = backward_pipelined,
     .backward_workspace = workspace_pipelined,
     .dropout = DROPOUT_POSITION,
     .bf16 = true,
     .refuses = refuses,
     .refuses_backward = refuses_backward},
    {},
};
