#include "chapter.h"
#include "error.h"
#include "matmul.h"
#include "memory.h"
#include "run.h"
#include "story.h"
#include "threads.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int use_threads(int wanted)
{
#ifdef _OPENMP
    int threads = wanted ? wanted : omp_get_num_procs();
    omp_set_dynamic(0);
    omp_set_num_threads(threads);
    return threads;
#else
    if (wanted > 1)
        die(EXIT_UNAVAILABLE, "this build has no OpenMP, so it runs 1 thread, not --threads %d", wanted);
    return 1;
#endif
}

const Kernel *kernel_named(const Chapter *chapter, const char *name)
{
    const Kernel *kernel = chapter->kernels;
    while (kernel->name && strcmp(kernel->name, name) != 0)
        kernel++;
    return kernel->name ? kernel : NULL;
}

/* The row that stands for this one's name under --dtype: the other dtype's, where the name has two. */
static bool other_dtype(const Chapter *chapter, const Kernel *kernel, bool bf16)
{
    if (kernel->bf16 == bf16)
        return false;
    for (const Kernel *k = chapter->kernels; k->name; k++)
        if (k->bf16 == bf16 && strcmp(k->name, kernel->name) == 0)
            return true;
    return false;
}

/* The i-th kernel: the CPU's, then those that only devices have and this build can list; NULL behind the last. */
static const Kernel *listed(const Chapter *chapter, int i)
{
    for (const Kernel *k = chapter->kernels; k->name; k++)
        if (!other_dtype(chapter, k, false) && i-- == 0)
            return k;
    for (const DeviceKernels *file = chapter->device_kernels; file->names; file++)
        for (const Kernel *k = file->simt ? file->simt : file->cuda; k && k->name; k++)
            if (!kernel_named(chapter, k->name) && i-- == 0)
                return k;
    return NULL;
}

static void print_help(const Chapter *chapter)
{
    printf("Chapter %d: %s\n\n", chapter->number, chapter->title);
    printf("  ./run              the chapter's story: its numbers, checked, then one timing\n");
    printf("  ./run [options]    runs the kernels on the problem named, checks them against the oracle\n");
    for (const ChapterMode *mode = chapter->modes; mode && mode->word; mode++)
        printf("  ./run %-12s %s\n", mode->word, mode->what);
    printf("\nKernels:\n");
    const Kernel *k;
    for (int i = 0; (k = listed(chapter, i)); i++)
        printf("  %-20s takes %-4s %s%s\n", k->name, k->takes == TAKES_X ? "x;" : "qkv;", k->what,
               kernel_named(chapter, k->name) ? ""
               : k->bf16                      ? "; --device simt or cuda, --dtype bf16"
                                              : "; --device simt or cuda");
    printf("\nOptions:\n");
    print_options(stdout);
    printf("\nExit code: 0 all checks passed, 1 a check failed, 2 bad usage or input, 3 no such device or "
           "memory.\n");
}

