#include "chapter.h"
#include "einsum_attention.h"
#include "try_einsum.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* In the order in which the notebook's constructor draws them. It makes the three matrices with randn, and
 * gives them other values only after out_proj has drawn its own. */
enum { OUT_WEIGHT, OUT_BIAS, W_QUERY, W_KEY, W_VALUE };

static void draw_parameters(Parameters *p, const AttentionShape *s)
{
    int C = s->embed, C_out = s->embed_out;
    for (int thrown_away = 0; thrown_away < 3; thrown_away++)
        skip_randn(p, (size_t)C * C_out);
    add_linear(p, "out_proj", C_out, C_out, true);

    /* kaiming_uniform takes the second size of a matrix for its number of inputs. For these it is C_out. */
    add_uniform(p, "W_query", C, C_out, linear_bound(C_out));
    add_uniform(p, "W_key", C, C_out, linear_bound(C_out));
    add_uniform(p, "W_value", C, C_out, linear_bound(C_out));
}

/* q, k, v, context, and with dropout the softmax before it */
static int workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = (size_t)s->batch * s->tokens * s->embed_out;
    floats[4] = weights_count(s);
    return s->dropout > 0 ? 5 : 4;
}

/* The gradients of q, k, v, context, weights, and a part of x's */
static int backward_workspace(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = floats[1] = floats[2] = floats[3] = (size_t)s->batch * s->tokens * s->embed_out;
    floats[4] = weights_count(s);
    floats[5] = (size_t)s->batch * s->tokens * s->embed;
    return 6;
}

static EinsumParameters parameters_in(const Tensors *t)
{
    const float *const *w = t->parameter;
    return (EinsumParameters){w[W_QUERY], w[W_KEY], w[W_VALUE], w[OUT_WEIGHT], w[OUT_BIAS]};
}

static EinsumActivations activations_in(const Tensors *t, const AttentionShape *s)
{
    float *const *w = t->workspace, *softmax = s->dropout > 0 ? w[4] : t->weights;
    return (EinsumActivations){w[0], w[1], w[2], softmax, t->weights, w[3]};
}

static void forward_with(EinsumFunction *einsum_with, const Tensors *t, const AttentionShape *s)
{
    EinsumParameters p = parameters_in(t);
    EinsumActivations a = activations_in(t, s);
    einsum_attention(t->out, &a, t->x, &p, einsum_with, s);
}

static void forward_einsum(const Tensors *t, const AttentionShape *s)
{
    forward_with(einsum, t, s);
}

static void forward_einsum_loops(const Tensors *t, const AttentionShape *s)
{
    forward_with(einsum_loops, t, s);
}

static void backward_with(EinsumFunction *einsum_with, const Tensors *t, const AttentionShape *s)
{
    EinsumParameters p = parameters_in(t);
    EinsumActivations a = activations_in(t, s);
    float *const *d = t->d_parameter, *const *w = t->backward_workspace;
    EinsumParameterGradients dp = {d[W_QUERY], d[W_KEY], d[W_VALUE], d[OUT_WEIGHT], d[OUT_BIAS]};
    EinsumActivationGradients da = {w[0], w[1], w[2], w[3], w[4], w[5]};
    einsum_attention_backward(t->dx, &dp, &da, t->dout, &a, t->x, &p, einsum_with, s);
}

static void backward_einsum(const Tensors *t, const AttentionShape *s)
{
    backward_with(einsum, t, s);
}

static void backward_einsum_loops(const Tensors *t, const AttentionShape *s)
{
    backward_with(einsum_loops, t, s);
}

/* Head h's columns of a matrix (C,C_out) that multiplies from the right. */
static OracleLinear columns_of_head(const float *W, int h, const AttentionShape *s)
{
    return (OracleLinear){.weight = W + (size_t)h * s->head_size, .stride_out = 1, .stride_in = s->embed_out};
}

static void describe(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                     const Tensors *t, const AttentionShape *s)
{
    const float *const *w = t->parameter;
    for (int h = 0; h < s->heads; h++) {
        query[h] = columns_of_head(w[W_QUERY], h, s);
        key[h] = columns_of_head(w[W_KEY], h, s);
        value[h] = columns_of_head(w[W_VALUE], h, s);
    }
    module->outputs = 1;
    module->output[0] = oracle_linear(w[OUT_WEIGHT], w[OUT_BIAS], s->embed_out);
}

