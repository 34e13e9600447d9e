/* The backward of pipelined.cu: one kernel, run twice. With keys outside a block owns 128 keys and meets all queries that
 * see them; with queries outside it is the other way round. Both compute P and dS again: seven products in place of the
 * five that must be, and no two blocks add to one number. The workspace is delta, a number a row. */
#ifndef PIPELINED_BACKWARD_H
#define PIPELINED_BACKWARD_H

#include "cuda_broadcast.h"
#include "tensor_tiles.h"

typedef struct {
    const bf16 *q, *k, *v, *out, *dout;
    const float *lse, *delta;
    bf16 *dq, *dk, *dv;
    float *dbias;
} Gradients;

/* The block starts to copy `count` rows of HS numbers to Rows rows of D; zeros fill up the rest. */
template <int Rows, int D> __device__ static void fetch_rows(bf16 *to, const bf16 *from, int count, int HS)
{
    for (int i = threadIdx.x; i < Rows * D / 8; i += blockDim.x) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool there = row < count && 8 * chunk < HS;
        copy_async_16(place<D>(to, row, chunk), there ? from + (size_t)row * HS + 8 * chunk : from, there);
    }
}

/* delta = the row's sum of dout * out: a warp to a row. */
__global__ static void delta_kernel(float *delta, const bf16 *dout, const bf16 *out, int HS, size_t rows)
{
    int lane = threadIdx.x % WARP;
    for (size_t row = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; row < rows;
         row += (size_t)gridDim.x * MOST_WARPS) {
        float sum = 0;
        for (int i = lane; i < HS; i += WARP)
            sum += bf16_float(dout[row * HS + i]) * bf16_float(out[row * HS + i]);
        sum = warp_sum(sum);
        if (lane == 0)
            delta[row] = sum;
    }
}

/* What a row's exponents are measured from. A row that sees no key: from inf, which leaves P = 0. */
__device__ static inline float exponent_base(const Gradients *g, const AttentionShape *s, int b, int h, int t)
{
    float lse = t < s->tokens ? g->lse[lse_index(s, b, h, t)] : -INFINITY;
    return lse == -INFINITY ? INFINITY : lse * LOG2_E;
}

enum { OWN = 128, MET = 64, BACKWARD_THREADS = OWN / 16 * WARP };

/* Rows: the block's own, 16 to a warp. Columns: those it meets. With KEYS outside X = K Q^T is S transposed. */
template <int D, bool KEYS>
__global__ static void __launch_bounds__(BACKWARD_THREADS)
    gradient_kernel(Gradients gradients, AttentionShape shape)
{
    DYNAMIC_SHARED(uint4, shared);
    const Gradients *g = &gradients;
    const AttentionShape *s = &shape;
    bf16 *own_1 = (bf16 *)shared, *own_2 = own_1 + OWN * D, *met_1 = own_2 + OWN * D,
         *met_2 = met_1 + 2 * MET * D;
    float *base = (float *)(met_2 + 2 * MET * D), *delta = base + 2 * MET; /* of the queries met */
    int HS = s->head_size, T = s->tokens, TK = s->key_tokens;
    int warp = threadIdx.x / WARP, row = threadIdx.x % WARP / 4, t4 = threadIdx.x % 4;
    int count = KEYS ? TK : T, tiles = (count + OWN - 1) / OWN, tile = (int)(blockIdx.x % tiles);
    size_t bh = blockIdx.x / tiles;
    int b = (int)(bh / s->heads), h = (int)(bh % s->heads);
    int first = (KEYS ? tile : tiles - 1 - tile) * OWN; /* what meets most comes first */

    /* What is met: keys up to the last that a row sees; queries from the first tile that sees a key. */
    int begin = 0, end = KEYS ? T : keys_end(s, b, smaller(first + OWN, T) - 1);
    if (KEYS)
        while (begin < end && keys_end(s, b, smaller(begin + MET, T) - 1) <= first)
            begin += MET;
    size_t of_q = query_row(s, b, h, 0), of_k = key_row(s, b, h, 0), own = KEYS ? of_k : of_q;
    const bf16 *a1 = (KEYS ? g->k : g->q) + own, *a2 = (KEYS ? g->v : g->dout) + own;
    const bf16 *b1 = KEYS ? g->q + of_q : g->k + of_k, *b2 = KEYS ? g->dout + of_q : g->v + of_k;

    auto fetch = [&](int from, int buffer) {
        fetch_rows<MET, D>(met_1 + buffer * MET * D, b1 + (size_t)from * HS, end - from, HS);
        fetch_rows<MET, D>(met_2 + buffer * MET * D, b2 + (size_t)from * HS, end - from, HS);
        copy_async_commit();
        if (KEYS && threadIdx.x < MET) {
            int t = from + threadIdx.x;
            base[buffer * MET + threadIdx.x] = exponent_base(g, s, b, h, t);
            delta[buffer * MET + threadIdx.x] = t < T ? g->delta[lse_index(s, b, h, t)] : 0;
        }
    };
    fetch_rows<OWN, D>(own_1, a1 + (size_t)first * HS, count - first, HS);
    fetch_rows<OWN, D>(own_2, a2 + (size_t)first * HS, count - first, HS);
    copy_async_commit();
    if (begin < end)
        fetch(begin, 0);

    int mine = first + 16 * warp + row;
    float own_base[2], own_delta[2];
    UNROLL for (int r = 0; r < 2; r++)
    {
        int t = mine + 8 * r;
        own_base[r] = KEYS ? 0 : exponent_base(g, s, b, h, t);
        own_delta[r] = !KEYS && t < T ? g->delta[lse_index(s, b, h, t)] : 0;
    }

    float d1[1][D / 8][4] = {}, d2[1][KEYS ? D / 8 : 1][4] = {}; /* dk or dq; dv */
    float factor = s->scale * LOG2_E;
    for (int from = begin, buffer = 0; from < end; from += MET, buffer ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        if (from + MET < end)
            fetch(from + MET, buffer ^ 1);

        float P[1][MET / 8][4] = {}, dS[1][MET / 8][4] = {};
        multiply_rows<1, MET, D>(P, own_1, 16 * warp, met_1 + buffer * MET * D);
        multiply_rows<1, MET, D>(dS, own_2, 16 * warp, met_2 + buffer * MET * D);
        bool whole =
            KEYS ? attends_to_tile(s, b, from, first + OWN) : attends_to_tile(s, b, first, from + MET);
        UNROLL for (int n = 0; n < MET / 8; n++) UNROLL for (int i = 0; i < 4; i++)
        {
            int o = mine + i / 2 * 8, column = 8 * n + 2 * t4 + i % 2, other = from + column;
            int t = KEYS ? other : o, t2 = KEYS ? o : other;
            float from_base = KEYS ? base[buffer * MET + column] : own_base[i / 2];
            float from_delta = KEYS ? delta[buffer * MET + column] : own_delta[i / 2];
            float p = P[0][n][i] * factor;
            if (s->bias && t < T && t2 < TK)
                p += LOG2_E * bias_at(s, b, h, t, t2);
            p = exp2_fast(p - from_base);
            if (!whole && (t >= T || t2 >= TK || !attends(s, b, h, t, t2)))
                p = 0;
            float kept = 1;
            if (s->dropout > 0)
                kept = dropout_keeps_pair(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) /
                       (1 - s->dropout);
            dS[0][n][i] = p == 0 ? 0 : p * (kept * dS[0][n][i] - from_delta);
            P[0][n][i] = kept * p;
        }
        if constexpr (KEYS)
            multiply_add<1, MET, D>(d2, P, met_2 + buffer * MET * D);
        multiply_add<1, MET, D>(d1, dS, met_1 + buffer * MET * D);
    }
    copy_async_wait<0>();

    UNROLL for (int r = 0; r < 2; r++)
    {
        int o = mine + 8 * r;
        if (o >= count)
            continue;
        size_t place_of = own + (size_t)o * HS;
        store_row<D>((KEYS ? g->dk : g->dq) + place_of, d1[0], r, s->scale, HS);
        if constexpr (KEYS)
            store_row<D>(g->dv + place_of, d2[0], r, 1, HS);
    }
}

