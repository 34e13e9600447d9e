/* Chapter 1: the published numbers, straight from the functions, and each trap that the README tells. */
#include "chapter.h"
#include "random.h"
#include "self_attention.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void expect_near(const float *ours, const double *expected, int n, double tolerance)
{
    for (int i = 0; i < n; i++) {
        double difference = fabs((double)ours[i] - expected[i]);
        cr_expect(difference <= tolerance, "element %d: %g, expected %g", i, (double)ours[i], expected[i]);
    }
}

static AttentionShape one_head(int batch, int tokens, int embed, int embed_out)
{
    return (AttentionShape){.batch = batch,
                            .tokens = tokens,
                            .key_tokens = tokens,
                            .heads = 1,
                            .kv_heads = 1,
                            .head_size = embed_out,
                            .embed = embed,
                            .embed_out = embed_out,
                            .scale = 1 / sqrtf((float)embed_out)};
}

/* Room for every tensor of the tests below, which are small. */
enum { ROOM = 100000 };
static float x[ROOM], w[3][ROOM], turned[3][ROOM], queries[ROOM], keys[ROOM], values[ROOM], weights[ROOM],
    out[ROOM], out2[ROOM];

static void draw(float *tensor, size_t n, uint64_t seed)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, seed);
    draw_randn(&stream, tensor, n);
}

static void transpose(float *columns_first, const float *rows_first, int rows, int columns)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            columns_first[c * rows + r] = rows_first[r * columns + c];
}

/* ---- The published numbers ---- */

Test(published, token_2_without_weights)
{
    float row[6], context[3];
    score_keys(row, sentence[1], sentence[0], 6, 3, 1);
    expect_near(row, (double[]){0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865}, 6, 1e-4);
    softmax_row(row, 6);
    expect_near(row, (double[]){0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581}, 6, 1e-4);
    mix_values(context, row, sentence[0], 6, 3);
    expect_near(context, (double[]){0.4419, 0.6515, 0.5683}, 3, 1e-4);
}

Test(published, all_tokens_without_weights)
{
    AttentionShape s = one_head(1, 6, 3, 3);
    s.scale = 1;
    attention_dot_product(out, weights, sentence[0], &s);
    expect_near(out,
                (double[]){.4421, .5931, .5790, .4419, .6515, .5683, .4431, .6496, .5671, .4304, .6298, .5510,
                           .4671, .5910, .5266, .4177, .6503, .5645},
                18, 1e-4);
}

Test(published, v1_seed_123)
{
    AttentionShape s = one_head(1, 6, 3, 2);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    for (int i = 0; i < 3; i++)
        draw_rand(&stream, w[i], 6);
    self_attention_v1(out, weights, queries, keys, values, sentence[0], w[0], w[1], w[2], &s);
    expect_near(queries + 2, (double[]){.4306, 1.4551}, 2, 1e-4);
    expect_near(weights + 6, (double[]){.1500, .2264, .2199, .1311, .0906, .1820}, 6, 1e-4);
    expect_near(
        out, (double[]){.2996, .8053, .3061, .8210, .3058, .8203, .2948, .7939, .2927, .7891, .2990, .8040},
        12, 1e-4);
}

static void v2_of_seed_789(void)
{
    AttentionShape s = one_head(1, 6, 3, 2);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 789);
    for (int i = 0; i < 3; i++)
        draw_uniform(&stream, w[i], 6, -linear_bound(3), linear_bound(3));
    self_attention_v2(out, weights, queries, keys, values, sentence[0], w[0], w[1], w[2], &s);
}

Test(published, v2_seed_789)
{
    v2_of_seed_789();
    expect_near(
        out,
        (double[]){-.0739, .0713, -.0748, .0703, -.0749, .0702, -.0760, .0685, -.0763, .0679, -.0754, .0693},
        12, 1e-4);
}

