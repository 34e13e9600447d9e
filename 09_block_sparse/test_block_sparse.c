/* What is particular to block masks: the lists, predicates of one's own, and the traps. Every kernel against
 * the oracle: common/test_chapter.c. */
#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "block_sparse.h"
#include "memory.h"
#include "reference.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

extern const Chapter chapter;

/* ---- Shapes and their lists ---- */

/* One batch entry, one head. drop_shape() frees the document numbers, if any. */
static AttentionShape shape_of(const char *mask, int tokens, int key_tokens, int block)
{
    AttentionShape s = {.batch = 1,
                        .heads = 1,
                        .kv_heads = 1,
                        .tokens = tokens,
                        .key_tokens = key_tokens,
                        .head_size = 1,
                        .scale = 1,
                        .block = block};
    int *document, document_tokens;
    const char *wrong = parse_mask(&s.mask, mask, &document, &document_tokens);
    cr_assert(!wrong, "%s", wrong);
    if (document)
        s.tokens = s.key_tokens = document_tokens;
    return s;
}

static void drop_shape(AttentionShape *s)
{
    free((int *)s->mask.document);
}

static BlockMask lists_of(const AttentionShape *s, MaskPredicate *predicate, bool by_batch, bool by_head)
{
    size_t floats = block_mask_floats(s, by_batch, by_head);
    BlockMask mask = block_mask_in(allocate_floats(floats), s, by_batch, by_head);
    if (predicate)
        fill_from_predicate(&mask, predicate, s);
    else
        fill_from_closed_form(&mask, s);
    cr_assert(mask.count + (size_t)mask.batch * mask.heads * mask.query_blocks == (int *)mask.listed + floats,
              "the lists do not fill the memory they asked for");
    return mask;
}

static BlockKind kind_at(const BlockMask *mask, int b, int h, int i, int j)
{
    int count;
    const ListedBlock *list = block_list(mask, b, h, i, &count);
    for (int n = 0; n < count; n++)
        if (list[n].key_block == j)
            return list[n].kind;
    return BLOCK_EMPTY;
}

/* How many pairs of a rectangle may attend. */
static long allowed(const AttentionShape *s, MaskPredicate *predicate, int b, int h, int q, int q_end, int kv,
                    int kv_end)
{
    long pairs = 0;
    for (int t = q; t < q_end; t++)
        for (int t2 = kv; t2 < kv_end; t2++)
            pairs += predicate(s, b, h, t, t2);
    return pairs;
}

static BlockKind kind_of_count(long pairs, long all)
{
    return pairs == 0 ? BLOCK_EMPTY : pairs == all ? BLOCK_FULL : BLOCK_PARTIAL;
}

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* Every block against a count of its pairs; lists ascending, of nothing but partial and full blocks. */
static void expect_right_lists(const BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s,
                               const char *name)
{
    int N = mask->block;
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                int count, q_end = smaller((i + 1) * N, s->tokens);
                const ListedBlock *list = block_list(mask, b, h, i, &count);
                for (int n = 0; n < count; n++)
                    cr_assert((n == 0 || list[n - 1].key_block < list[n].key_block) &&
                                  (list[n].kind == BLOCK_PARTIAL || list[n].kind == BLOCK_FULL),
                              "%s: place %d of list %d", name, n, i);
                for (int j = 0; j < mask->key_blocks; j++) {
                    int kv_end = smaller((j + 1) * N, s->key_tokens);
                    long pairs = allowed(s, predicate, b, h, i * N, q_end, j * N, kv_end);
                    BlockKind right = kind_of_count(pairs, (long)(q_end - i * N) * (kv_end - j * N));
                    BlockKind said = kind_at(mask, b, h, i, j);
                    cr_assert(said == right,
                              "%s, T = %d, TK = %d, N = %d: block %d,%d of (%d,%d) is %d, not %d", name,
                              s->tokens, s->key_tokens, N, i, j, b, h, said, right);
                }
            }
}

static const char *const masks[] = {"none",
                                    "causal",
                                    "window:1",
                                    "window:16",
                                    "window:37",
                                    "prefix:1",
                                    "prefix:50",
                                    "prefix:500",
                                    "dilated:4:1",
                                    "dilated:1:7",
                                    "dilated:5:9",
                                    "dilated:16777216:3",
                                    "local-global:1:1",
                                    "local-global:9:20",
                                    "local-global:20:200",
                                    "documents:1,40,30,19",
                                    "documents:90"};
enum { MASKS = sizeof masks / sizeof masks[0] };
static const int blocks[] = {1, 2, 3, 5, 8, 16, 32, 33, 64, 89, 90, 91, 1000};
enum { BLOCKS = sizeof blocks / sizeof blocks[0] };

Test(lists, closed_form_and_predicate_say_what_is_there)
{
    static const int key_tokens[] = {90, 53, 130};
    for (int m = 0; m < MASKS; m++)
        for (int n = 0; n < BLOCKS; n++)
            for (int i = 0; i < 3; i++) {
                AttentionShape s = shape_of(masks[m], 90, key_tokens[i], blocks[n]);
                BlockMask closed = lists_of(&s, NULL, false, false);
                BlockMask asked = lists_of(&s, attends, false, false);
                expect_right_lists(&closed, attends, &s, masks[m]);
                expect_right_lists(&asked, attends, &s, masks[m]);
                free(closed.listed);
                free(asked.listed);
                drop_shape(&s);
            }
}

