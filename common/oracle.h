/* The oracle: attention written once more as plainly as can be, in double, to judge every kernel.
 * It shares no code with the kernels but the mask's predicate (shape.h), which has tests of its own. */
#ifndef COMMON_ORACLE_H
#define COMMON_ORACLE_H

#include "shape.h"

/* Attention for chosen query rows, or for all.
 *   rows          count row numbers (b*NH + h)*T + t; NULL: all B*NH*T rows in order (count is then ignored)
 *   out           (count, HS)   written; NULL: not wanted
 *   lse           (count)       written; NULL: not wanted; -inf where a row has nothing to attend to (its out is zero)
 *   weights       (count, TK)   written, after dropout; NULL: not wanted
 *   q, k, v       (B,NH,T,HS), (B,NKV,TK,HS) twice
 *   keep          dropout's mask (B,NH,T,TK), 1 = stays; NULL: s->dropout is drawn by position, or is 0
 * Returns the largest |score| among allowed pairs, which the tolerance needs. */
double oracle_attention(double *out, double *lse, double *weights, const size_t *rows, size_t count,
                        const float *q, const float *k, const float *v, const uint8_t *keep,
                        const AttentionShape *s);

/* y[o] = sum over i of weight[o * stride_out + i * stride_in] * x[i], plus bias[o]: nn.Linear's weight (out,
 * in) has strides in, 1; a matrix that multiplies from the right, x @ W with W (in, out), has strides 1, out. */
typedef struct {
    const float *weight, *bias; /* bias may be NULL */
    size_t stride_out, stride_in;
} OracleLinear;

/* nn.Linear's weight, or rows of it. */
static inline OracleLinear oracle_linear(const float *weight, const float *bias, int inputs)
{
    OracleLinear linear = {weight, bias, (size_t)inputs, 1};
    return linear;
}

/* Head h's queries, keys and values: HS rows each of three weights (C_out,C), which may be thirds of one. */
static inline void oracle_heads(OracleLinear *query, OracleLinear *key, OracleLinear *value,
                                const float *query_weight, const float *key_weight, const float *value_weight,
                                const AttentionShape *s)
{
    for (int h = 0; h < s->heads; h++) {
        size_t first = (size_t)h * s->head_size * s->embed;
        query[h] = oracle_linear(query_weight + first, NULL, s->embed);
        key[h] = oracle_linear(key_weight + first, NULL, s->embed);
        value[h] = oracle_linear(value_weight + first, NULL, s->embed);
    }
}

/* A module: projections, attention, head-concatenation, output projections. A kernel that takes x describes
 * itself in these terms, and so is judged without its own arithmetic. */
typedef struct {
    const OracleLinear *query; /* (NH): per head, HS outputs from C inputs; NULL: x itself (then HS = C) */
    const OracleLinear *key, *value; /* (NKV) */
    OracleLinear output[2];          /* applied in turn to the concatenated heads, each C_out to C_out */
    int outputs;                     /* how many of them: 0, 1 or 2 */
    double rope_theta; /* rotary embedding of q and k (dimension i paired with i + HS/2); 0: none */
} OracleModule;

/* The module's output for chosen rows b*T + t of out (B,T,C_out), or for all.
 *   out           (count, C_out)   written
 *   weights       (count, TK), averaged over the heads, or (count, NH, TK) with per_head; NULL: not wanted
 *   x             (B,T,C), queries, keys and values alike (TK = T)
 *   keep          as above
 * Returns the largest |score|. Memory: q, k, v in double, of the batch entries that the rows name, one at a
 * time. */
double oracle_module(double *out, double *weights, bool per_head, const size_t *rows, size_t count,
                     const float *x, const OracleModule *module, const uint8_t *keep,
                     const AttentionShape *s);

/* Chooses up to `wanted` of `rows` row numbers, ascending and distinct: for each of a few slabs of `tokens`
 * rows the first, the last and those beside tile edges (15, 16, 63, 64, 127, 128), the rest by a fixed seed.
 * Returns how many. */
size_t sample_rows(size_t *chosen, size_t wanted, size_t rows, int tokens);

#endif
