/* What is particular to the stack of heads. Every kernel against the oracle: common/test_chapter.c. */
#include "memory.h"
#include "multihead_wrapper.h"
#include "reference.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

extern const Chapter chapter;

/* One of the chapter's kernels, opened on a problem such as "--batch 2 --tokens 5", forward called. Held
 * until the test's process ends. */
static Run *run_kernel(const char *name, const char *words)
{
    static Run runs[32];
    static int count;
    cr_assert(count < 32);
    Run *run = &runs[count++];
    static char copy[256];
    char *argv[32] = {"run"};
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    Options options;
    parse_options(&options, argc, argv);

    const Kernel *kernel = chapter.kernels;
    while (strcmp(kernel->name, name) != 0)
        kernel++;
    Refusal refusal = open_run(run, &chapter, kernel, &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s %s: %s", name, words, refusal.reason);
    forward_run(run);
    return run;
}

Test(stacked, prints_the_published_numbers)
{
    static const double published[6][4] = {
        {-.4519, .2216, .4772, .1063},  {-.5874, .0058, .5891, .3257},  {-.6300, -.0632, .6202, .3860},
        {-.5675, -.0843, .5478, .3589}, {-.5526, -.0981, .5321, .3428}, {-.5299, -.1081, .5077, .3493},
    };
    Run *run = run_kernel("stacked", "");
    for (int i = 0; i < 24; i++)
        cr_expect(fabs((double)run->t.out[i] - published[i / 4][i % 4]) <= 1e-4, "number %d is %f", i,
                  (double)run->t.out[i]);
}

Test(wrapper, holds_every_value_of_the_notebook)
{
    if (getenv("SMALL"))
        return;
    Run *run = run_kernel("wrapper", "--batch 8 --tokens 1024 --embed 768 --heads 12");
    const char *wrong = check_reference(run, "03_multihead_wrapper/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s", wrong);
}

/* W_query, W_key, W_value of head 0, then of head 1: what CausalAttention draws, over and over. */
Test(stacked, draws_what_single_heads_draw)
{
    enum { HS = 5, C = 7, NH = 3 };
    static const char *const names[3] = {"W_query", "W_key", "W_value"};
    Run *run = run_kernel("stacked", "--batch 1 --tokens 1 --embed 7 --heads 3 --head-size 5 --seed 42");
    RandomStream stream;
    float x[C], weight[HS * C];
    seed_stream(&stream, STREAM_CPU, 42);
    draw_randn(&stream, x, C);
    cr_assert(run->parameters.count == 3 * NH);
    for (int i = 0; i < 3 * NH; i++) {
        char name[48];
        snprintf(name, sizeof name, "heads.%d.%s.weight", i / 3, names[i % 3]);
        cr_expect_str_eq(run->parameters.list[i].name, name);
        draw_uniform(&stream, weight, HS * C, -linear_bound(C), linear_bound(C));
        cr_expect(memcmp(weight, run->parameters.list[i].data, sizeof weight) == 0, "%s", name);
    }
}

/* Each head alone, as a module of one head, gives its columns of the stack: concatenation is along the last
 * axis. */
Test(stacked, is_its_heads_side_by_side)
{
    enum { ROWS = 2 * 130, NH = 3, HS = 4 };
    Run *run = run_kernel("stacked", "--batch 2 --tokens 130 --embed 9 --heads 3 --head-size 4");
    AttentionShape alone = run->problem.shape;
    alone.heads = alone.kv_heads = 1;
    alone.embed_out = HS;
    float *buffer = allocate_floats(4 * ROWS * HS), *weights = allocate_floats(weights_count(&alone));
    float *q = buffer, *k = q + ROWS * HS, *v = k + ROWS * HS, *out = v + ROWS * HS;
    for (int h = 0; h < NH; h++) {
        Head head = {run->t.parameter[3 * h], run->t.parameter[3 * h + 1], run->t.parameter[3 * h + 2]};
        stacked_heads(out, weights, NULL, q, k, v, run->t.x, &head, &alone);
        for (int row = 0; row < ROWS; row++)
            for (int i = 0; i < HS; i++) {
                double apart = (double)out[row * HS + i] - (double)run->t.out[(row * NH + h) * HS + i];
                cr_assert(fabs(apart) <= 1e-6, "head %d, row %d, column %d: off by %g", h, row, i, apart);
            }
    }
    free(buffer);
    free(weights);
}

/* Blocks of query rows end at 128: the tokens around it, and T = 1, where a token's context is its own value.
 */
Test(stacked, weights_are_probabilities_of_the_past)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 1 --embed 6 --heads 3",
        "--batch 2 --tokens 1 --embed 6 --heads 1",
        "--batch 1 --tokens 127 --embed 6 --heads 3 --embed-out 9",
        "--batch 1 --tokens 128 --embed 6 --heads 1",
        "--batch 2 --tokens 129 --embed 6 --heads 3",
        "--batch 1 --tokens 257 --embed 12 --heads 3 --embed-out 3",
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        Run *run = run_kernel("stacked", sizes[i]);
        int T = run->problem.shape.tokens;
        for (size_t row = 0; row < lse_count(&run->problem.shape); row++) {
            const float *weights = run->t.weights + row * T;
            double sum = 0;
            for (int t2 = 0; t2 < T; t2++) {
                sum += (double)weights[t2];
                if (t2 > (int)(row % T))
                    cr_assert(weights[t2] == 0, "%s: row %zu sees key %d", sizes[i], row, t2);
            }
            cr_assert(fabs(sum - 1) <= 1e-5, "%s: row %zu sums to %f", sizes[i], row, sum);
        }
        cr_expect(check_run(run), "%s differs from the oracle", sizes[i]);
        close_run(run);
    }
}

