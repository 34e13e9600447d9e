/* Any specification, tried out: what it is recognised as, and how its two ways of running compare. */
#ifndef TRY_EINSUM_H
#define TRY_EINSUM_H

#include "einsum.h"

/* One line: the specification, its letters by kind, and the matrix products they make, as
 *     bhnd,bhmd->bhnm   batch bh  rows n   columns m   summed d   6 products of (4 x 5) (5 x 6) */
void describe_einsum(char *text, size_t size, const char *specification, const EinsumPlan *plan);

/* The same for the gradient of an operand, EINSUM_A or EINSUM_B; or why it is not an einsum. */
void describe_gradient(char *text, size_t size, const char *specification, int operand, const View *out,
                       const View *a, const View *b);

/* Views for a specification, from sizes in words ("2,3,4", "" for none); the result's follow from its
 * letters. NULL, or what is wrong. No memory is behind the views yet. */
const char *einsum_views(View *out, View *a, View *b, const char *specification, const char *sizes_a,
                         const char *sizes_b);

/* ./run einsum SPECIFICATION SIZES SIZES: what it is, what its gradients are, random operands, both
 * ways, the largest difference. Returns the exit code. */
int try_einsum(int argc, char **argv);

#endif
