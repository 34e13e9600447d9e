/* What is particular to tiles: their sizes, their edges, the lazy maximum, what is never read, and the masks
 * of the notebook's modules. Every kernel against the oracle over the ugly shapes: common/test_chapter.c. */
#include "flash_modules.h"
#include "flash_tiled.h"
#include "flash_tiled_simd.h"
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

/* One of the chapter's kernels, opened on a problem such as "--batch 2 --tokens 5", forward called. Held
 * until the test's process ends. */
static Run *run_kernel(const char *name, const char *words)
{
    static Run runs[16];
    static int count;
    static char copy[256];
    cr_assert(count < 16);
    Run *run = &runs[count++];
    char *argv[32] = {"run"};
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    Options options;
    parse_options(&options, argc, argv);
    Refusal refusal = open_run(run, &chapter, find_kernel(name), &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s %s: %s", name, words, refusal.reason);
    forward_run(run);
    return run;
}

static double furthest(const float *a, const float *b, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n; i++)
        most = worse(most, a[i] == b[i] ? 0 : fabs((double)a[i] - (double)b[i]));
    return most;
}

/* ---- A problem to change by hand: random q, k, v, then whatever a test does to them. ---- */

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse;
} Example;

static Example example(int batch, int heads, int tokens, int key_tokens, int head_size)
{
    Example p = {.s = {.batch = batch,
                       .heads = heads,
                       .kv_heads = heads,
                       .tokens = tokens,
                       .key_tokens = key_tokens,
                       .head_size = head_size,
                       .scale = 1 / sqrtf((float)head_size),
                       .tile_rows = 16,
                       .tile_columns = 24}};
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    p.q = allocate_floats(query_count(&p.s));
    p.k = allocate_floats(key_count(&p.s));
    p.v = allocate_floats(key_count(&p.s));
    p.out = allocate_floats(query_count(&p.s));
    p.lse = allocate_floats(lse_count(&p.s));
    draw_randn(&stream, p.q, query_count(&p.s));
    draw_randn(&stream, p.k, key_count(&p.s));
    draw_randn(&stream, p.v, key_count(&p.s));
    return p;
}

/* With the kernel of this name, outputs and workspace poisoned first. */
static void attend(Example *p, const char *name)
{
    const Kernel *kernel = find_kernel(name);
    Tensors t = {.q = p->q, .k = p->k, .v = p->v, .out = p->out, .lse = p->lse};
    size_t floats[MAX_BUFFERS];
    int buffers = kernel->workspace ? kernel->workspace(&p->s, floats) : 0;
    for (int i = 0; i < buffers; i++) {
        t.workspace[i] = allocate_floats(floats[i]);
        memset(t.workspace[i], 0xff, floats[i] * sizeof(float));
    }
    if (kernel->weights)
        t.weights = allocate_floats(weights_count(&p->s));
    memset(p->out, 0xff, query_count(&p->s) * sizeof(float));
    memset(p->lse, 0xff, lse_count(&p->s) * sizeof(float));
    kernel->forward(&t, &p->s);
    for (int i = 0; i < buffers; i++)
        free(t.workspace[i]);
    free(t.weights);
}

static void free_example(Example *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->out);
    free(p->lse);
}

/* How far out and lse are from the oracle's. */
static Comparison judge(const Example *p, Comparison *of_lse)
{
    double *out = allocate_zeroed(query_count(&p->s), sizeof *out),
           *lse = allocate_zeroed(lse_count(&p->s), sizeof *lse);
    double largest = oracle_attention(out, lse, NULL, NULL, 0, p->q, p->k, p->v, NULL, &p->s);
    double tolerance = tolerance_f32(p->s.key_tokens, largest);
    Comparison of_out = compare(p->out, out, query_count(&p->s), tolerance);
    *of_lse = compare(p->lse, lse, lse_count(&p->s), tolerance);
    free(out);
    free(lse);
    return of_out;
}

