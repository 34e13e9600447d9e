/* Chapter 9: block masks. Its kernels, its story, and the masks' pictures. */
#include "block_sparse.h"
#include "chapter.h"
#include "error.h"
#include "memory.h"
#include "options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Kernels ---- */

static int workspace_dense_mask(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = dense_mask_floats(s);
    return 1;
}

static void forward_dense_mask(const Tensors *t, const AttentionShape *s)
{
    attention_dense_mask(t->out, t->lse, t->weights, t->workspace[0], t->q, t->k, t->v, s);
}

enum { LISTS, SCRATCH, QKV, CONTEXT }; /* workspace of the others */

static int workspace_block_sparse(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[LISTS] = block_mask_floats(s, false, false);
    return 1;
}

static int workspace_simd(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[LISTS] = block_mask_floats(s, false, false);
    floats[SCRATCH] = block_sparse_scratch(s);
    return 2;
}

static int workspace_flex(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t row = (size_t)s->batch * s->tokens * s->embed_out;
    workspace_simd(s, floats);
    floats[QKV] = 3 * row;
    floats[CONTEXT] = row;
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

static void forward_simd(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    attention_block_sparse_simd(t->out, t->lse, t->workspace[SCRATCH], t->q, t->k, t->v, &mask, s);
}

static void parameters_flex(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "qkv", 3 * s->embed_out, s->embed, false);
    add_linear(p, "proj", s->embed_out, s->embed_out, true);
}

static void forward_flex(const Tensors *t, const AttentionShape *s)
{
    BlockMask mask = lists(t, s);
    flex_attention(t->out, t->workspace[QKV], t->workspace[CONTEXT], t->workspace[SCRATCH], t->x,
                   t->parameter[0], t->parameter[1], t->parameter[2], &mask, s);
}

static void describe_flex(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                          const Tensors *t, const AttentionShape *s)
{
    size_t third = (size_t)s->embed_out * s->embed, head = (size_t)s->head_size * s->embed;
    for (int h = 0; h < s->heads; h++) {
        query[h] =
            (OracleLinear){.weight = t->parameter[0] + h * head, .stride_out = s->embed, .stride_in = 1};
        key[h] = value[h] = query[h];
        key[h].weight += third;
        value[h].weight += 2 * third;
    }
    module->output[0] = (OracleLinear){t->parameter[1], t->parameter[2], s->embed_out, 1};
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
     .workspace = workspace_dense_mask,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .grouped = true},
    {.name = "block-sparse",
     .what = "online softmax over the listed blocks",
     .takes = TAKES_QKV,
     .forward = forward_block_sparse,
     .workspace = workspace_block_sparse,
     .dropout = DROPOUT_POSITION,
     .grouped = true,
     .blocked = true},
    {.name = "simd",
     .what = "chapter 7's fast tiles over the listed blocks",
     .takes = TAKES_QKV,
     .forward = forward_simd,
     .workspace = workspace_simd,
     .dropout = DROPOUT_POSITION,
     .grouped = true,
     .blocked = true},
    {.name = "flex",
     .what = "implementation 9: FlexAttention between two projections; --mask, causal if not given",
     .takes = TAKES_X,
     .forward = forward_flex,
     .workspace = workspace_flex,
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

static BlockMask make_mask(const AttentionShape *s)
{
    BlockMask mask = block_mask_in(allocate_floats(block_mask_floats(s, false, false)), s, false, false);
    fill_from_closed_form(&mask, s);
    return mask;
}

static const char *kind_name(const BlockMask *mask, int i, int j, const char *const names[3])
{
    int count;
    const ListedBlock *list = block_list(mask, 0, 0, i, &count);
    for (int n = 0; n < count; n++)
        if (list[n].key_block == j)
            return names[list[n].kind];
    return names[BLOCK_EMPTY];
}

/* One character a block: rows are queries, columns keys. */
static void print_picture(const BlockMask *mask, const AttentionShape *s)
{
    static const char *const marks[3] = {" .", " o", " #"};
    BlockCount count = count_blocks(mask);
    char name[64];
    mask_text(name, sizeof name, s);
    printf("%s, %d x %d tokens in blocks of %d: %zu full (#), %zu partial (o), %zu empty (.); %.0f%% of the "
           "pairs\n",
           name, s->tokens, s->key_tokens, mask->block, count.full, count.partial,
           count.all - count.full - count.partial, 100 * count_pairs(s) / (double)weights_count(s));
    for (int i = 0; i < mask->query_blocks; i++) {
        printf("  ");
        for (int j = 0; j < mask->key_blocks; j++)
            printf("%s", kind_name(mask, i, j, marks));
        printf("\n");
    }
}

static const char *const pictured[] = {
    "causal", "window:256", "prefix:300", "local-global:128:64", "dilated:3:200", "documents:300,500,224",
    NULL};

static AttentionShape picture_shape(const char *mask, int tokens, int block, int **document)
{
    AttentionShape s = {.batch = 1, .heads = 1, .kv_heads = 1, .head_size = 1, .scale = 1, .block = block};
    int document_tokens;
    const char *wrong = parse_mask(&s.mask, mask, document, &document_tokens);
    s.tokens = s.key_tokens = *document ? document_tokens : tokens;
    if (!wrong)
        wrong = validate_shape(&s);
    if (wrong)
        die(EXIT_USAGE, "%s", wrong);
    return s;
}

static void write_picture(FILE *file, const BlockMask *mask, const char *name)
{
    static const char *const names[3] = {"empty", "partial", "full"};
    for (int i = 0; i < mask->query_blocks; i++)
        for (int j = 0; j < mask->key_blocks; j++)
            fprintf(file, "%s\t%d\t%d\t%s\n", name, i, j, kind_name(mask, i, j, names));
}

/* ./run mask: the book's masks, or the one that --mask names, in the terminal and into --tsv FILE. */
static int run_mask(int argc, char **argv)
{
    const char *tsv = NULL;
    char *words[64] = {"run"};
    int count = 1;
    for (int i = 0; i < argc && count < 63; i++)
        if (strcmp(argv[i], "--tsv") == 0 && i + 1 < argc)
            tsv = argv[++i];
        else
            words[count++] = argv[i];
    Options o;
    parse_options(&o, count, words);
    FILE *file = tsv ? fopen(tsv, "w") : NULL;
    if (tsv && !file)
        die(EXIT_USAGE, "--tsv cannot write %s; name a file in a folder that can be written", tsv);
    if (file)
        fprintf(file, "mask\tquery_block\tkey_block\tkind\n");

    const char *const one[] = {o.mask, NULL};
    for (const char *const *name = o.mask ? one : pictured; *name; name++) {
        int *document;
        AttentionShape s =
            picture_shape(*name, o.tokens ? o.tokens : 1024, o.block ? o.block : 64, &document);
        if ((s.tokens - 1) / s.block >= 256)
            die(EXIT_USAGE, "a picture of more than 256 blocks; take --block %d or more",
                (s.tokens - 1) / 256 + 1);
        BlockMask mask = make_mask(&s);
        print_picture(&mask, &s);
        if (file)
            write_picture(file, &mask, *name);
        free(mask.listed);
        free(document);
    }
    if (file && fclose(file) != 0)
        die(EXIT_USAGE, "--tsv cannot write %s; is the disk full?", tsv);
    free_options(&o);
    return EXIT_PASSED;
}

/* ---- Checks and story ---- */

static bool same_lists(const BlockMask *a, const BlockMask *b)
{
    for (int i = 0; i < a->query_blocks; i++) {
        int na, nb;
        const ListedBlock *la = block_list(a, 0, 0, i, &na), *lb = block_list(b, 0, 0, i, &nb);
        if (na != nb)
            return false;
        for (int n = 0; n < na; n++)
            if (la[n].key_block != lb[n].key_block || la[n].kind != lb[n].kind)
                return false;
    }
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
                                        "local-global:1:1",
                                        "local-global:9:20",
                                        "dilated:4:1",
                                        "dilated:1:7",
                                        "dilated:5:9",
                                        "documents:1,40,30,26",
                                        "documents:97",
                                        NULL};
    static char wrong[160];
    for (const char *const *name = masks; *name; name++)
        for (int block = 1; block <= 100; block += block < 8 ? 1 : 23)
            for (int shift = -40; shift <= 40; shift += 40) {
                int *document;
                AttentionShape s = picture_shape(*name, 97, block, &document);
                s.key_tokens += document ? 0 : shift;
                BlockMask closed = make_mask(&s), asked = make_mask(&s);
                fill_from_predicate(&asked, attends, &s);
                bool same = same_lists(&closed, &asked);
                free(closed.listed);
                free(asked.listed);
                free(document);
                if (!same) {
                    snprintf(wrong, sizeof wrong,
                             "%s, T = 97, TK = %d, blocks of %d: closed form and predicate differ", *name,
                             s.key_tokens, block);
                    return wrong;
                }
            }
    return NULL;
}