/* Is name one of the words? */
static bool has_word(const char *words, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = words; length && (at = strstr(at, name)); at += length)
        if ((at == words || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0'))
            return true;
    return false;
}

/* "cpu,simt,cuda(no-device)": where a kernel is. */
static void print_devices(const Chapter *chapter, const char *name)
{
    bool on_cpu = kernel_named(chapter, name);
    const char *before = on_cpu ? "," : "";
    printf("%s", on_cpu ? "cpu" : "");
    for (const DeviceKernels *file = chapter->device_kernels; file->names; file++)
        for (Device device = DEVICE_SIMT; has_word(file->names, name) && device <= DEVICE_CUDA; device++) {
            const char *missing = device_missing(device);
            printf("%s%s%s%s%s", before, device_name(device), missing ? "(" : "", missing ? missing : "",
                   missing ? ")" : "");
            before = ",";
        }
}

static void print_list(const Chapter *chapter)
{
    const Kernel *k;
    for (int i = 0; (k = listed(chapter, i)); i++) {
        printf("%s %s %s %s ", k->name, k->takes == TAKES_X ? "x" : "qkv",
               k->backward ? "forward,backward" : "forward",
               k->bf16                         ? "bf16"
               : other_dtype(chapter, k, true) ? "f32,bf16"
                                               : "f32");
        print_devices(chapter, k->name);
        printf("\n");
    }
}

/* Where the kernels will run. Ends the program where nothing can. */
static Device choose_device(const Chapter *chapter, Device wanted)
{
    bool auto_cuda = wanted == DEVICE_AUTO && chapter->device_kernels[0].cuda && !device_missing(DEVICE_CUDA);
    Device device = wanted != DEVICE_AUTO ? wanted : auto_cuda ? DEVICE_CUDA : DEVICE_CPU;
    const char *missing = device_missing(device);
    if (missing)
        die(EXIT_UNAVAILABLE, "--device %s cannot be had here (%s); take --device cpu", device_name(device),
            missing);
    return device;
}

static void reject_unknown_kernel(const Chapter *chapter, const char *name)
{
    char names[512] = "";
    if (kernel_named(chapter, name))
        return;
    for (const DeviceKernels *file = chapter->device_kernels; chapter->device == DEVICE_CPU && file->names;
         file++)
        if (has_word(file->names, name))
            die(EXIT_USAGE, "kernel %s runs on --device simt or cuda, not cpu", name);
    for (const Kernel *k = chapter->kernels; k->name; k++)
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *names ? ", " : "", k->name);
    die(EXIT_USAGE, "chapter %d has no kernel \"%.40s\"%s%s; it has %s", chapter->number, name,
        chapter->device == DEVICE_CPU ? "" : " for --device ",
        chapter->device == DEVICE_CPU ? "" : device_name(chapter->device), names);
}

/* Makes the folder if it is absent, and its parents, and tries to write into it. */
static void try_folder(const char *folder)
{
    char path[4096];
    if (strlen(folder) > 3900)
        die(EXIT_USAGE, "--save takes a path of at most 3900 characters");
    snprintf(path, sizeof path, "%s", folder);
    for (char *slash = path + 1;; slash++)
        if (*slash == '/' || *slash == '\0') {
            char was = *slash;
            *slash = '\0';
            if (mkdir(path, 0777) != 0 && errno != EEXIST)
                die(EXIT_USAGE, "--save cannot make the folder %s: %s; name one that can be written", path,
                    strerror(errno));
            *slash = was;
            if (!was)
                break;
        }
    snprintf(path, sizeof path, "%s/.try-XXXXXX", folder);
    int file = mkstemp(path);
    if (file < 0)
        die(EXIT_USAGE, "--save cannot write into %s: %s; name a folder that can be written", folder,
            strerror(errno));
    close(file);
    unlink(path);
}

static bool all_kernels(const Options *o)
{
    return !o->kernel || strcmp(o->kernel, "all") == 0;
}

