/* The small einsum against sums in double written from the specification's text alone. */
#include "einsum.h"
#include "threads.h"
#include "try_einsum.h"

#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A small generator of its own, so that every run tests the same specifications. */
static unsigned random_state = 12345;
static int random_below(int n)
{
    random_state = random_state * 1664525u + 1013904223u;
    return (int)((random_state >> 16) % (unsigned)n);
}
static float random_float(void)
{
    return (float)(random_below(20001) - 10000) / 10000.0f;
}

static size_t size_of_letter[128];

/* A view with the word's letters for axes, laid out in memory in any order of axes, with gaps if `gaps`.
 * *floats: what the memory holds in all. */
static View random_view(const char *word, bool shuffled, bool gaps, size_t *floats)
{
    View v = {.axes = (int)strlen(word)};
    int order[EINSUM_MAX_AXES];
    for (int i = 0; i < v.axes; i++)
        order[i] = i;
    for (int i = v.axes - 1; shuffled && i > 0; i--) {
        int j = random_below(i + 1), swapped = order[i];
        order[i] = order[j];
        order[j] = swapped;
    }
    size_t stride = gaps && random_below(3) == 0 ? 2 : 1;
    for (int i = v.axes - 1; i >= 0; i--) {
        int axis = order[i];
        v.size[axis] = size_of_letter[(int)word[axis]];
        v.stride[axis] = stride;
        stride = stride * v.size[axis] + (gaps ? random_below(3) : 0);
    }
    *floats = stride;
    v.data = malloc(stride * sizeof *v.data);
    return v;
}

static size_t place(const View *v, const char *word, const size_t index[128])
{
    size_t at = 0;
    for (int i = 0; i < v->axes; i++)
        at += index[(int)word[i]] * v->stride[i];
    return at;
}

/* sum[place] += a * b and size[place] += |a * b|, over every setting of the letters from `letters` on. */
static void sum_all(double *sum, double *size, const EinsumWords *w, const char *letters, size_t index[128],
                    const View *out, const View *a, const View *b)
{
    if (*letters) {
        for (size_t i = 0; i < size_of_letter[(int)*letters]; i++) {
            index[(int)*letters] = i;
            sum_all(sum, size, w, letters + 1, index, out, a, b);
        }
        return;
    }
    double product = (double)a->data[place(a, w->a, index)] * b->data[place(b, w->b, index)];
    sum[place(out, w->out, index)] += product;
    size[place(out, w->out, index)] += fabs(product) + 1e-30; /* never 0 where something belongs */
}

/* Runs a specification on random operands both ways; returns true if it was a matrix product. */
static bool holds(const char *specification, bool shuffled, bool gaps)
{
    static const float untouched = 777.0f;
    EinsumWords w;
    const char *error = einsum_parse(&w, specification);
    cr_assert_null(error, "%s", error);

    size_t floats_a, floats_b, floats;
    View a = random_view(w.a, shuffled, gaps, &floats_a), b = random_view(w.b, shuffled, gaps, &floats_b);
    View out = random_view(w.out, shuffled, gaps, &floats);
    for (size_t i = 0; i < floats_a; i++)
        a.data[i] = random_float();
    for (size_t i = 0; i < floats_b; i++)
        b.data[i] = random_float();

    char letters[EINSUM_MAX_LETTERS + 1] = "", *end = letters;
    size_t index[128] = {0};
    for (int i = 0; i < a.axes + b.axes; i++) {
        char c = i < a.axes ? w.a[i] : w.b[i - a.axes];
        if (!strchr(letters, c))
            *end++ = c, *end = '\0';
    }
    double *sum = calloc(floats, sizeof *sum), *size = calloc(floats, sizeof *size);
    bool *written = calloc(floats, sizeof *written);
    sum_all(sum, size, &w, letters, index, &out, &a, &b);
    for (size_t i = 0; i < floats; i++)
        written[i] = size[i] != 0;

    EinsumPlan plan;
    error = einsum_plan(&plan, specification, &out, &a, &b);
    cr_assert_null(error, "%s", error);
    for (int way = 0; way < 2; way++) {
        for (size_t i = 0; i < floats; i++)
            out.data[i] = written[i] ? NAN : untouched;
        (way ? einsum : einsum_loops)(specification, out, a, b);
        for (size_t i = 0; i < floats; i++)
            if (written[i])
                cr_assert(fabs(out.data[i] - sum[i]) <= 1e-6 * size[i], "%s, %s: [%zu] is %g, not %g",
                          specification, way ? "einsum" : "einsum_loops", i, out.data[i], sum[i]);
            else
                cr_assert_eq(out.data[i], untouched, "%s wrote beside its result", specification);
    }
    EinsumProduct product;
    bool is_product = einsum_product(&product, &plan);
    free(a.data), free(b.data), free(out.data), free(sum), free(size), free(written);
    return is_product;
}

