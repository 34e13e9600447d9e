#include "chapter.h"
#include "mistakes.h"
#include "packed_qkv.h"

#include <limits.h>

static size_t tokens_of(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens;
}

/* The weights before dropout, which is the weights themselves where there is none: without dropout, forward
 * does not write them, and no room is kept. */
static float *softmax_of(float *weights, float *before_dropout, const AttentionShape *s)
{
    return s->dropout > 0 ? before_dropout : weights;
}

/* The scores' gradients that backward holds: BACKWARD_ROWS rows of each head, or all. */
static size_t score_rows_of(const AttentionShape *s)
{
    int rows = s->tokens < BACKWARD_ROWS ? s->tokens : BACKWARD_ROWS;
    return (size_t)s->batch * s->heads * rows * s->tokens;
}

/* ---- split-heads ---- */

static void draw_split(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "W_query", s->embed_out, s->embed, false);
    add_linear(p, "W_key", s->embed_out, s->embed, false);
    add_linear(p, "W_value", s->embed_out, s->embed, false);
    add_linear(p, "out_proj", s->embed_out, s->embed_out, true);
}

/* q, k, v, context, the weights before dropout */
static int workspace_split(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = tokens_of(s) * s->embed_out;
    floats[4] = weights_count(s);
    return s->dropout > 0 ? 5 : 4;
}

/* The gradients of q, k, v and context, and of scores */
static int backward_workspace_split(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = tokens_of(s) * s->embed_out;
    floats[4] = score_rows_of(s);
    return 5;
}

static void forward_split(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace;
    split_heads(t->out, t->weights, kept[4], kept[0], kept[1], kept[2], kept[3], t->x, w[0], w[1], w[2], w[3],
                w[4], s);
}

static void backward_split(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace, *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    split_heads_backward(t->dx, d_w[0], d_w[1], d_w[2], d_w[3], d_w[4], d[0], d[1], d[2], d[3], d[4], t->dout,
                         t->weights, softmax_of(t->weights, kept[4], s), kept[0], kept[1], kept[2], kept[3],
                         t->x, w[0], w[1], w[2], w[3], s);
}

static void describe_split(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                           const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    oracle_heads(query, key, value, w[0], w[1], w[2], s);
    module->outputs = 1;
    module->output[0] = oracle_linear(w[3], w[4], s->embed_out);
}

/* ---- packed-qkv ---- */

/* A packed row must be countable in an int. */
static const char *refuses_too_wide(const AttentionShape *s)
{
    return s->embed_out > INT_MAX / 3 ? "takes --embed-out up to 715827882" : NULL;
}

static void draw_packed(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "qkv", 3 * s->embed_out, s->embed, false);
    add_linear(p, "proj", s->embed_out, s->embed_out, true);
}

/* qkv, context, the weights before dropout */
static int workspace_packed(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = tokens_of(s) * 3 * s->embed_out;
    floats[1] = tokens_of(s) * s->embed_out;
    floats[2] = weights_count(s);
    return s->dropout > 0 ? 3 : 2;
}

/* The gradients of qkv and context, and of scores */
static int backward_workspace_packed(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = tokens_of(s) * 3 * s->embed_out;
    floats[1] = tokens_of(s) * s->embed_out;
    floats[2] = score_rows_of(s);
    return 3;
}

static void forward_packed(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace;
    packed_qkv(t->out, t->weights, kept[2], kept[0], kept[1], t->x, w[0], w[1], w[2], s);
}

static void backward_packed(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace, *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    packed_qkv_backward(t->dx, d_w[0], d_w[1], d_w[2], d[0], d[1], d[2], t->dout, t->weights,
                        softmax_of(t->weights, kept[2], s), kept[0], kept[1], t->x, w[0], w[1], s);
}

static void describe_packed(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                            const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    size_t third = (size_t)s->embed_out * s->embed;
    oracle_heads(query, key, value, w[0], w[0] + third, w[0] + 2 * third, s);
    module->outputs = 1;
    module->output[0] = oracle_linear(w[1], w[2], s->embed_out);
}

/* ---- torch-mha ---- */

static const char *refuses_another_width(const AttentionShape *s)
{
    return s->embed != s->embed_out ? "takes --embed-out equal to --embed" : refuses_too_wide(s);
}

/* nn.MultiheadAttention's constructor makes its out_proj before it initialises in_proj_weight. */
static void draw_torch_mha(Parameters *p, const AttentionShape *s)
{
    int C = s->embed;
    add_linear(p, "multihead_attn.out_proj", C, C, false);
    add_uniform(p, "multihead_attn.in_proj_weight", 3 * C, C, xavier_bound(C, 3 * C));
    add_linear(p, "proj", C, C, true);
}

/* qkv, context, attended, the weights of every head, and before dropout */
static int workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    workspace_packed(s, floats);
    floats[2] = floats[1];
    floats[3] = floats[4] = weights_count(s);
    return s->dropout > 0 ? 5 : 4;
}

