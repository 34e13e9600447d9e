/* Many heads from one matrix: the heads are columns of one wide product, found by strides and never moved. */
#ifndef PACKED_QKV_H
#define PACKED_QKV_H

#include "shape.h"

/* Causal attention of every head at once, with q, k, v read where the projection left them.
 *
 *   context     (B,T,NH,HS)   written: the heads side by side in each token's row, ready for the next
 * projection weights     (B,NH,T,T)    written, after dropout, zero above the diagonal q, k, v     rows of
 * tokens, row_stride floats apart, B*T of them; head h is columns h*HS .. (h+1)*HS - 1. read row_stride C_out
 * for three tensors of their own, 3*C_out for thirds of a packed one
 *
 * weights = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V: Vaswani et al. 2017,
 * equation 1. Dropout draws from s->dropout_stream over (B,NH,T,T) in memory order. */
void attend_heads(float *context, float *weights, const float *q, const float *k, const float *v,
                  int row_stride, const AttentionShape *s);

/* Three projections, each of all heads at once, then split: the notebooks' implementation 2.
 *
 *   out                                      (B,T,C_out)   written
 *   weights                                  (B,NH,T,T)    written
 *   q, k, v, context                         (B,T,C_out)   written: what is kept on the way
 *   x                                        (B,T,C)       read
 *   query_weight, key_weight, value_weight   (C_out,C)     read
 *   out_weight, out_bias                     (C_out,C_out), (C_out)   read */
void split_heads(float *out, float *weights, float *q, float *k, float *v, float *context, const float *x,
                 const float *query_weight, const float *key_weight, const float *value_weight,
                 const float *out_weight, const float *out_bias, const AttentionShape *s);

/* One projection, three times as wide: implementation 3, and c_attn of nanoGPT. Each row of qkv is a token's
 * queries, then its keys, then its values, every one of them NH heads of HS.
 *
 *   qkv                      (B,T,3*C_out)   written
 *   qkv_weight               (3*C_out,C)     read: the three matrices above one another
 *   proj_weight, proj_bias   (C_out,C_out), (C_out)   read
 *   the others as above */
void packed_qkv(float *out, float *weights, float *qkv, float *context, const float *x,
                const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                const AttentionShape *s);

/* nn.MultiheadAttention(bias=False) asked for its weights, then a projection: implementation 7. C_out = C.
 *
 *   averaged         (B,T,T)     written: the mean over the heads of the weights after dropout
 *   weights          (B,NH,T,T)  written: the heads' own
 *   attended         (B,T,C)     written: context * inner_weight^T, what nn.MultiheadAttention returns
 *   in_proj_weight   (3*C,C)     read: queries, keys, values as above
 *   inner_weight     (C,C)       read: its own out_proj.weight
 *   the others as above */
void torch_mha(float *out, float *averaged, float *weights, float *qkv, float *context, float *attended,
               const float *x, const float *in_proj_weight, const float *inner_weight,
               const float *proj_weight, const float *proj_bias, const AttentionShape *s);

#endif
