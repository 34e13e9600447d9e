/* Attention in bf16 near the peak of its multiply-adds. flash_tiled_simd.c says why lanes are queries, why the maximum is
 * lazy and why a product is TILE x VECTORS sums; here is what bf16 changes.
 *
 * - A multiply-add takes pairs along the axis that is summed over. Scores sum over the head's numbers: the pairs of K lie
 *   in memory as they are, those of Q are turned once a block. The output sums over keys: two keys' weights go side by
 *   side into each lane, and the values of two keys side by side into a copy of V, made once a head.
 * - Q is not scaled: scale * log2 e times a bf16 is no bf16. The sums are the plain q.k, exact products added in
 *   float32, and one multiply-add a score makes the exponent of it.
 * - The sum of the weights, and so lse, is of the weights before they are rounded. */
#include "flash_tiled_bf16.h"

#include <math.h>

#include "flash_dropout.h"
#include "flash_tiled_simd.h"

static const float log2e = 1.44269504f;

/* How far a score may stand above m, in powers of two, before m has to follow. */
static const float headroom = 20;

enum {
    ROWS = FLASH_ROWS, /* queries of a block */
    KEYS = 256,        /* keys of a tile; they come in groups of TILE */
};

static int smaller(int a, int b)
{
    return a < b ? a : b;
}
static int larger(int a, int b)
{
    return a > b ? a : b;
}
static int round_down(int n, int unit)
{
    return n / unit * unit;
}
static int round_up(int n, int unit)
{
    return (n + unit - 1) / unit * unit;
}

/* ---- Copies: V with pairs of keys, and K where an odd HS leaves a number without its partner ---- */

/* Pairs of a row of HS numbers; the second number of the last may be one too many, and is 0. */
static int row_pairs(const AttentionShape *s)
{
    return (s->head_size + 1) / 2;
}

/* Pairs of one head's copy of V: (HS / TILE, TK / 2, TILE), HS and TK rounded up to TILE. */
static size_t value_pairs(const AttentionShape *s)
{
    return (size_t)round_up(s->head_size, TILE) * round_up(s->key_tokens, TILE) / 2;
}

static size_t key_pairs(const AttentionShape *s)
{
    return s->head_size % 2 ? (size_t)s->key_tokens * row_pairs(s) : 0;
}

size_t bf16_copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * (value_pairs(s) + key_pairs(s));
}

static void pair_values(Pair *copy, const Bf16 *v, int keys, const AttentionShape *s)
{
    int HS = s->head_size, width = round_up(HS, TILE), pairs = keys / 2;
    if ((size_t)pairs * HS < value_pairs(s)) /* some numbers have no partner, or no place */
        memset(copy, 0, value_pairs(s) * sizeof *copy);
    for (int i = 0; i < pairs; i++, copy += width, v += 2 * HS)
        for (int d = 0; d < HS; d++)
            copy[d] = v[d] | (Pair)v[HS + d] << 16;
    for (int d = 0; keys % 2 && d < HS; d++)
        copy[d] = v[d];
}

static void pad_keys(Pair *copy, const Bf16 *k, int keys, const AttentionShape *s)
{
    int pairs = row_pairs(s);
    memset(copy, 0, key_pairs(s) * sizeof *copy);
    for (int key = 0; key < keys; key++)
        memcpy(copy + (size_t)key * pairs, k + (size_t)key * s->head_size, s->head_size * sizeof *k);
}

/* ---- A block of queries ---- */

/* Lane i of everything is query t + i. */
typedef struct {
    const AttentionShape *s;
    int b, h, t, rows;
    const Pair *k, *v;                              /* of this head: (TK, HS / 2), and the copy */
    Pair *q_columns;                                /* (HS / 2, ROWS): pairs of a query's numbers */
    float *out_columns;                             /* (HS, ROWS): not yet divided by l */
    _Alignas(64) float m[ROWS];                     /* scores are weighed as 2^(score - m) */
    _Alignas(64) float l[ROWS];                     /* the sum of the weights so far; 0: nothing yet */
    int first[ROWS], end[ROWS];                     /* a row sees no key outside */
    int vector_first[VECTORS], vector_end[VECTORS]; /* nor does a vector of rows */
    bool one_run;                                   /* and every key inside, if there is no bias */
} Block;

/* Pairs of q_columns and floats of out_columns. */
static size_t columns(const AttentionShape *s)
{
    return (size_t)round_up(s->head_size, TILE) * ROWS;
}

