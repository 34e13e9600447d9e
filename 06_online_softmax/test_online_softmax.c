/* What is particular to one pass over the keys: mending, merging, and the traps of softmax. */
#include "chapter.h"
#include "matmul.h"
#include "online_softmax.h"
#include "random.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- A problem small enough for arrays. ---- */

enum { MOST_TOKENS = 160, MOST_HEADS = 2, MOST_WIDTH = 24, MOST = MOST_HEADS * MOST_TOKENS * MOST_WIDTH };

static AttentionShape shape;
static float q[MOST], k[MOST], v[MOST], bias[MOST_TOKENS];
static float out[MOST], lse[MOST_HEADS * MOST_TOKENS], delta[MOST_HEADS * MOST_TOKENS];
static float weights[MOST_HEADS * MOST_TOKENS * MOST_TOKENS], softmax[MOST_HEADS * MOST_TOKENS * MOST_TOKENS],
    d_scores[MOST_HEADS * MOST_TOKENS * MOST_TOKENS];
static float dout[MOST], dq[MOST], dk[MOST], dv[MOST], dbias[MOST_HEADS * MOST_TOKENS * MOST_TOKENS];

extern const Chapter chapter;

static void set_up(int heads, int tokens, int key_tokens, int head_size)
{
    shape = (AttentionShape){.batch = 1,
                             .heads = heads,
                             .kv_heads = heads,
                             .tokens = tokens,
                             .key_tokens = key_tokens,
                             .head_size = head_size,
                             .scale = 1 / sqrtf(head_size)};
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, q, query_count(&shape));
    draw_randn(&stream, k, key_count(&shape));
    draw_randn(&stream, v, key_count(&shape));
    draw_randn(&stream, dout, query_count(&shape));
}

/* One query of one number, q = 1, scale = 1: a key is its own score. */
static void set_up_scores(const float *scores, const float *values, int n)
{
    set_up(1, 1, n, 1);
    shape.scale = 1;
    q[0] = 1;
    memcpy(k, scores, n * sizeof *k);
    memcpy(v, values, n * sizeof *v);
}

enum { MATERIALISED, ONLINE, KERNELS };
static const char *const names[KERNELS] = {"materialised", "online"};

static void attend(int kernel)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 7);
    shape.dropout_stream = &stream;
    shape.dropout_seed = 7;
    memset(out, 0x7f, sizeof out);
    memset(lse, 0x7f, sizeof lse);
    memset(weights, 0x7f, sizeof weights);
    if (kernel == MATERIALISED)
        attention_materialised(out, lse, weights, softmax, q, k, v, &shape);
    else
        attention_online(out, lse, q, k, v, &shape);
}

/* Forward and backward. */
static void differentiate(int kernel)
{
    attend(kernel);
    memset(dq, 0x7f, sizeof dq);
    memset(dk, 0x7f, sizeof dk);
    memset(dv, 0x7f, sizeof dv);
    memset(dbias, 0x7f, sizeof dbias);
    memset(d_scores, 0x7f, sizeof d_scores);
    const AttentionBackward g = {q, k, v, out, lse, dout, dq, dk, dv, dbias};
    if (kernel == MATERIALISED)
        attention_materialised_backward(&g, weights, shape.dropout > 0 ? softmax : weights, d_scores, &shape);
    else
        attention_online_backward(&g, delta, &shape);
}

#define near(a, b, tolerance) (fabs((double)(a) - (double)(b)) <= (tolerance))

/* ---- Mending ---- */

Test(mending, every_key_is_a_new_maximum)
{
    float scores[50], values[50];
    double sum = 0, mean = 0;
    for (int i = 0; i < 50; i++) {
        scores[i] = 0.3f * i;
        values[i] = i % 7 - 3;
        sum += exp(scores[i]);
        mean += exp(scores[i]) * values[i];
    }
    set_up_scores(scores, values, 50);
    attend(ONLINE);
    cr_expect(near(out[0], mean / sum, 1e-6), "%.7f instead of %.7f", out[0], mean / sum);
    cr_expect(near(lse[0], log(sum), 2e-6), "lse %.7f instead of %.7f", lse[0], log(sum));
}