static const char *const tile_kernels[] = {"tiled", "simd"};

static void expect_right(Example *p, const char *what)
{
    for (int i = 0; i < 2; i++) {
        Comparison of_lse;
        char text[200];
        attend(p, tile_kernels[i]);
        Comparison of_out = judge(p, &of_lse);
        comparison_text(text, sizeof text, &of_out);
        cr_expect(of_out.passed, "%s, %s: out %s", tile_kernels[i], what, text);
        comparison_text(text, sizeof text, &of_lse);
        cr_expect(of_lse.passed, "%s, %s: lse %s", tile_kernels[i], what, text);
    }
}

/* ---- The numbers of others ---- */

static void hold_the_notebook(const char *name)
{
    if (getenv("SMALL"))
        return;
    Run *run = run_kernel(name, "--batch 8 --tokens 1024 --embed 768 --heads 12");
    const char *wrong = check_reference(run, "07_flash_tiled/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s: %s", name, wrong);
}

Test(sdpa, holds_every_value_of_the_notebook)
{
    hold_the_notebook("sdpa");
}

Test(sdpa_mask, holds_every_value_of_the_notebook)
{
    hold_the_notebook("sdpa-mask");
}

Test(torch_mha, holds_every_value_of_the_notebook)
{
    hold_the_notebook("torch-mha-noweights");
}

/* ---- Tiles ---- */

Test(tiles, of_any_size_give_the_same)
{
    static const int sizes[][2] = {{64, 64}, {1, 1}, {3, 5}, {1, 300}, {300, 1}, {7, 64}, {500, 500}};
    for (int causal = 0; causal < 2; causal++) {
        Example p = example(2, 2, 97, 131, 20);
        p.s.causal = causal;
        attend(&p, "materialised");
        float *out = p.out, *lse = p.lse;
        p.out = allocate_floats(query_count(&p.s));
        p.lse = allocate_floats(lse_count(&p.s));
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            p.s.tile_rows = sizes[i][0];
            p.s.tile_columns = sizes[i][1];
            attend(&p, "tiled");
            double apart = furthest(p.out, out, query_count(&p.s)) + furthest(p.lse, lse, lse_count(&p.s));
            cr_expect(apart <= 4e-6, "%d x %d: off by %g", sizes[i][0], sizes[i][1], apart);
        }
        attend(&p, "simd");
        double apart = furthest(p.out, out, query_count(&p.s)) + furthest(p.lse, lse, lse_count(&p.s));
        cr_expect(apart <= 4e-6, "simd: off by %g", apart);
        free(out);
        free(lse);
        free_example(&p);
    }
}

/* One more and one less than every size that the fast kernel is cut at. */
Test(simd, edges_of_its_tiles)
{
    const int tokens[] = {
        1, LANES - 1, LANES, LANES + 1, FLASH_ROWS - 1, FLASH_ROWS, FLASH_ROWS + 1, 2 * FLASH_ROWS + LANES};
    const int keys[] = {
        1, TILE - 1, TILE, TILE + 1, FLASH_KEYS - 1, FLASH_KEYS, FLASH_KEYS + 1, 2 * FLASH_KEYS + 3};
    const int head_sizes[] = {1, TILE - 1, TILE, TILE + 1, 3 * TILE + 2};
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++)
            for (int causal = 0; causal < 2; causal++) {
                Example p = example(1, 1, tokens[i], keys[j], head_sizes[(i + j) % 5]);
                char what[100];
                snprintf(what, sizeof what, "T %d, TK %d, HS %d%s", p.s.tokens, p.s.key_tokens, p.s.head_size,
                         causal ? ", causal" : "");
                p.s.causal = causal;
                expect_right(&p, what);
                free_example(&p);
            }
}