/* A row's HS numbers as a column of pairs, and back. */
INLINE void row_to_column(Pair *column, const Bf16 *row, int HS)
{
    for (int d = 0; d + 1 < HS; d += 2)
        memcpy(column + (size_t)d / 2 * ROWS, row + d, sizeof(Pair));
    if (HS % 2)
        column[(size_t)HS / 2 * ROWS] = row[HS - 1];
}
INLINE void column_to_row(Bf16 *row, const Pair *column, int HS)
{
    for (int d = 0; d + 1 < HS; d += 2)
        memcpy(row + d, column + (size_t)d / 2 * ROWS, sizeof(Pair));
    if (HS % 2)
        row[HS - 1] = (Bf16)column[(size_t)HS / 2 * ROWS];
}

static void begin(Block *x, const Bf16 *q, float *scratch)
{
    const AttentionShape *s = x->s;
    x->out_columns = scratch;
    x->q_columns = (Pair *)(scratch + columns(s));
    memset(x->out_columns, 0, columns(s) * sizeof *x->out_columns);
    if (x->rows < ROWS)
        memset(x->q_columns, 0, columns(s) * sizeof *x->q_columns);
    memset(x->m, 0, sizeof x->m);
    memset(x->l, 0, sizeof x->l);
    memset(x->end, 0, sizeof x->end);
    memset(x->vector_end, 0, sizeof x->vector_end);
    for (int r = 0; r < x->rows; r++) {
        row_to_column(x->q_columns + r, q + query_row(s, x->b, x->h, x->t + r), s->head_size);
        x->one_run = flash_bounds(s, x->b, x->t + r, &x->first[r], &x->end[r]);
        int j = r / LANES;
        x->vector_first[j] = r % LANES ? smaller(x->vector_first[j], x->first[r]) : x->first[r];
        x->vector_end[j] = larger(x->vector_end[j], x->end[r]);
    }
}

/* c[i][j] += the sum over k of pair a[i][k * step] times pairs b[k][j]: both products. */
INLINE void multiply(Vector c[TILE][VECTORS], int vectors, const Pair *const a[TILE], size_t step,
                     const Pair *b, int n)
{
    for (int k = 0; k < n; k++, b += ROWS)
        EACH_VECTOR(i, j, vectors) {
            c[i][j] = add_pair_products(c[i][j], a[i][k * step], ((const PairVector *)b)[j]);
        }
}

/* What is added to the scores of TILE keys: the bias, or -inf where a row may not look. */
static void look_up(const Block *x, Vector extra[TILE][VECTORS], int key)
{
    const AttentionShape *s = x->s;
    for (int i = 0; i < TILE; i++)
        for (int r = 0; r < ROWS; r++) {
            bool between = (x->first[r] <= key + i) & (key + i < x->end[r]);
            ((float *)extra[i])[r] = between ? 0 : -INFINITY;
        }
    if (x->one_run && !s->bias)
        return;
    for (int r = 0; r < x->rows; r++)
        for (int i = 0; i < TILE; i++) {
            float *e = (float *)extra[i] + r;
            if (*e == 0 && !attends(s, x->b, x->h, x->t + r, key + i))
                *e = -INFINITY;
            if (*e == 0 && s->bias)
                *e = log2e * bias_at(s, x->b, x->h, x->t + r, key + i);
        }
}

/* Weights of keys key .. key + keys - 1 as pairs (keys / 2, ROWS), their sum, and the largest score - m. */
INLINE void weigh(const Block *x, Pair *p, Vector top[VECTORS], Vector sum[VECTORS], int key, int keys,
                  bool look, int from, int vectors)
{
    const AttentionShape *s = x->s;
    const Vector *m = (const Vector *)x->m + from;
    float to_exponent = s->scale * log2e;
    for (int j = 0; j < vectors; j++) {
        top[j] = (Vector){0} - INFINITY;
        sum[j] = (Vector){0};
    }
    for (int i0 = 0; i0 < keys; i0 += TILE) {
        Vector c[TILE][VECTORS], extra[TILE][VECTORS];
        const Pair *k[TILE]; /* past the last key: the last again, not used */
        for (int i = 0; i < TILE; i++)
            k[i] = x->k + (size_t)smaller(key + i0 + i, s->key_tokens - 1) * row_pairs(s);
        if (look)
            look_up(x, extra, key + i0);
        EACH_VECTOR(i, j, vectors) {
            c[i][j] = (Vector){0};
        }
        multiply(c, vectors, k, 1, x->q_columns + from * LANES, row_pairs(s));
        EACH_VECTOR(i, j, vectors) {
            Vector score = c[i][j] * to_exponent - m[j];
            if (look) {
                Vector e = extra[i][from + j];
                score = vector_select(e == -INFINITY, e, score + e);
            }
            top[j] = vector_max(score, top[j]);
            c[i][j] = exp2_short(score);
            sum[j] += c[i][j];
            if (i % 2)
                ((PairVector *)(p + (i0 + i) / 2 * ROWS))[from + j] = pairs_from(c[i - 1][j], c[i][j]);
        }
    }
}

