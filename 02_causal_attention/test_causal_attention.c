/* Chapter 2: the published numbers, straight from the functions, and each trap that the README tells. */
#include "causal_attention.h"
#include "chapter.h"
#include "random.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static void expect_near(const float *ours, const double *expected, int n, double tolerance)
{
    for (int i = 0; i < n; i++) {
        double difference = fabs((double)ours[i] - expected[i]);
        cr_expect(difference <= tolerance, "element %d: %g, expected %g", i, (double)ours[i], expected[i]);
    }
}

/* ---- A module small enough for arrays, in three versions of one signature. ---- */

enum { ROOM = 20000 };
static float x[ROOM], w[3][ROOM], queries[ROOM], keys[ROOM], values[ROOM], weights[ROOM], softmax[ROOM],
    out[ROOM];
static AttentionShape s;

typedef void Module(float *, float *, float *, float *, float *, const float *, const float *, const float *,
                    const float *, const AttentionShape *);

static void causal(float *its_out, float *its_weights, float *q, float *k, float *v, const float *its_x,
                   const float *w_query, const float *w_key, const float *w_value,
                   const AttentionShape *shape)
{
    causal_attention(its_out, its_weights, softmax, q, k, v, its_x, w_query, w_key, w_value, shape);
}

static Module *const modules[3] = {attention_renormalise, attention_minus_inf, causal};
static const char *const names[3] = {"renormalise", "minus-inf", "causal"};

static void run(Module *module)
{
    memset(out, 0xff, sizeof out); /* NaN */
    memset(weights, 0xff, sizeof weights);
    module(out, weights, queries, keys, values, x, w[0], w[1], w[2], &s);
}

static void set_up_shape(int batch, int tokens, int embed, int embed_out)
{
    s = (AttentionShape){.batch = batch,
                         .tokens = tokens,
                         .key_tokens = tokens,
                         .heads = 1,
                         .kv_heads = 1,
                         .head_size = embed_out,
                         .embed = embed,
                         .embed_out = embed_out,
                         .scale = 1 / sqrtf((float)embed_out)};
}

static void set_up_random(int batch, int tokens, int embed, int embed_out)
{
    set_up_shape(batch, tokens, embed, embed_out);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 7);
    draw_randn(&stream, x, (size_t)batch * tokens * embed);
    for (int i = 0; i < 3; i++)
        draw_uniform(&stream, w[i], (size_t)embed * embed_out, -linear_bound(embed), linear_bound(embed));
}

/* The sentence, `batch` times, and SelfAttention_v2's or CausalAttention's matrices, 3 to 2. */
static void set_up_sentence(int batch, uint64_t seed)
{
    set_up_shape(batch, 6, 3, 2);
    for (int b = 0; b < batch; b++)
        memcpy(x + 18 * b, sentence, sizeof sentence);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, seed);
    for (int i = 0; i < 3; i++)
        draw_uniform(&stream, w[i], 6, -linear_bound(3), linear_bound(3));
}

static void scores_of_query(float *row, int t, float scale)
{
    for (int t2 = 0; t2 < 6; t2++)
        row[t2] = scale * (queries[2 * t] * keys[2 * t2] + queries[2 * t + 1] * keys[2 * t2 + 1]);
}

/* ---- The published numbers ---- */

static const double masked_weights[36] = {1,     0,     0,     0,     0,     0,     .5517, .4483, 0,
                                          0,     0,     0,     .3800, .3097, .3103, 0,     0,     0,
                                          .2758, .2460, .2462, .2319, 0,     0,     .2175, .1983, .1984,
                                          .1888, .1971, 0,     .1935, .1663, .1666, .1542, .1666, .1529};

Test(published, weights_over_all_tokens)
{
    float row[6];
    set_up_sentence(1, 789);
    run(attention_renormalise);
    scores_of_query(row, 0, s.scale);
    softmax_row(row, 6);
    expect_near(row, (double[]){.1921, .1646, .1652, .1550, .1721, .1510}, 6, 1e-4);
}

Test(published, masked_weights_in_all_three_ways)
{
    for (int i = 0; i < 3; i++) {
        set_up_sentence(1, 789);
        run(modules[i]);
        expect_near(weights, masked_weights, 36, 1e-4);
    }
}

