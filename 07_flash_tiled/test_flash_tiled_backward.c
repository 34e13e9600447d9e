/* What is particular to the gradients: PyTorch's values for the notebook's modules, tiles and their edges, the
 * bias summed where it was broadcast, what is not read, memory. Every kernel's gradients against the oracle
 * over the ugly shapes: common/test_chapter.c. */
#include "flash_tiled_simd_backward.h"
#include "memory.h"
#include "reference.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

static const Kernel *find_kernel(const char *name)
{
    const Kernel *kernel = chapter.kernels;
    while (strcmp(kernel->name, name) != 0)
        kernel++;
    return kernel;
}

/* ---- PyTorch's numbers ---- */

static void hold_the_notebook(const char *name)
{
    if (getenv("SMALL"))
        return;
    char *argv[] = {"run", "--batch", "8",  "--tokens", "1024", "--embed",
                    "768", "--heads", "12", "--pass",   "both"};
    Options options;
    parse_options(&options, sizeof argv / sizeof *argv, argv);
    static Run run;
    Refusal refusal = open_run(&run, &chapter, find_kernel(name), &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s: %s", name, refusal.reason);
    forward_run(&run);
    backward_run(&run);
    const char *wrong = check_reference(&run, "07_flash_tiled/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s: %s", name, wrong);
}

Test(sdpa_gradient, holds_every_value_of_the_notebook)
{
    hold_the_notebook("sdpa");
}

Test(sdpa_mask_gradient, holds_every_value_of_the_notebook)
{
    hold_the_notebook("sdpa-mask");
}

Test(torch_mha_gradient, holds_every_value_of_the_notebook)
{
    hold_the_notebook("torch-mha-noweights");
}

/* ---- A problem to change by hand, and its gradients ---- */

enum { DQ, DK, DV, DBIAS, GRADIENTS };
static const char *const gradient_name[] = {"dq", "dk", "dv", "dbias"};

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *dout, *bias; /* bias NULL: none */
    float *out, *lse;
    float *gradient[GRADIENTS];
    size_t count[GRADIENTS];
} Gradients;

static Gradients problem(int batch, int heads, int tokens, int key_tokens, int head_size)
{
    Gradients p = {.s = {.batch = batch,
                         .heads = heads,
                         .kv_heads = heads,
                         .tokens = tokens,
                         .key_tokens = key_tokens,
                         .head_size = head_size,
                         .scale = 1 / sqrtf((float)head_size),
                         .tile_rows = 16,
                         .tile_columns = 24}};
    p.count[DQ] = query_count(&p.s);
    p.count[DK] = p.count[DV] = key_count(&p.s);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    float **drawn[] = {&p.q, &p.k, &p.v, &p.dout};
    const size_t counts[] = {query_count(&p.s), key_count(&p.s), key_count(&p.s), query_count(&p.s)};
    for (int i = 0; i < 4; i++) {
        *drawn[i] = allocate_floats(counts[i]);
        draw_randn(&stream, *drawn[i], counts[i]);
    }
    p.out = allocate_floats(query_count(&p.s));
    p.lse = allocate_floats(lse_count(&p.s));
    return p;
}

/* A random bias that has the axes (B, NH, T, TK) whose bit is set in `axes`. */
static void add_bias(Gradients *p, int axes)
{
    const int size[4] = {p->s.batch, p->s.heads, p->s.tokens, p->s.key_tokens};
    size_t count = 1;
    for (int i = 3; i >= 0; i--) {
        bool own = axes >> (3 - i) & 1;
        p->s.bias_stride[i] = own ? count : 0;
        count *= own ? size[i] : 1;
    }
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 7);
    p->count[DBIAS] = count;
    p->s.bias = p->bias = allocate_floats(count);
    draw_randn(&stream, p->bias, count);
}

