/* Between rows of tokens, as projections give them, and heads, as attention takes them: a thread to each number. For .cu files;
 * all pointers are the device's. */
#ifndef COMMON_CUDA_HEADS_H
#define COMMON_CUDA_HEADS_H

#include "cuda_warp.h"
#include "shape.h"

/* heads (B,n,T,HS) from n*HS columns of rows (B,T,width), the first of which `rows` points to. */
__global__ static void split_heads_kernel(float *heads, const float *rows, size_t width, int n, int T, int HS,
                                          size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        size_t d = i % HS, t = i / HS % T, h = i / HS / T % n, b = i / HS / T / n;
        heads[i] = rows[(b * T + t) * width + h * HS + d];
    }
}

/* The other way. */
__global__ static void join_heads_kernel(float *rows, size_t width, const float *heads, int n, int T, int HS,
                                         size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        size_t d = i % HS, h = i / HS % n, t = i / HS / n % T, b = i / HS / n / T;
        rows[(b * T + t) * width + h * HS + d] = heads[((b * n + h) * T + t) * HS + d];
    }
}

static inline size_t numbers_of_heads(int n, const AttentionShape *s)
{
    return (size_t)s->batch * n * s->tokens * s->head_size;
}

static inline void split_heads(float *heads, const float *rows, size_t width, int n, const AttentionShape *s)
{
    size_t count = numbers_of_heads(n, s);
    LAUNCH(split_heads_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, heads, rows, width, n,
           s->tokens, s->head_size, count);
}

static inline void join_heads(float *rows, size_t width, const float *heads, int n, const AttentionShape *s)
{
    size_t count = numbers_of_heads(n, s);
    LAUNCH(join_heads_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, rows, width, heads, n,
           s->tokens, s->head_size, count);
}

#endif
