/* The CPU stand-in for CUDA threads. The blocks of a launch run one after the other; the threads of a block are fibres
 * of one processor thread, each of which runs until it waits for its warp or its block. A kernel in which the threads
 * of a warp, or the warps of a block, do not all come to the same barrier ends the program. The order in which threads
 * run is always the same, and changes direction at every barrier, so that what relies on an order is likely to show. */
#ifndef COMMON_SIMT_H
#define COMMON_SIMT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static /* one block at a time */

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

/* Of the thread that is running. Blocks have one axis of threads; grids may have three. */
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void simt_run(dim3 grid, unsigned threads, size_t shared_bytes, void (*body)(void *), void *context);
void *simt_shared();        /* the block's shared memory, NaN at first */
void simt_wait_for_warp();  /* until all 32 threads are here, or the block's last few */
void simt_wait_for_block(); /* until all threads of the block are here */
uint32_t simt_exchange(uint32_t value, unsigned source); /* what lane `source` of the warp gave */

template <typename Kernel> void simt_launch(dim3 grid, unsigned threads, size_t shared_bytes, Kernel kernel)
{
    simt_run(
        grid, threads, shared_bytes, [](void *context) { (*(Kernel *)context)(); }, &kernel);
}

static inline void __syncthreads()
{
    simt_wait_for_block();
}

static inline void __syncwarp()
{
    simt_wait_for_warp();
}

/* For values of four bytes, and the whole warp. */
template <typename T> T simt_shuffle(T value, unsigned source)
{
    static_assert(sizeof(T) == 4, "four bytes");
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = simt_exchange(bits, source % 32);
    memcpy(&value, &bits, 4);
    return value;
}

template <typename T> T __shfl_sync(unsigned, T value, int source)
{
    return simt_shuffle(value, source);
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask)
{
    return simt_shuffle(value, threadIdx.x % 32 ^ mask);
}

template <typename T> T __shfl_down_sync(unsigned, T value, unsigned down)
{
    unsigned lane = threadIdx.x % 32;
    return simt_shuffle(value, lane + down < 32 ? lane + down : lane);
}

#endif
