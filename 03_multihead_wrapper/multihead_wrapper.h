/* Many heads the obvious way: single heads of causal attention, one after another, their outputs side by
 * side. */
#ifndef MULTIHEAD_WRAPPER_H
#define MULTIHEAD_WRAPPER_H

#include "shape.h"

/* One head's matrices, each (HS,C): nn.Linear(C, HS) without a bias. */
typedef struct {
    const float *query_weight, *key_weight, *value_weight;
} Head;

/* One head of chapter 2's CausalAttention, over the whole batch.
 *
 *   context   columns 0 .. HS-1 of rows that lie s->embed_out apart, B*T of them   written
 *   weights   (B,NH,T,T)   the head's own (T,T) of each batch entry written, after dropout, zero above the
 * diagonal q, k, v   (B,T,HS)     written: this head's queries, keys, values x         (B,T,C)      read h
 * which head it is: its place in weights, and its turn to draw dropout from s->dropout_stream
 *
 * weights = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V. Vaswani et al. 2017,
 * equation 1. */
void causal_head(float *context, float *weights, float *q, float *k, float *v, const float *x,
                 const Head *head, int h, const AttentionShape *s);

/* nn.ModuleList of NH heads, concatenated along the last axis: head h fills columns h*HS .. (h+1)*HS - 1 of
 * out.
 *
 *   out       (B,T,C_out)  written, C_out = NH * HS
 *   weights   (B,NH,T,T)   written
 *   q, k, v   (B,T,HS)     written over by each head in turn
 *   x         (B,T,C)      read
 *   heads     (NH)         read */
void stacked_heads(float *out, float *weights, float *q, float *k, float *v, const float *x,
                   const Head *heads, const AttentionShape *s);

/* The same, then an output projection: out = concatenated heads * out_weight^T + out_bias. Section 3.2.2
 * there.
 *
 *   out         (B,T,C_out)    written
 *   context     (B,T,C_out)    written: the heads, concatenated
 *   out_weight  (C_out,C_out)  read
 *   out_bias    (C_out)        read
 *   the others as above */
void multihead_wrapper(float *out, float *weights, float *q, float *k, float *v, float *context,
                       const float *x, const Head *heads, const float *out_weight, const float *out_bias,
                       const AttentionShape *s);

#endif
