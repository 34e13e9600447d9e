/* The KV cache: the keys and values of all tokens so far, so that the next token computes its own and no
 * others.
 *
 * A token's key and value never change once computed, as with a causal mask nothing before a token looks at
 * it. Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 3.3, on what it costs to read it
 * back for each token.
 */
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <stdbool.h>
#include <stddef.h>

/* One layer's cache: k and v (B,NKV,capacity,HS), which the caller allocates; the first `used` places of each
 * head hold something. */
typedef struct {
    float *k, *v;
    int batch, kv_heads, capacity, head_size;
    int used;
} KvCache;

/* Bytes that one token adds over all layers, each number `bytes_each` long: 2 for keys and values, times
 * layers, times NKV, times HS. */
size_t kv_cache_bytes_per_token(int layers, int kv_heads, int head_size, int bytes_each);

/* Appends one token's keys and values, k and v (B,NKV,HS) each. Returns false, and changes nothing, if the
 * cache is full. */
bool kv_cache_append(KvCache *cache, const float *k, const float *v);

/* One token attends to everything in the cache, itself included: append it first.
 *   out (B,NH,HS)  written      lse (B,NH)  written; NULL: not wanted
 *   q   (B,NH,HS)  read         scale       of the scores, as 1/sqrt(HS)
 * scratch: gqa_decode_scratch(cache, NH) floats, 64-byte aligned, enough until the cache is full. An empty cache
 * gives out = 0, lse = -inf. NKV divides NH. Head h reads key/value head h / (NH / NKV). */
void gqa_decode_step(float *out, float *lse, float *scratch, const float *q, const KvCache *cache, int heads,
                     float scale);
size_t gqa_decode_scratch(const KvCache *cache, int heads);

#endif