Test(published, masked_scores)
{
    float row[6];
    set_up_sentence(1, 789);
    run(attention_minus_inf);
    scores_of_query(row, 1, 1);
    mask_row(row, 6, 2);
    expect_near(row, (double[]){.4656, .1723}, 2, 1e-4);
    for (int i = 2; i < 6; i++)
        cr_expect(row[i] == -INFINITY);
}

Test(published, dropout_of_ones_and_of_masked_weights)
{
    RandomStream stream;
    float ones[36];
    for (int i = 0; i < 36; i++)
        ones[i] = 1;
    seed_stream(&stream, STREAM_CPU, 123);
    apply_dropout(&stream, ones, 36, 0.5);
    expect_near(ones, (double[]){2, 2, 0, 2, 2, 0, 0, 0, 0, 2, 0, 2, 2, 2, 2, 2, 0, 2,
                                 0, 2, 2, 0, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 2, 2, 2, 0},
                36, 0);

    set_up_sentence(1, 789);
    seed_stream(&stream, STREAM_CPU, 123);
    s.dropout = 0.5f;
    s.dropout_stream = &stream;
    run(causal);
    expect_near(weights + 12, (double[]){.7599, .6194, .6206, 0, 0, 0}, 6, 1e-4);
    expect_near(weights + 30, (double[]){0, .3327, .3331, .3084, .3331, 0}, 6, 1e-4);
}

Test(published, causal_attention_seed_123_twice_in_a_batch)
{
    set_up_sentence(2, 123);
    run(causal);
    for (int b = 0; b < 2; b++)
        expect_near(out + 12 * b,
                    (double[]){-.4519, .2216, -.5874, .0058, -.6300, -.0632, -.5675, -.0843, -.5526, -.0981,
                               -.5299, -.1081},
                    12, 1e-4);
}

/* ---- The traps ---- */

/* Tokens 1 and 200, all matrices 1: the first token's score with itself is 1, with the second, hidden one
 * 200. */
Test(trap, renormalise_loses_a_row_to_a_large_hidden_score)
{
    set_up_shape(1, 2, 1, 1);
    x[0] = 1, x[1] = 200;
    w[0][0] = w[1][0] = w[2][0] = 1;
    run(attention_renormalise);
    cr_expect(isnan(weights[0]) && isnan(out[0]), "weight %g, out %g", (double)weights[0], (double)out[0]);
    for (int i = 1; i < 3; i++) {
        run(modules[i]);
        expect_near(weights, (double[]){1, 0, 0, 1}, 4, 0);
        expect_near(out, (double[]){1, 200}, 2, 0);
    }
}

Test(trap, renormalise_bears_a_lead_of_87)
{
    float near[2] = {0, 86.9f}, far[2] = {0, 87.1f};
    softmax_row(near, 2);
    renormalise_row(near, 2, 1);
    cr_expect(near[0] == 1 && near[1] == 0, "%g %g", (double)near[0], (double)near[1]);
    softmax_row(far, 2);
    renormalise_row(far, 2, 1);
    cr_expect(isnan(far[0]), "%g", (double)far[0]);
}

/* A score of 0 is a score like any other: e^0 = 1. */
Test(trap, scores_masked_with_zero_leak)
{
    float zero[4] = {0.5f, -0.5f, 0, 0}, minus_inf[4] = {0.5f, -0.5f, 3, 7};
    softmax_row(zero, 4);
    cr_expect(zero[2] + zero[3] > 0.4f, "the hidden keys keep %g", (double)(zero[2] + zero[3]));
    mask_row(minus_inf, 4, 2);
    softmax_row(minus_inf, 4);
    expect_near(minus_inf, (double[]){0.731058579, 0.268941421, 0, 0}, 4, 1e-6);
}

/* Another last token: not one bit of the rows before it may change. (renormalise divides by a sum in which
 * the last token had a part, and so rounds differently.) */
