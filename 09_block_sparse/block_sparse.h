/* Attention under a mask that forbids most pairs: out = softmax(scale q.k + bias) v over the allowed pairs
 * only.
 *
 *   out (B,NH,T,HS)  lse (B,NH,T)          written; a row with nothing allowed: zeros, -inf
 *   q (B,NH,T,HS)  k, v (B,NKV,TK,HS)      read; query head h reads key/value head h / (NH / NKV)
 */
#ifndef BLOCK_SPARSE_H
#define BLOCK_SPARSE_H

#include "block_mask.h"

/* The mask as a tensor, as most notebooks hand it over: written out as (B or 1,T,TK) zeros and -inf, added to
 * all scores, and the forbidden ones weigh nothing after the work is done. weights (B,NH,T,TK) written mask
 * (dense_mask_floats(s))            scratch */
void attention_dense_mask(float *out, float *lse, float *weights, float *mask, const float *q, const float *k,
                          const float *v, const AttentionShape *s);
size_t dense_mask_floats(const AttentionShape *s);

/* Online softmax over the listed blocks only (chapter 6's loop, row by row). No memory beyond the lists. */
void attention_block_sparse(float *out, float *lse, const float *q, const float *k, const float *v,
                            const BlockMask *mask, const AttentionShape *s);

/* Chapter 7's tile steps over the listed blocks. Partial blocks are cut finer where the mask has a closed
 * form. scratch (block_sparse_scratch(s) floats, 64-byte aligned) */
void attention_block_sparse_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                                 const float *v, const BlockMask *mask, const AttentionShape *s);
size_t block_sparse_scratch(const AttentionShape *s);

/* FlexAttention as the notebook's ninth implementation uses it: one packed projection, attention under a
 * block mask on views of it, one projection out. C_out = NH * HS. out (B,T,C_out), x (B,T,C), qkv_weight
 * (3*C_out,C), proj_weight (C_out,C_out), proj_bias (C_out) qkv (B,T,3*C_out), context (B,T,C_out), scratch
 * written */
void flex_attention(float *out, float *qkv, float *context, float *scratch, const float *x,
                    const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                    const BlockMask *mask, const AttentionShape *s);

#endif