/* Runs what was asked for: each kernel against the oracle, then --save, then --bench. */
static int compute(const Chapter *chapter, const Options *o, int threads)
{
    int count = 0, opened = 0, failed = 0;
    for (const Kernel *k = chapter->kernels; k->name; k++)
        count++;
    Run *runs = allocate_zeroed(count, sizeof *runs);
    Run **open = allocate_zeroed(count, sizeof *open);
    BenchmarkRow *rows = allocate_zeroed(count, sizeof *rows);
    Refusal refusal = {0};

    if (o->save)
        try_folder(o->save);
    for (int i = 0; i < count; i++) {
        const Kernel *kernel = &chapter->kernels[i];
        if (!all_kernels(o) && strcmp(o->kernel, kernel->name) != 0)
            continue;
        if (other_dtype(chapter, kernel, o->dtype == DTYPE_BF16))
            continue;
        Refusal here = open_run(&runs[i], chapter, kernel, o, opened ? open[opened - 1] : NULL, 1);
        if (here.exit_code == 0)
            open[opened++] = &runs[i];
        else {
            refusal = here;
            if (!all_kernels(o))
                die(here.exit_code, "kernel %s %s", kernel->name, here.reason);
            printf("- %-14s skipped: %s\n", kernel->name, here.reason);
        }
    }
    if (opened == 0)
        die(refusal.exit_code, "no kernel of chapter %d can do this; the last one %s", chapter->number,
            refusal.reason);

    char text[400], problem[200] = "", last[200] = "";
    for (int i = 0; i < opened; i++) {
        problem_text(problem, sizeof problem, open[i]);
        if (strcmp(problem, last) != 0)
            printf("%s\n", problem);
        snprintf(last, sizeof last, "%s", problem);
        bool passed = check_run(open[i]);
        check_text(text, sizeof text, open[i]);
        printf("%s %-14s %s\n", passed ? "✓" : "✗", open[i]->kernel->name, text);
        failed += !passed;
        if (o->save) {
            char folder[4096];
            if (all_kernels(o)) {
                snprintf(folder, sizeof folder, "%s/%s", o->save, open[i]->kernel->name);
                try_folder(folder);
            } else
                snprintf(folder, sizeof folder, "%s", o->save);
            const char *wrong = save_run(open[i], folder);
            if (wrong)
                die(EXIT_USAGE, "--save %s", wrong);
        }
    }
    if (o->bench && !failed) {
        if (chapter->device != DEVICE_CPU)
            printf("%s\n", open[0]->device->machine());
        else
            printf("%s; %s; %d thread%s\n", machine_name(), matmul_library(), threads,
                   threads > 1 ? "s" : "");
        time_runs(rows, open, opened, chapter, o->repeat, threads);
        print_row_header();
        for (int i = 0; i < opened; i++) {
            print_row(&rows[i]);
            const char *wrong = o->tsv ? append_tsv(o->tsv, &rows[i]) : NULL;
            if (wrong)
                die(EXIT_USAGE, "--tsv %s", wrong);
        }
    }
    while (opened > 0) /* the first holds what the others share */
        close_run(open[--opened]);
    free(runs);
    free(open);
    free(rows);
    return failed ? EXIT_CHECK_FAILED : EXIT_PASSED;
}

static int check(const Chapter *chapter, const Options *o)
{
    char text[600];
    int failed = 0, count = check_count(chapter), ran = 0;
    bool terminal = isatty(STDOUT_FILENO);
    for (int i = 0; i < count; i++) {
        if (!all_kernels(o) && !check_names_kernel(chapter, i, o->kernel))
            continue;
        bool passed = check_case(chapter, i, text, sizeof text);
        ran++;
        failed += !passed;
        if (terminal && passed)
            printf("\r\033[K%.90s", text);
        else
            printf("%s%s\n", terminal ? "\r\033[K" : "", text);
        fflush(stdout);
    }
    printf("%s%d of %d checks passed\n", terminal ? "\r\033[K" : "", ran - failed, ran);
    return failed ? EXIT_CHECK_FAILED : EXIT_PASSED;
}

int chapter_main(int argc, char **argv, const Chapter *chapter)
{
    choose_blas_core(argv);
    for (const ChapterMode *mode = chapter->modes; mode && mode->word && argc > 1; mode++)
        if (strcmp(argv[1], mode->word) == 0) {
            use_threads(0);
            return mode->run(argc - 2, argv + 2);
        }
    Options options;
    parse_options(&options, argc, argv);
    int exit_code = EXIT_PASSED;
    if (options.help)
        print_help(chapter);
    else if (options.list)
        print_list(chapter);
    else {
        options.device = choose_device(chapter, options.device);
        Kernel rows[MAX_DEVICE_ROWS];
        Chapter on_device;
        if (options.device != DEVICE_CPU) {
            on_device = chapter_on(chapter, options.device, rows);
            chapter = &on_device;
        }
        if (!all_kernels(&options))
            reject_unknown_kernel(chapter, options.kernel);
        const char *wrong = options.tsv ? check_tsv(options.tsv) : NULL;
        if (wrong)
            die(EXIT_USAGE, "--tsv %s", wrong);
        int threads = use_threads(options.threads);
        if (argc == 1)
            exit_code = tell_story(chapter, threads);
        else if (options.check)
            exit_code = check(chapter, &options);
        else
            exit_code = compute(chapter, &options, threads);
    }
    free_options(&options);
    if (fflush(stdout) != 0 || ferror(stdout))
        die(EXIT_USAGE, "standard output cannot be written: %s", strerror(errno));
    return exit_code;
}