Test(trap, the_future_does_not_leak)
{
    enum { T = 37, C = 5, C_OUT = 4 };
    float before[T * C_OUT];
    for (int i = 0; i < 3; i++) {
        set_up_random(1, T, C, C_OUT);
        run(modules[i]);
        memcpy(before, out, sizeof before);
        for (int c = 0; c < C; c++)
            x[(T - 1) * C + c] += 3;
        run(modules[i]);
        for (int n = 0; n < (T - 1) * C_OUT; n++) {
            float difference = fabsf(out[n] - before[n]);
            cr_expect(difference <= (i == 0 ? 1e-6f : 0), "%s, element %d moved by %g", names[i], n,
                      (double)difference);
        }
        cr_expect(fabsf(out[T * C_OUT - 1] - before[T * C_OUT - 1]) > 1e-3f, "the last row should move");
    }
}

/* Token 1 sees itself alone; where dropout takes that one weight, its context vector is zero. */
Test(trap, dropout_can_silence_a_token)
{
    RandomStream stream;
    int silent = 0, doubled = 0;
    for (uint64_t seed = 0; seed < 100; seed++) {
        set_up_sentence(1, 123);
        seed_stream(&stream, STREAM_CPU, seed);
        s.dropout = 0.5f;
        s.dropout_stream = &stream;
        run(causal);
        silent += weights[0] == 0 && out[0] == 0 && out[1] == 0;
        doubled += weights[0] == 2 && out[0] == 2 * values[0];
    }
    cr_expect(silent + doubled == 100);
    cr_expect(silent > 30 && doubled > 30, "%d of 100 silent", silent);
}

/* nn.Dropout does not know what is masked: it draws for the zeros too. */
Test(trap, dropout_draws_for_masked_weights_too)
{
    RandomStream ours, expected;
    uint8_t keep[2 * 36];
    seed_stream(&ours, STREAM_CPU, 5);
    expected = ours;
    set_up_sentence(2, 123);
    s.dropout = 0.25f;
    s.dropout_stream = &ours;
    run(causal);
    draw_dropout(&expected, keep, 2 * 36, 0.25);
    float next[2];
    draw_rand(&ours, &next[0], 1);
    draw_rand(&expected, &next[1], 1);
    cr_expect(next[0] == next[1]);
    for (int i = 0; i < 2 * 36; i++)
        cr_expect(keep[i] || weights[i] == 0, "element %d", i);
}

Test(trap, dropped_weights_do_not_sum_to_one_but_do_on_average)
{
    enum { T = 100 };
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 5);
    set_up_random(1, T, 5, 4);
    s.dropout = 0.5f;
    s.dropout_stream = &stream;
    run(causal);
    double all = 0;
    int near_one = 0;
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int t2 = 0; t2 < T; t2++)
            sum += weights[t * T + t2];
        near_one += fabs(sum - 1) < 1e-3;
        all += sum / T;
    }
    cr_expect(near_one < 10, "%d of 100 rows still sum to 1", near_one);
    cr_expect(fabs(all - 1) < 0.1, "mean of the sums %g", all);
}

/* ---- Softmax at its edges ---- */

Test(softmax, a_row_with_nothing_allowed_is_zero)
{
    float row[3] = {1, 2, 3};
    mask_row(row, 3, 0);
    softmax_row(row, 3);
    expect_near(row, (double[]){0, 0, 0}, 3, 0);
}

Test(softmax, nan_is_not_hidden)
{
    float row[3] = {NAN, -INFINITY, -INFINITY};
    softmax_row(row, 3);
    for (int i = 0; i < 3; i++)
        cr_expect(isnan(row[i]), "element %d is %g", i, (double)row[i]);
}

/* ---- Shapes ---- */

Test(shapes, one_token_hears_itself_alone)
{
    for (int i = 0; i < 3; i++) {
        set_up_random(3, 1, 5, 7);
        run(modules[i]);
        for (int b = 0; b < 3; b++)
            cr_expect(weights[b] == 1, "%s: weight %g", names[i], (double)weights[b]);
        cr_expect(memcmp(out, values, 21 * sizeof *out) == 0, "%s: the token's value comes out as it is",
                  names[i]);
    }
}

