#include "benchmark.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

/* ---- Time ---- */

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, int n)
{
    qsort(values, n, sizeof *values, compare_doubles);
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

Timing summarise(double *ms, int n)
{
    double middle = median(ms, n);
    int rank = (95 * n + 99) / 100; /* 95% of n, rounded up */
    return (Timing){.ms_min = ms[0], .ms_median = middle, .ms_p95 = ms[rank - 1], .repeats = n};
}

/* ---- The machine's name ---- */

/* The processor's name as the system tells it; empty where it tells none. */
static void processor_name(char *name, size_t size)
{
    name[0] = '\0';
#ifdef __APPLE__
    if (sysctlbyname("machdep.cpu.brand_string", name, &size, NULL, 0) != 0)
        name[0] = '\0';
#else
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file && !name[0] && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':'))
            snprintf(name, size, "%s", strchr(line, ':') + 1);
    if (file)
        fclose(file);
#endif
}

static const char *vector_instructions(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f") ? "AVX-512"
           : __builtin_cpu_supports("avx2")  ? "AVX2"
                                             : "no AVX2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "unknown vectors";
#endif
}

/* One cell of a TSV: every run of blanks, tabs and line ends becomes one space, none at either end. */
static void one_line(char *text)
{
    char *to = text;
    for (const char *from = text; *from; from++) {
        bool blank = (unsigned char)*from <= ' ';
        if (!blank)
            *to++ = *from;
        else if (to > text && to[-1] != ' ')
            *to++ = ' ';
    }
    if (to > text && to[-1] == ' ')
        to--;
    *to = '\0';
}

const char *machine_name(void)
{
    static char name[200];
    char processor[128];
    const char *given = getenv("MACHINE");
    snprintf(name, sizeof name, "%s", given ? given : "");
    one_line(name);
    if (name[0])
        return name;

    processor_name(processor, sizeof processor);
    one_line(processor);
    bool vague = !strpbrk(processor, "0123456789"); /* "AMD EPYC", as virtual machines say: which one? */
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    snprintf(name, sizeof name, "%s%s%s%s, %ld core%s", processor[0] ? processor : "unnamed processor",
             vague ? " (" : "", vague ? vector_instructions() : "", vague ? ")" : "", cores,
             cores == 1 ? "" : "s");
    return name;
}

/* ---- Rows of a TSV file ---- */

static const char header[] = "machine\tchapter\tkernel\tdevice\tdtype\tpass\tbatch\theads\tkv_"
                             "heads\ttokens\tkey_tokens\thead_size\tembed\t"
                             "embed_out\tmask\tbias\tdropout\tthreads\trepeats\tms_min\tms_median\tms_"
                             "p95\tgflops\tgb_per_s\tpercent_of_peak\t"
                             "pairs_kept\tpeak_mib\tmax_abs_err\tchecked\n";

static char problem[512];

static const char *cannot(const char *path, const char *why)
{
    snprintf(problem, sizeof problem, "%s: %s", path, why);
    return problem;
}

static const char *cannot_write(const char *path)
{
    snprintf(problem, sizeof problem, "%s: %s; give the name of a file that may be written to", path,
             strerror(errno));
    return problem;
}

/* Is this what a row can be appended to: an ordinary file, empty or with our header? */
static const char *look_at(const char *path, int file, struct stat *status)
{
    char start[sizeof header - 1];
    if (fstat(file, status) != 0)
        return cannot_write(path);
    if (S_ISDIR(status->st_mode))
        return cannot(path, "is a folder; give the name of a file in it");
    if (!S_ISREG(status->st_mode))
        return cannot(path, "is not an ordinary file; give the name of one");
    if (status->st_size > 0 && (pread(file, start, sizeof start, 0) != (ssize_t)sizeof start ||
                                memcmp(start, header, sizeof start) != 0))
        return cannot(path, "its first line is not this benchmark's header; give the name of a new file");
    return NULL;
}