static const double sdpa_seed_42[48] = {
    -1.3321, -.3489, .3015,  -.3912, .9867,   .3137, -.0691, -1.2593, -1.0882, .2506,  .6491,  .1360,
    .5238,   -.2448, -.0820, -.6171, -1.0012, .3990, .6441,  -.0277,  .5325,   -.2564, -.0607, -.6404,
    .6091,   .0708,  .6188,  .3252,  -.1598,  .4197, -.2335, .0630,   .5285,   .3890,  -.2649, .3706,
    -.3839,  .1963,  -.6242, .2312,  .4048,   .0762, .3777,  .4689,   -.2978,  .2754,  -.6429, .1037};

static void sdpa_of_seed_42(StreamKind kind)
{
    AttentionShape s = one_head(2, 3, 0, 8);
    RandomStream stream;
    seed_stream(&stream, kind, 42);
    draw_randn(&stream, queries, 48);
    draw_randn(&stream, keys, 48);
    draw_randn(&stream, values, 48);
    attention_sdpa(out, NULL, weights, NULL, queries, keys, values, &s);
}

Test(published, sdpa_seed_42_on_a_gpu)
{
    sdpa_of_seed_42(STREAM_CUDA);
    expect_near(out, sdpa_seed_42, 48, 1e-4);
}

/* ---- The traps ---- */

Test(trap, the_same_seed_is_another_stream_on_a_gpu)
{
    sdpa_of_seed_42(STREAM_CPU);
    int far = 0;
    for (int i = 0; i < 48; i++)
        far += fabs((double)out[i] - sdpa_seed_42[i]) > 0.01;
    cr_expect(far > 40, "only %d of 48 numbers differ", far);
}

Test(trap, linear_keeps_its_matrix_transposed)
{
    v2_of_seed_789();
    AttentionShape s = one_head(1, 6, 3, 2);
    for (int i = 0; i < 3; i++)
        transpose(turned[i], w[i], 2, 3);
    self_attention_v1(out2, weights, queries, keys, values, sentence[0], turned[0], turned[1], turned[2], &s);
    for (int i = 0; i < 12; i++)
        cr_expect(fabsf(out[i] - out2[i]) <= 1e-6f, "element %d: %g and %g", i, (double)out[i],
                  (double)out2[i]);
}

/* With a square matrix nothing looks wrong but the numbers: sizes catch the mistake only where C != C_out. */
Test(trap, a_square_matrix_hides_a_missing_transpose)
{
    AttentionShape s = one_head(2, 5, 4, 4);
    draw(x, 40, 1);
    for (int i = 0; i < 3; i++)
        draw(w[i], 16, 2 + i);
    self_attention_v1(out, weights, queries, keys, values, x, w[0], w[1], w[2], &s);
    self_attention_v2(out2, weights, queries, keys, values, x, w[0], w[1], w[2], &s);
    double largest = 0;
    for (int i = 0; i < 40; i++)
        largest = fmax(largest, fabs((double)out[i] - out2[i]));
    cr_expect(largest > 0.1, "x @ W and x @ W^T differ by %g only", largest);
}

Test(trap, softmax_of_large_scores_does_not_overflow)
{
    float row[3] = {1000, 999, -1000};
    float lse = softmax_row(row, 3);
    expect_near(row, (double[]){0.731058579, 0.268941421, 0}, 3, 1e-6);
    cr_expect(fabsf(lse - 1000.3133f) <= 1e-3f, "lse %g", (double)lse);
    cr_expect(isinf(expf(1000)), "what it would be without subtracting the largest");
}

Test(trap, unscaled_scores_of_wide_vectors_saturate)
{
    enum { T = 64, HS = 1024 };
    AttentionShape s = one_head(1, T, 0, HS);
    draw(queries, T * HS, 1);
    draw(keys, T * HS, 2);
    draw(values, T * HS, 3);
    double mean[2] = {0, 0};
    for (int scaled = 0; scaled < 2; scaled++) {
        s.scale = scaled ? 1 / sqrtf(HS) : 1;
        attention_sdpa(out, NULL, weights, NULL, queries, keys, values, &s);
        for (int t = 0; t < T; t++) {
            float largest = 0;
            for (int t2 = 0; t2 < T; t2++)
                largest = fmaxf(largest, weights[t * T + t2]);
            mean[scaled] += largest / T;
        }
    }
    cr_expect(mean[0] > 0.9, "unscaled: the largest weight is %g on average", mean[0]);
    cr_expect(mean[1] < 0.2, "scaled: the largest weight is %g on average", mean[1]);
}

