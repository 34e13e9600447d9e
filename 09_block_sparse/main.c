/* Chapter 9: block masks. Its kernels, its story, and the masks' pictures. */
#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "benchmark.h"
#include "block_sparse.h"
#include "chapter.h"
#include "error.h"
#include "memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Kernels ---- */

/* The mask and, with dropout, the weights before it. */
static int workspace_dense_mask(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = dense_mask_floats(s);
    floats[1] = weights_count(s);
    return s->dropout > 0 ? 2 : 1;
}

static void forward_dense_mask(const Tensors *t, const AttentionShape *s)
{
    attention_dense_mask(t->out, t->lse, t->weights, t->workspace[1], t->workspace[0], t->q, t->k, t->v, s);
}

static AttentionBackward gradients(const Tensors *t)
{
    return (AttentionBackward){t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
}

static int d_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return 1;
}

static void backward_dense_mask(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = gradients(t);
    attention_dense_mask_backward(&g, t->weights, s->dropout > 0 ? t->workspace[1] : t->weights,
                                  t->backward_workspace[0], s);
}

enum { LISTS, SCRATCH, QKV, CONTEXT, LSE }; /* workspace of the others */
enum { TRANSPOSED, DELTA };                 /* and what block_sparse needs for its backward pass; */
enum { D_SCRATCH = 1, D_QKV, D_CONTEXT };   /* the others, in place of delta */

static int workspace_block_sparse(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[LISTS] = block_mask_floats(s, false, false);
    return 1;
}

static int workspace_simd(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[LISTS] = block_mask_floats(s, false, false);
    floats[SCRATCH] = flash_view_scratch(s);
    return 2;
}

static int workspace_flex(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t tokens = (size_t)s->batch * s->tokens;
    workspace_simd(s, floats);
    floats[QKV] = tokens * flash_packed_step(s);
    floats[CONTEXT] = tokens * s->embed_out;
    floats[LSE] = lse_count(s);
    return 5;
}

static int backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[TRANSPOSED] = transposed_mask_floats(s, false, false);
    floats[DELTA] = lse_count(s);
    return 2;
}

static int backward_workspace_simd(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[TRANSPOSED] = transposed_mask_floats(s, false, false);
    floats[D_SCRATCH] = flash_backward_scratch(s);
    return 2;
}

static int backward_workspace_flex(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t tokens = (size_t)s->batch * s->tokens;
    backward_workspace_simd(s, floats);
    floats[D_QKV] = tokens * flash_packed_step(s);
    floats[D_CONTEXT] = tokens * s->embed_out;
    return 4;
}

/* The lists are made anew in each call: what they cost is in the time. */
static BlockMask lists(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = block_mask_in(t->workspace[LISTS], s, false, false);
    fill_from_closed_form(&mask, s);
    return mask;
}

static void forward_block_sparse(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    attention_block_sparse(t->out, t->lse, t->q, t->k, t->v, &mask, s);
}

/* The lists again, which is what forward left there, and once from the side of the keys. */
static void backward_block_sparse(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s), transposed = transpose_in(t->backward_workspace[TRANSPOSED], &mask);
    AttentionBackward g = gradients(t);
    attention_block_sparse_backward(&g, t->backward_workspace[DELTA], &mask, &transposed, s);
}

static void forward_simd(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    attention_block_sparse_simd(t->out, t->lse, t->workspace[SCRATCH], t->q, t->k, t->v, &mask, s);
}

static void backward_simd(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace;
    BlockMask mask = lists(t, s), transposed = transpose_in(d[TRANSPOSED], &mask);
    AttentionBackward g = gradients(t);
    attention_block_sparse_simd_backward(&g, d[D_SCRATCH], &transposed, s);
}

static void parameters_flex(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "qkv", 3 * s->embed_out, s->embed, false);
    add_linear(p, "proj", s->embed_out, s->embed_out, true);
}

static void forward_flex(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    flex_attention(t->out, t->workspace[QKV], t->workspace[CONTEXT], t->workspace[LSE], t->workspace[SCRATCH],
                   t->x, t->parameter[0], t->parameter[1], t->parameter[2], &mask, s);
}

