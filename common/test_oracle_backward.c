#include "oracle_backward.h"
#include "compare.h"
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* clang-format off */
/* PyTorch's gradients, in double, from inputs that are sin(first), sin(first + 1), .. rounded to float. Made with
 * PyTorch 2.15 by running these lines; of the larger gradients every eleventh number:

import torch, torch.nn.functional as F
def t(first, *size):
    n = torch.Size(size).numel()
    return torch.sin(torch.arange(first, first + n, dtype=torch.float64)).float().double().view(size).requires_grad_()
def show(name, x, step=1): print(f"static const double {name}[] = {{" + ", ".join(f"{v:.9f}" for v in x.flatten()[::step].tolist()) + "};")
# 4 heads of 4 over 2 key/value heads, 3 queries, 5 keys, causal, a bias for all heads, every third pair dropped
q, k, v, bias, dout = t(0, 1, 4, 3, 4), t(100, 1, 2, 5, 4), t(200, 1, 2, 5, 4), t(300, 1, 1, 3, 5), t(400, 1, 4, 3, 4)
keep = (torch.arange(60) % 3 != 0).view(1, 4, 3, 5)
scores = q @ k.repeat_interleave(2, 1).mT / 2 + bias.masked_fill(~torch.ones(3, 5).tril(2).bool(), -torch.inf)
out = scores.softmax(-1) * keep / 0.75 @ v.repeat_interleave(2, 1)
out.backward(dout)
for name, x in (("core_dq", q), ("core_dk", k), ("core_dv", v), ("core_dbias", bias)): show(name, x.grad)
# 4 heads of 4 over 2 key/value heads, x (2,3,5), rotary embedding with theta 100, two output projections
x, wq, wk, wv, bq = t(0, 2, 3, 5), t(400, 16, 5), t(500, 8, 5), t(600, 8, 5), t(700, 16)
wo, bo, wo2, dout = t(800, 16, 16), t(1100, 16), t(1200, 16, 16), t(1500, 2, 3, 16)
angle = torch.arange(3.0).double()[:, None] * 100.0 ** (-torch.arange(2).double() / 2)
cos, sin = torch.cos(angle).repeat(1, 2), torch.sin(angle).repeat(1, 2)
def rope(x): return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin
def heads(x, n): return x.view(2, 3, n, 4).transpose(1, 2)
q, k, v = rope(heads(F.linear(x, wq, bq), 4)), rope(heads(F.linear(x, wk), 2)), heads(F.linear(x, wv), 2)
out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(2, 3, 16)
F.linear(F.linear(out, wo, bo), wo2).backward(dout)
for name, x in (("dx", x), ("dwk", wk), ("dbq", bq), ("dbo", bo)): show("module_" + name, x.grad)
for name, x in (("dwq", wq), ("dwv", wv), ("dwo", wo), ("dwo2", wo2)): show("module_" + name, x.grad, 11)

 */
static const double core_dq[] = {-0.400724969, -0.242066251, 0.139147056, 0.392429204, 0.244195829,
    -0.185500511, -0.444648552, -0.294988756, -0.136343951, 0.517971374, 0.696066214, 0.234200982,
    -0.443656718, -0.382998938, 0.029786294, 0.415186147, 0.434992098, -0.091586124, -0.533960508,
    -0.485414051, -0.366445304, 0.482037262, 0.887336998, 0.476823186, -0.034728347, -0.057752432,
    -0.027679196, 0.027842164, 0.183377106, -0.014306802, -0.198837104, -0.200557489, -0.178029712,
    -0.153550091, 0.012102780, 0.166628407, 0.484579788, 0.117015676, -0.358132106, -0.504014885, -0.027481012,
    0.274730839, 0.324356420, 0.075770209, -0.453425247, -0.497775251, -0.084472978, 0.406493355};
static const double core_dk[] = {0.752069604, 0.920850546, 0.243005756, -0.658257426, -0.612903653,
    -0.472948960, 0.101832833, 0.582989985, 0.065904752, -0.670998340, -0.790988666, -0.183747651, 0.328651731,
    0.581792842, 0.300036292, -0.257572235, -0.533722434, -0.358696086, 0.146113784, 0.516587327, 0.079640647,
    -0.481254913, -0.599686947, -0.166769561, 0.264777091, 0.479063088, 0.252900709, -0.205777423,
    -0.420614131, -0.237712938, 0.163740433, 0.414651611, 0.064918131, 0.152963214, 0.100374627, -0.044497933,
    0.011278263, 0.086941548, 0.082671178, 0.002393306};
static const double core_dv[] = {-0.039669611, 0.444025980, 0.519486102, 0.117333104, -0.421233805,
    -0.196258614, 0.209155826, 0.422273372, -0.818603969, -1.257956628, -0.540749797, 0.673619921, 1.140202054,
    0.604819336, -0.486631513, -1.130675602, -0.349649257, 0.217789822, 0.584993926, 0.414357317, -1.433441499,
    -0.617892238, 0.765744349, 1.445359028, 0.449068528, -1.207149828, -1.753520234, -0.687712166, 0.723421369,
    0.788830612, 0.128992601, -0.649440564, -0.014653482, 0.366781564, 0.410999335, 0.077346210, -0.147184488,
    -0.121718258, 0.015655182, 0.138635312};
