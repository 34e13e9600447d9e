/* Attention in bf16 near the peak of its multiply-adds. flash_tiled_simd.c says why lanes are queries, why the maximum is
 * lazy and why a product is TILE x VECTORS sums; which rows share a block and which keys they meet is the same (flash_view.c).
 * Here is what bf16 changes.
 *
 * - A multiply-add takes pairs along the axis that is summed over. Scores sum over the head's numbers: those of Q are turned once a
 *   block. The output sums over keys: two keys' weights go side by side into each lane, and the values of two keys side by side into
 *   a copy of V, made once a head. K is copied as well, so that whole panels of it can be read: bf16_product.h.
 * - Q is not scaled: scale * log2 e times a bf16 is no bf16. The sums are the plain q.k, exact products added in float32, and one
 *   multiply-add a score makes the exponent of it.
 * - 2^x follows a panel of scores at once, in the registers of the product or in the nearest cache, and half as many bytes of weights
 *   are stored.
 * - The sum of the weights, and so lse, is of the weights before they are rounded. */
#include "flash_tiled_bf16.h"

#if BF16_PAIRS
#include <math.h>

#include "flash_tiled_simd.h"

enum { ROWS = FLASH_ROWS, KEYS = FLASH_KEYS };

/* ---- Copies of a head's keys and values, as multiply_pairs() wants them ---- */

/* Pairs of a row of Q or K. */
static int row_pairs(const AttentionShape *s)
{
    return round_up((s->head_size + 1) / 2, DEEP);
}

/* Numbers of a row of V. */
static size_t value_width(const AttentionShape *s)
{
    return round_up(s->head_size, PANEL);
}

static size_t copied_keys(const AttentionShape *s)
{
    return round_up(s->key_tokens, larger(PANEL, 2 * DEEP));
}

/* K (keys,row_pairs): two numbers of a key are a pair. V (keys/2,width): the same number of two keys is one, and DEEP of them,
 * of 2 * DEEP keys, lie one behind the other. */
static size_t key_pairs(const AttentionShape *s)
{
    return copied_keys(s) * row_pairs(s);
}
static size_t value_pairs(const AttentionShape *s)
{
    return copied_keys(s) / 2 * value_width(s);
}

size_t bf16_copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * (key_pairs(s) + value_pairs(s));
}

/* Of head n of all B * NH. */
static void copy_head(Pair *keys, Pair *values, const Bf16 *k, const Bf16 *v, const AttentionShape *s,
                      size_t n)
{
    int HS = s->head_size, valid = s->lengths ? s->lengths[n / s->heads] : s->key_tokens;
    size_t head = n * s->key_tokens * HS;
    copy_rows(keys, row_pairs(s), k + head, valid, HS);
    pair_rows(values, value_width(s), DEEP, v + head, valid, HS);
}

/* ---- A block of queries ---- */

/* out_columns is float32 (width, ROWS). */
typedef struct {
    FlashBlock block;  /* first, so that its address is this one's; its q, k, v and out are not used */
    const Pair *k, *v; /* this head's copies */
    Pair *q_columns;   /* (row_pairs, ROWS): pairs of a query's numbers */
} Bf16Block;

static void begin(Bf16Block *x, const Bf16 *q, float *scratch)
{
    FlashBlock *block = &x->block;
    size_t columns = flash_scratch(block->s->head_size) / 2;
    memset(scratch, 0, columns * sizeof *scratch);
    block->out_columns = scratch;
    x->q_columns = (Pair *)(scratch + columns);
    flash_begin_rows(block);
    turn_rows(x->q_columns, ROWS, q, block->rows, block->s->head_size);
}

/* Weights of keys key .. key + keys - 1 as pairs (keys / 2, ROWS), their sum, and the largest score - m. ask: with
 * what flash_ask() says. */