static void insert(char *word, char letter)
{
    size_t length = strlen(word), at = random_below((int)length + 1);
    memmove(word + at + 1, word + at, length - at + 1);
    word[at] = letter;
}

/* Up to six letters in any order. Most stand in two or three of the words, as a matrix product's do; some
 * wander: once or twice in an operand, and then perhaps in the result. */
static void random_specification(char text[64])
{
    char a[16] = "", b[16] = "", out[16] = "";
    int wandering = random_below(3) == 0 ? 2 : 0;
    for (int i = 0, letters = random_below(7); i < letters; i++) {
        char c = "abcdXY"[i];
        int kind = random_below(4 + wandering); /* batch, row, column, summed, wandering twice */
        for (int times = kind < 4 ? (kind == 0 || kind == 1 || kind == 3) : random_below(3); times > 0;
             times--)
            insert(a, c);
        for (int times = kind < 4 ? (kind == 0 || kind == 2 || kind == 3) : random_below(2); times > 0;
             times--)
            insert(b, c);
        if (kind < 3 || (kind > 3 && (strchr(a, c) || strchr(b, c)) && random_below(2)))
            insert(out, c);
    }
    snprintf(text, 64, "%.8s,%.8s->%.8s", a, b, out);
}

Test(einsum, random_specifications_equal_sums_in_double)
{
    int products = 0, wanted = 3000;
    for (int i = 0; i < wanted; i++) {
        char text[64];
        EinsumWords words;
        do
            random_specification(text);
        while (einsum_parse(&words, text)); /* a word of more than eight letters was cut short */
        for (int c = 0; c < 128; c++)
            size_of_letter[c] = 1 + random_below(5);
        products += holds(text, i % 2, i % 3 == 0);
    }
    cr_expect(products > wanted / 5 && products < wanted * 4 / 5, "%d of %d were matrix products", products,
              wanted);
}

/* Attention's own, at sizes that are not multiples of anything, at one token, and larger than a panel of
 * rows. */
Test(einsum, attention_specifications_at_ugly_sizes)
{
    static const char *const specifications[] = {"bnd,do->bno",     "bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd",
                                                 "bno,po->bnp",     "bhnd,hdo->bno",   "bnd,hdk->bhnk",
                                                 "bhmn,bhmd->bhnd", "nd,dk->kn",       "bnhd,bmhd->bhnm"};
    static const size_t sizes[] = {1, 2, 3, 17, 33};
    for (size_t i = 0; i < sizeof specifications / sizeof *specifications; i++)
        for (int round = 0; round < 8; round++) {
            for (int c = 0; c < 128; c++)
                size_of_letter[c] = sizes[random_below(5)];
            size_of_letter['b'] = 1 + round % 3;
            size_of_letter['h'] = round % 2 ? 3 : 1;
            cr_expect(holds(specifications[i], false, false), "%s fell back to plain loops",
                      specifications[i]);
            holds(specifications[i], true, true);
        }
    for (int c = 0; c < 128; c++)
        size_of_letter[c] = 1;
    size_of_letter['n'] = 500;
    size_of_letter['d'] = 70, size_of_letter['o'] = 50;
    cr_expect(holds("bnd,do->bno", false, false));
}

