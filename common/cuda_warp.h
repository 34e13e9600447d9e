/* What a kernel does with a warp, and how many of them it is given. For .cu files. */
#ifndef COMMON_CUDA_WARP_H
#define COMMON_CUDA_WARP_H

#include "cuda_thread.h"
#include "host_device.h"

#include <math.h>
#include <stddef.h>

enum {
    WARP = 32,
    MOST_WARPS = 8,        /* of a block */
    MOST_BLOCKS = 1 << 20, /* of a grid: a warp takes one task after the other where there are more */
};

/* Blocks of MOST_WARPS warps for `tasks` of a warp each. */
static inline int blocks_for(size_t tasks)
{
    size_t blocks = (tasks + MOST_WARPS - 1) / MOST_WARPS;
    return blocks < MOST_BLOCKS ? (int)blocks : MOST_BLOCKS;
}

HOST_DEVICE static inline int smaller(int a, int b)
{
    return a < b ? a : b;
}

__device__ static inline float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* The dot product of two rows of HS numbers, without the `width` numbers from `first` on. */
__device__ static inline float dot_outside(const float *a, const float *b, int first, int width, int HS)
{
    int next = first + width;
    return dot(a, b, first) + dot(a + next, b + next, HS - next);
}

/* The larger of two; a NaN wins, and stays. */
__device__ static inline float larger(float a, float b)
{
    return b <= a || isnan(a) ? a : b;
}

/* Over the warp's lanes, in a fixed order; every lane gets it. */
__device__ static inline float warp_largest(float value)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, apart));
    return value;
}

__device__ static inline float warp_sum(float value)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
    return value;
}

#endif
