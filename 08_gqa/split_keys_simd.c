/* A decode step near the speed at which memory can be read. The contract is in the header.
 *
 * - A number of a key or value is multiplied once for each row of its group and is not needed again: memory is what
 *   counts. All rows of a group meet a key when it is there.
 * - Keys, then values, are read as they lie in memory, from one end to the other. In that order most processors fetch
 *   ahead of their own accord; several keys side by side made it slower. Some fetch not far enough: they are asked to.
 * - Lanes run along a head. What is used again for each key, ROWS queries while keys go past and ROWS results while values do, is
 *   in registers as far as these reach and else in the nearest cache: it costs less than to read a key in parts.
 * - The keys are split, for there may be more threads than key/value heads, and each split has its own maximum. */
#include "split_keys_simd.h"

#include <math.h>
#include <string.h>

#include "../07_flash_tiled/flash_tiled_simd.h"

enum {
    SHORTEST = 256, /* keys of a split: few enough to share out a short cache, */
    LONGEST = 2048, /* and many, since each split begins by reading elsewhere */
    TASKS = 128,    /* what a problem is split into between those two */
    STEP = 16,      /* keys that go past before the next columns of a head wider than COLUMNS vectors */
    AHEAD = 12,     /* memory is asked for the row that is so many keys on */
    ROWS = 4,
    COLUMNS = 128 / LANES, /* vectors of a row that are read at once */
};

#define EACH_ROW(r) UNROLL for (int r = 0; r < ROWS; r++)
#define EACH(j, n) UNROLL for (int j = 0; j < COLUMNS; j++) if (j < (n))

/* ---- Partial results ---- */

/* What one row makes of one split. Weights are 2^(score - m), scores times log2 e. */
typedef struct {
    float *o, *m, *l; /* o: HS numbers and room for whole vectors; not written where l is 0 */
} Partial;

/* How many splits: from the shape alone, and never fewer for more keys. */
static size_t splits_of(const AttentionShape *s)
{
    size_t TK = s->key_tokens, kv_heads = (size_t)s->batch * s->kv_heads;
    size_t fewest = (TK + LONGEST - 1) / LONGEST, most = (TK + SHORTEST - 1) / SHORTEST;
    size_t wanted = (TASKS + kv_heads - 1) / kv_heads;
    return wanted < fewest ? fewest : wanted < most ? wanted : most;
}

/* How many keys to a split; the last may have fewer, or none. */
static int split_of(const AttentionShape *s)
{
    return (int)((s->key_tokens + splits_of(s) - 1) / splits_of(s));
}

/* The (token, head of the group) pairs of a key/value head, token by token. */
static int rows_of(const AttentionShape *s)
{
    return s->tokens * (s->heads / s->kv_heads);
}

/* They are taken ROWS at a time; past the last comes the last again, with results that nobody reads. */
static size_t stored_rows(const AttentionShape *s)
{
    return ((size_t)rows_of(s) + ROWS - 1) / ROWS * ROWS;
}

static size_t width_of(const AttentionShape *s)
{
    return ((size_t)s->head_size + 15) / 16 * 16;
}

static Partial partial_of(float *scratch, const AttentionShape *s, size_t kv_head, size_t split, int row)
{
    size_t n = (kv_head * splits_of(s) + split) * stored_rows(s) + row;
    float *o = scratch + n * (width_of(s) + 16);
    return (Partial){.o = o, .m = o + width_of(s), .l = o + width_of(s) + 1};
}

size_t split_keys_scratch(const AttentionShape *s)
{
    return (size_t)s->batch * s->kv_heads * splits_of(s) * stored_rows(s) * (width_of(s) + 16);
}

bool split_keys_wins(const AttentionShape *s)
{
    enum { FEW_ROWS = 16 };
    MaskKind kind = s->mask.kind;
    return (int64_t)s->tokens * (s->heads / s->kv_heads) <= FEW_ROWS && s->key_tokens >= SHORTEST &&
           !s->bias && s->dropout == 0 && kind != MASK_LOCAL_GLOBAL && kind != MASK_DILATED;
}