static const double core_dbias[] = {0.608150100, 0.041020834, -0.649170934, 0.000000000, 0.000000000,
    0.056241630, 0.762293088, 0.356917181, -1.175451898, 0.000000000, 0.609746645, 0.002948411, -0.021555745,
    0.335845650, -0.926984962};
static const double module_dx[] = {0.407985479, -0.892837914, -1.372790251, -0.590605556, 0.734579143,
    -0.082083023, -2.255340018, -2.355047650, -0.289535433, 2.042174435, 1.088613142, 1.088753625, 0.087899009,
    -0.993769572, -1.161770949, 0.836172005, 0.122752747, -0.703524785, -0.882984911, -0.250632746,
    -0.143745798, 0.217666874, 0.378957611, 0.191836484, -0.171658260, -1.634924613, 0.244665417, 1.899311165,
    1.807739047, 0.054139925};
static const double module_dwk[] = {-0.094914530, -0.647524748, -0.604803712, -0.006028911, 0.598288844,
    0.294877944, 1.584202251, 1.417018328, -0.052965712, -1.474253348, 0.452072943, 0.297814919, -0.130252747,
    -0.438566633, -0.343664381, -0.140120216, -0.690667418, -0.606218186, 0.035585246, 0.644671780,
    -0.280810640, -0.838675016, -0.625465467, 0.162794164, 0.801381603, 0.527291112, 0.612776241, 0.134877745,
    -0.467026743, -0.639549009, 0.654637547, 0.225855982, -0.410576501, -0.669526855, -0.312917302,
    -0.297784850, -0.081582466, 0.209626449, 0.308105777, 0.123314081};
static const double module_dbq[] = {-0.011874424, -0.013736118, 0.000711241, 0.014656726, 0.163314628,
    0.204092521, 0.057970907, 0.054762523, -0.863957743, -0.535403704, 0.902461180, 1.140665404, -0.024892136,
    -0.019100167, 0.002504069, 0.019121517};
static const double module_dbo[] = {0.211774021, 0.145364995, -0.054691901, -0.204465394, -0.166254375,
    0.024810181, 0.193064310, 0.183816004, 0.005568106, -0.177799068, -0.197698652, -0.035835014, 0.158975200,
    0.207624281, 0.065384584, -0.136969393};
static const double module_dwq[] = {0.001880175, 0.000569175, 0.334674546, -0.044935584, -0.706741241,
    -1.203599363, -0.003627189, 0.018008899};
static const double module_dwv[] = {0.212545602, 0.518351138, 0.854130037, 0.199961879};
static const double module_dwo[] = {-0.634193786, 3.547243447, 0.056567786, -1.067915001, 0.376934691,
    -0.754957876, -0.442024170, 0.313009545, -2.313728207, -0.431234731, -0.718019378, -0.998304816,
    1.323071345, -1.200240975, -1.025202260, -0.304612240, -0.045121716, 2.282651746, 2.108672707, 0.599370001,
    -0.415093514, -0.538464205, -1.203087438, 2.339003925};
static const double module_dwo2[] = {-4.464426944, -4.231705931, -2.886754019, -9.690797706, -9.268885579,
    -2.078393116, -0.525863969, -0.147002097, 4.570426278, 8.230684726, 7.794742008, 3.268592620, 5.390673167,
    4.204773241, -5.862507977, -4.384081220, -7.447273754, -8.338346032, -3.568774577, 1.219038409,
    2.253688209, 2.350310920, 9.433385474, 9.356857463};
/* clang-format on */

/* sin(first), sin(first + 1), .. */
static void sines(float *out, int first, int count)
{
    for (int i = 0; i < count; i++)
        out[i] = (float)sin(first + i);
}

static void assert_near(const double *ours, const double *expected, int count, int step, const char *what)
{
    for (int i = 0; i < count; i += step)
        cr_assert(fabs(ours[i] - expected[i / step]) <= 2e-9, "%s[%d] is %.12g, not %.12g", what, i, ours[i],
                  expected[i / step]);
}

/* Multiples of 1/64 between -1.5 and 1.5: a step of 2^-9 to either side of one is a float too. */
static void draw(RandomStream *stream, float *out, size_t count)
{
    draw_rand(stream, out, count);
    for (size_t i = 0; i < count; i++)
        out[i] = roundf((2 * out[i] - 1) * 96) / 64;
}

/* d loss / d *p from four values of the loss about it, good to the fourth power of the step. */
static double central_difference(float *p, double (*loss)(void *), void *problem)
{
    const float step = 0x1p-9f, at = *p;
    double value[5];
    for (int i = -2; i <= 2; i++) {
        *p = at + (float)i * step;
        value[i + 2] = i ? loss(problem) : 0;
    }
    *p = at;
    return (8 * (value[3] - value[1]) - (value[4] - value[0])) / (12 * (double)step);
}