Test(mending, the_order_of_the_keys_does_not_matter)
{
    const float up[4] = {1, 2, 3, 5}, up_values[4] = {10, 30, 20, 40};
    const float down[4] = {5, 3, 2, 1}, down_values[4] = {40, 20, 30, 10};
    set_up_scores(up, up_values, 4);
    attend(ONLINE);
    float first = out[0];
    set_up_scores(down, down_values, 4);
    attend(ONLINE);
    cr_expect(near(out[0], first, 1e-5), "%.6f and %.6f", out[0], first);
    cr_expect(near(first, 36.880605, 1e-4), "%.6f", first);
}

/* ---- Merging ---- */

enum { HS = 8 };

/* Keys from .. to-1 of row 0, as a partial row. */
static PartialRow part(float *o, int from, int to)
{
    PartialRow row = empty_row(o, HS);
    add_keys(&row, q, k, v, &shape, 0, 0, 0, from, to);
    return row;
}

static bool same_row(const PartialRow *a, const PartialRow *b, double tolerance)
{
    bool same = a->m == b->m && near(a->l, b->l, tolerance);
    for (int i = 0; i < HS; i++)
        same = same && near(a->o[i], b->o[i], tolerance);
    return same;
}

Test(merging, commutes_and_associates)
{
    set_up(1, 1, 30, HS);
    for (int i = 0; i < 30; i++)
        k[i * HS] *= i; /* so that the maxima lie far apart */
    float o[6][HS];
    PartialRow ab = part(o[0], 0, 7), b = part(o[1], 7, 19), c = part(o[2], 19, 30);
    merge_partials(&ab, &b, HS);
    merge_partials(&ab, &c, HS); /* (a b) c */
    PartialRow bc = part(o[3], 7, 19), a = part(o[4], 0, 7), cb = part(o[5], 19, 30);
    merge_partials(&bc, &c, HS);
    merge_partials(&a, &bc, HS); /* a (b c) */
    cr_expect(same_row(&a, &ab, 2e-6), "grouping");
    merge_partials(&cb, &b, HS);
    PartialRow last = part(o[3], 0, 7);
    merge_partials(&cb, &last, HS); /* (c b) a */
    cr_expect(same_row(&cb, &ab, 2e-6), "order");
}

Test(merging, an_empty_row_changes_nothing)
{
    set_up(1, 1, 9, HS);
    float o[4][HS];
    PartialRow whole = part(o[0], 0, 9), a = part(o[1], 0, 9), left = empty_row(o[2], HS),
               right = empty_row(o[3], HS);
    merge_partials(&a, &right, HS);
    cr_expect(same_row(&a, &whole, 0), "empty on the right");
    merge_partials(&left, &a, HS);
    cr_expect(same_row(&left, &whole, 0), "empty on the left");

    PartialRow nothing = empty_row(o[1], HS);
    merge_partials(&nothing, &right, HS);
    cr_expect(nothing.m == -INFINITY && nothing.l == 0 && o[1][0] == 0, "two empty rows are an empty row");
    cr_expect(finish_row(&nothing, HS) == -INFINITY && o[1][0] == 0);
}

Test(merging, keeps_nan)
{
    set_up(1, 1, 9, HS);
    k[2 * HS] = NAN;
    float o[2][HS];
    PartialRow a = part(o[0], 0, 4), b = part(o[1], 4, 9);
    merge_partials(&b, &a, HS);
    cr_expect(isnan(b.l) && isnan(o[1][0]));
    cr_expect(isnan(finish_row(&b, HS)));
}

/* ---- Traps ---- */

Test(traps, large_scores_do_not_overflow)
{
    const float scores[3] = {5000, 4999, -5000}, values[3] = {1, 2, 3};
    cr_assert(isinf(expf(100)));
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up_scores(scores, values, 3);
        attend(kernel);
        cr_expect(near(out[0], 1 + 1 / (1 + exp(1)), 1e-6), "%s: %g", names[kernel], out[0]);
        cr_expect(near(lse[0], 5000 + log1p(exp(-1)), 1e-3), "%s: lse %g", names[kernel], lse[0]);
    }
}

Test(traps, nothing_allowed_gives_zeros)
{
    const int no_keys[1] = {0};
    const float forbidden[1] = {-INFINITY};
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (int how = 0; how < 3; how++) {
            set_up(1, 5, 3, 4);
            if (how == 0)
                shape.lengths = no_keys;
            else if (how == 1)
                shape.bias = forbidden; /* broadcast over all */
            else
                shape.causal = true; /* bottom-right: rows 0 and 1 stand before the first key */
            attend(kernel);
            for (int t = 0; t < (how == 2 ? 2 : 5); t++)
                cr_expect(lse[t] == -INFINITY && out[t * 4] == 0 && out[t * 4 + 3] == 0, "%s, way %d, row %d",
                          names[kernel], how, t);
        }
}

