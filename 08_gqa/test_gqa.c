/* What is particular to shared heads: who reads whom, the rotary embedding, the cache, and Llama's module. */
#include "chapter.h"
#include "decode.h"
#include "gqa.h"
#include "kv_cache.h"
#include "llama.h"
#include "memory.h"
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define near(a, b, tolerance) (fabs((double)(a) - (double)(b)) <= (tolerance))

extern const Chapter chapter;

/* ---- A problem ---- */

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *k_repeated, *v_repeated, *scratch;
} Problem;

static Problem set_up(int batch, int heads, int kv_heads, int tokens, int head_size)
{
    Problem p = {.s = {.batch = batch,
                       .heads = heads,
                       .kv_heads = kv_heads,
                       .tokens = tokens,
                       .key_tokens = tokens,
                       .head_size = head_size,
                       .scale = 1 / sqrtf((float)head_size),
                       .causal = true}};
    p.q = allocate_floats(query_count(&p.s));
    p.k = allocate_floats(key_count(&p.s));
    p.v = allocate_floats(key_count(&p.s));
    p.out = allocate_floats(query_count(&p.s));
    p.lse = allocate_floats(lse_count(&p.s));
    p.k_repeated = allocate_floats(query_count(&p.s));
    p.v_repeated = allocate_floats(query_count(&p.s));
    p.scratch = allocate_floats(grouped_simd_scratch(&p.s));
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p.q, query_count(&p.s));
    draw_randn(&stream, p.k, key_count(&p.s));
    draw_randn(&stream, p.v, key_count(&p.s));
    return p;
}

static void tear_down(Problem *p)
{
    float *const owned[] = {p->q, p->k, p->v, p->out, p->lse, p->k_repeated, p->v_repeated, p->scratch};
    for (int i = 0; i < 8; i++)
        free(owned[i]);
}

enum { REPEAT_KV, GROUPED, SIMD, KERNELS };
static const char *const names[KERNELS] = {"repeat-kv", "grouped", "simd"};

static void attend(Problem *p, int kernel)
{
    if (kernel == REPEAT_KV)
        attention_repeat_kv(p->out, p->lse, p->k_repeated, p->v_repeated, p->q, p->k, p->v, &p->s);
    else if (kernel == GROUPED)
        attention_grouped(p->out, p->lse, p->q, p->k, p->v, &p->s);
    else
        attention_grouped_simd(p->out, p->lse, p->scratch, p->q, p->k, p->v, &p->s);
}

/* ---- Who reads whom ---- */

Test(sharing, copies_of_a_head_lie_side_by_side)
{
    const AttentionShape s = {
        .batch = 2, .heads = 6, .kv_heads = 2, .tokens = 1, .key_tokens = 1, .head_size = 1};
    const float kv[2 * 2] = {10, 11, 20, 21},
                       expected[2 * 6] = {10, 10, 10, 11, 11, 11, 20, 20, 20, 21, 21, 21};
    float repeated[2 * 6];
    repeat_kv(repeated, kv, &s);
    for (int i = 0; i < 12; i++)
        cr_expect(repeated[i] == expected[i], "number %d is %g, not %g", i, repeated[i], expected[i]);
}

/* One query head alone with one key/value head is no grouped attention any more. */
Test(sharing, head_h_reads_key_value_head_h_over_group)
{
    static const int kv_heads[] = {6, 3, 2, 1};
    for (int kernel = 0; kernel < KERNELS; kernel++)
        for (int i = 0; i < 4; i++) {
            Problem p = set_up(2, 6, kv_heads[i], 53, 24);
            attend(&p, kernel);
            float *alone = allocate_floats((size_t)53 * 24), *alone_lse = allocate_floats(53);
            AttentionShape one = p.s;
            one.batch = one.heads = one.kv_heads = 1;
            for (int b = 0; b < 2; b++)
                for (int h = 0; h < 6; h++) {
                    size_t first = query_row(&p.s, b, h, 0);
                    size_t kv = ((size_t)b * kv_heads[i] + h / (6 / kv_heads[i])) * 53 * 24;
                    attention_grouped(alone, alone_lse, p.q + first, p.k + kv, p.v + kv, &one);
                    float worst = 0;
                    for (int n = 0; n < 53 * 24; n++)
                        worst = fmaxf(worst, fabsf(alone[n] - p.out[first + n]));
                    cr_expect(worst <= 2e-6f, "%s, %d key/value heads: head %d of entry %d is off by %g",
                              names[kernel], kv_heads[i], h, b, worst);
                }
            free(alone);
            free(alone_lse);
            tear_down(&p);
        }
}

