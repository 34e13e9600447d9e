#include "oracle.h"
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* clang-format off */
/* PyTorch's values, in double, from inputs that are sin(first), sin(first + 1), .. rounded to float. Made with PyTorch
 * 2.15 by running these lines:

import torch, torch.nn.functional as F
def t(first, *size):
    n = torch.Size(size).numel()
    return torch.sin(torch.arange(first, first + n, dtype=torch.float64)).float().double().view(size)
def qkv(nh, nkv, T, TK): return t(0, 1, nh, T, 4), t(100, 1, nkv, TK, 4), t(200, 1, nkv, TK, 4)
def show(name, x): print(f"static const double {name}[] = {{" + ", ".join(f"{v:.9f}" for v in x.flatten().tolist()) + "};")
q, k, v = qkv(2, 2, 3, 3)
show("causal", F.scaled_dot_product_attention(q, k, v, is_causal=True))
q, k, v = qkv(1, 1, 2, 5)
show("bottom_right", F.scaled_dot_product_attention(q, k, v, torch.ones(2, 5).tril(3).bool()))
q, k, v = qkv(2, 2, 3, 4)
bias = 2 * t(300, 1, 1, 3, 4); bias[..., 1, 2] = -torch.inf
show("biased", F.scaled_dot_product_attention(q, k, v, bias))
show("biased_lse", torch.logsumexp(q @ k.mT / 2 + bias, -1))
q, k, v = qkv(1, 1, 5, 3)
show("empty_rows", F.scaled_dot_product_attention(q, k, v, torch.ones(5, 3).tril(-2).bool()))
q, k, v = qkv(4, 2, 2, 3)
show("grouped", F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
# 4 heads of 4 over 2 key/value heads, x (2,3,5), rotary embedding with theta 100, two output projections
x, wq, wk, wv, bq = t(0, 2, 3, 5), t(400, 16, 5), t(500, 8, 5), t(600, 8, 5), t(700, 16)
wo, bo, wo2 = t(800, 16, 16) / 4, t(1100, 16), t(1200, 16, 16) / 4
angle = torch.arange(3.0).double()[:, None] * 100.0 ** (-torch.arange(2).double() / 2)
cos, sin = torch.cos(angle).repeat(1, 2), torch.sin(angle).repeat(1, 2)
def rope(x): return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin
def heads(x, n): return x.view(2, 3, n, 4).transpose(1, 2)
q, k, v = rope(heads(F.linear(x, wq, bq), 4)), rope(heads(F.linear(x, wk), 2)), heads(F.linear(x, wv), 2)
k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 3, 16)
show("module_out", F.linear(F.linear(out, wo, bo), wo2))
scores = (q @ k.mT / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
show("module_weights", scores.softmax(-1).mean(1))
 */
static const double causal[] = {-0.873297274, -0.061890252, 0.806418419, 0.933309674, -0.152625645,
    -0.499491227, -0.387126870, 0.081160142, 0.363752591, 0.557057984, 0.238206829, -0.299650591,
    -0.998347104, -0.587770641, 0.363199443, 0.980245650, 0.129100884, -0.348435581, -0.505621976,
    -0.197941843, 0.123043202, 0.433540892, 0.345443071, -0.060253497};
static const double bottom_right[] = {-0.440910741, -0.006703509, 0.433666910, 0.475325961, -0.174689457,
    -0.388679660, -0.245319571, 0.123586205};
static const double biased[] = {-0.648974090, -0.250591158, 0.378184130, 0.659258684, -0.642209189,
    -0.243559820, 0.379017349, 0.653127691, 0.454264818, 0.570216842, 0.161914121, -0.395251697,
    -0.077340920, -0.352902451, -0.304007095, 0.024390969, 0.685095063, -0.169143052, -0.867871822,
    -0.768683230, 0.130660656, 0.594573750, 0.511838463, -0.041478734};
static const double biased_lse[] = {2.627997282, 1.725675463, 3.075272749, 1.986762636, 2.052527159,
    2.969604442};
