/* A small einsum of two operands: read the letters, give every letter its stride in each tensor, and then
 * either walk along all letters in nested loops or see that the whole is a batch of matrix products.
 */
#include "einsum.h"

#include "error.h"
#include "matmul.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- Views ---- */

View view_of(const float *data, int axes, const size_t *size)
{
    View v = {.data = (float *)data, .axes = axes};
    size_t stride = 1;
    for (int i = axes - 1; i >= 0; i--) {
        v.size[i] = size[i];
        v.stride[i] = stride;
        stride *= size[i];
    }
    return v;
}

View transpose(View v, int axis, int other)
{
    View turned = v;
    turned.size[axis] = v.size[other], turned.stride[axis] = v.stride[other];
    turned.size[other] = v.size[axis], turned.stride[other] = v.stride[axis];
    return turned;
}

/* ---- Reading a specification ---- */

static const char *const word_name[] = {"the first operand", "the second operand", "the result"};

/* The error line: the specification with [ ] around the `length` characters at `at`, then the message. What
 * is not printable is written \xNN, and what comes long after the place is left out. */
static const char *complain(const char *specification, const char *at, size_t length, const char *format, ...)
{
    enum { SHOWN = 40 };
    static char text[400];
    char *to = text + sprintf(text, "einsum \"");
    const char *c = specification;
    for (;; c++) {
        if (c == at)
            *to++ = '[';
        if (c == at + length)
            *to++ = ']';
        if (!*c || c == specification + SHOWN)
            break;
        to += sprintf(to, *c >= ' ' && *c <= '~' ? "%c" : "\\x%02x", (unsigned char)*c);
    }
    to += sprintf(to, "%s\": ", *c ? ".." : "");

    va_list arguments;
    va_start(arguments, format);
    vsnprintf(to, text + sizeof text - to, format, arguments);
    va_end(arguments);
    return text;
}

static bool is_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* Something other than a letter stands at `at`. What would have been right there? */
static const char *complain_of_stranger(const char *specification, const char *at, int word)
{
    if (*at == '\0' && word < 2)
        return complain(specification, at, 0, "%s missing here",
                        word == 0 ? "a comma and the second operand's letters are"
                                  : "\"->\" and the result's letters are");
    if (*at == ',' && word == 1)
        return complain(specification, at, 1, "two operands are taken, not three");
    if (*at == '-' && word == 0)
        return complain(specification, at, 1, "two operands are taken, not one");
    if (*at == '-' && word == 1)
        return complain(specification, at, 1, "the result's letters follow \"->\"");
    if (*at == '.')
        return complain(specification, at, 1, "\"...\" is not taken: give every axis a letter");
    return complain(specification, at, 1, "the letters are a-z and A-Z");
}

const char *einsum_parse(EinsumWords *words, const char *specification)
{
    static const char *const ends_with[] = {",", "->", ""};
    memset(words, 0, sizeof *words);
    char *word[] = {words->a, words->b, words->out};
    const char *at = specification;

    for (int w = 0; w < 3; w++) {
        for (int axes = 0; is_letter(*at); at++, axes++) {
            if (axes == EINSUM_MAX_AXES)
                return complain(specification, at, 1, "%s has more than %d letters", word_name[w],
                                EINSUM_MAX_AXES);
            if (w == 2 && strchr(words->out, *at))
                return complain(specification, at, 1, "letter '%c' comes twice in the result", *at);
            if (w == 2 && !strchr(words->a, *at) && !strchr(words->b, *at))
                return complain(specification, at, 1, "letter '%c' of the result is in neither operand", *at);
            word[w][axes] = *at;
        }
        size_t length = strlen(ends_with[w]);
        if (strncmp(at, ends_with[w], length) != 0 || (w == 2 && *at))
            return complain_of_stranger(specification, at, w);
        at += length;
    }
    return NULL;
}

const char *einsum_gradient(char text[EINSUM_TEXT], const char *specification, int operand)
{
    EinsumWords words;
    const char *error = einsum_parse(&words, specification);
    if (error)
        return error;
    const char *wanted = operand == EINSUM_A ? words.a : words.b;
    const char *other = operand == EINSUM_A ? words.b : words.a;
    sprintf(text, "%s,%s->%s", words.out, other, wanted);
    return einsum_parse(&words, text);
}

/* ---- From letters to loops ---- */

static Letter *letter_named(EinsumPlan *plan, char name)
{
    for (int i = 0; i < plan->letters; i++)
        if (plan->letter[i].name == name)
            return &plan->letter[i];
    Letter *fresh = &plan->letter[plan->letters++];
    *fresh = (Letter){.name = name};
    return fresh;
}

