/* The ugly shapes: one body of cases for ./run --check and for the tests. A case is a command line, so that
 * one that fails can be typed. */
#include "error.h"
#include "memory.h"
#include "run.h"
#include "story.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    AS_DRAWN,
    TIMES_30, /* q and k */
    HOLES     /* a bias that forbids some of the pairs, with -inf */
};

typedef struct {
    const char *words;
    int inputs;
} Case;

static const Case core_cases[] = {
    {"--batch 2 --heads 3 --tokens 1 --head-size 64", AS_DRAWN},
    {"--heads 1 --tokens 1 --head-size 5 --causal", AS_DRAWN},
    {"--heads 1 --tokens 7 --key-tokens 1 --head-size 5", AS_DRAWN},
    {"--batch 2 --heads 3 --tokens 65 --head-size 40", AS_DRAWN},
    {"--heads 3 --tokens 65 --head-size 40 --causal", AS_DRAWN},
    {"--heads 1 --tokens 130 --head-size 64 --causal", AS_DRAWN},
    {"--heads 3 --tokens 67 --key-tokens 200 --head-size 128", AS_DRAWN},
    {"--heads 3 --tokens 67 --key-tokens 200 --head-size 128 --causal", AS_DRAWN},
    {"--batch 2 --heads 1 --tokens 129 --key-tokens 67 --head-size 64 --causal",
     AS_DRAWN}, /* 62 rows see no key */
    {"--heads 1 --tokens 33 --head-size 256", AS_DRAWN},
    {"--heads 3 --tokens 97 --head-size 256 --causal", AS_DRAWN},
    {"--heads 1 --tokens 300 --head-size 5 --causal", AS_DRAWN},
    {"--batch 2 --heads 1 --tokens 40 --key-tokens 70 --head-size 570 --causal", AS_DRAWN},
    {"--batch 3 --heads 2 --tokens 50 --head-size 40 --lengths 50,17,0", AS_DRAWN},
    {"--batch 3 --heads 3 --tokens 70 --head-size 64 --lengths 1,69,70 --causal", AS_DRAWN},
    {"--heads 3 --tokens 150 --head-size 64 --mask window:9", AS_DRAWN},
    {"--heads 1 --tokens 60 --key-tokens 140 --head-size 40 --mask window:33", AS_DRAWN},
    {"--heads 1 --tokens 140 --key-tokens 60 --head-size 40 --mask window:200", AS_DRAWN},
    {"--heads 3 --tokens 150 --head-size 64 --mask prefix:20", AS_DRAWN},
    {"--heads 1 --tokens 140 --key-tokens 60 --head-size 5 --mask prefix:7", AS_DRAWN},
    {"--heads 3 --tokens 150 --head-size 40 --mask local-global:5:3", AS_DRAWN},
    {"--heads 1 --tokens 70 --key-tokens 190 --head-size 64 --mask local-global:40:2", AS_DRAWN},
    {"--heads 3 --tokens 150 --head-size 64 --mask dilated:4:3", AS_DRAWN},
    {"--batch 2 --heads 3 --head-size 40 --mask documents:20,1,70,49", AS_DRAWN},
    {"--batch 2 --heads 1 --tokens 90 --head-size 64 --mask window:30 --causal --lengths 90,31", AS_DRAWN},
    {"--batch 2 --heads 3 --tokens 67 --head-size 40 --bias randn", AS_DRAWN},
    {"--batch 2 --heads 3 --tokens 67 --key-tokens 131 --head-size 64 --bias randn --causal --lengths 131,50",
     AS_DRAWN},
    {"--heads 3 --tokens 1 --key-tokens 700 --head-size 128 --causal", AS_DRAWN},
    {"--batch 2 --heads 1 --tokens 3 --key-tokens 600 --head-size 40 --mask window:300 --lengths 600,301",
     AS_DRAWN},
    {"--heads 2 --tokens 2 --key-tokens 513 --head-size 64 --causal", TIMES_30},
    {"--heads 2 --tokens 70 --head-size 64 --scale 0.5", AS_DRAWN},
    {"--heads 2 --tokens 70 --head-size 40 --scale -0.3 --causal", AS_DRAWN},
    {"--batch 2 --heads 3 --tokens 70 --head-size 40 --dropout 0.3", AS_DRAWN},
    {"--heads 1 --tokens 130 --key-tokens 150 --head-size 64 --dropout 0.5 --causal", AS_DRAWN},
    {"--batch 2 --heads 2 --tokens 66 --head-size 64 --dropout 0.1 --bias randn --lengths 66,9", AS_DRAWN},
    {"--heads 3 --tokens 67 --head-size 64", TIMES_30},
    {"--heads 3 --tokens 130 --head-size 64 --causal", TIMES_30},
    {"--heads 1 --tokens 150 --head-size 128 --mask window:40", TIMES_30},
    {"--batch 2 --heads 2 --tokens 80 --key-tokens 200 --head-size 40 --lengths 200,3 --bias randn",
     TIMES_30},
    {"--heads 1 --tokens 90 --head-size 256 --mask local-global:9:4", TIMES_30},
    {"--heads 3 --tokens 100 --head-size 40 --tile 1x1", AS_DRAWN},
    {"--heads 1 --tokens 100 --head-size 64 --tile 3x5 --causal", AS_DRAWN},
    {"--heads 1 --tokens 70 --key-tokens 140 --head-size 64 --tile 200x300 --causal", AS_DRAWN},
    {"--heads 3 --tokens 150 --head-size 64 --tile 16x128 --causal", TIMES_30},
    {"--heads 3 --tokens 100 --head-size 40 --block 1 --causal", AS_DRAWN},
    {"--heads 1 --tokens 150 --head-size 64 --block 7 --mask window:30", AS_DRAWN},
    {"--batch 2 --heads 1 --tokens 150 --head-size 64 --block 32 --causal --lengths 150,60", AS_DRAWN},
    {"--heads 1 --tokens 90 --key-tokens 190 --head-size 40 --block 64 --mask dilated:20:3", AS_DRAWN},
    {"--heads 1 --tokens 150 --head-size 64 --block 1000 --mask prefix:77", AS_DRAWN},
    {"--heads 6 --kv-heads 2 --tokens 67 --head-size 40", AS_DRAWN},
    {"--batch 2 --heads 6 --kv-heads 3 --tokens 130 --head-size 64 --causal", AS_DRAWN},
    {"--heads 8 --kv-heads 1 --tokens 65 --key-tokens 131 --head-size 128 --causal", AS_DRAWN},
    {"--batch 2 --heads 4 --kv-heads 2 --tokens 70 --head-size 40 --bias randn --lengths 70,0", AS_DRAWN},
    {"--heads 4 --kv-heads 2 --tokens 1 --key-tokens 300 --head-size 64", AS_DRAWN},
    {"--heads 4 --kv-heads 1 --tokens 90 --head-size 5 --mask window:20 --dropout 0.2", AS_DRAWN},
    {"--heads 12 --kv-heads 4 --tokens 100 --head-size 64 --causal", TIMES_30},
    {"--batch 2 --heads 3 --tokens 67 --key-tokens 131 --head-size 40 --causal", HOLES},
    {"--heads 2 --tokens 150 --head-size 64 --mask window:60 --dropout 0.2", HOLES},
    {"--heads 4 --kv-heads 2 --tokens 150 --head-size 64", HOLES},
};

