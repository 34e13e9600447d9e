/* Products against sums in double, and the same bits for 1, 2 and 3 threads. */
#include "matmul.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Floats in [-1, 1), always the same for a seed. The memory ends where the numbers do, so that a sanitizer
 * sees the edge. */
static float *random_floats(size_t count, uint64_t seed)
{
    float *x = malloc(count ? count * sizeof *x : 1);
    cr_assert(x);
    for (size_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(seed >> 32) * 0x1p-31f;
    }
    return x;
}

/* One product: the matrices stand in memory as (rows,ld). */
typedef struct {
    char transpose_a, transpose_b;
    int m, n, k;
    float alpha, beta;
    int gap; /* how much larger each ld is than the width */
    float *a, *b, *before;
    int ld_a, ld_b, ld_out;
    size_t a_count, b_count, out_count;
} Case;

static int larger(int a, int b)
{
    return a > b ? a : b;
}

static Case make_case(char transpose_a, char transpose_b, int m, int n, int k, float alpha, float beta,
                      int gap)
{
    Case c = {transpose_a, transpose_b, m, n, k, alpha, beta, gap, .ld_out = larger(n, 1) + gap};
    int a_rows = transpose_a == 'T' ? k : m, a_width = transpose_a == 'T' ? m : k;
    int b_rows = transpose_b == 'T' ? n : k, b_width = transpose_b == 'T' ? k : n;
    c.ld_a = larger(a_width, 1) + gap;
    c.ld_b = larger(b_width, 1) + gap;
    c.a_count = a_rows > 0 && a_width > 0 ? (size_t)(a_rows - 1) * c.ld_a + a_width : 0;
    c.b_count = b_rows > 0 && b_width > 0 ? (size_t)(b_rows - 1) * c.ld_b + b_width : 0;
    c.out_count = m > 0 && n > 0 ? (size_t)(m - 1) * c.ld_out + n : 0;
    c.a = random_floats(c.a_count, 1);
    c.b = random_floats(c.b_count, 2);
    c.before = random_floats(c.out_count, 3);
    for (size_t i = 0; beta == 0 && i < c.out_count; i++)
        c.before[i] = NAN; /* must not matter */
    return c;
}

static void free_case(Case *c)
{
    free(c->a);
    free(c->b);
    free(c->before);
}

static float *product(const Case *c, int threads)
{
    float *out = malloc(c->out_count ? c->out_count * sizeof *out : 1);
    memcpy(out, c->before, c->out_count * sizeof *out);
    omp_set_num_threads(threads);
    matmul(c->transpose_a, c->transpose_b, c->m, c->n, c->k, c->alpha, c->a, c->ld_a, c->b, c->ld_b, c->beta,
           out, c->ld_out);
    return out;
}

/* Each element within k + 4 roundings of the sum of the terms' sizes; what lies between the rows untouched. */
static void expect_right(const Case *c, const float *out)
{
    for (size_t i = 0; i < c->out_count; i++) {
        int row = (int)(i / c->ld_out), column = (int)(i % c->ld_out);
        if (column >= c->n) {
            cr_assert(memcmp(&out[i], &c->before[i], sizeof *out) == 0, "wrote beyond the width");
            continue;
        }
        double sum = 0, sizes = 0;
        for (int p = 0; p < c->k; p++) {
            double a =
                c->transpose_a == 'T' ? c->a[(size_t)p * c->ld_a + row] : c->a[(size_t)row * c->ld_a + p];
            double b = c->transpose_b == 'T' ? c->b[(size_t)column * c->ld_b + p]
                                             : c->b[(size_t)p * c->ld_b + column];
            sum += a * b;
            sizes += fabs(a * b);
        }
        double before = c->beta == 0 ? 0 : (double)c->beta * c->before[i];
        double expected = c->alpha * sum + before;
        double allowed = (c->k + 4) * 0x1p-24 * (fabs(c->alpha) * sizes + fabs(before));
        if (!(fabs(out[i] - expected) <= allowed))
            cr_assert_fail("%c%c %dx%dx%d, alpha %g, beta %g: out[%d][%d] is %.9g, not %.9g", c->transpose_a,
                           c->transpose_b, c->m, c->n, c->k, c->alpha, c->beta, row, column, out[i],
                           expected);
    }
}

