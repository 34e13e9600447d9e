/* Chapter 7: flash attention in tiles. Its kernels. */
#include "chapter.h"
#include "claims.h"
#include "flash_modules.h"
#include "flash_modules_backward.h"
#include "flash_tiled.h"
#include "flash_tiled_bf16.h"
#include "flash_tiled_bf16_backward.h"
#include "flash_tiled_backward.h"
#include "flash_tiled_simd.h"
#include "flash_tiled_simd_backward.h"
#include "layers.h"
#include "story_flash_tiled.h"

#include <stdio.h>

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
    floats[0] = flash_backward_scratch(s);
    return 1;
}

static void backward_simd(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = gradients(t);
    attention_simd_backward(&g, t->backward_workspace[0], s);
}

/* In bf16 the pointers stand for 16-bit numbers. */
static int workspace_bf16(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = bf16_copies(s);
    floats[1] = flash_view_scratch(s);
    return 2;
}

static void forward_bf16(const Tensors *t, const AttentionShape *s)
{
    attention_bf16((Bf16 *)t->out, t->lse, t->workspace[0], t->workspace[1], (const Bf16 *)t->q,
                   (const Bf16 *)t->k, (const Bf16 *)t->v, s);
}

static int backward_workspace_bf16(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = bf16_gradient_sums(s);
    floats[1] = bf16_backward_copies(s);
    floats[2] = bf16_backward_scratch(s);
    return 3;
}

static void backward_bf16(const Tensors *t, const AttentionShape *s)
{
    float *const *d = t->backward_workspace;
    const Bf16Backward g = {(const Bf16 *)t->q,   (const Bf16 *)t->k,    (const Bf16 *)t->v,
                            (const Bf16 *)t->out, (const Bf16 *)t->dout, t->lse,
                            (Bf16 *)t->dq,        (Bf16 *)t->dk,         (Bf16 *)t->dv};
    attention_bf16_backward(&g, d[0], d[1], d[2], s);
}

static const char *no_bias(const AttentionShape *s)
{
    return s->bias ? "takes no --bias in its backward pass in bf16; --dtype f32 does" : NULL;
}

/* ---- Modules ---- */

static int workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t tokens = (size_t)s->batch * s->tokens;
    floats[QKV] = tokens * flash_packed_step(s);
    floats[CONTEXT] = tokens * s->embed_out;
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

enum { D_QKV, D_CONTEXT, D_SCRATCH, D_ATTENDED }; /* their backward workspace */

static int backward_workspace_sdpa(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t tokens = (size_t)s->batch * s->tokens;
    floats[D_QKV] = tokens * flash_packed_step(s);
    floats[D_CONTEXT] = tokens * s->embed_out;
    floats[D_SCRATCH] = flash_backward_scratch(s);
    return 3;
}

static int backward_workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    backward_workspace_sdpa(s, floats);
    floats[D_ATTENDED] = floats[D_CONTEXT];
    return 4;
}

static ModuleScratch module_scratch(const Tensors *t)
{
    float *const *d = t->backward_workspace;
    return (ModuleScratch){
        .d_qkv = d[D_QKV], .d_context = d[D_CONTEXT], .d_attended = d[D_ATTENDED], .scratch = d[D_SCRATCH]};
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
    size_t third = (size_t)s->embed_out * s->embed;
    oracle_heads(query, key, value, weight, weight + third, weight + 2 * third, s);
}

static void describe_sdpa(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                          const Tensors *t, const AttentionShape *s)
{
    describe_packed(query, key, value, t->parameter[0], s);
    module->output[0] = oracle_linear(t->parameter[1], t->parameter[2], s->embed_out);
    module->outputs = 1;
}

static void describe_torch_mha(OracleModule *module, OracleLinear *query, OracleLinear *key,
                               OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    describe_packed(query, key, value, t->parameter[1], s);
    module->output[0] = oracle_linear(t->parameter[0], NULL, s->embed_out);
    module->output[1] = oracle_linear(t->parameter[2], t->parameter[3], s->embed_out);
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
    {.name = "simd",
     .what = "in bf16: 16 bits a number, sums of 32",
     .takes = TAKES_QKV,
     .forward = forward_bf16,
     .workspace = workspace_bf16,
     .backward = backward_bf16,
     .backward_workspace = backward_workspace_bf16,
     .refuses_backward = no_bias,
     .bf16 = true,
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

static const ChapterMode modes[] = {
    {"layers",
     "[--layers L] [--tokens T] [--batch B] [--dropout P] [--threads N] [--repeat R] [--tsv FILE]: with the "
     "matrix and "
     "without, over many layers",
     run_layers},
    {"claims",
     "[--tsv FILE]: the first call against later ones; -1e9 against -inf. --device simt|cuda: TF32, a mask "
     "tensor, "
     "launches",
     run_claims},
    {0},
};

DECLARE_DEVICE_KERNELS(flash_tiled);
DECLARE_DEVICE_KERNELS(rows);
DECLARE_DEVICE_KERNELS(shared);
DECLARE_DEVICE_KERNELS(registers);
DECLARE_DEVICE_KERNELS(async);
DECLARE_DEVICE_KERNELS(mma);
DECLARE_DEVICE_KERNELS(pipelined);

const Chapter chapter = {
    .number = 7,
    .title = "Flash attention in tiles",
    .folder = "07_flash_tiled",
    .kernels = kernels,
    .story = tell_flash_tiled,
    .modes = modes,
    .device_kernels =
        {
            DEVICE_KERNELS(flash_tiled, "tiled sdpa sdpa-mask torch-mha-noweights"),
            DEVICE_KERNELS(rows, "rows"),
            DEVICE_KERNELS(shared, "shared"),
            DEVICE_KERNELS(registers, "registers"),
            DEVICE_KERNELS(async, "async"),
            DEVICE_KERNELS(mma, "mma"),
            DEVICE_KERNELS(pipelined, "pipelined"),
        },
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
