/* The gradients over the listed blocks: what the common walk over the ugly shapes does not come by. */
#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "memory.h"
#include "test_problem.h"
#include "threads.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The same blocks from the other side, ascending too. */
Test(gradients, transposed_lists_hold_the_same_blocks)
{
    for (int n = 0; n < BLOCKS; n++) {
        AttentionShape s = shape_of("none", 70, 130, block_sizes[n]);
        s.batch = 2;
        s.heads = s.kv_heads = 3;
        BlockMask mask = lists_of(&s, window_by_head, true, true);
        size_t floats = transposed_mask_floats(&s, true, true);
        float *memory = allocate_floats(floats);
        BlockMask turned = transpose_in(memory, &mask);
        cr_assert(turned.count + 6 * mask.key_blocks == (int *)memory + floats);
        BlockCount there = count_blocks(&mask), here = count_blocks(&turned);
        cr_expect(there.full == here.full && there.partial == here.partial && there.all == here.all);
        for (int b = 0; b < 2; b++)
            for (int h = 0; h < 3; h++)
                for (int j = 0; j < mask.key_blocks; j++) {
                    int count;
                    const ListedBlock *list = block_list(&turned, b, h, j, &count);
                    for (int i = 0; i < count; i++) {
                        cr_assert(i == 0 || list[i - 1].key_block < list[i].key_block, "not ascending");
                        cr_assert(kind_at(&mask, b, h, list[i].key_block, j) == list[i].kind);
                    }
                }
        free(memory);
        free(mask.listed);
    }
}

Test(gradients, of_a_predicate_of_batch_entry_and_head)
{
    for (int n = 0; n < BLOCKS; n++) {
        Inputs p = set_up(shape_of("none", 70, 130, block_sizes[n]), 2, 3, 8);
        BlockMask mask = lists_of(&p.s, window_by_head, true, true);
        differentiate(&p, SPARSE, &mask);
        double error = gradient_error(&p, window_by_head);
        cr_expect(error <= 5e-6, "blocks of %d: off by %g", block_sizes[n], error);
        free(mask.listed);
        tear_down(&p);
    }
}

Test(gradients, of_rows_without_a_key_are_zero)
{
    static const int lengths[] = {20, 0};
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("causal", 50, 20, 16), 2, 1, 8);
        p.s.lengths = lengths;
        differentiate(&p, kernel, NULL);
        double error = gradient_error(&p, attends);
        cr_expect(error <= 5e-6, "%s: off by %g", names[kernel], error);
        for (int i = 0; i < 30 * 8; i++)
            cr_expect(p.dq[i] == 0, "%s", names[kernel]);
        for (int i = 20 * 8; i < 40 * 8; i++)
            cr_expect(p.dk[i] == 0 && p.dv[i] == 0, "%s: a key that nobody sees", names[kernel]);
        tear_down(&p);
    }
}

/* NaN in the keys of an empty block, and in the queries of another: who does not meet them has a gradient. */
Test(gradients, never_load_empty_blocks)
{
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        if (kernel == SIMD)
            continue; /* its tiles are larger: see below */
        Inputs p = set_up(shape_of("window:10", 64, 64, 16), 1, 1, 8);
        for (int i = 0; i < 16 * 8; i++)
            p.k[i] = p.v[i] = NAN; /* seen by rows 0 .. 24 */
        for (int i = 48 * 8; i < 64 * 8; i++)
            p.q[i] = p.dout[i] = NAN; /* who see keys 39 and later */
        differentiate(&p, kernel, NULL);
        bool finite = true;
        for (int c = 32 * 8; c < 48 * 8; c++)
            finite = finite && isfinite(p.dq[c]);
        for (int c = 25 * 8; c < 32 * 8; c++) /* keys 16 .. 24 meet rows whose delta is NaN */
            finite = finite && isfinite(p.dk[c]) && isfinite(p.dv[c]);
        cr_expect(finite == (kernel != DENSE && kernel != DENSE_SIMT), "%s", names[kernel]);
        cr_expect(isnan(p.dq[15 * 8]) && isnan(p.dv[50 * 8]) && isnan(p.dk[50 * 8]), "%s hides NaN",
                  names[kernel]);
        tear_down(&p);
    }
}

