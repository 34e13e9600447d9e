#include "oracle_internal.h"
#include "memory.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void oracle_widen(double *out, const float *in, size_t n)
{
#pragma omp parallel for if (n > SMALL)
    for (size_t i = 0; i < n; i++)
        out[i] = in[i];
}

double oracle_dropout(size_t row, int key, const uint8_t *keep, const AttentionShape *s)
{
    if (s->dropout == 0)
        return 1;
    bool stays =
        keep ? keep[row * s->key_tokens + key] : dropout_keeps(s->dropout_seed, row, key, s->dropout);
    return stays ? 1 / (1 - (double)s->dropout) : 0;
}

double oracle_attend_row(double *out, double *lse, double *weights, size_t row, const double *q,
                         const double *k, const double *v, const uint8_t *keep, const AttentionShape *s)
{
    size_t tokens = s->tokens, heads = s->heads, keys = s->key_tokens, size = s->head_size;
    int t = (int)(row % tokens), h = (int)(row / tokens % heads), b = (int)(row / tokens / heads);
    int *key = allocate_zeroed(keys, sizeof *key); /* the keys allowed, and the score of each */
    double *p = allocate_zeroed(keys, sizeof *p);
    int allowed = 0;
    double m = -INFINITY, l = 0, largest = 0;

    for (int t2 = 0; t2 < s->key_tokens; t2++) {
        double bias = bias_at(s, b, h, t, t2);
        if (!attends(s, b, h, t, t2) || bias == -INFINITY)
            continue;
        double score = s->scale * oracle_dot(q, k + t2 * size, s->head_size) + bias;
        key[allowed] = t2;
        p[allowed++] = score;
        if (score > m)
            m = score;
        if (fabs(score) > largest)
            largest = fabs(score);
    }
    for (int i = 0; i < allowed; i++) {
        p[i] = exp(p[i] - m);
        l += p[i];
    }
    if (lse)
        *lse = allowed ? m + log(l) : -INFINITY;

    if (weights)
        memset(weights, 0, keys * sizeof *weights);
    if (out)
        memset(out, 0, size * sizeof *out);
    for (int i = 0; i < allowed; i++) {
        double weight = p[i] / l * oracle_dropout(row, key[i], keep, s);
        if (weights)
            weights[key[i]] = weight;
        for (size_t d = 0; out && d < size; d++)
            out[d] += weight * v[key[i] * size + d];
    }
    free(key);
    free(p);
    return largest;
}

double oracle_attention(double *out, double *lse, double *weights, const size_t *rows, size_t count,
                        const float *q, const float *k, const float *v, const uint8_t *keep,
                        const AttentionShape *s)
{
    size_t size = s->head_size, keys = s->key_tokens, group = s->heads / s->kv_heads, slab_size = keys * size;
    double *k_slab = allocate_zeroed(slab_size, sizeof *k_slab); /* one key/value head, in double */
    double *v_slab = allocate_zeroed(slab_size, sizeof *v_slab);
    double largest = 0;
    if (!rows)
        count = lse_count(s);

    /* Rows that follow one another and share a key/value head are done together. */
    for (size_t first = 0, end; first < count; first = end) {
        size_t slab = (rows ? rows[first] : first) / s->tokens / group;
        for (end = first + 1; end < count && (rows ? rows[end] : end) / s->tokens / group == slab;)
            end++;
        oracle_widen(k_slab, k + slab * slab_size, slab_size);
        oracle_widen(v_slab, v + slab * slab_size, slab_size);
#pragma omp parallel for schedule(dynamic) reduction(max : largest) if ((end - first) * slab_size > SMALL)
        for (size_t i = first; i < end; i++) {
            size_t row = rows ? rows[i] : i;
            double *q_row = allocate_zeroed(size, sizeof *q_row);
            for (size_t d = 0; d < size; d++)
                q_row[d] = q[row * size + d];
            double score =
                oracle_attend_row(out ? out + i * size : NULL, lse ? lse + i : NULL,
                                  weights ? weights + i * keys : NULL, row, q_row, k_slab, v_slab, keep, s);
            largest = score > largest ? score : largest;
            free(q_row);
        }
    }
    free(k_slab);
    free(v_slab);
    return largest;
}

void oracle_add_product(Matrix c, Matrix a, Matrix b, size_t rows, size_t inner, size_t columns)
{
#pragma omp parallel for if (rows * inner * columns > SMALL)
    for (size_t i = 0; i < rows; i++) {
        double *sum = c.at + i * c.row;
        for (size_t k = 0; k < inner; k++) {
            const double factor = a.at[i * a.row + k * a.column], *row = b.at + k * b.row;
            for (size_t j = 0; j < columns; j++)
                sum[j] += factor * row[j];
        }
    }
}