/* What is recognised as which product, and what is not. Sizes: one digit an axis. */
Test(einsum, recognises_matrix_products)
{
    static const struct {
        const char *specification, *sizes, *text;
    } cases[] = {
        {"bnd,do->bno", "b2n3d4o5", "1 product of (6 x 4) (4 x 5)"},        /* b and n merge into rows */
        {"bno,po->bnp", "b2n3o4p5", "1 product of (6 x 4) (4 x 5)"},        /* nn.Linear */
        {"bhnd,bhmd->bhnm", "b2h3n4m5d6", "6 products of (4 x 6) (6 x 5)"}, /* scores */
        {"bhnm,bhmd->bhnd", "b2h3n4m5d6", "6 products of (4 x 5) (5 x 6)"}, /* context */
        {"bnhd,bmhd->bhnm", "b2h3n4m5d6",
         "6 products of (4 x 6) (6 x 5)"},                       /* the same scores, heads not moved */
        {"nd,dk->kn", "n3d4k5", "1 product of (5 x 4) (4 x 3)"}, /* the result transposed: b stands left */
        {"bhnd,hdo->bno", "b2h3n4d5o6",
         "6 products of (4 x 5) (5 x 6)"},                           /* h does not join d: 2 x 3 products */
        {"bno,bnd->do", "b2n3d4o5", "1 product of (4 x 6) (6 x 5)"}, /* dW: one sum over all rows */
        {"bnp,bno->po", "b2n3o4p5", "1 product of (5 x 6) (6 x 4)"},
        {"bhnm,bhnd->bhmd", "b2h3n4m5d6", "6 products of (5 x 4) (4 x 6)"}, /* dK */
        {"nd,d->n", "n3d4", "1 product of (3 x 4) (4 x 1)"},                /* matrix times vector */
        {"bii,bij->bj", "b2i3j4", "2 products of (1 x 3) (3 x 4)"},         /* a diagonal is one stride */
        {"bnd,do->bno", "b1n1d4o5", "1 product of (1 x 4) (4 x 5)"},        /* one token */
        {"i,j->ij", "i2j3", "plain loops"},                                 /* outer: nothing is summed */
        {"ij,ij->ij", "i2j3", "plain loops"},                               /* elementwise */
        {"ii,ij->ij", "i2j3", "plain loops"},                               /* a diagonal, nothing summed */
        {"i,i->", "i3", "plain loops"},                                     /* a dot product */
        {"ij,jk->k", "i2j3k4", "plain loops"},    /* i is summed in one operand alone */
        {"ij,kl->il", "i2j3k4l5", "plain loops"}, /* j and k likewise */
        {"ij,ik->i", "i2j3k4", "plain loops"},
        {",->", "", "plain loops"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memset(size_of_letter, 0, sizeof size_of_letter);
        for (const char *c = cases[i].sizes; *c; c += 2)
            size_of_letter[(int)c[0]] = c[1] - '0';
        EinsumWords w;
        cr_assert_null(einsum_parse(&w, cases[i].specification));
        size_t floats;
        View out = random_view(w.out, false, false, &floats), a = random_view(w.a, false, false, &floats);
        View b = random_view(w.b, false, false, &floats);
        EinsumPlan plan;
        const char *error = einsum_plan(&plan, cases[i].specification, &out, &a, &b);
        cr_assert_null(error, "%s", error);
        char text[80];
        einsum_text(text, sizeof text, &plan);
        cr_expect_str_eq(text, cases[i].text, "%s: %s", cases[i].specification, text);
        free(out.data), free(a.data), free(b.data);
    }
}

/* Rows h and n that lie as (N,H) in memory, in the result as well, join in the order of memory, not of the
 * letters. */
Test(einsum, letters_join_in_the_order_of_memory)
{
    static float x[2 * 3 * 4], w[4 * 5], y[2 * 3 * 5];
    View a = transpose(view(x, 3, 2, 4), 0, 1), b = view(w, 4, 5), out = transpose(view(y, 3, 2, 5), 0, 1);
    EinsumPlan plan;
    char text[80];
    cr_assert_null(einsum_plan(&plan, "hnd,do->hno", &out, &a, &b));
    einsum_text(text, sizeof text, &plan);
    cr_expect_str_eq(text, "1 product of (6 x 4) (4 x 5)", "%s", text);
}

/* No letter of stride 1 to read a matrix by: every second column of a. */
Test(einsum, strides_that_no_blas_takes_fall_back)
{
    float a_data[24] = {0}, b_data[12] = {0}, out_data[9];
    View a = view(a_data, 3, 4), b = view(b_data, 4, 3), out = view(out_data, 3, 3);
    a.stride[0] = 8, a.stride[1] = 2;
    EinsumPlan plan;
    char text[80];
    cr_assert_null(einsum_plan(&plan, "ik,kj->ij", &out, &a, &b));
    einsum_text(text, sizeof text, &plan);
    cr_expect_str_eq(text, "plain loops");

    for (int i = 0; i < 12; i++)
        a_data[2 * i] = (float)i, a_data[2 * i + 1] = 100,
                   b_data[i] = i % 4 == 0; /* b = columns 0, 1, 2 of I, stretched */
    einsum("ik,kj->ij", out, a, b);
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
            float expected = 0;
            for (int k = 0; k < 4; k++)
                expected += (float)(4 * i + k) * b_data[3 * k + j];
            cr_expect_eq(out_data[3 * i + j], expected);
        }
}

