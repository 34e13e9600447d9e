/* The oracle's gradients, in double: what every backward pass is judged by.
 *
 * With dout = dL/dout and, for each query row, lse and delta = rowsum(dout * out), each pair (query, key)
 * gives P = exp(score - lse)      D = P after dropout      dP = dout.v, times 1/(1-p) or 0 for dropout dS = P
 * * (dP - delta)     dv += D * dout           dq += scale * dS * k      dk += scale * dS * q      dbias += dS
 * Rows with nothing to attend to have zero gradients.
 */
#ifndef COMMON_ORACLE_BACKWARD_H
#define COMMON_ORACLE_BACKWARD_H

#include "oracle.h"

/* One core problem, its forward result and the gradient of its output. */
typedef struct {
    const float *q, *k, *v;    /* (B,NH,T,HS), (B,NKV,TK,HS) twice */
    const float *dout;         /* (B,NH,T,HS) */
    const double *lse, *delta; /* (B,NH,T): the oracle's own or, where only a sample is judged, those of the
                                  kernel's out and lse */
    const uint8_t *keep;       /* as in oracle_attention */
    const AttentionShape *s;
} OracleGradient;

/* dq (count,HS) for query rows (b*NH + h)*T + t; rows NULL: all B*NH*T. */
void oracle_dq(double *dq, const size_t *rows, size_t count, const OracleGradient *g);

/* dk, dv (count,HS) for key rows (b*NKV + kv_head)*TK + t2, summed over the group of query heads; rows NULL:
 * all. */
void oracle_dkv(double *dk, double *dv, const size_t *rows, size_t count, const OracleGradient *g);

/* dbias (count) for elements of the bias as it lies in memory (s->bias[element], strides s->bias_stride),
 * summed over what was broadcast; elements NULL: all of them (bias_elements(s)). */
void oracle_dbias(double *dbias, const size_t *elements, size_t count, const OracleGradient *g);
size_t bias_elements(const AttentionShape *s); /* how many numbers the bias holds; 0 without one */

/* A parameter of a module and its gradient: OracleLinear's pointers (weight, bias) point into `data`; the
 * gradient has the same layout. */
typedef struct {
    const float *data;
    size_t count;
    double *gradient; /* written: the gradient, or NaN where it was not judged */
} OracleParameter;

/* The gradients of a module, dout (B,T,C_out).
 *   dx (B,T,C)       written: the gradient, or NaN where it was not judged
 * sample false: everything. sample true: what about ten seconds on two cores allow at (8,1024,768): dx of one
 * batch entry, and of the projections' gradients the rows of one head, with the part of the output
 * projections' gradients that costs no more (chosen by a fixed seed). Every parameter has some judged
 * elements wherever that is affordable. */
void oracle_module_backward(double *dx, OracleParameter *parameters, int parameter_count, bool sample,
                            const float *dout, const float *x, const OracleModule *module,
                            const uint8_t *keep, const AttentionShape *s);

#endif
