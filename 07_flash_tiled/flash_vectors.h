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

enum { VECTORS = 3 };

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

#endif
