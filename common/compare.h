/* Is this tensor the right one? Ours in float beside the oracle's in double. NaN never passes. */
#ifndef COMMON_COMPARE_H
#define COMMON_COMPARE_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct {
    double
        relative_l2;  /* |ours - expected| / |expected|, L2 norms; |ours| itself where expected is all zero */
    double max_abs;   /* the largest |ours - expected| */
    size_t nan_count; /* NaN in ours, plus NaN in expected */
    size_t count;
    size_t first_bad; /* the first element that is NaN, infinite where it should not be, or off by more than
                         allowed; count if there is none */
    double tolerance;
    bool passed;
} Comparison;

/* ours[i] against expected[i]. Passes if relative_l2 <= tolerance, no element is off by more than 50 *
 * tolerance * (1 + the largest finite |expected|), and nothing is NaN. An infinity matches the same infinity
 * only, and is left out of the norms. */
Comparison compare(const float *ours, const double *expected, size_t count, double tolerance);

/* The same for a gradient, which can be zero on paper: no norm is taken to be smaller than that of elements of this
 * magnitude, so that what is left of a sum of ordinary numbers that cancel is judged by their size, not by its own. */
Comparison compare_gradient(const float *ours, const double *expected, size_t count, double tolerance,
                            double magnitude);

/* The larger of both; NaN if either is, which fmax() would drop, and so would a test made of it. */
static inline double worse(double a, double b)
{
    return a > b || isnan(a) ? a : b;
}

/* The largest |a[i] - b[i]|; NaN if there is one. */
double furthest_apart(const float *a, const float *b, size_t count);

/* The tolerance, written down once: for ordinary scores 1e-5 in float, and room for long sums of many keys; a
 * score of size s carries an error of s * 2^-24 into the exponent, with room for the dot product that made
 * it. */
double tolerance_f32(int key_tokens, double largest_score);

/* The same for a result in bf16, given float32's: its numbers, and those that it is a sum of, are rounded to 8 bits. */
double tolerance_bf16(double tolerance_of_f32);

/* "L2 3.1e-07, max 4.8e-07, 0 NaN" or, when it failed, also the tolerance and the first bad index. */
void comparison_text(char *text, size_t size, const Comparison *c);

#endif
