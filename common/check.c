/* The ugly shapes: one body of cases for ./run --check and for the tests. A case is a command line, so that
 * one that fails can be typed. */
#include "error.h"
#include "memory.h"
#include "run.h"
#include "story.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *words;
    float magnify; /* of q and k; 0 stands for 1 */
} Case;

static const Case core_cases[] = {
    {"--batch 2 --heads 3 --tokens 1 --head-size 64", 0},
    {"--heads 1 --tokens 1 --head-size 5 --causal", 0},
    {"--heads 1 --tokens 7 --key-tokens 1 --head-size 5", 0},
    {"--batch 2 --heads 3 --tokens 65 --head-size 40", 0},
    {"--heads 3 --tokens 65 --head-size 40 --causal", 0},
    {"--heads 1 --tokens 130 --head-size 64 --causal", 0},
    {"--heads 3 --tokens 67 --key-tokens 200 --head-size 128", 0},
    {"--heads 3 --tokens 67 --key-tokens 200 --head-size 128 --causal", 0},
    {"--batch 2 --heads 1 --tokens 129 --key-tokens 67 --head-size 64 --causal", 0}, /* 62 rows see no key */
    {"--heads 1 --tokens 33 --head-size 256", 0},
    {"--heads 3 --tokens 97 --head-size 256 --causal", 0},
    {"--heads 1 --tokens 300 --head-size 5 --causal", 0},
    {"--batch 3 --heads 2 --tokens 50 --head-size 40 --lengths 50,17,0", 0},
    {"--batch 3 --heads 3 --tokens 70 --head-size 64 --lengths 1,69,70 --causal", 0},
    {"--heads 3 --tokens 150 --head-size 64 --mask window:9", 0},
    {"--heads 1 --tokens 60 --key-tokens 140 --head-size 40 --mask window:33", 0},
    {"--heads 1 --tokens 140 --key-tokens 60 --head-size 40 --mask window:200", 0},
    {"--heads 3 --tokens 150 --head-size 64 --mask prefix:20", 0},
    {"--heads 1 --tokens 140 --key-tokens 60 --head-size 5 --mask prefix:7", 0},
    {"--heads 3 --tokens 150 --head-size 40 --mask local-global:5:3", 0},
    {"--heads 1 --tokens 70 --key-tokens 190 --head-size 64 --mask local-global:40:2", 0},
    {"--heads 3 --tokens 150 --head-size 64 --mask dilated:4:3", 0},
    {"--batch 2 --heads 3 --head-size 40 --mask documents:20,1,70,49", 0},
    {"--batch 2 --heads 1 --tokens 90 --head-size 64 --mask window:30 --causal --lengths 90,31", 0},
    {"--batch 2 --heads 3 --tokens 67 --head-size 40 --bias randn", 0},
    {"--batch 2 --heads 3 --tokens 67 --key-tokens 131 --head-size 64 --bias randn --causal --lengths 131,50",
     0},
    {"--heads 2 --tokens 70 --head-size 64 --scale 0.5", 0},
    {"--heads 2 --tokens 70 --head-size 40 --scale -0.3 --causal", 0},
    {"--batch 2 --heads 3 --tokens 70 --head-size 40 --dropout 0.3", 0},
    {"--heads 1 --tokens 130 --key-tokens 150 --head-size 64 --dropout 0.5 --causal", 0},
    {"--batch 2 --heads 2 --tokens 66 --head-size 64 --dropout 0.1 --bias randn --lengths 66,9", 0},
    {"--heads 3 --tokens 67 --head-size 64", 30},
    {"--heads 3 --tokens 130 --head-size 64 --causal", 30},
    {"--heads 1 --tokens 150 --head-size 128 --mask window:40", 30},
    {"--batch 2 --heads 2 --tokens 80 --key-tokens 200 --head-size 40 --lengths 200,3 --bias randn", 30},
    {"--heads 1 --tokens 90 --head-size 256 --mask local-global:9:4", 30},
    {"--heads 3 --tokens 100 --head-size 40 --tile 1x1", 0},
    {"--heads 1 --tokens 100 --head-size 64 --tile 3x5 --causal", 0},
    {"--heads 1 --tokens 70 --key-tokens 140 --head-size 64 --tile 200x300 --causal", 0},
    {"--heads 3 --tokens 150 --head-size 64 --tile 16x128 --causal", 30},
    {"--heads 3 --tokens 100 --head-size 40 --block 1 --causal", 0},
    {"--heads 1 --tokens 150 --head-size 64 --block 7 --mask window:30", 0},
    {"--batch 2 --heads 1 --tokens 150 --head-size 64 --block 32 --causal --lengths 150,60", 0},
    {"--heads 1 --tokens 90 --key-tokens 190 --head-size 40 --block 64 --mask dilated:20:3", 0},
    {"--heads 1 --tokens 150 --head-size 64 --block 1000 --mask prefix:77", 0},
    {"--heads 6 --kv-heads 2 --tokens 67 --head-size 40", 0},
    {"--batch 2 --heads 6 --kv-heads 3 --tokens 130 --head-size 64 --causal", 0},
    {"--heads 8 --kv-heads 1 --tokens 65 --key-tokens 131 --head-size 128 --causal", 0},
    {"--batch 2 --heads 4 --kv-heads 2 --tokens 70 --head-size 40 --bias randn --lengths 70,0", 0},
    {"--heads 4 --kv-heads 2 --tokens 1 --key-tokens 300 --head-size 64", 0},
    {"--heads 4 --kv-heads 1 --tokens 90 --head-size 5 --mask window:20 --dropout 0.2", 0},
    {"--heads 12 --kv-heads 4 --tokens 100 --head-size 64 --causal", 30},
};

