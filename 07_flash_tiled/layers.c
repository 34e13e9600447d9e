#include "layers.h"
#include "benchmark.h"
#include "error.h"
#include "flash_tiled.h"
#include "memory.h"
#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

enum { HEADS = 8, HEAD_SIZE = 64, WIDTH = HEADS * HEAD_SIZE };

/* ---- What was asked for ---- */

typedef struct {
    int layers, tokens, batch, threads, repeat;
    double dropout;
    const char *tsv;
} Setting;

static Setting read_setting(int argc, char **argv)
{
    Setting s = {.layers = 12, .tokens = 512, .batch = 8, .repeat = 5, .dropout = 0.1};
    const struct {
        const char *name;
        int *number, most;
    } numbers[] = {{"--layers", &s.layers, 1000},
                   {"--tokens", &s.tokens, 1 << 20},
                   {"--batch", &s.batch, 4096},
                   {"--threads", &s.threads, 1024},
                   {"--repeat", &s.repeat, 1000}};
    const int count = sizeof numbers / sizeof *numbers;
    for (int i = 0; i < argc; i += 2) {
        int n = 0;
        while (n < count && strcmp(argv[i], numbers[n].name) != 0)
            n++;
        bool tsv = strcmp(argv[i], "--tsv") == 0, dropout = strcmp(argv[i], "--dropout") == 0;
        if ((n == count && !tsv && !dropout) || i + 1 == argc)
            die(EXIT_USAGE,
                "layers takes --layers L, --tokens T, --batch B, --dropout P, --threads N, --repeat R, "
                "--tsv FILE, not \"%.40s\"",
                argv[i]);
        char end;
        if (tsv)
            s.tsv = argv[i + 1];
        else if (dropout) {
            if (sscanf(argv[i + 1], "%lf%c", &s.dropout, &end) != 1 || !(s.dropout >= 0 && s.dropout < 1))
                die(EXIT_USAGE, "--dropout takes a number from 0 to below 1, not \"%.40s\"", argv[i + 1]);
        } else if (sscanf(argv[i + 1], "%8d%c", numbers[n].number, &end) != 1 || *numbers[n].number < 1 ||
                   *numbers[n].number > numbers[n].most)
            die(EXIT_USAGE, "%s takes a whole number from 1 to %d, not \"%.40s\"", numbers[n].name,
                numbers[n].most, argv[i + 1]);
    }
    return s;
}

/* One batch entry has all T keys, the last T / 2, the others lie evenly between: "512,475,..". malloc'ed. */
static char *padded_lengths(const Setting *s)
{
    char *text = allocate_zeroed(s->batch, 12), *to = text;
    for (int b = 0; b < s->batch; b++) {
        int less = s->batch > 1 ? (int)((double)(s->tokens / 2) * b / (s->batch - 1)) : 0;
        to += sprintf(to, "%s%d", b ? "," : "", s->tokens - less);
    }
    return text;
}

/* One layer of a kernel, opened with its gradients. */
static void open_layer(Run *run, Options *options, const char *name, const Setting *s, const char *lengths)
{
    char batch[16], tokens[16], heads[16], head_size[16], p[16];
    snprintf(batch, sizeof batch, "%d", s->batch);
    snprintf(tokens, sizeof tokens, "%d", s->tokens);
    snprintf(heads, sizeof heads, "%d", HEADS);
    snprintf(head_size, sizeof head_size, "%d", HEAD_SIZE);
    snprintf(p, sizeof p, "%g", s->dropout);
    char *words[] = {"run",         "--batch", batch,       "--tokens", tokens,   "--heads", heads,
                     "--head-size", head_size, "--dropout", p,          "--pass", "both"};
    parse_options(options, sizeof words / sizeof *words, words);
    options->lengths = lengths;
    const Kernel *kernel = kernel_named(&chapter, name);
    Refusal refusal = open_run(run, &chapter, kernel, options, NULL, 1);
    if (refusal.exit_code)
        die(refusal.exit_code, "one layer of %s %s", name, refusal.reason);
}

/* ---- Many layers ---- */

typedef struct {
    const char *name, *kernel, *keeps;
    bool keeps_workspace; /* its backward reads what forward left in workspace[0] */
} Contestant;

