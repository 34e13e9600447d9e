/* Attention in bf16 near the peak of its multiply-adds. flash_tiled_simd.c says why lanes are queries, why the maximum is
 * lazy and why a product is TILE x VECTORS sums; which rows share a block and which keys they meet is the same (flash_view.c).
 * Here is what bf16 changes.
 *
 * - A multiply-add takes pairs along the axis that is summed over. Scores sum over the head's numbers: the pairs of K lie
 *   in memory as they are, those of Q are turned once a block. The output sums over keys: two keys' weights go side by
 *   side into each lane, and the values of two keys side by side into a copy of V, made once a head.
 * - Q is not scaled: scale * log2 e times a bf16 is no bf16. The sums are the plain q.k, exact products added in
 *   float32, and one multiply-add a score makes the exponent of it.
 * - The exponents do not go to memory: 2^x follows in the registers of the product, and half as many bytes of weights are
 *   stored.
 * - The sum of the weights, and so lse, is of the weights before they are rounded. */
#include "flash_tiled_bf16.h"

#include <math.h>

#include "flash_tiled_simd.h"

enum { ROWS = FLASH_ROWS, KEYS = FLASH_KEYS };

/* ---- Copies: V with pairs of keys, and K where an odd HS leaves a number without its partner ---- */

static int row_pairs(const AttentionShape *s)
{
    return (s->head_size + 1) / 2;
}

/* Pairs of one head's copy of V: (TK / 2, HS), TK and HS rounded up to TILE. */
static size_t value_pairs(const AttentionShape *s)
{
    return (size_t)round_up(s->head_size, TILE) * round_up(s->key_tokens, TILE) / 2;
}

/* And of K: (TK, row_pairs). */
static size_t key_pairs(const AttentionShape *s)
{
    return s->head_size % 2 ? (size_t)s->key_tokens * row_pairs(s) : 0;
}

size_t bf16_copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * (value_pairs(s) + key_pairs(s));
}

/* Head n of all. */
static void copy_head(Pair *values, Pair *keys, const Bf16 *k, const Bf16 *v, const AttentionShape *s,
                      size_t n)
{
    int HS = s->head_size, valid = s->lengths ? s->lengths[n / s->heads] : s->key_tokens;
    size_t head = n * s->key_tokens * HS;
    if ((size_t)(valid / 2) * HS < value_pairs(s)) /* some numbers have no partner, or no place */
        memset(values, 0, value_pairs(s) * sizeof *values);
    pair_rows(values, round_up(HS, TILE), v + head, valid, HS);
    for (size_t key = 0; HS % 2 && key < (size_t)valid; key++)
        scatter_row(keys + key * row_pairs(s), 1, k + head + key * HS, HS);
}

/* ---- A block of queries ---- */

/* out_columns is float32 (HS, ROWS), HS rounded up to TILE. */
typedef struct {
    FlashBlock block;  /* first, so that its address is this one's; its q, k, v and out are not used */
    const Pair *k, *v; /* of this head: (TK, row_pairs), and the copy */
    Pair *q_columns;   /* (row_pairs, ROWS): pairs of a query's numbers */
} Bf16Block;

static void begin(Bf16Block *x, const Bf16 *q, float *scratch)
{
    FlashBlock *block = &x->block;
    size_t columns = flash_scratch(block->s->head_size) / 2;
    memset(scratch, 0, 2 * columns * sizeof *scratch);
    block->out_columns = scratch;
    x->q_columns = (Pair *)(scratch + columns);
    flash_begin_rows(block);
    for (int r = 0; r < block->rows; r++)
        scatter_row(x->q_columns + r, ROWS, q + (size_t)r * block->s->head_size, block->s->head_size);
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
    for (int i0 = 0; i0 < keys; i0 += TILE) {
        Vector c[TILE][VECTORS];
        const Vector *term = (const Vector *)(terms + i0 * ROWS) + from;
        PairVector *weights = (PairVector *)(p + i0 / 2 * ROWS) + from;
        const Pair *k[TILE]; /* past the last key: the last again, which flash_ask() forbids */
        for (int i = 0; i < TILE; i++)
            k[i] = x->k + (size_t)(key + (ask ? smaller(i0 + i, keys - 1) : i0 + i)) * pairs;
        EACH_VECTOR(i, j, vectors)
            c[i][j] = (Vector){0};
        multiply_pairs(c, vectors, k, 1, x->q_columns + from * LANES, ROWS, pairs);
        EACH_VECTOR(i, j, vectors) {
            /* The term less m first: a mask of -1e9 leaves room for the score. */
            Vector less_m = -m[j];
            if (ask)
                less_m += term[i * VECTORS + j];
            Vector score = c[i][j] * to_exponent + less_m;
            if (ask)
                score = vector_select(less_m == -INFINITY, less_m, score);
            top[j] = vector_max(score, top[j]);
            c[i][j] = exp2_short(score);
            sum[j] += c[i][j];
            if (i % 2)
                weights[i / 2 * VECTORS + j] = pairs_from(c[i - 1][j], c[i][j]);
        }
    }
}