/* The same for the fast tiles, which are larger: 48 queries meet 192 keys at once. */
Test(gradients, fast_tiles_never_load_empty_blocks)
{
    Inputs p = set_up(shape_of("window:10", 768, 768, 64), 1, 1, 8);
    for (int i = 0; i < 192 * 8; i++)
        p.k[i] = p.v[i] = NAN; /* seen by rows 0 .. 200, whose tiles end at 240 */
    for (int i = 576 * 8; i < 768 * 8; i++)
        p.q[i] = p.dout[i] = NAN; /* who see keys 567 and later, whose tiles begin at 384 */
    differentiate(&p, SIMD, NULL);
    for (int t = 240; t < 576; t++)
        cr_assert(isfinite(p.dq[t * 8]), "row %d", t);
    for (int t2 = 241; t2 < 384; t2++)
        cr_assert(isfinite(p.dk[t2 * 8]) && isfinite(p.dv[t2 * 8]), "key %d", t2);
    cr_expect(isnan(p.dq[15 * 8]) && isnan(p.dv[700 * 8]) && isnan(p.dk[700 * 8]), "hides NaN");
    tear_down(&p);
}

/* Several tiles of keys, and lists that jump ahead into the middle of one. */
Test(gradients, of_fast_tiles_over_many_lists)
{
    static const char *const long_masks[] = {"none",
                                             "causal",
                                             "window:100",
                                             "prefix:300",
                                             "local-global:40:7",
                                             "dilated:5:9",
                                             "documents:100,250,350"};
    static const int long_blocks[] = {16, 50, 128};
    for (int m = 0; m < 7; m++)
        for (int n = 0; n < 3; n++) {
            Inputs p = set_up(shape_of(long_masks[m], 700, 700, long_blocks[n]), 1, 1, 8);
            differentiate(&p, SIMD, NULL);
            double error = gradient_error(&p, attends);
            cr_expect(error <= 1e-5, "%s, blocks of %d: off by %g", long_masks[m], long_blocks[n], error);
            tear_down(&p);
        }
}

/* Heads that have keys of their own, and heads that share them, whose dk and dv are sums. */
Test(gradients, of_fast_tiles_over_several_heads)
{
    static const int heads[][2] = {{3, 3}, {6, 2}, {4, 1}};
    for (int n = 0; n < 3; n++)
        for (int causal = 0; causal < 2; causal++) {
            AttentionShape s = shape_of(causal ? "causal" : "local-global:40:7", 250, 300, 50);
            Inputs p = set_up_grouped(s, 2, heads[n][0], heads[n][1], 8);
            differentiate(&p, SIMD, NULL);
            double error = gradient_error(&p, attends);
            cr_expect(error <= 1e-5, "%d heads over %d: off by %g", heads[n][0], heads[n][1], error);
            tear_down(&p);
        }
}

/* A bias that forbids some pairs of every row, and all of row 5, whatever the lists say. */
Test(gradients, of_a_bias_of_minus_infinity)
{
    for (int kernel = 0; kernel < kernels_here(); kernel++)
        for (int causal = 0; causal < 2; causal++) {
            float bias[64 * 64];
            for (int i = 0; i < 64 * 64; i++)
                bias[i] = i % 3 == 0 || i / 64 == 5 ? -INFINITY : 0.01f * (float)(i % 97);
            Inputs p = set_up_grouped(shape_of(causal ? "causal" : "none", 64, 64, 16), 2, 6, 2, 8);
            p.s.bias = bias;
            p.s.bias_stride[2] = 64;
            p.s.bias_stride[3] = 1;
            differentiate(&p, kernel, NULL);
            double error = worse(error_against(&p, attends), gradient_error(&p, attends));
            cr_expect(error <= 1e-5, "%s: off by %g", names[kernel], error);
            for (int c = 0; c < 8; c++)
                cr_expect(p.out[5 * 8 + c] == 0 && p.dq[5 * 8 + c] == 0, "%s: row 5", names[kernel]);
            cr_expect(p.dbias[63 * 64] == 0 && p.dbias[5 * 64 + 1] == 0, "%s: dbias", names[kernel]);
            tear_down(&p);
        }
}

/* Shared by all queries, by all keys, and by all pairs: sums over blocks of every kind. */
Test(gradients, of_a_bias_that_many_pairs_share)
{
    static const size_t strides[][2] = {{0, 1}, {1, 0}, {0, 0}};
    float bias[90];
    for (int i = 0; i < 90; i++)
        bias[i] = 0.1f * (float)(i % 7);
    for (int kernel = 0; kernel < kernels_here(); kernel++)
        for (int n = 0; n < 3; n++) {
            Inputs p = set_up_grouped(shape_of("window:40", 70, 90, 16), 2, 4, 2, 8);
            p.s.bias = bias;
            p.s.bias_stride[2] = strides[n][0];
            p.s.bias_stride[3] = strides[n][1];
            differentiate(&p, kernel, NULL);
            double error = gradient_error(&p, attends);
            cr_expect(error <= 1e-5, "%s, strides %zu and %zu: off by %g", names[kernel], strides[n][0],
                      strides[n][1], error);
            tear_down(&p);
        }
}

