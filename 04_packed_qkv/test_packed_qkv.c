/* What is particular to heads that are columns. Every kernel against the oracle: common/test_chapter.c. */
#include "memory.h"
#include "mistakes.h"
#include "packed_qkv.h"
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

/* ---- The numbers of others ---- */

static const double published[12] = {.3190, .4858, .2943, .3897, .2856, .3593,
                                     .2693, .3873, .2639, .3928, .2575, .4028};

Test(split_heads, prints_the_published_numbers)
{
    expect_values(run_kernel("split-heads", "")->t.out, published, 12, 1e-4, "out");
}

Test(packed_qkv, prints_the_published_numbers)
{
    expect_values(run_kernel("packed-qkv", "")->t.out, published, 12, 1e-4, "out");
}

/* PyTorch 2.15 on a CPU, seed 123: nn.MultiheadAttention(3, 3, dropout=p, bias=False) on the sentence, then
 * nn.Linear(3, 3). */
Test(torch_mha, gives_what_torch_gives)
{
    static const double out[18] = {.128593, .004675, -.062481, .288524, .072014, .015184,
                                   .342985, .094879, .041910,  .321820, .078663, .062992,
                                   .327794, .079403, .073310,  .318664, .073235, .078948};
    static const double last_weights[6] = {.163916, .161857, .162343, .170151, .177482, .164251};
    Run *run = run_kernel("torch-mha", "");
    expect_values(run->t.out, out, 18, 2e-6, "out");
    expect_values(run->t.weights + 30, last_weights, 6, 2e-6, "weights");

    static const double dropped[18] = {.018331, -.090044, .090764, .598922, .253631,  -.053660,
                                       .203653, .023645,  .029284, .405635, .134285,  .016221,
                                       .424156, .092917,  .236866, .177750, -.008563, .106241};
    static const double dropped_weights[6] = {.115461, .101802, .110617, .111449, .112063, .110457};
    run = run_kernel("torch-mha", "--dropout 0.5");
    expect_values(run->t.out, dropped, 18, 2e-6, "out after dropout");
    expect_values(run->t.weights + 30, dropped_weights, 6, 2e-6, "weights after dropout");
}

/* The same, out.sum().backward(). The parameters are out_proj.weight, in_proj_weight, proj.weight, proj.bias. */
Test(torch_mha, gives_the_gradients_torch_gives)
{
    static const double dx[18] = {1.297561, 1.653764, -.781034, .768355, .942654, -.448788,
                                  .502611,  .617955,  -.295412, .330146, .407445, -.175088,
                                  .193770,  .246164,  -.104800, .082039, .107963, -.050534};
    static const double d_in_proj[27] = {-.005943, -.007160, -.004007, .004298,  .006095,  .003592,  .019451,
                                         .029937,  .021096,  .004036,  .017120,  -.008611, -.008944, -.023009,
                                         -.000732, -.006551, -.036588, .009466,  1.401837, 1.504800, 2.032160,
                                         .579344,  .615361,  .824066,  1.517776, 1.608873, 2.201220};
    Run *run = run_kernel("torch-mha", "--pass both");
    expect_values(run->t.dx, dx, 18, 3e-6, "dx");
    expect_values(run->t.d_parameter[1], d_in_proj, 27, 3e-6, "d_in_proj_weight");

    static const double dropped_dx[18] = {.458278, .553117, -.155977, .996148, 1.280556, -.428339,
                                          .445420, .514076, -.397331, .377370, .416983,  -.196952,
                                          .277511, .381619, -.129566, .080380, .093431,  -.109944};
    static const double dropped_out_proj[9] = {-.555845, -1.813189, -1.171835, .302500,  .986767,
                                               .637731,  -.842557,  -2.748455, -1.776282};
    run = run_kernel("torch-mha", "--dropout 0.5 --pass both");
    expect_values(run->t.dx, dropped_dx, 18, 3e-6, "dx after dropout");
    expect_values(run->t.d_parameter[0], dropped_out_proj, 9, 3e-6, "d_out_proj after dropout");
}

static void hold_the_notebook(const char *name)
{
    if (getenv("SMALL"))
        return;
    Run *run = run_kernel(name, "--batch 8 --tokens 1024 --embed 768 --heads 12 --pass both");
    const char *wrong = check_reference(run, "04_packed_qkv/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s: %s", name, wrong);
}

Test(split_heads, holds_every_value_of_the_notebook)
{
    hold_the_notebook("split-heads");
}

