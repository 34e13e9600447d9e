/* What is particular to shared heads: who reads whom, the rotary embedding, the cache, and Llama's module. */
#include "chapter.h"
#include "decode.h"
#include "gqa.h"
#include "kv_cache.h"
#include "llama.h"
#include "memory.h"
#include "random.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define near(a, b, tolerance) (fabs((double)(a) - (double)(b)) <= (tolerance))

extern const Chapter chapter;

/* ---- A problem ---- */

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *k_repeated, *v_repeated, *scratch;
    float *dout, *dq, *dk, *dv, *delta, *dk_repeated, *dv_repeated;
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
    p.dout = allocate_floats(query_count(&p.s));
    p.dq = allocate_floats(query_count(&p.s));
    p.dk = allocate_floats(key_count(&p.s));
    p.dv = allocate_floats(key_count(&p.s));
    p.delta = allocate_floats(lse_count(&p.s));
    p.dk_repeated = allocate_floats(query_count(&p.s));
    p.dv_repeated = allocate_floats(query_count(&p.s));
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p.q, query_count(&p.s));
    draw_randn(&stream, p.k, key_count(&p.s));
    draw_randn(&stream, p.v, key_count(&p.s));
    draw_randn(&stream, p.dout, query_count(&p.s));
    return p;
}

