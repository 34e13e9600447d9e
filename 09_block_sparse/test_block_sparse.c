/* What is particular to block masks, forward: predicates of one's own, documents, and the traps. Every kernel against
 * the oracle: common/test_chapter.c. */
#include "memory.h"
#include "reference.h"
#include "test_problem.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Predicates of one's own ---- */

Test(predicates, of_batch_entry_and_head)
{
    for (int n = 0; n < BLOCKS; n++) {
        Inputs p = set_up(shape_of("none", 70, 90, block_sizes[n]), 2, 3, 8);
        BlockMask mask = lists_of(&p.s, window_by_head, true, true);
        expect_right_lists(&mask, window_by_head, &p.s, "window_by_head");
        attend(&p, SPARSE, &mask);
        double error = error_against(&p, window_by_head);
        cr_expect(error <= 2e-6, "blocks of %d: off by %g", block_sizes[n], error);
        free(mask.listed);
        tear_down(&p);
    }
}

Test(predicates, rows_without_a_key)
{
    Inputs p = set_up(shape_of("none", 40, 40, 8), 1, 2, 8);
    BlockMask mask = lists_of(&p.s, checkers, false, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, checkers) <= 2e-6);
    cr_expect(p.lse[0] == -INFINITY && p.out[0] == 0);
    free(mask.listed);
    tear_down(&p);
}

/* by_head false: everyone gets the lists of head 0, and what is in none of those is never seen. */
Test(predicates, that_look_at_the_head_need_lists_for_each)
{
    Inputs p = set_up(shape_of("none", 70, 90, 16), 2, 3, 8);
    BlockMask mask = lists_of(&p.s, window_by_head, true, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, window_by_head) > 0.1);
    free(mask.listed);
    tear_down(&p);
}

/* The sparse kernel asks the mask's predicate and not the shape. */
Test(predicates, are_asked_in_place_of_the_shapes_mask)
{
    Inputs p = set_up(shape_of("causal", 40, 40, 16), 1, 1, 8);
    BlockMask mask = lists_of(&p.s, checkers, false, false);
    attend(&p, SPARSE, &mask);
    cr_expect(error_against(&p, checkers) <= 2e-6);
    free(mask.listed);
    tear_down(&p);
}

/* ---- Documents ---- */

Test(documents, give_what_each_sequence_gives_alone)
{
    static const int lengths[] = {20, 1, 70, 49};
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("documents:20,1,70,49", 0, 0, 16), 1, 2, 8);
        attend(&p, kernel, NULL);
        for (int n = 0, first = 0; n < 4; first += lengths[n++]) {
            Inputs alone = set_up(shape_of("causal", lengths[n], lengths[n], 16), 1, 2, 8);
            for (int h = 0; h < 2; h++) {
                size_t from = query_row(&p.s, 0, h, first), to = query_row(&alone.s, 0, h, 0);
                size_t bytes = (size_t)lengths[n] * 8 * sizeof(float);
                memcpy(alone.q + to, p.q + from, bytes);
                memcpy(alone.k + to, p.k + from, bytes);
                memcpy(alone.v + to, p.v + from, bytes);
            }
            attend(&alone, SPARSE, NULL);
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < lengths[n] * 8; i++) {
                    double difference = fabs((double)p.out[query_row(&p.s, 0, h, first) + i] -
                                             alone.out[query_row(&alone.s, 0, h, 0) + i]);
                    cr_assert(difference <= 2e-6, "%s, document %d: off by %g", names[kernel], n, difference);
                }
            tear_down(&alone);
        }
        tear_down(&p);
    }
}

/* ---- Traps ---- */

