#include "chapter.h"
#include "compare.h"
#include "memory.h"
#include "online_softmax.h"

#include <math.h>
#include <stdio.h>

/* ---- The kernels. ---- */

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

static void forward_online(const Tensors *t, const AttentionShape *s)
{
    attention_online(t->out, t->lse, t->q, t->k, t->v, s);
}

static void backward_online(const Tensors *t, const AttentionShape *s)
{
    AttentionBackward g = gradients(t);
    attention_online_backward(&g, t->backward_workspace[0], s);
}

static int delta(const AttentionShape *s, size_t floats[MAX_BUFFERS])
{
    floats[0] = lse_count(s);
    return 1;
}

static const Kernel kernels[] = {
    {.name = "materialised",
     .what = "the T x TK matrix in memory, softmax over its rows",
     .takes = TAKES_QKV,
     .forward = forward_materialised,
     .backward = backward_materialised,
     .workspace = softmax_if_dropout,
     .backward_workspace = d_scores,
     .weights = WEIGHTS_PER_HEAD,
     .dropout = DROPOUT_STREAM},
    {.name = "online",
     .what = "one pass over the keys, the sums mended as the maximum grows",
     .takes = TAKES_QKV,
     .forward = forward_online,
     .backward = backward_online,
     .backward_workspace = delta,
     .dropout = DROPOUT_POSITION},
    {0},
};

/* ---- One query of one number, so that scores can be chosen: with q = 1 and scale = 1 a key is its own
 * score. ---- */

enum { KEYS = 4 };
static const float one = 1;
static const float scores[KEYS] = {1, 3, 2, 5}, values[KEYS] = {10, 20, 30, 40};

static AttentionShape one_query(int keys)
{
    return (AttentionShape){
        .batch = 1, .heads = 1, .kv_heads = 1, .tokens = 1, .key_tokens = keys, .head_size = 1, .scale = 1};
}

/* The textbook's softmax, which trusts exp() with any score. */
static float unsafe_softmax_mean(const float *score, const float *value, int n)
{
    float sum = 0, mean = 0;
    for (int i = 0; i < n; i++)
        sum += expf(score[i]);
    for (int i = 0; i < n; i++)
        mean += expf(score[i]) / sum * value[i];
    return mean;
}

/* ---- Split anywhere, merge, and it is the whole again. ---- */

static const char *split_and_merge(void)
{
    enum { HS = 8, TK = 13 };
    static char text[120];
    float q[HS], k[TK * HS], v[TK * HS], whole[HS], left[HS], right[HS];
    AttentionShape s = one_query(TK);
    s.head_size = HS;
    s.mask = (Mask){.kind = MASK_DILATED, .width = 4, .extra = 3}; /* so that some pieces see no key at all */
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    draw_randn(&stream, q, HS);
    draw_randn(&stream, k, TK * HS);
    draw_randn(&stream, v, TK * HS);

    PartialRow all = empty_row(whole, HS);
    add_keys(&all, q, k, v, &s, 0, 0, 0, 0, TK);
    float lse = finish_row(&all, HS);
    for (int cut = 0; cut <= TK; cut++) {
        PartialRow a = empty_row(left, HS), b = empty_row(right, HS);
        add_keys(&a, q, k, v, &s, 0, 0, 0, 0, cut);
        add_keys(&b, q, k, v, &s, 0, 0, 0, cut, TK);
        merge_partials(&a, &b, HS);
        float merged = finish_row(&a, HS);
        bool same = fabsf(merged - lse) <= 1e-6f;
        for (int i = 0; i < HS; i++)
            same = same && fabsf(left[i] - whole[i]) <= 1e-6f;
        if (!same) {
            snprintf(text, sizeof text, "cut at key %d of %d, lse %.7f instead of %.7f", cut, TK, merged,
                     lse);
            return text;
        }
    }
    return NULL;
}

static const ExtraCheck checks[] = {
    {"a row cut at any key and merged is the whole row", split_and_merge},
    {0},
};

/* ---- The story. ---- */

static void tell_one_pass(Story *story)
{
    story_heading(story, "One pass over four keys");
    story_say(story,
              "m is the largest score so far, l the sum of exp(score - m), O the sum of exp(score - m) times "
              "the value. A larger score mends l and O with one factor, exp(m_old - m_new).");
    AttentionShape s = one_query(KEYS);
    float o;
    PartialRow row = empty_row(&o, 1);
    story_say(story, "key  score  value      mend       m         l          O        O / l");
    for (int t2 = 0; t2 < KEYS; t2++) {
        float m_old = row.m;
        add_keys(&row, &one, scores, values, &s, 0, 0, 0, t2, t2 + 1);
        story_say(story, "%d %8g %6g %9.4f %7g %9.4f %10.4f %12.4f", t2, scores[t2], values[t2],
                  expf(m_old - row.m), row.m, row.l, o, o / row.l);
    }
    float lse = finish_row(&row, 1), expected = unsafe_softmax_mean(scores, values, KEYS);
    story_claim(story, fabsf(o - expected) <= 1e-5f,
                "softmax over the whole row gives %.4f, the one pass %.4f", expected, o);
    story_claim(story, fabsf(lse - logf(expf(1) + expf(3) + expf(2) + expf(5))) <= 1e-6f,
                "lse = m + log l = %.4f, the logarithm of the sum of exp(score)", lse);
}