static void backward_flex(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s), transposed = transpose_in(t->backward_workspace[TRANSPOSED], &mask);
    float *const *d = t->backward_workspace;
    flex_attention_backward(t->dx, t->d_parameter[0], t->d_parameter[1], t->d_parameter[2], d[D_QKV],
                            d[D_CONTEXT], d[D_SCRATCH], t->dout, t->workspace[QKV], t->workspace[CONTEXT],
                            t->workspace[LSE], t->x, t->parameter[0], t->parameter[1], &transposed, s);
}

static void describe_flex(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                          const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    size_t third = (size_t)s->embed_out * s->embed;
    oracle_heads(query, key, value, w[0], w[0] + third, w[0] + 2 * third, s);
    module->output[0] = oracle_linear(w[1], w[2], s->embed_out);
    module->outputs = 1;
}

static const char *one_kv_head_each(const AttentionShape *s)
{
    return s->kv_heads == s->heads ? NULL : "takes as many --kv-heads as --heads";
}

static const Kernel kernels[] = {
    {.name = "dense-mask",
     .what = "the mask as a T x TK tensor, added to all the scores",
     .takes = TAKES_QKV,
     .forward = forward_dense_mask,
     .backward = backward_dense_mask,
     .workspace = workspace_dense_mask,
     .backward_workspace = d_scores,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .grouped = true},
    {.name = "block-sparse",
     .what = "online softmax over the listed blocks",
     .takes = TAKES_QKV,
     .forward = forward_block_sparse,
     .backward = backward_block_sparse,
     .workspace = workspace_block_sparse,
     .backward_workspace = backward_workspace,
     .dropout = DROPOUT_POSITION,
     .grouped = true,
     .blocked = true},
    {.name = "simd",
     .what = "chapter 7's fast tiles over the listed blocks",
     .takes = TAKES_QKV,
     .forward = forward_simd,
     .backward = backward_simd,
     .workspace = workspace_simd,
     .backward_workspace = backward_workspace_simd,
     .dropout = DROPOUT_POSITION,
     .grouped = true,
     .blocked = true},
    {.name = "flex",
     .what = "implementation 9: FlexAttention between two projections; --mask, causal if not given",
     .takes = TAKES_X,
     .forward = forward_flex,
     .backward = backward_flex,
     .workspace = workspace_flex,
     .backward_workspace = backward_workspace_flex,
     .dropout = DROPOUT_POSITION,
     .grouped = true,
     .blocked = true,
     .refuses = one_kv_head_each,
     .own_mask = OWN_MASK_OPTION,
     .parameters = parameters_flex,
     .describe = describe_flex},
    {0},
};

/* ---- Pictures ---- */

typedef struct {
    const char *name;
    AttentionShape shape;
    int *document;
    BlockMask mask;
} Picture;

static void take_shape(Picture *p, const char *name, int tokens, int block)
{
    AttentionShape *s = &p->shape;
    *p = (Picture){.name = name};
    *s = (AttentionShape){.batch = 1, .heads = 1, .kv_heads = 1, .head_size = 1, .scale = 1, .block = block};
    int document_tokens;
    const char *wrong = parse_mask(&s->mask, name, &p->document, &document_tokens);
    s->tokens = s->key_tokens = p->document ? document_tokens : tokens;
    if (!wrong)
        wrong = validate_shape(s);
    if (wrong)
        die(EXIT_USAGE, "%s", wrong);
}

static BlockMask make_mask(const AttentionShape *s)
{
    BlockMask mask = block_mask_in(allocate_floats(block_mask_floats(s, false, false)), s, false, false);
    fill_from_closed_form(&mask, s);
    return mask;
}

static Picture draw(const char *name, int tokens, int block)
{
    Picture p;
    take_shape(&p, name, tokens, block);
    if ((p.shape.tokens - 1) / block >= 256)
        die(EXIT_USAGE, "--block %d draws too many blocks to look at; take %d or more", block,
            (p.shape.tokens - 1) / 256 + 1);
    p.mask = make_mask(&p.shape);
    return p;
}

