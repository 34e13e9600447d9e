/* From a mask to the lists of its blocks. The contracts are in the header. */
#include "block_mask.h"

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

static int larger(int a, int b)
{
    return a > b ? a : b;
}

size_t block_mask_floats(const AttentionShape *s, bool by_batch, bool by_head)
{
    size_t query_blocks = (s->tokens - 1) / s->block + 1, key_blocks = (s->key_tokens - 1) / s->block + 1;
    size_t rows = (by_batch || s->lengths ? s->batch : 1) * (size_t)(by_head ? s->heads : 1) * query_blocks;
    return rows * key_blocks * (sizeof(ListedBlock) / sizeof(float)) + rows * (sizeof(int) / sizeof(float));
}

BlockMask block_mask_in(float *memory, const AttentionShape *s, bool by_batch, bool by_head)
{
    BlockMask mask = {
        .block = s->block,
        .batch = by_batch || s->lengths ? s->batch : 1,
        .heads = by_head ? s->heads : 1,
        .query_blocks = (s->tokens - 1) / s->block + 1,
        .key_blocks = (s->key_tokens - 1) / s->block + 1,
        .listed = (ListedBlock *)memory,
    };
    size_t rows = (size_t)mask.batch * mask.heads * mask.query_blocks;
    mask.count = (int *)(mask.listed + rows * mask.key_blocks);
    return mask;
}

/* ---- From a predicate ---- */

static BlockKind ask_all(MaskPredicate *predicate, const AttentionShape *s, int b, int h, int q, int q_end,
                         int kv, int kv_end)
{
    bool some = false, all = true;
    for (int i = q; i < q_end; i++)
        for (int j = kv; j < kv_end; j++) {
            bool may = predicate(s, b, h, i, j);
            some |= may;
            all &= may;
            if (some && !all)
                return BLOCK_PARTIAL;
        }
    return all ? BLOCK_FULL : BLOCK_EMPTY;
}

/* Lists the blocks of every row. predicate NULL: by the closed form. */
static void fill(BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s)
{
    int N = mask->block;
#pragma omp parallel for collapse(3)
    for (int b = 0; b < mask->batch; b++)
        for (int h = 0; h < mask->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                size_t row = ((size_t)b * mask->heads + h) * mask->query_blocks + i;
                ListedBlock *list = mask->listed + row * mask->key_blocks;
                int count = 0, q = i * N, q_end = smaller(q + N, s->tokens);
                for (int j = 0; j < mask->key_blocks; j++) {
                    int kv = j * N, kv_end = smaller(kv + N, s->key_tokens);
                    BlockKind kind = predicate ? ask_all(predicate, s, b, h, q, q_end, kv, kv_end)
                                               : closed_form(s, b, q, q_end, kv, kv_end);
                    if (kind != BLOCK_EMPTY)
                        list[count++] = (ListedBlock){j, kind};
                }
                mask->count[row] = count;
            }
}

void fill_from_predicate(BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s)
{
    fill(mask, predicate, s);
}

void fill_from_closed_form(BlockMask *mask, const AttentionShape *s)
{
    fill(mask, NULL, s);
}

/* ---- In closed form ---- */

/* A range of whole numbers against another: all inside, some, or none. An empty first range is inside. */
static BlockKind inside(long first, long last, long from, long to)
{
    if (first >= from && last <= to)
        return BLOCK_FULL;
    return last >= from && first <= to ? BLOCK_PARTIAL : BLOCK_EMPTY;
}

/* A block is a rectangle of places p0 <= p <= p1 and keys k0 <= kv <= k1, so p - kv takes every whole number
 * between p0 - k1 and p1 - k0, and a mask of p - kv alone asks only how that range lies. */
static BlockKind mask_kind(const AttentionShape *s, int p0, int p1, int k0, int k1)
{
    const Mask *mask = &s->mask;
    const long everything = 1L << 40;
    BlockKind kind;
    long d0 = (long)p0 - k1, d1 = (long)p1 - k0, reach = (long)mask->width * mask->extra;
    switch (mask->kind) {
    case MASK_NONE: return BLOCK_FULL;
    case MASK_CAUSAL: return inside(d0, d1, 0, everything);
    case MASK_FUTURE: return inside(d0, d1, -everything, -1);
    case MASK_WINDOW: return inside(d0, d1, 0, mask->width - 1);
    case MASK_PREFIX:
        if (k1 < mask->width)
            return BLOCK_FULL;
        kind = inside(d0, d1, 0, everything);
        return kind == BLOCK_EMPTY && k0 < mask->width ? BLOCK_PARTIAL : kind;
    case MASK_LOCAL_GLOBAL: {
        /* What is left once the global rows and columns are cut away must lie in the band. */
        long p = larger(p0, mask->extra), k = larger(k0, mask->extra);
        bool global = p0 < mask->extra || k0 < mask->extra, band_left = p <= p1 && k <= k1;
        BlockKind band = band_left ? inside(p - k1, p1 - k, 1 - mask->width, mask->width - 1) : BLOCK_FULL;
        return band == BLOCK_EMPTY && global ? BLOCK_PARTIAL : band;
    }
    case MASK_DILATED: {
        if (mask->extra == 1)
            return inside(d0, d1, 0, reach - 1);
        long first = d0 > 0 ? (d0 + mask->extra - 1) / mask->extra * mask->extra
                            : 0; /* the first multiple of D not below */
        if (first > d1 || first >= reach)
            return BLOCK_EMPTY;
        return d0 == d1 ? BLOCK_FULL : BLOCK_PARTIAL;
    }
    case MASK_DOCUMENTS: {
        /* Documents are numbered along the tokens, so a range of tokens holds a range of documents. */
        const int *document = mask->document;
        BlockKind shared = inside(document[p0], document[p1], document[k0], document[k1]);
        if (shared == BLOCK_EMPTY || d1 < 0)
            return BLOCK_EMPTY;
        bool one = document[p0] == document[p1] && document[k0] == document[k1];
        return one && d0 >= 0 ? BLOCK_FULL : BLOCK_PARTIAL;
    }
    }
    return BLOCK_PARTIAL;
}

BlockKind closed_form(const AttentionShape *s, int b, int q, int q_end, int kv, int kv_end)
{
    int shift = s->key_tokens - s->tokens, p0 = q + shift, p1 = q_end - 1 + shift, k1 = kv_end - 1;
    BlockKind kind = mask_kind(s, p0, p1, kv, k1);
    if (s->causal)
        kind = smaller(kind, inside((long)p0 - k1, (long)p1 - kv, 0, 1L << 40));
    if (s->lengths)
        kind = smaller(kind, inside(kv, k1, 0, s->lengths[b] - 1));
    return kind;
}

BlockCount count_blocks(const BlockMask *mask)
{
    size_t rows = (size_t)mask->batch * mask->heads * mask->query_blocks;
    BlockCount total = {.all = rows * mask->key_blocks};
    for (size_t row = 0; row < rows; row++)
        for (int i = 0; i < mask->count[row]; i++) {
            bool full = mask->listed[row * mask->key_blocks + i].kind == BLOCK_FULL;
            total.full += full;
            total.partial += !full;
        }
    return total;
}
