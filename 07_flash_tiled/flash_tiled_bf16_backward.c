/* The gradients of attention in bf16: the five products of flash_tiled_simd_backward.c, keys outside, each with its factors
 * in pairs along the axis that is summed over.
 *
 *     S  = Q K^T      dP = dO V^T     pairs of a row's numbers: Q and dO as they lie, K and V turned once a block of keys
 *     dV += D^T dO    dK += dS^T Q    pairs of queries: two rows of each side by side
 *     dQ += dS K                      pairs of keys: dS as its rows lie, two rows of K side by side
 *
 * Softmax and its gradient are made of float32 sums in registers; what is rounded to bf16 is D and dS, as factors of the
 * last three. dK, dV and dQ are summed in float32 and rounded once, at the end. */
#include "flash_tiled_bf16_backward.h"

#include <math.h>

#include "flash_dropout.h"
#include "flash_tiled_simd.h"

static const float forbidden = -1;

enum {
    ROWS = 96,                  /* queries and */
    KEYS = 192,                 /* keys of a tile */
    KEY_STEP = VECTORS * LANES, /* keys of one register tile of S */
    KEY_UNIT =
        KEY_STEP % TILE ? 2 * KEY_STEP : KEY_STEP, /* whole register tiles of S, whole ones of dK and dV */
    WIDE = 2 * LANES,                              /* numbers of a head in one register tile of dQ, dK, dV */
    SHARES = 32,                                   /* with fewer heads (B * NH), their keys are shared out */
    MOST_LISTS = 64,                               /* how many lists of work there are at most */
};

/* What a task works in. pairs is HS / 2, width HS rounded up to WIDE. */
typedef struct {
    _Alignas(64) Pair weight_pairs[ROWS / 2 * KEYS]; /* (ROWS/2,KEYS): D and */
    Pair ds_pairs[ROWS / 2 * KEYS];                  /* dS, pairs of queries */
    Pair ds_rows[ROWS * KEYS / 2];                   /* (ROWS,KEYS/2): dS, pairs of keys */
    float kept[ROWS * KEYS];                         /* (ROWS,KEYS): dropout's factor, 0 or 1 / (1 - p); */
                                                     /* `forbidden` where a query may not look */
    float lse[ROWS], delta[ROWS];                    /* lse times log2 e, +inf for a row that saw nothing */

    int pairs, width;
    const Pair *q_rows, *dout_rows; /* (rows,pairs): in the tensors, or where HS is odd in */
    Pair *q_copy, *dout_copy;       /* (ROWS,pairs) */
    Pair *q_pairs, *dout_pairs;     /* (ROWS/2,width): pairs of queries; 0 beyond the last */
    Pair *k_columns, *v_columns; /* (pairs,KEYS): K^T, V^T, pairs of a row's numbers; 0 beyond the last key */
    Pair *k_pairs;               /* (KEYS/2,width): pairs of keys; likewise */
    float *dk, *dv;              /* (KEYS,width): sums so far */
} Scratch;

static size_t scratch_size(int head_size) /* in floats, a multiple of 64 bytes */
{
    return sizeof(Scratch) / sizeof(float) +
           (size_t)(3 * KEYS / 2 + 2 * KEYS + 2 * ROWS) * round_up(head_size, WIDE);
}

static Scratch *lay_out(float *scratch, int head_size)
{
    Scratch *x = (Scratch *)scratch;
    x->pairs = (head_size + 1) / 2;
    x->width = round_up(head_size, WIDE);
    size_t rows = ROWS / 2 * (size_t)x->width, keys = KEYS / 2 * (size_t)x->width;
    x->q_copy = (Pair *)(x + 1);
    x->dout_copy = x->q_copy + rows;
    x->q_pairs = x->dout_copy + rows;
    x->dout_pairs = x->q_pairs + rows;
    x->k_columns = x->dout_pairs + rows;
    x->v_columns = x->k_columns + keys;
    x->k_pairs = x->v_columns + keys;
    x->dk = (float *)(x->k_pairs + keys);
    x->dv = x->dk + 2 * keys;
    return x;
}

