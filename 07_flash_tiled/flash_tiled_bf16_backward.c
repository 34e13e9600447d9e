/* The gradients of attention in bf16: the five products of flash_tiled_simd_backward.c, keys outside, each with its factors
 * in pairs along the axis that is summed over. Left of the product stand rows of pairs, right of it a pair for each lane.
 *
 *     S    = Q K^T      dP   = dO V^T    pairs of a row's numbers: lanes are keys, for which K and V are turned
 *     dV^T += dO^T D    dK^T += Q^T dS   pairs of queries: lanes are keys, two rows of D or dS side by side
 *     dQ   += dS K                       pairs of keys: dS as its rows lie, lanes are a head's numbers, two rows of K side by side
 *
 * Softmax and its gradient are made of float32 sums; what is rounded to bf16 is D and dS, as factors of the last three. dK, dV
 * and dQ are summed in float32 and rounded once, at the end. */
#include "flash_tiled_bf16_backward.h"

#if BF16_PAIRS
#include <math.h>

#include "flash_dropout.h"
#include "flash_tiled_simd.h"
#include "key_order.h"
#include "threads.h"

static const float forbidden = -1;

enum {
    ROWS = 96,                                                  /* queries and */
    KEYS = 192,                                                 /* keys of a tile */
    KEY_STEP = VECTORS * LANES,                                 /* keys of one product S or dP */
    KEY_UNIT = KEY_STEP % (2 * DEEP) ? 2 * KEY_STEP : KEY_STEP, /* whole steps of all products */
    ROW_UNIT = PANEL > 2 * DEEP ? PANEL : 2 * DEEP,             /* likewise */
    WIDE = 2 * LANES,                                           /* numbers of a head in one product dQ */
    MOST_THREADS = 64,                                          /* each with scratch of its own */
};

/* What a task works in. width is HS rounded up to WIDE, pairs half of that. */
typedef struct {
    _Alignas(64) Pair weight_pairs[ROWS / 2 * KEYS]; /* (ROWS/2,KEYS): D and */
    Pair ds_pairs[ROWS / 2 * KEYS];                  /* dS, pairs of queries */
    Pair ds_rows[ROWS * KEYS / 2];                   /* (ROWS,KEYS/2): dS, pairs of keys */
    float kept[ROWS * KEYS];                         /* (ROWS,KEYS): dropout's factor, 0 or 1 / (1 - p); */
                                                     /* `forbidden` where a query may not look */
    float lse[ROWS], delta[ROWS];                    /* lse times log2 e, +inf for a row that saw nothing */

    int pairs, width;
    Pair *k_columns, *v_columns; /* (pairs,KEYS): K^T, V^T, pairs of a row's numbers; 0 beyond the last key */
    Pair *k_pairs;               /* (KEYS/2,width): pairs of keys; likewise */
    float *dk, *dv;              /* (width,KEYS): the transposed sums so far */
} Scratch;

static int width_of(const AttentionShape *s)
{
    return round_up(s->head_size, WIDE);
}

static size_t scratch_size(const AttentionShape *s) /* in floats, a multiple of 64 bytes */
{
    return sizeof(Scratch) / sizeof(float) + (size_t)(3 * KEYS / 2 + 2 * KEYS) * width_of(s);
}

static Scratch *lay_out(float *scratch, const AttentionShape *s)
{
    Scratch *x = (Scratch *)scratch;
    x->width = width_of(s);
    x->pairs = x->width / 2;
    size_t keys = KEYS / 2 * (size_t)x->width;
    x->k_columns = (Pair *)(x + 1);
    x->v_columns = x->k_columns + keys;
    x->k_pairs = x->v_columns + keys;
    x->dk = (float *)(x->k_pairs + keys);
    x->dv = x->dk + 2 * keys;
    return x;
}

/* ---- Copies of Q and dO, block by block of queries, as multiply_pairs() wants them on its left ---- */

