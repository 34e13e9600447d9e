#include "chapter.h"
#include "compare.h"
#include "decode.h"
#include "gqa.h"
#include "kv_cache.h"
#include "llama.h"

#include "../07_flash_tiled/flash_tiled_simd_backward.h"

#include <stdio.h>
#include <string.h>

/* ---- The kernels. ---- */

static void forward_repeat_kv(const Tensors *t, const AttentionShape *s)
{
    attention_repeat_kv(t->out, t->lse, t->workspace[0], t->workspace[1], t->q, t->k, t->v, s);
}

static size_t copies(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * s->key_tokens * s->head_size;
}

static int repeated_keys_and_values(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = copies(s);
    return 2;
}

static GroupedBackward gradients(const Tensors *t)
{
    return (GroupedBackward){
        t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias, t->backward_workspace[0]};
}

static void backward_repeat_kv(const Tensors *t, const AttentionShape *s)
{
    GroupedBackward g = gradients(t);
    attention_repeat_kv_backward(&g, t->workspace[0], t->workspace[1], t->backward_workspace[1],
                                 t->backward_workspace[2], s);
}

static int delta_and_copies(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    floats[1] = floats[2] = copies(s);
    return 3;
}

static void forward_grouped(const Tensors *t, const AttentionShape *s)
{
    attention_grouped(t->out, t->lse, t->q, t->k, t->v, s);
}

static void backward_grouped(const Tensors *t, const AttentionShape *s)
{
    GroupedBackward g = gradients(t);
    attention_grouped_backward(&g, s);
}

static int delta(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

static void forward_simd(const Tensors *t, const AttentionShape *s)
{
    attention_grouped_simd(t->out, t->lse, t->workspace[0], t->q, t->k, t->v, s);
}

/* Chapter 7's backward pass already takes a key/value head with several query heads. */
static void backward_simd(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = {t->q, t->k, t->v, t->out, t->lse, t->dout, t->dq, t->dk, t->dv, t->dbias};
    attention_simd_backward(&g, t->backward_workspace[0], s);
}

static int backward_scratch(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = flash_backward_scratch(s);
    return 1;
}

static int tiles(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = grouped_simd_scratch(s);
    return 1;
}

enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ };

static void parameters_llama(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "q_proj", s->heads * s->head_size, s->embed, false);
    add_linear(p, "k_proj", s->kv_heads * s->head_size, s->embed, false);
    add_linear(p, "v_proj", s->kv_heads * s->head_size, s->embed, false);
    add_linear(p, "o_proj", s->embed_out, s->heads * s->head_size, false);
}

static int llama_buffers(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = query_count(s);
    floats[3] = floats[4] = key_count(s);
    floats[5] = lse_count(s);
    floats[6] = (size_t)s->tokens * s->head_size; /* half for the cosines, half for the sines */
    floats[7] = grouped_simd_scratch(s);
    return 8;
}

static LlamaWorkspace llama_workspace(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace;
    return (LlamaWorkspace){.rows = w[0],
                            .q = w[1],
                            .out_heads = w[2],
                            .k = w[3],
                            .v = w[4],
                            .lse = w[5],
                            .cosine = w[6],
                            .sine = w[6] + (size_t)s->tokens * (s->head_size / 2),
                            .scratch = w[7]};
}

static void forward_llama(const Tensors *t, const AttentionShape *s)
{
    const LlamaWorkspace workspace = llama_workspace(t, s);
    llama_attention(t->out, &workspace, t->x, t->parameter[Q_PROJ], t->parameter[K_PROJ],
                    t->parameter[V_PROJ], t->parameter[O_PROJ], s);
}

static int llama_backward_buffers(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = query_count(s);
    floats[2] = floats[3] = key_count(s);
    floats[4] = lse_count(s);
    return 5;
}

