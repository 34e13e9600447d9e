#include "memory.h"
#include "oracle_backward.h"
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void poison(float *tensor, size_t count)
{
    for (size_t i = 0; tensor && i < count; i++)
        tensor[i] = NAN;
}

/* The mask that a kernel will draw for dropout from its stream, as (B,NH,T,TK); NULL where the oracle needs
 * none. */
static uint8_t *dropout_mask(const Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    DropoutKind kind = run->kernel->dropout;
    if (s->dropout == 0 || kind == DROPOUT_POSITION)
        return NULL;
    uint8_t *keep = allocate_zeroed(weights_count(s), 1);
    RandomStream stream = run->after_inputs;
    size_t matrix = (size_t)s->tokens * s->key_tokens;
    if (kind == DROPOUT_STREAM)
        draw_dropout(&stream, keep, weights_count(s), s->dropout);
    else
        for (int h = 0; h < s->heads; h++)
            for (int b = 0; b < s->batch; b++)
                draw_dropout(&stream, keep + ((size_t)b * s->heads + h) * matrix, matrix, s->dropout);
    return keep;
}

/* rows of `width` numbers picked from a tensor. */
static Comparison compare_rows(const float *tensor, const double *expected, const size_t *rows, size_t count,
                               size_t width, double tolerance, double magnitude)
{
    float *picked = allocate_floats(count * width);
    for (size_t i = 0; i < count; i++)
        memcpy(picked + i * width, tensor + rows[i] * width, width * sizeof *picked);
    Comparison result = compare_gradient(picked, expected, count * width, tolerance, magnitude);
    free(picked);
    return result;
}

static void check_core(Run *run, const size_t *rows, size_t count, const uint8_t *keep)
{
    const AttentionShape *s = &run->problem.shape;
    size_t width = s->head_size, keys = s->key_tokens;
    double *out = allocate_zeroed(count * width, sizeof *out), *lse = allocate_zeroed(count, sizeof *lse);
    double *weights = run->t.weights ? allocate_zeroed(count * keys, sizeof *weights) : NULL;
    double largest = oracle_attention(out, lse, weights, rows, count, run->t.q, run->t.k, run->t.v, keep, s);
    double tolerance = tolerance_f32(s->key_tokens, largest);
    double of_out = run->kernel->bf16 ? tolerance_bf16(tolerance) : tolerance;
    run->out = compare_rows(run->t.out, out, rows, count, width, of_out, 0);
    run->lse = compare_rows(run->t.lse, lse, rows, count, 1, tolerance, 0);
    if (weights)
        run->weights = compare_rows(run->t.weights, weights, rows, count, keys, tolerance, 0);
    free(out);
    free(lse);
    free(weights);
}

/* The kernel's description of its module, with room for its heads. */
typedef struct {
    OracleLinear *query, *key, *value;
    OracleModule module;
} Description;

static Description describe(const Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    Description d = {.query = allocate_zeroed(s->heads, sizeof *d.query),
                     .key = allocate_zeroed(s->heads, sizeof *d.key),
                     .value = allocate_zeroed(s->heads, sizeof *d.value)};
    d.module = (OracleModule){.query = d.query, .key = d.key, .value = d.value};
    run->kernel->describe(&d.module, d.query, d.key, d.value, &run->t, s);
    return d;
}

static void free_description(Description *d)
{
    free(d->query);
    free(d->key);
    free(d->value);
}

static void check_module(Run *run, const size_t *rows, size_t count, const uint8_t *keep)
{
    const AttentionShape *s = &run->problem.shape;
    Description description = describe(run);

    bool per_head = run->kernel->weights == WEIGHTS_PER_HEAD;
    size_t keys = s->key_tokens, width = s->embed_out, row_weights = keys * (per_head ? s->heads : 1);
    double *out = allocate_zeroed(count * width, sizeof *out);
    double *weights = run->t.weights ? allocate_zeroed(count * row_weights, sizeof *weights) : NULL;
    double largest =
        oracle_module(out, weights, per_head, rows, count, run->t.x, &description.module, keep, s);
    double tolerance = tolerance_f32(s->key_tokens, largest);
    run->out = compare_rows(run->t.out, out, rows, count, width, tolerance, 0);
    if (weights && !per_head)
        run->weights = compare_rows(run->t.weights, weights, rows, count, keys, tolerance, 0);
    if (weights && per_head) { /* row (b, t) of the oracle is rows (b, h, t) of ours, h = 0 .. NH-1 */
        size_t *weight_rows = allocate_zeroed(count * s->heads, sizeof *weight_rows);
        for (size_t i = 0; i < count; i++)
            for (int h = 0; h < s->heads; h++)
                weight_rows[i * s->heads + h] =
                    lse_index(s, (int)(rows[i] / s->tokens), h, (int)(rows[i] % s->tokens));
        run->weights =
            compare_rows(run->t.weights, weights, weight_rows, count * s->heads, keys, tolerance, 0);
        free(weight_rows);
    }
    free(out);
    free(weights);
    free_description(&description);
}

