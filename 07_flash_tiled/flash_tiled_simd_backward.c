/* The gradients of flash attention near the processor's multiply-add peak. flash_tiled_backward.c has the
 * formulas; the shapes are in the header.
 *
 * One pass, keys outside. FLASH_BACK_KEYS keys and their dk and dv stay in the cache while the queries, FLASH_BACK_ROWS
 * at a time, walk past; what each tile adds to dq goes to memory. A tile is five products, all sums of
 *
 *     c[i][j] += a number of the left matrix, broadcast, times a vector of the right one
 *
 *     S  = Q K^T    dP = dO V^T     rows are queries, lanes run along keys: K^T and V^T are copied once per
 *                                   block of keys
 *     dV += D^T dO  dK += dS^T Q    rows are keys, lanes run along the head's numbers
 *     dQ += dS K                    rows are queries, lanes likewise
 */
#include "flash_tiled_simd_backward.h"

#include <math.h>
#include <string.h>

#include "flash_dropout.h"

static const float log2e = 1.44269504f;

enum {
    ROWS = FLASH_BACK_ROWS,
    KEYS = FLASH_BACK_KEYS,
    KEY_STEP = VECTORS * LANES, /* keys of one register tile of S */
    KEY_UNIT =
        KEY_STEP % TILE ? 2 * KEY_STEP : KEY_STEP, /* whole register tiles of S, whole ones of dK and dV */
    PAIR = 2 * LANES,                              /* numbers of a head in one register tile of dQ, dK, dV */
};

static int smaller(int a, int b)
{
    return a < b ? a : b;
}
static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* What a task works in. width is HS rounded up to PAIR; what is beyond a row's HS numbers, beyond the last
 * query or the last key, is zero. */
typedef struct {
    int width;
    float *k_columns, *v_columns; /* (HS,KEYS): K^T, V^T */
    float *k_rows;                /* (KEYS,width) */
    float *dk_rows, *dv_rows;     /* (KEYS,width): sums so far */
    float *q_rows, *dout_rows;    /* (ROWS,width) */
    float *scaled_rows;           /* (ROWS,width): Q times scale and log2 e */
    float *dq_rows;               /* (ROWS,width): what one tile adds */
    float *weights;               /* (ROWS,KEYS): D */
    float *d_scores;              /* (ROWS,KEYS): dS */
    float *extra;                 /* (ROWS,KEYS): the bias times log2 e, or -inf where a query may not look */
    float *kept;                  /* (ROWS,KEYS): dropout's factor, 0 or 1 / (1 - p) */
    float *lse, *delta;           /* (ROWS): lse times log2 e, +inf for a row that saw nothing */
} Scratch;

static int width_of(int head_size)
{
    return (head_size + PAIR - 1) / PAIR * PAIR;
}

static size_t scratch_floats(int head_size)
{
    size_t width = width_of(head_size);
    return 5 * KEYS * width + 4 * ROWS * width + 4 * ROWS * KEYS + 2 * ROWS;
}

static float *take(float **at, size_t floats)
{
    float *taken = *at;
    *at += floats;
    return taken;
}

static Scratch lay_out(float *at, int head_size)
{
    Scratch x = {.width = width_of(head_size)};
    x.k_columns = take(&at, (size_t)KEYS * x.width);
    x.v_columns = take(&at, (size_t)KEYS * x.width);
    x.k_rows = take(&at, (size_t)KEYS * x.width);
    x.dk_rows = take(&at, (size_t)KEYS * x.width);
    x.dv_rows = take(&at, (size_t)KEYS * x.width);
    x.q_rows = take(&at, (size_t)ROWS * x.width);
    x.scaled_rows = take(&at, (size_t)ROWS * x.width);
    x.dout_rows = take(&at, (size_t)ROWS * x.width);
    x.dq_rows = take(&at, (size_t)ROWS * x.width);
    x.weights = take(&at, ROWS * KEYS);
    x.d_scores = take(&at, ROWS * KEYS);
    x.extra = take(&at, ROWS * KEYS);
    x.kept = take(&at, ROWS * KEYS);
    x.lse = take(&at, ROWS);
    x.delta = take(&at, ROWS);
    return x;
}