Test(packed_qkv, holds_every_value_of_the_notebook)
{
    hold_the_notebook("packed-qkv");
}

Test(torch_mha, holds_every_value_of_the_notebook)
{
    hold_the_notebook("torch-mha");
}

/* ---- Draws ---- */

static void expect_draw(RandomStream *stream, const Run *run, int i, const char *name, int rows, int columns,
                        float bound)
{
    size_t count = (size_t)rows * columns;
    float *expected = allocate_floats(count);
    draw_uniform(stream, expected, count, -bound, bound);
    cr_expect_str_eq(run->parameters.list[i].name, name);
    cr_expect(run->parameters.list[i].size[0] * run->parameters.list[i].size[1] == count, "%s", name);
    cr_expect(memcmp(expected, run->parameters.list[i].data, count * sizeof *expected) == 0, "%s", name);
    free(expected);
}

Test(torch_mha, draws_its_output_projection_first)
{
    enum { C = 6 };
    Run *run = run_kernel("torch-mha", "--batch 1 --tokens 2 --embed 6 --heads 3 --seed 42");
    RandomStream stream;
    float x[2 * C];
    seed_stream(&stream, STREAM_CPU, 42);
    draw_randn(&stream, x, 2 * C);
    expect_draw(&stream, run, 0, "multihead_attn.out_proj.weight", C, C, linear_bound(C));
    expect_draw(&stream, run, 1, "multihead_attn.in_proj_weight", 3 * C, C, sqrtf(6.0f / (4 * C)));
    expect_draw(&stream, run, 2, "proj.weight", C, C, linear_bound(C));
    expect_draw(&stream, run, 3, "proj.bias", C, 1, linear_bound(C));
}

Test(packed_qkv, is_split_heads_from_one_matrix)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 5 --embed 12 --heads 2",
        "--batch 2 --tokens 130 --embed 10 --embed-out 21 --heads 3",
        "--batch 1 --tokens 1 --embed 3 --embed-out 8 --heads 1",
        "--batch 2 --tokens 40 --embed 24 --embed-out 12 --heads 3 --dropout 0.4",
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        Run *split = run_kernel("split-heads", sizes[i]), *packed = run_kernel("packed-qkv", sizes[i]);
        for (size_t j = 0; j < split->out_size; j++) {
            double apart = (double)split->t.out[j] - (double)packed->t.out[j];
            cr_assert(fabs(apart) <= 1e-6, "%s: off by %g at %zu", sizes[i], apart, j);
        }
    }
}

/* ---- Traps ---- */

/* chunk(3, -1) of (2,5,36): columns 0-11 are queries, 12-23 keys, 24-35 values; head 1 starts at column 6 of
 * each. Not, as other libraries pack them, 6 queries, 6 keys and 6 values of head 0 and then those of head 1.
 */
Test(packed_qkv, thirds_are_queries_keys_values)
{
    enum { TOKENS = 2 * 5, C = 12, HS = 6 };
    const char *sizes = "--batch 2 --tokens 5 --embed 12 --heads 2";
    Run *packed = run_kernel("packed-qkv", sizes), *split = run_kernel("split-heads", sizes);
    const float *qkv = packed->t.workspace[0];
    for (int token = 0; token < TOKENS; token++)
        for (int third = 0; third < 3; third++)
            for (int i = 0; i < C; i++) {
                double apart = (double)qkv[token * 3 * C + third * C + i] -
                               (double)split->t.workspace[third][token * C + i];
                cr_assert(fabs(apart) <= 1e-6, "token %d, third %d, column %d", token, third, i);
            }
    /* entry 1, head 1, row 1: two keys, their scores by hand */
    const float *q = qkv + (5 + 1) * 3 * C + HS, *k0 = qkv + 5 * 3 * C + C + HS, *k1 = k0 + 3 * C;
    double score0 = 0, score1 = 0;
    for (int i = 0; i < HS; i++) {
        score0 += (double)q[i] * (double)k0[i];
        score1 += (double)q[i] * (double)k1[i];
    }
    const float *weights = packed->t.weights + lse_index(&packed->problem.shape, 1, 1, 1) * 5;
    cr_expect(fabs((double)weights[1] - 1 / (1 + exp((score0 - score1) / sqrt(HS)))) <= 1e-6);
}