const char *check_tsv(const char *path)
{
    struct stat status;
    int file = open(path, O_RDWR | O_APPEND | O_NONBLOCK);
    if (file >= 0) {
        const char *wrong = look_at(path, file, &status);
        close(file);
        return wrong;
    }
    if (errno == EISDIR)
        return cannot(path, "is a folder; give the name of a file in it");
    if (errno != ENOENT)
        return cannot_write(path);

    /* It will be made: nothing is written now, but its folder must be there and let us write. */
    char folder[4096];
    const char *slash = strrchr(path, '/');
    int length = slash == path ? 1 : slash ? (int)(slash - path) : 0;
    snprintf(folder, sizeof folder, "%.*s", length ? length : 1, length ? path : ".");
    if (!path[0] || (slash && !slash[1]))
        return cannot(path, "names no file; give the name of one");
    if (access(folder, F_OK) != 0)
        return cannot(path, "its folder does not exist; make the folder first");
    if (access(folder, W_OK | X_OK) != 0)
        return cannot(path, "its folder may not be written to; choose another one");
    return NULL;
}

const char *append_tsv(const char *path, const BenchmarkRow *row)
{
    const char *wrong = check_tsv(path);
    if (wrong)
        return wrong;
    int file = open(path, O_RDWR | O_APPEND | O_CREAT, 0666);
    if (file < 0)
        return cannot_write(path);
    flock(file, LOCK_EX); /* two programs may begin the same file at once; closing it lets go */
    struct stat status;
    wrong = look_at(path, file, &status);
    if (wrong) {
        close(file);
        return wrong;
    }

    char last = '\n', text[4096];
    if (status.st_size > 0 && pread(file, &last, 1, status.st_size - 1) != 1)
        last = '\n';
    int length = snprintf(
        text, sizeof text,
        "%s%s%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%d\t%g\t%d\t%d\t%.6g\t%.6g\t%.6g\t%."
        "6g\t"
        "%.6g\t%.4g\t%.10g\t%.6g\t%.3g\t%s\n",
        status.st_size == 0 ? header : "", last == '\n' ? "" : "\n",
        row->machine ? row->machine : machine_name(), row->chapter, row->kernel, row->device, row->dtype,
        row->pass, row->batch, row->heads, row->kv_heads, row->tokens, row->key_tokens, row->head_size,
        row->embed, row->embed_out, row->mask, row->bias, row->dropout, row->threads, row->time.repeats,
        row->time.ms_min, row->time.ms_median, row->time.ms_p95, row->gflops, row->gb_per_s,
        row->percent_of_peak, row->pairs_kept, row->peak_mib, row->max_abs_err, row->checked);
    if (length >= (int)sizeof text)
        wrong = cannot(path, "a row of more than 4096 letters");
    else {
        ssize_t written = write(file, text, length);
        if (written != length) {
            if (written >= 0)
                errno = ENOSPC;
            wrong = cannot_write(path);
            if (ftruncate(file, status.st_size) != 0)
                wrong = cannot(path, "the disk is full, and half a row stands at the end of the file");
        }
    }
    if (close(file) != 0 && !wrong)
        wrong = cannot_write(path);
    return wrong;
}

/* ---- Rows for people ---- */

void print_row_header(void)
{
    printf("%-20s %10s  %-20s %9s %8s %12s  %s\n", "kernel", "median ms", "fastest .. 95%", "GFLOP/s",
           "of peak", "memory", "max error");
}

static int decimals(double ms)
{
    return ms < 1 ? 4 : ms < 100 ? 2 : 0;
}

void print_row(const BenchmarkRow *row)
{
    char spread[64];
    const Timing *t = &row->time;
    char reading[64] = "";
    if (row->percent_of_reading > 0)
        snprintf(reading, sizeof reading, "  %.1f GB/s, %.0f%% of reading", row->gb_per_s,
                 row->percent_of_reading);
    const char *sample = strcmp(row->checked, "sample") == 0 ? " (sample)" : "";
    snprintf(spread, sizeof spread, "%.*f .. %.*f", decimals(t->ms_min), t->ms_min, decimals(t->ms_p95),
             t->ms_p95);
    printf("%-20s %10.*f  %-20s %9.1f %7.1f%% %8.2f MiB  %.1e%s%s\n", row->kernel, decimals(t->ms_median),
           t->ms_median, spread, row->gflops, row->percent_of_peak, row->peak_mib, row->max_abs_err, sample,
           reading);
}
