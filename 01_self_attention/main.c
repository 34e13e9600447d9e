#include "chapter.h"
#include "self_attention.h"

#include <math.h>

/* ---- The kernels. ---- */

static void forward_dot_product(const Tensors *t, const AttentionShape *s)
{
    attention_dot_product(t->out, t->weights, t->x, s);
}

static void forward_v1(const Tensors *t, const AttentionShape *s)
{
    self_attention_v1(t->out, t->weights, t->workspace[0], t->workspace[1], t->workspace[2], t->x,
                      t->parameter[0], t->parameter[1], t->parameter[2], s);
}

static void forward_v2(const Tensors *t, const AttentionShape *s)
{
    self_attention_v2(t->out, t->weights, t->workspace[0], t->workspace[1], t->workspace[2], t->x,
                      t->parameter[0], t->parameter[1], t->parameter[2], s);
}

static void forward_sdpa(const Tensors *t, const AttentionShape *s)
{
    attention_sdpa(t->out, t->lse, t->weights, t->workspace[0], t->q, t->k, t->v, s);
}

static void backward_dot_product(const Tensors *t, const AttentionShape *s)
{
    attention_dot_product_backward(t->dx, t->backward_workspace[0], t->dout, t->weights, t->x, s);
}

static void backward_v1(const Tensors *t, const AttentionShape *s)
{
    float *const *work = t->backward_workspace;
    self_attention_v1_backward(t->dx, t->d_parameter[0], t->d_parameter[1], t->d_parameter[2], work[0],
                               work[1], work[2], work[3], t->dout, t->weights, t->workspace[0],
                               t->workspace[1], t->workspace[2], t->x, t->parameter[0], t->parameter[1],
                               t->parameter[2], s);
}

static void backward_v2(const Tensors *t, const AttentionShape *s)
{
    float *const *work = t->backward_workspace;
    self_attention_v2_backward(t->dx, t->d_parameter[0], t->d_parameter[1], t->d_parameter[2], work[0],
                               work[1], work[2], work[3], t->dout, t->weights, t->workspace[0],
                               t->workspace[1], t->workspace[2], t->x, t->parameter[0], t->parameter[1],
                               t->parameter[2], s);
}

static void backward_sdpa(const Tensors *t, const AttentionShape *s)
{
    attention_sdpa_backward(t->dq, t->dk, t->dv, t->dbias, t->backward_workspace[0], t->dout, t->weights,
                            t->workspace[0], t->q, t->k, t->v, s);
}

/* ---- Their memory. ---- */

static int queries_keys_values(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = (size_t)s->batch * s->tokens * s->embed_out;
    return 3;
}

static int their_gradients_and_the_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    queries_keys_values(s, floats);
    floats[3] = weights_count(s);
    return 4;
}

static int gradient_of_the_scores(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = weights_count(s);
    return 1;
}

/* The weights before dropout; where there is none they are the weights themselves. */
static int softmax_before_dropout(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    if (s->dropout == 0)
        return 0;
    floats[0] = weights_count(s);
    return 1;
}

static const char *needs_one_head(const AttentionShape *s)
{
    return s->heads == 1 ? NULL : "takes one head: say --heads 1 (chapter 3 has more)";
}

static const char *needs_one_head_as_wide_as_x(const AttentionShape *s)
{
    if (s->embed_out != s->embed)
        return "has no matrix to change the width: --embed-out must equal --embed";
    return needs_one_head(s);
}

static void parameters_v1(Parameters *p, const AttentionShape *s)
{
    add_rand(p, "W_query", s->embed, s->embed_out);
    add_rand(p, "W_key", s->embed, s->embed_out);
    add_rand(p, "W_value", s->embed, s->embed_out);
}

static void parameters_v2(Parameters *p, const AttentionShape *s)
{
    add_linear(p, "W_query", s->embed_out, s->embed, false);
    add_linear(p, "W_key", s->embed_out, s->embed, false);
    add_linear(p, "W_value", s->embed_out, s->embed, false);
}

/* What the oracle is told of each module. */
static void describe_dot_product(OracleModule *module, OracleLinear *query, OracleLinear *key,
                                 OracleLinear *value, const Tensors *t, const AttentionShape *s)
{
    (void)query, (void)key, (void)value, (void)t, (void)s;
    module->query = module->key = module->value = NULL;
}

