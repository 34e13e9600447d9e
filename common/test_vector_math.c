/* largest_of; fast_exp and exp2_vector against the math library in double; fast_exp in loops that the compiler may turn into vectors. */
#include "vector_math.h"
#include "vectors.h"

#include <criterion/criterion.h>
#include <math.h>

enum { MANY = 1 << 16 };

Test(vector_math, largest_of_finds_it_wherever_it_is)
{
    float x[70] = {0};
    cr_assert(largest_of(x, 0) == -INFINITY);
    for (int n = 1; n <= 70; n++)
        for (int at = 0; at < n; at++) {
            for (int i = 0; i < n; i++)
                x[i] = i % 3 == 0 ? -INFINITY : -5.0f - i;
            x[(at + 1) % n] = NAN;
            x[(at + 16) % n] = NAN; /* of a longer row, in the same lane */
            x[at] = -4;
            cr_assert(largest_of(x, n) == -4, "number %d of %d", at, n);
        }
    for (int i = 0; i < 70; i++)
        x[i] = -INFINITY;
    cr_assert(largest_of(x, 70) == -INFINITY);
}

static void exp_of_many(float *out, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = fast_exp(x[i]);
}

/* The error in units of the last place of the float nearest to e^x. */
static double error_in_ulps(float ours, float x)
{
    double expected = exp(x);
    return fabs(ours - expected) / ldexp(1, ilogb((float)expected) - 23);
}

static void expect_within_2_ulps(double from, double to, int count)
{
    static float x[MANY], out[MANY];
    for (int first = 0; first < count; first += MANY) {
        int n = count - first < MANY ? count - first : MANY;
        for (int i = 0; i < n; i++)
            x[i] = (float)(from + (to - from) * (first + i) / (count - 1));
        exp_of_many(out, x, n);
        for (int i = 0; i < n; i++)
            if (!(error_in_ulps(out[i], x[i]) <= 2))
                cr_assert_fail("fast_exp(%.9g) is %.9g, not %.9g", x[i], out[i], exp(x[i]));
    }
}

Test(vector_math, fast_exp_is_within_2_ulps_over_its_whole_range)
{
    expect_within_2_ulps(-87, 88, 5000000);
}

Test(vector_math, fast_exp_is_within_2_ulps_of_1_near_0)
{
    expect_within_2_ulps(-1, 1, 1000000);
    expect_within_2_ulps(-1e-6, 1e-6, 100000);
    expect_within_2_ulps(-1e-40, 1e-40, 1000);
}

/* Half-way between two multiples of log 2 the remainder is largest, and the rounding may go either way. */
Test(vector_math, fast_exp_is_within_2_ulps_where_the_integer_changes)
{
    for (int n = -125; n < 126; n++) {
        float x = (float)((n + 0.5) * 0.69314718055994531), y = x;
        for (int step = 0; step < 100; step++) {
            cr_assert(error_in_ulps(fast_exp(x), x) <= 2, "fast_exp(%.9g) is %.9g", x, fast_exp(x));
            cr_assert(error_in_ulps(fast_exp(y), y) <= 2, "fast_exp(%.9g) is %.9g", y, fast_exp(y));
            x = nextafterf(x, 100), y = nextafterf(y, -100);
        }
    }
}

Test(vector_math, fast_exp_at_its_ends)
{
    const float x[] = {0.0f,      -0.0f, -87.0f, nextafterf(-87, -88), -88, -103, -1e4f, -3e38f,
                       -INFINITY, NAN,   -NAN};
    float out[11];
    exp_of_many(out, x, 11);
    cr_assert(out[0] == 1 && out[1] == 1);
    cr_assert(out[2] > 0);
    for (int i = 3; i < 9; i++)
        cr_assert(out[i] == 0 && !signbit(out[i]), "fast_exp(%g) is %g", x[i], out[i]);
    cr_assert(isnan(out[9]) && isnan(out[10]));
}

/* A vector of numbers gets what each number alone gets: a masked neighbour or a NaN beside it changes
 * nothing. */
Test(vector_math, fast_exp_keeps_neighbours_apart)
{
    float x[67], out[67];
    for (int i = 0; i < 67; i++)
        x[i] = i % 3 == 0 ? -INFINITY : i % 7 == 0 ? NAN : -i * 0.7f;
    exp_of_many(out, x, 67);
    for (int i = 0; i < 67; i++)
        if (i % 3 == 0)
            cr_assert(out[i] == 0);
        else if (i % 7 == 0)
            cr_assert(isnan(out[i]));
        else
            cr_assert(error_in_ulps(out[i], x[i]) <= 2);
}

/* ---- exp2_vector ---- */

static Vector lanes_from(float first, float step)
{
    Vector x;
    for (int i = 0; i < LANES; i++)
        x[i] = first + i * step;
    return x;
}

Test(vector_math, exp2_vector_is_within_2_ulps)
{
    const float step = 1.0f / 4096;
    for (float first = -125; first < 127; first += LANES * step) {
        Vector x = lanes_from(first, step), y = exp2_vector(x);
        for (int i = 0; i < LANES; i++) {
            double exact = exp2(x[i]), ulp = ldexp(1, ilogb((float)exact) - 23);
            cr_assert(fabs(y[i] - exact) <= 2 * ulp, "2^%.9g is %.9g, not %.9g", x[i], y[i], exact);
        }
    }
}

Test(vector_math, exp2_vector_at_its_ends)
{
    const float none[] = {-150.6f, -1e3f, -1e8f, -1e20f, -3e38f, -INFINITY};
    for (size_t n = 0; n < sizeof none / sizeof *none; n++) {
        Vector x = lanes_from(0, 1);
        x[n % LANES] = none[n];
        x[(n + 1) % LANES] = NAN;
        Vector y = exp2_vector(x);
        for (int i = 0; i < LANES; i++)
            if (i == (int)n % LANES)
                cr_assert(y[i] == 0 && !signbit(y[i]), "2^%g is %g", x[i], y[i]);
            else if (i == (int)(n + 1) % LANES)
                cr_assert(isnan(y[i]), "2^NaN is %g", y[i]);
            else
                cr_assert(y[i] == ldexpf(1, i), "2^%d is %g beside them", i, y[i]);
    }
}

Test(vector_math, exp2_vector_of_much_is_much)
{
    const float much[] = {127, 127.5f, 128, 129, 200, 1000, 1e8f, 1e20f, 3e38f, INFINITY};
    for (size_t n = 0; n < sizeof much / sizeof *much; n++) {
        Vector y = exp2_vector((Vector){0} + much[n]);
        for (int i = 0; i < LANES; i++)
            cr_assert(y[i] >= 0x1p127f, "2^%g is %g", much[n], y[i]);
    }
}
