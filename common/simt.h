/* The CPU stand-in for CUDA threads: what a .cu file's kernels need of CUDA C++, for the host's compiler.
 *
 * A thread of a block is a fibre: a stack of its own and a place in the code to go on from. Fibres of a block take turns on one
 * processor thread; each runs until it waits for its warp (__syncwarp, a shuffle, a ballot) or for its block (__syncthreads).
 * Whose turn is next is drawn at random, from SIMT_SEED and the block's number, so that a kernel that lacks a barrier
 * sees numbers that are not there yet; shared memory given at the launch is NaN at first. The blocks of a large launch run side
 * by side on all processor threads, in no order.
 *
 * What a GPU would not tell ends the program, with exit 1 and one line: threads of a warp, or warps of a block, that wait at
 * different places, or not at all. Built with AddressSanitizer (SANITIZE=yes) a block's shared memory and the device's memory
 * have bounds, and the blocks run one after the other.
 *
 * Blocks and grids may have three axes. Every lane of a warp has to take part in what a warp does together. */
#ifndef COMMON_SIMT_H
#define COMMON_SIMT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ONE_BY_ONE 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ONE_BY_ONE 1
#endif
#endif
#ifdef SIMT_ONE_BY_ONE
#define __shared__ static /* has bounds; one block at a time */
#else
#define __shared__ static thread_local /* one block at a time to each processor thread */
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 : uint3 {
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : uint3{x_, y_, z_}
    {
    }
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
static inline float2 make_float2(float x, float y)
{
    return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

/* ---- Of the thread that is running ---- */

struct SimtThread {
    uint3 thread, block, block_size, grid_size;
    unsigned lane;
};
extern __thread SimtThread simt_thread;
#define threadIdx simt_thread.thread
#define blockIdx simt_thread.block
#define blockDim simt_thread.block_size
#define gridDim simt_thread.grid_size

/* ---- Launching ---- */

/* Runs body(context) in every thread of every block. kernel: its name, for messages. */
void simt_run(const char *kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void *),
              const void *context);
void simt_set_seed(uint64_t seed); /* in place of SIMT_SEED */
void *simt_shared();               /* the block's shared memory */

/* Arguments are copied, as a launch copies them. */
template <typename... Parameters, typename... Arguments>
static void simt_launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                        void (*kernel)(Parameters...), Arguments... arguments)
{
    auto call = [=] { kernel(arguments...); };
    simt_run(
        name, grid, block, shared_bytes, [](const void *context) { (*(const decltype(call) *)context)(); },
        &call);
}

/* ---- Waiting. A caller's place in the source comes along by itself. ---- */

struct SimtPlace {
    const char *what, *file;
    int line;
};
void simt_wait_for_block(SimtPlace place);
void simt_wait_for_warp(SimtPlace place);

/* Gives `bytes` of value, up to 32, to the warp and waits for all of it. */
void simt_give(const void *value, size_t bytes, SimtPlace place);
/* What lane `from` gave in this lane's last exchange; NULL: the block has no such thread. It holds until the next. */
const void *simt_given(unsigned from);

#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(SIMT_PLACE)
{
    simt_wait_for_block({"__syncthreads", file, line});
}

static inline void __syncwarp(unsigned = 0xFFFFFFFFu, SIMT_PLACE)
{
    simt_wait_for_warp({"__syncwarp", file, line});
}

template <typename T> T simt_shuffle(T value, unsigned from, SimtPlace place)
{
    static_assert(sizeof(T) <= 32, "32 bytes at most");
    simt_give(&value, sizeof value, place);
    const void *given = simt_given(from);
    if (given)
        memcpy(&value, given, sizeof value);
    return value;
}

template <typename T> T __shfl_sync(unsigned, T value, int from, SIMT_PLACE)
{
    return simt_shuffle(value, from % 32, {"__shfl_sync", file, line});
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, SIMT_PLACE)
{
    return simt_shuffle(value, simt_thread.lane ^ mask, {"__shfl_xor_sync", file, line});
}

template <typename T> T __shfl_down_sync(unsigned, T value, unsigned down, SIMT_PLACE)
{
    unsigned lane = simt_thread.lane;
    return simt_shuffle(value, lane + down < 32 ? lane + down : lane, {"__shfl_down_sync", file, line});
}

template <typename T> T __shfl_up_sync(unsigned, T value, unsigned up, SIMT_PLACE)
{
    unsigned lane = simt_thread.lane;
    return simt_shuffle(value, lane >= up ? lane - up : lane, {"__shfl_up_sync", file, line});
}

static inline unsigned simt_ballot(bool yes, SimtPlace place)
{
    unsigned votes = 0;
    simt_give(&yes, sizeof yes, place);
    for (unsigned lane = 0; lane < 32; lane++) {
        const bool *vote = (const bool *)simt_given(lane);
        votes |= (unsigned)(vote && *vote) << lane;
    }
    return votes;
}

static inline unsigned __ballot_sync(unsigned, bool yes, SIMT_PLACE)
{
    return simt_ballot(yes, {"__ballot_sync", file, line});
}

static inline bool __any_sync(unsigned, bool yes, SIMT_PLACE)
{
    return simt_ballot(yes, {"__any_sync", file, line}) != 0;
}

static inline bool __all_sync(unsigned, bool yes, SIMT_PLACE)
{
    return simt_ballot(!yes, {"__all_sync", file, line}) == 0;
}

/* ---- Copies that go on while the thread does (cp.async; cuda_tensor.h has them for kernels). What is copied to is NaN at once,
 * and there only when the thread waits for its group: a wait that is missing is a wrong result. A thread that ends with
 * copies under way ends the program. ---- */

void simt_start_copy(void *to, const void *from, size_t bytes); /* from NULL: zeros */
void simt_close_group(void);                                    /* of the copies started since the last */
void simt_wait_for_groups(unsigned newest);                     /* for all groups but the `newest` */

/* ---- What blocks do to one number at once ---- */

template <typename T> T atomicAdd(T *sum, T more)
{
    T was, is;
    __atomic_load(sum, &was, __ATOMIC_RELAXED);
    do
        is = was + more;
    while (!__atomic_compare_exchange(sum, &was, &is, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return was;
}

template <typename T> T atomicMax(T *largest, T other)
{
    T was, is;
    __atomic_load(largest, &was, __ATOMIC_RELAXED);
    do
        is = was < other ? other : was;
    while (!__atomic_compare_exchange(largest, &was, &is, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return was;
}

/* ---- Arithmetic that CUDA has under other names ---- */

#define __expf expf

static inline float __fdividef(float a, float b)
{
    return a / b;
}

static inline float rsqrtf(float x)
{
    return 1 / sqrtf(x);
}

template <typename T> T __ldg(const T *address)
{
    return *address;
}

template <typename T> T min(T a, T b)
{
    return b < a ? b : a;
}

template <typename T> T max(T a, T b)
{
    return a < b ? b : a;
}

#endif
