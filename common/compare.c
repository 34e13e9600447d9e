#include "compare.h"

#include <math.h>
#include <stdio.h>

Comparison compare(const float *ours, const double *expected, size_t count, double tolerance)
{
    return compare_gradient(ours, expected, count, tolerance, 0);
}

Comparison compare_gradient(const float *ours, const double *expected, size_t count, double tolerance,
                            double magnitude)
{
    Comparison c = {.count = count, .first_bad = count, .tolerance = tolerance};
    double largest = 0;
    for (size_t i = 0; i < count; i++)
        if (isfinite(expected[i]) && fabs(expected[i]) > largest)
            largest = fabs(expected[i]);
    double allowed = 50 * tolerance * (1 + largest);

    double sum_difference = 0, sum_expected = 0;
    for (size_t i = 0; i < count; i++) {
        double difference = ours[i] - expected[i];
        bool good = fabs(difference) <= allowed; /* false for NaN */
        if (isfinite(difference)) {
            sum_difference += difference * difference;
            sum_expected += expected[i] * expected[i];
            c.max_abs = fmax(c.max_abs, fabs(difference));
        } else {
            c.nan_count += (size_t) !!isnan(ours[i]) + (size_t) !!isnan(expected[i]);
            good = ours[i] == expected[i]; /* the same infinity */
        }
        if (!good && c.first_bad == count)
            c.first_bad = i;
    }
    sum_expected = fmax(sum_expected, (double)count * magnitude * magnitude);
    c.relative_l2 = sqrt(sum_expected > 0 ? sum_difference / sum_expected : sum_difference);
    c.passed = c.nan_count == 0 && c.first_bad == count && c.relative_l2 <= tolerance;
    return c;
}

/* In units of 2^-24, the rounding error of one float: a sum of n terms drifts by about sqrt(n) of them, and a
 * score of size s brings s of them into the exponent. Four times that is room enough for every honest order
 * of adding. Never so much that a result wrong by 1% could pass, whatever the scores (infinite ones
 * included). */
double tolerance_f32(int key_tokens, double largest_score)
{
    double tolerance = 4 * 0x1p-24 * (sqrt(key_tokens) + largest_score);
    if (!(tolerance <= 5e-3))
        return 5e-3;
    return fmax(1e-5, tolerance);
}

/* Rounding to 8 bits is off by 2^-9 at most, and by 2^-9 / sqrt(3) or less in the L2 norm: room for three of that. */
double tolerance_bf16(double tolerance_of_f32)
{
    return fmin(5e-3, 0x1p-9 * sqrt(3) + tolerance_of_f32);
}

void comparison_text(char *text, size_t size, const Comparison *c)
{
    int used = snprintf(text, size, "L2 %.1e, max %.1e, %zu NaN", c->relative_l2, c->max_abs, c->nan_count);
    if (c->passed || used < 0 || (size_t)used >= size)
        return;
    text += used;
    size -= (size_t)used;
    if (c->first_bad < c->count)
        snprintf(text, size, ", tolerance %.1e, first bad %zu of %zu", c->tolerance, c->first_bad, c->count);
    else
        snprintf(text, size, ", tolerance %.1e, no element stands out", c->tolerance);
}

double furthest_apart(const float *a, const float *b, size_t count)
{
    double most = 0;
    for (size_t i = 0; i < count; i++)
        most = worse(most, fabs((double)a[i] - b[i]));
    return most;
}
