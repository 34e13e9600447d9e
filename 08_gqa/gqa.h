/* Grouped queries: NH query heads share NKV key/value heads, group = NH / NKV of them each.
 *
 *   q, out (B,NH,T,HS)    k, v (B,NKV,TK,HS)    lse (B,NH,T)    row-major floats
 *
 * Query head h reads key/value head h / group: neighbours share. NKV = NH is multi-head attention, NKV = 1
 * multi-query attention. Every function takes any mask, bias and scale that the shape names, and dropout
 * drawn by position (dropout_keeps). A row with no key allowed: out = 0, lse = -inf, gradients 0. A NaN that a
 * row can see reaches its out, lse and gradients. Nothing is allocated and nothing can fail.
 *
 * Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need"; Ainslie et al. 2023, "GQA:
 * Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".
 */
#ifndef GQA_H
#define GQA_H

#include "shape.h"

/* repeated (B,NH,TK,HS) = each head of kv (B,NKV,TK,HS) `group` times in a row, as
 * torch.repeat_interleave(kv, group, 1). */
void repeat_kv(float *repeated, const float *kv, const AttentionShape *s);

/* Repeats k and v, then attends head by head. k_repeated, v_repeated (B,NH,TK,HS) are written. */
void attention_repeat_kv(float *out, float *lse, float *k_repeated, float *v_repeated, const float *q,
                         const float *k, const float *v, const AttentionShape *s);

/* The same without the copies. */
void attention_grouped(float *out, float *lse, const float *q, const float *k, const float *v,
                       const AttentionShape *s);

/* What a backward pass reads and writes. dout is the gradient of out; of lse there is none. */
typedef struct {
    const float *q, *k, *v, *out, *lse, *dout; /* as forward was given them and left them; dout as out */
    float *dq, *dk, *dv; /* written: as q, k, v; dk and dv are summed over the group that reads them */
    float *dbias; /* written if s->bias is there: in its layout, summed over what it was broadcast to */
    float *delta; /* (B,NH,T) written: rowsum(dout * out) */
} GroupedBackward;

/* d_kv (B,NKV,TK,HS) = the sum over each head's copies in d_repeated (B,NH,TK,HS): repeat_kv's gradient. */
void repeat_kv_backward(float *d_kv, const float *d_repeated, const AttentionShape *s);

/* The gradients of attention_repeat_kv, from the copies that it left. dk_repeated, dv_repeated (B,NH,TK,HS)
 * are written: the gradients of the copies. */
void attention_repeat_kv_backward(const GroupedBackward *g, const float *k_repeated, const float *v_repeated,
                                  float *dk_repeated, float *dv_repeated, const AttentionShape *s);

/* The same without the copies: those of attention_grouped, or of anything that leaves out and lse. */
void attention_grouped_backward(const GroupedBackward *g, const AttentionShape *s);

/* attention_grouped with chapter 7's tile steps. A tile holds queries of all heads of a group, so that each key and
 * value is loaded once for the group; or, with few queries and many keys, over split keys. scratch:
 * grouped_simd_scratch(s) floats, 64-byte aligned. lse may be NULL. */
void attention_grouped_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                            const float *v, const AttentionShape *s);
size_t grouped_simd_scratch(const AttentionShape *s);

#endif
