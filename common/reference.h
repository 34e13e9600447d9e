/* Values that PyTorch computed for the notebook's modules, kept in a chapter's
 * reference/notebook_modules.tsv. */
#ifndef COMMON_REFERENCE_H
#define COMMON_REFERENCE_H

#include "run.h"

/* Holds x, every parameter and out of a run, forward called, against the rows of its kernel in the file: the
 * L2 norm of each to 1e-6 of it, single values to 2e-6 + 1e-5 |value|. Unless the run's pass is forward, the
 * gradients too (backward called; rows grad_x and grad_PARAMETER): sums of thousands of terms that cancel,
 * and so the norm to 1e-5 of it, single values to 1e-5 of the tensor's root mean square + 1e-4 |value|.
 * Columns of the file: implementation, kernel, tensor (x, out, a parameter's name, or grad_ before one),
 * shape as Python prints it, l2, then values as INDEX=VALUE between spaces, INDEX being 1,511,100 or, into
 * the flat tensor, [16384]. Returns NULL if all hold, else the first that does not, in one line (a static
 * buffer). */
const char *check_reference(const Run *run, const char *path);

#endif
