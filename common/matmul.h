/* Matrix products through a CBLAS, or plain loops where the machine has none. Row-major, floats.
 *
 * The result has the same bits for any number of threads: a product is cut into panels of rows (of columns, where
 * it has few rows) by its shape alone, and each panel is one single-threaded BLAS call. Inside an OpenMP parallel
 * region a call stays on its thread: many small products run best as a parallel loop over (b, h) around matmul(). */
#ifndef COMMON_MATMUL_H
#define COMMON_MATMUL_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out (m,n) = alpha * A B + beta * out, with A (m,k), B (k,n).
 *   'N': the matrix lies in memory as named, rows ld apart; 'T': its transpose does, (k,m) or (n,k).
 * With beta = 0, out need not be initialised (NaN there does not matter). m, n, k >= 0. */
void matmul(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float *a, int ld_a,
            const float *b, int ld_b, float beta, float *out, int ld_out);

/* `count` products of one shape, in parallel: the i-th at a + i*stride_a, b + i*stride_b, out + i*stride_out. */
void matmul_strided_batch(char transpose_a, char transpose_b, int m, int n, int k, float alpha,
                          const float *a, int ld_a, size_t stride_a, const float *b, int ld_b,
                          size_t stride_b, float beta, float *out, int ld_out, size_t stride_out, int count);

/* nn.Linear: out (rows,outputs) = x (rows,inputs) W^T + bias, with W (outputs,inputs); bias may be NULL. */
void linear(float *out, const float *x, const float *weight, const float *bias, size_t rows, int inputs,
            int outputs);

/* Its gradient: d_weight = d_y^T x, d_bias = the sum of d_y's rows (NULL: there is no bias), then d_x = d_y W + beta * d_x. Rows of
 * d_y are `step` numbers apart. With beta = 0, d_x may be x. */
void linear_backward(float *d_x, float beta, float *d_weight, float *d_bias, const float *d_y, int step,
                     const float *x, const float *weight, size_t rows, int inputs, int outputs);

/* Which library multiplies, for people: "OpenBLAS 0.3.21, core Cooperlake", "plain loops (no CBLAS found)". */
const char *matmul_library(void);

/* OpenBLAS reads OPENBLAS_CORETYPE when it is loaded, and releases older than a processor pick kernels of
 * half its speed. If that is so here (AVX-512 in the processor, none in the core that OpenBLAS took), sets
 * the variable to SkylakeX and runs this program again, once; returns otherwise. Call it first thing in main.
 * A value the user has set is left alone. */
void choose_blas_core(char **argv);

/* What the two above decide and say, of given facts (for tests). own_choice: the core that OpenBLAS took by
 * itself before this program ran itself again; NULL: it has not. */
bool better_core_wanted(bool processor_has_avx512, const char *core, const char *users_choice,
                        const char *own_choice);
void core_text(char *text, size_t size, const char *version, bool processor_has_avx512, const char *core,
               const char *own_choice);

#ifdef __cplusplus
}
#endif

#endif