/* Rows that share memory are no matrix to a BLAS: repeated by stride 0, as expand() makes them, or
 * overlapping, which is a convolution. As a loop around products they may stay. */
Test(einsum, rows_that_share_memory_are_read_again_and_again)
{
    static const struct {
        size_t stride[2];
        const char *text;
        float expected[6];
    } cases[] = {
        {{0, 1}, "plain loops", {4, 5, 4, 5, 4, 5}},
        {{1, 1}, "plain loops", {4, 5, 6, 7, 8, 9}},
        {{3, 1}, "1 product of (3 x 3) (3 x 2)", {4, 5, 10, 11, 16, 17}},
    };
    float a_data[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, b_data[6] = {1, 0, 0, 1, 1, 1}, out_data[12];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        View a = view(a_data, 3, 3), b = view(b_data, 3, 2), out = view(out_data, 3, 2);
        memcpy(a.stride, cases[i].stride, sizeof cases[i].stride);
        EinsumPlan plan;
        char text[80];
        cr_assert_null(einsum_plan(&plan, "ik,kj->ij", &out, &a, &b));
        einsum_text(text, sizeof text, &plan);
        cr_expect_str_eq(text, cases[i].text, "%s", text);
        einsum("ik,kj->ij", out, a, b);
        for (int j = 0; j < 6; j++)
            cr_expect_eq(out_data[j], cases[i].expected[j], "[%d] is %g", j, out_data[j]);
    }

    View a = view(a_data, 2, 2, 3), b = view(b_data, 3, 2);
    a.stride[0] = 0;
    einsum("bik,kj->bij", view(out_data, 2, 2, 2), a, b);
    static const float expected[8] = {4, 5, 10, 11, 4, 5, 10, 11};
    for (int i = 0; i < 8; i++)
        cr_expect_eq(out_data[i], expected[i], "[%d] is %g", i, out_data[i]);
}

