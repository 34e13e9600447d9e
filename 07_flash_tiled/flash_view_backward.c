/* All tasks of a backward pass: which keys and queries meet in which, and where their sums go. The contracts are in
 * flash_tiled_simd_backward.h. */
#include "flash_tiled_simd_backward.h"

#include <math.h>

#include "key_order.h"
#include "threads.h"

enum {
    ROWS = FLASH_BACK_ROWS,
    KEYS = FLASH_BACK_KEYS,
    UNIT = FLASH_BACK_UNIT,
    STEP = FLASH_BACK_STEP,
};

int flash_back_key_blocks(const AttentionShape *s)
{
    return (s->key_tokens + KEYS - 1) / KEYS;
}

static int width_of(int head_size)
{
    return round_up(head_size, LANES);
}
static int stride_of(int head_size)
{
    return width_of(head_size) + LANES;
}

size_t flash_back_block_floats(int head_size)
{
    size_t width = width_of(head_size), stride = stride_of(head_size);
    return 2 * KEYS * width + (KEYS + 2 * ROWS) * stride + 3 * ROWS * KEYS + 2 * ROWS;
}

static float *take(float **at, size_t floats)
{
    float *taken = *at;
    *at += floats;
    return taken;
}

void flash_back_lay_out(FlashBackBlock *x, float *scratch, int number)
{
    int end = x->s->lengths ? x->s->lengths[x->b] : x->s->key_tokens; /* what lies beyond is not read */
    x->key = number * KEYS;
    x->keys = larger(0, smaller(KEYS, end - x->key));
    x->width = width_of(x->s->head_size);
    x->stride = stride_of(x->s->head_size);
    int vectors = x->width / LANES, parts = (vectors + VECTORS - 1) / VECTORS;
    x->part = (vectors + parts - 1) / parts * LANES;
    size_t columns = (size_t)KEYS * x->width, stride = x->stride;
    x->k_columns = take(&scratch, columns);
    x->v_columns = take(&scratch, columns);
    x->k_rows = take(&scratch, KEYS * stride);
    x->q = take(&scratch, ROWS * stride);
    x->dout = take(&scratch, ROWS * stride);
    x->weights = take(&scratch, ROWS * KEYS);
    x->d_scores = take(&scratch, ROWS * KEYS);
    x->kept = take(&scratch, ROWS * KEYS);
    x->lse = take(&scratch, ROWS);
    x->delta = take(&scratch, ROWS);
    memset(x->summed, 0, sizeof x->summed);
}

/* Does any of the TILE queries before t see a key of the block? */
static bool is_seen(const FlashBackBlock *x, int t)
{
    FlashSpan span = flash_span(x->s, x->b, larger(0, t - TILE), smaller(TILE, t));
    return span.first < x->key + x->keys && x->key < span.end;
}

bool flash_back_before(FlashBackBlock *x, int t)
{
    const FlashKnown *known = &x->g->known;
    if (x->keys && t > 0 && known->queries_end)
        t = known->queries_end(known->lists, x->b, x->h, t, x->key, x->key + x->keys);
    while (x->keys && t > 0 && !is_seen(x, t))
        t = larger(0, t - TILE);
    x->t = round_up(larger(0, t - ROWS), TILE);
    x->rows = t - x->t;
    return x->keys && x->rows > 0;
}

bool flash_back_look(FlashBackBlock *x)
{
    const AttentionShape *s = x->s;
    const FlashKnown *known = &x->g->known;
    int kind = known->how_many ? known->how_many(s, x->b, x->t, x->t + x->rows, x->key, x->key + x->keys) : 1;
    bool any = false, plain = !s->bias && s->dropout == 0;
    for (int i = 0; i < KEYS / TILE; i++)
        x->seen_from[i] = ROWS, x->seen_to[i] = 0;
    for (int r = 0; r < x->rows; r += TILE) {
        FlashSpan span = flash_span(s, x->b, x->t + r, smaller(TILE, x->rows - r));
        FlashSight *sight = &x->sight[r / TILE];
        sight->from = larger(span.first - x->key, 0) / UNIT * UNIT;
        sight->to = kind == 0 ? 0 : smaller(span.end - x->key, x->keys);
        int sure_from = round_up(larger(span.all_first - x->key, 0), STEP);
        int sure_to = smaller(span.all_end - x->key, x->keys);
        if (kind == 2)
            sure_from = 0, sure_to = x->keys;
        sure_to = sure_to == x->keys ? round_up(sure_to, STEP) : sure_to / STEP * STEP;
        bool sure = plain && (kind == 2 || span.one_run) && sure_from < sure_to;
        sight->sure_from = sure ? sure_from : sight->from;
        sight->sure_to = sure ? sure_to : sight->from;
        for (int key = sight->from; key < sight->to; key += TILE) {
            x->seen_from[key / TILE] = smaller(x->seen_from[key / TILE], r);
            x->seen_to[key / TILE] = r + TILE;
            any = true;
        }
    }
    return any;
}

