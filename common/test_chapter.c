/* What every chapter promises: its kernels agree with the oracle over the ugly shapes, its own checks hold,
 * its story is true. */
#include "chapter.h"
#include "story.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <stdlib.h>

extern const Chapter chapter;

ParameterizedTestParameters(chapter, check)
{
    int count = check_count(&chapter);
    int *numbers = cr_malloc(count * sizeof *numbers);
    for (int i = 0; i < count; i++)
        numbers[i] = i;
    return cr_make_param_array(int, numbers, count);
}

ParameterizedTest(int *i, chapter, check)
{
    char text[600];
    cr_expect(check_case(&chapter, *i, text, sizeof text), "%s", text);
}

/* The story runs full sizes: not under sanitizers. */
Test(chapter, story_holds)
{
    if (getenv("SMALL"))
        return;
    cr_redirect_stdout();
    cr_expect(tell_story(&chapter, 2) == 0, "./run shows a cross: type it to see where");
}
