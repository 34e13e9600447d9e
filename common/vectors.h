/* Vectors of floats as wide as the processor that this is built for: 16 lanes with AVX-512, 8 with AVX2, 4
 * with NEON or SSE. They are the compiler's own (gcc's and clang's vector extensions): + and * work on all
 * lanes at once, a float beside a vector counts for each lane. Only what the extensions do badly stands here
 * once for each processor. And the two things that fast kernels are made of: a small product and 2^x.
 */
#ifndef COMMON_VECTORS_H
#define COMMON_VECTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* TILE: how many rows of three vectors are summed up at once in registers. 8 x 3 accumulators need 28 of 32
 * registers, 4 x 3 need 16 of 16. ZIP_LOW, ZIP_HIGH: which lanes ZIP() takes; the second
 * vector's count on from LANES. */
#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, TILE = 8 };
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#include <immintrin.h>
enum { LANES = 8, TILE = 4 };
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#if defined(__ARM_NEON)
enum { LANES = 4, TILE = 8 };
#else
enum { LANES = 4, TILE = 4 };
#endif
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

enum {
    VECTORS = 3,
    SHORT_SUM = 64, /* terms of a score that are added up before they join the rest */
};

/* For each row i of TILE and each vector j of the first `vectors` of a row: what follows in braces, written
 * out once for each, so that c[i][j] is a register. */
#ifdef UNROLL /* said on the command line: nothing, so that sanitizers have less to compile */
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define EACH_VECTOR(i, j, vectors)                                                                           \
    UNROLL for (int i = 0; i < TILE; i++) UNROLL for (int j = 0; j < VECTORS; j++) if (j < (vectors))

/* Where compilers load a step's numbers is their affair: clang broadcasts one for each row before it uses the first, and runs
 * out of registers; gcc, where there are 16, reads a row's vectors from the cache again for each number. No load moves across a
 * statement that they cannot look into, and what such a statement may change is in a register after it.
 * UNROLL_STEPS: with so few sums, stepping is a fifth of a loop's instructions. */
#if defined(__clang__)
#define KEEP_ORDER __asm__ volatile("")
#else
#define KEEP_ORDER (void)0
#endif
/* The compiler forgets what it knows of an address. Those of a tile's rows that gcc can work out ahead of a loop, it does, and
 * keeps them meanwhile in memory or in vector registers, from where they come back at the cost of a multiply-add each. */
#define FORGET(address) __asm__("" : "+r"(address))
#if defined(__AVX__) && !defined(__AVX512F__)
#define KEEP_IN_REGISTER(vector) __asm__("" : "+x"(vector))
#define UNROLL_STEPS _Pragma("GCC unroll 4")
#else
#define KEEP_IN_REGISTER(vector) (void)0
#define UNROLL_STEPS
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t IntVector __attribute__((vector_size(LANES * sizeof(float)), may_alias));

static inline int smaller(int a, int b)
{
    return a < b ? a : b;
}
static inline int larger(int a, int b)
{
    return a > b ? a : b;
}
static inline int round_up(int n, int unit)
{
    return (n + unit - 1) / unit * unit;
}

static inline float sum_lanes(Vector x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
#endif
}

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

/* Likewise the smaller. */
static inline Vector vector_min(Vector a, Vector b)
{
#if defined(__AVX__) && !defined(__AVX512F__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return vector_select(a < b, a, b);
#endif
}

static const float log2e = 1.44269504f; /* e^x = 2^(log2e x) */

