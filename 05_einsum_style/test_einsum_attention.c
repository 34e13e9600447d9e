/* The module written in einsum. Every kernel against the oracle: common/test_chapter.c. */
#include "einsum_attention.h"
#include "memory.h"
#include "reference.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

/* Kernel 0 (einsum) or 1 (einsum-loops), opened as on "--batch 2 --tokens 5". */
static Run *open_kernel(int which, const char *words)
{
    char copy[256], *rest = copy;
    char *argv[32] = {"run"};
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word; (word = strtok_r(rest, " ", &rest)) && argc < 32;)
        argv[argc++] = word;
    Options options;
    parse_options(&options, argc, argv);
    Run *run = allocate_zeroed(1, sizeof *run);
    Refusal refusal = open_run(run, &chapter, &chapter.kernels[which], &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s: %s", words, refusal.reason);
    free_options(&options);
    return run;
}

static Run *run_kernel(int which, const char *words)
{
    Run *run = open_kernel(which, words);
    forward_run(run);
    return run;
}

static void close_kernel(Run *run)
{
    close_run(run);
    free(run);
}

/* Forward and backward against a file; the loss is sum(out), or sum(out^2) / 2, whose gradient is out itself.
 */
static void expect_reference(int which, const char *words, const char *path, bool dout_is_out)
{
    Run *run = run_kernel(which, words);
    if (dout_is_out)
        run->t.dout = run->t.out;
    backward_run(run);
    Kernel named_einsum =
        *run->kernel; /* the file's rows are named for kernel 0; kernel 1 computes the same */
    named_einsum.name = "einsum";
    run->kernel = &named_einsum;
    const char *wrong = check_reference(run, path);
    cr_expect(!wrong, "%s: %s", chapter.kernels[which].name, wrong);
    close_kernel(run);
}

Test(einsum_attention, holds_every_value_of_the_notebook)
{
    if (getenv("SMALL"))
        return;
    expect_reference(0, "--batch 8 --tokens 1024 --embed 768 --heads 12 --pass both",
                     "05_einsum_style/reference/notebook_modules.tsv", false);
}

/* Where d_in = d_out, a W that is read the wrong way round still fits; here it does not. PyTorch's values,
 * both kernels, gradients included. */
Test(einsum_attention, holds_pytorchs_values_where_d_in_is_not_d_out)
{
    for (int which = 0; which < 2; which++)
        expect_reference(which, "--batch 2 --tokens 5 --embed 7 --embed-out 12 --heads 3 --pass both",
                         "05_einsum_style/reference/wide.tsv", true);
}

Test(einsum_attention, draws_dropout_as_pytorch_does)
{
    for (int which = 0; which < 2; which++)
        expect_reference(which,
                         "--batch 2 --tokens 5 --embed 7 --embed-out 12 --heads 3 --dropout 0.5 --pass both",
                         "05_einsum_style/reference/dropout.tsv", true);
}

/* Inputs first, and the bound is that of C_out: kaiming_uniform takes the second size for the number of
 * inputs. */
Test(einsum_attention, matrices_are_inputs_by_outputs)
{
    Run *run = open_kernel(0, "--batch 1 --tokens 2 --embed 50 --embed-out 200 --heads 4");
    static const char *const names[5] = {"out_proj.weight", "out_proj.bias", "W_query", "W_key", "W_value"};
    cr_assert_eq(run->parameters.count, 5);
    for (int i = 0; i < 5; i++) {
        cr_expect_str_eq(run->parameters.list[i].name, names[i]);
        float largest = 0, bound = 1 / sqrtf(200);
        size_t count = run->parameters.list[i].size[0] * run->parameters.list[i].size[1];
        for (size_t j = 0; j < count; j++)
            largest = fmaxf(largest, fabsf(run->parameters.list[i].data[j]));
        cr_expect(largest <= bound && largest > 0.97f * bound, "%s: %g, bound %g", names[i], (double)largest,
                  (double)bound);
        if (i >= 2)
            cr_expect(run->parameters.list[i].size[0] == 50 && run->parameters.list[i].size[1] == 200);
    }
    close_kernel(run);
}

/* The notebook's old line, "bnd,di->bni" with W (d_out,d_in), is refused as soon as the two differ, and only
 * then. */
Test(einsum_attention, a_matrix_the_wrong_way_round_hides_where_it_is_square)
{
    static float x[2 * 3 * 4], W[4 * 6], q[2 * 3 * 6];
    EinsumPlan plan;
    View input = view(x, 2, 3, 4), output = view(q, 2, 3, 6), square = view(q, 2, 3, 4);
    View turned = view(W, 6, 4), right = view(W, 4, 6), either = view(W, 4, 4);
    cr_expect_null(einsum_plan(&plan, "bnd,di->bni", &square, &input, &either));
    cr_expect_null(einsum_plan(&plan, "bnd,di->bni", &output, &input, &right));
    cr_expect_null(
        einsum_plan(&plan, "bnd,od->bno", &output, &input, &turned)); /* what the letters should have said */
    cr_expect_str_eq(einsum_plan(&plan, "bnd,di->bni", &output, &input, &turned),
                     "einsum \"bnd,[d]i->bni\": letter 'd' is 6 long here and 4 before");
}