typedef struct {
    Pair *q_rows, *dout_rows;   /* (ROWS,pairs): pairs of a row's numbers */
    Pair *q_pairs, *dout_pairs; /* (ROWS/2,width), DEEP pairs of a number together: pairs of queries */
} Queries;

static int query_blocks(const AttentionShape *s)
{
    return (s->tokens + ROWS - 1) / ROWS;
}

/* Pairs of each of the four. */
static size_t copy_size(const AttentionShape *s)
{
    return (size_t)ROWS / 2 * width_of(s);
}

/* Block n of those of all heads. */
static Queries queries_of(float *copies, const AttentionShape *s, size_t n)
{
    size_t size = copy_size(s);
    Pair *first = (Pair *)copies + 4 * size * n;
    return (Queries){first, first + size, first + 2 * size, first + 3 * size};
}

size_t bf16_backward_copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * query_blocks(s) * 4 * copy_size(s);
}

static void copy_queries(float *copies, const Bf16Backward *g, const AttentionShape *s, size_t n)
{
    Queries x = queries_of(copies, s, n);
    size_t head = n / query_blocks(s), t = n % query_blocks(s) * ROWS,
           first = (head * s->tokens + t) * s->head_size;
    int rows = smaller(ROWS, s->tokens - (int)t), HS = s->head_size, width = width_of(s);
    if (rows < ROWS)
        memset(x.q_rows, 0, 4 * copy_size(s) * sizeof(Pair));
    copy_rows(x.q_rows, width / 2, g->q + first, rows, HS);
    copy_rows(x.dout_rows, width / 2, g->dout + first, rows, HS);
    pair_rows(x.q_pairs, width, DEEP, g->q + first, rows, HS);
    pair_rows(x.dout_pairs, width, DEEP, g->dout + first, rows, HS);
}

/* ---- A block of keys, and a block of queries ---- */

/* Where in the problem a tile lies: queries t .. t + rows - 1, keys key .. key + keys - 1 of head h. */
typedef struct {
    const Bf16Backward *g;
    const AttentionShape *s;
    const float *delta; /* (B,NH,T) */
    int b, h;
    int t, rows;
    int key, keys;
} Place;

static void read_keys(Scratch *x, const Place *p)
{
    int HS = p->s->head_size;
    size_t first = key_row(p->s, p->b, p->h, p->key);
    if (p->keys < KEYS) /* all three, which lie one behind the other */
        memset(x->k_columns, 0, (size_t)3 * KEYS / 2 * x->width * sizeof(Pair));
    turn_rows(x->k_columns, KEYS, p->g->k + first, p->keys, HS);
    turn_rows(x->v_columns, KEYS, p->g->v + first, p->keys, HS);
    pair_rows(x->k_pairs, x->width, 1, p->g->k + first, p->keys, HS);
}

static void read_sums(Scratch *x, const Place *p)
{
    size_t first = lse_index(p->s, p->b, p->h, p->t);
    for (int r = 0; r < ROWS; r++) {
        float lse = r < p->rows ? p->g->lse[first + r] : -INFINITY;
        x->lse[r] = lse == -INFINITY ? INFINITY : log2e * lse; /* 2^(score - inf) = 0 */
        x->delta[r] = r < p->rows ? p->delta[first + r] : 0;
    }
}

/* ---- One tile ---- */

/* Which keys of its block a block of queries sees. */
typedef struct {
    int from, to; /* no key outside; from is a multiple of KEY_UNIT. from >= to: nothing */
    bool all;     /* every query sees every key of its block, and nothing is dropped */
} Sight;

static Sight look_ahead(const Place *p)
{
    const AttentionShape *s = p->s;
    FlashSpan span = flash_span(s, p->b, p->t, p->rows);
    Sight sight = {.from = larger(span.first - p->key, 0) / KEY_UNIT * KEY_UNIT,
                   .to = smaller(span.end - p->key, p->keys)};
    bool every = span.one_run && span.all_first <= p->key + sight.from && span.all_end >= p->key + sight.to;
    sight.all = every && s->dropout == 0 && sight.to == p->keys;
    return sight;
}