/* Weights that are dropped become 0; what is kept grows at the end. kept (KEYS, ROWS): to work in. */
static void drop_out(const FlashBlock *block, Pair *p, float *kept, int key, int keys, int from, int vectors)
{
    for (int i = 0; i < round_up(keys, 2) * ROWS; i++)
        kept[i] = 1;
    flash_drop_out(block, kept, key, keys, from, vectors);
    for (int i = 0; i < keys; i += 2)
        for (int r = 0; r < ROWS; r++)
            p[i / 2 * ROWS + r] &=
                (kept[i * ROWS + r] > 0 ? lower_half : 0) | (kept[(i + 1) * ROWS + r] > 0 ? upper_half : 0);
}

/* out += p^T V, TILE numbers of each value at a time. */
INLINE void add_values(Bf16Block *x, const Pair *p, int key, int keys, int from, int vectors)
{
    size_t width = round_up(x->block.s->head_size, TILE);
    for (size_t d = 0; d < width; d += TILE) {
        Vector c[TILE][VECTORS], *out = (Vector *)x->block.out_columns + d * VECTORS + from;
        const Pair *v[TILE];
        for (int i = 0; i < TILE; i++)
            v[i] = x->v + key / 2 * width + d + i;
        EACH_VECTOR(i, j, vectors)
            c[i][j] = out[i * VECTORS + j];
        multiply_pairs(c, vectors, v, width, p + from * LANES, ROWS, (keys + 1) / 2);
        EACH_VECTOR(i, j, vectors)
            out[i * VECTORS + j] = c[i][j];
    }
}

INLINE void attend_tile(Bf16Block *x, int key, int keys, bool ask, int from, int vectors)
{
    _Alignas(64) Pair p[KEYS / 2 * ROWS];
    _Alignas(64) float terms[KEYS * ROWS]; /* most tiles leave it alone */
    Vector top[VECTORS], sum[VECTORS];
    FlashBlock *block = &x->block;
    if (ask)
        flash_ask(block, terms, key, keys, from, vectors);
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

/* out = out_columns / l, through q_columns, which nobody needs any more. lse of each row */
static void finish(const Bf16Block *x, Bf16 *out, float *lse)
{
    const FlashBlock *block = &x->block;
    for (int j = 0; j < VECTORS; j++) {
        Vector l = ((const Vector *)block->l)[j] * (1 - block->s->dropout);
        Vector one_over_l = vector_select(l == 0, (Vector){0}, 1 / l);
        for (int i = 0; i < row_pairs(block->s); i++) {
            const Vector *both = (const Vector *)block->out_columns + (size_t)2 * i * VECTORS + j;
            ((PairVector *)x->q_columns)[i * VECTORS + j] =
                pairs_from(both[0] * one_over_l, both[VECTORS] * one_over_l);
        }
    }
    for (int r = 0; r < block->rows; r++) {
        gather_row(out + (size_t)r * block->s->head_size, x->q_columns + r, ROWS, block->s->head_size);
        lse[r] = block->l[r] == 0 ? -INFINITY : (block->m[r] + log2f(block->l[r])) / log2e;
    }
}

/* ---- All blocks of a problem ---- */

void attention_bf16(Bf16 *out, float *lse, float *copies, float *scratch, const Bf16 *q, const Bf16 *k,
                    const Bf16 *v, const AttentionShape *s)
{
    size_t heads = (size_t)s->batch * s->heads, HS = s->head_size;
    Pair *values = (Pair *)copies, *keys = values + heads * value_pairs(s);
#pragma omp parallel for
    for (size_t n = 0; n < heads; n++)
        copy_head(values + n * value_pairs(s), keys + n * key_pairs(s), k, v, s, n);

    FlashTeams teams = flash_teams(heads, s->tokens);
#pragma omp parallel for schedule(dynamic) num_threads(flash_threads(&teams))
    for (size_t n = 0; n < teams.count; n++) {
        Bf16Block x[FLASH_TEAM];
        FlashBlock *team[FLASH_TEAM];
        size_t head = n / teams.of_a_head;
        int blocks = 0, first = (int)(n % teams.of_a_head) * teams.blocks * ROWS;
        float *own = flash_own_scratch(scratch, &teams, s->head_size);
        for (int t = first; blocks < teams.blocks && t < s->tokens; blocks++, t += ROWS) {
            x[blocks] = (Bf16Block){
                .block = {.s = s, .b = (int)(head / s->heads), .attend_pairs = attend_pairs},
                .k = HS % 2 ? keys + head * key_pairs(s) : (const Pair *)(k + head * s->key_tokens * HS),
                .v = values + head * value_pairs(s),
            };
            FlashBlock *block = team[blocks] = &x[blocks].block;
            block->rows = smaller(ROWS, s->tokens - t);
            for (int r = 0; r < block->rows; r++)
                block->row[r] = (FlashRow){.h = (int)(head % s->heads), .t = t + r};
            begin(&x[blocks], q + (head * s->tokens + t) * HS, own + blocks * flash_scratch(s->head_size));
        }
        flash_attend_allowed(team, blocks);
        for (int i = 0; i < blocks; i++) {
            size_t row = head * s->tokens + first + i * ROWS;
            finish(&x[i], out + row * HS, lse + row);
        }
    }
}