static bool all_true(IntVector mask)
{
    int all = -1;
    for (int i = 0; i < LANES; i++)
        all &= mask[i];
    return all;
}

/* Do the weights fit with this m? As raise_maximum() of flash_tiled_simd.c: true if the tile must be weighed again. */
static bool raise_maximum(Block *x, const Vector top[VECTORS], int from, int vectors)
{
    bool again = false;
    IntVector fits = (IntVector){0} - 1;
    for (int j = 0; j < vectors; j++)
        fits &= (top[j] <= headroom) & (((const Vector *)x->l)[from + j] != 0);
    if (all_true(fits))
        return false;
    for (int i = 0; i < vectors * LANES; i++) {
        int row = from * LANES + i;
        float above = ((const float *)top)[i];
        bool nothing_yet = x->l[row] == 0;
        if (above <= headroom && (!nothing_yet || above >= -headroom || above == -INFINITY))
            continue;
        float mend = nothing_yet ? 0 : exp2f(-above);
        x->m[row] += above;
        x->l[row] *= mend;
        for (int d = 0; d < x->s->head_size; d++)
            x->out_columns[(size_t)d * ROWS + row] *= mend;
        again = true;
    }
    return again;
}

/* Weights that are dropped become 0; what is kept grows at the end. A lane is a row, one Philox call four of its keys. */
static void drop_out(const Block *x, Pair *p, int key, int keys, int from, int vectors)
{
    const AttentionShape *s = x->s;
    uint32_t threshold = dropout_threshold(s->dropout);
    for (int j = from; j < from + vectors; j++) {
        WordVector row_low = {0}, row_high = {0}, word[4];
        for (int i = 0; i < LANES; i++) {
            size_t row = lse_index(s, x->b, x->h, x->t + j * LANES + i);
            row_low[i] = (uint32_t)row;
            row_high[i] = (uint32_t)(row >> 32);
        }
        for (int k = 0; k < keys; k += 4) {
            PairVector *pairs = (PairVector *)(p + k / 2 * ROWS) + j;
            dropout_word_vectors(word, s->dropout_seed, row_low, row_high,
                                 (WordVector){0} + (uint32_t)(key + k) / 4);
            for (int i = 0; i < 2; i++) {
                PairVector first = (PairVector)(word[2 * i] >= threshold),
                           second = (PairVector)(word[2 * i + 1] >= threshold);
                pairs[i * VECTORS] &= (first & lower_half) | (second & upper_half);
            }
        }
    }
}

/* out += p^T V, TILE numbers of each value at a time. */
INLINE void add_values(Block *x, const Pair *p, int key, int keys, int from, int vectors)
{
    size_t width = round_up(x->s->head_size, TILE);
    for (int d = 0; d < x->s->head_size; d += TILE) {
        Vector c[TILE][VECTORS], *out = (Vector *)x->out_columns + (size_t)d * VECTORS + from;
        const Pair *v[TILE];
        for (int i = 0; i < TILE; i++)
            v[i] = x->v + (size_t)key / 2 * width + d + i;
        EACH_VECTOR(i, j, vectors) {
            c[i][j] = out[i * VECTORS + j];
        }
        multiply(c, vectors, v, width, p + from * LANES, keys / 2);
        EACH_VECTOR(i, j, vectors) {
            out[i * VECTORS + j] = c[i][j];
        }
    }
}

INLINE void attend_tile(Block *x, int key, int keys, bool look, int from, int vectors)
{
    _Alignas(64) Pair p[KEYS / 2 * ROWS];
    Vector top[VECTORS], sum[VECTORS];
    weigh(x, p, top, sum, key, keys, look, from, vectors);
    if (raise_maximum(x, top, from, vectors))
        weigh(x, p, top, sum, key, keys, look, from, vectors);
    for (int j = 0; j < vectors; j++)
        ((Vector *)x->l)[from + j] += sum[j];
    if (x->s->dropout > 0)
        drop_out(x, p, key, keys, from, vectors);
    add_values(x, p, key, keys, from, vectors);
}

/* The vectors from .. to - 1 hold all rows that may see the group of keys at `key`. */
static void seeing_vectors(const Block *x, int key, int *from, int *to)
{
    *from = VECTORS;
    *to = 0;
    for (int j = 0; j < VECTORS; j++)
        if (key < x->vector_end[j] && x->vector_first[j] < key + TILE) {
            *from = smaller(*from, j);
            *to = j + 1;
        }
}

