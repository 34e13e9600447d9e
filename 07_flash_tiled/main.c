/* Chapter 7: flash attention in tiles. Its kernels, and its story. */
#include "chapter.h"
#include "flash_modules.h"
#include "flash_modules_backward.h"
#include "flash_tiled.h"
#include "flash_tiled_backward.h"
#include "flash_tiled_simd.h"
#include "flash_tiled_simd_backward.h"
#include "memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- Kernels that take q, k and v ---- */

static void forward_materialised(const Tensors *t, const AttentionShape *s)
{
    attention_materialised(t->out, t->lse, t->weights, t->workspace[0], t->q, t->k, t->v, s);
}

/* The softmax before dropout, where there is any. */
static int softmax_if_dropout(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return s->dropout > 0 ? 1 : 0;
}

static AttentionBackward gradients(const Tensors *t)
{
    return (AttentionBackward){t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
}

static void backward_materialised(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = gradients(t);
    attention_materialised_backward(&g, t->weights, s->dropout > 0 ? t->workspace[0] : t->weights,
                                    t->backward_workspace[0], s);
}

static int d_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return 1;
}

static int workspace_tiled(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = lse_count(s);
    floats[2] = tile_scores(s);
    return 3;
}

static void forward_tiled(const Tensors *t, const AttentionShape *s)
{
    float *m = t->workspace[0], *l = t->workspace[1], *scores = t->workspace[2];
    attention_tiled(t->out, t->lse, m, l, scores, t->q, t->k, t->v, s);
}

static void backward_tiled(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = gradients(t);
    float *const *w = t->backward_workspace;
    attention_tiled_backward(&g, &(TiledScratch){w[0], w[1], w[2]}, s);
}

static int backward_workspace_tiled(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    floats[1] = floats[2] = key_block_count(s);
    return 3;
}

static int workspace_simd(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = flash_view_scratch(s);
    return 1;
}

static void forward_simd(const Tensors *t, const AttentionShape *s)
{
    attention_simd(t->out, t->lse, t->workspace[0], t->q, t->k, t->v, s);
}

static int backward_workspace_simd(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    floats[1] = flash_backward_scratch(s);
    floats[2] = flash_backward_partials(s);
    return floats[2] ? 3 : 2;
}

static void backward_simd(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace;
    AttentionBackward g = gradients(t);
    attention_simd_backward(&g, d[0], d[2], d[1], s);
}

/* ---- Modules ---- */

enum { QKV, CONTEXT, SCRATCH, LSE, ATTENDED }; /* their workspace */

static int workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t row = (size_t)s->batch * s->tokens * s->embed_out;
    floats[QKV] = 3 * row;
    floats[CONTEXT] = row;
    floats[SCRATCH] = flash_view_scratch(s);
    floats[LSE] = lse_count(s);
    return 4;
}

static int workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    workspace_sdpa(s, floats);
    floats[ATTENDED] = floats[CONTEXT];
    return 5;
}

static void parameters_sdpa(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "qkv", 3 * s->embed_out, s->embed, false);
    add_linear(p, "proj", s->embed_out, s->embed_out, true);
}

static void forward_sdpa(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    sdpa_module(t->out, w[QKV], w[CONTEXT], w[LSE], w[SCRATCH], t->x, t->parameter[0], t->parameter[1],
                t->parameter[2], s);
}

enum { D_QKV, D_CONTEXT, DELTA, D_SCRATCH, PARTIAL, D_ATTENDED }; /* their backward workspace */

static int backward_workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t row = (size_t)s->batch * s->tokens * s->embed_out;
    floats[D_QKV] = 3 * row;
    floats[D_CONTEXT] = row;
    floats[DELTA] = lse_count(s);
    floats[D_SCRATCH] = flash_backward_scratch(s);
    floats[PARTIAL] = flash_backward_partials(s);
    return 5;
}

static int backward_workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    backward_workspace_sdpa(s, floats);
    floats[D_ATTENDED] = floats[D_CONTEXT];
    return 6;
}

static ModuleScratch module_scratch(const Tensors *t)
{
    float *const *d = t->backward_workspace;
    return (ModuleScratch){.d_qkv = d[D_QKV],
                           .d_context = d[D_CONTEXT],
                           .d_attended = d[D_ATTENDED],
                           .delta = d[DELTA],
                           .scratch = d[D_SCRATCH],
                           .partial = d[PARTIAL]};
}

static void backward_sdpa(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace, *const *d = t->d_parameter;
    ModuleScratch scratch = module_scratch(t);
    sdpa_module_backward(t->dx, d[0], d[1], d[2], &scratch, t->dout, w[QKV], w[CONTEXT], w[LSE], t->x,
                         t->parameter[0], t->parameter[1], s);
}

/* The inner out_proj is drawn before in_proj_weight, which comes from xavier_uniform: see
 * nn.MultiheadAttention. */
static void parameters_torch_mha(Parameters *p, const AttentionShape *s)
{
    int C = s->embed;
    add_linear(p, "multihead_attn.out_proj", C, C, false);
    add_uniform(p, "multihead_attn.in_proj_weight", 3 * C, C, xavier_bound(C, 3 * C));
    add_linear(p, "proj", C, C, true);
}

