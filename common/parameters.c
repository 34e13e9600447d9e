#include "error.h"
#include "kernel.h"
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>

static float *add(Parameters *p, const char *name, const char *suffix, int axes, int rows, int columns)
{
    if (p->count == MAX_PARAMETERS)
        die(EXIT_USAGE, "a module of more than %d parameters; take fewer --heads", MAX_PARAMETERS);
    size_t count = (size_t)rows * columns;
    int i = p->count++;
    snprintf(p->list[i].name, sizeof p->list[i].name, "%s%s", name, suffix);
    p->list[i].axes = axes;
    p->list[i].size[0] = rows;
    p->list[i].size[1] = columns;
    return p->list[i].data = allocate_floats(count);
}

void add_linear(Parameters *p, const char *name, int outputs, int inputs, bool bias)
{
    float bound = linear_bound(inputs);
    float *weight = add(p, name, ".weight", 2, outputs, inputs);
    draw_uniform(p->stream, weight, (size_t)outputs * inputs, -bound, bound);
    if (bias)
        draw_uniform(p->stream, add(p, name, ".bias", 1, outputs, 1), outputs, -bound, bound);
}

void add_uniform(Parameters *p, const char *name, int rows, int columns, float bound)
{
    draw_uniform(p->stream, add(p, name, "", 2, rows, columns), (size_t)rows * columns, -bound, bound);
}

void add_rand(Parameters *p, const char *name, int rows, int columns)
{
    draw_rand(p->stream, add(p, name, "", 2, rows, columns), (size_t)rows * columns);
}

void skip_randn(Parameters *p, size_t n)
{
    float *thrown_away = allocate_floats(n);
    draw_randn(p->stream, thrown_away, n);
    free(thrown_away);
}
