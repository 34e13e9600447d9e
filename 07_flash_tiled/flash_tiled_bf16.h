/* Flash attention in bf16: q, k, v and out are 16 bits a number, and every sum is float32. Where pairs of bf16 are multiplied
 * (BF16_PAIRS), the weights are rounded to bf16 for their product with V; elsewhere (flash_tiled_bf16_widened.c) nothing but out
 * is. For the rest the contract is attention_simd()'s.
 *
 *   q, out (B,NH,T,HS)   k, v (B,NH,TK,HS)   bf16        lse (B,NH,T)   float32
 *   copies    bf16_copies(s) floats     K and V as the products of pairs want them; or q, K and V, widened
 *   scratch   flash_view_scratch(s)    what the threads work in
 *
 * Any mask, bias, scale, dropout; any T, TK and HS; one key/value head for each query head. A row with no key allowed:
 * out = 0, lse = -inf. Keys beyond the valid length are not read. The bits do not depend on the number of threads. */
#ifndef FLASH_TILED_BF16_H
#define FLASH_TILED_BF16_H

#include "bf16_product.h"
#include "shape.h"

void attention_bf16(Bf16 *out, float *lse, float *copies, float *scratch, const Bf16 *q, const Bf16 *k,
                    const Bf16 *v, const AttentionShape *s);
size_t bf16_copies(const AttentionShape *s);

#endif
