/* Matrix products on the device: cuBLAS under nvcc, in float32 throughout (no TF32); on the stand-in the CPU's product.
 * For .cu files. Row-major, and the letters of matmul.h: out (m,n) = alpha * A B + beta * out, with A (m,k), B (k,n);
 * 'N': the matrix lies in memory as named, rows ld apart; 'T': its transpose does. All pointers are the device's; none
 * of the three waits for its product. The program ends with exit 3 where cuBLAS fails. */
#ifndef COMMON_CUBLAS_H
#define COMMON_CUBLAS_H

#include "error.h"

#include <stddef.h>

#ifdef SIMT
#include "matmul.h"

static inline void device_matmul(char transpose_a, char transpose_b, int m, int n, int k, float alpha,
                                 const float *a, int ld_a, const float *b, int ld_b, float beta, float *out,
                                 int ld_out)
{
    matmul(transpose_a, transpose_b, m, n, k, alpha, a, ld_a, b, ld_b, beta, out, ld_out);
}

static inline void device_matmul_strided_batch(char transpose_a, char transpose_b, int m, int n, int k,
                                               float alpha, const float *a, int ld_a, size_t stride_a,
                                               const float *b, int ld_b, size_t stride_b, float beta,
                                               float *out, int ld_out, size_t stride_out, int count)
{
    matmul_strided_batch(transpose_a, transpose_b, m, n, k, alpha, a, ld_a, stride_a, b, ld_b, stride_b, beta,
                         out, ld_out, stride_out, count);
}

static inline void device_matmul_pointer_batch(char transpose_a, char transpose_b, int m, int n, int k,
                                               float alpha, const float *const *a, int ld_a,
                                               const float *const *b, int ld_b, float beta, float *const *out,
                                               int ld_out, int count)
{
    for (int i = 0; i < count; i++)
        matmul(transpose_a, transpose_b, m, n, k, alpha, a[i], ld_a, b[i], ld_b, beta, out[i], ld_out);
}

#else
#include <cublas_v2.h>

#define CHECK_CUBLAS(call) check_cublas(call, #call, __FILE__, __LINE__)
static inline void check_cublas(cublasStatus_t status, const char *call, const char *file, int line)
{
    if (status != CUBLAS_STATUS_SUCCESS)
        die(EXIT_UNAVAILABLE, "cuBLAS: %s in %.60s (%s:%d)", cublasGetStatusString(status), call, file, line);
}

/* One for each .cu file. */
static inline cublasHandle_t cublas_handle(void)
{
    static cublasHandle_t handle;
    if (!handle) {
        CHECK_CUBLAS(cublasCreate(&handle));
        CHECK_CUBLAS(cublasSetMathMode(handle, CUBLAS_PEDANTIC_MATH));
    }
    return handle;
}

static inline cublasOperation_t cublas_operation(char transpose)
{
    return transpose == 'T' ? CUBLAS_OP_T : CUBLAS_OP_N;
}

/* cuBLAS stores matrices by columns: our rows are its columns, each matrix is its transpose to it, and
 * out^T = B^T A^T. */
static inline void device_matmul(char transpose_a, char transpose_b, int m, int n, int k, float alpha,
                                 const float *a, int ld_a, const float *b, int ld_b, float beta, float *out,
                                 int ld_out)
{
    CHECK_CUBLAS(cublasSgemm(cublas_handle(), cublas_operation(transpose_b), cublas_operation(transpose_a), n,
                             m, k, &alpha, b, ld_b, a, ld_a, &beta, out, ld_out));
}

/* `count` products of one shape: the i-th at a + i*stride_a, b + i*stride_b, out + i*stride_out. */
static inline void device_matmul_strided_batch(char transpose_a, char transpose_b, int m, int n, int k,
                                               float alpha, const float *a, int ld_a, size_t stride_a,
                                               const float *b, int ld_b, size_t stride_b, float beta,
                                               float *out, int ld_out, size_t stride_out, int count)
{
    CHECK_CUBLAS(cublasSgemmStridedBatched(cublas_handle(), cublas_operation(transpose_b),
                                           cublas_operation(transpose_a), n, m, k, &alpha, b, ld_b,
                                           (long long)stride_b, a, ld_a, (long long)stride_a, &beta, out,
                                           ld_out, (long long)stride_out, count));
}

/* The same with the pointers to each matrix in arrays, which lie on the device too. */
static inline void device_matmul_pointer_batch(char transpose_a, char transpose_b, int m, int n, int k,
                                               float alpha, const float *const *a, int ld_a,
                                               const float *const *b, int ld_b, float beta, float *const *out,
                                               int ld_out, int count)
{
    CHECK_CUBLAS(cublasSgemmBatched(cublas_handle(), cublas_operation(transpose_b),
                                    cublas_operation(transpose_a), n, m, k, &alpha, b, ld_b, a, ld_a, &beta,
                                    out, ld_out, count));
}
#endif

#endif