/* ---- Arithmetic on vectors ---- */

/* multiply_add() with b (n,KEYS), for scores: in sums of SHORT_SUM terms, as forward adds them. */
INLINE void add_scores(Vector c[TILE][VECTORS], const float *a[TILE], const float *b, int n)
{
    multiply_add(c, VECTORS, a, 1, b, KEYS, smaller(n, SHORT_SUM));
    for (int k = SHORT_SUM; k < n; k += SHORT_SUM) {
        Vector more[TILE][VECTORS] = {0};
        for (int i = 0; i < TILE; i++)
            a[i] += SHORT_SUM;
        multiply_add(more, VECTORS, a, 1, b + (size_t)k * KEYS, KEYS, smaller(n - k, SHORT_SUM));
        EACH_VECTOR(i, j, VECTORS) {
            c[i][j] += more[i][j];
        }
    }
}

/* ---- A block of keys, and a block of queries ---- */

/* Where the parts of one problem lie, and which of it a tile is: queries t .. t + rows - 1 of head h, keys
 * key .. key + keys - 1 of head kv_head. */
typedef struct {
    const FlashBackward *g;
    const AttentionShape *s;
    const float *delta; /* (B,NH,T) */
    int b, h, kv_head;
    int t, rows;
    int key, keys;
} Place;

static const float *key_at(const Place *p, const float *k, int key)
{
    const FlashView *view = &p->g->view;
    return k + p->b * view->k_batch + p->kv_head * view->k_head + (size_t)key * view->k_token;
}

/* K, K^T and V^T; keys from `keys` on are zero. */
static void read_keys(Scratch *x, const Place *p)
{
    int HS = p->s->head_size;
    size_t width = x->width;
    memset(x->k_columns, 0, KEYS * width * sizeof(float));
    memset(x->v_columns, 0, KEYS * width * sizeof(float));
    memset(x->k_rows, 0, KEYS * width * sizeof(float));
    for (int i = 0; i < p->keys; i++) {
        const float *k = key_at(p, p->g->view.k, p->key + i);
        memcpy(x->k_rows + i * width, k, HS * sizeof(float));
    }
    for (int i0 = 0; i0 < p->keys; i0 += LANES)
        for (int d = 0; d < HS; d += LANES) {
            Vector k[LANES] = {0}, v[LANES] = {0};
            for (int i = 0; i < LANES && i0 + i < p->keys; i++) {
                k[i] = load_first(key_at(p, p->g->view.k, p->key + i0 + i) + d, HS - d);
                v[i] = load_first(key_at(p, p->g->view.v, p->key + i0 + i) + d, HS - d);
            }
            transpose(k);
            transpose(v);
            for (int i = 0; i < LANES; i++) {
                *(Vector *)(x->k_columns + (size_t)(d + i) * KEYS + i0) = k[i];
                *(Vector *)(x->v_columns + (size_t)(d + i) * KEYS + i0) = v[i];
            }
        }
}

/* Q, dO, lse and delta. Rows from `rows` on are zero, and see nothing. */
static void read_queries(Scratch *x, const Place *p)
{
    const FlashView *view = &p->g->view;
    int HS = p->s->head_size;
    for (int r = 0; r < ROWS; r++) {
        size_t at = (size_t)r * x->width;
        float *q = x->q_rows + at, *scaled = x->scaled_rows + at, *dout = x->dout_rows + at;
        int own = r < p->rows ? HS : 0;
        size_t q_row = p->b * view->q_batch + p->h * view->q_head + (size_t)(p->t + r) * view->q_token;
        size_t out_row =
            p->b * view->out_batch + p->h * view->out_head + (size_t)(p->t + r) * view->out_token;
        if (own) {
            memcpy(q, view->q + q_row, own * sizeof *q);
            memcpy(dout, p->g->dout + out_row, own * sizeof *dout);
        }
        memset(q + own, 0, (x->width - own) * sizeof *q);
        for (int d = 0; d < x->width; d++)
            scaled[d] = p->s->scale * log2e * q[d];
        memset(dout + own, 0, (x->width - own) * sizeof *dout);
        float lse = own ? view->lse[lse_index(p->s, p->b, p->h, p->t + r)] : -INFINITY;
        x->lse[r] = lse == -INFINITY ? INFINITY : log2e * lse; /* 2^(score - inf) = 0 */
        x->delta[r] = own ? p->delta[lse_index(p->s, p->b, p->h, p->t + r)] : 0;
    }
}