void flash_back_ask(FlashBackBlock *x)
{
    const FlashView *view = &x->g->view;
    size_t t = x->t, out = x->b * view->out_batch + x->h * view->out_head + t * view->out_token;
    x->from_q = view->q + x->b * view->q_batch + x->h * view->q_head + t * view->q_token;
    x->from_out = view->out + out;
    x->from_dout = x->g->dout + out;
    size_t first = lse_index(x->s, x->b, x->h, x->t);
    for (int r = 0; r < round_up(x->rows, TILE); r++) {
        float lse = r < x->rows ? x->g->view.lse[first + r] : -INFINITY;
        x->lse[r] = lse == -INFINITY ? INFINITY : log2e * lse; /* 2^(score - inf) = 0 */
        flash_ask_row(x, r);
    }
}

void flash_back_look_ahead(const FlashBackBlock *x, int r, bool is_q)
{
    ptrdiff_t next = r - ROWS, out = next * (ptrdiff_t)x->g->view.out_token,
              q = next * (ptrdiff_t)x->g->view.q_token;
    for (int d = 0; d < x->s->head_size; d += 16) {
        if (is_q) {
            __builtin_prefetch(x->from_q + q + d, 0, 2);
            __builtin_prefetch(x->dq + r * x->g->view.q_token + d, 1, 2);
        } else {
            __builtin_prefetch(x->from_dout + out + d, 0, 2);
            __builtin_prefetch(x->from_out + out + d, 0, 2);
        }
    }
}

/* ---- One task ---- */

/* Which adds to dq when, and which comes after which: key_order.h.
 *
 *     done (B,NH,blocks)   the task is done with this query of the head and those after it */