/* kept of the keys in sight, and of those that share a register tile with the last. */
static void look_up(Scratch *x, const Place *p, const Sight *sight)
{
    const AttentionShape *s = p->s;
    for (int r = 0; r < ROWS; r++) {
        float *kept = x->kept + r * KEYS;
        int first = 0, end = 0, t = p->t + r;
        bool one_run = r >= p->rows || flash_bounds(s, p->b, t, &first, &end);
        for (int i = sight->from; i < round_up(sight->to, KEY_UNIT); i++)
            kept[i] = 1;
        if (s->dropout > 0 && r < p->rows)
            dropout_row(kept, s, lse_index(s, p->b, p->h, t), p->key, sight->from, sight->to);
        for (int i = sight->from; i < round_up(sight->to, KEY_UNIT); i++) {
            bool sees = (first <= p->key + i) & (p->key + i < end) & (i < sight->to);
            kept[i] = sees ? kept[i] : forbidden;
        }
        for (int i = sight->from; !one_run && i < sight->to; i++)
            if (!attends(s, p->b, p->h, t, p->key + i))
                kept[i] = forbidden;
    }
}

/* S, the softmax, dP and its gradient, for PANEL queries by KEY_STEP keys: D and dS. */
INLINE void weigh(Scratch *x, const Place *p, const Queries *queries, int r0, int key, bool all)
{
    float to_exponent = p->s->scale * log2e;
    Vector score[PANEL][VECTORS], d_weight[PANEL][VECTORS];
    size_t rows = (size_t)r0 * x->pairs;
    multiply_pairs(score[0], VECTORS, VECTORS, false, queries->q_rows + rows, x->pairs, DEEP,
                   x->k_columns + key, KEYS, x->pairs);
    multiply_pairs(d_weight[0], VECTORS, VECTORS, false, queries->dout_rows + rows, x->pairs, DEEP,
                   x->v_columns + key, KEYS, x->pairs);
    for (int half = 0; half < PANEL; half += TILE) {
        int r = r0 + half;
        Vector weight[TILE][VECTORS], ds[TILE][VECTORS];
        const Vector *kept = (const Vector *)(x->kept + r * KEYS + key);
        PairVector *weight_pairs = (PairVector *)(x->weight_pairs + r / 2 * KEYS + key);
        PairVector *ds_pairs = (PairVector *)(x->ds_pairs + r / 2 * KEYS + key);
        Bf16 *ds_rows = (Bf16 *)x->ds_rows + r * KEYS + key;
        EACH_VECTOR(i, j, VECTORS) {
            Vector exponent = score[half + i][j] * to_exponent - x->lse[r + i], dw = d_weight[half + i][j];
            if (all) {
                weight[i][j] = exp2_vector(exponent);
                ds[i][j] = weight[i][j] * (dw - x->delta[r + i]);
            } else {
                Vector factor = kept[i * KEYS / LANES + j];
                Vector w = exp2_vector(vector_select(factor < 0, (Vector){0} - INFINITY, exponent));
                ds[i][j] = vector_select(factor < 0, (Vector){0}, w * (factor * dw - x->delta[r + i]));
                weight[i][j] = w * factor;
            }
            store_row(ds_rows + i * KEYS + j * LANES, ds[i][j], LANES);
            if (i % 2) {
                ds_pairs[i / 2 * KEYS / LANES + j] = pairs_from(ds[i - 1][j], ds[i][j]);
                weight_pairs[i / 2 * KEYS / LANES + j] = pairs_from(weight[i - 1][j], weight[i][j]);
            }
        }
    }
}

