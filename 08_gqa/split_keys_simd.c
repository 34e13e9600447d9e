/* A decode step near the speed at which memory can be read. The contract is in the header.
 *
 * One row that meets a key uses each of its numbers once: no multiply-add unit is short of work there, memory
 * is. So every key and value is fetched from memory once, for all rows of its group and well before it is
 * needed, and lanes run along the head as it lies there. */
#include "split_keys_simd.h"

#include <math.h>
#include <string.h>

#include "../07_flash_tiled/flash_tiled_simd.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    SPLIT = SP,     /* keys of a split: their weights stay in the nearest cache */
    ROWS = 4,        /* queries whose sums are in registers at once */
    KEYS = KE, /* keys likewise, or vectors of a value */
    STEP = ST,       /* keys whose values are added up before a result leaves the registers */
    AHEAD = AH,

};

static const float log2e = 1.44269504f;

/* A vector anywhere: heads of 5 numbers are not aligned. */
typedef float LooseVector __attribute__((vector_size(LANES * sizeof(float)), may_alias, aligned(4)));

/* What one row makes of one split, in scratch: o (HS rounded up to whole vectors), m and l. */
typedef struct {
    float *o, *m, *l;
} Partial;

static int smaller(int a, int b)
{
    return a < b ? a : b;
}
static int larger(int a, int b)
{
    return a > b ? a : b;
}

static size_t splits_of(const AttentionShape *s)
{
    return ((size_t)s->key_tokens + SPLIT - 1) / SPLIT;
}

/* The (token, head of the group) pairs of a key/value head, token by token, as in gqa_simd.c. */
static int rows_of(const AttentionShape *s)
{
    return s->tokens * (s->heads / s->kv_heads);
}

static size_t width_of(const AttentionShape *s)
{
    return ((size_t)s->head_size + 15) / 16 * 16;
}

static Partial partial_of(float *scratch, const AttentionShape *s, size_t kv_head, size_t split, int row)
{
    size_t n = (kv_head * splits_of(s) + split) * rows_of(s) + row;
    float *o = scratch + n * (width_of(s) + 16);
    return (Partial){.o = o, .m = o + width_of(s), .l = o + width_of(s) + 1};
}

size_t split_keys_scratch(const AttentionShape *s)
{
    return (size_t)s->batch * s->kv_heads * splits_of(s) * rows_of(s) * (width_of(s) + 16);
}

bool split_keys_wins(const AttentionShape *s)
{
    enum { FEW_ROWS = 16 };
    MaskKind kind = s->mask.kind;
    return (int64_t)s->tokens * (s->heads / s->kv_heads) <= FEW_ROWS && s->key_tokens >= SPLIT && !s->bias &&
           s->dropout == 0 && kind != MASK_LOCAL_GLOBAL && kind != MASK_DILATED;
}

/* n numbers of a row; lanes past them are 0. */
INLINE Vector load(const float *row, int n)
{
    if (n >= LANES)
        return *(const LooseVector *)row;
    Vector x = {0};
    for (int i = 0; i < n; i++)
        x[i] = row[i];
    return x;
}

typedef float Half __attribute__((vector_size(LANES * sizeof(float) / 2)));
typedef float Quarter __attribute__((vector_size(LANES * sizeof(float) / 4)));

