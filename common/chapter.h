/* What a chapter's main.c says of itself, and what its story is told with. */
#ifndef COMMON_CHAPTER_H
#define COMMON_CHAPTER_H

#include "kernel.h"
#include "compare.h"
#include "device.h"

typedef struct Story Story;

/* More that a chapter checks about itself, beside its kernels: ./run --check and the tests both run it.
 * Returns NULL if all is well, else one line that says what is not (a static buffer). */
typedef struct {
    const char *name;
    const char *(*check)(void);
} ExtraCheck;

/* A chapter's own mode beside the common ones, as ./run WORD [options]. */
typedef struct {
    const char *word, *what;           /* what: half a line for --help */
    int (*run)(int argc, char **argv); /* gets the words after WORD; returns the exit code */
} ChapterMode;

/* A .cu's kernels, compiled twice: for the CPU stand-in and for a GPU. Both tables are arrays that end with a row
 * whose name is NULL, and NULL where this build has no compiler for them. */
typedef struct {
    const char *names; /* of its kernels, with spaces between them; NULL: the list ends here */
    const Kernel *simt, *cuda;
} DeviceKernels;

/* FILE.cu's entry: DEVICE_KERNELS(flash_tiled, "tiled"), behind DECLARE_DEVICE_KERNELS(flash_tiled). */
#define DECLARE_DEVICE_KERNELS(file) extern const Kernel file##_simt[], file##_cuda[]
#define DEVICE_KERNELS(file, names)                                                                          \
    {                                                                                                        \
        names, SIMT_TABLE(file), CUDA_TABLE(file)                                                            \
    }
#ifdef HAVE_SIMT
#define SIMT_TABLE(file) file##_simt
#else
#define SIMT_TABLE(file) NULL
#endif
#ifdef HAVE_CUDA
#define CUDA_TABLE(file) file##_cuda
#else
#define CUDA_TABLE(file) NULL
#endif

enum { MAX_DEVICE_FILES = 10, MAX_DEVICE_ROWS = 24 };

typedef struct {
    int number;
    const char *title;
    const char *folder;                                 /* "07_flash_tiled" */
    const Kernel *kernels;                              /* ends with a row whose name is NULL */
    DeviceKernels device_kernels[MAX_DEVICE_FILES + 1]; /* of its .cu files; ends with a row of zeros */
    Device device;                                      /* where `kernels` run */
    const ExtraCheck *checks;                           /* ends with a row whose name is NULL; NULL: none */
    void (*story)(Story *story);
    int group; /* --kv-heads when not given: this many query heads share one; 0 or 1: each has its own */
    const ChapterMode *modes; /* ends with a row whose word is NULL; NULL: none */
} Chapter;

/* The whole command line. Returns the exit code. */
int chapter_main(int argc, char **argv, const Chapter *chapter);

/* The chapter's kernel of that name; NULL: it has none. */
const Kernel *kernel_named(const Chapter *chapter, const char *name);

/* From here on `wanted` threads, or all cores if 0. Returns how many. Ends the program with exit 3 if the build has
 * no OpenMP and more than one is wanted. */
int use_threads(int wanted);

/* ---- Telling the story. Everything printed goes through these, so that nine chapters look alike. ---- */

/* A heading line, a paragraph of plain text (printf format; wrapped at 100 columns). */
void story_heading(Story *story, const char *format, ...) __attribute__((format(printf, 2, 3)));
void story_say(Story *story, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Prints rows x columns of ours beside numbers from elsewhere (story_expect: published ones; story_beside: `word` says whose), a tick or a cross at each row's end. A row
 * passes where every number is within 1e-4 (four published decimals, and PyTorch's own rounding); both NaN or
 * the same infinity passes too only if published so. A cross makes ./run exit with 1. */
void story_expect(Story *story, const char *what, const float *ours, const double *published, int rows,
                  int columns);
void story_beside(Story *story, const char *what, const char *word, const float *ours, const double *theirs,
                  int rows, int columns);

/* What a run left behind; valid until the story ends. */
typedef struct {
    AttentionShape shape;
    Tensors t;
    Parameters *parameters;
    Comparison comparison;
    size_t extra_bytes; /* held beyond inputs and outputs */
} StoryRun;

/* A notebook module's out at (8,1024,768), seed 123, beside PyTorch's: out[0,0,0] [0,1,1] [1,511,100]
 * [3,512,383] [5,700,640] [7,1023,767], and the norm (the square root of the sum of squares) of all 6291456,
 * to 1e-6 of it. */
void story_notebook(Story *story, const StoryRun *run, const double values[6], double norm);

/* One line with a tick or a cross: a claim, and whether it holds. */
void story_claim(Story *story, bool holds, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Runs one of the chapter's kernels as "./run --kernel NAME OPTIONS" would, OPTIONS being words with single
 * spaces ("--seed 123 --batch 2"), and checks it against the oracle (a failed check is a cross). */
const StoryRun *story_run(Story *story, const char *kernel, const char *options);

/* Runs the named kernels (separated by spaces) interleaved and prints the benchmark's rows: the one timing at
 * the end. */
void story_time(Story *story, const char *kernels, const char *options);

/* The sentence of the notebooks, "Your journey starts with one step": (6,3). */
extern const float sentence[6][3];

/* ---- For tests: one body of cases for --check and for Criterion. ---- */
int check_count(const Chapter *chapter);
/* The same chapter with the kernels that it has for a device, and no checks of its own: *rows becomes its table. It
 * may be empty. */
Chapter chapter_on(const Chapter *chapter, Device device, Kernel rows[MAX_DEVICE_ROWS]);

/* Runs case i; returns true if it passed. text says what it was and how it went, in one line. */
bool check_case(const Chapter *chapter, int i, char *text, size_t size);

#endif