/* Forward and backward with the kernel of this name; gradients and workspace poisoned first. */
static void differentiate(Gradients *p, const char *name)
{
    const Kernel *kernel = find_kernel(name);
    Tensors t = {.q = p->q, .k = p->k, .v = p->v, .out = p->out, .lse = p->lse, .dout = p->dout};
    size_t floats[MAX_BUFFERS], backward_floats[MAX_BUFFERS];
    int buffers = kernel->workspace ? kernel->workspace(&p->s, floats) : 0;
    int backward_buffers = kernel->backward_workspace(&p->s, backward_floats);
    for (int i = 0; i < buffers; i++) {
        t.workspace[i] = allocate_floats(floats[i]);
        memset(t.workspace[i], 0xff, floats[i] * sizeof(float));
    }
    for (int i = 0; i < backward_buffers; i++) {
        t.backward_workspace[i] = allocate_floats(backward_floats[i]);
        memset(t.backward_workspace[i], 0xff, backward_floats[i] * sizeof(float));
    }
    if (kernel->weights)
        t.weights = allocate_floats(weights_count(&p->s));
    for (int i = 0; i < GRADIENTS; i++) {
        p->gradient[i] = p->count[i] ? allocate_floats(p->count[i]) : NULL;
        if (p->count[i])
            memset(p->gradient[i], 0xff, p->count[i] * sizeof(float));
    }
    t.dq = p->gradient[DQ];
    t.dk = p->gradient[DK];
    t.dv = p->gradient[DV];
    t.dbias = p->gradient[DBIAS];
    kernel->forward(&t, &p->s);
    kernel->backward(&t, &p->s);
    for (int i = 0; i < buffers; i++)
        free(t.workspace[i]);
    for (int i = 0; i < backward_buffers; i++)
        free(t.backward_workspace[i]);
    free(t.weights);
}

static void free_gradients(Gradients *p)
{
    for (int i = 0; i < GRADIENTS; i++)
        free(p->gradient[i]);
}

static void free_problem(Gradients *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->dout);
    free(p->bias);
    free(p->out);
    free(p->lse);
    free_gradients(p);
}

/* The kernel's gradients are those in `expected`, but for rounding. A number of the bias that many pairs share has the sum of
 * their gradients, which may be zero on paper: it is judged by the size of what was added, as --check does. */
static void expect_same(const Gradients *expected, Gradients p, const char *name, const char *what)
{
    differentiate(&p, name);
    for (int g = 0; g < GRADIENTS; g++) {
        double apart = 0, largest = 0;
        for (size_t i = 0; i < p.count[g]; i++) {
            double difference = fabs((double)p.gradient[g][i] - (double)expected->gradient[g][i]);
            apart = worse(apart, difference);
            largest = fmax(largest, fabs((double)expected->gradient[g][i]));
        }
        double summed = g == DBIAS && p.s.bias ? (double)weights_count(&p.s) / (double)p.count[g] : 1;
        cr_expect(apart <= 1e-5 * fmax(1 + largest, 0.01 * sqrt(summed)), "%s, %s: %s off by %g of %g", name,
                  what, gradient_name[g], apart, largest);
    }
    free_gradients(&p);
}

/* ---- Tiles ---- */

Test(tiled_gradient, tiles_of_any_size_give_the_same)
{
    static const int sizes[][2] = {{64, 64}, {1, 1}, {3, 5}, {1, 300}, {300, 1}, {7, 64}, {500, 500}};
    for (int causal = 0; causal < 2; causal++) {
        Gradients p = problem(2, 2, 97, 131, 20);
        p.s.causal = causal;
        differentiate(&p, "materialised");
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            char what[40];
            p.s.tile_rows = sizes[i][0];
            p.s.tile_columns = sizes[i][1];
            snprintf(what, sizeof what, "%d x %d", sizes[i][0], sizes[i][1]);
            expect_same(&p, p, "tiled", what);
        }
        free_problem(&p);
    }
}

/* One more and one less than every size that the fast kernel is cut at. */
Test(simd_gradient, edges_of_its_tiles)
{
    enum { R = FLASH_BACK_ROWS, K = FLASH_BACK_KEYS, V = VECTORS * LANES };
    const int tokens[] = {1, TILE - 1, TILE, TILE + 1, R - 1, R, R + 1, 2 * R + TILE};
    const int keys[] = {1, TILE + 1, V - 1, V, V + 1, K - 1, K, K + 1, 2 * K + V + 1};
    const int head_sizes[] = {1, LANES, LANES + 1, 2 * LANES - 1, 2 * LANES, 2 * LANES + 1, 3 * LANES, 64};
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 9; j++)
            for (int causal = 0; causal < 2; causal++) {
                Gradients p = problem(1, 1, tokens[i], keys[j], head_sizes[(i + 2 * j) % 8]);
                char what[100];
                snprintf(what, sizeof what, "T %d, TK %d, HS %d%s", p.s.tokens, p.s.key_tokens, p.s.head_size,
                         causal ? ", causal" : "");
                p.s.causal = causal;
                differentiate(&p, "tiled");
                expect_same(&p, p, "simd", what);
                free_problem(&p);
            }
}

