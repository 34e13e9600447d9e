#include "shape.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const AttentionShape core = {
    .batch = 2, .tokens = 5, .key_tokens = 5, .heads = 6, .kv_heads = 2, .head_size = 4, .scale = 0.5f};

/* ---- The masks, as pictures: a row for each query, a column for each key ---- */

static void assert_picture(const char *mask_name, int tokens, int key_tokens, bool causal,
                           const char *picture)
{
    AttentionShape s = core;
    int *document, document_tokens;
    cr_assert_null(parse_mask(&s.mask, mask_name, &document, &document_tokens));
    s.tokens = tokens;
    s.key_tokens = key_tokens;
    s.causal = causal;
    char drawn[200] = "";
    for (int t = 0; t < tokens; t++) {
        for (int t2 = 0; t2 < key_tokens; t2++)
            strcat(drawn, attends(&s, 0, 0, t, t2) ? "#" : ".");
        strcat(drawn, t < tokens - 1 ? "\n" : "");
    }
    cr_assert_str_eq(drawn, picture, "%s, T %d, TK %d:\n%s\nshould be\n%s", mask_name, tokens, key_tokens,
                     drawn, picture);
    free(document);
}

Test(shape, masks_of_a_square)
{
    assert_picture("none", 2, 2, false, "##\n##");
    assert_picture("causal", 5, 5, false, "#....\n##...\n###..\n####.\n#####");
    assert_picture("none", 5, 5, true, "#....\n##...\n###..\n####.\n#####");
    assert_picture("window:2", 5, 5, false, "#....\n##...\n.##..\n..##.\n...##");
    assert_picture("prefix:3", 5, 5, false, "###..\n###..\n###..\n####.\n#####");
    assert_picture("prefix:3", 5, 5, true, "#....\n##...\n###..\n####.\n#####");
    assert_picture("local-global:2:1", 5, 5, false, "#####\n###..\n####.\n#.###\n#..##");
    assert_picture("local-global:1:2", 5, 5, true, "#....\n##...\n###..\n##.#.\n##..#");
    assert_picture("dilated:2:2", 5, 5, false, "#....\n.#...\n#.#..\n.#.#.\n..#.#");
    assert_picture("dilated:3:1", 5, 5, false, "#....\n##...\n###..\n.###.\n..###");
    assert_picture("documents:2,3", 5, 5, false, "#....\n##...\n..#..\n..##.\n..###");
}

Test(shape, masks_with_more_keys_than_queries_are_aligned_bottom_right)
{
    assert_picture("causal", 3, 5, false, "###..\n####.\n#####");
    assert_picture("window:2", 3, 5, false, ".##..\n..##.\n...##");
    assert_picture("prefix:4", 3, 5, false, "####.\n####.\n#####");
    assert_picture("local-global:2:1", 3, 5, false, "####.\n#.###\n#..##");
    assert_picture("dilated:2:2", 3, 5, false, "#.#..\n.#.#.\n..#.#");
    assert_picture("causal", 1, 4, false, "####"); /* one token decoded: all it has seen */
}

Test(shape, masks_with_fewer_keys_than_queries_leave_rows_empty)
{
    assert_picture("causal", 5, 3, false, "...\n...\n#..\n##.\n###");
    assert_picture("window:1", 5, 3, false, "...\n...\n#..\n.#.\n..#");
    assert_picture("prefix:1", 5, 3, false, "#..\n#..\n#..\n##.\n###");
    assert_picture("dilated:2:2", 5, 3, false, "...\n...\n#..\n.#.\n#.#");
    assert_picture("local-global:1:1", 4, 3, false, "###\n###\n##.\n#.#");
}

Test(shape, the_future_is_what_causal_forbids)
{
    AttentionShape s = core, causal = core;
    s.mask.kind = MASK_FUTURE;
    causal.mask.kind = MASK_CAUSAL;
    for (int t = 0; t < 5; t++)
        for (int t2 = 0; t2 < 5; t2++)
            cr_assert(attends(&s, 0, 0, t, t2) == !attends(&causal, 0, 0, t, t2));
}

