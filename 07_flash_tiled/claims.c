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
    const char *machine;
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
        fprintf(report->file, "%s\t%s\t%.7g\t%s\n", report->machine, what, isnan(figure) ? NAN : figure,
                unit); /* never -nan */
}

/* ---- Cold against warm ---- */

static double time_call(Run *run)
{
    double start = now();
    forward_run(run);
    return 1e3 * (now() - start);
}

static void open_kernel(Run *run, const Chapter *there, const char *name, const Options *options)
{
    Refusal refusal = open_run(run, there, kernel_named(there, name), options, NULL, 1);
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
        char *words[] = {"run", "--heads", "12", "--tokens", "1024", "--head-size", "64"};
        parse_options(&options, sizeof words / sizeof *words, words);
        open_kernel(&run, &chapter, name, &options);
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

/* ---- What a GPU adds: TF32, a launch that does not wait, a mask as a tensor. On the stand-in the same code walks at a size
 * for it, and what it prints of time means nothing. ---- */

typedef struct {
    const Accelerator *device;
    float *a, *b, *out;
    int n;
    bool tf32;
} Product;

static void launch_product(void *context)
{
    const Product *p = context;
    p->device->multiply(p->out, p->a, p->b, p->n, p->tf32);
}

enum { TURNS = 11 };

/* Of the first row, against sums in double: the L2 norm of what it is off by, relative. */
static double row_error(const float *out, const float *a, const float *b, int n)
{
    double off = 0, all = 0;
    for (int j = 0; j < n; j++) {
        double sum = 0;
        for (int k = 0; k < n; k++)
            sum += (double)a[k] * b[(size_t)k * n + j];
        off += (out[j] - sum) * (out[j] - sum);
        all += sum * sum;
    }
    return sqrt(off / all);
}

static void tell_tf32(Report *report, const Accelerator *device)
{
    int n = device == accelerator(DEVICE_CUDA) ? 4096 : 128;
    size_t count = (size_t)n * n, bytes = count * sizeof(float);
    float *a = allocate_floats(count), *b = allocate_floats(count), *row = allocate_floats(n);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, a, count);
    draw_randn(&stream, b, count);
    Product p = {device, device->allocate(bytes), device->allocate(bytes), device->allocate(bytes), n, false};
    device->copy_to(p.a, a, bytes);
    device->copy_to(p.b, b, bytes);

    double ms[2][TURNS], error[2];
    for (int turn = -1; turn < TURNS; turn++) /* the first warms up */
        for (int tf32 = 0; tf32 < 2; tf32++) {
            p.tf32 = tf32;
            double took = device->time_ms(launch_product, &p);
            if (turn >= 0)
                ms[tf32][turn] = took;
            else { /* the first row, before the other product takes its place */
                device->copy_from(row, p.out, n * sizeof(float));
                error[tf32] = row_error(row, a, b, n);
            }
        }
    double f32_ms = median(ms[0], TURNS), tf32_ms = median(ms[1], TURNS);
    claim(report, error[0] < 1e-5 && error[1] > 1e-4 && error[1] < 2e-3,
          "a product of two %d x %d matrices is off by %.1e in float32, by %.1e with TF32", n, n, error[0],
          error[1]);
    printf("    float32 takes %.2f times as long\n", f32_ms / tf32_ms);
    write_figure(report, "a product in float32: error", error[0], "of the L2 norm");
    write_figure(report, "a product with TF32: error", error[1], "of the L2 norm");
    write_figure(report, "a product: float32 over TF32", f32_ms / tf32_ms, "times as long");
    device->release(p.a);
    device->release(p.b);
    device->release(p.out);
    free(a);
    free(b);
    free(row);
}

/* `tiled`, causal: by the flag, and by a tensor of 0 and -inf. */
static void open_tiled(Run *run, Options *options, const Chapter *there, bool tensor)
{
    bool large = there->device == DEVICE_CUDA;
    char *words[] = {"run",
                     "--device",
                     (char *)device_name(there->device),
                     "--heads",
                     "12",
                     "--tokens",
                     large ? "4096" : "70",
                     "--head-size",
                     "64",
                     "--causal"};
    parse_options(options, sizeof words / sizeof *words - tensor, words);
    if (tensor) {
        size_t T = options->tokens;
        options->bias = (NpyArray){.axes = 2, .size = {T, T}, .count = T * T, .data = allocate_floats(T * T)};
        for (size_t i = 0; i < T * T; i++)
            options->bias.data[i] = i % T <= i / T ? 0 : -INFINITY;
    }
    open_kernel(run, there, "tiled", options);
}

