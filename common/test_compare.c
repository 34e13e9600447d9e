#include "compare.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { COUNT = 1000 };

/* Ordinary numbers, ours the expected ones times `factor`. */
static void fill(float *ours, double *expected, int count, double factor)
{
    for (int i = 0; i < count; i++) {
        expected[i] = sin(i);
        ours[i] = (float)(factor * expected[i]);
    }
}

Test(compare, accepts_rounding)
{
    float ours[COUNT];
    double expected[COUNT];
    fill(ours, expected, COUNT, 1);
    Comparison c = compare(ours, expected, COUNT, 1e-5);
    cr_assert(c.passed);
    cr_assert(c.relative_l2 > 0 && c.relative_l2 < 1e-7);
    cr_assert(c.max_abs > 0 && c.max_abs < 1e-7);
    cr_assert(c.nan_count == 0 && c.first_bad == COUNT && c.count == COUNT);
}

Test(compare, nan_on_either_side_fails)
{
    float ours[COUNT];
    double expected[COUNT];
    fill(ours, expected, COUNT, 1);
    ours[700] = NAN;
    Comparison c = compare(ours, expected, COUNT, 1e-5);
    cr_assert(!c.passed && c.nan_count == 1 && c.first_bad == 700);
    expected[700] = NAN; /* not even the same NaN on both sides */
    c = compare(ours, expected, COUNT, 1e-5);
    cr_assert(!c.passed && c.nan_count == 2 && c.first_bad == 700);
    ours[700] = 0;
    c = compare(ours, expected, COUNT, 1e-5);
    cr_assert(!c.passed && c.nan_count == 1 && c.first_bad == 700);
    cr_assert(!compare(ours, expected, COUNT, INFINITY).passed);
    expected[700] = 0;
    cr_assert(!compare(ours, expected, COUNT, NAN).passed);
}

Test(compare, one_percent_fails_at_every_tolerance)
{
    float ours[COUNT];
    double expected[COUNT];
    fill(ours, expected, COUNT, 1.01);
    const double scores[] = {0, 1, 10, 100, 4000, 1e6, INFINITY, NAN};
    const int keys[] = {1, 1024, 1 << 24};
    for (size_t i = 0; i < sizeof scores / sizeof scores[0]; i++)
        for (size_t j = 0; j < sizeof keys / sizeof keys[0]; j++)
            cr_assert(!compare(ours, expected, COUNT, tolerance_f32(keys[j], scores[i])).passed,
                      "%d keys, scores up to %g", keys[j], scores[i]);
    cr_assert(!compare(ours, expected, COUNT, tolerance_bf16(INFINITY)).passed);
    cr_assert(!compare(ours, expected, COUNT, 1e-5).passed);
}

Test(compare, tolerances_are_tight_and_no_tighter_than_float)
{
    cr_assert(tolerance_f32(1024, 5) == 1e-5);
    cr_assert(tolerance_f32(6, 0) == 1e-5);
    cr_assert(tolerance_bf16(1e-5) > 0x1p-9 && tolerance_bf16(1e-5) < 3.5e-3);
    cr_assert(tolerance_f32(1024, 4000) > 4000 * 0x1p-24 && tolerance_f32(1024, 4000) < 1.1e-3);
    cr_assert(tolerance_f32(1 << 20, 5) > 1e-5 && tolerance_f32(1 << 20, 5) < 1e-3);
}

Test(compare, infinities_match_only_their_like)
{
    float ours[4] = {1, -INFINITY, 2, INFINITY};
    double expected[4] = {1, -INFINITY, 2, INFINITY};
    Comparison c = compare(ours, expected, 4, 1e-5);
    cr_assert(c.passed && c.relative_l2 == 0 && c.max_abs == 0 && c.nan_count == 0);
    ours[1] = INFINITY;
    c = compare(ours, expected, 4, 1e-5);
    cr_assert(!c.passed && c.first_bad == 1 && c.nan_count == 0);
    ours[1] = -3e38f; /* a large number is not an infinity */
    cr_assert(!compare(ours, expected, 4, 1e-5).passed);
    ours[1] = -INFINITY;
    expected[3] = 3e38;
    c = compare(ours, expected, 4, 1e-5);
    cr_assert(!c.passed && c.first_bad == 3);

    float only[2] = {-INFINITY, -INFINITY};
    double only_expected[2] = {-INFINITY, -INFINITY};
    cr_assert(compare(only, only_expected, 2, 1e-5).passed);
}

