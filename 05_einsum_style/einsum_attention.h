/* Causal multi-head attention written in einsum: the notebook's fourth implementation. Vaswani et al. 2017.
 */
#ifndef EINSUM_ATTENTION_H
#define EINSUM_ATTENTION_H

#include "einsum.h"
#include "shape.h"

/* The module's parameters. The first three multiply from the right, x @ W; out_weight is nn.Linear's and
 * multiplies as x @ W^T. */
typedef struct {
    const float *W_query, *W_key, *W_value; /* (C,C_out), inputs first */
    const float *out_weight, *out_bias;     /* (C_out,C_out), (C_out) */
} EinsumParameters;

/* einsum or einsum_loops */
typedef void EinsumFunction(const char *specification, View out, View a, View b);

/* weights = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V, out = context W_out^T +
 * b.
 *
 *   out      (B,T,C_out)   written, C_out = NH * HS
 *   weights  (B,NH,T,T)    written, after dropout (drawn from s->dropout_stream); 0 above the diagonal
 *   q, k, v  (B,T,C_out)   written: x W_query, x W_key, x W_value
 *   context  (B,T,C_out)   written: the heads side by side
 *   x        (B,T,C)       read */
void einsum_attention(float *out, float *weights, float *q, float *k, float *v, float *context,
                      const float *x, const EinsumParameters *p, EinsumFunction *einsum_with,
                      const AttentionShape *s);

#endif