/* The gradients of qkv, context and attended, and of scores */
static int backward_workspace_torch_mha(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    backward_workspace_packed(s, floats);
    floats[3] = floats[2];
    floats[2] = floats[1];
    return 4;
}

static void forward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace;
    torch_mha(t->out, t->weights, kept[3], kept[4], kept[0], kept[1], kept[2], t->x, w[1], w[0], w[2], w[3],
              s);
}

/* The averaged weights are returned to be looked at; the loss is out's. */
static void backward_torch_mha(const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    float *const *kept = t->workspace, *const *d = t->backward_workspace, *const *d_w = t->d_parameter;
    torch_mha_backward(t->dx, d_w[1], d_w[0], d_w[2], d_w[3], d[0], d[1], d[2], d[3], t->dout, kept[3],
                       softmax_of(kept[3], kept[4], s), kept[0], kept[1], kept[2], t->x, w[1], w[0], w[2], s);
}

static void describe_torch_mha(OracleModule *module, OracleLinear *query, OracleLinear *key,
                               OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    size_t third = (size_t)s->embed * s->embed;
    oracle_heads(query, key, value, w[1], w[1] + third, w[1] + 2 * third, s);
    module->outputs = 2;
    module->output[0] = oracle_linear(w[0], NULL, s->embed);
    module->output[1] = oracle_linear(w[2], w[3], s->embed);
}

static const Defaults two_heads = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 2, .heads = 2, .sentence = true};
static const Defaults three_heads = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 3, .heads = 3, .sentence = true};

static const Kernel kernels[] = {
    {.name = "split-heads",
     .what = "three projections, heads split by strides: implementation 2",
     .takes = TAKES_X,
     .forward = forward_split,
     .backward = backward_split,
     .workspace = workspace_split,
     .backward_workspace = backward_workspace_split,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .defaults = &two_heads,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_split,
     .describe = describe_split},
    {.name = "packed-qkv",
     .what = "one projection three times as wide: implementation 3, nanoGPT's c_attn",
     .takes = TAKES_X,
     .forward = forward_packed,
     .backward = backward_packed,
     .workspace = workspace_packed,
     .backward_workspace = backward_workspace_packed,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .defaults = &two_heads,
     .refuses = refuses_too_wide,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_packed,
     .describe = describe_packed},
    {.name = "torch-mha",
     .what = "nn.MultiheadAttention returning averaged weights: implementation 7",
     .takes = TAKES_X,
     .forward = forward_torch_mha,
     .backward = backward_torch_mha,
     .workspace = workspace_torch_mha,
     .backward_workspace = backward_workspace_torch_mha,
     .weights = WEIGHTS_AVERAGED,
     .dropout = DROPOUT_STREAM,
     .defaults = &three_heads,
     .refuses = refuses_another_width,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_torch_mha,
     .describe = describe_torch_mha},
    {.name = NULL},
};

/* ---- The story ---- */

/* MultiHeadAttention(3, 2, num_heads=2), seed 123: Raschka's chapter 3 notebook. */
static const double published[6][2] = {
    {.3190, .4858}, {.2943, .3897}, {.2856, .3593}, {.2693, .3873}, {.2639, .3928}, {.2575, .4028},
};

static void tell_published_numbers(Story *story)
{
    story_heading(story, "Three projections, split into two heads");
    story_say(story, "\"Your journey starts with one step\": each W makes two numbers of a token's three, "
                     "one for each head. Nothing is moved to split them; a head is a column.");
    const StoryRun *split = story_run(story, "split-heads", "");
    story_expect(story, "out, seed 123", split->t.out, &published[0][0], 6, 2);

    story_heading(story, "One projection");
    story_say(story, "The three matrices above one another are one matrix, and PyTorch draws the same "
                     "numbers for it. So the packed module must print the same again:");
    const StoryRun *packed = story_run(story, "packed-qkv", "");
    story_expect(story, "out, seed 123", packed->t.out, &published[0][0], 6, 2);
}

/* From PyTorch 2.15 on a CPU: nn.MultiheadAttention(3, 3, bias=False) and nn.Linear(3, 3), seed 123. */
static const double torch_out[6][3] = {
    {.128593, .004675, -.062481}, {.288524, .072014, .015184}, {.342985, .094879, .041910},
    {.321820, .078663, .062992},  {.327794, .079403, .073310}, {.318664, .073235, .078948},
};
static const double torch_weights[6][6] = {
    {1},
    {.503474, .496526},
    {.336016, .331337, .332647},
    {.249460, .246395, .247015, .257131},
    {.197166, .195052, .195393, .203569, .208820},
    {.163916, .161857, .162343, .170151, .177482, .164251},
};
/* The gradient of x, out.sum().backward(). */
static const double torch_dx[6][3] = {
    {1.297561, 1.653764, -.781034}, {.768355, .942654, -.448788}, {.502611, .617955, -.295412},
    {.330146, .407445, -.175088},   {.193770, .246164, -.104800}, {.082039, .107963, -.050534},
};

