/* Philox4x32-10, and dropout drawn by position from it: inline, for the CPU and for GPU kernels alike. */
#ifndef COMMON_PHILOX_H
#define COMMON_PHILOX_H

#include "host_device.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Ten rounds of Philox4x32 on one counter. */
HOST_DEVICE static inline void philox4x32(uint32_t out[4], const uint32_t counter[4], uint64_t key)
{
    uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
    uint32_t key_low = (uint32_t)key, key_high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t from_a = (uint64_t)0xD2511F53u * a;
        uint64_t from_c = (uint64_t)0xCD9E8D57u * c;
        a = (uint32_t)(from_c >> 32) ^ b ^ key_low;
        b = (uint32_t)from_c;
        c = (uint32_t)(from_a >> 32) ^ d ^ key_high;
        d = (uint32_t)from_a;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

/* Dropout's words for the keys 4*four .. 4*four + 3 of a row. The counter's last word keeps it apart from those of
 * PyTorch's CUDA generator under the same seed. */
HOST_DEVICE static inline void dropout_words(uint32_t word[4], uint64_t seed, size_t row, uint32_t four)
{
    const uint32_t counter[4] = {four, (uint32_t)row, (uint32_t)((uint64_t)row >> 32),
                                 0x64726F70u /* "drop" */};
    philox4x32(word, counter, seed);
}

HOST_DEVICE static inline bool word_keeps(uint32_t word, float p)
{
    return word * 0x1p-32 >= p;
}

/* The same answer as dropout_keeps() in random.h, which remembers the last four words; this one remembers nothing. */
HOST_DEVICE static inline bool dropout_keeps_pair(uint64_t seed, size_t row, int key, float p)
{
    uint32_t word[4];
    dropout_words(word, seed, row, (uint32_t)key / 4);
    return word_keeps(word[key % 4], p);
}

#endif
