/* Few query rows against split keys: every shape against the oracle, NaN, the threads, and what is counted. */
#include "chapter.h"
#include "gqa.h"
#include "kv_cache.h"
#include "memory.h"
#include "oracle.h"
#include "random.h"
#include "split_keys_simd.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *scratch;
} Problem;

static Problem set_up(AttentionShape s)
{
    s.scale = s.scale != 0 ? s.scale : 1 / sqrtf((float)s.head_size);
    Problem p = {.s = s};
    p.q = allocate_floats(query_count(&s));
    p.k = allocate_floats(key_count(&s));
    p.v = allocate_floats(key_count(&s));
    p.out = allocate_floats(query_count(&s));
    p.lse = allocate_floats(lse_count(&s));
    p.scratch = allocate_floats(split_keys_scratch(&s));
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p.q, query_count(&s));
    draw_randn(&stream, p.k, key_count(&s));
    draw_randn(&stream, p.v, key_count(&s));
    return p;
}

static void tear_down(Problem *p)
{
    float *const owned[] = {p->q, p->k, p->v, p->out, p->lse, p->scratch};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        free(owned[i]);
}

static void attend(Problem *p)
{
    memset(p->scratch, 0xFF, split_keys_scratch(&p->s) * sizeof(float)); /* NaN */
    memset(p->out, 0xFF, query_count(&p->s) * sizeof(float));
    attention_split_keys(p->out, p->lse, p->scratch, p->q, p->k, p->v,
                         (size_t)p->s.key_tokens * p->s.head_size, &p->s);
}

/* The largest difference from the oracle; infinite if either is NaN, or one lse is -inf and the other is not. */
static double off_by(const Problem *p)
{
    double *out = calloc(query_count(&p->s), sizeof *out), *lse = calloc(lse_count(&p->s), sizeof *lse),
           worst = 0;
    oracle_attention(out, lse, NULL, NULL, 0, p->q, p->k, p->v, NULL, &p->s);
    for (size_t i = 0; i < query_count(&p->s); i++)
        worst = worse(worst, fabs(out[i] - p->out[i]));
    for (size_t i = 0; i < lse_count(&p->s); i++)
        if (lse[i] != p->lse[i])
            worst = worse(worst, fabs(lse[i] - p->lse[i]));
    free(out);
    free(lse);
    return isnan(worst) ? INFINITY : worst;
}

Test(split_keys, give_what_the_oracle_gives)
{
    static const int head_sizes[] = {1, 5, 40, 64, 80, 128, 256, 570};
    static const int groups[] = {1, 2, 3, 4, 5, 8, 16, 17};
    static const int key_counts[] = {1, 7, 255, 256, 257, 700};
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            Problem p = set_up((AttentionShape){.batch = 2,
                                                .tokens = 1,
                                                .key_tokens = key_counts[(i + j) % 6],
                                                .heads = 2 * groups[j],
                                                .kv_heads = 2,
                                                .head_size = head_sizes[i],
                                                .causal = j % 2});
            attend(&p);
            double off = off_by(&p);
            cr_expect(off <= 4e-6, "head size %d, group %d, %d keys: off by %g", head_sizes[i], groups[j],
                      p.s.key_tokens, off);
            tear_down(&p);
        }
}

/* With so many key/value heads a split would be longer than its weights' room: then there are more of them. */
Test(split_keys, are_never_longer_than_their_weights_room)
{
    Problem p = set_up((AttentionShape){
        .batch = 1, .tokens = 1, .key_tokens = 5000, .heads = 130, .kv_heads = 130, .head_size = 4});
    attend(&p);
    double off = off_by(&p);
    cr_expect(off <= 4e-6, "off by %g", off);
    tear_down(&p);
}

/* A growing cache asks for its scratch once. */
Test(split_keys, need_no_less_room_for_more_keys)
{
    static const int kv_heads[] = {1, 3, 8, 130};
    for (int i = 0; i < 4; i++) {
        KvCache cache = {.batch = 1, .kv_heads = kv_heads[i], .head_size = 16};
        for (size_t before = 0, now; cache.capacity < 70000; before = now, cache.capacity += 97) {
            now = gqa_decode_scratch(&cache, kv_heads[i]);
            cr_assert(now >= before, "%d key/value heads, %d keys", kv_heads[i], cache.capacity);
        }
    }
}

