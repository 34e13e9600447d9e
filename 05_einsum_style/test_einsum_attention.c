/* The module written in einsum. Every kernel against the oracle: common/test_chapter.c. */
#include "einsum_attention.h"
#include "memory.h"
#include "reference.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

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

static void expect_reference(int which, const char *words, const char *path)
{
    Run *run = run_kernel(which, words);
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
    expect_reference(0, "--batch 8 --tokens 1024 --embed 768 --heads 12",
                     "05_einsum_style/reference/notebook_modules.tsv");
}

/* Where d_in = d_out, a W that is read the wrong way round still fits; here it does not. PyTorch's values,
 * both kernels. */
Test(einsum_attention, holds_pytorchs_values_where_d_in_is_not_d_out)
{
    for (int which = 0; which < 2; which++)
        expect_reference(which, "--batch 2 --tokens 5 --embed 7 --embed-out 12 --heads 3",
                         "05_einsum_style/reference/wide.tsv");
}

Test(einsum_attention, draws_dropout_as_pytorch_does)
{
    for (int which = 0; which < 2; which++)
        expect_reference(which, "--batch 2 --tokens 5 --embed 7 --embed-out 12 --heads 3 --dropout 0.5",
                         "05_einsum_style/reference/dropout.tsv");
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
        Run *run = run_kernel(which, "--batch 3 --tokens 1 --embed 5 --embed-out 6 --heads 2");
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
        Run *run = open_kernel(which, "--batch 2 --tokens 5 --embed 6 --heads 2");
        float x[B * T * C];
        memcpy(x, run->t.x, sizeof x);
        x[(T - 1) * C] = NAN; /* the last token of the first batch entry */
        run->t.x = x;
        forward_run(run);
        for (int i = 0; i < B * T * C; i++)
            cr_expect_eq(isnan(run->t.out[i]) != 0, i < T * C, "kernel %d, number %d is %g", which, i,
                         (double)run->t.out[i]);
        close_kernel(run);
    }
}

#ifdef _OPENMP
Test(einsum_attention, the_same_bits_for_any_number_of_threads)
{
    for (int which = 0; which < 2; which++) {
        Run *run = open_kernel(which, "--batch 2 --tokens 210 --embed 48 --embed-out 36 --heads 3");
        size_t count = (size_t)2 * 210 * 36;
        float *first = allocate_floats(count);
        for (int threads = 1; threads <= 4; threads++) {
            omp_set_num_threads(threads);
            forward_run(run);
            if (threads == 1)
                memcpy(first, run->t.out, count * sizeof *first);
            cr_expect(memcmp(first, run->t.out, count * sizeof *first) == 0, "kernel %d, %d threads", which,
                      threads);
        }
        free(first);
        close_kernel(run);
    }
}
#endif