Test(traps, minus_1e30_is_not_minus_infinity)
{
    const float scores[2] = {1, 2}, values[2] = {1, 2}, small[2] = {-1e30f, -1e30f};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up_scores(scores, values, 2);
        shape.bias = small;
        shape.bias_stride[3] = 1;
        attend(kernel);
        cr_expect(out[0] == 1.5f && lse[0] == -1e30f, "%s: out %g, lse %g", names[kernel], out[0], lse[0]);
    }
}

Test(traps, nan_is_never_hidden)
{
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (int where = 0; where < 4; where++) {
            set_up(1, 70, 70, 5);
            memset(bias, 0, sizeof bias);
            if (where == 0)
                q[69 * 5] = NAN;
            else if (where == 1)
                k[3 * 5 + 4] = NAN;
            else if (where == 2)
                v[3 * 5] = NAN;
            else
                bias[0] = NAN;
            shape.bias = bias;
            shape.bias_stride[3] = 1;
            attend(kernel);
            cr_expect(isnan(out[69 * 5]), "%s hides NaN of input %d", names[kernel], where);
            cr_expect(where == 2 || isnan(lse[69]), "%s hides NaN of input %d in lse", names[kernel], where);
            cr_expect(where != 0 || !isnan(out[0]), "%s spreads NaN to another row", names[kernel]);
        }
}

Test(traps, only_nan_is_not_nothing)
{
    const float values[2] = {1, 2}, scores[2] = {NAN, -INFINITY};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up_scores(scores, values, 2);
        attend(kernel);
        cr_expect(isnan(out[0]) && isnan(lse[0]), "%s: out %g, lse %g", names[kernel], out[0], lse[0]);
    }
}

Test(traps, zero_times_nan_is_nan)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up(1, 4, 4, 3);
        shape.causal = true;
        v[3 * 3] = NAN; /* row 0 may not see key 3 */
        attend(kernel);
        cr_expect((isnan(out[0]) != 0) == (kernel == MATERIALISED), "%s: %g", names[kernel], out[0]);
        cr_expect(!isnan(lse[0]));
    }
}

Test(traps, dropout_leaves_the_sum_alone)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        float kept[MOST_TOKENS];
        set_up(1, 40, 40, 6);
        attend(kernel);
        memcpy(kept, lse, sizeof kept);
        float first = out[0];
        shape.dropout = 0.5f;
        attend(kernel);
        cr_expect(memcmp(kept, lse, 40 * sizeof *kept) == 0, "%s: lse changed", names[kernel]);
        cr_expect(out[0] != first, "%s: nothing was dropped", names[kernel]);
    }
}

/* ---- Gradients ---- */

static double loss(int kernel)
{
    attend(kernel);
    double sum = 0;
    for (size_t i = 0; i < query_count(&shape); i++)
        sum += (double)dout[i] * out[i];
    return sum;
}

/* A random step along one input changes the loss by the gradient times the step. */
static void expect_gradient(int kernel, const char *what, float *input, const float *gradient, size_t count)
{
    static float before[MOST], step[MOST];
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 99);
    draw_randn(&stream, step, count);
    memcpy(before, input, count * sizeof *before);
    double expected = 0, norm = 0, at[2];
    for (size_t i = 0; i < count; i++) {
        expected += (double)gradient[i] * step[i];
        norm += (double)gradient[i] * gradient[i];
    }
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < count; i++)
            input[i] = before[i] + (side ? 0.01f : -0.01f) * step[i];
        at[side] = loss(kernel);
    }
    memcpy(input, before, count * sizeof *before);
    double found = (at[1] - at[0]) / 0.02;
    cr_expect(near(found, expected, 2e-3 * sqrt(norm)), "%s: the loss changes by %.5f, d%s says %.5f",
              names[kernel], found, what, expected);
}

