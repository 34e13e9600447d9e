#include "causal_attention.h"
#include "chapter.h"

#include <math.h>
#include <string.h>

/* ---- The kernels. ---- */

static void forward_renormalise(const Tensors *t, const AttentionShape *s)
{
    attention_renormalise(t->out, t->weights, t->workspace[0], t->workspace[1], t->workspace[2], t->x,
                          t->parameter[0], t->parameter[1], t->parameter[2], s);
}

static void forward_minus_inf(const Tensors *t, const AttentionShape *s)
{
    attention_minus_inf(t->out, t->weights, t->workspace[0], t->workspace[1], t->workspace[2], t->x,
                        t->parameter[0], t->parameter[1], t->parameter[2], s);
}

static void forward_causal(const Tensors *t, const AttentionShape *s)
{
    causal_attention(t->out, t->weights, t->workspace[3], t->workspace[0], t->workspace[1], t->workspace[2],
                     t->x, t->parameter[0], t->parameter[1], t->parameter[2], s);
}

static void backward(const Tensors *t, const AttentionShape *s)
{
    float *const *work = t->backward_workspace;
    causal_attention_backward(t->dx, t->d_parameter[0], t->d_parameter[1], t->d_parameter[2], work[0],
                              work[1], work[2], work[3], t->dout, t->weights, t->workspace[3],
                              t->workspace[0], t->workspace[1], t->workspace[2], t->x, t->parameter[0],
                              t->parameter[1], t->parameter[2], s);
}

/* ---- Their memory. ---- */

static int queries_keys_values(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = (size_t)s->batch * s->tokens * s->embed_out;
    return 3;
}

/* And the weights before dropout; where there is none they are the weights themselves. */
static int and_softmax(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    queries_keys_values(s, floats);
    if (s->dropout == 0)
        return 3;
    floats[3] = weights_count(s);
    return 4;
}

static int their_gradients_and_the_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    queries_keys_values(s, floats);
    floats[3] = weights_count(s);
    return 4;
}

static const char *needs_one_head(const AttentionShape *s)
{
    return s->heads == 1 ? NULL : "takes one head: say --heads 1 (chapter 3 has more)";
}

static void parameters(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "W_query", s->embed_out, s->embed, false);
    add_linear(p, "W_key", s->embed_out, s->embed, false);
    add_linear(p, "W_value", s->embed_out, s->embed, false);
}

/* What the oracle is told of them. */
static void describe(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                     const Tensors *t, const AttentionShape *s)
{
    (void)module;
    *query = oracle_linear(t->parameter[0], NULL, s->embed);
    *key = oracle_linear(t->parameter[1], NULL, s->embed);
    *value = oracle_linear(t->parameter[2], NULL, s->embed);
}

static const Defaults sentence_to_two = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 2, .heads = 1, .sentence = true};

static const Kernel kernels[] = {
    {.name = "renormalise",
     .what = "softmax over all keys, the future struck out, the rest divided by its sum",
     .takes = TAKES_X,
     .forward = forward_renormalise,
     .backward = backward,
     .workspace = queries_keys_values,
     .backward_workspace = their_gradients_and_the_scores,
     .weights = WEIGHTS_PER_HEAD,
     .defaults = &sentence_to_two,
     .refuses = needs_one_head,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters,
     .describe = describe},
    {.name = "minus-inf",
     .what = "the future's scores set to -inf, then softmax",
     .takes = TAKES_X,
     .forward = forward_minus_inf,
     .backward = backward,
     .workspace = queries_keys_values,
     .backward_workspace = their_gradients_and_the_scores,
     .weights = WEIGHTS_PER_HEAD,
     .defaults = &sentence_to_two,
     .refuses = needs_one_head,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters,
     .describe = describe},
    {.name = "causal",
     .what = "CausalAttention: minus-inf, then dropout",
     .takes = TAKES_X,
     .forward = forward_causal,
     .backward = backward,
     .workspace = and_softmax,
     .backward_workspace = their_gradients_and_the_scores,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .defaults = &sentence_to_two,
     .refuses = needs_one_head,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = parameters,
     .describe = describe},
    {0},
};

/* ---- The published numbers: LLMs-from-scratch, chapter 3 (ch03.ipynb). ---- */

static const double softmax_row_1[6] = {0.1921, 0.1646, 0.1652, 0.1550, 0.1721, 0.1510};
static const double masked_weights[6][6] = {{1, 0, 0, 0, 0, 0},
                                            {0.5517, 0.4483, 0, 0, 0, 0},
                                            {0.3800, 0.3097, 0.3103, 0, 0, 0},
                                            {0.2758, 0.2460, 0.2462, 0.2319, 0, 0},
                                            {0.2175, 0.1983, 0.1984, 0.1888, 0.1971, 0},
                                            {0.1935, 0.1663, 0.1666, 0.1542, 0.1666, 0.1529}};