static void expect_same_bits(const float *a, const float *b, size_t count, const char *what)
{
    for (size_t i = 0; i < count; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            cr_assert_fail("%s: element %zu is %.9g and %.9g", what, i, a[i], b[i]);
}

static void check(char transpose_a, char transpose_b, int m, int n, int k, float alpha, float beta, int gap)
{
    Case c = make_case(transpose_a, transpose_b, m, n, k, alpha, beta, gap);
    float *out = product(&c, 1);
    expect_right(&c, out);
    for (int threads = 2; threads <= 3; threads++) {
        float *again = product(&c, threads);
        expect_same_bits(out, again, c.out_count, "other bits with more threads");
        free(again);
    }
    free(out);
    free_case(&c);
}

static void check_all_transposes(int m, int n, int k, float alpha, float beta, int gap)
{
    check('N', 'N', m, n, k, alpha, beta, gap);
    check('N', 'T', m, n, k, alpha, beta, gap);
    check('T', 'N', m, n, k, alpha, beta, gap);
    check('T', 'T', m, n, k, alpha, beta, gap);
}

Test(matmul, odd_sizes_and_all_transposes)
{
    const int sizes[] = {1, 5, 7, 65};
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < 4; n++)
            for (int k = 0; k < 4; k++)
                check_all_transposes(sizes[m], sizes[n], sizes[k], 1, 0, 0);
}

Test(matmul, several_panels_of_rows_and_pieces_of_k)
{
    check_all_transposes(300, 65, 300, 1, 0, 0);
    check_all_transposes(256, 32, 256, 1, 0, 0);
    check_all_transposes(257, 33, 257, 1, 0, 0);
    check_all_transposes(770, 7, 5, 1, 0, 0);
    check_all_transposes(5, 300, 700, 1, 0, 0);
    check_all_transposes(1030, 1, 65, 1, 0, 0);
    check_all_transposes(700, 9, 65, 1, 0, 0);
}

Test(matmul, few_rows_and_much_to_do_are_cut_by_columns)
{
    check_all_transposes(64, 515, 2048, 1, 0.5f, 3);
}

Test(matmul, rows_farther_apart_than_their_width)
{
    check_all_transposes(7, 5, 65, 1, 0, 3);
    check_all_transposes(300, 65, 7, 1, 0, 3);
    check_all_transposes(65, 7, 300, 1, 0.5f, 100);
}

Test(matmul, alpha_and_beta)
{
    const float alphas[] = {1, 0.125f, -3, 0}, betas[] = {0, 1, -0.5f};
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 3; b++) {
            check_all_transposes(7, 65, 5, alphas[a], betas[b], 1);
            check_all_transposes(300, 7, 300, alphas[a], betas[b], 0);
        }
}

Test(matmul, nothing_to_add_or_nothing_to_write)
{
    check_all_transposes(5, 7, 0, 1, 0, 0); /* zeros where NaN stood */
    check_all_transposes(300, 7, 0, 1, 0.5f, 2);
    check_all_transposes(300, 7, 0, 1, 1, 0);
    check_all_transposes(0, 7, 5, 1, 0, 0);
    check_all_transposes(5, 0, 7, 1, 0, 0);
    check_all_transposes(0, 0, 0, 1, 0, 0);
}

Test(matmul, nan_in_reaches_the_rows_and_columns_it_must_and_no_others)
{
    Case c = make_case('N', 'T', 300, 65, 33, 1, 0, 0);
    c.a[290 * c.ld_a + 32] = NAN;
    c.b[64 * c.ld_b] = NAN;
    float *out = product(&c, 2);
    for (int i = 0; i < 300; i++)
        for (int j = 0; j < 65; j++)
            cr_assert(!isnan(out[i * c.ld_out + j]) == (i != 290 && j != 64), "out[%d][%d] is %g", i, j,
                      out[i * c.ld_out + j]);
    free(out);
    free_case(&c);
}

Test(matmul, the_same_bits_inside_a_parallel_region)
{
    Case c = make_case('N', 'T', 600, 96, 200, 1, 0, 0);
    float *out = product(&c, 1), *inside[4];
    omp_set_num_threads(3);
#pragma omp parallel for
    for (int i = 0; i < 4; i++) {
        inside[i] = malloc(c.out_count * sizeof(float));
        matmul('N', 'T', c.m, c.n, c.k, 1, c.a, c.ld_a, c.b, c.ld_b, 0, inside[i], c.ld_out);
    }
    for (int i = 0; i < 4; i++) {
        expect_same_bits(out, inside[i], c.out_count, "other bits inside a parallel region");
        free(inside[i]);
    }
    free(out);
    free_case(&c);
}

/* A library that is built on OpenMP is told to stay on one thread; the program around it must keep its own
 * number. */
Test(matmul, the_number_of_threads_survives)
{
#ifdef _OPENMP
    omp_set_num_threads(3);
    Case c = make_case('N', 'N', 600, 64, 64, 1, 0, 0);
    free(product(&c, 3));
    cr_assert(omp_get_max_threads() == 3);
    int threads = 0;
#pragma omp parallel reduction(+ : threads)
    threads += 1;
    cr_assert(threads == 3);
#pragma omp parallel
    {
        float *out = malloc(c.out_count * sizeof(float));
        matmul('N', 'N', c.m, c.n, c.k, 1, c.a, c.ld_a, c.b, c.ld_b, 0, out, c.ld_out);
        cr_assert(omp_get_max_threads() == 3);
        free(out);
    }
    free_case(&c);
#endif
}