Test(einsum, bad_specifications_are_refused_with_the_place)
{
    static const struct {
        const char *specification, *error;
    } cases[] = {
        {"", "einsum \"[]\": a comma and the second operand's letters are missing here"},
        {"bnd", "einsum \"bnd[]\": a comma and the second operand's letters are missing here"},
        {"bnd,", "einsum \"bnd,[]\": \"->\" and the result's letters are missing here"},
        {"bnd,do", "einsum \"bnd,do[]\": \"->\" and the result's letters are missing here"},
        {"bnd,do-", "einsum \"bnd,do[-]\": the result's letters follow \"->\""},
        {"bnd,do-bno", "einsum \"bnd,do[-]bno\": the result's letters follow \"->\""},
        {"bnd,do->bnq", "einsum \"bnd,do->bn[q]\": letter 'q' of the result is in neither operand"},
        {"bnd,do->Bno", "einsum \"bnd,do->[B]no\": letter 'B' of the result is in neither operand"},
        {"bnd,do->bnn", "einsum \"bnd,do->bn[n]\": letter 'n' comes twice in the result"},
        {"ij->ji", "einsum \"ij[-]>ji\": two operands are taken, not one"},
        {"ij,jk,kl->il", "einsum \"ij,jk[,]kl->il\": two operands are taken, not three"},
        {"ij,,jk->ik", "einsum \"ij,[,]jk->ik\": two operands are taken, not three"},
        {"...d,do->...o", "einsum \"[.]..d,do->...o\": \"...\" is not taken: give every axis a letter"},
        {"bnd,do->...o", "einsum \"bnd,do->[.]..o\": \"...\" is not taken: give every axis a letter"},
        {"bnd, do->bno", "einsum \"bnd,[ ]do->bno\": the letters are a-z and A-Z"},
        {"bnd,do -> bno", "einsum \"bnd,do[ ]-> bno\": the letters are a-z and A-Z"},
        {"bnd,do->bno ", "einsum \"bnd,do->bno[ ]\": the letters are a-z and A-Z"},
        {"bnd,do->bno->bno", "einsum \"bnd,do->bno[-]>bno\": the letters are a-z and A-Z"},
        {"bnd,do->b,o", "einsum \"bnd,do->b[,]o\": the letters are a-z and A-Z"},
        {"b1d,do->b1o", "einsum \"b[1]d,do->b1o\": the letters are a-z and A-Z"},
        {"bnd>do->bno", "einsum \"bnd[>]do->bno\": the letters are a-z and A-Z"},
        {"bnd,do=>bno", "einsum \"bnd,do[=]>bno\": the letters are a-z and A-Z"},
        {"bnd\n,do->bno", "einsum \"bnd[\\x0a],do->bno\": the letters are a-z and A-Z"},
        {"bn\xc3\xa9,do->bno", "einsum \"bn[\\xc3]\\xa9,do->bno\": the letters are a-z and A-Z"},
        {"->", "einsum \"[-]>\": two operands are taken, not one"},
        {",", "einsum \",[]\": \"->\" and the result's letters are missing here"},
        {"abcdefghi,a->a", "einsum \"abcdefgh[i],a->a\": the first operand has more than 8 letters"},
        {"a,abcdefghi->a", "einsum \"a,abcdefgh[i]->a\": the second operand has more than 8 letters"},
        {"abcdefgh,ijklmnop->abcdijklm",
         "einsum \"abcdefgh,ijklmnop->abcdijkl[m]\": the result has more than 8 letters"},
        {"xyz!aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
         "einsum \"xyz[!]aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..\": the letters are a-z and A-Z"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        EinsumWords words;
        const char *error = einsum_parse(&words, cases[i].specification);
        cr_assert_not_null(error, "%s was taken", cases[i].specification);
        cr_expect_str_eq(error, cases[i].error, "%s", error);
    }
}

Test(einsum, operands_that_do_not_fit_are_refused_with_the_place)
{
    static float data[60];
    View x = view(data, 2, 3, 4), w = view(data, 4, 5), out = view(data, 2, 3, 5);
    EinsumPlan plan;
    cr_expect_null(einsum_plan(&plan, "bnd,do->bno", &out, &x, &w));
    cr_expect_str_eq(einsum_plan(&plan, "bnd,do->bno", &out, &w, &x),
                     "einsum \"[bnd],do->bno\": the first operand has 2 axes, not 3");
    cr_expect_str_eq(einsum_plan(&plan, "bnd,o->bno", &out, &x, &w),
                     "einsum \"bnd,[o]->bno\": the second operand has 2 axes, not 1");
    cr_expect_str_eq(einsum_plan(&plan, "bnd,do->", &out, &x, &w),
                     "einsum \"bnd,do->[]\": the result has 3 axes, not 0");
    cr_expect_str_eq(einsum_plan(&plan, "bnd,od->bno", &out, &x, &w),
                     "einsum \"bnd,o[d]->bno\": letter 'd' is 5 long here and 4 before");
    cr_expect_str_eq(einsum_plan(&plan, "bnd,do->nbo", &out, &x, &w),
                     "einsum \"bnd,do->[n]bo\": letter 'n' is 2 long here and 3 before");
    cr_expect_str_eq(einsum_plan(&plan, "bbd,do->bdo", &out, &x, &w),
                     "einsum \"b[b]d,do->bdo\": letter 'b' is 3 long here and 2 before");
    w.size[1] = 0;
    cr_expect_str_eq(einsum_plan(&plan, "bnd,do->bno", &out, &x, &w),
                     "einsum \"bnd,d[o]->bno\": letter 'o' has length 0");
    w.size[0] = 1; /* PyTorch would broadcast it */
    cr_expect_str_eq(einsum_plan(&plan, "bnd,do->bno", &out, &x, &w),
                     "einsum \"bnd,[d]o->bno\": letter 'd' is 1 long here and 4 before");
}

/* ---- Gradients ---- */

Test(einsum_gradient, writes_the_specification)
{
    static const struct {
        const char *specification, *for_a, *for_b;
    } cases[] = {
        {"bnd,do->bno", "bno,do->bnd", "bno,bnd->do"},
        {"bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd", "bhnm,bhnd->bhmd"},
        {"bhnm,bhmd->bhnd", "bhnd,bhmd->bhnm", "bhnd,bhnm->bhmd"},
        {"bno,po->bnp", "bnp,po->bno", "bnp,bno->po"},
        {"i,j->ij", "ij,j->i", "ij,i->j"},
        {"i,i->", ",i->i", ",i->i"},
        {",->", ",->", ",->"},
        {"abcdefgh,abcdefgh->abcdefgh", "abcdefgh,abcdefgh->abcdefgh", "abcdefgh,abcdefgh->abcdefgh"},
        {"ii,ij->ij", NULL, "ij,ii->ij"},
        {"ij,jk->k", NULL, "k,ij->jk"},
        {"ij,jkl->il", "il,jkl->ij", NULL},
        {"ik,jj->ijk", "ijk,jj->ik", NULL},
    };
    char text[EINSUM_TEXT];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int x = EINSUM_A; x <= EINSUM_B; x++) {
            const char *expected = x == EINSUM_A ? cases[i].for_a : cases[i].for_b;
            const char *error = einsum_gradient(text, cases[i].specification, x);
            cr_expect_eq(!error, expected != NULL, "%s: %s", cases[i].specification, error ? error : text);
            if (!error && expected)
                cr_expect_str_eq(text, expected, "%s: %s", cases[i].specification, text);
        }
    cr_expect_str_eq(einsum_gradient(text, "ii,ij->ij", EINSUM_A),
                     "einsum \"ij,ij->i[i]\": letter 'i' comes twice in the result");
    cr_expect_str_eq(einsum_gradient(text, "ij,jk->k", EINSUM_A),
                     "einsum \"k,jk->[i]j\": letter 'i' of the result is in neither operand");
    cr_expect_str_eq(einsum_gradient(text, "ij,jk", EINSUM_A),
                     "einsum \"ij,jk[]\": \"->\" and the result's letters are missing here");
}

