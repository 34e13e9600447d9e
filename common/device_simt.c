/* The stand-in's device: its memory is this machine's, and a kernel has finished when its launch returns. */
#include "benchmark.h"
#include "device.h"
#include "error.h"
#include "memory.h"

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

static double peak_gflops(double ms, bool bf16)
{
    (void)ms;
    (void)bf16;
    return 0;
}

const Accelerator accelerator_simt = {
    .name = "simt",
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
