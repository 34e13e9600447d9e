/* The gradients of flash attention near the multiply-add peak. flash_tiled_backward.c has the formulas; the contracts of
 * these steps are in the header. This is how it is done, and why.
 *
 * - Keys outside. A block of keys, its dk and its dv stay in the cache while all queries walk past, FLASH_BACK_ROWS at
 *   a time: what goes to memory and back is dq alone.
 * - Five products, all of one form: sums in registers += a number, broadcast, times a vector.
 *       S  = Q K^T    dP = dO V^T     rows are queries, lanes run along keys: K^T, V^T are made once a block
 *       dV += D^T dO  dK += dS^T Q    rows are keys, lanes run along the head's numbers
 *       dQ += dS K                    rows are queries, lanes likewise
 * - Scale and log2 e are in the queries, so that S comes out as an exponent of 2. dS is divided by log2 e: so dK, a sum
 *   of such queries, comes out right, and dQ finds scale and log2 e in K.
 * - Long sums. A tile of dK and dV is loaded and stored once for FLASH_BACK_ROWS queries, one of dQ for FLASH_BACK_KEYS keys.
 * - Softmax and its gradient are made of dP while a tile of it is still in registers, not in a pass of their own.
 * - Memory is asked for ahead: the next queries, and dq, a row or two with each tile. dk and dv begin without being read.
 * - What no query sees is left out: TILE queries at a time know which keys they see, and all five products keep to it. */
#include "flash_tiled_simd_backward.h"

#include <math.h>

static const float ln2 = 0.693147181f;
enum {
    ROWS = FLASH_BACK_ROWS,
    KEYS = FLASH_BACK_KEYS,
    STEP = FLASH_BACK_STEP, /* keys of a register tile of S or dP */
    UNIT = FLASH_BACK_UNIT, /* whole vectors of S, whole tiles of dK and dV */
};

/* ---- A block of keys ---- */

static const float *row_of_k(const FlashBackBlock *x, const float *k, int key)
{
    const FlashView *view = &x->g->view;
    return k + x->b * view->k_batch + x->kv_head * view->k_head + (size_t)key * view->k_token;
}

void flash_back_begin(FlashBackBlock *x, float *scratch, int number)
{
    flash_back_lay_out(x, scratch, number);
    int HS = x->s->head_size, width = x->width;
    float factor = x->s->scale * log2e;
    for (int i0 = 0; i0 < round_up(x->keys, UNIT); i0 += LANES)
        for (int d = 0; d < width; d += LANES) {
            Vector k[LANES] = {0}, v[LANES] = {0};
            for (int i = 0; i < LANES; i++) {
                __builtin_prefetch(row_of_k(x, x->g->view.k, x->key + i0 + LANES + i) + d);
                __builtin_prefetch(row_of_k(x, x->g->view.v, x->key + i0 + LANES + i) + d);
                if (i0 + i < x->keys) {
                    k[i] = load_first(row_of_k(x, x->g->view.k, x->key + i0 + i) + d, HS - d);
                    v[i] = load_first(row_of_k(x, x->g->view.v, x->key + i0 + i) + d, HS - d);
                }
                *(Vector *)(x->k_rows + (size_t)(i0 + i) * x->stride + d) = factor * k[i];
            }
            transpose(k);
            transpose(v);
            for (int i = 0; i < LANES; i++) {
                *(Vector *)(x->k_columns + (size_t)(d + i) * KEYS + i0) = k[i];
                *(Vector *)(x->v_columns + (size_t)(d + i) * KEYS + i0) = v[i];
            }
        }
}

/* ---- Queries meet it ---- */

/* Reads row r of Q, times scale and log2 e, or of dO, with its delta; zeros from row `rows` on. */
INLINE void read_row(const FlashBackBlock *x, int r, bool is_q)
{
    size_t q_at = r * x->g->view.q_token, out_at = r * x->g->view.out_token;
    const float *from = is_q ? x->from_q + q_at : x->from_dout + out_at, *out = x->from_out + out_at;
    float *to = (is_q ? x->q : x->dout) + (size_t)r * x->stride, factor = is_q ? x->s->scale * log2e : 1;
    int n = r < x->rows ? x->s->head_size : 0, width = x->width;
    Vector delta = {0};
    for (int d = 0; d < width; d += LANES) {
        Vector numbers = load_first(from + d, n - d);
        *(Vector *)(to + d) = factor * numbers;
        if (!is_q)
            delta += numbers * load_first(out + d, n - d);
    }
    if (!is_q)
        x->delta[r] = sum_lanes(delta);
}