static void describe_v1(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                        const Tensors *t, const AttentionShape *s)
{
    (void)module;
    *query = (OracleLinear){.weight = t->parameter[0], .stride_out = 1, .stride_in = s->embed_out};
    *key = (OracleLinear){.weight = t->parameter[1], .stride_out = 1, .stride_in = s->embed_out};
    *value = (OracleLinear){.weight = t->parameter[2], .stride_out = 1, .stride_in = s->embed_out};
}

static void describe_v2(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                        const Tensors *t, const AttentionShape *s)
{
    (void)module;
    *query = oracle_linear(t->parameter[0], NULL, s->embed);
    *key = oracle_linear(t->parameter[1], NULL, s->embed);
    *value = oracle_linear(t->parameter[2], NULL, s->embed);
}

static const Defaults sentence_alone = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 3, .heads = 1, .sentence = true};
static const Defaults sentence_to_two = {
    .batch = 1, .tokens = 6, .embed = 3, .embed_out = 2, .heads = 1, .sentence = true};
static const Defaults sdpa_notebook = {
    .batch = 2, .heads = 1, .tokens = 3, .head_size = 8, .rng = STREAM_CUDA, .seed = 42};

static const Kernel kernels[] = {
    {.name = "dot-product",
     .what = "attention without weights to learn, as plain loops",
     .takes = TAKES_X,
     .forward = forward_dot_product,
     .backward = backward_dot_product,
     .backward_workspace = gradient_of_the_scores,
     .weights = WEIGHTS_PER_HEAD,
     .defaults = &sentence_alone,
     .refuses = needs_one_head_as_wide_as_x,
     .unscaled = true,
     .describe = describe_dot_product},
    {.name = "v1",
     .what = "SelfAttention_v1: x @ W for queries, keys and values",
     .takes = TAKES_X,
     .forward = forward_v1,
     .backward = backward_v1,
     .backward_workspace = their_gradients_and_the_scores,
     .workspace = queries_keys_values,
     .weights = WEIGHTS_PER_HEAD,
     .defaults = &sentence_to_two,
     .refuses = needs_one_head,
     .parameters = parameters_v1,
     .describe = describe_v1},
    {.name = "v2",
     .what = "SelfAttention_v2: nn.Linear, x @ W^T",
     .takes = TAKES_X,
     .forward = forward_v2,
     .backward = backward_v2,
     .backward_workspace = their_gradients_and_the_scores,
     .workspace = queries_keys_values,
     .weights = WEIGHTS_PER_HEAD,
     .defaults = &sentence_to_two,
     .refuses = needs_one_head,
     .parameters = parameters_v2,
     .describe = describe_v2},
    {.name = "sdpa",
     .what = "scaled dot-product attention: product, softmax, product",
     .takes = TAKES_QKV,
     .forward = forward_sdpa,
     .backward = backward_sdpa,
     .workspace = softmax_before_dropout,
     .backward_workspace = gradient_of_the_scores,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .defaults = &sdpa_notebook},
    {0},
};

/* ---- The published numbers: LLMs-from-scratch, chapter 3 (ch03.ipynb), and the SDPA notebook. ---- */

static const double token_2_scores[6] = {0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865};
static const double token_2_weights[6] = {0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581};
static const double token_2_context[3] = {0.4419, 0.6515, 0.5683};
static const double all_contexts[6][3] = {{0.4421, 0.5931, 0.5790}, {0.4419, 0.6515, 0.5683},
                                          {0.4431, 0.6496, 0.5671}, {0.4304, 0.6298, 0.5510},
                                          {0.4671, 0.5910, 0.5266}, {0.4177, 0.6503, 0.5645}};
static const double v1_query_2[2] = {0.4306, 1.4551};
static const double v1_scores_2[6] = {1.2705, 1.8524, 1.8111, 1.0795, 0.5577, 1.5440};
static const double v1_weights_2[6] = {0.1500, 0.2264, 0.2199, 0.1311, 0.0906, 0.1820};
static const double v1_contexts[6][2] = {{0.2996, 0.8053}, {0.3061, 0.8210}, {0.3058, 0.8203},
                                         {0.2948, 0.7939}, {0.2927, 0.7891}, {0.2990, 0.8040}};
static const double v2_contexts[6][2] = {{-0.0739, 0.0713}, {-0.0748, 0.0703}, {-0.0749, 0.0702},
                                         {-0.0760, 0.0685}, {-0.0763, 0.0679}, {-0.0754, 0.0693}};