const char *einsum_plan(EinsumPlan *plan, const char *specification, const View *out, const View *a,
                        const View *b)
{
    EinsumWords words;
    const char *error = einsum_parse(&words, specification);
    if (error)
        return error;

    /* All in the order of EINSUM_A, EINSUM_B, EINSUM_OUT. */
    const char *word[] = {words.a, words.b, words.out};
    const View *tensor[] = {a, b, out};
    const char *at[] = {specification, strchr(specification, ',') + 1, strchr(specification, '>') + 1};

    plan->letters = 0;
    for (int w = 0; w < 3; w++) {
        int axes = (int)strlen(word[w]);
        if (axes != tensor[w]->axes)
            return complain(specification, at[w], axes, "%s has %d axes, not %d", word_name[w],
                            tensor[w]->axes, axes);
        for (int i = 0; i < axes; i++) {
            Letter *letter = letter_named(plan, word[w][i]);
            size_t size = tensor[w]->size[i];
            if (size == 0)
                return complain(specification, at[w] + i, 1, "letter '%c' has length 0", letter->name);
            if (letter->size && letter->size != size)
                return complain(specification, at[w] + i, 1, "letter '%c' is %zu long here and %zu before",
                                letter->name, size, letter->size);
            letter->size = size;
            letter->stride[w] += tensor[w]->stride[i];
            letter->in[w] = true;
        }
    }
    return NULL;
}

/* The i-th setting of some letters, the last one running fastest, as an offset into each tensor. */
typedef struct {
    size_t in[3];
} Offsets;

static Offsets offsets_of(size_t i, const Letter *letter, int letters)
{
    Offsets at = {{0}};
    for (int l = letters - 1; l >= 0; l--) {
        size_t index = i % letter[l].size;
        for (int x = 0; x < 3; x++)
            at.in[x] += index * letter[l].stride[x];
        i /= letter[l].size;
    }
    return at;
}

static size_t settings(const Letter *letter, int letters)
{
    size_t count = 1;
    for (int l = 0; l < letters; l++)
        count *= letter[l].size;
    return count;
}

/* How far a step along the letter goes in all three tensors together. */
static size_t reach(const Letter *letter)
{
    return letter->stride[EINSUM_OUT] + letter->stride[EINSUM_A] + letter->stride[EINSUM_B];
}

/* Longest reach first; a stable sort, so that the order follows from the plan alone. */
static void sort_by_reach(Letter *letter, int letters)
{
    for (int i = 1; i < letters; i++)
        for (int j = i; j > 0 && reach(&letter[j]) > reach(&letter[j - 1]); j--) {
            Letter swapped = letter[j];
            letter[j] = letter[j - 1];
            letter[j - 1] = swapped;
        }
}

/* ---- As plain loops ---- */

/* out = 0 along those of the letters that it has. */
static void clear(const Letter *letter, int letters, float *out)
{
    if (letters == 0)
        *out = 0;
    else
        for (size_t i = 0; i < (letter->in[EINSUM_OUT] ? letter->size : 1); i++)
            clear(letter + 1, letters - 1, out + i * letter->stride[EINSUM_OUT]);
}

/* The innermost loop where its letter is summed over: sum of a[i] * b[i]. Along memory it runs in the lanes
 * of a vector. */
static float dot(size_t n, const float *a, size_t step_a, const float *b, size_t step_b)
{
    float sum = 0;
    if (step_a == 1 && step_b == 1) {
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < n; i++)
            sum += a[i] * b[i];
    } else {
        for (size_t i = 0; i < n; i++)
            sum += a[i * step_a] * b[i * step_b];
    }
    return sum;
}

/* The innermost loop where its letter is in the result: out[i] += a[i] * b[i]. If one operand stays where it
 * is, and the others lie along memory, this too is a loop for vectors. */
static void add_row(size_t n, float *restrict out, size_t step_out, const float *restrict a, size_t step_a,
                    const float *restrict b, size_t step_b)
{
    if (step_out == 1 && step_a == 0 && step_b == 1) {
        float factor = *a;
        for (size_t i = 0; i < n; i++)
            out[i] += factor * b[i];
    } else {
        for (size_t i = 0; i < n; i++)
            out[i * step_out] += a[i * step_a] * b[i * step_b];
    }
}

/* out += a * b for every setting of the letters: one loop a letter. */
static void add_products(const Letter *letter, int letters, float *out, const float *a, const float *b)
{
    if (letters == 0) {
        *out += *a * *b;
        return;
    }
    size_t n = letter->size, step_out = letter->stride[EINSUM_OUT];
    size_t step_a = letter->stride[EINSUM_A], step_b = letter->stride[EINSUM_B];
    if (letters > 1)
        for (size_t i = 0; i < n; i++)
            add_products(letter + 1, letters - 1, out + i * step_out, a + i * step_a, b + i * step_b);
    else if (!letter->in[EINSUM_OUT])
        *out += dot(n, a, step_a, b, step_b);
    else if (letter->in[EINSUM_B])
        add_row(n, out, step_out, a, step_a, b, step_b);
    else
        add_row(n, out, step_out, b, step_b, a, step_a);
}

