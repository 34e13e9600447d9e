#include "decode.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "benchmark.h"
#include "error.h"
#include "gqa.h"
#include "kv_cache.h"
#include "memory.h"
#include "random.h"
#include "threads.h"

typedef struct {
    AttentionShape shape; /* causal; TK tokens in all, T of which are queries of the call without a cache */
    float *q, *k, *v;     /* as attention takes them */
    float *out, *lse, *scratch;
    KvCache cache;
    float *q_token, *k_token, *v_token, *out_token, *step_scratch;
} Decoding;

static Decoding open_decoding(int batch, int tokens, int key_tokens, int heads, int kv_heads, int head_size)
{
    Decoding d = {.shape = {.batch = batch,
                            .tokens = tokens,
                            .key_tokens = key_tokens,
                            .heads = heads,
                            .kv_heads = kv_heads,
                            .head_size = head_size,
                            .scale = 1 / sqrtf((float)head_size),
                            .causal = true}};
    size_t q_count = query_count(&d.shape), kv_count = key_count(&d.shape);
    float **const of_tokens[] = {&d.q, &d.out, &d.k, &d.v, &d.cache.k, &d.cache.v};
    for (int i = 0; i < 6; i++)
        *of_tokens[i] = allocate_floats(i < 2 ? q_count : kv_count);
    d.lse = allocate_floats(lse_count(&d.shape));
    d.scratch = allocate_floats(grouped_simd_scratch(&d.shape));
    d.q_token = allocate_floats(q_count / tokens);
    d.out_token = allocate_floats(q_count / tokens);
    d.k_token = allocate_floats(kv_count / key_tokens);
    d.v_token = allocate_floats(kv_count / key_tokens);
    d.cache.batch = batch;
    d.cache.kv_heads = kv_heads;
    d.cache.head_size = head_size;
    d.cache.capacity = key_tokens;
    d.step_scratch = allocate_floats(gqa_decode_scratch(&d.cache, heads));

    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, d.q, q_count);
    draw_randn(&stream, d.k, kv_count);
    draw_randn(&stream, d.v, kv_count);
    return d;
}

static void close_decoding(Decoding *d)
{
    float *const owned[] = {d->step_scratch, d->q,       d->k,        d->v,       d->out,
                            d->lse,          d->scratch, d->cache.k,  d->cache.v, d->q_token,
                            d->k_token,      d->v_token, d->out_token};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        free(owned[i]);
}

/* Token t of each of n heads (n,tokens,HS), gathered to (n,HS). */
static void take_token(float *token, const float *heads, int n, int tokens, int t, size_t HS)
{
    for (int h = 0; h < n; h++)
        memcpy(token + h * HS, heads + ((size_t)h * tokens + t) * HS, HS * sizeof *token);
}

static void append_token(Decoding *d, int t)
{
    const AttentionShape *s = &d->shape;
    take_token(d->k_token, d->k, s->batch * s->kv_heads, s->key_tokens, t, s->head_size);
    take_token(d->v_token, d->v, s->batch * s->kv_heads, s->key_tokens, t, s->head_size);
    kv_cache_append(&d->cache, d->k_token, d->v_token);
}

static void decode_token(Decoding *d, int t)
{
    take_token(d->q_token, d->q, d->shape.batch * d->shape.heads, d->shape.tokens, t, d->shape.head_size);
    gqa_decode_step(d->out_token, NULL, d->step_scratch, d->q_token, &d->cache, d->shape.heads,
                    d->shape.scale);
}

/* The largest difference between the decoded token t and row t of `out`; infinite if there is a NaN. */
static float difference(const Decoding *d, int t)
{
    float worst = 0;
    size_t HS = d->shape.head_size;
    for (int h = 0; h < d->shape.batch * d->shape.heads; h++)
        for (size_t i = 0; i < HS; i++) {
            float off = fabsf(d->out_token[h * HS + i] - d->out[((size_t)h * d->shape.tokens + t) * HS + i]);
            worst = isnan(off) ? INFINITY : fmaxf(worst, off);
        }
    return worst;
}