static const double empty_rows[] = {0.000000000, 0.000000000, 0.000000000, 0.000000000, 0.000000000,
    0.000000000, 0.000000000, 0.000000000, -0.873297274, -0.061890252, 0.806418419, 0.933309674,
    -0.650808378, -0.196988338, 0.437941900, 0.670230345, 0.072554164, -0.313002175, -0.410785757,
    -0.130894808};
static const double grouped[] = {-0.224149529, 0.219246616, 0.461068447, 0.278986054, -0.074550614,
    -0.346152716, -0.299503601, 0.022507739, 0.363752591, 0.557057984, 0.238206829, -0.299650591,
    -0.428027558, 0.014047364, 0.443207225, 0.464884383, 0.123479937, -0.177969187, -0.315794261,
    -0.163279533, 0.123043202, 0.433540892, 0.345443071, -0.060253497, -0.620102864, -0.311583208,
    0.283404612, 0.617831555, 0.326916160, -0.066587269, -0.398870671, -0.364434203};
static const double module_out[] = {1.747345541, -1.938780892, 1.966038193, -1.826809398, 1.532884430,
    -1.109153224, 0.591497802, -0.023753704, -0.546001866, 1.069521437, -1.502472828, 1.808193251,
    -1.960793994, 1.947352651, -1.769007505, 1.440860906, 1.813017222, -1.977710608, 1.974929280,
    -1.804908994, 1.482047055, -1.033683849, 0.497787266, 0.080262515, -0.651515533, 1.167597560,
    -1.584806233, 1.867811831, -1.992649217, 1.948746970, -1.739822850, 1.383568653, 1.778188739,
    -1.905853223, 1.872128081, -1.679869160, 1.345357206, -0.896918969, 0.372528740, 0.183407632,
    -0.723812855, 1.202924854, -1.580171920, 1.823608413, -1.912619824, 1.839668602, -1.610932327,
    1.245780594, 1.661321847, -1.880510185, 1.940454981, -1.836080021, 1.576223893, -1.182891478,
    0.689390598, -0.137511415, -0.426012408, 0.953461042, -1.400169593, 1.728310361, -1.910095970,
    1.930132674, -1.786723772, 1.492013203, 1.601140661, -1.835446684, 1.914325257, -1.831096705,
    1.592809023, -1.219640591, 0.743191727, -0.203808653, -0.352833216, 0.879596769, -1.331875127,
    1.671368983, -1.869329499, 1.908993273, -1.787001537, 1.513684627, 1.793648630, -1.949155069,
    1.939604957, -1.765807137, 1.442478893, -0.997000035, 0.467094220, 0.102365660, -0.663157080,
    1.167791682, -1.573536482, 1.846032564, -1.962204702, 1.912215291, -1.700297530, 1.344396751};
static const double module_weights[] = {1.000000000, 0.000000000, 0.000000000, 0.411128916, 0.588871084,
    0.000000000, 0.524445616, 0.000390534, 0.475163850, 1.000000000, 0.000000000, 0.000000000, 0.251197930,
    0.748802070, 0.000000000, 0.584017262, 0.037688588, 0.378294149};
/* clang-format on */

enum { ROOM = 400 };

/* sin(first), sin(first + 1), .. */
static void sines(float *out, int first, int count)
{
    for (int i = 0; i < count; i++)
        out[i] = (float)sin(first + i);
}

static void assert_near(const double *ours, const double *expected, size_t count, const char *what)
{
    for (size_t i = 0; i < count; i++)
        cr_assert(ours[i] == expected[i] || fabs(ours[i] - expected[i]) <= 2e-9,
                  "%s[%zu] is %.12g, not %.12g", what, i, ours[i], expected[i]);
}

/* The inputs that the PyTorch values above were made from. */
typedef struct {
    AttentionShape shape;
    float q[ROOM], k[ROOM], v[ROOM];
    double out[ROOM], lse[ROOM], weights[ROOM];
} Case;