/* The letters that reach furthest are the outer loops, so that the innermost runs along memory. The result's
 * furthest letter goes first of all, and with it all result letters that then follow: their settings write to
 * different places and run in parallel. One letter at least stays inside. */
static void run_loops(const EinsumPlan *plan, float *out, const float *a, const float *b)
{
    Letter letter[EINSUM_MAX_LETTERS];
    int letters = plan->letters, outer = 0;
    memcpy(letter, plan->letter, sizeof letter);
    sort_by_reach(letter, letters);

    int first = 0;
    while (first < letters && !letter[first].in[EINSUM_OUT])
        first++;
    if (first < letters) {
        Letter furthest = letter[first];
        memmove(letter + 1, letter, first * sizeof(Letter));
        letter[0] = furthest;
    }
    while (outer < letters - 1 && letter[outer].in[EINSUM_OUT])
        outer++;

    size_t count = settings(letter, outer);
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        Offsets at = offsets_of(i, letter, outer);
        clear(letter + outer, letters - outer, out + at.in[EINSUM_OUT]);
        add_products(letter + outer, letters - outer, out + at.in[EINSUM_OUT], a + at.in[EINSUM_A],
                     b + at.in[EINSUM_B]);
    }
}

/* ---- As matrix products ---- */

EinsumKind einsum_kind(const Letter *letter)
{
    const bool *in = letter->in;
    if (!in[EINSUM_OUT])
        return in[EINSUM_A] && in[EINSUM_B] ? EINSUM_SUMMED : EINSUM_ALONE;
    return in[EINSUM_A] && in[EINSUM_B] ? EINSUM_BATCH : in[EINSUM_A] ? EINSUM_ROW : EINSUM_COLUMN;
}

/* The plan's letters of one kind, with neighbours in memory merged into one: going once through the inner
 * letter must come out where one step of the outer one does, in every tensor. "bn" of a row-major (B,T,C) is
 * one letter of B*T. */
static int gather(Letter *group, const EinsumPlan *plan, EinsumKind kind)
{
    int count = 0, merged = 0;
    for (int i = 0; i < plan->letters; i++)
        if (einsum_kind(&plan->letter[i]) == kind)
            group[count++] = plan->letter[i];
    sort_by_reach(group, count);

    for (int i = 1; i < count; i++) {
        Letter *outer = &group[merged], inner = group[i];
        bool joins = true;
        for (int x = 0; x < 3; x++)
            joins = joins && outer->stride[x] == inner.size * inner.stride[x];
        if (joins) {
            inner.size *= outer->size;
            *outer = inner;
        } else {
            group[++merged] = inner;
        }
    }
    if (count == 0)
        group[0] = (Letter){.size = 1};
    return merged + 1;
}

/* Can a BLAS read a matrix with these two letters for its rows and columns? One of them must move by 1. */
static bool is_matrix(char *transposed, int *ld, const Letter *rows, const Letter *columns, int x)
{
    for (int turn = 0; turn < 2; turn++) {
        const Letter *slow = turn ? columns : rows, *fast = turn ? rows : columns;
        size_t step = slow->size > 1 ? slow->stride[x] : fast->size;
        if ((fast->size == 1 || fast->stride[x] == 1) && step >= fast->size && step <= INT_MAX) {
            *transposed = turn ? 'T' : 'N';
            *ld = (int)step;
            return true;
        }
    }
    return false;
}

/* Takes the best row, column and summed letter for the matrix, given which operand stands left. */
static bool choose_matrix(EinsumProduct *p, const EinsumPlan *plan)
{
    Letter row[EINSUM_MAX_LETTERS], column[EINSUM_MAX_LETTERS], summed[EINSUM_MAX_LETTERS],
        batch[EINSUM_MAX_LETTERS];
    int rows = gather(row, plan, p->left == EINSUM_A ? EINSUM_ROW : EINSUM_COLUMN);
    int columns = gather(column, plan, p->left == EINSUM_A ? EINSUM_COLUMN : EINSUM_ROW);
    int sums = gather(summed, plan, EINSUM_SUMMED);
    int batches = gather(batch, plan, EINSUM_BATCH);

    int best_row = -1, best_column = -1, best_sum = -1;
    size_t most = 0;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            for (int k = 0; k < sums; k++) {
                char plain, t_left, t_right;
                int ld_out, ld_left, ld_right;
                size_t work = row[i].size * column[j].size * summed[k].size;
                if (work <= most || row[i].size > INT_MAX || column[j].size > INT_MAX ||
                    summed[k].size > INT_MAX ||
                    !is_matrix(&plain, &ld_out, &row[i], &column[j], EINSUM_OUT) || plain != 'N' ||
                    !is_matrix(&t_left, &ld_left, &row[i], &summed[k], p->left) ||
                    !is_matrix(&t_right, &ld_right, &summed[k], &column[j], p->right))
                    continue;
                most = work, best_row = i, best_column = j, best_sum = k;
                p->rows = row[i], p->columns = column[j], p->summed = summed[k];
                p->transpose_left = t_left, p->transpose_right = t_right;
                p->ld_left = ld_left, p->ld_right = ld_right, p->ld_out = ld_out;
            }

    p->loops = p->agains = 0;
    for (int i = 0; i < batches; i++)
        p->loop[p->loops++] = batch[i];
    for (int i = 0; i < rows; i++)
        if (i != best_row)
            p->loop[p->loops++] = row[i];
    for (int j = 0; j < columns; j++)
        if (j != best_column)
            p->loop[p->loops++] = column[j];
    for (int k = 0; k < sums; k++)
        if (k != best_sum)
            p->again[p->agains++] = summed[k];
    return most > 0;
}

