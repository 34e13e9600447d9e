/* What is particular to bf16 on the processor: rounding, pairs that an odd size leaves incomplete, 16-bit tensors, and what
 * is never read. Against the oracle over the ugly shapes: common/test_chapter.c. */
#include "flash_tiled_bf16.h"
#include "memory.h"
#include "narrow.h"
#include "run.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

extern const Chapter chapter;

static const Kernel *bf16_kernel(void)
{
    const Kernel *kernel = chapter.kernels;
    while (!kernel->bf16)
        kernel++;
    return kernel;
}

/* "--tokens 5": opened for both passes with a random dout. */
static Refusal open_words(Run *run, const char *words)
{
    char copy[256], *argv[40] = {"run", "--dtype", "bf16", "--pass", "both", "--dout", "randn"};
    int argc = 7;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    Options options;
    parse_options(&options, argc, argv);
    Refusal refusal = open_run(run, &chapter, bf16_kernel(), &options, NULL, 1);
    free_options(&options);
    return refusal;
}

static void expect_right(const char *words)
{
    Run run;
    char text[400];
    Refusal refusal = open_words(&run, words);
    cr_assert(refusal.exit_code == 0, "%s: %s", words, refusal.reason);
    bool passed = check_run(&run);
    check_text(text, sizeof text, &run);
    cr_expect(passed, "%s: %s", words, text);
    close_run(&run);
}

/* ---- Arithmetic ---- */

static float random_float(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return ldexpf((float)(int32_t)*state, (int)(*state >> 7) % 40 - 50);
}

static Vector random_vector(uint32_t *state)
{
    Vector x;
    for (int i = 0; i < LANES; i++)
        x[i] = random_float(state);
    return x;
}

Test(bf16, rounds_to_nearest_even)
{
    uint32_t state = 1;
    for (int n = 0; n < 10000; n++) {
        Vector a = random_vector(&state), b = random_vector(&state);
        if (n == 0)
            a[0] = 0x1.01p0f, a[1] = 0x1.03p0f, a[2] = NAN, a[3] = INFINITY, b[0] = -0x1.01p0f;
        PairVector pairs = pairs_from(a, b);
        Bf16 row[LANES];
        store_row(row, a, LANES);
        for (int i = 0; i < LANES; i++) {
            Bf16 first = bf16_from_float(a[i]), second = bf16_from_float(b[i]);
            cr_assert(pairs[i] == (first | (Pair)second << 16) || isnan(a[i]), "%a, %a", a[i], b[i]);
            cr_assert(row[i] == (Bf16)pairs[i]);
            cr_assert(isnan(a[i]) ? isnan(bf16_to_float(row[i])) : bf16_from_float(a[i]) == first);
        }
    }
}

/* Exact products: the sum is off by the roundings of two additions at most. */
Test(bf16, adds_products_of_pairs_in_float)
{
    uint32_t state = 2;
    for (int n = 0; n < 10000; n++) {
        Vector sum = random_vector(&state), a = random_vector(&state);
        PairVector x = pairs_from(a, random_vector(&state)), y = pairs_from(random_vector(&state), a);
        Vector got = add_pair_products(sum, x[1], y);
        for (int i = 0; i < LANES; i++) {
            double first = (double)bf16_to_float((Bf16)x[1]) * bf16_to_float((Bf16)y[i]),
                   second = (double)bf16_to_float((Bf16)(x[1] >> 16)) * bf16_to_float((Bf16)(y[i] >> 16));
            double size = fabs((double)sum[i]) + fabs(first) + fabs(second);
            double error = fabs(got[i] - ((double)sum[i] + first + second));
            cr_assert(error <= 0x1p-23 * size + 0x1p-120, "off by %g of %g", error, size);
        }
    }
}

/* ---- Sizes ---- */

Test(bf16, holds_around_the_edges_of_tiles)
{
    static const int sizes[] = {1, 2, 3, 7, 8, 9, 47, 48, 49, 95, 97, 191, 193, 257};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    for (int i = 0; i < SIZES; i++)
        for (int causal = 0; causal < 2; causal++) {
            char words[120];
            int keys = sizes[(5 * i + 3) % SIZES], head_size = 1 + 7 * i;
            snprintf(words, sizeof words, "--heads 2 --tokens %d --key-tokens %d --head-size %d%s", sizes[i],
                     keys, head_size, causal ? " --causal" : "");
            expect_right(words);
        }
}

Test(bf16, holds_with_many_heads_and_with_one)
{
    expect_right("--batch 5 --heads 9 --tokens 50 --head-size 6 --causal");
    expect_right("--heads 1 --tokens 400 --key-tokens 1000 --head-size 16 --mask window:300");
    expect_right("--heads 40 --tokens 30 --key-tokens 700 --head-size 8 --dropout 0.2");
}

/* What follows the last key in its pair and in its step is none: with a score of 0 among scores of -300 it would weigh
 * infinitely much. */
Test(bf16, the_last_key_has_no_neighbour)
{
    expect_right("--heads 2 --tokens 40 --key-tokens 1 --head-size 8 --scale 100");
    expect_right("--heads 2 --tokens 40 --key-tokens 2 --head-size 8 --scale 100");
}

/* ---- Tensors ---- */