static Case sine_case(int heads, int kv_heads, int tokens, int key_tokens)
{
    Case c = {.shape = {.batch = 1,
                        .tokens = tokens,
                        .key_tokens = key_tokens,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .head_size = 4,
                        .scale = 0.5f}};
    sines(c.q, 0, heads * tokens * 4);
    sines(c.k, 100, kv_heads * key_tokens * 4);
    sines(c.v, 200, kv_heads * key_tokens * 4);
    return c;
}

static double run(Case *c)
{
    return oracle_attention(c->out, c->lse, c->weights, NULL, 0, c->q, c->k, c->v, NULL, &c->shape);
}

/* ---- By hand ---- */

Test(oracle, two_keys_by_hand)
{
    /* q.k is 1 and 3 and the scale is 1/2: the weights are e^0.5 : e^1.5 = 1 : e */
    const float q[1] = {1}, k[2] = {1, 3}, v[2] = {10, 20};
    const AttentionShape s = {
        .batch = 1, .tokens = 1, .key_tokens = 2, .heads = 1, .kv_heads = 1, .head_size = 1, .scale = 0.5f};
    double out, lse, weights[2], e = exp(1);
    double largest = oracle_attention(&out, &lse, weights, NULL, 0, q, k, v, NULL, &s);
    cr_assert(largest == 1.5);
    assert_near(weights, (double[]){1 / (1 + e), e / (1 + e)}, 2, "weights");
    assert_near(&out, (double[]){(10 + 20 * e) / (1 + e)}, 1, "out");
    assert_near(&lse, (double[]){log(exp(0.5) + exp(1.5))}, 1, "lse");
}

Test(oracle, huge_scores_do_not_overflow)
{
    const float q[2] = {1e4f, -1e4f}, k[2] = {1, 1.0001f}, v[2] = {1, 2};
    const AttentionShape s = {
        .batch = 1, .tokens = 2, .key_tokens = 2, .heads = 1, .kv_heads = 1, .head_size = 1, .scale = 1};
    double out[2], lse[2];
    double largest = oracle_attention(out, lse, NULL, NULL, 0, q, k, v, NULL, &s);
    double d = 1e4 * ((double)k[1] - 1), e = exp(-d);
    cr_assert(fabs(largest - 1e4 * k[1]) < 1e-9);
    assert_near(out, (double[]){(e + 2) / (e + 1), (1 + 2 * e) / (1 + e)}, 2, "out");
    assert_near(lse, (double[]){1e4 * k[1] + log1p(e), -1e4 + log1p(e)}, 2, "lse");
}

Test(oracle, dot_products_of_any_length)
{
    /* q.k = 1 + 4 + .. + n^2, and with one key the log-sum-exp is that score */
    float q[40], out_of[40];
    for (int n = 1; n <= 40; n++) {
        const AttentionShape s = {.batch = 1,
                                  .tokens = 1,
                                  .key_tokens = 1,
                                  .heads = 1,
                                  .kv_heads = 1,
                                  .head_size = n,
                                  .scale = 0.5f};
        double out[40], lse;
        q[n - 1] = (float)n;
        out_of[n - 1] = (float)-n;
        oracle_attention(out, &lse, NULL, NULL, 0, q, q, out_of, NULL, &s);
        cr_assert(lse == n * (n + 1) * (2 * n + 1) / 12.0, "HS %d: %g", n, lse);
        for (int d = 0; d < n; d++)
            cr_assert(out[d] == -d - 1);
    }
}

/* ---- Against PyTorch ---- */

Test(oracle, causal_as_pytorch)
{
    Case c = sine_case(2, 2, 3, 3);
    c.shape.mask.kind = MASK_CAUSAL;
    run(&c);
    assert_near(c.out, causal, 24, "out");
    c = sine_case(2, 2, 3, 3);
    c.shape.causal = true;
    run(&c);
    assert_near(c.out, causal, 24, "out");
}

