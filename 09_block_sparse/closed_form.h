/* What the book's masks say of a whole block of pairs, in a few comparisons and without asking about any pair: inline,
 * for the CPU and for GPU kernels alike. */
#ifndef CLOSED_FORM_H
#define CLOSED_FORM_H

#include "shape.h"

/* From least to most: where two masks hold at once, a block is at most the lesser of its two kinds. */
typedef enum { BLOCK_EMPTY, BLOCK_PARTIAL, BLOCK_FULL } BlockKind;

HOST_DEVICE static inline BlockKind lesser(BlockKind a, BlockKind b)
{
    return a < b ? a : b;
}

/* A range of whole numbers first .. last against another: all inside, some, or none. */
HOST_DEVICE static inline BlockKind inside(int64_t first, int64_t last, int64_t from, int64_t to)
{
    if (first >= from && last <= to)
        return BLOCK_FULL;
    return last >= from && first <= to ? BLOCK_PARTIAL : BLOCK_EMPTY;
}

/* A block is a rectangle of places p0 <= p <= p1 and keys k0 <= kv <= k1. In it p - kv takes every whole
 * number from p0 - k1 to p1 - k0, so a mask of p - kv alone asks only how that range lies. */
HOST_DEVICE static inline BlockKind mask_kind(const AttentionShape *s, int p0, int p1, int k0, int k1)
{
    const Mask *mask = &s->mask;
    int64_t nearest = (int64_t)p0 - k1, farthest = (int64_t)p1 - k0, W = mask->width;
    BlockKind past = inside(nearest, farthest, 0, INT64_MAX); /* kv <= p */

    switch (mask->kind) {
    case MASK_NONE: return BLOCK_FULL;
    case MASK_CAUSAL: return past;
    case MASK_FUTURE: return inside(nearest, farthest, INT64_MIN, -1);
    case MASK_WINDOW: return inside(nearest, farthest, 0, W - 1);

    case MASK_PREFIX:
        if (k1 < W)
            return BLOCK_FULL;
        return past == BLOCK_EMPTY && k0 < W ? BLOCK_PARTIAL : past;

    case MASK_LOCAL_GLOBAL: {
        /* The global rows and columns are kept whole; the rectangle without them must lie in the band. */
        int G = mask->extra, p = p0 > G ? p0 : G, k = k0 > G ? k0 : G;
        if (p > p1 || k > k1)
            return BLOCK_FULL;
        BlockKind band = inside((int64_t)p - k1, (int64_t)p1 - k, 1 - W, W - 1);
        return band == BLOCK_EMPTY && (p > p0 || k > k0) ? BLOCK_PARTIAL : band;
    }

    case MASK_DILATED: {
        int64_t D = mask->extra, reach = W * D;
        if (D == 1)
            return inside(nearest, farthest, 0, reach - 1);
        int64_t step = nearest <= 0 ? 0 : (nearest + D - 1) / D * D; /* the first that is not too near */
        if (step > farthest || step >= reach)
            return BLOCK_EMPTY;
        return nearest == farthest ? BLOCK_FULL : BLOCK_PARTIAL; /* two neighbours are never both kept */
    }

    case MASK_DOCUMENTS: { /* numbered along the tokens */
        const int *document = mask->document;
        if (past == BLOCK_EMPTY || document[k1] < document[p0])
            return BLOCK_EMPTY;
        return past == BLOCK_FULL && document[k0] == document[p1] ? BLOCK_FULL : BLOCK_PARTIAL;
    }
    }
    return BLOCK_PARTIAL;
}

/* What s->mask, causality and lengths together say of the queries q <= .. < q_end and the keys
 * kv <= .. < kv_end, neither range empty. */
HOST_DEVICE static inline BlockKind closed_form(const AttentionShape *s, int b, int q, int q_end, int kv,
                                                int kv_end)
{
    int shift = s->key_tokens - s->tokens, p0 = q + shift, p1 = q_end - 1 + shift;

    /* Keys beyond the batch entry's length are cut off first: what is left is a rectangle again. */
    int valid_end = s->lengths && s->lengths[b] < kv_end ? s->lengths[b] : kv_end;
    if (valid_end <= kv)
        return BLOCK_EMPTY;
    BlockKind kind = mask_kind(s, p0, p1, kv, valid_end - 1);
    if (s->causal)
        kind = lesser(kind, inside((int64_t)p0 - (valid_end - 1), (int64_t)p1 - kv, 0, INT64_MAX));
    return lesser(kind, valid_end < kv_end ? BLOCK_PARTIAL : BLOCK_FULL);
}

#endif