Test(matmul, strided_batch_is_count_products)
{
    const int shapes[][3] = {{5, 7, 65}, {300, 65, 7}, {1, 1, 1}, {7, 33, 0}};
    for (int s = 0; s < 4; s++)
        for (int transposes = 0; transposes < 4; transposes++) {
            enum { COUNT = 5 };
            char ta = transposes & 1 ? 'T' : 'N', tb = transposes & 2 ? 'T' : 'N';
            Case c = make_case(ta, tb, shapes[s][0], shapes[s][1], shapes[s][2], 0.5f, 1, 0);
            size_t stride_a = c.a_count + 3, stride_b = c.b_count + 5, stride_out = c.out_count + 7;
            float *a = random_floats(stride_a * COUNT, 4), *b = random_floats(stride_b * COUNT, 5);
            float *out = random_floats(stride_out * COUNT, 6), *one = random_floats(stride_out * COUNT, 6);
            omp_set_num_threads(1);
            for (int i = 0; i < COUNT; i++)
                matmul(ta, tb, c.m, c.n, c.k, 0.5f, a + i * stride_a, c.ld_a, b + i * stride_b, c.ld_b, 1,
                       one + i * stride_out, c.ld_out);
            omp_set_num_threads(2);
            matmul_strided_batch(ta, tb, c.m, c.n, c.k, 0.5f, a, c.ld_a, stride_a, b, c.ld_b, stride_b, 1,
                                 out, c.ld_out, stride_out, COUNT);
            expect_same_bits(one, out, stride_out * COUNT, "strided batch");
            matmul_strided_batch(ta, tb, c.m, c.n, c.k, 0.5f, a, c.ld_a, stride_a, b, c.ld_b, stride_b, 1,
                                 out, c.ld_out, stride_out, 0);
            expect_same_bits(one, out, stride_out * COUNT, "a batch of none");
            free(a), free(b), free(out), free(one);
            free_case(&c);
        }
}

/* One matrix for all products: strides of 0 for what is shared. */
Test(matmul, strided_batch_with_a_shared_matrix)
{
    float *a = random_floats(3 * 4 * 5, 1), *b = random_floats(5 * 6, 2), out[3 * 4 * 6], one[4 * 6];
    matmul_strided_batch('N', 'N', 4, 6, 5, 1, a, 5, 20, b, 6, 0, 0, out, 6, 24, 3);
    for (int i = 0; i < 3; i++) {
        matmul('N', 'N', 4, 6, 5, 1, a + 20 * i, 5, b, 6, 0, one, 6);
        expect_same_bits(one, out + 24 * i, 24, "shared matrix");
    }
    free(a), free(b);
}

Test(matmul, linear_with_and_without_bias)
{
    const int shapes[][3] = {{1, 1, 1}, {6, 3, 2}, {65, 7, 5},      {300, 65, 300},
                             {5, 0, 7}, {0, 5, 7}, {20, 2048, 1700}};
    for (int s = 0; s < 7; s++)
        for (int with_bias = 0; with_bias < 2; with_bias++) {
            int rows = shapes[s][0], inputs = shapes[s][1], outputs = shapes[s][2];
            float *x = random_floats((size_t)rows * inputs, 1),
                  *w = random_floats((size_t)outputs * inputs, 2);
            float *bias = with_bias ? random_floats(outputs, 3) : NULL;
            float *out = random_floats((size_t)rows * outputs, 4),
                  *again = random_floats((size_t)rows * outputs, 5);
            for (int i = 0; i < rows * outputs; i++)
                out[i] = NAN;
            omp_set_num_threads(1);
            linear(out, x, w, bias, rows, inputs, outputs);
            omp_set_num_threads(2);
            linear(again, x, w, bias, rows, inputs, outputs);
            expect_same_bits(out, again, (size_t)rows * outputs, "linear");
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < outputs; j++) {
                    double sum = bias ? bias[j] : 0, sizes = fabs(sum);
                    for (int p = 0; p < inputs; p++) {
                        double term = (double)x[i * inputs + p] * w[j * inputs + p];
                        sum += term;
                        sizes += fabs(term);
                    }
                    cr_assert(fabs(out[i * outputs + j] - sum) <= (inputs + 4) * 0x1p-24 * sizes,
                              "rows %d, inputs %d, outputs %d, bias %d: out[%d][%d] is %g, not %g", rows,
                              inputs, outputs, with_bias, i, j, out[i * outputs + j], sum);
                }
            free(x), free(w), free(bias), free(out), free(again);
        }
}

/* ---- Which library, and which of its cores ---- */