Test(tiles, same_bits_for_any_number_of_threads)
{
    static const char *const names[] = {"materialised", "tiled", "simd"};
    for (int i = 0; i < 3; i++) {
        Example p = example(2, 3, 700, 700, 40); /* so long that teams differ with the threads */
        p.s.causal = true;
        omp_set_num_threads(1);
        attend(&p, names[i]);
        float *out = p.out, *lse = p.lse;
        p.out = allocate_floats(query_count(&p.s));
        p.lse = allocate_floats(lse_count(&p.s));
        for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            attend(&p, names[i]);
            cr_expect(memcmp(out, p.out, query_count(&p.s) * sizeof *out) == 0, "%s, %d threads", names[i],
                      threads);
            cr_expect(memcmp(lse, p.lse, lse_count(&p.s) * sizeof *lse) == 0, "%s, %d threads", names[i],
                      threads);
        }
        free(out);
        free(lse);
        free_example(&p);
    }
}

static size_t workspace_of(const char *name, int tokens)
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
    for (int i = find_kernel(name)->workspace(&s, floats); i-- > 0;)
        sum += floats[i];
    return sum;
}

/* No kernel with tiles holds more than a few numbers a row, whatever T is. */
Test(tiles, memory_is_linear_in_tokens)
{
    cr_expect(workspace_of("tiled", 1024) == 3 * 12 * 1024, "m, l and one score a row");
    cr_expect(workspace_of("tiled", 1 << 20) == 1024 * workspace_of("tiled", 1024));
    cr_expect(workspace_of("simd", 1 << 20) == FLASH_THREADS * FLASH_TEAM * flash_scratch(64),
              "as much as all threads need");
    cr_expect(workspace_of("simd", 1) == 12 * flash_scratch(64), "one block a head");
}

/* ---- The lazy maximum ---- */

/* Each key outdoes all before it by more than the headroom: m has to move with every key of the first row,
 * and what was summed up before must vanish. */
Test(lazy_maximum, every_key_outdoes_the_last)
{
    Example p = example(1, 1, 50, 300, 4);
    for (int t2 = 0; t2 < 300; t2++)
        for (int d = 0; d < 4; d++)
            p.k[t2 * 4 + d] = 30.0f * t2;
    for (int t = 0; t < 50; t++)
        for (int d = 0; d < 4; d++)
            p.q[t * 4 + d] = t % 2 ? 1 : -1; /* odd rows climb, even rows start at the top */
    expect_right(&p, "climbing scores");
    free_example(&p);
}

/* m starts at 0: far too large here, where every weight would be 2^-5000 = 0. */
Test(lazy_maximum, all_scores_far_below_zero)
{
    Example p = example(1, 2, 60, 200, 16);
    for (size_t i = 0; i < query_count(&p.s); i++)
        p.q[i] = 30 + 0.01f * p.q[i];
    for (size_t i = 0; i < key_count(&p.s); i++)
        p.k[i] = -30 + 0.01f * p.k[i];
    expect_right(&p, "scores near -3600");
    p.s.causal = true;
    expect_right(&p, "scores near -3600, causal");
    free_example(&p);
}

/* A forbidden key of enormous score must not set the maximum: all that may be seen would weigh 0. */
Test(lazy_maximum, is_of_keys_that_may_be_seen)
{
    Example p = example(1, 1, 200, 200, 16);
    for (size_t i = 0; i < query_count(&p.s); i++)
        p.q[i] = fabsf(p.q[i]);
    for (int t2 = 0; t2 < 200; t2++)
        for (int d = 0; d < 16; d++)
            if (t2 % 16 == 15)
                p.k[t2 * 16 + d] = 3000;
    p.s.causal = true;
    expect_right(&p, "causal, every 16th score enormous");
    p.s.causal = false;
    p.s.mask = (Mask){.kind = MASK_DILATED, .width = 12, .extra = 5};
    expect_right(&p, "dilated, every 16th score enormous");
    float *bias = allocate_zeroed(200, sizeof *bias);
    for (int t2 = 15; t2 < 200; t2 += 16)
        bias[t2] = -INFINITY;
    p.s.mask.kind = MASK_NONE;
    p.s.bias = bias;
    p.s.bias_stride[3] = 1;
    expect_right(&p, "every 16th key forbidden by the bias, its score enormous");
    free(bias);
    free_example(&p);
}

