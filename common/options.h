/* The command line, the same in every chapter. */
#ifndef COMMON_OPTIONS_H
#define COMMON_OPTIONS_H

#include "device.h"
#include "npy.h"
#include "random.h"

#include <stdio.h>

typedef enum { PASS_FORWARD, PASS_BACKWARD, PASS_BOTH } Pass;
typedef enum { DTYPE_F32, DTYPE_BF16 } Dtype;

/* What the options said, as they said it. Sizes not given are 0, texts not given NULL; arrays come from
 * files. */
typedef struct {
    bool help, list, check, bench;
    const char *kernel; /* NULL: all */
    Device device;
    int batch, tokens, key_tokens, embed, embed_out, heads, kv_heads, head_size;
    const char *x_path, *q_path, *k_path, *v_path, *bias_path, *dout_path;
    NpyArray x, q, k, v, bias, dout; /* read at once; data is NULL where there is no file */
    bool bias_randn, dout_randn;
    bool causal;
    const char *mask, *lengths;
    bool has_scale;
    float scale;
    double dropout;
    int tile_rows, tile_columns, block; /* 0: not given */
    bool has_seed, has_rng;
    uint64_t seed;
    StreamKind rng;
    int multiprocessors, threads_per_multiprocessor; /* of --rng cuda:108x2048; 0: not given */
    Pass pass;
    Dtype dtype;
    int threads; /* 0: all cores */
    const char *save;
    int repeat;
    bool has_repeat;
    const char *tsv;
} Options;

/* Reads argv, which getopt may reorder. Ends the program with exit 2 and one line on bad usage or a bad file,
 * with exit 1 where a file holds NaN. */
void parse_options(Options *options, int argc, char **argv);
void free_options(Options *options);

/* The options, a line each, as --help prints them. */
void print_options(FILE *file);

#endif
