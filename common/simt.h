/* A stand-in for CUDA threads, so that kernels run, and are tested, where there is no GPU.
 *
 * A kernel is one function, run by many threads. They come in blocks: the threads of a block run on one piece of
 * the GPU, share its __shared__ memory, and can wait for each other at __syncthreads(), a barrier that none
 * passes until all have come. Blocks know nothing of each other. Within a block every 32 threads are a warp;
 * its threads, the lanes, can hand each other values without memory (__shfl_sync and the like).
 *
 * Here each thread of a block is a fibre: a stack of its own and the place in the code where it stopped. One
 * processor thread runs one block. It takes the block's fibres in an order drawn at random (environment:
 * SIMT_SEED), and each runs until it has to wait for others: at a barrier, or in an operation of its warp. A
 * barrier that is missing therefore shows: some fibre reads what another has not yet written. OpenMP runs several
 * blocks side by side.
 *
 * What a GPU would hide or hang on ends the program with one line and exit code 1:
 *   - some threads wait at a barrier, while others have ended or wait elsewhere;
 *   - lanes that the mask of a warp's operation names do not come to it.
 * Under AddressSanitizer, what lies beyond shared or global arrays is found too; then one block runs at a time.
 *
 * Not like a GPU: an atomicAdd's order differs from run to run only if OpenMP has more than one thread; there are
 * no caches, banks or clocks; __expf and its kin are the exact functions. */
#ifndef COMMON_SIMT_H
#define COMMON_SIMT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* #pragma unroll */

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#ifdef SIMT_ASAN
#define __shared__ static /* AddressSanitizer does not look beyond thread-local arrays */
#else
#define __shared__ static __thread
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

/* ---- Threads. These names are those of the fibre that runs now. ---- */

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
extern __thread unsigned char *simt_dynamic_shared;
static const int warpSize = 32;

/* Runs body(argument) once for each thread of each block. shared_bytes: of a block, filled with NaN before it. */
void simt_run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void *), const void *argument);

template <class Body> void simt_launch(dim3 grid, dim3 block, size_t shared_bytes, Body body)
{
    simt_run(
        grid, block, shared_bytes, [](const void *p) { (*static_cast<const Body *>(p))(); }, &body);
}

/* Where in the source a thread waits, and for what. */
struct SimtPlace {
    const char *what, *file;
    int line;
};
#define SIMT_HERE(what)                                                                                      \
    SimtPlace                                                                                                \
    {                                                                                                        \
        what, __FILE__, __LINE__                                                                             \
    }

/* Waits until all threads of the block are there. */
void simt_barrier(SimtPlace place);
#define __syncthreads() simt_barrier(SIMT_HERE("__syncthreads"))

/* Waits until all lanes of the mask are there, each with an operand of its own. The last to come does the work for
 * all, together(operand of each lane, mask), while the others stand still; then all go on. Lanes that the block
 * has no threads for are taken out of the mask. */
typedef void SimtTogether(void *const *operand, unsigned mask);
void simt_warp(unsigned mask, void *operand, SimtTogether *together, SimtPlace place);

inline int simt_lane()
{
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

/* ---- Operations of a warp ---- */

inline void simt_nothing(void *const *, unsigned)
{
}
inline void simt_syncwarp(SimtPlace place)
{
    simt_warp(0xFFFFFFFFu, nullptr, simt_nothing, place);
}
inline void simt_syncwarp(SimtPlace place, unsigned mask)
{
    simt_warp(mask, nullptr, simt_nothing, place);
}
#define __syncwarp(...) simt_syncwarp(SIMT_HERE("__syncwarp"), ##__VA_ARGS__)

template <class T> struct SimtShuffle {
    T value, result;
    int source;
    static void together(void *const *operand, unsigned mask)
    {
        for (int lane = 0; lane < 32; lane++) {
            if (!(mask >> lane & 1))
                continue;
            SimtShuffle *own = static_cast<SimtShuffle *>(operand[lane]);
            /* a lane that takes no part has nothing to give: as good as any number, and seen in tests */
            if (mask >> own->source & 1)
                own->result = static_cast<SimtShuffle *>(operand[own->source])->value;
            else
                memset(static_cast<void *>(&own->result), 0xFF, sizeof(T));
        }
    }
};

/* The value of lane `source`; out of the lane's group of `width` lanes (up, down, xor): its own. */
template <class T> T simt_shuffle(SimtPlace place, unsigned mask, T value, int source, bool inside)
{
    SimtShuffle<T> operand = {value, value, inside ? source : simt_lane()};
    simt_warp(mask, &operand, SimtShuffle<T>::together, place);
    return operand.result;
}
template <class T> T simt_shfl(SimtPlace place, unsigned mask, T value, int source, int width = 32)
{
    int first = simt_lane() & ~(width - 1);
    return simt_shuffle(place, mask, value, first + (source & (width - 1)), true);
}
template <class T> T simt_shfl_xor(SimtPlace place, unsigned mask, T value, int bits, int width = 32)
{
    int lane = simt_lane(), source = lane ^ bits;
    return simt_shuffle(place, mask, value, source, source < (lane & ~(width - 1)) + width);
}
template <class T> T simt_shfl_up(SimtPlace place, unsigned mask, T value, unsigned by, int width = 32)
{
    int lane = simt_lane(), source = lane - (int)by;
    return simt_shuffle(place, mask, value, source, source >= (lane & ~(width - 1)));
}
template <class T> T simt_shfl_down(SimtPlace place, unsigned mask, T value, unsigned by, int width = 32)
{
    int lane = simt_lane(), source = lane + (int)by;
    return simt_shuffle(place, mask, value, source, source < (lane & ~(width - 1)) + width);
}
#define __shfl_sync(...) simt_shfl(SIMT_HERE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) simt_shfl_xor(SIMT_HERE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) simt_shfl_up(SIMT_HERE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) simt_shfl_down(SIMT_HERE("__shfl_down_sync"), __VA_ARGS__)

struct SimtVote {
    bool yes;
    unsigned result;
    static void together(void *const *operand, unsigned mask)
    {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++)
            if (mask >> lane & 1)
                votes |= (unsigned)static_cast<SimtVote *>(operand[lane])->yes << lane;
        for (int lane = 0; lane < 32; lane++)
            if (mask >> lane & 1)
                static_cast<SimtVote *>(operand[lane])->result = votes;
    }
};
inline unsigned simt_ballot(SimtPlace place, unsigned mask, bool yes)
{
    SimtVote operand = {yes, 0};
    simt_warp(mask, &operand, SimtVote::together, place);
    return operand.result;
}
#define __ballot_sync(mask, yes) simt_ballot(SIMT_HERE("__ballot_sync"), mask, yes)
#define __any_sync(mask, yes) (simt_ballot(SIMT_HERE("__any_sync"), mask, yes) != 0)
#define __all_sync(mask, yes) (simt_ballot(SIMT_HERE("__all_sync"), mask, !(yes)) == 0)
/* Each fibre runs alone, so each is the only one at work. */
#define __activemask() (1u << simt_lane())

