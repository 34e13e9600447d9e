#include "matmul.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef HAVE_ACCELERATE
#include <Accelerate/Accelerate.h>
#elif defined(HAVE_CBLAS)
#include <cblas.h>
#endif

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

/* ---- Large products, and all of them where there is no library: plain C, in the order that BLIS made known
 * (Van Zee and van de Geijn 2015). Pieces of A and B are copied to where they lie in the order of use, zeros
 * filling them up at the edges, and a tile of out stays in registers along DEPTH of k. An element of out adds
 * up its terms in the same order however the work is cut. ---- */

/* The registers: a tile of ROWS x VECTORS sums, a row of B and a number of A. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8, VECTORS = 3 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4, VECTORS = 3 };
#elif defined(__ARM_NEON)
enum { LANES = 4, ROWS = 8, VECTORS = 3 };
#else
enum { LANES = 4, ROWS = 4, VECTORS = 3 };
#endif
enum {
    COLUMNS = VECTORS * LANES, /* a strip of B: its DEPTH rows stay in the nearest caches */
    DEPTH = 512,               /* how much of k is copied at once */
    PANEL = 96,                /* rows of A that a task copies: they stay in its second cache */
    COPIED = 4 << 20, /* how many numbers of B are copied at once: the threads meet but a few times */
    TASKS = 16,       /* at least so many tasks, if need be by cutting panels into groups of strips */
};
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), may_alias));

/* What follows, written out once for each vector of the tile, so that sum[i][j] is a register. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define EACH_VECTOR(i, j, vectors)                                                                           \
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < VECTORS; j++) if (j < (vectors))

/* tile (ROWS,COLUMNS) = a b, with a (depth,ROWS) and b (depth,vectors*LANES). */
static inline __attribute__((always_inline)) void multiply_vectors(int vectors, float tile[ROWS][COLUMNS],
                                                                   int depth, const float *a, const Vector *b)
{
    Vector sum[ROWS][VECTORS];
    EACH_VECTOR(i, j, vectors)
    sum[i][j] = (Vector){0};
    for (int p = 0; p < depth; p++, a += ROWS, b += vectors)
        EACH_VECTOR(i, j, vectors)
    sum[i][j] += a[i] * b[j];
    EACH_VECTOR(i, j, vectors)
    *(Vector *)&tile[i][j * LANES] = sum[i][j];
}

/* The same for a strip of any width: of the last one only the vectors that hold something. A function of its
 * own, to which all registers belong. */
static __attribute__((noinline)) void multiply_tile(float tile[ROWS][COLUMNS], int columns, int depth,
                                                    const float *a, const float *b)
{
    if (columns > 2 * LANES)
        multiply_vectors(3, tile, depth, a, (const Vector *)b);
    else if (columns > LANES)
        multiply_vectors(2, tile, depth, a, (const Vector *)b);
    else
        multiply_vectors(1, tile, depth, a, (const Vector *)b);
}

/* packed (depth,width): `used` columns of a matrix whose element (p, i) is at p*along + i*across, then zeros. */
static inline __attribute__((always_inline)) void pack(float *restrict packed, const float *restrict matrix,
                                                       size_t along, size_t across, int depth, int used,
                                                       int width)
{
    for (int p = 0; p < depth; p++, packed += width, matrix += along)
        if (used < width)
            for (int i = 0; i < width; i++)
                packed[i] = i < used ? matrix[i * across] : 0.0f;
        else if (across == 1)
            memcpy(packed, matrix, width * sizeof *packed);
        else
            for (int i = 0; i < width; i++)
                packed[i] = matrix[i * across];
}

/* out (rows,columns) = alpha * tile + beta * out. */
static void write_tile(float *out, int ld_out, int rows, int columns, float alpha,
                       float tile[restrict ROWS][COLUMNS], float beta)
{
    for (int r = 0; r < rows; r++) {
        float *restrict row = out + (size_t)r * ld_out;
        if (beta == 0)
            for (int c = 0; c < columns; c++)
                row[c] = alpha * tile[r][c];
        else
            for (int c = 0; c < columns; c++)
                row[c] = alpha * tile[r][c] + beta * row[c];
    }
}

