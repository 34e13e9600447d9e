/* What every chapter promises: its kernels agree with the oracle over the ugly shapes, its own checks hold,
 * its story is true. */
#include "chapter.h"
#include "story.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

/* A test takes every SLICES-th case. Each is a process, and where CUDA's libraries are linked to it, they need a tenth of a second
 * before it begins: so there are not as many as cases. */
enum { SLICES = 12 };

static struct criterion_test_params slices_of(const Chapter *of)
{
    int count = check_count(of) < SLICES ? check_count(of) : SLICES;
    int *numbers = cr_malloc((count + 1) * sizeof *numbers);
    for (int i = 0; i < count; i++)
        numbers[i] = i;
    return cr_make_param_array(int, numbers, count);
}

static void check_slice(const Chapter *of, int slice)
{
    for (int i = slice; i < check_count(of); i += SLICES) {
        char text[600];
        cr_expect(check_case(of, i, text, sizeof text), "%s", text);
    }
}

ParameterizedTestParameters(chapter, check)
{
    return slices_of(&chapter);
}

ParameterizedTest(int *slice, chapter, check)
{
    check_slice(&chapter, *slice);
}

/* The same shapes for its CUDA kernels, on the CPU stand-in. */
static Kernel simt_rows[MAX_DEVICE_ROWS];

ParameterizedTestParameters(chapter, check_simt)
{
    Chapter simt = chapter_on(&chapter, DEVICE_SIMT, simt_rows);
    return slices_of(&simt);
}

ParameterizedTest(int *slice, chapter, check_simt)
{
    Chapter simt = chapter_on(&chapter, DEVICE_SIMT, simt_rows);
    check_slice(&simt, *slice);
}

/* --list names a kernel's devices from a list of words: is each row of the table there? */
Test(chapter, device_kernels_are_named)
{
    for (const DeviceKernels *file = chapter.device_kernels; file->names; file++)
        for (const Kernel *k = file->simt; k && k->name; k++)
            cr_expect(strstr(file->names, k->name), "%s is missing in DEVICE_KERNELS", k->name);
}

/* The story runs full sizes: not under sanitizers. */
Test(chapter, story_holds)
{
    if (getenv("SMALL"))
        return;
    cr_redirect_stdout();
    cr_expect(tell_story(&chapter, 2) == 0, "./run shows a cross: type it to see where");
}
