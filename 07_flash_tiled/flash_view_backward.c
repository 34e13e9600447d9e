/* All tasks of a backward pass: which keys and queries meet in which, and where their sums go. The contracts are in
 * flash_tiled_simd_backward.h. */
#include "flash_tiled_simd_backward.h"

#include <math.h>

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

/* Does any of TILE queries from t on see a key of the block? */
static bool is_seen(const FlashBackBlock *x, int t)
{
    FlashSpan span = flash_span(x->s, x->b, t, smaller(TILE, x->s->tokens - t));
    return span.first < x->key + x->keys && x->key < span.end;
}

bool flash_back_next(FlashBackBlock *x, int t)
{
    const FlashKnown *known = &x->g->known;
    if (x->keys && t < x->s->tokens && known->next_query)
        t = known->next_query(known->lists, x->s, x->b, x->h, t, x->key, x->key + x->keys);
    while (x->keys && t < x->s->tokens && !is_seen(x, t))
        t += TILE;
    x->t = t;
    x->rows = smaller(ROWS, x->s->tokens - t);
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
    size_t next = (size_t)r + ROWS, out = next * x->g->view.out_token, q = next * x->g->view.q_token;
    for (int d = 0; d < x->s->head_size; d += 16) {
        if (is_q) {
            __builtin_prefetch(x->from_q + q + d, 0, 2);
            __builtin_prefetch(x->dq + r * x->dq_token + d, 1, 2);
        } else {
            __builtin_prefetch(x->from_dout + out + d, 0, 2);
            __builtin_prefetch(x->from_out + out + d, 0, 2);
        }
    }
}

/* How many batch entries one task takes: all of them where they share the numbers of a bias, so that its gradient is summed
 * up in one place; but not where too few tasks would be left. */
static int entries_of_a_task(const AttentionShape *s)
{
    bool shared = s->bias && s->bias_stride[0] == 0 && (s->bias_stride[1] || s->kv_heads == 1);
    return shared && s->kv_heads * flash_back_key_blocks(s) >= FLASH_BACK_SHARES / 4 ? s->batch : 1;
}

/* Where key/value heads are few, several tasks share one: each has some blocks of keys, and a dq of its own.
 * How many follows from the shape alone, and so do the bits. */
static int chunks(const AttentionShape *s)
{
    int heads = s->batch / entries_of_a_task(s) * s->kv_heads;
    int wanted = FLASH_BACK_SHARES / smaller(FLASH_BACK_SHARES, heads);
    return smaller(wanted, flash_back_key_blocks(s));
}

/* Does each number of the bias belong to one task? Then its gradient is summed up along the way. */
static bool bias_is_own(const AttentionShape *s)
{
    const size_t *stride = s->bias_stride;
    return s->bias && (stride[0] || entries_of_a_task(s) == s->batch) && (stride[1] || s->kv_heads == 1) &&
           (stride[3] || chunks(s) == 1);
}

static int chunk_key(const AttentionShape *s, int chunk)
{
    return chunk * flash_back_key_blocks(s) / chunks(s) * KEYS;
}