/* ---- One tile ---- */

/* Which keys of its block a block of queries sees. */
typedef struct {
    int from, to; /* no key outside; from is a multiple of KEY_UNIT. from >= to: nothing */
    bool all;     /* every query sees every key of its block, and nothing is added or dropped */
} Sight;

static Sight look_ahead(const Place *p)
{
    const AttentionShape *s = p->s;
    const FlashKnown *known = &p->g->known;
    int kind = known->how_many ? known->how_many(s, p->b, p->t, p->t + p->rows, p->key, p->key + p->keys) : 1;
    if (kind == 0)
        return (Sight){0};
    FlashSpan span = flash_span(s, p->b, p->t, p->rows);
    Sight sight = {.from = larger(span.first - p->key, 0) / KEY_UNIT * KEY_UNIT,
                   .to = smaller(span.end - p->key, p->keys)};
    bool every = kind == 2 ||
                 (span.one_run && span.all_first <= p->key + sight.from && span.all_end >= p->key + sight.to);
    sight.all = every && !s->bias && s->dropout == 0 && sight.to == p->keys;
    return sight;
}

/* One past the last key that a register tile of dK and dV reads. */
static int tiles_end(const Sight *sight)
{
    return (sight->to + TILE - 1) / TILE * TILE;
}

/* extra and kept of the keys that are in sight, and of those that share a register tile with the last. */
static void look_up(Scratch *x, const Place *p, const Sight *sight)
{
    const AttentionShape *s = p->s;
    int to = tiles_end(sight);
    for (int r = 0; r < p->rows; r++) {
        float *extra = x->extra + r * KEYS, *kept = x->kept + r * KEYS;
        int first, end, t = p->t + r;
        size_t row = lse_index(s, p->b, p->h, t);
        bool one_run = flash_bounds(s, p->b, t, &first, &end);
        for (int i = sight->from; i < to; i++) {
            bool sees = (first <= p->key + i) & (p->key + i < end) & (i < sight->to);
            extra[i] = sees ? 0 : -INFINITY;
            kept[i] = 1;
        }
        if (!one_run)
            for (int i = sight->from; i < sight->to; i++)
                if (!attends(s, p->b, p->h, t, p->key + i))
                    extra[i] = -INFINITY;
        if (s->bias) {
            const float *bias = bias_row(s, p->b, p->h, t) + p->key * s->bias_stride[3];
            if (s->bias_stride[3] == 1) /* the same, for the compiler to turn into vectors */
                for (int i = sight->from; i < sight->to; i++)
                    extra[i] = extra[i] == 0 ? log2e * bias[i] : -INFINITY;
            else
                for (int i = sight->from; i < sight->to; i++)
                    extra[i] = extra[i] == 0 ? log2e * bias[i * s->bias_stride[3]] : -INFINITY;
        }
        if (s->dropout > 0)
            dropout_row(kept, s, row, p->key, sight->from, sight->to);
    }
}

/* S - lse into weights, dP into d_scores. The sums of S start at -lse, the numbers and their order are forward's: so they
 * are rounded much as they were there, and large scores lose little. */
