/* PyTorch's random numbers, from the seed alone: the CPU generator (MT19937) and the CUDA generator
 * (Philox4x32-10). Matsumoto and Nishimura 1998; Salmon et al. 2011; the transformations are those of
 * PyTorch 2.
 */
#ifndef COMMON_RANDOM_H
#define COMMON_RANDOM_H

#include "philox.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { STREAM_CPU, STREAM_CUDA } StreamKind;

/* A generator's whole state: copy the struct to remember a place in the stream. */
struct RandomStream {
    StreamKind kind;
    uint64_t seed;
    /* STREAM_CPU */
    uint32_t state[624];
    int position;
    bool has_normal; /* a normal number is left over from a randn of fewer than 16 */
    double normal;
    /* STREAM_CUDA: where the next call starts, and the GPU whose launches are imitated */
    uint64_t offset;
    int multiprocessors,
        threads_per_multiprocessor; /* only large tensors depend on them; an A100 has 108 and 2048 */
};
typedef struct RandomStream RandomStream;

/* torch.manual_seed(seed). For STREAM_CUDA the geometry is an A100's; set the two fields for another GPU. */
void seed_stream(RandomStream *stream, StreamKind kind, uint64_t seed);

/* torch.rand: n floats in [0, 1). */
void draw_rand(RandomStream *stream, float *out, size_t n);

/* tensor.uniform_(from, to). nn.Linear draws its weight, then its bias, with to = -from = 1 / sqrt(inputs). */
void draw_uniform(RandomStream *stream, float *out, size_t n, float from, float to);

/* torch.randn: n floats of the standard normal distribution. */
void draw_randn(RandomStream *stream, float *out, size_t n);

/* nn.Dropout's mask as PyTorch's CPU draws it: keep[i] is 1 with probability 1 - p. p = 0 draws nothing and
 * keeps all. Only for STREAM_CPU. */
void draw_dropout(RandomStream *stream, uint8_t *keep, size_t n, double p);

/* nn.Dropout in place: each value is zeroed with probability p, or multiplied by 1 / (1 - p). */
void apply_dropout(RandomStream *stream, float *values, size_t n, double p);

/* The bounds that the two initialisations of the notebooks use, for draw_uniform(-bound, bound). */
float linear_bound(int inputs); /* nn.Linear, and kaiming_uniform with a = sqrt(5): 1 / sqrt(inputs) */
float xavier_bound(int inputs, int outputs); /* xavier_uniform: sqrt(6 / (inputs + outputs)) */

/* Dropout drawn by position: does the pair (row, key) stay? row is (b*NH + h)*T + t. Any order of asking
 * gives the same answer, so tiles, threads and the backward pass agree without storing anything. */
bool dropout_keeps(uint64_t seed, size_t row, int key, float p);

#endif
