/* The twin of llama.c on a GPU: the same steps, each a launch; a part of gqa.cu, whose `grouped` is its attention. The shapes
 * are in llama.h, and the pointers are the device's. */
#ifndef LLAMA_CUDA_H
#define LLAMA_CUDA_H

#include "cuda_heads.h"
#include "cuda_linear.h"
#include "llama.h"

static void forward_grouped(const Tensors *t, const AttentionShape *s);
static void backward_grouped(const Tensors *t, const AttentionShape *s);

/* ---- Rotary embedding ---- */

/* A thread to each number of cosine and sine (T,HS/2); angles in double, as a place times a frequency may be thousands. */
__global__ static void rope_table_kernel(float *cosine, float *sine, int head_size, size_t count)
{
    int half = head_size / 2;
    for (size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x; n < count;
         n += (size_t)gridDim.x * blockDim.x) {
        double angle = (double)(n / half) * pow((double)LLAMA_THETA, -2.0 * (double)(n % half) / head_size);
        cosine[n] = (float)cos(angle);
        sine[n] = (float)sin(angle);
    }
}

/* heads (B,n,T,HS), in place: a thread to each pair of numbers. direction 1 turns forward, -1 back: a rotation's gradient. */
__global__ static void turn_heads_kernel(float *heads, const float *cosine, const float *sine,
                                         float direction, int T, int HS, size_t pairs)
{
    int half = HS / 2;
    for (size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x; n < pairs;
         n += (size_t)gridDim.x * blockDim.x) {
        size_t i = n % half, row = n / half, angle = row % T * half + i;
        float c = cosine[angle], s = direction * sine[angle], a = heads[row * HS + i],
              b = heads[row * HS + i + half];
        heads[row * HS + i] = a * c - b * s;
        heads[row * HS + i + half] = b * c + a * s;
    }
}

static void turn_heads(float *heads, int n, float direction, const LlamaWorkspace *w, const AttentionShape *s)
{
    size_t pairs = numbers_of_heads(n, s) / 2;
    LAUNCH(turn_heads_kernel, blocks_for(pairs / WARP + 1), MOST_WARPS * WARP, 0, heads, w->cosine, w->sine,
           direction, s->tokens, s->head_size, pairs);
}

/* ---- The module ---- */

enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ };

/* As the C's, but for its last: attention needs no scratch here. */
static int llama_buffers(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = query_count(s);
    floats[3] = floats[4] = key_count(s);
    floats[5] = lse_count(s);
    floats[6] = (size_t)s->tokens * s->head_size; /* half for the cosines, half for the sines */
    return 7;
}

static LlamaWorkspace llama_workspace(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    LlamaWorkspace workspace = {};
    workspace.rows = w[0];
    workspace.q = w[1];
    workspace.out_heads = w[2];
    workspace.k = w[3];
    workspace.v = w[4];
    workspace.lse = w[5];
    workspace.cosine = w[6];
    workspace.sine = w[6] + (size_t)s->tokens * (s->head_size / 2);
    return workspace;
}

/* The tensors of the attention within. */
static Tensors attention_in(const LlamaWorkspace *w)
{
    Tensors t = {};
    t.q = w->q;
    t.k = w->k;
    t.v = w->v;
    t.out = w->out_heads;
    t.lse = w->lse;
    return t;
}

static void forward_llama(const Tensors *t, const AttentionShape *s)
{
    const LlamaWorkspace w = llama_workspace(t, s);
    size_t rows = (size_t)s->batch * s->tokens, angles = (size_t)s->tokens * (s->head_size / 2);
    int q_width = s->heads * s->head_size, kv_width = s->kv_heads * s->head_size;

    device_linear(w.rows, t->x, t->parameter[Q_PROJ], NULL, rows, s->embed, q_width);
    split_heads(w.q, w.rows, q_width, s->heads, s);
    device_linear(w.rows, t->x, t->parameter[K_PROJ], NULL, rows, s->embed, kv_width);
    split_heads(w.k, w.rows, kv_width, s->kv_heads, s);
    device_linear(w.rows, t->x, t->parameter[V_PROJ], NULL, rows, s->embed, kv_width);
    split_heads(w.v, w.rows, kv_width, s->kv_heads, s);

    /* Before the heads are shared: one rotation serves the whole group. */
    LAUNCH(rope_table_kernel, blocks_for(angles / WARP + 1), MOST_WARPS * WARP, 0, w.cosine, w.sine,
           s->head_size, angles);
    turn_heads(w.q, s->heads, 1, &w, s);
    turn_heads(w.k, s->kv_heads, 1, &w, s);

    Tensors attention = attention_in(&w);
    forward_grouped(&attention, s);

    join_heads(w.rows, q_width, w.out_heads, s->heads, s);
    device_linear(t->out, w.rows, t->parameter[O_PROJ], NULL, rows, q_width, s->embed_out);
}

/* ---- Its gradient: the same steps, backwards. ---- */

static void backward_llama(const Tensors *t, const AttentionShape *s)
{
    const LlamaWorkspace w = llama_workspace(t, s);
    float *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    float *dout_heads = d[0], *dq = d[1], *dk = d[2], *dv = d[3], *delta = d[4];
    size_t rows = (size_t)s->batch * s->tokens;
    int q_width = s->heads * s->head_size, kv_width = s->kv_heads * s->head_size;

    /* dout_heads is free until the rows' gradient, which waits in dq, is split into it. */
    device_linear_backward(dq, 0, d_w[O_PROJ], t->dout, w.rows, t->parameter[O_PROJ], rows, q_width,
                           s->embed_out);
    split_heads(dout_heads, dq, q_width, s->heads, s);

    Tensors attention = attention_in(&w);
    attention.dout = dout_heads;
    attention.dq = dq;
    attention.dk = dk;
    attention.dv = dv;
    attention.backward_workspace[0] = delta;
    backward_grouped(&attention, s);

    /* dk is summed over the group already, as k was turned before it was shared. Values were not turned. */
    turn_heads(dq, s->heads, -1, &w, s);
    turn_heads(dk, s->kv_heads, -1, &w, s);

    float *d_rows = w.rows; /* forward's were needed for o_proj's gradient alone */
    join_heads(d_rows, kv_width, dv, s->kv_heads, s);
    device_linear_backward(t->dx, 0, d_w[V_PROJ], d_rows, t->x, t->parameter[V_PROJ], rows, s->embed,
                           kv_width);
    join_heads(d_rows, kv_width, dk, s->kv_heads, s);
    device_linear_backward(t->dx, 1, d_w[K_PROJ], d_rows, t->x, t->parameter[K_PROJ], rows, s->embed,
                           kv_width);
    join_heads(d_rows, q_width, dq, s->heads, s);
    device_linear_backward(t->dx, 1, d_w[Q_PROJ], d_rows, t->x, t->parameter[Q_PROJ], rows, s->embed,
                           q_width);
}
#endif