Test(stacked, one_token_attends_to_itself)
{
    Run *run = run_kernel("stacked", "--batch 3 --tokens 1 --embed 5 --heads 1 --head-size 8");
    const float *v = run->t.workspace[2];
    for (int i = 0; i < 3 * 8; i++)
        cr_expect(fabs((double)run->t.out[i] - (double)v[i]) <= 1e-6);
}

/* Trap: each head owns a Dropout and calls it in its turn, so all batch entries of head 0 come first. One
 * Dropout over (B,NH,T,T), as chapter 4's modules have, draws another mask from the same seed. */
Test(stacked, drops_head_by_head)
{
    enum { B = 2, NH = 2, T = 20, PAIRS = T * T };
    const char *sizes = "--batch 2 --tokens 20 --embed 6 --heads 2";
    Run *kept = run_kernel("stacked", sizes);
    char with_dropout[100];
    snprintf(with_dropout, sizeof with_dropout, "%s --dropout 0.5", sizes);
    Run *dropped = run_kernel("stacked", with_dropout);

    uint8_t keep[B * NH * PAIRS];
    RandomStream stream = kept->after_inputs;
    draw_dropout(&stream, keep, sizeof keep, 0.5);
    int in_memory_order = 0;
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int i = 0; i < PAIRS; i++) {
                int place = (b * NH + h) * PAIRS + i, drawn = (h * B + b) * PAIRS + i;
                cr_assert(dropped->t.weights[place] == (keep[drawn] ? 2 * kept->t.weights[place] : 0));
                in_memory_order +=
                    dropped->t.weights[place] == (keep[place] ? 2 * kept->t.weights[place] : 0);
            }
    cr_expect(in_memory_order < B * NH * PAIRS, "one mask over (B,NH,T,T) would do as well");
}

/* A token's change reaches no earlier token, not by one bit; a NaN is not hidden. */
Test(wrapper, sees_no_later_token)
{
    enum { T = 150, C = 6, CHANGED = 140 };
    Run *run = run_kernel("wrapper", "--batch 1 --tokens 150 --embed 6 --heads 3");
    float before[T * C], *x = (float *)run->t.x;
    memcpy(before, run->t.out, sizeof before);
    for (int i = 0; i < C; i++)
        x[CHANGED * C + i] += 1;
    forward_run(run);
    cr_expect(memcmp(before, run->t.out, CHANGED * C * sizeof *before) == 0);
    cr_expect(memcmp(before, run->t.out, sizeof before) != 0);

    x[CHANGED * C] = NAN;
    forward_run(run);
    for (int i = CHANGED * C; i < T * C; i++)
        cr_assert(isnan(run->t.out[i]), "number %d is %f", i, (double)run->t.out[i]);
}

Test(wrapper, large_scores)
{
    Run *run = run_kernel("wrapper", "--batch 1 --tokens 140 --embed 24 --heads 3");
    for (int i = 0; i < 140 * 24; i++)
        ((float *)run->t.x)[i] *= 30;
    char text[400];
    bool passed = check_run(run);
    check_text(text, sizeof text, run);
    cr_expect(passed, "%s", text);
}

Test(wrapper, same_bits_for_any_number_of_threads)
{
#ifdef _OPENMP
    const char *sizes = "--batch 2 --tokens 300 --embed 48 --heads 3";
    omp_set_num_threads(1);
    Run *one = run_kernel("wrapper", sizes);
    for (int threads = 2; threads <= 5; threads++) {
        omp_set_num_threads(threads);
        Run *several = run_kernel("wrapper", sizes);
        cr_expect(memcmp(one->t.out, several->t.out, one->out_size * sizeof *one->t.out) == 0, "%d threads",
                  threads);
    }
#endif
}

Test(wrapper, refuses_more_heads_than_it_has_room_for)
{
    AttentionShape s = {.batch = 1, .tokens = 1, .embed = 171, .heads = 171, .head_size = 1};
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++) {
        cr_assert_not_null(kernel->refuses(&s));
        cr_expect_str_eq(kernel->refuses(&s), "takes up to 170 heads, not --heads 171");
        s.heads = 170;
        cr_expect_null(kernel->refuses(&s));
        s.heads = 171;
    }
}
