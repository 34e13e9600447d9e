/* From what the command line said to the sizes, masks and scale of one kernel's problem. */
#ifndef COMMON_RESOLVE_H
#define COMMON_RESOLVE_H

#include "chapter.h"
#include "options.h"

/* What a resolved problem is, beside its shape. */
typedef struct {
    AttentionShape shape;
    bool sentence; /* x is the 6 x 3 sentence */
    StreamKind rng;
    uint64_t seed;
    int *document, *lengths; /* malloc'ed, or NULL: the shape points to them */
    char reason[240];        /* why the kernel refuses, to stand behind "kernel NAME "; "" if it does not */
} Problem;

/* Ends the program with exit 2 where options or files contradict each other. */
void resolve_problem(Problem *problem, const Chapter *chapter, const Kernel *kernel, const Options *options);

#endif
