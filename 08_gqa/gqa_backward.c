/* The gradients of grouped attention. Chapter 6 derives them; what is new is that a key/value head was read by
 * `group` query heads, and so its gradient is the sum of theirs. The shapes are in the header. */
#include "gqa.h"

#include <math.h>
#include <string.h>

#include "random.h"

/* ---- One pair, and one row against one head: chapter 6's backward pass. ---- */

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* sum += factor * row */
static void add_scaled(float *restrict sum, float factor, const float *restrict row, int n)
{
    for (int i = 0; i < n; i++)
        sum[i] += factor * row[i];
}

typedef struct {
    float weight;  /* D: what the value was multiplied by */
    float d_score; /* dS = P * (dP - delta) */
} Pair;

/* Computes a weight again, and the gradient of its score. False for a pair that is forbidden. key, value (HS)
 * are those that query (b, h, t) reads at t2. */
static bool recompute(Pair *pair, const GroupedBackward *g, const float *key, const float *value,
                      const AttentionShape *s, int b, int h, int t, int t2)
{
    if (!attends(s, b, h, t, t2))
        return false;
    size_t row = lse_index(s, b, h, t), q_bht = query_row(s, b, h, t);
    float score = s->scale * dot(g->q + q_bht, key, s->head_size) + bias_at(s, b, h, t, t2);
    if (score == -INFINITY)
        return false;
    float p = expf(score - g->lse[row]);
    float kept = 1;
    if (s->dropout > 0)
        kept = dropout_keeps(s->dropout_seed, row, t2, s->dropout) / (1 - s->dropout);
    pair->weight = kept * p;
    pair->d_score = p * (kept * dot(g->dout + q_bht, value, s->head_size) - g->delta[row]);
    return true;
}

/* delta and dq of query (b, h, t), which read k_head, v_head (TK,HS). */
static void query_gradient(const GroupedBackward *g, const float *k_head, const float *v_head,
                           const AttentionShape *s, int b, int h, int t)
{
    size_t HS = s->head_size, q_bht = query_row(s, b, h, t);
    g->delta[lse_index(s, b, h, t)] = dot(g->dout + q_bht, g->out + q_bht, s->head_size);
    memset(g->dq + q_bht, 0, HS * sizeof *g->dq);
    for (int t2 = 0; t2 < keys_end(s, b, t); t2++) {
        const float *key = k_head + t2 * HS;
        Pair pair;
        if (recompute(&pair, g, key, v_head + t2 * HS, s, b, h, t, t2))
            add_scaled(g->dq + q_bht, s->scale * pair.d_score, key, s->head_size);
    }
}

/* Adds to dk, dv (HS) what the queries of head h have for key and value t2. */
static void add_key_gradient(float *dk, float *dv, const GroupedBackward *g, const float *key,
                             const float *value, const AttentionShape *s, int b, int h, int t2)
{
    for (int t = 0; t < s->tokens; t++) {
        Pair pair;
        if (!recompute(&pair, g, key, value, s, b, h, t, t2))
            continue;
        add_scaled(dk, s->scale * pair.d_score, g->q + query_row(s, b, h, t), s->head_size);
        add_scaled(dv, pair.weight, g->dout + query_row(s, b, h, t), s->head_size);
    }
}

/* A number of the bias was added to one score or, along axes where its stride is 0, to many: its gradient is
 * the sum of theirs. */