/* The blocks of a head's keys are tasks of their own, which add to the same dq, each in its turn: right under every mask, and
 * the same bits whether one thread does all or four come in each other's way. */
Test(simd_gradient, of_one_head_in_several_tasks)
{
    enum { K = FLASH_BACK_KEYS, KEY_TOKENS = 3 * K };
    static int document[KEY_TOKENS];
    for (int i = 0; i < KEY_TOKENS; i++)
        document[i] = (i > 20) + (i > K + 30) + (i > 2 * K);
    const Mask masks[] = {{.kind = MASK_NONE},
                          {.kind = MASK_CAUSAL},
                          {.kind = MASK_WINDOW, .width = 60},
                          {.kind = MASK_WINDOW, .width = 2 * K + 10},
                          {.kind = MASK_PREFIX, .width = K + 7},
                          {.kind = MASK_LOCAL_GLOBAL, .width = 30, .extra = 3},
                          {.kind = MASK_DILATED, .width = 50, .extra = 9},
                          {.kind = MASK_DOCUMENTS, .document = document},
                          {.kind = MASK_FUTURE}};
    const int tokens[] = {KEY_TOKENS, KEY_TOKENS - 150, KEY_TOKENS + 40}, lengths[] = {KEY_TOKENS, 2 * K + 9};
    for (int i = 0; i < 9 * 3; i++) {
        Gradients p = problem(1, 1, tokens[i % 3], KEY_TOKENS, 8);
        char what[100];
        snprintf(what, sizeof what, "mask %d, T %d, %d keys", i / 3, p.s.tokens, lengths[i % 3 == 2]);
        p.s.mask = masks[i / 3];
        p.s.lengths = &lengths[i % 3 == 2];
        differentiate(&p, "tiled");
        expect_same(&p, p, "simd", what);
        Gradients one = p, four = p;
        omp_set_num_threads(1);
        differentiate(&one, "simd");
        omp_set_num_threads(4);
        differentiate(&four, "simd");
        for (int g = DQ; g <= DV; g++)
            cr_expect(memcmp(one.gradient[g], four.gradient[g], p.count[g] * sizeof(float)) == 0,
                      "%s: four threads, %s", what, gradient_name[g]);
        free_gradients(&one);
        free_gradients(&four);
        free_problem(&p);
    }
}

Test(gradients, same_bits_for_any_number_of_threads)
{
    static const char *const names[] = {"materialised", "tiled", "simd"};
    for (int i = 0; i < 3; i++) {
        Gradients p = problem(2, 3, 150, 450, 40);
        p.s.causal = true;
        add_bias(&p, 5); /* per head and key */
        omp_set_num_threads(1);
        differentiate(&p, names[i]);
        for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            Gradients again = p;
            differentiate(&again, names[i]);
            for (int g = 0; g < GRADIENTS; g++)
                cr_expect(memcmp(p.gradient[g], again.gradient[g], p.count[g] * sizeof(float)) == 0,
                          "%s, %d threads, %s", names[i], threads, gradient_name[g]);
            free_gradients(&again);
        }
        free_problem(&p);
    }
}

/* ---- The bias ---- */

/* Present or broadcast along each of its four axes: its gradient is summed over what it was broadcast to. In `simd` batch
 * entries that share a bias are one task where enough tasks are left, with four heads, and not with two. */
Test(gradients, a_broadcast_bias_gets_the_sum)
{
    for (int axes = 0; axes < 16; axes++)
        for (int heads = 2; heads <= 4; heads += 2) {
            Gradients p = problem(2, heads, 60, heads == 2 ? 250 : 2 * FLASH_BACK_KEYS + 9, 12);
            char what[40];
            snprintf(what, sizeof what, "axes %d, %d heads", axes, heads);
            p.s.causal = axes % 3 == 0;
            add_bias(&p, axes);
            differentiate(&p, "materialised");
            expect_same(&p, p, "tiled", what);
            expect_same(&p, p, "simd", what);
            free_problem(&p);
        }
}

/* Where each pair has a number of its own, its gradient is zero even if a whole tile sees nothing: before the diagonal, and
 * beyond the valid keys. */
