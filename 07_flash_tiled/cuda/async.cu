/* Step 4 of the ladder: step 3's forward, whose copies go on while it computes. The values of a tile come while its
 * scores are computed, and the keys of the next tile while its values are added up; a copy is 16 bytes a thread and leaves
 * the registers alone. D is the head size, padded with zeros to what the arrays are compiled for. The pointers are the
 * device's.
 *
 * Thread (y, x) has the rows y * R .. y * R + R - 1 of the tile, the keys x, x + 16, x + 32 .. (C of them), and of O the
 * columns 64 * c + 4 * x .. + 3. The 16 threads of a row are half a warp: they meet by shuffles. */
#include "cuda_tensor.h"
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

/* The block starts to copy `width` of the HS numbers of `count` rows to `Rows` rows of D that lie `stride` apart; zeros fill up the
 * rest. A warp's 32 threads copy 512 bytes that lie behind one another, or 128 where rows do not begin at multiples of 16. */
template <int D, int Rows>
__device__ static void fetch_rows(float *to, int stride, const float *from, int count, int width, int HS)
{
    int each = HS % 4 == 0 ? 4 : 1;
    for (int i = threadIdx.x * each; i < Rows * D; i += THREADS * each) {
        int row = i / D, column = i % D;
        bool there = row < count && column < width;
        const float *source = there ? from + (size_t)row * HS + column : from;
        if (each == 4)
            copy_async_16(to + row * stride + column, source, there);
        else
            copy_async_4(to + row * stride + column, source, there);
    }
    copy_async_commit();
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
    async_kernel(float *out, float *lse, const float *q, const float *k, const float *v, AttentionShape shape,
                 int row_tiles, size_t tiles, int column)
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
        fetch_rows<D, Bc>(k_tile, D + PAD, k + key_row(s, b, h, 0) + column, tile_end, width, HS);

        for (int from = 0; from < tile_end; from += Bc) {
            copy_async_wait<0>();
            __syncthreads(); /* the keys are there, and all are done with the values before */
            fetch_rows<D, Bc>(v_tile, D + PAD, v + key_row(s, b, h, from) + column, tile_end - from, width,
                              HS);
            float p[R][C];
            multiply_rows<D>(p, q_tile, k_tile);
            if constexpr (D == MOST_COLUMNS)
                add_outside(p, q + query_row(s, b, h, first), past - first, k + key_row(s, b, h, from),
                            tile_end - from, column, width, HS);
            copy_async_wait<0>();
            __syncthreads(); /* the values are there, and all are done with the keys */
            if (from + Bc < tile_end)
                fetch_rows<D, Bc>(k_tile, D + PAD, k + key_row(s, b, h, from + Bc) + column,
                                  tile_end - from - Bc, width, HS);

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

        copy_async_wait<0>(); /* where there was no key, of the queries */
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

/* ---- The table ---- */

/* The queries, a tile of keys and one of values, and their weights. */
template <int D, int R, int C> static size_t shared_bytes()
{
    return sizeof(float) * (R * SIDE * D + 2 * C * SIDE * (D + PAD) + R * SIDE * (C * SIDE + PAD));
}

static int blocks_of(size_t tiles)
{
    return tiles < MOST_BLOCKS ? (int)tiles : MOST_BLOCKS;
}

template <int D, int R, int C> static void launch_async(const Tensors *t, const AttentionShape *s)
{
    int row_tiles = (s->tokens + R * SIDE - 1) / (R * SIDE);
    size_t tiles = (size_t)s->batch * s->heads * row_tiles, bytes = shared_bytes<D, R, C>();
    auto kernel = async_kernel<D, R, C>;
    allow_shared(kernel, bytes);
    for (int column = 0; column < s->head_size; column += D)
        LAUNCH(kernel, blocks_of(tiles), THREADS, bytes, t->out, t->lse, t->q, t->k, t->v, *s, row_tiles,
               tiles, column);
}

static void forward_async(const Tensors *t, const AttentionShape *s)
{
    s->head_size <= 64    ? launch_async<64, 4, 4>(t, s)
    : s->head_size <= 128 ? launch_async<128, 4, 2>(t, s)
                          : launch_async<256, 4, 2>(t, s);
}

static const char *refuses(const AttentionShape *s)
{
    if (s->mask.kind != MASK_NONE && s->mask.kind != MASK_CAUSAL)
        return "takes no --mask but causal";
    return s->bias ? "takes no --bias" : s->lengths ? "takes no --lengths" : NULL;
}

DEVICE_TABLE(async) = {
    {.name = "async",
     .what = "the ladder, 4: the same, the next tile's copy under way while this one is computed",
     .takes = TAKES_QKV,
     .forward = forward_async,
     .refuses = refuses},
    {},
};
