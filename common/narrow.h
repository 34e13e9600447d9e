/* The two 16-bit floating-point formats, and float32 rounded to them.
 *
 *   half   sign, 5 bits of exponent (bias 15), 10 of fraction: to 65504, steps of 2^-10 of the number
 *   bf16   sign, 8 bits of exponent (bias 127), 7 of fraction: a float32 cut off, steps of 2^-7
 *
 * Both round to nearest, ties to even, as IEEE 754 says; too large becomes infinite; subnormal numbers count; a NaN
 * stays a NaN of its sign, and is quiet. From 16 bits to float32 nothing is lost. */
#ifndef COMMON_NARROW_H
#define COMMON_NARROW_H

#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

uint16_t half_from_float(float x);
float half_to_float(uint16_t bits);

#ifdef __cplusplus
}
#endif

/* Inline: kernels call them for each number. */
static inline uint16_t bf16_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float bf16_to_float(uint16_t narrow)
{
    uint32_t bits = (uint32_t)narrow << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#endif