/* The loss sum(d_out * out), straight from the letters. It is linear in each number of an operand, so that a
 * difference is the gradient however large the step; and with small whole numbers all of it is exact. */
static double loss(const EinsumWords *w, const char *letters, size_t index[128], const View *d_out,
                   const View *a, const View *b)
{
    if (!*letters)
        return (double)d_out->data[place(d_out, w->out, index)] * a->data[place(a, w->a, index)] *
               b->data[place(b, w->b, index)];
    double sum = 0;
    for (size_t i = 0; i < size_of_letter[(int)*letters]; i++) {
        index[(int)*letters] = i;
        sum += loss(w, letters + 1, index, d_out, a, b);
    }
    return sum;
}

/* Adds 1 to every number of x in turn and sees what becomes of the loss: what d, laid out as x, should hold.
 */
static void expect_differences(const char *specification, const float *d, float *x, size_t floats,
                               const EinsumWords *w, const char *letters, const View *d_out, const View *a,
                               const View *b)
{
    size_t index[128] = {0};
    double before = loss(w, letters, index, d_out, a, b);
    for (size_t i = 0; i < floats; i++) {
        x[i] += 1;
        double difference = loss(w, letters, index, d_out, a, b) - before;
        x[i] -= 1;
        cr_assert(d[i] == difference, "%s: [%zu] is %g, not %g", specification, i, (double)d[i], difference);
    }
}

