/* The devices whose memory is this machine's, and whose kernels have finished when their launch returns: the stand-in, and
 * this processor for kernels in bf16. What these read and write lies in memory of its own, 16 bits a number, beside the
 * float32 tensors that the oracle reads; copying is not timed, as no device's upload is. */
#include "benchmark.h"
#include "device.h"
#include "error.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const char *missing(void)
{
    return NULL;
}

static void *allocate(size_t bytes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 256, bytes ? bytes : 1) !=
        0) /* no byte more: its bounds are watched by sanitizers */
        die(EXIT_UNAVAILABLE, "no room for %s; take a smaller --batch or fewer --tokens",
            bytes_text((double)bytes));
    return memory;
}

static void copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static void fill_with_nan(void *floats, size_t bytes)
{
    memset(floats, 0xFF, bytes);
}

static void finish(void)
{
}

static double time_ms(void (*run)(void *context), void *context)
{
    double start = now();
    run(context);
    return 1e3 * (now() - start);
}

static double no_peak(double ms, bool bf16)
{
    (void)ms;
    (void)bf16;
    return 0;
}

static double peak_gflops(double ms, bool bf16)
{
    return peak_burst_gflops(omp_get_max_threads(), ms, bf16);
}

/* To the nearest with 13 bits less; ties away from zero, as cvt.rna.tf32 has them. */
static float *rounded_to_tf32(const float *from, size_t count)
{
    float *to = allocate_floats(count);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        bits = (bits + 0x1000) & ~(uint32_t)0x1FFF;
        memcpy(to + i, &bits, sizeof bits);
    }
    return to;
}

static void multiply(float *out, const float *a, const float *b, int n, bool tf32)
{
    if (!tf32) {
        matmul('N', 'N', n, n, n, 1, a, n, b, n, 0, out, n);
        return;
    }
    float *a_rounded = rounded_to_tf32(a, (size_t)n * n), *b_rounded = rounded_to_tf32(b, (size_t)n * n);
    matmul('N', 'N', n, n, n, 1, a_rounded, n, b_rounded, n, 0, out, n);
    free(a_rounded);
    free(b_rounded);
}

#define HERE                                                                                                 \
    .missing = missing, .machine = machine_name, .free_memory = available_memory, .allocate = allocate,      \
    .release = free, .copy_to = copy, .copy_from = copy, .fill_with_nan = fill_with_nan, .finish = finish,   \
    .time_ms = time_ms

const Accelerator accelerator_simt = {.name = "simt", HERE, .peak_gflops = no_peak, .multiply = multiply};
const Accelerator accelerator_cpu = {.name = "cpu", HERE, .peak_gflops = peak_gflops};
