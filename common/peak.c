#include "benchmark.h"
#include "memory.h"

#include <stdbool.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* As wide as this build's vectors are. */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32 };
#else
enum { VECTOR_BYTES = 16 };
#endif

/* A multiply-add takes about 4 cycles and up to 4 begin in each (2 on x86): this many must be under way at
 * once, and all of them must stay in registers, 16 or 32 of them. */
#ifdef __aarch64__
enum { CHAINS = 16 };
#else
enum { CHAINS = 12 };
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
enum { LANES = VECTOR_BYTES / sizeof(float), STEPS = 4096 };

/* STEPS multiply-adds on each of CHAINS vectors. The sums settle at 1: nothing overflows, nothing becomes
 * denormal. */
static __attribute__((noinline)) void multiply_adds(Vector *sums)
{
    const Vector half = (Vector){0} + 0.5f;
    Vector c[CHAINS];
    memcpy(c, sums, sizeof c);
    for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < CHAINS; i++)
            c[i] = c[i] * half + half;
    memcpy(sums, c, sizeof c);
}

/* The same of pairs of bf16; returns how many multiply-adds one instruction does in a lane. */
static __attribute__((noinline)) int bf16_multiply_adds(Vector *sums)
{
#ifdef __AVX512BF16__
    const __m512bh small = (__m512bh)_mm512_set1_epi32(0x3c003c00); /* 2^-7 */
    __m512 c[CHAINS];
    memcpy(c, sums, sizeof c);
    for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < CHAINS; i++)
            c[i] = _mm512_dpbf16_ps(c[i], small, small);
    memcpy(sums, c, sizeof c);
    return 2;
#else
    multiply_adds(sums);
    return 1;
#endif
}

static double one_thread_gflops(double ms, bool bf16)
{
    Vector sums[CHAINS];
    memset(sums, 0, sizeof sums);
    multiply_adds(sums); /* wakes the clock and the vector units */
    double start = now(), seconds, rounds = 0;
    int each = 1;
    do {
        if (bf16)
            each = bf16_multiply_adds(sums);
        else
            multiply_adds(sums);
        rounds++;
        seconds = now() - start;
    } while (seconds < 1e-3 * ms);
    return rounds * 2.0 * each * STEPS * CHAINS * LANES / seconds * 1e-9;
}

double peak_burst_gflops(int threads, double ms, bool bf16)
{
    double gflops = 0;
#pragma omp parallel num_threads(threads) reduction(+ : gflops)
    gflops += one_thread_gflops(ms, bf16);
    (void)threads; /* without OpenMP there is one */
    return gflops;
}

/* ---- Reading ---- */

/* The sum of the vectors, one after the other: the order in which a processor fetches ahead of its own accord. */
static __attribute__((noinline)) Vector read_block(const Vector *block, size_t vectors)
{
    enum { SUMS = 8 };
    Vector sum[SUMS] = {0}, total = {0};
    for (size_t i = 0; i + SUMS <= vectors; i += SUMS)
        for (int j = 0; j < SUMS; j++)
            sum[j] += block[i + j];
    for (int j = 0; j < SUMS; j++)
        total += sum[j];
    return total;
}

/* Reads round and round in a part of its own; what was read first is long out of the cache when its turn comes again. */
static double one_thread_gb_per_s(const Vector *part, size_t vectors, double ms)
{
    const size_t block = (256 << 10) / sizeof(Vector);
    Vector total = {0};
    double start = now(), seconds, blocks = 0;
    size_t at = 0;
    do {
        total += read_block(part + at, block);
        at = at + 2 * block <= vectors ? at + block : 0;
        blocks++;
        seconds = now() - start;
    } while (seconds < 1e-3 * ms);
    bool all_zero = total[0] == 0; /* so the sum is wanted, and no compiler leaves the reading out */
    return all_zero ? blocks * block * sizeof(Vector) / seconds * 1e-9 : 0;
}

double read_burst_gb_per_s(int threads, double ms)
{
    const size_t all = (256 << 20) / sizeof(Vector);
    static Vector *memory;
    if (!memory) {
        memory = (Vector *)allocate_floats(all * LANES);
#pragma omp parallel for
        for (size_t i = 0; i < all; i++)
            memory[i] = (Vector){0};
    }
    double gb_per_s = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : gb_per_s)
    for (int i = 0; i < threads; i++)
        gb_per_s += one_thread_gb_per_s(memory + i * (all / threads), all / threads, ms);
    return gb_per_s;
}
