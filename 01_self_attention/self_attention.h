/* Self-attention: every token looks at every token and takes a weighted mean of what they hold.
 *
 * Bahdanau, Cho and Bengio 2014 for the idea; Vaswani et al. 2017, section 3.2.1, for the form that stayed:
 *
 *     attention(Q, K, V) = softmax(scale * Q K^T) V,   scale = 1 / sqrt(HS)
 *
 * All tensors are row-major float32. B, T, TK, C, NH, HS and C_out are s->batch, s->tokens, s->key_tokens,
 * s->embed, s->heads, s->head_size and s->embed_out. No function here allocates, and none can fail. */
#ifndef SELF_ATTENTION_H
#define SELF_ATTENTION_H

#include "shape.h"

/* ---- One token, in three steps. ---- */

/* scores (n) written: scores[i] = scale * the dot product of query (width) and row i of keys (n, width). */
void score_keys(float *scores, const float *query, const float *keys, int n, int width, float scale);

/* row (n), in place: exp(row[i]) over the sum of them all, so that the row sums to 1. Returns the row's LSE,
 * the logarithm of that sum. A score of -inf weighs exactly 0; a row of nothing else becomes zeros, and its
 * LSE is -inf. NaN spreads over its row. */
float softmax_row(float *row, int n);

/* out (width) written: the mean of the rows of values (n, width), row i counted weights[i] times. */
void mix_values(float *out, const float *weights, const float *values, int n, int width);

/* Backward through softmax_row(): row (n), in place, from the gradient of the weights to that of the scores,
 * weights (n) being those that softmax_row() left. A weight of 0 passes nothing on. */
void softmax_row_backward(float *row, const float *weights, int n);

/* ---- All tokens. ----
 *
 * NAME_backward() is NAME's gradient: dout is that of the loss by out, dx by x, and so on. Gradients are
 * written, not added to; weights, queries, keys and values are read as NAME left them, and only written where
 * a line says so. */

/* Attention without anything to learn: a token is its own query, key and value.
 *   out (B,T,C), weights (B,1,T,T)             written
 *   x (B,T,C)                                  read; C_out = C, one head
 * The scale is s->scale; the notebook's is 1. */
void attention_dot_product(float *out, float *weights, const float *x, const AttentionShape *s);

/*   dx (B,T,C)                                 written
 *   dscores (B,1,T,T)                          written, then read
 *   dout (B,T,C), weights, x                   read */
void attention_dot_product_backward(float *dx, float *dscores, const float *dout, const float *weights,
                                    const float *x, const AttentionShape *s);

/* SelfAttention_v1: queries, keys and values are x times a matrix each, x @ W.
 *   out (B,T,C_out), weights (B,1,T,T)         written
 *   queries, keys, values (B,T,C_out)          written, then read
 *   x (B,T,C)                                  read; one head, so HS = C_out
 *   w_query, w_key, w_value (C,C_out)          read */
void self_attention_v1(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                       const float *w_query, const float *w_key, const float *w_value,
                       const AttentionShape *s);

/*   dx (B,T,C)                                 written: the sum of what comes back through all three
 *   dw_query, dw_key, dw_value (C,C_out)       written
 *   dqueries, dkeys, dvalues (B,T,C_out)       written, then read
 *   dscores (B,1,T,T)                          written, then read
 *   dout (B,T,C_out), and all of forward's     read */
void self_attention_v1_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                                float *dkeys, float *dvalues, float *dscores, const float *dout,
                                const float *weights, const float *queries, const float *keys,
                                const float *values, const float *x, const float *w_query, const float *w_key,
                                const float *w_value, const AttentionShape *s);

/* SelfAttention_v2: the same with nn.Linear, which keeps its matrix the other way round: x @ W^T.
 *   w_query, w_key, w_value (C_out,C)          read; the rest as in v1 */
void self_attention_v2(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                       const float *w_query, const float *w_key, const float *w_value,
                       const AttentionShape *s);

/*   dx (B,T,C)                                 written: the sum of what comes back through all three
 *   dw_query, dw_key, dw_value (C_out,C)       written
 *   dqueries, dkeys, dvalues (B,T,C_out)       written, then read
 *   dscores (B,1,T,T)                          written, then read
 *   dout (B,T,C_out), and all of forward's     read */
void self_attention_v2_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                                float *dkeys, float *dvalues, float *dscores, const float *dout,
                                const float *weights, const float *queries, const float *keys,
                                const float *values, const float *x, const float *w_query, const float *w_key,
                                const float *w_value, const AttentionShape *s);

/* Scaled dot-product attention as three steps over the whole T x TK matrix: PyTorch's math path.
 *   out (B,NH,T,HS), weights (B,NH,T,TK)       written; weights after dropout
 *   softmax (B,NH,T,TK)                        written where s->dropout > 0: the weights before dropout, for
 *                                              the backward pass; else not touched and may be NULL
 *   lse (B,NH,T)                               written; NULL: not wanted
 *   q (B,NH,T,HS), k, v (B,NH,TK,HS)           read
 * Masks, lengths, bias and dropout as s says; causal with T != TK is aligned bottom-right. A row with no key
 * allowed: out = 0, lse = -inf. */
void attention_sdpa(float *out, float *lse, float *weights, float *softmax, const float *q, const float *k,
                    const float *v, const AttentionShape *s);

/*   dq (B,NH,T,HS), dk, dv (B,NH,TK,HS)        written; zeros for a query with nothing to attend to, and for a
 *                                              key that nothing attends to
 *   dbias                                      written: laid out as s->bias, with its strides, summed over
 *                                              what was broadcast; NULL: no bias, or not wanted
 *   dscores (B,NH,T,TK)                        written, then read: the gradient of scale * q.k + bias
 *   dout (B,NH,T,HS), and all of forward's     read; softmax only where s->dropout > 0 */
void attention_sdpa_backward(float *dq, float *dk, float *dv, float *dbias, float *dscores, const float *dout,
                             const float *weights, const float *softmax, const float *q, const float *k,
                             const float *v, const AttentionShape *s);

#endif
