#include "story_flash_tiled.h"
#include "flash_modules.h"
#include "flash_tiled_simd.h"
#include "memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

extern const Chapter chapter;

/* Of dq, dk and dv. */
static double gradients_apart(const StoryRun *a, const StoryRun *b)
{
    size_t queries = query_count(&a->shape), keys = key_count(&a->shape);
    double dq = furthest_apart(a->t.dq, b->t.dq, queries), dk = furthest_apart(a->t.dk, b->t.dk, keys),
           dv = furthest_apart(a->t.dv, b->t.dv, keys);
    return worse(dq, worse(dk, dv));
}

/* Output and gradients, of which the oracle has judged each by itself. */
static void claim_same(Story *story, const char *name, const StoryRun *run, const StoryRun *expected)
{
    double apart = furthest_apart(run->t.out, expected->t.out, query_count(&run->shape)),
           gradients = gradients_apart(run, expected);
    story_claim(story, apart <= 2e-6 && gradients <= 2e-5,
                "%-21s and materialised differ by %.1e at most, in dq, dk and dv by %.1e", name, apart,
                gradients);
}

static void tell_tiles(Story *story)
{
    const char *problem = "--heads 12 --tokens 1024 --head-size 64 --causal --pass both";
    story_heading(story, "Tiles change nothing");
    story_say(story, "12 causal heads, 1024 tokens of 64 numbers: the same output and the same gradients of "
                     "out.sum() with "
                     "the T x TK matrix and without it, for tiles of any size.");
    const StoryRun *expected = story_run(story, "materialised", problem);
    static const char *const tiles[] = {"--tile 64x64", "--tile 3x5", "--tile 1x2000"};
    for (int i = 0; i < 3; i++) {
        char words[128], name[64];
        snprintf(words, sizeof words, "%s %s", problem, tiles[i]);
        snprintf(name, sizeof name, "tiled, %s", tiles[i]);
        claim_same(story, name, story_run(story, "tiled", words), expected);
    }
    claim_same(story, "simd", story_run(story, "simd", problem), expected);
}

/* The bytes of a kernel's workspace. */
static double workspace_of(const char *name, const AttentionShape *s)
{
    const Kernel *kernel = kernel_named(&chapter, name);
    size_t floats[MAX_BUFFERS], sum = 0;
    for (int i = kernel->workspace(s, floats); i-- > 0;)
        sum += floats[i];
    return 4.0 * (double)sum;
}

static void tell_memory(Story *story)
{
    story_heading(story, "Memory beyond inputs and outputs, 12 heads of 64");
    story_say(story, "%9s %14s %14s %14s", "tokens", "materialised", "tiled 64x64", "simd");
    AttentionShape s = {
        .batch = 1, .heads = 12, .kv_heads = 12, .head_size = 64, .tile_rows = 64, .tile_columns = 64};
    double first[3] = {0}, last[3] = {0}, before = 0;
    for (s.tokens = 1024; s.tokens <= 65536; s.tokens *= 4) {
        s.key_tokens = s.tokens;
        before = last[2];
        last[0] = 4.0 * (double)weights_count(&s);
        last[1] = workspace_of("tiled", &s);
        last[2] = workspace_of("simd", &s);
        story_say(story, "%9d %14s %14s %14s", s.tokens, bytes_text(last[0]), bytes_text(last[1]),
                  bytes_text(last[2]));
        for (int i = 0; i < 3 && s.tokens == 1024; i++)
            first[i] = last[i];
    }
    story_claim(story, last[0] == 4096 * first[0], "64 times the tokens: the matrix is 4096 times as large");
    story_claim(story, last[1] == 64 * first[1],
                "the plain tiles' maxima, sums and scores are 64 times as large");
    story_claim(story, last[2] == before,
                "the fast tiles' scratch has stopped growing: it is enough for %d threads", FLASH_THREADS);
}

static double norm(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    return sqrt(sum);
}

/* The gradients of out.sum(), sums of 8192 rows that nearly cancel, and so to five figures: the norm of dx's, then of
 * each parameter's. reference/notebook_modules.tsv */
static void tell_gradients(Story *story, const StoryRun *run, double dx, const double *norms)
{
    double ours = norm(run->t.dx, (size_t)run->shape.batch * run->shape.tokens * run->shape.embed);
    story_claim(story, fabs(ours - dx) <= 1e-5 * dx, "%-32s norm %11.4f, PyTorch's %11.4f", "dx", ours, dx);
    for (int i = 0; i < run->parameters->count; i++) {
        char name[64];
        snprintf(name, sizeof name, "d_%s", run->parameters->list[i].name);
        ours = norm(run->parameters->list[i].gradient,
                    run->parameters->list[i].size[0] * run->parameters->list[i].size[1]);
        story_claim(story, fabs(ours - norms[i]) <= 1e-5 * norms[i], "%-32s norm %11.4f, PyTorch's %11.4f",
                    name, ours, norms[i]);
    }
}