/* view(1, -1, 2, 6): the second sequence sees the first. */
Test(mistakes, folded_batch_leaks)
{
    enum { T = 5, C = 12, ENTRY = T * C };
    Run *run = run_kernel("packed-qkv", "--batch 2 --tokens 5 --embed 12 --heads 2");
    AttentionShape right = run->problem.shape, wrong = folded_batch(&right);
    cr_assert(wrong.batch == 1 && wrong.tokens == 10 && wrong.key_tokens == 10);
    const float *qkv = run->t.workspace[0];
    float weights[2 * 10 * 10], context[2][2][2 * ENTRY]; /* wrong?, changed? */
    for (int changed = 0; changed < 2; changed++) {
        if (changed) {
            for (int i = 0; i < ENTRY; i++)
                ((float *)run->t.x)[i] += 1;
            forward_run(run);
        }
        attend_heads(context[0][changed], weights, NULL, qkv, qkv + C, qkv + 2 * C, 3 * C, &right);
        attend_heads(context[1][changed], weights, NULL, qkv, qkv + C, qkv + 2 * C, 3 * C, &wrong);
    }
    cr_expect(furthest_apart(context[0][0], context[0][1], ENTRY) > 0.01, "entry 0 did change");
    cr_expect(memcmp(context[0][0] + ENTRY, context[0][1] + ENTRY, ENTRY * sizeof(float)) == 0);
    cr_expect(furthest_apart(context[1][0] + ENTRY, context[1][1] + ENTRY, ENTRY) > 0.01,
              "folded, it must leak");
}

/* head_dim = 12 // (2 * 3): a token becomes three, the first of which does not see the other two. */
Test(mistakes, third_of_a_head_makes_three_tokens_of_one)
{
    enum { C = 12 };
    Run *run = run_kernel("split-heads", "--batch 2 --tokens 5 --embed 12 --heads 2");
    AttentionShape wrong = third_of_a_head(&run->problem.shape);
    cr_assert(wrong.head_size == 2 && wrong.tokens == 15 && wrong.heads == 2 && wrong.batch == 2);
    const float *q = run->t.workspace[0], *k = run->t.workspace[1], *v = run->t.workspace[2],
                *context = run->t.workspace[3];
    float mistaken[2 * 5 * C], weights[2 * 2 * 15 * 15];
    attend_heads(mistaken, weights, NULL, q, k, v, C / 3, &wrong);
    cr_expect(furthest_apart(context, v, C) <= 1e-6, "a first token's context is its own value");
    cr_expect(furthest_apart(mistaken, v, 4) <= 1e-6, "and so is that of its first third");
    cr_expect(furthest_apart(mistaken + 4, v + 4, 4) > 0.01,
              "but the second third mixes itself with the first");
}

/* view(B, NH, T, HS): "tokens" of head 1 begin in the middle of the sentence, so token 0 sees token T/2. */
Test(mistakes, without_transpose_mixes_tokens)
{
    enum { B = 2, T = 6, C = 4, NH = 2, HS = 2 };
    Run *run = run_kernel("split-heads", "--batch 2 --tokens 6 --embed 4 --heads 2");
    AttentionShape right = run->problem.shape, wrong = without_transpose(&right);
    const float *q = run->t.workspace[0], *k = run->t.workspace[1], *v = run->t.workspace[2],
                *context = run->t.workspace[3];
    float mistaken[B * NH * T * HS], weights[B * NH * T * T];
    attend_heads(mistaken, weights, NULL, q, k, v, HS, &wrong);
    for (int b = 0; b < B; b++) {
        const float *v_b = v + b * T * C, *head1 = mistaken + (b * NH + 1) * T * HS;
        cr_expect(furthest_apart(context + b * T * C, v_b, C) <= 1e-6, "token 0's context is its own value");
        cr_expect(furthest_apart(head1, v_b + HS, HS) > 0.01, "without the transpose head 1's half is not");
        cr_expect(furthest_apart(head1, v_b + T / 2 * C, HS) <= 1e-6, "but the first half of token 3's");
    }
}

/* Trap: x went three ways, so its gradient is a sum of three. And the packed matrix's gradient is the three
 * matrices' above one another, as the matrix itself. */
