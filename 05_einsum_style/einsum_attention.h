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

/* What lies between x and out. */
typedef struct {
    float *q, *k, *v; /* (B,T,C_out): x W_query, x W_key, x W_value */
    float *softmax;   /* (B,NH,T,T): the probabilities before dropout; without dropout the same memory as: */
    float *weights;   /* (B,NH,T,T): after dropout, drawn from s->dropout_stream; 0 above the diagonal */
    float *context;   /* (B,T,C_out): the heads side by side */
} EinsumActivations;

/* softmax = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V, out = context W_out^T +
 * b.
 *
 *   out (B,T,C_out), a   written, C_out = NH * HS
 *   x   (B,T,C)          read */
void einsum_attention(float *out, const EinsumActivations *a, const float *x, const EinsumParameters *p,
                      EinsumFunction *einsum_with, const AttentionShape *s);

/* Gradients: of the parameters, with their shapes, and of what lies between. */
typedef struct {
    float *W_query, *W_key, *W_value, *out_weight, *out_bias;
} EinsumParameterGradients;

typedef struct {
    float *q, *k, *v, *context; /* (B,T,C_out) */
    float *weights;             /* (B,NH,T,T); ends as the gradient of the scores Q K^T */
    float *x_part;              /* (B,T,C): what one of q, k, v gives to dx */
} EinsumActivationGradients;

/* The gradients, from dout and from what the forward left in a.
 *
 *   dx   (B,T,C), dp, da                             written
 *   dout (B,T,C_out), a, x (B,T,C), p (but the bias) read */
void einsum_attention_backward(float *dx, const EinsumParameterGradients *dp,
                               const EinsumActivationGradients *da, const float *dout,
                               const EinsumActivations *a, const float *x, const EinsumParameters *p,
                               EinsumFunction *einsum_with, const AttentionShape *s);

#endif
