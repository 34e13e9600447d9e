/* Attention near the multiply-add peak. The contract is in the header; this is how it is done, and why.
 *
 * - Lanes are queries. A vector holds one number of LANES different queries, so that a row's maximum, sum and
 *   weights never leave their lane: nothing is added up across a vector. Keys and values are read number by
 *   number, as they lie in memory, and broadcast. Only the queries are transposed, once a block, and the output
 *   back.
 * - Sums stay in registers. Both products are multiply(): TILE x VECTORS sums, so that each number loaded is
 *   used several times and the multiply-add units do not wait for memory.
 * - The score comes out as an exponent. scale and log2 e are multiplied into the queries once, and the sums start
 *   at -m: after the product there is nothing left to do but 2^x, on the registers, before they are stored.
 * - The maximum is lazy. Softmax needs no maximum but a number near it. m follows only where a score has
 *   outgrown it by 2^headroom, which is looked at once a tile; then the tile is done again.
 * - FLASH_KEYS keys a tile: their weights stay in the cache between the two products, and the output is loaded
 *   and stored once for all of them.
 * - What no row sees is left out, down to single vectors of rows along the diagonal of a causal mask. */
#include "flash_tiled_simd.h"

#include <math.h>
#include <string.h>

#include "flash_dropout.h"

#define INLINE static inline __attribute__((always_inline))

static const float log2e = 1.44269504f;

/* How far a score may stand above m, in powers of two, before m has to follow. */
static const float headroom = 20;

static int smaller(int a, int b)
{
    return a < b ? a : b;
}
static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* ---- Arithmetic on vectors ---- */

/* c[i][j] += the sum over k of a[i][k * step] * b[k][j]: both products of attention, for TILE numbers of a
 * (each broadcast to a whole vector) by up to VECTORS vectors of b. It is always inlined with `vectors` a
 * constant, and c has a constant size: only so do all of c stay in registers. */
INLINE void multiply(Vector c[TILE][VECTORS], int vectors, const float *const a[TILE], size_t step,
                     const float *b, int n)
{
    for (int k = 0; k < n; k++, b += FLASH_ROWS)
        EACH_VECTOR(i, j, vectors)
        {
            c[i][j] += a[i][k * step] * ((const Vector *)b)[j];
        }
}

/* The same for a score, step 1, in sums of SHORT_SUM terms: rounding then costs a score of 256 terms no more
 * than one of 64. A large score needs that, as its error goes into an exponent. */
INLINE void add_scores(Vector c[TILE][VECTORS], int vectors, const float *a[TILE], const float *b, int n)
{
    multiply(c, vectors, a, 1, b, smaller(n, SHORT_SUM));
    for (int k = SHORT_SUM; k < n; k += SHORT_SUM) {
        Vector more[TILE][VECTORS] = {0};
        for (int i = 0; i < TILE; i++)
            a[i] += SHORT_SUM;
        multiply(more, vectors, a, 1, b + k * FLASH_ROWS, smaller(n - k, SHORT_SUM));
        EACH_VECTOR(i, j, vectors)
        {
            c[i][j] += more[i][j];
        }
    }
}

/* ---- The steps of a tile: up to FLASH_KEYS keys by the block's vectors from .. from + vectors - 1 ---- */

/* What is added to the scores of TILE keys: the bias, or -inf where a row may not look. */
static void look_up(const FlashBlock *block, Vector extra[TILE][VECTORS], int key, int from, int vectors)
{
    const AttentionShape *s = block->s;
    int rows = smaller(block->rows, (from + vectors) * LANES);
    for (int i = 0; i < TILE; i++)
        for (int r = 0; r < FLASH_ROWS; r++) {
            bool between = (block->first[r] <= key + i) & (key + i < block->end[r]);
            ((float *)extra[i])[r] = between ? 0 : -INFINITY;
        }
    if (block->one_run && !s->bias)
        return;
    for (int r = from * LANES; r < rows; r++) {
        int h = block->row[r].h, t = block->row[r].t;
        float *extra_r = (float *)extra + r; /* key i: extra_r[i * FLASH_ROWS] */
        for (int i = 0; !block->one_run && i < TILE; i++)
            if (extra_r[i * FLASH_ROWS] == 0 && !attends(s, block->b, h, t, key + i))
                extra_r[i * FLASH_ROWS] = -INFINITY;
        if (!s->bias)
            continue;
        const float *bias = bias_row(s, block->b, h, t) + key * s->bias_stride[3];
        bool sees_all = block->one_run && block->first[r] <= key && key + TILE <= block->end[r];
        for (int i = 0; i < TILE; i++)
            if (sees_all || extra_r[i * FLASH_ROWS] == 0)
                extra_r[i * FLASH_ROWS] = log2e * bias[i * s->bias_stride[3]];
    }
}

