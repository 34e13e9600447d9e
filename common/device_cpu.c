/* This processor as a device: what a kernel in bf16 reads and writes lies in memory of its own, 16 bits a number, beside
 * the float32 tensors that the oracle reads. Copying is not timed, as no device's upload is. */
#include "benchmark.h"
#include "device.h"
#include "error.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static const char *missing(void)
{
    return NULL;
}

static void *allocate(size_t bytes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1) != 0)
        die(EXIT_UNAVAILABLE, "not enough memory for %s; take smaller sizes", bytes_text((double)bytes));
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

static double peak_gflops(double ms, bool bf16)
{
#ifdef _OPENMP
    int threads = omp_get_max_threads();
#else
    int threads = 1;
#endif
    return peak_burst_gflops(threads, ms, bf16);
}

const Accelerator accelerator_cpu = {
    .name = "cpu",
    .missing = missing,
    .machine = machine_name,
    .free_memory = available_memory,
    .allocate = allocate,
    .release = free,
    .copy_to = copy,
    .copy_from = copy,
    .fill_with_nan = fill_with_nan,
    .finish = finish,
    .time_ms = time_ms,
    .peak_gflops = peak_gflops,
};