/* T = 50, TK = 20: the first 30 queries stand before all keys. Batch entry 1 has no keys at all. */
Test(traps, nothing_allowed_gives_zeros)
{
    static const int lengths[] = {20, 0};
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("causal", 50, 20, 16), 2, 1, 8);
        p.s.lengths = lengths;
        attend(&p, kernel, NULL);
        cr_expect(error_against(&p, attends) <= 2e-6, "%s", names[kernel]);
        for (int b = 0; b < 2; b++)
            for (int t = 0; t < (b ? 50 : 30); t++)
                cr_expect(p.lse[lse_index(&p.s, b, 0, t)] == -INFINITY &&
                              p.out[query_row(&p.s, b, 0, t)] == 0,
                          "%s, row %d", names[kernel], t);
        tear_down(&p);
    }
}

/* The whole point, shown with poison: keys in no list may hold NaN. Rows 32 .. 63 see keys 23 and later. */
Test(traps, empty_blocks_are_never_loaded)
{
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("window:10", 64, 64, 16), 1, 1, 8);
        for (int i = 0; i < 16 * 8; i++)
            p.k[i] = p.v[i] = NAN;
        attend(&p, kernel, NULL);
        bool finite = true;
        for (int t = 32; t < 64; t++)
            for (int c = 0; c < 8; c++)
                finite = finite && isfinite(p.out[t * 8 + c]);
        cr_expect(finite == (kernel != DENSE && kernel != DENSE_SIMT),
                  "%s: adding -inf to a score of NaN does not forbid it", names[kernel]);
        cr_expect(isnan(p.out[15 * 8]), "%s: row 15 sees NaN, and must say so", names[kernel]);
        tear_down(&p);
    }
}

/* Of a partial block, the pairs that are forbidden weigh nothing, whatever they hold. */
Test(traps, forbidden_pairs_of_a_partial_block_stay_out)
{
    for (int kernel = SPARSE; kernel < kernels_here(); kernel += SPARSE_SIMT - SPARSE) {
        Inputs p = set_up(shape_of("causal", 64, 64, 64), 1, 1, 8);
        for (int i = 40 * 8; i < 64 * 8; i++)
            p.k[i] = p.v[i] = NAN;
        attend(&p, kernel, NULL);
        for (int t = 0; t < 64; t++)
            cr_expect((isnan(p.out[t * 8]) != 0) == (t >= 40), "%s, row %d", names[kernel], t);
        tear_down(&p);
    }
}

/* A block is full for the mask. The bias may still forbid a pair in it. */
Test(traps, a_bias_of_minus_infinity_in_a_full_block)
{
    float bias[64];
    for (int t2 = 0; t2 < 64; t2++)
        bias[t2] = t2 % 3 ? 0.1f * t2 : -INFINITY;
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("none", 64, 64, 16), 1, 2, 8);
        p.s.bias = bias;
        p.s.bias_stride[3] = 1;
        attend(&p, kernel, NULL);
        double error = error_against(&p, attends);
        cr_expect(error <= 2e-6, "%s: off by %g", names[kernel], error);
        tear_down(&p);
    }
}

/* Dropout falls on pairs, not on places in a list: whatever the blocks, the same pairs are dropped. */
Test(traps, the_size_of_a_block_changes_nothing)
{
    for (int kernel = SPARSE; kernel < kernels_here(); kernel++)
        for (int dropout = 0; dropout < 2 && kernel != DENSE_SIMT; dropout++) {
            Inputs first = set_up(shape_of("local-global:20:5", 90, 130, 130), 2, 2, 8);
            first.s.dropout = 0.3f * dropout;
            first.s.dropout_seed = 7;
            attend(&first, kernel, NULL);
            for (int n = 0; n < BLOCKS; n++) {
                Inputs p = set_up(shape_of("local-global:20:5", 90, 130, block_sizes[n]), 2, 2, 8);
                p.s.dropout = first.s.dropout;
                p.s.dropout_seed = 7;
                attend(&p, kernel, NULL);
                for (size_t i = 0; i < query_count(&p.s); i++) {
                    double difference = fabs((double)p.out[i] - first.out[i]);
                    cr_assert(difference <= 2e-6, "%s, blocks of %d: off by %g", names[kernel],
                              block_sizes[n], difference);
                }
                tear_down(&p);
            }
            tear_down(&first);
        }
}