Test(oracle, more_keys_than_queries_as_pytorch)
{
    Case c = sine_case(1, 1, 2, 5);
    c.shape.mask.kind = MASK_CAUSAL;
    run(&c);
    assert_near(c.out, bottom_right, 8, "out");
}

Test(oracle, bias_as_pytorch)
{
    Case c = sine_case(2, 2, 3, 4);
    float bias[12];
    sines(bias, 300, 12);
    for (int i = 0; i < 12; i++)
        bias[i] *= 2;
    bias[1 * 4 + 2] = -INFINITY;
    c.shape.bias = bias; /* (1,1,3,4): broadcast over the heads */
    c.shape.bias_stride[2] = 4;
    c.shape.bias_stride[3] = 1;
    run(&c);
    assert_near(c.out, biased, 24, "out");
    assert_near(c.lse, biased_lse, 6, "lse");
    cr_assert(c.weights[1 * 4 + 2] == 0 && c.weights[4 * 4 + 2] == 0);
}

Test(oracle, empty_rows_as_pytorch)
{
    Case c = sine_case(1, 1, 5, 3);
    c.shape.mask.kind = MASK_CAUSAL;
    memset(c.out, 0xff, sizeof c.out); /* NaN: whatever is not written shows */
    memset(c.weights, 0xff, sizeof c.weights);
    run(&c);
    assert_near(c.out, empty_rows, 20, "out");
    assert_near(c.lse, (double[]){-INFINITY, -INFINITY}, 2, "lse");
    cr_assert(isfinite(c.lse[2]));
    assert_near(c.weights, (double[]){0, 0, 0, 0, 0, 0, 1, 0, 0}, 9, "weights");
}

Test(oracle, grouped_heads_as_pytorch)
{
    Case c = sine_case(4, 2, 2, 3);
    run(&c);
    assert_near(c.out, grouped, 32, "out");
}

/* ---- What else the contract says ---- */

Test(oracle, bias_may_forbid_a_whole_row)
{
    Case c = sine_case(1, 1, 2, 3);
    const float bias[6] = {-INFINITY, -INFINITY, -INFINITY, -7, -INFINITY, -INFINITY};
    c.shape.bias = bias;
    c.shape.bias_stride[2] = 3;
    c.shape.bias_stride[3] = 1;
    double largest = run(&c);
    cr_assert(largest > 5 && largest < 9); /* |score| of the one pair allowed, which is negative */
    assert_near(c.out, (double[]){0, 0, 0, 0, c.v[0], c.v[1], c.v[2], c.v[3]}, 8, "out");
    assert_near(c.weights, (double[]){0, 0, 0, 1, 0, 0}, 6, "weights");
    assert_near(c.lse, (double[]){-INFINITY, -largest}, 2, "lse");
}

Test(oracle, lengths_of_zero_leave_nothing)
{
    Case c = sine_case(1, 1, 3, 3);
    const int lengths[1] = {0};
    c.shape.lengths = lengths;
    cr_assert(run(&c) == 0);
    for (int i = 0; i < 12; i++)
        cr_assert(c.out[i] == 0);
    for (int t = 0; t < 3; t++)
        cr_assert(c.lse[t] == -INFINITY);
}

Test(oracle, what_is_forbidden_does_not_matter)
{
    Case c = sine_case(2, 2, 3, 3), changed = c;
    c.shape.mask.kind = changed.shape.mask.kind = MASK_CAUSAL;
    for (int d = 0; d < 4; d++) /* key 2 of head 0 is for query 2 only */
        changed.k[2 * 4 + d] = changed.v[2 * 4 + d] = NAN;
    run(&c);
    run(&changed);
    assert_near(changed.out, c.out, 8, "out");
    assert_near(changed.out + 12, c.out + 12, 12, "out of head 1");
    for (int d = 0; d < 4; d++)
        cr_assert(isnan(changed.out[8 + d]));
}