static void tell_merge(Story *story)
{
    story_heading(story, "Two halves, merged");
    AttentionShape s = one_query(KEYS);
    float left, right, nothing;
    PartialRow a = empty_row(&left, 1), b = empty_row(&right, 1), empty = empty_row(&nothing, 1);
    add_keys(&a, &one, scores, values, &s, 0, 0, 0, 0, 2);
    add_keys(&b, &one, scores, values, &s, 0, 0, 0, 2, KEYS);
    story_say(story, "keys 0 and 1:  m %g  l %.4f  O %.4f", a.m, a.l, left);
    story_say(story, "keys 2 and 3:  m %g  l %.4f  O %.4f", b.m, b.l, right);
    merge_partials(&a, &b, 1);
    story_say(story, "merged:        m %g  l %.4f  O %.4f", a.m, a.l, left);
    story_claim(story, split_and_merge() == NULL,
                "a row of 13 keys, cut at every place and merged, is the whole row");
    float before = left;
    merge_partials(&a, &empty, 1);
    story_claim(story, left == before,
                "merging with a row that has seen nothing changes nothing, and is not NaN");
}

static void tell_traps(Story *story)
{
    story_heading(story, "Large scores, and rows with nothing to see");
    const float large[2] = {100, 99}, pair[2] = {1, 2};
    AttentionShape s = one_query(2);
    float out, lse, unsafe = unsafe_softmax_mean(large, pair, 2);
    attention_online(&out, &lse, &one, large, pair, &s);
    story_say(story, "Scores 100 and 99, values 1 and 2. exp(100) is more than a float holds.");
    story_claim(story, isnan(unsafe), "softmax without the maximum: %s", isnan(unsafe) ? "NaN" : "a number?");
    story_claim(story, fabsf(out - (1 + 1 / (1 + expf(1)))) <= 1e-6f, "one pass: %.4f", out);

    const float minus_inf[2] = {-INFINITY, -INFINITY}, very_small[2] = {-1e30f, -1e30f};
    s.bias_stride[3] = 1;
    s.bias = minus_inf;
    attention_online(&out, &lse, &one, large, pair, &s);
    story_claim(story, out == 0 && lse == -INFINITY, "both forbidden by a bias of -inf: out %g, lse %g", out,
                lse);
    s.bias = very_small;
    attention_online(&out, &lse, &one, large, pair, &s);
    story_claim(story, out == 1.5f,
                "both \"forbidden\" by a bias of -1e30: out %g, the plain mean of both values", out);
}

static void tell_kernels(Story *story)
{
    story_heading(story, "The two kernels, held against the oracle in double");
    static const char *const options[] = {
        "--heads 3 --tokens 65 --head-size 40",
        "--heads 3 --tokens 67 --key-tokens 200 --head-size 64 --causal",
        "--heads 2 --tokens 129 --key-tokens 67 --head-size 64 --causal",
        "--batch 2 --heads 2 --tokens 50 --head-size 5 --lengths 50,17 --bias randn",
    };
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        for (const Kernel *kernel = kernels; kernel->name; kernel++) {
            char text[200];
            const StoryRun *run = story_run(story, kernel->name, options[i]);
            comparison_text(text, sizeof text, &run->comparison);
            story_claim(story, run->comparison.passed, "%-12s %s: %s", kernel->name, options[i], text);
        }
}

static void tell_memory(Story *story)
{
    story_heading(story, "Memory beyond inputs and outputs, 12 heads");
    story_say(story, "tokens   materialised   online");
    for (int tokens = 1024; tokens <= 65536; tokens *= 4)
        story_say(story, "%6d   %-12s   none", tokens, bytes_text(4.0 * 12 * tokens * tokens));
}

static void story(Story *story)
{
    tell_one_pass(story);
    tell_merge(story);
    tell_traps(story);
    tell_kernels(story);
    tell_memory(story);
    story_time(story, "materialised online", "--heads 12 --tokens 1024 --head-size 64");
    story_time(story, "materialised online", "--heads 12 --tokens 1024 --head-size 64 --causal");
}

DECLARE_DEVICE_KERNELS(online_softmax);

const Chapter chapter = {
    .number = 6,
    .title = "Online softmax: attention in one pass over the keys",
    .folder = "06_online_softmax",
    .kernels = kernels,
    .device_kernels = {DEVICE_KERNELS(online_softmax, "materialised online split-keys")},
    .checks = checks,
    .story = story,
};

int main(int argc, char **argv)
{
    return chapter_main(argc, argv, &chapter);
}
