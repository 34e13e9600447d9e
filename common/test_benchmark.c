#include "benchmark.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Times ---- */

Test(benchmark, median_of_odd_and_even_counts)
{
    cr_assert(median((double[]){7}, 1) == 7);
    cr_assert(median((double[]){9, 1, 5}, 3) == 5);
    cr_assert(median((double[]){10, 1, 2, 4}, 4) == 3);
}

Test(benchmark, summary_of_100_times_in_any_order)
{
    double ms[100];
    for (int i = 0; i < 100; i++)
        ms[i] = (i * 37) % 100 + 1; /* 1 .. 100, each once */
    Timing t = summarise(ms, 100);
    cr_assert(t.ms_min == 1 && t.ms_median == 50.5 && t.ms_p95 == 95 && t.repeats == 100);
}

Test(benchmark, p95_is_the_nearest_rank)
{
    cr_assert(summarise((double[]){3}, 1).ms_p95 == 3);
    cr_assert(summarise((double[]){2, 1}, 2).ms_p95 == 2);
    double ten[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, twenty[20];
    cr_assert(summarise(ten, 10).ms_p95 == 10);
    for (int i = 0; i < 20; i++)
        twenty[i] = i + 1;
    cr_assert(summarise(twenty, 20).ms_p95 == 19);
}

Test(benchmark, clock_goes_forward_by_seconds)
{
    double start = now();
    usleep(20000);
    double seconds = now() - start;
    cr_assert(seconds >= 0.019 && seconds < 5);
}

Test(benchmark, peak_burst_lasts_as_long_as_asked_and_counts)
{
    double start = now(), one = peak_burst_gflops(1, 30, false), seconds = now() - start;
    cr_assert(seconds >= 0.03 && seconds < 3);
    cr_assert(one > 0.01 && one < 2000, "%g GFLOP/s", one);
    double two = peak_burst_gflops(2, 30, false);
    cr_assert(two > 0.01 && two < 4000, "%g GFLOP/s", two);
}

Test(benchmark, read_burst_lasts_as_long_as_asked_and_reads)
{
    read_burst_gb_per_s(1, 1); /* the first fills its memory */
    double start = now(), one = read_burst_gb_per_s(1, 30), seconds = now() - start;
    cr_expect(seconds > 0.03 && seconds < 1, "%g s", seconds);
    cr_expect(one > 0.1 && one < 2000, "%g GB/s: a compiler that leaves the reading out gets thousands", one);
    double two = read_burst_gb_per_s(2, 30);
    cr_expect(two > 0.3 * one && two < 4000, "%g GB/s with two threads, %g with one", two, one);
}

/* ---- The machine's name ---- */

Test(benchmark, machine_is_what_the_variable_says_on_one_line)
{
    setenv("MACHINE", "\tmy\tbig \n\n machine\r\n", 1);
    cr_assert_str_eq(machine_name(), "my big machine");
}

Test(benchmark, machine_is_the_processor_and_its_cores)
{
    for (int empty = 0; empty < 2; empty++) {
        if (empty)
            setenv("MACHINE", " \n", 1);
        else
            unsetenv("MACHINE");
        char cores[40];
        long count = sysconf(_SC_NPROCESSORS_ONLN);
        snprintf(cores, sizeof cores, ", %ld core%s", count, count == 1 ? "" : "s");
        const char *name = machine_name(), *comma = strstr(name, cores);
        cr_assert(comma && comma > name && comma[strlen(cores)] == '\0', "\"%s\"", name);
        cr_assert(!strpbrk(name, "\t\n"));
        cr_assert(strcspn(name, "0123456789") < (size_t)(comma - name) || strstr(name, "(NEON)") ||
                      strstr(name, "vectors)") || strstr(name, "no AVX2)"),
                  "\"%s\" does not say which processor", name);
    }
}

/* ---- TSV ---- */

static const char *columns[] = {
    "machine",         "chapter",    "kernel",    "device",      "dtype",      "pass",
    "batch",           "heads",      "kv_heads",  "tokens",      "key_tokens", "head_size",
    "embed",           "embed_out",  "mask",      "bias",        "dropout",    "threads",
    "repeats",         "ms_min",     "ms_median", "ms_p95",      "gflops",     "gb_per_s",
    "percent_of_peak", "pairs_kept", "peak_mib",  "max_abs_err", "checked",
};
enum { COLUMNS = sizeof columns / sizeof *columns };

static const BenchmarkRow example = {
    .chapter = "07_flash_tiled",
    .kernel = "simd",
    .device = "cpu",
    .dtype = "f32",
    .pass = "forward",
    .batch = 1,
    .heads = 12,
    .kv_heads = 4,
    .tokens = 1024,
    .key_tokens = 1025,
    .head_size = 64,
    .embed = 7,
    .embed_out = 8,
    .mask = "window:256",
    .bias = true,
    .dropout = 0.25,
    .threads = 2,
    .time = {1.25, 2.5, 3.75, 10},
    .gflops = 123.456,
    .gb_per_s = 0.5,
    .percent_of_peak = 86.5,
    .pairs_kept = 0.500488,
    .peak_mib = 1.5,
    .max_abs_err = 3.1e-7,
    .checked = "sample",
};

static char folder[64], path[128];

static void make_folder(void)
{
    strcpy(folder, "/tmp/test_benchmark.XXXXXX");
    cr_assert(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/rows.tsv", folder);
    setenv("MACHINE", "test machine", 1);
}

static void remove_folder(void)
{
    unlink(path);
    rmdir(folder);
}

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");
    cr_assert(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

/* The whole file, cut into lines; returns how many. */
static int read_lines(char lines[][1024], int most)
{
    FILE *file = fopen(path, "r");
    int count = 0;
    cr_assert(file);
    while (count < most && fgets(lines[count], 1024, file))
        count++;
    fclose(file);
    return count;
}

static void expect_cells(char *line, const char *const *expected)
{
    int count = 0;
    for (char *cell = line, *end; cell; cell = end, count++) {
        end = cell + strcspn(cell, "\t\n");
        bool last = *end == '\n';
        *end = '\0';
        cr_assert(count < COLUMNS);
        cr_assert_str_eq(cell, expected[count], "column %s: \"%s\", not \"%s\"", columns[count], cell,
                         expected[count]);
        end = last ? NULL : end + 1;
    }
    cr_assert(count == COLUMNS, "%d columns", count);
}

TestSuite(tsv, .init = make_folder, .fini = remove_folder);

Test(tsv, header_and_rows_have_the_designs_columns)
{
    static char lines[8][1024];
    const char *expected[COLUMNS] = {
        "test machine", "07_flash_tiled", "simd", "cpu",  "f32",     "forward",    "1",    "12",       "4",
        "1024",         "1025",           "64",   "7",    "8",       "window:256", "1",    "0.25",     "2",
        "10",           "1.25",           "2.5",  "3.75", "123.456", "0.5",        "86.5", "0.500488", "1.5",
        "3.1e-07",      "sample",
    };
    for (int i = 0; i < 3; i++)
        cr_assert_null(append_tsv(path, &example));
    cr_assert(read_lines(lines, 8) == 4);
    expect_cells(lines[0], columns);
    for (int i = 1; i < 4; i++)
        expect_cells(lines[i], expected);
}

Test(tsv, checking_makes_no_file)
{
    cr_assert_null(check_tsv(path));
    cr_assert(access(path, F_OK) != 0);
    cr_assert(chdir(folder) == 0);
    cr_assert_null(check_tsv("new.tsv"));
    cr_assert(access("new.tsv", F_OK) != 0);
}

Test(tsv, an_empty_file_gets_the_header)
{
    static char lines[8][1024];
    write_file("");
    cr_assert_null(check_tsv(path));
    cr_assert_null(append_tsv(path, &example));
    cr_assert(read_lines(lines, 8) == 2);
}

Test(tsv, a_row_starts_a_line_though_the_last_one_has_no_end)
{
    static char lines[8][1024];
    cr_assert_null(append_tsv(path, &example));
    struct stat status;
    cr_assert(stat(path, &status) == 0 && truncate(path, status.st_size - 1) == 0);
    cr_assert_null(append_tsv(path, &example));
    cr_assert(read_lines(lines, 8) == 3);
    cr_assert_str_eq(lines[1], lines[2]);
}

static void expect_refused(const char *name, const char *words)
{
    const char *check = check_tsv(name);
    cr_assert(check, "%s was not refused", name);
    cr_assert(strncmp(check, name, strlen(name)) == 0 && strstr(check, words) && !strchr(check, '\n'), "%s",
              check);
    const char *append = append_tsv(name, &example);
    cr_assert(append && strstr(append, words), "%s", append);
}

Test(tsv, a_file_with_another_header_is_refused_and_left_alone)
{
    static const char *const others[] = {"machine\tchapter\n", "some text of mine", "\n"};
    static char lines[8][1024], first[2048];
    for (int i = 0; i < 3; i++) {
        write_file(others[i]);
        expect_refused(path, "header");
        cr_assert(read_lines(lines, 8) == 1);
        cr_assert_str_eq(lines[0], others[i]);
    }
    write_file("");
    cr_assert_null(append_tsv(path, &example));
    read_lines(lines, 8);
    lines[0][strlen(lines[0]) - 1] = '\0';
    snprintf(first, sizeof first, "%s\tone more\n", lines[0]);
    write_file(first);
    expect_refused(path, "header");
}

Test(tsv, what_is_no_file_is_refused)
{
    char name[256];
    expect_refused(folder, "folder");
    expect_refused("/dev/null", "ordinary file");
    snprintf(name, sizeof name, "%s/absent/rows.tsv", folder);
    expect_refused(name, "does not exist");
    snprintf(name, sizeof name, "%s/", folder);
    expect_refused(name, "folder");
    snprintf(name, sizeof name, "%s/new/", folder);
    expect_refused(name, "names no file");
    expect_refused("", "names no file");
    write_file("");
    snprintf(name, sizeof name, "%s/below", path);
    expect_refused(name, "give the name of a file");
}

static bool refused(const char *name, const char *words)
{
    const char *wrong = check_tsv(name);
    return wrong && strstr(wrong, words) && append_tsv(name, &example);
}

/* In a process of its own that stops being root, to whom nothing is forbidden. */
Test(tsv, what_may_not_be_written_to_is_refused)
{
    write_file("");
    cr_assert(chmod(path, 0444) == 0 && chmod(folder, 0555) == 0);
    pid_t child = fork();
    if (child == 0) {
        char name[256];
        snprintf(name, sizeof name, "%s/new.tsv", folder);
        bool ordinary_user = geteuid() != 0 || setuid(65534) == 0;
        _exit(ordinary_user && refused(path, "may be written to") && refused(name, "may not be written to")
                  ? 0
                  : 1);
    }
    int status;
    cr_assert(waitpid(child, &status, 0) == child && status == 0);
    chmod(folder, 0755);
}

/* ---- Rows for people ---- */

Test(benchmark, printed_rows_fit_and_line_up)
{
    char text[4096] = "";
    FILE *file = tmpfile();
    int out = dup(STDOUT_FILENO);
    fflush(stdout);
    cr_assert(file && dup2(fileno(file), STDOUT_FILENO) >= 0);
    print_row_header();
    print_row(&example);
    BenchmarkRow large = example;
    large.kernel = "torch-mha-noweights";
    large.time = (Timing){12345.678, 23456.789, 34567.891, 10};
    large.gflops = 98765.4;
    large.peak_mib = 43210.9;
    large.checked = "all";
    print_row(&large);
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    rewind(file);
    cr_assert(fread(text, 1, sizeof text - 1, file) > 0);

    int lines = 0, rate_ends[3] = {0};
    for (char *line = strtok(text, "\n"); line && lines < 3; line = strtok(NULL, "\n"), lines++) {
        cr_assert(strlen(line) < 110, "%zu letters: %s", strlen(line), line);
        const char *rate = strstr(line, lines == 0 ? "GFLOP/s" : lines == 1 ? "123.5" : "98765.4");
        cr_assert(rate, "%s", line);
        rate_ends[lines] = (int)(rate - line) + (lines == 1 ? 5 : 7);
    }
    cr_assert(lines == 3 && rate_ends[0] == rate_ends[1] && rate_ends[0] == rate_ends[2], "%d %d %d",
              rate_ends[0], rate_ends[1], rate_ends[2]);
}