/* No row of such a head fits into a GPU's shared memory: it is read where it lies. */
Test(traps, a_head_too_wide_for_shared_memory)
{
    if (kernels_here() < KERNELS)
        return;
    Inputs p = set_up_grouped(shape_of("causal", 40, 50, 16), 1, 2, 1, 6001);
    p.s.scale /= 10; /* a plain sum of 6001 products in float is not exact to the last digits */
    differentiate(&p, SPARSE_SIMT, NULL);
    cr_expect(error_against(&p, attends) <= 2e-6);
    cr_expect(gradient_error(&p, attends) <= 1e-5);
    tear_down(&p);
}

/* Lists of entry 0 for all entries would let entry 1 see 40 keys that are padding. */
Test(traps, lengths_need_lists_for_each_batch_entry)
{
    static const int lengths[] = {64, 24};
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("none", 64, 64, 8), 2, 1, 8);
        p.s.lengths = lengths;
        attend(&p, kernel, NULL);
        double error = error_against(&p, attends);
        cr_expect(error <= 2e-6, "%s: off by %g", names[kernel], error);
        tear_down(&p);
    }
}

static double workspace_bytes(const char *kernel, int tokens)
{
    AttentionShape s = shape_of("window:256", tokens, tokens, 128);
    s.heads = s.kv_heads = 8;
    s.head_size = 64;
    size_t floats[MAX_BUFFERS];
    int buffers = kernel_named(&chapter, kernel)->workspace(&s, floats);
    double bytes = 0;
    for (int i = 0; i < buffers; i++)
        bytes += 4.0 * (double)floats[i];
    return bytes;
}

/* Lists of (T / N)^2 blocks, one set for all heads, and scratch that does not grow with T at all. */
Test(traps, no_kernel_with_lists_holds_a_matrix)
{
    for (int tokens = 4096; tokens <= 131072; tokens *= 2) {
        double rows = tokens / 128, lists = 4 * rows + 8 * rows * rows;
        cr_expect(workspace_bytes("block-sparse", tokens) == lists);
        cr_expect(workspace_bytes("simd", tokens) - lists ==
                  workspace_bytes("simd", 4096) - workspace_bytes("block-sparse", 4096));
        cr_expect(workspace_bytes("dense-mask", tokens) == 4.0 * tokens * tokens);
    }
}

Test(traps, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        /* So long that teams differ with the threads. */
        Inputs p = set_up(shape_of("local-global:20:5", 340, 370, 16), 2, 3, 24);
        size_t bytes = query_count(&p.s) * sizeof(float);
        float *alone = allocate_floats(query_count(&p.s));
        omp_set_num_threads(1);
        attend(&p, kernel, NULL);
        memcpy(alone, p.out, bytes);
        for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            attend(&p, kernel, NULL);
            cr_expect(memcmp(alone, p.out, bytes) == 0, "%s on %d threads", names[kernel], threads);
        }
        free(alone);
        tear_down(&p);
    }
}

/* ---- The module ---- */

/* Implementation 9 draws and computes what 5 does: x, parameters, out and gradients are PyTorch's values for 5. */
Test(flex, gives_what_pytorch_gives)
{
    if (getenv("SMALL"))
        return;
    char *argv[] = {"run", "--batch", "8",  "--tokens", "1024", "--embed",
                    "768", "--heads", "12", "--pass",   "both"};
    Options options;
    parse_options(&options, 11, argv);
    Run *run = allocate_zeroed(1, sizeof *run);
    Refusal refusal = open_run(run, &chapter, kernel_named(&chapter, "flex"), &options, NULL, 1);
    cr_assert(refusal.exit_code == 0, "%s", refusal.reason);
    forward_run(run);
    backward_run(run);
    const char *wrong = check_reference(run, "09_block_sparse/reference/notebook_modules.tsv");
    cr_expect(!wrong, "%s", wrong);
    close_run(run);
    free(run);
    free_options(&options);
}
