#include "random.h"

#include <assert.h>
#include <math.h>

void seed_stream(RandomStream *stream, StreamKind kind, uint64_t seed)
{
    *stream = (RandomStream){
        .kind = kind, .seed = seed, .multiprocessors = 108, .threads_per_multiprocessor = 2048};
    stream->state[0] = (uint32_t)seed; /* the CPU's generator has no use for the high half */
    for (uint32_t i = 1; i < 624; i++) {
        uint32_t before = stream->state[i - 1];
        stream->state[i] = 1812433253u * (before ^ (before >> 30)) + i;
    }
    stream->position = 624; /* all used up: the first draw makes new ones */
}

/* ---- the CPU's generator: MT19937 ---- */

static uint32_t twisted(uint32_t far, uint32_t here, uint32_t next)
{
    uint32_t joined = (here & 0x80000000u) | (next & 0x7FFFFFFFu);
    return far ^ (joined >> 1) ^ ((joined & 1) ? 0x9908B0DFu : 0);
}

/* The next 624 words, each from itself, its neighbour, and the word 397 places on, around the ring. */
static void twist(uint32_t s[624])
{
    for (int i = 0; i < 624 - 397; i++)
        s[i] = twisted(s[i + 397], s[i], s[i + 1]);
    for (int i = 624 - 397; i < 623; i++)
        s[i] = twisted(s[i + 397 - 624], s[i], s[i + 1]);
    s[623] = twisted(s[396], s[623], s[0]);
}

static uint32_t draw_word(RandomStream *stream)
{
    if (stream->position == 624) {
        twist(stream->state);
        stream->position = 0;
    }
    uint32_t x = stream->state[stream->position++];
    x ^= x >> 11;
    x ^= (x << 7) & 0x9D2C5680u;
    x ^= (x << 15) & 0xEFC60000u;
    return x ^ (x >> 18);
}

/* A float in [0, 1): 24 bits, as many as its mantissa holds. */
static float draw_float(RandomStream *stream)
{
    return (float)(draw_word(stream) & 0xFFFFFFu) * 0x1p-24f;
}

/* A double in [0, 1): 53 bits of two words. */
static double draw_double(RandomStream *stream)
{
    uint64_t high = draw_word(stream);
    uint64_t both = high << 32 | draw_word(stream);
    return (double)(both & 0x1FFFFFFFFFFFFFu) * 0x1p-53;
}

/* ---- the CUDA generator: Philox4x32-10 (philox.h), one counter for each thread ---- */

/* Four floats in (0, 1]. A word near 2^32 rounds up to 1, a word of 0 stays above 0. */
static void uniform4(float out[4], const uint32_t word[4])
{
    for (int i = 0; i < 4; i++)
        out[i] = (float)word[i] * 0x1p-32f + 0x1p-33f;
}

/* Four normal numbers. The sine comes first here, the cosine on the CPU. */
static void normal4(float out[4], const uint32_t word[4])
{
    const float turn = 6.2831855f * 0x1p-32f;
    for (int i = 0; i < 4; i += 2) {
        float u = (float)word[i] * 0x1p-32f + 0x1p-33f;
        float angle = fmaf((float)word[i + 1], turn, turn / 2);
        float radius = sqrtf(-2.0f * logf(u));
        out[i] = radius * sinf(angle);
        out[i + 1] = radius * cosf(angle);
    }
}

/* What one launch of PyTorch's kernel writes. Of the T threads that fit on the GPU at once, thread t takes
 * elements t, t + T, t + 2T, .. and draws four numbers at a time. A tensor of up to T elements uses only the
 * first of each four, and so comes out the same for every T. */
static void launch(RandomStream *stream, float *out, size_t n,
                   void (*four)(float out[4], const uint32_t word[4]))
{
    int blocks = stream->multiprocessors * (stream->threads_per_multiprocessor / 256);
    size_t threads = 256 * (size_t)blocks;

    for (size_t start = 0; start < n; start += 4 * threads) {
        for (size_t t = 0; t < threads && start + t < n; t++) {
            uint32_t counter[4] = {(uint32_t)(stream->offset / 4), (uint32_t)(stream->offset / 4 >> 32),
                                   (uint32_t)t, (uint32_t)((uint64_t)t >> 32)};
            uint32_t word[4];
            float number[4];
            philox4x32(word, counter, stream->seed);
            four(number, word);
            for (size_t part = 0; part < 4 && start + part * threads + t < n; part++)
                out[start + part * threads + t] = number[part];
        }
        stream->offset += 4;
    }
}