Test(shapes, a_batch_is_its_entries)
{
    enum { B = 3, T = 11, C = 6, C_OUT = 5 };
    float together[B * T * C_OUT], all[B * T * C];
    for (int i = 0; i < 3; i++) {
        set_up_random(B, T, C, C_OUT);
        memcpy(all, x, sizeof all);
        run(modules[i]);
        memcpy(together, out, sizeof together);
        s.batch = 1;
        for (int b = 0; b < B; b++) {
            memcpy(x, all + b * T * C, T * C * sizeof *x);
            run(modules[i]);
            for (int n = 0; n < T * C_OUT; n++)
                cr_expect(fabsf(out[n] - together[b * T * C_OUT + n]) <= 1e-6f, "%s, entry %d, element %d",
                          names[i], b, n);
        }
    }
}

Test(shapes, nan_is_not_hidden)
{
    for (int i = 0; i < 3; i++) {
        set_up_random(1, 5, 3, 2);
        x[4] = NAN; /* token 2 */
        run(modules[i]);
        for (int n = 2; n < 10; n++)
            cr_expect(isnan(out[n]), "%s: element %d is %g", names[i], n, (double)out[n]);
    }
}

/* ---- Gradients ---- */

static float dout[ROOM], dx[ROOM], dw[3][ROOM], dqueries[ROOM], dkeys[ROOM], dvalues[ROOM], dscores[ROOM];
static RandomStream dropout_stream;

/* Forward with the same dropout each time. */
static void run_again(Module *module)
{
    if (s.dropout > 0) {
        seed_stream(&dropout_stream, STREAM_CPU, 9);
        s.dropout_stream = &dropout_stream;
    }
    run(module);
}

static void run_backward(void)
{
    memset(dx, 0xff, sizeof dx); /* NaN */
    causal_attention_backward(dx, dw[0], dw[1], dw[2], dqueries, dkeys, dvalues, dscores, dout, weights,
                              softmax, queries, keys, values, x, w[0], w[1], w[2], &s);
}

static void draw_dout(int n)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 8);
    draw_randn(&stream, dout, n);
}

/* The loss is the sum of dout * out. Its slope along each number of `tensor`, from four points beside it (an
 * error of h^4), must be the gradient's. */
static void expect_slope(int module, const char *name, int out_size, float *tensor, const float *gradient,
                         int n)
{
    const float h = 0x1p-4f, steps[4] = {h, -h, 2 * h, -2 * h};
    for (int i = 0; i < n; i++) {
        float before = tensor[i];
        double loss[4] = {0};
        for (int j = 0; j < 4; j++) {
            tensor[i] = before + steps[j];
            run_again(modules[module]);
            for (int o = 0; o < out_size; o++)
                loss[j] += (double)dout[o] * out[o];
        }
        tensor[i] = before;
        double slope = (8 * (loss[0] - loss[1]) - (loss[2] - loss[3])) / (12 * h);
        cr_expect(fabs(gradient[i] - slope) <= 2e-4, "%s, %s, element %d: %g, by differences %g",
                  names[module], name, i, (double)gradient[i], slope);
    }
}

/* renormalise too, whose own two divisions are taken here. The fourth is causal with dropout. */
Test(gradient, of_all_three_is_their_slope)
{
    enum { B = 2, T = 7, C = 5, C_OUT = 3 };
    for (int i = 0; i < 4; i++) {
        int module = i < 3 ? i : 2;
        set_up_random(B, T, C, C_OUT);
        draw_dout(B * T * C_OUT);
        s.dropout = i < 3 ? 0 : 0.4f;
        run_again(modules[module]);
        run_backward();
        expect_slope(module, "dx", B * T * C_OUT, x, dx, B * T * C);
        for (int m = 0; m < 3; m++)
            expect_slope(module, "dw", B * T * C_OUT, w[m], dw[m], C * C_OUT);
    }
}

/* out.sum().backward() of PyTorch's autograd, on the sentence: for the first two by its own way through the
 * division, for CausalAttention with its seed. */
