/* A small einsum: sums of products of two tensors, said in letters.
 *
 *     "bhnd,bhmd->bhnm"      out[b,h,n,m] = sum over d of a[b,h,n,d] * b[b,h,m,d]
 *
 * Each axis has a letter, a-z or A-Z; an operand has at most EINSUM_MAX_AXES of them, perhaps none. The same
 * letter means the same index everywhere. A letter that the result does not have is summed over. Inside an
 * operand a letter may come twice ("ii,ij->ij" reads a diagonal); inside the result it may not. There are two
 * operands, and no "...", no spaces and no broadcasting of axes of length 1.
 */
#ifndef EINSUM_H
#define EINSUM_H

#include <stdbool.h>
#include <stddef.h>

enum { EINSUM_MAX_AXES = 8, EINSUM_MAX_LETTERS = 2 * EINSUM_MAX_AXES };

/* ---- Tensors as they lie in memory, not always in order ---- */

/* Element (i, j, ..) is data[i * stride[0] + j * stride[1] + ..]. An operand is only read, whatever the
 * pointer's type. */
typedef struct {
    float *data;
    int axes;
    size_t size[EINSUM_MAX_AXES], stride[EINSUM_MAX_AXES];
} View;

/* view(data, B, T, C): the tensor (B,T,C), row-major. As in Python it copies nothing, and so can view one
 * tensor two ways. */
#define view(data, ...)                                                                                      \
    view_of(data, sizeof((const size_t[]){__VA_ARGS__}) / sizeof(size_t), (const size_t[]){__VA_ARGS__})
View view_of(const float *data, int axes, const size_t *size);

/* The same elements with two axes exchanged. */
View transpose(View v, int axis, int other);

/* ---- Running a specification ---- */

/* out = what the specification says of a and b: einsum() as matrix products through BLAS where that is what
 * it is (einsum_product), else as plain loops; einsum_loops() always as plain loops. out must not overlap a
 * or b, and no two of its elements may share memory. A specification that is wrong, or does not fit the
 * views, ends the program with its error and exit code 2: ask einsum_plan() first where that will not do. */
void einsum(const char *specification, View out, View a, View b);
void einsum_loops(const char *specification, View out, View a, View b);
typedef void EinsumFunction(const char *specification, View out, View a, View b);

/* The gradients of out = einsum(specification, a, b), from the gradient of out: two einsums, run by
 * einsum_with (einsum or einsum_loops). d_a and d_b are written; they have the axes of a and b, and any
 * strides. Specifications that einsum_gradient() refuses end the program as above. */
void einsum_backward(EinsumFunction *einsum_with, const char *specification, View d_a, View d_b, View d_out,
                     View a, View b);

/* ---- The steps on the way ---- */

/* The letters of a specification, each word ended with a zero. */
typedef struct {
    char a[EINSUM_MAX_AXES + 1], b[EINSUM_MAX_AXES + 1], out[EINSUM_MAX_AXES + 1];
} EinsumWords;

/* Reads any string. Returns NULL, or one line that marks the place, in a static buffer of less than 400
 * characters:
 *
 *     einsum "bnd,do->bn[q]": letter 'q' of the result is in neither operand */
const char *einsum_parse(EinsumWords *words, const char *specification);

/* Writes the specification of a gradient, to be run on the result's gradient and the other operand: of
 * "A,B->C" it is "C,B->A" for the first operand (EINSUM_A) and "C,A->B" for the second (EINSUM_B). Returns
 * NULL, or one line as above, where that is no specification: of "ii,ij->ij" it would be "ij,ij->ii" (the
 * gradient is 0 off the diagonal), and of "ij,jk->k" it would be "k,jk->ij" (the gradient is the same for
 * every i). So it takes an operand whose letters differ and are in the other operand or the result; what the
 * other operand has does not matter. */
enum { EINSUM_TEXT = 3 * EINSUM_MAX_AXES + sizeof ",->" };
const char *einsum_gradient(char text[EINSUM_TEXT], const char *specification, int operand);

/* One letter is one loop. A step along it moves by stride[] in each tensor: by 0 where the letter is absent,
 * by the sum of two strides where it comes twice. */
enum { EINSUM_A, EINSUM_B, EINSUM_OUT };
typedef struct {
    char name;
    size_t size;
    size_t stride[3];
    bool in[3];
} Letter;

typedef struct {
    int letters;
    Letter letter[EINSUM_MAX_LETTERS];
} EinsumPlan;

/* Reads the specification and holds it against the views. Returns NULL, or one line as above. */
const char *einsum_plan(EinsumPlan *plan, const char *specification, const View *out, const View *a,
                        const View *b);

/* The plan as matrix products, out (rows,columns) = left (rows,summed) right (summed,columns): one for each
 * setting of the `loop` letters. `again` are summed letters that did not join the matrix: their products are
 * added up. */
typedef struct {
    int left, right; /* which operand is which: A, B, or B, A where the result lies transposed */
    Letter rows, columns, summed;
    char transpose_left, transpose_right; /* as matmul() has them */
    int ld_left, ld_right, ld_out;
    int loops, agains;
    Letter loop[EINSUM_MAX_LETTERS], again[EINSUM_MAX_LETTERS];
} EinsumProduct;

/* Is it a matrix product? It is where some letter is summed over, no letter is in one operand only and not in
 * the result, and the strides let some row and column letters be a matrix's in all three tensors. Outer and
 * elementwise products, dot products and sums of one operand are not. */
bool einsum_product(EinsumProduct *product, const EinsumPlan *plan);

/* What einsum_product() found, in words: "96 products of (1024 x 64) (64 x 1024)", or "plain loops". */
void einsum_text(char *text, size_t size, const EinsumPlan *plan);

/* The letters of the plan of one kind, as they stand: rows are in a and out, columns in b and out, batch
 * letters in all three, summed letters in a and b. */
typedef enum { EINSUM_BATCH, EINSUM_ROW, EINSUM_COLUMN, EINSUM_SUMMED, EINSUM_ALONE } EinsumKind;
EinsumKind einsum_kind(const Letter *letter);

#endif