/* ---- A block of keys, and a block of queries ---- */

/* Which of the problem a tile is: queries t .. t + rows - 1, keys key .. key + keys - 1 of head h. */
typedef struct {
    const Bf16Backward *g;
    const AttentionShape *s;
    const float *delta; /* (B,NH,T) */
    int b, h;
    int t, rows;
    int key, keys;
} Place;

/* Rows of HS numbers as they lie, which are rows of pairs, or where HS is odd a copy of them. */
static const Pair *rows_of_pairs(Pair *copy, const Bf16 *rows, int n, int HS)
{
    if (HS % 2 == 0)
        return (const Pair *)rows;
    for (int r = 0; r < n; r++)
        scatter_row(copy + (size_t)r * (HS + 1) / 2, 1, rows + (size_t)r * HS, HS);
    return copy;
}

/* Pairs of rows, room for `most` rows. */
static void pair_block(Pair *to, int most, const Scratch *x, const Bf16 *rows, int n, int HS)
{
    if (n < most || HS < x->width)
        memset(to, 0, (size_t)most / 2 * x->width * sizeof *to);
    pair_rows(to, x->width, rows, n, HS);
}

static void read_keys(Scratch *x, const Place *p)
{
    int HS = p->s->head_size;
    const Bf16 *k = p->g->k + key_row(p->s, p->b, p->h, p->key), *v = p->g->v + (k - p->g->k);
    memset(x->k_columns, 0, (size_t)x->pairs * KEYS * sizeof(Pair));
    memset(x->v_columns, 0, (size_t)x->pairs * KEYS * sizeof(Pair));
    for (int i = 0; i < p->keys; i++) {
        scatter_row(x->k_columns + i, KEYS, k + (size_t)i * HS, HS);
        scatter_row(x->v_columns + i, KEYS, v + (size_t)i * HS, HS);
    }
    pair_block(x->k_pairs, KEYS, x, k, p->keys, HS);
}

