/* Grouped queries near the processor's peak. The arithmetic is chapter 7's; what stands here is which queries
 * share a block. A token's queries of one group see the same keys under the same mask, so a block takes them
 * together: with a group of 4, the 48 rows of a block are 12 tokens of 4 heads. A key or value that is loaded
 * serves all of them. Where there are so few rows that most of a block would be empty, split_keys_simd.c does it. */
#include "gqa.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "split_keys_simd.h"

/* The rows of a key/value head are its (token, head of the group) pairs, token by token. */
static size_t rows_of_kv_head(const AttentionShape *s)
{
    return (size_t)s->tokens * (s->heads / s->kv_heads);
}

size_t grouped_simd_scratch(const AttentionShape *s)
{
    if (split_keys_wins(s))
        return split_keys_scratch(s);
    return flash_team_scratch((size_t)s->batch * s->kv_heads, rows_of_kv_head(s), s->head_size);
}

/* The rows first .. past - 1 of a key/value head; these heads are counted over all batch entries. */
static void begin_block(FlashBlock *block, float *out, float *lse, float *scratch, const float *q,
                        const float *k, const float *v, const AttentionShape *s, size_t kv_head, size_t first,
                        size_t past)
{
    int group = s->heads / s->kv_heads;
    int b = (int)(kv_head / s->kv_heads), first_head = (int)(kv_head % s->kv_heads) * group;
    *block = (FlashBlock){.s = s, .b = b, .key_step = s->head_size};
    block->k = k + key_row(s, b, first_head, 0);
    block->v = v + key_row(s, b, first_head, 0);
    for (size_t i = first; i < past; i++) {
        int t = (int)(i / group), h = first_head + (int)(i % group);
        block->row[block->rows++] = (FlashRow){.q = q + query_row(s, b, h, t),
                                               .out = out + query_row(s, b, h, t),
                                               .lse = lse ? lse + lse_index(s, b, h, t) : NULL,
                                               .h = h,
                                               .t = t};
    }
    flash_begin(block, scratch);
}

/* How far from block i of team n, whose rows begin at `first`, the queries and keys of the same block of the next team lie. */
static void tell_next(FlashBlock *block, const AttentionShape *s, const FlashTeams *teams, size_t n, int i,
                      size_t first)
{
    size_t next_first, past, next = flash_next_team(teams, n);
    flash_rows_of(teams, next, i, &next_first, &past);
    int group = s->heads / s->kv_heads;
    ptrdiff_t heads = next / teams->of_a_head - n / teams->of_a_head;
    ptrdiff_t tokens = next_first / group - first / group;
    block->q_ahead = (heads * group * s->tokens + tokens) * s->head_size;
    block->k_ahead = (heads * s->key_tokens + tokens) * s->head_size;
}

void attention_grouped_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                            const float *v, const AttentionShape *s)
{
    if (split_keys_wins(s)) {
        attention_split_keys(out, lse, scratch, q, k, v, (size_t)s->key_tokens * s->head_size, s);
        return;
    }
    FlashTeams teams = flash_teams((size_t)s->batch * s->kv_heads, rows_of_kv_head(s));
#pragma omp parallel for schedule(dynamic) num_threads(teams.threads)
    for (size_t n = 0; n < teams.count; n++) {
        FlashBlock block[FLASH_TEAM], *team[FLASH_TEAM];
        int blocks = 0;
        for (size_t first, past; flash_rows_of(&teams, n, blocks, &first, &past); blocks++) {
            team[blocks] = &block[blocks];
            begin_block(team[blocks], out, lse, flash_own_scratch(scratch, &teams, s->head_size, blocks), q,
                        k, v, s, n / teams.of_a_head, first, past);
            tell_next(team[blocks], s, &teams, n, blocks, first);
        }
        flash_attend_allowed(team, blocks);
        for (int i = 0; i < blocks; i++)
            flash_finish(team[i]);
    }
}