/* Every gradient of `count` inputs at p against its central difference. */
static void assert_derivatives(const double *ours, float *p, size_t count, double (*loss)(void *),
                               void *problem, const char *what)
{
    for (size_t i = 0; i < count; i++) {
        double expected = isinf(p[i]) ? 0 : central_difference(p + i, loss, problem);
        cr_assert(fabs(ours[i] - expected) <= 1e-8 * (1 + fabs(expected)), "%s[%zu] is %.12g, not %.12g",
                  what, i, ours[i], expected);
    }
}

/* ---- The core ---- */

enum { ROOM = 512 };

/* A core problem and its gradients. */
typedef struct {
    AttentionShape s;
    float q[ROOM], k[ROOM], v[ROOM], dout[ROOM], bias[ROOM];
    uint8_t keep[ROOM];
    bool by_keep;
    double lse[ROOM], delta[ROOM];
    double dq[ROOM], dk[ROOM], dv[ROOM], dbias[ROOM];
} Core;

static const uint8_t *keep_of(const Core *c)
{
    return c->by_keep ? c->keep : NULL;
}

static double core_loss(void *problem)
{
    const Core *c = problem;
    double out[ROOM], loss = 0;
    oracle_attention(out, NULL, NULL, NULL, 0, c->q, c->k, c->v, keep_of(c), &c->s);
    for (size_t i = 0; i < query_count(&c->s); i++)
        loss += c->dout[i] * out[i];
    return loss;
}

static OracleGradient gradient_of(const Core *c)
{
    return (OracleGradient){c->q, c->k, c->v, c->dout, c->lse, c->delta, keep_of(c), &c->s};
}

/* Forward, then every gradient; what is not written shows as NaN. */
static void differentiate(Core *c)
{
    double out[ROOM];
    size_t size = c->s.head_size;
    oracle_attention(out, c->lse, NULL, NULL, 0, c->q, c->k, c->v, keep_of(c), &c->s);
    for (size_t row = 0; row < lse_count(&c->s); row++) {
        c->delta[row] = 0;
        for (size_t d = 0; d < size; d++)
            c->delta[row] += c->dout[row * size + d] * out[row * size + d];
    }
    memset(c->dq, 0xff, sizeof c->dq);
    memset(c->dk, 0xff, sizeof c->dk);
    memset(c->dv, 0xff, sizeof c->dv);
    memset(c->dbias, 0xff, sizeof c->dbias);
    OracleGradient g = gradient_of(c);
    oracle_dq(c->dq, NULL, 0, &g);
    oracle_dkv(c->dk, c->dv, NULL, 0, &g);
    oracle_dbias(c->dbias, NULL, 0, &g);
}

/* A bias (B,NH,T,TK) of those axes that `axes` names ("b", "h", "t", "k"), row-major, broadcast along the
 * others; holes: some of it is -inf. */
static void set_bias(Core *c, const char *axes, bool holes)
{
    const int size[4] = {c->s.batch, c->s.heads, c->s.tokens, c->s.key_tokens};
    size_t stride = 1;
    for (int axis = 3; axis >= 0; axis--)
        if (strchr(axes, "bhtk"[axis])) {
            c->s.bias_stride[axis] = stride;
            stride *= size[axis];
        }
    cr_assert(stride <= ROOM);
    for (size_t i = 0; holes && i < stride; i += 5)
        c->bias[i] = -INFINITY;
    c->s.bias = c->bias;
    cr_assert_eq(bias_elements(&c->s), stride);
}

typedef struct {
    const char *name;
    AttentionShape s;
    const char *bias; /* its axes; NULL: none */
    bool holes, by_keep;
} CoreCase;

static const int two_lengths[] = {3, 0}, three_documents[] = {0, 0, 1, 1, 1, 2};

