/* What is particular to one pass over the keys: mending, merging, and the traps of softmax. */
#include "matmul.h"
#include "online_softmax.h"
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- A problem small enough for arrays. ---- */

enum { MOST_TOKENS = 160, MOST_HEADS = 2, MOST_WIDTH = 24, MOST = MOST_HEADS * MOST_TOKENS * MOST_WIDTH };

static AttentionShape shape;
static float q[MOST], k[MOST], v[MOST], bias[MOST_TOKENS];
static float out[MOST], lse[MOST_HEADS * MOST_TOKENS], weights[MOST_HEADS * MOST_TOKENS * MOST_TOKENS];

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
    memset(out, 0x7f, sizeof out);
    memset(lse, 0x7f, sizeof lse);
    memset(weights, 0x7f, sizeof weights);
    if (kernel == MATERIALISED)
        attention_materialised(out, lse, weights, q, k, v, &shape);
    else
        attention_online(out, lse, q, k, v, &shape);
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
        RandomStream stream;
        seed_stream(&stream, STREAM_CPU, 7);
        shape.dropout = 0.5f;
        shape.dropout_stream = &stream;
        shape.dropout_seed = 7;
        attend(kernel);
        cr_expect(memcmp(kept, lse, 40 * sizeof *kept) == 0, "%s: lse changed", names[kernel]);
        cr_expect(out[0] != first, "%s: nothing was dropped", names[kernel]);
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

#ifdef _OPENMP
Test(threads, give_the_same_bits)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        static float alone[MOST];
        set_up(2, 150, 150, 20);
        shape.causal = true;
        omp_set_num_threads(1);
        attend(kernel);
        memcpy(alone, out, sizeof alone);
        omp_set_num_threads(3);
        attend(kernel);
        cr_expect(memcmp(alone, out, query_count(&shape) * sizeof *out) == 0, "%s", names[kernel]);
    }
}
#endif
