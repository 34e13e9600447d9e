/* Few query rows against many keys, as when one token is decoded with a long cache: the keys are split, each
 * split gives a partial result, and those are merged by chapter 6's rule.
 *
 *   out (B,NH,T,HS), lse (B,NH,T)   written; lse may be NULL
 *   q (B,NH,T,HS)                   read
 *   k, v                            read: key t2 of key/value head n (counted over all batch entries) is the
 *                                   HS numbers at n * head_step + t2 * HS; contiguous: head_step = TK * HS
 *
 * Any mask whose rows see one run of keys each (all but local-global and dilated), causality, lengths; no bias
 * and no dropout. TK may be 0. Rows with no key allowed: out = 0, lse = -inf. NaN as in flash_attend().
 * How the keys are split depends on the shape alone, so the bits do not depend on the threads.
 *
 * Dao, Haziza, Massa and Sizov 2023 (Flash-Decoding). */
#ifndef SPLIT_KEYS_SIMD_H
#define SPLIT_KEYS_SIMD_H

#include "shape.h"

/* Is this the faster way? Few rows share a key, there are many keys, and the mask is one that is taken. */
bool split_keys_wins(const AttentionShape *s);

/* scratch: split_keys_scratch(s) floats, 64-byte aligned: a partial result for each row and split. */
size_t split_keys_scratch(const AttentionShape *s);
void attention_split_keys(float *out, float *lse, float *scratch, const float *q, const float *k,
                          const float *v, size_t head_step, const AttentionShape *s);

#endif
