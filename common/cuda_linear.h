/* nn.Linear on the device, forward and backward: the twin of linear() in matmul.h, for .cu files. All pointers are the
 * device's, all matrices row-major; rows must fit into an int. */
#ifndef COMMON_CUDA_LINEAR_H
#define COMMON_CUDA_LINEAR_H

#include "cuda_warp.h"
#if defined(SIMT) || defined(HAVE_CUBLAS)
#include "cublas.h"

/* out (rows,width): bias (width) in each row. */
[[maybe_unused]] __global__ static void fill_rows_kernel(float *out, const float *bias, size_t count,
                                                         int width)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x)
        out[i] = bias[i % width];
}

/* out (rows,outputs) = x (rows,inputs) W^T + bias, with W (outputs,inputs); bias may be NULL. */
static inline void device_linear(float *out, const float *x, const float *weight, const float *bias,
                                 size_t rows, int inputs, int outputs)
{
    size_t count = rows * outputs;
    if (bias)
        LAUNCH(fill_rows_kernel, blocks_for(count / WARP + 1), MOST_WARPS * WARP, 0, out, bias, count,
               outputs);
    device_matmul('N', 'T', (int)rows, outputs, inputs, 1, x, inputs, weight, inputs, bias ? 1 : 0, out,
                  outputs);
}

/* dx (rows,inputs) = dout W + beta * dx, dweight (outputs,inputs) = dout^T x. */
static inline void device_linear_backward(float *dx, float beta, float *dweight, const float *dout,
                                          const float *x, const float *weight, size_t rows, int inputs,
                                          int outputs)
{
    device_matmul('N', 'N', (int)rows, inputs, outputs, 1, dout, outputs, weight, inputs, beta, dx, inputs);
    device_matmul('T', 'N', outputs, inputs, (int)rows, 1, dout, outputs, x, inputs, 0, dweight, inputs);
}

#endif

/* A block to 32 columns, a column to each lane. Each warp adds up every MOST_WARPS-th row, and their sums are added in
 * their order. */
[[maybe_unused]] __global__ static void sum_rows_kernel(float *sum, const float *y, size_t rows, int width)
{
    __shared__ float part[MOST_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float own = 0;
    for (size_t row = warp; column < width && row < rows; row += MOST_WARPS)
        own += y[row * width + column];
    part[warp][lane] = own;
    __syncthreads();
    if (warp > 0 || column >= width)
        return;
    for (int i = 1; i < MOST_WARPS; i++)
        own += part[i][lane];
    sum[column] = own;
}

/* sum (width) = the sum of the rows of y (rows,width): the gradient of a bias. */
static inline void device_sum_rows(float *sum, const float *y, size_t rows, int width)
{
    LAUNCH(sum_rows_kernel, (width + WARP - 1) / WARP, MOST_WARPS * WARP, 0, sum, y, rows, width);
}

#endif