static const Kernel kernels[] = {
    {.name = "einsum",
     .what = "implementation 4: every product an einsum, run as matrix products",
     .takes = TAKES_X,
     .forward = forward_einsum,
     .backward = backward_einsum,
     .workspace = workspace,
     .backward_workspace = backward_workspace,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_parameters,
     .describe = describe},
    {.name = "einsum-loops",
     .what = "the same, run as plain loops",
     .takes = TAKES_X,
     .forward = forward_einsum_loops,
     .backward = backward_einsum_loops,
     .workspace = workspace,
     .backward_workspace = backward_workspace,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM,
     .own_mask = OWN_MASK_CAUSAL,
     .parameters = draw_parameters,
     .describe = describe},
    {.name = NULL},
};

/* ---- The story ---- */

static void tell_letters(Story *story)
{
    static const char *const cases[][3] = {
        {"bnd,do->bno", "8,1024,768", "768,768"},
        {"bhnd,bhmd->bhnm", "8,12,1024,64", "8,12,1024,64"},
        {"bhnm,bhmd->bhnd", "8,12,1024,1024", "8,12,1024,64"},
        {"bno,po->bnp", "8,1024,768", "768,768"},
        {"bhnd,hdo->bno", "8,12,1024,64", "12,64,768"},
        {"i,j->ij", "768", "768"},
        {"bnd,bnd->bn", "8,1024,768", "8,1024,768"},
        {"ii,ij->ij", "768,768", "768,768"},
        {"nm,d->nd", "1024,1024", "64"},
    };
    story_heading(story, "One letter, one loop");
    story_say(
        story,
        "The module's four products, then others, at the notebook's sizes. A letter in both operands and the "
        "result is a batch letter; in the first and the result a row, in the second and the result a column; "
        "in both but not in the result it is summed over.");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        View out, a, b;
        EinsumPlan plan;
        char text[200];
        const char *error = einsum_views(&out, &a, &b, cases[i][0], cases[i][1], cases[i][2]);
        if (!error && !einsum_plan(&plan, cases[i][0], &out, &a, &b))
            describe_einsum(text, sizeof text, cases[i][0], &plan);
        story_say(story, "%s", error ? error : text);
    }
}

static void tell_refusals(Story *story)
{
    static const char *const cases[][3] = {
        {"bnd,do->bnq", "8,1024,768", "768,768"},   {"bnd,do->bnn", "8,1024,768", "768,768"},
        {"bnd;do->bno", "8,1024,768", "768,768"},   {"bnd,do", "8,1024,768", "768,768"},
        {"...d,do->...o", "8,1024,768", "768,768"}, {"bhnd,bhmd->bhnm", "8,1024,12,64", "8,12,1024,64"},
        {"bnd,do->bno", "8,1024,768", "1024,768"},
    };
    story_heading(story, "What is refused, and where");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        View out, a, b;
        const char *error = einsum_views(&out, &a, &b, cases[i][0], cases[i][1], cases[i][2]);
        story_say(story, "%s", error ? error : "taken!");
    }
}

/* The module's four products again, each with the gradients of its two operands. */
static void tell_gradients(Story *story)
{
    static const char *const cases[][3] = {
        {"bno,po->bnp", "8,1024,768", "768,768"},
        {"bhnm,bhmd->bhnd", "8,12,1024,1024", "8,12,1024,64"},
        {"bhnd,bhmd->bhnm", "8,12,1024,64", "8,12,1024,64"},
        {"bnd,do->bno", "8,1024,768", "768,768"},
        {"ii,ij->ij", "768,768", "768,768"},
        {"ij,jk->k", "768,768", "768,768"},
    };
    story_heading(story, "The gradient of an einsum is an einsum");
    story_say(story,
              "Of \"A,B->C\" it is \"C,B->A\" for the first operand and \"C,A->B\" for the second. The "
              "module's products from last to first, then two whose first operand is refused: what "
              "comes twice in an operand would come twice in a result, and what no other tensor has "
              "is not there to be read.");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        View out, a, b;
        char text[400];
        story_say(story, "The gradients of %s:", cases[i][0]);
        if (einsum_views(&out, &a, &b, cases[i][0], cases[i][1], cases[i][2]))
            continue;
        for (int operand = EINSUM_A; operand <= EINSUM_B; operand++) {
            describe_gradient(text, sizeof text, cases[i][0], operand, &out, &a, &b);
            story_say(story, "%s", text);
        }
    }
}

static double norm(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    return sqrt(sum);
}