/* Strides say where its numbers are: here those of a key lie side by side, and heads share them. */
Test(bias, may_lie_along_the_queries)
{
    Example p = example(2, 2, 60, 200, 16);
    float *bias = allocate_floats(60 * 200);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 5);
    draw_randn(&stream, bias, 60 * 200);
    p.s.bias = bias;
    p.s.bias_stride[2] = 1;
    p.s.bias_stride[3] = 60;
    expect_right(&p, "transposed bias");
    p.s.causal = true;
    expect_right(&p, "transposed bias, causal");
    free(bias);
    free_example(&p);
}

/* The fast kernel's short cuts cost no accuracy. */
Test(simd, is_as_accurate_as_the_plain_loops)
{
    Example p = example(1, 2, 300, 1000, 64);
    Comparison plain, fast, of_lse;
    attend(&p, "tiled");
    plain = judge(&p, &of_lse);
    attend(&p, "simd");
    fast = judge(&p, &of_lse);
    cr_expect(fast.relative_l2 <= 1.5 * plain.relative_l2, "L2 %.2g, the plain loops' %.2g", fast.relative_l2,
              plain.relative_l2);
    free_example(&p);
}

/* Two keys with scores 0 and x and values 0 and 1: out = e^x / (1 + e^x), which shows exp alone. */
Test(simd, exp_is_good_to_the_last_bits)
{
    Example p = example(1, 1, 1, 2, 1);
    p.s.scale = 1;
    p.q[0] = 1;
    p.k[0] = p.v[0] = 0;
    p.v[1] = 1;
    for (int i = -1000; i <= 1000; i++) {
        double x = i / 1000.0, expected = 1 / (1 + exp(-x));
        p.k[1] = (float)x;
        attend(&p, "simd");
        cr_assert(fabs((double)p.out[0] - expected) <= 3e-7 * expected, "x = %g: off by %g of it", x,
                  p.out[0] / expected - 1);
    }
    free_example(&p);
}

/* ---- What is seen, and what is not even read ---- */

static size_t count_nan(const float *x, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += isnan(x[i]) != 0;
    return count;
}

Test(nan, reaches_every_row_that_sees_it)
{
    enum { T = 70, HS = 10, SEEN_FROM = 66 };
    for (int i = 0; i < 2; i++)
        for (int tensor = 0; tensor < 3; tensor++) {
            Example p = example(1, 1, T, T, HS);
            p.s.causal = true;
            (tensor == 0 ? p.q : tensor == 1 ? p.k : p.v)[SEEN_FROM * HS + 3] = NAN;
            attend(&p, tile_kernels[i]);
            for (int t = SEEN_FROM; t < (tensor ? T : SEEN_FROM + 1); t++)
                cr_expect(count_nan(p.out + t * HS, HS) == (tensor < 2 ? HS : 1), "%s, tensor %d, row %d",
                          tile_kernels[i], tensor, t);
            if (tensor < 2 || i == 0) /* the fast kernel multiplies v with 0: the header says so */
                cr_expect(count_nan(p.out, SEEN_FROM * HS) == 0, "%s, tensor %d: rows that do not see it",
                          tile_kernels[i], tensor);
            free_example(&p);
        }
}

/* Also where it is all that a row sees. */
Test(nan, alone_is_no_empty_row)
{
    for (int i = 0; i < 2; i++) {
        Example p = example(1, 1, 5, 1, 8);
        p.k[2] = NAN;
        attend(&p, tile_kernels[i]);
        cr_expect(count_nan(p.out, 5 * 8) == 5 * 8 && count_nan(p.lse, 5) == 5, "%s", tile_kernels[i]);
        free_example(&p);
    }
}