static void read_queries(Scratch *x, const Place *p)
{
    int HS = p->s->head_size;
    size_t first = lse_index(p->s, p->b, p->h, p->t);
    const Bf16 *q = p->g->q + first * HS, *dout = p->g->dout + first * HS;
    x->q_rows = rows_of_pairs(x->q_copy, q, p->rows, HS);
    x->dout_rows = rows_of_pairs(x->dout_copy, dout, p->rows, HS);
    pair_block(x->q_pairs, ROWS, x, q, p->rows, HS);
    pair_block(x->dout_pairs, ROWS, x, dout, p->rows, HS);
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
    sight.all = every && s->dropout == 0 && sight.to == p->keys && sight.to % 2 == 0;
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

/* c = TILE rows times KEY_STEP columns; past row `last`: that one again, whose weights are 0. */
INLINE void multiply_rows(Vector c[TILE][VECTORS], const Pair *rows, int r, int last, const Pair *columns,
                          int pairs)
{
    const Pair *a[TILE];
    for (int i = 0; i < TILE; i++)
        a[i] = rows + (size_t)smaller(r + i, last) * pairs;
    EACH_VECTOR(i, j, VECTORS)
        c[i][j] = (Vector){0};
    multiply_pairs(c, VECTORS, a, 1, columns, KEYS, pairs);
}

/* S, the softmax, dP and its gradient, for TILE queries by KEY_STEP keys: D and dS. */
INLINE void weigh(Scratch *x, const Place *p, int r, int key, bool all)
{
    float to_exponent = p->s->scale * log2e;
    Vector c[TILE][VECTORS], weight[TILE][VECTORS];
    const Vector *kept = (const Vector *)(x->kept + r * KEYS + key);
    PairVector *weight_pairs = (PairVector *)(x->weight_pairs + r / 2 * KEYS + key);
    PairVector *ds_pairs = (PairVector *)(x->ds_pairs + r / 2 * KEYS + key);
    Bf16 *ds_rows = (Bf16 *)x->ds_rows + r * KEYS + key;
    multiply_rows(c, x->q_rows, r, p->rows - 1, x->k_columns + key, x->pairs);
    EACH_VECTOR(i, j, VECTORS) {
        Vector score = c[i][j] * to_exponent - x->lse[r + i];
        if (!all)
            score = vector_select(kept[i * KEYS / LANES + j] < 0, (Vector){0} - INFINITY, score);
        weight[i][j] = exp2_short(score);
    }
    multiply_rows(c, x->dout_rows, r, p->rows - 1, x->v_columns + key, x->pairs);
    EACH_VECTOR(i, j, VECTORS) {
        Vector w = weight[i][j];
        if (all)
            c[i][j] = w * (c[i][j] - x->delta[r + i]);
        else {
            Vector factor = kept[i * KEYS / LANES + j];
            c[i][j] = vector_select(factor < 0, (Vector){0}, w * (factor * c[i][j] - x->delta[r + i]));
            weight[i][j] = w * factor;
        }
        store_row(ds_rows + i * KEYS + j * LANES, c[i][j]);
        if (i % 2) {
            ds_pairs[i / 2 * KEYS / LANES + j] = pairs_from(c[i - 1][j], c[i][j]);
            weight_pairs[i / 2 * KEYS / LANES + j] = pairs_from(weight[i - 1][j], weight[i][j]);
        }
    }
}

/* sum (rows,width) += a product: pair k of row i lies at left + i * left_row + k * left_step; right (n,width). */
INLINE void add_gradient(float *sum, int rows, const Pair *left, size_t left_row, size_t left_step,
                         const Pair *right, int n, int width)
{
    for (int d = 0; d < width; d += WIDE)
        for (int r = 0; r < rows; r += TILE) {
            Vector c[TILE][VECTORS];
            const Pair *a[TILE];
            for (int i = 0; i < TILE; i++)
                a[i] = left + (r + i) * left_row;
            EACH_VECTOR(i, j, 2)
                c[i][j] = ((const Vector *)(sum + (size_t)(r + i) * width + d))[j];
            multiply_pairs(c, 2, a, left_step, right + d, width, n);
            EACH_VECTOR(i, j, 2)
                ((Vector *)(sum + (size_t)(r + i) * width + d))[j] = c[i][j];
        }
}

/* The block's queries meet its keys. dq (ROWS,width) */
static void meet(Scratch *x, const Place *p, float *dq)
{
    Sight sight = look_ahead(p);
    if (sight.from >= sight.to)
        return;
    read_queries(x, p);
    int rows = round_up(p->rows, TILE), width = x->width, keys = sight.to - sight.from;
    if (!sight.all)
        look_up(x, p, &sight);
    for (int key = sight.from; key < round_up(sight.to, KEY_UNIT); key += KEY_STEP)
        for (int r = 0; r < rows; r += TILE)
            if (sight.all)
                weigh(x, p, r, key, true);
            else
                weigh(x, p, r, key, false);
    size_t sums = (size_t)sight.from * width;
    add_gradient(x->dv + sums, keys, x->weight_pairs + sight.from, 1, KEYS, x->dout_pairs, rows / 2, width);
    add_gradient(x->dk + sums, keys, x->ds_pairs + sight.from, 1, KEYS, x->q_pairs, rows / 2, width);
    add_gradient(dq, rows, x->ds_rows + sight.from / 2, KEYS / 2, 1, x->k_pairs + sums / 2, (keys + 1) / 2,
                 width);
}

/* ---- All tiles ---- */

static int key_blocks(const AttentionShape *s)
{
    return (s->key_tokens + KEYS - 1) / KEYS;
}

/* Where heads are few, several tasks share one: each has some blocks of its keys, and sums of dq of its own. How many
 * follows from the shape alone, and so do the bits. */
static int chunks(const AttentionShape *s)
{
    int wanted = SHARES / smaller(SHARES, s->batch * s->heads);
    return smaller(wanted, key_blocks(s));
}

static size_t all_tasks(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * chunks(s);
}

/* Floats of one task's sums: (T,width), T rounded up to ROWS. */
static size_t task_sums(const AttentionShape *s)
{
    return (size_t)round_up(s->tokens, ROWS) * round_up(s->head_size, WIDE);
}

size_t bf16_gradient_sums(const AttentionShape *s)
{
    return all_tasks(s) * task_sums(s);
}

static size_t lists(const AttentionShape *s)
{
    return all_tasks(s) < MOST_LISTS ? all_tasks(s) : MOST_LISTS;
}

size_t bf16_backward_scratch(const AttentionShape *s)
{
    return lists(s) * scratch_size(s->head_size);
}

static void write_key_gradient(const Scratch *x, const Place *p, int block)
{
    int HS = p->s->head_size, keys = smaller(KEYS, p->s->key_tokens - block * KEYS);
    for (int i = 0; i < keys; i++) {
        size_t row = key_row(p->s, p->b, p->h, p->key + i), at = (size_t)i * x->width;
        for (int d = 0; d < HS; d++) {
            p->g->dk[row + d] = bf16_from_float(i < p->keys ? p->s->scale * x->dk[at + d] : 0);
            p->g->dv[row + d] = bf16_from_float(i < p->keys ? x->dv[at + d] : 0);
        }
    }
}

/* Task `task`: a share of the keys of one head, and all its queries. */
static void task_gradient(const Bf16Backward *g, const float *delta, float *sums, float *scratch,
                          const AttentionShape *s, size_t task)
{
    int n = chunks(s), head = (int)(task / n), chunk = (int)(task % n);
    Place p = {.g = g, .s = s, .delta = delta, .b = head / s->heads, .h = head % s->heads};
    int valid = s->lengths ? s->lengths[p.b] : s->key_tokens; /* what lies beyond is not read */
    Scratch *x = lay_out(scratch, s->head_size);
    float *dq = sums + task * task_sums(s);
    memset(dq, 0, task_sums(s) * sizeof *dq);

    for (int block = chunk * key_blocks(s) / n; block < (chunk + 1) * key_blocks(s) / n; block++) {
        p.key = block * KEYS;
        p.keys = larger(0, smaller(KEYS, valid - p.key));
        read_keys(x, &p);
        memset(x->dk, 0, (size_t)KEYS * x->width * sizeof *x->dk);
        memset(x->dv, 0, (size_t)KEYS * x->width * sizeof *x->dv);
        for (p.t = 0; p.t < s->tokens; p.t += ROWS) {
            p.rows = smaller(ROWS, s->tokens - p.t);
            meet(x, &p, dq + (size_t)p.t * x->width);
        }
        write_key_gradient(x, &p, block);
    }
}

static float row_delta(const Bf16 *dout, const Bf16 *out, int n)
{
    float sum = 0;
    for (int d = 0; d < n; d++)
        sum += bf16_to_float(dout[d]) * bf16_to_float(out[d]);
    return sum;
}

/* dq = scale times the sums of a head's tasks, in their order. */
static void finish_row(const Bf16Backward *g, const float *sums, const AttentionShape *s, size_t row)
{
    int n = chunks(s), HS = s->head_size;
    size_t head = row / s->tokens, t = row % s->tokens;
    const float *first = sums + head * n * task_sums(s) + t * round_up(HS, WIDE);
    for (int d = 0; d < HS; d++) {
        float sum = 0;
        for (int chunk = 0; chunk < n; chunk++)
            sum += first[chunk * task_sums(s) + d];
        g->dq[row * HS + d] = bf16_from_float(s->scale * sum);
    }
}

void attention_bf16_backward(const Bf16Backward *g, float *delta, float *sums, float *scratch,
                             const AttentionShape *s)
{
    size_t n = lists(s), tasks = all_tasks(s), floats = scratch_size(s->head_size), HS = s->head_size;
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++)
        delta[row] = row_delta(g->dout + row * HS, g->out + row * HS, (int)HS);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++)
        for (size_t task = tasks * i / n; task < tasks * (i + 1) / n; task++)
            task_gradient(g, delta, sums, scratch + i * floats, s, task);
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++)
        finish_row(g, sums, s, row);
}
