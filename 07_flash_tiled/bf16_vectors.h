/* Vectors of pairs of bf16. A multiply-add of bf16 takes a pair of them from each side:
 *
 *     sum += first(a) * first(b) + second(a) * second(b)          sum in float32, in each lane
 *
 * one instruction where the processor has AVX512_BF16, twice the multiply-adds of a float32 instruction. Elsewhere the
 * same sum is two multiply-adds in float32: bf16 is a float32 cut off, so that widening is a shift. */
#ifndef BF16_VECTORS_H
#define BF16_VECTORS_H

#include "narrow.h"
#include "vectors.h"

typedef uint16_t Bf16;
typedef uint32_t __attribute__((may_alias)) Pair; /* two neighbours in memory; the first is the lower half */
typedef uint32_t PairVector __attribute__((vector_size(LANES * sizeof(Pair)), may_alias));

static const Pair upper_half = 0xffff0000u, lower_half = 0xffff;

/* sum + a * b, the pair `a` for all lanes. */
INLINE Vector add_pair_products(Vector sum, Pair a, PairVector b)
{
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    PairVector all = (PairVector){0} + a;
    sum += (Vector)(all & upper_half) * (Vector)(b & upper_half);
    return sum + (Vector)(all << 16) * (Vector)(b << 16);
#endif
}

/* c[i][j] += the sum over k < n of pair a[i][k * a_step] times pairs b[k * b_step][j], as multiply_add() of vectors.h. */
INLINE void multiply_pairs(Vector c[TILE][VECTORS], int vectors, const Pair *const a[TILE], size_t a_step,
                           const Pair *b, size_t b_step, int n)
{
    for (int k = 0; k < n; k++, b += b_step)
        EACH_VECTOR(i, j, vectors)
            c[i][j] = add_pair_products(c[i][j], a[i][k * a_step], ((const PairVector *)b)[j]);
}

/* ---- Rows of HS numbers: what follows the last of an odd HS is 0 ---- */

/* A row's pairs go to every step-th place, and come back. */
INLINE void scatter_row(Pair *to, size_t step, const Bf16 *row, int HS)
{
    for (int d = 0; d + 1 < HS; d += 2)
        memcpy(to + (size_t)d / 2 * step, row + d, sizeof *to);
    if (HS % 2)
        to[(size_t)HS / 2 * step] = row[HS - 1];
}
INLINE void gather_row(Bf16 *row, const Pair *from, size_t step, int HS)
{
    for (int d = 0; d + 1 < HS; d += 2)
        memcpy(row + d, from + (size_t)d / 2 * step, sizeof *from);
    if (HS % 2)
        row[HS - 1] = (Bf16)from[(size_t)HS / 2 * step];
}

/* Two rows side by side: row r of `to` (n / 2 rounded up, width) holds rows 2r and 2r + 1. Its other numbers stay. */
static inline void pair_rows(Pair *to, size_t width, const Bf16 *from, int n, int HS)
{
    for (int r = 0; r + 1 < n; r += 2, to += width, from += 2 * HS)
        for (int d = 0; d < HS; d++)
            to[d] = from[d] | (Pair)from[HS + d] << 16;
    for (int d = 0; n % 2 && d < HS; d++)
        to[d] = from[d];
}

/* ---- Rounding ---- */

#ifndef __AVX512BF16__
/* Rounded in the upper half; the lower is what it may be. A NaN of any bits stays one: no carry runs out of it. */
INLINE PairVector rounded(Vector x)
{
    PairVector bits = (PairVector)x, up = bits + (0x7fff + (bits >> 16 & 1));
    return (PairVector)vector_select(x == x, (Vector)up, (Vector)(bits | 0x400000));
}
#endif

/* Pairs of float32 rounded to bf16, to nearest, ties to even. NaN stays NaN. */
INLINE PairVector pairs_from(Vector first, Vector second)
{
#ifdef __AVX512BF16__
    static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (PairVector)_mm512_permutexvar_epi16(_mm512_loadu_si512(zip), both);
#else
    return rounded(first) >> 16 | (rounded(second) & upper_half);
#endif
}

/* LANES numbers rounded likewise, one behind the other. */
INLINE void store_row(Bf16 *row, Vector x)
{
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)row, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    PairVector rounded = pairs_from(x, (Vector){0});
    for (int i = 0; i < LANES; i++)
        row[i] = (Bf16)rounded[i];
#endif
}

/* ---- Powers of two ---- */

/* 2^x for x <= 127, as exp2_vector() of vectors.h with a term less: relative error 9e-8. Below -150 exactly 0, NaN
 * stays NaN. What AVX-512 takes for the fraction leaves 0 of -inf: nothing to clamp. */
INLINE Vector exp2_short(Vector x)
{
#ifdef __AVX512F__
    Vector n = (Vector)_mm512_roundscale_ps((__m512)x, 0), f = (Vector)_mm512_reduce_ps((__m512)x, 0);
#else
    const float shift = 12582912.0f;
    x = vector_max((Vector){0} - 127.0f, x);
    Vector n = x + shift, f = x - (n - shift); /* the low bits of n are the integer */
#endif
    Vector p = 1.326472721e-3f * f + 9.671512812e-3f;
    p = p * f + 5.550733745e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (Vector)(((IntVector)n + 127) << 23);
#endif
}

#endif