Test(sharing, nan_stays_in_its_group)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Problem p = set_up(1, 6, 2, 20, 8);
        p.k[key_row(&p.s, 0, 3, 0)] = NAN; /* key/value head 1: query heads 3, 4, 5 */
        attend(&p, kernel);
        for (int h = 0; h < 6; h++)
            cr_expect((isnan(p.out[query_row(&p.s, 0, h, 19)]) != 0) == (h >= 3), "%s, head %d",
                      names[kernel], h);
        tear_down(&p);
    }
}

#ifdef _OPENMP
Test(sharing, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Problem p = set_up(1, 6, 2, 130, 24);
        size_t bytes = query_count(&p.s) * sizeof(float);
        float *alone = allocate_floats(query_count(&p.s));
        omp_set_num_threads(1);
        attend(&p, kernel);
        memcpy(alone, p.out, bytes);
        omp_set_num_threads(3);
        attend(&p, kernel);
        cr_expect(memcmp(alone, p.out, bytes) == 0, "%s", names[kernel]);
        free(alone);
        tear_down(&p);
    }
}
#endif

/* ---- Rotary embedding ---- */

Test(rope, pairs_i_with_i_plus_half)
{
    float cosine[2 * 2], sine[2 * 2], row[4] = {1, 0, 0, 10};
    rope_table(cosine, sine, 2, 4, 10000);
    rope(row, cosine + 2, sine + 2, 4); /* place 1: angles 1 and 1 / sqrt(10000) */
    const double expected[4] = {cos(1), -10 * sin(0.01), sin(1), 10 * cos(0.01)};
    for (int i = 0; i < 4; i++)
        cr_expect(near(row[i], expected[i], 1e-6), "number %d is %g, not %g", i, row[i], expected[i]);
}

