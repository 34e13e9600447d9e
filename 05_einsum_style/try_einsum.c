#include "try_einsum.h"

#include "benchmark.h"
#include "error.h"
#include "memory.h"
#include "random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_NUMBERS = 1 << 28 }; /* in one tensor: 1 GiB */

static void letters_of(char *text, const EinsumPlan *plan, EinsumKind kind)
{
    char *to = text;
    for (int i = 0; i < plan->letters; i++)
        if (einsum_kind(&plan->letter[i]) == kind)
            *to++ = plan->letter[i].name;
    strcpy(to, to == text ? "-" : "");
}

void describe_einsum(char *text, size_t size, const char *specification, const EinsumPlan *plan)
{
    char letters[4][EINSUM_MAX_LETTERS + 1], product[80];
    for (EinsumKind kind = EINSUM_BATCH; kind <= EINSUM_SUMMED; kind++)
        letters_of(letters[kind], plan, kind);
    einsum_text(product, sizeof product, plan);
    snprintf(text, size, "%-16s  batch %-3s rows %-3s columns %-3s summed %-3s %s", specification,
             letters[EINSUM_BATCH], letters[EINSUM_ROW], letters[EINSUM_COLUMN], letters[EINSUM_SUMMED],
             product);
}

void describe_gradient(char *text, size_t size, const char *specification, int operand, const View *out,
                       const View *a, const View *b)
{
    char gradient[EINSUM_TEXT];
    EinsumPlan plan;
    const View *wanted = operand == EINSUM_A ? a : b, *other = operand == EINSUM_A ? b : a;
    const char *error = einsum_gradient(gradient, specification, operand);
    error = error ? error : einsum_plan(&plan, gradient, wanted, out, other);
    if (error)
        snprintf(text, size, "%s", error);
    else
        describe_einsum(text, size, gradient, &plan);
}

/* How many numbers a view holds; 0 if more than MOST_NUMBERS. */
static size_t count_of(const View *v)
{
    size_t count = 1;
    for (int i = 0; i < v->axes; i++) {
        if (v->size[i] > MOST_NUMBERS / count)
            return 0;
        count *= v->size[i];
    }
    return count;
}

/* "2,3,4" */
static const char *read_sizes(View *v, const char *text)
{
    static const char wrong[] =
        "sizes are up to eight numbers from 1 to 268435456 with commas between them, as 2,3,4, "
        "and their product is no more than that";
    size_t size[EINSUM_MAX_AXES];
    int axes = 0;
    for (const char *at = text; *at;) {
        char *end;
        unsigned long n = strtoul(at, &end, 10);
        if (*at < '0' || *at > '9' || n < 1 || n > MOST_NUMBERS || axes == EINSUM_MAX_AXES ||
            (*end == ',' ? end[1] == '\0' : *end != '\0'))
            return wrong;
        size[axes++] = n;
        at = end + (*end == ',');
    }
    *v = view_of(NULL, axes, size);
    return count_of(v) ? NULL : wrong;
}

const char *einsum_views(View *out, View *a, View *b, const char *specification, const char *sizes_a,
                         const char *sizes_b)
{
    EinsumWords words;
    const char *error = einsum_parse(&words, specification);
    error = error ? error : read_sizes(a, sizes_a);
    error = error ? error : read_sizes(b, sizes_b);
    if (error)
        return error;

    size_t size[EINSUM_MAX_AXES], axes = strlen(words.out);
    for (size_t i = 0; i < axes; i++) {
        const char *in_a = strchr(words.a, words.out[i]), *in_b = strchr(words.b, words.out[i]);
        if (in_a)
            size[i] = in_a - words.a < a->axes ? a->size[in_a - words.a] : 1;
        else
            size[i] = in_b - words.b < b->axes ? b->size[in_b - words.b] : 1;
    }
    *out = view_of(NULL, (int)axes, size);
    EinsumPlan plan;
    error = einsum_plan(&plan, specification, out, a, b);
    if (!error && count_of(out) == 0)
        error = "the result would have more than 268435456 numbers; take smaller sizes";
    return error;
}

int try_einsum(int argc, char **argv)
{
    if (argc != 3)
        die(EXIT_USAGE, "einsum takes a specification and two operands' sizes, as ./run einsum "
                        "\"bnd,do->bno\" 2,3,4 4,5");
    const char *specification = argv[0];
    View out, a, b;
    EinsumPlan plan;
    const char *error = einsum_views(&out, &a, &b, specification, argv[1], argv[2]);
    error = error ? error : einsum_plan(&plan, specification, &out, &a, &b);
    if (error)
        die(EXIT_USAGE, "%s", error);
    char text[400];
    describe_einsum(text, sizeof text, specification, &plan);
    printf("%s\n", text);
    for (int operand = EINSUM_A; operand <= EINSUM_B; operand++) {
        describe_gradient(text, sizeof text, specification, operand, &out, &a, &b);
        printf("%s  gradient of the %s operand\n", text, operand == EINSUM_A ? "first" : "second");
    }

    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, a.data = allocate_floats(count_of(&a)), count_of(&a));
    draw_randn(&stream, b.data = allocate_floats(count_of(&b)), count_of(&b));
    float *by_loops = allocate_floats(count_of(&out)), *by_einsum = allocate_floats(count_of(&out));

    double began = now();
    out.data = by_loops;
    einsum_loops(specification, out, a, b);
    double middle = now();
    out.data = by_einsum;
    einsum(specification, out, a, b);
    double ended = now(), largest = 0, difference = 0;

    bool nan = false;
    for (size_t i = 0; i < count_of(&out); i++) {
        nan = nan || isnan(by_loops[i]) || isnan(by_einsum[i]);
        largest = fmax(largest, fabs((double)by_loops[i]));
        difference = fmax(difference, fabs((double)by_loops[i] - by_einsum[i]));
    }
    bool same = !nan && difference <= 1e-5 * largest;
    printf("%s loops %.3f ms, einsum %.3f ms; they differ by %.1e at most, the largest number being %.3g\n",
           same ? "✓" : "✗", 1e3 * (middle - began), 1e3 * (ended - middle), difference, largest);
    free(a.data), free(b.data), free(by_loops), free(by_einsum);
    return same ? EXIT_PASSED : EXIT_CHECK_FAILED;
}
