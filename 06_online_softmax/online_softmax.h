/* Online softmax: attention in one pass over the keys, and the matrix that it does without.
 *
 *   q, out (B,NH,T,HS)    k, v (B,NH,TK,HS)    lse (B,NH,T)    weights (B,NH,T,TK)    row-major floats
 *
 * Both functions take any mask, bias, scale and dropout that the shape names, and one key/value head for each
 * query head (kv_heads = heads). A row with no key allowed: out = 0, lse = -inf. A NaN that a row can see
 * reaches its out and lse. Nothing is allocated and nothing can fail.
 *
 * Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021,
 * "Self-attention does not need O(n^2) memory".
 */
#ifndef ONLINE_SOFTMAX_H
#define ONLINE_SOFTMAX_H

#include "shape.h"

/* softmax(scale Q K^T + bias) V, one step after the other, the T x TK matrix in memory. weights are kept,
 * after dropout, which is drawn from s->dropout_stream in memory order, as PyTorch's nn.Dropout draws it. */
void attention_materialised(float *out, float *lse, float *weights, const float *q, const float *k,
                            const float *v, const AttentionShape *s);

/* The same in one pass over the keys, without the matrix. Dropout is drawn by position (dropout_keeps). */
void attention_online(float *out, float *lse, const float *q, const float *k, const float *v,
                      const AttentionShape *s);

/* What one query row knows of the keys it has seen. `o` belongs to the caller. */
typedef struct {
    float m;  /* the largest score; -inf before the first */
    float l;  /* the sum of exp(score - m) */
    float *o; /* (HS) the sum of exp(score - m) * value, not yet divided by l */
} PartialRow;

/* A row that has seen nothing: m = -inf, l = 0, o = 0. */
PartialRow empty_row(float *o, int head_size);

/* Shows the keys from <= t2 < to to row (b, h, t). Only for to <= keys_end(s, b, t). */
void add_keys(PartialRow *row, const float *q, const float *k, const float *v, const AttentionShape *s, int b,
              int h, int t, int from, int to);

/* into = what a row knows that has seen the keys of both. Any order and any grouping of merges gives the
 * same, up to rounding; merging with an empty row changes nothing. */
void merge_partials(PartialRow *into, const PartialRow *other, int head_size);

/* Divides o by l, which makes it the row's output, and returns the row's lse = m + log l. */
float finish_row(PartialRow *row, int head_size);

#endif