Test(shape, lengths_forbid_keys_and_do_not_move_the_diagonal)
{
    const int lengths[2] = {5, 2};
    AttentionShape s = core;
    s.lengths = lengths;
    s.causal = true;
    for (int t = 0; t < 5; t++)
        for (int t2 = 0; t2 < 5; t2++) {
            cr_assert(attends(&s, 0, 0, t, t2) == (t2 <= t));
            cr_assert(attends(&s, 1, 0, t, t2) == (t2 <= t && t2 < 2));
        }
}

/* ---- keys_end() and count_pairs() against every pair, over all masks ---- */

static const char *const every_mask[] = {
    "none",
    "causal",
    "window:1",
    "window:3",
    "window:2147483647",
    "prefix:1",
    "prefix:4",
    "prefix:2000000000",
    "local-global:1:1",
    "local-global:2:1",
    "local-global:1:3",
    "local-global:3:2",
    "local-global:90:90",
    "dilated:1:1",
    "dilated:2:3",
    "dilated:3:2",
    "dilated:50:1",
    "dilated:1:50",
    "future",
};

static double assert_keys_end_and_count(const AttentionShape *s, const char *name)
{
    double pairs = 0;
    for (int b = 0; b < s->batch; b++)
        for (int t = 0; t < s->tokens; t++) {
            int end = keys_end(s, b, t), last = -1;
            for (int t2 = 0; t2 < s->key_tokens; t2++)
                if (attends(s, b, 0, t, t2)) {
                    last = t2;
                    pairs += s->heads;
                }
            cr_assert(end >= last + 1 && end >= 0 && end <= s->key_tokens,
                      "%s, T %d, TK %d, row %d: keys_end %d, last key %d", name, s->tokens, s->key_tokens, t,
                      end, last);
            bool tight =
                s->mask.kind == MASK_NONE || s->mask.kind == MASK_CAUSAL || s->mask.kind == MASK_PREFIX;
            cr_assert(!tight || end == last + 1, "%s, T %d, TK %d, row %d: keys_end %d, last key %d", name,
                      s->tokens, s->key_tokens, t, end, last);
        }
    cr_assert(count_pairs(s) == pairs, "%s, T %d, TK %d, causal %d, lengths %d: %g pairs, not %g", name,
              s->tokens, s->key_tokens, s->causal, s->lengths != NULL, pairs, count_pairs(s));
    return pairs;
}

Test(shape, keys_end_and_count_pairs_agree_with_every_pair)
{
    double all = 0;
    for (size_t i = 0; i < sizeof every_mask / sizeof every_mask[0]; i++)
        for (int tokens = 1; tokens <= 8; tokens++)
            for (int key_tokens = 1; key_tokens <= 8; key_tokens++)
                for (int options = 0; options < 4; options++) {
                    AttentionShape s = core;
                    int *document, document_tokens;
                    const int lengths[2] = {key_tokens / 2, (key_tokens * 3 + 3) / 4};
                    if (parse_mask(&s.mask, every_mask[i], &document, &document_tokens))
                        s.mask.kind = MASK_FUTURE;
                    s.tokens = tokens;
                    s.key_tokens = key_tokens;
                    s.causal = options & 1;
                    s.lengths = options & 2 ? lengths : NULL;
                    cr_assert_null(validate_shape(&s));
                    all += assert_keys_end_and_count(&s, every_mask[i]);
                }
    cr_assert(all > 1e5);
}

