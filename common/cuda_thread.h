/* What every .cu file includes: one source for nvcc and a GPU, and for a C++ compiler and the CPU stand-in.
 *
 *     __global__ static void add(float *to, const float *from, int n)
 *     {
 *         int i = blockIdx.x * blockDim.x + threadIdx.x;
 *         if (i < n)
 *             to[i] += from[i];
 *     }
 *     LAUNCH(add, (n + 255) / 256, 256, 0, to, from, n);
 *
 * LAUNCH(kernel, grid, block, shared_bytes, arguments...) starts the kernel; what fails at once ends the program
 * with exit code 3. A kernel with commas in its name goes in brackets: LAUNCH((tile<64, 32>), ...).
 * DYNAMIC_SHARED(float, name) in a kernel declares float *name, the shared_bytes of its block, 128-byte aligned.
 * DEVICE_TABLE(chapter) = {...}; defines the table of kernels, chapter_cuda or chapter_simt. */
#ifndef COMMON_CUDA_THREAD_H
#define COMMON_CUDA_THREAD_H

#include "host_device.h"

#ifdef __CUDACC__

#include "error.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

inline void check_cuda(cudaError_t status, const char *text, const char *file, int line)
{
    if (status != cudaSuccess)
        die(EXIT_UNAVAILABLE, "CUDA: %s in %.60s (%s:%d)", cudaGetErrorString(status), text, file, line);
}

/* Where all kernels are launched: one after the other. */
inline cudaStream_t cuda_stream()
{
    return 0;
}

/* A kernel that wants more than 48 KiB of shared memory has to say so before. */
template <class Kernel> cudaError_t allow_shared(Kernel kernel, size_t bytes)
{
    if (bytes <= 48 * 1024)
        return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                       \
    do {                                                                                                     \
        check_cuda(allow_shared(kernel, shared_bytes), #kernel, __FILE__, __LINE__);                         \
        kernel<<<grid, block, shared_bytes, cuda_stream()>>>(__VA_ARGS__);                                   \
        check_cuda(cudaGetLastError(), #kernel, __FILE__, __LINE__);                                         \
    } while (0)

#define DYNAMIC_SHARED(type, name)                                                                           \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];                                         \
    type *name = reinterpret_cast<type *>(dynamic_shared)

#define DEVICE_TABLE(chapter) extern "C" const Kernel chapter##_cuda[]

#else

#include "simt.h"

#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                       \
    simt_launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); })
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(simt_dynamic_shared)
#define DEVICE_TABLE(chapter) extern "C" const Kernel chapter##_simt[]

#endif
#endif
