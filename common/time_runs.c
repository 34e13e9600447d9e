#include "memory.h"
#include "run.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The ceiling right now: the device's own, or this processor's. */
static double peak_gflops(const Run *run, int threads, double ms)
{
    return run->device ? run->device->peak_gflops(ms, run->kernel->bf16)
                       : peak_burst_gflops(threads, ms, false);
}

/* How fast memory can be read right now, if that is what holds the run up: with fewer operations to a byte than any
 * processor does in the time in which it reads one. Else, and on a device, 0. */
static double read_gb_per_s(const Run *run, int threads, double ms)
{
    const double few = 8;
    bool waits = !run->device && run_flops(run, run->pass) < few * run_bytes(run, run->pass);
    return waits ? read_burst_gb_per_s(threads, ms) : 0;
}

static double seconds_of(Run *run)
{
    if (run->device) {
        double seconds = 1e-3 * run->device->time_ms(launch_run, run);
        run->device->finish(); /* what went wrong is told here */
        return seconds;
    }
    double start = now();
    launch_run(run);
    return now() - start;
}

void time_runs(BenchmarkRow *row, Run *const *runs, int count, const Chapter *chapter, int repeat,
               int threads)
{
    static const char *const pass_names[] = {"forward", "backward", "both"};
    const double burst_ms = 4;
    bool terminal = isatty(STDERR_FILENO);
    double *ms = allocate_zeroed((size_t)count * repeat, sizeof *ms);
    double *share = allocate_zeroed((size_t)count * repeat, sizeof *share);
    double *of_reading = allocate_zeroed((size_t)count * repeat, sizeof *of_reading);
    const int first = repeat > 1 ? -1 : 0; /* -1 warms up; of one long run its check did */
    for (int round = first; round < repeat; round++)
        for (int i = 0; i < count; i++) {
            if (terminal)
                fprintf(stderr, "\r\033[Ktiming %s, round %d of %d", runs[i]->kernel->name, round + 1,
                        repeat);
            Pass pass = runs[i]->pass;
            if (pass == PASS_BACKWARD)
                forward_run(runs[i]); /* backward may use up what forward left */
            double before = peak_gflops(runs[i], threads, burst_ms);
            double read_before = read_gb_per_s(runs[i], threads, burst_ms);
            double seconds = seconds_of(runs[i]);
            double read_after = read_gb_per_s(runs[i], threads, burst_ms);
            double after = peak_gflops(runs[i], threads, burst_ms);
            if (round < 0)
                continue;
            ms[i * repeat + round] = 1e3 * seconds;
            double peak = 0.5 * (before + after);
            share[i * repeat + round] = peak > 0 ? 100 * 1e-9 * run_flops(runs[i], pass) / seconds / peak : 0;
            double read = 0.5 * (read_before + read_after);
            of_reading[i * repeat + round] =
                read > 0 ? 100 * 1e-9 * run_bytes(runs[i], pass) / seconds / read : 0;
        }
    if (terminal)
        fprintf(stderr, "\r\033[K");

    for (int i = 0; i < count; i++) {
        const Run *run = runs[i];
        const AttentionShape *s = &run->problem.shape;
        row[i] = (BenchmarkRow){
            .chapter = chapter->folder,
            .kernel = run->kernel->name,
            .machine = run->device ? run->device->machine() : machine_name(),
            .device = run->device ? run->device->name : "cpu",
            .dtype = run->kernel->bf16 ? "bf16" : "f32",
            .pass = pass_names[run->pass],
            .batch = s->batch,
            .heads = s->heads,
            .kv_heads = s->kv_heads,
            .tokens = s->tokens,
            .key_tokens = s->key_tokens,
            .head_size = s->head_size,
            .embed = s->embed,
            .embed_out = s->embed_out,
            .bias = s->bias != NULL,
            .dropout = s->dropout,
            .threads = threads,
            .time = summarise(ms + (size_t)i * repeat, repeat),
            .percent_of_peak = median(share + (size_t)i * repeat, repeat),
            .pairs_kept = count_pairs(s) / (double)weights_count(s),
            .peak_mib = (double)run->extra_bytes / (1 << 20),
            .max_abs_err = run->pass == PASS_FORWARD ? run->out.max_abs : run->gradient.max_abs,
            .percent_of_reading = median(of_reading + (size_t)i * repeat, repeat),
            .checked = run->sampled ? "sample" : "all",
        };
        mask_text(row[i].mask, sizeof row[i].mask, s);
        row[i].gflops = 1e-6 * run_flops(run, run->pass) / row[i].time.ms_median;
        row[i].gb_per_s = 1e-6 * run_bytes(run, run->pass) / row[i].time.ms_median;
    }
    free(ms);
    free(share);
    free(of_reading);
}