/* A shape starts with batch, tokens, key tokens, heads, key/value heads, head size. */
static const CoreCase core_cases[] = {
    {"plain", .s = {2, 3, 3, 2, 2, 3, .scale = 0.6f}},
    {"one pair", .s = {1, 1, 1, 1, 1, 1, .scale = 1}},
    {"HS 11, negative scale", .s = {1, 3, 4, 1, 1, 11, .scale = -0.3f}},
    {"causal", .s = {1, 5, 5, 2, 2, 4, .scale = 0.5f, .mask = {.kind = MASK_CAUSAL}}},
    {"causal option, T < TK", .s = {1, 3, 5, 2, 2, 4, .scale = 0.5f, .causal = true}},
    {"empty rows, T > TK", .s = {2, 5, 3, 2, 1, 3, .scale = 0.5f, .mask = {.kind = MASK_CAUSAL}}},
    {"grouped", .s = {2, 3, 4, 4, 2, 3, .scale = 0.6f}},
    {"multi-query", .s = {1, 3, 4, 3, 1, 3, .scale = 0.6f}},
    {"window", .s = {1, 6, 6, 1, 1, 3, .scale = 0.6f, .mask = {MASK_WINDOW, 3, 0, NULL}}},
    {"prefix", .s = {1, 5, 5, 1, 1, 3, .scale = 0.6f, .mask = {MASK_PREFIX, 2, 0, NULL}}},
    {"local-global", .s = {1, 6, 7, 1, 1, 3, .scale = 0.6f, .mask = {MASK_LOCAL_GLOBAL, 1, 2, NULL}}},
    {"dilated", .s = {1, 6, 6, 1, 1, 3, .scale = 0.6f, .mask = {MASK_DILATED, 2, 2, NULL}}},
    {"documents", .s = {1, 6, 6, 2, 1, 3, .scale = 0.6f, .mask = {MASK_DOCUMENTS, 0, 0, three_documents}}},
    {"future", .s = {1, 5, 5, 1, 1, 3, .scale = 0.6f, .mask = {.kind = MASK_FUTURE}}},
    {"lengths", .s = {2, 3, 4, 2, 2, 3, .scale = 0.6f, .lengths = two_lengths}},
    {"bias", .s = {2, 2, 3, 2, 2, 3, .scale = 0.6f}, .bias = "bhtk"},
    {"bias (1,NH,T,TK)", .s = {2, 2, 3, 2, 1, 3, .scale = 0.6f}, .bias = "htk"},
    {"bias (1,1,T,TK), causal", .s = {2, 3, 3, 2, 2, 3, .scale = 0.6f, .causal = true}, .bias = "tk"},
    {"bias (B,1,1,TK)", .s = {2, 2, 3, 2, 1, 3, .scale = 0.6f}, .bias = "bk"},
    {"bias (1,NH,1,TK)", .s = {2, 2, 3, 4, 2, 3, .scale = 0.6f}, .bias = "hk"},
    {"bias (B,NH,T,1)", .s = {2, 2, 3, 2, 2, 3, .scale = 0.6f}, .bias = "bht"},
    {"bias (B,1,T,1)", .s = {2, 2, 3, 2, 2, 3, .scale = 0.6f}, .bias = "bt"},
    {"bias (1)", .s = {2, 2, 3, 2, 2, 3, .scale = 0.6f, .causal = true}, .bias = ""},
    {"bias with holes", .s = {2, 3, 4, 2, 2, 3, .scale = 0.6f}, .bias = "tk", .holes = true},
    {"bias that forbids whole rows", .s = {1, 5, 5, 2, 2, 3, .scale = 0.6f}, .bias = "ht", .holes = true},
    {"dropout by keep", .s = {2, 3, 4, 2, 2, 3, .scale = 0.6f, .dropout = 0.25f}, .by_keep = true},
    {"dropout by position", .s = {2, 4, 5, 4, 2, 3, .scale = 0.6f, .dropout = 0.5f, .dropout_seed = 7}},
    {"dropout, bias, causal, T < TK, grouped",
     .s = {2, 3, 5, 4, 2, 4, .scale = 0.5f, .causal = true, .dropout = 0.3f}, .bias = "htk", .holes = true,
     .by_keep = true},
};

static void open_core(Core *c, const CoreCase *of)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    *c = (Core){.s = of->s, .by_keep = of->by_keep};
    draw(&stream, c->q, ROOM);
    draw(&stream, c->k, ROOM);
    draw(&stream, c->v, ROOM);
    draw(&stream, c->dout, ROOM);
    draw(&stream, c->bias, ROOM);
    draw_dropout(&stream, c->keep, ROOM, 0.3);
    if (of->bias)
        set_bias(c, of->bias, of->holes);
    cr_assert_null(validate_shape(&c->s));
    cr_assert(query_count(&c->s) <= ROOM && key_count(&c->s) <= ROOM && weights_count(&c->s) <= ROOM);
}

Test(oracle_backward, core_against_central_differences)
{
    for (size_t i = 0; i < sizeof core_cases / sizeof core_cases[0]; i++) {
        Core c;
        char what[100];
        open_core(&c, &core_cases[i]);
        differentiate(&c);
        const struct {
            const char *name;
            const double *gradient;
            float *input;
            size_t count;
        } parts[] = {{"dq", c.dq, c.q, query_count(&c.s)},
                     {"dk", c.dk, c.k, key_count(&c.s)},
                     {"dv", c.dv, c.v, key_count(&c.s)},
                     {"dbias", c.dbias, c.bias, bias_elements(&c.s)}};
        for (int part = 0; part < 4; part++) {
            snprintf(what, sizeof what, "%s: %s", core_cases[i].name, parts[part].name);
            assert_derivatives(parts[part].gradient, parts[part].input, parts[part].count, core_loss, &c,
                               what);
        }
    }
}

Test(oracle_backward, core_as_pytorch)
{
    static const CoreCase of = {"", .s = {1, 3, 5, 4, 2, 4, .scale = 0.5f, .causal = true, .dropout = 0.25f},
                                .bias = "tk", .by_keep = true};
    Core c;
    open_core(&c, &of);
    sines(c.q, 0, 48);
    sines(c.k, 100, 40);
    sines(c.v, 200, 40);
    sines(c.bias, 300, 15);
    sines(c.dout, 400, 48);
    for (int i = 0; i < 60; i++)
        c.keep[i] = i % 3 != 0;
    differentiate(&c);
    assert_near(c.dq, core_dq, 48, 1, "dq");
    assert_near(c.dk, core_dk, 40, 1, "dk");
    assert_near(c.dv, core_dv, 40, 1, "dv");
    assert_near(c.dbias, core_dbias, 15, 1, "dbias");
}