/* Against sums in double, with rows of d_y farther apart than their width, d_x added to or written over x. */
Test(matmul, linear_backward_is_the_gradient)
{
    static const int cases[][3] = {{1, 3, 5}, {129, 40, 70}, {300, 65, 64}, {7, 1, 1}};
    for (int i = 0; i < 4; i++)
        for (int beta = 0; beta < 2; beta++) {
            int rows = cases[i][0], inputs = cases[i][1], outputs = cases[i][2], step = outputs + 3;
            float *x = random_floats((size_t)rows * inputs, 4),
                  *kept = random_floats((size_t)rows * inputs, 4),
                  *w = random_floats((size_t)outputs * inputs, 5),
                  *d_y = random_floats((size_t)(rows - 1) * step + outputs, 6),
                  *before = random_floats((size_t)rows * inputs, 7),
                  *d_x = beta ? random_floats((size_t)rows * inputs, 7) : x,
                  *d_w = random_floats((size_t)outputs * inputs, 8), *d_bias = random_floats(outputs, 9);
            linear_backward(d_x, (float)beta, d_w, i == 3 ? NULL : d_bias, d_y, step, x, w, rows, inputs,
                            outputs);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < inputs; c++) {
                    double sum = beta ? before[r * inputs + c] : 0;
                    for (int o = 0; o < outputs; o++)
                        sum += (double)d_y[r * step + o] * w[o * inputs + c];
                    cr_assert(fabs(d_x[r * inputs + c] - sum) < 1e-5, "d_x of case %d", i);
                }
            for (int o = 0; o < outputs; o++) {
                double of_bias = 0;
                for (int r = 0; r < rows; r++)
                    of_bias += d_y[r * step + o];
                cr_assert(i == 3 || fabs(d_bias[o] - of_bias) < 1e-5, "d_bias of case %d", i);
                for (int c = 0; c < inputs; c++) {
                    double sum = 0;
                    for (int r = 0; r < rows; r++)
                        sum += (double)d_y[r * step + o] * kept[r * inputs + c];
                    cr_assert(fabs(d_w[o * inputs + c] - sum) < 1e-5, "d_weight of case %d", i);
                }
            }
            if (beta)
                free(d_x);
            free(x), free(kept), free(w), free(d_y), free(before), free(d_w), free(d_bias);
        }
}

Test(matmul, another_core_is_wanted_only_where_it_helps_and_nobody_has_chosen)
{
    const char *const cores[] = {"Haswell",        "Zen",     "Prescott", "SkylakeX", "Cooperlake",
                                 "SapphireRapids", "SKYLAKEX"};
    for (int core = 0; core < 7; core++)
        for (int avx512 = 0; avx512 < 2; avx512++)
            for (int user = 0; user < 2; user++)
                for (int again = 0; again < 2; again++) {
                    bool wanted = better_core_wanted(avx512, cores[core], user ? "Haswell" : NULL,
                                                     again ? "Haswell" : NULL);
                    cr_assert(wanted == (core < 3 && avx512 && !user && !again),
                              "%s, AVX-512 %d, user %d, again %d", cores[core], avx512, user, again);
                }
}

static void expect_text(const char *expected, bool avx512, const char *core, const char *own_choice)
{
    char text[200];
    core_text(text, sizeof text, "OpenBLAS 0.3.21", avx512, core, own_choice);
    cr_assert_str_eq(text, expected, "%s", text);
}

Test(matmul, the_core_in_use_is_said)
{
    expect_text("OpenBLAS 0.3.21, core Cooperlake", true, "Cooperlake", NULL);
    expect_text("OpenBLAS 0.3.21, core Haswell", false, "Haswell", NULL);
    expect_text("OpenBLAS 0.3.21, core SkylakeX (taken instead of its own choice Haswell)", true, "SkylakeX",
                "Haswell");
    expect_text("OpenBLAS 0.3.21, core Haswell (leaves this processor's AVX-512 unused)", true, "Haswell",
                NULL);
    expect_text("OpenBLAS 0.3.21, core Haswell (leaves this processor's AVX-512 unused)", true, "Haswell",
                "Haswell");
    char small[20];
    core_text(small, sizeof small, "OpenBLAS 0.3.21", true, "SkylakeX", "Haswell");
    cr_assert_str_eq(small, "OpenBLAS 0.3.21, co");
}

Test(matmul, the_library_is_named)
{
#if defined(HAVE_OPENBLAS)
    cr_assert(strncmp(matmul_library(), "OpenBLAS ", 9) == 0 && strstr(matmul_library(), ", core "), "%s",
              matmul_library());
#elif !defined(HAVE_CBLAS)
    cr_assert_str_eq(matmul_library(), "plain loops (no CBLAS found)");
#endif
    cr_assert(strlen(matmul_library()) > 3 && !strchr(matmul_library(), '\n'));
}
