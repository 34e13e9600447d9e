/* Many heads from one matrix: the heads are columns of one wide product, found by strides and never moved. */
#ifndef PACKED_QKV_H
#define PACKED_QKV_H

#include "shape.h"

/* Causal attention of every head at once, with q, k, v read where the projection left them.
 *
 *   context   (B,T,NH,HS)   written: heads side by side in a token's row, ready for the next projection
 *   weights   (B,NH,T,T)    written, after dropout, zero above the diagonal
 *   softmax   (B,NH,T,T)    written if s->dropout > 0: the weights before it; else left alone
 *   q, k, v                 read: B*T rows of tokens, row_stride floats apart, head h in columns h*HS ..
 *                           (h+1)*HS - 1; row_stride is C_out for three tensors, 3*C_out for a packed one
 *
 * weights = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V: Vaswani et al. 2017,
 * equation 1. Dropout draws from s->dropout_stream over (B,NH,T,T) in memory order. */
void attend_heads(float *context, float *weights, float *softmax, const float *q, const float *k,
                  const float *v, int row_stride, const AttentionShape *s);

/* Three projections, each of all heads at once, then split: the notebooks' implementation 2.
 *
 *   out                                      (B,T,C_out)   written
 *   weights, softmax                         (B,NH,T,T)    written, as above
 *   q, k, v, context                         (B,T,C_out)   written: what is kept on the way
 *   x                                        (B,T,C)       read
 *   query_weight, key_weight, value_weight   (C_out,C)     read
 *   out_weight, out_bias                     (C_out,C_out), (C_out)   read */
void split_heads(float *out, float *weights, float *softmax, float *q, float *k, float *v, float *context,
                 const float *x, const float *query_weight, const float *key_weight,
                 const float *value_weight, const float *out_weight, const float *out_bias,
                 const AttentionShape *s);

/* One projection, three times as wide: implementation 3, and c_attn of nanoGPT. Each row of qkv is a token's
 * queries, then its keys, then its values, every one of them NH heads of HS.
 *
 *   qkv                      (B,T,3*C_out)   written
 *   qkv_weight               (3*C_out,C)     read: the three matrices above one another
 *   proj_weight, proj_bias   (C_out,C_out), (C_out)   read
 *   the others as above */
void packed_qkv(float *out, float *weights, float *softmax, float *qkv, float *context, const float *x,
                const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                const AttentionShape *s);

/* nn.MultiheadAttention(bias=False) asked for its weights, then a projection: implementation 7. C_out = C.
 *
 *   averaged         (B,T,T)      written: the mean over the heads of the weights after dropout
 *   weights, softmax (B,NH,T,T)   written, as above: the heads' own
 *   attended         (B,T,C)      written: context * inner_weight^T, what nn.MultiheadAttention returns
 *   in_proj_weight   (3*C,C)      read: queries, keys, values as above
 *   inner_weight     (C,C)        read: its own out_proj.weight
 *   the others as above */
void torch_mha(float *out, float *averaged, float *weights, float *softmax, float *qkv, float *context,
               float *attended, const float *x, const float *in_proj_weight, const float *inner_weight,
               const float *proj_weight, const float *proj_bias, const AttentionShape *s);

/* ---- Gradients, in packed_qkv_backward.c. d_NAME is the gradient of a loss with respect to NAME and has its
 * shape. All are written, not added to; what forward left is read and stays. B*T must fit into an int. ---- */

enum { BACKWARD_ROWS = 128 }; /* query rows whose scores' gradients are held at a time */

/* The gradient of attend_heads.
 *
 *   d_q, d_k, d_v      written: rows as those of q, k and v, row_stride apart
 *   d_scores           (B,NH,BACKWARD_ROWS,T), or T rows where T is less   scratch
 *   d_context          (B,T,NH,HS)   read
 *   weights, softmax   (B,NH,T,T)    read: as forward left them; softmax = weights without dropout
 *   q, k, v            read, as above */
void attend_heads_backward(float *d_q, float *d_k, float *d_v, float *d_scores, const float *d_context,
                           const float *weights, const float *softmax, const float *q, const float *k,
                           const float *v, int row_stride, const AttentionShape *s);

/* The gradients of the three modules: of x and each parameter, from d_out (B,T,C_out) and what forward left.
 * d_qkv (or d_q, d_k, d_v), d_context, d_attended and d_scores are scratch; the latter as above. */
void split_heads_backward(float *d_x, float *d_query_weight, float *d_key_weight, float *d_value_weight,
                          float *d_out_weight, float *d_out_bias, float *d_q, float *d_k, float *d_v,
                          float *d_context, float *d_scores, const float *d_out, const float *weights,
                          const float *softmax, const float *q, const float *k, const float *v,
                          const float *context, const float *x, const float *query_weight,
                          const float *key_weight, const float *value_weight, const float *out_weight,
                          const AttentionShape *s);

void packed_qkv_backward(float *d_x, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                         float *d_qkv, float *d_context, float *d_scores, const float *d_out,
                         const float *weights, const float *softmax, const float *qkv, const float *context,
                         const float *x, const float *qkv_weight, const float *proj_weight,
                         const AttentionShape *s);

void torch_mha_backward(float *d_x, float *d_in_proj_weight, float *d_inner_weight, float *d_proj_weight,
                        float *d_proj_bias, float *d_qkv, float *d_context, float *d_attended,
                        float *d_scores, const float *d_out, const float *weights, const float *softmax,
                        const float *qkv, const float *context, const float *attended, const float *x,
                        const float *in_proj_weight, const float *inner_weight, const float *proj_weight,
                        const AttentionShape *s);

#endif