/* 2^x within 2 ulps, for x up to 127; above, 2^127 at least. Below -150 it is exactly 0, for -inf too; NaN stays NaN. */
INLINE Vector exp2_vector(Vector x)
{
#if defined(__AVX512F__)
    /* x = n + k / 32 + f with f in 0 .. 1/32, so that three terms do. 2^(k/32), here times 1 + 5e-8 as the terms want it, is
     * looked up in two registers: k is what stays in the low bits when 1.5 * 2^18 leaves no room for more. vreduceps gives f at
     * once: faster on Intel, but slower than anything on AMD's Zen 4. Only Intel has FP16 too. */
    static const _Alignas(64) float power[] = {
        1.0f,        1.0218972f,  1.04427385f, 1.06714046f, 1.09050775f, 1.1143868f,  1.1387887f,
        1.1637249f,  1.1892072f,  1.21524739f, 1.24185789f, 1.26905107f, 1.29683959f, 1.32523668f,
        1.35425568f, 1.38390994f, 1.41421366f, 1.44518089f, 1.47682619f, 1.50916445f, 1.54221094f,
        1.5759809f,  1.61049044f, 1.64575553f, 1.68179297f, 1.71861935f, 1.75625229f, 1.79470921f,
        1.83400822f, 1.87416768f, 1.91520667f, 1.95714426f};
    enum { DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC, THIRTY_SECONDS = 5 << 4 };
    const float shift = 393216.0f;
    __m512i k = (__m512i)_mm512_add_round_ps((__m512)x, (__m512)((Vector){0} + shift), DOWN);
#if defined(__AVX512FP16__)
    Vector f = (Vector)_mm512_reduce_ps((__m512)x, DOWN | THIRTY_SECONDS);
#else
    Vector f = x - (Vector)_mm512_roundscale_ps((__m512)x, DOWN | THIRTY_SECONDS);
#endif
    Vector p = (Vector)_mm512_permutex2var_ps(_mm512_load_ps(power), k, _mm512_load_ps(power + LANES));
    p += p * (f * (0.242840609f * f + 0.693116526f));
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)x); /* p 2^n; 0 for n = -inf, whatever p is */
#else
    /* The nearest integer, here with the 127 of an exponent, is what stays in the low bits when 1.5 * 2^23 leaves no room for a
     * fraction; a minimax polynomial takes the rest, -1/2 .. 1/2. */
    static const float term[] = {1.534581201e-4f,
                                 1.339993122e-3f,
                                 9.618488957e-3f,
                                 5.550328777e-2f,
                                 2.402264689e-1f,
                                 6.931472057e-1f,
                                 1.0f};
    const float shift = 12582912.0f + 127;
    x = vector_min((Vector){0} + 127.0f, vector_max((Vector){0} - 127.0f, x));
    Vector exponent = x + shift, f = x - (exponent - shift), p = (Vector){0} + term[0];
    UNROLL for (int i = 1; i < 7; i++) p = p * f + term[i];
    return p * (Vector)((IntVector)exponent << 23);
#endif
}

/* The first n numbers from an address that needs no alignment, then zeros; to such an address. n <= 0: none. */
#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int n)
{
    return (__mmask16)(n >= LANES ? 0xffff : (1u << larger(n, 0)) - 1);
}
INLINE Vector load_first(const float *from, int n)
{
    return (Vector)_mm512_maskz_loadu_ps(first_lanes(n), from);
}
INLINE void store_first(float *to, Vector v, int n)
{
    _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)v);
}
#else
INLINE Vector load_first(const float *from, int n)
{
    if (n >= LANES) { /* by itself, so that it stays in a register */
        Vector all;
        memcpy(&all, from, sizeof all);
        return all;
    }
    Vector v = {0};
    if (n > 0)
        memcpy(&v, from, (size_t)n * sizeof(float));
    return v;
}
INLINE void store_first(float *to, Vector v, int n)
{
    if (n >= LANES)
        memcpy(to, &v, sizeof v);
    else if (n > 0)
        memcpy(to, &v, (size_t)n * sizeof(float));
}
#endif

/* The lanes of a and b in turn: ZIP(a, b, ZIP_LOW) those of their first halves, ZIP(a, b, ZIP_HIGH) of their second. */
#if defined(__clang__) || __GNUC__ >= 12
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (IntVector){__VA_ARGS__})
#endif

/* Rows become columns. One round of zipping row i with row i + LANES / 2 turns the bits of (row, column), read as
 * one number, left by one place; after log2(LANES) rounds row and column have changed places. */
INLINE void transpose(Vector row[LANES])
{
    UNROLL for (int round = 1; round < LANES; round *= 2)
    {
        Vector next[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++)
        {
            next[2 * i] = ZIP(row[i], row[i + LANES / 2], ZIP_LOW);
            next[2 * i + 1] = ZIP(row[i], row[i + LANES / 2], ZIP_HIGH);
        }
        memcpy(row, next, sizeof next);
    }
}

/* c[i][j] += the sum over k < n of a[i][k * a_step] * b[k * b_step][j]: TILE numbers of a, each broadcast to a
 * whole vector, by up to VECTORS vectors of b. b is aligned. It is always inlined with `vectors` a constant, and c
 * has a constant size: only so do all of c stay in registers.
 * look, a constant too: what lies at ahead + k * ahead_step will soon be read, and is brought near meanwhile. */
INLINE void multiply_add_ahead(Vector c[TILE][VECTORS], int vectors, const float *const a[TILE],
                               size_t a_step, const float *b, size_t b_step, int n, bool look,
                               const float *ahead, size_t ahead_step)
{
    UNROLL_STEPS for (int k = 0; k < n; k++, b += b_step)
    {
        if (look)
            __builtin_prefetch(ahead + k * ahead_step, 0, 2);
        Vector row[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) if (j < vectors)
        {
            row[j] = ((const Vector *)b)[j];
            KEEP_IN_REGISTER(row[j]);
        }
        EACH_VECTOR(i, j, vectors) {
            if (j == 0)
                KEEP_ORDER;
            c[i][j] += a[i][k * a_step] * row[j];
        }
    }
}
INLINE void multiply_add(Vector c[TILE][VECTORS], int vectors, const float *const a[TILE], size_t a_step,
                         const float *b, size_t b_step, int n)
{
    multiply_add_ahead(c, vectors, a, a_step, b, b_step, n, false, NULL, 0);
}

#endif