static void tear_down(Problem *p)
{
    float *const owned[] = {p->q,          p->k,          p->v,       p->out,         p->lse,
                            p->k_repeated, p->v_repeated, p->scratch, p->dout,        p->dq,
                            p->dk,         p->dv,         p->delta,   p->dk_repeated, p->dv_repeated};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
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

/* Forward and backward. */
enum { DIFFERENTIATED = GROUPED + 1 }; /* simd has no backward */
static void differentiate(Problem *p, int kernel)
{
    attend(p, kernel);
    const GroupedBackward g = {p->q,  p->k,  p->v,  p->out, p->lse,  p->dout,
                               p->dq, p->dk, p->dv, NULL,   p->delta};
    if (kernel == REPEAT_KV)
        attention_repeat_kv_backward(&g, p->k_repeated, p->v_repeated, p->dk_repeated, p->dv_repeated, &p->s);
    else
        attention_grouped_backward(&g, &p->s);
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
                    double worst = furthest_apart(alone, p.out + first, 53 * 24);
                    cr_expect(worst <= 2e-6, "%s, %d key/value heads: head %d of entry %d is off by %g",
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

Test(sharing, gradients_of_copies_are_summed)
{
    const AttentionShape s = {
        .batch = 2, .heads = 6, .kv_heads = 2, .tokens = 1, .key_tokens = 1, .head_size = 1};
    const float d_repeated[2 * 6] = {1, 2, 4, 10, 20, 40, 100, 200, 400, 1000, 2000, 4000},
                               expected[2 * 2] = {7, 70, 700, 7000};
    float d_kv[2 * 2] = {NAN, NAN, NAN, NAN};
    repeat_kv_backward(d_kv, d_repeated, &s);
    for (int i = 0; i < 4; i++)
        cr_expect(d_kv[i] == expected[i], "number %d is %g, not %g", i, d_kv[i], expected[i]);
}

/* The gradient of a key/value head is the sum of what each of its query heads has for it alone. */
Test(sharing, gradients_are_summed_over_the_group)
{
    static const int kv_heads[] = {6, 3, 2, 1};
    enum { T = 53, HS = 24 };
    for (int kernel = 0; kernel < DIFFERENTIATED; kernel++)
        for (int i = 0; i < 4; i++) {
            Problem p = set_up(2, 6, kv_heads[i], T, HS), one = set_up(1, 1, 1, T, HS);
            differentiate(&p, kernel);
            for (int b = 0; b < 2; b++)
                for (int kv_head = 0; kv_head < kv_heads[i]; kv_head++) {
                    int group = 6 / kv_heads[i];
                    size_t kv = ((size_t)b * kv_heads[i] + kv_head) * T * HS;
                    static double dk[T * HS], dv[T * HS];
                    memset(dk, 0, sizeof dk);
                    memset(dv, 0, sizeof dv);
                    double dq_off = 0, dkv_off = 0;
                    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
                        size_t first = query_row(&p.s, b, h, 0);
                        memcpy(one.q, p.q + first, T * HS * sizeof(float));
                        memcpy(one.dout, p.dout + first, T * HS * sizeof(float));
                        memcpy(one.k, p.k + kv, T * HS * sizeof(float));
                        memcpy(one.v, p.v + kv, T * HS * sizeof(float));
                        differentiate(&one, GROUPED);
                        for (int n = 0; n < T * HS; n++) {
                            dk[n] += one.dk[n];
                            dv[n] += one.dv[n];
                            dq_off = worse(dq_off, fabs((double)one.dq[n] - p.dq[first + n]));
                        }
                    }
                    for (int n = 0; n < T * HS; n++)
                        dkv_off =
                            worse(dkv_off, worse(fabs(dk[n] - p.dk[kv + n]), fabs(dv[n] - p.dv[kv + n])));
                    cr_expect(dq_off <= 2e-6 && dkv_off <= 2e-5,
                              "%s, %d key/value heads: head %d is off by %g, %g", names[kernel], kv_heads[i],
                              kv_head, dq_off, dkv_off);
                }
            tear_down(&p);
            tear_down(&one);
        }
}

Test(sharing, nan_of_a_gradient_stays_in_its_group)
{
    for (int kernel = 0; kernel < DIFFERENTIATED; kernel++) {
        Problem p = set_up(1, 6, 2, 20, 8);
        p.dout[query_row(&p.s, 0, 4, 10)] = NAN; /* query head 4 reads key/value head 1 */
        differentiate(&p, kernel);
        for (int h = 0; h < 6; h++)
            cr_expect((isnan(p.dq[query_row(&p.s, 0, h, 10)]) != 0) == (h == 4), "%s, head %d", names[kernel],
                      h);
        cr_expect(!isnan(p.dk[0]) && !isnan(p.dv[0]), "%s", names[kernel]);
        cr_expect(isnan(p.dk[20 * 8]) && isnan(p.dv[20 * 8]), "%s", names[kernel]);
        cr_expect(!isnan(p.dk[(20 + 11) * 8]), "%s: token 10 does not see key 11", names[kernel]);
        tear_down(&p);
    }
}

Test(sharing, copies_cost_memory_again)
{
    const AttentionShape s = {
        .batch = 2, .heads = 6, .kv_heads = 2, .tokens = 5, .key_tokens = 7, .head_size = 8};
    size_t floats[MAX_BUFFERS];
    cr_expect(chapter.kernels[REPEAT_KV].backward_workspace(&s, floats) == 3);
    cr_expect(floats[0] == 2 * 6 * 5 && floats[1] == 2 * 6 * 7 * 8 && floats[2] == 2 * 6 * 7 * 8);
    cr_expect(chapter.kernels[GROUPED].backward_workspace(&s, floats) == 1 && floats[0] == 2 * 6 * 5);
}

Test(sharing, threads_give_the_same_bits_backwards)
{
    for (int kernel = 0; kernel < DIFFERENTIATED; kernel++) {
        Problem p = set_up(1, 6, 2, 130, 24), alone = set_up(1, 6, 2, 130, 24);
        omp_set_num_threads(1);
        differentiate(&alone, kernel);
        for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            differentiate(&p, kernel);
            cr_expect(memcmp(alone.dq, p.dq, query_count(&p.s) * sizeof(float)) == 0, "%s", names[kernel]);
            cr_expect(memcmp(alone.dk, p.dk, key_count(&p.s) * sizeof(float)) == 0, "%s", names[kernel]);
            cr_expect(memcmp(alone.dv, p.dv, key_count(&p.s) * sizeof(float)) == 0, "%s", names[kernel]);
        }
        tear_down(&p);
        tear_down(&alone);
    }
}

Test(sharing, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Problem p = set_up(1, 6, 2, 400, 24); /* so long that teams differ with the threads */
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

/* What a rotation does to lengths and angles: nothing. So (R a).b = a.(R^T b), and R^T undoes R. */
Test(rope, backward_is_the_rotation_back)
{
    enum { HS = 16, PLACE = 7 };
    float cosine[(PLACE + 1) * HS / 2], sine[(PLACE + 1) * HS / 2], a[HS], b[HS], turned[HS], back[HS];
    rope_table(cosine, sine, PLACE + 1, HS, 10000);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, a, HS);
    draw_randn(&stream, b, HS);
    memcpy(turned, a, sizeof a);
    memcpy(back, b, sizeof b);
    rope(turned, cosine + PLACE * HS / 2, sine + PLACE * HS / 2, HS);
    rope_backward(back, cosine + PLACE * HS / 2, sine + PLACE * HS / 2, HS);
    double left = 0, right = 0;
    for (int i = 0; i < HS; i++) {
        left += (double)turned[i] * b[i];
        right += (double)a[i] * back[i];
    }
    cr_expect(near(left, right, 1e-6) && fabs(left) > 0.1, "%g and %g", left, right);
    rope_backward(turned, cosine + PLACE * HS / 2, sine + PLACE * HS / 2, HS);
    for (int i = 0; i < HS; i++)
        cr_expect(near(turned[i], a[i], 1e-6), "number %d", i);
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

/* The problem of reference/llama.py, forward and backward, in the order of its random numbers. */
typedef struct {
    AttentionShape s;
    Tensors t;
    Parameters parameters;
    float x[2 * 10 * 48], out[2 * 10 * 96], dout[2 * 10 * 96], dx[2 * 10 * 48];
} LlamaProblem;

static void allocate_buffers(float **buffer, int (*sizes)(const AttentionShape *, size_t *),
                             const AttentionShape *s)
{
    size_t floats[MAX_BUFFERS];
    int buffers = sizes(s, floats);
    for (int i = 0; i < buffers; i++)
        buffer[i] = allocate_floats(floats[i]);
}

static void run_llama(LlamaProblem *p)
{
    *p = (LlamaProblem){.s = {.batch = 2,
                              .tokens = 10,
                              .key_tokens = 10,
                              .embed = 48,
                              .embed_out = 96,
                              .heads = 6,
                              .kv_heads = 2,
                              .head_size = 16,
                              .scale = 0.25f,
                              .mask.kind = MASK_CAUSAL}};
    const Kernel *kernel = llama_kernel();
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p->x, 2 * 10 * 48);
    p->parameters.stream = &stream;
    kernel->parameters(&p->parameters, &p->s);
    draw_randn(&stream, p->dout, 2 * 10 * 96);

    p->t = (Tensors){.x = p->x, .out = p->out, .dout = p->dout, .dx = p->dx};
    for (int i = 0; i < p->parameters.count; i++) {
        p->t.parameter[i] = p->parameters.list[i].data;
        p->t.d_parameter[i] = allocate_floats(p->parameters.list[i].size[0] * p->parameters.list[i].size[1]);
    }
    allocate_buffers(p->t.workspace, kernel->workspace, &p->s);
    allocate_buffers(p->t.backward_workspace, kernel->backward_workspace, &p->s);
    kernel->forward(&p->t, &p->s);
    kernel->backward(&p->t, &p->s);
}

static void free_llama(LlamaProblem *p)
{
    for (int i = 0; i < MAX_BUFFERS; i++) {
        free(p->t.workspace[i]);
        free(p->t.backward_workspace[i]);
    }
    for (int i = 0; i < p->parameters.count; i++) {
        free(p->parameters.list[i].data);
        free(p->t.d_parameter[i]);
    }
}

static double next_number(FILE *file)
{
    double number;
    cr_assert(fscanf(file, "%lf", &number) == 1, "08_gqa/reference/llama.tsv ends too early");
    return number;
}

/* A line of gradients: a name, the norm, the first row, the last row. */
static void expect_line(FILE *file, const char *name, const float *gradient, size_t count, int columns)
{
    char found[40];
    cr_assert(fscanf(file, "%39s", found) == 1 && strcmp(found, name) == 0, "%s instead of %s", found, name);
    double norm = next_number(file), squares = 0;
    for (size_t i = 0; i < count; i++)
        squares += (double)gradient[i] * gradient[i];
    cr_expect(near(sqrt(squares), norm, 2e-6 * norm), "%s: norm %.7g, not %.7g", name, sqrt(squares), norm);
    double mean = norm / sqrt((double)count);
    for (int row = 0; row < 2; row++)
        for (int i = 0; i < columns; i++) {
            float ours = gradient[(row ? count - columns : 0) + i];
            double expected = next_number(file);
            cr_expect(near(ours, expected, 1e-5 * mean), "%s, row %d, number %d: %.7g, not %.7g", name, row,
                      i, ours, expected);
        }
}

Test(llama, gives_what_pytorch_gives)
{
    static LlamaProblem p;
    run_llama(&p);
    FILE *file = fopen("08_gqa/reference/llama.tsv", "r");
    cr_assert(file, "08_gqa/reference/llama.tsv is missing; run the test from the top of the repository");
    char comment[400];
    for (int i = 0; i < 2; i++)
        cr_assert(fgets(comment, sizeof comment, file) && comment[0] == '#');
    for (int i = 0; i < 2 * 10 * 96; i++) {
        double expected = next_number(file);
        cr_expect(near(p.out[i], expected, 2e-6), "number %d is %.7g, not %.7g", i, p.out[i], expected);
    }
    cr_assert(fscanf(file, " %399[^\n]", comment) == 1 && comment[0] == '#');
    static const char *const name[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    expect_line(file, "x", p.dx, 2 * 10 * 48, 48);
    for (int i = 0; i < 4; i++)
        expect_line(file, name[i], p.t.d_parameter[i],
                    p.parameters.list[i].size[0] * p.parameters.list[i].size[1],
                    (int)p.parameters.list[i].size[1]);
    fclose(file);
    free_llama(&p);
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

static _Alignas(64) float scratch[2048]; /* for a step of at most 20 heads of 16 and one split */

Test(cache, is_empty_at_first_and_full_at_last)
{
    float k[2 * 3 * 2], v[2 * 3 * 2], token[2 * 2] = {1, 2, 3, 4}, q[4 * 2] = {0}, out[4 * 2], lse[4];
    KvCache cache = {.k = k, .v = v, .batch = 1, .kv_heads = 2, .capacity = 3, .head_size = 2};
    gqa_decode_step(out, lse, scratch, q, &cache, 4, 1);
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
    gqa_decode_step(out, NULL, scratch, q, &cache, 2, p.s.scale);
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
        gqa_decode_step(out, lse, scratch, q, &cache, heads[i], p.s.scale);
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
        gqa_decode_step(out, lse, scratch, p.q, &cache, 2, p.s.scale);
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