Test(gradient, is_pytorchs)
{
    for (int i = 0; i < 18; i++)
        dout[i] = 1;
    for (int i = 0; i < 2; i++) {
        set_up_sentence(1, 789);
        run(modules[i]);
        run_backward();
        expect_near(dw[0], (double[]){.0072129, .0162444, .0102294, .0207938, .0283172, .0176843}, 6, 2e-6);
        expect_near(dw[1], (double[]){.0356878, -.0172045, -.0322611, -.0182052, .0089088, .0166273}, 6,
                    2e-6);
        expect_near(dw[2], (double[]){2.8180780, 2.9134269, 4.1336875, 2.8180780, 2.9134269, 4.1336875}, 6,
                    2e-6);
    }
    set_up_sentence(1, 123);
    run(causal);
    run_backward();
    expect_near(dw[0], (double[]){.0626881, .0959587, .0661744, .0305682, .0455934, .0322795}, 6, 2e-6);
    expect_near(dw[1], (double[]){.0155005, .0714656, -.0203111, .0033547, .0112174, -.0027596}, 6, 2e-6);
    expect_near(dw[2], (double[]){2.8251438, 3.0571668, 4.0758495, 2.8251438, 3.0571668, 4.0758495}, 6, 2e-6);
    expect_near(dx,
                (double[]){-1.4167199, -1.8568645, .4321268, -.9294557, -1.2218056, .2221425, -.6019210,
                           -.7933598, .1488359, -.3674664, -.4793774, .0989131, -.2195651, -.2866884,
                           .0562782, -.1048196, -.1345266, .0246941},
                18, 2e-6);
}

/* Back through both divisions of a row, one after the other: what README's page says comes of it. */
Test(gradient, two_divisions_come_to_one)
{
    enum { N = 9, ALLOWED = 5 };
    RandomStream stream;
    float row[N], once[N], twice[N];
    seed_stream(&stream, STREAM_CPU, 3);
    draw_randn(&stream, row, N);
    draw_randn(&stream, once, N);
    memcpy(twice, once, sizeof twice);
    softmax_row(row, N);

    double p[N], w_i[N], d[N], sum = 0, delta = 0, delta_p = 0;
    for (int i = 0; i < N; i++)
        p[i] = row[i];
    for (int i = 0; i < ALLOWED; i++)
        sum += p[i];
    for (int i = 0; i < N; i++)
        w_i[i] = i < ALLOWED ? p[i] / sum : 0;
    for (int i = 0; i < N; i++)
        delta += w_i[i] * once[i];
    for (int i = 0; i < N; i++) /* the second division: w = p / sum */
        d[i] = i < ALLOWED ? (once[i] - delta) / sum : 0;
    for (int i = 0; i < N; i++)
        delta_p += p[i] * d[i];
    cr_expect(fabs(delta_p) <= 1e-12, "nothing is left for the first division to take away: %g", delta_p);
    for (int i = 0; i < N; i++) /* the first: the softmax over all N */
        d[i] = p[i] * (d[i] - delta_p);

    renormalise_row(row, N, ALLOWED);
    softmax_row_backward(twice, row, N);
    expect_near(twice, d, N, 1e-6);
}

/* A loss at token t alone: no token after it has a gradient, not one bit. */
Test(trap, the_future_does_not_leak_backward)
{
    enum { B = 2, T = 37, C = 5, C_OUT = 4, SEEN = 20 };
    for (int i = 0; i < 3; i++) {
        set_up_random(B, T, C, C_OUT);
        memset(dout, 0, sizeof dout);
        dout[(SEEN - 1) * C_OUT] = dout[(T + SEEN - 1) * C_OUT + 1] = 1;
        run(modules[i]);
        run_backward();
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++)
                for (int c = 0; c < C; c++) {
                    float gradient = dx[(b * T + t) * C + c];
                    cr_expect((gradient != 0) == (t < SEEN), "%s, token %d: %g", names[i], t,
                              (double)gradient);
                }
    }
}

/* The mean that the softmax takes away is over the weights before dropout; and a dropped weight, though its
 * own gradient is 0, has its score pushed by it. */
