#include "test_problem.h"
#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "memory.h"
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Shapes and their lists ---- */

AttentionShape shape_of(const char *mask, int tokens, int key_tokens, int block)
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

void drop_shape(AttentionShape *s)
{
    free((int *)s->mask.document);
}

BlockMask lists_of(const AttentionShape *s, MaskPredicate *predicate, bool by_batch, bool by_head)
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

BlockKind kind_at(const BlockMask *mask, int b, int h, int i, int j)
{
    int count;
    const ListedBlock *list = block_list(mask, b, h, i, &count);
    for (int n = 0; n < count; n++)
        if (list[n].key_block == j)
            return list[n].kind;
    return BLOCK_EMPTY;
}

long allowed(const AttentionShape *s, MaskPredicate *predicate, int b, int h, int q, int q_end, int kv,
             int kv_end)
{
    long pairs = 0;
    for (int t = q; t < q_end; t++)
        for (int t2 = kv; t2 < kv_end; t2++)
            pairs += predicate(s, b, h, t, t2);
    return pairs;
}

BlockKind kind_of_count(long pairs, long all)
{
    return pairs == 0 ? BLOCK_EMPTY : pairs == all ? BLOCK_FULL : BLOCK_PARTIAL;
}

void expect_right_lists(const BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s,
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

const char *const masks[MASKS] = {"none",
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
const int block_sizes[BLOCKS] = {1, 2, 3, 5, 8, 16, 32, 33, 64, 89, 90, 91, 1000};

bool window_by_head(const AttentionShape *s, int b, int h, int q, int kv)
{
    int distance = q + s->key_tokens - s->tokens - kv - 3 * b;
    return kv == 0 || (distance >= 0 && distance < 8 << h);
}

bool checkers(const AttentionShape *s, int b, int h, int q, int kv)
{
    (void)s, (void)b, (void)h;
    return q % 2 && kv % 2;
}

/* ---- A problem, and the kernels on it ---- */

const char *const names[KERNELS] = {"dense-mask", "block-sparse", "simd", "dense-mask on simt",
                                    "block-sparse on simt"};

Inputs set_up_grouped(AttentionShape s, int batch, int heads, int kv_heads, int head_size)
{
    Inputs p = {.s = s};
    p.s.batch = batch;
    p.s.heads = heads;
    p.s.kv_heads = kv_heads;
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
    p.dbias = allocate_floats((size_t)p.s.tokens * p.s.key_tokens);
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, p.q, query_count(&p.s));
    draw_randn(&stream, p.k, key_count(&p.s));
    draw_randn(&stream, p.v, key_count(&p.s));
    draw_randn(&stream, p.dout, query_count(&p.s));
    return p;
}

Inputs set_up(AttentionShape s, int batch, int heads, int head_size)
{
    return set_up_grouped(s, batch, heads, heads, head_size);
}

void tear_down(Inputs *p)
{
    float *const owned[] = {p->q, p->k, p->v, p->out, p->lse, p->dout, p->dq, p->dk, p->dv, p->dbias};
    for (int i = 0; i < 10; i++)
        free(owned[i]);
    drop_shape(&p->s);
}

/* ---- On the CPU stand-in for a GPU ---- */

static const char *const device_names[KERNELS] = {
    [DENSE_SIMT] = "dense-mask", [SPARSE_SIMT] = "block-sparse"};
static Kernel simt_rows[MAX_DEVICE_ROWS];

int kernels_here(void)
{
    return chapter_on(&chapter, DEVICE_SIMT, simt_rows).kernels->name ? KERNELS : DENSE_SIMT;
}

static void allocate_all(float *buffer[MAX_BUFFERS], const AttentionShape *s,
                         int (*sizes)(const AttentionShape *, size_t *))
{
    size_t floats[MAX_BUFFERS];
    for (int i = sizes(s, floats) - 1; i >= 0; i--)
        buffer[i] = allocate_floats(floats[i]);
}

static void run_on_stand_in(const Inputs *p, int which, bool backward)
{
    const AttentionShape *s = &p->s;
    Chapter simt = chapter_on(&chapter, DEVICE_SIMT, simt_rows);
    const Kernel *kernel = kernel_named(&simt, device_names[which]);
    float *weights = which == DENSE_SIMT ? allocate_floats(weights_count(s)) : NULL;
    Tensors t = {.q = p->q,
                 .k = p->k,
                 .v = p->v,
                 .out = p->out,
                 .lse = p->lse,
                 .weights = weights,
                 .dout = p->dout,
                 .dq = p->dq,
                 .dk = p->dk,
                 .dv = p->dv,
                 .dbias = p->dbias};
    allocate_all(t.workspace, s, kernel->workspace);
    kernel->forward(&t, s);
    if (backward) {
        allocate_all(t.backward_workspace, s, kernel->backward_workspace);
        kernel->backward(&t, s);
    }
    free(weights);
    for (int i = 0; i < MAX_BUFFERS; i++) {
        free(t.workspace[i]);
        free(t.backward_workspace[i]);
    }
}

/* ---- All of them ---- */

void attend(const Inputs *p, int kernel, const BlockMask *mask)
{
    const AttentionShape *s = &p->s;
    BlockMask own = lists_of(s, NULL, false, false);
    memset(p->out, 0x7f, query_count(s) * sizeof(float));
    if (kernel >= DENSE_SIMT)
        run_on_stand_in(p, kernel, false);
    else if (kernel == DENSE) {
        float *weights = allocate_floats(weights_count(s)), *tensor = allocate_floats(dense_mask_floats(s));
        attention_dense_mask(p->out, p->lse, weights, NULL, tensor, p->q, p->k, p->v, s);
        free(weights);
        free(tensor);
    } else if (kernel == SPARSE)
        attention_block_sparse(p->out, p->lse, p->q, p->k, p->v, mask ? mask : &own, s);
    else {
        float *scratch = allocate_floats(flash_view_scratch(s));
        attention_block_sparse_simd(p->out, p->lse, scratch, p->q, p->k, p->v, mask ? mask : &own, s);
        free(scratch);
    }
    free(own.listed);
}

void differentiate(const Inputs *p, int kernel, const BlockMask *mask)
{
    const AttentionShape *s = &p->s;
    AttentionBackward g = {p->q, p->k, p->v, p->out, p->lse, p->dout, p->dq, p->dk, p->dv, p->dbias};
    memset(p->dq, 0x7f, query_count(s) * sizeof(float));
    memset(p->dk, 0x7f, key_count(s) * sizeof(float));
    memset(p->dv, 0x7f, key_count(s) * sizeof(float));
    if (kernel >= DENSE_SIMT) {
        run_on_stand_in(p, kernel, true);
        return;
    }
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
        float *scratch = allocate_floats(flash_backward_scratch(s));
        attention_block_sparse_simd_backward(&g, scratch, &transposed, s);
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
    for (size_t i = 0; i < count; i++)
        worst = worse(worst, fabs(ours[i] - expected[i]));
    return worst;
}

static double dot(const float *a, const float *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

double gradient_error(const Inputs *p, MaskPredicate *predicate)
{
    const AttentionShape *s = &p->s;
    int HS = s->head_size, TK = s->key_tokens;
    double *dq = allocate_zeroed(query_count(s), sizeof *dq), *dk = allocate_zeroed(key_count(s), sizeof *dk);
    double *dv = allocate_zeroed(key_count(s), sizeof *dv), *weight = allocate_zeroed(TK, sizeof *weight);
    const size_t *stride = s->bias_stride; /* of a bias for all batch entries and heads */
    size_t numbers = s->bias ? (s->tokens - 1) * stride[2] + (TK - 1) * stride[3] + 1 : 0;
    double *dbias = allocate_zeroed(numbers + 1, sizeof *dbias);
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
                    if (s->bias)
                        dbias[t * stride[2] + t2 * stride[3]] += d;
                    for (int c = 0; c < HS && weight[t2] > 0; c++) {
                        dq[at + c] += s->scale * d * p->k[kv + c];
                        dk[kv + c] += s->scale * d * p->q[at + c];
                        dv[kv + c] += weight[t2] * p->dout[at + c];
                    }
                }
            }
    double worst = 0;
    const double error[] = {
        largest_difference(p->dq, dq, query_count(s)), largest_difference(p->dk, dk, key_count(s)),
        largest_difference(p->dv, dv, key_count(s)), largest_difference(p->dbias, dbias, numbers)};
    for (int i = 0; i < 4; i++)
        worst = worse(worst, error[i]);
    double *const owned[] = {dq, dk, dv, weight, dbias};
    for (int i = 0; i < 5; i++)
        free(owned[i]);
    return worst;
}

double error_against(const Inputs *p, MaskPredicate *predicate)
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
                    worst = worse(worst, fabs(p->out[query_row(s, b, h, t) + c] - expected));
                }
            }
    free(out);
    return worst;
}

float *gradients_of(const Inputs *p)
{
    size_t queries = query_count(&p->s), keys = key_count(&p->s);
    float *all = allocate_floats(queries + 2 * keys);
    memcpy(all, p->dq, queries * sizeof *all);
    memcpy(all + queries, p->dk, keys * sizeof *all);
    memcpy(all + queries + keys, p->dv, keys * sizeof *all);
    return all;
}
