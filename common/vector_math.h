/* What a softmax needs of its rows, in vectors: the largest score, and exp.
 *
 * fast_exp is for loops that the compiler turns into vectors: branch-free, no table, no call.
 * The math library's expf is correct to half a unit in the last place but is one call a number; a softmax
 * over millions of scores then waits for it. This one rounds x / log 2 to an integer n, takes a polynomial of
 * degree 6 for the rest (|f| <= 1/2) and shifts n into the exponent: within 1.2 units in the last place.
 */
#ifndef COMMON_VECTOR_MATH_H
#define COMMON_VECTOR_MATH_H

#include <stdint.h>
#include <string.h>

/* The largest of n numbers; -inf where n is 0. A NaN is never the largest. */
float largest_of(const float *x, int n);

/* e^x for x <= 88. Below -87 the result is exactly 0 (e^-inf among them), so that a masked score weighs
 * nothing; NaN stays NaN. */
static inline float fast_exp(float x)
{
    const float one_over_log_2 = 1.44269504f, round_to_integer = 12582912.0f; /* 1.5 * 2^23 */
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * one_over_log_2 + round_to_integer;
    float n = shifted - round_to_integer;
    float f = clamped - n * 0.693359375f; /* log 2 in two parts, so that f keeps its low bits */
    f = f - n * -2.12194440e-4f;
    float p = 1.38146023e-3f; /* the coefficients that make the largest relative error smallest */
    p = p * f + 8.36871564e-3f;
    p = p * f + 4.16683890e-2f;
    p = p * f + 1.66665211e-1f;
    p = p * f + 4.99999940e-1f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* the low byte of `shifted` holds n */
    float two_to_n;
    memcpy(&two_to_n, &bits, sizeof bits);
    float result = p * two_to_n;
    return x < -87.0f ? 0.0f : result;
}

#endif
