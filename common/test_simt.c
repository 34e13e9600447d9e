/* The stand-in for CUDA threads: what it offers, and that it finds what a GPU hides. */
#ifdef HAVE_SIMT
#include "device.h"
#include "narrow.h"
#include "test_simt.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Missing barriers: some number is wrong, whatever the seed; with the barrier none is. ---- */

enum { BLOCKS = 6, SEEDS = 20 };

static int wrong_in_reverse(const float *out, int threads)
{
    int wrong = 0;
    for (int i = 0; i < BLOCKS * threads; i++)
        wrong += out[i] != (float)(threads - 1 - i % threads); /* NaN is wrong too */
    return wrong;
}

Test(simt, a_missing_syncthreads_is_seen)
{
    static float out[BLOCKS * 256];
    for (int threads = 64; threads <= 256; threads += 96)
        for (int seed = 0; seed < SEEDS; seed++) {
            simt_test_seed(seed);
            reverse_blocks(out, BLOCKS, threads, true);
            cr_expect(wrong_in_reverse(out, threads) == 0, "seed %d, %d threads", seed, threads);
            reverse_blocks(out, BLOCKS, threads, false);
            cr_expect(wrong_in_reverse(out, threads) > 0, "seed %d, %d threads: not seen", seed, threads);
        }
}

Test(simt, a_missing_syncwarp_is_seen)
{
    static float out[BLOCKS * 32];
    for (int seed = 0; seed < SEEDS; seed++) {
        simt_test_seed(seed);
        reverse_warps(out, BLOCKS, true);
        cr_expect(wrong_in_reverse(out, 32) == 0, "seed %d", seed);
        reverse_warps(out, BLOCKS, false);
        cr_expect(wrong_in_reverse(out, 32) > 0, "seed %d: not seen", seed);
    }
}

/* Threads of a warp no longer run in lockstep, and here they never do. */
Test(simt, a_warp_is_not_in_lockstep)
{
    float out[BLOCKS];
    for (int seed = 0; seed < SEEDS; seed++) {
        int wrong = 0;
        simt_test_seed(seed);
        tree_sums(out, BLOCKS, false);
        for (int i = 0; i < BLOCKS; i++)
            cr_expect(out[i] == 32640, "seed %d, block %d", seed, i);
        tree_sums(out, BLOCKS, true);
        for (int i = 0; i < BLOCKS; i++)
            wrong += out[i] != 32640;
        cr_expect(wrong > 0, "seed %d: not seen", seed);
    }
}

/* ---- What there is ---- */

Test(simt, blocks_and_grids_have_three_axes)
{
    int out[12 * 30] = {0};
    number_threads(out);
    for (int i = 0; i < 12 * 30; i++)
        cr_expect(out[i] == i, "thread %d wrote %d", i, out[i]);
}

Test(simt, a_warp_answers)
{
    for (int threads = 32; threads >= 20; threads -= 12) { /* the last warp of a block may be short */
        unsigned out[7 * 32], votes = 0;
        ask_the_warp(out, threads);
        for (int lane = 0; lane < threads; lane += 3)
            votes |= 1u << lane;
        for (unsigned lane = 0; lane < (unsigned)threads; lane++) {
            unsigned other = lane ^ 3, down = lane + 4, up = lane ? lane - 1 : 0;
            cr_expect(out[lane] == 105);
            cr_expect(out[32 + lane] == 100 + (other < (unsigned)threads ? other : lane));
            cr_expect(out[64 + lane] == 100 + (down < (unsigned)threads ? down : lane));
            cr_expect(out[96 + lane] == 100 + up);
            cr_expect(out[128 + lane] == votes);
            cr_expect(out[160 + lane] == 1);
            cr_expect(out[192 + lane] == (threads == 20));
        }
    }
}

Test(simt, atomics_lose_nothing)
{
    omp_set_num_threads(4);
    float quarter = 0;
    unsigned count = 0;
    int largest = -1;
    add_atomically(&quarter, &count, &largest, 500);
    cr_expect(quarter == 16000 && count == 64000 && largest == 63999, "%g, %u, %d", quarter, count, largest);
}

/* Numbers whose products and sums are exact, all different along each axis. */
Test(simt, tensor_core_multiplies_matrices)
{
    uint16_t a[16][16], b[16][16], b_turned[16][16];
    float c[16][16], d[16][16];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            a[i][j] = bf16_from_float((float)((7 * i + 3 * j + i * j) % 31 - 15));
            b[i][j] = b_turned[j][i] = bf16_from_float((float)((5 * i + 11 * j + i * j) % 29) / 4);
            c[i][j] = (float)(i - 2 * j);
        }
    for (int turned = 0; turned < 2; turned++) {
        multiply_by_tensor_core(&d[0][0], &c[0][0], &a[0][0], turned ? &b_turned[0][0] : &b[0][0], turned);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                float sum = c[i][j];
                for (int k = 0; k < 16; k++)
                    sum += bf16_to_float(a[i][k]) * bf16_to_float(b[k][j]);
                cr_assert(d[i][j] == sum, "row %d, column %d: %g, not %g", i, j, d[i][j], sum);
            }
    }
}