/* Each batch entry has lists of its own, and those of an entry of length 0 are empty. */
Test(lists, causality_and_lengths_on_top)
{
    static const int lengths[] = {90, 41, 0, 1, 33};
    for (int m = 0; m < MASKS; m++)
        for (int n = 0; n < BLOCKS; n++)
            for (int causal = 0; causal < 2; causal++) {
                AttentionShape s = shape_of(masks[m], 90, 90, blocks[n]);
                s.batch = 5;
                s.lengths = lengths;
                s.causal = causal;
                BlockMask closed = lists_of(&s, NULL, false, false);
                cr_assert(closed.batch == 5);
                expect_right_lists(&closed, attends, &s, masks[m]);
                free(closed.listed);
                drop_shape(&s);
            }
}

/* Of any rectangle, not only of blocks: simd asks about strips. */
Test(lists, closed_form_of_any_rectangle)
{
    for (int m = 0; m < MASKS; m++)
        for (int q = 0; q < 90; q += 11)
            for (int q_end = q + 1; q_end <= 90; q_end += 1 + (q_end - q) / 2)
                for (int kv = 0; kv < 90; kv += 7)
                    for (int kv_end = kv + 1; kv_end <= 90; kv_end += 1 + (kv_end - kv) / 2) {
                        AttentionShape s = shape_of(masks[m], 90, 90, 8);
                        long pairs = allowed(&s, attends, 0, 0, q, q_end, kv, kv_end);
                        BlockKind right = kind_of_count(pairs, (long)(q_end - q) * (kv_end - kv));
                        cr_assert(closed_form(&s, 0, q, q_end, kv, kv_end) == right,
                                  "%s: queries %d .. %d, keys %d .. %d", masks[m], q, q_end, kv, kv_end);
                        drop_shape(&s);
                    }
}

/* What create_block_mask says: reference/block_masks.tsv. */
Test(lists, are_pytorchs)
{
    FILE *file = fopen("09_block_sparse/reference/block_masks.tsv", "r");
    cr_assert(file);
    char line[1000], name[64], picture[512];
    int rows = 0, tokens, block;
    size_t full, partial;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s %d %d %zu %zu %511s", name, &tokens, &block, &full, &partial, picture) != 6)
            continue;
        AttentionShape s = shape_of(name, tokens, tokens, block);
        BlockMask mask = lists_of(&s, NULL, false, false);
        BlockCount c = count_blocks(&mask);
        cr_expect(c.full == full && c.partial == partial, "%s: %zu full, %zu partial", name, c.full,
                  c.partial);
        int n = tokens / block;
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++)
                cr_expect(".o#"[kind_at(&mask, 0, 0, i, j)] == picture[i * (n + 1) + j], "%s: block %d,%d",
                          name, i, j);
        free(mask.listed);
        drop_shape(&s);
        rows++;
    }
    fclose(file);
    cr_expect(rows == 16);
}

Test(lists, a_window_of_256_in_4096_keeps_a_tenth)
{
    AttentionShape s = shape_of("window:256", 4096, 4096, 128);
    BlockMask mask = lists_of(&s, NULL, false, false);
    BlockCount c = count_blocks(&mask);
    /* Row 0 has its partial block, row 1 a full one too, every later row partial, full, partial. */
    cr_expect(c.full == 31 && c.partial == 32 + 30 && c.all == 1024);
    double visited = (double)(c.full + c.partial) * 128 * 128;
    cr_expect(visited / count_pairs(&s) > 1.45 && visited / count_pairs(&s) < 1.55,
              "blocks of 128 visit half as many pairs again: %g", visited / count_pairs(&s));
    free(mask.listed);

    s.block = 16;
    mask = lists_of(&s, NULL, false, false);
    c = count_blocks(&mask);
    visited = (double)(c.full + c.partial) * 16 * 16;
    cr_expect(visited / count_pairs(&s) < 1.07, "blocks of 16 do not: %g", visited / count_pairs(&s));
    free(mask.listed);
}

/* Where N does not divide T, create_block_mask pads and calls the last blocks partial. Here they are full. */
Test(lists, blocks_cut_short_can_be_full)
{
    AttentionShape s = shape_of("none", 1000, 1000, 128);
    BlockMask mask = lists_of(&s, attends, false, false);
    BlockCount c = count_blocks(&mask);
    cr_expect(c.full == 64 && c.partial == 0 && c.all == 64);
    free(mask.listed);
}

Test(lists, one_block_larger_than_the_sequence)
{
    AttentionShape s = shape_of("causal", 5, 9, 1 << 24);
    BlockMask mask = lists_of(&s, NULL, false, false);
    BlockCount c = count_blocks(&mask);
    cr_expect(c.partial == 1 && c.full == 0 && c.all == 1);
    free(mask.listed);
}

