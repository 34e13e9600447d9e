/* Copies from global to shared memory that go on while the threads compute (cp.async). For .cu files.
 *
 * A thread starts copies of its own, closes a group of them with copy_async_commit(), and waits until at most N of its
 * groups are still under way with copy_async_wait<N>(); a barrier then shows them to the block. Where `there` is false
 * zeros are written, and `global` is not read. */
#ifndef COMMON_CUDA_TENSOR_H
#define COMMON_CUDA_TENSOR_H

#include "cuda_thread.h"

#ifdef SIMT
static inline void copy_async_16(void *shared, const void *global, bool there)
{
    there ? memcpy(shared, global, 16) : memset(shared, 0, 16);
}

static inline void copy_async_4(void *shared, const void *global, bool there)
{
    there ? memcpy(shared, global, 4) : memset(shared, 0, 4);
}

static inline void copy_async_commit()
{
}

template <int N> static inline void copy_async_wait()
{
}

#else
/* Both places begin at a multiple of 16 bytes. Past the first cache, which would not be read again. */
__device__ static inline void copy_async_16(void *shared, const void *global, bool there)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(there ? 16 : 0)
        : "memory");
}

__device__ static inline void copy_async_4(void *shared, const void *global, bool there)
{
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(there ? 4 : 0)
        : "memory");
}

__device__ static inline void copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ static inline void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

#endif