INLINE float sum_lanes(Vector x)
{
#if MODE == 1
    Half a, b;
    memcpy(&a, &x, sizeof a);
    memcpy(&b, (char *)&x + sizeof a, sizeof b);
    a += b;
    Quarter c, d;
    memcpy(&c, &a, sizeof c);
    memcpy(&d, (char *)&a + sizeof c, sizeof d);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
#else
    return _mm512_reduce_add_ps((__m512)x);
#endif
}
#if MODE >= 2
#define I(l, w) ((l) & (w) ? LANES + ((l) ^ (w)) : (l))
#define J(l, w) ((l) & (w) ? LANES + (l) : (l) ^ (w))
#define ALL(F, w) F(0, w), F(1, w), F(2, w), F(3, w), F(4, w), F(5, w), F(6, w), F(7, w), F(8, w), F(9, w), F(10, w), F(11, w), F(12, w), F(13, w), F(14, w), F(15, w)
#define FOLD(a, b, w) (__builtin_shufflevector(a, b, ALL(I, w)) + __builtin_shufflevector(a, b, ALL(J, w)))
INLINE Vector sum_all(Vector c[16])
{
    Vector a[8], b[4], d[2];
    UNROLL for (int i = 0; i < 8; i++) a[i] = FOLD(c[i], c[i + 8], 8);
    UNROLL for (int i = 0; i < 4; i++) b[i] = FOLD(a[i], a[i + 4], 4);
    UNROLL for (int i = 0; i < 2; i++) d[i] = FOLD(b[i], b[i + 2], 2);
    return FOLD(d[0], d[1], 1);
}
#endif

INLINE void multiply(Vector c[ROWS][KEYS], const float *const q[ROWS], const float *const k[KEYS], int d,
                     int n, int HS)
{
    Vector x[KEYS];
    UNROLL for (int i = 0; i < KEYS; i++)
    {
        x[i] = load(k[i] + d, n);
        KEEP(x[i]);
        PFK(k[i] + AHEAD * HS + d);
    }
    UNROLL for (int r = 0; r < ROWS; r++)
    {
        Vector y = load(q[r] + d, n);
        KEEP(y);
        UNROLL for (int i = 0; i < KEYS; i++)
        {
            c[r][i] += y * x[i];
        }
    }
}

/* score[r][i] = factor * q[r] . key i of k (keys,HS) */
static void score_keys(float score[ROWS][SPLIT], const float *const q[ROWS], const float *k, int keys, int HS,
                       float factor)
{
    for (int i0 = 0; i0 < keys; i0 += KEYS) {
        Vector c[ROWS][KEYS] = {0};
        const float *key[KEYS]; /* past the last: the last again */
        for (int i = 0; i < KEYS; i++)
            key[i] = k + (size_t)smaller(i0 + i, keys - 1) * HS;
        int d = 0;
        for (; d + LANES <= HS; d += LANES)
            multiply(c, q, key, d, LANES, HS);
        if (d < HS)
            multiply(c, q, key, d, HS - d, HS);
#if MODE >= 2
        Vector sums = factor * sum_all(&c[0][0]);
        typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
        UNROLL for (int r = 0; r < ROWS; r++) *(Four *)(score[r] + i0) = ((Four *)&sums)[r];
#else
        UNROLL for (int r = 0; r < ROWS; r++)
        {
            UNROLL for (int i = 0; i < KEYS; i++)
            {
                score[r][i0 + i] = factor * sum_lanes(c[r][i]);
            }
        }
#endif
    }
}

/* Scores become weights 2^(score - m), those outside first <= i < end 0. */
static void weigh(float score[SPLIT], float *m, float *l, int first, int end, int keys)
{
    Vector top = (Vector){0} - INFINITY, sum = {0}, *x = (Vector *)score;
    int vectors = (keys + LANES - 1) / LANES;
    for (int i = 0; i < first; i++)
        score[i] = -INFINITY;
    for (int i = larger(end, 0); i < vectors * LANES; i++)
        score[i] = -INFINITY;
    for (int j = 0; j < vectors; j++)
        top = vector_max(x[j], top); /* not NaN */
    *m = top[0];
    for (int i = 1; i < LANES; i++)
        *m = fmaxf(*m, top[i]);
    for (int j = 0; j < vectors; j++) {
        x[j] = exp2_vector(x[j] - (*m == -INFINITY ? 0 : *m));
        sum += x[j];
    }
    *l = sum_lanes(sum);
}