Test(lists, dilated_masks_keep_no_full_block)
{
    AttentionShape s = shape_of("dilated:3:200", 1024, 1024, 128);
    BlockMask mask = lists_of(&s, NULL, false, false);
    BlockCount c = count_blocks(&mask);
    cr_expect(c.full == 0 && (double)c.partial / c.all > 0.4, "0.3%% of the pairs lie in %zu of %zu blocks",
              c.partial, c.all);
    cr_expect(count_pairs(&s) / (1024.0 * 1024) < 0.003);
    free(mask.listed);
}

/* ---- A problem, and the kernels on it ---- */

enum { DENSE, SPARSE, SIMD, KERNELS };
static const char *const names[KERNELS] = {"dense-mask", "block-sparse", "simd"};

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv;
} Inputs;

static Inputs set_up(AttentionShape s, int batch, int heads, int head_size)
{
    Inputs p = {.s = s};
    p.s.batch = batch;
    p.s.heads = p.s.kv_heads = heads;
    p.s.head_size = head_size;
    p.s.scale = 1 / sqrtf((float)head_size);
    p.q = allocate_floats(query_count(&p.s));
    p.k = allocate_floats(key_count(&p.s));
    p.v = allocate_floats(key_count(&p.s));
    p.out = allocate_floats(query_count(&p.s));
    p.lse = allocate_floats(lse_count(&p.s));
    p.dout = allocate_floats(query_count(&p.s));
    p.dq = allocate_floats(query_count(&p.s));
    p.dk = allocate_floats(key_count(&p.s));
    p.dv = allocate_floats(key_count(&p.s));
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p.q, query_count(&p.s));
    draw_randn(&stream, p.k, key_count(&p.s));
    draw_randn(&stream, p.v, key_count(&p.s));
    draw_randn(&stream, p.dout, query_count(&p.s));
    return p;
}

static void tear_down(Inputs *p)
{
    float *const owned[] = {p->q, p->k, p->v, p->out, p->lse, p->dout, p->dq, p->dk, p->dv};
    for (int i = 0; i < 9; i++)
        free(owned[i]);
    drop_shape(&p->s);
}

/* mask: its lists, for the book's own masks NULL. */
static void attend(const Inputs *p, int kernel, const BlockMask *mask)
{
    const AttentionShape *s = &p->s;
    BlockMask own = lists_of(s, NULL, false, false);
    memset(p->out, 0x7f, query_count(s) * sizeof(float));
    if (kernel == DENSE) {
        float *weights = allocate_floats(weights_count(s)), *tensor = allocate_floats(dense_mask_floats(s));
        attention_dense_mask(p->out, p->lse, weights, NULL, tensor, p->q, p->k, p->v, s);
        free(weights);
        free(tensor);
    } else if (kernel == SPARSE)
        attention_block_sparse(p->out, p->lse, p->q, p->k, p->v, mask ? mask : &own, s);
    else {
        float *scratch = allocate_floats(block_sparse_scratch(s));
        attention_block_sparse_simd(p->out, p->lse, scratch, p->q, p->k, p->v, mask ? mask : &own, s);
        free(scratch);
    }
    free(own.listed);
}

/* Forward and backward. */
static void differentiate(const Inputs *p, int kernel, const BlockMask *mask)
{
    const AttentionShape *s = &p->s;
    AttentionBackward g = {p->q, p->k, p->v, p->out, p->lse, p->dout, p->dq, p->dk, p->dv, NULL};
    float dbias[64];
    g.dbias = dbias; /* the tests of this file have a bias of 64 keys at most */
    memset(p->dq, 0x7f, query_count(s) * sizeof(float));
    memset(p->dk, 0x7f, key_count(s) * sizeof(float));
    memset(p->dv, 0x7f, key_count(s) * sizeof(float));
    if (kernel == DENSE) {
        float *weights = allocate_floats(weights_count(s)), *tensor = allocate_floats(dense_mask_floats(s));
        float *d_scores = allocate_floats(weights_count(s));
        attention_dense_mask(p->out, p->lse, weights, NULL, tensor, p->q, p->k, p->v, s);
        attention_dense_mask_backward(&g, weights, weights, d_scores, s);
        free(weights);
        free(tensor);
        free(d_scores);
        return;
    }
    attend(p, kernel, mask);
    BlockMask own = lists_of(s, NULL, false, false);
    const BlockMask *used = mask ? mask : &own;
    float *memory = allocate_floats(transposed_mask_floats(s, used->batch > 1, used->heads > 1));
    float *delta = allocate_floats(lse_count(s));
    BlockMask transposed = transpose_in(memory, used);
    if (kernel == SIMD) {
        float *partial = allocate_floats(flash_backward_partials(s));
        float *scratch = allocate_floats(flash_backward_scratch(s));
        attention_block_sparse_simd_backward(&g, delta, partial, scratch, &transposed, s);
        free(partial);
        free(scratch);
    } else
        attention_block_sparse_backward(&g, delta, used, &transposed, s);
    free(memory);
    free(delta);
    free(own.listed);
}

static double largest_difference(const float *ours, const double *expected, size_t count)
{
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        double difference = fabs(ours[i] - expected[i]);
        if (!(difference <= worst))
            worst = difference;
    }
    return worst;
}