static void forget(Picture *p)
{
    free(p->mask.listed);
    free(p->document);
}

static BlockKind kind_at(const BlockMask *mask, int i, int j)
{
    int count;
    const ListedBlock *list = block_list(mask, 0, 0, i, &count);
    for (int n = 0; n < count; n++)
        if (list[n].key_block == j)
            return list[n].kind;
    return BLOCK_EMPTY;
}

/* Side by side, one character a block: rows are queries, columns keys. All have as many blocks. */
static void print_pictures(const Picture *pictures, int count)
{
    int blocks = pictures[0].mask.query_blocks, width = 2 * blocks + 1 < 28 ? 28 : 2 * blocks + 1;
    for (int line = -2; line < blocks; line++) {
        for (int n = 0; n < count; n++) {
            BlockCount c = count_blocks(&pictures[n].mask);
            int used = 0;
            if (line == -2)
                used = printf(" %.*s", width - 2, pictures[n].name);
            else if (line == -1)
                used = printf(" %zu full, %zu partial of %zu", c.full, c.partial, c.all);
            else
                for (int j = 0; j < blocks; j++)
                    used += printf(" %c", ".o#"[kind_at(&pictures[n].mask, line, j)]);
            printf("%*s", n + 1 < count ? width - used : 0, "");
        }
        printf("\n");
    }
}

enum { PICTURES = 6, ABREAST = 3, PICTURE_TOKENS = 1024 };
static const char *const pictured[PICTURES] = {"causal",     "window:256",          "dilated:3:200",
                                               "prefix:300", "local-global:128:64", "documents:300,500,224"};

static void write_picture(FILE *file, const Picture *p)
{
    static const char *const names[] = {"empty", "partial", "full"};
    for (int i = 0; i < p->mask.query_blocks; i++)
        for (int j = 0; j < p->mask.key_blocks; j++)
            fprintf(file, "%s\t%d\t%d\t%s\n", p->name, i, j, names[kind_at(&p->mask, i, j)]);
}

/* Draws all of the book's masks, three abreast; into a file too where there is one. */
static void draw_all(int block, FILE *file)
{
    for (int first = 0; first < PICTURES; first += ABREAST) {
        Picture pictures[ABREAST];
        for (int n = 0; n < ABREAST; n++)
            pictures[n] = draw(pictured[first + n], PICTURE_TOKENS, block);
        if (first)
            printf("\n");
        print_pictures(pictures, ABREAST);
        for (int n = 0; n < ABREAST; n++) {
            if (file)
                write_picture(file, &pictures[n]);
            forget(&pictures[n]);
        }
    }
}

/* ./run mask: the book's masks, or the one that --mask names, in the terminal and into --tsv FILE. */
static int run_mask(int argc, char **argv)
{
    enum { MASK, TOKENS, BLOCK, TSV, OPTIONS };
    static const char *const names[OPTIONS] = {"--mask", "--tokens", "--block", "--tsv"};
    const char *value[OPTIONS] = {NULL};
    int number[OPTIONS] = {[TOKENS] = PICTURE_TOKENS, [BLOCK] = 64};
    for (int i = 0; i < argc; i += 2) {
        int o = 0;
        while (o < OPTIONS && strcmp(argv[i], names[o]) != 0)
            o++;
        if (o == OPTIONS || i + 1 == argc)
            die(EXIT_USAGE, "mask takes --mask NAME, --tokens T, --block N, --tsv FILE, not \"%.40s\"",
                argv[i]);
        value[o] = argv[i + 1];
        char end;
        if (number[o] && (sscanf(value[o], "%8d%c", &number[o], &end) != 1 || number[o] < 1))
            die(EXIT_USAGE, "%s takes a whole number from 1 to 16777216, not \"%.40s\"", names[o], value[o]);
    }
    if (value[TOKENS] && !value[MASK])
        die(EXIT_USAGE, "--tokens goes with --mask; the pictures of all masks are of %d", PICTURE_TOKENS);
    FILE *file = value[TSV] ? fopen(value[TSV], "w") : NULL;
    if (value[TSV] && !file)
        die(EXIT_USAGE, "--tsv cannot write %s; name a file in a folder that can be written", value[TSV]);
    if (file)
        fprintf(file, "mask\tquery_block\tkey_block\tkind\n");

    if (value[MASK]) {
        Picture p = draw(value[MASK], number[TOKENS], number[BLOCK]);
        print_pictures(&p, 1);
        if (file)
            write_picture(file, &p);
        forget(&p);
    } else
        draw_all(number[BLOCK], file);
    if (file && fclose(file) != 0)
        die(EXIT_USAGE, "--tsv cannot write %s; is the disk full?", value[TSV]);
    return EXIT_PASSED;
}