static bool is_sure(const FlashSight *sight, int key, int keys)
{
    return sight->sure_from <= key && key + keys <= sight->sure_to;
}

/* S - lse of TILE queries by some vectors of keys, summed up in forward's order: so large scores lose little. */
INLINE void score_tile(const FlashBackBlock *x, int r, int key, int vectors)
{
    int HS = x->s->head_size;
    bool ask = !is_sure(&x->sight[r / TILE], key, vectors * LANES);
    float *to = x->weights + (size_t)r * KEYS + key;
    const float *lse = x->lse + r, *q[TILE];
    for (int d = 0; d < HS; d += SHORT_SUM) {
        Vector c[TILE][VECTORS];
        for (int i = 0; i < TILE; i++)
            q[i] = x->q + (size_t)(r + i) * x->stride + d;
        FORGET(to);
        FORGET(lse);
        EACH_VECTOR(i, j, vectors) {
            c[i][j] = (Vector){0} - (d ? 0 : lse[i]);
            if (ask && d == 0)
                c[i][j] += ((const Vector *)(to + i * KEYS))[j];
        }
        multiply_add(c, vectors, q, 1, x->k_columns + (size_t)d * KEYS + key, KEYS,
                     smaller(SHORT_SUM, HS - d));
        EACH_VECTOR(i, j, vectors) {
            Vector *sum = (Vector *)(to + i * KEYS) + j;
            if (d)
                c[i][j] += *sum;
            *sum = ask ? vector_select(*sum == -INFINITY, *sum, c[i][j]) : c[i][j];
        }
    }
}

/* D in their place, and dS: the softmax and its gradient. */
INLINE void weigh_tile(const FlashBackBlock *x, int r, int key, int vectors)
{
    bool sure = is_sure(&x->sight[r / TILE], key, vectors * LANES);
    size_t at = (size_t)r * KEYS + key;
    float *weights = x->weights + at, *d_scores = x->d_scores + at;
    const float *delta = x->delta + r, *kept = x->s->dropout > 0 ? x->kept + at : NULL, *dout[TILE];
    Vector dP[TILE][VECTORS];
    for (int i = 0; i < TILE; i++)
        dout[i] = x->dout + (size_t)(r + i) * x->stride;
    EACH_VECTOR(i, j, vectors)
        dP[i][j] = (Vector){0};
    multiply_add(dP, vectors, dout, 1, x->v_columns + key, KEYS, x->s->head_size);
    FORGET(weights);
    FORGET(d_scores);
    EACH_VECTOR(i, j, vectors) {
        Vector *weight = (Vector *)(weights + i * KEYS) + j, *d_score = (Vector *)(d_scores + i * KEYS) + j;
        Vector score = *weight, w = exp2_vector(score), one = (Vector){0} + 1;
        if (sure) {
            *weight = w;
            *d_score = ln2 * w * (dP[i][j] - delta[i]);
        } else {
            Vector factor = kept ? ((const Vector *)(kept + i * KEYS))[j] : one;
            *weight = factor * w;
            *d_score =
                vector_select(score == -INFINITY, (Vector){0}, ln2 * w * (factor * dP[i][j] - delta[i]));
        }
    }
}

/* First the scores of all queries with what they see of STEP keys, whose columns stay in the cache meanwhile; then the rest. */
INLINE void meet_keys(const FlashBackBlock *x, bool is_score, int key)
{
    for (int r = 0; r < x->rows; r += TILE) {
        const FlashSight *sight = &x->sight[r / TILE];
        for (int i = 0; key == 0 && i < TILE; i++)
            read_row(x, r + i, is_score);
        for (int i = key / STEP; i < TILE; i += KEYS / STEP)
            flash_back_look_ahead(x, r + i, is_score);
        int from = larger(key, sight->from), end = smaller(key + STEP, round_up(sight->to, UNIT));
        int vectors = larger(0, end - from) / LANES;
        switch (2 * vectors + is_score) { /* constants: so the sums stay in registers */
        case 2: weigh_tile(x, r, from, 1); break;
        case 3: score_tile(x, r, from, 1); break;
        case 4: weigh_tile(x, r, from, 2); break;
        case 5: score_tile(x, r, from, 2); break;
        case 6: weigh_tile(x, r, from, 3); break;
        case 7: score_tile(x, r, from, 3); break;
        }
    }
}

