/* The gradient of a bias: dS, summed up over the pairs that each number of the bias was given to. Mostly it is found along
 * the way: written if each pair has a number of its own (flash_back_write_bias), added if not (flash_back_add_bias). A
 * bias whose numbers several tasks share takes a pass of its own, in which dS is made once more and each number belongs to
 * one task. */
#include "flash_tiled_simd_backward.h"

enum { KEYS = FLASH_BACK_KEYS };

bool flash_bias_is_of_pairs(const AttentionShape *s)
{
    return s->bias && broadcast_of(s).elements == lse_count(s) * s->key_tokens;
}

/* A whole vector to an aligned address, past the caches: memory is not read first, and what lies in the caches stays. */
static void write_past(float *to, Vector v)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)v);
#else
    *(Vector *)to = v;
#endif
}

/* dS comes divided by log2 e. */
static void write_row(float *to, const float *d_scores, int n)
{
    int i = 0;
    for (; i < n && (uintptr_t)(to + i) % sizeof(Vector); i++)
        to[i] = log2e * d_scores[i];
    for (; i + LANES <= n; i += LANES)
        write_past(to + i, log2e * load_first(d_scores + i, LANES));
    for (; i < n; i++)
        to[i] = log2e * d_scores[i];
}

int flash_back_write_bias(const FlashBackBlock *x, int t)
{
    static const float nothing[KEYS];
    const size_t *stride = x->s->bias_stride;
    float *dbias = x->g->dbias + x->b * stride[0] + x->h * stride[1] + x->key * stride[3];
    int keys = smaller(KEYS, x->s->key_tokens - x->key);
    for (t--; t >= x->t + x->rows; t--)
        write_row(dbias + t * stride[2], nothing, keys);
    for (int r = 0; r < x->rows; r++) {
        const FlashSight *sight = &x->sight[r / TILE];
        int from = smaller(sight->from, keys), to = larger(sight->to, from);
        float *d_scores = x->d_scores + r * KEYS;
        memset(d_scores, 0, from * sizeof *d_scores);
        memset(d_scores + to, 0, (keys - to) * sizeof *d_scores);
        write_row(dbias + (x->t + r) * stride[2], d_scores, keys);
    }
    return x->t;
}

void flash_back_add_bias(const FlashBackBlock *x)
{
    const size_t *stride = x->s->bias_stride;
    float *dbias = x->g->dbias + x->b * stride[0] + x->h * stride[1] + x->t * stride[2] + x->key * stride[3];
    /* A sum over queries is made in the tile first: a sum of sums loses less to rounding. */
    float one_row[KEYS] = {0};
    for (int r = 0; r < x->rows; r++) {
        const FlashSight *sight = &x->sight[r / TILE];
        const float *d_scores = x->d_scores + r * KEYS;
        float *row = dbias + r * stride[2], sum = 0;
        for (int i = sight->from; i < sight->to; i++)
            if (!stride[2])
                one_row[i] += log2e * d_scores[i];
            else if (stride[3])
                row[i * stride[3]] += log2e * d_scores[i];
            else
                sum += log2e * d_scores[i];
        if (stride[2] && !stride[3])
            row[0] += sum;
    }
    float sum = 0;
    for (int i = 0; !stride[2] && i < x->keys; i++)
        if (stride[3])
            dbias[i * stride[3]] += one_row[i];
        else
            sum += one_row[i];
    if (!stride[2] && !stride[3])
        dbias[0] += sum;
}

/* A job is one (b, h) of the bias and, if it tells keys apart, one block of keys. How many jobs a (b, h) has: */
static int jobs_of_a_head(const AttentionShape *s)
{
    return s->bias_stride[3] ? flash_back_key_blocks(s) : 1;
}

size_t flash_bias_jobs(const AttentionShape *s)
{
    Broadcast axes = broadcast_of(s);
    return (size_t)axes.own[0] * axes.own[1] * jobs_of_a_head(s);
}

void flash_bias_gradient(FlashBackBlock x, float *scratch, size_t job)
{
    const AttentionShape *s = x.s;
    Broadcast axes = broadcast_of(s);
    int jobs = jobs_of_a_head(s), blocks = flash_back_key_blocks(s) / jobs;
    int b0 = (int)(job / jobs / axes.own[1]), h0 = (int)(job / jobs % axes.own[1]);
    int first = (int)(job % jobs) * blocks;

    for (x.b = b0; x.b < b0 + axes.shared[0]; x.b++)
        for (x.h = h0; x.h < h0 + axes.shared[1]; x.h++)
            for (int block = first; block < first + blocks; block++) {
                x.kv_head = x.h / (s->heads / s->kv_heads);
                flash_back_begin(&x, scratch, block);
                for (int t = s->tokens; flash_back_before(&x, t); t = x.t)
                    if (flash_back_weigh(&x))
                        flash_back_add_bias(&x);
            }
}
