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

/* ---- Rows of numbers as pairs; what follows the last of n numbers is 0 ---- */

/* Copies what a vector of `all` bytes has of a row with so many left: all by itself, as a known size needs no call. */
INLINE void copy_first(void *to, const void *from, size_t left, size_t all)
{
    if (left >= all)
        memcpy(to, from, all);
    else
        memcpy(to, from, left);
}

/* LANES pairs of a row of which n > 0 numbers are left; to such a row. */
INLINE PairVector load_pairs(const Bf16 *row, int n)
{
    PairVector x = {0};
    copy_first(&x, row, (size_t)n * sizeof *row, sizeof x);
    return x;
}
INLINE void store_pairs(Bf16 *row, PairVector x, int n)
{
    copy_first(row, &x, (size_t)n * sizeof *row, sizeof x);
}

/* LANES rows of LANES pairs become columns. */
INLINE void transpose_pairs(PairVector row[LANES])
{
    transpose((Vector *)row);
}

/* Rows of n numbers, each with zeros up to `pairs` pairs. */
static inline void copy_rows(Pair *to, int pairs, const Bf16 *from, int rows, int n)
{
    for (int r = 0; r < rows; r++, to += pairs, from += n) {
        memcpy(to, from, (size_t)n * sizeof *from);
        memset((Bf16 *)to + n, 0, (size_t)(2 * pairs - n) * sizeof *from);
    }
}

/* The pairs of rows become columns: pair p of row r, n numbers each, goes to to[p * step + r]; zeros up to the next multiple
 * of LANES rows and pairs. */
static inline void turn_rows(Pair *to, size_t step, const Bf16 *from, int rows, int n)
{
    for (int r0 = 0; r0 < rows; r0 += LANES)
        for (int p0 = 0; 2 * p0 < n; p0 += LANES) {
            PairVector x[LANES] = {0};
            for (int r = r0; r < smaller(r0 + LANES, rows); r++)
                x[r - r0] = load_pairs(from + (size_t)r * n + 2 * p0, n - 2 * p0);
            transpose_pairs(x);
            for (int p = 0; p < LANES; p++)
                *(PairVector *)(to + (size_t)(p0 + p) * step + r0) = x[p];
        }
}

/* LANES numbers of such a row, each as the first of a pair. */
INLINE PairVector load_numbers(const Bf16 *row, int n)
{
    Bf16 x __attribute__((vector_size(LANES * sizeof(Bf16)))) = {0};
    copy_first(&x, row, (size_t)n * sizeof *row, sizeof x);
    return __builtin_convertvector(x, PairVector);
}

/* Two rows side by side: pair r of number d is of rows 2r and 2r + 1. It goes to to[r * width + d], and nothing else is
 * written; or with `deep` pairs of a number one behind the other (deep = LANES) to
 * to[(r / deep * width + d) * deep + r % deep], with zeros for what the last block of pairs and numbers lacks. */
INLINE void pair_rows(Pair *to, size_t width, int deep, const Bf16 *from, int rows, int n)
{
    for (int r0 = 0; 2 * r0 < rows; r0 += LANES)
        for (int d = 0; d < n; d += LANES) {
            PairVector x[LANES] = {0};
            for (int r = 2 * r0; r < smaller(2 * (r0 + LANES), rows); r++)
                x[r / 2 - r0] |= load_numbers(from + (size_t)r * n + d, n - d) << (r % 2 * 16);
            if (deep > 1) {
                transpose_pairs(x);
                for (int i = 0; i < LANES; i++)
                    *(PairVector *)(to + r0 * width + (size_t)(d + i) * deep) = x[i];
            } else
                for (int r = r0; r < smaller(r0 + LANES, (rows + 1) / 2); r++)
                    copy_first(to + r * width + d, &x[r - r0], (size_t)(n - d) * sizeof *to, sizeof *x);
        }
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

/* LANES numbers rounded likewise, one behind the other, to a row of which n > 0 are left. */
INLINE void store_row(Bf16 *row, Vector x, int n)
{
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
#else
    PairVector pairs = pairs_from(x, (Vector){0});
    Bf16 narrow[LANES];
    for (int i = 0; i < LANES; i++)
        narrow[i] = (Bf16)pairs[i];
#endif
    copy_first(row, &narrow, (size_t)n * sizeof *row, sizeof narrow);
}

#endif
