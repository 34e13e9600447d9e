/* Attention near the multiply-add peak. The contract is in the header; this is how it is done, and why.
 *
 * - Lanes are queries. A vector holds one number of LANES different queries, so that a row's maximum, sum and weights never
 *   leave their lane: nothing is added up across a vector. Keys and values are read number by number, as they lie in memory,
 *   and broadcast. Only the queries are transposed, once a block, and the output back.
 * - Sums stay in registers: both products are multiply_add_ahead(), TILE x VECTORS sums, and each number loaded serves several.
 * - The score comes out as an exponent. scale and log2 e are multiplied into the queries once, and the sums start at -m: after
 *   the product there is nothing left to do but 2^x.
 * - The maximum is lazy. Softmax needs no maximum but a number near it. Where the sum of a tile's weights says that m is no such
 *   number, m moves to the largest score, and the tile is scored again.
 * - FLASH_KEYS keys a tile: their weights stay in the cache between both products, the output is loaded and stored once for all.
 * - What no row sees is left out, down to single vectors of rows along the diagonal of a causal mask. */
#include "flash_tiled_simd.h"

#include <math.h>

enum { HEADROOM = 13 }; /* How far a score may stand above m, in powers of two, before m has to follow. */

/* ---- The steps of a tile: up to FLASH_KEYS keys by the block's vectors from .. from + vectors - 1 ---- */

/* p = 2^(score - m), and their sum in each lane; or, if not `weigh`, p = score - m, and the largest in each lane. ask: with
 * what flash_ask() says; memory is asked for the next tile's bias meanwhile. A score of more than SHORT_SUM terms is added up in
 * several sums: rounding then costs one of 256 terms no more than one of 64, and a large score's error would go into an exponent. */
INLINE void score_tile(const FlashBlock *block, float *p, Vector found[VECTORS], int key, int keys, bool ask,
                       bool weigh, int from, int vectors)
{
    const Vector *m = (const Vector *)block->m + from;
    const size_t *stride = block->s->bias_stride;
    for (int j = 0; j < vectors; j++)
        found[j] = (Vector){0} - (weigh ? 0 : INFINITY);
    const float *ahead = ask ? flash_ask(block, p, key, keys, from, vectors) : p;
    for (int i0 = 0; i0 < keys; i0 += TILE) {
        Vector *scores = (Vector *)(p + i0 * FLASH_ROWS) + from;
        if (LANES < 16 && block->leads)
            flash_look_ahead_for_keys(block, key + keys + i0);
        for (int d = 0, HS = block->s->head_size; d < HS; d += SHORT_SUM) {
            Vector c[TILE][VECTORS];
            const float *k[TILE]; /* past the last key: the last again, which flash_ask() forbids */
            for (int i = 0; i < TILE; i++)
                k[i] = block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step + d;
            EACH_VECTOR(i, j, vectors) {
                c[i][j] = d ? (Vector){0} : -m[j];
                if (ask && !d) /* first: a mask of -1e9 less m leaves room for the score */
                    c[i][j] += scores[i * VECTORS + j];
            }
            multiply_add_ahead(c, vectors, k, 1, block->q_columns + d * FLASH_ROWS + from * LANES, FLASH_ROWS,
                               smaller(SHORT_SUM, HS - d), ask, ahead + i0 * stride[3], stride[2]);
            EACH_VECTOR(i, j, vectors) {
                Vector *at = scores + i * VECTORS + j;
                if (d)
                    c[i][j] += *at;
                *at = ask ? vector_select(*at == -INFINITY, *at, c[i][j]) : c[i][j];
            }
        }
        for (int i = 0; i < TILE; i++)
            UNROLL for (int j = 0; j < vectors; j++)
            {
                Vector *at = scores + i * VECTORS + j;
                if (weigh)
                    found[j] += *at = exp2_vector(*at);
                else
                    found[j] = vector_max(*at, found[j]);
            }
    }
}

/* Must m move? A row that has seen nothing yet started with m = 0, which may also be far too large for it. */
INLINE bool outgrown(float above, float l)
{
    return (above > HEADROOM) | ((l == 0) & (above < -HEADROOM) & (above > -INFINITY));
}

bool flash_raise_maximum(FlashBlock *block, const Vector top[VECTORS], int from, int vectors)
{
    const float *above = (const float *)top;
    float *m = block->m + from * LANES, *l = block->l + from * LANES;
    int again = 0;
    for (int i = 0; i < vectors * LANES; i++)
        again |= outgrown(above[i], l[i]);
    for (int i = 0; again && i < vectors * LANES; i++) {
        if (!outgrown(above[i], l[i]))
            continue;
        float mend = l[i] == 0 ? 0 : exp2f(-above[i]);
        m[i] += above[i];
        l[i] *= mend;
        for (int d = 0; d < block->s->head_size; d++)
            block->out_columns[d * FLASH_ROWS + from * LANES + i] *= mend;
    }
    return again;
}

/* Has a weight outgrown m by HEADROOM, or are all of a row too small for it? All lanes are asked at once, of their sums: random
 * scores never get further. Rows that see nothing of the tile have no say. */
INLINE bool is_odd(const FlashBlock *block, const Vector *sum, int key, int keys, int from, int vectors)
{
    const float *sums = (const float *)sum, *l = block->l + from * LANES, one = 1 << HEADROOM;
    const int *first = block->first + from * LANES, *end = block->end + from * LANES;
    int any = 0;
    for (int i = 0; i < vectors * LANES; i++)
        any |= (sums[i] > FLASH_KEYS * one) |
               ((l[i] == 0) & (sums[i] < 1 / one) & (first[i] < key + keys) & (key < end[i]));
    return any;
}

