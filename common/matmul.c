#include "matmul.h"
#include "threads.h"
#include "vectors.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef HAVE_ACCELERATE
#include <Accelerate/Accelerate.h>
#elif defined(HAVE_CBLAS)
#include <cblas.h>
#endif

/* Rows of out that one call computes, at most. Each call copies all of B once more into its own order: with 256
 * rows that takes a tenth of the time, with 512 half of that. The plain loops copy B in small pieces. */
#ifdef HAVE_CBLAS
enum { PANEL = 640 };
#else
enum { PANEL = 256 };
#endif

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Panels come in fours where there is more than one, all of one height, so that two or four threads have as much to
 * do each; but 128 rows are worth a call of their own, fewer are not. */
static size_t panel_of(size_t rows)
{
    size_t panels = (rows + PANEL - 1) / PANEL, most = (rows + 127) / 128;
    panels = least((panels + 3) / 4 * 4, most);
    return ((rows + panels - 1) / panels + 15) / 16 * 16;
}

/* What is asked of each of `count` products; bias (n) or NULL is added to every row. */
typedef struct {
    char transpose_a, transpose_b;
    size_t m;
    int n, k;
    float alpha;
    const float *a;
    int ld_a;
    size_t stride_a;
    const float *b;
    int ld_b;
    size_t stride_b;
    float beta;
    const float *bias;
    float *out;
    int ld_out;
    size_t stride_out;
} Product;

#ifdef HAVE_CBLAS

static void one_product(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float *a,
                        int ld_a, const float *b, int ld_b, float beta, float *out, int ld_out)
{
    cblas_sgemm(CblasRowMajor, transpose_a == 'T' ? CblasTrans : CblasNoTrans,
                transpose_b == 'T' ? CblasTrans : CblasNoTrans, m, n, k, alpha, a, ld_a, b, ld_b, beta, out,
                ld_out);
}

#else

/* Plain C, in the order that BLIS made known (Van Zee and van de Geijn 2015): pieces of A and B are copied to
 * where they lie in the order of use, zeros filling them up at the edges, and a tile of out stays in
 * registers along all of k. */
enum { ROWS = 6, COLUMNS = 2 * LANES, DEPTH = 128 };
/* The tile; how much of k is copied at once, and added up before it joins out: short sums lose less to rounding. */

/* tile (ROWS,COLUMNS) = a b, with a (depth,ROWS) and b (depth,COLUMNS). */
static void multiply_tile(float tile[ROWS][COLUMNS], int depth, const float *a, const float *b)
{
    Vector sum[ROWS][2];
    memset(sum, 0, sizeof sum);
    for (int p = 0; p < depth; p++) {
        Vector b0, b1;
        memcpy(&b0, b + p * COLUMNS, sizeof b0);
        memcpy(&b1, b + p * COLUMNS + LANES, sizeof b1);
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += a[p * ROWS + i] * b0;
            sum[i][1] += a[p * ROWS + i] * b1;
        }
    }
    memcpy(tile, sum, sizeof sum);
}

/* packed (depth,width): `used` columns of a matrix whose element (p, i) is at p*along + i*across, then zeros. */
static void pack(float *packed, const float *matrix, size_t along, size_t across, int depth, int used,
                 int width)
{
    for (int p = 0; p < depth; p++)
        for (int i = 0; i < width; i++)
            packed[p * width + i] = i < used ? matrix[p * along + i * across] : 0.0f;
}

/* out (rows,columns) = alpha * tile + beta * out. */
static void write_tile(float *out, int ld_out, int rows, int columns, float alpha, float tile[ROWS][COLUMNS],
                       float beta)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            float *at = out + (size_t)r * ld_out + c;
            *at = alpha * tile[r][c] + (beta == 0 ? 0.0f : beta * *at);
        }
}

/* At most PANEL rows of out. */
static void one_product(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float *a,
                        int ld_a, const float *b, int ld_b, float beta, float *out, int ld_out)
{
    _Alignas(64) float packed_a[(PANEL + ROWS) * DEPTH], packed_b[DEPTH * COLUMNS], tile[ROWS][COLUMNS];
    size_t a_row = transpose_a == 'T' ? 1 : ld_a, a_column = transpose_a == 'T' ? ld_a : 1;
    size_t b_row = transpose_b == 'T' ? 1 : ld_b, b_column = transpose_b == 'T' ? ld_b : 1;

    for (int p = 0; p < k; p += DEPTH) {
        int depth = smaller(DEPTH, k - p);
        for (int i = 0; i < m; i += ROWS)
            pack(packed_a + i * depth, a + i * a_row + p * a_column, a_column, a_row, depth,
                 smaller(ROWS, m - i), ROWS);
        for (int j = 0; j < n; j += COLUMNS) {
            int columns = smaller(COLUMNS, n - j);
            pack(packed_b, b + p * b_row + j * b_column, b_row, b_column, depth, columns, COLUMNS);
            for (int i = 0; i < m; i += ROWS) {
                multiply_tile(tile, depth, packed_a + i * depth, packed_b);
                write_tile(out + (size_t)i * ld_out + j, ld_out, smaller(ROWS, m - i), columns, alpha, tile,
                           p == 0 ? beta : 1);
            }
        }
    }
}

#endif

/* A library's own threads would change the bits with their number, and fight ours. Told once; but one built on OpenMP in
 * each thread, by multiply(): there openblas_set_num_threads would set the number of threads of the whole program. */
