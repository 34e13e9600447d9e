/* What a kernel costs follows from its lists: every pair of a listed block is met once, and of the others nothing is even
 * read. Results cannot show that: a kernel that loads everything and throws most of it away has the same. So here what
 * asks is counted, and what may not be read lies in memory that cannot be. */
#include "memory.h"
#include "random.h"
#include "test_problem.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* ---- Pairs that are asked about ---- */

static long asked;

static bool counting(const AttentionShape *s, int b, int h, int q, int kv)
{
#pragma omp atomic
    asked++;
    return attends(s, b, h, q, kv);
}

/* How many pairs the lists' partial blocks hold, or with `all` all of their blocks, over all batch entries and heads. */
static long listed_pairs(const BlockMask *mask, const AttentionShape *s, bool all)
{
    long pairs = 0;
    int N = mask->block;
    for (int b = 0; b < s->batch; b++)
        for (int h = 0; h < s->heads; h++)
            for (int i = 0; i < mask->query_blocks; i++) {
                int count, rows = smaller(N, s->tokens - i * N);
                const ListedBlock *list = block_list(mask, b, h, i, &count);
                for (int n = 0; n < count; n++)
                    if (all || list[n].kind == BLOCK_PARTIAL)
                        pairs += (long)rows * smaller(N, s->key_tokens - list[n].key_block * N);
            }
    return pairs;
}

/* Once forward, and backward once along each walk: the queries', the keys', and the bias's if there is one. With every
 * listed block called partial there is a question for every pair that is met. */
Test(met, each_pair_of_a_listed_block_as_often_as_it_is_needed)
{
    static const char *const some[] = {"none", "causal", "window:16", "local-global:9:20", "dilated:5:9"};
    static const int sizes[] = {16, 90};
    static const float bias[130];
    for (int m = 0; m < 5; m++)
        for (int n = 0; n < 2; n++)
            for (int all = 0; all < 2; all++) {
                Inputs p = set_up_grouped(shape_of(some[m], 90, 130, sizes[n]), 2, 2, 1, 8);
                BlockMask mask = lists_of(&p.s, NULL, false, false);
                long pairs = listed_pairs(&mask, &p.s, all);
                mask.predicate = counting;
                for (int i = 0; all && i < mask.query_blocks * mask.key_blocks; i++)
                    mask.listed[i].kind = BLOCK_PARTIAL;

                asked = 0;
                attend(&p, SPARSE, &mask);
                cr_expect(asked == pairs, "%s, blocks of %d: %ld of %ld", some[m], sizes[n], asked, pairs);
                asked = 0;
                differentiate(&p, SPARSE, &mask);
                cr_expect(asked == 3 * pairs, "%s, blocks of %d, backward: %ld of %ld", some[m], sizes[n],
                          asked, 3 * pairs);
                p.s.bias = bias;
                p.s.bias_stride[3] = 1;
                asked = 0;
                differentiate(&p, SPARSE, &mask);
                cr_expect(asked == 4 * pairs, "%s, blocks of %d, with a bias: %ld of %ld", some[m], sizes[n],
                          asked, 4 * pairs);
                free(mask.listed);
                tear_down(&p);
            }
}

/* ---- Memory that cannot be read ---- */

/* In place of a tensor of `rows` rows: the same numbers on pages of their own. */
typedef struct {
    float *row;
    size_t bytes, block_bytes;
} Pages;