static void tell_torch_mha(Story *story)
{
    story_heading(story, "nn.MultiheadAttention, three heads of one number");
    story_say(story, "It draws its output projection before its packed one, and bounds the latter by the "
                     "sum of both its sides. It returns one matrix of weights: the heads' average. Beside "
                     "PyTorch's:");
    const StoryRun *run = story_run(story, "torch-mha", "--pass both");
    story_beside(story, "out, seed 123", "PyTorch's", run->t.out, &torch_out[0][0], 6, 3);
    story_beside(story, "weights, averaged", "PyTorch's", run->t.weights, &torch_weights[0][0], 6, 6);
    story_say(story,
              "\nBackward, from the sum of all of out. A later token hears from fewer rows, and less:");
    story_beside(story, "gradient of x", "PyTorch's", run->t.dx, &torch_dx[0][0], 6, 3);
}

/* The SDPA notebook's c_attn cell: width 12, 2 heads, x (2,5,12). */
static void tell_folded_batch(Story *story)
{
    enum { B = 2, T = 5, C = 12, NH = 2 };
    static float context[B * T * C], weights[NH * (B * T) * (B * T)];
    const StoryRun *run = story_run(story, "packed-qkv", "--batch 2 --tokens 5 --embed 12 --heads 2");
    const float *qkv = run->t.workspace[0];

    story_heading(story, "Mistake 1: view(1, -1, 2, 6) on a batch of two");
    story_say(story, "The SDPA notebook's cell: width 12, 2 heads, x (2,5,12). chunk(3, -1) is columns "
                     "0-11, 12-23 and 24-35 of the product: queries, keys, values. The view then makes one "
                     "sequence of ten tokens of the two of five.");
    AttentionShape wrong = folded_batch(&run->shape);
    attend_heads(context, weights, NULL, qkv, qkv + C, qkv + 2 * C, 3 * C, &wrong);
    double leaked = 0; /* head 0, row T: the first token of the second sequence */
    for (int t2 = 0; t2 < T; t2++)
        leaked += weights[T * (B * T) + t2];
    story_claim(story, leaked > 0.01,
                "the second sequence's first token gives %.0f%% of its attention to the first sequence",
                100 * leaked);
    float to_itself = run->t.weights[lse_index(&run->shape, 1, 0, 0) * T];
    story_claim(story, to_itself == 1, "with view(2, -1, 2, 6) it gives %.0f%% to itself",
                100 * (double)to_itself);

    story_heading(story, "Mistake 2: head_dim = 12 // (2 * 3)");
    wrong = third_of_a_head(&run->shape);
    story_say(story,
              "Dividing by 3 is right for the packed width 36, not for 12. Heads of %d instead of 6 "
              "are no error: view's -1 makes up for it with more tokens.",
              wrong.head_size);
    story_claim(story, wrong.tokens == 15, "5 tokens have become %d", wrong.tokens);
}

static void tell_without_transpose(Story *story)
{
    enum { T = 6, C = 2, NH = 2 };
    float context[NH * T], weights[NH * T * T];
    const StoryRun *run = story_run(story, "split-heads", "");
    const float *q = run->t.workspace[0], *k = run->t.workspace[1], *v = run->t.workspace[2];

    story_heading(story, "Mistake 3: view(B, NH, T, HS) without the transpose");
    story_say(story, "The first token may see itself alone, so its context is its own value: of head 1 its "
                     "value's first number, of head 2 the second. Read without the transpose, head 2 begins "
                     "in the middle of the sentence.");
    AttentionShape wrong = without_transpose(&run->shape);
    attend_heads(context, weights, NULL, q, k, v, run->shape.head_size, &wrong);
    const float *right = run->t.workspace[3];
    story_claim(story, right[0] == v[0] && right[1] == v[1],
                "token 1: context %.4f %.4f, its value %.4f %.4f", right[0], right[1], v[0], v[1]);
    story_claim(story, context[T] == v[3 * C],
                "without the transpose: %.4f %.4f, the second of them token 4's (value %.4f %.4f)",
                context[0], context[T], v[3 * C], v[3 * C + 1]);
}

static void story(Story *story)
{
    tell_published_numbers(story);
    tell_torch_mha(story);
    tell_folded_batch(story);
    tell_without_transpose(story);
    story_time(story, "split-heads packed-qkv torch-mha", "--batch 8 --tokens 1024 --embed 768 --heads 12");
}

DECLARE_DEVICE_KERNELS(packed_qkv);

const Chapter chapter = {
    .number = 4,
    .title = "Many heads from one matrix",
    .folder = "04_packed_qkv",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(packed_qkv, "split-heads packed-qkv torch-mha")},
    .story = story,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