bool einsum_product(EinsumProduct *product, const EinsumPlan *plan)
{
    int count[EINSUM_ALONE + 1] = {0};
    for (int i = 0; i < plan->letters; i++)
        count[einsum_kind(&plan->letter[i])]++;
    if (count[EINSUM_ALONE] > 0 || count[EINSUM_SUMMED] == 0 || count[EINSUM_ROW] + count[EINSUM_COLUMN] == 0)
        return false;

    product->left = EINSUM_A, product->right = EINSUM_B;
    if (choose_matrix(product, plan))
        return true;
    product->left = EINSUM_B,
    product->right = EINSUM_A; /* the result transposed: (left right)^T = right^T left^T */
    return choose_matrix(product, plan);
}

/* The loop letters in parallel; where there are none, matmul() is parallel itself. */
static void run_product(const EinsumProduct *p, float *out, const float *a, const float *b)
{
    const float *left = p->left == EINSUM_A ? a : b, *right = p->left == EINSUM_A ? b : a;
    size_t products = settings(p->loop, p->loops), terms = settings(p->again, p->agains);

#pragma omp parallel for if (products > 1)
    for (size_t i = 0; i < products; i++) {
        Offsets at = offsets_of(i, p->loop, p->loops);
        for (size_t term = 0; term < terms; term++) {
            Offsets more = offsets_of(term, p->again, p->agains);
            matmul(p->transpose_left, p->transpose_right, (int)p->rows.size, (int)p->columns.size,
                   (int)p->summed.size, 1.0f, left + at.in[p->left] + more.in[p->left], p->ld_left,
                   right + at.in[p->right] + more.in[p->right], p->ld_right, term == 0 ? 0.0f : 1.0f,
                   out + at.in[EINSUM_OUT], p->ld_out);
        }
    }
}

void einsum_text(char *text, size_t size, const EinsumPlan *plan)
{
    EinsumProduct p;
    if (!einsum_product(&p, plan)) {
        snprintf(text, size, "plain loops");
        return;
    }
    size_t products = settings(p.loop, p.loops) * settings(p.again, p.agains);
    snprintf(text, size, "%zu product%s of (%zu x %zu) (%zu x %zu)", products, products == 1 ? "" : "s",
             p.rows.size, p.summed.size, p.summed.size, p.columns.size);
}

/* ---- Both ways, from the text ---- */

static EinsumPlan plan_or_die(const char *specification, const View *out, const View *a, const View *b)
{
    EinsumPlan plan;
    const char *error = einsum_plan(&plan, specification, out, a, b);
    if (error)
        die(EXIT_USAGE, "%s", error);
    return plan;
}

void einsum_loops(const char *specification, View out, View a, View b)
{
    EinsumPlan plan = plan_or_die(specification, &out, &a, &b);
    run_loops(&plan, out.data, a.data, b.data);
}

void einsum(const char *specification, View out, View a, View b)
{
    EinsumPlan plan = plan_or_die(specification, &out, &a, &b);
    EinsumProduct product;
    if (einsum_product(&product, &plan))
        run_product(&product, out.data, a.data, b.data);
    else
        run_loops(&plan, out.data, a.data, b.data);
}

/* ---- Gradients ---- */

void einsum_backward(EinsumFunction *einsum_with, const char *specification, View d_a, View d_b, View d_out,
                     View a, View b)
{
    char for_a[EINSUM_TEXT], for_b[EINSUM_TEXT];
    const char *error = einsum_gradient(for_a, specification, EINSUM_A);
    error = error ? error : einsum_gradient(for_b, specification, EINSUM_B);
    if (error)
        die(EXIT_USAGE, "%s (for a gradient)", error);
    einsum_with(for_a, d_a, d_out, b);
    einsum_with(for_b, d_b, d_out, a);
}