static void forward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    torch_mha_module(t->out, w[QKV], w[CONTEXT], w[LSE], w[ATTENDED], w[SCRATCH], t->x, t->parameter[1],
                     t->parameter[0], t->parameter[2], t->parameter[3], s);
}

static void backward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace, *const *d = t->d_parameter;
    ModuleScratch scratch = module_scratch(t);
    torch_mha_module_backward(t->dx, d[1], d[0], d[2], d[3], &scratch, t->dout, w[QKV], w[CONTEXT], w[LSE],
                              w[ATTENDED], t->x, t->parameter[1], t->parameter[0], t->parameter[2], s);
}

static const char *needs_embed_out_equal(const AttentionShape *s)
{
    static char reason[96];
    snprintf(reason, sizeof reason, "takes --embed-out %d, as wide as --embed, not %d", s->embed,
             s->embed_out);
    return s->embed == s->embed_out ? NULL : reason;
}

/* For the oracle: head h's queries, keys and values are rows h*HS .. of the thirds of a packed weight
 * (3*C_out,C). */
static void describe_packed(OracleLinear *query, OracleLinear *key, OracleLinear *value, const float *weight,
                            const AttentionShape *s)
{
    size_t third = (size_t)s->embed_out * s->embed, head = (size_t)s->head_size * s->embed;
    for (int h = 0; h < s->heads; h++) {
        query[h] = (OracleLinear){.weight = weight + h * head, .stride_out = s->embed, .stride_in = 1};
        key[h] = value[h] = query[h];
        key[h].weight += third;
        value[h].weight += 2 * third;
    }
}

static OracleLinear describe_linear(const float *weight, const float *bias, const AttentionShape *s)
{
    return (OracleLinear){.weight = weight, .bias = bias, .stride_out = s->embed_out, .stride_in = 1};
}

static void describe_sdpa(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                          const Tensors *t, const AttentionShape *s)
{
    describe_packed(query, key, value, t->parameter[0], s);
    module->output[0] = describe_linear(t->parameter[1], t->parameter[2], s);
    module->outputs = 1;
}

static void describe_torch_mha(OracleModule *module, OracleLinear *query, OracleLinear *key,
                               OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    describe_packed(query, key, value, t->parameter[1], s);
    module->output[0] = describe_linear(t->parameter[0], NULL, s);
    module->output[1] = describe_linear(t->parameter[2], t->parameter[3], s);
    module->outputs = 2;
}

static const Kernel kernels[] = {
    {.name = "materialised",
     .what = "the T x TK matrix in memory, softmax over it",
     .takes = TAKES_QKV,
     .forward = forward_materialised,
     .backward = backward_materialised,
     .workspace = softmax_if_dropout,
     .backward_workspace = d_scores,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM},
    {.name = "tiled",
     .what = "flash attention in plain C: tiles of queries by keys, no matrix",
     .takes = TAKES_QKV,
     .forward = forward_tiled,
     .backward = backward_tiled,
     .workspace = workspace_tiled,
     .backward_workspace = backward_workspace_tiled,
     .dropout = DROPOUT_POSITION,
     .tiled = true},
    {.name = "simd",
     .what = "the same with vectors of queries, tiles in registers",
     .takes = TAKES_QKV,
     .forward = forward_simd,
     .backward = backward_simd,
     .workspace = workspace_simd,
     .backward_workspace = backward_workspace_simd,
     .dropout = DROPOUT_POSITION},
    {.name = "sdpa",
     .what = "implementation 5: one packed projection, scaled_dot_product_attention(is_causal=True)",
     .takes = TAKES_X,
     .forward = forward_sdpa,
     .backward = backward_sdpa,
     .workspace = workspace_sdpa,
     .backward_workspace = backward_workspace_sdpa,
     .dropout = DROPOUT_POSITION,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters_sdpa,
     .describe = describe_sdpa},
    {.name = "sdpa-mask",
     .what = "implementation 6: the same with a mask tensor, which makes each query see later keys only",
     .takes = TAKES_X,
     .forward = forward_sdpa,
     .backward = backward_sdpa,
     .workspace = workspace_sdpa,
     .backward_workspace = backward_workspace_sdpa,
     .dropout = DROPOUT_POSITION,
     .own_mask = OWN_MASK_FUTURE,
     .parameters = parameters_sdpa,
     .describe = describe_sdpa},
    {.name = "torch-mha-noweights",
     .what = "implementation 8: nn.MultiheadAttention(need_weights=False)",
     .takes = TAKES_X,
     .forward = forward_torch_mha,
     .backward = backward_torch_mha,
     .workspace = workspace_torch_mha,
     .backward_workspace = backward_workspace_torch_mha,
     .dropout = DROPOUT_POSITION,
     .refuses = needs_embed_out_equal,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters_torch_mha,
     .describe = describe_torch_mha},
    {0},
};

/* ---- The story ---- */