/* A token's product with itself is near C, with any other near 0: unscaled, every token hears itself alone.
 */
Test(trap, dot_product_of_wide_tokens_returns_the_tokens)
{
    AttentionShape s = one_head(1, 20, 768, 768);
    s.scale = 1;
    draw(x, 20 * 768, 1);
    attention_dot_product(out, weights, x, &s);
    cr_expect(memcmp(out, x, 20 * 768 * sizeof *x) == 0);
}

/* Attention sees a set: turn the sentence round and the same vectors come out, turned round. */
Test(trap, attention_knows_no_order)
{
    AttentionShape s = one_head(1, 6, 3, 3);
    float reversed[18];
    for (int t = 0; t < 6; t++)
        memcpy(reversed + 3 * t, sentence[5 - t], sizeof sentence[0]);
    attention_dot_product(out, weights, sentence[0], &s);
    attention_dot_product(out2, weights, reversed, &s);
    for (int t = 0; t < 6; t++)
        for (int c = 0; c < 3; c++)
            cr_expect(fabsf(out[3 * t + c] - out2[3 * (5 - t) + c]) <= 1e-6f, "token %d", t);
}

/* ---- Softmax at its edges ---- */

Test(softmax, a_row_with_nothing_allowed_is_zero)
{
    float row[20];
    for (int i = 0; i < 20; i++)
        row[i] = -INFINITY;
    float lse = softmax_row(row, 20);
    for (int i = 0; i < 20; i++)
        cr_expect(row[i] == 0, "element %d is %g", i, (double)row[i]);
    cr_expect(lse == -INFINITY, "lse %g", (double)lse);
}

Test(softmax, nan_is_not_hidden)
{
    for (int length = 1; length <= 40; length++)
        for (int bad = 0; bad < length; bad++) {
            float row[40];
            for (int i = 0; i < length; i++)
                row[i] = i % 2 ? 1 : -INFINITY;
            row[bad] = NAN;
            float lse = softmax_row(row, length);
            for (int i = 0; i < length; i++)
                cr_expect(isnan(row[i]), "NaN at %d of %d: element %d is %g", bad, length, i, (double)row[i]);
            cr_expect(isnan(lse));
        }
}

Test(softmax, sums_to_one_and_returns_the_lse)
{
    for (int length = 1; length < 200; length++) {
        double sum = 0, expected = 0;
        draw(x, length, 5);
        for (int i = 0; i < length; i++)
            expected += exp((double)x[i]);
        float lse = softmax_row(x, length);
        for (int i = 0; i < length; i++)
            sum += x[i];
        cr_expect(fabs(sum - 1) <= 1e-6, "length %d: sum %.9f", length, sum);
        cr_expect(fabs(lse - log(expected)) <= 1e-5, "length %d: lse %g", length, (double)lse);
    }
}

/* ---- One token; widths that differ ---- */

Test(shapes, one_token_hears_itself_alone)
{
    AttentionShape s = one_head(3, 1, 5, 7);
    draw(x, 15, 1);
    for (int i = 0; i < 3; i++)
        draw(w[i], 35, 2 + i);
    self_attention_v1(out, weights, queries, keys, values, x, w[0], w[1], w[2], &s);
    for (int b = 0; b < 3; b++)
        cr_expect(weights[b] == 1, "weight %g", (double)weights[b]);
    cr_expect(memcmp(out, values, 21 * sizeof *out) == 0, "the token's value comes out as it is");
}

