#include "claims.h"
#include "benchmark.h"
#include "error.h"
#include "flash_tiled.h"
#include "flash_tiled_simd.h"
#include "memory.h"
#include "narrow.h"
#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

typedef struct {
    FILE *file; /* NULL: none is wanted */
    int failed;
} Report;

/* A line with a tick or a cross. */
static void __attribute__((format(printf, 3, 4))) claim(Report *report, bool holds, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("  %s ", holds ? "✓" : "✗");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    report->failed += !holds;
}

static void write_figure(Report *report, const char *what, double figure, const char *unit)
{
    if (report->file)
        fprintf(report->file, "%s\t%s\t%.7g\t%s\n", machine_name(), what, isnan(figure) ? NAN : figure,
                unit); /* never -nan */
}

/* ---- Cold against warm ---- */

static double time_call(Run *run)
{
    double start = now();
    forward_run(run);
    return 1e3 * (now() - start);
}

static void open_kernel(Run *run, Options *options, const char *name)
{
    char *words[] = {"run", "--heads", "12", "--tokens", "1024", "--head-size", "64"};
    parse_options(options, sizeof words / sizeof *words, words);
    const Kernel *kernel = kernel_named(&chapter, name);
    Refusal refusal = open_run(run, &chapter, kernel, options, NULL, 1);
    if (refusal.exit_code)
        die(refusal.exit_code, "kernel %s %s", name, refusal.reason);
}

/* The first call in this process, the first with memory of its own, and the median of later ones. */
static void tell_cold(Report *report, const char *name)
{
    enum { WARM = 9 };
    double first = 0, fresh = 0, warm[WARM];
    char text[400], what[80];
    for (int again = 0; again < 2; again++) {
        Run run;
        Options options;
        open_kernel(&run, &options, name);
        *(again ? &fresh : &first) = time_call(&run);
        for (int i = 0; again && i < WARM; i++)
            warm[i] = time_call(&run);
        if (again) {
            bool right = check_run(&run);
            check_text(text, sizeof text, &run);
            claim(report, right, "%-14s %s", name, text);
        }
        close_run(&run);
        free_options(&options);
    }
    double ms = median(warm, WARM);
    printf("    first call %.2f ms, %.1f times a warm one; first with fresh memory %.2f ms, %.1f times; warm "
           "%.2f ms\n",
           first, first / ms, fresh, fresh / ms, ms);
    const double figures[] = {first, fresh, ms};
    static const char *const names[] = {"first call", "first call with fresh memory", "warm call"};
    for (int i = 0; i < 3; i++) {
        snprintf(what, sizeof what, "%s: %s", name, names[i]);
        write_figure(report, what, figures[i], "ms");
        if (i < 2)
            write_figure(report, what, figures[i] / ms, "warm calls");
    }
}

/* ---- -1e9 against -inf ---- */

typedef struct {
    const char *name;
    float (*round)(float x); /* to the type, and back */
} Type;

static float round_f32(float x)
{
    return x;
}
static float round_bf16(float x)
{
    return bf16_to_float(bf16_from_float(x));
}
static float round_half(float x)
{
    return half_to_float(half_from_float(x));
}

enum { F32, BF16, HALF, TYPES };
static const Type types[TYPES] = {{"f32", round_f32}, {"bf16", round_bf16}, {"half", round_half}};

enum { KEYS = 8 };
static const float scores[KEYS] = {1.5f, -0.25f, 0.75f, 3, -2, 0.125f, -1, 2.25f};

/* softmax(scores + mask), as a textbook has it: each step rounded to the type. The keys from `allowed` on are
 * masked. */
static void textbook_softmax(float *weights, const Type *type, float mask, int allowed)
{
    float most = -INFINITY, sum = 0;
    for (int i = 0; i < KEYS; i++) {
        float added = i < allowed ? 0 : type->round(mask);
        weights[i] = type->round(type->round(scores[i]) + added);
        most = fmaxf(most, weights[i]);
    }
    for (int i = 0; i < KEYS; i++) {
        weights[i] = type->round(expf(type->round(weights[i] - most)));
        sum = type->round(sum + weights[i]);
    }
    for (int i = 0; i < KEYS; i++)
        weights[i] = type->round(weights[i] / sum);
}

static bool all_equal(const float *weights, float value)
{
    for (int i = 0; i < KEYS; i++)
        if (!(weights[i] == value))
            return false;
    return true;
}

static bool all_nan(const float *weights)
{
    for (int i = 0; i < KEYS; i++)
        if (!isnan(weights[i]))
            return false;
    return true;
}