/* Some vectors of o += those of weight[r][i] * value i. */
INLINE void add_columns(float *const o[ROWS], int vectors, float weight[ROWS][SPLIT], const float *v,
                        int first, int end, int d, int HS)
{
    int n = vectors == 1 ? HS - d : LANES;
    Vector c[ROWS][KEYS];
    UNROLL for (int r = 0; r < ROWS; r++)
    {
        UNROLL for (int j = 0; j < vectors; j++)
        {
            c[r][j] = ((Vector *)(o[r] + d))[j];
        }
    }
    for (int i = first; i < end; i++) {
        const float *value = v + (size_t)i * HS + d;
        UNROLL for (int j = 0; j < vectors; j++)
        {
            Vector x = load(value + j * LANES, n);
            KEEP(x);
            PFV(value + AHEAD * HS + j * LANES);
            UNROLL for (int r = 0; r < ROWS; r++)
            {
                c[r][j] += weight[r][i] * x;
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
    {
        UNROLL for (int j = 0; j < vectors; j++)
        {
            ((Vector *)(o[r] + d))[j] = c[r][j];
        }
    }
}

/* o[r] += the sum of weight[r][i] * value i of v (keys,HS) */
static void add_values(float *const o[ROWS], float weight[ROWS][SPLIT], const float *v, int keys, int HS)
{
    for (int first = 0; first < keys; first += STEP) {
        int end = smaller(first + STEP, keys), d = 0;
        for (; d + KEYS * LANES <= HS; d += KEYS * LANES)
            add_columns(o, KEYS, weight, v, first, end, d, HS);
        for (; d < HS; d += LANES)
            add_columns(o, 1, weight, v, first, end, d, HS);
    }
}

/* ROWS rows from `row` on meet one split of one key/value head. */
static void attend_split(float *scratch, const float *q, const float *k, const float *v,
                         const AttentionShape *s, size_t kv_head, size_t split, int row)
{
    int group = s->heads / s->kv_heads, HS = s->head_size;
    int b = (int)(kv_head / s->kv_heads), first_head = (int)(kv_head % s->kv_heads) * group;
    int from = s->key_tokens, to = 0, first[ROWS], end[ROWS];
    const float *q_row[ROWS];
    float *o[ROWS];
    Partial partial[ROWS];
    for (int r = 0; r < ROWS; r++) { /* past the last: the last again, which writes the same once more */
        int i = smaller(row + r, rows_of(s) - 1), t = i / group;
        q_row[r] = q + query_row(s, b, first_head + i % group, t);
        partial[r] = partial_of(scratch, s, kv_head, split, i);
        o[r] = partial[r].o;
        *partial[r].m = -INFINITY;
        *partial[r].l = 0;
        flash_bounds(s, b, t, &first[r], &end[r]);
        from = smaller(from, first[r]);
        to = larger(to, end[r]);
    }
    from = larger(from, (int)split * SPLIT);
    to = smaller(to, smaller((int)(split + 1) * SPLIT, s->key_tokens));
    if (from >= to)
        return;

    _Alignas(64) float weight[ROWS][SPLIT];
    score_keys(weight, q_row, k + (size_t)from * HS, to - from, HS, s->scale * log2e);
    for (int r = 0; r < ROWS; r++) {
        weigh(weight[r], partial[r].m, partial[r].l, smaller(first[r], to) - from, smaller(end[r], to) - from,
              to - from);
        memset(o[r], 0, width_of(s) * sizeof *o[r]);
    }
    add_values(o, weight, v + (size_t)from * HS, to - from, HS);
}

/* Sums over different keys become one once all are measured from the same maximum: chapter 6's merge_partials,
 * in ascending order of the splits. */
static void merge_splits(float *out, float *lse, float *scratch, const AttentionShape *s, size_t kv_head,
                         int row)
{
    float m = -INFINITY, l = 0;
    memset(out, 0, s->head_size * sizeof *out);
    for (size_t n = 0; n < splits_of(s); n++)
        m = fmaxf(m, *partial_of(scratch, s, kv_head, n, row).m);
    for (size_t n = 0; n < splits_of(s); n++) {
        Partial other = partial_of(scratch, s, kv_head, n, row);
        if (*other.l == 0)
            continue; /* it saw no key, and its o was not written */
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

    /* Neighbours go to one thread: what it fetches ahead is what it reads next. */
#pragma omp parallel for schedule(dynamic, 4)
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