static const Case module_cases[] = {
    {"--batch 1 --tokens 1 --embed 5 --heads 1", AS_DRAWN},
    {"--batch 2 --tokens 1 --embed 12 --heads 3", AS_DRAWN},
    {"--batch 2 --tokens 7 --embed 24 --embed-out 12 --heads 3", AS_DRAWN},
    {"--batch 1 --tokens 65 --embed 40 --heads 1", AS_DRAWN},
    {"--batch 2 --tokens 40 --embed 7 --heads 1", AS_DRAWN},
    {"--batch 3 --tokens 130 --embed 192 --heads 3", AS_DRAWN},
    {"--batch 1 --tokens 67 --embed 33 --embed-out 128 --heads 1", AS_DRAWN},
    {"--batch 2 --tokens 40 --embed 70 --embed-out 256 --heads 1", AS_DRAWN},
    {"--batch 1 --tokens 150 --embed 30 --embed-out 120 --heads 3", AS_DRAWN},
    {"--batch 2 --tokens 129 --embed 128 --heads 2", AS_DRAWN},
    {"--batch 1 --tokens 300 --embed 15 --embed-out 15 --heads 3", AS_DRAWN},
    {"--batch 1 --tokens 300 --embed 10 --heads 1", AS_DRAWN},
    {"--batch 2 --tokens 50 --embed 36 --heads 3 --dropout 0.5", AS_DRAWN},
    {"--batch 2 --tokens 50 --embed 20 --heads 1 --dropout 0.2", AS_DRAWN},
    {"--batch 2 --tokens 48 --embed 96 --heads 12 --kv-heads 4", AS_DRAWN},
    {"--batch 1 --tokens 70 --embed 64 --heads 4 --kv-heads 1", AS_DRAWN},
    {"--batch 2 --tokens 150 --embed 36 --heads 3 --mask window:40", AS_DRAWN},
    {"--batch 2 --tokens 150 --embed 36 --heads 3 --mask local-global:40:7 --block 32", AS_DRAWN},
    {"--batch 2 --tokens 150 --embed 64 --heads 1 --mask prefix:40 --lengths 150,10", AS_DRAWN},
};