/* The first query from which on nobody sees a key of an earlier chunk: under a window most see but one. */
static int first_own(const AttentionShape *s, int chunk)
{
    int low = 0, high = s->tokens, first, end;
    if (chunk == chunks(s))
        return high;
    while (low < high) {
        int middle = low + (high - low) / 2;
        flash_bounds(s, 0, middle, &first, &end);
        if (first < chunk_key(s, chunk))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Does the chunk keep a sum for query t that is added to an earlier chunk's? */
static bool is_shared(const AttentionShape *s, int b, int t, int chunk)
{
    int first, end, key = chunk_key(s, chunk);
    flash_bounds(s, b, t, &first, &end);
    return first < key && key < end;
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

/* Where a chunk adds up dq of query t: its own where the caller wants it, others in `partial`. */
static float *dq_row(const FlashBackBlock *x, float *partial, int chunk, int own, int t)
{
    const FlashView *view = &x->g->view;
    if (t >= own)
        return x->g->dq + x->b * view->q_batch + x->h * view->q_head + t * view->q_token;
    return partial + (chunk - 1) * query_count(x->s) + query_row(x->s, x->b, x->h, t);
}

/* Of queries t .. end - 1 it becomes 0, if anyone reads it; returns the first query of which it has not. */
static int clear_dq(const FlashBackBlock *x, float *partial, int chunk, int own, int t, int end)
{
    for (; t < end; t++)
        if (t >= own || is_shared(x->s, x->b, t, chunk))
            memset(dq_row(x, partial, chunk, own, t), 0, x->s->head_size * sizeof *partial);
    return t;
}

/* Chunk number `chunk` of the keys of one key/value head, and all queries that read it. */
static void chunk_gradient(FlashBackBlock x, float *partial, float *scratch, int chunk)
{
    const AttentionShape *s = x.s;
    int n = chunks(s), blocks = flash_back_key_blocks(s), group = s->heads / s->kv_heads;
    int first = chunk * blocks / n, first_head = x.kv_head * group;
    int own = first_own(s, chunk), own_end = first_own(s, chunk + 1);
    bool of_pairs = flash_bias_is_of_pairs(s);
    for (int block = first; block < (chunk + 1) * blocks / n; block++) {
        flash_back_begin(&x, scratch, block);
        for (x.h = first_head; x.h < first_head + group; x.h++) {
            int cleared = block > first ? own_end : 0, written = 0;
            for (int t = 0; flash_back_next(&x, t) && x.t < own_end; t = x.t + x.rows) {
                x.rows = smaller(x.rows, (x.t < own ? own : own_end) - x.t);
                x.dq = dq_row(&x, partial, chunk, own, x.t);
                x.dq_token = x.t < own ? (size_t)s->head_size : x.g->view.q_token;
                if (!flash_back_weigh(&x))
                    continue;
                cleared = clear_dq(&x, partial, chunk, own, cleared, x.t + x.rows);
                flash_back_add(&x);
                if (of_pairs)
                    written = flash_back_write_bias(&x, written);
                else if (bias_is_own(s))
                    flash_back_add_bias(&x);
            }
            clear_dq(&x, partial, chunk, own, cleared, own_end);
            if (of_pairs) { /* zeros for the queries that are left */
                x.t = s->tokens, x.rows = 0;
                flash_back_write_bias(&x, written);
            }
        }
        clear_unseen(&x);
    }
}

/* A task: one chunk of one key/value head, in one batch entry or in all. First chunks come first: under a causal mask they
 * have most to do. */
static void task_gradient(FlashBackBlock x, float *partial, float *scratch, size_t job)
{
    const AttentionShape *s = x.s;
    int entries = entries_of_a_task(s), heads = s->batch / entries * s->kv_heads, head = (int)(job % heads);
    int first = head / s->kv_heads * entries;
    x.kv_head = head % s->kv_heads;
    for (x.b = first; x.b < first + entries; x.b++)
        chunk_gradient(x, partial, scratch, (int)(job / heads));
}

/* dq += the partial sums of the other chunks, in their order. */
static void add_partials(const FlashBackward *g, const float *partial, const AttentionShape *s)
{
    const FlashView *view = &g->view;
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++) {
        size_t bh = row / s->tokens;
        float *dq = g->dq + bh / s->heads * view->q_batch + bh % s->heads * view->q_head +
                    row % s->tokens * view->q_token;
        for (int chunk = 1; chunk < chunks(s); chunk++)
            if (is_shared(s, (int)(bh / s->heads), (int)(row % s->tokens), chunk))
                for (int d = 0; d < s->head_size; d++)
                    dq[d] += partial[(chunk - 1) * query_count(s) + row * s->head_size + d];
    }
}

static size_t jobs(const AttentionShape *s)
{
    return (size_t)(s->batch / entries_of_a_task(s)) * s->kv_heads * chunks(s);
}

static size_t bias_jobs(const AttentionShape *s)
{
    return s->bias && !bias_is_own(s) ? flash_bias_jobs(s) : 0;
}

/* Each has scratch of its own, and keeps it from job to job: it stays in the cache. */
static int most_threads(const AttentionShape *s)
{
    size_t most = jobs(s) > bias_jobs(s) ? jobs(s) : bias_jobs(s);
    return most < FLASH_BACK_THREADS ? (int)most : FLASH_BACK_THREADS;
}

size_t flash_backward_partials(const AttentionShape *s)
{
    return (chunks(s) - 1) * query_count(s);
}

size_t flash_backward_scratch(const AttentionShape *s)
{
    return most_threads(s) * flash_back_block_floats(s->head_size);
}

void flash_attention_backward(const FlashBackward *g, float *partial, float *scratch, const AttentionShape *s)
{
    size_t floats = flash_back_block_floats(s->head_size);
    const FlashBackBlock x = {.g = g, .s = s, .dq = g->dq};
    if (s->bias && !flash_bias_is_of_pairs(s))
        memset(g->dbias, 0, broadcast_of(s).elements * sizeof *g->dbias);
#pragma omp parallel for schedule(dynamic) num_threads(smaller(omp_get_max_threads(), most_threads(s)))
    for (size_t job = 0; job < jobs(s); job++)
        task_gradient(x, partial, scratch + omp_get_thread_num() * floats, job);
    if (chunks(s) > 1)
        add_partials(g, partial, s);
#pragma omp parallel for schedule(dynamic) num_threads(smaller(omp_get_max_threads(), most_threads(s)))
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

void attention_simd_backward(const AttentionBackward *a, float *partial, float *scratch,
                             const AttentionShape *s)
{
    FlashBackward g = flash_backward(a, s);
    flash_attention_backward(&g, partial, scratch, s);
}
