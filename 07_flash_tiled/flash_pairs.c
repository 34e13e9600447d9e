/* What the fast tiles are told of single pairs of a query and a key: mask, lengths, bias, dropout. Most tiles of
 * most problems never ask. The contracts are in flash_tiled_simd.h. */
#include "flash_tiled_simd_backward.h"

#include <math.h>

#include "flash_dropout.h"

/* The first key of the document that position `place` belongs to: the numbers ascend. */
static int document_start(const int *document, int place)
{
    int low = 0, high = place;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (document[middle] < document[place])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool flash_bounds(const AttentionShape *s, int b, int t, int *first, int *end)
{
    int place = t + s->key_tokens - s->tokens;
    const Mask *mask = &s->mask;
    int64_t reach = (int64_t)mask->width * (mask->kind == MASK_DILATED ? mask->extra : 1);
    *first = 0;
    if ((mask->kind == MASK_WINDOW || mask->kind == MASK_DILATED) && place >= reach)
        *first = (int)(place - reach) + 1;
    else if (mask->kind == MASK_FUTURE)
        *first = larger(0, place + 1);
    else if (mask->kind == MASK_DOCUMENTS)
        *first = document_start(mask->document, place);
    *end = keys_end(s, b, t);
    return mask->kind != MASK_LOCAL_GLOBAL && mask->kind != MASK_DILATED;
}

FlashSpan flash_span(const AttentionShape *s, int b, int t, int rows)
{
    FlashSpan span;
    flash_bounds(s, b, t, &span.first, &span.all_end);
    span.one_run = flash_bounds(s, b, t + rows - 1, &span.all_first, &span.end);
    return span;
}

/* The term for a key, of the block's j-th vector of rows. */
INLINE Vector term(const FlashBlock *block, int j, int key, Vector bias)
{
    IntVector first = ((const IntVector *)block->first)[j], end = ((const IntVector *)block->end)[j];
    return vector_select((first <= key) & (key < end), log2e * bias, (Vector){0} - INFINITY);
}

/* The rows of a bias lie along the keys: LANES of them by LANES keys are read at once and transposed. */
static void ask_bias(const FlashBlock *block, Vector *at, int key, int keys, int j)
{
    const AttentionShape *s = block->s;
    size_t step = s->bias_stride[3];
    const float *from[LANES];
    for (int r = 0; r < LANES; r++) { /* past the last row: the last again, which sees nothing there */
        const FlashRow *row = &block->row[smaller(j * LANES + r, block->rows - 1)];
        from[r] = bias_row(s, block->b, row->h, row->t) + key * step;
    }
    for (int i0 = 0; i0 < keys; i0 += LANES) {
        Vector bias[LANES];
        int n = smaller(LANES, keys - i0);
        if (step == 1)
            UNROLL for (int r = 0; r < LANES; r++) bias[r] = load_first(from[r] + i0, n);
        else
            for (int r = 0; r < LANES; r++)
                for (int i = 0; i < LANES; i++)
                    bias[r][i] = i < n ? from[r][(i0 + i) * step] : 0;
        transpose(bias);
        for (int i = 0; i < n; i++)
            at[(i0 + i) * VECTORS] = term(block, j, key + i0 + i, bias[i]);
    }
}

const float *flash_ask(const FlashBlock *block, float *terms, int key, int keys, int from, int vectors)
{
    const AttentionShape *s = block->s;
    for (int j = from; j < from + vectors; j++) {
        Vector *at = (Vector *)terms + j;
        if (s->bias)
            ask_bias(block, at, key, keys, j);
        else
            for (int i = 0; i < keys; i++)
                at[i * VECTORS] = term(block, j, key + i, (Vector){0});
        for (int i = keys; i % TILE; i++)
            at[i * VECTORS] = (Vector){0} - INFINITY;
    }
    if (!block->one_run)
        for (int r = from * LANES; r < smaller(block->rows, (from + vectors) * LANES); r++)
            for (int i = 0; i < keys; i++)
                if (!attends(s, block->b, block->row[r].h, block->row[r].t, key + i))
                    terms[i * FLASH_ROWS + r] = -INFINITY;
    const FlashRow *row = &block->row[from * LANES];
    return s->bias ? bias_row(s, block->b, row->h, row->t) + (key + keys) * s->bias_stride[3] : terms;
}

/* A lane is a row, so one Philox call gives the factors of four keys for each of LANES rows. */
void flash_drop_out(const FlashBlock *block, float *p, int key, int keys, int from, int vectors)
{
    const AttentionShape *s = block->s;
    uint32_t threshold = dropout_threshold(s->dropout);
    const RoundKeys round_keys = round_keys_of(s->dropout_seed);
    for (int j = from; j < from + vectors; j++) {
        _Alignas(64) uint32_t low[LANES] = {0}, high[LANES] = {0};
        for (int i = 0; i < LANES && j * LANES + i < block->rows; i++) {
            const FlashRow *row = &block->row[j * LANES + i];
            uint64_t index = lse_index(s, block->b, row->h, row->t);
            low[i] = (uint32_t)index;
            high[i] = (uint32_t)(index >> 32);
        }
        WordVector row_low = *(WordVector *)low, row_high = *(WordVector *)high;
        for (int four = key / 4; 4 * four < key + keys; four++) {
            WordVector word[4];
            dropout_word_vectors(word, &round_keys, row_low, row_high, (WordVector){0} + (uint32_t)four);
            UNROLL for (int i = 0; i < 4; i++)
            {
                int at = 4 * four + i - key;
                if (0 <= at && at < keys)
                    ((Vector *)(p + at * FLASH_ROWS))[j] *=
                        dropout_factors(word[i], threshold, 1 / (1 - s->dropout));
            }
        }
    }
}

/* Of the keys from .. to - 1. */
static void ask_keys(const FlashBackBlock *x, int r, int from, int to)
{
    const AttentionShape *s = x->s;
    float *extra = x->weights + r * FLASH_BACK_KEYS, *kept = x->kept + r * FLASH_BACK_KEYS;
    int first = 0, end = 0, t = x->t + r, seen_to = smaller(to, x->sight[r / TILE].to);
    bool is = r < x->rows, one_run = !is || flash_bounds(s, x->b, t, &first, &end);
    IntVector lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (int i = from; i < to; i += LANES) {
        IntVector key = lane + (x->key + i), sees = (first <= key) & (key < smaller(end, x->key + seen_to));
        *(Vector *)(extra + i) = vector_select(sees, (Vector){0}, (Vector){0} - INFINITY);
        if (s->dropout > 0)
            *(Vector *)(kept + i) = (Vector){0} + 1;
    }
    for (int i = from; !one_run && i < seen_to; i++)
        if (!attends(s, x->b, x->h, t, x->key + i))
            extra[i] = -INFINITY;
    if (is && s->bias) {
        size_t step = s->bias_stride[3];
        const float *bias = bias_row(s, x->b, x->h, t) + x->key * step;
        for (int i = from; i < seen_to; i += LANES)
            __builtin_prefetch(bias + 4 * s->bias_stride[2] + i * step); /* some rows ahead */
        if (step == 1) /* the same, for the compiler to turn into vectors */
            for (int i = from; i < seen_to; i++)
                extra[i] = extra[i] == 0 ? log2e * bias[i] : -INFINITY;
        else
            for (int i = from; i < seen_to; i++)
                extra[i] = extra[i] == 0 ? log2e * bias[i * step] : -INFINITY;
    }
    if (is && s->dropout > 0 && from < seen_to)
        dropout_row(kept, s, lse_index(s, x->b, x->h, t), x->key, from, seen_to);
}

void flash_ask_row(const FlashBackBlock *x, int r)
{
    const FlashSight *sight = &x->sight[r / TILE];
    int end = round_up(sight->to, FLASH_BACK_UNIT);
    if (sight->from < sight->sure_from)
        ask_keys(x, r, sight->from, sight->sure_from);
    if (sight->sure_to < end)
        ask_keys(x, r, sight->sure_to, end);
}