Test(oracle, nan_goes_through)
{
    for (int which = 0; which < 3; which++) {
        Case c = sine_case(1, 1, 2, 3);
        (which == 0 ? c.q : which == 1 ? c.k : c.v)[0] = NAN;
        double largest = run(&c);
        cr_assert(isfinite(largest));
        cr_assert(isnan(c.out[0]));
        cr_assert(which == 2 || (isnan(c.out[3]) && isnan(c.lse[0])));
    }
}

Test(oracle, chosen_rows_are_the_same_rows)
{
    Case c = sine_case(4, 2, 5, 6);
    const size_t rows[] = {19, 0, 7, 7, 12};
    double out[5 * 4], lse[5], weights[5 * 6];
    c.shape.mask.kind = MASK_CAUSAL;
    run(&c);
    oracle_attention(out, lse, weights, rows, 5, c.q, c.k, c.v, NULL, &c.shape);
    for (int i = 0; i < 5; i++) {
        assert_near(out + i * 4, c.out + rows[i] * 4, 4, "out");
        assert_near(lse + i, c.lse + rows[i], 1, "lse");
        assert_near(weights + i * 6, c.weights + rows[i] * 6, 6, "weights");
    }
    memset(out, 0xff, sizeof out);
    oracle_attention(out, NULL, NULL, rows, 5, c.q, c.k, c.v, NULL, &c.shape);
    assert_near(out, c.out + 19 * 4, 4, "out alone");
}

Test(oracle, dropout_scales_what_stays)
{
    Case c = sine_case(2, 1, 3, 4), dropped;
    uint8_t keep[24];
    c.shape.mask = (Mask){.kind = MASK_WINDOW, .width = 2};
    dropped = c;
    run(&c);
    for (int i = 0; i < 24; i++)
        keep[i] = i % 3 != 0;
    dropped.shape.dropout = 0.25f;
    oracle_attention(dropped.out, dropped.lse, dropped.weights, NULL, 0, c.q, c.k, c.v, keep, &dropped.shape);
    assert_near(dropped.lse, c.lse, 6, "lse"); /* dropout comes after the softmax */
    for (int row = 0; row < 6; row++) {
        double out[4] = {0};
        for (int t2 = 0; t2 < 4; t2++) {
            double weight = keep[row * 4 + t2] ? c.weights[row * 4 + t2] / 0.75 : 0;
            assert_near(&dropped.weights[row * 4 + t2], &weight, 1, "weight");
            for (int d = 0; d < 4; d++)
                out[d] += weight * c.v[t2 * 4 + d];
        }
        assert_near(dropped.out + row * 4, out, 4, "out");
    }
}

Test(oracle, dropout_by_position)
{
    Case c = sine_case(3, 1, 5, 8), dropped = c;
    run(&c);
    dropped.shape.dropout = 0.5f;
    dropped.shape.dropout_seed = 123;
    run(&dropped);
    int kept = 0;
    for (int row = 0; row < 15; row++)
        for (int t2 = 0; t2 < 8; t2++) {
            bool stays = dropout_keeps(123, (size_t)row, t2, 0.5f);
            double weight = stays ? 2 * c.weights[row * 8 + t2] : 0;
            assert_near(&dropped.weights[row * 8 + t2], &weight, 1, "weight");
            kept += stays;
        }
    cr_assert(kept > 20 && kept < 100);
}

/* ---- Modules ---- */

typedef struct {
    AttentionShape shape;
    OracleModule module;
    OracleLinear query[4], key[2], value[2];
    float x[30], wq[80], bq[16], wk[40], wv[40], wo[256], bo[16], wo2[256];
} ModuleCase;