/* 0 times NaN is NaN: a product over a whole partial block would let in what its mask forbids. */
Test(gradients, forbidden_pairs_of_a_partial_block_stay_out)
{
    for (int kernel = SPARSE; kernel < kernels_here(); kernel += SPARSE_SIMT - SPARSE) {
        Inputs p = set_up(shape_of("causal", 64, 64, 64), 1, 1, 8);
        for (int i = 40 * 8; i < 64 * 8; i++)
            p.k[i] = p.v[i] = NAN;
        differentiate(&p, kernel, NULL);
        for (int t = 0; t < 64; t++)
            cr_expect((isnan(p.dq[t * 8]) != 0) == (t >= 40), "%s, row %d", names[kernel], t);
        tear_down(&p);
    }
}

/* The same where the bias forbids, in a full block. */
Test(gradients, what_a_bias_forbids_stays_out)
{
    float bias[64];
    for (int t2 = 0; t2 < 64; t2++)
        bias[t2] = t2 % 3 ? 0.1f * t2 : -INFINITY;
    for (int kernel = SPARSE; kernel < kernels_here(); kernel += SPARSE_SIMT - SPARSE) {
        Inputs p = set_up(shape_of("none", 64, 64, 16), 1, 2, 8);
        p.s.bias = bias;
        p.s.bias_stride[3] = 1;
        for (int h = 0; h < 2; h++)
            for (int c = 0; c < 8; c++)
                p.v[key_row(&p.s, 0, h, 3) + c] = NAN;
        differentiate(&p, kernel, NULL);
        double error = gradient_error(&p, attends);
        cr_expect(error <= 1e-5, "%s: off by %g", names[kernel], error);
        p.dout[0] = NAN; /* of query 0, which key 0 does not meet and key 1 does */
        differentiate(&p, kernel, NULL);
        cr_expect(p.dv[0] == 0 && isnan(p.dv[8]), "%s", names[kernel]);
        tear_down(&p);
    }
}

/* With dropout too, which is drawn again in each pass. */
Test(gradients, do_not_change_with_the_size_of_a_block)
{
    for (int dropout = 0; dropout < 2; dropout++) {
        float *first = NULL;
        for (int n = -1; n < BLOCKS; n++) {
            Inputs p = set_up(shape_of("local-global:20:5", 90, 130, n < 0 ? 130 : block_sizes[n]), 2, 2, 8);
            p.s.dropout = 0.3f * dropout;
            p.s.dropout_seed = 7;
            differentiate(&p, SPARSE, NULL);
            float *now = gradients_of(&p);
            for (size_t i = 0; first && i < query_count(&p.s) + 2 * key_count(&p.s); i++)
                cr_assert(fabs((double)now[i] - first[i]) <= 5e-6, "blocks of %d: %g and %g", block_sizes[n],
                          (double)now[i], (double)first[i]);
            if (first)
                free(now);
            else
                first = now;
            tear_down(&p);
        }
        free(first);
    }
}

/* What backward adds: the lists of the key blocks, and one number a row. */
Test(gradients, need_no_matrix)
{
    for (int tokens = 4096; tokens <= 131072; tokens *= 2) {
        AttentionShape s = shape_of("window:256", tokens, tokens, 128);
        s.heads = s.kv_heads = 8;
        s.head_size = 64;
        size_t floats[MAX_BUFFERS], rows = tokens / 128;
        cr_expect(kernel_named(&chapter, "block-sparse")->backward_workspace(&s, floats) == 2);
        cr_expect(floats[0] == rows + 2 * rows * rows && floats[1] == (size_t)8 * tokens);
        cr_expect(kernel_named(&chapter, "simd")->backward_workspace(&s, floats) == 2);
        cr_expect(floats[0] == rows + 2 * rows * rows && floats[1] == flash_backward_scratch(&s));
        cr_expect(kernel_named(&chapter, "dense-mask")->backward_workspace(&s, floats) == 1 &&
                  floats[0] == (size_t)8 * tokens * tokens);
    }
}

Test(gradients, threads_give_the_same_bits)
{
    for (int kernel = 0; kernel < kernels_here(); kernel++) {
        Inputs p = set_up(shape_of("local-global:20:5", 200, 230, 16), 2, 3, 24);
        float *alone = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            differentiate(&p, kernel, NULL);
            float *now = gradients_of(&p);
            size_t bytes = (query_count(&p.s) + 2 * key_count(&p.s)) * sizeof *now;
            cr_expect(!alone || memcmp(alone, now, bytes) == 0, "%s on %d threads", names[kernel], threads);
            if (alone)
                free(now);
            else
                alone = now;
        }
        free(alone);
        tear_down(&p);
    }
}