static void backward_llama(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->backward_workspace, *const *d = t->d_parameter;
    const LlamaWorkspace workspace = llama_workspace(t, s);
    const LlamaBackwardWorkspace backward = {w[0], w[1], w[2], w[3], w[4]};
    const LlamaGradients g = {t->dx, d[Q_PROJ], d[K_PROJ], d[V_PROJ], d[O_PROJ]};
    llama_attention_backward(&g, &backward, &workspace, t->dout, t->x, t->parameter[Q_PROJ],
                             t->parameter[K_PROJ], t->parameter[V_PROJ], t->parameter[O_PROJ], s);
}

static const char *needs_even_heads(const AttentionShape *s)
{
    static char reason[120];
    snprintf(reason, sizeof reason,
             "turns pairs of numbers: a head's size must be even, not %d (--embed-out over --heads)",
             s->head_size);
    return s->head_size % 2 == 0 ? NULL : reason;
}

/* What the oracle is told: head h owns rows h*HS .. of its projection. */
static void describe_llama(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                           const Tensors *t, const AttentionShape *s)
{
    size_t head = (size_t)s->head_size * s->embed;
    for (int h = 0; h < s->heads; h++)
        query[h] = oracle_linear(t->parameter[Q_PROJ] + h * head, NULL, s->embed);
    for (int h = 0; h < s->kv_heads; h++) {
        key[h] = oracle_linear(t->parameter[K_PROJ] + h * head, NULL, s->embed);
        value[h] = oracle_linear(t->parameter[V_PROJ] + h * head, NULL, s->embed);
    }
    module->output[0] = oracle_linear(t->parameter[O_PROJ], NULL, s->embed_out);
    module->outputs = 1;
    module->rope_theta = LLAMA_THETA;
}

static const Kernel kernels[] = {
    {.name = "repeat-kv",
     .what = "keys and values copied for each query head, then head by head",
     .takes = TAKES_QKV,
     .forward = forward_repeat_kv,
     .backward = backward_repeat_kv,
     .workspace = repeated_keys_and_values,
     .backward_workspace = delta_and_copies,
     .dropout = DROPOUT_POSITION,
     .grouped = true},
    {.name = "grouped",
     .what = "the same without copies: head h reads key/value head h / group",
     .takes = TAKES_QKV,
     .forward = forward_grouped,
     .backward = backward_grouped,
     .backward_workspace = delta,
     .dropout = DROPOUT_POSITION,
     .grouped = true},
    {.name = "simd",
     .what = "chapter 7's tiles, a group's queries side by side in each; one token over split keys",
     .takes = TAKES_QKV,
     .forward = forward_simd,
     .backward = backward_simd,
     .backward_workspace = backward_scratch,
     .workspace = tiles,
     .dropout = DROPOUT_POSITION,
     .grouped = true},
    {.name = "llama",
     .what = "Llama 3's module: projections, rotary embedding, grouped causal attention",
     .takes = TAKES_X,
     .forward = forward_llama,
     .backward = backward_llama,
     .workspace = llama_buffers,
     .backward_workspace = llama_backward_buffers,
     .grouped = true,
     .refuses = needs_even_heads,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters_llama,
     .describe = describe_llama},
    {0},
};

static const ExtraCheck checks[] = {
    {"decoding token by token gives the rows of the causal call", decode_equals_causal},
    {0},
};

/* ---- The story. ---- */

static void tell_kernels(Story *story)
{
    story_heading(story, "Query heads share key/value heads, held against the oracle in double");
    story_say(story, "8 query heads on 2 key/value heads, group 4:");
    story_say(story, "query head h     0 1 2 3 4 5 6 7");
    story_say(story, "reads h / group  0 0 0 0 1 1 1 1   (h %% 2 would be 0 1 0 1 0 1 0 1)");
    static const char *const options[] = {
        "--heads 6 --kv-heads 6 --tokens 65 --head-size 40 --causal",
        "--heads 6 --kv-heads 2 --tokens 65 --head-size 40 --causal",
        "--heads 6 --kv-heads 1 --tokens 65 --head-size 40 --causal",
        "--batch 2 --heads 8 --kv-heads 2 --tokens 67 --key-tokens 131 --head-size 64 --bias randn",
    };
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        const StoryRun *run[3];
        story_say(story, "%s", options[i]);
        for (int j = 0; j < 3; j++) {
            char text[200];
            run[j] = story_run(story, kernels[j].name, options[i]);
            comparison_text(text, sizeof text, &run[j]->comparison);
            story_claim(story, run[j]->comparison.passed, "%-9s %s", kernels[j].name, text);
        }
        size_t bytes = query_count(&run[0]->shape) * sizeof(float);
        story_claim(story, memcmp(run[0]->t.out, run[1]->t.out, bytes) == 0,
                    "repeat-kv and grouped agree in every bit: the copies add nothing");
    }
}