Test(shape, keys_end_and_count_pairs_of_documents)
{
    const char *const texts[] = {"documents:8", "documents:1,1,1,5", "documents:3,5", "documents:4,1,3"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        for (int options = 0; options < 4; options++) {
            AttentionShape s = core;
            int *document, document_tokens;
            const int lengths[2] = {3, 7};
            cr_assert_null(parse_mask(&s.mask, texts[i], &document, &document_tokens));
            cr_assert_eq(document_tokens, 8);
            s.tokens = s.key_tokens = 8;
            s.causal = options & 1;
            s.lengths = options & 2 ? lengths : NULL;
            assert_keys_end_and_count(&s, texts[i]);
            free(document);
        }
}

Test(shape, count_pairs_of_long_rows_is_exact_and_quick, .timeout = 20)
{
    double n = 1 << 22;
    AttentionShape s = core;
    s.tokens = s.key_tokens = 1 << 22;
    s.heads = s.kv_heads = s.batch = 1;
    cr_assert(count_pairs(&s) == n * n);
    s.mask.kind = MASK_CAUSAL;
    cr_assert(count_pairs(&s) == n * (n + 1) / 2);
    s.mask = (Mask){.kind = MASK_WINDOW, .width = 256};
    cr_assert(count_pairs(&s) == n * 256 - 256 * 255 / 2);
    s.mask = (Mask){.kind = MASK_DILATED, .width = 2, .extra = 4};
    cr_assert(count_pairs(&s) == 2 * n - 4);
}

/* ---- parse_mask, mask_text ---- */

Test(shape, parse_mask_reads_what_mask_text_writes)
{
    const char *const texts[] = {"none",
                                 "causal",
                                 "window:256",
                                 "prefix:64",
                                 "dilated:4:16",
                                 "window:1",
                                 "local-global:256:16",
                                 "documents:8",
                                 "documents:3,1,4",
                                 "documents:1,1,1,1,1,1,1,1"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        AttentionShape s = core;
        int *document, document_tokens;
        char text[64];
        const char *wrong = parse_mask(&s.mask, texts[i], &document, &document_tokens);
        cr_assert_null(wrong, "%s: %s", texts[i], wrong);
        cr_assert((document != NULL) == (s.mask.kind == MASK_DOCUMENTS));
        cr_assert((document_tokens > 0) == (s.mask.kind == MASK_DOCUMENTS));
        s.tokens = s.key_tokens = document_tokens ? document_tokens : 5;
        mask_text(text, sizeof text, &s);
        cr_assert_str_eq(text, texts[i]);
        free(document);
    }
}

Test(shape, parse_mask_numbers_documents_from_zero)
{
    Mask mask;
    int *document, document_tokens;
    const int expected[6] = {0, 0, 1, 2, 2, 2};
    cr_assert_null(parse_mask(&mask, "documents:2,1,3", &document, &document_tokens));
    cr_assert(document_tokens == 6 && mask.document == document);
    cr_assert_arr_eq(document, expected, sizeof expected);
    free(document);
}

Test(shape, parse_mask_refuses_everything_else)
{
    const char *const texts[] = {
        "",
        ":",
        "Causal",
        "causal:",
        "causal:1",
        "causal ",
        "caus",
        "causally",
        "window",
        "window:",
        "window:0",
        "window:-1",
        "window:+1",
        "window: 1",
        "window:1 ",
        "window:1:2",
        "window:1.5",
        "window:0x10",
        "window:2147483648",
        "window:99999999999999999999999",
        "prefix:0",
        "future",
        "prefix:3,4",
        "dilated:2",
        "dilated:2:",
        "dilated:2:0",
        "dilated:0:2",
        "dilated:1:2:3",
        "local-global:4",
        "local-global::1",
        "local-global:4:-1",
        "documents",
        "documents:",
        "documents:,",
        "documents:3,",
        "documents:,3",
        "documents:3,,4",
        "documents:3:4",
        "documents:0",
        "documents:3,-1",
        "documents:3 4",
        "documents:16777216,1",
        "window:1\n",
        "\x1b[31m",
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        Mask mask;
        int *document, document_tokens;
        const char *wrong = parse_mask(&mask, texts[i], &document, &document_tokens);
        cr_assert_not_null(wrong, "'%s' was accepted", texts[i]);
        cr_assert_null(document);
        cr_assert(strstr(wrong, "--mask"), "%s", wrong);
        for (const char *c = wrong; *c; c++)
            cr_assert(*c >= ' ' && *c <= '~', "'%s' holds the character %d", wrong, *c);
    }
}

Test(shape, parse_mask_says_what_was_given_and_what_would_be_right)
{
    Mask mask;
    int *document, document_tokens;
    cr_assert_str_eq(
        parse_mask(&mask, "window:0", &document, &document_tokens),
        "--mask 'window:0': it takes the form window:W, with whole numbers from 1 to 2147483647");
    cr_assert_str_eq(parse_mask(&mask, "windw:3", &document, &document_tokens),
                     "--mask 'windw:3' is not one of none, causal, window:W, prefix:P, local-global:W:G, "
                     "dilated:W:D, documents:L1,L2,..");
    char endless[10001];
    memset(endless, 'x', sizeof endless - 1);
    endless[sizeof endless - 1] = 0;
    cr_assert(strlen(parse_mask(&mask, endless, &document, &document_tokens)) < 200);
}

static void assert_mask_text(const AttentionShape *s, const char *expected)
{
    char text[64];
    mask_text(text, sizeof text, s);
    cr_assert_str_eq(text, expected);
}

Test(shape, mask_text_names_what_is_combined)
{
    const int lengths[2] = {3, 4};
    AttentionShape s = core;
    assert_mask_text(&s, "none");
    s.lengths = lengths;
    assert_mask_text(&s, "none+lengths");
    s.causal = true;
    assert_mask_text(&s, "causal+lengths");
    s.mask.kind = MASK_CAUSAL;
    assert_mask_text(&s, "causal+lengths");
    s.mask = (Mask){.kind = MASK_LOCAL_GLOBAL, .width = 1 << 24, .extra = 1 << 24};
    assert_mask_text(&s, "local-global:16777216:16777216+causal+lengths");
    s.lengths = NULL;
    s.mask.kind = MASK_FUTURE;
    assert_mask_text(&s, "future+causal");
}

Test(shape, mask_text_of_many_documents_is_cut_between_numbers)
{
    AttentionShape s = core;
    int document[400];
    const int lengths[2] = {3, 4};
    for (int i = 0; i < 400; i++)
        document[i] = i / 20;
    s.tokens = s.key_tokens = 400;
    s.mask = (Mask){.kind = MASK_DOCUMENTS, .document = document};
    s.causal = true;
    s.lengths = lengths;
    char text[64];
    mask_text(text, sizeof text, &s);
    cr_assert(strstr(text, "documents:20,20,20"));
    cr_assert(strstr(text, ",20,..+causal+lengths"), "%s", text);
    char small[12];
    mask_text(small, sizeof small, &s);
    cr_assert_str_eq(small, "documents:2");
}

/* ---- validate_shape ---- */

static void assert_wrong(const AttentionShape *s, const char *expected)
{
    const char *wrong = validate_shape(s);
    cr_assert_not_null(wrong, "no complaint; it should be: %s", expected);
    cr_assert_str_eq(wrong, expected);
}

Test(shape, sizes_that_make_sense)
{
    AttentionShape s = core;
    cr_assert_null(validate_shape(&s));
    s.embed = 7;
    s.embed_out = 24;
    cr_assert_null(validate_shape(&s));
    s = core;
    s.tokens = s.key_tokens = 1 << 24;
    cr_assert_null(validate_shape(&s));
    s.batch = s.tokens = s.key_tokens = s.heads = s.kv_heads = s.head_size = 1;
    cr_assert_null(validate_shape(&s));
}

Test(shape, each_size_is_at_least_one_and_not_absurd)
{
    const struct {
        size_t offset;
        const char *option;
    } sizes[] = {{offsetof(AttentionShape, batch), "--batch"},
                 {offsetof(AttentionShape, tokens), "--tokens"},
                 {offsetof(AttentionShape, key_tokens), "--key-tokens"},
                 {offsetof(AttentionShape, heads), "--heads"},
                 {offsetof(AttentionShape, kv_heads), "--kv-heads"},
                 {offsetof(AttentionShape, head_size), "--head-size"}};
    const int bad[] = {0, -1, (1 << 24) + 1, 2147483647, -2147483647 - 1};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (size_t j = 0; j < sizeof bad / sizeof bad[0]; j++) {
            AttentionShape s = core;
            char expected[100];
            memcpy((char *)&s + sizes[i].offset, &bad[j], sizeof bad[j]);
            snprintf(expected, sizeof expected, "%s is %d: it must be 1 to 16777216", sizes[i].option,
                     bad[j]);
            assert_wrong(&s, expected);
        }
}

Test(shape, heads_must_divide)
{
    AttentionShape s = core;
    s.heads = 8;
    s.kv_heads = 3;
    assert_wrong(&s, "--kv-heads 3 does not divide --heads 8");
    s.kv_heads = 16;
    assert_wrong(&s, "--kv-heads 16 does not divide --heads 8");
    s = core;
    s.embed = s.embed_out = 768;
    s.heads = s.kv_heads = 5;
    s.head_size = 768 / 5;
    assert_wrong(&s, "--heads 5 does not divide --embed 768");
    s.embed = 3;
    assert_wrong(&s, "--heads 5 does not divide --embed-out 768");
    s.heads = s.kv_heads = 1000; /* the head size is 0 then, but that is not what is wrong */
    s.head_size = 0;
    assert_wrong(&s, "--heads 1000 does not divide --embed-out 768");
    s.heads = s.kv_heads = 12;
    s.head_size = 32;
    assert_wrong(&s, "--heads 12 times --head-size 32 is 384, not --embed-out 768");
    s.head_size = 64;
    cr_assert_null(validate_shape(&s));
    s.key_tokens = 9;
    assert_wrong(&s, "--key-tokens 9 is not --tokens 5: a module's keys are made from the same x");
}

Test(shape, products_that_no_memory_holds)
{
    AttentionShape s = core;
    s.tokens = s.key_tokens = 1 << 24;
    s.batch = 1 << 12;
    s.heads = s.kv_heads = 2; /* 2^61 weights */
    assert_wrong(&s, "these sizes make a tensor of 2.3e+18 numbers, more than any memory holds: "
                     "lower --batch, --heads or --tokens");
    s.heads = s.kv_heads = 1; /* 2^60 */
    cr_assert_null(validate_shape(&s));
    s = core;
    s.batch = s.heads = s.kv_heads = 1 << 16;
    assert_wrong(&s, "--batch 65536 times --heads 65536 is more than 1073741824");
    s.batch = 1;
    s.head_size = 1 << 16;
    assert_wrong(&s, "--heads 65536 times --head-size 65536 is more than 1073741824");
}

Test(shape, numbers_out_of_range)
{
    AttentionShape s = core;
    s.scale = NAN;
    assert_wrong(&s, "--scale is nan: it must be a finite number");
    s.scale = -INFINITY;
    assert_wrong(&s, "--scale is -inf: it must be a finite number");
    s.scale = -2; /* odd, and allowed */
    cr_assert_null(validate_shape(&s));
    const float bad[] = {1, 1.5f, -0.1f, NAN, INFINITY};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        s.dropout = bad[i];
        cr_assert(strstr(validate_shape(&s), "it must be at least 0 and below 1"));
    }
    s.dropout = 0.99f;
    cr_assert_null(validate_shape(&s));
}