Test(trap, softmax_is_gone_through_with_the_weights_before_dropout)
{
    float p[3] = {0.5f, 0.25f, 0.25f}, dropped[3] = {1, 0, 0.5f}, right[3] = {1, 8, -4}, wrong[3];
    dropout_row_backward(right, dropped, 3, 0.5f);
    expect_near(right, (double[]){2, 0, -8}, 3, 0);
    memcpy(wrong, right, sizeof wrong);
    softmax_row_backward(right, p, 3);
    expect_near(right, (double[]){1.5, 0.25, -1.75}, 3, 0); /* delta = 0.5 * 2 + 0.25 * -8 = -1 */
    softmax_row_backward(wrong, dropped, 3);
    cr_expect(wrong[1] == 0 && fabsf(wrong[0] - right[0]) > 1, "%g %g", (double)wrong[0], (double)wrong[1]);
}

/* See trap/renormalise_loses_a_row_to_a_large_hidden_score. */
Test(trap, a_lost_row_has_no_gradient)
{
    set_up_shape(1, 2, 1, 1);
    x[0] = 1, x[1] = 200;
    w[0][0] = w[1][0] = w[2][0] = dout[0] = dout[1] = 1;
    for (int i = 0; i < 3; i++) {
        run(modules[i]);
        run_backward();
        cr_expect(isnan(dx[0]) == (i == 0), "%s: %g", names[i], (double)dx[0]);
        for (int m = 0; m < 3; m++)
            cr_expect(isnan(dw[m][0]) == (i == 0), "%s: %g", names[i], (double)dw[m][0]);
    }
}

Test(gradient, of_a_batch_is_the_sum_over_its_entries)
{
    enum { B = 3, T = 11, C = 6, C_OUT = 5 };
    float together[3][C * C_OUT], all[B * T * C], all_dout[B * T * C_OUT];
    double sum[3][C * C_OUT] = {0};
    set_up_random(B, T, C, C_OUT);
    draw_dout(B * T * C_OUT);
    memcpy(all, x, sizeof all);
    memcpy(all_dout, dout, sizeof all_dout);
    run(causal);
    run_backward();
    for (int m = 0; m < 3; m++)
        memcpy(together[m], dw[m], sizeof together[m]);
    s.batch = 1;
    for (int b = 0; b < B; b++) {
        memcpy(x, all + b * T * C, T * C * sizeof *x);
        memcpy(dout, all_dout + b * T * C_OUT, T * C_OUT * sizeof *dout);
        run(causal);
        run_backward();
        for (int m = 0; m < 3; m++)
            for (int n = 0; n < C * C_OUT; n++)
                sum[m][n] += dw[m][n];
    }
    for (int m = 0; m < 3; m++)
        expect_near(together[m], sum[m], C * C_OUT, 1e-5);
}

Test(gradient, nan_is_not_hidden)
{
    for (int i = 0; i < 3; i++) {
        set_up_random(2, 5, 3, 2);
        draw_dout(20);
        dout[4] = NAN; /* of the first entry's token 2, counted from 0 */
        run(modules[i]);
        run_backward();
        for (int n = 0; n < 9; n++) /* it has seen tokens 0 to 2 */
            cr_expect(isnan(dx[n]), "%s: dx element %d is %g", names[i], n, (double)dx[n]);
        for (int n = 15; n < 30; n++)
            cr_expect(!isnan(dx[n]), "%s: dx element %d, of the other entry, is %g", names[i], n,
                      (double)dx[n]);
        for (int m = 0; m < 3; m++)
            cr_expect(isnan(dw[m][0]), "%s: dw is %g", names[i], (double)dw[m][0]);
    }
}

Test(gradient, has_the_same_bits_for_any_number_of_threads)
{
    enum { B = 2, T = 90, C = 40, C_OUT = 33 };
    float first_dx[B * T * C], first_dw[3][C * C_OUT];
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        set_up_random(B, T, C, C_OUT);
        draw_dout(B * T * C_OUT);
        s.dropout = 0.3f;
        run_again(causal);
        run_backward();
        if (threads == 1) {
            memcpy(first_dx, dx, sizeof first_dx);
            for (int m = 0; m < 3; m++)
                memcpy(first_dw[m], dw[m], sizeof first_dw[m]);
        }
        cr_expect(memcmp(first_dx, dx, sizeof first_dx) == 0, "dx with %d threads", threads);
        for (int m = 0; m < 3; m++)
            cr_expect(memcmp(first_dw[m], dw[m], sizeof first_dw[m]) == 0, "dw with %d threads", threads);
    }
}