INLINE void multiply_scores(Scratch *x, const Place *p, const Sight *sight, bool all)
{
    int HS = p->s->head_size;
    for (int key = sight->from; key < tiles_end(sight); key += KEY_STEP)
        for (int r = 0; r < p->rows; r += TILE) {
            Vector c[TILE][VECTORS];
            const float *a[TILE];
            size_t at = (size_t)r * KEYS + key;
            for (int i = 0; i < TILE; i++)
                a[i] = x->scaled_rows + (size_t)(r + i) * x->width;
            EACH_VECTOR(i, j, VECTORS) {
                c[i][j] = (Vector){0} - x->lse[r + i];
                if (!all)
                    c[i][j] += ((const Vector *)(x->extra + at + i * KEYS))[j];
            }
            add_scores(c, a, x->k_columns + key, HS);
            EACH_VECTOR(i, j, VECTORS) {
                ((Vector *)(x->weights + at + i * KEYS))[j] = c[i][j];
            }

            for (int i = 0; i < TILE; i++)
                a[i] = x->dout_rows + (size_t)(r + i) * x->width;
            EACH_VECTOR(i, j, VECTORS) {
                c[i][j] = (Vector){0};
            }
            multiply_add(c, VECTORS, a, 1, x->v_columns + key, KEYS, HS);
            EACH_VECTOR(i, j, VECTORS) {
                ((Vector *)(x->d_scores + at + i * KEYS))[j] = c[i][j];
            }
        }
}

/* D and dS from them: the softmax and its gradient. Apart from the products, whose sums need nearly all registers. */
INLINE void weigh(Scratch *x, const Place *p, const Sight *sight, bool all)
{
    for (int r = 0; r < (p->rows + TILE - 1) / TILE * TILE; r++)
        for (int key = sight->from; key < tiles_end(sight); key += LANES) {
            size_t at = (size_t)r * KEYS + key;
            Vector *weight = (Vector *)(x->weights + at), *d_score = (Vector *)(x->d_scores + at);
            if (all) {
                *weight = exp2_vector(*weight);
                *d_score = *weight * (*d_score - x->delta[r]);
            } else {
                Vector extra = *(const Vector *)(x->extra + at), kept = *(const Vector *)(x->kept + at);
                Vector w = exp2_vector(vector_select(extra == -INFINITY, extra, *weight));
                *d_score =
                    vector_select(extra == -INFINITY, (Vector){0}, w * (kept * *d_score - x->delta[r]));
                *weight = w * kept;
            }
        }
}

/* sum (keys,width) += left^T right: left (rows,KEYS), right (rows,width). */
INLINE void add_key_gradient(float *sum, const float *left, const float *right, const Sight *sight, int rows,
                             int width)
{
    for (int d = 0; d < width; d += PAIR)
        for (int key = sight->from; key < sight->to; key += TILE) {
            Vector c[TILE][VECTORS];
            const float *a[TILE];
            for (int i = 0; i < TILE; i++)
                a[i] = left + key + i;
            EACH_VECTOR(i, j, 2) {
                c[i][j] = ((const Vector *)(sum + (size_t)(key + i) * width + d))[j];
            }
            multiply_add(c, 2, a, KEYS, right + d, width, rows);
            EACH_VECTOR(i, j, 2) {
                ((Vector *)(sum + (size_t)(key + i) * width + d))[j] = c[i][j];
            }
        }
}

/* dq_rows = dS K */
INLINE void query_gradient(Scratch *x, const Sight *sight, int rows)
{
    for (int d = 0; d < x->width; d += PAIR)
        for (int r = 0; r < rows; r += TILE) {
            Vector c[TILE][VECTORS];
            const float *a[TILE];
            for (int i = 0; i < TILE; i++)
                a[i] = x->d_scores + (r + i) * KEYS + sight->from;
            EACH_VECTOR(i, j, 2) {
                c[i][j] = (Vector){0};
            }
            multiply_add(c, 2, a, 1, x->k_rows + (size_t)sight->from * x->width + d, x->width,
                         sight->to - sight->from);
            EACH_VECTOR(i, j, 2) {
                ((Vector *)(x->dq_rows + (size_t)(r + i) * x->width + d))[j] = c[i][j];
            }
        }
}

/* The block's queries meet its keys: weights and d_scores. False if no query sees any key. */
static bool meet(Scratch *x, const Place *p, Sight *sight)
{
    *sight = look_ahead(p);
    if (sight->from >= sight->to)
        return false;
    read_queries(x, p);
    if (sight->all) {
        multiply_scores(x, p, sight, true);
        weigh(x, p, sight, true);
    } else {
        look_up(x, p, sight);
        multiply_scores(x, p, sight, false);
        weigh(x, p, sight, false);
    }
    return true;
}