static const Contestant contestants[] = {
    {"naive", "materialised", "q, k, v, out, lse, the softmax, and with dropout what is left of it", true},
    {"flash", "simd", "q, k, v, out, lse", false},
};

typedef struct {
    double forward_ms, ms;          /* medians; ms: forward and backward */
    double layer_bytes, once_bytes; /* held by each layer; held once for all of them */
    double bytes;                   /* both, at their peak */
    bool worked_out;                /* from 2 layers */
} Result;

/* 0 if it needs none, as the naive one without dropout, whose softmax is the weights. */
static size_t kept_workspace(const Run *run, const Contestant *c)
{
    return c->keeps_workspace && run->t.workspace[0] ? run->workspace_size[0] : 0;
}

static size_t layer_floats(const Run *run, const Contestant *c)
{
    const AttentionShape *s = &run->problem.shape;
    return 2 * query_count(s) + 2 * key_count(s) + lse_count(s) + run->weights_size + kept_workspace(run, c);
}

static size_t once_floats(const Run *run, const Contestant *c)
{
    const AttentionShape *s = &run->problem.shape;
    size_t floats = 2 * query_count(s) + 2 * key_count(s); /* dout, dq, dk, dv */
    for (int i = 0; i < MAX_BUFFERS; i++) {
        floats += run->t.backward_workspace[i] ? run->backward_workspace_size[i] : 0;
        floats += run->t.workspace[i] && !c->keeps_workspace ? run->workspace_size[i] : 0;
    }
    return floats;
}

static float *copy_floats(const float *from, size_t n)
{
    return memcpy(allocate_floats(n), from, n * sizeof(float));
}

/* Layer number i beside the run's own, number 0: memory of its own for all that it keeps, and queries of its own, so that
 * no two layers have the same weights. */
static Tensors add_layer(const Run *run, const Contestant *c, int i)
{
    const AttentionShape *s = &run->problem.shape;
    Tensors t = run->t;
    float *q = copy_floats(run->t.q, query_count(s));
    for (size_t j = 0; j < query_count(s); j++)
        q[j] /= (float)(i + 1);
    t.q = q;
    t.k = copy_floats(run->t.k, key_count(s));
    t.v = copy_floats(run->t.v, key_count(s));
    t.out = allocate_floats(query_count(s));
    t.lse = allocate_floats(lse_count(s));
    if (t.weights)
        t.weights = allocate_floats(run->weights_size);
    if (kept_workspace(run, c))
        t.workspace[0] = allocate_floats(kept_workspace(run, c));
    return t;
}

static void remove_layer(Tensors *t, const Contestant *c)
{
    free((void *)t->q), free((void *)t->k), free((void *)t->v);
    free(t->out), free(t->lse), free(t->weights);
    if (c->keeps_workspace)
        free(t->workspace[0]);
}

/* All layers forward, then all backward in reverse, as training does. */
static void forward_layers(Run *run, const Tensors *layer, int count)
{
    for (int i = 0; i < count; i++) {
        run->t = layer[i];
        forward_run(run);
    }
}

static void backward_layers(Run *run, const Tensors *layer, int count)
{
    for (int i = count; i-- > 0;) {
        run->t = layer[i];
        backward_run(run);
    }
}

/* FNV-1a over the bits of n floats, on top of `hash`. */
static uint64_t hash_floats(uint64_t hash, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3;
    }
    return hash;
}

static uint64_t hash_of_results(const Tensors *t, const AttentionShape *s)
{
    uint64_t hash = hash_floats(0xcbf29ce484222325, t->out, query_count(s));
    hash = hash_floats(hash, t->lse, lse_count(s));
    hash = hash_floats(hash, t->dq, query_count(s));
    hash = hash_floats(hash, t->dk, key_count(s));
    return hash_floats(hash, t->dv, key_count(s));
}

