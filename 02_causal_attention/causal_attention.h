/* Causal self-attention: a token sees itself and what came before it, never what comes after.
 *
 * Vaswani et al. 2017, section 3.2.3; dropout on the weights as in the notebook's CausalAttention.
 *
 * All modules take one head and nn.Linear's matrices, as chapter 1's v2 does. Row-major float32:
 *   out (B,T,C_out), weights (B,1,T,T)         written; weights are 0 above the diagonal
 *   queries, keys, values (B,T,C_out)          written, then read
 *   x (B,T,C)                                  read
 *   w_query, w_key, w_value (C_out,C)          read
 * B, T, C and C_out are s->batch, s->tokens, s->embed and s->embed_out; scores are multiplied by s->scale,
 * 1 / sqrt(C_out). No function here allocates, and none can fail. */
#ifndef CAUSAL_ATTENTION_H
#define CAUSAL_ATTENTION_H

#include "shape.h"

/* ---- The steps, a row at a time. `allowed` is how many keys the row may see: the first ones. ---- */

/* row (n), in place: exp(row[i]) over the sum of them all. -inf weighs exactly 0; a row of nothing else
 * becomes zeros. NaN spreads over its row. */
void softmax_row(float *row, int n);

/* After the softmax: row (n) holds weights; those of the other keys become 0, the rest is divided by its sum.
 * Where that sum is 0 (see attention_renormalise) the row becomes NaN, 0/0, as it does in PyTorch. */
void renormalise_row(float *row, int n, int allowed);

/* Before the softmax: row (n) holds scores; those of the other keys become -inf. */
void mask_row(float *row, int n, int allowed);

/* ---- Modules. ---- */

/* Softmax over all T keys, then renormalise_row(). On paper the same weights as attention_minus_inf(); in
 * floats only while no hidden score of a row exceeds the row's largest allowed one by more than 87. Beyond
 * that fast_exp(score - largest) is 0 for every allowed key, and the row is lost: NaN. */
void attention_renormalise(float *out, float *weights, float *queries, float *keys, float *values,
                           const float *x, const float *w_query, const float *w_key, const float *w_value,
                           const AttentionShape *s);

/* mask_row(), then softmax over all T keys. Right for finite scores of any size. */
void attention_minus_inf(float *out, float *weights, float *queries, float *keys, float *values,
                         const float *x, const float *w_query, const float *w_key, const float *w_value,
                         const AttentionShape *s);

/* CausalAttention: attention_minus_inf(), and dropout on its weights: each is zeroed with probability
 * s->dropout, or multiplied by 1 / (1 - s->dropout). s->dropout_stream is drawn from as PyTorch draws on a
 * CPU, for all of (B,T,T) in memory order, the zeros above the diagonal included; s->dropout = 0 draws
 * nothing. weights are those after dropout; softmax (B,1,T,T) is written where s->dropout > 0, with those
 * before it, which the backward pass needs, and may be NULL where not. */
void causal_attention(float *out, float *weights, float *softmax, float *queries, float *keys, float *values,
                      const float *x, const float *w_query, const float *w_key, const float *w_value,
                      const AttentionShape *s);

/* ---- Backward. ---- */

/* Through dropout: row (n), in place, from the gradient of the dropped weights to that of the softmax's.
 * weights (n) are those after dropout: one that is 0 was dropped, or was 0 before and passes nothing on. */
void dropout_row_backward(float *row, const float *weights, int n, float p);

/* Through the softmax and the mask: row (n), in place, from the gradient of the weights to that of the scores,
 * weights (n) being those that softmax_row() left. A weight of 0, hidden ones among them, passes nothing on.
 * The same for weights that renormalise_row() left, for they are the same weights (README). */
void softmax_row_backward(float *row, const float *weights, int n);

/* The gradient of all three modules; of the first two with s->dropout = 0.
 *   dx (B,T,C)                                 written
 *   dw_query, dw_key, dw_value (C_out,C)       written
 *   dqueries, dkeys, dvalues (B,T,C_out)       written, then read
 *   dscores (B,1,T,T)                          written, then read
 *   dout (B,T,C_out)                           read: the gradient of the loss by out
 *   weights, softmax, queries, keys, values    read, as forward left them; softmax only where s->dropout > 0
 *   x, w_query, w_key, w_value                 read
 * A row that attention_renormalise() has lost (NaN) makes the gradients NaN as well. */
void causal_attention_backward(float *dx, float *dw_query, float *dw_key, float *dw_value, float *dqueries,
                               float *dkeys, float *dvalues, float *dscores, const float *dout,
                               const float *weights, const float *softmax, const float *queries,
                               const float *keys, const float *values, const float *x, const float *w_query,
                               const float *w_key, const float *w_value, const AttentionShape *s);

#endif