INLINE void weigh(const Bf16Block *x, Pair *p, Vector top[VECTORS], Vector sum[VECTORS], const float *terms,
                  int key, int keys, bool ask, int from, int vectors)
{
    const Vector *m = (const Vector *)x->block.m + from;
    int pairs = row_pairs(x->block.s);
    float to_exponent = x->block.s->scale * log2e;
    for (int j = 0; j < vectors; j++) {
        top[j] = (Vector){0} - INFINITY;
        sum[j] = (Vector){0};
    }
    for (int i0 = 0; i0 < keys; i0 += PANEL) {
        Vector c[PANEL][VECTORS];
        multiply_pairs(c[0], VECTORS, vectors, false, x->k + (size_t)(key + i0) * pairs, pairs, DEEP,
                       x->q_columns + from * LANES, ROWS, pairs);
        for (int half = 0; half < PANEL; half += TILE) {
            const Vector *term = (const Vector *)(terms + (i0 + half) * ROWS) + from;
            PairVector *weights = (PairVector *)(p + (i0 + half) / 2 * ROWS) + from;
            Vector weight[TILE][VECTORS];
            EACH_VECTOR(i, j, vectors) {
                /* The term less m first: a mask of -1e9 leaves room for the score. */
                Vector less_m = -m[j];
                if (ask)
                    less_m += term[i * VECTORS + j];
                Vector score = c[half + i][j] * to_exponent + less_m;
                if (ask)
                    score = vector_select(less_m == -INFINITY, less_m, score);
                top[j] = vector_max(score, top[j]);
                weight[i][j] = exp2_vector(score);
                sum[j] += weight[i][j];
                if (i % 2)
                    weights[i / 2 * VECTORS + j] = pairs_from(weight[i - 1][j], weight[i][j]);
            }
        }
    }
}

/* Weights that are dropped become 0; what is kept grows at the end. kept (KEYS, ROWS): to work in. */
static void drop_out(const FlashBlock *block, Pair *p, float *kept, int key, int keys, int from, int vectors)
{
    for (int i = 0; i < keys * ROWS; i++)
        kept[i] = 1;
    flash_drop_out(block, kept, key, keys, from, vectors);
    for (int i = 0; i < keys; i += 2)
        for (int r = 0; r < ROWS; r++)
            p[i / 2 * ROWS + r] &=
                (kept[i * ROWS + r] > 0 ? lower_half : 0) | (kept[(i + 1) * ROWS + r] > 0 ? upper_half : 0);
}

/* out += p^T V, PANEL numbers of each value at a time. */
INLINE void add_values(Bf16Block *x, const Pair *p, int key, int keys, int from, int vectors)
{
    size_t width = value_width(x->block.s);
    const Pair *v = x->v + key / 2 * width;
    for (size_t d = 0; d < width; d += PANEL)
        multiply_pairs((Vector *)x->block.out_columns + d * VECTORS + from, VECTORS, vectors, true,
                       v + d * DEEP, DEEP, width * DEEP, p + from * LANES, ROWS, keys / 2);
}

INLINE void attend_tile(Bf16Block *x, int key, int keys, bool ask, int from, int vectors)
{
    _Alignas(64) Pair p[KEYS / 2 * ROWS];
    _Alignas(64) float terms[KEYS * ROWS]; /* most tiles leave it alone */
    Vector top[VECTORS], sum[VECTORS];
    FlashBlock *block = &x->block;
    if (ask) {
        flash_ask(block, terms, key, keys, from, vectors);
        for (; keys % (2 * DEEP); keys++) /* whole steps, of keys that weigh nothing */
            for (int j = from; j < from + vectors; j++)
                ((Vector *)terms)[keys * VECTORS + j] = (Vector){0} - INFINITY;
    }
    weigh(x, p, top, sum, terms, key, keys, ask, from, vectors);
    if (flash_raise_maximum(block, top, from, vectors))
        weigh(x, p, top, sum, terms, key, keys, ask, from, vectors);
    for (int j = 0; j < vectors; j++)
        ((Vector *)block->l)[from + j] += sum[j];
    if (block->s->dropout > 0)
        drop_out(block, p, terms, key, keys, from, vectors);
    add_values(x, p, key, keys, from, vectors);
}