Test(shape, lengths_are_zero_to_the_number_of_keys)
{
    int lengths[2] = {0, 5};
    AttentionShape s = core;
    s.lengths = lengths;
    cr_assert_null(validate_shape(&s));
    lengths[1] = 6;
    assert_wrong(&s, "--lengths holds 6: it must be 0 to 5, the number of key tokens");
    lengths[1] = -1;
    assert_wrong(&s, "--lengths holds -1: it must be 0 to 5, the number of key tokens");
}

Test(shape, documents_need_as_many_keys_as_queries)
{
    int document[5] = {0, 0, 1, 1, 1};
    AttentionShape s = core;
    s.mask = (Mask){.kind = MASK_DOCUMENTS, .document = document};
    cr_assert_null(validate_shape(&s));
    s.tokens = 4;
    assert_wrong(
        &s, "--mask documents: the lengths add up to 5, --tokens is 4: both and --key-tokens must be equal");
    s.tokens = 5;
    document[4] = 0;
    assert_wrong(&s, "--mask documents: the documents are not in ascending order at token 4");
    s.mask.document = NULL;
    assert_wrong(&s, "--mask documents: no lengths given, as in documents:L1,L2,..");
}

Test(shape, no_mask_divides_by_zero)
{
    AttentionShape s = core;
    s.mask = (Mask){.kind = MASK_DILATED, .width = 2};
    assert_wrong(&s, "--mask: its numbers must be 1 or more, not 2 and 0");
    s.mask.extra = 1;
    cr_assert_null(validate_shape(&s));
}
