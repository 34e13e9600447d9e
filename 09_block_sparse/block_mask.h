/* A block mask: the T x TK pairs cut into blocks of N x N, and for each row of blocks the list of those that
 * are worth visiting.
 *
 * A block is empty (no pair may attend: it is in no list, so nobody loads its keys), full (every pair may:
 * nobody asks again), or partial (the predicate is asked about each pair). At the edges, where N does not
 * divide T or TK, blocks are cut short, and their kind speaks of the pairs that exist.
 *
 * Dong, Feng, Guessous, Liang and He 2024 (FlexAttention).
 */
#ifndef BLOCK_MASK_H
#define BLOCK_MASK_H

#include "closed_form.h"

/* May query q of batch entry b and head h attend to key kv? attends() of shape.h is one. */
typedef bool MaskPredicate(const AttentionShape *s, int b, int h, int q, int kv);

typedef struct {
    int key_block;
    BlockKind kind; /* BLOCK_PARTIAL or BLOCK_FULL */
} ListedBlock;

typedef struct {
    int block;                    /* N */
    int batch, heads;             /* how many sets of lists: 1 where b, or h, makes no difference */
    int query_blocks, key_blocks; /* ceil(T / N), ceil(TK / N) */
    int *count;                   /* (batch, heads, query_blocks): the length of each list */
    ListedBlock *listed;          /* (batch, heads, query_blocks, key_blocks): the lists, keys ascending */
    MaskPredicate *predicate;     /* what it was filled from; partial blocks ask it */
} BlockMask;

#ifdef __cplusplus
extern "C" {
#endif

/* How many floats of memory the lists for s->block need, and the mask in that memory, not yet filled.
 * by_batch, by_head: the predicate looks at b, at h, so that each needs lists of its own. Batch entries that
 * differ in s->lengths always get them. */
size_t block_mask_floats(const AttentionShape *s, bool by_batch, bool by_head);
BlockMask block_mask_in(float *memory, const AttentionShape *s, bool by_batch, bool by_head);

/* Fills the lists by asking about the pairs: at most T * TK questions for each set of lists. */
void fill_from_predicate(BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s);

/* Fills them with the same lists that attends() would give, by closed_form(): a few comparisons for each block between the
 * first key and the last that a query of its row sees. */
void fill_from_closed_form(BlockMask *mask, const AttentionShape *s);

/* The same lists from the side of the keys: for each row of key blocks the query blocks that list it,
 * ascending. Of what it returns, query_blocks and key_blocks have changed places, and key_block of a
 * ListedBlock is the number of a query block. One walk through the lists makes it. transposed_mask_in: not yet
 * filled. */
size_t transposed_mask_floats(const AttentionShape *s, bool by_batch, bool by_head);
BlockMask transposed_mask_in(float *memory, const BlockMask *mask);
BlockMask transpose_in(float *memory, const BlockMask *mask);

/* Which list belongs to query block i of (b, h). */
HOST_DEVICE static inline size_t list_index(const BlockMask *mask, int b, int h, int i)
{
    size_t set = (size_t)(mask->batch > 1 ? b : 0) * mask->heads + (mask->heads > 1 ? h : 0);
    return set * mask->query_blocks + i;
}

/* That list: *count blocks. */
HOST_DEVICE static inline const ListedBlock *block_list(const BlockMask *mask, int b, int h, int i,
                                                        int *count)
{
    size_t index = list_index(mask, b, h, i);
    *count = mask->count[index];
    return mask->listed + index * mask->key_blocks;
}

/* How many of a list's blocks come before this one: they ascend. */
static inline int listed_before(const ListedBlock *list, int count, int key_block)
{
    int n = 0;
    while (n < count) {
        int middle = n + (count - n) / 2;
        if (list[middle].key_block < key_block)
            n = middle + 1;
        else
            count = middle;
    }
    return n;
}

/* How many blocks of each kind the lists hold, and how many blocks there are in all, over all sets. */
typedef struct {
    size_t full, partial, all;
} BlockCount;
BlockCount count_blocks(const BlockMask *mask);

#ifdef __cplusplus
}
#endif

#endif