/* v1 with W, C to C_out, is v2 with W^T, for every pair of widths. */
Test(shapes, v1_and_v2_agree_for_all_widths)
{
    const int widths[] = {1, 2, 3, 16, 33};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++) {
            int C = widths[i], C_out = widths[j];
            AttentionShape s = one_head(2, 9, C, C_out);
            draw(x, 18 * C, 1);
            for (int m = 0; m < 3; m++) {
                draw(w[m], C * C_out, 2 + m);
                transpose(turned[m], w[m], C, C_out);
            }
            self_attention_v1(out, weights, queries, keys, values, x, w[0], w[1], w[2], &s);
            self_attention_v2(out2, weights, queries, keys, values, x, turned[0], turned[1], turned[2], &s);
            for (int n = 0; n < 18 * C_out; n++)
                cr_expect(fabsf(out[n] - out2[n]) <= 1e-4f, "%d to %d, element %d: %g and %g", C, C_out, n,
                          (double)out[n], (double)out2[n]);
        }
}

/* Plain loops and products: with the identity for all three matrices v1 is dot-product, batches and scale
 * included. */
Test(shapes, dot_product_is_v1_with_identities)
{
    enum { B = 3, T = 21, C = 4 };
    AttentionShape s = one_head(B, T, C, C);
    draw(x, B * T * C, 1);
    memset(w[0], 0, C * C * sizeof w[0][0]);
    for (int c = 0; c < C; c++)
        w[0][c * C + c] = 1;
    self_attention_v1(out, weights, queries, keys, values, x, w[0], w[0], w[0], &s);
    attention_dot_product(out2, weights, x, &s);
    for (int n = 0; n < B * T * C; n++)
        cr_expect(fabsf(out[n] - out2[n]) <= 1e-5f, "element %d: %g and %g", n, (double)out[n],
                  (double)out2[n]);
}

/* ---- Gradients ---- */

static float dout[ROOM], dx[ROOM], dw[3][ROOM], dqueries[ROOM], dkeys[ROOM], dvalues[ROOM], dscores[ROOM],
    softmax[ROOM], bias[ROOM], dbias[ROOM];
static AttentionShape shape; /* of the functions below */
static RandomStream dropout_stream;

static void forward_dot_product(void)
{
    attention_dot_product(out, weights, x, &shape);
}

static void forward_v1(void)
{
    self_attention_v1(out, weights, queries, keys, values, x, w[0], w[1], w[2], &shape);
}

static void forward_v2(void)
{
    self_attention_v2(out, weights, queries, keys, values, x, w[0], w[1], w[2], &shape);
}

/* With the same dropout each time. */
static void forward_sdpa(void)
{
    seed_stream(&dropout_stream, STREAM_CPU, 9);
    attention_sdpa(out, NULL, weights, softmax, queries, keys, values, &shape);
}

static void backward_v1(void)
{
    memset(dx, 0xff, sizeof dx); /* NaN */
    self_attention_v1_backward(dx, dw[0], dw[1], dw[2], dqueries, dkeys, dvalues, dscores, dout, weights,
                               queries, keys, values, x, w[0], w[1], w[2], &shape);
}

static void backward_v2(void)
{
    memset(dx, 0xff, sizeof dx); /* NaN */
    self_attention_v2_backward(dx, dw[0], dw[1], dw[2], dqueries, dkeys, dvalues, dscores, dout, weights,
                               queries, keys, values, x, w[0], w[1], w[2], &shape);
}

static void backward_sdpa(void)
{
    attention_sdpa_backward(dqueries, dkeys, dvalues, shape.bias ? dbias : NULL, dscores, dout, weights,
                            softmax, queries, keys, values, &shape);
}

/* The loss is the sum of dout * out. Its slope along each number of `tensor`, from four points beside it (an
 * error of h^4), must be the gradient's. */
static void expect_slope(const char *name, void (*forward)(void), int out_size, float *tensor,
                         const float *gradient, int n)
{
    const float h = 0x1p-4f, steps[4] = {h, -h, 2 * h, -2 * h};
    for (int i = 0; i < n; i++) {
        float before = tensor[i];
        double loss[4] = {0};
        for (int j = 0; j < 4; j++) {
            tensor[i] = before + steps[j];
            forward();
            for (int o = 0; o < out_size; o++)
                loss[j] += (double)dout[o] * out[o];
        }
        tensor[i] = before;
        double slope = (8 * (loss[0] - loss[1]) - (loss[2] - loss[3])) / (12 * h);
        cr_expect(fabs(gradient[i] - slope) <= 2e-4, "%s, element %d: %g, by differences %g", name, i,
                  (double)gradient[i], slope);
    }
}