Test(rope, place_0_turns_nothing)
{
    float cosine[4], sine[4], row[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    rope_table(cosine, sine, 1, 8, LLAMA_THETA);
    rope(row, cosine, sine, 8);
    for (int i = 0; i < 8; i++)
        cr_expect(row[i] == i + 1);
}

Test(rope, a_product_knows_the_distance_only)
{
    enum { HS = 16, PLACES = 40 };
    float cosine[PLACES * HS / 2], sine[PLACES * HS / 2], q[HS], k[HS];
    rope_table(cosine, sine, PLACES, HS, LLAMA_THETA);
    double first = 0;
    for (int place = 0; place + 9 < PLACES; place++) {
        RandomStream stream;
        seed_stream(&stream, STREAM_CPU, 123);
        draw_randn(&stream, q, HS);
        draw_randn(&stream, k, HS);
        rope(q, cosine + (place + 9) * HS / 2, sine + (place + 9) * HS / 2, HS);
        rope(k, cosine + place * HS / 2, sine + place * HS / 2, HS);
        double product = 0;
        for (int i = 0; i < HS; i++)
            product += (double)q[i] * k[i];
        first = place == 0 ? product : first;
        cr_expect(near(product, first, 2e-6), "place %d: %.7f, not %.7f", place, product, first);
        /* A query whose place is counted from 0 again, with `place` keys in the cache: */
        seed_stream(&stream, STREAM_CPU, 123);
        draw_randn(&stream, q, HS);
        rope(q, cosine + 9 * HS / 2, sine + 9 * HS / 2, HS);
        double restarted = 0;
        for (int i = 0; i < HS; i++)
            restarted += (double)q[i] * k[i];
        cr_expect(place == 0 || !near(restarted, first, 1e-3), "place %d", place);
    }
}

Test(rope, before_or_after_the_copies_is_the_same)
{
    Problem p = set_up(1, 6, 2, 11, 8);
    float cosine[11 * 4], sine[11 * 4];
    float *after = allocate_floats(query_count(&p.s));
    rope_table(cosine, sine, 11, 8, LLAMA_THETA);
    repeat_kv(after, p.k, &p.s);
    for (int row = 0; row < 6 * 11; row++)
        rope(after + row * 8, cosine + row % 11 * 4, sine + row % 11 * 4, 8);
    for (int row = 0; row < 2 * 11; row++)
        rope(p.k + row * 8, cosine + row % 11 * 4, sine + row % 11 * 4, 8);
    repeat_kv(p.k_repeated, p.k, &p.s);
    cr_expect(memcmp(after, p.k_repeated, query_count(&p.s) * sizeof(float)) == 0);
    free(after);
    tear_down(&p);
}

/* ---- Llama's module ---- */

static const Kernel *llama_kernel(void)
{
    const Kernel *kernel = chapter.kernels;
    while (strcmp(kernel->name, "llama") != 0)
        kernel++;
    return kernel;
}

Test(llama, gives_what_pytorch_gives)
{
    const AttentionShape s = {.batch = 2,
                              .tokens = 10,
                              .key_tokens = 10,
                              .embed = 48,
                              .embed_out = 96,
                              .heads = 6,
                              .kv_heads = 2,
                              .head_size = 16,
                              .scale = 0.25f,
                              .mask.kind = MASK_CAUSAL};
    const Kernel *kernel = llama_kernel();
    static float x[2 * 10 * 48], out[2 * 10 * 96];
    Tensors t = {.x = x, .out = out};
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, x, 2 * 10 * 48);
    Parameters parameters = {.stream = &stream};
    kernel->parameters(&parameters, &s);
    for (int i = 0; i < parameters.count; i++)
        t.parameter[i] = parameters.list[i].data;
    size_t floats[MAX_BUFFERS];
    int buffers = kernel->workspace(&s, floats);
    for (int i = 0; i < buffers; i++)
        t.workspace[i] = allocate_floats(floats[i]);
    kernel->forward(&t, &s);

    FILE *file = fopen("08_gqa/reference/llama.tsv", "r");
    cr_assert(file, "08_gqa/reference/llama.tsv is missing; run the test from the top of the repository");
    char comment[400];
    for (int i = 0; i < 2; i++)
        cr_assert(fgets(comment, sizeof comment, file) && comment[0] == '#');
    for (int i = 0; i < 2 * 10 * 96; i++) {
        double expected;
        cr_assert(fscanf(file, "%lf", &expected) == 1, "number %d is missing", i);
        cr_expect(near(out[i], expected, 2e-6), "number %d is %.7g, not %.7g", i, out[i], expected);
    }
    fclose(file);
    for (int i = 0; i < buffers; i++)
        free(t.workspace[i]);
    for (int i = 0; i < parameters.count; i++)
        free(parameters.list[i].data);
}

Test(llama, refuses_odd_heads)
{
    const AttentionShape odd = {.head_size = 5}, even = {.head_size = 6};
    cr_expect(llama_kernel()->refuses(&odd) && strstr(llama_kernel()->refuses(&odd), "even"));
    cr_expect(!llama_kernel()->refuses(&even));
}

/* ---- The cache ---- */

Test(cache, costs_what_its_heads_cost)
{
    cr_expect(kv_cache_bytes_per_token(32, 32, 128, 2) == 512 << 10);
    cr_expect(kv_cache_bytes_per_token(32, 8, 128, 2) == 128 << 10);
    cr_expect(kv_cache_bytes_per_token(32, 1, 128, 2) == 16 << 10);
    cr_expect(kv_cache_bytes_per_token(80, 8, 128, 4) == (size_t)640 << 10);
}

