/* Half and bf16: every pattern there is, and every place where rounding turns. */
#include "narrow.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdbool.h>

typedef struct {
    uint16_t (*from_float)(float x);
    float (*to_float)(uint16_t bits);
    uint16_t infinity; /* numbers below it, NaN above */
} Format;

static const Format half = {half_from_float, half_to_float, 0x7c00};
static const Format bf16 = {bf16_from_float, bf16_to_float, 0x7f80};

static void every_pattern_comes_back(const Format *f)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float x = f->to_float((uint16_t)bits);
        uint16_t back = f->from_float(x);
        if ((bits & 0x7fff) > f->infinity) {
            cr_assert(isnan(x), "%04x", bits);
            cr_assert(isnan(f->to_float(back)) && back >> 15 == bits >> 15, "NaN %04x became %04x", bits,
                      back);
        } else
            cr_assert(back == bits, "%04x became %04x", bits, back);
    }
}

Test(half, every_pattern_comes_back)
{
    every_pattern_comes_back(&half);
}

Test(bf16, every_pattern_comes_back)
{
    every_pattern_comes_back(&bf16);
}

/* Between any two neighbours: the middle goes to the even one, the floats beside the middle to the nearer. */
static void every_tie_goes_to_even(const Format *f)
{
    for (uint32_t bits = 0; bits + 1 < f->infinity; bits++) {
        float low = f->to_float((uint16_t)bits), high = f->to_float((uint16_t)(bits + 1));
        float middle = low + (high - low) / 2; /* exact: float32 has more bits */
        uint16_t even = (uint16_t)(bits + (bits & 1));
        cr_assert(low < high);
        cr_assert(f->from_float(middle) == even, "the middle above %04x", bits);
        cr_assert(f->from_float(nextafterf(middle, low)) == bits, "below the middle above %04x", bits);
        cr_assert(f->from_float(nextafterf(middle, high)) == bits + 1, "above the middle above %04x", bits);
        cr_assert(f->from_float(-middle) == (0x8000 | even), "the middle below -%04x", bits);
    }
}

Test(half, every_tie_goes_to_even)
{
    every_tie_goes_to_even(&half);
}

Test(bf16, every_tie_goes_to_even)
{
    every_tie_goes_to_even(&bf16);
}

Test(half, values_of_the_format)
{
    cr_expect(half_to_float(0x3c00) == 1);
    cr_expect(half_to_float(0xc000) == -2);
    cr_expect(half_to_float(0x3555) == 1365.0f / 4096); /* about a third */
    cr_expect(half_to_float(0x7bff) == 65504);
    cr_expect(half_to_float(0x0400) == 0x1p-14f);
    cr_expect(half_to_float(0x0001) == 0x1p-24f);
    cr_expect(half_to_float(0x7c00) == INFINITY && half_to_float(0xfc00) == -INFINITY);
    cr_expect(signbit(half_to_float(0x8000)) && half_to_float(0x8000) == 0);
}

Test(bf16, values_of_the_format)
{
    cr_expect(bf16_to_float(0x3f80) == 1);
    cr_expect(bf16_to_float(0xc000) == -2);
    cr_expect(bf16_to_float(0x7f7f) == 0x1.fep127f);
    cr_expect(bf16_to_float(0x0080) == 0x1p-126f);
    cr_expect(bf16_to_float(0x0001) == 0x1p-133f);
    cr_expect(bf16_to_float(0x7f80) == INFINITY && bf16_to_float(0xff80) == -INFINITY);
}

Test(half, too_large_is_infinite)
{
    cr_expect(half_from_float(nextafterf(65520, 0)) == 0x7bff);
    cr_expect(half_from_float(65520) == 0x7c00);
    cr_expect(half_from_float(-1e9f) == 0xfc00);
    cr_expect(half_from_float(INFINITY) == 0x7c00);
    cr_expect(half_from_float(3.4e38f) == 0x7c00);
}

Test(bf16, too_large_is_infinite)
{
    float limit = 0x1.ffp127f; /* half-way from the largest to what would be 2^128 */
    cr_expect(bf16_from_float(nextafterf(limit, 0)) == 0x7f7f);
    cr_expect(bf16_from_float(limit) == 0x7f80);
    cr_expect(bf16_from_float(-3.4028235e38f) == 0xff80);
    cr_expect(isfinite(bf16_to_float(bf16_from_float(-1e9f))));
}

Test(half, too_small_is_zero)
{
    cr_expect(half_from_float(0x1p-25f) == 0); /* a tie between 0 and 2^-24 */
    cr_expect(half_from_float(nextafterf(0x1p-25f, 1)) == 1);
    cr_expect(half_from_float(-0x1p-26f) == 0x8000);
    cr_expect(half_from_float(0x1p-149f) == 0);
}

/* A NaN whose bits are all in the part that is dropped must not become an infinity. */
Test(narrow, a_small_nan_stays_a_nan)
{
    union {
        uint32_t bits;
        float x;
    } nan = {0x7f800001};
    cr_expect(isnan(half_to_float(half_from_float(nan.x))));
    cr_expect(isnan(bf16_to_float(bf16_from_float(nan.x))));
    nan.bits = 0xffffffff;
    cr_expect(half_from_float(nan.x) == 0xffff);
    cr_expect(bf16_from_float(nan.x) == 0xffff);
}
