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
 * nothing. weights are those after dropout. */
void causal_attention(float *out, float *weights, float *queries, float *keys, float *values, const float *x,
                      const float *w_query, const float *w_key, const float *w_value,
                      const AttentionShape *s);

#endif
