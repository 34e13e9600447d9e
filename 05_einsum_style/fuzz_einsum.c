/* einsum_parse on any bytes, for libFuzzer; what it takes is then run both ways, which must agree. `make
 * fuzz` builds and runs it. */
#include "einsum.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                                                   \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            abort();                                                                                         \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);

static void check_error(const char *error)
{
    size_t open = 0, close = 0;
    REQUIRE(strncmp(error, "einsum \"", 8) == 0 && strlen(error) < 400);
    for (const char *c = error; *c; c++) {
        REQUIRE(*c >= ' ' && *c <= '~');
        open += *c == '[';
        close += *c == ']';
    }
    REQUIRE(open > 0 && close > 0); /* the place is marked */
}

/* One thing only is taken: words of letters that put together are the text again. */
static void check_words(const EinsumWords *w, const char *specification)
{
    char again[64];
    REQUIRE(strlen(w->a) <= EINSUM_MAX_AXES && strlen(w->b) <= EINSUM_MAX_AXES &&
            strlen(w->out) <= EINSUM_MAX_AXES);
    snprintf(again, sizeof again, "%s,%s->%s", w->a, w->b, w->out);
    REQUIRE(strcmp(again, specification) == 0);
    for (const char *c = w->out; *c; c++)
        REQUIRE((strchr(w->a, *c) || strchr(w->b, *c)) && !strchr(c + 1, *c));
}

/* Letters of length 1 to 3, chosen by the seed; 1 or 2 where there are many. */
static View view_of_letters(const char *word, unsigned seed, int longest)
{
    size_t size[EINSUM_MAX_AXES], count = 1;
    int axes = (int)strlen(word);
    for (int i = 0; i < axes; i++)
        count *= size[i] = 1 + (seed >> (word[i] % 7)) % longest;
    View v = view_of(NULL, axes, size);
    v.data = malloc(count * sizeof *v.data);
    for (size_t i = 0; i < count; i++)
        v.data[i] = (float)((i * 7 + seed) % 5) - 2; /* small integers: every sum is exact */
    return v;
}

static size_t count_of(const View *v)
{
    size_t count = 1;
    for (int i = 0; i < v->axes; i++)
        count *= v->size[i];
    return count;
}

static void run_both_ways(const EinsumWords *w, const char *specification, unsigned seed)
{
    int longest = strlen(w->a) + strlen(w->b) > 8 ? 2 : 3;
    View a = view_of_letters(w->a, seed, longest), b = view_of_letters(w->b, seed, longest);
    View by_loops = view_of_letters(w->out, seed, longest),
         by_einsum = view_of_letters(w->out, seed, longest);
    EinsumPlan plan;
    REQUIRE(einsum_plan(&plan, specification, &by_loops, &a, &b) == NULL);
    REQUIRE(plan.letters <= EINSUM_MAX_LETTERS);
    einsum_loops(specification, by_loops, a, b);
    einsum(specification, by_einsum, a, b);
    for (size_t i = 0; i < count_of(&by_loops); i++)
        REQUIRE(by_loops.data[i] == by_einsum.data[i]);
    free(a.data), free(b.data), free(by_loops.data), free(by_einsum.data);
}

/* A gradient is refused as a specification is; one that is taken has the first again for its own gradient. */
static void check_gradients(const char *specification)
{
    char text[EINSUM_TEXT], again[EINSUM_TEXT];
    for (int x = EINSUM_A; x <= EINSUM_B; x++) {
        const char *error = einsum_gradient(text, specification, x);
        if (error)
            check_error(error);
        else
            REQUIRE(einsum_gradient(again, text, EINSUM_A) == NULL &&
                    (x == EINSUM_B || strcmp(again, specification) == 0));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length)
{
    if (length == 0)
        return 0;
    char *specification = malloc(length); /* no longer than it is, so that a step too far is seen */
    memcpy(specification, bytes + 1, length - 1);
    specification[length - 1] = '\0';

    EinsumWords words;
    memset(&words, 0xFF, sizeof words);
    const char *error = einsum_parse(&words, specification);
    if (error) {
        check_error(error);
    } else {
        check_words(&words, specification);
        check_gradients(specification);
        run_both_ways(&words, specification, bytes[0] * 2654435761u);
    }
    free(specification);
    return 0;
}