/* p = 2^(score - m), its sum over the keys, and the largest score - m. */
INLINE void weigh(const FlashBlock *block, float *p, Vector top[VECTORS], Vector sum[VECTORS], int key,
                  int keys, bool look, int from, int vectors)
{
    const Vector *m = (const Vector *)block->m + from;
    for (int j = 0; j < vectors; j++) {
        top[j] = (Vector){0} - INFINITY;
        sum[j] = (Vector){0};
    }
    for (int i0 = 0; i0 < keys; i0 += TILE) {
        Vector c[TILE][VECTORS], extra[TILE][VECTORS];
        const float *k[TILE]; /* past the last key: the last again, not used */
        for (int i = 0; i < TILE; i++)
            k[i] = block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step;

        /* The sums start at -m: what comes out is the exponent. */
        if (look)
            look_up(block, extra, key + i0, from, vectors);
        EACH_VECTOR(i, j, vectors)
        {
            c[i][j] = (look ? extra[i][from + j] : (Vector){0}) - m[j];
        }
        add_scores(c, vectors, k, block->q_columns + from * LANES, block->s->head_size);

        EACH_VECTOR(i, j, vectors)
        {
            if (i0 + i < keys) {
                Vector x = c[i][j];
                if (look)
                    x = vector_select(extra[i][from + j] == -INFINITY, extra[i][from + j], x);
                top[j] = vector_max(x, top[j]);
                Vector weight = exp2_vector(x);
                sum[j] += weight;
                ((Vector *)(p + (i0 + i) * FLASH_ROWS))[from + j] = weight;
            }
        }
    }
}

/* Do the weights fit into floats with this m? A row that has seen nothing yet started with m = 0, which may
 * also be far too large for it. Where not, m moves to the largest score and what was summed up so far is
 * mended; returns true if the tile must be weighed again. Random scores never get here; large ones do once or
 * twice a row. */
static bool raise_maximum(FlashBlock *block, const Vector top[VECTORS], int from, int vectors)
{
    bool again = false;
    for (int i = 0; i < vectors * LANES; i++) {
        int row = from * LANES + i;
        float above = ((const float *)top)[i];
        bool nothing_yet = block->l[row] == 0;
        if (above <= headroom && (!nothing_yet || above >= -headroom || above == -INFINITY))
            continue;
        float mend = nothing_yet ? 0 : exp2f(-above);
        block->m[row] += above;
        block->l[row] *= mend;
        for (size_t d = 0; d < (size_t)block->s->head_size; d++)
            block->out_columns[d * FLASH_ROWS + row] *= mend;
        again = true;
    }
    return again;
}

/* A lane is a row, so one Philox call gives the factors of four keys for each of LANES rows. */
static void drop_out(const FlashBlock *block, float *p, int key, int keys, int from, int vectors)
{
    const AttentionShape *s = block->s;
    uint32_t threshold = dropout_threshold(s->dropout);
    for (int j = from; j < from + vectors; j++) {
        WordVector row_low = {0}, row_high = {0};
        for (int i = 0; i < LANES && j * LANES + i < block->rows; i++) {
            const FlashRow *row = &block->row[j * LANES + i];
            uint64_t index = lse_index(s, block->b, row->h, row->t);
            row_low[i] = (uint32_t)index;
            row_high[i] = (uint32_t)(index >> 32);
        }
        for (int four = key / 4; 4 * four < key + keys; four++) {
            WordVector word[4];
            dropout_word_vectors(word, s->dropout_seed, row_low, row_high, (WordVector){0} + (uint32_t)four);
            for (int i = larger(0, key - 4 * four); i < smaller(4, key + keys - 4 * four); i++)
                ((Vector *)(p + (4 * four + i - key) * FLASH_ROWS))[j] *=
                    dropout_factors(word[i], threshold, 1 / (1 - s->dropout));
        }
    }
}

