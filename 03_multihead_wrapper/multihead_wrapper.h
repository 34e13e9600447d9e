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
 *                          diagonal
 *   softmax   (B,NH,T,T)   the same, written if s->dropout > 0: the weights before it; else left alone
 *   q, k, v   (B,T,HS)     written: this head's queries, keys, values
 *   x         (B,T,C)      read
 *   h         which head it is: its place in weights, and its turn to draw dropout from s->dropout_stream
 *
 * weights = softmax(s->scale Q K^T) over keys 0 .. t of row t, context = weights V. Vaswani et al. 2017,
 * equation 1. */
void causal_head(float *context, float *weights, float *softmax, float *q, float *k, float *v, const float *x,
                 const Head *head, int h, const AttentionShape *s);

/* nn.ModuleList of NH heads, concatenated along the last axis: head h fills columns h*HS .. (h+1)*HS - 1 of
 * out.
 *
 *   out                (B,T,C_out)    written, C_out = NH * HS
 *   weights, softmax   (B,NH,T,T)     written, as above
 *   q, k, v            (NH,B,T,HS)    written: kept for the gradient
 *   x                  (B,T,C)        read
 *   heads              (NH)           read */
void stacked_heads(float *out, float *weights, float *softmax, float *q, float *k, float *v, const float *x,
                   const Head *heads, const AttentionShape *s);

/* The same, then an output projection: out = concatenated heads * out_weight^T + out_bias. Section 3.2.2
 * there.
 *
 *   out         (B,T,C_out)    written
 *   context     (B,T,C_out)    written: the heads, concatenated
 *   out_weight  (C_out,C_out)  read
 *   out_bias    (C_out)        read
 *   the others as above */
void multihead_wrapper(float *out, float *weights, float *softmax, float *q, float *k, float *v,
                       float *context, const float *x, const Head *heads, const float *out_weight,
                       const float *out_bias, const AttentionShape *s);

/* ---- Gradients, in multihead_wrapper_backward.c. d_NAME is the gradient of a loss with respect to NAME and
 * has its shape. What forward left is read and stays. B*T must fit into an int. ---- */

/* The gradients of one head's matrices. */
typedef struct {
    float *query_weight, *key_weight, *value_weight;
} HeadGradient;

/* The gradient of causal_head.
 *
 *   d_x                (B,T,C)      written by head 0, added to by the others: all heads read one x
 *   d_head             (HS,C) three times   written
 *   d_q, d_k, d_v      (B,T,HS)     scratch
 *   d_scores           (B,T,T)      scratch
 *   d_context          columns 0 .. HS-1 of rows that lie s->embed_out apart   read
 *   weights, softmax   (B,NH,T,T)   read, as forward left them; softmax = weights without dropout
 *   q, k, v, x, head, h             read, as above */
void causal_head_backward(float *d_x, const HeadGradient *d_head, float *d_q, float *d_k, float *d_v,
                          float *d_scores, const float *d_context, const float *weights, const float *softmax,
                          const float *q, const float *k, const float *v, const float *x, const Head *head,
                          int h, const AttentionShape *s);

/* Of stacked_heads: head after head.
 *
 *   d_x                        (B,T,C)       written
 *   d_heads                    (NH)          written
 *   d_q, d_k, d_v, d_scores    scratch, as above: written over by each head in turn
 *   d_out                      (B,T,C_out)   read
 *   q, k, v                    (NH,B,T,HS)   read */
void stacked_heads_backward(float *d_x, const HeadGradient *d_heads, float *d_q, float *d_k, float *d_v,
                            float *d_scores, const float *d_out, const float *weights, const float *softmax,
                            const float *q, const float *k, const float *v, const float *x, const Head *heads,
                            const AttentionShape *s);

/* Of multihead_wrapper.
 *
 *   d_out_weight, d_out_bias   (C_out,C_out), (C_out)   written
 *   d_context                  (B,T,C_out)              scratch
 *   the others as above */
void multihead_wrapper_backward(float *d_x, const HeadGradient *d_heads, float *d_out_weight,
                                float *d_out_bias, float *d_q, float *d_k, float *d_v, float *d_context,
                                float *d_scores, const float *d_out, const float *weights,
                                const float *softmax, const float *q, const float *k, const float *v,
                                const float *context, const float *x, const Head *heads,
                                const float *out_weight, const AttentionShape *s);

#endif