/* Keys first <= .. < end, both multiples of TILE. look = false: every row sees all of them. */
static void attend(Block *x, int first, int end, bool look)
{
    for (int key = first, keys; key < end; key += keys) {
        int from = 0, to = VECTORS;
        keys = smaller(KEYS, end - key);
        if (look) {
            int next_from, next_to;
            seeing_vectors(x, key, &from, &to);
            for (int more = TILE; more < keys; more += TILE) {
                seeing_vectors(x, key + more, &next_from, &next_to);
                if (next_from != from || next_to != to)
                    keys = more;
            }
        }
        if (to - from == 3)
            attend_tile(x, key, keys, look, from, 3);
        else if (to - from == 2)
            attend_tile(x, key, keys, look, from, 2);
        else if (to - from == 1)
            attend_tile(x, key, keys, look, from, 1);
    }
}

static void attend_allowed(Block *x)
{
    int first = x->first[0], all_first = first, end = x->end[0], all_end = end;
    for (int r = 1; r < x->rows; r++) {
        first = smaller(first, x->first[r]);
        all_first = larger(all_first, x->first[r]);
        end = larger(end, x->end[r]);
        all_end = smaller(all_end, x->end[r]);
    }
    first = round_down(first, TILE);
    end = round_up(end, TILE);
    all_first = round_up(all_first, TILE);
    all_end = round_down(all_end, TILE);
    if (!x->one_run || x->s->bias || all_first >= all_end)
        all_first = all_end = end;
    attend(x, first, all_first, true);
    attend(x, all_first, all_end, false);
    attend(x, all_end, end, true);
}

/* out = out_columns / l, through q_columns, which nobody needs any more. */
static void finish(Block *x, Bf16 *out, float *lse)
{
    const AttentionShape *s = x->s;
    for (int j = 0; j < VECTORS; j++) {
        Vector l = ((const Vector *)x->l)[j] * (1 - s->dropout);
        Vector one_over_l = vector_select(l == 0, (Vector){0}, 1 / l);
        for (int i = 0; i < row_pairs(s); i++) {
            const Vector *both = (const Vector *)x->out_columns + (size_t)2 * i * VECTORS + j;
            ((PairVector *)x->q_columns)[i * VECTORS + j] =
                pairs_from(both[0] * one_over_l, both[VECTORS] * one_over_l);
        }
    }
    for (int r = 0; r < x->rows; r++) {
        column_to_row(out + query_row(s, x->b, x->h, x->t + r), x->q_columns + r, s->head_size);
        lse[lse_index(s, x->b, x->h, x->t + r)] =
            x->l[r] == 0 ? -INFINITY : (x->m[r] + log2f(x->l[r])) / log2e;
    }
}

/* ---- All blocks of a problem ---- */

static size_t all_blocks(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * ((s->tokens + ROWS - 1) / ROWS);
}

size_t bf16_scratch(const AttentionShape *s)
{
    size_t blocks = all_blocks(s);
    return (blocks < FLASH_TASKS ? blocks : FLASH_TASKS) * 2 * columns(s);
}

void attention_bf16(Bf16 *out, float *lse, float *copies, float *scratch, const Bf16 *q, const Bf16 *k,
                    const Bf16 *v, const AttentionShape *s)
{
    size_t blocks = all_blocks(s), heads = (size_t)s->batch * s->heads, of_a_head = blocks / heads;
    Pair *values = (Pair *)copies, *keys = values + heads * value_pairs(s);
#pragma omp parallel for
    for (size_t n = 0; n < heads; n++) {
        int valid = s->lengths ? s->lengths[n / s->heads] : s->key_tokens;
        size_t head = key_row(s, 0, (int)n, 0);
        pair_values(values + n * value_pairs(s), v + head, valid, s);
        if (s->head_size % 2)
            pad_keys(keys + n * key_pairs(s), k + head, valid, s);
    }
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < FLASH_TASKS; i++)
        for (size_t n = flash_task(i, blocks); n < flash_task(i + 1, blocks); n++) {
            size_t head = n / of_a_head;
            Block x = {.s = s,
                       .b = (int)(head / s->heads),
                       .h = (int)(head % s->heads),
                       .t = (int)(n % of_a_head) * ROWS};
            x.rows = smaller(ROWS, s->tokens - x.t);
            x.v = values + head * value_pairs(s);
            x.k = s->head_size % 2 ? keys + head * key_pairs(s)
                                   : (const Pair *)(k + head * s->key_tokens * s->head_size);
            begin(&x, q, scratch + i * 2 * columns(s));
            attend_allowed(&x);
            finish(&x, out, lse);
        }
}