Test(bf16, tensors_are_16_bits_and_counted)
{
    Run run;
    cr_assert(open_words(&run, "--heads 3 --tokens 70 --head-size 40").exit_code == 0);
    const Bf16 *k = (const Bf16 *)run.on_device.k;
    for (size_t i = 0; i < key_count(&run.problem.shape); i++)
        cr_assert(bf16_to_float(k[i]) == run.t.k[i]);
    size_t floats = 0;
    for (int i = 0; i < MAX_BUFFERS; i++)
        floats += run.workspace_size[i] + run.backward_workspace_size[i];
    cr_expect(run.extra_bytes == 4 * floats);
    size_t panels = PANEL == 16 ? 96 * (64 + 48) / 2 : 72 * (40 + 40) / 2;
    cr_expect(run.workspace_size[0] == 3 * (BF16_PAIRS ? panels : 3 * 70 * 40),
              "K and V once more in whole panels, or widened, as q is");
    cr_expect(run_bytes(&run, PASS_FORWARD) == 2.0 * 4 * 3 * 70 * 40);
    close_run(&run);
}

/* Twice as many tokens: twice the memory, not four times. With one head, too: its tasks share one dq. */
Test(bf16, memory_grows_with_the_tokens)
{
    static const int heads[] = {40, 1};
    for (int i = 0; i < 2; i++) {
        Run run[2];
        for (int n = 0; n < 2; n++) {
            char words[80];
            snprintf(words, sizeof words, "--heads %d --tokens %d --head-size 16", heads[i], 4096 << n);
            cr_assert(open_words(&run[n], words).exit_code == 0);
        }
        cr_expect(run[1].extra_bytes < 2.1 * (double)run[0].extra_bytes, "%d heads", heads[i]);
        close_run(&run[0]);
        close_run(&run[1]);
    }
}

Test(bf16, has_the_same_bits_for_any_number_of_threads)
{
    static const char *const problems[] = {"--heads 3 --tokens 301 --head-size 24 --causal",
                                           "--batch 2 --heads 20 --tokens 99 --head-size 5 --dropout 0.1",
                                           "--heads 1 --tokens 900 --head-size 32",
                                           "--heads 1 --tokens 900 --head-size 32 --causal",
                                           "--heads 1 --tokens 900 --head-size 32 --mask window:100",
                                           "--heads 1 --tokens 900 --head-size 32 --mask local-global:30:3"};
    for (int i = 0; i < 6; i++) {
        Run run[2];
        for (int n = 0; n < 2; n++) {
            cr_assert(open_words(&run[n], problems[i]).exit_code == 0);
            omp_set_num_threads(n ? 4 : 1);
            forward_run(&run[n]);
            fetch_from_device(&run[n], PASS_FORWARD);
            backward_run(&run[n]);
            fetch_from_device(&run[n], PASS_BACKWARD);
        }
        size_t bytes = query_count(&run[0].problem.shape) * sizeof(float);
        cr_expect(memcmp(run[0].t.out, run[1].t.out, bytes) == 0);
        cr_expect(memcmp(run[0].t.dq, run[1].t.dq, bytes) == 0);
        const float *sums[] = {run[0].on_device.backward_workspace[0],
                               run[1].on_device.backward_workspace[0]};
        if (run[0].problem.shape.head_size % 32 == 0) /* else nobody cares what lies beyond it */
            cr_expect(memcmp(sums[0], sums[1], run[0].backward_workspace_size[0] * sizeof(float)) == 0,
                      "%s: dq in float32", problems[i]);
        cr_expect(memcmp(run[0].t.dk, run[1].t.dk, bytes) == 0);
        cr_expect(memcmp(run[0].t.dv, run[1].t.dv, bytes) == 0);
        close_run(&run[0]);
        close_run(&run[1]);
    }
}

/* An odd number of valid keys: the last pair's second key is none of them. */
Test(bf16, does_not_read_beyond_the_valid_length)
{
    for (int head_size = 7; head_size <= 8; head_size++) {
        Run run;
        char words[80];
        snprintf(words, sizeof words, "--heads 1 --tokens 40 --head-size %d --lengths 21", head_size);
        cr_assert(open_words(&run, words).exit_code == 0);
        for (int i = 21 * head_size; i < 40 * head_size; i++)
            ((Bf16 *)run.on_device.k)[i] = ((Bf16 *)run.on_device.v)[i] = 0x7fc0; /* NaN */
        cr_expect(check_run(&run), "HS %d", head_size);
        close_run(&run);
    }
}

Test(bf16, shows_a_nan_that_a_row_sees)
{
    Run run;
    cr_assert(open_words(&run, "--heads 1 --tokens 60 --head-size 8 --causal").exit_code == 0);
    ((Bf16 *)run.on_device.k)[50 * 8 + 3] = 0x7fc0;
    forward_run(&run);
    fetch_from_device(&run, PASS_FORWARD);
    for (int t = 0; t < 60; t++)
        cr_expect(!isnan(run.t.out[t * 8]) == (t < 50), "row %d", t);
    close_run(&run);
}

Test(bf16, refuses_a_bias_in_its_backward)
{
    Run run;
    Refusal refusal = open_words(&run, "--heads 1 --tokens 9 --head-size 8 --bias randn");
    cr_expect(refusal.exit_code == 2 && strstr(refusal.reason, "--bias"), "%s", refusal.reason);
}

Test(flash_tiled_bf16, a_nan_of_any_bits_stays_one)
{
    static const uint32_t patterns[] = {0x7fffffff, 0xffffffff, 0x7f800001, 0x7fc00000};
    for (int i = 0; i < 4; i++) {
        Vector nan = (Vector)((PairVector){0} + patterns[i]);
        PairVector pairs = pairs_from(nan, nan);
        for (int lane = 0; lane < LANES; lane++) {
            cr_expect(isnan(bf16_to_float((uint16_t)pairs[lane])), "%x", patterns[i]);
            cr_expect(isnan(bf16_to_float((uint16_t)(pairs[lane] >> 16))), "%x", patterns[i]);
        }
    }
}