/* ---- Gradients ---- */

/* Gradients of ordinary inputs have elements of about this size, unless they are zero on paper. An error of 1% in elements
 * a hundred times smaller still fails. */
#define ORDINARY 0.1

static void poison_gradients(Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    poison(run->t.dq, query_count(s));
    poison(run->t.dk, key_count(s));
    poison(run->t.dv, key_count(s));
    poison(run->t.dbias, bias_elements(s));
    poison(run->t.dx, run->t.dx ? (size_t)s->batch * s->tokens * s->embed : 0);
    for (int i = 0; i < run->parameters.count; i++)
        poison(run->parameters.list[i].gradient,
               run->parameters.list[i].size[0] * run->parameters.list[i].size[1]);
    for (int i = 0; i < MAX_BUFFERS && run->t.backward_workspace[i]; i++)
        poison(run->t.backward_workspace[i], run->backward_workspace_size[i]);
}

/* Of the gradients compared so far the run keeps the one that is furthest off. */
static void keep_worst(Run *run, const char *name, Comparison c)
{
    const Comparison *worst = &run->gradient;
    bool worse = worst->passed && (!c.passed || c.relative_l2 >= worst->relative_l2);
    if (!worse)
        return;
    run->gradient = c;
    snprintf(run->gradient_name, sizeof run->gradient_name, "%s", name);
}

static void check_core_gradients(Run *run, const size_t *rows, size_t count, const uint8_t *keep)
{
    const AttentionShape *s = &run->problem.shape;
    size_t width = s->head_size, all = lse_count(s);
    double *lse = allocate_zeroed(all, sizeof *lse), *delta = allocate_zeroed(all, sizeof *delta);
    /* In bf16 out was rounded before delta was made of it: the gradient is judged as that of what forward kept. */
    bool as_kept = run->sampled || run->kernel->bf16;
    double *out = as_kept ? NULL : allocate_zeroed(all * width, sizeof *out);
    if (out)
        oracle_attention(out, lse, NULL, NULL, all, run->t.q, run->t.k, run->t.v, keep, s);
    for (size_t row = 0; row < all; row++) {
        if (as_kept)
            lse[row] = run->t.lse[row];
        for (size_t i = row * width; i < (row + 1) * width; i++)
            delta[row] += (double)run->t.dout[i] * (out ? out[i] : (double)run->t.out[i]);
    }
    free(out);
    OracleGradient g = {run->t.q, run->t.k, run->t.v, run->t.dout, lse, delta, keep, s};

    double *dq = allocate_zeroed(count * width, sizeof *dq);
    oracle_dq(dq, rows, count, &g);
    keep_worst(run, "dq", compare_rows(run->t.dq, dq, rows, count, width, run->out.tolerance, ORDINARY));
    free(dq);

    size_t keys = (size_t)s->batch * s->kv_heads * s->key_tokens,
           judged = run->sampled && keys > 64 ? 64 : keys;
    size_t *key_rows = allocate_zeroed(judged, sizeof *key_rows);
    if (judged < keys)
        judged = sample_rows(key_rows, judged, keys, s->key_tokens);
    else
        for (size_t i = 0; i < keys; i++)
            key_rows[i] = i;
    double *dk = allocate_zeroed(judged * width, sizeof *dk),
           *dv = allocate_zeroed(judged * width, sizeof *dv);
    oracle_dkv(dk, dv, key_rows, judged, &g);
    keep_worst(run, "dk", compare_rows(run->t.dk, dk, key_rows, judged, width, run->out.tolerance, ORDINARY));
    keep_worst(run, "dv", compare_rows(run->t.dv, dv, key_rows, judged, width, run->out.tolerance, ORDINARY));
    free(dk);
    free(dv);
    free(key_rows);

    if (s->bias) {
        /* An element that was broadcast is a sum of many; along the keys it is a sum of zero. */
        double summed = (double)weights_count(s) / (double)bias_elements(s);
        double magnitude = fmax(ORDINARY, 0.01 * sqrt(summed));
        size_t elements = bias_elements(s), chosen = run->sampled && elements > 64 ? 64 : elements;
        size_t *which = allocate_zeroed(chosen, sizeof *which);
        if (chosen < elements)
            chosen = sample_rows(which, chosen, elements, s->key_tokens);
        else
            for (size_t i = 0; i < elements; i++)
                which[i] = i;
        double *dbias = allocate_zeroed(chosen, sizeof *dbias);
        oracle_dbias(dbias, which, chosen, &g);
        keep_worst(run, "dbias",
                   compare_rows(run->t.dbias, dbias, which, chosen, 1, run->out.tolerance, magnitude));
        free(dbias);
        free(which);
    }
    free(lse);
    free(delta);
}

