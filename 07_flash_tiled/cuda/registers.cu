/* Step 3 of the ladder: 16 x 16 threads to a tile of Br query rows by Bc keys. Each thread holds a small tile of S and one
 * of O in registers, so that each number it loads from shared memory is used several times. D is the head size, padded
 * with zeros to what the arrays are compiled for. The pointers are the device's.
 *
 * Thread (y, x) has the rows y * R .. y * R + R - 1 of the tile, the keys x, x + 16, x + 32 .. (C of them), and of O the
 * columns 64 * c + 4 * x .. + 3. The 16 threads of a row are half a warp: they meet by shuffles. */
#include "../flash_tiled_backward.h"
#include "cuda_warp.h"
#include "kernel.h"

enum { SIDE = 16, THREADS = SIDE * SIDE, PAD = 4, MOST_COLUMNS = 256 };

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; /* exp(x) is exp2(x * LOG2_E), and cheaper so */

/* How many blocks are to fit on a multiprocessor: two leave each thread 128 of its 65536 registers. */
template <int D> constexpr int BLOCKS = D <= 128 ? 2 : 1;

/* Loaded and stored by one instruction. */
struct alignas(16) Four {
    float at[4];
};

__device__ static inline Four four(const float *from)
{
    return *(const Four *)from;
}

/* The block copies `width` of the HS numbers of `count` rows to `Rows` rows of D that lie `stride` apart; zeros fill up the rest.
 * Neighbouring threads read neighbouring numbers, so that a warp's 32 are one piece of 128 bytes. */
template <int D, int Rows>
__device__ static void fetch_rows(float *to, int stride, const float *from, int count, int width, int HS)
{
    for (int i = threadIdx.x; i < Rows * D; i += THREADS) {
        int row = i / D, column = i % D;
        to[row * stride + column] = row < count && column < width ? from[(size_t)row * HS + column] : 0;
    }
}

/* s = A B^T for this thread's rows of A and of B. All lanes of a row read one place in A. In B they read 16 rows at one
 * column, 16 bytes each: with rows D apart all would lie in the same four banks; D + PAD apart, eight lanes read from 32. */
template <int D, int R, int C>
__device__ static void multiply_rows(float (&s)[R][C], const float *a, const float *b)
{
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) s[r][c] = 0;
    for (int i = 0; i < D; i += 4) {
        Four a4[R], b4[C];
        UNROLL for (int r = 0; r < R; r++) a4[r] = four(a + (y * R + r) * D + i);
        UNROLL for (int c = 0; c < C; c++) b4[c] = four(b + (x + c * SIDE) * (D + PAD) + i);
        UNROLL for (int n = 0; n < 4; n++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) s[r][c] += a4[r].at[n] * b4[c].at[n];
    }
}

/* s += A B^T over the columns that the tiles do not have, from where they lie: `rows` rows of a, `columns` of b. */
template <int R, int C>
__device__ static void add_outside(float (&s)[R][C], const float *a, int rows, const float *b, int columns,
                                   int column, int width, int HS)
{
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            if (y * R + r < rows && x + c * SIDE < columns)
                s[r][c] += dot_outside(a + (size_t)(y * R + r) * HS, b + (size_t)(x + c * SIDE) * HS, column,
                                       width, HS);
}

/* o += P B for this thread's rows and columns. All lanes of a row read one place in P; of B they read one row, 256 bytes
 * behind one another. */
template <int D, int R, int C>
__device__ static void add_product(float (&o)[R][D / SIDE], const float *p, const float *b)
{
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    for (int j = 0; j < C * SIDE; j += 4) {
        Four p4[R];
        UNROLL for (int r = 0; r < R; r++) p4[r] = four(p + (y * R + r) * (C * SIDE + PAD) + j);
        UNROLL for (int n = 0; n < 4; n++) UNROLL for (int c = 0; c < D / 64; c++)
        {
            Four b4 = four(b + (j + n) * (D + PAD) + 64 * c + 4 * x);
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < 4; i++) o[r][4 * c + i] +=
                p4[r].at[n] * b4.at[i];
        }
    }
}