/* The module that the PyTorch values were made from: embed 5, four heads of 4 over two key/value heads. */
static void open_module(ModuleCase *c)
{
    *c = (ModuleCase){.shape = {.batch = 2,
                                .tokens = 3,
                                .key_tokens = 3,
                                .heads = 4,
                                .kv_heads = 2,
                                .head_size = 4,
                                .embed = 5,
                                .embed_out = 16,
                                .scale = 0.5f,
                                .mask = {.kind = MASK_CAUSAL}}};
    sines(c->x, 0, 30);
    sines(c->wq, 400, 80);
    sines(c->wk, 500, 40);
    sines(c->wv, 600, 40);
    sines(c->bq, 700, 16);
    sines(c->wo, 800, 256);
    sines(c->bo, 1100, 16);
    sines(c->wo2, 1200, 256);
    for (int i = 0; i < 256; i++) {
        c->wo[i] /= 4;
        c->wo2[i] /= 4;
    }
    for (int h = 0; h < 4; h++)
        c->query[h] = (OracleLinear){c->wq + h * 20, c->bq + h * 4, 5, 1};
    for (int h = 0; h < 2; h++) {
        c->key[h] = (OracleLinear){c->wk + h * 20, NULL, 5, 1};
        c->value[h] = (OracleLinear){c->wv + h * 20, NULL, 5, 1};
    }
    c->module = (OracleModule){.query = c->query,
                               .key = c->key,
                               .value = c->value,
                               .output = {{c->wo, c->bo, 16, 1}, {c->wo2, NULL, 16, 1}},
                               .outputs = 2,
                               .rope_theta = 100};
}

Test(oracle, module_as_pytorch)
{
    ModuleCase c;
    double out[96], weights[18];
    open_module(&c);
    double largest = oracle_module(out, weights, false, NULL, 0, c.x, &c.module, NULL, &c.shape);
    assert_near(out, module_out, 96, "out");
    assert_near(weights, module_weights, 18, "weights");
    cr_assert(largest > 0.1 && largest < 100);
}

Test(oracle, module_of_chosen_rows)
{
    ModuleCase c;
    const size_t rows[] = {1, 2, 5};
    double out[48], weights[9];
    open_module(&c);
    oracle_module(out, weights, false, rows, 3, c.x, &c.module, NULL, &c.shape);
    for (int i = 0; i < 3; i++) {
        assert_near(out + i * 16, module_out + rows[i] * 16, 16, "out");
        assert_near(weights + i * 3, module_weights + rows[i] * 3, 3, "weights");
    }
}

Test(oracle, module_with_matrices_from_the_right)
{
    ModuleCase c;
    float right[80]; /* (C, C_out), for x @ W */
    double out[96];
    open_module(&c);
    for (int o = 0; o < 16; o++)
        for (int i = 0; i < 5; i++)
            right[i * 16 + o] = c.wq[o * 5 + i];
    for (int h = 0; h < 4; h++)
        c.query[h] = (OracleLinear){right + h * 4, c.bq + h * 4, 1, 16};
    oracle_module(out, NULL, false, NULL, 0, c.x, &c.module, NULL, &c.shape);
    assert_near(out, module_out, 96, "out");
}

Test(oracle, module_weights_per_head_average_to_the_weights)
{
    ModuleCase c;
    double out[96], weights[2 * 3 * 4 * 3];
    open_module(&c);
    oracle_module(out, weights, true, NULL, 0, c.x, &c.module, NULL, &c.shape);
    for (int row = 0; row < 6; row++)
        for (int t2 = 0; t2 < 3; t2++) {
            double mean = 0;
            for (int h = 0; h < 4; h++)
                mean += weights[(row * 4 + h) * 3 + t2] / 4;
            assert_near(&mean, &module_weights[row * 3 + t2], 1, "weights");
        }
    double difference = 0;
    for (int t2 = 0; t2 < 3; t2++)
        difference += fabs(weights[(2 * 4 + 0) * 3 + t2] - weights[(2 * 4 + 3) * 3 + t2]);
    cr_assert(difference > 0.01, "heads 0 and 3 of row 2 are alike");
}