static void draw_module(int batch, int tokens, int embed, int embed_out)
{
    shape = one_head(batch, tokens, embed, embed_out);
    draw(x, batch * tokens * embed, 1);
    draw(dout, batch * tokens * embed_out, 2);
    for (int i = 0; i < 3; i++) {
        draw(w[i], embed * embed_out, 3 + i);
        for (int n = 0; n < embed * embed_out; n++)
            w[i][n] /= sqrtf((float)embed);
    }
}

Test(gradient, of_dot_product_is_its_slope)
{
    draw_module(2, 7, 4, 4);
    forward_dot_product();
    attention_dot_product_backward(dx, dscores, dout, weights, x, &shape);
    expect_slope("dx", forward_dot_product, 56, x, dx, 56);
}

Test(gradient, of_v1_is_its_slope)
{
    draw_module(2, 7, 5, 3);
    forward_v1();
    backward_v1();
    expect_slope("dx", forward_v1, 42, x, dx, 70);
    for (int i = 0; i < 3; i++)
        expect_slope("dw", forward_v1, 42, w[i], dw[i], 15);
}

Test(gradient, of_v2_is_its_slope)
{
    draw_module(2, 7, 5, 3);
    forward_v2();
    backward_v2();
    expect_slope("dx", forward_v2, 42, x, dx, 70);
    for (int i = 0; i < 3; i++)
        expect_slope("dw", forward_v2, 42, w[i], dw[i], 15);
}

/* q (2,3,4,5), k and v (2,3,6,5): causal, padded, dropped, with a bias that is shared along the axes of which
 * `axes` has no bit (1: B, 2: NH, 4: T, 8: TK). */
static void draw_sdpa(int axes)
{
    enum { B = 2, NH = 3, T = 4, TK = 6, HS = 5 };
    static const int lengths[B] = {6, 3};
    shape = (AttentionShape){.batch = B,
                             .tokens = T,
                             .key_tokens = TK,
                             .heads = NH,
                             .kv_heads = NH,
                             .head_size = HS,
                             .scale = 0.7f,
                             .causal = true,
                             .lengths = lengths,
                             .bias = bias,
                             .dropout = 0.3f,
                             .dropout_stream = &dropout_stream};
    const int size[4] = {B, NH, T, TK};
    size_t stride = 1;
    for (int axis = 3; axis >= 0; axis--)
        if (axes & 1 << axis) {
            shape.bias_stride[axis] = stride;
            stride *= size[axis];
        }
    draw(queries, B * NH * T * HS, 1);
    draw(keys, B * NH * TK * HS, 2);
    draw(values, B * NH * TK * HS, 3);
    draw(bias, B * NH * T * TK, 4);
    draw(dout, B * NH * T * HS, 5);
    memset(dbias, 0xff, sizeof dbias); /* NaN */
}

Test(gradient, of_sdpa_is_its_slope)
{
    draw_sdpa(15);
    forward_sdpa();
    backward_sdpa();
    expect_slope("dq", forward_sdpa, 120, queries, dqueries, 120);
    expect_slope("dk", forward_sdpa, 120, keys, dkeys, 180);
    expect_slope("dv", forward_sdpa, 120, values, dvalues, 180);
    expect_slope("dbias", forward_sdpa, 120, bias, dbias, 144);
}

Test(gradient, of_a_bias_is_summed_over_what_was_broadcast)
{
    const int size[4] = {2, 3, 4, 6};
    for (int axes = 0; axes < 16; axes++) {
        draw_sdpa(axes);
        forward_sdpa();
        backward_sdpa();
        int elements = 1;
        for (int axis = 0; axis < 4; axis++)
            elements *= axes & 1 << axis ? size[axis] : 1;
        expect_slope("dbias", forward_sdpa, 120, bias, dbias, elements);
        cr_expect(isnan(dbias[elements]), "the bias has %d elements", elements);
    }
}