Test(oracle_backward, rows_with_nothing_to_attend_to_have_zero_gradients)
{
    static const CoreCase of = {"", .s = {1, 5, 3, 1, 1, 4, .scale = 0.5f, .causal = true}};
    Core c;
    open_core(&c, &of);
    differentiate(&c);
    cr_assert(c.lse[0] == -INFINITY && c.lse[1] == -INFINITY && isfinite(c.lse[2]));
    for (int d = 0; d < 8; d++)
        cr_assert(c.dq[d] == 0);
    c.s.lengths = (int[]){0};
    differentiate(&c);
    for (int i = 0; i < 12; i++)
        cr_assert(c.dq[i] == 0 && c.dk[i] == 0 && c.dv[i] == 0);
}

Test(oracle_backward, what_is_forbidden_does_not_matter)
{
    static const CoreCase of = {"", .s = {1, 3, 3, 1, 1, 4, .scale = 0.5f, .causal = true}};
    Core c, changed;
    open_core(&c, &of);
    differentiate(&c);
    changed = c;
    changed.k[8] = changed.v[8] = NAN; /* key 2 is for query 2 only */
    differentiate(&changed);
    cr_assert_arr_eq(changed.dq, c.dq, 8 * sizeof *c.dq);
    cr_assert(isnan(changed.dq[8]) && isnan(changed.dk[0]) && isnan(changed.dv[0]));
    changed = c;
    changed.q[0] = changed.dout[0] = NAN; /* query 0 sees key 0 only */
    differentiate(&changed);
    cr_assert_arr_eq(changed.dk + 4, c.dk + 4, 8 * sizeof *c.dk);
    cr_assert_arr_eq(changed.dv + 4, c.dv + 4, 8 * sizeof *c.dv);
    cr_assert(isnan(changed.dq[0]) && isnan(changed.dk[0]) && isnan(changed.dv[0]));
}

Test(oracle_backward, chosen_rows_and_elements_are_the_same)
{
    static const CoreCase of = {
        "", .s = {2, 5, 6, 4, 2, 3, .scale = 0.5f, .causal = true, .dropout = 0.3f, .dropout_seed = 5},
        .bias = "htk"};
    const size_t rows[] = {39, 0, 7, 8, 8, 22, 12}, keys[] = {23, 3, 4, 11, 12, 0, 4};
    const size_t elements[] = {119, 0, 57, 31, 30};
    double dq[7 * 3], dk[7 * 3], dv[7 * 3], dbias[5];
    Core c;
    open_core(&c, &of);
    differentiate(&c);
    OracleGradient g = gradient_of(&c);
    oracle_dq(dq, rows, 7, &g);
    oracle_dkv(dk, dv, keys, 7, &g);
    oracle_dbias(dbias, elements, 5, &g);
    for (int i = 0; i < 7; i++) {
        cr_assert_arr_eq(dq + i * 3, c.dq + rows[i] * 3, 3 * sizeof *dq);
        cr_assert_arr_eq(dk + i * 3, c.dk + keys[i] * 3, 3 * sizeof *dk);
        cr_assert_arr_eq(dv + i * 3, c.dv + keys[i] * 3, 3 * sizeof *dv);
    }
    for (int i = 0; i < 5; i++)
        cr_assert(dbias[i] == c.dbias[elements[i]]);
}

Test(oracle_backward, lse_and_delta_in_float_change_no_more_than_rounding)
{
    static const CoreCase of = {"", .s = {2, 5, 6, 4, 2, 4, .scale = 0.5f, .causal = true}, .bias = "tk"};
    static Core c, rounded;
    open_core(&c, &of);
    differentiate(&c);
    rounded = c;
    for (size_t row = 0; row < lse_count(&c.s); row++) {
        rounded.lse[row] = (float)c.lse[row];
        rounded.delta[row] = (float)c.delta[row];
    }
    OracleGradient g = gradient_of(&rounded);
    oracle_dq(rounded.dq, NULL, 0, &g);
    oracle_dkv(rounded.dk, rounded.dv, NULL, 0, &g);
    double largest = 0;
    for (size_t i = 0; i < query_count(&c.s); i++)
        largest = worse(largest, fabs(rounded.dq[i] - c.dq[i]));
    for (size_t i = 0; i < key_count(&c.s); i++)
        largest = worse(largest, worse(fabs(rounded.dk[i] - c.dk[i]), fabs(rounded.dv[i] - c.dv[i])));
    cr_assert(largest > 0 && largest < 2e-6, "%g", largest);
}

Test(oracle_backward, without_a_bias_it_has_no_elements)
{
    AttentionShape s = {1, 2, 2, 1, 1, 2, .scale = 1};
    cr_assert_eq(bias_elements(&s), 0);
}

/* ---- Modules ---- */

enum { MAX_HEADS = 4, PARAMETERS = 10 };
enum { WQ, BQ, WK, BK, WV, BV, W0, B0, W1, B1 };