static const double sdpa_out[6][8] = {{-1.3321, -0.3489, 0.3015, -0.3912, 0.9867, 0.3137, -0.0691, -1.2593},
                                      {-1.0882, 0.2506, 0.6491, 0.1360, 0.5238, -0.2448, -0.0820, -0.6171},
                                      {-1.0012, 0.3990, 0.6441, -0.0277, 0.5325, -0.2564, -0.0607, -0.6404},
                                      {0.6091, 0.0708, 0.6188, 0.3252, -0.1598, 0.4197, -0.2335, 0.0630},
                                      {0.5285, 0.3890, -0.2649, 0.3706, -0.3839, 0.1963, -0.6242, 0.2312},
                                      {0.4048, 0.0762, 0.3777, 0.4689, -0.2978, 0.2754, -0.6429, 0.1037}};

/* The gradients of v2's matrices, seed 789, by out.sum().backward() in PyTorch. */
static const double v2_gradients[3][6] = {
    {0.0531672, 0.0713544, 0.0648202, 0.0741572, 0.0998542, 0.0909605},
    {0.1465164, -0.1053103, -0.1115718, -0.0691991, 0.0497172, 0.0526351},
    {2.6388035, 3.4082525, 3.2399576, 2.6388035, 3.4082525, 3.2399576}};

/* ---- The story. ---- */

/* out (6,2): v1 on the sentence, with the three matrices of v2, each transposed. */
static void v1_with_the_matrices_of_v2(float out[12], const StoryRun *v2)
{
    float w[3][6], weights[36], queries[12], keys[12], values[12];
    for (int m = 0; m < 3; m++)
        for (int i = 0; i < 3; i++)
            for (int o = 0; o < 2; o++)
                w[m][i * 2 + o] = v2->t.parameter[m][o * 3 + i];
    self_attention_v1(out, weights, queries, keys, values, v2->t.x, w[0], w[1], w[2], &v2->shape);
}

/* The loss, the sum of out, of v2 on the sentence, one number of W_query moved by `step`. */
static double loss_of_v2(const StoryRun *v2, int number, float step)
{
    float w_query[6], out[12], weights[36], queries[12], keys[12], values[12];
    for (int i = 0; i < 6; i++)
        w_query[i] = v2->t.parameter[0][i] + (i == number ? step : 0);
    self_attention_v2(out, weights, queries, keys, values, v2->t.x, w_query, v2->t.parameter[1],
                      v2->t.parameter[2], &v2->shape);
    double loss = 0;
    for (int i = 0; i < 12; i++)
        loss += out[i];
    return loss;
}

static void story_of_the_gradient(Story *story)
{
    static const char *const names[3] = {"W_query", "W_key", "W_value"};
    story_heading(story, "The gradient: kernel v2, seed 789; the loss is the sum of out");
    const StoryRun *v2 = story_run(story, "v2", "--seed 789 --pass both");
    const float h = 1 / 32.0f;
    double up = loss_of_v2(v2, 4, h), down = loss_of_v2(v2, 4, -h), slope = (up - down) / (2 * h);
    story_claim(story, fabs(slope - v2->t.d_parameter[0][4]) <= 1e-4,
                "W_query[1][1] 1/32 up, then down: the loss is %.6f, %.6f; slope %.4f, gradient %.4f", up,
                down, slope, v2->t.d_parameter[0][4]);
    for (int i = 0; i < 3; i++)
        story_beside(story, names[i], "PyTorch's", v2->t.d_parameter[i], v2_gradients[i], 2, 3);
}

/* The sum of a row's gradients of scores, all taken positive, averaged: what a loss on random numbers would
 * teach. */
static double mean_score_gradient(const StoryRun *run)
{
    size_t rows = run->shape.tokens, n = run->shape.key_tokens;
    double sum = 0;
    for (size_t i = 0; i < rows * n; i++)
        sum += fabsf(run->t.backward_workspace[0][i]);
    return sum / (double)rows;
}

/* The largest weight of each row, averaged: 1/TK where all keys count alike, 1 where one key takes all. */
static double mean_of_largest_weight(const StoryRun *run)
{
    int rows = run->shape.tokens, n = run->shape.key_tokens;
    double sum = 0;
    for (int t = 0; t < rows; t++) {
        float largest = 0;
        for (int t2 = 0; t2 < n; t2++)
            largest = fmaxf(largest, run->t.weights[(size_t)t * n + t2]);
        sum += largest;
    }
    return sum / rows;
}