/* Only what the oracle has judged: the rest of expected is NaN. Only in a sample may it have judged nothing. */
static Comparison compare_judged(const float *ours, double *expected, size_t count, double tolerance,
                                 bool sampled)
{
    float *picked = allocate_floats(count);
    size_t judged = 0;
    for (size_t i = 0; i < count; i++)
        if (!isnan(expected[i])) {
            picked[judged] = ours[i];
            expected[judged++] = expected[i];
        }
    Comparison result = compare_gradient(picked, expected, judged, tolerance, ORDINARY);
    result.passed = result.passed && (judged > 0 || sampled);
    free(picked);
    return result;
}

static void check_module_gradients(Run *run, const size_t *rows, size_t count, const uint8_t *keep)
{
    (void)rows;
    (void)count;
    const AttentionShape *s = &run->problem.shape;
    size_t x_size = (size_t)s->batch * s->tokens * s->embed;
    double *dx = allocate_zeroed(x_size, sizeof *dx);
    OracleParameter *parameters = allocate_zeroed(run->parameters.count, sizeof *parameters);
    for (int i = 0; i < run->parameters.count; i++) {
        parameters[i].data = run->parameters.list[i].data;
        parameters[i].count = run->parameters.list[i].size[0] * run->parameters.list[i].size[1];
        parameters[i].gradient = allocate_zeroed(parameters[i].count, sizeof(double));
    }
    Description description = describe(run);
    oracle_module_backward(dx, parameters, run->parameters.count, run->sampled, run->t.dout, run->t.x,
                           &description.module, keep, s);
    keep_worst(run, "dx", compare_judged(run->t.dx, dx, x_size, run->out.tolerance, run->sampled));
    for (int i = 0; i < run->parameters.count; i++) {
        char name[64];
        snprintf(name, sizeof name, "d_%s", run->parameters.list[i].name);
        keep_worst(run, name,
                   compare_judged(run->parameters.list[i].gradient, parameters[i].gradient,
                                  parameters[i].count, run->out.tolerance, run->sampled));
        free(parameters[i].gradient);
    }
    free_description(&description);
    free(parameters);
    free(dx);
}

bool check_run(Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    enum { SAMPLE = 64 };
    const double all_at_most = 1.5e9; /* floating-point operations that the oracle does in about a second */
    bool module = run->kernel->takes == TAKES_X;

    poison(run->t.out, run->out_size);
    poison(run->t.lse, run->t.lse ? lse_count(s) : 0);
    poison(run->t.weights, run->weights_size);
    for (int i = 0; i < MAX_BUFFERS && run->t.workspace[i]; i++)
        poison(run->t.workspace[i], run->workspace_size[i]);
    poison_on_device(run, PASS_FORWARD);
    forward_run(run);
    fetch_from_device(run, PASS_FORWARD);

    size_t all = module ? (size_t)s->batch * s->tokens : lse_count(s);
    run->sampled = all > SAMPLE && run_flops(run, run->pass) > all_at_most;
    size_t count = run->sampled ? SAMPLE : all;
    size_t *rows = allocate_zeroed(count, sizeof *rows);
    if (run->sampled)
        count = sample_rows(rows, SAMPLE, all, s->tokens);
    else
        for (size_t i = 0; i < all; i++)
            rows[i] = i;
    uint8_t *keep = dropout_mask(run);
    run->gradient = run->out = run->lse = run->weights = (Comparison){.passed = true};
    (module ? check_module : check_core)(run, rows, count, keep);
    if (run->pass != PASS_FORWARD) {
        poison_gradients(run);
        poison_on_device(run, PASS_BACKWARD);
        backward_run(run);
        fetch_from_device(run, PASS_BACKWARD);
        (module ? check_module_gradients : check_core_gradients)(run, rows, count, keep);
    }
    free(keep);
    free(rows);
    return run->out.passed && run->lse.passed && run->weights.passed && run->gradient.passed;
}

void check_text(char *text, size_t size, const Run *run)
{
    const struct {
        const char *name;
        const Comparison *c;
    } parts[] = {{"out", &run->out}, {"lse", &run->lse}, {"weights", &run->weights}};
    const char *judged = run->sampled ? "sample" : "all";
    char one[200];
    comparison_text(one, sizeof one, &run->out);
    snprintf(text, size, "%s (%s)", one, judged);
    if (run->pass != PASS_FORWARD && run->gradient.passed) {
        comparison_text(one, sizeof one, &run->gradient);
        snprintf(text, size, "out L2 %.1e; gradients, the furthest off is %s: %s (%s)", run->out.relative_l2,
                 run->gradient_name, one, judged);
    }
    if (!run->gradient.passed) {
        comparison_text(one, sizeof one, &run->gradient);
        snprintf(text + strlen(text), size - strlen(text), "; %s: %s", run->gradient_name, one);
    }
    for (int i = 1; i < 3; i++)
        if (parts[i].c->count && !parts[i].c->passed) {
            comparison_text(one, sizeof one, parts[i].c);
            snprintf(text + strlen(text), size - strlen(text), "; %s: %s", parts[i].name, one);
        }
}