Test(oracle, module_dropout_is_that_of_its_rows)
{
    ModuleCase c;
    double out[96], weights[72], dropped[72];
    uint8_t keep[72]; /* (B,NH,T,TK) */
    open_module(&c);
    for (int i = 0; i < 72; i++)
        keep[i] = i % 5 > 1;
    oracle_module(out, weights, true, NULL, 0, c.x, &c.module, NULL, &c.shape);
    c.shape.dropout = 0.5f;
    oracle_module(out, dropped, true, NULL, 0, c.x, &c.module, keep, &c.shape);
    for (int b = 0; b < 2; b++)
        for (int h = 0; h < 4; h++)
            for (int t = 0; t < 3; t++)
                for (int t2 = 0; t2 < 3; t2++) {
                    size_t ours = (size_t)((b * 3 + t) * 4 + h) * 3 + t2;
                    double expected = keep[((b * 4 + h) * 3 + t) * 3 + t2] ? 2 * weights[ours] : 0;
                    assert_near(&dropped[ours], &expected, 1, "weights");
                }
}

Test(oracle, module_without_projections_is_attention_of_x)
{
    ModuleCase c;
    open_module(&c);
    AttentionShape s = {.batch = 2,
                        .tokens = 3,
                        .key_tokens = 3,
                        .heads = 1,
                        .kv_heads = 1,
                        .head_size = 5,
                        .embed = 5,
                        .embed_out = 5,
                        .scale = 1};
    const OracleModule none = {0};
    double out[30], weights[18], core_out[30], core_weights[18];
    double largest = oracle_module(out, weights, false, NULL, 0, c.x, &none, NULL, &s);
    double core_largest = oracle_attention(core_out, NULL, core_weights, NULL, 0, c.x, c.x, c.x, NULL, &s);
    cr_assert(largest == core_largest);
    assert_near(out, core_out, 30, "out");
    assert_near(weights, core_weights, 18, "weights");
}

/* ---- sample_rows ---- */

static bool holds(const size_t *chosen, size_t count, size_t row)
{
    for (size_t i = 0; i < count; i++)
        if (chosen[i] == row)
            return true;
    return false;
}

Test(oracle, samples_hold_the_edges_and_are_spread)
{
    enum { TOKENS = 1024, SLABS = 8, WANTED = 64 };
    size_t chosen[WANTED], again[WANTED];
    cr_assert_eq(sample_rows(chosen, WANTED, (size_t)SLABS * TOKENS, TOKENS), WANTED);
    const size_t edges[] = {0, 15, 16, 63, 64, 127, 128, 1023};
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        cr_assert(holds(chosen, WANTED, edges[i]), "row %zu", edges[i]);
        cr_assert(holds(chosen, WANTED, edges[i] + (SLABS - 1) * TOKENS), "row %zu of the last slab",
                  edges[i]);
    }
    for (size_t slab = 0; slab < SLABS; slab++) {
        int here = 0;
        for (size_t i = 0; i < WANTED; i++)
            here += chosen[i] / TOKENS == slab;
        cr_assert(here >= 2, "slab %zu has %d", slab, here);
    }
    sample_rows(again, WANTED, (size_t)SLABS * TOKENS, TOKENS);
    cr_assert_arr_eq(chosen, again, sizeof chosen);
}

Test(oracle, samples_are_ascending_distinct_and_no_more_than_there_are)
{
    const int tokens[] = {1, 2, 5, 16, 17, 63, 129, 1000};
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++)
        for (size_t slabs = 1; slabs <= 9; slabs++)
            for (size_t wanted = 1; wanted <= 200; wanted = wanted * 3 / 2 + 1) {
                size_t rows = slabs * (size_t)tokens[i], chosen[200];
                size_t count = sample_rows(chosen, wanted, rows, tokens[i]);
                cr_assert(count == (wanted < rows ? wanted : rows));
                for (size_t j = 0; j < count; j++) {
                    cr_assert(chosen[j] < rows);
                    cr_assert(j == 0 || chosen[j] > chosen[j - 1]);
                }
                cr_assert(chosen[0] == 0);
                cr_assert(wanted < 8 || chosen[count - 1] == rows - 1);
            }
}
