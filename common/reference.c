#include "reference.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char problem[300];

static __attribute__((format(printf, 1, 2))) const char *wrong(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem, sizeof problem, format, arguments);
    va_end(arguments);
    return problem;
}

/* "grad_x" names the gradient of x, and so for each parameter. */
static bool is_gradient(const char *name)
{
    return strncmp(name, "grad_", 5) == 0;
}

static const float *find_tensor(const Run *run, const char *name, size_t *count)
{
    bool gradient = is_gradient(name);
    if (gradient)
        name += 5;
    const AttentionShape *s = &run->problem.shape;
    size_t rows = (size_t)s->batch * s->tokens;
    *count = rows * s->embed;
    if (strcmp(name, "x") == 0)
        return gradient ? run->t.dx : run->t.x;
    *count = rows * s->embed_out;
    if (strcmp(name, "out") == 0 && !gradient)
        return run->t.out;
    for (int i = 0; i < run->parameters.count; i++)
        if (strcmp(name, run->parameters.list[i].name) == 0) {
            *count = run->parameters.list[i].size[0] * run->parameters.list[i].size[1];
            return gradient ? run->parameters.list[i].gradient : run->parameters.list[i].data;
        }
    return NULL;
}

/* "(8, 1024, 768)" or "(768,)"; returns the number of axes. */
static int parse_shape(size_t size[3], const char *text)
{
    int axes = 0;
    for (const char *at = text; axes < 3 && (at = strpbrk(at, "0123456789")); axes++)
        size[axes] = strtoul(at, (char **)&at, 10);
    return axes;
}

/* "1,511,100" or "[16384]" */
static size_t parse_index(const char *text, const size_t *size, int axes)
{
    if (text[0] == '[')
        return strtoul(text + 1, NULL, 10);
    size_t index = 0;
    for (int axis = 0; axis < axes; axis++, text++)
        index = index * size[axis] + strtoul(text, (char **)&text, 10);
    return index;
}

static const char *check_row(const Run *run, const char *name, const char *shape, double l2, char *values)
{
    size_t size[3], count, expected_count = 1;
    const float *tensor = find_tensor(run, name, &count);
    int axes = parse_shape(size, shape);
    for (int axis = 0; axis < axes; axis++)
        expected_count *= size[axis];
    if (!tensor || count != expected_count)
        return wrong("%s: no tensor of shape %s here", name, shape);
    bool gradient = is_gradient(name);
    double relative = gradient ? 1e-4 : 1e-5, absolute = gradient ? 1e-5 * l2 / sqrt((double)count) : 2e-6;
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += (double)tensor[i] * tensor[i];
    if (!(fabs(sqrt(sum) - l2) <= (gradient ? 1e-5 : 1e-6) * l2))
        return wrong("%s: norm %.9g, PyTorch's is %.9g", name, sqrt(sum), l2);
    for (char *value = strtok(values, " \n"); value; value = strtok(NULL, " \n")) {
        double expected = strtod(strchr(value, '=') + 1, NULL);
        size_t index = parse_index(value, size, axes);
        double ours = index < count ? (double)tensor[index] : NAN;
        if (!(fabs(ours - expected) <= absolute + relative * fabs(expected)))
            return wrong("%s: %.9g where PyTorch has %s", name, ours, value);
    }
    return NULL;
}

const char *check_reference(const Run *run, const char *path)
{
    FILE *file = fopen(path, "r");
    if (!file)
        return wrong("cannot open %s", path);
    char line[1000], kernel[64], name[64], shape[64];
    const char *bad = NULL;
    bool backward = run->pass != PASS_FORWARD;
    int rows = 0, expected = run->parameters.count + 2 + (backward ? run->parameters.count + 1 : 0);
    while (!bad && fgets(line, sizeof line, file)) {
        double l2;
        int values = 0;
        if (sscanf(line, "%*[^\t]\t%63[^\t]\t%63[^\t]\t%63[^\t]\t%lf\t%n", kernel, name, shape, &l2,
                   &values) != 4 ||
            values == 0 || strcmp(kernel, run->kernel->name) != 0 || (is_gradient(name) && !backward))
            continue;
        bad = check_row(run, name, shape, l2, line + values);
        rows++;
    }
    fclose(file);
    if (!bad && rows != expected)
        return wrong("%s has %d rows of kernel %s; x, out and %d parameters%s make %d", path, rows,
                     run->kernel->name, run->parameters.count, backward ? " and the gradients" : "",
                     expected);
    return bad;
}
