/* The lists: by closed form, from a predicate, and as PyTorch has them. */
#include "memory.h"
#include "test_problem.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

Test(lists, closed_form_and_predicate_say_what_is_there)
{
    static const int key_tokens[] = {90, 53, 130};
    for (int m = 0; m < MASKS; m++)
        for (int n = 0; n < BLOCKS; n++)
            for (int i = 0; i < 3; i++) {
                AttentionShape s = shape_of(masks[m], 90, key_tokens[i], block_sizes[n]);
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
                AttentionShape s = shape_of(masks[m], 90, 90, block_sizes[n]);
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
