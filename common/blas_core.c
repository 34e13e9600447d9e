/* Which kernels OpenBLAS takes for this processor, and how it is made to take better ones. */
#include "matmul.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>
#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif

/* Set to OpenBLAS's own choice while it runs with ours. */
#define OWN_CHOICE "OPENBLAS_OWN_CHOICE"

static bool uses_avx512(const char *core)
{
    return !strcasecmp(core, "SkylakeX") || !strcasecmp(core, "Cooperlake") ||
           !strcasecmp(core, "SapphireRapids");
}

bool better_core_wanted(bool processor_has_avx512, const char *core, const char *users_choice,
                        const char *own_choice)
{
    return processor_has_avx512 && !uses_avx512(core) && !users_choice && !own_choice;
}

void core_text(char *text, size_t size, const char *version, bool processor_has_avx512, const char *core,
               const char *own_choice)
{
    int length = snprintf(text, size, "%s, core %s", version, core);
    if (length < 0 || (size_t)length >= size)
        return;
    if (own_choice && strcasecmp(core, own_choice) != 0)
        snprintf(text + length, size - length, " (taken instead of its own choice %s)", own_choice);
    else if (processor_has_avx512 && !uses_avx512(core))
        snprintf(text + length, size - length, " (leaves this processor's AVX-512 unused)");
}

#ifdef HAVE_OPENBLAS

static bool processor_has_avx512(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

const char *matmul_library(void)
{
    static char text[200];
    char version[64] = "OpenBLAS", number[32];
    if (sscanf(openblas_get_config(), "OpenBLAS %31s", number) == 1)
        snprintf(version, sizeof version, "OpenBLAS %s", number);
    core_text(text, sizeof text, version, processor_has_avx512(), openblas_get_corename(),
              getenv(OWN_CHOICE));
    return text;
}

void choose_blas_core(char **argv)
{
    const char *core = openblas_get_corename();
    if (!better_core_wanted(processor_has_avx512(), core, getenv("OPENBLAS_CORETYPE"), getenv(OWN_CHOICE)))
        return;
    setenv(OWN_CHOICE, core, 1);
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 1);
    execv("/proc/self/exe", argv); /* returns only if it could not */
    unsetenv(OWN_CHOICE);
    unsetenv("OPENBLAS_CORETYPE");
}

#else

const char *matmul_library(void)
{
#if defined(HAVE_ACCELERATE)
    return "Accelerate";
#elif defined(HAVE_CBLAS)
    return "CBLAS";
#else
    return "plain loops (no CBLAS found)";
#endif
}

void choose_blas_core(char **argv)
{
    (void)argv;
}

#endif
