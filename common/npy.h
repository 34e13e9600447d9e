/* Tensors in NumPy's .npy files (format versions 1.0 to 3.0): little-endian f4 and f8, C order.
 * https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html */
#ifndef COMMON_NPY_H
#define COMMON_NPY_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { NPY_MAX_AXES = 4 };

typedef struct {
    int axes;
    size_t size[NPY_MAX_AXES];
    size_t count; /* the product of the sizes; no size is zero */
    float *data;  /* malloc'ed; f8 is rounded to float */
} NpyArray;

/* Reads a whole file. Returns NULL, or one line that says what is wrong and what would be right (a static
 * buffer, valid until the next call); then array->data is NULL. Never trusts the header: every size is
 * checked against the file's length before memory is asked for. */
const char *read_npy(NpyArray *array, const char *path);

/* The same from bytes in memory: what read_npy stands on, and what the fuzzer feeds. */
const char *parse_npy(NpyArray *array, const uint8_t *bytes, size_t length);

/* Writes float32, version 1.0, to a temporary file beside PATH and renames it over PATH, so that PATH is
 * replaced whole or not at all. Returns NULL, or what went wrong. */
const char *write_npy(const char *path, const float *data, const size_t *size, int axes);

/* (8, 1024, 768), as Python prints it. */
void size_text(char *text, size_t length, const size_t *size, int axes);

#endif
