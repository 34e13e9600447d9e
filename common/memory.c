#include "memory.h"
#include "error.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Much memory is asked for in pages of 2 MiB: with the usual 4 KiB a processor that reads as fast as it can waits for
 * the places of its pages as well. Where the system has no such pages nothing changes. */
static const size_t large_page = 2 << 20;

float *allocate_floats(size_t n)
{
    void *memory = NULL;
    if (n == 0)
        n = 1;
    bool large = n >= 2 * large_page / sizeof(float);
    if (n > SIZE_MAX / sizeof(float) ||
        posix_memalign(&memory, large ? large_page : 64, n * sizeof(float)) != 0)
        die(EXIT_UNAVAILABLE, "not enough memory for %s; take smaller sizes", bytes_text(4.0 * (double)n));
#ifdef MADV_HUGEPAGE
    if (large)
        madvise(memory, n * sizeof(float), MADV_HUGEPAGE);
#endif
    return memory;
}

void *allocate_zeroed(size_t n, size_t size)
{
    void *memory = calloc(n ? n : 1, size);
    if (!memory)
        die(EXIT_UNAVAILABLE, "not enough memory for %s; take smaller sizes",
            bytes_text((double)n * (double)size));
    return memory;
}

/* The first whole number in a file that `format` reads, or -1. */
static long long read_number(const char *path, const char *format)
{
    long long number = -1;
    char line[256];
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, format, &number) == 1)
            break;
    if (file)
        fclose(file);
    return number;
}

size_t available_memory(void)
{
    double bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    long long kib = read_number("/proc/meminfo", "MemAvailable: %lld");
    if (kib >= 0)
        bytes = 1024.0 * (double)kib;
    /* A container may have less than its machine. */
    long long limit = read_number("/sys/fs/cgroup/memory.max", "%lld");
    long long used = read_number("/sys/fs/cgroup/memory.current", "%lld");
    if (limit > 0 && used >= 0 && (double)(limit - used) < bytes)
        bytes = limit > used ? (double)(limit - used) : 0;
    return (size_t)bytes;
}

const char *bytes_text(double bytes)
{
    static char texts[4][32];
    static int turn;
    char *text = texts[turn++ % 4];
    if (bytes >= 0.1 * (1 << 30))
        snprintf(text, sizeof texts[0], "%.1f GiB", bytes / (1 << 30));
    else if (bytes >= 0.1 * (1 << 20))
        snprintf(text, sizeof texts[0], "%.1f MiB", bytes / (1 << 20));
    else
        snprintf(text, sizeof texts[0], "%.1f KiB", bytes / (1 << 10));
    return text;
}