Test(simd_gradient, of_a_bias_that_whole_tiles_do_not_see)
{
    int length = 2 * FLASH_BACK_KEYS - 30, tokens = 3 * FLASH_BACK_KEYS + 5;
    for (int causal = 0; causal < 2; causal++) {
        Gradients p = problem(1, 2, tokens, tokens, 12);
        p.s.causal = causal;
        p.s.lengths = causal ? NULL : &length;
        add_bias(&p, 15);
        differentiate(&p, "materialised");
        expect_same(&p, p, "simd", causal ? "causal" : "padding");
        free_problem(&p);
    }
}

/* ---- Dropout ---- */

/* The backward pass asks again which pairs were dropped: the same answer in any order. */
Test(dropout_gradient, does_not_depend_on_tiles)
{
    Gradients p = problem(1, 2, 90, 250, 16);
    p.s.dropout = 0.4f;
    p.s.dropout_seed = 7;
    differentiate(&p, "tiled");
    p.s.tile_rows = 5;
    p.s.tile_columns = 11;
    expect_same(&p, p, "tiled", "5 x 11");
    expect_same(&p, p, "simd", "dropout");
    free_problem(&p);
}

/* Whole blocks of queries and keys: what is drawn for the last of them stays in its place. */
Test(dropout_gradient, of_whole_blocks)
{
    Gradients p = problem(1, 1, FLASH_BACK_ROWS + 3, FLASH_BACK_KEYS + 5, 16);
    p.s.dropout = 0.4f;
    p.s.dropout_seed = 7;
    differentiate(&p, "tiled");
    expect_same(&p, p, "simd", "dropout");
    free_problem(&p);
}

/* delta is rowsum(dO * O), with the O that dropout has been through. With one key and out = v / (1 - p) where
 * it was kept, dP = delta and so dq = 0 in every row, whether the key was kept or not. */
Test(dropout_gradient, delta_is_of_what_was_kept)
{
    static const char *const names[] = {"tiled", "simd"};
    for (int i = 0; i < 2; i++) {
        Gradients p = problem(1, 1, 100, 1, 8);
        p.s.dropout = 0.5f;
        p.s.dropout_seed = 3;
        differentiate(&p, names[i]);
        for (size_t j = 0; j < p.count[DQ]; j++)
            cr_assert(fabsf(p.gradient[DQ][j]) <= 1e-5f, "%s: dq %g", names[i], p.gradient[DQ][j]);
        free_problem(&p);
    }
}

/* ---- What is not seen ---- */

/* A score that a query may not see is left out, even where it overflows: without fused multiply-adds inf - inf would be NaN. */
Test(simd_gradient, unseen_scores_may_overflow)
{
    Gradients p = problem(1, 1, 10, 10, 8);
    p.s.causal = true;
    p.k[9 * 8] = 3e38f;
    for (int t = 0; t < 10; t++)
        p.q[t * 8] = 4;
    differentiate(&p, "simd");
    for (int i = 0; i < 9 * 8; i++)
        cr_expect(isfinite(p.gradient[DQ][i]), "dq of query %d: %g", i / 8, p.gradient[DQ][i]);
    free_problem(&p);
}

Test(gradients, rows_without_keys_give_zeros)
{
    static const char *const names[] = {"materialised", "tiled", "simd"};
    for (int i = 0; i < 3; i++) {
        Gradients p = problem(1, 2, 90, 40, 12); /* the first 50 rows see no key */
        p.s.causal = true;
        differentiate(&p, names[i]);
        for (int h = 0; h < 2; h++)
            for (size_t j = query_row(&p.s, 0, h, 0); j < query_row(&p.s, 0, h, 50); j++)
                cr_assert(p.gradient[DQ][j] == 0, "%s: dq %g", names[i], p.gradient[DQ][j]);
        free_problem(&p);
    }
}

/* The same by a bias of -inf, whose score - lse would be -inf - -inf. */
Test(gradients, rows_forbidden_by_the_bias_give_zeros)
{
    static const char *const names[] = {"materialised", "tiled", "simd"};
    for (int i = 0; i < 3; i++) {
        Gradients p = problem(1, 1, 40, 40, 12);
        add_bias(&p, 1);
        for (size_t j = 0; j < p.count[GRADIENTS - 1]; j++)
            ((float *)p.s.bias)[j] = -INFINITY;
        differentiate(&p, names[i]);
        for (int g = 0; g < GRADIENTS; g++)
            for (size_t j = 0; j < p.count[g]; j++)
                cr_assert(p.gradient[g][j] == 0, "%s: %s %g", names[i], gradient_name[g], p.gradient[g][j]);
        free_problem(&p);
    }
}

