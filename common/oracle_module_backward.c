#include "oracle_internal.h"
#include "memory.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A module's gradients while they are worked on, one key/value head of one batch entry at a time. */
typedef struct {
    const OracleModule *module;
    const AttentionShape *s;
    OracleParameter *parameters;
    int parameter_count;
    OracleGradient core; /* lse and delta of every row, keep, s */
    double *lse, *delta;

    Matrix through; /* (C_out,C_out): all output projections in one, out = joined through^T */
    Matrix outer;   /* (C_out,C_out): dout^T joined, summed over all rows */
    double *sum;    /* (C_out): dout summed over all rows */

    double *x, *dx; /* (T,C) of the batch entry at hand; dx NULL: not wanted */
    double *dout;   /* (T,C_out) likewise */
    int kv_head, group;
    size_t first_row;                  /* the number of the group's first query row */
    double *q, *joined, *dq, *djoined; /* (group,T,HS): the query heads that share a key/value head */
    double *k, *v, *dk, *dv;           /* (T,HS) */
} Backward;

/* Where the gradient of the number at p belongs; NULL if it lies in no parameter. */
static double *gradient_of(const float *p, const Backward *w)
{
    for (int i = 0; i < w->parameter_count; i++) {
        const OracleParameter *parameter = &w->parameters[i];
        uintptr_t start = (uintptr_t)parameter->data, at = (uintptr_t)p;
        if (at >= start && at < start + parameter->count * sizeof *p)
            return parameter->gradient + (p - parameter->data);
    }
    return NULL;
}

/* Adds dweight (outputs,inputs) and dbias (outputs) to the gradients of a linear's parameters; NaN where they
 * are NULL, which no later sum undoes: not judged. */
static void add_gradients(const OracleLinear *linear, const double *dweight, const double *dbias,
                          size_t outputs, size_t inputs, const Backward *w)
{
    double *weight = gradient_of(linear->weight, w), *bias = gradient_of(linear->bias, w);
    for (size_t o = 0; o < outputs; o++) {
        for (size_t i = 0; weight && i < inputs; i++)
            weight[o * linear->stride_out + i * linear->stride_in] += dweight ? dweight[o * inputs + i] : NAN;
        if (bias)
            bias[o] += dbias ? dbias[o] : NAN;
    }
}

/* sum (columns) += the rows of m (rows,columns) */
static void add_rows(double *sum, const double *m, size_t rows, size_t columns)
{
    for (size_t row = 0; row < rows; row++)
        for (size_t i = 0; i < columns; i++)
            sum[i] += m[row * columns + i];
}

/* Back through y = linear(x), dy (T,HS): dx += dy weight, dweight += dy^T x, dbias += dy summed over the
 * rows. With linear NULL y is x. */
static void back_project(const OracleLinear *linear, double *dy, bool want_parameters, const Backward *w)
{
    size_t tokens = w->s->tokens, inputs = w->s->embed, outputs = w->s->head_size;
    if (!linear) {
        for (size_t i = 0; w->dx && i < tokens * inputs; i++)
            w->dx[i] += dy[i];
        return;
    }
    if (w->dx) {
        double *weight = oracle_matrix(linear, outputs, inputs);
        oracle_add_product(by_rows(w->dx, inputs), by_rows(dy, outputs), by_rows(weight, inputs), tokens,
                           outputs, inputs);
        free(weight);
    }
    if (want_parameters) {
        double *dweight = allocate_zeroed(outputs * inputs, sizeof *dweight);
        double *dbias = allocate_zeroed(outputs, sizeof *dbias);
        oracle_add_product(by_rows(dweight, inputs), transposed(by_rows(dy, outputs)), by_rows(w->x, inputs),
                           outputs, tokens, inputs);
        add_rows(dbias, dy, tokens, outputs);
        add_gradients(linear, dweight, dbias, outputs, inputs, w);
        free(dweight);
        free(dbias);
    }
}

/* The linear of head h, or NULL for x itself. */
static const OracleLinear *head_of(const OracleLinear *linears, int h)
{
    return linears ? &linears[h] : NULL;
}

/* Turns each row of a head by its position, or back. */
static void rotate_rows(double *rows, double direction, const Backward *w)
{
    size_t size = w->s->head_size;
    for (int t = 0; w->module->rope_theta > 0 && t < w->s->tokens; t++)
        oracle_rotate(rows + t * size, w->s->head_size, direction * t, w->module->rope_theta);
}

