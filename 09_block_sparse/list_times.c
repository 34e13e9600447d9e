/* What the lists cost: their making, from the closed form, beside the attention that walks them. */
#include "list_times.h"

#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "benchmark.h"
#include "block_sparse.h"
#include "error.h"
#include "memory.h"
#include "random.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    const char *mask;
    int heads, tokens;
} Case;

static const Case cases[] = {
    {"causal", 8, 4096},       {"window:256", 8, 4096},
    {"prefix:512", 8, 4096},   {"local-global:256:64", 8, 4096},
    {"dilated:8:64", 8, 4096}, {"documents:1000,1000,96,2000", 8, 4096},
    {"window:512", 4, 16384},
};
static const int blocks[] = {128, 32, 16};

/* Everything that attention and its gradients need, and the lists' memory. */
typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv, *delta;
    float *scratch, *back_scratch, *partial, *lists, *transposed;
} Work;

static Work open_work(const AttentionShape *s)
{
    Work w = {.s = *s};
    float **const as_q[] = {&w.q, &w.k, &w.v, &w.out, &w.dout, &w.dq, &w.dk, &w.dv};
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    for (size_t i = 0; i < sizeof as_q / sizeof as_q[0]; i++) {
        *as_q[i] = allocate_floats(query_count(s));
        draw_randn(&stream, *as_q[i], query_count(s));
    }
    w.lse = allocate_floats(lse_count(s));
    w.delta = allocate_floats(lse_count(s));
    w.scratch = allocate_floats(block_sparse_scratch(s));
    w.back_scratch = allocate_floats(flash_backward_scratch(s));
    w.partial = allocate_floats(flash_backward_partials(s));
    w.lists = allocate_floats(block_mask_floats(s, false, false));
    w.transposed = allocate_floats(transposed_mask_floats(s, false, false));
    return w;
}

static void close_work(Work *w)
{
    float *const owned[] = {w->q,       w->k,     w->v,         w->out,   w->lse,     w->dout,
                            w->dq,      w->dk,    w->dv,        w->delta, w->scratch, w->back_scratch,
                            w->partial, w->lists, w->transposed};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        free(owned[i]);
}

/* In milliseconds. Backward makes the lists once more and turns them. */
typedef struct {
    double lists, forward, back_lists, backward;
} Times;

static Times time_once(Work *w)
{
    const AttentionShape *s = &w->s;
    double start = now();
    BlockMask mask = block_mask_in(w->lists, s, false, false);
    fill_from_closed_form(&mask, s);
    double listed = now();
    attention_block_sparse_simd(w->out, w->lse, w->scratch, w->q, w->k, w->v, &mask, s);
    double attended = now();
    fill_from_closed_form(&mask, s);
    BlockMask transposed = transpose_in(w->transposed, &mask);
    double turned = now();
    AttentionBackward g = {w->q, w->k, w->v, w->out, w->lse, w->dout, w->dq, w->dk, w->dv, NULL};
    attention_block_sparse_simd_backward(&g, w->delta, w->partial, w->back_scratch, &transposed, s);
    return (Times){1e3 * (listed - start), 1e3 * (attended - start), 1e3 * (turned - attended),
                   1e3 * (now() - attended)};
}

/* Do the lists say of every block what asking each pair says? */
static bool lists_are_right(Work *w)
{
    const AttentionShape *s = &w->s;
    BlockMask closed = block_mask_in(w->lists, s, false, false);
    BlockMask asked = block_mask_in(allocate_floats(block_mask_floats(s, false, false)), s, false, false);
    fill_from_closed_form(&closed, s);
    fill_from_predicate(&asked, attends, s);
    bool same = true;
    for (int i = 0; i < closed.query_blocks && same; i++) {
        int count, asked_count;
        const ListedBlock *list = block_list(&closed, 0, 0, i, &count);
        const ListedBlock *other = block_list(&asked, 0, 0, i, &asked_count);
        same = count == asked_count && memcmp(list, other, count * sizeof *list) == 0;
    }
    free(asked.listed);
    return same;
}