/* Some vectors of TILE rows of a gradient, `rows` of them and n numbers: += sum over k of a[row * a_row + k * a_step] * b[k]. */
INLINE void add_vectors(float *to, size_t step, int rows, int n, int vectors, bool add, const float *a,
                        size_t a_row, size_t a_step, const float *b, size_t b_step, int terms)
{
    Vector c[TILE][VECTORS];
    const float *row[TILE];
    for (int i = 0; i < TILE; i++)
        row[i] = a + i * a_row;
    EACH_VECTOR(i, j, vectors)
        c[i][j] = add ? load_first(to + i * step + j * LANES, i < rows ? n - j * LANES : 0) : (Vector){0};
    multiply_add(c, vectors, row, a_step, b, b_step, terms);
    FORGET(to);
    EACH_VECTOR(i, j, vectors)
        store_first(to + i * step + j * LANES, c[i][j], i < rows ? n - j * LANES : 0);
}

/* The same with constants; then nothing needs to be asked for each row of a whole tile. */
INLINE void add_tile(float *to, size_t step, int rows, int n, int vectors, bool add, const float *a,
                     size_t a_row, size_t a_step, const float *b, size_t b_step, int terms)
{
    bool whole = rows >= TILE && n >= vectors * LANES;
    switch (whole ? vectors : -vectors) {
    case 1: add_vectors(to, step, TILE, LANES, 1, add, a, a_row, a_step, b, b_step, terms); break;
    case 2: add_vectors(to, step, TILE, 2 * LANES, 2, add, a, a_row, a_step, b, b_step, terms); break;
    case 3: add_vectors(to, step, TILE, 3 * LANES, 3, add, a, a_row, a_step, b, b_step, terms); break;
    case -1: add_vectors(to, step, rows, n, 1, add, a, a_row, a_step, b, b_step, terms); break;
    case -2: add_vectors(to, step, rows, n, 2, add, a, a_row, a_step, b, b_step, terms); break;
    case -3: add_vectors(to, step, rows, n, 3, add, a, a_row, a_step, b, b_step, terms); break;
    }
}

/* dK or dV += left^T right; left (ROWS,KEYS), right (ROWS,stride). */
static void add_key_gradient(const FlashBackBlock *x, float *gradient, const float *left, const float *right)
{
    size_t stride = x->stride, step = x->g->view.k_token;
    for (int d = 0; d < x->width; d += x->part)
        for (int key = 0; key < x->keys; key += TILE) {
            int from = x->seen_from[key / TILE], terms = x->seen_to[key / TILE] - from;
            int n = x->s->head_size - d, vectors = smaller(x->part, x->width - d) / LANES;
            float *to = (float *)row_of_k(x, gradient, x->key + key) + d;
            const float *a = left + from * KEYS + key, *b = right + from * stride + d;
            if (terms > 0)
                add_tile(to, step, x->keys - key, n, vectors, x->summed[key / TILE], a, 1, KEYS, b, stride,
                         terms);
        }
}

bool flash_back_weigh(FlashBackBlock *x)
{
    if (!flash_back_look(x))
        return false;
    flash_back_ask(x);
    for (int key = 0; key < KEYS; key += STEP) {
        meet_keys(x, true, key);
        meet_keys(x, false, key);
    }
    return true;
}

void flash_back_add_to_keys(FlashBackBlock *x)
{
    add_key_gradient(x, x->g->dv, x->weights, x->dout);
    add_key_gradient(x, x->g->dk, x->d_scores, x->q);
    for (int i = 0; i < KEYS / TILE; i++)
        x->summed[i] |= x->seen_from[i] < x->seen_to[i];
}

/* dQ += dS K. */
void flash_back_add_to_queries(const FlashBackBlock *x)
{
    size_t stride = x->stride, step = x->g->view.q_token;
    for (int d = 0; d < x->width; d += x->part)
        for (int r = 0; r < x->rows; r += TILE) {
            int from = x->sight[r / TILE].from, terms = x->sight[r / TILE].to - from;
            int n = x->s->head_size - d, vectors = smaller(x->part, x->width - d) / LANES;
            const float *a = x->d_scores + r * KEYS + from, *b = x->k_rows + from * stride + d;
            if (terms > 0)
                add_tile(x->dq + r * step + d, step, x->rows - r, n, vectors, true, a, KEYS, 1, b, stride,
                         terms);
        }
}