static int least(int a, int b)
{
    return a < b ? a : b;
}

static int pieces(size_t whole, int piece)
{
    return (int)((whole + piece - 1) / piece);
}

/* One panel of out, columns first .. past-1, k's piece from p to p_past added to it. packed_b holds that piece of
 * B, width columns of it: DEPTH rows after DEPTH rows, in them strip after strip. */
static void one_panel(const Product *product, const float *a, const float *packed_b, int width, float *out,
                      int rows, int first, int past, int p, int p_past)
{
    _Alignas(64) float packed_a[PANEL * DEPTH], tile[ROWS][COLUMNS];
    size_t row = product->transpose_a == 'T' ? 1 : product->ld_a;
    size_t column = product->transpose_a == 'T' ? product->ld_a : 1;

    for (int r = 0; r < rows && product->bias && p == 0; r++)
        memcpy(out + (size_t)r * product->ld_out + first, product->bias + first,
               (past - first) * sizeof *out);
    for (; p < p_past; p += DEPTH, packed_b += (size_t)DEPTH * width) {
        int depth = least(DEPTH, p_past - p);
        float beta = p > 0 || product->bias ? 1 : product->beta;
        for (int r = 0; r < rows; r += ROWS)
            pack(packed_a + r * depth, a + r * row + p * column, column, row, depth, least(ROWS, rows - r),
                 ROWS);
        for (int c = first; c < past; c += COLUMNS)
            for (int r = 0; r < rows; r += ROWS) {
                int columns = least(COLUMNS, past - c), tile_rows = least(ROWS, rows - r);
                float *at = out + (size_t)r * product->ld_out + c;
                for (int t = 0; t < tile_rows; t++) /* on its way while the tile is multiplied: worth 3% */
                    for (int j = 0; j < columns; j += LANES)
                        __builtin_prefetch(at + (size_t)t * product->ld_out + j, 1);
                multiply_tile(tile, columns, depth, packed_a + r * depth, packed_b + (size_t)c * depth);
                write_tile(at, product->ld_out, tile_rows, columns, product->alpha, tile, beta);
            }
    }
}

/* The i-th product, in parallel unless its caller is: all threads first copy B, or as much of it as fits, and
 * then take panels. */
static void packed_product(const Product *product, size_t i)
{
    int n = product->n, k = product->k, strips = pieces(n, COLUMNS), panels = pieces(product->m, PANEL);
    int groups = least(strips, pieces(TASKS, panels)), group = pieces(strips, groups) * COLUMNS;
    int width = strips * COLUMNS, fits = width < COPIED / DEPTH ? COPIED / width / DEPTH * DEPTH : DEPTH;
    size_t row = product->transpose_b == 'T' ? 1 : product->ld_b;
    size_t column = product->transpose_b == 'T' ? product->ld_b : 1;
    size_t a_row = product->transpose_a == 'T' ? 1 : product->ld_a;
    const float *a = product->a + i * product->stride_a, *b = product->b + i * product->stride_b;
    float *out = product->out + i * product->stride_out;
    float *packed_b = allocate_floats((size_t)least(fits, k) * width);

#pragma omp parallel if (!omp_in_parallel())
    for (int p = 0; p < k; p += fits) {
        int p_past = least(p + fits, k);
#pragma omp for collapse(2)
        for (int q = p; q < p_past; q += DEPTH)
            for (int c = 0; c < n; c += COLUMNS) {
                int depth = least(DEPTH, p_past - q), columns = least(COLUMNS, n - c);
                pack(packed_b + (size_t)(q - p) * width + (size_t)c * depth, b + q * row + c * column, row,
                     column, depth, columns, pieces(columns, LANES) * LANES);
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int panel = 0; panel < panels; panel++)
            for (int first = 0; first < n; first += group) {
                size_t top = (size_t)panel * PANEL;
                int rows = product->m - top < PANEL ? (int)(product->m - top) : PANEL;
                one_panel(product, a + top * a_row, packed_b, width, out + top * product->ld_out, rows, first,
                          least(n, first + group), p, p_past);
            }
    }
    free(packed_b);
}