/* True if both operands have a gradient that is an einsum; it is then held against differences. */
static bool gradients_hold(const char *specification)
{
    EinsumWords w;
    cr_assert_null(einsum_parse(&w, specification));
    char letters[EINSUM_MAX_LETTERS + 1] = "", *end = letters, text[EINSUM_TEXT], again[EINSUM_TEXT];
    bool takes[2] = {true, true};
    for (int x = EINSUM_A; x <= EINSUM_B; x++)
        for (const char *c = x == EINSUM_A ? w.a : w.b; *c; c++) {
            takes[x] = takes[x] && !strchr(c + 1, *c) &&
                       (strchr(w.out, *c) || strchr(x == EINSUM_A ? w.b : w.a, *c));
            if (!strchr(letters, *c))
                *end++ = *c, *end = '\0';
        }
    for (int x = EINSUM_A; x <= EINSUM_B; x++)
        cr_assert_eq(einsum_gradient(text, specification, x) == NULL, takes[x], "%s, operand %d: %s",
                     specification, x, text);
    if (takes[EINSUM_A]) { /* the gradient's gradient is the einsum that one began with */
        cr_assert_null(einsum_gradient(text, specification, EINSUM_A));
        cr_assert_null(einsum_gradient(again, text, EINSUM_A));
        cr_assert_str_eq(again, specification);
    }
    if (!takes[EINSUM_A] || !takes[EINSUM_B])
        return false;

    size_t floats_a, floats_b, floats_out, floats;
    View a = random_view(w.a, false, false, &floats_a), d_a = random_view(w.a, false, false, &floats);
    View b = random_view(w.b, false, false, &floats_b), d_b = random_view(w.b, false, false, &floats);
    View d_out = random_view(w.out, false, false, &floats_out);
    for (size_t i = 0; i < floats_a; i++)
        a.data[i] = (float)(random_below(7) - 3);
    for (size_t i = 0; i < floats_b; i++)
        b.data[i] = (float)(random_below(7) - 3);
    for (size_t i = 0; i < floats_out; i++)
        d_out.data[i] = (float)(random_below(7) - 3);
    for (int way = 0; way < 2; way++) {
        for (size_t i = 0; i < floats_a; i++)
            d_a.data[i] = NAN;
        for (size_t i = 0; i < floats_b; i++)
            d_b.data[i] = NAN;
        einsum_backward(way ? einsum : einsum_loops, specification, d_a, d_b, d_out, a, b);
        expect_differences(specification, d_a.data, a.data, floats_a, &w, letters, &d_out, &a, &b);
        expect_differences(specification, d_b.data, b.data, floats_b, &w, letters, &d_out, &a, &b);
    }
    free(a.data), free(b.data), free(d_a.data), free(d_b.data), free(d_out.data);
    return true;
}

Test(einsum_gradient, equals_brute_force_differences)
{
    static const char *const of_attention[] = {"bnd,do->bno", "bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd",
                                               "bno,po->bnp", "bhnd,hdo->bno",   "bnhd,bmhd->bhnm"};
    for (int c = 0; c < 128; c++)
        size_of_letter[c] = 2 + c % 3;
    for (size_t i = 0; i < sizeof of_attention / sizeof *of_attention; i++)
        cr_expect(gradients_hold(of_attention[i]));

    int held = 0, wanted = 1000;
    for (int i = 0; i < wanted; i++) {
        char text[64];
        EinsumWords words;
        do
            random_specification(text);
        while (einsum_parse(&words, text));
        for (int c = 0; c < 128; c++)
            size_of_letter[c] = 1 + random_below(3);
        held += gradients_hold(text);
    }
    cr_expect(held > wanted / 2 && held < wanted, "%d of %d had two gradients", held, wanted);
}

/* What is refused can be had through views. A diagonal is a view with one letter; a letter that is summed in
 * one operand alone may be given to the other, where it moves by 0. */
Test(einsum_gradient, of_a_diagonal_and_of_a_lone_letter_through_views)
{
    enum { N = 3, M = 2 };
    float m[N * N] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, b[N * M] = {1, 2, 3, 4, 5, 6},
                d_out[N * M] = {1, 1, 2, 0, 0, 3};
    float d_m[N * N] = {0}, d_b[N * M];
    View diagonal = view(m, N), d_diagonal = view(d_m, N);
    diagonal.stride[0] = d_diagonal.stride[0] = N + 1;
    einsum_backward(einsum, "i,ij->ij", d_diagonal, view(d_b, N, M), view(d_out, N, M), diagonal,
                    view(b, N, M));
    static const float expected[N * N] = {1 + 2, 0, 0, 0, 2 * 3, 0, 0, 0, 3 * 6};
    for (int i = 0; i < N * N; i++)
        cr_expect_eq(d_m[i], expected[i], "[%d] is %g", i, (double)d_m[i]);

    /* out[k] = sum over i and j of a[i,j] b[j,k]: d_a[i,j] = sum over k of d_out[k] b[j,k] for every i */
    float d_a[N * N], d_row[M] = {10, 1};
    View stretched = view(b, N, N, M);
    stretched.stride[0] = 0;
    einsum("k,ijk->ij", view(d_a, N, N), view(d_row, M), stretched);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            cr_expect_eq(d_a[i * N + j], 10 * b[j * M] + b[j * M + 1]);
}