/* A cache's room beyond the valid keys holds anything. */
Test(padding, is_never_read)
{
    int lengths[2] = {37, 0};
    for (int i = 0; i < 2; i++) {
        Example p = example(2, 1, 20, 100, 12);
        p.s.lengths = lengths;
        for (int b = 0; b < 2; b++)
            for (size_t j = key_row(&p.s, b, 0, lengths[b]); j < key_row(&p.s, b + 1, 0, 0); j++)
                p.k[j] = p.v[j] = NAN;
        attend(&p, tile_kernels[i]);
        cr_expect(count_nan(p.out, query_count(&p.s)) == 0, "%s", tile_kernels[i]);
        for (int t = 0; t < 20; t++)
            cr_expect(p.lse[20 + t] == -INFINITY && p.out[query_row(&p.s, 1, 0, t)] == 0,
                      "%s: a row without keys", tile_kernels[i]);
        free_example(&p);
    }
}

/* ---- The steps that other chapters call ---- */

/* Rows of three heads that share their keys, in one block, with the keys in pieces of any order: as chapter 8
 * and 9 call. */
Test(steps, rows_of_any_heads_and_keys_in_any_order)
{
    enum { HEADS = 3, T = 4, TK = 300, HS = 24 };
    Example p = example(1, HEADS, T, TK, HS);
    size_t head = (size_t)TK * HS;
    for (int h = 1; h < HEADS; h++) {
        memcpy(p.k + h * head, p.k, head * sizeof *p.k);
        memcpy(p.v + h * head, p.v, head * sizeof *p.v);
    }
    p.s.causal = true;
    attend(&p, "tiled");

    float out[HEADS * T * HS], lse[HEADS * T];
    FlashBlock block = {.s = &p.s, .k = p.k, .v = p.v, .key_step = HS};
    float *scratch = allocate_floats(flash_scratch(HS));
    for (int t = T - 1; t >= 0; t--)
        for (int h = 0; h < HEADS; h++) {
            size_t row = query_row(&p.s, 0, h, t);
            float *lse_bht = lse + lse_index(&p.s, 0, h, t);
            block.row[block.rows++] =
                (FlashRow){.q = p.q + row, .out = out + row, .lse = lse_bht, .h = h, .t = t};
        }
    flash_begin(&block, scratch);
    flash_attend(&block, 250, TK, true);
    flash_attend(&block, 0, 3, false);
    flash_attend(&block, 3, 3, false);
    flash_attend(&block, 130, 250, false);
    flash_attend(&block, 3, 130, true);
    flash_finish(&block);
    cr_expect(furthest(out, p.out, HEADS * T * HS) <= 2e-6);
    cr_expect(furthest(lse, p.lse, HEADS * T) <= 2e-6);

    flash_begin(&block, scratch);
    flash_attend_allowed((FlashBlock *[]){&block}, 1);
    flash_finish(&block);
    cr_expect(furthest(out, p.out, HEADS * T * HS) <= 2e-6);
    flash_begin(&block, scratch);
    flash_finish(&block);
    cr_expect(out[0] == 0 && lse[0] == -INFINITY, "a block that attended to nothing");
    free(scratch);
    free_example(&p);
}