/* ---- Few keys and some columns ---- */

/* ROWS rows, some keys, and their values. */
typedef struct {
    const float *q[ROWS], *k, *v;
    float *o[ROWS];
    _Alignas(64) float weight[ROWS][LONGEST];
    int keys, HS;
} Meeting;

/* weight[r][i] += q[r] . key i, of the columns d .. d + vectors * LANES - 1, or up to the row's end for a last vector;
 * for the keys first .. end - 1. vectors is a constant where this is inlined: so y may stay in registers. */
INLINE void multiply_keys(Meeting *t, int vectors, int first, int end, int d)
{
    int n = vectors == 1 ? t->HS - d : LANES;
    Vector y[ROWS][COLUMNS];
    EACH_ROW(r)
        EACH(j, vectors)
            y[r][j] = load_first(t->q[r] + d + j * LANES, n);
    for (int i = first; i < end; i++) {
        const float *key = t->k + (size_t)i * t->HS + d;
        Vector sum[ROWS] = {0};
        EACH(j, vectors) {
            Vector x = load_first(key + j * LANES, n);
            __builtin_prefetch(key + AHEAD * t->HS + j * LANES);
            EACH_ROW(r)
                sum[r] += y[r][j] * x;
        }
        EACH_ROW(r)
            t->weight[r][i] = (d > 0 ? t->weight[r][i] : 0) + sum_lanes(sum[r]);
    }
}

/* o[r] += the sum over i of weight[r][i] * value i; likewise. */
INLINE void add_values(Meeting *t, int vectors, int first, int end, int d)
{
    int n = vectors == 1 ? t->HS - d : LANES;
    Vector c[ROWS][COLUMNS];
    EACH_ROW(r)
        EACH(j, vectors)
            c[r][j] = ((Vector *)(t->o[r] + d))[j];
    for (int i = first; i < end; i++) {
        const float *value = t->v + (size_t)i * t->HS + d;
        EACH(j, vectors) {
            Vector x = load_first(value + j * LANES, n);
            __builtin_prefetch(value + AHEAD * t->HS + j * LANES);
            EACH_ROW(r)
                c[r][j] += t->weight[r][i] * x;
        }
    }
    EACH_ROW(r)
        EACH(j, vectors)
            ((Vector *)(t->o[r] + d))[j] = c[r][j];
}

/* One of the two for all keys and columns. */
INLINE void for_all(Meeting *t, void (*piece)(Meeting *, int, int, int, int))
{
    enum { WIDE = COLUMNS * LANES, HALF = WIDE / 2 };
    for (int first = 0; first < t->keys; first += STEP) {
        int end = smaller(first + STEP, t->keys), d = 0;
        for (; d + WIDE <= t->HS; d += WIDE)
            piece(t, COLUMNS, first, end, d);
        for (; d + HALF <= t->HS; d += HALF)
            piece(t, COLUMNS / 2, first, end, d);
        for (; d < t->HS; d += LANES)
            piece(t, 1, first, end, d);
    }
}

/* Products become weights 2^(factor * product - m), and 0 outside first <= i < end; m is the largest exponent (never NaN,
 * but NaN is weighed as NaN), l the sum of the weights. */
static void weigh(float *score, float *m, float *l, float factor, int first, int end, int keys)
{
    int vectors = (keys + LANES - 1) / LANES;
    Vector top = (Vector){0} - INFINITY, sum = {0}, *x = (Vector *)score;
    for (int i = 0; i < vectors * LANES; i++)
        score[i] = i < first || i >= smaller(end, keys) ? -INFINITY : score[i] * factor;
    for (int j = 0; j < vectors; j++)
        top = vector_max(x[j], top);
    *m = top[0];
    for (int i = 1; i < LANES; i++)
        *m = fmaxf(*m, top[i]);
    for (int j = 0; j < vectors; j++) {
        x[j] = exp2_vector(x[j] - (*m == -INFINITY ? 0 : *m));
        sum += x[j];
    }
    *l = sum_lanes(sum);
}