static double dot(const float *a, const float *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* The largest difference of dq, dk, dv from those over the allowed pairs, each asked for, in double. */
static double gradient_error(const Inputs *p, MaskPredicate *predicate)
{
    const AttentionShape *s = &p->s;
    int HS = s->head_size, TK = s->key_tokens;
    double *dq = allocate_zeroed(query_count(s), sizeof *dq), *dk = allocate_zeroed(key_count(s), sizeof *dk);
    double *dv = allocate_zeroed(key_count(s), sizeof *dv), *weight = allocate_zeroed(TK, sizeof *weight);
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                size_t at = query_row(s, b, h, t);
                double sum = 0, delta = 0;
                for (int t2 = 0; t2 < TK; t2++) {
                    bool may = predicate(s, b, h, t, t2) && bias_at(s, b, h, t, t2) > -INFINITY;
                    double score = dot(p->q + at, p->k + key_row(s, b, h, t2), HS) * s->scale;
                    sum += weight[t2] = may ? exp(score + bias_at(s, b, h, t, t2)) : 0;
                }
                for (int t2 = 0; t2 < TK; t2++)
                    if (weight[t2] > 0) {
                        weight[t2] /= sum;
                        delta += weight[t2] * dot(p->dout + at, p->v + key_row(s, b, h, t2), HS);
                    }
                for (int t2 = 0; t2 < TK; t2++) {
                    size_t kv = key_row(s, b, h, t2);
                    double d = weight[t2] > 0 ? weight[t2] * (dot(p->dout + at, p->v + kv, HS) - delta) : 0;
                    for (int c = 0; c < HS && weight[t2] > 0; c++) {
                        dq[at + c] += s->scale * d * p->k[kv + c];
                        dk[kv + c] += s->scale * d * p->q[at + c];
                        dv[kv + c] += weight[t2] * p->dout[at + c];
                    }
                }
            }
    double worst =
        fmax(largest_difference(p->dq, dq, query_count(s)),
             fmax(largest_difference(p->dk, dk, key_count(s)), largest_difference(p->dv, dv, key_count(s))));
    double *const owned[] = {dq, dk, dv, weight};
    for (int i = 0; i < 4; i++)
        free(owned[i]);
    return worst;
}

/* The largest difference from softmax over the allowed pairs, each asked for, in double. */
static double error_against(const Inputs *p, MaskPredicate *predicate)
{
    const AttentionShape *s = &p->s;
    int HS = s->head_size;
    double worst = 0, *out = allocate_zeroed(HS, sizeof *out);
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int t = 0; t < s->tokens; t++) {
                double sum = 0;
                memset(out, 0, HS * sizeof *out);
                for (int t2 = 0; t2 < s->key_tokens; t2++) {
                    if (!predicate(s, b, h, t, t2))
                        continue;
                    double score = 0;
                    for (int c = 0; c < HS; c++)
                        score += (double)p->q[query_row(s, b, h, t) + c] * p->k[key_row(s, b, h, t2) + c];
                    double weight = exp(score * s->scale + bias_at(s, b, h, t, t2));
                    sum += weight;
                    for (int c = 0; c < HS; c++)
                        out[c] += weight * p->v[key_row(s, b, h, t2) + c];
                }
                double lse = p->lse[lse_index(s, b, h, t)];
                if (!(sum == 0 ? lse == -INFINITY : fabs(lse - log(sum)) <= 1e-5))
                    worst = INFINITY;
                for (int c = 0; c < HS; c++) {
                    double expected = sum == 0 ? 0 : out[c] / sum;
                    double difference = fabs(p->out[query_row(s, b, h, t) + c] - expected);
                    if (!(difference <= worst))
                        worst = difference;
                }
            }
    free(out);
    return worst;
}

/* ---- Predicates of one's own ---- */

/* A window that is wider in each head and starts later in each batch entry, but key 0 is always seen. */
static bool window_by_head(const AttentionShape *s, int b, int h, int q, int kv)
{
    int distance = q + s->key_tokens - s->tokens - kv - 3 * b;
    return kv == 0 || (distance >= 0 && distance < 8 << h);
}

/* Every other key, from the odd queries only. */
static bool checkers(const AttentionShape *s, int b, int h, int q, int kv)
{
    (void)s, (void)b, (void)h;
    return q % 2 && kv % 2;
}

Test(predicates, of_batch_entry_and_head)
{
    for (int n = 0; n < BLOCKS; n++) {
        Inputs p = set_up(shape_of("none", 70, 90, blocks[n]), 2, 3, 8);
        BlockMask mask = lists_of(&p.s, window_by_head, true, true);
        expect_right_lists(&mask, window_by_head, &p.s, "window_by_head");
        attend(&p, SPARSE, &mask);
        double error = error_against(&p, window_by_head);
        cr_expect(error <= 2e-6, "blocks of %d: off by %g", blocks[n], error);
        free(mask.listed);
        tear_down(&p);
    }
}

