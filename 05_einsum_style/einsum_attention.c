#include "einsum_attention.h"
#include "random.h"
#include "vector_math.h"

#include <math.h>
#include <string.h>

/* Softmax in place over the first `keys` of a row's T scores, which it scales; the rest become 0. Sixteen
 * maxima stand side by side, and `omp simd` lets the sum run in as many lanes, so that both are vector
 * instructions. A NaN is never the largest, but its exponential makes the sum NaN, and so the whole row. */
static void softmax_row(float *row, int keys, int T, float scale)
{
    enum { LANES = 16 };
    float lane[LANES], largest = -INFINITY, sum = 0;
    for (int i = 0; i < LANES; i++)
        lane[i] = -INFINITY;
    int whole = keys - keys % LANES;
    for (int t2 = 0; t2 < whole; t2 += LANES)
        for (int i = 0; i < LANES; i++)
            lane[i] = row[t2 + i] > lane[i] ? row[t2 + i] : lane[i];
    for (int i = 0; i < LANES; i++)
        largest = lane[i] > largest ? lane[i] : largest;
    for (int t2 = whole; t2 < keys; t2++)
        largest = row[t2] > largest ? row[t2] : largest;

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

void einsum_attention(float *out, float *weights, float *q, float *k, float *v, float *context,
                      const float *x, const EinsumParameters *p, EinsumFunction *einsum_with,
                      const AttentionShape *s)
{
    size_t B = s->batch, T = s->tokens, NH = s->heads, HS = s->head_size;
    size_t C = s->embed, C_out = s->embed_out;

    /* Q = x W_query, K = x W_key, V = x W_value, for all heads at once */
    View input = view(x, B, T, C);
    einsum_with("bnd,do->bno", view(q, B, T, C_out), input, view(p->W_query, C, C_out));
    einsum_with("bnd,do->bno", view(k, B, T, C_out), input, view(p->W_key, C, C_out));
    einsum_with("bnd,do->bno", view(v, B, T, C_out), input, view(p->W_value, C, C_out));

    /* Head h is columns h*HS .. (h+1)*HS - 1. Seen as (B,NH,T,HS) nothing moves, and context is written where
     * out_proj will read it. */
    View queries = transpose(view(q, B, T, NH, HS), 1, 2);
    View keys = transpose(view(k, B, T, NH, HS), 1, 2);
    View values = transpose(view(v, B, T, NH, HS), 1, 2);
    View heads = transpose(view(context, B, T, NH, HS), 1, 2);
    View pairs = view(weights, B, NH, T, T);

    einsum_with("bhnd,bhmd->bhnm", pairs, queries, keys);
    softmax(weights, s);
    if (s->dropout > 0)
        apply_dropout(s->dropout_stream, weights, weights_count(s), s->dropout);
    einsum_with("bhnm,bhmd->bhnd", heads, pairs, values);

    /* nn.Linear keeps its matrix (outputs, inputs); the letters say so. */
    einsum_with("bno,po->bnp", view(out, B, T, C_out), view(context, B, T, C_out),
                view(p->out_weight, C_out, C_out));
    add_bias(out, p->out_bias, B * T, (int)C_out);
}