static void tell_notebook(Story *story, const StoryRun *causal, const StoryRun *future)
{
    static const double sdpa[6] = {0.3409292, -0.02430938, 0.004581543, 0.02482991, 0.02445523, -0.01866736};
    static const double mask[6] = {0.01886547, 0.03523598, 0.03210562, 0.01431189, 0.03654278, 0.010864};
    static const double torch_mha[6] = {0.2677648,  0.2954288,   -0.002144566,
                                        0.03782766, 0.006217474, -0.01936917};
    /* In the order in which the parameters are drawn. */
    static const double sdpa_gradients[] = {58629.7578, 60032.0595, 227023.363};
    static const double mask_gradients[] = {57804.471, 56467.7973, 227023.363};
    static const double torch_gradients[] = {39486.5352, 33568.6152, 39627.1201, 227023.363};
    story_heading(story, "The notebook's implementations 5, 8 and 6, 8 x 1024 x 768, 12 heads, seed 123");
    story_say(story, "Beside what PyTorch 2.15 computed on a CPU, gradients of out.sum() too. 5 is "
                     "scaled_dot_product_attention(is_causal=True):");
    story_notebook(story, causal, sdpa, 92.2031735);
    tell_gradients(story, causal, 1179.8246, sdpa_gradients);
    story_say(story, "\n8 is nn.MultiheadAttention(need_weights=False), then a projection:");
    const StoryRun *torch = story_run(story, "torch-mha-noweights", "--pass both");
    story_notebook(story, torch, torch_mha, 78.0672562);
    tell_gradients(story, torch, 841.901104, torch_gradients);
    story_say(story, "\n6 is 5 with a mask tensor in place of is_causal. Its numbers are others:");
    story_notebook(story, future, mask, 92.4122157);
    tell_gradients(story, future, 1179.07405, mask_gradients);

    int C = future->shape.embed_out, T = future->shape.tokens;
    double apart = furthest_apart(future->t.out + (size_t)(T - 1) * C, future->t.parameter[2], C);
    story_claim(story, apart == 0, "its last token sees nothing: out is proj.bias, bit for bit");
}

/* Implementation 6's module once more, its mask read from a tensor in one way or the other. */
static double apart_with_tensor(void (*read)(float *bias, const bool *tensor, size_t n), const StoryRun *run,
                                const float *expected)
{
    AttentionShape s = run->shape;
    const Tensors *t = &run->t;
    size_t T = s.tokens, count = (size_t)s.batch * T * s.embed_out;
    bool *triu = allocate_zeroed(T * T, sizeof *triu);
    float *bias = allocate_floats(T * T), *out = allocate_floats(count);
    for (size_t row = 0; row < T; row++)
        for (size_t column = row + 1; column < T; column++)
            triu[row * T + column] = true;
    read(bias, triu, T * T);
    s.mask.kind = MASK_NONE;
    s.bias = bias;
    s.bias_stride[2] = T;
    s.bias_stride[3] = 1;
    sdpa_module(out, t->workspace[QKV], t->workspace[CONTEXT], NULL, t->workspace[SCRATCH], t->x,
                t->parameter[0], t->parameter[1], t->parameter[2], &s);
    double apart = furthest_apart(out, expected, count);
    free(triu);
    free(bias);
    free(out);
    return apart;
}

static void tell_mask(Story *story, const StoryRun *causal, const StoryRun *future)
{
    story_heading(story, "A mask that means the opposite");
    story_say(story, "6's tensor is triu(ones(T, T), diagonal=1), True above the diagonal. The notebook's "
                     "other modules fill in "
                     "-inf where it is True, and nn.MultiheadAttention does as well. But to "
                     "scaled_dot_product_attention True "
                     "means: may attend.");
    double apart = apart_with_tensor(true_may_attend, future, future->t.out);
    story_claim(story, apart <= 2e-6,
                "True may attend: %.1e from sdpa-mask at most; each query sees the future alone", apart);
    apart = apart_with_tensor(true_may_not_attend, future, causal->t.out);
    story_claim(story, apart <= 2e-6, "the tensor inverted: %.1e from sdpa at most; causal, as was meant",
                apart);
}

void tell_flash_tiled(Story *story)
{
    const StoryRun *causal = story_run(story, "sdpa", "--pass both"),
                   *future = story_run(story, "sdpa-mask", "--pass both");
    tell_notebook(story, causal, future);
    tell_mask(story, causal, future);
    tell_tiles(story);
    tell_memory(story);
    story_time(story, "materialised tiled simd", "--heads 12 --tokens 1024 --head-size 64");
}