/* ---- Memory ---- */

template <class T> T atomicAdd(T *address, T value)
{
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do
        after = before + value;
    while (!__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
template <class T> T __ldg(const T *address)
{
    return *address;
}
inline void __threadfence()
{
}

/* cp.async (see cuda_tensor.h): the copy happens when it is waited for, and until then `to` holds NaN. */
void simt_copy_async(void *to, const void *from, int copied, int bytes);
void simt_copy_commit();
void simt_copy_wait(int pending_groups);

/* ---- Numbers ---- */

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
inline float2 make_float2(float x, float y)
{
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

#define SIMT_MIN_MAX(T)                                                                                      \
    inline T min(T a, T b)                                                                                   \
    {                                                                                                        \
        return b < a ? b : a;                                                                                \
    }                                                                                                        \
    inline T max(T a, T b)                                                                                   \
    {                                                                                                        \
        return a < b ? b : a;                                                                                \
    }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
inline float min(float a, float b)
{
    return fminf(a, b);
}
inline float max(float a, float b)
{
    return fmaxf(a, b);
}

inline float __expf(float x)
{
    return expf(x);
}
inline float __logf(float x)
{
    return logf(x);
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float rsqrtf(float x)
{
    return 1 / sqrtf(x);
}
template <class To, class From> To simt_same_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x)
{
    return simt_same_bits<unsigned>(x);
}
inline float __uint_as_float(unsigned x)
{
    return simt_same_bits<float>(x);
}

/* ---- Half the bits: bf16 keeps a float's exponents, half its precision (11 bits of it). Rounded to nearest, ties to
 * even. ---- */

struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half half;
typedef __half2 half2;

inline float __bfloat162float(__nv_bfloat16 x)
{
    return __uint_as_float((unsigned)x.bits << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
    unsigned bits = __float_as_uint(x);
    return {(uint16_t)(x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x)
{
    unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023u;
    if (exponent == 0)
        return __uint_as_float(sign | __float_as_uint((float)fraction * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float x)
{
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, positive = bits & 0x7FFFFFFF;
    if (x != x)
        return {0x7FFF};
    if (fabsf(x) >= 65520)
        return {(uint16_t)(sign | 0x7C00)};
    if (fabsf(x) < 0x1p-14f) /* subnormal: a whole number of 2^-24 */
        return {(uint16_t)(sign | (unsigned)lrintf(fabsf(x) * 0x1p24f))};
    return {(uint16_t)(sign | (positive + 0xFFF + (positive >> 13 & 1) - (112u << 23)) >> 13)};
}

/* The functions that both types have under names of the same pattern. */
#define SIMT_HALF_BITS(T, T2, name, name2)                                                                   \
    inline T __float2##name(float x)                                                                         \
    {                                                                                                        \
        return __float2##name##_rn(x);                                                                       \
    }                                                                                                        \
    inline T __ushort_as_##name(unsigned short bits)                                                         \
    {                                                                                                        \
        return {bits};                                                                                       \
    }                                                                                                        \
    inline unsigned short __##name##_as_ushort(T x)                                                          \
    {                                                                                                        \
        return x.bits;                                                                                       \
    }                                                                                                        \
    inline T2 __floats2##name2##_rn(float low, float high)                                                   \
    {                                                                                                        \
        return {__float2##name##_rn(low), __float2##name##_rn(high)};                                        \
    }                                                                                                        \
    inline float2 __##name2##2float2(T2 pair)                                                                \
    {                                                                                                        \
        return {__##name##2float(pair.x), __##name##2float(pair.y)};                                         \
    }                                                                                                        \
    inline float __low2float(T2 pair)                                                                        \
    {                                                                                                        \
        return __##name##2float(pair.x);                                                                     \
    }                                                                                                        \
    inline float __high2float(T2 pair)                                                                       \
    {                                                                                                        \
        return __##name##2float(pair.y);                                                                     \
    }
SIMT_HALF_BITS(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162)
SIMT_HALF_BITS(__half, __half2, half, half2)

#endif