/* Each layer must give, bit for bit, what it gives when it is alone: none writes what another keeps. */
static bool layers_agree(Run *run, const Tensors *layer, int count)
{
    uint64_t *alone = allocate_zeroed(count, sizeof *alone);
    for (int i = 0; i < count; i++) {
        forward_layers(run, layer + i, 1);
        backward_layers(run, layer + i, 1);
        alone[i] = hash_of_results(layer + i, &run->problem.shape);
    }
    bool agree = true;
    forward_layers(run, layer, count);
    for (int i = count; i-- > 0;) {
        backward_layers(run, layer + i, 1);
        agree = agree && hash_of_results(layer + i, &run->problem.shape) == alone[i];
    }
    free(alone);
    return agree;
}

/* False if a layer is wrong. */
static bool time_layers(Result *result, const Contestant *c, const Setting *setting, const char *lengths)
{
    Run run;
    Options options;
    char text[400];
    open_layer(&run, &options, c->kernel, setting, lengths);
    bool good = check_run(&run);
    check_text(text, sizeof text, &run);
    printf("%s %s, one layer: %s\n", good ? "✓" : "✗", c->kernel, text);

    double layer_bytes = 4.0 * (double)layer_floats(&run, c), once_bytes = 4.0 * (double)once_floats(&run, c);
    double copies = once_bytes, more = (setting->layers - 1) * layer_bytes + copies;
    bool fits = setting->layers <= 2 || more < 0.95 * (double)available_memory();
    int count = fits ? setting->layers : 2;
    if (layer_bytes + copies >= 0.95 * (double)available_memory())
        die(EXIT_UNAVAILABLE,
            "two layers of %s need %s more and %s are free; take a smaller --batch or fewer --tokens",
            c->kernel, bytes_text(layer_bytes + copies), bytes_text((double)available_memory()));
    Tensors *layer = allocate_zeroed(count, sizeof *layer);
    layer[0] = run.t;
    for (int i = 1; i < count; i++)
        layer[i] = add_layer(&run, c, i);
    if (good && !layers_agree(&run, layer, count)) {
        printf("✗ %s: a layer gives other numbers among the others than alone\n", c->kernel);
        good = false;
    }

    double *forward = allocate_zeroed(setting->repeat, sizeof *forward);
    double *both = allocate_zeroed(setting->repeat, sizeof *both);
    for (int i = 0; good && i < setting->repeat; i++) {
        double start = now();
        forward_layers(&run, layer, count);
        double middle = now();
        backward_layers(&run, layer, count);
        forward[i] = 1e3 * (middle - start);
        both[i] = 1e3 * (now() - start);
    }
    double times = (double)setting->layers / count;
    *result = (Result){.forward_ms = times * median(forward, setting->repeat),
                       .ms = times * median(both, setting->repeat),
                       .layer_bytes = layer_bytes,
                       .once_bytes = once_bytes,
                       .bytes = once_bytes + setting->layers * layer_bytes,
                       .worked_out = !fits};
    free(forward);
    free(both);
    for (int i = 1; i < count; i++)
        remove_layer(&layer[i], c);
    free(layer);
    close_run(&run);
    free_options(&options);
    return good;
}

/* ---- Beside the chat's table ---- */

typedef struct {
    int layers, tokens;
    double naive_ms, naive_mb, flash_ms, flash_mb;
} ChatRow;

static const ChatRow chat[] = {
    {12, 512, 100, 4000, 25, 2000}, {24, 512, 200, 8000, 50, 4000}, {48, 1024, 400, 16000, 75, 8000}};
enum { CHAT_ROWS = sizeof chat / sizeof *chat };

static void tell_chat_table(const Setting *s)
{
    printf("\nThe table of the chat, which names no machine and no source:\n");
    printf("%8s %8s %12s %12s %12s %12s\n", "layers", "tokens", "naive, ms", "MB", "flash, ms", "MB");
    for (int i = 0; i < CHAT_ROWS; i++)
        printf("%8d %8d %12g %12g %12g %12g%s\n", chat[i].layers, chat[i].tokens, chat[i].naive_ms,
               chat[i].naive_mb, chat[i].flash_ms, chat[i].flash_mb,
               chat[i].layers == s->layers && chat[i].tokens == s->tokens ? "   the row of ours above" : "");
}

static void claim(bool holds, const char *claimed, double ours, const char *what)
{
    printf("  %s %-28s here %.2f times %s\n", holds ? "✓" : "✗", claimed, ours, what);
}

