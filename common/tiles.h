/* The tile registers of a processor with AMX: eight, each 16 rows of 64 bytes. One instruction multiplies 16 rows of 16 pairs
 * of bf16 by 16 pairs of 16 lanes and adds the products to 16 x 16 sums in float32: 8192 multiply-adds in 16 cycles.
 * Intel's Intrinsics Guide: _tile_loadd, _tile_dpbf16ps, _tile_stored. HAVE_TILES where they are there. */
#ifndef COMMON_TILES_H
#define COMMON_TILES_H

#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) /* gcc's name, and clang 14's */
#define HAVE_TILES
#include "error.h"

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Before a thread's first use of them. The system lends them to a process that asks (Linux 5.16); ends the program where it
 * does not. */
static inline void tiles_begin(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static const struct {
        uint8_t palette, start, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0)
        die(EXIT_UNAVAILABLE, "no tile registers (AMX) for this process; what is built with "
                              "ARCH='-march=native -mno-amx-tile -mno-amx-bf16' needs none");
    _tile_loadconfig(&shape);
}

/* After the last. */
static inline void tiles_end(void)
{
    _tile_release();
}
#else
static inline void tiles_begin(void)
{
}
static inline void tiles_end(void)
{
}
#endif

/* Are pairs of bf16 multiplied faster than float32? With tile registers they are, and by AMD's processors with AVX512_BF16.
 * Intel's have the same instruction, but make half as many multiply-adds with it as in float32; only they have FP16, too. */
#ifndef BF16_PAIRS
#if defined(HAVE_TILES) || (defined(__AVX512BF16__) && !defined(__AVX512FP16__))
#define BF16_PAIRS 1
#else
#define BF16_PAIRS 0
#endif
#endif

#endif