static void tell_llama(Story *story)
{
    story_heading(story, "Llama 3's module, held against PyTorch");
    story_say(story, "x (2,10,48) with seed 123, 6 heads of 16 on 2 key/value heads, as reference/llama.py "
                     "computes it. The first "
                     "six numbers of tokens 0, 1 and 9:");
    static const double pytorch[3][6] = {
        /* reference/llama.tsv */
        {-0.3344, -0.0052, -0.0264, -0.0697, 0.4446, 0.1432},
        {-0.2115, 0.2442, 0.0423, -0.0892, 0.2848, 0.0454},
        {0.0005, 0.0722, -0.0591, -0.0312, 0.1367, -0.0394},
    };
    static const int tokens[3] = {0, 1, 9};
    const StoryRun *run =
        story_run(story, "llama", "--batch 2 --tokens 10 --embed 48 --embed-out 96 --heads 6 --kv-heads 2");
    float ours[3][6];
    for (int i = 0; i < 3; i++)
        memcpy(ours[i], run->t.out + (size_t)tokens[i] * run->shape.embed_out, sizeof ours[i]);
    story_beside(story, "out, batch entry 0", "PyTorch's", &ours[0][0], &pytorch[0][0], 3, 6);
}

static void tell_cache(Story *story)
{
    enum { LAYERS = 32, HEADS = 32, HS = 128, CONTEXT = 8192 };
    story_heading(story, "What the KV cache holds: 32 layers, 32 heads of 128, as Llama 3 8B");
    story_say(story, "key/value heads   a token, bf16   f32          %d tokens, bf16   f32", CONTEXT);
    static const struct {
        int kv_heads;
        const char *name;
    } row[] = {{HEADS, "(multi-head)"}, {HEADS / 4, "(Llama 3)"}, {1, "(multi-query)"}};
    for (int i = 0; i < 3; i++) {
        size_t kib = kv_cache_bytes_per_token(LAYERS, row[i].kv_heads, HS, 2) / 1024;
        story_say(story, "%2d %-14s %4zu KiB        %4zu KiB     %4zu MiB            %4zu MiB",
                  row[i].kv_heads, row[i].name, kib, 2 * kib, kib * CONTEXT / 1024, 2 * kib * CONTEXT / 1024);
    }
    const char *wrong = decode_equals_causal();
    story_claim(story, !wrong,
                "70 tokens decoded one by one with a growing cache give the rows of the causal call");
    story_say(story, "./run decode times one more token with the cache and without.");
}

static void story(Story *story)
{
    tell_kernels(story);
    tell_llama(story);
    tell_cache(story);
    story_time(story, "repeat-kv grouped simd",
               "--heads 12 --kv-heads 3 --tokens 1024 --head-size 64 --causal");
}

static const ChapterMode modes[] = {
    {"decode", "[--tsv FILE]: time for one more token, with a KV cache and without", run_decode}, {0}};

DECLARE_DEVICE_KERNELS(gqa);

const Chapter chapter = {
    .number = 8,
    .title = "Grouped queries, and the KV cache",
    .folder = "08_gqa",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(gqa, "repeat-kv grouped split-keys llama")},
    .checks = checks,
    .story = story,
    .group = 4,
    .modes = modes,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
