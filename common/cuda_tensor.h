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

/* ---- bf16 and the tensor cores. A warp's 32 lanes hold a small matrix in their registers, two bf16 in each. ---- */

#include <math.h>
#include <stdint.h>

#ifndef UNROLL
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif
#endif

struct bf16 {
    uint16_t bits;
};

__device__ static inline float bf16_float(bf16 x)
{
    union {
        uint32_t bits;
        float value;
    } wide = {(uint32_t)x.bits << 16};
    return wide.value;
}

#ifdef SIMT
static inline uint32_t bf16_rounded(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline uint32_t pack_bf16(float low, float high)
{
    return bf16_rounded(low) | bf16_rounded(high) << 16;
}

static inline float exp2_fast(float x)
{
    return exp2f(x);
}

/* Lane 8 m + r brings row r of matrix m, 16 bytes. */
static inline void simt_load_matrix(uint32_t r[4], const void *row, bool transposed)
{
    simt_give(&row, sizeof row, {"load_matrix", __FILE__, __LINE__});
    unsigned g = simt_thread.lane / 4, t = simt_thread.lane % 4;
    for (unsigned m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; i++) {
            const uint16_t *from;
            memcpy(&from, simt_given(8 * m + (transposed ? 2 * t + i : g)), sizeof from);
            pair[i] = from[transposed ? g : 2 * t + i];
        }
        r[m] = pair[0] | (uint32_t)pair[1] << 16;
    }
    simt_wait_for_warp({"load_matrix", __FILE__, __LINE__});
}

static inline void load_matrix_4(uint32_t r[4], const void *row)
{
    simt_load_matrix(r, row, false);
}

static inline void load_matrix_4_transposed(uint32_t r[4], const void *row)
{
    simt_load_matrix(r, row, true);
}

static inline float simt_half(uint32_t pair, int high)
{
    return bf16_float({(uint16_t)(high ? pair >> 16 : pair)});
}

/* d += a b, 16 x 8 x 16. */
static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    simt_give(mine, sizeof mine, {"mma", __FILE__, __LINE__});
    unsigned g = simt_thread.lane / 4, t = simt_thread.lane % 4;
    for (int i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) {
            const uint32_t *of_a = (const uint32_t *)simt_given(4 * g + k % 8 / 2);
            float left = simt_half(of_a[i / 2 + k / 8 * 2], k % 2);
            const uint32_t *of_b = (const uint32_t *)simt_given(4 * (2 * t + i % 2) + k % 8 / 2);
            d[i] += left * simt_half(of_b[4 + k / 8], k % 2);
        }
}

#else
__device__ static inline uint32_t pack_bf16(float low, float high)
{
    uint32_t pair; /* the first source goes to the upper half */
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ static inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ static inline void load_matrix_4(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

__device__ static inline void load_matrix_4_transposed(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

__device__ static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#endif
