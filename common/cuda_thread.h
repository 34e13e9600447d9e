/* What a .cu file needs to run its kernels, under nvcc and on the CPU stand-in alike:
 *
 *   LAUNCH(kernel, grid, block, shared_bytes, arguments..)   blocks of threads; an error ends the program with exit 3
 *   DYNAMIC_SHARED(type, name);                              the block's shared_bytes, as an array
 *   allow_shared(kernel, bytes);                             before a launch with more than 48 KiB of them
 *   check_cuda(call)                                         the same for a call of the CUDA runtime; nvcc only
 *   UNROLL for (..)                                          written out turn by turn, so that an array can be registers
 */
#ifndef COMMON_CUDA_THREAD_H
#define COMMON_CUDA_THREAD_H

#ifdef SIMT
#include "simt.h"

#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                       \
    simt_launch(#kernel, grid, block, shared_bytes, kernel, __VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type *name = (type *)simt_shared()
#define UNROLL

template <class Kernel> static inline void allow_shared(Kernel, size_t)
{
}

#else
#include "error.h"

#include <cuda_runtime.h>

#define check_cuda(call) check_cuda_status(call, #call, __FILE__, __LINE__)
static inline void check_cuda_status(cudaError_t status, const char *call, const char *file, int line)
{
    if (status != cudaSuccess)
        die(EXIT_UNAVAILABLE, "CUDA: %s in %.60s (%s:%d)", cudaGetErrorString(status), call, file, line);
}

#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                       \
    do {                                                                                                     \
        kernel<<<grid, block, shared_bytes>>>(__VA_ARGS__);                                                  \
        check_cuda_status(cudaGetLastError(), "launch of " #kernel, __FILE__, __LINE__);                     \
    } while (0)
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define UNROLL _Pragma("unroll")

template <class Kernel> static inline void allow_shared(Kernel kernel, size_t bytes)
{
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}
#endif

#endif