/* The first query that sees nothing before the key, or that sees it or one after it. */
static int first_query(const AttentionShape *s, int b, int key, bool sees)
{
    int low = 0, high = s->tokens, first, end;
    while (low < high) {
        int middle = low + (high - low) / 2;
        flash_bounds(s, b, middle, &first, &end);
        if (sees ? end <= key : first < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* dq of the queries t .. end - 1 becomes 0; returns where that is from. */
static int clear_dq(const FlashBackBlock *x, float *dq, int t, int end)
{
    for (int i = t; i < end; i++)
        memset(dq + i * x->g->view.q_token, 0, x->s->head_size * sizeof *dq);
    return smaller(t, end);
}

/* How many batch entries one task takes: all of them where they share the numbers of a bias, so that its gradient is summed
 * up in one place; but not where too few tasks would be left. */
static int entries_of_a_task(const AttentionShape *s)
{
    enum { ENOUGH = 4 };
    bool shared = s->bias && s->bias_stride[0] == 0 && (s->bias_stride[1] || s->kv_heads == 1);
    return shared && s->kv_heads * flash_back_key_blocks(s) >= ENOUGH ? s->batch : 1;
}

/* Does each number of the bias belong to one task? Then its gradient is summed up along the way. */
static bool bias_is_own(const AttentionShape *s)
{
    const size_t *stride = s->bias_stride;
    return s->bias && (stride[0] || entries_of_a_task(s) == s->batch) && (stride[1] || s->kv_heads == 1) &&
           (stride[3] || flash_back_key_blocks(s) == 1);
}

/* The queries of head x->h meet block number `block`. Those from `own` on see no earlier block, those from `end` on not this one. */
static void meet_queries(FlashBackBlock *x, atomic_int *done, int block)
{
    const AttentionShape *s = x->s;
    const FlashView *view = &x->g->view;
    float *dq = x->g->dq + x->b * view->q_batch + x->h * view->q_head;
    bool last = block == flash_back_key_blocks(s) - 1;
    int first = first_query(s, x->b, x->key, true), own = first_query(s, x->b, x->key, false);
    int end = last ? s->tokens : first_query(s, x->b, x->key + KEYS, false);
    int cleared = end, written = s->tokens;
    for (int t = end; t > first && flash_back_before(x, t); t = x->t) {
        int from = larger(x->t, first);
        x->rows -= from - x->t;
        x->t = from;
        x->dq = dq + from * view->q_token;
        if (from < own)
            wait_for(done - 1, from);
        if (!flash_back_weigh(x))
            continue;
        flash_back_add_to_keys(x);
        cleared = clear_dq(x, dq, larger(own, from), cleared);
        flash_back_add_to_queries(x);
        tell_done(done, from);
        if (flash_bias_is_of_pairs(s))
            written = flash_back_write_bias(x, written);
        else if (bias_is_own(s))
            flash_back_add_bias(x);
    }
    clear_dq(x, dq, own, cleared);
    if (first < own)
        wait_for(done - 1, first);
    tell_done(done, first);
    if (flash_bias_is_of_pairs(s)) { /* zeros for the queries that are left */
        x->t = x->rows = 0;
        flash_back_write_bias(x, written);
    }
}

/* dk = dv = 0 where no query sees a key of TILE, and beyond the valid length. */
static void clear_unseen(const FlashBackBlock *x)
{
    const FlashView *view = &x->g->view;
    size_t head = x->b * view->k_batch + x->kv_head * view->k_head, size = x->s->head_size * sizeof(float);
    for (int i = 0; i < smaller(KEYS, x->s->key_tokens - x->key); i++) {
        size_t at = head + (size_t)(x->key + i) * view->k_token;
        if (i < x->keys && x->summed[i / TILE])
            continue;
        memset(x->g->dk + at, 0, size);
        memset(x->g->dv + at, 0, size);
    }
}

static void block_gradient(FlashBackBlock x, atomic_int *done, float *scratch, int block)
{
    int heads = x.s->heads, group = heads / x.s->kv_heads, blocks = flash_back_key_blocks(x.s);
    flash_back_begin(&x, scratch, block);
    for (x.h = x.kv_head * group; x.h < (x.kv_head + 1) * group; x.h++)
        meet_queries(&x, done + ((size_t)x.b * heads + x.h) * blocks + block, block);
    clear_unseen(&x);
}

/* ---- All of them ---- */

/* The heads whose tasks there are: where batch entries go together, those of one entry. */
static size_t heads_of_tasks(const AttentionShape *s)
{
    return (size_t)(s->batch / entries_of_a_task(s)) * s->kv_heads;
}

static size_t tasks(const AttentionShape *s)
{
    return heads_of_tasks(s) * flash_back_key_blocks(s);
}

static void task_gradient(FlashBackBlock x, atomic_int *done, float *scratch, KeyTask task)
{
    const AttentionShape *s = x.s;
    int entries = entries_of_a_task(s), first_entry = (int)(task.head / s->kv_heads) * entries;
    x.kv_head = (int)(task.head % s->kv_heads);
    for (x.b = first_entry; x.b < first_entry + entries; x.b++)
        block_gradient(x, done, scratch, task.block);
}

static size_t bias_jobs(const AttentionShape *s)
{
    return s->bias && !bias_is_own(s) ? flash_bias_jobs(s) : 0;
}

/* Each has scratch of its own, and keeps it from task to task: it stays in the cache. */
static int most_threads(const AttentionShape *s)
{
    size_t most = tasks(s) > bias_jobs(s) ? tasks(s) : bias_jobs(s);
    return most < FLASH_BACK_THREADS ? (int)most : FLASH_BACK_THREADS;
}

static size_t all_blocks(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * flash_back_key_blocks(s);
}

size_t flash_backward_scratch(const AttentionShape *s)
{
    return most_threads(s) * flash_back_block_floats(s->head_size) +
           all_blocks(s) * sizeof(atomic_int) / sizeof(float);
}

void flash_attention_backward(const FlashBackward *g, float *scratch, const AttentionShape *s)
{
    size_t floats = flash_back_block_floats(s->head_size);
    int threads = smaller(omp_get_max_threads(), most_threads(s));
    const FlashBackBlock x = {.g = g, .s = s, .dq = g->dq};
    atomic_int *done = (atomic_int *)(scratch + most_threads(s) * floats);
    for (size_t i = 0; i < all_blocks(s); i++)
        atomic_init(&done[i], s->tokens);
    if (s->bias && !flash_bias_is_of_pairs(s))
        memset(g->dbias, 0, broadcast_of(s).elements * sizeof *g->dbias);
#pragma omp parallel for schedule(monotonic : dynamic) num_threads(threads)
    for (size_t n = 0; n < tasks(s); n++)
        task_gradient(x, done, scratch + omp_get_thread_num() * floats,
                      key_task(n, heads_of_tasks(s), flash_back_key_blocks(s), threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t job = 0; job < bias_jobs(s); job++)
        flash_bias_gradient(x, scratch + omp_get_thread_num() * floats, job);
}

FlashBackward flash_backward(const AttentionBackward *a, const AttentionShape *s)
{
    return (FlashBackward){.view = flash_view(a->q, a->k, a->v, (float *)a->out, (float *)a->lse, s),
                           .dout = a->dout,
                           .dq = a->dq,
                           .dk = a->dk,
                           .dv = a->dv,
                           .dbias = a->dbias};
}

void attention_simd_backward(const AttentionBackward *a, float *scratch, const AttentionShape *s)
{
    FlashBackward g = flash_backward(a, s);
    flash_attention_backward(&g, scratch, s);
}
