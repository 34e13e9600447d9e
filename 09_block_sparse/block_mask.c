/* From a mask to the lists of its blocks. The contracts are in the header. */
#include "block_mask.h"

#include <string.h>

#include "../07_flash_tiled/flash_tiled_simd.h"

static size_t list_count(const BlockMask *mask)
{
    return (size_t)mask->batch * mask->heads * mask->query_blocks;
}

static BlockMask sizes(const AttentionShape *s, bool by_batch, bool by_head)
{
    return (BlockMask){
        .block = s->block,
        .batch = by_batch || s->lengths ? s->batch : 1,
        .heads = by_head ? s->heads : 1,
        .query_blocks = (s->tokens - 1) / s->block + 1,
        .key_blocks = (s->key_tokens - 1) / s->block + 1,
    };
}

static size_t floats_of(const BlockMask *mask)
{
    size_t bytes_a_list = mask->key_blocks * sizeof(ListedBlock) + sizeof(int);
    return list_count(mask) * (bytes_a_list / sizeof(float));
}

static void place(BlockMask *mask, float *memory)
{
    mask->listed = (ListedBlock *)memory;
    mask->count = (int *)(mask->listed + list_count(mask) * mask->key_blocks);
}

size_t block_mask_floats(const AttentionShape *s, bool by_batch, bool by_head)
{
    BlockMask mask = sizes(s, by_batch, by_head);
    return floats_of(&mask);
}

BlockMask block_mask_in(float *memory, const AttentionShape *s, bool by_batch, bool by_head)
{
    BlockMask mask = sizes(s, by_batch, by_head);
    place(&mask, memory);
    return mask;
}

/* ---- From the side of the keys ---- */

static BlockMask transposed(const BlockMask *mask)
{
    BlockMask turned = *mask;
    turned.query_blocks = mask->key_blocks;
    turned.key_blocks = mask->query_blocks;
    return turned;
}

size_t transposed_mask_floats(const AttentionShape *s, bool by_batch, bool by_head)
{
    BlockMask mask = sizes(s, by_batch, by_head), turned = transposed(&mask);
    return floats_of(&turned);
}

BlockMask transposed_mask_in(float *memory, const BlockMask *mask)
{
    BlockMask turned = transposed(mask);
    place(&turned, memory);
    return turned;
}

BlockMask transpose_in(float *memory, const BlockMask *mask)
{
    BlockMask turned = transposed_mask_in(memory, mask);
    memset(turned.count, 0, list_count(&turned) * sizeof *turned.count);

    for (int b = 0; b < mask->batch; b++)
        for (int h = 0; h < mask->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                int count;
                const ListedBlock *list = block_list(mask, b, h, i, &count);
                for (int n = 0; n < count; n++) { /* i is met in ascending order, so each list is too */
                    size_t index = list_index(&turned, b, h, list[n].key_block);
                    ListedBlock *end = turned.listed + index * turned.key_blocks + turned.count[index]++;
                    *end = (ListedBlock){i, list[n].kind};
                }
            }
    return turned;
}

/* ---- From a predicate ---- */

/* Asks until a yes and a no were heard. */
static BlockKind ask_pairs(MaskPredicate *predicate, const AttentionShape *s, int b, int h, int q, int q_end,
                           int kv, int kv_end)
{
    bool first = predicate(s, b, h, q, kv);
    for (int t = q; t < q_end; t++)
        for (int t2 = kv; t2 < kv_end; t2++)
            if (predicate(s, b, h, t, t2) != first)
                return BLOCK_PARTIAL;
    return first ? BLOCK_FULL : BLOCK_EMPTY;
}

/* The closed form is asked only about blocks between the first and the last key that some query of theirs sees: with small
 * blocks and a narrow mask those are few. */
static void fill(BlockMask *mask, bool closed, const AttentionShape *s)
{
    int N = mask->block;
#pragma omp parallel for collapse(3) schedule(dynamic, 16)
    for (int b = 0; b < mask->batch; b++)
        for (int h = 0; h < mask->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                size_t index = list_index(mask, b, h, i);
                ListedBlock *list = mask->listed + index * mask->key_blocks;
                int count = 0, q = i * N, q_end = smaller(q + N, s->tokens);

                FlashSpan reach = {.end = s->key_tokens};
                if (closed)
                    reach = flash_span(s, b, q, q_end - q);

                for (int j = reach.first / N; j <= (reach.end - 1) / N; j++) {
                    int kv = j * N, kv_end = smaller(kv + N, s->key_tokens);
                    BlockKind kind = closed ? closed_form(s, b, q, q_end, kv, kv_end)
                                            : ask_pairs(mask->predicate, s, b, h, q, q_end, kv, kv_end);
                    if (kind != BLOCK_EMPTY)
                        list[count++] = (ListedBlock){j, kind};
                }
                mask->count[index] = count;
            }
}

void fill_from_predicate(BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s)
{
    mask->predicate = predicate;
    fill(mask, false, s);
}

void fill_from_closed_form(BlockMask *mask, const AttentionShape *s)
{
    mask->predicate = attends;
    fill(mask, true, s);
}

BlockCount count_blocks(const BlockMask *mask)
{
    size_t lists = list_count(mask);
    BlockCount total = {.all = lists * mask->key_blocks};
    for (size_t index = 0; index < lists; index++)
        for (int n = 0; n < mask->count[index]; n++) {
            bool full = mask->listed[index * mask->key_blocks + n].kind == BLOCK_FULL;
            total.full += full;
            total.partial += !full;
        }
    return total;
}