/* Blocks that begin and end at different keys, with one of them done long before the others. */
Test(steps, a_team_gives_what_each_block_alone_gives)
{
    enum { TEAM = 3, T = TEAM * FLASH_ROWS - 5, TK = 700, HS = 24 };
    Example p = example(1, 1, T, TK, HS);
    p.s.mask = (Mask){.kind = MASK_WINDOW, .width = 300};
    float *scratch = allocate_floats(TEAM * flash_scratch(HS)), *lse = allocate_floats(T);
    float *out[2] = {allocate_floats(T * HS), allocate_floats(T * HS)};
    for (int together = 0; together < 2; together++) {
        FlashBlock block[TEAM], *team[TEAM];
        for (int i = 0; i < TEAM; i++) {
            team[i] = &block[i];
            block[i] = (FlashBlock){.s = &p.s, .k = p.k, .v = p.v, .key_step = HS};
            for (int t = i * FLASH_ROWS; t < smaller((i + 1) * FLASH_ROWS, T); t++)
                block[i].row[block[i].rows++] =
                    (FlashRow){.q = p.q + t * HS, .out = out[together] + t * HS, .lse = lse + t, .t = t};
            flash_begin(&block[i], scratch + i * flash_scratch(HS));
            if (!together)
                flash_attend_allowed(&team[i], 1);
        }
        if (together)
            flash_attend_allowed(team, TEAM);
        for (int i = 0; i < TEAM; i++)
            flash_finish(&block[i]);
    }
    attend(&p, "tiled");
    cr_expect(furthest(out[0], p.out, T * HS) <= 2e-6);
    cr_expect(memcmp(out[0], out[1], T * HS * sizeof(float)) == 0);
    free(scratch);
    free(lse);
    free(out[0]);
    free(out[1]);
    free_example(&p);
}

Test(steps, teams_have_room_for_every_row_and_keep_to_their_scratch)
{
    for (int threads = 1; threads <= 2 * FLASH_THREADS; threads *= 2)
        for (size_t heads = 1; heads < 200; heads += 27)
            for (size_t rows = 1; rows < 3000; rows += 77) {
                omp_set_num_threads(threads);
                FlashTeams teams = flash_teams(heads, rows);
                size_t of_a_team = (size_t)teams.blocks * FLASH_ROWS;
                cr_assert(teams.blocks >= 1 && teams.blocks <= FLASH_TEAM);
                cr_assert(teams.count == heads * teams.of_a_head);
                cr_assert(teams.of_a_head * of_a_team >= rows && (teams.of_a_head - 1) * of_a_team < rows);
                cr_assert(teams.threads >= 1 && teams.threads <= threads &&
                          (size_t)teams.threads <= teams.count);
                cr_assert((size_t)teams.threads * teams.blocks * flash_scratch(5) <=
                          flash_team_scratch(heads, rows, 5));
            }
}

/* ---- The modules ---- */

/* The heads are read where the projection left them: the same bits as from contiguous copies. */
Test(sdpa, reads_packed_heads_in_place)
{
    Run *run = run_kernel("sdpa", "--batch 2 --tokens 70 --embed 36 --heads 3");
    AttentionShape s = run->problem.shape;
    Example p = example(2, 3, 70, 70, 12);
    p.s.causal = true;
    const float *qkv = run->t.workspace[0], *context = run->t.workspace[1];
    for (int b = 0; b < 2; b++)
        for (int h = 0; h < 3; h++)
            for (int t = 0; t < 70; t++) {
                const float *token = qkv + ((size_t)b * 70 + t) * flash_packed_step(&s) + h * 12;
                memcpy(p.q + query_row(&s, b, h, t), token, 12 * sizeof *p.q);
                memcpy(p.k + key_row(&s, b, h, t), token + 36, 12 * sizeof *p.k);
                memcpy(p.v + key_row(&s, b, h, t), token + 72, 12 * sizeof *p.v);
            }
    attend(&p, "simd");
    for (int b = 0; b < 2; b++)
        for (int h = 0; h < 3; h++)
            for (int t = 0; t < 70; t++)
                cr_expect(memcmp(p.out + query_row(&s, b, h, t), context + ((size_t)b * 70 + t) * 36 + h * 12,
                                 12 * sizeof(float)) == 0,
                          "entry %d, head %d, token %d", b, h, t);
    free_example(&p);
}