static void read_sentence(void (*draw_parameter)(RandomStream *, float *, size_t), uint64_t seed,
                          int embed_out)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, seed);
    shape = one_head(1, 6, 3, embed_out);
    memcpy(x, sentence, sizeof sentence);
    for (int i = 0; i < 3; i++)
        draw_parameter(&stream, w[i], 6);
    for (int i = 0; i < 18; i++)
        dout[i] = 1;
}

static void draw_linear(RandomStream *stream, float *weight, size_t n)
{
    draw_uniform(stream, weight, n, -linear_bound(3), linear_bound(3));
}

/* out.sum().backward() of PyTorch's autograd, on the sentence. */
Test(gradient, of_dot_product_is_pytorchs)
{
    read_sentence(draw_rand, 123, 3);
    shape.scale = 1;
    forward_dot_product();
    attention_dot_product_backward(dx, dscores, dout, weights, x, &shape);
    expect_near(dx,
                (double[]){.8878055, .9148115, .8881631, 1.5842100, 1.7166116, 1.6562229, 1.5519136,
                           1.6776488, 1.6198046, .6628287, .6357628, .6449630, .5955805, .6293480, .6324276,
                           .9019123, .8828865, .8809959},
                18, 2e-6);
}

Test(gradient, of_v1_is_pytorchs)
{
    read_sentence(draw_rand, 123, 2);
    forward_v1();
    backward_v1();
    expect_near(dw[0], (double[]){.0481464, .1384263, .0643002, .1845130, .0582205, .1670377}, 6, 2e-6);
    expect_near(dw[1], (double[]){.0029485, .0111496, .0757113, .2607281, .0647352, .2223057}, 6, 2e-6);
    expect_near(dw[2], (double[]){2.5389733, 2.5389733, 3.8045738, 3.8045738, 3.3912673, 3.3912673}, 6, 2e-6);
}

Test(gradient, of_v2_is_pytorchs)
{
    read_sentence(draw_linear, 789, 2);
    forward_v2();
    backward_v2();
    expect_near(dw[0], (double[]){.0531672, .0713544, .0648202, .0741572, .0998542, .0909605}, 6, 2e-6);
    expect_near(dw[1], (double[]){.1465164, -.1053103, -.1115718, -.0691991, .0497172, .0526351}, 6, 2e-6);
    expect_near(dw[2], (double[]){2.6388035, 3.4082525, 3.2399576, 2.6388035, 3.4082525, 3.2399576}, 6, 2e-6);
    expect_near(dx,
                (double[]){.8901458, -.2536139, -.4721952, .7657863, -.2210064, -.3985861, .7711119,
                           -.2259775, -.3928937, .7033707, -.1962095, -.3807412, .8494685, -.3110403,
                           -.2790078, .6602101, -.1537978, -.4323201},
                18, 2e-6);
}

/* x is query, key and value at once: what dot-product's loops find must be the sum of sdpa's three gradients.
 */
Test(trap, the_gradient_of_x_is_a_sum_of_three)
{
    enum { N = 3 * 20 * 6 };
    draw_module(3, 20, 6, 6);
    forward_dot_product();
    attention_dot_product_backward(dx, dscores, dout, weights, x, &shape);
    attention_sdpa(out, NULL, weights, NULL, x, x, x, &shape);
    attention_sdpa_backward(dqueries, dkeys, dvalues, NULL, dscores, dout, weights, NULL, x, x, x, &shape);
    for (int i = 0; i < N; i++) {
        float sum = dqueries[i] + dkeys[i] + dvalues[i];
        cr_expect(fabsf(dx[i] - sum) <= 1e-5f, "element %d: %g and %g", i, (double)dx[i], (double)sum);
    }
}

/* Adding the same number to all scores of a row changes no weight, so a row's gradients sum to 0. */
Test(trap, the_gradients_of_a_rows_scores_sum_to_zero)
{
    for (int length = 1; length < 100; length++) {
        float row[100];
        double sum = 0;
        draw(x, length, 5);
        draw(row, length, 6);
        softmax_row(x, length);
        softmax_row_backward(row, x, length);
        for (int i = 0; i < length; i++)
            sum += row[i];
        cr_expect(fabs(sum) <= 1e-6, "length %d: sum %g", length, sum);
    }
}