/* ---- Checks and story ---- */

static bool same_lists(const BlockMask *a, const BlockMask *b)
{
    for (int i = 0; i < a->query_blocks; i++)
        for (int j = 0; j < a->key_blocks; j++)
            if (kind_at(a, i, j) != kind_at(b, i, j))
                return false;
    return true;
}

/* The closed form against every pair asked, for all the masks over many blocks. */
static const char *check_closed_forms(void)
{
    static const char *const masks[] = {"causal",
                                        "window:1",
                                        "window:37",
                                        "prefix:1",
                                        "prefix:50",
                                        "dilated:4:1",
                                        "dilated:1:7",
                                        "dilated:5:9",
                                        "local-global:1:1",
                                        "local-global:9:20",
                                        "documents:1,40,30,26",
                                        "documents:97"};
    static char wrong[160];
    for (size_t i = 0; i < sizeof masks / sizeof masks[0]; i++)
        for (int block = 1; block <= 100; block += block < 8 ? 1 : 23)
            for (int shift = -40; shift <= 40; shift += 40) {
                Picture p;
                take_shape(&p, masks[i], 97, block);
                p.shape.key_tokens += p.document ? 0 : shift;
                p.mask = make_mask(&p.shape);
                BlockMask asked = make_mask(&p.shape);
                fill_from_predicate(&asked, attends, &p.shape);
                bool same = same_lists(&p.mask, &asked);
                free(asked.listed);
                forget(&p);
                if (!same) {
                    snprintf(wrong, sizeof wrong,
                             "%s, T = 97, TK = %d, blocks of %d: closed form and predicate differ", masks[i],
                             p.shape.key_tokens, block);
                    return wrong;
                }
            }
    return NULL;
}

static const ExtraCheck checks[] = {
    {"each mask's closed form says what its predicate says", check_closed_forms}, {0}};

static double milliseconds(void (*forward)(const Tensors *, const AttentionShape *), const StoryRun *run)
{
    double start = now();
    forward(&run->t, &run->shape);
    return 1e3 * (now() - start);
}

/* All the masks in turn, several times over, so that a busy moment of the machine hits them alike. */
static void tell_times(Story *story)
{
    enum { MASKS = 4, ROUNDS = 3 };
    static const char *const masks[MASKS] = {"none", "causal", "window:1024", "window:256"};
    const StoryRun *runs[MASKS], *both[MASKS], *dense;
    double ms[MASKS][ROUNDS], back_ms[MASKS][ROUNDS], dense_ms[ROUNDS];
    char words[128] = "", backward[160];
    for (int i = 0; i < MASKS; i++) {
        snprintf(words, sizeof words, "--heads 4 --tokens 4096 --mask %s", masks[i]);
        snprintf(backward, sizeof backward, "%s --pass both", words);
        runs[i] = story_run(story, "simd", words);
        both[i] = story_run(story, "simd", backward);
    }
    dense = story_run(story, "dense-mask", words);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < MASKS; i++) {
            ms[i][round] = milliseconds(forward_simd, runs[i]);
            back_ms[i][round] = milliseconds(backward_simd, both[i]);
        }
        dense_ms[round] = milliseconds(forward_dense_mask, dense);
    }

    double full = median(ms[0], ROUNDS), back_full = median(back_ms[0], ROUNDS), last = full;
    story_say(story, "                                             forward (simd)    backward (simd)");
    story_say(story, "  mask           pairs kept   blocks visited     ms  of none's     ms  of none's");
    for (int i = 0; i < MASKS; i++) {
        const AttentionShape *s = &runs[i]->shape;
        BlockMask mask = make_mask(s);
        BlockCount c = count_blocks(&mask);
        last = median(ms[i], ROUNDS);
        double back = median(back_ms[i], ROUNDS);
        story_say(story, "  %-14s %9.1f%% %15.1f%% %6.1f %8.1f%% %6.0f %8.1f%%", masks[i],
                  100 * count_pairs(s) / (double)weights_count(s), 100.0 * (c.full + c.partial) / c.all, last,
                  100 * last / full, back, 100 * back / back_full);
        free(mask.listed);
    }
    double dense_median = median(dense_ms, ROUNDS);
    story_say(
        story,
        "window:256 as a T x TK tensor (dense-mask): forward %.0f ms, %.0f times as long; %.0f MiB, not "
        "%.0f.",
        dense_median, dense_median / last, (double)dense->extra_bytes / (1 << 20),
        (double)runs[MASKS - 1]->extra_bytes / (1 << 20));
}

