/* Memory that is asked for once, checked, and counted. */
#ifndef COMMON_MEMORY_H
#define COMMON_MEMORY_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* n floats, 64-byte aligned, uninitialised; free() them. Ends the program with exit 3 where there is no room.
 */
float *allocate_floats(size_t n);

/* n zeroed elements of `size` bytes; likewise. */
void *allocate_zeroed(size_t n, size_t size);

/* Bytes that can still be had without swapping: what the system says is available. */
size_t available_memory(void);

/* "1.5 GiB", "96 MiB", "12 KiB": for people. A static buffer, one of four in turn. */
const char *bytes_text(double bytes);

#ifdef __cplusplus
}
#endif

#endif
