/* Vectors of floats as wide as the processor that this is built for: 16 lanes with AVX-512, 8 with AVX2, 4
 * with NEON or SSE. They are the compiler's own (gcc's and clang's vector extensions): + and * work on all
 * lanes at once, a float beside a vector counts for each lane. Only what the extensions do badly stands here
 * once for each processor.
 */
#ifndef FLASH_VECTORS_H
#define FLASH_VECTORS_H

#include <stdint.h>

/* TILE: how many rows of three vectors are summed up at once in registers. 8 x 3 accumulators need 28 of 32
 * registers, 4 x 3 need 16 of 16. */
#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, TILE = 8 };
#elif defined(__AVX__)
#include <immintrin.h>
enum { LANES = 8, TILE = 4 };
#elif defined(__ARM_NEON)
#include <arm_neon.h>
enum { LANES = 4, TILE = 8 };
#else
enum { LANES = 4, TILE = 4 };
#endif

enum {
    VECTORS = 3,
    SHORT_SUM = 64, /* terms of a score that are added up before they join the rest */
};

/* For each row i of TILE and each vector j of the first `vectors` of a row: what follows in braces, written
 * out once for each, so that c[i][j] is a register. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define EACH_VECTOR(i, j, vectors)                                                                           \
    UNROLL for (int i = 0; i < TILE; i++) UNROLL for (int j = 0; j < VECTORS; j++) if (j < (vectors))

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t IntVector __attribute__((vector_size(LANES * sizeof(float)), may_alias));

/* yes where the mask's lane is all ones, no where it is 0. */
static inline Vector vector_select(IntVector mask, Vector yes, Vector no)
{
    return (Vector)((mask & (IntVector)yes) | (~mask & (IntVector)no));
}

/* The larger of the two, lane by lane; b where a or b is NaN. */
static inline Vector vector_max(Vector a, Vector b)
{
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vector_select(a > b, a, b);
#endif
}

/* 2^x for x <= 127: the nearest integer n goes into the exponent, a polynomial of degree 6 (minimax, 2e-9)
 * takes the rest. Below -127 the result is exactly 0, for -inf too; NaN stays NaN. Adding 1.5 * 2^23 leaves
 * no room for a fraction: the sum's low bits are n. */
static inline __attribute__((always_inline)) Vector exp2_vector(Vector x)
{
    const float shift = 12582912.0f;
    x = vector_max((Vector){0} - 127.0f, x);
    Vector shifted = x + shift;
    Vector f = x - (shifted - shift);
    Vector p = 1.534581201e-4f * f + 1.339993122e-3f;
    p = p * f + 9.618488957e-3f;
    p = p * f + 5.550328777e-2f;
    p = p * f + 2.402264689e-1f;
    p = p * f + 6.931472057e-1f;
    p = p * f + 1.0f;
    IntVector two_to_n = ((IntVector)shifted + 127) << 23;
    return p * (Vector)two_to_n;
}

#endif