typedef struct {
    AttentionShape s;
    OracleModule module;
    OracleLinear query[MAX_HEADS], key[MAX_HEADS], value[MAX_HEADS];
    float x[ROOM], dout[ROOM], data[PARAMETERS][ROOM];
    double gradient[PARAMETERS][ROOM], dx[ROOM];
    OracleParameter parameter[PARAMETERS];
    uint8_t keep[ROOM];
    bool by_keep;
} Module;

typedef struct {
    const char *name;
    AttentionShape s;
    int outputs;
    double rope_theta;
    bool bias, from_right; /* every linear has a bias; matrices multiply from the right */
    bool one_head;         /* all heads share one head's parameters */
    bool by_keep;
} ModuleCase;

static size_t x_count(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens * s->embed;
}

static size_t out_count(const AttentionShape *s)
{
    return (size_t)s->batch * s->tokens * s->embed_out;
}

/* Rows first, first + 1, .. of a parameter (outputs,inputs). */
static OracleLinear linear_of(const Module *m, int weight, const ModuleCase *of, int first, int outputs,
                              int inputs)
{
    const float *w = m->data[weight], *bias = of->bias ? m->data[weight + 1] + first : NULL;
    return of->from_right ? (OracleLinear){w + first, bias, 1, (size_t)outputs}
                          : (OracleLinear){w + (size_t)first * inputs, bias, (size_t)inputs, 1};
}

static void open_module(Module *m, const ModuleCase *of)
{
    RandomStream stream;
    seed_stream(&stream, STREAM_CPU, 123);
    *m = (Module){.s = of->s, .by_keep = of->by_keep};
    const AttentionShape *s = &m->s;
    int C = s->embed, C_out = s->embed_out, kv_width = s->kv_heads * s->head_size;
    draw(&stream, m->x, ROOM);
    draw(&stream, m->dout, ROOM);
    for (int i = 0; i < PARAMETERS; i++)
        draw(&stream, m->data[i], ROOM);
    draw_dropout(&stream, m->keep, ROOM, 0.3);
    cr_assert(x_count(s) <= ROOM && out_count(s) <= ROOM && C * C_out <= ROOM && C_out * C_out <= ROOM);
    cr_assert(weights_count(s) <= ROOM && !validate_shape(s));

    for (int h = 0; h < s->heads; h++)
        m->query[h] = linear_of(m, WQ, of, of->one_head ? 0 : h * s->head_size, C_out, C);
    for (int h = 0; h < s->kv_heads; h++) {
        m->key[h] = linear_of(m, WK, of, of->one_head ? 0 : h * s->head_size, kv_width, C);
        m->value[h] = linear_of(m, WV, of, of->one_head ? 0 : h * s->head_size, kv_width, C);
    }
    m->module = (OracleModule){
        .query = m->query,
        .key = m->key,
        .value = m->value,
        .output = {linear_of(m, W0, of, 0, C_out, C_out), linear_of(m, W1, of, 0, C_out, C_out)},
        .outputs = of->outputs,
        .rope_theta = of->rope_theta};
    size_t count[PARAMETERS] = {C * C_out, C_out,         C * kv_width, kv_width,      C * kv_width,
                                kv_width,  C_out * C_out, C_out,        C_out * C_out, C_out};
    for (int i = 0; i < PARAMETERS; i++)
        m->parameter[i] = (OracleParameter){m->data[i], count[i], m->gradient[i]};
}

static double module_loss(void *problem)
{
    const Module *m = problem;
    double out[ROOM], loss = 0;
    oracle_module(out, NULL, false, NULL, 0, m->x, &m->module, m->by_keep ? m->keep : NULL, &m->s);
    for (size_t i = 0; i < out_count(&m->s); i++)
        loss += m->dout[i] * out[i];
    return loss;
}

static void back(Module *m, bool sample)
{
    memset(m->gradient, 0xff, sizeof m->gradient);
    memset(m->dx, 0xff, sizeof m->dx);
    oracle_module_backward(m->dx, m->parameter, PARAMETERS, sample, m->dout, m->x, &m->module,
                           m->by_keep ? m->keep : NULL, &m->s);
}

