/* Online softmax: attention in one pass over the keys, and the matrix that it does without.
 *
 *   q, out (B,NH,T,HS)    k, v (B,NH,TK,HS)    lse (B,NH,T)    weights (B,NH,T,TK)    row-major floats
 *
 * Every function takes any mask, bias, scale and dropout that the shape names, and one key/value head for each
 * query head (kv_heads = heads). A row with no key allowed: out = 0, lse = -inf, gradients 0. A NaN that a row
 * can see reaches its out, lse and gradients. Nothing is allocated and nothing can fail.
 *
 * Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021,
 * "Self-attention does not need O(n^2) memory".
 */
#ifndef ONLINE_SOFTMAX_H
#define ONLINE_SOFTMAX_H

#include "shape.h"

/* softmax(scale Q K^T + bias) V, one step after the other, the T x TK matrix in memory. weights are kept,
 * after dropout, which is drawn from s->dropout_stream in memory order, as PyTorch's nn.Dropout draws it.
 * softmax (B,NH,T,TK): the weights before dropout, which the backward pass needs too; written only where
 * s->dropout > 0, as they are the same otherwise. */
void attention_materialised(float *out, float *lse, float *weights, float *softmax, const float *q,
                            const float *k, const float *v, const AttentionShape *s);

/* The same in one pass over the keys, without the matrix. Dropout is drawn by position (dropout_keeps). */
void attention_online(float *out, float *lse, const float *q, const float *k, const float *v,
                      const AttentionShape *s);

/* What a backward pass reads and writes. dout is the gradient of out; of lse there is none. */
typedef struct {
    const float *q, *k, *v, *out, *lse, *dout; /* as forward was given them and left them; dout as out */
    float *dq, *dk, *dv;                       /* written: as q, k, v */
    float *dbias; /* written if s->bias is there: in its layout, summed over what it was broadcast to */
} AttentionBackward;

/* The gradients of attention_materialised, from its weights and softmax (the same pointer without dropout).
 * d_scores (B,NH,T,TK) is written: the gradient of the scores. lse is not read. */
void attention_materialised_backward(const AttentionBackward *g, const float *weights, const float *softmax,
                                     float *d_scores, const AttentionShape *s);

/* The gradients of attention_online. delta (B,NH,T) is written: rowsum(dout * out). No matrix is kept: each
 * weight is computed again from lse, twice (three times with a bias). A pair that is forbidden is not looked
 * at. Dao et al. 2022, "FlashAttention", appendix B.2. */
void attention_online_backward(const AttentionBackward *g, float *delta, const AttentionShape *s);

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