Test(split_keys, take_every_mask_of_one_run)
{
    static const int lengths[] = {700, 0, 257, 1};
    static const Mask masks[] = {{MASK_NONE, 0, 0, NULL},     {MASK_CAUSAL, 0, 0, NULL},
                                 {MASK_WINDOW, 1, 0, NULL},   {MASK_WINDOW, 300, 0, NULL},
                                 {MASK_PREFIX, 400, 0, NULL}, {MASK_PREFIX, 5, 0, NULL}};
    for (int i = 0; i < 6; i++)
        for (int padded = 0; padded < 2; padded++)
            for (int causal = 0; causal < 2; causal++)
                for (int tokens = 2; tokens <= 900;
                     tokens += 898) { /* of 900 tokens, 200 stand before the keys */
                    if (tokens == 900 && (padded || masks[i].kind == MASK_PREFIX))
                        continue;
                    Problem p = set_up((AttentionShape){.batch = padded ? 4 : 1,
                                                        .tokens = tokens,
                                                        .key_tokens = 700,
                                                        .heads = 3,
                                                        .kv_heads = 1,
                                                        .head_size = 20,
                                                        .mask = masks[i],
                                                        .causal = causal,
                                                        .lengths = padded ? lengths : NULL});
                    attend(&p);
                    double off = off_by(&p);
                    cr_expect(off <= 4e-6, "mask %d, causal %d, lengths %d, %d tokens: off by %g", i, causal,
                              padded, tokens, off);
                    tear_down(&p);
                }
}

/* Scores of thousands, negative ones too: a maximum of each split, and none of another one's keys. */
Test(split_keys, bear_large_scores)
{
    static const float scales[] = {30, -30, 100};
    for (int i = 0; i < 3; i++) {
        Problem p = set_up((AttentionShape){.batch = 1,
                                            .tokens = 2,
                                            .key_tokens = 900,
                                            .heads = 4,
                                            .kv_heads = 2,
                                            .head_size = 64,
                                            .scale = scales[i]});
        attend(&p);
        double off = off_by(&p);
        cr_expect(off <= 5e-3, "scale %g: off by %g", scales[i], off);
        tear_down(&p);
    }
}

/* What a row may see reaches it; what it may not stays out, also at the end of its last step of keys. */
Test(split_keys, never_hide_nan_nor_spread_it)
{
    static const int lengths[] = {601, 300};
    for (int in_values = 0; in_values < 2; in_values++) {
        Problem p = set_up((AttentionShape){.batch = 2,
                                            .tokens = 1,
                                            .key_tokens = 700,
                                            .heads = 6,
                                            .kv_heads = 2,
                                            .head_size = 24,
                                            .lengths = lengths});
        for (int b = 0; b < 2; b++)
            (in_values ? p.v : p.k)[key_row(&p.s, b, 3, 300)] =
                NAN; /* entry 0 sees key 300, entry 1 does not */
        attend(&p);
        for (int b = 0; b < 2; b++)
            for (int h = 0; h < 6; h++) {
                bool expected = b == 0 && h >= 3;
                cr_expect((isnan(p.out[query_row(&p.s, b, h, 0)]) != 0) == expected, "entry %d, head %d", b,
                          h);
                cr_expect((isnan(p.lse[lse_index(&p.s, b, h, 0)]) != 0) == (expected && !in_values));
            }
        tear_down(&p);
    }
    Problem p = set_up((AttentionShape){
        .batch = 1, .tokens = 1, .key_tokens = 300, .heads = 1, .kv_heads = 1, .head_size = 8});
    for (int i = 0; i < 300 * 8; i++)
        p.k[i] = NAN; /* no key has a score at all */
    attend(&p);
    cr_expect(isnan(p.out[0]) && isnan(p.lse[0]));
    tear_down(&p);
}

