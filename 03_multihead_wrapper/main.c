#include "chapter.h"
#include "multihead_wrapper.h"

#include <math.h>
#include <stdio.h>

enum { MAX_HEADS = (MAX_PARAMETERS - 2) / 3 };

static const char *too_many_heads(const AttentionShape *s)
{
    static char text[80];
    snprintf(text, sizeof text, "takes up to %d heads, not --heads %d", MAX_HEADS, s->heads);
    return s->heads > MAX_HEADS ? text : NULL;
}

/* W_query, W_key, W_value of each head in turn: drawn so, and found again so. */
static void draw_heads(Parameters *p, const AttentionShape *s)
{
    static const char *const matrices[3] = {"W_query", "W_key", "W_value"};
    for (int h = 0; h < s->heads; h++)
        for (int i = 0; i < 3; i++) {
            char name[40];
            snprintf(name, sizeof name, "heads.%d.%s", h, matrices[i]);
            add_linear(p, name, s->head_size, s->embed, false);
        }
}

static void draw_heads_and_projection(Parameters *p, const AttentionShape *s)
{
    draw_heads(p, s);
    add_linear(p, "out_proj", s->embed_out, s->embed_out, true);
}

static void find_heads(Head *heads, const Tensors *t, const AttentionShape *s)
{
    for (int h = 0; h < s->heads; h++)
        heads[h] = (Head){t->parameter[3 * h], t->parameter[3 * h + 1], t->parameter[3 * h + 2]};
}

static void find_gradients(HeadGradient *heads, const Tensors *t, const AttentionShape *s)
{
    for (int h = 0; h < s->heads; h++)
        heads[h] =
            (HeadGradient){t->d_parameter[3 * h], t->d_parameter[3 * h + 1], t->d_parameter[3 * h + 2]};
}

/* q, k, v of every head; the weights before dropout where there is any; for the wrapper the concatenated
 * heads. */
static int stacked_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = (size_t)s->batch * s->tokens * s->embed_out;
    floats[3] = s->dropout > 0 ? weights_count(s) : 0;
    return 4;
}

static int wrapper_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    stacked_workspace(s, floats);
    floats[4] = floats[0];
    return 5;
}

/* The gradients of one head's q, k, v and scores; for the wrapper those of the concatenated heads. */
static int stacked_backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    size_t rows = (size_t)s->batch * s->tokens;
    floats[0] = floats[1] = floats[2] = rows * s->head_size;
    floats[3] = rows * s->tokens;
    return 4;
}

static int wrapper_backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    stacked_backward_workspace(s, floats);
    floats[4] = (size_t)s->batch * s->tokens * s->embed_out;
    return 5;
}

static void forward_stacked(const Tensors *t, const AttentionShape *s)
{
    Head heads[MAX_HEADS];
    float *const *kept = t->workspace;
    find_heads(heads, t, s);
    stacked_heads(t->out, t->weights, kept[3], kept[0], kept[1], kept[2], t->x, heads, s);
}

static void forward_wrapper(const Tensors *t, const AttentionShape *s)
{
    Head heads[MAX_HEADS];
    float *const *kept = t->workspace;
    find_heads(heads, t, s);
    multihead_wrapper(t->out, t->weights, kept[3], kept[0], kept[1], kept[2], kept[4], t->x, heads,
                      t->parameter[3 * s->heads], t->parameter[3 * s->heads + 1], s);
}

static void backward_stacked(const Tensors *t, const AttentionShape *s)
{
    Head heads[MAX_HEADS];
    HeadGradient d_heads[MAX_HEADS];
    float *const *kept = t->workspace, *const *d = t->backward_workspace;
    find_heads(heads, t, s);
    find_gradients(d_heads, t, s);
    stacked_heads_backward(t->dx, d_heads, d[0], d[1], d[2], d[3], t->dout, t->weights,
                           s->dropout > 0 ? kept[3] : t->weights, kept[0], kept[1], kept[2], t->x, heads, s);
}

static void backward_wrapper(const Tensors *t, const AttentionShape *s)
{
    Head heads[MAX_HEADS];
    HeadGradient d_heads[MAX_HEADS];
    float *const *kept = t->workspace, *const *d = t->backward_workspace;
    find_heads(heads, t, s);
    find_gradients(d_heads, t, s);
    multihead_wrapper_backward(t->dx, d_heads, t->d_parameter[3 * s->heads], t->d_parameter[3 * s->heads + 1],
                               d[0], d[1], d[2], d[4], d[3], t->dout, t->weights,
                               s->dropout > 0 ? kept[3] : t->weights, kept[0], kept[1], kept[2], kept[4],
                               t->x, heads, t->parameter[3 * s->heads], s);
}