Test(predicates, rows_without_a_key)
{
    Inputs p = set_up(shape_of("none", 40, 40, 8), 1, 2, 8);
    BlockMask mask = lists_of(&p.s, checkers, false, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, checkers) <= 2e-6);
    cr_expect(p.lse[0] == -INFINITY && p.out[0] == 0);
    free(mask.listed);
    tear_down(&p);
}

/* by_head false: everyone gets the lists of head 0, and what is in none of those is never seen. */
Test(predicates, that_look_at_the_head_need_lists_for_each)
{
    Inputs p = set_up(shape_of("none", 70, 90, 16), 2, 3, 8);
    BlockMask mask = lists_of(&p.s, window_by_head, true, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, window_by_head) > 0.1);
    free(mask.listed);
    tear_down(&p);
}

/* The sparse kernel asks the mask's predicate and not the shape. */
Test(predicates, are_asked_in_place_of_the_shapes_mask)
{
    Inputs p = set_up(shape_of("causal", 40, 40, 16), 1, 1, 8);
    BlockMask mask = lists_of(&p.s, checkers, false, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, checkers) <= 2e-6);
    free(mask.listed);
    tear_down(&p);
}

/* ---- Gradients ---- */

/* The same blocks from the other side, ascending too. */
Test(gradients, transposed_lists_hold_the_same_blocks)
{
    for (int n = 0; n < BLOCKS; n++) {
        AttentionShape s = shape_of("none", 70, 130, blocks[n]);
        s.batch = 2;
        s.heads = s.kv_heads = 3;
        BlockMask mask = lists_of(&s, window_by_head, true, true);
        size_t floats = transposed_mask_floats(&s, true, true);
        float *memory = allocate_floats(floats);
        BlockMask turned = transpose_in(memory, &mask);
        cr_assert(turned.count + 6 * mask.key_blocks == (int *)memory + floats);
        BlockCount there = count_blocks(&mask), here = count_blocks(&turned);
        cr_expect(there.full == here.full && there.partial == here.partial && there.all == here.all);
        for (int b = 0; b < 2; b++)
            for (int h = 0; h < 3; h++)
                for (int j = 0; j < mask.key_blocks; j++) {
                    int count;
                    const ListedBlock *list = block_list(&turned, b, h, j, &count);
                    for (int i = 0; i < count; i++) {
                        cr_assert(i == 0 || list[i - 1].key_block < list[i].key_block, "not ascending");
                        cr_assert(kind_at(&mask, b, h, list[i].key_block, j) == list[i].kind);
                    }
                }
        free(memory);
        free(mask.listed);
    }
}

Test(gradients, of_a_predicate_of_batch_entry_and_head)
{
    for (int n = 0; n < BLOCKS; n++) {
        Inputs p = set_up(shape_of("none", 70, 130, blocks[n]), 2, 3, 8);
        BlockMask mask = lists_of(&p.s, window_by_head, true, true);
        differentiate(&p, SPARSE, &mask);
        double error = gradient_error(&p, window_by_head);
        cr_expect(error <= 5e-6, "blocks of %d: off by %g", blocks[n], error);
        free(mask.listed);
        tear_down(&p);
    }
}

Test(gradients, of_rows_without_a_key_are_zero)
{
    static const int lengths[] = {20, 0};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("causal", 50, 20, 16), 2, 1, 8);
        p.s.lengths = lengths;
        differentiate(&p, kernel, NULL);
        double error = gradient_error(&p, attends);
        cr_expect(error <= 5e-6, "%s: off by %g", names[kernel], error);
        for (int i = 0; i < 30 * 8; i++)
            cr_expect(p.dq[i] == 0, "%s", names[kernel]);
        for (int i = 20 * 8; i < 40 * 8; i++)
            cr_expect(p.dk[i] == 0 && p.dv[i] == 0, "%s: a key that nobody sees", names[kernel]);
        tear_down(&p);
    }
}

/* NaN in the keys of an empty block, and in the queries of another: who does not meet them has a gradient. */
Test(gradients, never_load_empty_blocks)
{
    for (int kernel = 0; kernel <= SPARSE; kernel++) {
        Inputs p = set_up(shape_of("window:10", 64, 64, 16), 1, 1, 8);
        for (int i = 0; i < 16 * 8; i++)
            p.k[i] = p.v[i] = NAN; /* seen by rows 0 .. 24 */
        for (int i = 48 * 8; i < 64 * 8; i++)
            p.q[i] = p.dout[i] = NAN; /* who see keys 39 and later */
        differentiate(&p, kernel, NULL);
        bool finite = true;
        for (int c = 32 * 8; c < 48 * 8; c++)
            finite = finite && isfinite(p.dq[c]);
        for (int c = 25 * 8; c < 32 * 8; c++) /* keys 16 .. 24 meet rows whose delta is NaN */
            finite = finite && isfinite(p.dk[c]) && isfinite(p.dv[c]);
        cr_expect(finite == (kernel != DENSE), "%s", names[kernel]);
        cr_expect(isnan(p.dq[15 * 8]) && isnan(p.dv[50 * 8]) && isnan(p.dk[50 * 8]), "%s hides NaN",
                  names[kernel]);
        tear_down(&p);
    }
}

