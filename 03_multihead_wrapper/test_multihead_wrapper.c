/* What is particular to the stack of heads. Every kernel against the oracle: common/test_chapter.c. */
#include "memory.h"
#include "multihead_wrapper.h"
#include "reference.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

/* One of the chapter's kernels, opened on a problem such as "--batch 2 --tokens 5", forward called, and
 * backward if "--pass both" is among the words. Held until the test's process ends. */
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
    if (run->pass != PASS_FORWARD)
        backward_run(run);
    return run;
}

static void expect_values(const float *ours, const double *expected, int count, double tolerance,
                          const char *what)
{
    for (int i = 0; i < count; i++)
        cr_expect(fabs((double)ours[i] - expected[i]) <= tolerance, "%s: number %d is %f, not %f", what, i,
                  (double)ours[i], expected[i]);
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
    Run *run = run_kernel("wrapper", "--batch 8 --tokens 1024 --embed 768 --heads 12 --pass both");
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

/* ---- Gradients ---- */

/* PyTorch 2.15 on a CPU, seed 123, out.sum().backward(): the sentence through two heads, without dropout and
 * with it. */
Test(stacked, gives_the_gradients_torch_gives)
{
    static const double dx[18] = {.214061, -.213589, .928143, .236436, .029997,  .445937,
                                  .141112, .000749,  .309583, .087207, -.015911, .247899,
                                  .058465, .000893,  .141188, .018967, -.008367, .068629};
    static const double first_query[6] = {.062688, .095959, .066174, .030568, .045593, .032280};
    static const double second_key[6] = {.018769, .068893, -.011875, .029214, .112727, -.018542};
    Run *run = run_kernel("stacked", "--pass both");
    expect_values(run->t.dx, dx, 18, 2e-6, "dx");
    expect_values(run->t.d_parameter[0], first_query, 6, 2e-6, "d_heads.0.W_query");
    expect_values(run->t.d_parameter[4], second_key, 6, 2e-6, "d_heads.1.W_key");

    static const double dropped_dx[18] = {.461772,  .383065,  .377971, -.445472, -.818621, .431916,
                                          -.579825, -.891799, .397145, .743496,  .752137,  .297498,
                                          .121208,  .033797,  .207487, .043224,  .013041,  .108527};
    static const double dropped_query[6] = {.116156, .187620, .138553, .055547, .097408, .073870};
    static const double dropped_key[6] = {-.015606, .008508, -.048463, -.018548, .012713, -.064535};
    run = run_kernel("stacked", "--dropout 0.5 --pass both");
    expect_values(run->t.dx, dropped_dx, 18, 2e-6, "dx after dropout");
    expect_values(run->t.d_parameter[0], dropped_query, 6, 2e-6, "d_heads.0.W_query after dropout");
    expect_values(run->t.d_parameter[4], dropped_key, 6, 2e-6, "d_heads.1.W_key after dropout");
}

/* Trap: x went to every head, and each adds its part to d_x. The heads alone, summed, make the stack's. */
Test(stacked, x_hears_from_every_head)
{
    enum { ROWS = 2 * 130, T = 130, C = 9, NH = 3, HS = 4 };
    Run *run = run_kernel("stacked", "--batch 2 --tokens 130 --embed 9 --heads 3 --head-size 4 --pass both "
                                     "--dout randn");
    AttentionShape alone = run->problem.shape;
    alone.heads = alone.kv_heads = 1;
    alone.embed_out = HS;
    float *part = allocate_floats(8 * ROWS * HS + ROWS * C + 3 * HS * C);
    float *q = part, *k = q + ROWS * HS, *v = k + ROWS * HS, *out = v + ROWS * HS, *d_out = out + ROWS * HS,
          *d_q = d_out + ROWS * HS, *d_k = d_q + ROWS * HS, *d_v = d_k + ROWS * HS, *d_x = d_v + ROWS * HS,
          *d_weight = d_x + ROWS * C;
    float *weights = allocate_floats(2 * T * T), *d_scores = allocate_floats(2 * T * T);
    double sum[ROWS * C] = {0};
    for (int h = 0; h < NH; h++) {
        float *const *p = (float *const *)&run->t.parameter[3 * h];
        Head head = {p[0], p[1], p[2]};
        HeadGradient d_head = {d_weight, d_weight + HS * C, d_weight + 2 * HS * C};
        for (int row = 0; row < ROWS; row++)
            memcpy(d_out + row * HS, run->t.dout + (row * NH + h) * HS, HS * sizeof *d_out);
        stacked_heads(out, weights, NULL, q, k, v, run->t.x, &head, &alone);
        stacked_heads_backward(d_x, &d_head, d_q, d_k, d_v, d_scores, d_out, weights, weights, q, k, v,
                               run->t.x, &head, &alone);
        for (int i = 0; i < ROWS * C; i++)
            sum[i] += (double)d_x[i];
        for (int i = 0; i < 3 * HS * C; i++) {
            double apart =
                (double)d_weight[i] - (double)run->t.d_parameter[3 * h + i / (HS * C)][i % (HS * C)];
            cr_assert(fabs(apart) <= 1e-4, "head %d, matrix %d: off by %g", h, i / (HS * C), apart);
        }
    }
    for (int i = 0; i < ROWS * C; i++)
        cr_assert(fabs((double)run->t.dx[i] - sum[i]) <= 1e-5, "d_x: number %d is %g, not %g", i,
                  (double)run->t.dx[i], sum[i]);
    free(part);
    free(weights);
    free(d_scores);
}

/* Trap: a softmax of one score is 1 whatever the score. Nothing is learned of queries and keys, exactly. */
Test(stacked, one_token_teaches_no_query)
{
    Run *run = run_kernel("stacked", "--batch 3 --tokens 1 --embed 6 --heads 2 --pass both --dout randn");
    for (int i = 0; i < 6; i++)
        for (size_t j = 0; j < run->parameters.list[i].size[0] * 6; j++)
            if (i % 3 == 2)
                cr_assert(run->t.d_parameter[i][j] != 0, "matrix %d", i);
            else
                cr_assert(run->t.d_parameter[i][j] == 0, "matrix %d: %g", i,
                          (double)run->t.d_parameter[i][j]);
}

/* Trap: the same number added to all scores of a row changes nothing, so each row of d_scores sums to 0, with
 * dropout too. A delta taken of the weights before dropout does not manage that. */
Test(stacked, score_gradients_of_a_row_sum_to_zero)
{
    enum { B = 2, T = 150 };
    Run *run = run_kernel("stacked", "--batch 2 --tokens 150 --embed 12 --heads 2 --dropout 0.3 --pass both "
                                     "--dout randn");
    for (int row = 0; row < B * T; row++) {
        const float *d_scores = run->t.backward_workspace[3] + row * T; /* of the last head */
        double sum = 0, largest = 0;
        for (int t2 = 0; t2 <= row % T; t2++) {
            sum += (double)d_scores[t2];
            largest = fmax(largest, fabs((double)d_scores[t2]));
        }
        cr_assert(fabs(sum) <= 1e-5 * (1 + largest), "row %d sums to %g", row, sum);
    }
}

/* The other way round than forward: what is asked of a token's output is heard by no later token. */
Test(wrapper, no_later_token_hears)
{
    enum { T = 150, C = 6, CHANGED = 140 };
    Run *run = run_kernel("wrapper", "--batch 1 --tokens 150 --embed 6 --heads 3 --pass both --dout randn");
    float before[T * C], *dout = (float *)run->t.dout;
    memcpy(before, run->t.dx, sizeof before);
    for (int i = 0; i < C; i++)
        dout[CHANGED * C + i] += 1;
    backward_run(run);
    size_t later = (CHANGED + 1) * C;
    cr_expect(memcmp(before + later, run->t.dx + later, (T * C - later) * sizeof *before) == 0);
    for (int t = 0; t <= CHANGED; t++)
        cr_expect(memcmp(before + t * C, run->t.dx + t * C, C * sizeof *before) != 0, "token %d", t);

    dout[CHANGED * C] = NAN;
    backward_run(run);
    for (int i = 0; i < (CHANGED + 1) * C; i++)
        cr_assert(isnan(run->t.dx[i]), "number %d is %f", i, (double)run->t.dx[i]);
}

/* The ends of blocks, of rows and of keys; and what backward asks for: q, k, v and scores of one head, and the
 * concatenated heads. */
Test(wrapper, gradients_at_block_edges)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 127 --embed 9 --heads 3 --pass both --dout randn",
        "--batch 1 --tokens 128 --embed 6 --heads 1 --pass both --dout randn",
        "--batch 2 --tokens 129 --embed 6 --heads 3 --pass both --dout randn",
        "--batch 1 --tokens 257 --embed 5 --embed-out 12 --heads 3 --pass both --dout randn",
        "--batch 2 --tokens 257 --embed 12 --heads 3 --pass both --dout randn --dropout 0.4",
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        Run *run = run_kernel("wrapper", sizes[i]);
        char text[400];
        bool passed = check_run(run);
        check_text(text, sizeof text, run);
        cr_expect(passed, "%s: %s", sizes[i], text);
        const AttentionShape *s = &run->problem.shape;
        size_t rows = (size_t)s->batch * s->tokens, kept = weights_count(s) * (s->dropout > 0 ? 2 : 1);
        cr_expect(run->extra_bytes / sizeof(float) ==
                      kept + rows * (5 * s->embed_out + 3 * s->head_size + s->tokens),
                  "%s", sizes[i]);
        close_run(run);
    }
}

Test(wrapper, same_bits_for_any_number_of_threads)
{
    const char *sizes = "--batch 2 --tokens 300 --embed 48 --heads 3 --pass both --dout randn";
    omp_set_num_threads(1);
    Run *one = run_kernel("wrapper", sizes);
    for (int threads = 2; threads <= 5; threads++) {
        omp_set_num_threads(threads);
        Run *several = run_kernel("wrapper", sizes);
        cr_expect(memcmp(one->t.out, several->t.out, one->out_size * sizeof *one->t.out) == 0, "%d threads",
                  threads);
        cr_expect(memcmp(one->t.dx, several->t.dx, one->out_size * sizeof *one->t.dx) == 0, "dx, %d threads",
                  threads);
        for (int i = 0; i < one->parameters.count; i++)
            cr_expect(memcmp(one->t.d_parameter[i], several->t.d_parameter[i],
                             one->parameters.list[i].size[0] * one->parameters.list[i].size[1] *
                                 sizeof(float)) == 0,
                      "d_%s, %d threads", one->parameters.list[i].name, threads);
    }
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