/* ---- All tiles ---- */

static int key_blocks(const AttentionShape *s)
{
    return (s->key_tokens + KEYS - 1) / KEYS;
}

/* How many batch entries one task takes: all of them where they share the numbers of a bias, so that its gradient is summed
 * up in one place; but not where too few tasks would be left. */
static int entries_of_a_task(const AttentionShape *s)
{
    bool shared = s->bias && s->bias_stride[0] == 0 && (s->bias_stride[1] || s->kv_heads == 1);
    return shared && s->kv_heads * key_blocks(s) >= FLASH_BACK_SHARES / 4 ? s->batch : 1;
}

/* Where key/value heads are few, several tasks share one: each has some blocks of keys, and a dq of its own.
 * How many follows from the shape alone, and so do the bits. */
static int chunks(const AttentionShape *s)
{
    int heads = s->batch / entries_of_a_task(s) * s->kv_heads;
    int wanted = FLASH_BACK_SHARES / smaller(FLASH_BACK_SHARES, heads);
    return smaller(wanted, key_blocks(s));
}

static void set_keys(Place *p, int block)
{
    int end = p->s->lengths ? p->s->lengths[p->b] : p->s->key_tokens; /* what lies beyond is not read */
    p->key = block * KEYS;
    p->keys = larger(0, smaller(KEYS, end - p->key));
}

/* The first query at or after t that these keys have to meet. */
static int next_query(const Place *p, int t)
{
    const FlashKnown *known = &p->g->known;
    if (!known->next_query || t >= p->s->tokens || !p->keys)
        return p->keys ? t : p->s->tokens;
    return known->next_query(known->lists, p->s, p->b, p->h, t, p->key, p->key + p->keys);
}

static void set_queries(Place *p, int t)
{
    p->t = t;
    p->rows = smaller(ROWS, p->s->tokens - t);
}

/* A dq: the caller's, or contiguous for the second chunk and those after it. */
typedef struct {
    float *first; /* of (b, h = 0) */
    size_t head, token;
} QueryRows;

static QueryRows query_rows(const Place *p, float *partial, int chunk)
{
    const AttentionShape *s = p->s;
    const FlashView *view = &p->g->view;
    if (chunk == 0)
        return (QueryRows){p->g->dq + p->b * view->q_batch, view->q_head, view->q_token};
    return (QueryRows){partial + (chunk - 1) * query_count(s) + query_row(s, p->b, 0, 0),
                       query_row(s, 0, 1, 0), s->head_size};
}

/* Adds one tile's dS to the gradient of (b, h)'s bias. A sum over queries is made in the tile first: a sum of sums loses
 * less to rounding. */
static void add_bias_gradient(Scratch *x, const Place *p, const Sight *sight)
{
    const size_t *stride = p->s->bias_stride;
    float *dbias = p->g->dbias + p->b * stride[0] + p->h * stride[1];
    int rows = p->rows;
    if (!stride[2]) { /* one row for all queries: into the first */
        for (int r = 1; r < rows; r++)
            for (int i = sight->from; i < sight->to; i++)
                x->d_scores[i] += x->d_scores[r * KEYS + i];
        rows = 1;
    }
    for (int r = 0; r < rows; r++) {
        const float *d_score = x->d_scores + r * KEYS;
        float *row = dbias + (p->t + r) * stride[2] + p->key * stride[3], sum = 0;
        for (int i = sight->from; stride[3] && i < sight->to; i++)
            row[i * stride[3]] += d_score[i];
        for (int i = sight->from; !stride[3] && i < sight->to; i++)
            sum += d_score[i];
        if (!stride[3])
            row[0] += sum;
    }
}

/* Does each number of the bias belong to one task? Then its gradient is summed up along the way. */
static bool bias_is_own(const AttentionShape *s)
{
    const size_t *stride = s->bias_stride;
    return s->bias && (stride[0] || entries_of_a_task(s) == s->batch) && (stride[1] || s->kv_heads == 1) &&
           (stride[3] || chunks(s) == 1);
}