static void tell_launches(Report *report, const Accelerator *device, const Chapter *there)
{
    Run run[2];
    Options options[2];
    double ms[2][TURNS], launch[TURNS];
    char text[400];
    for (int tensor = 0; tensor < 2; tensor++) {
        open_tiled(&run[tensor], &options[tensor], there, tensor);
        bool right = check_run(&run[tensor]);
        check_text(text, sizeof text, &run[tensor]);
        claim(report, right, "tiled, causal by %s: %s", tensor ? "a tensor" : "the flag", text);
    }
    for (int turn = 0; turn < TURNS; turn++) {
        for (int tensor = 0; tensor < 2; tensor++)
            ms[tensor][turn] = device->time_ms(launch_run, &run[tensor]);
        double start = now();
        launch_run(&run[0]);
        launch[turn] = 1e3 * (now() - start);
        device->finish();
    }
    size_t out = run[0].out_size;
    double apart = furthest_apart(run[0].t.out, run[1].t.out, out);
    claim(report, apart <= 1e-6, "the two are the same, to %.1e", apart);
    double flag = median(ms[0], TURNS), tensor = median(ms[1], TURNS), unsynchronised = median(launch, TURNS);
    printf("    the tensor takes %.2f times as long as the flag\n", tensor / flag);
    printf("    a clock stopped when the launch returns sees %.3f of the time that it takes%s\n",
           unsynchronised / flag,
           there->device == DEVICE_CUDA ? "" : ": the stand-in's launch returns when all is done");
    write_figure(report, "tiled, causal: a tensor over the flag", tensor / flag, "times as long");
    write_figure(report, "tiled: a clock that does not wait sees", unsynchronised / flag, "of the time");
    for (int i = 0; i < 2; i++) {
        close_run(&run[i]);
        free_options(&options[i]);
    }
}

static void tell_device(Report *report, Device where)
{
    const char *missing = device_missing(where);
    if (missing)
        die(EXIT_UNAVAILABLE, "--device %s cannot be had here (%s); leave it out", device_name(where),
            missing);
    const Accelerator *device = accelerator(where);
    Kernel rows[MAX_DEVICE_ROWS];
    Chapter there = chapter_on(&chapter, where, rows);
    report->machine = device->machine();
    printf("TF32 on and off, a mask as a tensor, and a clock that does not wait: %s%s\n", report->machine,
           where == DEVICE_CUDA ? "" : ", where times mean nothing: it stands in for a GPU");
    tell_tf32(report, device);
    tell_launches(report, device, &there);
}

/* ---- The mode ---- */

static void tell_processor(Report *report)
{
    printf("The first call against later ones, 12 heads of 64, 1024 tokens, float32; simd comes first, and "
           "so starts "
           "the threads; materialised starts the BLAS\n");
    tell_cold(report, "simd");
    tell_cold(report, "materialised");
    printf("\n-1e9 against -inf as a mask: textbook softmax of %d scores, each step rounded to the type\n",
           KEYS);
    tell_types(report);
    printf("\nThe same with the kernels, float32\n");
    tell_kernels(report);
}

int run_claims(int argc, char **argv)
{
    const char *path = NULL;
    Device where = DEVICE_CPU;
    for (int i = 0; i < argc; i += 2) {
        bool tsv = strcmp(argv[i], "--tsv") == 0, device = strcmp(argv[i], "--device") == 0;
        bool simt = device && i + 1 < argc && strcmp(argv[i + 1], "simt") == 0;
        bool cuda = device && i + 1 < argc && strcmp(argv[i + 1], "cuda") == 0;
        if (!(tsv || simt || cuda) || i + 1 == argc)
            die(EXIT_USAGE, "./run claims takes --tsv FILE and --device simt|cuda, and nothing else");
        path = tsv ? argv[i + 1] : path;
        where = simt ? DEVICE_SIMT : cuda ? DEVICE_CUDA : where;
    }
    Report report = {.file = path ? fopen(path, "w") : NULL, .machine = machine_name()};
    if (path && !report.file)
        die(EXIT_USAGE, "--tsv cannot write %s: %s", path, strerror(errno));
    if (report.file)
        fprintf(report.file, "machine\tclaim\tfigure\tunit\n");
    if (where == DEVICE_CPU)
        tell_processor(&report);
    else
        tell_device(&report, where);
    if (report.file && fclose(report.file) != 0)
        die(EXIT_USAGE, "--tsv cannot write %s: %s", path, strerror(errno));
    printf("\n%s\n", report.failed ? "✗ not all of it holds" : "✓ all of it holds");
    return report.failed ? EXIT_CHECK_FAILED : EXIT_PASSED;
}