/* The thread's tile of P, to where the other lanes of its rows can read it. Two rows of a warp lie R * PAD banks further
 * apart than they would without PAD: for R = 4 their 16 lanes each write to 32 banks, not twice to 16. */
template <int R, int C> __device__ static void share(float *p, const float (&s)[R][C])
{
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    __syncwarp(); /* what was there before has been read: a row is read by its own half of the warp only */
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
        p[(y * R + r) * (C * SIDE + PAD) + x + c * SIDE] = s[r][c];
    __syncwarp();
}

/* Over the 16 lanes of a row; each gets it. A NaN need not stay in m: it comes back in exp2f(NaN - m). */
__device__ static float row_largest(float value)
{
    for (int apart = SIDE / 2; apart > 0; apart /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, apart));
    return value;
}

__device__ static float row_sum(float value)
{
    for (int apart = SIDE / 2; apart > 0; apart /= 2)
        value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
    return value;
}

/* Writes factor[r] * o to row first + y * R + r of a tensor that has `rows` of them. */
template <int D, int R>
__device__ static void store_rows(float *to, const float (&o)[R][D / SIDE], const float (&factor)[R],
                                  int first, int rows, int width, int HS)
{
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < D / SIDE; i++)
    {
        int row = first + y * R + r, column = i / 4 * 64 + 4 * x + i % 4;
        if (row < rows && column < width)
            to[(size_t)row * HS + column] = factor[r] * o[r][i];
    }
}

/* Of out the columns from `column` on, D at most: a head wider than MOST_COLUMNS takes several launches. */
template <int D, int R, int C>
__global__ static void __launch_bounds__(THREADS, BLOCKS<D>)
    registers_kernel(float *out, float *lse, const float *q, const float *k, const float *v,
                     AttentionShape shape, int row_tiles, size_t tiles, int column)
{
    DYNAMIC_SHARED(Four, shared);
    const int Br = R * SIDE, Bc = C * SIDE;
    float *q_tile = (float *)shared, *k_tile = q_tile + Br * D, *v_tile = k_tile + Bc * (D + PAD);
    float *p_tile = v_tile + Bc * (D + PAD);
    const AttentionShape *s = &shape;
    int HS = s->head_size, width = smaller(D, HS - column), y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    float scale = s->scale * LOG2_E;

    for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int h = (int)(tile / row_tiles % s->heads), b = (int)(tile / row_tiles / s->heads);
        int first = (row_tiles - 1 - (int)(tile % row_tiles)) * Br; /* causal: the longest rows go first */
        int past = smaller(first + Br, s->tokens);

        float o[R][D / SIDE] = {}, m[R], l[R]; /* l: of this thread's keys, until the end */
        int end[R], tile_end = keys_end(s, b, past - 1);
        UNROLL for (int r = 0; r < R; r++)
        {
            int t = first + y * R + r;
            end[r] = t < past ? keys_end(s, b, t) : 0;
            m[r] = -INFINITY;
            l[r] = 0;
        }
        __syncthreads(); /* all are done with the rows before */
        fetch_rows<D, Br>(q_tile, D, q + query_row(s, b, h, first) + column, past - first, width, HS);

        for (int from = 0; from < tile_end; from += Bc) {
            __syncthreads(); /* all are done with the tile before */
            fetch_rows<D, Bc>(k_tile, D + PAD, k + key_row(s, b, h, from) + column, tile_end - from, width,
                              HS);
            fetch_rows<D, Bc>(v_tile, D + PAD, v + key_row(s, b, h, from) + column, tile_end - from, width,
                              HS);
            __syncthreads();
            float p[R][C];
            multiply_rows<D>(p, q_tile, k_tile);
            if constexpr (D == MOST_COLUMNS)
                add_outside(p, q + query_row(s, b, h, first), past - first, k + key_row(s, b, h, from),
                            tile_end - from, column, width, HS);

            UNROLL for (int r = 0; r < R; r++)
            {
                float m_new = m[r];
                UNROLL for (int c = 0; c < C; c++)
                {
                    p[r][c] = from + x + c * SIDE < end[r] ? scale * p[r][c] : -INFINITY;
                    m_new = fmaxf(m_new, p[r][c]);
                }
                m_new = row_largest(m_new);
                float base =
                    m_new == -INFINITY ? 0 : m_new; /* nothing allowed yet: -inf - -inf would be NaN */
                float mend = exp2f(m[r] - base);
                l[r] *= mend;
                UNROLL for (int c = 0; c < C; c++)
                {
                    p[r][c] = exp2f(p[r][c] - base);
                    l[r] += p[r][c];
                }
                UNROLL for (int i = 0; i < D / SIDE; i++) o[r][i] *= mend;
                m[r] = m_new;
            }
            share(p_tile, p);
            add_product<D, R, C>(o, p_tile, v_tile);
        }

        float one_over_l[R];
        UNROLL for (int r = 0; r < R; r++)
        {
            int t = first + y * R + r;
            l[r] = row_sum(l[r]);
            one_over_l[r] = l[r] == 0 ? 0 : 1 / l[r];
            if (x == 0 && t < past)
                lse[lse_index(s, b, h, t)] = (m[r] + log2f(l[r])) * LN_2;
        }
        store_rows<D>(out + query_row(s, b, h, 0) + column, o, one_over_l, first, past, width, HS);
    }
}