static void write_key_gradient(const Scratch *x, const Place *p, int block)
{
    int HS = p->s->head_size, keys = smaller(KEYS, p->s->key_tokens - block * KEYS);
    for (int i = 0; i < keys; i++) {
        float *dk = (float *)key_at(p, p->g->dk, p->key + i), *dv = (float *)key_at(p, p->g->dv, p->key + i);
        for (int d = 0; d < HS; d++) {
            dk[d] = i < p->keys ? p->s->scale * x->dk_rows[(size_t)i * x->width + d] : 0;
            dv[d] = i < p->keys ? x->dv_rows[(size_t)i * x->width + d] : 0;
        }
    }
}

/* Chunk number `chunk` of the keys of one key/value head, and all queries that read it. */
static void chunk_gradient(Place p, float *partial, Scratch x, int chunk)
{
    const AttentionShape *s = p.s;
    int n = chunks(s), group = s->heads / s->kv_heads, first_head = p.kv_head * group;
    int HS = s->head_size;
    QueryRows dq = query_rows(&p, partial, chunk);

    for (int h = first_head; h < first_head + group; h++)
        for (int t = 0; t < s->tokens; t++)
            memset(dq.first + h * dq.head + t * dq.token, 0, HS * sizeof *dq.first);

    for (int block = chunk * key_blocks(s) / n; block < (chunk + 1) * key_blocks(s) / n; block++) {
        set_keys(&p, block);
        read_keys(&x, &p);
        memset(x.dk_rows, 0, (size_t)KEYS * x.width * sizeof *x.dk_rows);
        memset(x.dv_rows, 0, (size_t)KEYS * x.width * sizeof *x.dv_rows);
        for (p.h = first_head; p.h < first_head + group; p.h++)
            for (int t = next_query(&p, 0); t < s->tokens; t = next_query(&p, t + ROWS)) {
                Sight sight;
                set_queries(&p, t);
                if (!meet(&x, &p, &sight))
                    continue;
                add_key_gradient(x.dv_rows, x.weights, x.dout_rows, &sight, p.rows, x.width);
                add_key_gradient(x.dk_rows, x.d_scores, x.q_rows, &sight, p.rows, x.width);
                query_gradient(&x, &sight, p.rows);
                if (bias_is_own(s))
                    add_bias_gradient(&x, &p, &sight);
                for (int r = 0; r < p.rows; r++) {
                    float *row = dq.first + p.h * dq.head + (t + r) * dq.token;
                    for (int d = 0; d < HS; d++)
                        row[d] += s->scale * x.dq_rows[(size_t)r * x.width + d];
                }
            }
        write_key_gradient(&x, &p, block);
    }
}

/* A task: one chunk of one key/value head, in one batch entry or in all. */
static void task_gradient(const FlashBackward *g, const float *delta, float *partial, float *scratch,
                          const AttentionShape *s, size_t job)
{
    int n = chunks(s), entries = entries_of_a_task(s), head = (int)(job / n);
    Place p = {.g = g, .s = s, .delta = delta, .kv_head = head % s->kv_heads};
    int first = head / s->kv_heads * entries;
    for (p.b = first; p.b < first + entries; p.b++)
        chunk_gradient(p, partial, lay_out(scratch, s->head_size), (int)(job % n));
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
            for (int d = 0; d < s->head_size; d++)
                dq[d] += partial[(chunk - 1) * query_count(s) + row * s->head_size + d];
    }
}

static void row_deltas(float *delta, const FlashBackward *g, const AttentionShape *s)
{
    const FlashView *view = &g->view;
#pragma omp parallel for
    for (size_t row = 0; row < lse_count(s); row++) {
        size_t bh = row / s->tokens, at = bh / s->heads * view->out_batch + bh % s->heads * view->out_head +
                                          row % s->tokens * view->out_token;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int d = 0; d < s->head_size; d++)
            sum += g->dout[at + d] * view->out[at + d];
        delta[row] = sum;
    }
}

/* ---- A bias whose numbers several chunks share: dS once more, each number of the bias in one task ---- */