enum {
    CORES = sizeof core_cases / sizeof core_cases[0],
    MODULES = sizeof module_cases / sizeof module_cases[0]
};

/* Which kernel and which of its cases is number i? Behind the last kernel's come the chapter's own checks:
 * kernel NULL. */
static const Kernel *locate(const Chapter *chapter, int i, int *which)
{
    for (const Kernel *k = chapter->kernels; k->name; k++) {
        int count = k->takes == TAKES_X ? MODULES : CORES;
        if (i < count) {
            *which = i;
            return k;
        }
        i -= count;
    }
    *which = i;
    return NULL;
}

/* A device's row, filled up with what it leaves out from the CPU's row of that name. Dropout is its own. */
static Kernel filled_up(const Kernel *device, const Kernel *cpu)
{
    if (!cpu)
        return *device;
    Kernel kernel = *cpu;
    kernel.what = device->what ? device->what : cpu->what;
    kernel.forward = device->forward;
    kernel.backward = device->backward;
    kernel.workspace = device->workspace ? device->workspace : cpu->workspace;
    kernel.backward_workspace =
        device->backward_workspace ? device->backward_workspace : cpu->backward_workspace;
    kernel.dropout = device->dropout;
    return kernel;
}

Chapter chapter_on(const Chapter *chapter, Device device, Kernel rows[MAX_DEVICE_ROWS])
{
    Chapter there = *chapter;
    int count = 0;
    for (const DeviceKernels *file = chapter->device_kernels; file->names; file++) {
        const Kernel *table = device == DEVICE_CUDA ? file->cuda : file->simt;
        for (; table && table->name && count < MAX_DEVICE_ROWS - 1; table++)
            rows[count++] = filled_up(table, kernel_named(chapter, table->name));
    }
    rows[count] = (Kernel){0};
    there.device = device;
    there.kernels = rows;
    there.checks = NULL;
    return there;
}

int check_count(const Chapter *chapter)
{
    int count = 0;
    for (const Kernel *k = chapter->kernels; k->name; k++)
        count += k->takes == TAKES_X ? MODULES : CORES;
    for (const ExtraCheck *c = chapter->checks; c && c->name; c++)
        count++;
    return count;
}

bool check_names_kernel(const Chapter *chapter, int i, const char *kernel)
{
    int which;
    const Kernel *k = locate(chapter, i, &which);
    return k && strcmp(k->name, kernel) == 0;
}