/* A cache's room beyond the valid keys holds anything; its gradient is zero. */
Test(padding_gradient, is_never_read)
{
    static const char *const names[] = {"tiled", "simd"};
    int lengths[2] = {37, 0};
    for (int i = 0; i < 4; i++) {
        Gradients p = problem(2, 1, 60, 300, 12);
        p.s.lengths = lengths;
        if (i / 2)
            add_bias(&p, 1);
        for (int b = 0; b < 2; b++)
            for (size_t j = key_row(&p.s, b, 0, lengths[b]); j < key_row(&p.s, b + 1, 0, 0); j++)
                p.k[j] = p.v[j] = NAN;
        differentiate(&p, names[i % 2]);
        for (int g = 0; g < GRADIENTS; g++)
            for (size_t j = 0; j < p.count[g]; j++)
                cr_assert(!isnan(p.gradient[g][j]), "%s: %s[%zu]", names[i % 2], gradient_name[g], j);
        for (int b = 0; b < 2; b++)
            for (size_t j = key_row(&p.s, b, 0, lengths[b]); j < key_row(&p.s, b + 1, 0, 0); j++)
                cr_assert(p.gradient[DK][j] == 0 && p.gradient[DV][j] == 0, "%s", names[i % 2]);
        free_problem(&p);
    }
}

/* A NaN in q, k, v or dout is not lost on the way. */
Test(gradients, nan_reaches_them)
{
    static const char *const names[] = {"materialised", "tiled", "simd"};
    for (int i = 0; i < 3; i++)
        for (int tensor = 0; tensor < 4; tensor++) {
            Gradients p = problem(1, 1, 70, 70, 10);
            (tensor == 0 ? p.q : tensor == 1 ? p.k : tensor == 2 ? p.v : p.dout)[66 * 10 + 3] = NAN;
            differentiate(&p, names[i]);
            for (int g = DQ; g <= DK; g++)
                cr_expect(isnan(p.gradient[g][66 * 10]), "%s, tensor %d: %s", names[i], tensor,
                          gradient_name[g]);
            free_problem(&p);
        }
}

/* ---- Large scores ---- */

/* Weights are computed again as 2^(score - lse): a score of thousands must be rounded as it was in forward, and
 * not much, or its error goes into the exponent. With scores summed in one piece, in both passes, the
 * gradients are off by 8e-4 and more. */
Test(simd_gradient, large_scores_of_long_heads)
{
    char *argv[] = {"run",    "--heads",          "1",      "--tokens", "90",     "--head-size", "256",
                    "--mask", "local-global:9:4", "--pass", "both",     "--dout", "randn"};
    Options options;
    parse_options(&options, sizeof argv / sizeof *argv, argv);
    static Run run;
    Refusal refusal = open_run(&run, &chapter, find_kernel("simd"), &options, NULL, 30);
    cr_assert(refusal.exit_code == 0, "%s", refusal.reason);
    cr_expect(check_run(&run) && run.gradient.relative_l2 <= 5e-4, "%s: L2 %g", run.gradient_name,
              run.gradient.relative_l2);
}

/* ---- Memory ---- */

static size_t backward_floats(const char *name, int tokens)
{
    AttentionShape s = {.batch = 1,
                        .heads = 12,
                        .kv_heads = 12,
                        .tokens = tokens,
                        .key_tokens = tokens,
                        .head_size = 64,
                        .tile_rows = 64,
                        .tile_columns = 64};
    size_t floats[MAX_BUFFERS], sum = 0;
    for (int i = find_kernel(name)->backward_workspace(&s, floats); i-- > 0;)
        sum += floats[i];
    return sum;
}

Test(gradients, memory_is_linear_in_tokens)
{
    cr_expect(backward_floats("tiled", 1024) == 12 * 1024 * (1 + 2 * 64), "delta, and k and v turned");
    cr_expect(backward_floats("tiled", 1 << 17) == (12 << 17) * (1 + 2 * 64));
    size_t thread = flash_back_block_floats(64);
    cr_expect(thread <= 1000 * 1000 / 4, "%zu floats for each thread", thread);
    cr_expect(backward_floats("simd", 1) == 12 * (thread + 1), "each of 12 heads is one task");
    cr_expect(backward_floats("simd", 1000 * FLASH_BACK_KEYS) == FLASH_BACK_THREADS * thread + 12 * 1000,
              "beside the threads' own, a number for each task");
}