/* The same for the fast tiles, which are larger: 48 queries meet 192 keys at once. */
Test(gradients, fast_tiles_never_load_empty_blocks)
{
    Inputs p = set_up(shape_of("window:10", 768, 768, 64), 1, 1, 8);
    for (int i = 0; i < 192 * 8; i++)
        p.k[i] = p.v[i] = NAN; /* seen by rows 0 .. 200, whose tiles end at 240 */
    for (int i = 576 * 8; i < 768 * 8; i++)
        p.q[i] = p.dout[i] = NAN; /* who see keys 567 and later, whose tiles begin at 384 */
    differentiate(&p, SIMD, NULL);
    for (int t = 240; t < 576; t++)
        cr_assert(isfinite(p.dq[t * 8]), "row %d", t);
    for (int t2 = 241; t2 < 384; t2++)
        cr_assert(isfinite(p.dk[t2 * 8]) && isfinite(p.dv[t2 * 8]), "key %d", t2);
    cr_expect(isnan(p.dq[15 * 8]) && isnan(p.dv[700 * 8]) && isnan(p.dk[700 * 8]), "hides NaN");
    tear_down(&p);
}

/* Several tiles of keys, and lists that jump ahead into the middle of one. */
Test(gradients, of_fast_tiles_over_many_lists)
{
    static const char *const long_masks[] = {"none",
                                             "causal",
                                             "window:100",
                                             "prefix:300",
                                             "local-global:40:7",
                                             "dilated:5:9",
                                             "documents:100,250,350"};
    static const int long_blocks[] = {16, 50, 128};
    for (int m = 0; m < 7; m++)
        for (int n = 0; n < 3; n++) {
            Inputs p = set_up(shape_of(long_masks[m], 700, 700, long_blocks[n]), 1, 1, 8);
            differentiate(&p, SIMD, NULL);
            double error = gradient_error(&p, attends);
            cr_expect(error <= 1e-5, "%s, blocks of %d: off by %g", long_masks[m], long_blocks[n], error);
            tear_down(&p);
        }
}

/* 0 times NaN is NaN: a product over a whole partial block would let in what its mask forbids. */
Test(gradients, forbidden_pairs_of_a_partial_block_stay_out)
{
    Inputs p = set_up(shape_of("causal", 64, 64, 64), 1, 1, 8);
    for (int i = 40 * 8; i < 64 * 8; i++)
        p.k[i] = p.v[i] = NAN;
    differentiate(&p, SPARSE, NULL);
    for (int t = 0; t < 64; t++)
        cr_expect((isnan(p.dq[t * 8]) != 0) == (t >= 40), "row %d", t);
    tear_down(&p);
}

/* The same where the bias forbids, in a full block. */
Test(gradients, what_a_bias_forbids_stays_out)
{
    float bias[64];
    for (int t2 = 0; t2 < 64; t2++)
        bias[t2] = t2 % 3 ? 0.1f * t2 : -INFINITY;
    Inputs p = set_up(shape_of("none", 64, 64, 16), 1, 2, 8);
    p.s.bias = bias;
    p.s.bias_stride[3] = 1;
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < 8; c++)
            p.v[key_row(&p.s, 0, h, 3) + c] = NAN;
    differentiate(&p, SPARSE, NULL);
    double error = gradient_error(&p, attends);
    cr_expect(error <= 5e-6, "off by %g", error);
    p.dout[0] = NAN; /* of query 0, which key 0 does not meet and key 1 does */
    differentiate(&p, SPARSE, NULL);
    cr_expect(p.dv[0] == 0 && isnan(p.dv[8]));
    tear_down(&p);
}

static float *gradients_of(const Inputs *p)
{
    size_t queries = query_count(&p->s), keys = key_count(&p->s);
    float *all = allocate_floats(queries + 2 * keys);
    memcpy(all, p->dq, queries * sizeof *all);
    memcpy(all + queries, p->dk, keys * sizeof *all);
    memcpy(all + queries + keys, p->dv, keys * sizeof *all);
    return all;
}

/* With dropout too, which is drawn again in each pass. */
Test(gradients, do_not_change_with_the_size_of_a_block)
{
    for (int dropout = 0; dropout < 2; dropout++) {
        float *first = NULL;
        for (int n = -1; n < BLOCKS; n++) {
            Inputs p = set_up(shape_of("local-global:20:5", 90, 130, n < 0 ? 130 : blocks[n]), 2, 2, 8);
            p.s.dropout = 0.3f * dropout;
            p.s.dropout_seed = 7;
            differentiate(&p, SPARSE, NULL);
            float *now = gradients_of(&p);
            for (size_t i = 0; first && i < query_count(&p.s) + 2 * key_count(&p.s); i++)
                cr_assert(fabs((double)now[i] - first[i]) <= 5e-6, "blocks of %d: %g and %g", blocks[n],
                          (double)now[i], (double)first[i]);
            if (first)
                free(now);
            else
                first = now;
            tear_down(&p);
        }
        free(first);
    }
}

/* ---- Documents ---- */