/* reference/notebook_modules.tsv */
static void tell_notebook(Story *story)
{
    static const int places[6][3] = {{0, 0, 0},     {0, 1, 1},     {1, 511, 100},
                                     {3, 512, 383}, {5, 700, 640}, {7, 1023, 767}};
    static const double values[6] = {-0.1338991, 0.4851589, 0.01038295, -0.01309081, 0.04704844, 0.01287574};
    static const double norms[5] = {15.9896458, 0.578132658, 16.010434, 16.0034212, 16.0088755};
    const double norm_out = 91.8848775;

    story_heading(story, "Implementation 4 of the notebook, 8 x 1024 x 768, 12 heads, seed 123");
    story_say(story, "PyTorch's values were computed by running its module with the same seed: each "
                     "parameter's norm, in the "
                     "order they are drawn, then six numbers of the result and the norm of all 6291456.");
    const StoryRun *run = story_run(story, "einsum", "--pass both");
    const Parameters *p = run->parameters;
    for (int i = 0; i < p->count; i++) {
        double ours = norm(p->list[i].data, p->list[i].size[0] * p->list[i].size[1]);
        story_claim(story, fabs(ours - norms[i]) <= 1e-6 * norms[i], "%-15s norm %10.6f, PyTorch's %10.6f",
                    p->list[i].name, ours, norms[i]);
    }
    float ours[6];
    for (int i = 0; i < 6; i++)
        ours[i] = run->t.out[((size_t)places[i][0] * 1024 + places[i][1]) * 768 + places[i][2]];
    story_beside(story, "out[0,0,0] [0,1,1] [1,511,100] [3,512,383] [5,700,640] [7,1023,767]", "PyTorch's",
                 ours, values, 1, 6);
    double norm_ours = norm(run->t.out, (size_t)8 * 1024 * 768);
    story_claim(story, fabs(norm_ours - norm_out) <= 1e-6 * norm_out,
                "out             norm %10.6f, PyTorch's %10.6f", norm_ours, norm_out);

    /* A gradient is a sum of 8192 rows that nearly cancel: five figures. */
    static const double gradient_norms[5] = {55431.862, 227023.363, 1228.63548, 1445.48176, 58600.7955};
    const double norm_dx = 1182.66795;
    story_say(story, "Then out.sum().backward():");
    for (int i = 0; i < p->count; i++) {
        double ours_d = norm(p->list[i].gradient, p->list[i].size[0] * p->list[i].size[1]);
        story_claim(story, fabs(ours_d - gradient_norms[i]) <= 1e-5 * gradient_norms[i],
                    "d_%-15s norm %11.4f, PyTorch's %11.4f", p->list[i].name, ours_d, gradient_norms[i]);
    }
    double ours_dx = norm(run->t.dx, (size_t)8 * 1024 * 768);
    story_claim(story, fabs(ours_dx - norm_dx) <= 1e-5 * norm_dx,
                "dx                norm %11.4f, PyTorch's %11.4f", ours_dx, norm_dx);
}

/* The notebook once made its matrices (d_out,d_in) and read them as (d_in,d_out). */
static void tell_hidden_mistake(Story *story)
{
    View out, a, b;
    story_heading(story, "A mistake that a square matrix hides");
    story_say(story, "The notebook once made W_query as (d_out,d_in) and wrote \"bnd,di->bni\", which reads "
                     "it as (d_in,d_out). "
                     "With 768 and 768 nothing was wrong but the meaning. With d_in 768 and d_out 1536:");
    const char *error = einsum_views(&out, &a, &b, "bnd,di->bni", "8,1024,768", "768,768");
    story_claim(story, error == NULL, "W (768,768): taken");
    error = einsum_views(&out, &a, &b, "bnd,di->bni", "8,1024,768", "1536,768");
    story_claim(story, error != NULL, "W (1536,768): %s", error ? error : "taken");
    error = einsum_views(&out, &a, &b, "bnd,di->bni", "8,1024,768", "768,1536");
    story_claim(story, error == NULL, "W (768,1536), as it is made today: taken");
}

static void story(Story *story)
{
    tell_letters(story);
    tell_refusals(story);
    tell_gradients(story);
    tell_notebook(story);
    tell_hidden_mistake(story);
    story_time(story, "einsum-loops einsum", "--batch 1 --tokens 512");
    story_say(story, "\nThe backward pass alone:");
    story_time(story, "einsum-loops einsum", "--batch 1 --tokens 512 --pass backward");
}

static const ChapterMode modes[] = {
    {"einsum", "SPECIFICATION SIZES SIZES: tries any einsum, as ./run einsum \"ij,jk->ik\" 2,3 3,4",
     try_einsum},
    {0}};

DECLARE_DEVICE_KERNELS(einsum_attention);

const Chapter chapter = {
    .number = 5,
    .title = "Attention in einsum",
    .folder = "05_einsum_style",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(einsum_attention, "einsum einsum-loops")},
    .story = story,
    .modes = modes,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
