/* Three mistakes from notebooks and forums, each of which runs without a complaint. Each is attend_heads()
 * over the right memory with the wrong shape: these functions make the shape. */
#ifndef MISTAKES_H
#define MISTAKES_H

#include "shape.h"

/* view(1, -1, NH, HS) where view(B, -1, NH, HS) was meant: one sequence of B*T tokens, so that the entries of
 * a batch see each other. Row stride as it was. */
AttentionShape folded_batch(const AttentionShape *s);

/* HS = C // (NH * 3), a division by 3 that belongs to the packed width 3*C alone: view's -1 takes up the
 * rest, and every token becomes three. HS must be a multiple of 3; the row stride is C_out / 3. */
AttentionShape third_of_a_head(const AttentionShape *s);

/* view(B, NH, T, HS) where view(B, T, NH, HS).transpose(1, 2) was meant: the NH pieces of a token's row taken
 * for NH tokens that follow one another. The row stride is HS; context comes out as (B,NH,T,HS). */
AttentionShape without_transpose(const AttentionShape *s);

#endif
