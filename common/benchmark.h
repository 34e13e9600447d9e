/* Timing: warm-up, repeats, median and spread; this machine's multiply-add peak; rows of a TSV file. */
#ifndef COMMON_BENCHMARK_H
#define COMMON_BENCHMARK_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds on a clock that never goes back. */
double now(void);

typedef struct {
    double ms_min, ms_median, ms_p95;
    int repeats;
} Timing;

/* Sorts the n >= 1 times (in ms) and sums them up; the 95th percentile is the nearest rank. */
Timing summarise(double *ms, int n);
double median(double *values, int n); /* sorts them */

/* GFLOP/s of a burst of independent float32 multiply-adds on `threads` threads at once, about `ms`
 * milliseconds long, as wide as this build's vectors are; bf16: of multiply-adds of bf16 into float32, where the
 * processor has an instruction for them, else the same. Take bursts right before and after what is timed: clocks
 * wander. */
double peak_burst_gflops(int threads, double ms, bool bf16);

/* GB/s (10^9 bytes) that `threads` threads read at once, one address after the other, for about `ms` milliseconds. The
 * memory is 256 MiB, kept from the first call on; each call goes on where the last one ended, or it would find in a large
 * cache what that one has read. */
double read_burst_gb_per_s(int threads, double ms);

/* The machine's name for charts and TSV rows: $MACHINE, or the processor's name and the number of cores. */
const char *machine_name(void);

/* One row of results, its columns as the design's TSV names them. machine: NULL stands for machine_name(). */
typedef struct {
    const char *machine, *chapter, *kernel, *device, *dtype, *pass;
    int batch, heads, kv_heads, tokens, key_tokens, head_size, embed, embed_out;
    char mask[64];
    bool bias;
    double dropout;
    int threads;
    Timing time;
    double gflops, gb_per_s, percent_of_peak, pairs_kept, peak_mib, max_abs_err;
    const char *checked; /* "all" or "sample" */
    double
        percent_of_reading; /* of read_burst_gb_per_s(); 0: reading is not what holds it up. For people only */
} BenchmarkRow;

/* Appends the row to the file, with the header line first when the file is new or empty. A file whose first
 * line is another header is refused. Returns NULL, or what is wrong (one line, a static buffer). */
const char *check_tsv(const char *path); /* could a row be appended? asked before anything is computed */
const char *append_tsv(const char *path, const BenchmarkRow *row);

/* For people, on stdout: kernel, median, spread, GFLOP/s, percent of peak, memory, error. Header first. */
void print_row_header(void);
void print_row(const BenchmarkRow *row);

#ifdef __cplusplus
}
#endif

#endif