Test(split_keys, give_the_same_bits_for_any_number_of_threads)
{
    Problem p = set_up((AttentionShape){.batch = 2,
                                        .tokens = 2,
                                        .key_tokens = 1500,
                                        .heads = 6,
                                        .kv_heads = 2,
                                        .head_size = 72,
                                        .causal = true});
    size_t bytes = query_count(&p.s) * sizeof(float);
    float *alone = allocate_floats(query_count(&p.s)), *alone_lse = allocate_floats(lse_count(&p.s));
    omp_set_num_threads(1);
    attend(&p);
    memcpy(alone, p.out, bytes);
    memcpy(alone_lse, p.lse, lse_count(&p.s) * sizeof(float));
    for (int threads = 2; threads <= 5; threads++) {
        omp_set_num_threads(threads);
        attend(&p);
        cr_expect(memcmp(alone, p.out, bytes) == 0, "%d threads", threads);
        cr_expect(memcmp(alone_lse, p.lse, lse_count(&p.s) * sizeof(float)) == 0, "%d threads", threads);
    }
    free(alone);
    free(alone_lse);
    tear_down(&p);
}

/* The kernel named simd takes this way by itself, counts its workspace, and gives the same bits. */
Test(split_keys, are_what_simd_does_with_few_rows)
{
    const Kernel *simd = chapter.kernels;
    while (strcmp(simd->name, "simd") != 0)
        simd++;
    const AttentionShape one = {.batch = 2,
                                .tokens = 1,
                                .key_tokens = 1000,
                                .heads = 8,
                                .kv_heads = 2,
                                .head_size = 40,
                                .causal = true};
    size_t floats[MAX_BUFFERS];
    cr_assert(split_keys_wins(&one) && simd->workspace(&one, floats) == 1);
    cr_expect(floats[0] == split_keys_scratch(&one));
    cr_expect(floats[0] == (size_t)2 * 2 * 4 * 4 * (48 + 16),
              "entries, heads, splits of 256, rows, columns: %zu", floats[0]);
    Problem p = set_up(one);
    attend(&p);
    float *out = allocate_floats(query_count(&one)), *lse = allocate_floats(lse_count(&one));
    attention_grouped_simd(out, lse, p.scratch, p.q, p.k, p.v, &p.s);
    cr_expect(memcmp(out, p.out, query_count(&one) * sizeof(float)) == 0);
    cr_expect(memcmp(lse, p.lse, lse_count(&one) * sizeof(float)) == 0);

    AttentionShape other = one;
    other.tokens = 5; /* 20 rows */
    cr_expect(!split_keys_wins(&other));
    other = one;
    other.dropout = 0.1f;
    cr_expect(!split_keys_wins(&other));
    other = one;
    other.bias = p.q;
    cr_expect(!split_keys_wins(&other));
    other = one;
    other.mask = (Mask){MASK_DILATED, 3, 2, NULL};
    cr_expect(!split_keys_wins(&other));
    other.mask = (Mask){MASK_LOCAL_GLOBAL, 3, 2, NULL};
    cr_expect(!split_keys_wins(&other));
    free(out);
    free(lse);
    tear_down(&p);
}

/* A cache that is not full: its heads lie further apart than they are long. */
Test(split_keys, read_a_cache_that_is_not_full)
{
    Problem p = set_up((AttentionShape){
        .batch = 2, .tokens = 1, .key_tokens = 530, .heads = 6, .kv_heads = 3, .head_size = 12});
    size_t head = (size_t)530 * 12, room = (size_t)600 * 12;
    KvCache cache = {.batch = 2, .kv_heads = 3, .capacity = 600, .head_size = 12, .used = 530};
    cache.k = allocate_floats(6 * room);
    cache.v = allocate_floats(6 * room);
    memset(cache.k, 0xFF, 6 * room * sizeof(float));
    memset(cache.v, 0xFF, 6 * room * sizeof(float));
    for (int n = 0; n < 6; n++) {
        memcpy(cache.k + n * room, p.k + n * head, head * sizeof(float));
        memcpy(cache.v + n * room, p.v + n * head, head * sizeof(float));
    }
    float *scratch = allocate_floats(gqa_decode_scratch(&cache, 6));
    gqa_decode_step(p.out, p.lse, scratch, p.q, &cache, 6, p.s.scale);
    double off = off_by(&p);
    cr_expect(off <= 4e-6, "off by %g", off);
    free(scratch);
    free(cache.k);
    free(cache.v);
    tear_down(&p);
}