/* dV^T or dK^T += left right, over `rows` queries, for the keys from .. to - 1. */
static void add_key_gradient(const Scratch *x, float *sums, const Pair *left, const Pair *right, int rows,
                             int from, int to, int HS)
{
    for (int key = from; key < to; key += KEY_STEP)
        for (int d = 0; d < HS; d += PANEL)
            multiply_pairs((Vector *)(sums + d * KEYS + key), KEYS / LANES, VECTORS, true, left + d * DEEP,
                           DEEP, (size_t)x->width * DEEP, right + key, KEYS, rows / 2);
}

/* dq (ROWS,width) += dS K, over the keys from .. to - 1. */
static void add_query_gradient(const Scratch *x, float *dq, int rows, int from, int to)
{
    size_t width = x->width;
    for (int d = 0; d < x->width; d += WIDE)
        for (int r = 0; r < rows; r += PANEL)
            multiply_pairs((Vector *)(dq + r * width + d), width / LANES, 2, true,
                           x->ds_rows + (r * KEYS + from) / 2, KEYS / 2, DEEP,
                           x->k_pairs + from / 2 * width + d, width, (to - from) / 2);
}

/* The block's queries meet its keys. dq (ROWS,width) */
static void meet(Scratch *x, const Place *p, const Sight *sight, const Queries *queries, float *dq)
{
    read_sums(x, p);
    int rows = round_up(p->rows, ROW_UNIT), from = sight->from, to = round_up(sight->to, KEY_UNIT),
        HS = p->s->head_size;
    if (!sight->all)
        look_up(x, p, sight);
    for (int key = from; key < to; key += KEY_STEP)
        for (int r = 0; r < rows; r += PANEL)
            if (sight->all)
                weigh(x, p, queries, r, key, true);
            else
                weigh(x, p, queries, r, key, false);
    /* What fills the last step up weighs 2^(0 - lse), which may be infinite: nothing for dQ, a sum over keys. */
    for (int r = 0; sight->to < to && r < rows; r++)
        memset((Bf16 *)x->ds_rows + r * KEYS + sight->to, 0, (to - sight->to) * sizeof(Bf16));
    add_key_gradient(x, x->dv, queries->dout_pairs, x->weight_pairs, rows, from, to, HS);
    add_key_gradient(x, x->dk, queries->q_pairs, x->ds_pairs, rows, from, to, HS);
    add_query_gradient(x, dq, rows, from, to);
}

/* ---- All tiles ---- */

static int key_blocks(const AttentionShape *s)
{
    return (s->key_tokens + KEYS - 1) / KEYS;
}

static size_t all_tasks(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * key_blocks(s);
}

/* Floats of a head's dq: (T,width), T rounded up to ROWS. */
static size_t head_sums(const AttentionShape *s)
{
    return (size_t)query_blocks(s) * ROWS * width_of(s);
}

size_t bf16_gradient_sums(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * head_sums(s) + lse_count(s);
}

static int most_threads(const AttentionShape *s)
{
    return all_tasks(s) < MOST_THREADS ? (int)all_tasks(s) : MOST_THREADS;
}

size_t bf16_backward_scratch(const AttentionShape *s)
{
    return most_threads(s) * scratch_size(s) + all_tasks(s) * sizeof(atomic_int) / sizeof(float);
}

/* A gradient (TK,HS) = factor times the transposed sums; zeros for keys that nobody may see. */
static void write_key_gradient(Bf16 *to, float factor, const float *sums, const Place *p, int keys)
{
    int HS = p->s->head_size;
    for (int i0 = 0; i0 < keys; i0 += LANES)
        for (int d = 0; d < HS; d += LANES) {
            Vector x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = factor * *(const Vector *)(sums + (d + i) * KEYS + i0);
            transpose(x);
            for (int i = i0; i < smaller(i0 + LANES, keys); i++)
                store_row(to + (size_t)i * HS + d, i < p->keys ? x[i - i0] : (Vector){0}, HS - d);
        }
}