Test(trap, saturated_scores_learn_nothing)
{
    enum { T = 64, HS = 1024 };
    double size[2] = {0, 0};
    shape = one_head(1, T, 0, HS);
    draw(queries, T * HS, 1);
    draw(keys, T * HS, 2);
    draw(values, T * HS, 3);
    draw(dout, T * HS, 4);
    for (int scaled = 0; scaled < 2; scaled++) {
        shape.scale = scaled ? 1 / sqrtf(HS) : 1;
        forward_sdpa();
        backward_sdpa();
        for (int i = 0; i < T * T; i++)
            size[scaled] += fabs((double)dscores[i]) / T;
    }
    cr_expect(size[0] < 0.15 * size[1], "gradients of a row's scores: %g unscaled, %g scaled", size[0],
              size[1]);
}

Test(gradient, of_a_row_with_nothing_allowed_is_zero)
{
    enum { B = 2, T = 5, TK = 3, HS = 4 };
    static const int lengths[B] = {3, 0};
    shape = (AttentionShape){.batch = B,
                             .tokens = T,
                             .key_tokens = TK,
                             .heads = 1,
                             .kv_heads = 1,
                             .head_size = HS,
                             .scale = 0.5f,
                             .causal = true,
                             .lengths = lengths};
    draw(queries, B * T * HS, 1);
    draw(keys, B * TK * HS, 2);
    draw(values, B * TK * HS, 3);
    draw(dout, B * T * HS, 4);
    forward_sdpa();
    backward_sdpa();
    for (int i = 0; i < B * T * HS;
         i++) /* the first two queries of five stand before the first key of three */
        cr_expect((dqueries[i] != 0) == (i >= 3 * HS && i < T * HS), "dq element %d: %g", i,
                  (double)dqueries[i]);
    for (int i = 0; i < B * TK * HS; i++)
        cr_expect((dvalues[i] != 0) == (i < TK * HS), "dv element %d: %g", i, (double)dvalues[i]);
    for (int i = TK * HS; i < B * TK * HS; i++)
        cr_expect(dkeys[i] == 0, "dk element %d: %g", i, (double)dkeys[i]);
}

Test(gradient, nan_is_not_hidden)
{
    draw_module(2, 9, 5, 3);
    dout[4] = NAN; /* of the first entry's second token */
    forward_v2();
    backward_v2();
    for (int i = 0; i < 90; i++)
        cr_expect(isnan(dx[i]) == (i < 45), "dx element %d: %g", i, (double)dx[i]);
    for (int i = 0; i < 15; i++)
        cr_expect(isnan(dw[0][i]) && isnan(dw[1][i]), "element %d", i);
}

Test(gradient, has_the_same_bits_for_any_number_of_threads)
{
    enum { B = 1, T = 300, C = 40, C_OUT = 33 };
    static float first_dx[B * T * C], first_dw[3][C * C_OUT], first_dbias[ROOM];
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        draw_module(B, T, C, C_OUT);
        forward_v2();
        backward_v2();
        if (threads == 1) {
            memcpy(first_dx, dx, sizeof first_dx);
            for (int i = 0; i < 3; i++)
                memcpy(first_dw[i], dw[i], sizeof first_dw[i]);
        }
        cr_expect(memcmp(first_dx, dx, sizeof first_dx) == 0, "dx with %d threads", threads);
        for (int i = 0; i < 3; i++)
            cr_expect(memcmp(first_dw[i], dw[i], sizeof first_dw[i]) == 0, "dw with %d threads", threads);
        draw_sdpa(12);
        forward_sdpa();
        backward_sdpa();
        if (threads == 1)
            memcpy(first_dbias, dbias, sizeof dbias);
        cr_expect(memcmp(first_dbias, dbias, 24 * sizeof *dbias) == 0, "dbias with %d threads", threads);
    }
}