/* With all that stands between: scale, mask, a bias of one number a head and key, and dropout. */
Test(gradients, say_how_the_loss_changes)
{
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (int with_dropout = 0; with_dropout < 2; with_dropout++) {
            static float bias_of_heads[2 * 60];
            set_up(2, 50, 60, 12);
            RandomStream stream;
            seed_stream(&stream, STREAM_CPU, 5);
            draw_randn(&stream, bias_of_heads, 2 * 60);
            shape.scale = -0.4f;
            shape.causal = true;
            shape.mask = (Mask){.kind = MASK_WINDOW, .width = 30};
            shape.bias = bias_of_heads;
            shape.bias_stride[1] = 60;
            shape.bias_stride[3] = 1;
            shape.dropout = with_dropout ? 0.4f : 0;
            differentiate(kernel);
            expect_gradient(kernel, "q", q, dq, query_count(&shape));
            expect_gradient(kernel, "k", k, dk, key_count(&shape));
            expect_gradient(kernel, "v", v, dv, key_count(&shape));
            expect_gradient(kernel, "bias", bias_of_heads, dbias, 2 * 60);
        }
}

/* A bias that is the same for all pairs of an axis: its gradient is the sum over them. */
Test(gradients, of_a_broadcast_bias_are_summed)
{
    enum { T = 20, TK = 30 };
    static float whole[2 * T * TK];
    static const size_t full[4] = {0, T * TK, TK, 1};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        static const float zeros[2 * T * TK];
        set_up(2, T, TK, 8);
        shape.causal = true;
        shape.bias = zeros;
        memcpy(shape.bias_stride, full, sizeof full);
        differentiate(kernel);
        memcpy(whole, dbias, sizeof whole);
        /* Bit 0: one number for all heads, bit 1: for all queries, bit 2: for all keys. */
        for (int shared = 1; shared < 8; shared++) {
            static double expected[2 * T * TK];
            size_t stride[4] = {0, 0, 0, 0}, count = 1;
            static const int size[4] = {1, 2, T, TK};
            for (int axis = 3; axis > 0; axis--)
                if (!(shared >> (axis - 1) & 1)) {
                    stride[axis] = count;
                    count *= size[axis];
                }
            memset(expected, 0, sizeof expected);
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < T; t++)
                    for (int t2 = 0; t2 < TK; t2++)
                        expected[h * stride[1] + t * stride[2] + t2 * stride[3]] +=
                            whole[(h * T + t) * TK + t2];
            memcpy(shape.bias_stride, stride, sizeof stride);
            differentiate(kernel);
            for (size_t i = 0; i < count; i++)
                cr_expect(near(dbias[i], expected[i], 1e-5), "%s, shared %d: number %zu is %g, not %g",
                          names[kernel], shared, i, dbias[i], expected[i]);
        }
    }
}

/* What is added to all scores of a row alike cancels in the softmax. */
Test(gradients, of_a_rows_scores_sum_to_nothing)
{
    static const float zeros[1];
    set_up(2, 40, 40, 8);
    shape.causal = true;
    differentiate(MATERIALISED);
    for (int row = 0; row < 2 * 40; row++) {
        double sum = 0, size = 0;
        for (int t2 = 0; t2 < 40; t2++) {
            sum += d_scores[row * 40 + t2];
            size += fabsf(d_scores[row * 40 + t2]);
        }
        cr_expect(near(sum, 0, 1e-6), "row %d: %g of %g", row, sum, size);
    }
    shape.bias = zeros;
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        differentiate(kernel);
        cr_expect(near(dbias[0], 0, 1e-4), "%s: %g", names[kernel], dbias[0]);
    }
}

Test(gradients, online_keeps_one_number_a_row)
{
    const AttentionShape s = {
        .batch = 2, .heads = 3, .kv_heads = 3, .tokens = 50, .key_tokens = 70, .head_size = 8};
    AttentionShape with_dropout = s;
    with_dropout.dropout = 0.1f;
    const Kernel *kernel = chapter.kernels;
    size_t floats[MAX_BUFFERS];
    cr_expect(kernel[MATERIALISED].backward_workspace(&s, floats) == 1 && floats[0] == 2 * 3 * 50 * 70);
    cr_expect(kernel[MATERIALISED].workspace(&s, floats) == 0, "no second matrix without dropout");
    cr_expect(kernel[MATERIALISED].workspace(&with_dropout, floats) == 1 && floats[0] == 2 * 3 * 50 * 70);
    cr_expect(!kernel[ONLINE].workspace);
    cr_expect(kernel[ONLINE].backward_workspace(&s, floats) == 1 && floats[0] == 2 * 3 * 50);
}

static bool all_zero(const float *row, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (!(row[i] == 0))
            return false;
    return true;
}

