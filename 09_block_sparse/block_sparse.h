/* Attention under a mask that forbids most pairs: out = softmax(scale q.k + bias) v over the allowed pairs.
 *
 *   out (B,NH,T,HS)    lse (B,NH,T)              written
 *   q (B,NH,T,HS)      k, v (B,NKV,TK,HS)        read
 *
 * Row-major floats; query head h reads key/value head h / (NH / NKV). Any bias and scale that the shape
 * names. A row with no key allowed: out = 0, lse = -inf. A NaN that a row can see reaches its out. Nothing is
 * allocated and nothing can fail.
 */
#ifndef BLOCK_SPARSE_H
#define BLOCK_SPARSE_H

#include "../07_flash_tiled/flash_tiled_backward.h" /* AttentionBackward */
#include "block_mask.h"

/* The mask as most notebooks hand it over: a tensor of zeros and -inf, added to all the scores. What it
 * forbids weighs nothing, after all the work is done. Dropout is drawn from s->dropout_stream.
 *
 *   weights   (B,NH,T,TK)                          written, after dropout
 *   softmax   (B,NH,T,TK)                          written where s->dropout > 0: before dropout, for backward
 *   mask      (1,T,TK), or (B,T,TK) with lengths   written: dense_mask_floats(s) */
void attention_dense_mask(float *out, float *lse, float *weights, float *softmax, float *mask, const float *q,
                          const float *k, const float *v, const AttentionShape *s);
size_t dense_mask_floats(const AttentionShape *s);

/* The listed blocks only, row by row: online softmax (chapter 6) that skips what is in no list. The mask is
 * whatever predicate the lists were filled from; s->mask, causal and lengths are not looked at again. Dropout
 * is drawn by position. No memory beyond the lists. */
void attention_block_sparse(float *out, float *lse, const float *q, const float *k, const float *v,
                            const BlockMask *mask, const AttentionShape *s);

/* The same with chapter 7's tile steps. Those ask attends() and not a predicate of your own, so the lists
 * must be of the book's masks: s->mask, causal and lengths.
 *
 *   scratch   flash_view_scratch(s) floats, 64-byte aligned */
void attention_block_sparse_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                                 const float *v, const BlockMask *mask, const AttentionShape *s);

/* FlexAttention as the notebook's ninth implementation uses it: one packed projection, attention under a
 * block mask (of the book's masks) on views of it, one projection. C_out = NH * HS, NKV = NH.
 *
 *   out                      (B,T,C_out)             written
 *   qkv                      (B,T,step)              written: a token's queries, keys, values, by heads;
 *                                                  step: flash_packed_step(s)
 *   context                  (B,T,C_out)             written: the heads side by side
 *   lse                      (B,NH,T)                written, for backward
 *   scratch                  flash_view_scratch(s) floats, 64-byte aligned
 *   x                        (B,T,C)                 read
 *   qkv_weight               (3*C_out,C)             read
 *   proj_weight, proj_bias   (C_out,C_out), (C_out)  read */
void flex_attention(float *out, float *qkv, float *context, float *lse, float *scratch, const float *x,
                    const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                    const BlockMask *mask, const AttentionShape *s);

/* The gradients of attention_dense_mask, from its weights and softmax (the same pointer without dropout).
 * d_scores (B,NH,T,TK) is written: the gradient of the scores. lse is not read. */
void attention_dense_mask_backward(const AttentionBackward *g, const float *weights, const float *softmax,
                                   float *d_scores, const AttentionShape *s);

/* The gradients of attention_block_sparse over the same lists: no block that is in none of them
 * is loaded. Weights are computed again from lse, twice (three times with a bias).
 *
 *   delta        (B,NH,T)              written: rowsum(dout * out)
 *   transposed   transpose_in(mask)    read: dk and dv walk the lists from the side of the keys */
void attention_block_sparse_backward(const AttentionBackward *g, float *delta, const BlockMask *mask,
                                     const BlockMask *transposed, const AttentionShape *s);

/* The same with chapter 7's tile steps, after attention_block_sparse_simd: the lists must be of the book's
 * masks.
 *
 *   scratch   flash_backward_scratch(s) floats, 64-byte aligned */
void attention_block_sparse_simd_backward(const AttentionBackward *g, float *scratch,
                                          const BlockMask *transposed, const AttentionShape *s);

/* The gradients of flex_attention, from the qkv, context and lse that it left.
 *
 *   dx, d_qkv_weight, d_proj_weight, d_proj_bias   written: as what they are the gradients of
 *   d_qkv (B,T,step), d_context (B,T,C_out)        written: likewise
 *   scratch                                        as above */
void flex_attention_backward(float *dx, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                             float *d_qkv, float *d_context, float *scratch, const float *dout,
                             const float *qkv, const float *context, const float *lse, const float *x,
                             const float *qkv_weight, const float *proj_weight, const BlockMask *transposed,
                             const AttentionShape *s);

#endif