/* Here the widths of x and of all heads follow the head size. */
static const ModuleCase module_cases[] = {
    {"no output", .s = {2, 3, 3, 1, 1, 4, 3, 4, .scale = 0.5f}},
    {"from the right", .s = {2, 3, 3, 1, 1, 4, 5, 4, .scale = 0.5f}, .from_right = true},
    {"one output, causal", .s = {2, 4, 4, 3, 3, 2, 5, 6, .scale = 0.6f, .causal = true}, .outputs = 1},
    {"biases", .s = {2, 3, 3, 2, 2, 3, 4, 6, .scale = 0.6f, .causal = true}, .outputs = 1, .bias = true},
    {"biases, from the right", .s = {1, 3, 3, 2, 2, 3, 7, 6, .scale = 0.6f}, .outputs = 1, .bias = true,
     .from_right = true},
    {"two outputs", .s = {2, 3, 3, 2, 2, 2, 3, 4, .scale = 0.6f, .causal = true}, .outputs = 2},
    {"two outputs, biases, from the right", .s = {2, 3, 3, 2, 2, 3, 5, 6, .scale = 0.6f}, .outputs = 2,
     .bias = true, .from_right = true},
    {"grouped", .s = {2, 3, 3, 4, 2, 2, 5, 8, .scale = 0.6f, .causal = true}, .outputs = 1},
    {"multi-query, biases, no output", .s = {1, 3, 3, 4, 1, 2, 5, 8, .scale = 0.6f}, .bias = true},
    {"rope", .s = {2, 4, 4, 2, 2, 4, 5, 8, .scale = 0.5f, .causal = true}, .outputs = 1, .rope_theta = 100},
    {"rope, grouped, biases, dropout", .s = {2, 4, 4, 4, 2, 4, 6, 16, .scale = 0.5f, .dropout = 0.3f},
     .outputs = 1, .rope_theta = 50, .bias = true, .by_keep = true},
    {"dropout by position", .s = {2, 4, 4, 2, 2, 3, 4, 6, .scale = 0.6f, .dropout = 0.5f, .dropout_seed = 3},
     .outputs = 1},
    {"future: an empty row", .s = {2, 4, 4, 2, 2, 3, 4, 6, .scale = 0.6f, .mask = {.kind = MASK_FUTURE}},
     .outputs = 1, .bias = true},
    {"lengths", .s = {2, 4, 4, 2, 2, 3, 4, 6, .scale = 0.6f, .lengths = two_lengths}, .outputs = 2,
     .bias = true},
    {"shared by all heads", .s = {2, 3, 3, 3, 3, 2, 4, 6, .scale = 0.6f, .causal = true}, .outputs = 1,
     .bias = true, .one_head = true},
};

static void assert_module(Module *m, const char *name)
{
    static const char *const names[PARAMETERS] = {"dwq", "dbq", "dwk", "dbk", "dwv",
                                                  "dbv", "dw0", "db0", "dw1", "db1"};
    char what[100];
    back(m, false);
    snprintf(what, sizeof what, "%s: dx", name);
    assert_derivatives(m->dx, m->x, x_count(&m->s), module_loss, m, what);
    for (int i = 0; i < PARAMETERS; i++) {
        snprintf(what, sizeof what, "%s: %s", name, names[i]);
        assert_derivatives(m->gradient[i], m->data[i], m->parameter[i].count, module_loss, m, what);
    }
}

Test(oracle_backward, module_against_central_differences)
{
    static Module m;
    for (size_t i = 0; i < sizeof module_cases / sizeof module_cases[0]; i++) {
        open_module(&m, &module_cases[i]);
        assert_module(&m, module_cases[i].name);
    }
}

Test(oracle_backward, module_without_projections)
{
    static const ModuleCase of = {"", .s = {2, 3, 3, 1, 1, 5, 5, 5, .scale = 0.7f}};
    static Module m;
    open_module(&m, &of);
    m.module = (OracleModule){0};
    assert_module(&m, "x is q, k and v");
    m.module = (OracleModule){.output = {{m.data[W0], m.data[B0], 5, 1}}, .outputs = 1};
    assert_module(&m, "with an output");
}

Test(oracle_backward, module_as_pytorch)
{
    static const ModuleCase of = {"", .s = {2, 3, 3, 4, 2, 4, 5, 16, .scale = 0.5f, .causal = true},
                                  .outputs = 2, .rope_theta = 100, .bias = true};
    static Module m;
    open_module(&m, &of);
    sines(m.x, 0, 30);
    sines(m.data[WQ], 400, 80);
    sines(m.data[WK], 500, 40);
    sines(m.data[WV], 600, 40);
    sines(m.data[BQ], 700, 16);
    sines(m.data[W0], 800, 256);
    sines(m.data[B0], 1100, 16);
    sines(m.data[W1], 1200, 256);
    sines(m.dout, 1500, 96);
    for (int h = 0; h < 2; h++)
        m.key[h].bias = m.value[h].bias = NULL;
    m.module.output[1].bias = NULL;
    back(&m, false);
    assert_near(m.dx, module_dx, 30, 1, "dx");
    assert_near(m.gradient[WQ], module_dwq, 80, 11, "dwq");
    assert_near(m.gradient[BQ], module_dbq, 16, 1, "dbq");
    assert_near(m.gradient[WK], module_dwk, 40, 1, "dwk");
    assert_near(m.gradient[WV], module_dwv, 40, 11, "dwv");
    assert_near(m.gradient[W0], module_dwo, 256, 11, "dwo");
    assert_near(m.gradient[B0], module_dbo, 16, 1, "dbo");
    assert_near(m.gradient[W1], module_dwo2, 256, 11, "dwo2");
    for (int i = 0; i < 8; i++)
        cr_assert(m.gradient[BK][i] == 0 && m.gradient[BV][i] == 0); /* no linear uses them */
}