Test(einsum_gradient, one_that_is_no_specification_ends_the_program_with_2, .exit_code = 2)
{
    float data[64] = {0};
    View square = view(data, 2, 2);
    einsum_backward(einsum, "ii,ij->ij", square, square, square, square, square);
}

Test(einsum, a_bad_specification_ends_the_program_with_2, .exit_code = 2)
{
    float data[64] = {0};
    einsum("ij,jk->iq", view(data, 2, 2), view(data, 2, 2), view(data, 2, 2));
}

/* ./run einsum SPECIFICATION SIZES SIZES */
Test(try_einsum, tells_good_sizes_from_bad)
{
    static const struct {
        const char *specification, *a, *b;
        bool good;
    } cases[] = {
        {"bnd,do->bno", "2,3,4", "4,5", true},
        {",->", "", "", true},
        {"i,->i", "7", "", true},
        {"abcdefgh,a->b", "1,2,1,2,1,2,1,2", "1", true},
        {"bnd,do->bno", "2,3,4", "5,4", false},
        {"bnd,do->bno", "2,3,4,", "4,5", false},
        {"bnd,do->bno", ",2,3,4", "4,5", false},
        {"bnd,do->bno", "2,,4", "4,5", false},
        {"bnd,do->bno", "2,3,-4", "4,5", false},
        {"bnd,do->bno", "2,3, 4", "4,5", false},
        {"bnd,do->bno", "2,3,4x", "4,5", false},
        {"bnd,do->bno", "0,3,4", "4,5", false},
        {"bnd,do->bno", "2,3", "4,5", false},
        {"bnd,do->bno", "1,1,1,1,1,1,1,1,1", "4,5", false},
        {"bnd,do->bno", "2,3,268435457", "4,5", false},
        {"bnd,do->bno", "2,3,99999999999999999999", "4,5", false},
        {"bnd,do->bno", "65536,65536,65536", "65536,5", false},
        {"i,j->ij", "1000000", "1000000", false}, /* the result alone is too large */
        {"i,j->ik", "2", "3", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        View out, a, b;
        const char *error = einsum_views(&out, &a, &b, cases[i].specification, cases[i].a, cases[i].b);
        cr_expect(cases[i].good == !error, "%s %s %s: %s", cases[i].specification, cases[i].a, cases[i].b,
                  error ? error : "taken");
    }
}

Test(try_einsum, runs_both_ways_and_compares)
{
    cr_redirect_stdout();
    char *argv[] = {"bhnd,bhmd->bhnm", "2,3,4,5", "2,3,6,5"};
    cr_expect_eq(try_einsum(3, argv), 0);
    fflush(stdout);
}

Test(try_einsum, wants_three_words, .exit_code = 2)
{
    char *argv[] = {"ij,jk->ik", "2,3"};
    try_einsum(2, argv);
}

Test(einsum, nan_reaches_the_result)
{
    float a[4] = {1, NAN, 3, 4}, b[4] = {0}, out[4];
    for (int way = 0; way < 2; way++) {
        (way ? einsum : einsum_loops)("ij,jk->ik", view(out, 2, 2), view(a, 2, 2), view(b, 2, 2));
        cr_expect(isnan(out[0]) && isnan(out[1]) && out[2] == 0 && out[3] == 0);
    }
}

Test(einsum, the_same_bits_for_any_number_of_threads)
{
    enum { B = 2, H = 3, N = 37, D = 19 };
    static float a[B * H * N * D], b[B * H * N * D], out[2][B * H * N * N];
    for (int i = 0; i < B * H * N * D; i++)
        a[i] = random_float(), b[i] = random_float();
    for (int way = 0; way < 2; way++)
        for (int threads = 1; threads <= 4; threads++) {
            omp_set_num_threads(threads);
            (way ? einsum : einsum_loops)("bhnd,bhmd->bhnm", view(out[threads > 1], B, H, N, N),
                                          view(a, B, H, N, D), view(b, B, H, N, D));
            if (threads > 1)
                cr_expect_eq(memcmp(out[0], out[1], sizeof out[0]), 0, "%d threads", threads);
        }
}