Test(cache, is_empty_at_first_and_full_at_last)
{
    float k[2 * 3 * 2], v[2 * 3 * 2], token[2 * 2] = {1, 2, 3, 4}, q[4 * 2] = {0}, out[4 * 2], lse[4];
    KvCache cache = {.k = k, .v = v, .batch = 1, .kv_heads = 2, .capacity = 3, .head_size = 2};
    gqa_decode_step(out, lse, q, &cache, 4, 1);
    for (int h = 0; h < 4; h++)
        cr_expect(lse[h] == -INFINITY && out[h * 2] == 0 && out[h * 2 + 1] == 0, "head %d", h);
    for (int i = 0; i < 3; i++)
        cr_expect(kv_cache_append(&cache, token, token));
    token[0] = 9;
    cr_expect(!kv_cache_append(&cache, token, token));
    cr_expect(cache.used == 3 && k[0] == 1 && k[2 * 2] == 1 && k[3 * 2] == 3);
}

/* Scores of hundreds: exp() of one that is not measured from the largest overflows. */
Test(cache, bears_large_scores)
{
    Problem p = set_up(1, 2, 1, 70, 10);
    for (size_t i = 0; i < key_count(&p.s); i++)
        p.k[i] *= 100;
    attend(&p, GROUPED);
    KvCache cache = {
        .k = p.k, .v = p.v, .batch = 1, .kv_heads = 1, .capacity = 70, .head_size = 10, .used = 70};
    float q[2 * 10], out[2 * 10];
    for (int h = 0; h < 2; h++)
        memcpy(q + h * 10, p.q + query_row(&p.s, 0, h, 69), 10 * sizeof *q);
    gqa_decode_step(out, NULL, q, &cache, 2, p.s.scale);
    for (int i = 0; i < 20; i++)
        cr_expect(near(out[i], p.out[query_row(&p.s, 0, i / 10, 69) + i % 10], 1e-4), "number %d: %g", i,
                  out[i]);
    tear_down(&p);
}

/* One query head more than are taken at once, keys that do not fill the last step, and the lse. */
Test(cache, decodes_groups_of_any_size)
{
    static const int heads[] = {1, 9, 17};
    for (int i = 0; i < 3; i++) {
        Problem p = set_up(1, heads[i], 1, 67, 10);
        attend(&p, GROUPED);
        KvCache cache = {
            .k = p.k, .v = p.v, .batch = 1, .kv_heads = 1, .capacity = 67, .head_size = 10, .used = 67};
        float q[17 * 10], out[17 * 10], lse[17];
        for (int h = 0; h < heads[i]; h++)
            memcpy(q + h * 10, p.q + query_row(&p.s, 0, h, 66), 10 * sizeof *q);
        gqa_decode_step(out, lse, q, &cache, heads[i], p.s.scale);
        for (int h = 0; h < heads[i]; h++) {
            cr_expect(near(lse[h], p.lse[lse_index(&p.s, 0, h, 66)], 2e-6), "%d heads, lse of head %d",
                      heads[i], h);
            for (int d = 0; d < 10; d++)
                cr_expect(near(out[h * 10 + d], p.out[query_row(&p.s, 0, h, 66) + d], 2e-6),
                          "%d heads, head %d", heads[i], h);
        }
        tear_down(&p);
    }
}

Test(cache, never_hides_nan)
{
    for (int where = 0; where < 2; where++) {
        Problem p = set_up(1, 2, 1, 70, 10);
        (where ? p.v : p.k)[40 * 10] = NAN;
        KvCache cache = {
            .k = p.k, .v = p.v, .batch = 1, .kv_heads = 1, .capacity = 70, .head_size = 10, .used = 70};
        float out[2 * 10], lse[2];
        gqa_decode_step(out, lse, p.q, &cache, 2, p.s.scale);
        cr_expect(isnan(out[0]) && isnan(out[10]) && (where || isnan(lse[1])), "input %d", where);
        tear_down(&p);
    }
}

Test(cache, token_by_token_is_the_causal_call)
{
    const char *wrong = decode_equals_causal();
    cr_expect(!wrong, "%s", wrong);
}

Test(cache, its_mode_refuses_other_words, .exit_code = 2)
{
    char word[] = "--fast", *argv[] = {word, NULL};
    run_decode(1, argv);
}