static void bias_gradient(const GroupedBackward *g, const AttentionShape *s)
{
    const size_t *stride = s->bias_stride;
    const int size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    int own[4], shared[4]; /* how many numbers the bias has along an axis, how many pairs share each */
    for (int i = 0; i < 4; i++) {
        own[i] = stride[i] ? size[i] : 1;
        shared[i] = stride[i] ? 1 : size[i];
    }

#pragma omp parallel for collapse(4) schedule(dynamic, 16)
    for (int b0 = 0; b0 < own[0]; b0++)
        for (int h0 = 0; h0 < own[1]; h0++)
            for (int t0 = 0; t0 < own[2]; t0++)
                for (int k0 = 0; k0 < own[3]; k0++) {
                    float sum = 0;
                    for (int b = b0; b < b0 + shared[0]; b++)
                        for (int h = h0; h < h0 + shared[1]; h++)
                            for (int t = t0; t < t0 + shared[2]; t++) {
                                float row_sum = 0;
                                for (int t2 = k0; t2 < k0 + shared[3]; t2++) {
                                    size_t kv = key_row(s, b, h, t2);
                                    Pair pair;
                                    if (recompute(&pair, g, g->k + kv, g->v + kv, s, b, h, t, t2))
                                        row_sum += pair.d_score;
                                }
                                sum += row_sum;
                            }
                    g->dbias[b0 * stride[0] + h0 * stride[1] + t0 * stride[2] + k0 * stride[3]] = sum;
                }
}

/* ---- With copies: each has a gradient of its own, and what was copied gets their sum. ---- */

void repeat_kv_backward(float *d_kv, const float *d_repeated, const AttentionShape *s)
{
    int group = s->heads / s->kv_heads;
    size_t head = (size_t)s->key_tokens * s->head_size;

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int kv_head = 0; kv_head < s->kv_heads; kv_head++) {
            float *sum = d_kv + ((size_t)b * s->kv_heads + kv_head) * head;
            memset(sum, 0, head * sizeof *sum);
            for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
                const float *copy = d_repeated + ((size_t)b * s->heads + h) * head;
                for (size_t i = 0; i < head; i++)
                    sum[i] += copy[i];
            }
        }
}

void attention_repeat_kv_backward(const GroupedBackward *g, const float *k_repeated, const float *v_repeated,
                                  float *dk_repeated, float *dv_repeated, const AttentionShape *s)
{
    size_t HS = s->head_size, head = (size_t)s->key_tokens * HS;

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t kv_bh = ((size_t)b * s->heads + h) * head;
                query_gradient(g, k_repeated + kv_bh, v_repeated + kv_bh, s, b, h, t);
            }

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t2 = 0; t2 < s->key_tokens; t2++) {
                size_t kv = ((size_t)b * s->heads + h) * head + t2 * HS;
                memset(dk_repeated + kv, 0, HS * sizeof *dk_repeated);
                memset(dv_repeated + kv, 0, HS * sizeof *dv_repeated);
                add_key_gradient(dk_repeated + kv, dv_repeated + kv, g, k_repeated + kv, v_repeated + kv, s,
                                 b, h, t2);
            }
    repeat_kv_backward(g->dk, dk_repeated, s);
    repeat_kv_backward(g->dv, dv_repeated, s);
    if (s->bias)
        bias_gradient(g, s);
}

/* ---- Without: whoever has the key goes through the heads that read it. ---- */

void attention_grouped_backward(const GroupedBackward *g, const AttentionShape *s)
{
    int group = s->heads / s->kv_heads;
    size_t HS = s->head_size, head = (size_t)s->key_tokens * HS;

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t kv_bh = ((size_t)b * s->kv_heads + h / group) * head;
                query_gradient(g, g->k + kv_bh, g->v + kv_bh, s, b, h, t);
            }

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int kv_head = 0; kv_head < s->kv_heads; kv_head++)
            for (int t2 = 0; t2 < s->key_tokens; t2++) {
                size_t kv = ((size_t)b * s->kv_heads + kv_head) * head + t2 * HS;
                memset(g->dk + kv, 0, HS * sizeof *g->dk);
                memset(g->dv + kv, 0, HS * sizeof *g->dv);
                for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
                    add_key_gradient(g->dk + kv, g->dv + kv, g, g->k + kv, g->v + kv, s, b, h, t2);
            }
    if (s->bias)
        bias_gradient(g, s);
}
