#include "benchmark.h"
#include "memory.h"
#include "tiles.h"
#include "vectors.h"

/* A multiply-add takes about 4 cycles and up to 4 begin in each (2 on x86): this many must be under way at
 * once, and all of them must stay in registers, 16 or 32 of them. */
#ifdef __aarch64__
enum { CHAINS = 16 };
#else
enum { CHAINS = 12 };
#endif

enum { STEPS = 4096 };

#if defined(__clang__) && defined(__AVX512F__) /* it takes vectors in two halves, unless it is told */
#define WHOLE_VECTORS __attribute__((min_vector_width(512)))
#else
#define WHOLE_VECTORS
#endif

/* STEPS multiply-adds on each of CHAINS vectors; returns how many operations that is. The sums settle at 1: nothing
 * overflows, nothing becomes denormal. */
WHOLE_VECTORS static __attribute__((noinline)) double multiply_adds(Vector *sums)
{
    const Vector half = (Vector){0} + 0.5f;
    Vector c[CHAINS];
    memcpy(c, sums, sizeof c);
    for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < CHAINS; i++)
            c[i] = c[i] * half + half;
    memcpy(sums, c, sizeof c);
    return 2.0 * STEPS * CHAINS * LANES;
}

/* The same for numbers in bf16, by the fastest instruction there is. */
static __attribute__((noinline)) double bf16_multiply_adds(Vector *sums)
{
#if BF16_PAIRS && defined(HAVE_TILES)
    (void)sums;
    for (int step = 0; step < STEPS; step++) { /* of zeros, which take as long */
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
    }
    return 2.0 * STEPS * 4 * (16 * 16 * 32);
#elif BF16_PAIRS && defined(__AVX512BF16__)
    const __m512bh small = (__m512bh)_mm512_set1_epi32(0x3c003c00); /* 2^-7 */
    __m512 c[CHAINS];
    memcpy(c, sums, sizeof c);
    for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < CHAINS; i++)
            c[i] = _mm512_dpbf16_ps(c[i], small, small);
    memcpy(sums, c, sizeof c);
    return 2.0 * STEPS * CHAINS * 2 * LANES;
#else
    return multiply_adds(sums);
#endif
}

static double one_thread_gflops(double ms, bool bf16)
{
    Vector sums[CHAINS];
    memset(sums, 0, sizeof sums);
    multiply_adds(sums); /* wakes the clock and the vector units */
    if (bf16)
        tiles_begin();
    double start = now(), seconds, operations = 0;
    do {
        operations += bf16 ? bf16_multiply_adds(sums) : multiply_adds(sums);
        seconds = now() - start;
    } while (seconds < 1e-3 * ms);
    if (bf16)
        tiles_end();
    return operations / seconds * 1e-9;
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

enum { PIECE = (256 << 10) / sizeof(Vector) }; /* vectors read between two looks at the clock */

/* The sum of one piece, in the order in which it lies: a processor fetches ahead where addresses follow each other. */
static __attribute__((noinline)) Vector read_piece(const Vector *piece)
{
    enum { SUMS = 8 };
    Vector sum[SUMS] = {0}, total = {0};
    for (size_t i = 0; i < PIECE; i += SUMS)
        UNROLL for (int j = 0; j < SUMS; j++) sum[j] += piece[i + j];
    for (int j = 0; j < SUMS; j++)
        total += sum[j];
    return total;
}

/* Round and round; the threads take turns at the pieces. What is read again was last read 256 MiB ago. */
double read_burst_gb_per_s(int threads, double ms)
{
    static Vector *memory;
    static size_t begun;
    const size_t pieces = (256 << 20) / (PIECE * sizeof(Vector));
    if (!memory) {
        memory = (Vector *)allocate_floats(pieces * PIECE * LANES);
        memset(memory, 0,
               pieces * PIECE * sizeof(Vector)); /* pages never written to may all be the same one */
    }
    size_t all = 0;
    double gb_per_s = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : all, gb_per_s)
    for (int i = 0; i < threads; i++) {
        Vector total = {0};
        size_t read = 0;
        double start = now(), seconds;
        do {
            total += read_piece(memory + (begun + i + read++ * threads) % pieces * PIECE);
            seconds = now() - start;
        } while (seconds < 1e-3 * ms);
        all += read;
        /* All of it is 0. The sum is looked at, or a compiler might leave the reading out. */
        gb_per_s += total[0] == 0 ? 1e-9 * read * PIECE * sizeof(Vector) / seconds : 0;
    }
    begun += all;
    return gb_per_s;
}