/* A bias with -inf at a quarter of the pairs, at all of row 1, and at a rectangle as large as a tile. */
static NpyArray bias_with_holes(const Options *o)
{
    NpyArray bias = {.axes = 3, .size = {o->heads, o->tokens, o->key_tokens ? o->key_tokens : o->tokens}};
    bias.count = bias.size[0] * bias.size[1] * bias.size[2];
    bias.data = allocate_floats(bias.count);
    for (size_t i = 0; i < bias.count; i++) {
        size_t t2 = i % bias.size[2], t = i / bias.size[2] % bias.size[1],
               h = i / bias.size[2] / bias.size[1];
        bool hole = (3 * t + 5 * t2 + h) % 4 == 0 || t == 1 || (t >= 64 && t2 < 64);
        bias.data[i] = hole ? -INFINITY : (float)((7 * t + 3 * t2 + h) % 11) / 5 - 1;
    }
    return bias;
}

/* The case as a command line would bring it. words: the options' own copy of it. */
static void open_options(Options *options, char words[256], const Chapter *chapter, const Kernel *kernel,
                         const Case *c, bool backward)
{
    char *argv[48] = {"run"};
    int argc = 1;
    snprintf(words, 256, "%s", c->words);
    char *rest = words;
    for (char *word; (word = strtok_r(rest, " ", &rest)) && argc < 35;)
        argv[argc++] = word;
    if (backward) {
        argv[argc++] = "--pass";
        argv[argc++] = "both";
        argv[argc++] = "--dout";
        argv[argc++] = "randn";
    }
    if (kernel->bf16) {
        argv[argc++] = "--dtype";
        argv[argc++] = "bf16";
    }
    if (chapter->device != DEVICE_CPU) {
        argv[argc++] = "--device";
        argv[argc++] = (char *)device_name(chapter->device);
    }
    parse_options(options, argc, argv);
    if (c->inputs == HOLES)
        options->bias = bias_with_holes(options);
}

bool check_case(const Chapter *chapter, int i, char *text, size_t size)
{
    int which;
    const Kernel *kernel = locate(chapter, i, &which);
    if (!kernel) {
        const char *wrong = chapter->checks[which].check();
        snprintf(text, size, "%s %s%s%s", wrong ? "✗" : "✓", chapter->checks[which].name, wrong ? ": " : "",
                 wrong ? wrong : "");
        return !wrong;
    }
    const Case *c = kernel->takes == TAKES_X ? &module_cases[which] : &core_cases[which];
    char words[256], result[400];
    Options options;
    Run *run = allocate_zeroed(1, sizeof *run);
    open_options(&options, words, chapter, kernel, c, kernel->backward != NULL);
    Refusal refusal = open_run(run, chapter, kernel, &options, NULL, c->inputs == TIMES_30 ? 30 : 1);
    if (refusal.exit_code && kernel->refuses_backward) { /* forward can do more */
        free_options(&options);
        open_options(&options, words, chapter, kernel, c, false);
        refusal = open_run(run, chapter, kernel, &options, NULL, c->inputs == TIMES_30 ? 30 : 1);
    }
    bool passed = refusal.exit_code == 0 ? check_run(run) : refusal.exit_code == EXIT_USAGE;
    if (refusal.exit_code)
        snprintf(result, sizeof result, "skipped: %s", refusal.reason);
    else
        check_text(result, sizeof result, run);
    snprintf(text, size, "%s --kernel %s%s%s%s %s%s: %s",
             refusal.exit_code ? "-"
             : passed          ? "✓"
                               : "✗",
             kernel->name, chapter->device == DEVICE_CPU ? "" : " --device ",
             chapter->device == DEVICE_CPU ? "" : device_name(chapter->device),
             kernel->bf16 ? " --dtype bf16" : "", c->words,
             c->inputs == TIMES_30 ? " (q and k times 30)"
             : c->inputs == HOLES  ? " (a bias with -inf)"
                                   : "",
             result);
    if (refusal.exit_code == 0)
        close_run(run);
    free(run);
    free_options(&options);
    return passed;
}