/* With one token there is one key, whose weight is 1: out = (x W_value) W_out^T + b, computed here index by
 * index. */
Test(einsum_attention, one_token_attends_to_itself)
{
    enum { B = 3, C = 5, C_OUT = 6 };
    for (int which = 0; which < 2; which++) {
        Run *run = run_kernel(
            which, "--batch 3 --tokens 1 --embed 5 --embed-out 6 --heads 2 --pass both --dout randn");
        const float *out_weight = run->t.parameter[0], *bias = run->t.parameter[1],
                    *W_value = run->t.parameter[4];
        for (int b = 0; b < B; b++)
            for (int o = 0; o < C_OUT; o++) {
                double expected = bias[o];
                for (int i = 0; i < C_OUT; i++) {
                    double value = 0;
                    for (int c = 0; c < C; c++)
                        value += (double)run->t.x[b * C + c] * W_value[c * C_OUT + i];
                    expected += value * out_weight[o * C_OUT + i];
                }
                cr_expect(fabs(run->t.out[b * C_OUT + o] - expected) <= 1e-6, "out[%d,0,%d] is %g, not %g", b,
                          o, (double)run->t.out[b * C_OUT + o], expected);
            }
        backward_run(run); /* a weight that is always 1 moves with nothing */
        for (int i = 0; i < C * C_OUT; i++)
            cr_expect(run->t.d_parameter[2][i] == 0 && run->t.d_parameter[3][i] == 0, "kernel %d: [%d]",
                      which, i);
        close_kernel(run);
    }
}

/* Around multiples of the softmax's sixteen lanes. */
Test(einsum_attention, weights_are_probabilities_of_the_past)
{
    static const char *const sizes[] = {
        "--batch 2 --tokens 1 --embed 6 --heads 3", "--batch 1 --tokens 15 --embed 6 --heads 2",
        "--batch 1 --tokens 16 --embed 6 --heads 1", "--batch 2 --tokens 17 --embed 9 --heads 3",
        "--batch 1 --tokens 131 --embed 30 --heads 3"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        Run *run = run_kernel(0, sizes[i]);
        int T = run->problem.shape.tokens;
        for (size_t row = 0; row < lse_count(&run->problem.shape); row++) {
            const float *weights = run->t.weights + row * T;
            int t = (int)(row % T);
            double sum = 0;
            for (int t2 = 0; t2 <= t; t2++) {
                cr_expect_gt(weights[t2], 0);
                sum += weights[t2];
            }
            for (int t2 = t + 1; t2 < T; t2++)
                cr_expect_eq(weights[t2], 0);
            cr_expect(fabs(sum - 1) <= 1e-6, "%s: row %zu sums to %.9f", sizes[i], row, sum);
        }
        close_kernel(run);
    }
}

/* Head h is columns h*HS .. (h+1)*HS - 1, and (B,NH,T,HS) is the same memory read in another order. */
Test(einsum_attention, split_heads_are_a_view)
{
    enum { B = 2, T = 3, NH = 2, HS = 4 };
    static float q[B * T * NH * HS];
    View heads = transpose(view(q, B, T, NH, HS), 1, 2);
    static const size_t size[4] = {B, NH, T, HS}, stride[4] = {T * NH * HS, HS, NH * HS, 1};
    cr_expect_eq(heads.data, q);
    cr_expect_eq(heads.axes, 4);
    for (int i = 0; i < 4; i++)
        cr_expect(heads.size[i] == size[i] && heads.stride[i] == stride[i], "axis %d", i);
}

/* The weight of a forbidden pair is 0, and 0 * NaN is NaN: with every weight in memory and a dense product, a
 * NaN in the last token's value reaches the tokens before it, as it does in PyTorch. */
Test(einsum_attention, a_later_nan_reaches_earlier_tokens)
{
    enum { B = 2, T = 5, C = 6 };
    for (int which = 0; which < 2; which++) {
        Run *run = open_kernel(which, "--batch 2 --tokens 5 --embed 6 --heads 2 --pass both");
        float x[B * T * C];
        memcpy(x, run->t.x, sizeof x);
        x[(T - 1) * C] = NAN; /* the last token of the first batch entry */
        run->t.x = x;
        forward_run(run);
        backward_run(run);
        for (int i = 0; i < B * T * C; i++) {
            cr_expect_eq(isnan(run->t.out[i]) != 0, i < T * C, "kernel %d, number %d is %g", which, i,
                         (double)run->t.out[i]);
            cr_expect_eq(isnan(run->t.dx[i]) != 0, i < T * C, "kernel %d, number %d of dx is %g", which, i,
                         (double)run->t.dx[i]);
        }
        close_kernel(run);
    }
}

