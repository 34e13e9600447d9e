/* The gradients of attention_bf16().
 *
 *   q, out, dout (B,NH,T,HS)   k, v (B,NH,TK,HS)   lse (B,NH,T)      as forward had them and left them
 *   dq, dk, dv                 written, bf16; every sum is float32
 *   sums    bf16_gradient_sums(s)         dq in float32, and in pairs rowsum(dout * out) behind it
 *   copies  bf16_backward_copies(s)       Q and dO as the products of pairs want them; or all but dq, widened
 *   scratch bf16_backward_scratch(s)      64-byte aligned, as sums and copies are
 *
 * Takes all that the forward takes but a bias. A row with no key allowed gives zeros. Keys beyond the valid length are not
 * read. The same bits for any number of threads. */
#ifndef FLASH_TILED_BF16_BACKWARD_H
#define FLASH_TILED_BF16_BACKWARD_H

#include "flash_tiled_bf16.h"

typedef struct {
    const Bf16 *q, *k, *v, *out, *dout;
    const float *lse;
    Bf16 *dq, *dk, *dv;
} Bf16Backward;

void attention_bf16_backward(const Bf16Backward *g, float *sums, float *copies, float *scratch,
                             const AttentionShape *s);
size_t bf16_gradient_sums(const AttentionShape *s);
size_t bf16_backward_copies(const AttentionShape *s);
size_t bf16_backward_scratch(const AttentionShape *s);

#endif