/* out of the sdpa module with a boolean tensor for a mask, read as PyTorch's two functions read it. */
static void sdpa_with_tensor(float *out, const Run *run, const bool *tensor,
                             void (*read)(float *, const bool *, size_t))
{
    AttentionShape s = run->problem.shape;
    size_t T = s.tokens;
    float *bias = allocate_floats(T * T);
    read(bias, tensor, T * T);
    s.mask.kind = MASK_NONE;
    s.bias = bias;
    s.bias_stride[2] = T;
    s.bias_stride[3] = 1;
    sdpa_module(out, run->t.workspace[0], run->t.workspace[1], NULL, run->t.workspace[2], run->t.x,
                run->t.parameter[0], run->t.parameter[1], run->t.parameter[2], &s);
    free(bias);
}

Test(sdpa_mask, sees_the_future_and_inverted_is_sdpa)
{
    enum { B = 2, T = 60, C = 24, COUNT = B * T * C };
    const char *words = "--batch 2 --tokens 60 --embed 24 --heads 3";
    Run *causal = run_kernel("sdpa", words), *future = run_kernel("sdpa-mask", words);
    static bool triu[T * T];
    static float out[COUNT];
    for (int t = 0; t < T; t++)
        for (int t2 = 0; t2 < T; t2++)
            triu[t * T + t2] = t2 > t;

    cr_expect(furthest(causal->t.out, future->t.out, COUNT) > 0.1, "6 is not 5");
    sdpa_with_tensor(out, future, triu, true_may_attend);
    cr_expect(furthest(out, future->t.out, COUNT) <= 1e-6, "as scaled_dot_product_attention reads it");
    sdpa_with_tensor(out, future, triu, true_may_not_attend);
    cr_expect(furthest(out, causal->t.out, COUNT) <= 1e-6, "as nn.MultiheadAttention reads it");

    const float *last_row = future->t.out + (T - 1) * C, *bias = future->t.parameter[2];
    cr_expect(memcmp(last_row, bias, C * sizeof *bias) == 0, "the last token sees nothing: out is proj.bias");
}

Test(torch_mha, draws_its_output_projection_first)
{
    enum { C = 6 };
    Run *run = run_kernel("torch-mha-noweights", "--batch 1 --tokens 2 --embed 6 --heads 3 --seed 42");
    static const char *const names[] = {"multihead_attn.out_proj.weight", "multihead_attn.in_proj_weight",
                                        "proj.weight", "proj.bias"};
    const float bounds[] = {linear_bound(C), xavier_bound(C, 3 * C), linear_bound(C), linear_bound(C)};
    const size_t counts[] = {C * C, 3 * C * C, C * C, C};
    RandomStream stream;
    float expected[3 * C * C];
    seed_stream(&stream, STREAM_CPU, 42);
    draw_randn(&stream, expected, 2 * C); /* x */
    for (int i = 0; i < 4; i++) {
        draw_uniform(&stream, expected, counts[i], -bounds[i], bounds[i]);
        cr_expect_str_eq(run->parameters.list[i].name, names[i]);
        cr_expect(memcmp(expected, run->t.parameter[i], counts[i] * sizeof *expected) == 0, "%s", names[i]);
    }
}

/* Dropout is drawn by position: the plain and the fast kernel, and tiles of any size, drop the same pairs. */
Test(dropout, does_not_depend_on_tiles)
{
    Example p = example(1, 2, 90, 150, 16);
    p.s.dropout = 0.4f;
    p.s.dropout_seed = 7;
    attend(&p, "tiled");
    float *out = p.out;
    p.out = allocate_floats(query_count(&p.s));
    p.s.tile_rows = 5;
    p.s.tile_columns = 11;
    attend(&p, "tiled");
    cr_expect(furthest(out, p.out, query_count(&p.s)) <= 2e-6, "5 x 11");
    attend(&p, "simd");
    cr_expect(furthest(out, p.out, query_count(&p.s)) <= 2e-6, "simd");
    p.s.dropout_seed = 8;
    attend(&p, "simd");
    cr_expect(furthest(out, p.out, query_count(&p.s)) > 0.1, "another seed");
    free(out);
    free_example(&p);
}