Test(documents, give_what_each_sequence_gives_alone)
{
    static const int lengths[] = {20, 1, 70, 49};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("documents:20,1,70,49", 0, 0, 16), 1, 2, 8);
        attend(&p, kernel, NULL);
        for (int n = 0, first = 0; n < 4; first += lengths[n++]) {
            Inputs alone = set_up(shape_of("causal", lengths[n], lengths[n], 16), 1, 2, 8);
            for (int h = 0; h < 2; h++) {
                size_t from = query_row(&p.s, 0, h, first), to = query_row(&alone.s, 0, h, 0);
                size_t bytes = (size_t)lengths[n] * 8 * sizeof(float);
                memcpy(alone.q + to, p.q + from, bytes);
                memcpy(alone.k + to, p.k + from, bytes);
                memcpy(alone.v + to, p.v + from, bytes);
            }
            attend(&alone, SPARSE, NULL);
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < lengths[n] * 8; i++) {
                    double difference = fabs((double)p.out[query_row(&p.s, 0, h, first) + i] -
                                             alone.out[query_row(&alone.s, 0, h, 0) + i]);
                    cr_assert(difference <= 2e-6, "%s, document %d: off by %g", names[kernel], n, difference);
                }
            tear_down(&alone);
        }
        tear_down(&p);
    }
}

/* ---- Traps ---- */

/* T = 50, TK = 20: the first 30 queries stand before all keys. Batch entry 1 has no keys at all. */
Test(traps, nothing_allowed_gives_zeros)
{
    static const int lengths[] = {20, 0};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("causal", 50, 20, 16), 2, 1, 8);
        p.s.lengths = lengths;
        attend(&p, kernel, NULL);
        cr_expect(error_against(&p, attends) <= 2e-6, "%s", names[kernel]);
        for (int b = 0; b < 2; b++)
            for (int t = 0; t < (b ? 50 : 30); t++)
                cr_expect(p.lse[lse_index(&p.s, b, 0, t)] == -INFINITY &&
                              p.out[query_row(&p.s, b, 0, t)] == 0,
                          "%s, row %d", names[kernel], t);
        tear_down(&p);
    }
}

/* The whole point, shown with poison: keys in no list may hold NaN. Rows 32 .. 63 see keys 23 and later. */
Test(traps, empty_blocks_are_never_loaded)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("window:10", 64, 64, 16), 1, 1, 8);
        for (int i = 0; i < 16 * 8; i++)
            p.k[i] = p.v[i] = NAN;
        attend(&p, kernel, NULL);
        bool finite = true;
        for (int t = 32; t < 64; t++)
            for (int c = 0; c < 8; c++)
                finite = finite && isfinite(p.out[t * 8 + c]);
        cr_expect(finite == (kernel != DENSE), "%s: adding -inf to a score of NaN does not forbid it",
                  names[kernel]);
        cr_expect(isnan(p.out[15 * 8]), "%s: row 15 sees NaN, and must say so", names[kernel]);
        tear_down(&p);
    }
}

/* Of a partial block, the pairs that are forbidden weigh nothing, whatever they hold. */
Test(traps, forbidden_pairs_of_a_partial_block_stay_out)
{
    Inputs p = set_up(shape_of("causal", 64, 64, 64), 1, 1, 8);
    for (int i = 40 * 8; i < 64 * 8; i++)
        p.k[i] = p.v[i] = NAN;
    attend(&p, SPARSE, NULL);
    for (int t = 0; t < 64; t++)
        cr_expect((isnan(p.out[t * 8]) != 0) == (t >= 40), "row %d", t);
    tear_down(&p);
}

/* A block is full for the mask. The bias may still forbid a pair in it. */
Test(traps, a_bias_of_minus_infinity_in_a_full_block)
{
    float bias[64];
    for (int t2 = 0; t2 < 64; t2++)
        bias[t2] = t2 % 3 ? 0.1f * t2 : -INFINITY;
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("none", 64, 64, 16), 1, 2, 8);
        p.s.bias = bias;
        p.s.bias_stride[3] = 1;
        attend(&p, kernel, NULL);
        double error = error_against(&p, attends);
        cr_expect(error <= 2e-6, "%s: off by %g", names[kernel], error);
        tear_down(&p);
    }
}

/* Dropout falls on pairs, not on places in a list: whatever the blocks, the same pairs are dropped. */
Test(traps, the_size_of_a_block_changes_nothing)
{
    for (int kernel = SPARSE; kernel < KERNELS; kernel++)
        for (int dropout = 0; dropout < 2; dropout++) {
            Inputs first = set_up(shape_of("local-global:20:5", 90, 130, 130), 2, 2, 8);
            first.s.dropout = 0.3f * dropout;
            first.s.dropout_seed = 7;
            attend(&first, kernel, NULL);
            for (int n = 0; n < BLOCKS; n++) {
                Inputs p = set_up(shape_of("local-global:20:5", 90, 130, blocks[n]), 2, 2, 8);
                p.s.dropout = first.s.dropout;
                p.s.dropout_seed = 7;
                attend(&p, kernel, NULL);
                for (size_t i = 0; i < query_count(&p.s); i++) {
                    double difference = fabs((double)p.out[i] - first.out[i]);
                    cr_assert(difference <= 2e-6, "%s, blocks of %d: off by %g", names[kernel], blocks[n],
                              difference);
                }
                tear_down(&p);
            }
            tear_down(&first);
        }
}

