/* Attention in bf16 where the processor multiplies float32 as fast as pairs of bf16, or faster (BF16_PAIRS in tiles.h): q, k, v and dout
 * are widened, the float32 kernel attends, and out and the gradients are rounded. Nothing else is: no weight, no dS. The contracts are
 * in flash_tiled_bf16.h and flash_tiled_bf16_backward.h. */
#include "flash_tiled_bf16_backward.h"

#if !BF16_PAIRS
#include "flash_tiled_simd_backward.h"

/* (B,NH,tokens,HS). Of keys, only those of a valid length; q, out and dout have none: NULL. */
static void widen(float *to, const Bf16 *from, int tokens, const int *lengths, const AttentionShape *s)
{
    size_t HS = s->head_size, heads = (size_t)s->batch * s->heads;
#pragma omp parallel for
    for (size_t row = 0; row < heads * tokens; row++) {
        if (lengths && row % tokens >= (size_t)lengths[row / tokens / s->heads])
            continue;
        for (size_t i = row * HS; i < (row + 1) * HS; i++)
            to[i] = bf16_to_float(from[i]);
    }
}

static void narrow(Bf16 *to, const float *from, size_t count)
{
#pragma omp parallel for
    for (size_t i = 0; i < count; i++)
        to[i] = bf16_from_float(from[i]);
}

size_t bf16_copies(const AttentionShape *s)
{
    return query_count(s) + 2 * key_count(s);
}

/* out takes q's place. */
void attention_bf16(Bf16 *out, float *lse, float *copies, float *scratch, const Bf16 *q, const Bf16 *k,
                    const Bf16 *v, const AttentionShape *s)
{
    float *wide_q = copies, *wide_k = wide_q + query_count(s), *wide_v = wide_k + key_count(s);
    widen(wide_q, q, s->tokens, NULL, s);
    widen(wide_k, k, s->key_tokens, s->lengths, s);
    widen(wide_v, v, s->key_tokens, s->lengths, s);
    attention_simd(wide_q, lse, scratch, wide_q, wide_k, wide_v, s);
    narrow(out, wide_q, query_count(s));
}

size_t bf16_gradient_sums(const AttentionShape *s)
{
    return query_count(s);
}

size_t bf16_backward_copies(const AttentionShape *s)
{
    return 3 * query_count(s) + 4 * key_count(s);
}

size_t bf16_backward_scratch(const AttentionShape *s)
{
    return flash_backward_scratch(s);
}

void attention_bf16_backward(const Bf16Backward *g, float *sums, float *copies, float *scratch,
                             const AttentionShape *s)
{
    size_t queries = query_count(s), keys = key_count(s);
    float *q = copies, *out = q + queries, *dout = out + queries, *k = dout + queries, *v = k + keys,
          *dk = v + keys, *dv = dk + keys;
    widen(q, g->q, s->tokens, NULL, s);
    widen(out, g->out, s->tokens, NULL, s);
    widen(dout, g->dout, s->tokens, NULL, s);
    widen(k, g->k, s->key_tokens, s->lengths, s);
    widen(v, g->v, s->key_tokens, s->lengths, s);
    const AttentionBackward wide = {q, k, v, out, g->lse, dout, .dq = sums, .dk = dk, .dv = dv};
    attention_simd_backward(&wide, scratch, s);
    narrow(g->dq, sums, queries);
    narrow(g->dk, dk, keys);
    narrow(g->dv, dv, keys);
}
#endif