static Pages on_pages(float **tensor, int rows, int head_size, int block)
{
    Pages pages = {.bytes = (size_t)rows * head_size * sizeof(float),
                   .block_bytes = (size_t)block * head_size * sizeof(float)};
    pages.row = mmap(NULL, pages.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(pages.row != MAP_FAILED);
    memcpy(pages.row, *tensor, pages.bytes);
    free(*tensor);
    *tensor = pages.row;
    return pages;
}

static void forbid(const Pages *pages, int block)
{
    char *first = (char *)pages->row + block * pages->block_bytes;
    cr_assert(mprotect(first, pages->block_bytes, PROT_NONE) == 0, "a block is no whole number of pages");
}

/* Everything may be read again; the tensor becomes one that tear_down() can free. */
static void off_pages(const Pages *pages, float **tensor)
{
    cr_assert(mprotect(pages->row, pages->bytes, PROT_READ) == 0);
    *tensor = allocate_floats(pages->bytes / sizeof(float));
    memcpy(*tensor, pages->row, pages->bytes);
    munmap(pages->row, pages->bytes);
}

/* The smallest head that fills a page with `block` rows. */
static int head_size_for(int block)
{
    int floats = (int)(sysconf(_SC_PAGESIZE) / sizeof(float)), head_size = 1;
    while (block * head_size % floats)
        head_size++;
    return head_size;
}

/* One block of queries, behind more and more keys: each time another row of the mask's picture. A key in no list that is
 * touched ends this program. */
static void expect_only_listed_keys_read(int kernel, bool backward, int N)
{
    static const char *const some[] = {"causal",       "window:20", "window:300", "local-global:20:16",
                                       "dilated:2:40", "prefix:40"};
    int HS = head_size_for(N), lists = 0, left_out = 0;
    for (int m = 0; m < 6; m++)
        for (int keys = 1; keys <= 7; keys += 3) {
            Inputs p = set_up(shape_of(some[m], N, keys * N, N), 1, 1, HS);
            BlockMask mask = lists_of(&p.s, NULL, false, false);
            Pages k = on_pages(&p.k, keys * N, HS, N), v = on_pages(&p.v, keys * N, HS, N);
            for (int j = 0; j < keys; j++)
                if (kind_at(&mask, 0, 0, 0, j) == BLOCK_EMPTY) {
                    forbid(&k, j);
                    forbid(&v, j);
                    left_out++;
                }
            if (backward)
                differentiate(&p, kernel, NULL);
            else
                attend(&p, kernel, NULL);
            off_pages(&k, &p.k);
            off_pages(&v, &p.v);
            cr_expect(error_against(&p, attends) <= 1e-5, "%s", names[kernel]);
            cr_expect(!backward || gradient_error(&p, attends) <= 2e-5, "%s", names[kernel]);
            free(mask.listed);
            tear_down(&p);
            lists++;
        }
    cr_expect(lists == 18 && left_out > 10);
}

Test(met, keys_in_no_list_are_not_read)
{
    for (int kernel = SPARSE; kernel < kernels_here(); kernel++)
        if (kernel != DENSE_SIMT)
            expect_only_listed_keys_read(kernel, false, 16);
}

/* simd reads all keys once, a tile at a time, before it asks who will meet them. */
Test(met, keys_in_no_list_are_not_read_backward)
{
    for (int kernel = SPARSE; kernel < kernels_here(); kernel += SPARSE_SIMT - SPARSE)
        expect_only_listed_keys_read(kernel, true, 16);
}

/* From the other side: 96 of 128 queries stand before all keys, and no key's list holds them. */
Test(met, queries_in_no_list_are_not_read)
{
    enum { N = 16, T = 128, TK = 32 };
    int HS = head_size_for(N);
    for (int kernel = SPARSE; kernel < kernels_here(); kernel += SPARSE_SIMT - SPARSE) {
        Inputs p = set_up(shape_of("causal", T, TK, N), 1, 1, HS);
        Pages q = on_pages(&p.q, T, HS, N);
        for (int i = 0; i < (T - TK) / N; i++)
            forbid(&q, i);
        differentiate(&p, kernel, NULL);
        off_pages(&q, &p.q);
        cr_expect(gradient_error(&p, attends) <= 2e-5, "%s", names[kernel]);
        tear_down(&p);
    }
}

/* ---- The lists that a device makes ---- */

static void expect_same_lists(const BlockMask *ours, const BlockMask *theirs, const char *what)
{
    for (int b = 0; b < ours->batch; b++)
        for (int i = 0; i < ours->query_blocks; i++) {
            int count, expected;
            const ListedBlock *list = block_list(ours, b, 0, i, &count);
            const ListedBlock *right = block_list(theirs, b, 0, i, &expected);
            cr_assert(count == expected && memcmp(list, right, count * sizeof *list) == 0,
                      "%s: list %d of %d", what, i, b);
        }
}

/* From both sides: they stand first in the kernel's workspaces. */
Test(met, a_device_makes_the_same_lists)
{
    static Kernel rows[MAX_DEVICE_ROWS];
    static const int sizes[] = {16, 33, 1000}, lengths[] = {41, 0};
    Chapter simt = chapter_on(&chapter, DEVICE_SIMT, rows);
    for (int m = 0; m < MASKS && simt.kernels->name; m++)
        for (int n = 0; n < 3; n++) {
            const Kernel *kernel = kernel_named(&simt, "block-sparse");
            AttentionShape s = shape_of(masks[m], 90, 130, sizes[n]);
            s.batch = 2;
            s.lengths = n % 2 ? lengths : NULL;
            BlockMask right = lists_of(&s, NULL, false, false);
            float *turned = allocate_floats(transposed_mask_floats(&s, false, false));
            BlockMask right_turned = transpose_in(turned, &right);

            Tensors t = {0};
            size_t floats[MAX_BUFFERS];
            float *tensor = allocate_zeroed(2 * 130, sizeof *tensor);
            float *gradient = allocate_floats(2 * 130);
            t.q = t.k = t.v = t.dout = tensor;
            t.dq = t.dk = t.dv = t.out = t.lse = gradient;
            for (int i = kernel->workspace(&s, floats) - 1; i >= 0; i--)
                t.workspace[i] = allocate_floats(floats[i]);
            for (int i = kernel->backward_workspace(&s, floats) - 1; i >= 0; i--)
                t.backward_workspace[i] = allocate_floats(floats[i]);
            kernel->forward(&t, &s);
            kernel->backward(&t, &s);

            BlockMask ours = block_mask_in(t.workspace[0], &s, false, false);
            BlockMask ours_turned = transposed_mask_in(t.backward_workspace[0], &ours);
            expect_same_lists(&ours, &right, masks[m]);
            expect_same_lists(&ours_turned, &right_turned, masks[m]);

            for (int i = 0; i < MAX_BUFFERS; i++) {
                free(t.workspace[i]);
                free(t.backward_workspace[i]);
            }
            free(tensor);
            free(gradient);
            free(turned);
            free(right.listed);
            drop_shape(&s);
        }
}
