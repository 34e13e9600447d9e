/* All blocks of a problem: which rows share one, which keys it meets, which thread does it. The contracts are in
 * flash_tiled_simd.h. */
#include "flash_tiled_simd.h"

void flash_begin_rows(FlashBlock *block)
{
    for (int r = 0; r < FLASH_ROWS; r++) {
        block->m[r] = block->l[r] = 0;
        block->first[r] = block->end[r] = 0;
        if (r < block->rows)
            block->one_run =
                flash_bounds(block->s, block->b, block->row[r].t, &block->first[r], &block->end[r]);
    }
}

/* Where tiles are cut: at any key, or between pairs. */
static int unit_of(const FlashBlock *block)
{
    return block->attend_pairs ? 2 : 1;
}
static int round_down(int n, int unit)
{
    return n / unit * unit;
}

/* The vectors from .. to - 1 hold all rows that may see the key; returns how many keys on this holds. */
static int seeing_vectors(const FlashBlock *block, int key, int keys, int *from, int *to)
{
    *from = VECTORS;
    *to = 0;
    for (int j = 0; j < VECTORS; j++) {
        int first = 0, end = 0; /* the keys that any row of the vector sees */
        for (int r = j * LANES; r < smaller((j + 1) * LANES, block->rows); r++) {
            first = r == j * LANES || block->first[r] < first ? block->first[r] : first;
            end = block->end[r] > end ? block->end[r] : end;
        }
        first = round_down(first, unit_of(block));
        end = round_up(end, unit_of(block));
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
        if (from < to)
            (block->attend_pairs ? block->attend_pairs
                                 : flash_attend_tile)(block, key, keys, look || keys % TILE, from, to - from);
    }
}

void flash_attend_allowed(FlashBlock *block)
{
    int first = block->first[0], all_first = first, end = block->end[0], all_end = end;
    for (int r = 1; r < block->rows; r++) {
        first = smaller(first, block->first[r]);
        all_first = larger(all_first, block->first[r]);
        end = larger(end, block->end[r]);
        all_end = smaller(all_end, block->end[r]);
    }
    first = round_down(first, unit_of(block));
    all_first = round_up(all_first, unit_of(block));
    all_end = round_down(all_end, unit_of(block));
    bool ask = !block->one_run || block->s->bias;
    if (ask || all_first >= all_end)
        all_first = all_end = end;
    flash_attend(block, first, all_first, true);
    flash_attend(block, all_first, all_end, false);
    flash_attend(block, all_end, end, true);
}

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