static void tell_types(Report *report)
{
    const float big = -1e9f;
    const float half = round_half(big), bf16 = round_bf16(big);
    claim(report, half == -INFINITY, "half: -1e9 becomes %g; the largest number is %g", half,
          half_to_float(0x7bff));
    claim(report, isfinite(bf16), "bf16: -1e9 becomes %.9g, which is finite", bf16);
    write_figure(report, "-1e9 as half", half, "half");
    write_figure(report, "-1e9 as bf16", bf16, "bf16");

    float weights[KEYS], others[KEYS];
    for (int i = 0; i < TYPES; i++) {
        const Type *type = &types[i];
        textbook_softmax(weights, type, big, 0);
        if (i == HALF)
            claim(report, all_nan(weights), "half: a row all at -1e9 gives NaN: -inf - -inf");
        else
            claim(report, all_equal(weights, 1.0f / KEYS),
                  "%s: a row all at -1e9 gives 1/%d to each key: the scores are lost in 1e9", type->name,
                  KEYS);
        write_figure(report, "weight in a row all at -1e9", weights[0], type->name);

        textbook_softmax(weights, type, -INFINITY, 0);
        claim(report, all_nan(weights), "%s: a row all at -inf gives NaN", type->name);
        write_figure(report, "weight in a row all at -inf", weights[0], type->name);

        textbook_softmax(weights, type, big, KEYS / 2);
        textbook_softmax(others, type, -INFINITY, KEYS / 2);
        bool same = true, zero = true;
        for (int key = 0; key < KEYS; key++) {
            same = same && weights[key] == others[key];
            zero = zero && (key < KEYS / 2) == (weights[key] > 0);
        }
        claim(report, same && zero, "%s: a row half masked gives the same numbers with both", type->name);
    }
}

/* The same with our kernels, in float32: of 2 queries the first may see no key, the second half of them. */
static void tell_kernels(Report *report)
{
    enum { HS = 16, VALUES = 3 };
    static const float masks[VALUES] = {0, -1e9f, -INFINITY};
    enum { NO_MASK, BIG, INFINITE };
    AttentionShape s = {.batch = 1,
                        .heads = 1,
                        .kv_heads = 1,
                        .tokens = 2,
                        .key_tokens = KEYS,
                        .head_size = HS,
                        .scale = 0.25f,
                        .bias_stride = {0, 0, KEYS, 1}};
    float q[2 * HS], k[KEYS * HS], v[KEYS * HS], bias[2 * KEYS], weights[2 * KEYS], lse[2];
    float matrix[VALUES][2 * HS], tiles[VALUES][2 * HS], mean[HS] = {0}, zeros[HS] = {0};
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, q, 2 * HS);
    draw_randn(&stream, k, KEYS * HS);
    draw_randn(&stream, v, KEYS * HS);
    for (int i = 0; i < KEYS * HS; i++)
        mean[i % HS] += v[i] / KEYS;
    s.bias = bias;
    float *scratch = allocate_floats(flash_view_scratch(&s));
    for (int mask = 0; mask < VALUES; mask++) {
        for (int i = 0; i < 2 * KEYS; i++)
            bias[i] = i >= KEYS && i < KEYS + KEYS / 2 ? 0 : masks[mask];
        attention_materialised(matrix[mask], lse, weights, NULL, q, k, v, &s);
        attention_simd(tiles[mask], lse, scratch, q, k, v, &s);
    }
    free(scratch);

    double apart = furthest_apart(matrix[BIG], mean, HS);
    claim(report, apart <= 1e-6, "materialised: a row all at -1e9 is the mean of all values, to %.1e", apart);
    apart = furthest_apart(tiles[BIG], tiles[NO_MASK], HS);
    claim(
        report, apart <= 1e-6 && furthest_apart(tiles[BIG], mean, HS) > 0.01,
        "simd: a row all at -1e9 is as if nothing were masked, to %.1e: it takes the maximum from the mask, "
        "and only then adds the scores",
        apart);
    claim(report,
          furthest_apart(matrix[INFINITE], zeros, HS) == 0 && furthest_apart(tiles[INFINITE], zeros, HS) == 0,
          "both: a row all at -inf is zeros, no NaN");
    claim(report,
          furthest_apart(matrix[BIG] + HS, matrix[INFINITE] + HS, HS) == 0 &&
              furthest_apart(tiles[BIG] + HS, tiles[INFINITE] + HS, HS) == 0,
          "both: a row half masked is the same with -1e9 and with -inf, bit for bit");
}

int run_claims(int argc, char **argv)
{
    const char *path = argc == 2 && strcmp(argv[0], "--tsv") == 0 ? argv[1] : NULL;
    if (argc > 0 && !path)
        die(EXIT_USAGE, "./run claims takes --tsv FILE and nothing else");
    Report report = {.file = path ? fopen(path, "w") : NULL};
    if (path && !report.file)
        die(EXIT_USAGE, "--tsv cannot write %s: %s", path, strerror(errno));
    if (report.file)
        fprintf(report.file, "machine\tclaim\tfigure\tunit\n");

    printf("The first call against later ones, 12 heads of 64, 1024 tokens, float32; simd comes first, and "
           "so starts "
           "the threads; materialised starts the BLAS\n");
    tell_cold(&report, "simd");
    tell_cold(&report, "materialised");
    printf("\n-1e9 against -inf as a mask: textbook softmax of %d scores, each step rounded to the type\n",
           KEYS);
    tell_types(&report);
    printf("\nThe same with the kernels, float32\n");
    tell_kernels(&report);
    if (report.file && fclose(report.file) != 0)
        die(EXIT_USAGE, "--tsv cannot write %s: %s", path, strerror(errno));
    printf("\n%s\n", report.failed ? "✗ not all of it holds" : "✓ all of it holds");
    return report.failed ? EXIT_CHECK_FAILED : EXIT_PASSED;
}