/* Lists of entry 0 for all entries would let entry 1 see 40 keys that are padding. */
Test(traps, lengths_need_lists_for_each_batch_entry)
{
    static const int lengths[] = {64, 24};
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("none", 64, 64, 8), 2, 1, 8);
        p.s.lengths = lengths;
        attend(&p, kernel, NULL);
        double error = error_against(&p, attends);
        cr_expect(error <= 2e-6, "%s: off by %g", names[kernel], error);
        tear_down(&p);
    }
}

static const Kernel *find_kernel(const char *name)
{
    const Kernel *kernel = chapter.kernels;
    while (kernel->name && strcmp(kernel->name, name) != 0)
        kernel++;
    cr_assert(kernel->name);
    return kernel;
}

static double workspace_bytes(const char *kernel, int tokens)
{
    AttentionShape s = shape_of("window:256", tokens, tokens, 128);
    s.heads = s.kv_heads = 8;
    s.head_size = 64;
    size_t floats[MAX_BUFFERS];
    int buffers = find_kernel(kernel)->workspace(&s, floats);
    double bytes = 0;
    for (int i = 0; i < buffers; i++)
        bytes += 4.0 * (double)floats[i];
    return bytes;
}

/* Lists of (T / N)^2 blocks, one set for all heads, and scratch that does not grow with T at all. */
Test(traps, no_kernel_with_lists_holds_a_matrix)
{
    for (int tokens = 4096; tokens <= 131072; tokens *= 2) {
        double rows = tokens / 128, lists = 4 * rows + 8 * rows * rows;
        cr_expect(workspace_bytes("block-sparse", tokens) == lists);
        cr_expect(workspace_bytes("simd", tokens) - lists ==
                  workspace_bytes("simd", 4096) - workspace_bytes("block-sparse", 4096));
        cr_expect(workspace_bytes("dense-mask", tokens) == 4.0 * tokens * tokens);
    }
}

/* What backward adds: the lists of the key blocks, and one number a row. */
Test(gradients, need_no_matrix)
{
    for (int tokens = 4096; tokens <= 131072; tokens *= 2) {
        AttentionShape s = shape_of("window:256", tokens, tokens, 128);
        s.heads = s.kv_heads = 8;
        s.head_size = 64;
        size_t floats[MAX_BUFFERS], rows = tokens / 128;
        cr_expect(find_kernel("block-sparse")->backward_workspace(&s, floats) == 2);
        cr_expect(floats[0] == rows + 2 * rows * rows && floats[1] == (size_t)8 * tokens);
        cr_expect(find_kernel("simd")->backward_workspace(&s, floats) == 4);
        cr_expect(floats[0] == rows + 2 * rows * rows && floats[1] == (size_t)8 * tokens);
        cr_expect(floats[3] == 3 * query_count(&s) && floats[2] == flash_backward_scratch(&s));
        cr_expect(find_kernel("dense-mask")->backward_workspace(&s, floats) == 1 &&
                  floats[0] == (size_t)8 * tokens * tokens);
    }
}

#ifdef _OPENMP
Test(gradients, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("local-global:20:5", 200, 230, 16), 2, 3, 24);
        float *alone = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            differentiate(&p, kernel, NULL);
            float *now = gradients_of(&p);
            size_t bytes = (query_count(&p.s) + 2 * key_count(&p.s)) * sizeof *now;
            cr_expect(!alone || memcmp(alone, now, bytes) == 0, "%s on %d threads", names[kernel], threads);
            if (alone)
                free(now);
            else
                alone = now;
        }
        free(alone);
        tear_down(&p);
    }
}

Test(traps, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Inputs p = set_up(shape_of("local-global:20:5", 200, 230, 16), 2, 3, 24);
        size_t bytes = query_count(&p.s) * sizeof(float);
        float *alone = allocate_floats(query_count(&p.s));
        omp_set_num_threads(1);
        attend(&p, kernel, NULL);
        memcpy(alone, p.out, bytes);
        for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            attend(&p, kernel, NULL);
            cr_expect(memcmp(alone, p.out, bytes) == 0, "%s on %d threads", names[kernel], threads);
        }
        free(alone);
        tear_down(&p);
    }
}
#endif

/* ---- The module ---- */

/* Implementation 9 draws and computes what 5 does: x, parameters, out and gradients are PyTorch's values for 5. */
Test(flex, gives_what_pytorch_gives)
{
    if (getenv("SMALL"))
        return;
    char *argv[] = {"run", "--batch", "8",  "--tokens", "1024", "--embed",
                    "768", "--heads", "12", "--pass",   "both"};
    Options options;
    parse_options(&options, 11, argv);
    Run *run = allocate_zeroed(1, sizeof *run);
    Refusal refusal = open_run(run, &chapter, find_kernel("flex"), &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s", refusal.reason);
    forward_run(run);
    backward_run(run);
    const char *wrong = check_reference(run, "09_block_sparse/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s", wrong);
    close_run(run);
    free(run);
    free_options(&options);
}
