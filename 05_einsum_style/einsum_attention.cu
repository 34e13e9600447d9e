/* The twins of einsum.c and einsum_attention.c on a GPU. What a specification means, which loops it needs and whether it is a
 * matrix product, einsum.c has said already, on the host; here it is run: by cuBLAS, or as plain loops with a thread to
 * each number of the result. The shapes are in einsum_attention.h, and the pointers in the views are the device's. */
#include "error.h"
#include "kernel.h"
#include "philox.h"
extern "C" {
#include "einsum_attention.h"
}
#include "cuda_linear.h"

#undef view /* C++ has no compound literals */
template <typename... Sizes> static View view(const float *data, Sizes... sizes)
{
    const size_t size[] = {(size_t)sizes...};
    return view_of(data, sizeof...(sizes), size);
}

/* ---- einsum: as plain loops ---- */

/* The letters of the result, which say whose number this thread's is, and those that are summed over. */
typedef struct {
    int outer, inner;
    size_t count, terms;
    Letter letter[EINSUM_MAX_LETTERS]; /* outer ones first; the last of either runs fastest */
} Loops;

/* Moves to the i-th setting of the letters, the last one running fastest. */
HOST_DEVICE static void step(size_t at[3], const Letter *letter, int letters, size_t i)
{
    for (int l = letters - 1; l >= 0; l--) {
        for (int x = 0; x < 3; x++)
            at[x] += i % letter[l].size * letter[l].stride[x];
        i /= letter[l].size;
    }
}

__global__ static void loops_kernel(float *out, const float *a, const float *b, Loops loops)
{
    size_t threads = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < loops.count; i += threads) {
        size_t first[3] = {0, 0, 0};
        step(first, loops.letter, loops.outer, i);
        float sum = 0;
        for (size_t term = 0; term < loops.terms; term++) {
            size_t at[3] = {first[EINSUM_A], first[EINSUM_B], first[EINSUM_OUT]};
            step(at, loops.letter + loops.outer, loops.inner, term);
            sum += a[at[EINSUM_A]] * b[at[EINSUM_B]];
        }
        out[first[EINSUM_OUT]] = sum;
    }
}

static void run_loops(const EinsumPlan *plan, float *out, const float *a, const float *b)
{
    Loops loops = {};
    loops.count = loops.terms = 1;
    for (int i = 0; i < plan->letters; i++)
        if (plan->letter[i].in[EINSUM_OUT]) {
            loops.letter[loops.outer++] = plan->letter[i];
            loops.count *= plan->letter[i].size;
        }
    for (int i = 0; i < plan->letters; i++)
        if (!plan->letter[i].in[EINSUM_OUT]) {
            loops.letter[loops.outer + loops.inner++] = plan->letter[i];
            loops.terms *= plan->letter[i].size;
        }
    LAUNCH(loops_kernel, blocks_for(loops.count / WARP + 1), MOST_WARPS * WARP, 0, out, a, b, loops);
}

static EinsumPlan plan_or_die(const char *specification, const View *out, const View *a, const View *b)
{
    EinsumPlan plan;
    const char *error = einsum_plan(&plan, specification, out, a, b);
    if (error)
        die(EXIT_USAGE, "%s", error);
    return plan;
}

static void device_einsum_loops(const char *specification, View out, View a, View b)
{
    EinsumPlan plan = plan_or_die(specification, &out, &a, &b);
    run_loops(&plan, out.data, a.data, b.data);
}

#if defined(SIMT) || defined(HAVE_CUBLAS)
/* ---- einsum: as matrix products ---- */

/* Each call is a batch along the longest of the loop letters; the others are loops on the host, around the calls. */
static void run_product(const EinsumProduct *p, float *out, const float *a, const float *b)
{
    const float *const operand[] = {a, b}; /* EINSUM_A and EINSUM_B */
    Letter batch = {}, around[EINSUM_MAX_LETTERS];
    int longest = 0, letters = 0;
    batch.size = 1;
    for (int i = 1; i < p->loops; i++)
        longest = p->loop[i].size > p->loop[longest].size ? i : longest;
    for (int i = 0; i < p->loops; i++)
        if (i == longest)
            batch = p->loop[i];
        else
            around[letters++] = p->loop[i];
    size_t calls = 1, terms = 1;
    for (int l = 0; l < letters; l++)
        calls *= around[l].size;
    for (int l = 0; l < p->agains; l++)
        terms *= p->again[l].size;

    for (size_t call = 0; call < calls; call++)
        for (size_t term = 0; term < terms; term++) {
            size_t at[3] = {0, 0, 0};
            step(at, around, letters, call);
            step(at, p->again, p->agains, term);
            device_matmul_strided_batch(
                p->transpose_left, p->transpose_right, (int)p->rows.size, (int)p->columns.size,
                (int)p->summed.size, 1, operand[p->left] + at[p->left], p->ld_left, batch.stride[p->left],
                operand[p->right] + at[p->right], p->ld_right, batch.stride[p->right], term > 0,
                out + at[EINSUM_OUT], p->ld_out, batch.stride[EINSUM_OUT], (int)batch.size);
        }
}

