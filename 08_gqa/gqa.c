/* Two ways to let a group of query heads share a key/value head. The shapes are in the header. */
#include "gqa.h"

#include <math.h>
#include <string.h>

#include "random.h"

/* ---- One query row against the keys of one head, in one pass: chapter 6's online softmax. ---- */

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* out (HS) from q (HS) and k_head, v_head (TK,HS); returns the row's lse. */
static float attend_row(float *out, const float *q, const float *k_head, const float *v_head,
                        const AttentionShape *s, int b, int h, int t)
{
    int HS = s->head_size;
    float m = -INFINITY, l = 0;
    memset(out, 0, HS * sizeof *out);

    for (int t2 = 0; t2 < keys_end(s, b, t); t2++) {
        if (!attends(s, b, h, t, t2))
            continue;
        float score = s->scale * dot(q, k_head + (size_t)t2 * HS, HS) + bias_at(s, b, h, t, t2);
        if (score == -INFINITY)
            continue;
        float m_new = fmaxf(m, score);
        float mend = m == m_new ? 1 : expf(m - m_new);
        float p = expf(score - m_new);
        l = mend * l + p;
        m = m_new;
        if (s->dropout > 0)
            p *= dropout_keeps(s->dropout_seed, lse_index(s, b, h, t), t2, s->dropout) / (1 - s->dropout);
        const float *value = v_head + (size_t)t2 * HS;
#pragma omp simd
        for (int i = 0; i < HS; i++)
            out[i] = mend * out[i] + p * value[i];
    }
    for (int i = 0; i < HS; i++)
        out[i] = l == 0 ? 0 : out[i] / l;
    return m + logf(l);
}

/* ---- With copies ---- */

void repeat_kv(float *repeated, const float *kv, const AttentionShape *s)
{
    int group = s->heads / s->kv_heads;
    size_t head = (size_t)s->key_tokens * s->head_size;

#pragma omp parallel for collapse(2)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            memcpy(repeated + ((size_t)b * s->heads + h) * head,
                   kv + ((size_t)b * s->kv_heads + h / group) * head, head * sizeof *kv);
}

void attention_repeat_kv(float *out, float *lse, float *k_repeated, float *v_repeated, const float *q,
                         const float *k, const float *v, const AttentionShape *s)
{
    size_t head = (size_t)s->key_tokens * s->head_size;
    repeat_kv(k_repeated, k, s);
    repeat_kv(v_repeated, v, s);

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t q_bht = query_row(s, b, h, t), kv_bh = ((size_t)b * s->heads + h) * head;
                lse[lse_index(s, b, h, t)] =
                    attend_row(out + q_bht, q + q_bht, k_repeated + kv_bh, v_repeated + kv_bh, s, b, h, t);
            }
}

/* ---- Without: the head's number says where to look. ---- */

void attention_grouped(float *out, float *lse, const float *q, const float *k, const float *v,
                       const AttentionShape *s)
{
    int group = s->heads / s->kv_heads;
    size_t head = (size_t)s->key_tokens * s->head_size;

#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t q_bht = query_row(s, b, h, t), kv_bh = ((size_t)b * s->kv_heads + h / group) * head;
                lse[lse_index(s, b, h, t)] =
                    attend_row(out + q_bht, q + q_bht, k + kv_bh, v + kv_bh, s, b, h, t);
            }
}