/* ---- Backward: P again from lse. A thread's tiles are as above, and no two blocks write to one row. ---- */

/* delta = rowsum(dout * out), a warp to each row. */
__global__ static void delta_kernel(float *delta, AttentionBackward g, int HS, size_t rows)
{
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (size_t row = (size_t)blockIdx.x * warps + threadIdx.x / WARP; row < rows;
         row += (size_t)gridDim.x * warps) {
        float sum = 0;
        for (int i = lane; i < HS; i += WARP)
            sum += g.dout[row * HS + i] * g.out[row * HS + i];
        sum = warp_sum(sum);
        if (lane == 0)
            delta[row] = sum;
    }
}

/* Queries outside, keys inside: dq. */
template <int D, int R, int C>
__global__ static void __launch_bounds__(THREADS)
    query_kernel(AttentionBackward g, const float *delta, AttentionShape shape, int row_tiles, size_t tiles,
                 int column)
{
    DYNAMIC_SHARED(Four, shared);
    const int Br = R * SIDE, Bc = C * SIDE;
    float *q_tile = (float *)shared, *dout_tile = q_tile + Br * D, *k_tile = dout_tile + Br * D;
    float *v_tile = k_tile + Bc * (D + PAD), *pair_tile = v_tile + Bc * (D + PAD);
    const AttentionShape *s = &shape;
    int HS = s->head_size, width = smaller(D, HS - column), y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    float scale = s->scale * LOG2_E;

    for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int h = (int)(tile / row_tiles % s->heads), b = (int)(tile / row_tiles / s->heads);
        int first = (row_tiles - 1 - (int)(tile % row_tiles)) * Br, past = smaller(first + Br, s->tokens);

        float dq[R][D / SIDE] = {}, row_lse[R], row_delta[R], row_scale[R];
        int end[R], tile_end = keys_end(s, b, past - 1);
        UNROLL for (int r = 0; r < R; r++)
        {
            int t = first + y * R + r;
            end[r] = t < past ? keys_end(s, b, t) : 0;
            row_lse[r] = t < past ? LOG2_E * g.lse[lse_index(s, b, h, t)] : 0;
            row_delta[r] = t < past ? delta[lse_index(s, b, h, t)] : 0;
            row_scale[r] = s->scale;
        }
        __syncthreads(); /* all are done with the rows before */
        fetch_rows<D, Br>(q_tile, D, g.q + query_row(s, b, h, first) + column, past - first, width, HS);
        fetch_rows<D, Br>(dout_tile, D, g.dout + query_row(s, b, h, first) + column, past - first, width, HS);

        for (int from = 0; from < tile_end; from += Bc) {
            __syncthreads(); /* all are done with the tile before */
            fetch_rows<D, Bc>(k_tile, D + PAD, g.k + key_row(s, b, h, from) + column, tile_end - from, width,
                              HS);
            fetch_rows<D, Bc>(v_tile, D + PAD, g.v + key_row(s, b, h, from) + column, tile_end - from, width,
                              HS);
            __syncthreads();
            float p[R][C], d_p[R][C];
            multiply_rows<D>(p, q_tile, k_tile);
            multiply_rows<D>(d_p, dout_tile, v_tile);
            if constexpr (D == MOST_COLUMNS) {
                add_outside(p, g.q + query_row(s, b, h, first), past - first, g.k + key_row(s, b, h, from),
                            tile_end - from, column, width, HS);
                add_outside(d_p, g.dout + query_row(s, b, h, first), past - first,
                            g.v + key_row(s, b, h, from), tile_end - from, column, width, HS);
            }
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)
            {
                p[r][c] = from + x + c * SIDE < end[r] ? exp2f(scale * p[r][c] - row_lse[r]) : 0;
                d_p[r][c] = p[r][c] * (d_p[r][c] - row_delta[r]);
            }
            share(pair_tile, d_p);
            add_product<D, R, C>(dq, pair_tile, k_tile);
        }
        store_rows<D>(g.dq + query_row(s, b, h, 0) + column, dq, row_scale, first, past, width, HS);
    }
}