/* A block of keys of a head, and all its queries. done: of the head's first block, the others' follow. */
static void task_gradient(const Bf16Backward *g, const float *delta, float *sums, float *copies,
                          float *scratch, atomic_int *done, const AttentionShape *s, KeyTask task)
{
    Place p = {.g = g,
               .s = s,
               .delta = delta,
               .b = (int)(task.head / s->heads),
               .h = (int)(task.head % s->heads),
               .key = task.block * KEYS};
    int valid = s->lengths ? s->lengths[p.b] : s->key_tokens; /* what lies beyond is not read */
    p.keys = larger(0, smaller(KEYS, valid - p.key));
    Scratch *x = lay_out(scratch, s);
    read_keys(x, &p);
    memset(x->dk, 0, (size_t)2 * KEYS * x->width * sizeof *x->dk);
    tiles_begin();
    for (int i = query_blocks(s) - 1; i >= 0; i--) {
        p.t = i * ROWS;
        p.rows = smaller(ROWS, s->tokens - p.t);
        Sight sight = look_ahead(&p);
        size_t block = task.head * query_blocks(s) + i;
        Queries queries = queries_of(copies, s, block);
        if (sight.from < sight.to) {
            for (int earlier = 0; earlier < task.block; earlier++)
                wait_for(done + earlier, p.t);
            meet(x, &p, &sight, &queries, sums + block * ROWS * x->width);
        }
        tell_done(done + task.block, p.t);
    }
    tiles_end();
    size_t row = key_row(s, p.b, p.h, p.key);
    int keys = smaller(KEYS, s->key_tokens - p.key);
    write_key_gradient(g->dk + row, s->scale, x->dk, &p, keys);
    write_key_gradient(g->dv + row, 1, x->dv, &p, keys);
}

static float row_delta(const Bf16 *dout, const Bf16 *out, int n)
{
    Vector sums = {0};
    for (int d = 0; d < n; d += LANES)
        sums += (Vector)(load_numbers(dout + d, n - d) << 16) * (Vector)(load_numbers(out + d, n - d) << 16);
    return sum_lanes(sums);
}

static void write_query_gradient(const Bf16Backward *g, const float *sums, const AttentionShape *s,
                                 size_t row)
{
    int HS = s->head_size;
    const float *dq = sums + row / s->tokens * head_sums(s) + row % s->tokens * width_of(s);
    for (int d = 0; d < HS; d += LANES)
        store_row(g->dq + row * HS + d, s->scale * *(const Vector *)(dq + d), HS - d);
}

void attention_bf16_backward(const Bf16Backward *g, float *sums, float *copies, float *scratch,
                             const AttentionShape *s)
{
    size_t floats = scratch_size(s), heads = (size_t)s->batch * s->heads, HS = s->head_size;
    int threads = smaller(omp_get_max_threads(), most_threads(s)), blocks = key_blocks(s);
    float *delta = sums + heads * head_sums(s);
    atomic_int *done = (atomic_int *)(scratch + most_threads(s) * floats);
    for (size_t task = 0; task < all_tasks(s); task++)
        atomic_init(&done[task], s->tokens);
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++)
        delta[row] = row_delta(g->dout + row * HS, g->out + row * HS, (int)HS);
#pragma omp parallel for
    for (size_t i = 0; i < heads * query_blocks(s); i++) {
        copy_queries(copies, g, s, i);
        memset(sums + i * ROWS * width_of(s), 0, (size_t)ROWS * width_of(s) * sizeof *sums);
    }
#pragma omp parallel for schedule(monotonic : dynamic) num_threads(threads)
    for (size_t n = 0; n < all_tasks(s); n++) {
        KeyTask task = key_task(n, heads, blocks, threads);
        task_gradient(g, delta, sums, copies, scratch + omp_get_thread_num() * floats,
                      done + task.head * blocks, s, task);
    }
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++)
        write_query_gradient(g, sums, s, row);
}
#endif