/* dS of one pair again, by plain dot products: a bias as large as S costs as much as all the rest. (A name of its own: chapter 6's
 * RecomputedScores is in the same program, and two that differ must not share one.) */
struct RecomputedFromBf16 {
    const Gradients *g;
    const AttentionShape *s;

    __device__ float d_score(int b, int h, int t, int t2) const
    {
        size_t query = query_row(s, b, h, t), key = key_row(s, b, h, t2);
        float score = 0, d_p = 0;
        for (int i = 0; i < s->head_size; i++) {
            score += bf16_float(g->q[query + i]) * bf16_float(g->k[key + i]);
            d_p += bf16_float(g->dout[query + i]) * bf16_float(g->v[key + i]);
        }
        size_t row = lse_index(s, b, h, t);
        if (s->dropout > 0)
            d_p *= dropout_keeps_pair(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
        float exponent = LOG2_E * (s->scale * score + bias_at(s, b, h, t, t2));
        float p = exp2_fast(exponent - exponent_base(g, s, b, h, t));
        return p == 0 ? 0 : p * (d_p - g->delta[row]);
    }

    __device__ float operator()(const Rectangle &r) const
    {
        return sum_of_pairs(
            r, [&](int t, int t2) { return attends(s, r.b, r.h, t, t2) ? d_score(r.b, r.h, t, t2) : 0; });
    }
};

__global__ static void bias_kernel(Gradients gradients, AttentionShape shape, Broadcast axes)
{
    sum_into_bias(gradients.dbias, &shape, axes, RecomputedFromBf16{&gradients, &shape});
}

/* ---- For the table ---- */

static int workspace_pipelined(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

template <int D, bool KEYS> static void launch_gradient(const Gradients &g, const AttentionShape *s)
{
    size_t tiles = ((size_t)(KEYS ? s->key_tokens : s->tokens) + OWN - 1) / OWN;
    size_t bytes = sizeof(bf16) * D * (2 * OWN + 4 * MET) + sizeof(float) * 4 * MET;
    auto kernel = gradient_kernel<D, KEYS>;
    allow_shared(kernel, bytes);
    LAUNCH(kernel, (unsigned)(tiles * s->batch * s->heads), BACKWARD_THREADS, bytes, g, *s);
}

static void backward_pipelined(const Tensors *t, const AttentionShape *s)
{
    float *delta = t->backward_workspace[0];
    Gradients g = {(const bf16 *)t->q,
                   (const bf16 *)t->k,
                   (const bf16 *)t->v,
                   (const bf16 *)t->out,
                   (const bf16 *)t->dout,
                   t->lse,
                   delta,
                   (bf16 *)t->dq,
                   (bf16 *)t->dk,
                   (bf16 *)t->dv,
                   t->dbias};
    LAUNCH(delta_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, delta, g.dout, g.out, s->head_size,
           lse_count(s));
    if (s->head_size <= 64) {
        launch_gradient<64, true>(g, s);
        launch_gradient<64, false>(g, s);
    } else {
        launch_gradient<128, true>(g, s);
        launch_gradient<128, false>(g, s);
    }
    if (s->bias) {
        Broadcast axes = broadcast_of(s);
        LAUNCH(bias_kernel, blocks_for(axes.elements), MOST_WARPS * WARP, 0, g, *s, axes);
    }
}

#endif