/* What a sample judges is what the whole gradient is, bit for bit; returns how many numbers it judges. */
static size_t assert_part_of(const double *sample, const double *all, size_t count, const char *what)
{
    size_t judged = 0;
    for (size_t i = 0; i < count; i++) {
        cr_assert(isnan(sample[i]) || sample[i] == all[i], "%s[%zu] is %.17g, not %.17g", what, i, sample[i],
                  all[i]);
        judged += !isnan(sample[i]);
    }
    return judged;
}

static const ModuleCase sample_cases[] = {
    {"no output", .s = {3, 4, 4, 4, 4, 2, 5, 8, .scale = 0.6f, .causal = true}, .bias = true},
    {"one output", .s = {3, 4, 4, 4, 4, 2, 5, 8, .scale = 0.6f, .causal = true}, .outputs = 1, .bias = true},
    {"two outputs", .s = {3, 4, 4, 4, 4, 2, 5, 8, .scale = 0.6f, .causal = true}, .outputs = 2, .bias = true,
     .from_right = true},
    {"grouped, rope, dropout", .s = {3, 4, 4, 4, 2, 4, 5, 16, .scale = 0.5f, .dropout = 0.4f}, .outputs = 1,
     .rope_theta = 100, .bias = true, .by_keep = true},
};

Test(oracle_backward, a_sample_is_part_of_the_whole)
{
    static Module all, m;
    for (size_t i = 0; i < sizeof sample_cases / sizeof sample_cases[0]; i++) {
        const ModuleCase *of = &sample_cases[i];
        open_module(&all, of);
        back(&all, false);
        open_module(&m, of);
        back(&m, true);
        size_t one_entry = x_count(&m.s) / m.s.batch;
        cr_assert_eq(assert_part_of(m.dx, all.dx, x_count(&m.s), of->name), one_entry);
        for (int p = WQ; p <= B1; p++) {
            size_t count = m.parameter[p].count;
            size_t judged = assert_part_of(m.gradient[p], all.gradient[p], count, of->name);
            bool by_heads = p <= BV || (p == W0 && of->outputs == 1);
            cr_assert_eq(judged, by_heads ? count / m.s.kv_heads : count, "%s: %zu of parameter %d", of->name,
                         judged, p);
        }
    }
}

Test(oracle_backward, a_sample_of_one_batch_entry_is_everything)
{
    static const ModuleCase of = {"", .s = {1, 4, 4, 4, 4, 2, 5, 8, .scale = 0.6f, .causal = true},
                                  .outputs = 1, .bias = true};
    static Module all, m;
    open_module(&all, &of);
    back(&all, false);
    open_module(&m, &of);
    back(&m, true);
    cr_assert_eq(assert_part_of(m.dx, all.dx, x_count(&m.s), "dx"), x_count(&m.s));
    for (int p = 0; p < PARAMETERS; p++)
        cr_assert_eq(assert_part_of(m.gradient[p], all.gradient[p], m.parameter[p].count, "gradient"),
                     m.parameter[p].count);
}

Test(oracle_backward, a_sample_judges_no_part_of_a_sum)
{
    /* All heads share their parameters, so that one head's gradients are not the parameters'. */
    static const ModuleCase of = {"", .s = {3, 4, 4, 4, 4, 2, 5, 8, .scale = 0.6f, .causal = true},
                                  .outputs = 1, .bias = true, .one_head = true};
    static Module m;
    open_module(&m, &of);
    back(&m, true);
    for (int i = 0; i < 2 * 5; i++) /* the rows of the one head */
        cr_assert(isnan(m.gradient[WQ][i]) && isnan(m.gradient[WK][i]) && isnan(m.gradient[WV][i]));
}

Test(oracle_backward, parameters_that_are_not_asked_for)
{
    static const ModuleCase of = {"", .s = {2, 3, 3, 2, 2, 3, 4, 6, .scale = 0.6f}, .outputs = 1,
                                  .bias = true};
    static Module all, m;
    open_module(&all, &of);
    back(&all, false);
    open_module(&m, &of);
    oracle_module_backward(m.dx, &m.parameter[WV], 1, false, m.dout, m.x, &m.module, NULL, &m.s);
    cr_assert_arr_eq(m.dx, all.dx, x_count(&m.s) * sizeof *m.dx);
    cr_assert_arr_eq(m.gradient[WV], all.gradient[WV], m.parameter[WV].count * sizeof(double));
}

Test(oracle_backward, parameters_side_by_side)
{
    /* The weight in two halves, one for each head, the second where the first ends. */
    static const ModuleCase of = {"", .s = {2, 3, 3, 2, 2, 3, 4, 6, .scale = 0.6f}, .outputs = 1};
    static Module all, m;
    open_module(&all, &of);
    back(&all, false);
    open_module(&m, &of);
    double half[2][20];
    OracleParameter halves[2] = {{m.data[WQ], 12, half[0]}, {m.data[WQ] + 12, 12, half[1]}};
    oracle_module_backward(m.dx, halves, 2, false, m.dout, m.x, &m.module, NULL, &m.s);
    cr_assert_arr_eq(half[0], all.gradient[WQ], 12 * sizeof(double));
    cr_assert_arr_eq(half[1], all.gradient[WQ] + 12, 12 * sizeof(double));
}