/* Keys outside, queries inside: dk and dv. Here a row of a thread's tile is a key, a column a query. */
template <int D, int R, int C>
__global__ static void __launch_bounds__(THREADS)
    key_kernel(AttentionBackward g, const float *delta, AttentionShape shape, int key_tiles, size_t tiles,
               int column)
{
    DYNAMIC_SHARED(Four, shared);
    const int Br = C * SIDE, Bc = R * SIDE;
    float *k_tile = (float *)shared, *v_tile = k_tile + Bc * D, *q_tile = v_tile + Bc * D;
    float *dout_tile = q_tile + Br * (D + PAD), *pair_tile = dout_tile + Br * (D + PAD);
    const AttentionShape *s = &shape;
    int HS = s->head_size, width = smaller(D, HS - column), y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    float scale = s->scale * LOG2_E;

    for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int h = (int)(tile / key_tiles % s->heads), b = (int)(tile / key_tiles / s->heads);
        int first = (int)(tile % key_tiles) * Bc, past = smaller(first + Bc, s->key_tokens);

        float dk[R][D / SIDE] = {}, dv[R][D / SIDE] = {}, row_scale[R], one[R];
        UNROLL for (int r = 0; r < R; r++)
        {
            row_scale[r] = s->scale;
            one[r] = 1;
        }
        __syncthreads(); /* all are done with the keys before */
        fetch_rows<D, Bc>(k_tile, D, g.k + key_row(s, b, h, first) + column, past - first, width, HS);
        fetch_rows<D, Bc>(v_tile, D, g.v + key_row(s, b, h, first) + column, past - first, width, HS);

        for (int from = 0; from < s->tokens; from += Br) {
            int to = smaller(from + Br, s->tokens);
            if (keys_end(s, b, to - 1) <= first)
                continue;    /* none of these rows sees as far as these keys */
            __syncthreads(); /* all are done with the tile before */
            fetch_rows<D, Br>(q_tile, D + PAD, g.q + query_row(s, b, h, from) + column, to - from, width, HS);
            fetch_rows<D, Br>(dout_tile, D + PAD, g.dout + query_row(s, b, h, from) + column, to - from,
                              width, HS);
            __syncthreads();
            float p[R][C], d_p[R][C];
            multiply_rows<D>(p, k_tile, q_tile);
            multiply_rows<D>(d_p, v_tile, dout_tile);
            if constexpr (D == MOST_COLUMNS) {
                add_outside(p, g.k + key_row(s, b, h, first), past - first, g.q + query_row(s, b, h, from),
                            to - from, column, width, HS);
                add_outside(d_p, g.v + key_row(s, b, h, first), past - first,
                            g.dout + query_row(s, b, h, from), to - from, column, width, HS);
            }
            UNROLL for (int c = 0; c < C; c++)
            {
                int t = from + x + c * SIDE;
                size_t row = lse_index(s, b, h, t);
                int end = t < to ? keys_end(s, b, t) : 0;
                float row_lse = t < to ? LOG2_E * g.lse[row] : 0, row_delta = t < to ? delta[row] : 0;
                UNROLL for (int r = 0; r < R; r++)
                {
                    p[r][c] = first + y * R + r < end ? exp2f(scale * p[r][c] - row_lse) : 0;
                    d_p[r][c] = p[r][c] * (d_p[r][c] - row_delta);
                }
            }
            share(pair_tile, p);
            add_product<D, R, C>(dv, pair_tile, dout_tile);
            share(pair_tile, d_p);
            add_product<D, R, C>(dk, pair_tile, q_tile);
        }
        store_rows<D>(g.dk + key_row(s, b, h, 0) + column, dk, row_scale, first, past, width, HS);
        store_rows<D>(g.dv + key_row(s, b, h, 0) + column, dv, one, first, past, width, HS);
    }
}