double *oracle_matrix(const OracleLinear *linear, size_t outputs, size_t inputs)
{
    double *matrix = allocate_zeroed(outputs * inputs, sizeof *matrix);
    for (size_t o = 0; o < outputs; o++)
        for (size_t i = 0; i < inputs; i++)
            matrix[o * inputs + i] = linear->weight[o * linear->stride_out + i * linear->stride_in];
    return matrix;
}

void oracle_project(double *out, const OracleLinear *linear, double *x, size_t count, size_t inputs,
                    size_t outputs)
{
    if (!linear) {
        memcpy(out, x, count * inputs * sizeof *out);
        return;
    }
    OracleLinear from_right = {linear->weight, NULL, linear->stride_in, linear->stride_out};
    double *columns = oracle_matrix(&from_right, inputs, outputs);
    for (size_t row = 0; row < count; row++)
        for (size_t o = 0; o < outputs; o++)
            out[row * outputs + o] = linear->bias ? linear->bias[o] : 0;
    oracle_add_product(by_rows(out, outputs), by_rows(x, inputs), by_rows(columns, outputs), count, inputs,
                       outputs);
    free(columns);
}

void oracle_rotate(double *row, int size, double position, double theta)
{
    for (int i = 0; i < size / 2; i++) {
        double angle = position * pow(theta, -2.0 * i / size), x = row[i], y = row[i + size / 2];
        row[i] = x * cos(angle) - y * sin(angle);
        row[i + size / 2] = y * cos(angle) + x * sin(angle);
    }
}

/* One batch entry's rows of a module, while it is worked on. */
typedef struct {
    double *q;      /* (NH, rows, HS) */
    double *k, *v;  /* (NKV, T, HS) */
    double *joined; /* (rows, C_out), the heads side by side */
} Entry;

/* x (T,C) of one batch entry to the queries of the chosen rows and the keys and values of all. */
static Entry project_entry(const float *x, const size_t *chosen, size_t count, const OracleModule *module,
                           const AttentionShape *s)
{
    size_t tokens = s->tokens, embed = s->embed, size = s->head_size, heads = s->heads,
           kv_heads = s->kv_heads;
    Entry e = {.q = allocate_zeroed(heads * count * size, sizeof(double)),
               .k = allocate_zeroed(kv_heads * tokens * size, sizeof(double)),
               .v = allocate_zeroed(kv_heads * tokens * size, sizeof(double)),
               .joined = allocate_zeroed(heads * count * size, sizeof(double))};
    double *x_all = allocate_zeroed(tokens * embed, sizeof *x_all);
    double *x_chosen = allocate_zeroed(count * embed, sizeof *x_chosen);
    oracle_widen(x_all, x, tokens * embed);
    for (size_t i = 0; i < count; i++)
        memcpy(x_chosen + i * embed, x_all + chosen[i] * embed, embed * sizeof *x_all);

    for (size_t h = 0; h < heads; h++) {
        double *q = e.q + h * count * size;
        oracle_project(q, module->query ? &module->query[h] : NULL, x_chosen, count, embed, size);
        for (size_t i = 0; module->rope_theta > 0 && i < count; i++)
            oracle_rotate(q + i * size, s->head_size, (double)chosen[i], module->rope_theta);
    }
    for (size_t h = 0; h < kv_heads; h++) {
        double *k = e.k + h * tokens * size;
        oracle_project(k, module->key ? &module->key[h] : NULL, x_all, tokens, embed, size);
        oracle_project(e.v + h * tokens * size, module->value ? &module->value[h] : NULL, x_all, tokens,
                       embed, size);
        for (size_t t = 0; module->rope_theta > 0 && t < tokens; t++)
            oracle_rotate(k + t * size, s->head_size, (double)t, module->rope_theta);
    }
    free(x_all);
    free(x_chosen);
    return e;
}

/* All heads of one row: writes their outputs side by side to joined (C_out) and the weights, per head (NH,TK)
 * or averaged (TK). i counts the entry's chosen rows, t is the row's place in the entry b. */