static double furthest(const float *a, const float *b, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        double apart = fabs((double)a[i] - b[i]);
        most = apart <= most ? most : apart; /* a NaN stays */
    }
    return most;
}

static void tell_tiles(Story *story)
{
    const char *problem = "--heads 12 --tokens 1024 --head-size 64 --causal";
    story_heading(story, "Tiles change nothing");
    story_say(
        story,
        "12 causal heads, 1024 tokens of 64 numbers: the same output with the T x TK matrix and without it, "
        "for tiles of any size.");
    const StoryRun *expected = story_run(story, "materialised", problem);
    static const char *const tiles[] = {"--tile 64x64", "--tile 3x5", "--tile 1x2000"};
    for (int i = 0; i < 3; i++) {
        char words[128];
        snprintf(words, sizeof words, "%s %s", problem, tiles[i]);
        const StoryRun *run = story_run(story, "tiled", words);
        double apart = furthest(run->t.out, expected->t.out, query_count(&run->shape));
        story_claim(story, apart <= 2e-6, "tiled, %-14s and materialised differ by %.1e at most", tiles[i],
                    apart);
    }
    const StoryRun *run = story_run(story, "simd", problem);
    double apart = furthest(run->t.out, expected->t.out, query_count(&run->shape));
    story_claim(story, apart <= 2e-6, "simd                  and materialised differ by %.1e at most", apart);
}

static double bytes_of(int (*workspace)(const AttentionShape *s, size_t floats[MAX_BUFFERS]),
                       const AttentionShape *s)
{
    size_t floats[MAX_BUFFERS], sum = 0;
    for (int i = workspace(s, floats); i-- > 0;)
        sum += floats[i];
    return 4.0 * (double)sum;
}

static void tell_memory(Story *story)
{
    story_heading(story, "Memory beyond inputs and outputs, 12 heads of 64");
    story_say(story, "%9s %14s %14s %14s", "tokens", "materialised", "tiled 64x64", "simd");
    AttentionShape s = {
        .batch = 1, .heads = 12, .kv_heads = 12, .head_size = 64, .tile_rows = 64, .tile_columns = 64};
    double first[3] = {0}, last[3] = {0};
    for (s.tokens = 1024; s.tokens <= 65536; s.tokens *= 4) {
        s.key_tokens = s.tokens;
        last[0] = 4.0 * (double)weights_count(&s);
        last[1] = bytes_of(workspace_tiled, &s);
        last[2] = bytes_of(workspace_simd, &s);
        story_say(story, "%9d %14s %14s %14s", s.tokens, bytes_text(last[0]), bytes_text(last[1]),
                  bytes_text(last[2]));
        for (int i = 0; i < 3 && s.tokens == 1024; i++)
            first[i] = last[i];
    }
    story_claim(story, last[0] == 4096 * first[0], "64 times the tokens: the matrix is 4096 times as large");
    story_claim(story, last[1] == 64 * first[1],
                "the plain tiles' maxima, sums and scores are 64 times as large");
    story_claim(story, last[2] == first[2],
                "the fast tiles' scratch is as large as before: there are no more than %d", FLASH_TASKS);
}

static void tell_notebook(Story *story, const StoryRun *causal, const StoryRun *future)
{
    static const double sdpa[6] = {0.3409292, -0.02430938, 0.004581543, 0.02482991, 0.02445523, -0.01866736};
    static const double mask[6] = {0.01886547, 0.03523598, 0.03210562, 0.01431189, 0.03654278, 0.010864};
    static const double torch_mha[6] = {0.2677648,  0.2954288,   -0.002144566,
                                        0.03782766, 0.006217474, -0.01936917};
    story_heading(story, "The notebook's implementations 5, 8 and 6, 8 x 1024 x 768, 12 heads, seed 123");
    story_say(
        story,
        "Beside what PyTorch 2.15 computed on a CPU. 5 is scaled_dot_product_attention(is_causal=True):");
    story_notebook(story, causal, sdpa, 92.2031735);
    story_say(story, "\n8 is nn.MultiheadAttention(need_weights=False), then a projection:");
    story_notebook(story, story_run(story, "torch-mha-noweights", ""), torch_mha, 78.0672562);
    story_say(story, "\n6 is 5 with a mask tensor in place of is_causal. Its numbers are others:");
    story_notebook(story, future, mask, 92.4122157);

    int C = future->shape.embed_out, T = future->shape.tokens;
    double apart = furthest(future->t.out + (size_t)(T - 1) * C, future->t.parameter[2], C);
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
    double apart = furthest(out, expected, count);
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

static void story(Story *story)
{
    const StoryRun *causal = story_run(story, "sdpa", ""), *future = story_run(story, "sdpa-mask", "");
    tell_notebook(story, causal, future);
    tell_mask(story, causal, future);
    tell_tiles(story);
    tell_memory(story);
    story_time(story, "materialised tiled simd", "--heads 12 --tokens 1024 --head-size 64");
}

const Chapter chapter = {
    .number = 7,
    .title = "Flash attention in tiles",
    .folder = "07_flash_tiled",
    .kernels = kernels,
    .story = story,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