#ifdef HAVE_CBLAS

/* ---- Through a library ---- */

/* Rows of out that one call computes. Each call copies all of B once more into its own order: with 256 rows
 * that costs 2 to 3% of the speed, and 1024 rows still make work for four threads. */
enum { CALL_ROWS = 256 };

/* A library's own threads would change the bits with their number, and fight ours. Told once: */
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

/* .. and told in each of our threads, for a library built on OpenMP, which asks how many threads it may take.
 * (There openblas_set_num_threads would set the number of threads of the whole program.) */
static void keep_library_on_this_thread(void)
{
#if defined(_OPENMP) && defined(HAVE_CBLAS)
    omp_set_num_threads(1);
#endif
}

/* The rows from first_row on of the i-th product, CALL_ROWS of them or what is left. */
static void library_call(const Product *p, size_t i, size_t first_row)
{
    int rows = p->m - first_row < CALL_ROWS ? (int)(p->m - first_row) : CALL_ROWS;
    float *out = p->out + i * p->stride_out + first_row * p->ld_out;
    const float *a = p->a + i * p->stride_a + first_row * (p->transpose_a == 'T' ? 1 : p->ld_a);
    const float *b = p->b + i * p->stride_b;
    float beta = p->beta;

    if (p->bias) {
        for (int r = 0; r < rows; r++)
            memcpy(out + (size_t)r * p->ld_out, p->bias, p->n * sizeof(float));
        beta = 1;
    }
    cblas_sgemm(CblasRowMajor, p->transpose_a == 'T' ? CblasTrans : CblasNoTrans,
                p->transpose_b == 'T' ? CblasTrans : CblasNoTrans, rows, p->n, p->k, p->alpha, a, p->ld_a, b,
                p->ld_b, beta, out, p->ld_out);
}

static void library_products(const Product *p, int count)
{
    static pthread_once_t settled = PTHREAD_ONCE_INIT;
    pthread_once(&settled, settle_library);
    size_t calls = (p->m + CALL_ROWS - 1) / CALL_ROWS;

#pragma omp parallel if (!omp_in_parallel() && calls * count > 1)
    {
        keep_library_on_this_thread();
#pragma omp for collapse(2) schedule(dynamic)
        for (int i = 0; i < count; i++)
            for (size_t call = 0; call < calls; call++)
                library_call(p, i, call * CALL_ROWS);
    }
}

/* Is our own product the faster one? The shape decides, so that the bits do not depend on threads. OpenBLAS copies
 * B anew for each panel, and three panels keep two threads busy for three quarters of the time; ours shares one
 * copy and cuts finer. Small products and short sums are too little to share. */
static bool use_own(const Product *p)
{
#if defined(HAVE_OPENBLAS) && defined(__AVX__)
    return p->k >= 256 && (double)p->m * p->n * p->k >= 1 << 27;
#else
    (void)p;
    return false;
#endif
}

#endif

/* out = bias or beta * out, where k = 0 leaves nothing to add. */
static void without_terms(const Product *p, int count)
{
    for (int i = 0; i < count; i++)
        for (size_t r = 0; r < p->m; r++)
            for (int c = 0; c < p->n; c++) {
                float *at = p->out + i * p->stride_out + r * p->ld_out + c;
                *at = p->bias ? p->bias[c] : p->beta == 0 ? 0.0f : p->beta * *at;
            }
}

static void multiply(const Product *p, int count)
{
    if (p->m == 0 || p->n == 0)
        return;
    if (p->k == 0)
        without_terms(p, count);
#ifdef HAVE_CBLAS
    else if (!use_own(p))
        library_products(p, count);
#endif
    else
#pragma omp parallel for if (!omp_in_parallel() && count > 1)
        for (int i = 0; i < count; i++)
            packed_product(p, i);
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
