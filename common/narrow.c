#include "narrow.h"

/* float32: sign, 8 bits of exponent (bias 127), 23 of fraction. */
enum {
    FLOAT_INFINITY = 0x7f800000,
    TOO_LARGE_FOR_HALF = 0x477ff000,   /* 65520, half-way from 65504 to what would be 65536 */
    SMALLEST_NORMAL_HALF = 0x38800000, /* 2^-14 */
};

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Drops the last n bits, to nearest, ties to even. A carry runs on into the exponent, as it should. */
static uint32_t drop_bits(uint32_t bits, int n)
{
    uint32_t last_kept = bits >> n & 1;
    return (bits + (1u << (n - 1)) - 1 + last_kept) >> n;
}

uint16_t half_from_float(float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > FLOAT_INFINITY)
        return (uint16_t)(sign | 0x7e00 | (size >> 13 & 0x1ff));
    if (size >= TOO_LARGE_FOR_HALF)
        return (uint16_t)(sign | 0x7c00);
    if (size < SMALLEST_NORMAL_HALF) /* the last bit of 0.5f is 2^-24, as that of a subnormal half */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (drop_bits(size, 13) - ((127 - 15) << 10)));
}

float half_to_float(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
    if (exponent == 0x1f)
        return float_of(sign | FLOAT_INFINITY | fraction << 13);
    if (exponent == 0) {
        float size = (float)fraction / (1 << 24);
        return sign ? -size : size;
    }
    return float_of(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}
