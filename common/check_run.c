#include "memory.h"
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
                               size_t width, double tolerance)
{
    float *picked = allocate_floats(count * width);
    for (size_t i = 0; i < count; i++)
        memcpy(picked + i * width, tensor + rows[i] * width, width * sizeof *picked);
    Comparison result = compare(picked, expected, count * width, tolerance);
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
    run->out = compare_rows(run->t.out, out, rows, count, width, tolerance);
    run->lse = compare_rows(run->t.lse, lse, rows, count, 1, tolerance);
    if (weights)
        run->weights = compare_rows(run->t.weights, weights, rows, count, keys, tolerance);
    free(out);
    free(lse);
    free(weights);
}

static void check_module(Run *run, const size_t *rows, size_t count, const uint8_t *keep)
{
    const AttentionShape *s = &run->problem.shape;
    OracleLinear *query = allocate_zeroed(s->heads, sizeof *query),
                 *key = allocate_zeroed(s->heads, sizeof *key),
                 *value = allocate_zeroed(s->heads, sizeof *value);
    OracleModule module = {.query = query, .key = key, .value = value};
    run->kernel->describe(&module, query, key, value, &run->t, s);

    bool per_head = run->kernel->weights == WEIGHTS_PER_HEAD;
    size_t keys = s->key_tokens, width = s->embed_out, row_weights = keys * (per_head ? s->heads : 1);
    double *out = allocate_zeroed(count * width, sizeof *out);
    double *weights = run->t.weights ? allocate_zeroed(count * row_weights, sizeof *weights) : NULL;
    double largest = oracle_module(out, weights, per_head, rows, count, run->t.x, &module, keep, s);
    double tolerance = tolerance_f32(s->key_tokens, largest);
    run->out = compare_rows(run->t.out, out, rows, count, width, tolerance);
    if (weights && !per_head)
        run->weights = compare_rows(run->t.weights, weights, rows, count, keys, tolerance);
    if (weights && per_head) { /* row (b, t) of the oracle is rows (b, h, t) of ours, h = 0 .. NH-1 */
        size_t *weight_rows = allocate_zeroed(count * s->heads, sizeof *weight_rows);
        for (size_t i = 0; i < count; i++)
            for (int h = 0; h < s->heads; h++)
                weight_rows[i * s->heads + h] =
                    lse_index(s, (int)(rows[i] / s->tokens), h, (int)(rows[i] % s->tokens));
        run->weights = compare_rows(run->t.weights, weights, weight_rows, count * s->heads, keys, tolerance);
        free(weight_rows);
    }
    free(out);
    free(weights);
    free(query);
    free(key);
    free(value);
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
    forward_run(run);

    size_t all = module ? (size_t)s->batch * s->tokens : lse_count(s);
    run->sampled = all > SAMPLE && forward_flops(run) > all_at_most;
    size_t count = run->sampled ? SAMPLE : all;
    size_t *rows = allocate_zeroed(count, sizeof *rows);
    if (run->sampled)
        count = sample_rows(rows, SAMPLE, all, s->tokens);
    else
        for (size_t i = 0; i < all; i++)
            rows[i] = i;
    uint8_t *keep = dropout_mask(run);
    run->out = run->lse = run->weights = (Comparison){.passed = true};
    (module ? check_module : check_core)(run, rows, count, keep);
    free(keep);
    free(rows);
    return run->out.passed && run->lse.passed && run->weights.passed;
}

void check_text(char *text, size_t size, const Run *run)
{
    const struct {
        const char *name;
        const Comparison *c;
    } parts[] = {{"out", &run->out}, {"lse", &run->lse}, {"weights", &run->weights}};
    char one[200];
    comparison_text(one, sizeof one, &run->out);
    snprintf(text, size, "%s (%s)", one, run->sampled ? "sample" : "all");
    for (int i = 1; i < 3; i++)
        if (parts[i].c->count && !parts[i].c->passed) {
            comparison_text(one, sizeof one, parts[i].c);
            snprintf(text + strlen(text), size - strlen(text), "; %s: %s", parts[i].name, one);
        }
}
