/* One kernel on one problem: sizes worked out from options, files and defaults; inputs drawn or read; outputs
 * and workspace allocated and counted; forward called; the result held against the oracle. */
#ifndef COMMON_RUN_H
#define COMMON_RUN_H

#include "benchmark.h"
#include "chapter.h"
#include "options.h"
#include "resolve.h"

typedef struct {
    const Kernel *kernel;
    Problem problem;
    Tensors t;
    Parameters parameters;
    RandomStream after_x;        /* the generator once q, k, v and bias, or x, were drawn */
    RandomStream after_inputs;   /* and once the parameters were */
    RandomStream dropout_stream; /* set to that before each forward */
    size_t extra_bytes;  /* held beyond inputs and outputs: the workspace, and weights that are kept */
    size_t out_size;     /* elements of t.out */
    size_t weights_size; /* elements of t.weights */
    size_t workspace_size[MAX_BUFFERS], backward_workspace_size[MAX_BUFFERS];
    Pass pass;
    size_t bias_size[NPY_MAX_AXES]; /* the shape of the bias, and so of dbias */
    int bias_axes;
    bool sampled;                 /* the oracle judged a sample */
    Comparison out, lse, weights; /* count 0 where there is nothing to compare */
    Comparison gradient;          /* of the gradient that is furthest off, for its tolerance */
    char gradient_name[64];
    void *owned[24 + 2 * MAX_BUFFERS]; /* what close_run() frees */
    int owned_count;
    /* For a kernel on a device, where workspace lies too: t's holds none then. A kernel in bf16 that runs here has its
     * 16-bit tensors that way. NULL: the kernel runs here on t. */
    const Accelerator *device;
    Tensors on_device;           /* t's tensors, in the device's memory */
    AttentionShape device_shape; /* the problem's, its arrays in the device's memory */
    void *device_owned[32 + 2 * MAX_BUFFERS + 2 * MAX_PARAMETERS];
    int device_owned_count;
} Run;

/* Elements of x, and of parameter i. */
static inline size_t x_count(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens * s->embed;
}
static inline size_t parameter_count(const Run *run, int i)
{
    return run->parameters.list[i].size[0] * run->parameters.list[i].size[1];
}

/* Why a kernel was not opened. */
typedef struct {
    int exit_code; /* 0: it was opened */
    char reason[240];
} Refusal;

/* Everything up to the call. Options that contradict each other, or files that do not fit, end the program
 * with exit 2. A kernel that cannot do what is asked, or does not fit into memory, is refused: nothing is
 * then held. One that needs a GiB or more says so before it asks for it. inputs_of is another open run whose
 * q, k, v or x may be shared when they are the same; NULL: none. magnify multiplies q and k, or x. */
Refusal open_run(Run *run, const Chapter *chapter, const Kernel *kernel, const Options *options,
                 const Run *inputs_of, float magnify);
void close_run(Run *run);

/* One forward pass, dropout starting where PyTorch's would. */
void forward_run(Run *run);

/* The backward pass behind it: every gradient, from what forward left. */
void backward_run(Run *run);

/* The passes of run->pass, one behind the other; on a device launched, and not waited for. context: a Run. */
void launch_run(void *context);

/* The same tensors in the device's memory (run_on_device.c): allocated and filled from t once open_run() has drawn
 * or read them; outputs and workspace, or gradients and theirs, made NaN; those fetched into t; all freed. */
void open_on_device(Run *run);
void poison_on_device(Run *run, Pass pass);
void fetch_from_device(Run *run, Pass pass);
void close_on_device(Run *run);

/* Poisons outputs and workspace with NaN, calls forward (and backward if the pass asks for it), compares with
 * the oracle; true if all of it passed.
 */
bool check_run(Run *run);
/* "L2 3.1e-07, max 4.8e-07, 0 NaN (all)" of out, and of lse and weights where there are any. */
void check_text(char *text, size_t size, const Run *run);

/* What the literature counts: forward 4*B*NH*T*TK*HS, half of it for causal with T = TK, the allowed pairs
 * for other masks; backward 2.5 times that, both 3.5 times. Modules add 2*m*n*k for each projection forward,
 * twice that backward, three times both. */
double run_flops(const Run *run, Pass pass);
/* Each input read once, each output written once. */
double run_bytes(const Run *run, Pass pass);

/* Times the open runs interleaved, `repeat` rounds after a warm-up, bursts of the peak between them. One row
 * each, printed by the caller; the runs must have been checked. what: shown as progress on a terminal. */
void time_runs(BenchmarkRow *row, Run *const *runs, int count, const Chapter *chapter, int repeat,
               int threads);

/* out, lse, weights and gradients as .npy files in folder (which exists). Returns NULL or what went wrong. */
const char *save_run(const Run *run, const char *folder);

/* The problem in one line: "1 x 12 heads x 1024 tokens x 64, causal". */
void problem_text(char *text, size_t size, const Run *run);

#endif