/* c + n equal products in one corner. */
static float corner(float c, float x, float y, int n)
{
    uint16_t a[16][16] = {0}, b[16][16] = {0};
    float sums[16][16] = {{c}}, d[16][16];
    for (int k = 0; k < n; k++) {
        a[0][k] = bf16_from_float(x);
        b[k][0] = bf16_from_float(y);
    }
    multiply_by_tensor_core(&d[0][0], &sums[0][0], &a[0][0], &b[0][0], false);
    return d[0][0];
}

Test(simt, tensor_core_adds_all_products_at_once_and_cuts_off)
{
    cr_expect(corner(1, 0x1p-12f, 0x1p-13f, 16) == 1 + 0x1p-21f); /* one after the other they would be lost */
    cr_expect(corner(1, 0x1p-13f, 0x1p-13f, 16) == 1);            /* each lies behind the 25th bit */
    cr_expect(corner(1, 0x3p-12f, 0x1p-13f, 1) == 1);         /* 1 + 3/4 of a last bit: cut, not rounded */
    cr_expect(corner(-1, -0x3p-12f, 0x1p-13f, 1) == -1);      /* towards zero on either side */
    cr_expect(corner(0, 0x1p-70f, 0x1p-70f, 2) == 0x1p-139f); /* a subnormal stays */
    cr_expect(corner(0, 0, 0, 16) == 0);
    cr_expect(corner(INFINITY, 1, 1, 1) == INFINITY);
    cr_expect(corner(0, 0x1p+100f, 0x1p+100f, 1) == INFINITY);
    cr_expect(isnan(corner(0, INFINITY, 0, 1)));
}

Test(simt, copies_are_there_when_waited_for_and_not_before)
{
    float in[2][32], out[2][32];
    for (int i = 0; i < 64; i++)
        in[i / 32][i % 32] = (float)i;
    for (int newest = 0; newest < 3; newest++) {
        copy_two_tiles(&out[0][0], &in[0][0], newest);
        for (int i = 0; i < 64; i++) {
            bool there = i / 32 < 2 - newest;
            float got = out[i / 32][i % 32];
            cr_assert(there ? got == in[i / 32][31 - i % 32] : isnan(got), "newest %d, place %d: %g", newest,
                      i, got);
        }
    }
}

Test(simt, halves_are_rounded_as_ieee_says)
{
    static uint16_t out[65536];
    add_to_halves(out, 0.125f);
    for (unsigned i = 0; i < 65536; i++)
        cr_assert(out[i] == half_from_float(half_to_float((uint16_t)i) + 0.125f), "number %u", i);
}

/* ---- What ends the program. Each runs in a process of its own, whose last words are read. ---- */

static void expect_end(void (*broken)(void), int exit_code, const char *words, const char *more)
{
    int ends[2];
    char text[4096] = "";
    cr_assert(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        broken();
        _exit(0);
    }
    close(ends[1]);
    FILE *from = fdopen(ends[0], "r");
    size_t length = fread(text, 1, sizeof text - 1, from);
    text[length] = '\0';
    fclose(from);
    int status = 0;
    waitpid(child, &status, 0);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == exit_code, "exit code %d: %s", WEXITSTATUS(status),
              text);
    cr_expect(strstr(text, words) && strstr(text, more), "it says: %s", text);
}

Test(simt, divergent_barriers_are_named)
{
    expect_end(some_threads_wait_for_the_block, 1, "some_threads_wait_kernel",
               "to __syncthreads (common/test_simt.cpp:");
    expect_end(two_barriers_at_once, 1, "two_barriers_kernel, block (0,0,0)",
               "of the same block to __syncthreads");
    expect_end(half_a_warp_shuffles, 1, "half_a_warp_kernel", "__shfl_xor_sync (common/test_simt.cpp:");
    expect_end(one_thread_returns_early, 1, "returns_early_kernel", "to its end");
    expect_end(ends_with_a_copy_under_way, 1, "copy_under_way_kernel", "with 1 copies under way");
    expect_end(too_many_threads, 3, "nothing_kernel", "1 to 1024 threads");
}

static void past_device_memory(void)
{
    past_global(accelerator_simt.allocate(100 * sizeof(float)), 100);
}

Test(simt, bounds_are_kept_under_addresssanitizer)
{
    if (!simt_has_bounds())
        return; /* tested where it is built so: .ci/run */
    expect_end(past_dynamic_shared, 1, "heap-buffer-overflow", "past_dynamic_kernel");
    expect_end(past_static_shared, 1, "global-buffer-overflow", "past_static_kernel");
    expect_end(past_device_memory, 1, "heap-buffer-overflow", "past_global_kernel");
}
#endif