static void tell_claims(const Result *naive, const Result *flash)
{
    printf("\nWhat it claims, and what holds here:\n");
    double faster = naive->ms / flash->ms, less = naive->bytes / flash->bytes,
           sooner = naive->forward_ms / flash->forward_ms;
    claim(faster >= 1.5, "1.5x to 6x faster:", faster,
          faster > 6 ? "as fast: more than it claims" : "as fast");
    claim(less >= 2, "2x to 4x less memory:", less,
          less > 4   ? "less: more than it claims"
          : less < 1 ? "less, that is more"
                     : "less");
    claim(sooner >= 5, "up to 5x lower latency:", sooner, "as soon, forward alone");
    const ChatRow *a = &chat[1], *b = &chat[2];
    double work = (double)b->layers / a->layers * b->tokens / a->tokens * b->tokens / a->tokens;
    printf("  %s from its second row to its third the pairs grow %g-fold, its naive time and memory %g- and "
           "%g-fold\n",
           b->naive_ms / a->naive_ms >= work / 2 ? "✓" : "✗", work, b->naive_ms / a->naive_ms,
           b->naive_mb / a->naive_mb);
}

/* The mean over the rows of a row's largest weight. */
static double largest_weight(const float *weights, const AttentionShape *s)
{
    double sum = 0;
    for (size_t row = 0; row < lse_count(s); row++) {
        float most = 0;
        for (int t2 = 0; t2 < s->key_tokens; t2++)
            most = fmaxf(most, weights[row * s->key_tokens + t2]);
        sum += most;
    }
    return sum / (double)lse_count(s);
}

/* The chat's code on 64 tokens of 512 random numbers, line by line. */
static void tell_chat_code(void)
{
    enum { TOKENS = 64, NUMBERS = TOKENS * WIDTH };
    AttentionShape whole = {.batch = 1,
                            .tokens = TOKENS,
                            .key_tokens = TOKENS,
                            .heads = 1,
                            .kv_heads = 1,
                            .head_size = WIDTH,
                            .scale = 1 / sqrtf(WIDTH)};
    AttentionShape split = whole;
    split.heads = split.kv_heads = HEADS;
    split.head_size = HEAD_SIZE;
    float *x = allocate_floats(3 * NUMBERS), *heads = allocate_floats(3 * NUMBERS);
    float *out = allocate_floats(2 * NUMBERS), *lse = allocate_floats(lse_count(&split)),
          *weights = allocate_floats(weights_count(&split));
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, x, 3 * NUMBERS);
    for (int i = 0; i < 3 * NUMBERS; i++) { /* (3,T,NH,HS) to (3,NH,T,HS) */
        int tensor = i / NUMBERS, t = i % NUMBERS / WIDTH, h = i % WIDTH / HEAD_SIZE;
        heads[((tensor * HEADS + h) * TOKENS + t) * HEAD_SIZE + i % HEAD_SIZE] = x[i];
    }

    attention_materialised(out, lse, weights, NULL, x, x + NUMBERS, x + 2 * NUMBERS, &whole);
    const float *q = heads, *k = heads + NUMBERS, *v = heads + 2 * NUMBERS;
    attention_materialised(out + NUMBERS, lse, weights, NULL, q, k, v, &split);
    double too_small = largest_weight(weights, &split);
    split.scale = 1 / sqrtf(HEAD_SIZE);
    attention_materialised(out + NUMBERS, lse, weights, NULL, q, k, v, &split);
    double right = largest_weight(weights, &split);
    float apart =
        0; /* a double that is the largest of floats stops gcc 12 for arm64 with an error of its own */
    for (int i = 0; i < NUMBERS; i++) {
        int t = i / WIDTH, h = i % WIDTH / HEAD_SIZE;
        apart =
            (float)worse(apart, fabsf(out[i] - out[NUMBERS + (h * TOKENS + t) * HEAD_SIZE + i % HEAD_SIZE]));
    }

    double ratio = split.scale / whole.scale;
    printf("\nWhat is wrong in its code, on %d tokens of %d random numbers:\n", TOKENS, WIDTH);
    printf(
        "  %s it names %d heads and never splits: one head of %d, whose out is up to %.2f from that of %d\n",
        apart > 0.1 ? "✓" : "✗", HEADS, WIDTH, apart, HEADS);
    printf("  %s it scales by 1/sqrt(%d), not 1/sqrt(%d): scores of a head %.4f = sqrt(%d) times too small; "
           "a row's largest weight is %.3f on average, and should be %.3f\n",
           fabs(ratio - sqrt(HEADS)) < 1e-5 && too_small < right ? "✓" : "✗", WIDTH, HEAD_SIZE, ratio, HEADS,
           too_small, right);
    printf("  %s its first \"FlashAttention\" is softmax over the whole matrix: %zu weights for %d tokens, "
           "as the "
           "naive one holds, and so no memory is saved\n",
           weights_count(&whole) == (size_t)TOKENS * TOKENS ? "✓" : "✗", weights_count(&whole), TOKENS);
    free(x), free(heads), free(out), free(lse), free(weights);
}

