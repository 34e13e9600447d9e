/* Kernels for the tests of the stand-in: right ones, and the same with something left out. */
#ifndef TEST_SIMT_H
#define TEST_SIMT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void simt_test_seed(uint64_t seed);
bool simt_has_bounds(void); /* built with AddressSanitizer */

/* out (blocks,threads): each block's numbers 0 .. threads - 1 in reverse, through shared memory. */
void reverse_blocks(float *out, int blocks, int threads, bool barrier);
/* out (blocks,32): the same for single warps, and __syncwarp. */
void reverse_warps(float *out, int blocks, bool barrier);
/* out (blocks): the sum of 0 .. 255, 256 threads halving a sum in shared memory; `late` leaves out the barrier of the last
 * rounds, as code for warps in lockstep once did. */
void tree_sums(float *out, int blocks, bool late);

/* Each thread's number from its three coordinates. out (2*3*2 blocks, 3*5*2 threads) */
void number_threads(int *out);
/* out (7,32): what each lane gets from shfl, shfl_xor, shfl_down, shfl_up, ballot, any, all. */
void ask_the_warp(unsigned *out, int threads);
/* sums (3): of 1, of 0.25f and the largest of all thread numbers, by atomics, over blocks x 128 threads. */
void add_atomically(float *quarter, unsigned *count, int *largest, int blocks);

/* d (16,16) = c + a b on a tensor core, bf16 factors (16,16) each; `turned`: b comes as its transpose. */
void multiply_by_tensor_core(float *d, const float *c, const uint16_t *a, const uint16_t *b, bool turned);

/* out (2,32) = in (2,32) by way of shared memory: two copies a thread, each a group of its own, and before out is
 * written a wait for all but the `newest` groups; newest 2: none. */
void copy_two_tiles(float *out, const float *in, int newest);
/* out (65536): every half precision number plus `more`, in half precision. */
void add_to_halves(uint16_t *out, float more);

/* These end the program. */
void some_threads_wait_for_the_block(void);
void two_barriers_at_once(void);
void half_a_warp_shuffles(void);
void one_thread_returns_early(void);
void too_many_threads(void);
void ends_with_a_copy_under_way(void);
/* These too, where there are bounds. */
void past_dynamic_shared(void);
void past_static_shared(void);
void past_global(float *device, int count);

#ifdef __cplusplus
}
#endif

#endif