/* x to q, k and v, to the heads' outputs, and what these add to dout^T joined. */
static void forward(Backward *w)
{
    size_t tokens = w->s->tokens, embed = w->s->embed, size = w->s->head_size, width = w->s->embed_out;
    oracle_project(w->k, head_of(w->module->key, w->kv_head), w->x, tokens, embed, size);
    oracle_project(w->v, head_of(w->module->value, w->kv_head), w->x, tokens, embed, size);
    rotate_rows(w->k, 1, w);
    for (int i = 0; i < w->group; i++) {
        double *q = w->q + i * tokens * size, *joined = w->joined + i * tokens * size;
        int h = w->kv_head * w->group + i;
        oracle_project(q, head_of(w->module->query, h), w->x, tokens, embed, size);
        rotate_rows(q, 1, w);
#pragma omp parallel for schedule(dynamic) if (tokens * tokens * size > SMALL)
        for (size_t t = 0; t < tokens; t++) {
            size_t row = w->first_row + i * tokens + t;
            oracle_attend_row(joined + t * size, &w->lse[row], NULL, row, q + t * size, w->k, w->v,
                              w->core.keep, w->s);
        }
        if (w->module->outputs > 0)
            oracle_add_product((Matrix){w->outer.at + h * size, width, 1},
                               transposed(by_rows(w->dout, width)), by_rows(joined, size), width, tokens,
                               size);
    }
}

/* dout to the gradients of the heads' outputs, of q, k and v, of x and of the heads' projections. */
static void backward(bool want_parameters, Backward *w)
{
    size_t tokens = w->s->tokens, size = w->s->head_size, width = w->s->embed_out, rows = w->group * tokens;
    memset(w->djoined, 0, rows * size * sizeof *w->djoined);
    for (int i = 0; i < w->group; i++) {
        double *djoined = w->djoined + i * tokens * size;
        size_t column = (w->kv_head * w->group + i) * size;
        if (w->module->outputs > 0)
            oracle_add_product(by_rows(djoined, size), by_rows(w->dout, width),
                               (Matrix){w->through.at + column, width, 1}, tokens, width, size);
        for (size_t t = 0; w->module->outputs == 0 && t < tokens; t++)
            memcpy(djoined + t * size, w->dout + t * width + column, size * sizeof *djoined);
    }
    for (size_t i = 0; i < rows; i++)
        w->delta[w->first_row + i] = oracle_dot(w->djoined + i * size, w->joined + i * size, w->s->head_size);

#pragma omp parallel for schedule(dynamic) if (rows * tokens * size > SMALL)
    for (size_t i = 0; i < rows; i++) {
        OracleQuery query = {w->q + i * size, w->djoined + i * size, w->first_row + i};
        oracle_dq_row(w->dq + i * size, query, w->k, w->v, &w->core);
    }
#pragma omp parallel for schedule(dynamic) if (rows * tokens * size > SMALL)
    for (size_t t2 = 0; t2 < tokens; t2++) {
        OracleKey key = {w->k + t2 * size, w->v + t2 * size, (int)t2};
        OracleQuery queries = {w->q, w->djoined, w->first_row};
        oracle_dkv_row(w->dk + t2 * size, w->dv + t2 * size, key, queries, rows, &w->core);
    }

    for (int i = 0; i < w->group; i++) {
        rotate_rows(w->dq + i * tokens * size, -1, w);
        back_project(head_of(w->module->query, w->kv_head * w->group + i), w->dq + i * tokens * size,
                     want_parameters, w);
    }
    rotate_rows(w->dk, -1, w);
    back_project(head_of(w->module->key, w->kv_head), w->dk, want_parameters, w);
    back_project(head_of(w->module->value, w->kv_head), w->dv, want_parameters, w);
}

/* Leaves NaN, for not judged, where this key/value head's gradients and its group's would be. */
static void leave_out(const Backward *w)
{
    size_t embed = w->s->embed, size = w->s->head_size, width = w->s->embed_out, columns = w->group * size;
    for (size_t o = 0; w->module->outputs == 1 && o < width; o++)
        for (size_t c = 0; c < columns; c++)
            w->outer.at[o * width + w->kv_head * columns + c] = NAN;
    for (int h = w->kv_head * w->group; w->module->query && h < (w->kv_head + 1) * w->group; h++)
        add_gradients(&w->module->query[h], NULL, NULL, size, embed, w);
    if (w->module->key)
        add_gradients(&w->module->key[w->kv_head], NULL, NULL, size, embed, w);
    if (w->module->value)
        add_gradients(&w->module->value[w->kv_head], NULL, NULL, size, embed, w);
}

/* The output projections' gradients. With one, out = joined W0^T + b0: dW0 = outer, db0 = sum. With two,
 * out = (joined W0^T + b0) W1^T + b1: dW0 = W1^T outer, db0 = sum W1, dW1 = outer W0^T + sum^T b0, db1 = sum. */
