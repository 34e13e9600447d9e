/* parse_npy on any bytes, for libFuzzer:
 *
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -Icommon common/fuzz_npy.c common/npy.c -o
 * fuzz_npy
 *   ./fuzz_npy -max_total_time=60
 */
#include "npy.h"

#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                                                   \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            abort();                                                                                         \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length)
{
    NpyArray array;
    memset(&array, 0xFF, sizeof array);
    const char *problem = parse_npy(&array, bytes, length);
    if (problem) { /* one line of plain text, and nothing to free */
        REQUIRE(array.data == NULL && *problem && strlen(problem) < 512);
        for (const char *c = problem; *c; c++)
            REQUIRE(*c >= ' ' && *c < 127);
        return 0;
    }

    size_t product = 1;
    REQUIRE(array.axes >= 1 && array.axes <= NPY_MAX_AXES);
    for (int i = 0; i < array.axes; i++) {
        REQUIRE(array.size[i] >= 1);
        product *= array.size[i];
    }
    REQUIRE(array.count == product && array.count <= length / 4);

    volatile float sum = 0; /* every number can be read */
    for (size_t i = 0; i < array.count; i++)
        sum += array.data[i];
    free(array.data);
    return 0;
}