static const ExtraCheck checks[] = {
    {"each mask's closed form says what its predicate says", check_closed_forms}, {0}};

static void story(Story *story)
{
    story_heading(story, "A mask in blocks");
    story_say(story, "Of the pairs that a mask allows, most come in whole blocks. A block that is empty is "
                     "never loaded, one that "
                     "is full is never asked about; only partial ones look at each pair.");
    for (const char *const *name = pictured; *name; name++) {
        int *document;
        AttentionShape s = picture_shape(*name, 1024, 64, &document);
        BlockMask mask = make_mask(&s);
        if (name < pictured + 2)
            print_picture(&mask, &s);
        else {
            BlockCount count = count_blocks(&mask);
            story_say(story, "%-24s %3zu full, %3zu partial, %3zu empty blocks of 64", *name, count.full,
                      count.partial, count.all - count.full - count.partial);
        }
        free(mask.listed);
        free(document);
    }
    story_say(story, "./run mask draws them all.");
    story_claim(story, check_closed_forms() == NULL,
                "for each mask the closed form says of every block what asking each pair says");

    story_heading(story,
                  "Implementation 9 of the notebook: FlexAttention, 8 x 1024 x 768, 12 heads, seed 123");
    story_say(story, "It draws its parameters as implementation 5 does, and its result is the same:");
    story_notebook(
        story, story_run(story, "flex", ""),
        (const double[6]){0.3409292, -0.02430938, 0.004581543, 0.02482991, 0.02445523, -0.01866736},
        92.2031735);

    story_heading(story, "Time follows the pairs that are kept");
    story_say(story, "8 heads of 64, 4096 tokens, blocks of 128:");
    story_time(story, "simd", "--heads 8 --tokens 4096 --mask window:256");
    story_time(story, "simd", "--heads 8 --tokens 4096 --mask window:1024");
    story_time(story, "simd", "--heads 8 --tokens 4096 --causal");

    story_heading(story, "The same mask as a tensor");
    story_time(story, "dense-mask block-sparse simd", "--heads 8 --tokens 2048 --mask window:256");
}

const Chapter chapter = {
    .number = 9,
    .title = "Block masks: what most pairs forbid, nobody computes",
    .folder = "09_block_sparse",
    .kernels = kernels,
    .checks = checks,
    .story = story,
    .extra_mode = "mask",
    .extra_mode_what = "[--mask NAME] [--tokens T] [--block N] [--tsv FILE]: pictures of block masks",
    .run_extra_mode = run_mask,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