static const double masked_scores_2[6] = {0.4656, 0.1723, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
static const double dropped_ones[6][6] = {{2, 2, 0, 2, 2, 0}, {0, 0, 0, 2, 0, 2}, {2, 2, 2, 2, 0, 2},
                                          {0, 2, 2, 0, 0, 2}, {0, 2, 0, 2, 0, 2}, {0, 2, 2, 2, 2, 0}};
static const double dropped_weights_3[6] = {0.7599, 0.6194, 0.6206, 0, 0, 0};
static const double dropped_weights_6[6] = {0, 0.3327, 0.3331, 0.3084, 0.3331, 0};
static const double causal_contexts[6][2] = {{-0.4519, 0.2216},  {-0.5874, 0.0058},  {-0.6300, -0.0632},
                                             {-0.5675, -0.0843}, {-0.5526, -0.0981}, {-0.5299, -0.1081}};

/* The gradients of its W_query and W_key, by out.sum().backward() in PyTorch; and, seed 789, of W_query with
 * the mask after the softmax. */
static const double causal_gradients[2][6] = {
    {0.0626881, 0.0959587, 0.0661744, 0.0305682, 0.0455934, 0.0322795},
    {0.0155005, 0.0714656, -0.0203111, 0.0033547, 0.0112174, -0.0027596}};
static const double renormalise_gradient[6] = {0.0072129, 0.0162444, 0.0102294,
                                               0.0207938, 0.0283172, 0.0176843};

/* ---- The story. ---- */

/* row (T): the scores of query t of a finished run, from its queries and keys. */
static void scores_of_query(float *row, const StoryRun *run, int t, float scale)
{
    const float *queries = run->t.workspace[0], *keys = run->t.workspace[1];
    int width = run->shape.embed_out;
    for (int t2 = 0; t2 < run->shape.tokens; t2++) {
        row[t2] = 0;
        for (int c = 0; c < width; c++)
            row[t2] += scale * queries[t * width + c] * keys[t2 * width + c];
    }
}

/* values (36): dropped as nn.Dropout(0.5) drops them after torch.manual_seed(123). */
static void drop_half(float *values)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    apply_dropout(&stream, values, 36, 0.5);
}

static void story(Story *story)
{
    float row[6], matrix[36];

    story_heading(story, "Mask after the softmax: kernel renormalise, seed 789");
    const StoryRun *renormalise = story_run(story, "renormalise", "--seed 789");
    scores_of_query(row, renormalise, 0, renormalise->shape.scale);
    softmax_row(row, 6);
    story_expect(story, "weights of token 1 over all six tokens, five of them in its future", row,
                 softmax_row_1, 1, 6);
    story_expect(story, "the future struck out, the rest divided by its sum", renormalise->t.weights,
                 masked_weights[0], 6, 6);

    story_heading(story, "Mask before the softmax: kernel minus-inf, seed 789");
    const StoryRun *minus_inf = story_run(story, "minus-inf", "--seed 789");
    scores_of_query(row, minus_inf, 1, 1);
    mask_row(row, 6, 2);
    story_expect(story, "scores of token 2, masked, not yet scaled", row, masked_scores_2, 1, 6);
    story_expect(story, "weights: the same by one step less", minus_inf->t.weights, masked_weights[0], 6, 6);

    story_heading(story, "Where the two part");
    story_say(story,
              "Three scores, 0, 1 and 110; the third is in the future. The softmax over all three gives it "
              "everything, and nothing is left to renormalise.");
    float after[3] = {0, 1, 110}, before[3] = {0, 1, 110};
    softmax_row(after, 3);
    renormalise_row(after, 3, 2);
    mask_row(before, 3, 2);
    softmax_row(before, 3);
    story_claim(story, isnan(after[0]) && isnan(after[1]), "mask after the softmax: %.4f %.4f %.4f",
                fabsf(after[0]), fabsf(after[1]), after[2]);
    story_claim(story, fabsf(before[0] - 0.26894f) < 1e-4f && before[2] == 0,
                "mask before the softmax: %.4f %.4f %.4f", before[0], before[1], before[2]);

    story_heading(story, "Dropout(0.5), seed 123");
    for (int i = 0; i < 36; i++)
        matrix[i] = 1;
    drop_half(matrix);
    story_expect(story, "of ones: half go, the others double", matrix, dropped_ones[0], 6, 6);
    memcpy(matrix, minus_inf->t.weights, sizeof matrix);
    drop_half(matrix);
    story_expect(story, "of the masked weights: row 3", matrix + 12, dropped_weights_3, 1, 6);
    story_expect(story, "of the masked weights: row 6", matrix + 30, dropped_weights_6, 1, 6);

    story_heading(story, "The module: kernel causal, seed 123, the sentence twice as a batch of 2");
    const StoryRun *causal = story_run(story, "causal", "--seed 123");
    AttentionShape two = causal->shape;
    two.batch = 2;
    float x[36], out[24], weights[72], queries[24], keys[24], values[24];
    memcpy(x, sentence, sizeof sentence);
    memcpy(x + 18, sentence, sizeof sentence);
    causal_attention(out, weights, NULL, queries, keys, values, x, causal->t.parameter[0],
                     causal->t.parameter[1], causal->t.parameter[2], &two);
    story_expect(story, "context vectors of the first entry", out, causal_contexts[0], 6, 2);
    story_expect(story, "and of the second", out + 12, causal_contexts[0], 6, 2);

    story_heading(story, "The gradient; the loss is the sum of out");
    const StoryRun *trained = story_run(story, "causal", "--seed 123 --pass both");
    story_beside(story, "causal, seed 123: W_query", "PyTorch's", trained->t.d_parameter[0],
                 causal_gradients[0], 2, 3);
    story_beside(story, "W_key", "PyTorch's", trained->t.d_parameter[1], causal_gradients[1], 2, 3);
    const StoryRun *divided = story_run(story, "renormalise", "--seed 789 --pass both");
    story_beside(story, "renormalise, seed 789: W_query, PyTorch going back through both divisions",
                 "PyTorch's", divided->t.d_parameter[0], renormalise_gradient, 2, 3);

    story_time(story, "renormalise minus-inf causal", "--batch 1 --tokens 1024 --embed 768");
}

DECLARE_DEVICE_KERNELS(causal_attention);

const Chapter chapter = {.number = 2,
                         .title = "Causal attention",
                         .folder = "02_causal_attention",
                         .kernels = kernels,
                         .device_kernels = {DEVICE_KERNELS(causal_attention, "renormalise minus-inf causal")},
                         .story = story};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
