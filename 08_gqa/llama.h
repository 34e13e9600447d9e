/* The attention of Llama 3 as a module: projections without bias, rotary embedding, grouped causal attention.
 *
 * Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.2 (grouped queries, theta = 500000); Su et al.
 * 2021, "RoFormer", for the rotary embedding, in the pairing of Hugging Face's weights. T, C, NH, NKV, HS and
 * C_out are s->tokens, s->embed, s->heads, s->kv_heads, s->head_size and s->embed_out = NH * HS.
 */
#ifndef LLAMA_H
#define LLAMA_H

#include "shape.h"

enum { LLAMA_THETA = 500000 };

/* cosine, sine (places, HS/2) = those of place * theta^(-2i/HS). HS is even. */
void rope_table(float *cosine, float *sine, int places, int head_size, double theta);

/* Rotates one row (HS) in place: numbers i and i + HS/2 are a point in the plane, turned by the i-th angle of
 * the row's place. cosine, sine (HS/2): the table's rows of that place. */
void rope(float *row, const float *cosine, const float *sine, int head_size);

/* Its gradient: the gradient of a turned row, in place, becomes that of the row before. A rotation's gradient
 * is its transpose, the rotation back. */
void rope_backward(float *row, const float *cosine, const float *sine, int head_size);

/* What llama_attention works in. */
typedef struct {
    float *rows; /* (B,T,C_out): what is projected, before its heads are split and after they are joined */
    float *q, *out_heads; /* (B,NH,T,HS) */
    float *k, *v;         /* (B,NKV,T,HS) */
    float *lse;           /* (B,NH,T) */
    float *cosine, *sine; /* (T,HS/2) */
    float *scratch;       /* grouped_simd_scratch(s) floats, 64-byte aligned */
} LlamaWorkspace;

/* out (B,T,C_out) written; x (B,T,C), q_proj (NH*HS,C), k_proj, v_proj (NKV*HS,C), o_proj (C_out,NH*HS) read.
 * Places count from 0. Attends under s->mask. HS is even. */
void llama_attention(float *out, const LlamaWorkspace *w, const float *x, const float *q_proj,
                     const float *k_proj, const float *v_proj, const float *o_proj, const AttentionShape *s);

/* The gradients, all written: dx (B,T,C), and those of the four projections as they lie. */
typedef struct {
    float *dx, *dq_proj, *dk_proj, *dv_proj, *do_proj;
} LlamaGradients;

/* What llama_attention_backward works in. */
typedef struct {
    float *dout_heads, *dq; /* (B,NH,T,HS) */
    float *dk, *dv;         /* (B,NKV,T,HS) */
    float *delta;           /* (B,NH,T) */
} LlamaBackwardWorkspace;

/* dout (B,T,C_out) is the gradient of out. w is as llama_attention left it; its rows are overwritten. */
void llama_attention_backward(const LlamaGradients *g, const LlamaBackwardWorkspace *d,
                              const LlamaWorkspace *w, const float *dout, const float *x, const float *q_proj,
                              const float *k_proj, const float *v_proj, const float *o_proj,
                              const AttentionShape *s);

#endif