/* out += p^T V, TILE numbers of each value at a time. */
INLINE void add_values(FlashBlock *block, const float *p, int key, int keys, int from, int vectors)
{
    int head_size = block->s->head_size;
    for (int d = 0; d < head_size; d += TILE) {
        Vector c[TILE][VECTORS];
        Vector *out = (Vector *)block->out_columns + (size_t)d * VECTORS + from;
        const float *v[TILE]; /* past the last: the last again; out_columns has room for the results */
        for (int i = 0; i < TILE; i++)
            v[i] = block->v + (size_t)key * block->key_step + smaller(d + i, head_size - 1);
        EACH_VECTOR(i, j, vectors)
        {
            c[i][j] = out[i * VECTORS + j];
        }
        multiply(c, vectors, v, block->key_step, p + from * LANES, keys);
        EACH_VECTOR(i, j, vectors)
        {
            out[i * VECTORS + j] = c[i][j];
        }
    }
}

INLINE void attend_tile(FlashBlock *block, int key, int keys, bool look, int from, int vectors)
{
    _Alignas(64) float p[FLASH_KEYS * FLASH_ROWS];
    Vector top[VECTORS], sum[VECTORS];
    weigh(block, p, top, sum, key, keys, look, from, vectors);
    if (raise_maximum(block, top, from, vectors))
        weigh(block, p, top, sum, key, keys, look, from, vectors);
    for (int j = 0; j < vectors; j++)
        ((Vector *)block->l)[from + j] += sum[j];
    if (block->s->dropout > 0)
        drop_out(block, p, key, keys, from, vectors);
    add_values(block, p, key, keys, from, vectors);
}

/* ---- The life of a block ---- */

/* Floats of q_columns, and of out_columns: a multiple of 64 bytes. */
static size_t columns_size(int head_size)
{
    size_t rounded = ((size_t)head_size + 15) / 16 * 16;
    return rounded * FLASH_ROWS;
}

size_t flash_scratch(int head_size)
{
    return 2 * columns_size(head_size);
}

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
    MaskKind kind = s->mask.kind;
    *first = kind == MASK_WINDOW      ? place < s->mask.width ? 0 : place - s->mask.width + 1
             : kind == MASK_FUTURE    ? larger(0, place + 1)
             : kind == MASK_DOCUMENTS ? document_start(s->mask.document, place)
                                      : 0;
    *end = keys_end(s, b, t);
    return kind != MASK_LOCAL_GLOBAL && kind != MASK_DILATED;
}

void flash_begin(FlashBlock *block, float *scratch)
{
    const AttentionShape *s = block->s;
    block->q_columns = scratch;
    block->out_columns = scratch + columns_size(s->head_size);
    memset(scratch, 0, flash_scratch(s->head_size) * sizeof(float));
    memset(block->m, 0, sizeof block->m);
    memset(block->l, 0, sizeof block->l);
    memset(block->first, 0, sizeof block->first);
    memset(block->end, 0, sizeof block->end);
    for (int j = 0; j < VECTORS; j++) {
        block->vector_first[j] = s->key_tokens;
        block->vector_end[j] = 0;
    }
    for (int r = 0; r < block->rows; r++) {
        block->one_run = flash_bounds(s, block->b, block->row[r].t, &block->first[r], &block->end[r]);
        block->vector_first[r / LANES] = smaller(block->vector_first[r / LANES], block->first[r]);
        block->vector_end[r / LANES] = larger(block->vector_end[r / LANES], block->end[r]);
        for (size_t d = 0; d < (size_t)s->head_size; d++)
            block->q_columns[d * FLASH_ROWS + r] = s->scale * log2e * block->row[r].q[d];
    }
}

/* The vectors from .. to - 1 hold all rows that may see the key; returns how many keys on this holds. */
static int seeing_vectors(const FlashBlock *block, int key, int keys, int *from, int *to)
{
    *from = VECTORS;
    *to = 0;
    for (int j = 0; j < VECTORS && j * LANES < block->rows; j++) {
        int first = block->vector_first[j], end = block->vector_end[j];
        if (first <= key && key < end) {
            *from = smaller(*from, j);
            *to = j + 1;
        }
        if (first > key)
            keys = smaller(keys, first - key);
        if (end > key)
            keys = smaller(keys, end - key);
    }
    return keys;
}

void flash_attend(FlashBlock *block, int first, int end, bool look)
{
    for (int key = first, keys; key < end; key += keys) {
        int from = 0, to = (block->rows + LANES - 1) / LANES;
        keys = smaller(FLASH_KEYS, end - key);
        if (look)
            keys = seeing_vectors(block, key, keys, &from, &to);
        if (to - from == 3)
            attend_tile(block, key, keys, look, from, 3);
        else if (to - from == 2)
            attend_tile(block, key, keys, look, from, 2);
        else if (to - from == 1)
            attend_tile(block, key, keys, look, from, 1);
    }
}