Test(packed_qkv, gradients_are_those_of_split_heads)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 5 --embed 12 --heads 2 --pass both --dout randn",
        "--batch 2 --tokens 130 --embed 10 --embed-out 21 --heads 3 --pass both --dout randn",
        "--batch 2 --tokens 40 --embed 24 --embed-out 12 --heads 3 --dropout 0.4 --pass both --dout randn",
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        Run *split = run_kernel("split-heads", sizes[i]), *packed = run_kernel("packed-qkv", sizes[i]);
        const AttentionShape *s = &split->problem.shape;
        int third = s->embed_out * s->embed;
        cr_expect(furthest_apart(split->t.dx, packed->t.dx, s->batch * s->tokens * s->embed) <= 2e-6, "%s",
                  sizes[i]);
        for (int j = 0; j < 3; j++)
            cr_expect(furthest_apart(split->t.d_parameter[j], packed->t.d_parameter[0] + j * third, third) <=
                          1e-4,
                      "%s: third %d", sizes[i], j);
    }
}

/* Trap: the same vector added to all keys of an entry changes no weight, so the gradients of its keys sum to
 * 0, with dropout too. A delta taken of the weights before dropout does not manage that. */
Test(packed_qkv, gradients_of_keys_sum_to_zero)
{
    enum { B = 2, T = 150, C = 12 };
    Run *run =
        run_kernel("packed-qkv", "--batch 2 --tokens 150 --embed 12 --heads 2 --dropout 0.3 --pass both "
                                 "--dout randn");
    for (int b = 0; b < B; b++)
        for (int i = 0; i < C; i++) {
            double sum = 0, size = 0;
            for (int t2 = 0; t2 < T; t2++) {
                double d_k = (double)run->t.backward_workspace[0][(b * T + t2) * 3 * C + C + i];
                sum += d_k;
                size += fabs(d_k);
            }
            cr_expect(size > 0.1 && fabs(sum) <= 1e-5 * size, "entry %d, column %d: %g", b, i, sum);
        }
}

/* What backward asks for: the gradients of qkv and of context, and 128 rows of scores for each head. Chapter 7
 * needs none of the last. */
Test(packed_qkv, backward_holds_a_block_of_scores)
{
    for (int T = 64; T <= 512; T *= 2) {
        char both[100], forward[80];
        snprintf(forward, sizeof forward, "--batch 2 --tokens %d --embed 12 --heads 3", T);
        snprintf(both, sizeof both, "%s --pass both", forward);
        size_t more =
            run_kernel("packed-qkv", both)->extra_bytes - run_kernel("packed-qkv", forward)->extra_bytes;
        size_t block = T < 128 ? T : 128;
        cr_expect(more == sizeof(float) * (2 * T * 4 * 12 + 2 * 3 * block * T), "%d tokens: %zu", T, more);
    }
}

/* ---- Every kernel ---- */

Test(packed_qkv, block_edges_and_large_scores)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 1 --embed 6 --heads 3",
        "--batch 2 --tokens 127 --embed 9 --heads 3",
        "--batch 1 --tokens 128 --embed 6 --heads 1",
        "--batch 2 --tokens 129 --embed 6 --heads 3",
        "--batch 1 --tokens 257 --embed 3 --heads 3",
        "--batch 1 --tokens 129 --embed 5 --embed-out 12 --heads 3",
    };
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++)
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            if (i == 5 && strcmp(kernel->name, "torch-mha") == 0)
                continue;
            Run *run = run_kernel(kernel->name, sizes[i]);
            cr_expect(check_run(run), "%s %s differs from the oracle", kernel->name, sizes[i]);
            int T = run->problem.shape.tokens;
            for (size_t j = 0; j < run->weights_size; j++)
                if ((int)(j % T) > (int)(j / T % T))
                    cr_assert(run->t.weights[j] == 0, "%s: %zu lies above the diagonal", kernel->name, j);
            for (size_t j = 0; j < (size_t)run->problem.shape.batch * T * run->problem.shape.embed; j++)
                ((float *)run->t.x)[j] *= 30;
            cr_expect(check_run(run), "%s %s, x times 30, differs from the oracle", kernel->name, sizes[i]);
            close_run(run);
        }
}

/* The ends of blocks, backward. */
Test(packed_qkv, gradients_at_block_edges)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 127 --embed 9 --heads 3 --pass both --dout randn",
        "--batch 1 --tokens 128 --embed 6 --heads 1 --pass both --dout randn",
        "--batch 2 --tokens 129 --embed 6 --heads 3 --pass both --dout randn",
        "--batch 1 --tokens 257 --embed 3 --heads 3 --pass both --dout randn",
        "--batch 2 --tokens 257 --embed 12 --heads 3 --pass both --dout randn --dropout 0.4",
    };
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++)
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            Run *run = run_kernel(kernel->name, sizes[i]);
            char text[400];
            bool passed = check_run(run);
            check_text(text, sizeof text, run);
            cr_expect(passed, "%s %s: %s", kernel->name, sizes[i], text);
            close_run(run);
        }
}