static void settle_library(void)
{
#ifdef HAVE_OPENBLAS
    if (openblas_get_parallel() == OPENBLAS_THREAD)
        openblas_set_num_threads(1);
#endif
#ifdef HAVE_ACCELERATE
    setenv("VECLIB_MAXIMUM_THREADS", "1", 0); /* read when it multiplies for the first time */
#endif
}

/* out (rows,n) *= beta, where k = 0 leaves nothing to add. */
static void scale(float *out, int rows, int n, int ld_out, float beta)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) {
            float *at = out + (size_t)r * ld_out + c;
            *at = beta == 0 ? 0.0f : beta * *at;
        }
}

/* The rows from first_row on of the i-th product, of them the columns from first_column on: `rows` by `columns`, or
 * what is left. */
static void one_panel(const Product *p, size_t i, size_t first_row, size_t first_column, size_t rows,
                      size_t columns)
{
    int m = (int)least(rows, p->m - first_row), n = (int)least(columns, p->n - first_column);
    float *out = p->out + i * p->stride_out + first_row * p->ld_out + first_column;
    const float *a = p->a + i * p->stride_a + first_row * (p->transpose_a == 'T' ? 1 : p->ld_a);
    const float *b = p->b + i * p->stride_b + first_column * (p->transpose_b == 'T' ? p->ld_b : 1);
    float beta = p->beta;

    if (p->bias) {
        for (int r = 0; r < m; r++)
            memcpy(out + (size_t)r * p->ld_out, p->bias + first_column, n * sizeof(float));
        beta = 1;
    }
    if (p->k > 0)
        one_product(p->transpose_a, p->transpose_b, m, n, p->k, p->alpha, a, p->ld_a, b, p->ld_b, beta, out,
                    p->ld_out);
    else
        scale(out, m, n, p->ld_out, beta);
}

static void multiply(const Product *p, int count)
{
    static pthread_once_t settled = PTHREAD_ONCE_INIT;
    pthread_once(&settled, settle_library);
    if (p->m == 0 || p->n == 0)
        return;

    /* A head's weight gradient, (64,8192) by (8192,768), has too few rows to share, but much to do. */
    bool few_rows = panel_of(p->m) >= p->m && (double)p->m * p->n * p->k >= 1 << 26;
    size_t rows = panel_of(p->m), columns = few_rows ? panel_of(p->n) : (size_t)p->n;
    size_t down = (p->m + rows - 1) / rows, across = (p->n + columns - 1) / columns;

#pragma omp parallel if (!omp_in_parallel() && down * across * count > 1)
    {
        omp_set_num_threads(1); /* for this thread alone: what a library built on OpenMP may take in it */
#pragma omp for collapse(3) schedule(dynamic)
        for (int i = 0; i < count; i++)
            for (size_t r = 0; r < down; r++)
                for (size_t c = 0; c < across; c++)
                    one_panel(p, i, r * rows, c * columns, rows, columns);
    }
}

void matmul_strided_batch(char transpose_a, char transpose_b, int m, int n, int k, float alpha,
                          const float *a, int ld_a, size_t stride_a, const float *b, int ld_b,
                          size_t stride_b, float beta, float *out, int ld_out, size_t stride_out, int count)
{
    multiply(&(Product){transpose_a, transpose_b, m, n, k, alpha, a, ld_a, stride_a, b, ld_b, stride_b, beta,
                        NULL, out, ld_out, stride_out},
             count);
}

void matmul(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float *a, int ld_a,
            const float *b, int ld_b, float beta, float *out, int ld_out)
{
    matmul_strided_batch(transpose_a, transpose_b, m, n, k, alpha, a, ld_a, 0, b, ld_b, 0, beta, out, ld_out,
                         0, 1);
}

void linear(float *out, const float *x, const float *weight, const float *bias, size_t rows, int inputs,
            int outputs)
{
    multiply(&(Product){'N', 'T', rows, outputs, inputs, 1, x, inputs, 0, weight, inputs, 0, 0, bias, out,
                        outputs, 0},
             1);
}

/* sum (width) = the sum of y's rows: 128 of them at a time, since a sum of many terms in one go loses more to rounding. */
static void sum_rows(float *sum, const float *y, int step, size_t rows, int width)
{
    enum { WIDE = 64, FEW = 128 };
#pragma omp parallel for
    for (int c0 = 0; c0 < width; c0 += WIDE) {
        int columns = width - c0 < WIDE ? width - c0 : WIDE;
        for (int c = 0; c < columns; c++)
            sum[c0 + c] = 0;
        for (size_t r0 = 0; r0 < rows; r0 += FEW) {
            float part[WIDE] = {0};
            for (size_t r = r0; r < r0 + FEW && r < rows; r++)
                for (int c = 0; c < columns; c++)
                    part[c] += y[r * step + c0 + c];
            for (int c = 0; c < columns; c++)
                sum[c0 + c] += part[c];
        }
    }
}

void linear_backward(float *d_x, float beta, float *d_weight, float *d_bias, const float *d_y, int step,
                     const float *x, const float *weight, size_t rows, int inputs, int outputs)
{
    matmul('T', 'N', outputs, inputs, (int)rows, 1, d_y, step, x, inputs, 0, d_weight, inputs);
    if (d_bias)
        sum_rows(d_bias, d_y, step, rows, outputs);
    matmul('N', 'N', (int)rows, inputs, outputs, 1, d_y, step, weight, inputs, beta, d_x, inputs);
}