void flash_attend_allowed(FlashBlock *block)
{
    if (!block->one_run || block->s->bias) {
        int end = 0;
        for (int r = 0; r < block->rows; r++)
            end = larger(end, block->end[r]);
        flash_attend(block, 0, end, true);
        return;
    }
    int first = block->first[0], all_first = first, end = block->end[0], all_end = end;
    for (int r = 1; r < block->rows; r++) {
        first = smaller(first, block->first[r]);
        all_first = larger(all_first, block->first[r]);
        end = larger(end, block->end[r]);
        all_end = smaller(all_end, block->end[r]);
    }
    if (all_first >= all_end)
        all_first = all_end = end;
    flash_attend(block, first, all_first, true);
    flash_attend(block, all_first, all_end, false);
    flash_attend(block, all_end, end, true);
}

void flash_finish(FlashBlock *block)
{
    for (int r = 0; r < block->rows; r++) {
        const FlashRow *row = &block->row[r];
        float l = block->l[r], one_over_l = 1 / l;
        for (size_t d = 0; d < (size_t)block->s->head_size; d++)
            row->out[d] = l == 0 ? 0 : block->out_columns[d * FLASH_ROWS + r] * one_over_l;
        if (row->lse)
            *row->lse = l == 0 ? -INFINITY : (float)((block->m[r] + log2((double)l)) / 1.4426950408889634);
    }
}

/* ---- All blocks of a problem ---- */

static size_t blocks_of_a_head(const AttentionShape *s)
{
    return ((size_t)s->tokens + FLASH_ROWS - 1) / FLASH_ROWS;
}

size_t flash_view_scratch(const AttentionShape *s)
{
    return flash_task_scratch((size_t)s->batch * s->heads * blocks_of_a_head(s), s->head_size);
}

static void attend_block(const FlashView *view, float *scratch, const AttentionShape *s, size_t n)
{
    size_t bh = n / blocks_of_a_head(s), b = bh / s->heads, h = bh % s->heads;
    int t = (int)(n % blocks_of_a_head(s)) * FLASH_ROWS;
    size_t head = b * view->k_batch + h * view->k_head;
    FlashBlock block = {
        .s = s, .b = (int)b, .k = view->k + head, .v = view->v + head, .key_step = view->k_token};
    block.rows = smaller(FLASH_ROWS, s->tokens - t);
    for (int r = 0; r < block.rows; r++)
        block.row[r] = (FlashRow){
            .q = view->q + b * view->q_batch + h * view->q_head + (size_t)(t + r) * view->q_token,
            .out = view->out + b * view->out_batch + h * view->out_head + (size_t)(t + r) * view->out_token,
            .lse = view->lse ? view->lse + lse_index(s, (int)b, (int)h, t + r) : NULL,
            .h = (int)h,
            .t = t + r,
        };
    flash_begin(&block, scratch);
    flash_attend_allowed(&block);
    flash_finish(&block);
}

void flash_attention(const FlashView *view, float *scratch, const AttentionShape *s)
{
    size_t blocks = (size_t)s->batch * s->heads * blocks_of_a_head(s);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < FLASH_TASKS; i++)
        for (size_t n = flash_task(i, blocks); n < flash_task(i + 1, blocks); n++)
            attend_block(view, scratch + i * flash_scratch(s->head_size), s, n);
}

FlashView flash_view(const float *q, const float *k, const float *v, float *out, float *lse,
                     const AttentionShape *s)
{
    FlashView view = {.q = q, .k = k, .v = v, .out = out, .lse = lse};
    view.q_token = view.k_token = view.out_token = s->head_size;
    view.q_head = view.out_head = (size_t)s->tokens * s->head_size;
    view.q_batch = view.out_batch = s->heads * view.q_head;
    view.k_head = (size_t)s->key_tokens * s->head_size;
    view.k_batch = s->kv_heads * view.k_head;
    return view;
}

void attention_simd(float *out, float *lse, float *scratch, const float *q, const float *k, const float *v,
                    const AttentionShape *s)
{
    FlashView view = flash_view(q, k, v, out, lse, s);
    flash_attention(&view, scratch, s);
}