/* out += p^T V for n <= TILE numbers of each value, from d on. Meanwhile memory is asked for the next tile's keys or values, a row
 * for each row multiplied; with shorter vectors score_tile() has: here that drives values out of a first cache of 32 KiB. */
INLINE void add_few(FlashBlock *block, const float *p, int d, int n, int key, int keys, int from, int vectors)
{
    flash_look_ahead(block);
    Vector c[TILE][VECTORS], *out = (Vector *)block->out_columns + (size_t)d * VECTORS + from;
    const float *v[TILE], *first = block->v + (size_t)key * block->key_step + d;
    const float *next = (d / TILE % 2 ? block->v : block->k) + (size_t)(key + keys) * block->key_step + d;
    for (int i = 0; i < TILE; i++) /* past the last: the last again; out_columns has room for the results */
        v[i] = first + smaller(i, n - 1);
    EACH_VECTOR(i, j, vectors)
        c[i][j] = out[i * VECTORS + j];
    multiply_add_ahead(c, vectors, v, block->key_step, p + from * LANES, FLASH_ROWS, keys, LANES == 16, next,
                       block->key_step);
    EACH_VECTOR(i, j, vectors)
        out[i * VECTORS + j] = c[i][j];
}
INLINE void add_values(FlashBlock *block, const float *p, int key, int keys, int from, int vectors)
{
    int d = 0, HS = block->s->head_size;
    for (; d + TILE <= HS; d += TILE) /* TILE is a constant: so one address does for all */
        add_few(block, p, d, TILE, key, keys, from, vectors);
    if (d < HS)
        add_few(block, p, d, HS - d, key, keys, from, vectors);
}

INLINE void attend_tile(FlashBlock *block, int key, int keys, bool ask, int from, int vectors)
{
    _Alignas(64) float p[FLASH_KEYS * FLASH_ROWS];
    Vector sum[VECTORS], top[VECTORS];
    score_tile(block, p, sum, key, keys, ask, true, from, vectors);
    if (is_odd(block, sum, key, keys, from, vectors)) {
        score_tile(block, p, top, key, keys, ask, false, from, vectors);
        flash_raise_maximum(block, top, from, vectors);
        score_tile(block, p, sum, key, keys, ask, true, from, vectors);
    }
    for (int j = 0; j < vectors; j++)
        ((Vector *)block->l)[from + j] += sum[j];
    if (block->s->dropout > 0)
        flash_drop_out(block, p, key, keys, from, vectors);
    add_values(block, p, key, keys, from, vectors);
}

void flash_attend_tile(FlashBlock *block, int key, int keys, bool ask, int from, int vectors)
{
    switch (2 * vectors + ask) { /* constants, so that each has sums of its own in registers */
    case 2: attend_tile(block, key, keys, false, from, 1); break;
    case 3: attend_tile(block, key, keys, true, from, 1); break;
    case 4: attend_tile(block, key, keys, false, from, 2); break;
    case 5: attend_tile(block, key, keys, true, from, 2); break;
    case 6: attend_tile(block, key, keys, false, from, 3); break;
    case 7: attend_tile(block, key, keys, true, from, 3); break;
    }
}

/* ---- The life of a block ---- */

/* q_columns and out_columns: whole squares of LANES x LANES. */
size_t flash_scratch(int head_size)
{
    return (size_t)2 * round_up(head_size, 16) * FLASH_ROWS;
}

void flash_begin(FlashBlock *block, float *scratch)
{
    const AttentionShape *s = block->s;
    block->q_columns = scratch;
    block->out_columns = scratch + flash_scratch(s->head_size) / 2;
    memset(block->out_columns, 0, flash_scratch(s->head_size) / 2 * sizeof(float));
    flash_begin_rows(block);
    for (int r0 = 0; r0 < FLASH_ROWS; r0 += LANES)
        for (int d = 0; d < s->head_size; d += LANES) {
            Vector q[LANES] = {0};
            for (int r = r0; r < r0 + LANES && r < block->rows; r++)
                q[r - r0] = s->scale * log2e * load_first(block->row[r].q + d, s->head_size - d);
            transpose(q);
            for (int i = 0; i < LANES; i++)
                *(Vector *)(block->q_columns + (size_t)(d + i) * FLASH_ROWS + r0) = q[i];
        }
}

void flash_finish(FlashBlock *block)
{
    for (int r0 = 0; r0 < block->rows; r0 += LANES)
        for (int d = 0, HS = block->s->head_size; d < HS; d += LANES) {
            Vector out[LANES], l = *(const Vector *)(block->l + r0);
            for (int i = 0; i < LANES; i++)
                out[i] = *(Vector *)(block->out_columns + (size_t)(d + i) * FLASH_ROWS + r0) * (1 / l);
            transpose(out);
            for (int r = r0; r < r0 + LANES && r < block->rows; r++)
                store_first(block->row[r].out + d, block->l[r] == 0 ? (Vector){0} : out[r - r0], HS - d);
        }
    for (int r = 0; r < block->rows; r++)
        if (block->row[r].lse)
            *block->row[r].lse = (float)((block->m[r] + log2(block->l[r])) / 1.4426950408889634);
}
