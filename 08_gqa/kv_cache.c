/* One token against everything before it. The shapes are in the header. */
#include "kv_cache.h"

#include <string.h>

#include "split_keys_simd.h"

size_t kv_cache_bytes_per_token(int layers, int kv_heads, int head_size, int bytes_each)
{
    return (size_t)2 * layers * kv_heads * head_size * bytes_each;
}

/* Where key/value head number n (counted over all batch entries) begins. */
static size_t head_start(const KvCache *cache, size_t n)
{
    return n * cache->capacity * cache->head_size;
}

bool kv_cache_append(KvCache *cache, const float *k, const float *v)
{
    size_t HS = cache->head_size, place = cache->used * HS;
    if (cache->used == cache->capacity)
        return false;
    for (size_t n = 0; n < (size_t)cache->batch * cache->kv_heads; n++) {
        memcpy(cache->k + head_start(cache, n) + place, k + n * HS, HS * sizeof *k);
        memcpy(cache->v + head_start(cache, n) + place, v + n * HS, HS * sizeof *v);
    }
    cache->used++;
    return true;
}

/* The problem that one more token is. */
static AttentionShape decode_shape(const KvCache *cache, int keys, int heads, float scale)
{
    return (AttentionShape){.batch = cache->batch,
                            .tokens = 1,
                            .key_tokens = keys,
                            .heads = heads,
                            .kv_heads = cache->kv_heads,
                            .head_size = cache->head_size,
                            .scale = scale};
}

size_t gqa_decode_scratch(const KvCache *cache, int heads)
{
    AttentionShape s = decode_shape(cache, cache->capacity, heads, 1);
    return split_keys_scratch(&s);
}

void gqa_decode_step(float *out, float *lse, float *scratch, const float *q, const KvCache *cache, int heads,
                     float scale)
{
    AttentionShape s = decode_shape(cache, cache->used, heads, scale);
    attention_split_keys(out, lse, scratch, q, cache->k, cache->v, head_start(cache, 1), &s);
}