/* ---- the distributions ---- */

void draw_uniform(RandomStream *stream, float *out, size_t n, float from, float to)
{
    if (stream->kind == STREAM_CUDA)
        launch(stream, out, n, uniform4);
    else
        for (size_t i = 0; i < n; i++)
            out[i] = draw_float(stream);

    for (size_t i = 0; i < n; i++) {
        float value = fmaf(out[i], to - from, from); /* one rounding, as on most of PyTorch's machines */
        out[i] = value == to ? from : value;
    }
}

void draw_rand(RandomStream *stream, float *out, size_t n)
{
    draw_uniform(stream, out, n, 0.0f, 1.0f);
}

/* Box and Muller 1958, in double; of the two numbers it makes, one is kept for the next time. */
static double draw_normal(RandomStream *stream)
{
    const double two_pi = 6.283185307179586;
    if (stream->has_normal) {
        stream->has_normal = false;
        return stream->normal;
    }
    double angle = two_pi * draw_double(stream);
    double radius = sqrt(-2.0 * log1p(-draw_double(stream)));
    stream->normal = radius * sin(angle);
    stream->has_normal = true;
    return radius * cos(angle);
}

/* The same in float for 16 at once: number j and number j + 8 are a pair. */
static void draw_16_normals(RandomStream *stream, float out[16])
{
    const float two_pi = 6.2831855f;
    for (int j = 0; j < 16; j++)
        out[j] = draw_float(stream);
    for (int j = 0; j < 8; j++) {
        float radius = sqrtf(-2.0f * logf(1.0f - out[j]));
        float angle = two_pi * out[j + 8];
        out[j] = radius * cosf(angle);
        out[j + 8] = radius * sinf(angle);
    }
}

void draw_randn(RandomStream *stream, float *out, size_t n)
{
    if (stream->kind == STREAM_CUDA) {
        launch(stream, out, n, normal4);
    } else if (n < 16) {
        for (size_t i = 0; i < n; i++)
            out[i] = (float)draw_normal(stream);
    } else {
        for (size_t i = 0; i + 16 <= n; i += 16)
            draw_16_normals(stream, out + i);
        if (n % 16 != 0) { /* PyTorch draws for the rest, then draws the last 16 afresh */
            for (size_t i = 0; i < n % 16; i++)
                draw_word(stream);
            draw_16_normals(stream, out + n - 16);
        }
    }
}

void draw_dropout(RandomStream *stream, uint8_t *keep, size_t n, double p)
{
    assert(stream->kind == STREAM_CPU);
    for (size_t i = 0; i < n; i++)
        keep[i] = p == 0 || draw_double(stream) < 1 - p;
}

void apply_dropout(RandomStream *stream, float *values, size_t n, double p)
{
    assert(stream->kind == STREAM_CPU);
    float scale = 1.0f / (float)(1 - p);
    for (size_t i = 0; i < n && p != 0; i++)
        values[i] *= draw_double(stream) < 1 - p ? scale : 0.0f; /* a product, so that a NaN is not hidden */
}

float linear_bound(int inputs)
{
    return (float)(1 / sqrt(inputs));
}

float xavier_bound(int inputs, int outputs)
{
    return (float)sqrt(6 / ((double)inputs + outputs));
}

/* Four neighbouring keys share one counter, whose words stay at hand in each thread: keys asked for in order
 * cost a quarter of a Philox each. */
bool dropout_keeps(uint64_t seed, size_t row, int key, float p)
{
    static _Thread_local struct {
        uint64_t seed, row;
        uint32_t four; /* key / 4 */
        uint32_t word[4];
    } last = {.four = UINT32_MAX};

    uint32_t four = (uint32_t)key / 4;
    if (last.four != four || last.row != row || last.seed != seed) {
        dropout_words(last.word, seed, row, four);
        last.seed = seed, last.row = row, last.four = four;
    }
    return word_keeps(last.word[key % 4], p);
}
