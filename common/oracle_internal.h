/* What the oracle's forward and backward share: nothing outside of the oracle calls these. */
#ifndef COMMON_ORACLE_INTERNAL_H
#define COMMON_ORACLE_INTERNAL_H

#include "oracle_backward.h"

/* Below this many multiplications a loop is not worth waking the other threads for. */
enum { SMALL = 1 << 16 };

/* Element (i, j) is at[i * row + j * column]. */
typedef struct {
    double *at;
    size_t row, column;
} Matrix;

static inline Matrix by_rows(double *at, size_t width)
{
    return (Matrix){at, width, 1};
}

static inline Matrix transposed(Matrix m)
{
    return (Matrix){m.at, m.column, m.row};
}

/* Eight sums side by side: compilers make a vector of them, and may not do so of a single sum. */
static inline double oracle_dot(const double *a, const double *b, int n)
{
    enum { WIDTH = 8 };
    double part[WIDTH] = {0}, sum = 0;
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        for (int j = 0; j < WIDTH; j++)
            part[j] += a[i + j] * b[i + j];
    for (; i < n; i++)
        sum += a[i] * b[i];
    for (int j = 0; j < WIDTH; j++)
        sum += part[j];
    return sum;
}

/* out[0..n) = in[0..n) */
void oracle_widen(double *out, const float *in, size_t n);

/* c (rows,columns) += a (rows,inner) b (inner,columns). The columns of b and c lie side by side, so that the
 * inner loop runs along them. */
void oracle_add_product(Matrix c, Matrix a, Matrix b, size_t rows, size_t inner, size_t columns);

/* The weight as a new matrix (outputs, inputs). */
double *oracle_matrix(const OracleLinear *linear, size_t outputs, size_t inputs);

/* out (count, outputs) = linear(x), x (count, inputs), or a copy of x where linear is NULL. */
void oracle_project(double *out, const OracleLinear *linear, double *x, size_t count, size_t inputs,
                    size_t outputs);

/* Rotary embedding of one row of a head, in place: dimensions i and i + HS/2, as a point of the plane, turn
 * by position * theta^(-2i/HS). Su and others 2021, in the pairing of Hugging Face's Llama. */
void oracle_rotate(double *row, int size, double position, double theta);

/* What dropout multiplies the weight of the pair (row, key) by: 1 / (1 - p), 0, or 1 without dropout. */
double oracle_dropout(size_t row, int key, const uint8_t *keep, const AttentionShape *s);

/* softmax(scale q.k + bias) v for one row, in two passes: the scores of the keys allowed and their maximum,
 * then the sum; then the weighted values.
 *   out (HS), lse (1), weights (TK)   written; each may be NULL
 *   row                               (b*NH + h)*T + t
 *   q (HS), k, v (TK,HS)              this row's query, the keys and values of its key/value head
 * Returns the largest |score|. */
double oracle_attend_row(double *out, double *lse, double *weights, size_t row, const double *q,
                         const double *k, const double *v, const uint8_t *keep, const AttentionShape *s);

/* A query row and its gradient: q, dout (HS), and its number (b*NH + h)*T + t. A key row: k, v (HS). */
typedef struct {
    const double *q, *dout;
    size_t row;
} OracleQuery;
typedef struct {
    const double *k, *v;
    int t2;
} OracleKey;

/* dq (HS) of one query, k and v (TK,HS) of its key/value head; dk, dv (HS) of one key, from the `rows` query
 * rows that share its head: q and dout (rows,HS) start at `queries`. Of g only lse, delta, keep and s are
 * read. */
void oracle_dq_row(double *dq, OracleQuery query, const double *k, const double *v, const OracleGradient *g);
void oracle_dkv_row(double *dk, double *dv, OracleKey key, OracleQuery queries, size_t rows,
                    const OracleGradient *g);

#endif
