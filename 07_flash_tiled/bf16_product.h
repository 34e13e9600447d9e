/* The product that attention in bf16 is made of: float32 sums += rows of pairs times columns of pairs.
 *
 *   a   PANEL rows: pair k of row i at a + i * a_row + k / DEEP * a_step + k % DEEP
 *   b   a pair for each lane: row k, some vectors, at b + k * b_row
 *   c   (PANEL, vectors): row i, some vectors, at c + i * c_row
 *   n   pairs that are summed over, a multiple of DEEP
 *
 * All between tiles_begin() and tiles_end(). A processor with tile registers (AMX) has one instruction for 16 rows by 16
 * lanes by 16 pairs: 8192 multiply-adds in 16 cycles. c and a are then 16 rows of a tile each, b is 16 pairs of 16 lanes. Any
 * other takes TILE rows of sums into vector registers, as multiply_add() of vectors.h does, and broadcasts pair by pair. */
#ifndef BF16_PRODUCT_H
#define BF16_PRODUCT_H

#include "bf16_vectors.h"
#include "tiles.h"

#include <stdbool.h>

#ifdef HAVE_TILES
enum { PANEL = 16, DEEP = 16 };

/* Registers 0 to 2 hold sums, 3 rows of a, 4 to 6 columns of b. They are constants in an instruction: hence macros. */
#define EACH_TILE(step)                                                                                      \
    step(0, 4);                                                                                              \
    if (vectors > 1) {                                                                                       \
        step(1, 5);                                                                                          \
    }                                                                                                        \
    if (vectors > 2) {                                                                                       \
        step(2, 6);                                                                                          \
    }
#define CLEAR(j, column) _tile_zero(j)
#define LOAD(j, column) _tile_loadd(j, c + j, c_row)
#define MULTIPLY(j, column)                                                                                  \
    _tile_loadd(column, b + j * LANES, b_row);                                                               \
    _tile_dpbf16ps(j, 3, column)
#define STORE(j, column) _tile_stored(j, c + j, c_row)

INLINE void multiply_pairs(Vector *c, size_t c_row, int vectors, bool add, const Pair *a, size_t a_row,
                           size_t a_step, const Pair *b, size_t b_row, int n)
{
    c_row *= sizeof *c, a_row *= sizeof *a, b_row *= sizeof *b; /* tiles count in bytes */
    /* What was written must be in memory: compilers do not know that tiles read it. */
    __asm__ volatile("" ::: "memory");
    if (add) {
        EACH_TILE(LOAD)
    } else {
        EACH_TILE(CLEAR)
    }
    for (int k = 0; k < n; k += DEEP, a += a_step, b += DEEP * b_row / sizeof *b) {
        _tile_loadd(3, a, a_row);
        EACH_TILE(MULTIPLY)
    }
    EACH_TILE(STORE)
}

#else
enum { PANEL = TILE, DEEP = 1 };

INLINE void multiply_pairs(Vector *c, size_t c_row, int vectors, bool add, const Pair *a, size_t a_row,
                           size_t a_step, const Pair *b, size_t b_row, int n)
{
    Vector sum[TILE][VECTORS];
    const Pair *row[TILE];
    for (int i = 0; i < TILE; i++)
        row[i] = a + i * a_row;
    EACH_VECTOR(i, j, vectors)
        sum[i][j] = add ? c[i * c_row + j] : (Vector){0};
    for (int k = 0; k < n; k++, b += b_row)
        EACH_VECTOR(i, j, vectors)
            sum[i][j] = add_pair_products(sum[i][j], row[i][k * a_step], ((const PairVector *)b)[j]);
    EACH_VECTOR(i, j, vectors)
        c[i * c_row + j] = sum[i][j];
}
#endif

#endif