/* ---- The table ---- */

/* For `held` tiles of R * 16 rows, two tiles of C * 16 that come and go, and one of pairs. */
template <int D, int R, int C> static size_t shared_bytes(int held)
{
    return sizeof(float) * (held * R * SIDE * D + 2 * C * SIDE * (D + PAD) + R * SIDE * (C * SIDE + PAD));
}

static int blocks_of(size_t tiles)
{
    return tiles < MOST_BLOCKS ? (int)tiles : MOST_BLOCKS;
}

template <int D, int R, int C> static void launch_registers(const Tensors *t, const AttentionShape *s)
{
    int row_tiles = (s->tokens + R * SIDE - 1) / (R * SIDE);
    size_t tiles = (size_t)s->batch * s->heads * row_tiles, bytes = shared_bytes<D, R, C>(1);
    auto kernel = registers_kernel<D, R, C>;
    allow_shared(kernel, bytes);
    for (int column = 0; column < s->head_size; column += D)
        LAUNCH(kernel, blocks_of(tiles), THREADS, bytes, t->out, t->lse, t->q, t->k, t->v, *s, row_tiles,
               tiles, column);
}

static void forward_registers(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64    ? launch_registers<64, 4, 4>(t, s)
    : s->head_size <= 128 ? launch_registers<128, 4, 2>(t, s)
                          : launch_registers<256, 4, 2>(t, s);
}

template <int D, int R, int C> static void launch_backward(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, NULL};
    float *delta = t->backward_workspace[0];
    int row_tiles = (s->tokens + R * SIDE - 1) / (R * SIDE),
        key_tiles = (s->key_tokens + R * SIDE - 1) / (R * SIDE);
    size_t heads = (size_t)s->batch * s->heads, bytes = shared_bytes<D, R, C>(2);
    auto queries = query_kernel<D, R, C>;
    auto keys = key_kernel<D, R, C>;
    allow_shared(queries, bytes);
    allow_shared(keys, bytes);
    LAUNCH(delta_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, delta, g, s->head_size,
           lse_count(s));
    for (int column = 0; column < s->head_size; column += D) {
        LAUNCH(queries, blocks_of(heads * row_tiles), THREADS, bytes, g, delta, *s, row_tiles,
               heads * row_tiles, column);
        LAUNCH(keys, blocks_of(heads * key_tiles), THREADS, bytes, g, delta, *s, key_tiles, heads * key_tiles,
               column);
    }
}

static void backward_registers(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64    ? launch_backward<64, 4, 4>(t, s)
    : s->head_size <= 128 ? launch_backward<128, 4, 2>(t, s)
                          : launch_backward<256, 2, 2>(t, s);
}

/* delta */
static int backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

static const char *refuses(const AttentionShape *s)
{
    if (s->mask.kind != MASK_NONE && s->mask.kind != MASK_CAUSAL)
        return "takes no --mask but causal";
    return s->bias ? "takes no --bias" : s->lengths ? "takes no --lengths" : NULL;
}

DEVICE_TABLE(registers) = {
    {.name = "registers",
     .what = "the ladder, 3: 16 x 16 threads to a tile, each with a tile of S and of O in registers",
     .takes = TAKES_QKV,
     .forward = forward_registers,
     .backward = backward_registers,
     .backward_workspace = backward_workspace,
     .refuses = refuses},
    {},
};