static void device_einsum(const char *specification, View out, View a, View b)
{
    EinsumPlan plan = plan_or_die(specification, &out, &a, &b);
    EinsumProduct product;
    if (einsum_product(&product, &plan))
        run_product(&product, out.data, a.data, b.data);
    else
        run_loops(&plan, out.data, a.data, b.data);
}
#endif

/* ---- Between the products ---- */

/* Softmax in place over the first `keys` of a row's T scores, which it scales; the rest become 0. One warp. */
__device__ static void softmax_row(float *row, int keys, int T, float scale)
{
    int lane = threadIdx.x % WARP;
    float largest = -INFINITY, sum = 0;
    for (int t2 = lane; t2 < keys; t2 += WARP)
        largest = larger(largest, row[t2]);
    largest = warp_largest(largest);
    for (int t2 = lane; t2 < keys; t2 += WARP) {
        row[t2] = expf(scale * (row[t2] - largest));
        sum += row[t2];
    }
    sum = warp_sum(sum);
    for (int t2 = lane; t2 < T; t2 += WARP)
        row[t2] = t2 < keys ? row[t2] / sum : 0;
}

/* A warp to each row. softmax, the weights before dropout, is written only where there is dropout. */
__global__ static void softmax_kernel(float *weights, float *softmax, AttentionShape shape, size_t rows)
{
    const AttentionShape *s = &shape;
    int T = s->tokens;
    for (size_t bht = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bht < rows;
         bht += (size_t)gridDim.x * MOST_WARPS) {
        float *row = weights + bht * T;
        softmax_row(row, keys_end(s, (int)(bht / T / s->heads), (int)(bht % T)), T, s->scale);
        for (int t2 = threadIdx.x % WARP; s->dropout > 0 && t2 < T; t2 += WARP) {
            softmax[bht * T + t2] = row[t2];
            row[t2] *= dropout_keeps_pair(s->dropout_seed, bht, t2, s->dropout) / (1 - s->dropout);
        }
    }
}

/* From the gradient of a row's weights D to that of its T scores, in place: dS = scale (D dD - P delta). One warp. */
__device__ static void softmax_row_backward(float *row, const float *weights, const float *softmax, int keys,
                                            int T, float scale)
{
    float delta = 0;
    for (int t2 = threadIdx.x % WARP; t2 < keys; t2 += WARP)
        delta += weights[t2] * row[t2];
    delta = warp_sum(delta);
    for (int t2 = threadIdx.x % WARP; t2 < T; t2 += WARP)
        row[t2] = t2 < keys ? scale * (weights[t2] * row[t2] - softmax[t2] * delta) : 0;
}

__global__ static void softmax_backward_kernel(float *d_weights, const float *weights, const float *softmax,
                                               AttentionShape shape, size_t rows)
{
    const AttentionShape *s = &shape;
    int T = s->tokens;
    for (size_t bht = (size_t)blockIdx.x * MOST_WARPS + threadIdx.x / WARP; bht < rows;
         bht += (size_t)gridDim.x * MOST_WARPS)
        softmax_row_backward(d_weights + bht * T, weights + bht * T, softmax + bht * T,
                             keys_end(s, (int)(bht / T / s->heads), (int)(bht % T)), T, s->scale);
}

/* out (rows,columns) += bias (columns) in each row, and sum += part: a thread to each number. */
__global__ static void add_bias_kernel(float *out, const float *bias, size_t count, int columns)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x)
        out[i] += bias[i % columns];
}

__global__ static void add_kernel(float *sum, const float *part, size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x)
        sum[i] += part[i];
}

/* ---- The module ---- */

static void device_einsum_attention(float *out, const EinsumActivations *a, const float *x,
                                    const EinsumParameters *p, EinsumFunction *einsum_with,
                                    const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size, C = s->embed, C_out = s->embed_out;
    size_t count = (size_t)B * T * C_out;

    /* Q = x W_query, K = x W_key, V = x W_value, for all heads at once */
    View input = view(x, B, T, C);
    einsum_with("bnd,do->bno", view(a->q, B, T, C_out), input, view(p->W_query, C, C_out));
    einsum_with("bnd,do->bno", view(a->k, B, T, C_out), input, view(p->W_key, C, C_out));
    einsum_with("bnd,do->bno", view(a->v, B, T, C_out), input, view(p->W_value, C, C_out));

    View queries = transpose(view(a->q, B, T, NH, HS), 1, 2);
    View keys = transpose(view(a->k, B, T, NH, HS), 1, 2);
    View values = transpose(view(a->v, B, T, NH, HS), 1, 2);
    View heads = transpose(view(a->context, B, T, NH, HS), 1, 2);
    View pairs = view(a->weights, B, NH, T, T);

    einsum_with("bhnd,bhmd->bhnm", pairs, queries, keys);
    LAUNCH(softmax_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, a->weights, a->softmax, *s,
           lse_count(s));
    einsum_with("bhnm,bhmd->bhnd", heads, pairs, values);

    einsum_with("bno,po->bnp", view(out, B, T, C_out), view(a->context, B, T, C_out),
                view(p->out_weight, C_out, C_out));
    LAUNCH(add_bias_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, out, p->out_bias, count,
           C_out);
}