/* Along each axis the bias holds `own` numbers, each shared by `shared` pairs. A task is one (b, h) of the
 * bias and, if it tells keys apart, one block of keys. */
typedef struct {
    int own[4], shared[4];
    int blocks; /* of keys to a task's (b, h) */
} BiasTasks;

static BiasTasks bias_tasks(const AttentionShape *s)
{
    const int size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    BiasTasks tasks;
    for (int i = 0; i < 4; i++) {
        tasks.own[i] = s->bias_stride[i] ? size[i] : 1;
        tasks.shared[i] = s->bias_stride[i] ? 1 : size[i];
    }
    tasks.blocks = s->bias_stride[3] ? key_blocks(s) : 1;
    return tasks;
}

static size_t bias_jobs(const AttentionShape *s)
{
    BiasTasks tasks = bias_tasks(s);
    return s->bias && !bias_is_own(s) ? (size_t)tasks.own[0] * tasks.own[1] * tasks.blocks : 0;
}

static void bias_gradient(const FlashBackward *g, const float *delta, float *scratch, const AttentionShape *s,
                          size_t job)
{
    BiasTasks tasks = bias_tasks(s);
    int b0 = (int)(job / tasks.blocks / tasks.own[1]), h0 = (int)(job / tasks.blocks % tasks.own[1]);
    int first = s->bias_stride[3] ? (int)(job % tasks.blocks) : 0,
        end = s->bias_stride[3] ? first + 1 : key_blocks(s);
    Scratch x = lay_out(scratch, s->head_size);
    Place p = {.g = g, .s = s, .delta = delta};

    for (p.b = b0; p.b < b0 + tasks.shared[0]; p.b++)
        for (p.h = h0; p.h < h0 + tasks.shared[1]; p.h++)
            for (int block = first; block < end; block++) {
                p.kv_head = p.h / (s->heads / s->kv_heads);
                set_keys(&p, block);
                read_keys(&x, &p);
                for (int t = next_query(&p, 0); t < s->tokens; t = next_query(&p, t + ROWS)) {
                    Sight sight;
                    set_queries(&p, t);
                    if (meet(&x, &p, &sight))
                        add_bias_gradient(&x, &p, &sight);
                }
            }
}

/* ---- The whole ---- */

static size_t all_jobs(const AttentionShape *s)
{
    return (size_t)(s->batch / entries_of_a_task(s)) * s->kv_heads * chunks(s);
}

/* Lists that the jobs are cut into, each with scratch of its own. */
static size_t lists(const AttentionShape *s)
{
    size_t jobs = all_jobs(s) > bias_jobs(s) ? all_jobs(s) : bias_jobs(s);
    return jobs < FLASH_BACK_LISTS ? jobs : FLASH_BACK_LISTS;
}

size_t flash_backward_partials(const AttentionShape *s)
{
    return (chunks(s) - 1) * query_count(s);
}

size_t flash_backward_scratch(const AttentionShape *s)
{
    return lists(s) * scratch_floats(s->head_size);
}

void flash_attention_backward(const FlashBackward *g, float *delta, float *partial, float *scratch,
                              const AttentionShape *s)
{
    size_t n = lists(s), jobs = all_jobs(s), floats = scratch_floats(s->head_size);
    row_deltas(delta, g, s);
    if (s->bias) {
        BiasTasks bias = bias_tasks(s);
        memset(g->dbias, 0, (size_t)bias.own[0] * bias.own[1] * bias.own[2] * bias.own[3] * sizeof *g->dbias);
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++)
        for (size_t job = jobs * i / n; job < jobs * (i + 1) / n; job++)
            task_gradient(g, delta, partial, scratch + i * floats, s, job);
    add_partials(g, partial, s);
    jobs = bias_jobs(s);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++)
        for (size_t job = jobs * i / n; job < jobs * (i + 1) / n; job++)
            bias_gradient(g, delta, scratch + i * floats, s, job);
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

void attention_simd_backward(const AttentionBackward *a, float *delta, float *partial, float *scratch,
                             const AttentionShape *s)
{
    FlashBackward g = flash_backward(a, s);
    flash_attention_backward(&g, delta, partial, scratch, s);
}