/* Of the sum of all of out, as PyTorch has it for implementation 5. */
static void tell_gradients(Story *story, const StoryRun *run)
{
    static const char *const names[] = {"x", "qkv.weight", "proj.weight"};
    static const double norms[] = {1179.8246, 58629.7578, 60032.0595};
    const AttentionShape *s = &run->shape;
    size_t C = s->embed, C_out = s->embed_out;
    const size_t count[] = {s->batch * s->tokens * C, 3 * C_out * C, C_out * C_out};
    const float *const gradient[] = {run->t.dx, run->t.d_parameter[0], run->t.d_parameter[1]};
    for (int n = 0; n < 3; n++) {
        double squares = 0;
        for (size_t i = 0; i < count[n]; i++)
            squares += (double)gradient[n][i] * gradient[n][i];
        story_claim(story, fabs(sqrt(squares) - norms[n]) <= 1e-5 * norms[n],
                    "gradient of %s: norm %.4f, PyTorch's %.4f", names[n], sqrt(squares), norms[n]);
    }
}

static void story(Story *story)
{
    story_heading(story, "A mask in blocks");
    story_say(story,
              "1024 queries (down) by 1024 keys (across) in blocks of 128. In a block # every pair may "
              "attend, so nobody asks again; in a block o some may; a block . is never loaded.");
    draw_all(128, NULL);
    story_say(story, "./run mask draws them finer. Nobody asked about a pair to find this out:");
    story_claim(story, check_closed_forms() == NULL,
                "for each mask the closed form says of every block what asking each pair says");

    story_heading(story,
                  "Implementation 9 of the notebook: FlexAttention, 8 x 1024 x 768, 12 heads, seed 123");
    story_say(story, "It draws its parameters as implementation 5 does, and its result is the same:");
    const StoryRun *flex = story_run(story, "flex", "--pass both");
    story_notebook(
        story, flex,
        (const double[6]){0.3409292, -0.02430938, 0.004581543, 0.02482991, 0.02445523, -0.01866736},
        92.2031735);
    tell_gradients(story, flex);

    story_heading(story, "Time follows the blocks that are kept: 4 heads of 64, 4096 tokens, blocks of 128");
    tell_times(story);
}

static const ChapterMode modes[] = {
    {"mask", "[--mask NAME] [--tokens T] [--block N] [--tsv FILE]: pictures of block masks", run_mask}, {0}};

DECLARE_DEVICE_KERNELS(block_sparse);
DECLARE_DEVICE_KERNELS(dense_mask);

const Chapter chapter = {
    .number = 9,
    .title = "Block masks: what most pairs forbid, nobody computes",
    .folder = "09_block_sparse",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(block_sparse, "block-sparse flex"),
                       DEVICE_KERNELS(dense_mask, "dense-mask")},
    .checks = checks,
    .story = story,
    .modes = modes,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