static void describe_stacked(OracleModule *module, OracleLinear *query, OracleLinear *key,
                             OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    (void)module;
    for (int h = 0; h < s->heads; h++) {
        query[h] = oracle_linear(t->parameter[3 * h], NULL, s->embed);
        key[h] = oracle_linear(t->parameter[3 * h + 1], NULL, s->embed);
        value[h] = oracle_linear(t->parameter[3 * h + 2], NULL, s->embed);
    }
}

static void describe_wrapper(OracleModule *module, OracleLinear *query, OracleLinear *key,
                             OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    describe_stacked(module, query, key, value, t, s);
    module->outputs = 1;
    module->output[0] =
        oracle_linear(t->parameter[3 * s->heads], t->parameter[3 * s->heads + 1], s->embed_out);
}

static const Defaults two_heads = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 4, .heads = 2, .sentence = true};

static const Kernel kernels[] = {
    {.name = "stacked",
     .what = "single causal heads, one after another, concatenated",
     .takes = TAKES_X,
     .forward = forward_stacked,
     .backward = backward_stacked,
     .workspace = stacked_workspace,
     .backward_workspace = stacked_backward_workspace,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM_BY_HEAD,
     .defaults = &two_heads,
     .refuses = too_many_heads,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_heads,
     .describe = describe_stacked},
    {.name = "wrapper",
     .what = "the same and an output projection: implementation 1",
     .takes = TAKES_X,
     .forward = forward_wrapper,
     .backward = backward_wrapper,
     .workspace = wrapper_workspace,
     .backward_workspace = wrapper_backward_workspace,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM_BY_HEAD,
     .refuses = too_many_heads,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_heads_and_projection,
     .describe = describe_wrapper},
    {.name = NULL},
};

/* MultiHeadAttentionWrapper(3, 2, num_heads=2), seed 123: Raschka's chapter 3 notebook. */
static const double published[6][4] = {
    {-.4519, .2216, .4772, .1063},  {-.5874, .0058, .5891, .3257},  {-.6300, -.0632, .6202, .3860},
    {-.5675, -.0843, .5478, .3589}, {-.5526, -.0981, .5321, .3428}, {-.5299, -.1081, .5077, .3493},
};

/* The gradient of x, PyTorch 2.15 on a CPU: the same module, out.sum().backward(). */
static const double torch_dx[6][3] = {
    {.214061, -.213589, .928143}, {.236436, .029997, .445937}, {.141112, .000749, .309583},
    {.087207, -.015911, .247899}, {.058465, .000893, .141188}, {.018967, -.008367, .068629},
};

static void story(Story *story)
{
    story_heading(story, "Two heads of CausalAttention, side by side");
    story_say(story, "\"Your journey starts with one step\", six tokens of three numbers. Each head makes "
                     "two numbers of them: columns 1 and 2 are the first head's, 3 and 4 the second's.");
    const StoryRun *two = story_run(story, "stacked", "--pass both");
    story_expect(story, "out, seed 123", two->t.out, &published[0][0], 6, 4);

    story_say(story, "\nBackward, from the sum of all of out. x went to both heads and to three matrices in "
                     "each, so six parts are added up. Beside PyTorch's:");
    story_beside(story, "gradient of x", "PyTorch's", two->t.dx, &torch_dx[0][0], 6, 3);

    story_say(story, "\nThe heads know nothing of each other. The first of three is the one that the same "
                     "seed draws alone, chapter 2's:");
    const StoryRun *three =
        story_run(story, "stacked", "--batch 1 --tokens 6 --embed 3 --heads 3 --head-size 2");
    const StoryRun *one =
        story_run(story, "stacked", "--batch 1 --tokens 6 --embed 3 --heads 1 --head-size 2");
    double apart = 0;
    for (int t = 0; t < 6; t++)
        for (int i = 0; i < 2; i++)
            apart = worse(apart, fabs((double)one->t.out[t * 2 + i] - three->t.out[t * 6 + i]));
    story_claim(story, apart <= 1e-6,
                "columns 1 and 2 of three heads' out = out of one head; apart by %.1g at most", apart);

    story_heading(story, "At the notebook's size: 8 x 1024 x 768, 12 heads, and an output projection");
    story_say(story, "PyTorch's values for implementation 1 were computed by running its module with the "
                     "same seed. Six of them, and the square root of the sum of squares of all 6291456:");
    story_notebook(story, story_run(story, "wrapper", ""),
                   (const double[6]){-0.3221758, -0.3710763, 0.03839746, 0.01324414, 0.05652134, 0.001141259},
                   92.2561002);

    story_time(story, "wrapper", "");
    story_say(story, "\nTwelve heads read x 36 times and multiply it with 36 narrow matrices. Chapter 4 "
                     "does it in one.");
}

DECLARE_DEVICE_KERNELS(multihead_wrapper);

const Chapter chapter = {
    .number = 3,
    .title = "Many heads, one after another",
    .folder = "03_multihead_wrapper",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(multihead_wrapper, "stacked wrapper")},
    .story = story,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