Test(compare, one_wrong_element_in_a_million_is_caught)
{
    const int count = 1000000;
    float *ours = malloc((size_t)count * sizeof *ours);
    double *expected = malloc((size_t)count * sizeof *expected);
    fill(ours, expected, count, 1);
    cr_assert(compare(ours, expected, count, 1e-5).passed);
    ours[999999] += 0.002f; /* the L2 norm alone, 2.8e-6 here, would not see it */
    Comparison c = compare(ours, expected, count, 1e-5);
    cr_assert(!c.passed && c.first_bad == 999999);
    cr_assert(c.relative_l2 < 1e-5);
    free(ours);
    free(expected);
}

Test(compare, many_small_errors_are_caught)
{
    float ours[COUNT];
    double expected[COUNT];
    fill(ours, expected, COUNT, 1.0001); /* no element is off by 50e-5, all of them together are */
    Comparison c = compare(ours, expected, COUNT, 1e-5);
    cr_assert(!c.passed && c.first_bad == COUNT);
}

Test(compare, zeros_are_judged_by_our_own_size)
{
    float ours[3] = {0, 0, 0};
    const double expected[3] = {0, 0, 0};
    cr_assert(compare(ours, expected, 3, 1e-5).passed);
    ours[1] = 1e-4f;
    Comparison c = compare(ours, expected, 3, 1e-5);
    cr_assert(!c.passed);
    cr_assert(fabs(c.relative_l2 - 1e-4) < 1e-9);
}

Test(compare, text_says_what_failed)
{
    float ours[3] = {1, 2, 3};
    const double expected[3] = {1, 2, 3};
    char text[200];
    Comparison c = compare(ours, expected, 3, 1e-5);
    comparison_text(text, sizeof text, &c);
    cr_assert_str_eq(text, "L2 0.0e+00, max 0.0e+00, 0 NaN");
    ours[2] = 4;
    c = compare(ours, expected, 3, 1e-5);
    comparison_text(text, sizeof text, &c);
    cr_assert_str_eq(text, "L2 2.7e-01, max 1.0e+00, 0 NaN, tolerance 1.0e-05, first bad 2 of 3");
    char small[10];
    comparison_text(small, sizeof small, &c);
    cr_assert_str_eq(small, "L2 2.7e-0");
}

Test(compare, gradient_of_zero_is_judged_by_what_was_summed)
{
    float ours[3] = {2e-8f, -1e-8f, 0};
    double zero[3] = {6e-17, 0, -3e-17};
    cr_expect(!compare(ours, zero, 3, 1e-5).passed, "by its own size, what is left of zero is all wrong");
    cr_expect(compare_gradient(ours, zero, 3, 1e-5, 0.1).passed);
    ours[2] = 1e-5f;
    cr_expect(!compare_gradient(ours, zero, 3, 1e-5, 0.1).passed);
    ours[2] = NAN;
    cr_expect(!compare_gradient(ours, zero, 3, 1e-5, 0.1).passed);
}

Test(compare, small_gradients_off_by_a_percent_fail)
{
    float ours[2] = {1.01e-3f, -1.01e-3f};
    double expected[2] = {1e-3, -1e-3};
    cr_expect(!compare_gradient(ours, expected, 2, 1e-5, 0.1).passed);
}

Test(compare, the_largest_of_differences_keeps_a_nan)
{
    const float zeros[3] = {0}, ours[3] = {1, NAN, 2};
    cr_expect(furthest_apart(ours, zeros, 1) == 1);
    cr_expect(isnan(furthest_apart(ours, zeros, 3)), "where others follow it");
    cr_expect(isnan(worse(NAN, 1)) && isnan(worse(1, NAN)) && worse(1, 2) == 2 && worse(2, 1) == 2);
}