/* What flash_attend() calls for its tiles. */
static void attend_pairs(FlashBlock *block, int key, int keys, bool ask, int from, int vectors)
{
    Bf16Block *x = (Bf16Block *)block;
    switch (2 * vectors + ask) { /* constants, so that each has sums of its own in registers */
    case 2: attend_tile(x, key, keys, false, from, 1); break;
    case 3: attend_tile(x, key, keys, true, from, 1); break;
    case 4: attend_tile(x, key, keys, false, from, 2); break;
    case 5: attend_tile(x, key, keys, true, from, 2); break;
    case 6: attend_tile(x, key, keys, false, from, 3); break;
    case 7: attend_tile(x, key, keys, true, from, 3); break;
    }
}

/* out = out_columns / l; lse of each row */
static void finish(const Bf16Block *x, Bf16 *out, float *lse)
{
    const FlashBlock *block = &x->block;
    int HS = block->s->head_size;
    for (int r0 = 0; r0 < block->rows; r0 += LANES) {
        Vector l = *(const Vector *)(block->l + r0) * (1 - block->s->dropout);
        Vector one_over_l = vector_select(l == 0, (Vector){0}, 1 / l);
        for (int p0 = 0; 2 * p0 < HS; p0 += LANES) {
            PairVector pairs[LANES] = {0};
            for (int i = 0; i < LANES && 2 * (p0 + i) < HS; i++) {
                const Vector *both = (const Vector *)(block->out_columns + 2 * (p0 + i) * ROWS + r0);
                pairs[i] = pairs_from(both[0] * one_over_l, both[VECTORS] * one_over_l);
            }
            transpose_pairs(pairs);
            for (int r = r0; r < smaller(r0 + LANES, block->rows); r++)
                store_pairs(out + (size_t)r * HS + 2 * p0, pairs[r - r0], HS - 2 * p0);
        }
    }
    for (int r = 0; r < block->rows; r++)
        lse[r] = block->l[r] == 0 ? -INFINITY : (block->m[r] + log2f(block->l[r])) / log2e;
}

/* ---- All blocks of a problem ---- */

void attention_bf16(Bf16 *out, float *lse, float *copies, float *scratch, const Bf16 *q, const Bf16 *k,
                    const Bf16 *v, const AttentionShape *s)
{
    size_t heads = (size_t)s->batch * s->heads, HS = s->head_size;
    Pair *keys = (Pair *)copies, *values = keys + heads * key_pairs(s);
#pragma omp parallel for
    for (size_t n = 0; n < heads; n++)
        copy_head(keys + n * key_pairs(s), values + n * value_pairs(s), k, v, s, n);

    FlashTeams teams = flash_teams(heads, s->tokens);
#pragma omp parallel for schedule(dynamic) num_threads(teams.threads)
    for (size_t n = 0; n < teams.count; n++) {
        Bf16Block x[FLASH_TEAM];
        FlashBlock *team[FLASH_TEAM];
        size_t head = n / teams.of_a_head;
        int blocks = 0;
        for (size_t t, past; flash_rows_of(&teams, n, blocks, &t, &past); blocks++) {
            x[blocks] = (Bf16Block){
                .block = {.s = s,
                          .b = (int)(head / s->heads),
                          .attend_pairs = attend_pairs,
                          .unit = 2 * DEEP},
                .k = keys + head * key_pairs(s),
                .v = values + head * value_pairs(s),
            };
            FlashBlock *block = team[blocks] = &x[blocks].block;
            block->rows = (int)(past - t);
            for (int r = 0; r < block->rows; r++)
                block->row[r] = (FlashRow){.h = (int)(head % s->heads), .t = (int)t + r};
            begin(&x[blocks], q + (head * s->tokens + t) * HS,
                  flash_own_scratch(scratch, &teams, s->head_size, blocks));
        }
        tiles_begin();
        flash_attend_allowed(team, blocks);
        tiles_end();
        for (int i = 0; i < blocks; i++) {
            size_t row = head * s->tokens + team[i]->row[0].t;
            finish(&x[i], out + row * HS, lse + row);
        }
    }
}
#endif