/* One line; false if the lists are wrong. */
static bool tell_case(const Case *c, int block, FILE *file)
{
    enum { REPEATS = 7 };
    AttentionShape s = {.batch = 1,
                        .heads = c->heads,
                        .kv_heads = c->heads,
                        .tokens = c->tokens,
                        .key_tokens = c->tokens,
                        .head_size = 64,
                        .scale = 0.125f,
                        .block = block};
    int *document, document_tokens;
    const char *wrong = parse_mask(&s.mask, c->mask, &document, &document_tokens);
    if (wrong)
        die(EXIT_USAGE, "%s", wrong);
    Work w = open_work(&s);
    bool right = lists_are_right(&w);
    double value[6][REPEATS];
    for (int i = -1; i < REPEATS; i++) { /* -1 warms up */
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r\033[K%s, blocks of %d, round %d of %d", c->mask, block, i + 1, REPEATS);
        Times t = time_once(&w);
        if (i < 0)
            continue;
        value[0][i] = t.lists;
        value[1][i] = t.forward;
        value[2][i] = 100 * t.lists / t.forward;
        value[3][i] = t.back_lists;
        value[4][i] = t.backward;
        value[5][i] = 100 * t.back_lists / t.backward;
    }
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K");
    double m[6];
    for (int i = 0; i < 6; i++)
        m[i] = median(value[i], REPEATS);
    BlockMask mask = block_mask_in(w.lists, &s, false, false);
    BlockCount count = count_blocks(&mask);
    printf("%-28s %6d %6d %8zu %9.3f %9.2f %7.2f%% %9.3f %9.2f %7.2f%% %s\n", c->mask, c->tokens, block,
           count.full + count.partial, m[0], m[1], m[2], m[3], m[4], m[5], right ? "✓" : "✗");
    if (file)
        fprintf(file, "%s\t%s\t%d\t%d\t%d\t%zu\t%.4g\t%.4g\t%.3g\t%.4g\t%.4g\t%.3g\n", machine_name(),
                c->mask, c->heads, c->tokens, block, count.full + count.partial, m[0], m[1], m[2], m[3], m[4],
                m[5]);
    close_work(&w);
    free(document);
    return right;
}

int run_list_times(int argc, char **argv)
{
    const char *path = argc == 2 && strcmp(argv[0], "--tsv") == 0 ? argv[1] : NULL;
    char unfinished[4096] = "";
    FILE *file = NULL;
    if (argc > 0 && !path)
        die(EXIT_USAGE, "./run lists takes --tsv FILE and nothing else");
    if (path) {
        snprintf(unfinished, sizeof unfinished, "%s.new", path);
        file = fopen(unfinished, "w");
        if (!file)
            die(EXIT_USAGE, "cannot write %s: %s", unfinished, strerror(errno));
        fprintf(file,
                "machine\tmask\theads\ttokens\tblock\tlisted\tlists_ms\tforward_ms\tpercent_of_forward\t"
                "back_lists_ms\tbackward_ms\tpercent_of_backward\n");
    }
    printf("Making the block lists, as part of simd's time: heads of 64, 8 of them at 4096 tokens, 4 at "
           "16384\n");
    printf("%-28s %6s %6s %8s %9s %9s %8s %9s %9s %8s\n", "mask", "tokens", "block", "listed", "lists, ms",
           "forward", "", "and turned", "backward", "");
    bool right = true;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (size_t j = 0; j < sizeof blocks / sizeof blocks[0]; j++)
            right = tell_case(&cases[i], blocks[j], file) && right;
    if (file && (fclose(file) != 0 || rename(unfinished, path) != 0))
        die(EXIT_USAGE, "cannot write %s: %s", path, strerror(errno));
    return right ? EXIT_PASSED : EXIT_CHECK_FAILED;
}
