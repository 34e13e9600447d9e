/* Grouped attention with everything that stands around it in Llama 3. The shapes are in the header. */
#include "llama.h"

#include <math.h>
#include <string.h>

#include "gqa.h"
#include "matmul.h"

/* ---- Rotary embedding: a query and a key turned by their places; their product knows the distance only.
 * ---- */

void rope_table(float *cosine, float *sine, int places, int head_size, double theta)
{
    int half = head_size / 2;
#pragma omp parallel for
    for (int i = 0; i < half; i++) {
        double frequency = pow(theta, -2.0 * i / head_size);
        for (int place = 0; place < places; place++) {
            cosine[(size_t)place * half + i] = (float)cos(place * frequency);
            sine[(size_t)place * half + i] = (float)sin(place * frequency);
        }
    }
}

void rope(float *row, const float *cosine, const float *sine, int head_size)
{
    int half = head_size / 2;
    for (int i = 0; i < half; i++) {
        float a = row[i], b = row[i + half];
        row[i] = a * cosine[i] - b * sine[i];
        row[i + half] = b * cosine[i] + a * sine[i];
    }
}

void rope_backward(float *row, const float *cosine, const float *sine, int head_size)
{
    int half = head_size / 2;
    for (int i = 0; i < half; i++) {
        float a = row[i], b = row[i + half];
        row[i] = a * cosine[i] + b * sine[i];
        row[i + half] = b * cosine[i] - a * sine[i];
    }
}

/* ---- Between rows (B,T,n*HS), as projections give them, and heads (B,n,T,HS), as attention takes them. ----
 */

static void split_heads(float *heads, const float *rows, int n, const AttentionShape *s)
{
    int T = s->tokens, HS = s->head_size;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < n; h++)
            for (int t = 0; t < T; t++)
                memcpy(heads + (((size_t)b * n + h) * T + t) * HS, rows + (((size_t)b * T + t) * n + h) * HS,
                       HS * sizeof *rows);
}

static void join_heads(float *rows, const float *heads, int n, const AttentionShape *s)
{
    int T = s->tokens, HS = s->head_size;
#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < T; t++)
            for (int h = 0; h < n; h++)
                memcpy(rows + (((size_t)b * T + t) * n + h) * HS, heads + (((size_t)b * n + h) * T + t) * HS,
                       HS * sizeof *rows);
}

/* turn is rope or rope_backward. */
static void turn_heads(float *heads, int n, void (*turn)(float *, const float *, const float *, int),
                       const LlamaWorkspace *w, const AttentionShape *s)
{
    size_t T = s->tokens, HS = s->head_size;
#pragma omp parallel for collapse(2)
    for (size_t bh = 0; bh < (size_t)s->batch * n; bh++)
        for (size_t t = 0; t < T; t++)
            turn(heads + (bh * T + t) * HS, w->cosine + t * (HS / 2), w->sine + t * (HS / 2), s->head_size);
}

/* ---- The module ---- */

void llama_attention(float *out, const LlamaWorkspace *w, const float *x, const float *q_proj,
                     const float *k_proj, const float *v_proj, const float *o_proj, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int q_width = s->heads * s->head_size, kv_width = s->kv_heads * s->head_size;

    linear(w->rows, x, q_proj, NULL, rows, s->embed, q_width);
    split_heads(w->q, w->rows, s->heads, s);
    linear(w->rows, x, k_proj, NULL, rows, s->embed, kv_width);
    split_heads(w->k, w->rows, s->kv_heads, s);
    linear(w->rows, x, v_proj, NULL, rows, s->embed, kv_width);
    split_heads(w->v, w->rows, s->kv_heads, s);

    /* Before the heads are shared: one rotation serves the whole group. */
    rope_table(w->cosine, w->sine, s->tokens, s->head_size, LLAMA_THETA);
    turn_heads(w->q, s->heads, rope, w, s);
    turn_heads(w->k, s->kv_heads, rope, w, s);

    attention_grouped_simd(w->out_heads, w->lse, w->scratch, w->q, w->k, w->v, s);

    join_heads(w->rows, w->out_heads, s->heads, s);
    linear(out, w->rows, o_proj, NULL, rows, q_width, s->embed_out);
}

/* ---- Its gradient: the same steps, backwards. ---- */

void llama_attention_backward(const LlamaGradients *g, const LlamaBackwardWorkspace *d,
                              const LlamaWorkspace *w, const float *dout, const float *x, const float *q_proj,
                              const float *k_proj, const float *v_proj, const float *o_proj,
                              const AttentionShape *s)
{
    int rows = s->batch * s->tokens, q_width = s->heads * s->head_size, kv_width = s->kv_heads * s->head_size;
    float *d_rows = w->rows; /* from here on: forward's are needed for o_proj's gradient alone */

    linear_backward(d_rows, 0, g->do_proj, NULL, dout, s->embed_out, w->rows, o_proj, rows, q_width,
                    s->embed_out);
    split_heads(d->dout_heads, d_rows, s->heads, s);

    const GroupedBackward attention = {.q = w->q,
                                       .k = w->k,
                                       .v = w->v,
                                       .out = w->out_heads,
                                       .lse = w->lse,
                                       .dout = d->dout_heads,
                                       .dq = d->dq,
                                       .dk = d->dk,
                                       .dv = d->dv,
                                       .delta = d->delta};
    attention_grouped_backward(&attention, s);

    /* dk is summed over the group already, as k was turned before it was shared. Values were not turned. */
    turn_heads(d->dq, s->heads, rope_backward, w, s);
    turn_heads(d->dk, s->kv_heads, rope_backward, w, s);

    join_heads(d_rows, d->dv, s->kv_heads, s);
    linear_backward(g->dx, 0, g->dv_proj, NULL, d_rows, kv_width, x, v_proj, rows, s->embed, kv_width);
    join_heads(d_rows, d->dk, s->kv_heads, s);
    linear_backward(g->dx, 1, g->dk_proj, NULL, d_rows, kv_width, x, k_proj, rows, s->embed, kv_width);
    join_heads(d_rows, d->dq, s->heads, s);
    linear_backward(g->dx, 1, g->dq_proj, NULL, d_rows, q_width, x, q_proj, rows, s->embed, q_width);
}
