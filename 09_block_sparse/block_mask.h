/* A block mask: the T x TK pairs cut into blocks of N x N, and for each row of blocks the list of those that
 * are worth visiting.
 *
 * A block is empty (no pair may attend: it is in no list, so nobody loads it), full (every pair may: nobody
 * asks again), or partial (the predicate is asked pair by pair). Masks that look at neither b nor h get one
 * set of lists for all. Dong, Feng, Guessous, Liang and He 2024 (FlexAttention).
 */
#ifndef BLOCK_MASK_H
#define BLOCK_MASK_H

#include "shape.h"

typedef enum { BLOCK_EMPTY, BLOCK_PARTIAL, BLOCK_FULL } BlockKind;

typedef struct {
    int key_block;
    BlockKind kind; /* BLOCK_PARTIAL or BLOCK_FULL */
} ListedBlock;

typedef struct {
    int block;                    /* N */
    int batch, heads;             /* how many sets of lists: 1 where b, or h, makes no difference */
    int query_blocks, key_blocks; /* ceil(T / N), ceil(TK / N); the last block of each may be cut short */
    int *count;                   /* (batch, heads, query_blocks): the length of each list */
    ListedBlock
        *listed; /* (batch, heads, query_blocks, key_blocks): key blocks ascending, the first `count` used */
} BlockMask;

/* May query q of batch entry b and head h attend to key kv? */
typedef bool MaskPredicate(const AttentionShape *s, int b, int h, int q, int kv);

/* What a block mask of s needs, in floats, and the empty mask in that memory (16-byte aligned). by_head: the
 * predicate looks at h. There is one set of lists for each batch entry where by_batch is set or s has
 * lengths. */
size_t block_mask_floats(const AttentionShape *s, bool by_batch, bool by_head);
BlockMask block_mask_in(float *memory, const AttentionShape *s, bool by_batch, bool by_head);

/* Fills the lists from any predicate, asking about each pair: B*NH*T*TK questions at most. */
void fill_from_predicate(BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s);

/* The same lists for the book's own masks (s->mask, causal, lengths), from their closed form: a few
 * comparisons a block. */
void fill_from_closed_form(BlockMask *mask, const AttentionShape *s);

/* What the book's own masks say of the queries q <= .. < q_end and keys kv <= .. < kv_end, without asking
 * about any pair. Each mask alone is exact. Of several together (causal, lengths) it may call partial what is
 * empty: slower, never wrong. */
BlockKind closed_form(const AttentionShape *s, int b, int q, int q_end, int kv, int kv_end);

/* The list of query block i for (b, h). */
static inline const ListedBlock *block_list(const BlockMask *mask, int b, int h, int i, int *count)
{
    size_t row =
        ((size_t)(mask->batch > 1 ? b : 0) * mask->heads + (mask->heads > 1 ? h : 0)) * mask->query_blocks +
        i;
    *count = mask->count[row];
    return mask->listed + row * mask->key_blocks;
}

/* How many blocks of each kind the lists hold, and how many there are in all (of the sets kept). */
typedef struct {
    size_t full, partial, all;
} BlockCount;
BlockCount count_blocks(const BlockMask *mask);

#endif