/* ROWS rows from `row` on meet one split of one key/value head, which begins at k and v. */
static void attend_split(float *scratch, const float *q, const float *k, const float *v,
                         const AttentionShape *s, size_t kv_head, size_t split, int row)
{
    int group = s->heads / s->kv_heads;
    int b = (int)(kv_head / s->kv_heads), first_head = (int)(kv_head % s->kv_heads) * group;
    int from = s->key_tokens, to = 0, first[ROWS], end[ROWS];
    Meeting t;
    t.HS = s->head_size;
    Partial partial[ROWS];
    for (int r = 0; r < ROWS; r++) {
        int i = smaller(row + r, rows_of(s) - 1);
        partial[r] = partial_of(scratch, s, kv_head, split, row + r);
        *partial[r].m = -INFINITY;
        *partial[r].l = 0;
        t.o[r] = partial[r].o;
        t.q[r] = q + query_row(s, b, first_head + i % group, i / group);
        flash_bounds(s, b, i / group, &first[r], &end[r]);
        from = smaller(from, first[r]);
        to = larger(to, end[r]);
    }
    size_t start = split * split_of(s); /* it may lie beyond the keys */
    from = larger(from, (int)start);
    to = smaller(to, (int)(start + split_of(s)));
    if (from >= to)
        return;

    t.k = k + (size_t)from * t.HS;
    t.v = v + (size_t)from * t.HS;
    t.keys = to - from;
    for_all(&t, multiply_keys);
    for (int r = 0; r < ROWS; r++) {
        weigh(t.weight[r], partial[r].m, partial[r].l, s->scale * log2e, first[r] - from, end[r] - from,
              t.keys);
        memset(t.o[r], 0, width_of(s) * sizeof *t.o[r]);
    }
    for_all(&t, add_values);
}

/* ---- The merge ---- */

/* Sums over different keys become one once all are measured from the same maximum: chapter 6's merge_partials, in the
 * order of the keys. */
static void merge_splits(float *out, float *lse, float *scratch, const AttentionShape *s, size_t kv_head,
                         int row)
{
    float m = -INFINITY, l = 0;
    for (size_t n = 0; n < splits_of(s); n++)
        m = fmaxf(m, *partial_of(scratch, s, kv_head, n, row).m);
    memset(out, 0, s->head_size * sizeof *out);
    for (size_t n = 0; n < splits_of(s); n++) {
        Partial other = partial_of(scratch, s, kv_head, n, row);
        if (*other.l == 0)
            continue; /* it saw no key */
        float mend = *other.m == m ? 1 : exp2f(*other.m - m);
        l += mend * *other.l;
        for (int d = 0; d < s->head_size; d++)
            out[d] += mend * other.o[d];
    }
    float one_over_l = l == 0 ? 0 : 1 / l;
    for (int d = 0; d < s->head_size; d++)
        out[d] *= one_over_l;
    if (lse)
        *lse = l == 0 ? -INFINITY : (float)((m + log2((double)l)) / 1.4426950408889634);
}

void attention_split_keys(float *out, float *lse, float *scratch, const float *q, const float *k,
                          const float *v, size_t head_step, const AttentionShape *s)
{
    size_t kv_heads = (size_t)s->batch * s->kv_heads, splits = splits_of(s);
    int rows = rows_of(s), group = s->heads / s->kv_heads;

#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < kv_heads * splits; n++)
        for (int row = 0; row < rows; row += ROWS)
            attend_split(scratch, q, k + n / splits * head_step, v + n / splits * head_step, s, n / splits,
                         n % splits, row);

#pragma omp parallel for collapse(2)
    for (size_t n = 0; n < kv_heads; n++)
        for (int row = 0; row < rows; row++) {
            int b = (int)(n / s->kv_heads), h = (int)(n % s->kv_heads) * group + row % group;
            merge_splits(out + query_row(s, b, h, row / group),
                         lse ? lse + lse_index(s, b, h, row / group) : NULL, scratch, s, n, row);
        }
}
