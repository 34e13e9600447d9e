/* The gradients of the two plain kernels. The letters and layouts are those of flash_tiled.h.
 *
 * Both take all that their forward takes. A row with no key allowed gives zeros; a NaN that a row can see
 * reaches its gradients. Nothing is allocated and nothing can fail.
 */
#ifndef FLASH_TILED_BACKWARD_H
#define FLASH_TILED_BACKWARD_H

#include "shape.h"

/* What a backward pass reads and writes. dout is the gradient of out; of lse there is none. */
typedef struct {
    const float *q, *k, *v, *out, *lse, *dout; /* as forward was given them and left them; dout as out */
    float *dq, *dk, *dv;                       /* written: as q, k, v */
    float *dbias; /* written if s->bias is there: in its layout, summed over what it was broadcast to */
} AttentionBackward;

/* From the weights that forward kept, and the softmax before dropout (the same pointer without dropout).
 * d_scores (B,NH,T,TK) is written: the gradient of the scores. lse is not read. */
void attention_materialised_backward(const AttentionBackward *g, const float *weights, const float *softmax,
                                     float *d_scores, const AttentionShape *s);

/* Written by attention_tiled_backward. delta (B,NH,T) is rowsum(dout * out). The blocks hold key_block_count()
 * numbers each: k and v, turned so that neighbouring keys are neighbours in memory. */
typedef struct {
    float *delta, *key_blocks, *value_blocks;
} TiledScratch;

size_t key_block_count(const AttentionShape *s);

/* From lse: each weight is computed again, in tiles of s->tile_rows by s->tile_columns. No matrix is
 * kept.
 *
 * Dao, Fu, Ermon, Rudra and Re 2022, appendix B.2 and algorithm 4. That algorithm has the keys outside and
 * adds to dq from every tile of keys; here the queries get a pass of their own, so that each sum belongs to
 * one task: seven products in place of five, and no two tasks write to one row. */
void attention_tiled_backward(const AttentionBackward *g, const TiledScratch *scratch,
                              const AttentionShape *s);

#endif
