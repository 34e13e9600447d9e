/* Chapter 1: the published numbers, straight from the functions, and each trap that the README tells. */
#include "chapter.h"
#include "random.h"
#include "self_attention.h"

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
    attention_sdpa(out, NULL, weights, queries, keys, values, &s);
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
        attention_sdpa(out, NULL, weights, queries, keys, values, &s);
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