static void add(float *sum, const float *part, size_t count)
{
    LAUNCH(add_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, sum, part, count);
}

static void device_einsum_attention_backward(float *dx, const EinsumParameterGradients *dp,
                                             const EinsumActivationGradients *da, const float *dout,
                                             const EinsumActivations *a, const float *x,
                                             const EinsumParameters *p, EinsumFunction *einsum_with,
                                             const AttentionShape *s)
{
    int B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size, C = s->embed, C_out = s->embed_out;

    device_sum_rows(dp->out_bias, dout, (size_t)B * T, C_out);
    einsum_backward(einsum_with, "bno,po->bnp", view(da->context, B, T, C_out),
                    view(dp->out_weight, C_out, C_out), view(dout, B, T, C_out),
                    view(a->context, B, T, C_out), view(p->out_weight, C_out, C_out));

    View queries = transpose(view(a->q, B, T, NH, HS), 1, 2);
    View keys = transpose(view(a->k, B, T, NH, HS), 1, 2);
    View values = transpose(view(a->v, B, T, NH, HS), 1, 2);
    View pairs = view(a->weights, B, NH, T, T);
    View d_queries = transpose(view(da->q, B, T, NH, HS), 1, 2);
    View d_keys = transpose(view(da->k, B, T, NH, HS), 1, 2);
    View d_values = transpose(view(da->v, B, T, NH, HS), 1, 2);
    View d_heads = transpose(view(da->context, B, T, NH, HS), 1, 2);
    View d_pairs = view(da->weights, B, NH, T, T);

    einsum_backward(einsum_with, "bhnm,bhmd->bhnd", d_pairs, d_values, d_heads, pairs, values);
    LAUNCH(softmax_backward_kernel, blocks_for(lse_count(s)), MOST_WARPS * WARP, 0, da->weights, a->weights,
           a->softmax, *s, lse_count(s));
    einsum_backward(einsum_with, "bhnd,bhmd->bhnm", d_queries, d_keys, d_pairs, queries, keys);

    /* x went three ways: its gradient is the sum of what comes back on each. */
    View input = view(x, B, T, C), d_input = view(dx, B, T, C), d_part = view(da->x_part, B, T, C);
    size_t count = (size_t)B * T * C;
    einsum_backward(einsum_with, "bnd,do->bno", d_input, view(dp->W_query, C, C_out),
                    view(da->q, B, T, C_out), input, view(p->W_query, C, C_out));
    einsum_backward(einsum_with, "bnd,do->bno", d_part, view(dp->W_key, C, C_out), view(da->k, B, T, C_out),
                    input, view(p->W_key, C, C_out));
    add(dx, da->x_part, count);
    einsum_backward(einsum_with, "bnd,do->bno", d_part, view(dp->W_value, C, C_out), view(da->v, B, T, C_out),
                    input, view(p->W_value, C, C_out));
    add(dx, da->x_part, count);
}

/* ---- The table: all else is as in main.c, which has the order of the parameters and of the workspace. ---- */

static EinsumActivations activations_in(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace, *softmax = s->dropout > 0 ? w[4] : t->weights;
    return {w[0], w[1], w[2], softmax, t->weights, w[3]};
}

static EinsumParameters parameters_in(const Tensors *t)
{
    const float *const *w = t->parameter;
    return {w[2], w[3], w[4], w[0], w[1]};
}

template <EinsumFunction *einsum_with> static void forward(const Tensors *t, const AttentionShape *s)
{
    EinsumParameters p = parameters_in(t);
    EinsumActivations a = activations_in(t, s);
    device_einsum_attention(t->out, &a, t->x, &p, einsum_with, s);
}

template <EinsumFunction *einsum_with> static void backward(const Tensors *t, const AttentionShape *s)
{
    EinsumParameters p = parameters_in(t);
    EinsumActivations a = activations_in(t, s);
    float *const *d = t->d_parameter, *const *w = t->backward_workspace;
    EinsumParameterGradients dp = {d[2], d[3], d[4], d[0], d[1]};
    EinsumActivationGradients da = {w[0], w[1], w[2], w[3], w[4], w[5]};
    device_einsum_attention_backward(t->dx, &dp, &da, t->dout, &a, t->x, &p, einsum_with, s);
}

DEVICE_TABLE(einsum_attention) = {
#if defined(SIMT) || defined(HAVE_CUBLAS)
    {.name = "einsum",
     .forward = forward<device_einsum>,
     .backward = backward<device_einsum>,
     .dropout = DROPOUT_POSITION},
#endif
    {.name = "einsum-loops",
     .forward = forward<device_einsum_loops>,
     .backward = backward<device_einsum_loops>,
     .dropout = DROPOUT_POSITION},
    {},
};
