#include "einsum_attention.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>
#include <string.h>

/* Softmax in place over the first `keys` of a row's T scores, which it scales; the rest become 0. `omp simd` lets the
 * sum run in several lanes, so that it is vector instructions. A NaN is never the largest, but its exponential makes
 * the sum NaN, and so the whole row. */
static void softmax_row(float *row, int keys, int T, float scale)
{
    float largest = largest_of(row, keys), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int t2 = 0; t2 < keys; t2++) {
        row[t2] = fast_exp(scale * (row[t2] - largest));
        sum += row[t2];
    }
    for (int t2 = 0; t2 < keys; t2++)
        row[t2] /= sum;
    memset(row + keys, 0, (T - keys) * sizeof *row);
}

static void softmax(float *weights, const AttentionShape *s)
{
    int T = s->tokens;
#pragma omp parallel for collapse(3)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < T; t++)
                softmax_row(weights + lse_index(s, b, h, t) * T, keys_end(s, b, t), T, s->scale);
}

static void add_bias(float *out, const float *bias, size_t rows, int columns)
{
#pragma omp parallel for
    for (size_t r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            out[r * columns + c] += bias[c];
}

void einsum_attention(float *out, const EinsumActivations *a, const float *x, const EinsumParameters *p,
                      EinsumFunction *einsum_with, const AttentionShape *s)
{
    size_t B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size;
    size_t C = s->embed, C_out = s->embed_out;

    /* Q = x W_query, K = x W_key, V = x W_value, for all heads at once */
    View input = view(x, B, T, C);
    einsum_with("bnd,do->bno", view(a->q, B, T, C_out), input, view(p->W_query, C, C_out));
    einsum_with("bnd,do->bno", view(a->k, B, T, C_out), input, view(p->W_key, C, C_out));
    einsum_with("bnd,do->bno", view(a->v, B, T, C_out), input, view(p->W_value, C, C_out));

    /* Head h is columns h*HS .. (h+1)*HS - 1. Seen as (B,NH,T,HS) nothing moves, and context is written where
     * out_proj will read it. */
    View queries = transpose(view(a->q, B, T, NH, HS), 1, 2);
    View keys = transpose(view(a->k, B, T, NH, HS), 1, 2);
    View values = transpose(view(a->v, B, T, NH, HS), 1, 2);
    View heads = transpose(view(a->context, B, T, NH, HS), 1, 2);
    View pairs = view(a->weights, B, NH, T, T);

    einsum_with("bhnd,bhmd->bhnm", pairs, queries, keys);
    softmax(a->weights, s);
    if (s->dropout > 0) {
        memcpy(a->softmax, a->weights, weights_count(s) * sizeof(float)); /* the backward pass wants both */
        apply_dropout(s->dropout_stream, a->weights, weights_count(s), s->dropout);
    }
    einsum_with("bhnm,bhmd->bhnd", heads, pairs, values);

    /* nn.Linear keeps its matrix (outputs, inputs); the letters say so. */
    einsum_with("bno,po->bnp", view(out, B, T, C_out), view(a->context, B, T, C_out),
                view(p->out_weight, C_out, C_out));
    add_bias(out, p->out_bias, B * T, (int)C_out);
}

/* ---- The gradients, from the last line to the first ---- */

/* The bias went to every row. Sixteen columns side by side, added row after row. */
static void bias_backward(float *d_bias, const float *dout, size_t rows, int columns)
{
    enum { SIDE_BY_SIDE = 16 };
#pragma omp parallel for
    for (int first = 0; first < columns; first += SIDE_BY_SIDE) {
        int count = columns - first < SIDE_BY_SIDE ? columns - first : SIDE_BY_SIDE;
        float sum[SIDE_BY_SIDE] = {0};
        for (size_t r = 0; r < rows; r++)
            for (int i = 0; i < count; i++)
                sum[i] += dout[r * columns + first + i];
        memcpy(d_bias + first, sum, count * sizeof *sum);
    }
}

/* From the gradient of a row's weights D to that of its T scores, in place. With P the softmax before
 * dropout and dP = dD D/P (1/(1-p) where the weight was kept, 0 where it was dropped), a softmax gives
 *     dS = scale P (dP - delta), delta = sum over keys of P dP.
 * P dP is D dD: so dropout is seen in D, and what it kept need not be known. */
static void softmax_row_backward(float *row, const float *weights, const float *softmax, int keys, int T,
                                 float scale)
{
    float delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int t2 = 0; t2 < keys; t2++)
        delta += weights[t2] * row[t2];
    for (int t2 = 0; t2 < keys; t2++)
        row[t2] = scale * (weights[t2] * row[t2] - softmax[t2] * delta);
    memset(row + keys, 0, (T - keys) * sizeof *row);
}

static void softmax_backward(float *d_weights, const float *weights, const float *softmax,
                             const AttentionShape *s)
{
    int T = s->tokens;
#pragma omp parallel for collapse(3)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < T; t++) {
                size_t row = lse_index(s, b, h, t) * T;
                softmax_row_backward(d_weights + row, weights + row, softmax + row, keys_end(s, b, t), T,
                                     s->scale);
            }
}

static void add(float *sum, const float *part, size_t n)
{
#pragma omp parallel for simd
    for (size_t i = 0; i < n; i++)
        sum[i] += part[i];
}

void einsum_attention_backward(float *dx, const EinsumParameterGradients *dp,
                               const EinsumActivationGradients *da, const float *dout,
                               const EinsumActivations *a, const float *x, const EinsumParameters *p,
                               EinsumFunction *einsum_with, const AttentionShape *s)
{
    size_t B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size;
    size_t C = s->embed, C_out = s->embed_out;

    bias_backward(dp->out_bias, dout, B * T, (int)C_out);
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
    softmax_backward(da->weights, a->weights, a->softmax, s);
    einsum_backward(einsum_with, "bhnd,bhmd->bhnm", d_queries, d_keys, d_pairs, queries, keys);

    /* x went three ways: its gradient is the sum of what comes back on each. */
    View input = view(x, B, T, C), d_input = view(dx, B, T, C), d_part = view(da->x_part, B, T, C);
    einsum_backward(einsum_with, "bnd,do->bno", d_input, view(dp->W_query, C, C_out),
                    view(da->q, B, T, C_out), input, view(p->W_query, C, C_out));
    einsum_backward(einsum_with, "bnd,do->bno", d_part, view(dp->W_key, C, C_out), view(da->k, B, T, C_out),
                    input, view(p->W_key, C, C_out));
    add(dx, da->x_part, B * T * C);
    einsum_backward(einsum_with, "bnd,do->bno", d_part, view(dp->W_value, C, C_out), view(da->v, B, T, C_out),
                    input, view(p->W_value, C, C_out));
    add(dx, da->x_part, B * T * C);
}