/* ---- The mode ---- */

static void append_rows(const Setting *s, const Result *results, int threads)
{
    FILE *file = fopen(s->tsv, "a");
    if (file && fseek(file, 0, SEEK_END) == 0 && ftell(file) == 0)
        fprintf(file,
                "machine\tlayers\ttokens\tbatch\theads\thead_size\tdropout\tthreads\tkernel\tforward_ms\tms\t"
                "layer_mib\tonce_mib\tpeak_mib\thow\n");
    for (int i = 0; file && i < 2; i++)
        fprintf(file, "%s\t%d\t%d\t%d\t%d\t%d\t%g\t%d\t%s\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\t%s\n",
                machine_name(), s->layers, s->tokens, s->batch, HEADS, HEAD_SIZE, s->dropout, threads,
                contestants[i].kernel, results[i].forward_ms, results[i].ms,
                results[i].layer_bytes / (1 << 20), results[i].once_bytes / (1 << 20),
                results[i].bytes / (1 << 20), results[i].worked_out ? "worked out" : "measured");
    if (!file || fclose(file) != 0)
        die(EXIT_USAGE, "--tsv cannot write %s: %s", s->tsv, strerror(errno));
}

int run_layers(int argc, char **argv)
{
    Setting s = read_setting(argc, argv);
    int threads = use_threads(s.threads);
    char *lengths = padded_lengths(&s);
    Result results[2];
    printf(
        "%d layers, each %d x %d tokens of %d numbers, %d heads of %d; forward, then backward in reverse\n",
        s.layers, s.batch, s.tokens, WIDTH, HEADS, HEAD_SIZE);
    printf("valid keys %s; dropout %g; float32; %s, %d thread%s\n", lengths, s.dropout, machine_name(),
           threads, threads > 1 ? "s" : "");
    bool good = true;
    for (int i = 0; i < 2; i++)
        good = time_layers(&results[i], &contestants[i], &s, lengths) && good;
    free(lengths);
    if (!good)
        return EXIT_CHECK_FAILED;

    printf("\nEach layer holds until its backward pass:\n");
    for (int i = 0; i < 2; i++)
        printf("  %-6s %s\n", contestants[i].name, contestants[i].keeps);
    printf("Held once: dout, dq, dk, dv and the kernels' workspace. Memory is what these arrays take.\n\n");
    printf("%-20s %12s %12s %12s %12s %12s\n", "", "forward, ms", "both, ms", "a layer", "once", "peak");
    for (int i = 0; i < 2; i++) {
        const Result *r = &results[i];
        char name[32];
        snprintf(name, sizeof name, "%s (%s)", contestants[i].name, contestants[i].kernel);
        printf("%-20s %12.1f %12.1f %12s %12s %12s%s\n", name, r->forward_ms, r->ms,
               bytes_text(r->layer_bytes), bytes_text(r->once_bytes), bytes_text(r->bytes),
               r->worked_out ? "   worked out from 2 layers" : "");
    }
    tell_chat_table(&s);
    tell_claims(&results[0], &results[1]);
    tell_chat_code();
    if (s.tsv)
        append_rows(&s, results, threads);
    return EXIT_PASSED;
}
