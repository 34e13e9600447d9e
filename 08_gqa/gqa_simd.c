/* Grouped queries near the processor's peak. The arithmetic is chapter 7's; what stands here is which queries
 * share a block. A token's queries of one group see the same keys under the same mask, so a block takes them
 * together: with a group of 4, the 48 rows of a block are 12 tokens of 4 heads. A key or value that is loaded
 * serves all of them. Where there are so few rows that most of a block would be empty, split_keys_simd.c does it. */
#include "gqa.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "split_keys_simd.h"

/* The (token, head of the group) pairs of one key/value head, token by token, cut into blocks. */
static size_t blocks_of_kv_head(const AttentionShape *s)
{
    size_t rows = (size_t)s->tokens * (s->heads / s->kv_heads);
    return (rows + FLASH_ROWS - 1) / FLASH_ROWS;
}

static size_t all_blocks(const AttentionShape *s)
{
    return (size_t)s->batch * s->kv_heads * blocks_of_kv_head(s);
}

size_t grouped_simd_scratch(const AttentionShape *s)
{
    return split_keys_wins(s) ? split_keys_scratch(s) : flash_task_scratch(all_blocks(s), s->head_size);
}

static void attend_block(float *out, float *lse, float *scratch, const float *q, const float *k,
                         const float *v, const AttentionShape *s, size_t n)
{
    int group = s->heads / s->kv_heads;
    size_t rows = (size_t)s->tokens * group, first = n % blocks_of_kv_head(s) * FLASH_ROWS;
    size_t kv_head = n / blocks_of_kv_head(s); /* counted over all batch entries */
    int b = (int)(kv_head / s->kv_heads), first_head = (int)(kv_head % s->kv_heads) * group;

    FlashBlock block = {.s = s, .b = b, .key_step = s->head_size};
    block.k = k + key_row(s, b, first_head, 0);
    block.v = v + key_row(s, b, first_head, 0);
    for (size_t i = first; i < rows && block.rows < FLASH_ROWS; i++) {
        int t = (int)(i / group), h = first_head + (int)(i % group);
        block.row[block.rows++] = (FlashRow){.q = q + query_row(s, b, h, t),
                                             .out = out + query_row(s, b, h, t),
                                             .lse = lse ? lse + lse_index(s, b, h, t) : NULL,
                                             .h = h,
                                             .t = t};
    }
    flash_begin(&block, scratch);
    flash_attend_allowed(&block);
    flash_finish(&block);
}

void attention_grouped_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                            const float *v, const AttentionShape *s)
{
    if (split_keys_wins(s)) {
        attention_split_keys(out, lse, scratch, q, k, v, (size_t)s->key_tokens * s->head_size, s);
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < FLASH_TASKS; i++)
        for (size_t n = flash_task(i, all_blocks(s)); n < flash_task(i + 1, all_blocks(s)); n++)
            attend_block(out, lse, scratch + i * flash_scratch(s->head_size), q, k, v, s, n);
}
