/* Copies from global to shared memory that go on while the threads compute (cp.async). For .cu files.
 *
 * A thread starts copies of its own, closes a group of them with copy_async_commit(), and waits until at most N of its
 * groups are still under way with copy_async_wait<N>(); a barrier then shows them to the block. Where `there` is false
 * zeros are written, and `global` is not read. */
#ifndef COMMON_CUDA_TENSOR_H
#define COMMON_CUDA_TENSOR_H

#include "cuda_thread.h"
#include "narrow.h"

#include <math.h>
#include <stdint.h>

#ifdef SIMT
static inline void copy_async_16(void *shared, const void *global, bool there)
{
    simt_start_copy(shared, there ? global : nullptr, 16);
}

static inline void copy_async_4(void *shared, const void *global, bool there)
{
    simt_start_copy(shared, there ? global : nullptr, 4);
}

static inline void copy_async_commit()
{
    simt_close_group();
}

template <int N> static inline void copy_async_wait()
{
    simt_wait_for_groups(N);
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

/* Half precision: 5 bits of exponent, 10 of fraction. */
struct half16 {
    uint16_t bits;
};

#ifdef SIMT
static inline float half_float(half16 x)
{
    return half_to_float(x.bits);
}

static inline half16 float_half(float x)
{
    return {half_from_float(x)};
}

static inline uint32_t pack_bf16(float low, float high)
{
    return bf16_from_float(low) | (uint32_t)bf16_from_float(high) << 16;
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

/* c + the sum of a[i] b[i], as a tensor core of sm_90 is reported to add: each product exact, all terms shifted to the largest
 * one's exponent and cut off 25 bits behind its first, added exactly, and the sum cut off to a float's 24 bits. */
static inline float simt_fused_sum(float c, const uint16_t a[16], const uint16_t b[16])
{
    enum { BITS = 25 };
    int32_t size[16], shift[16]; /* products size * 2^(shift - 14) */
    uint32_t bits;
    float wide = c;
    memcpy(&bits, &c, 4);
    int exponent = (int)(bits >> 23 & 0xFF), c_shift = (exponent ? exponent : 1) - 127, largest = c_shift;
    int64_t c_size = (bits & 0x7FFFFF) | (exponent ? 0x800000 : 0);
    int odd = exponent == 0xFF;
    for (int i = 0; i < 16; i++) {
        int ea = a[i] >> 7 & 0xFF, eb = b[i] >> 7 & 0xFF;
        size[i] = ((a[i] & 0x7F) | (ea ? 0x80 : 0)) * ((b[i] & 0x7F) | (eb ? 0x80 : 0));
        shift[i] = (ea ? ea : 1) + (eb ? eb : 1) - 2 * 127;
        largest = shift[i] > largest ? shift[i] : largest;
        odd |= (ea == 0xFF) | (eb == 0xFF);
    }
    if (odd) { /* infinities and NaN */
        for (int i = 0; i < 16; i++)
            wide += bf16_float({a[i]}) * bf16_float({b[i]});
        return wide;
    }
    /* In steps of 2^(largest - BITS): a number of n bits behind its first goes BITS - n up and its exponent's lag down. */
    int lag = largest - c_shift;
    int64_t sum = lag > 40 ? 0 : c_size << (BITS - 23) >> lag;
    sum = bits >> 31 ? -sum : sum;
    for (int i = 0; i < 16; i++) {
        int down = largest - shift[i];
        int32_t term = down > 31 ? 0 : size[i] << (BITS - 14) >> down;
        sum += (a[i] ^ b[i]) >> 15 ? -term : term;
    }
    double exact = ldexp((double)sum, largest - BITS);
    float cut = (float)exact;
    return isfinite(cut) && fabs((double)cut) > fabs(exact) ? nextafterf(cut, 0) : cut;
}

/* d += a b, 16 x 8 x 16. */
static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    simt_give(mine, sizeof mine, {"mma", __FILE__, __LINE__});
    unsigned g = simt_thread.lane / 4, t = simt_thread.lane % 4;
    uint16_t row[2][16], column[2][16]; /* of A, rows g and g + 8; of B, columns 2 t and 2 t + 1 */
    for (unsigned lane = 0; lane < 4; lane++)
        for (int i = 0; i < 2; i++) {
            const uint32_t *of_a = (const uint32_t *)simt_given(4 * g + lane);
            const uint32_t *of_b = (const uint32_t *)simt_given(4 * (2 * t + i) + lane) + 4;
            for (int k = 0; k < 4; k++) { /* two pairs, 8 apart */
                row[i][2 * lane + k % 2 + k / 2 * 8] = (uint16_t)(of_a[i + k / 2 * 2] >> 16 * (k % 2));
                column[i][2 * lane + k % 2 + k / 2 * 8] = (uint16_t)(of_b[k / 2] >> 16 * (k % 2));
            }
        }
    for (int i = 0; i < 4; i++)
        d[i] = simt_fused_sum(d[i], row[i / 2], column[i % 2]);
}

#else
__device__ static inline float half_float(half16 x)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

__device__ static inline half16 float_half(float x)
{
    half16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}

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
