/* Sequences packed into one, --mask documents:L1,L2,..: each gets what it gets alone, forward and gradients. */
#include "chapter.h"
#include "memory.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const Chapter chapter;

enum { BATCH = 2, HEADS = 2, HEAD_SIZE = 20, SLABS = BATCH * HEADS };
enum { Q, K, V, DOUT, INPUTS, OUT = INPUTS, DQ, DK, DV, TENSORS }; /* each (B,NH,T,HS) */
static const char *const tensor_name[TENSORS] = {[OUT] = "out", [DQ] = "dq", [DK] = "dk", [DV] = "dv"};

typedef struct {
    AttentionShape shape;
    float *tensor[TENSORS];
} Sequence;

static Sequence sequence(int tokens)
{
    Sequence x = {.shape = {.batch = BATCH,
                            .heads = HEADS,
                            .kv_heads = HEADS,
                            .tokens = tokens,
                            .key_tokens = tokens,
                            .head_size = HEAD_SIZE,
                            .scale = 1 / sqrtf(HEAD_SIZE),
                            .causal = true,
                            .tile_rows = 16,
                            .tile_columns = 24}};
    for (int i = 0; i < TENSORS; i++)
        x.tensor[i] = allocate_floats(query_count(&x.shape));
    return x;
}

static void free_sequence(Sequence *x)
{
    for (int i = 0; i < TENSORS; i++)
        free(x->tensor[i]);
}

static float *poisoned(size_t n)
{
    return memset(allocate_floats(n), 0xff, n * sizeof(float));
}

/* Forward and backward. */
static void differentiate(Sequence *x, const Kernel *kernel)
{
    AttentionShape *s = &x->shape;
    float **of = x->tensor;
    size_t floats[MAX_BUFFERS];
    Tensors t = {.q = of[Q],
                 .k = of[K],
                 .v = of[V],
                 .dout = of[DOUT],
                 .out = of[OUT],
                 .dq = of[DQ],
                 .dk = of[DK],
                 .dv = of[DV]};
    for (int i = OUT; i < TENSORS; i++)
        memset(of[i], 0xff, query_count(s) * sizeof(float));
    t.lse = poisoned(lse_count(s));
    t.weights = kernel->weights ? poisoned(weights_count(s)) : NULL;
    for (int i = kernel->workspace ? kernel->workspace(s, floats) : 0; i-- > 0;)
        t.workspace[i] = poisoned(floats[i]);
    for (int i = kernel->backward_workspace(s, floats); i-- > 0;)
        t.backward_workspace[i] = poisoned(floats[i]);
    kernel->forward(&t, s);
    kernel->backward(&t, s);
    free(t.lse);
    free(t.weights);
    for (int i = 0; i < MAX_BUFFERS; i++) {
        free(t.workspace[i]);
        free(t.backward_workspace[i]);
    }
}

/* Tokens first .. first + T of `packed` are those of `alone`: where row 0 of a slab begins in the packed tensor. */
static float *within(const Sequence *packed, int tensor, int slab, int first)
{
    return packed->tensor[tensor] + ((size_t)slab * packed->shape.tokens + first) * HEAD_SIZE;
}

static double largest_of(const float *tensor, size_t n)
{
    double largest = 0;
    for (size_t i = 0; i < n; i++)
        largest = fmax(largest, fabs(tensor[i]));
    return largest;
}

/* To 1e-6 of the tensor's largest number: the gradients of a sequence of one token are zero on paper, and what is left
 * of numbers that cancel is judged by their size. */
static void packed_as_alone(const char *name, const char *mask)
{
    const Kernel *kernel = kernel_named(&chapter, name);
    int *document, tokens;
    Mask parsed;
    const char *wrong = parse_mask(&parsed, mask, &document, &tokens);
    cr_assert(!wrong, "%s", wrong);
    Sequence packed = sequence(tokens);
    packed.shape.mask = parsed;
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    for (int i = 0; i < INPUTS; i++)
        draw_randn(&stream, packed.tensor[i], query_count(&packed.shape));
    differentiate(&packed, kernel);

    for (int first = 0, end; first < tokens; first = end) {
        for (end = first; end < tokens && document[end] == document[first];)
            end++;
        Sequence alone = sequence(end - first);
        size_t slab_size = (size_t)(end - first) * HEAD_SIZE;
        for (int i = 0; i < INPUTS; i++)
            for (int slab = 0; slab < SLABS; slab++)
                memcpy(alone.tensor[i] + slab * slab_size, within(&packed, i, slab, first),
                       slab_size * sizeof(float));
        differentiate(&alone, kernel);
        for (int i = OUT; i < TENSORS; i++) {
            double apart = 0, largest = largest_of(packed.tensor[i], query_count(&packed.shape));
            for (int slab = 0; slab < SLABS; slab++)
                for (size_t n = 0; n < slab_size; n++) {
                    double expected = alone.tensor[i][slab * slab_size + n];
                    double off = fabs(within(&packed, i, slab, first)[n] - expected);
                    apart = worse(apart, off);
                }
            cr_expect(apart <= 1e-6 * largest, "%s, %s, tokens %d to %d: %s off by %g of %g", name, mask,
                      first, end, tensor_name[i], apart, largest);
        }
        free_sequence(&alone);
    }
    free_sequence(&packed);
    free(document);
}

static const char *const masks[] = {"documents:20,1,70,49", "documents:48,192,7", "documents:131",
                                    "documents:1,1,1,97,2"};
enum { MASKS = sizeof masks / sizeof *masks };

Test(documents, packed_are_as_alone_materialised)
{
    for (int i = 0; i < MASKS; i++)
        packed_as_alone("materialised", masks[i]);
}

Test(documents, packed_are_as_alone_tiled)
{
    for (int i = 0; i < MASKS; i++)
        packed_as_alone("tiled", masks[i]);
}

Test(documents, packed_are_as_alone_simd)
{
    for (int i = 0; i < MASKS; i++)
        packed_as_alone("simd", masks[i]);
}
