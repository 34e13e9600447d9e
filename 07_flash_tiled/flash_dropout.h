/* dropout_keeps() of random.h for LANES pairs at a time: Philox4x32-10 (Salmon et al. 2011) with a counter in each lane.
 * philox.h has the same lines for one counter, and which counter is whose. */
#ifndef FLASH_DROPOUT_H
#define FLASH_DROPOUT_H

#include "shape.h"
#include "vectors.h"

#include <math.h>
#include <stddef.h>

typedef uint32_t WordVector __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef uint64_t WideVector __attribute__((vector_size(LANES * sizeof(float)), may_alias));

/* The upper and lower halves of a * factor, lane by lane: products of 64 bits, of the even lanes and of the odd ones. */
INLINE void multiply_wide(WordVector *high, WordVector *low, WordVector a, uint32_t factor)
{
#if defined(__AVX512F__)
    /* Lanes change places on the port that multiplies least: shifts would wait for the products. */
    __m512i factors = _mm512_set1_epi32((int)factor);
    __m512i even = _mm512_mul_epu32((__m512i)a, factors);
    __m512i odd = _mm512_mul_epu32(_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB), factors);
    *low = (WordVector)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
    *high = (WordVector)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
#else
    const uint64_t lower = 0xFFFFFFFF;
#if defined(__AVX2__)
    __m256i factors = _mm256_set1_epi32((int)factor);
    WideVector even = (WideVector)_mm256_mul_epu32((__m256i)a, factors);
    WideVector odd = (WideVector)_mm256_mul_epu32((__m256i)((WideVector)a >> 32), factors);
#else
    WideVector even = ((WideVector)a & lower) * factor;
    WideVector odd = ((WideVector)a >> 32) * factor;
#endif
    *low = (WordVector)((even & lower) | (odd << 32));
    *high = (WordVector)((even >> 32) | (odd & ~lower));
#endif
}

/* What the ten rounds are keyed with: in memory, from where a broadcast is free; from a register it takes a lane change's place. */
typedef struct {
    uint32_t low[10], high[10];
} RoundKeys;
static inline RoundKeys round_keys_of(uint64_t seed)
{
    RoundKeys keys;
    for (uint32_t round = 0; round < 10; round++) {
        keys.low[round] = (uint32_t)seed + round * 0x9E3779B9u;
        keys.high[round] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
    }
    return keys;
}

/* word[i]: for the key 4 * four + i of row `row` (its lower and upper 32 bits). */
INLINE void dropout_word_vectors(WordVector word[4], const RoundKeys *round_keys, WordVector row_low,
                                 WordVector row_high, WordVector four)
{
    WordVector a = four, b = row_low, c = row_high, d = (WordVector){0} + 0x64726F70u;
    for (int round = 0; round < 10; round++) {
        WordVector a_high, a_low, c_high, c_low;
        multiply_wide(&a_high, &a_low, a, 0xD2511F53u);
        multiply_wide(&c_high, &c_low, c, 0xCD9E8D57u);
        a = c_high ^ b ^ round_keys->low[round];
        b = c_low;
        c = a_high ^ d ^ round_keys->high[round];
        d = a_low;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

/* A pair is kept where its word is at least this: the integer that word * 2^-32 >= p asks for. */
static inline uint32_t dropout_threshold(float p)
{
    return (uint32_t)ceil(p * 0x1p32);
}

/* kept where a word keeps its pair, else 0. */
static inline Vector dropout_factors(WordVector word, uint32_t threshold, float kept)
{
    return vector_select((IntVector)(word >= threshold), (Vector){0} + kept, (Vector){0});
}

/* Lane after lane, word after word: the rows of a (4,LANES) matrix become columns, in two rounds of zipping. */
INLINE void side_by_side(Vector row[4])
{
    UNROLL for (int round = 0; round < 2; round++)
    {
        Vector a = row[0], b = row[1];
        row[0] = ZIP(a, row[2], ZIP_LOW);
        row[1] = ZIP(a, row[2], ZIP_HIGH);
        row[2] = ZIP(b, row[3], ZIP_LOW);
        row[3] = ZIP(b, row[3], ZIP_HIGH);
    }
}

/* kept[i], from <= i < to: the factor of key `key` + i of one row, whose place in lse is `row`; and of its neighbours, down
 * to a multiple of 4 * LANES and up to one of LANES. `key` is a multiple of 4, kept is aligned. A lane is a group of four
 * keys, whose factors then go side by side. */
static inline void dropout_row(float *kept, const AttentionShape *s, size_t row, int key, int from, int to)
{
    enum { STEP = 4 * LANES };
    const RoundKeys round_keys = round_keys_of(s->dropout_seed);
    WordVector row_low = (WordVector){0} + (uint32_t)row,
               row_high = (WordVector){0} + (uint32_t)((uint64_t)row >> 32);
    for (int i0 = from / STEP * STEP; i0 < to; i0 += STEP) {
        WordVector four = {0}, word[4];
        Vector factor[4];
        for (int i = 0; i < LANES; i++)
            four[i] = (uint32_t)(key + i0) / 4 + (uint32_t)i;
        dropout_word_vectors(word, &round_keys, row_low, row_high, four);
        for (int j = 0; j < 4; j++)
            factor[j] = dropout_factors(word[j], dropout_threshold(s->dropout), 1 / (1 - s->dropout));
        side_by_side(factor);
        for (int j = 0; j < 4 && i0 + j * LANES < to; j++)
            *(Vector *)(kept + i0 + j * LANES) = factor[j];
    }
}

#endif