Test(traps, nothing_allowed_has_no_gradient)
{
    const int no_keys[1] = {0};
    const float forbidden[1] = {-INFINITY};
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (int how = 0; how < 3; how++) {
            set_up(1, 5, 3, 4);
            if (how == 0)
                shape.lengths = no_keys;
            else if (how == 1)
                shape.bias = forbidden;
            else
                shape.causal = true;
            differentiate(kernel);
            cr_expect(all_zero(dq, (how == 2 ? 2 : 5) * 4), "%s, way %d: dq", names[kernel], how);
            if (how < 2)
                cr_expect(all_zero(dk, 3 * 4) && all_zero(dv, 3 * 4), "%s, way %d", names[kernel], how);
            else
                cr_expect(!isnan(dk[0]) && !isnan(dv[0]) && dv[0] != 0, "%s: the other rows' gradients",
                          names[kernel]);
            if (how == 1)
                cr_expect(dbias[0] == 0, "%s: dbias %g", names[kernel], dbias[0]);
        }
}

/* Row 0 may see key 0 alone: its out is that value whatever its score is. */
Test(traps, one_key_has_no_gradient_of_its_score)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up(1, 70, 70, 24);
        shape.causal = true;
        differentiate(kernel);
        for (int i = 0; i < 24; i++)
            cr_expect(near(dq[i], 0, 1e-6), "%s: dq[%d] = %g", names[kernel], i, dq[i]);
    }
}

Test(traps, nan_in_dout_is_never_hidden)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up(2, 70, 70, 5);
        shape.causal = true;
        dout[40 * 5 + 2] = NAN;
        differentiate(kernel);
        cr_expect(isnan(dq[40 * 5]) && isnan(dk[40 * 5]) && isnan(dv[40 * 5 + 2]), "%s", names[kernel]);
        cr_expect(!isnan(dq[39 * 5]), "%s spreads NaN to another row", names[kernel]);
        cr_expect(!isnan(dk[70 * 5]) && !isnan(dv[70 * 5]), "%s spreads NaN to another head", names[kernel]);
        if (kernel == ONLINE)
            cr_expect(!isnan(dk[41 * 5]) && !isnan(dv[41 * 5 + 2]), "a key that row 40 may not see");
    }
}

/* exp(score - lse) of a score of thousands must not be taken as exp(score) / l. */
Test(traps, large_scores_have_gradients)
{
    const float scores[3] = {5000, 4999, -5000}, values[3] = {1, 2, 3};
    double e = exp(-1), p0 = 1 / (1 + e), p1 = e / (1 + e), mean = p0 + 2 * p1;
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        set_up_scores(scores, values, 3);
        dout[0] = 1;
        differentiate(kernel);
        cr_expect(near(dk[0], p0 * (1 - mean), 2e-4) && near(dk[1], p1 * (2 - mean), 2e-4) && dk[2] == 0,
                  "%s: %g %g %g", names[kernel], dk[0], dk[1], dk[2]);
        cr_expect(near(dv[0], p0, 2e-4) && dv[2] == 0, "%s: dv %g", names[kernel], dv[0]);
    }
}

/* ---- The matrix ---- */

Test(matrix, rows_sum_to_one_and_end_at_the_diagonal)
{
    set_up(2, 150, 150, 7);
    shape.causal = true;
    attend(MATERIALISED);
    for (int h = 0; h < 2; h++)
        for (int t = 0; t < 150; t++) {
            const float *row = weights + lse_index(&shape, 0, h, t) * 150;
            double sum = 0;
            for (int t2 = 0; t2 < 150; t2++) {
                sum += row[t2];
                cr_expect((row[t2] > 0) == (t2 <= t), "head %d, row %d, key %d: %g", h, t, t2, row[t2]);
            }
            cr_expect(near(sum, 1, 1e-6), "head %d, row %d sums to %.8f", h, t, sum);
        }
}

/* ---- Threads ---- */

Test(threads, give_the_same_bits)
{
    static const float zeros[2 * 150];
    static float *const result[] = {out, dq, dk, dv, dbias};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        static float alone[5][MOST];
        set_up(2, 150, 150, 20);
        shape.causal = true;
        shape.bias = zeros;
        shape.bias_stride[1] = 150;
        shape.bias_stride[3] = 1;
        for (int threads = 1; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            differentiate(kernel);
            for (int i = 0; i < 5; i++) {
                size_t bytes = (i < 4 ? query_count(&shape) : 2 * 150) * sizeof(float);
                if (threads == 1)
                    memcpy(alone[i], result[i], bytes);
                cr_expect(memcmp(alone[i], result[i], bytes) == 0, "%s, %d threads, result %d", names[kernel],
                          threads, i);
            }
        }
    }
}