static void back_outputs(const Backward *w)
{
    size_t width = w->s->embed_out;
    const OracleLinear *first = &w->module->output[0], *second = &w->module->output[1];
    if (w->module->outputs == 1)
        add_gradients(first, w->outer.at, w->sum, width, width, w);
    if (w->module->outputs < 2)
        return;

    OracleLinear first_transposed = {first->weight, NULL, first->stride_in, first->stride_out};
    double *w0_transposed = oracle_matrix(&first_transposed, width, width);
    double *w1 = oracle_matrix(second, width, width);
    double *dweight = allocate_zeroed(width * width, sizeof *dweight);
    double *dbias = allocate_zeroed(width, sizeof *dbias);
    oracle_add_product(by_rows(dweight, width), transposed(by_rows(w1, width)), w->outer, width, width,
                       width);
    oracle_add_product(by_rows(dbias, width), by_rows(w->sum, width), by_rows(w1, width), 1, width, width);
    add_gradients(first, dweight, dbias, width, width, w);

    for (size_t o = 0; o < width; o++)
        for (size_t i = 0; i < width; i++)
            dweight[o * width + i] = first->bias ? w->sum[o] * first->bias[i] : 0;
    oracle_add_product(by_rows(dweight, width), w->outer, by_rows(w0_transposed, width), width, width, width);
    add_gradients(second, dweight, w->sum, width, width, w);
    free(w0_transposed);
    free(w1);
    free(dweight);
    free(dbias);
}

/* (C_out,C_out): the product of the output projections, or NULL without any. */
static double *outputs_in_one(const OracleModule *module, size_t width)
{
    if (module->outputs == 0)
        return NULL;
    double *first = oracle_matrix(&module->output[0], width, width);
    if (module->outputs == 1)
        return first;
    double *second = oracle_matrix(&module->output[1], width, width);
    double *both = allocate_zeroed(width * width, sizeof *both);
    oracle_add_product(by_rows(both, width), by_rows(second, width), by_rows(first, width), width, width,
                       width);
    free(first);
    free(second);
    return both;
}

void oracle_module_backward(double *dx, OracleParameter *parameters, int parameter_count, bool sample,
                            const float *dout, const float *x, const OracleModule *module,
                            const uint8_t *keep, const AttentionShape *s)
{
    size_t tokens = s->tokens, embed = s->embed, width = s->embed_out;
    int group = s->heads / s->kv_heads;
    size_t key_size = tokens * s->head_size, query_size = group * key_size;
    Backward w = {.module = module,
                  .s = s,
                  .parameters = parameters,
                  .parameter_count = parameter_count,
                  .lse = allocate_zeroed(lse_count(s), sizeof(double)),
                  .delta = allocate_zeroed(lse_count(s), sizeof(double)),
                  .through = by_rows(outputs_in_one(module, width), width),
                  .outer = by_rows(allocate_zeroed(width * width, sizeof(double)), width),
                  .sum = allocate_zeroed(width, sizeof(double)),
                  .x = allocate_zeroed(tokens * embed, sizeof(double)),
                  .dout = allocate_zeroed(tokens * width, sizeof(double)),
                  .group = group,
                  .q = allocate_zeroed(4 * query_size, sizeof(double)),
                  .k = allocate_zeroed(4 * key_size, sizeof(double))};
    w.joined = w.q + query_size, w.dq = w.joined + query_size, w.djoined = w.dq + query_size;
    w.v = w.k + key_size, w.dk = w.v + key_size, w.dv = w.dk + key_size;
    w.core = (OracleGradient){.lse = w.lse, .delta = w.delta, .keep = keep, .s = s};

    /* The sample: dx of one batch entry, the projections of one key/value head and its group. Where there are
     * two output projections the second one's gradient needs every head's output. */
    const uint32_t counter[4] = {0};
    uint32_t drawn[4];
    philox4x32(drawn, counter, 123);
    int sampled_entry = (int)(drawn[0] % (uint32_t)s->batch);
    int sampled_head = (int)(drawn[1] % (uint32_t)s->kv_heads);
    bool every_head = !sample || s->batch == 1;

    for (int i = 0; i < parameter_count; i++)
        memset(parameters[i].gradient, 0, parameters[i].count * sizeof(double));
    for (int b = 0; b < s->batch; b++) {
        bool want_dx = !sample || b == sampled_entry;
        double *dx_b = dx + b * tokens * embed;
        for (size_t i = 0; i < tokens * embed; i++)
            dx_b[i] = want_dx ? 0 : NAN;
        w.dx = want_dx ? dx_b : NULL;
        oracle_widen(w.x, x + b * tokens * embed, tokens * embed);
        oracle_widen(w.dout, dout + b * tokens * width, tokens * width);
        add_rows(w.sum, w.dout, tokens, width);
        for (int g = 0; g < s->kv_heads; g++) {
            bool want_parameters = every_head || g == sampled_head;
            w.kv_head = g;
            w.first_row = lse_index(s, b, g * group, 0);
            if (want_dx || want_parameters || module->outputs == 2)
                forward(&w);
            if (want_dx || want_parameters)
                backward(want_parameters, &w);
            if (!want_parameters && b == 0)
                leave_out(&w);
        }
    }
    back_outputs(&w);

    free(w.lse);
    free(w.delta);
    free(w.through.at);
    free(w.outer.at);
    free(w.sum);
    free(w.x);
    free(w.dout);
    free(w.q);
    free(w.k);
}