static void story(Story *story)
{
    story_heading(story, "One token, nothing to learn");
    story_say(story,
              "The sentence \"Your journey starts with one step\" as six vectors of three numbers. Token 2, "
              "\"journey\", is compared with every token by a dot product.");
    float row[6], context[3];
    score_keys(row, sentence[1], sentence[0], 6, 3, 1);
    story_expect(story, "scores of token 2", row, token_2_scores, 1, 6);
    softmax_row(row, 6);
    story_expect(story, "softmax: its weights", row, token_2_weights, 1, 6);
    mix_values(context, row, sentence[0], 6, 3);
    story_expect(story, "the six vectors, mixed with these weights: its context vector", context,
                 token_2_context, 1, 3);

    story_heading(story, "All tokens: kernel dot-product");
    const StoryRun *plain = story_run(story, "dot-product", "");
    story_expect(story, "context vectors", plain->t.out, all_contexts[0], 6, 3);

    story_heading(story, "Matrices to learn: kernel v1, x @ W, seed 123");
    const StoryRun *v1 = story_run(story, "v1", "--seed 123");
    const float *queries = v1->t.workspace[0], *keys = v1->t.workspace[1];
    story_expect(story, "query of token 2", queries + 2, v1_query_2, 1, 2);
    score_keys(row, queries + 2, keys, 6, 2, 1);
    story_expect(story, "scores of token 2, not yet scaled", row, v1_scores_2, 1, 6);
    story_expect(story, "weights of token 2: softmax(scores / sqrt(2))", v1->t.weights + 6, v1_weights_2, 1,
                 6);
    story_expect(story, "context vectors", v1->t.out, v1_contexts[0], 6, 2);

    story_heading(story, "The same with nn.Linear: kernel v2, x @ W^T, seed 789");
    const StoryRun *v2 = story_run(story, "v2", "--seed 789");
    story_expect(story, "context vectors", v2->t.out, v2_contexts[0], 6, 2);
    float out[12];
    v1_with_the_matrices_of_v2(out, v2);
    double difference = furthest_apart(out, v2->t.out, 12);
    story_claim(story, difference <= 1e-6,
                "v1 with the matrices of v2, transposed, gives v2's numbers (largest "
                "difference %.1e)",
                difference);

    story_of_the_gradient(story);

    story_heading(story, "Queries, keys and values from elsewhere: kernel sdpa, seed 42 on a GPU");
    const StoryRun *sdpa = story_run(story, "sdpa", "");
    story_expect(story, "softmax(Q K^T / sqrt(8)) V, two batch entries of three tokens", sdpa->t.out,
                 sdpa_out[0], 6, 8);

    story_heading(story, "Why the scores are divided by sqrt(HS)");
    story_say(
        story,
        "A dot product of HS normal numbers has variance HS. For HS = 1024 scores lie some 32 apart, and "
        "softmax gives nearly all to one key. The largest weight of a row of 64, on average:");
    const char *scores = "--heads 1 --tokens 64 --head-size 1024 --pass both --dout randn";
    const char *raw_scores = "--heads 1 --tokens 64 --head-size 1024 --pass both --dout randn --scale 1";
    const StoryRun *unscaled = story_run(story, "sdpa", raw_scores);
    const StoryRun *scaled = story_run(story, "sdpa", scores);
    story_claim(story, mean_of_largest_weight(unscaled) > 0.9, "not scaled: %.3f",
                mean_of_largest_weight(unscaled));
    story_claim(story, mean_of_largest_weight(scaled) < 0.2, "scaled by 1/sqrt(1024): %.3f",
                mean_of_largest_weight(scaled));
    story_claim(story, mean_score_gradient(unscaled) < 0.15 * mean_score_gradient(scaled),
                "what comes back to a row's scores from a random dout: %.1f not scaled, %.1f scaled",
                mean_score_gradient(unscaled), mean_score_gradient(scaled));

    story_time(story, "dot-product v1 v2", "--batch 1 --tokens 1024 --embed 768");
}

DECLARE_DEVICE_KERNELS(self_attention);

const Chapter chapter = {.number = 1,
                         .title = "Self-attention",
                         .folder = "01_self_attention",
                         .kernels = kernels,
                         .device_kernels = {DEVICE_KERNELS(self_attention, "dot-product v1 v2 sdpa")},
                         .story = story};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