static double attend_heads(const Entry *e, double *weights, bool per_head, size_t i, size_t count, size_t b,
                           size_t t, const uint8_t *keep, const AttentionShape *s)
{
    size_t size = s->head_size, heads = s->heads, group = s->heads / s->kv_heads, keys = s->key_tokens;
    double *one_head = weights && !per_head ? allocate_zeroed(keys, sizeof *one_head) : NULL;
    double largest = 0;
    if (one_head)
        memset(weights, 0, keys * sizeof *weights);
    for (size_t h = 0; h < heads; h++) {
        double *head_weights = one_head ? one_head : weights ? weights + h * keys : NULL;
        size_t slab = h / group * keys * size;
        double score = oracle_attend_row(e->joined + (i * heads + h) * size, NULL, head_weights,
                                         lse_index(s, (int)b, (int)h, (int)t), e->q + (h * count + i) * size,
                                         e->k + slab, e->v + slab, keep, s);
        largest = score > largest ? score : largest;
        for (size_t t2 = 0; one_head && t2 < keys; t2++)
            weights[t2] += one_head[t2] / (double)heads;
    }
    free(one_head);
    return largest;
}

double oracle_module(double *out, double *weights, bool per_head, const size_t *rows, size_t count,
                     const float *x, const OracleModule *module, const uint8_t *keep, const AttentionShape *s)
{
    size_t tokens = s->tokens, embed_out = (size_t)s->heads * s->head_size;
    size_t row_weights = (per_head ? (size_t)s->heads : 1) * s->key_tokens;
    double largest = 0;
    if (!rows)
        count = (size_t)s->batch * tokens;

    /* Rows that follow one another in one batch entry are done together. */
    for (size_t first = 0, end; first < count; first = end) {
        size_t b = (rows ? rows[first] : first) / tokens;
        for (end = first + 1; end < count && (rows ? rows[end] : end) / tokens == b;)
            end++;
        size_t here = end - first;
        size_t *chosen = allocate_zeroed(here, sizeof *chosen);
        for (size_t i = 0; i < here; i++)
            chosen[i] = (rows ? rows[first + i] : first + i) % tokens;

        Entry e = project_entry(x + b * tokens * s->embed, chosen, here, module, s);
#pragma omp parallel for schedule(dynamic) reduction(max : largest) if (here * tokens * embed_out > SMALL)
        for (size_t i = 0; i < here; i++) {
            double score = attend_heads(&e, weights ? weights + (first + i) * row_weights : NULL, per_head, i,
                                        here, b, chosen[i], keep, s);
            largest = score > largest ? score : largest;
        }
        for (int i = 0; i < module->outputs; i++) {
            double *joined = e.joined;
            oracle_project(e.q, &module->output[i], joined, here, embed_out, embed_out);
            e.joined = e.q; /* of the same size, and no longer needed */
            e.q = joined;
        }
        memcpy(out + first * embed_out, e.joined, here * embed_out * sizeof *out);
        free(e.q);
        free(e.k);
        free(e.v);
        free(e.joined);
        free(chosen);
    }
    return largest;
}

/* Puts a row number into its place; returns 1, or 0 if it was there already. */
static size_t insert_row(size_t *chosen, size_t count, size_t row)
{
    size_t i = count;
    while (i > 0 && chosen[i - 1] > row)
        i--;
    if (i > 0 && chosen[i - 1] == row)
        return 0;
    memmove(chosen + i + 1, chosen + i, (count - i) * sizeof *chosen);
    chosen[i] = row;
    return 1;
}

size_t sample_rows(size_t *chosen, size_t wanted, size_t rows, int tokens)
{
    enum { SLABS = 4 };
    const size_t edges[] = {0, (size_t)tokens - 1, 15, 16, 63, 64, 127, 128};
    size_t slabs = rows / (size_t)tokens, count = 0;
    if (wanted > rows)
        wanted = rows;
    for (size_t edge = 0; edge < sizeof edges / sizeof edges[0]; edge++)
        for (size_t i = 0; i < SLABS && slabs > 0; i++) {
            size_t row = i * (slabs - 1) / (SLABS - 1) * (size_t)tokens + edges[edge];
            if (edges[edge] < (size_t)tokens && count < wanted)
                count += insert_row(chosen, count, row);
        }

    /* The rest: one from each of as many equal stretches, so that none of the tensor is left out. A row that
     * is taken already gives way to the next. */
    size_t rest = wanted - count;
    uint64_t state = 123;
    for (size_t i = 0; i < rest; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's generator, MMIX */
        size_t start = rows / rest * i + rows % rest * i / rest;
        size_t next = rows / rest * (i + 1) + rows % rest * (i + 1) / rest;
        size_t row = start + (size_t)(state >> 33) % (next - start);
        while (!insert_row(chosen, count, row % rows))
            row++;
        count++;
    }
    return count;
}
