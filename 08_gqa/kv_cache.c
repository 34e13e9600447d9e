/* One token against everything before it. The shapes are in the header. */
#include "kv_cache.h"

#include <math.h>
#include <string.h>

#include "vector_math.h"

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

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* How many keys, and how many heads of a group, are taken at once: a step's keys and values stay in the
 * nearest cache while the heads read them one after the other. */
enum { STEP = 32, HEADS = 8 };

/* Shows `keys` <= STEP keys to one query: m, l and out as in chapter 6, mended once for all of them. */
static void attend_step(float *out, float *m, float *l, const float *q, const float *k, const float *v,
                        int keys, int HS, float scale)
{
    float p[STEP], m_new = *m, sum = 0;
    for (int i = 0; i < keys; i++) {
        p[i] = scale * dot(q, k + (size_t)i * HS, HS);
        m_new = fmaxf(m_new, p[i]);
    }
    float mend = *m == m_new ? 1 : expf(*m - m_new);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < keys; i++) {
        p[i] = fast_exp(p[i] - m_new);
        sum += p[i];
    }
    *l = mend * *l + sum;
    *m = m_new;

    for (int d = 0; d < HS; d++)
        out[d] *= mend;
    for (int i = 0; i < keys; i++) {
#pragma omp simd
        for (int d = 0; d < HS; d++)
            out[d] += p[i] * v[(size_t)i * HS + d];
    }
}

void gqa_decode_step(float *out, float *lse, const float *q, const KvCache *cache, int heads, float scale)
{
    int group = heads / cache->kv_heads, HS = cache->head_size;

#pragma omp parallel for collapse(2)
    for (int n = 0; n < cache->batch * cache->kv_heads; n++)
        for (int g = 0; g < group; g += HEADS) {
            int count = group - g < HEADS ? group - g : HEADS;
            size_t first =
                (size_t)n * group + g; /* the first of `count` query heads, over all batch entries */
            float m[HEADS], l[HEADS] = {0};
            for (int i = 0; i < count; i++)
                m[i] = -INFINITY;
            memset(out + first * HS, 0, (size_t)count * HS * sizeof *out);

            for (int t2 = 0; t2 < cache->used; t2 += STEP) {
                int keys = cache->used - t2 < STEP ? cache->used - t2 : STEP;
                size_t place = head_start(cache, n) + (size_t)t2 * HS;
                for (int i = 0; i < count; i++)
                    attend_step(out + (first + i) * HS, &m[i], &l[i], q + (first + i) * HS, cache->k + place,
                                cache->v + place, keys, HS, scale);
            }

            for (int i = 0; i < count; i++) {
                for (int d = 0; d < HS; d++)
                    out[(first + i) * HS + d] *= l[i] == 0 ? 0 : 1 / l[i];
                if (lse)
                    lse[first + i] = m[i] + logf(l[i]);
            }
        }
}