/* The other way round than forward: what is asked of a token's output is heard by no later token. */
Test(packed_qkv, no_later_token_hears)
{
    enum { T = 150, C = 6, CHANGED = 140 };
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++) {
        Run *run =
            run_kernel(kernel->name, "--batch 1 --tokens 150 --embed 6 --heads 3 --pass both --dout randn");
        float before[T * C], *dout = (float *)run->t.dout;
        memcpy(before, run->t.dx, sizeof before);
        for (int i = 0; i < C; i++)
            dout[CHANGED * C + i] += 1;
        backward_run(run);
        size_t later = (CHANGED + 1) * C;
        cr_expect(memcmp(before + later, run->t.dx + later, (T * C - later) * sizeof *before) == 0, "%s",
                  kernel->name);
        for (int t = 0; t <= CHANGED; t++)
            cr_expect(memcmp(before + t * C, run->t.dx + t * C, C * sizeof *before) != 0, "%s: token %d",
                      kernel->name, t);

        dout[CHANGED * C] = NAN;
        backward_run(run);
        for (int i = 0; i < (CHANGED + 1) * C; i++)
            cr_assert(isnan(run->t.dx[i]), "%s: number %d is %f", kernel->name, i, (double)run->t.dx[i]);
    }
}

/* A token's change reaches no earlier token, not by one bit; a NaN is not hidden. */
Test(packed_qkv, sees_no_later_token)
{
    enum { T = 150, C = 6, CHANGED = 140 };
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++) {
        Run *run = run_kernel(kernel->name, "--batch 1 --tokens 150 --embed 6 --heads 3");
        float before[T * C], *x = (float *)run->t.x;
        memcpy(before, run->t.out, sizeof before);
        for (int i = 0; i < C; i++)
            x[CHANGED * C + i] += 1;
        forward_run(run);
        cr_expect(memcmp(before, run->t.out, CHANGED * C * sizeof *before) == 0, "%s", kernel->name);
        cr_expect(memcmp(before, run->t.out, sizeof before) != 0, "%s", kernel->name);

        x[CHANGED * C] = NAN;
        forward_run(run);
        for (int i = CHANGED * C; i < T * C; i++)
            cr_assert(isnan(run->t.out[i]), "%s: number %d is %f", kernel->name, i, (double)run->t.out[i]);
    }
}

Test(packed_qkv, same_bits_for_any_number_of_threads)
{
    const char *sizes = "--batch 2 --tokens 300 --embed 48 --heads 3 --pass both --dout randn";
    for (const Kernel *kernel = chapter.kernels; kernel->name; kernel++) {
        omp_set_num_threads(1);
        Run *one = run_kernel(kernel->name, sizes);
        for (int threads = 2; threads <= 5; threads++) {
            omp_set_num_threads(threads);
            Run *several = run_kernel(kernel->name, sizes);
            cr_expect(memcmp(one->t.out, several->t.out, one->out_size * sizeof *one->t.out) == 0,
                      "%s: %d threads", kernel->name, threads);
            cr_expect(
                memcmp(one->t.weights, several->t.weights, one->weights_size * sizeof *one->t.weights) == 0,
                "%s: weights, %d threads", kernel->name, threads);
            cr_expect(memcmp(one->t.dx, several->t.dx, one->out_size * sizeof *one->t.dx) == 0,
                      "%s: dx, %d threads", kernel->name, threads);
            for (int i = 0; i < one->parameters.count; i++)
                cr_expect(memcmp(one->t.d_parameter[i], several->t.d_parameter[i],
                                 one->parameters.list[i].size[0] * one->parameters.list[i].size[1] *
                                     sizeof(float)) == 0,
                          "%s: d_%s, %d threads", kernel->name, one->parameters.list[i].name, threads);
        }
    }
}

Test(torch_mha, refuses_another_width)
{
    AttentionShape s = {.batch = 1, .tokens = 1, .embed = 4, .embed_out = 2, .heads = 1, .head_size = 2};
    const Kernel *torch = &chapter.kernels[2];
    cr_assert_str_eq(torch->name, "torch-mha");
    cr_expect_str_eq(torch->refuses(&s), "takes --embed-out equal to --embed");
    s.embed = 2;
    cr_expect_null(torch->refuses(&s));
    s.embed = s.embed_out = 1 << 30; /* 3 * C would not fit into an int */
    cr_expect_not_null(torch->refuses(&s));
}
