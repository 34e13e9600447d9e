/* The notebook's modules whose attention is flash attention: its implementations 5, 6 and 8. */
#ifndef FLASH_MODULES_H
#define FLASH_MODULES_H

#include "flash_tiled_simd.h"
#include "shape.h"

/* One packed projection, attention, a projection: implementation 5, causal, and 6, which with its mask sees
 * the future only. The mask is s->mask. Dropout is drawn by position.
 *
 *   out                      (B,T,C_out)               written
 *   qkv                      (B,T,step)                written: each token's queries, then its keys, then its
 *                                                      values, NH heads of HS each; step: flash_packed_step(s)
 *   context                  (B,T,C_out)               written: the heads side by side
 *   lse                      (B,NH,T)                  written, for the backward pass; NULL: not wanted
 *   scratch                  flash_view_scratch(s)
 *   x                        (B,T,C)                   read
 *   qkv_weight               (3*C_out,C)               read
 *   proj_weight, proj_bias   (C_out,C_out), (C_out)    read */
void sdpa_module(float *out, float *qkv, float *context, float *lse, float *scratch, const float *x,
                 const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                 const AttentionShape *s);

/* nn.MultiheadAttention(bias=False) with need_weights=False, then a projection: implementation 8. C_out = C.
 *
 *   attended         (B,T,C)   written: context * inner_weight^T, what nn.MultiheadAttention returns
 *   in_proj_weight   (3*C,C)   read
 *   inner_weight     (C,C)     read: its own out_proj.weight
 *   the others as above */
void torch_mha_module(float *out, float *qkv, float *context, float *lse, float *attended, float *scratch,
                      const float *x, const float *in_proj_weight, const float *inner_weight,
                      const float *proj_weight, const float *proj_bias, const AttentionShape *s);

/* A boolean mask tensor of n pairs as the bias it stands for, 0 where a query may attend and -inf where not.
 * The two functions of PyTorch that take such a tensor read it in opposite ways: true_may_attend
 * scaled_dot_product_attention(attn_mask=tensor) true_may_not_attend   nn.MultiheadAttention's
 * forward(attn_mask=tensor), and masked_fill(tensor, -inf) */
void true_may_attend(float *bias, const bool *tensor, size_t n);
void true_may_not_attend(float *bias, const bool *tensor, size_t n);

#endif