const char *decode_equals_causal(void)
{
    static char text[120];
    static const int kv_heads[] = {12, 3, 1};
    for (int i = 0; i < 3; i++) {
        Decoding d = open_decoding(2, 70, 70, 12, kv_heads[i], 20);
        attention_grouped(d.out, d.lse, d.q, d.k, d.v, &d.shape);
        float worst = 0;
        for (int t = 0; t < d.shape.tokens; t++) {
            append_token(&d, t);
            decode_token(&d, t);
            worst = fmaxf(worst, difference(&d, t));
        }
        close_decoding(&d);
        if (!(worst <= 2e-6f)) {
            snprintf(text, sizeof text, "off by %g with %d key/value heads", worst, kv_heads[i]);
            return text;
        }
    }
    return NULL;
}

int run_decode(int argc, char **argv)
{
    const char *path = argc == 2 && strcmp(argv[0], "--tsv") == 0 ? argv[1] : NULL;
    char unfinished[4096];
    FILE *file = NULL;
    if (argc > 0 && !path)
        die(EXIT_USAGE, "./run decode takes --tsv FILE and nothing else");
    if (path) {
        snprintf(unfinished, sizeof unfinished, "%s.new", path);
        file = fopen(unfinished, "w");
        if (!file)
            die(EXIT_USAGE, "cannot write %s: %s", unfinished, strerror(errno));
        fprintf(file, "machine\tkernel\ttokens\tms_per_token\tgb_per_s\tpercent_of_reading\n");
    }

    enum { HEADS = 32, KV_HEADS = 8, HS = 128, LONGEST = 32768, LONGEST_ANEW = 4096, REPEATS = 15 };
    const double burst_ms = 4;
    bool good = true;
    printf("One more token after so many, %d heads of %d on %d key/value heads, one layer, float32\n", HEADS,
           HS, KV_HEADS);
    printf("%8s %12s %8s %12s %16s %12s\n", "tokens", "cache, ms", "GB/s", "of reading", "all anew, ms",
           "difference");
    for (int tokens = 64; tokens <= LONGEST; tokens *= 2) {
        bool anew_too = tokens <= LONGEST_ANEW;
        Decoding d = open_decoding(1, anew_too ? tokens : 1, tokens, HEADS, KV_HEADS, HS);
        double cached[REPEATS], share[REPEATS], anew[REPEATS];
        double gb = 1e-9 * 2 * sizeof(float) * (double)key_count(&d.shape);
        for (int t = 0; t < tokens; t++)
            append_token(&d, t);
        for (int i = -1; i < REPEATS; i++) { /* -1 warms up */
            double before = read_burst_gb_per_s(omp_get_max_threads(), burst_ms);
            double start = now();
            decode_token(&d, d.shape.tokens - 1);
            double seconds = now() - start;
            double after = read_burst_gb_per_s(omp_get_max_threads(), burst_ms);
            if (i >= 0) {
                cached[i] = 1e3 * seconds;
                share[i] = 100 * gb / seconds / (0.5 * (before + after));
            }
        }
        int anew_repeats = !anew_too ? 0 : tokens > 512 ? 3 : REPEATS;
        for (int i = 0; i < anew_repeats; i++) {
            double start = now();
            attention_grouped_simd(d.out, d.lse, d.scratch, d.q, d.k, d.v, &d.shape);
            anew[i] = 1e3 * (now() - start);
        }
        if (!anew_too)
            attention_grouped(d.out, d.lse, d.q, d.k, d.v, &d.shape);
        float off = difference(&d, d.shape.tokens - 1);
        good = good && off <= 1e-5f;
        double ms = median(cached, REPEATS), percent = median(share, REPEATS);
        char anew_text[32] = "-";
        if (anew_too)
            snprintf(anew_text, sizeof anew_text, "%.4f", median(anew, anew_repeats));
        printf("%8d %12.4f %8.1f %11.0f%% %16s %12.1e %s\n", tokens, ms, 1e3 * gb / ms, percent, anew_text,
               off, off <= 1e-5f ? "✓" : "✗");
        if (file)
            fprintf(file, "%s\tcache\t%d\t%.6g\t%.4g\t%.4g\n", machine_name(), tokens, ms, 1e3 * gb / ms,
                    percent);
        if (file && anew_too)
            fprintf(file, "%s\tanew\t%d\t%s\t\t\n", machine_name(), tokens, anew_text);
        close_decoding(&d);
    }
    if (file && (fclose(file) != 0 || rename(unfinished, path) != 0))
        die(EXIT_USAGE, "cannot write %s: %s", path, strerror(errno));
    return good ? EXIT_PASSED : EXIT_CHECK_FAILED;
}