static const Case module_cases[] = {
    {"--batch 1 --tokens 1 --embed 5 --heads 1", 0},
    {"--batch 2 --tokens 1 --embed 12 --heads 3", 0},
    {"--batch 2 --tokens 7 --embed 24 --embed-out 12 --heads 3", 0},
    {"--batch 1 --tokens 65 --embed 40 --heads 1", 0},
    {"--batch 2 --tokens 40 --embed 7 --heads 1", 0},
    {"--batch 3 --tokens 130 --embed 192 --heads 3", 0},
    {"--batch 1 --tokens 67 --embed 33 --embed-out 128 --heads 1", 0},
    {"--batch 2 --tokens 40 --embed 70 --embed-out 256 --heads 1", 0},
    {"--batch 1 --tokens 150 --embed 30 --embed-out 120 --heads 3", 0},
    {"--batch 2 --tokens 129 --embed 128 --heads 2", 0},
    {"--batch 1 --tokens 300 --embed 15 --embed-out 15 --heads 3", 0},
    {"--batch 1 --tokens 300 --embed 10 --heads 1", 0},
    {"--batch 2 --tokens 50 --embed 36 --heads 3 --dropout 0.5", 0},
    {"--batch 2 --tokens 50 --embed 20 --heads 1 --dropout 0.2", 0},
    {"--batch 2 --tokens 48 --embed 96 --heads 12 --kv-heads 4", 0},
    {"--batch 1 --tokens 70 --embed 64 --heads 4 --kv-heads 1", 0},
    {"--batch 2 --tokens 150 --embed 36 --heads 3 --mask window:40", 0},
    {"--batch 2 --tokens 150 --embed 36 --heads 3 --mask local-global:40:7 --block 32", 0},
    {"--batch 2 --tokens 150 --embed 64 --heads 1 --mask prefix:40 --lengths 150,10", 0},
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

Chapter chapter_on(const Chapter *chapter, Device device, Kernel rows[MAX_DEVICE_ROWS])
{
    Chapter there = *chapter;
    int count = 0;
    for (const DeviceKernels *file = chapter->device_kernels; file->names; file++) {
        const Kernel *table = device == DEVICE_CUDA ? file->cuda : file->simt;
        for (; table && table->name && count < MAX_DEVICE_ROWS - 1; table++)
            rows[count++] = *table;
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
    char *argv[48] = {"run"};
    int argc = 1;
    snprintf(words, sizeof words, "%s", c->words);
    char *rest = words;
    for (char *word; (word = strtok_r(rest, " ", &rest)) && argc < 35;)
        argv[argc++] = word;
    if (kernel->backward) {
        argv[argc++] = "--pass";
        argv[argc++] = "both";
        argv[argc++] = "--dout";
        argv[argc++] = "randn";
    }
    if (chapter->device != DEVICE_CPU) {
        argv[argc++] = "--device";
        argv[argc++] = (char *)device_name(chapter->device);
    }
    Options options;
    parse_options(&options, argc, argv);

    Run *run = allocate_zeroed(1, sizeof *run);
    Refusal refusal = open_run(run, chapter, kernel, &options, NULL, c->magnify ? c->magnify : 1);
    bool passed = refusal.exit_code == 0 ? check_run(run) : refusal.exit_code == EXIT_USAGE;
    if (refusal.exit_code)
        snprintf(result, sizeof result, "skipped: %s", refusal.reason);
    else
        check_text(result, sizeof result, run);
    snprintf(text, size, "%s --kernel %s%s%s %s%s: %s",
             refusal.exit_code ? "-"
             : passed          ? "✓"
                               : "✗",
             kernel->name, chapter->device == DEVICE_CPU ? "" : " --device ",
             chapter->device == DEVICE_CPU ? "" : device_name(chapter->device), c->words,
             c->magnify ? " (q and k times 30)" : "", result);
    if (refusal.exit_code == 0)
        close_run(run);
    free(run);
    free_options(&options);
    return passed;
}
