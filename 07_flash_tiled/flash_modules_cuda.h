/* The twins of flash_modules.c and flash_modules_backward.c on a GPU: the same steps, each a launch; a part of flash_tiled.cu, whose
 * `tiled` is their attention. The C reads heads where the projection left them; here they are copied apart and together again,
 * four numbers moved for each of x, so that `tiled` stays as plain as it is. The pointers are the device's. */
#ifndef FLASH_MODULES_CUDA_H
#define FLASH_MODULES_CUDA_H

#include "cuda_heads.h"
#include "cuda_linear.h"
#include "kernel.h"

static void forward_tiled(const Tensors *t, const AttentionShape *s);

/* Forward's workspace, of which all but M and L is kept for backward, and backward's. */
enum { QKV, HEADS, OUT_HEADS, CONTEXT, LSE, M, L, ATTENDED };
enum { D_HEADS, D_OUT_HEADS, D_CONTEXT, DELTA, D_ATTENDED };

static int workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[QKV] = floats[HEADS] = 3 * query_count(s);
    floats[OUT_HEADS] = floats[CONTEXT] = query_count(s);
    floats[LSE] = floats[M] = floats[L] = lse_count(s);
    return 7;
}

static int workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    workspace_sdpa(s, floats);
    floats[ATTENDED] = query_count(s);
    return 8;
}

static int backward_workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[D_HEADS] = 3 * query_count(s);
    floats[D_OUT_HEADS] = floats[D_CONTEXT] = query_count(s);
    floats[DELTA] = lse_count(s);
    return 4;
}

static int backward_workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    backward_workspace_sdpa(s, floats);
    floats[D_ATTENDED] = query_count(s);
    return 5;
}

/* The tensors of the attention within. */
static Tensors attention_in(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    Tensors attention = {};
    attention.q = w[HEADS];
    attention.k = w[HEADS] + query_count(s);
    attention.v = w[HEADS] + 2 * query_count(s);
    attention.out = w[OUT_HEADS];
    attention.lse = w[LSE];
    attention.workspace[0] = w[M];
    attention.workspace[1] = w[L];
    return attention;
}

/* From qkv (B,T,3*C_out) to context (B,T,C_out). */
static void attend_packed(const Tensors *t, const AttentionShape *s)
{
    size_t C = s->embed_out;
    for (int i = 0; i < 3; i++)
        split_heads(t->workspace[HEADS] + i * query_count(s), t->workspace[QKV] + i * C, 3 * C, s->heads, s);
    Tensors attention = attention_in(t, s);
    forward_tiled(&attention, s);
    join_heads(t->workspace[CONTEXT], C, t->workspace[OUT_HEADS], s->heads, s);
}

/* Every head's gradients, written over qkv: backward has what it needs of that in heads. */
static float *attend_packed_backward(const Tensors *t, const AttentionShape *s)
{
    size_t C = s->embed_out;
    float *const *d = t->backward_workspace, *d_qkv = t->workspace[QKV];
    split_heads(d[D_OUT_HEADS], d[D_CONTEXT], C, s->heads, s);
    Tensors attention = attention_in(t, s);
    attention.dout = d[D_OUT_HEADS];
    attention.dq = d[D_HEADS];
    attention.dk = d[D_HEADS] + query_count(s);
    attention.dv = d[D_HEADS] + 2 * query_count(s);
    attention.backward_workspace[0] = d[DELTA];
    backward_recomputed(&attention, s);
    for (int i = 0; i < 3; i++)
        join_heads(d_qkv + i * C, 3 * C, d[D_HEADS] + i * query_count(s), s->heads, s);
    return d_qkv;
}

static size_t tokens_of(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens;
}

/* ---- sdpa, and sdpa-mask, which differs by its mask: parameters qkv, proj and its bias ---- */

static void forward_sdpa(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    int C = s->embed_out;
    device_linear(w[QKV], t->x, t->parameter[0], NULL, tokens_of(s), s->embed, 3 * C);
    attend_packed(t, s);
    device_linear(t->out, w[CONTEXT], t->parameter[1], t->parameter[2], tokens_of(s), C, C);
}

static void backward_sdpa(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    int C = s->embed_out;
    device_linear_backward(d[D_CONTEXT], 0, d_w[1], t->dout, t->workspace[CONTEXT], t->parameter[1],
                           tokens_of(s), C, C);
    device_sum_rows(d_w[2], t->dout, tokens_of(s), C);
    const float *d_qkv = attend_packed_backward(t, s);
    device_linear_backward(t->dx, 0, d_w[0], d_qkv, t->x, t->parameter[0], tokens_of(s), s->embed, 3 * C);
}

/* ---- torch-mha-noweights: parameters the inner out_proj, in_proj, proj and its bias ---- */

static void forward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    int C = s->embed_out;
    device_linear(w[QKV], t->x, t->parameter[1], NULL, tokens_of(s), C, 3 * C);
    attend_packed(t, s);
    device_linear(w[ATTENDED], w[CONTEXT], t->parameter[0], NULL, tokens_of(s), C, C);
    device_linear(t->out, w[ATTENDED], t->parameter[2], t->parameter[3], tokens_of(s), C, C);
}

static void backward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace, *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    int C = s->embed_out;
    device_linear_backward(d[D_ATTENDED], 0, d_w[2], t->dout, w[ATTENDED], t->parameter[2], tokens_of(s), C,
                           C);
    device_sum_rows(d_w[3], t->dout, tokens_of(s), C);
    device_linear_backward(d[D_CONTEXT], 0, d_w[0], d[D_ATTENDED], w[CONTEXT], t->parameter[0], tokens_of(s),
                           C, C);
    const float *d_qkv = attend_packed_backward(t, s);
    device_linear_backward(t->dx, 0, d_w[1], d_qkv, t->x, t->parameter[1], tokens_of(s), C, 3 * C);
}

#endif
