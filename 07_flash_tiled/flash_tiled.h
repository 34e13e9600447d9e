/* Flash attention in tiles, in plain C, and the attention with a T x TK matrix that it is compared with.
 *
 *   q, out (B,NH,T,HS)    k, v (B,NH,TK,HS)    lse (B,NH,T)    weights (B,NH,T,TK)    row-major floats
 *
 * Both take any mask, bias, scale and dropout that the shape names, T and TK of any size, and one key/value
 * head for each query head (kv_heads = heads). A row with no key allowed: out = 0, lse = -inf. A NaN that a
 * row can see reaches its out. Nothing is allocated and nothing can fail.
 */
#ifndef FLASH_TILED_H
#define FLASH_TILED_H

#include "shape.h"

/* softmax(scale Q K^T + bias) V, one step after the other, with the matrix in memory, as in chapter 6. The
 * weights are kept, after dropout, which is drawn from s->dropout_stream in memory order, as PyTorch's
 * nn.Dropout draws it. softmax (B,NH,T,TK): the weights before dropout, for the backward pass; written only
 * where s->dropout > 0, as they are the same otherwise. */
void attention_materialised(float *out, float *lse, float *weights, float *softmax, const float *q,
                            const float *k, const float *v, const AttentionShape *s);

/* Flash attention: tiles of Br = s->tile_rows queries by Bc = s->tile_columns keys, of any positive sizes.
 * Dropout is drawn by position (dropout_keeps).
 *
 *   m, l     (B,NH,T)            workspace: the running maximum and sum of each row
 *   scores   tile_scores(s)      workspace: one row of Bc scores for each tile of rows
 *
 * Dao, Fu, Ermon, Rudra and Re 2022, algorithm 1, with the loops of Dao 2023, algorithm 1: queries outside,
 * keys inside, divided by l once at the end. */
void attention_tiled(float *out, float *lse, float *m, float *l, float *scores, const float *q,
                     const float *k, const float *v, const AttentionShape *s);

/* How many floats `scores` holds: B * NH * ceil(T / Br) * Bc. With Br = Bc that is one number a row, not TK
 * of them. */
size_t tile_scores(const AttentionShape *s);

#endif