/* Adding one number to all scores of a row changes no weight, so the scores' gradients cancel; with dropout
 * too, where a weight that was dropped still has one. Above the diagonal they are 0. */
Test(einsum_attention, gradients_of_a_rows_scores_cancel)
{
    enum { T = 40 };
    static const char *const dropouts[] = {"--dropout 0", "--dropout 0.4"};
    for (int i = 0; i < 2; i++) {
        char words[100];
        snprintf(words, sizeof words,
                 "--batch 2 --tokens 40 --embed 12 --heads 3 --pass both --dout randn %s", dropouts[i]);
        Run *run = run_kernel(0, words);
        backward_run(run);
        int dropped = 0, with_gradient = 0;
        for (size_t row = 0; row < lse_count(&run->problem.shape); row++) {
            const float *d_scores = run->t.backward_workspace[4] + row * T;
            const float *weights = run->t.weights + row * T;
            int t = (int)(row % T);
            double sum = 0, size = 0;
            for (int t2 = 0; t2 < T; t2++) {
                sum += d_scores[t2];
                size += fabs((double)d_scores[t2]);
                cr_expect(t2 <= t || d_scores[t2] == 0);
                dropped += t2 <= t && weights[t2] == 0;
                with_gradient += t2 <= t && weights[t2] == 0 && d_scores[t2] != 0;
            }
            cr_expect(fabs(sum) <= 1e-5 * size + 1e-7, "row %zu sums to %g of %g", row, sum, size);
        }
        cr_expect(i == 0 ? dropped == 0 : dropped > 1500 && with_gradient > 0.95 * dropped,
                  "%d weights were dropped, %d of them have a gradient", dropped, with_gradient);
        close_kernel(run);
    }
}

/* Beyond inputs, outputs and gradients: q, k, v, context and the weights, a gradient of each, and a part of
 * dx; with dropout the softmax before it. */
Test(einsum_attention, keeps_what_it_says)
{
    static const struct {
        const char *words;
        size_t floats;
    } cases[] = {{"", 4 * 2 * 5 * 12 + 2 * 3 * 5 * 5},
                 {"--dropout 0.5", 4 * 2 * 5 * 12 + 2 * 2 * 3 * 5 * 5},
                 {"--pass both", 8 * 2 * 5 * 12 + 2 * 2 * 3 * 5 * 5 + 2 * 5 * 7},
                 {"--pass both --dropout 0.5", 8 * 2 * 5 * 12 + 3 * 2 * 3 * 5 * 5 + 2 * 5 * 7}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char words[120];
        snprintf(words, sizeof words, "--batch 2 --tokens 5 --embed 7 --embed-out 12 --heads 3 %s",
                 cases[i].words);
        Run *run = open_kernel(0, words);
        cr_expect_eq(run->extra_bytes, 4 * cases[i].floats, "%s: %zu bytes", words, run->extra_bytes);
        close_kernel(run);
    }
}

/* How many numbers of out (which -2), dx (-1) or the gradient of a parameter; *data: they. */
static size_t result(const Run *run, int which, const float **data)
{
    const AttentionShape *s = &run->problem.shape;
    *data = which == -2 ? run->t.out : which == -1 ? run->t.dx : run->t.d_parameter[which];
    if (which < 0)
        return (size_t)s->batch * s->tokens * (which == -2 ? s->embed_out : s->embed);
    return run->parameters.list[which].size[0] * run->parameters.list[which].size[1];
}

Test(einsum_attention, the_same_bits_for_any_number_of_threads)
{
    for (int kernel = 0; kernel < 2; kernel++) {
        Run *run =
            open_kernel(kernel, "--batch 2 --tokens 210 --embed 48 --embed-out 36 --heads 3 --pass both "
                                "--dout randn");
        float *first[7] = {0};
        for (int threads = 1; threads <= 4; threads++) {
            omp_set_num_threads(threads);
            forward_run(run);
            backward_run(run);
            for (int which = -2; which < 5; which++) {
                const float *data;
                size_t count = result(run, which, &data);
                if (threads == 1)
                    memcpy(first[which + 2] = allocate_floats(count), data, count * sizeof *data);
                cr_expect(memcmp(first[which + 2], data, count * sizeof *data) == 0,
                          "kernel %d, %d threads, tensor %d", kernel, threads, which);
            }
        }
        for (int i = 0; i < 7; i++)
            free(first[i]);
        close_kernel(run);
    }
}
