/* The generators against numbers that others have published or that PyTorch prints. Where a comment gives a
 * Python expression, the numbers below it are what PyTorch 2.15 printed for it on a CPU (AVX-512). */
#include "random.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static RandomStream stream;

static void seed_cpu(uint64_t seed)
{
    seed_stream(&stream, STREAM_CPU, seed);
}

static void seed_cuda(uint64_t seed)
{
    seed_stream(&stream, STREAM_CUDA, seed);
}

/* PyTorch's vectorised log, sin and cos round a little differently from ours. */
static void expect_near(const float *ours, const float *expected, size_t n, double tolerance)
{
    for (size_t i = 0; i < n; i++)
        cr_assert(fabs((double)ours[i] - (double)expected[i]) <= tolerance, "[%zu] is %.9g, not %.9g", i,
                  (double)ours[i], (double)expected[i]);
}

static float *new_floats(size_t n)
{
    float *floats = malloc(n * sizeof *floats);
    cr_assert_not_null(floats);
    return floats;
}

static double sum_of(const float *x, size_t n, int power)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += power == 1 ? (double)x[i] : (double)x[i] * (double)x[i];
    return sum;
}

/* ---- CPU ---- */

/* manual_seed(123); rand(5) */
Test(random, cpu_rand)
{
    float x[5];
    seed_cpu(123);
    draw_rand(&stream, x, 5);
    expect_near(x, (float[]){0.296111941f, 0.516562283f, 0.251670718f, 0.68855679f, 0.0739724636f}, 5, 0);
}

/* manual_seed(123); x = rand(1000000); x[623], x[624], x[-1], x.double().sum() */
Test(random, cpu_rand_goes_round_the_state)
{
    size_t n = 1000000;
    float *x = new_floats(n);
    seed_cpu(123);
    draw_rand(&stream, x, n);
    cr_assert_eq(x[623], 0.0771321058f);
    cr_assert_eq(x[624], 0.350822151f);
    cr_assert_eq(x[n - 1], 0.202273667f);
    cr_assert(fabs(sum_of(x, n, 1) - 500274.8498888016) <= 1e-6);
    free(x);
}

/* manual_seed(123); randn(n) for n = 1, 5, 15: one number after another, in double */
Test(random, cpu_randn_fewer_than_16)
{
    const float expected[15] = {-0.111467116f, 0.120362945f,  -0.369634509f, -0.240417972f, -1.19692433f,
                                0.20926936f,   -0.972355008f, -0.755045474f, 0.323902756f,  -0.108522631f,
                                0.210331157f,  -0.390842825f, 0.234973416f,  0.665260434f,  0.352820754f};
    const size_t sizes[] = {1, 5, 15};
    for (size_t s = 0; s < COUNT(sizes); s++) {
        float x[15];
        seed_cpu(123);
        draw_randn(&stream, x, sizes[s]);
        expect_near(x, expected, sizes[s], 1e-7);
    }
}

/* manual_seed(123); randn(16) */
static const float randn16[16] = {0.337370187f, -0.177777216f, -0.303527594f, -0.588011861f,
                                  0.348605186f, 0.660340965f,  -0.219637617f, -0.379169822f,
                                  0.767107069f, -1.19250202f,  0.69835192f,   -1.40972292f,
                                  0.179379612f, 1.89514804f,   0.495446384f,  0.269198567f};

Test(random, cpu_randn_16)
{
    float x[16];
    seed_cpu(123);
    draw_randn(&stream, x, 16);
    expect_near(x, randn16, 16, 1e-5);
}

/* manual_seed(123); randn(17): a full block, and then all but the first number drawn again */
Test(random, cpu_randn_17)
{
    const float expected[17] = {0.337370187f, -1.02047193f, -0.16895628f,  0.917764604f,  1.58096957f,
                                1.30103993f,  1.27530122f,  -0.200953096f, -0.160563782f, -1.57230425f,
                                0.966571569f, -1.14814401f, -1.15886784f,  0.325471014f,  -0.63150537f,
                                -2.83999395f, -0.784853339f};
    float x[17];
    seed_cpu(123);
    draw_randn(&stream, x, 17);
    expect_near(x, expected, 17, 1e-5);
}

/* manual_seed(123); x = randn(n); x[:3] (as above), x[-17:], x.double().sum(), x.double().pow(2).sum(),
 * rand(2) */
Test(random, cpu_randn_of_other_sizes)
{
    const struct {
        size_t n;
        float last[17];
        double sum, squares;
        float next[2];
    } expected[] = {
        {31,
         {0.495446384f, -1.60327017f, -1.32495737f, 0.178428441f, -2.13375306f, 1.05235779f, -0.388483077f,
          -0.934345901f, -0.499144107f, -0.337838799f, 0.880544305f, 1.55415857f, 0.626616061f, -0.175487205f,
          0.0982837752f, -0.0935074314f, 0.266214728f},
         -1.7227831482887268,
         24.796523737266607,
         {0.578603506f, 0.945506334f}},
        {100,
         {0.827230871f, -0.0318612382f, -0.478955716f, 0.766808629f, 0.0274681915f, 0.0474699028f,
          -0.92386651f, -1.06073678f, -2.32444572f, -2.06281757f, 0.00637452863f, -0.989554703f, 0.701609194f,
          -0.982237995f, 0.277030349f, 0.645495057f, -0.895680785f},
         -4.742860268801451,
         99.22659269202474,
         {0.116951644f, 0.557778656f}},
        {1000,
         {-0.777582645f, 0.551924348f, -0.520246923f, 0.8333323f, -0.513830602f, 2.92761493f, -0.598184645f,
          0.0422661528f, 1.52952909f, -1.01095521f, 0.676743567f, 0.655169725f, 0.222129002f, 1.62117136f,
          0.902543843f, 1.48588419f, 0.0359384269f},
         20.348040955723263,
         1001.9308678836878,
         {0.713288248f, 0.991201341f}},
    };
    for (size_t e = 0; e < COUNT(expected); e++) {
        size_t n = expected[e].n;
        float x[1000], next[2];
        seed_cpu(123);
        draw_randn(&stream, x, n);
        expect_near(x, randn16, 3, 1e-5);
        expect_near(x + n - 17, expected[e].last, 17, 1e-5);
        cr_assert(fabs(sum_of(x, n, 1) - expected[e].sum) <= 1e-4);
        cr_assert(fabs(sum_of(x, n, 2) - expected[e].squares) <= 1e-4);
        draw_rand(&stream, next, 2);
        expect_near(next, expected[e].next, 2, 0);
    }
}

/* manual_seed(123); randn(3); randn(16)[:2]; randn(2); rand(1); randn(1): the fourth number of the pairs
 * waits while a call of 16 goes by */
Test(random, cpu_keeps_a_normal_across_calls)
{
    const float expected[9] = {-0.111467116f, 0.120362945f, -0.369634509f, 0.468862891f, 0.75249213f,
                               -0.240417972f, 0.234973416f, 0.899328232f,  0.665260434f};
    float x[9], block[16];
    seed_cpu(123);
    draw_randn(&stream, x, 3);
    draw_randn(&stream, block, 16);
    memcpy(x + 3, block, 2 * sizeof *x);
    draw_randn(&stream, x + 5, 2);
    draw_rand(&stream, x + 7, 1);
    draw_randn(&stream, x + 8, 1);
    expect_near(x, expected, 9, 1e-5);
}

Test(random, seeding_forgets_the_kept_normal)
{
    float x[2], y[2];
    seed_cpu(123);
    draw_randn(&stream, x, 1);
    seed_cpu(123);
    draw_randn(&stream, y, 1);
    cr_assert_eq(x[0], y[0]);
}

/* manual_seed((1 << 33) + 4000000000); rand(3), and the same without 1 << 33 */
Test(random, cpu_seed_is_its_low_32_bits)
{
    const uint64_t seeds[] = {(UINT64_C(1) << 33) + 4000000000u, 4000000000u};
    for (size_t s = 0; s < COUNT(seeds); s++) {
        float x[3];
        seed_cpu(seeds[s]);
        draw_rand(&stream, x, 3);
        expect_near(x, (float[]){0.39816165f, 0.134016633f, 0.637996376f}, 3, 0);
    }
}

/* manual_seed(123); nn.Linear(3, 2): weight, bias */
Test(random, linear)
{
    const float expected[8] = {-0.235429645f, 0.0191244762f, -0.286745936f, 0.217726618f,
                               -0.49193421f,  0.423223078f,  -0.419641405f, -0.459017664f};
    float x[8], bound = linear_bound(3);
    seed_cpu(123);
    draw_uniform(&stream, x, 6, -bound, bound);
    draw_uniform(&stream, x + 6, 2, -bound, bound);
    expect_near(x, expected, 8, 0);
}

/* manual_seed(123); nn.init.xavier_uniform_(empty(3, 4)) */
Test(random, xavier)
{
    const float expected[12] = {-0.377527326f, 0.0306673888f, -0.459816486f, 0.349139333f,
                                -0.788849711f, 0.67866677f,   -0.672923326f, -0.736065805f,
                                -0.585013747f, 0.419297904f,  -0.342083275f, 0.346454233f};
    float x[12], bound = xavier_bound(4, 3);
    seed_cpu(123);
    draw_uniform(&stream, x, 12, -bound, bound);
    expect_near(x, expected, 12, 0);
}

/* manual_seed(123); empty(5).uniform_(-2, 3), and uniform_(1, 1.0000002), which has two floats to choose from */
Test(random, cpu_uniform)
{
    float x[5];
    seed_cpu(123);
    draw_uniform(&stream, x, 5, -2, 3);
    expect_near(x, (float[]){-0.519440293f, 0.582811415f, -0.741646409f, 1.44278395f, -1.63013768f}, 5, 0);
    seed_cpu(123);
    draw_uniform(&stream, x, 5, 1, 1.0000002f);
    expect_near(x, (float[]){1.00000012f, 1.00000012f, 1.00000012f, 1.00000012f, 1}, 5, 0);
}

/* The mha-implementations notebook: manual_seed(123), x = randn(8, 1024, 768), then the first Linear(768,
 * 64). */
Test(random, notebook_x_and_first_weight)
{
    size_t n = 8 * 1024 * 768, weights = 64 * 768;
    float *x = new_floats(n), *w = new_floats(weights), bound = linear_bound(768);
    seed_cpu(123);
    draw_randn(&stream, x, n);
    draw_uniform(&stream, w, weights, -bound, bound);

#define AT(b, t, c) x[((size_t)(b)*1024 + (t)) * 768 + (c)]
    const float ours[] = {AT(0, 0, 0),     AT(0, 1, 1),     AT(1, 511, 100),
                          AT(3, 512, 383), AT(5, 700, 640), AT(7, 1023, 767)};
#undef AT
    const float expected[] = {0.3373702f, 0.3419652f, -0.5038498f, -0.6398729f, 0.558431f, -0.62551f};
    expect_near(x, randn16, 16, 1e-5);
    expect_near(ours, expected, 6, 1e-5);
    cr_assert(fabs(sqrt(sum_of(x, n, 2)) - 2509.17921) <= 1e-4);

    const float ours_w[] = {w[0], w[16384], w[49151]};
    expect_near(ours_w, (float[]){-0.03150934f, -0.02578618f, -0.008534291f}, 3, 1e-8);
    cr_assert(fabs(sqrt(sum_of(w, weights, 2)) - 4.60764927) <= 1e-7);
    free(x), free(w);
}

/* ---- dropout in memory order ---- */

/* LLMs-from-scratch, chapter 3: manual_seed(123); nn.Dropout(0.5)(ones(6, 6)) */
Test(random, dropout_of_ones)
{
    const float expected[36] = {2, 2, 0, 2, 2, 0, /**/ 0, 0, 0, 2, 0, 2, /**/ 2, 2, 2, 2, 0, 2, /**/
                                0, 2, 2, 0, 0, 2, /**/ 0, 2, 0, 2, 0, 2, /**/ 0, 2, 2, 2, 2, 0};
    float x[36];
    for (int i = 0; i < 36; i++)
        x[i] = 1;
    seed_cpu(123);
    apply_dropout(&stream, x, 36, 0.5);
    expect_near(x, expected, 36, 0);
}

/* manual_seed(123); nn.functional.dropout(ones(40), 0.1); rand(1): two words for each element */
Test(random, dropout_draws_doubles)
{
    uint8_t keep[40];
    float x[40], next;
    seed_cpu(123);
    draw_dropout(&stream, keep, 40, 0.1);
    for (int i = 0; i < 40; i++)
        cr_assert_eq(keep[i], i != 8 && i != 26, "element %d", i);
    draw_rand(&stream, &next, 1);
    cr_assert_eq(next, 0.731955707f);

    for (int i = 0; i < 40; i++)
        x[i] = 1;
    seed_cpu(123);
    apply_dropout(&stream, x, 40, 0.1);
    for (int i = 0; i < 40; i++)
        cr_assert_eq(x[i], keep[i] ? 1.11111116f : 0, "element %d", i);
}

Test(random, dropout_of_0_draws_nothing)
{
    float x[6] = {1, 2, 3, 4, 5, NAN}, next[2];
    uint8_t keep[6];
    seed_cpu(123);
    apply_dropout(&stream, x, 6, 0);
    draw_dropout(&stream, keep, 6, 0);
    expect_near(x, (float[]){1, 2, 3, 4, 5}, 5, 0);
    for (int i = 0; i < 6; i++)
        cr_assert_eq(keep[i], 1);
    draw_rand(&stream, next, 2);
    expect_near(next, (float[]){0.296111941f, 0.516562283f}, 2, 0);
}

/* PyTorch's dropout multiplies: nn.functional.dropout(full((8,), nan)) is NaN throughout. */
Test(random, dropout_hides_no_nan)
{
    float x[8] = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
    seed_cpu(123);
    apply_dropout(&stream, x, 8, 0.5);
    for (int i = 0; i < 8; i++)
        cr_assert(isnan(x[i]));
}

/* ---- CUDA ---- */

/* Random123's known answers for ten rounds. */
Test(random, philox_known_answers)
{
    const struct {
        uint32_t counter[4];
        uint64_t key;
        uint32_t expected[4];
    } answers[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
         UINT64_MAX,
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         UINT64_C(0x299f31d0a4093822),
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < COUNT(answers); i++) {
        uint32_t out[4];
        philox4x32(out, answers[i].counter, answers[i].key);
        cr_assert_arr_eq(out, answers[i].expected, sizeof out, "answer %zu", i);
    }
}

/* Printed by many: manual_seed(0); rand(10, device="cuda"), then another. */
Test(random, cuda_rand)
{
    const float first[10] = {.3990f, .5167f, .0249f, .9401f, .9459f, .7967f, .4150f, .8203f, .2290f, .9096f};
    const float second[10] = {.9722f, .7910f, .4690f, .3300f, .3345f, .3783f, .7640f, .6405f, .1103f, .3594f};
    float x[10];
    seed_cuda(0);
    draw_rand(&stream, x, 10);
    expect_near(x, first, 10, 1e-4);
    draw_rand(&stream, x, 10);
    expect_near(x, second, 10, 1e-4);
}

/* The SDPA notebook: manual_seed(42); Q, K, V = randn(2, 3, 8, device="cuda") each; softmax(Q K^T / sqrt 8)
 * V. */
Test(random, cuda_sdpa_notebook)
{
    const float expected[48] = {-1.3321f, -.3489f, .3015f,  -.3912f, .9867f,  .3137f,  -.0691f, -1.2593f,
                                -1.0882f, .2506f,  .6491f,  .1360f,  .5238f,  -.2448f, -.0820f, -.6171f,
                                -1.0012f, .3990f,  .6441f,  -.0277f, .5325f,  -.2564f, -.0607f, -.6404f,
                                .6091f,   .0708f,  .6188f,  .3252f,  -.1598f, .4197f,  -.2335f, .0630f,
                                .5285f,   .3890f,  -.2649f, .3706f,  -.3839f, .1963f,  -.6242f, .2312f,
                                .4048f,   .0762f,  .3777f,  .4689f,  -.2978f, .2754f,  -.6429f, .1037f};
    float q[2][3][8], k[2][3][8], v[2][3][8], out[2][3][8] = {0};
    seed_cuda(42);
    draw_randn(&stream, &q[0][0][0], 48);
    draw_randn(&stream, &k[0][0][0], 48);
    draw_randn(&stream, &v[0][0][0], 48);

    for (int b = 0; b < 2; b++)
        for (int t = 0; t < 3; t++) {
            double weight[3], sum = 0;
            for (int t2 = 0; t2 < 3; t2++) {
                double score = 0;
                for (int i = 0; i < 8; i++)
                    score += (double)q[b][t][i] * (double)k[b][t2][i];
                sum += weight[t2] = exp(score / sqrt(8));
            }
            for (int t2 = 0; t2 < 3; t2++)
                for (int i = 0; i < 8; i++)
                    out[b][t][i] += (float)(weight[t2] / sum * (double)v[b][t2][i]);
        }
    expect_near(&out[0][0][0], expected, 48, 1e-4);
}

/* Triton's first tutorial prints the last three of rand(98432) + rand(98432), seed 0. Three readers' GPUs,
 * three answers. */
Test(random, cuda_large_tensors_depend_on_the_gpu)
{
    const struct {
        int multiprocessors, threads;
        float last[3];
    } gpu[] = {
        {108, 2048, {.6724f, 1.2141f, .9733f}}, /* A100: each element has a thread of its own */
        {68, 1024, {1.1495f, .9265f, 1.1323f}}, /* the second of four numbers */
        {28, 1536, {1.3374f, 1.4960f, .9115f}}, /* the third */
    };
    size_t n = 98432;
    float *x = new_floats(n), *y = new_floats(n);
    for (size_t g = 0; g < COUNT(gpu); g++) {
        seed_cuda(0);
        stream.multiprocessors = gpu[g].multiprocessors;
        stream.threads_per_multiprocessor = gpu[g].threads;
        draw_rand(&stream, x, n);
        draw_rand(&stream, y, n);
        float sum[6];
        for (size_t i = 0; i < 3; i++) {
            sum[i] = x[i] + y[i];
            sum[3 + i] = x[n - 3 + i] + y[n - 3 + i];
        }
        expect_near(sum, (float[]){1.3713f, 1.3076f, .4940f}, 3, 1e-4);
        expect_near(sum + 3, gpu[g].last, 3, 1e-4);
    }
    free(x), free(y);
}

/* Triton's matrix product tutorial on an A100, seed 0: randn(512, 512) times another, in half precision, so
 * to 0.05 only. 512 * 512 is more than the A100 has threads: its last rows are second numbers of a four. */
Test(random, cuda_large_randn)
{
    const float expected[6][6] = {{-10.9531f, -4.7109f, 15.6953f, -28.4062f, 4.3320f, -26.4219f},
                                  {26.8438f, 10.0469f, -5.4297f, -11.2969f, -8.5312f, 30.7500f},
                                  {-13.2578f, 15.8516f, 18.0781f, -21.7656f, -8.6406f, 10.2031f},
                                  {40.2812f, 18.6094f, -25.6094f, -2.7598f, -3.2441f, 41.0000f},
                                  {-6.1211f, -16.8281f, 4.4844f, -21.0312f, 24.7031f, 15.0234f},
                                  {-17.0938f, -19.0000f, -0.3831f, 21.5469f, -30.2344f, -13.2188f}};
    float *a = new_floats(512 * 512), *b = new_floats(512 * 512);
    seed_cuda(0);
    draw_randn(&stream, a, 512 * 512);
    draw_randn(&stream, b, 512 * 512);
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++) {
            int row = i < 3 ? i : 506 + i, column = j < 3 ? j : 506 + j;
            double sum = 0;
            for (int k = 0; k < 512; k++)
                sum += (double)a[row * 512 + k] * (double)b[k * 512 + column];
            cr_assert(fabs(sum - (double)expected[i][j]) <= 0.05, "[%d][%d] is %g, not %g", row, column, sum,
                      (double)expected[i][j]);
        }
    free(a), free(b);
}

/* A tensor that either GPU has threads enough for is the same on both. */
Test(random, cuda_small_tensors_are_the_same_everywhere)
{
    size_t n = 40 * 1024, large = n + 1;
    float *x = new_floats(large), *y = new_floats(large);
    for (int i = 0; i < 2; i++) {
        seed_cuda(7);
        draw_randn(&stream, x, i ? large : n);
        seed_cuda(7);
        stream.multiprocessors = 40; /* a T4 */
        stream.threads_per_multiprocessor = 1024;
        draw_randn(&stream, y, i ? large : n);
        cr_assert_arr_eq(x, y, n * sizeof *x);
    }
    cr_assert_neq(x[n], y[n]);
    free(x), free(y);
}

/* A call moves the offset by 4 * (floor((n - 1) / 4T) + 1), whatever it drew. */
Test(random, cuda_offset)
{
    const struct {
        size_t n;
        uint64_t moves;
    } calls[] = {{0, 0}, {1, 4}, {256, 4}, {1024, 4}, {1025, 8}, {2048, 8}, {2049, 12}, {10000, 40}};
    float *x = new_floats(10000);
    for (size_t i = 0; i < COUNT(calls); i++) {
        seed_cuda(3);
        stream.multiprocessors = 1, stream.threads_per_multiprocessor = 256; /* T = 256 */
        draw_rand(&stream, x, calls[i].n);
        cr_assert_eq(stream.offset, calls[i].moves, "n = %zu: %zu", calls[i].n, (size_t)stream.offset);
        draw_randn(&stream, x, calls[i].n);
        cr_assert_eq(stream.offset, 2 * calls[i].moves);
    }
    free(x);
}

/* Element by element from the definition: element i is number (i / T) % 4 at counter (i / T) / 4 of thread i
 * % T. */
Test(random, cuda_elements_by_definition)
{
    size_t n = 3000, threads = 512;
    float *x = new_floats(n);
    seed_cuda(UINT64_C(0x123456789ABCDEF0));
    stream.multiprocessors = 2, stream.threads_per_multiprocessor = 300;
    stream.offset = (UINT64_C(1) << 35) - 4; /* over the edge of the counter's low word during the call */
    draw_rand(&stream, x, n);
    for (size_t i = 0; i < n; i++) {
        uint64_t place = (UINT64_C(1) << 33) - 1 + i / threads / 4;
        uint32_t counter[4] = {(uint32_t)place, (uint32_t)(place >> 32), (uint32_t)(i % threads), 0}, word[4];
        philox4x32(word, counter, stream.seed);
        float expected = (float)word[i / threads % 4] * 0x1p-32f + 0x1p-33f;
        cr_assert_eq(x[i], expected == 1 ? 0 : expected, "element %zu", i);
    }
    free(x);
}

Test(random, cuda_rand_is_never_1)
{
    float x[2];
    uint32_t word[4];
    uint64_t seed = 16390493; /* the first whose first word rounds up to 2^32 */
    philox4x32(word, (uint32_t[4]){0}, seed);
    cr_assert_eq((float)word[0], 0x1p32f);
    seed_cuda(seed);
    draw_rand(&stream, x, 2);
    cr_assert_eq(x[0], 0);
    seed_cuda(seed);
    draw_uniform(&stream, x, 2, -3, 5);
    cr_assert_eq(x[0], -3);
}

/* ---- both streams ---- */

Test(random, a_copy_of_the_struct_is_a_place_in_the_stream)
{
    for (int kind = STREAM_CPU; kind <= STREAM_CUDA; kind++) {
        float x[100], y[100];
        seed_stream(&stream, kind, 9);
        draw_randn(&stream, x, 7);
        RandomStream place = stream;
        draw_randn(&stream, x, 3);
        draw_rand(&stream, x + 3, 97);
        draw_randn(&place, y, 3);
        draw_rand(&place, y + 3, 97);
        cr_assert_arr_eq(x, y, sizeof x);
    }
}

Test(random, drawing_nothing_draws_nothing)
{
    for (int kind = STREAM_CPU; kind <= STREAM_CUDA; kind++) {
        float x, y;
        seed_stream(&stream, kind, 9);
        draw_rand(&stream, &x, 1);
        seed_stream(&stream, kind, 9);
        draw_rand(&stream, NULL, 0);
        draw_randn(&stream, NULL, 0);
        draw_uniform(&stream, NULL, 0, 1, 2);
        draw_rand(&stream, &y, 1);
        cr_assert_eq(x, y);
    }
}

Test(random, uniform_stays_inside_its_bounds)
{
    size_t n = 1000000;
    float *x = new_floats(n);
    const float bounds[][2] = {{0, 1}, {-0.25f, 0.25f}, {1, 2}, {1000, 1000.001f}, {-1e-30f, 1e30f}};
    for (int kind = STREAM_CPU; kind <= STREAM_CUDA; kind++)
        for (size_t b = 0; b < COUNT(bounds); b++) {
            seed_stream(&stream, kind, 5);
            draw_uniform(&stream, x, n, bounds[b][0], bounds[b][1]);
            for (size_t i = 0; i < n; i++)
                cr_assert(x[i] >= bounds[b][0] && x[i] < bounds[b][1], "%.9g", (double)x[i]);
        }
    free(x);
}

/* Five standard errors, of mean and variance and of how many lie within one standard deviation; neighbours,
 * and pairs eight apart, are not correlated. */
Test(random, looks_random)
{
    size_t n = 1000000;
    double root = sqrt((double)n);
    float *x = new_floats(n);
    for (int kind = STREAM_CPU; kind <= STREAM_CUDA; kind++) {
        seed_stream(&stream, kind, 1);
        draw_rand(&stream, x, n);
        double mean = sum_of(x, n, 1) / (double)n, variance = sum_of(x, n, 2) / (double)n - mean * mean;
        cr_assert(fabs(mean - 0.5) <= 5 * sqrt(1.0 / 12) / root, "mean %g", mean);
        cr_assert(fabs(variance - 1.0 / 12) <= 5 * sqrt(1.0 / 180) / root, "variance %g", variance);

        draw_randn(&stream, x, n);
        mean = sum_of(x, n, 1) / (double)n, variance = sum_of(x, n, 2) / (double)n - mean * mean;
        cr_assert(fabs(mean) <= 5 / root, "mean %g", mean);
        cr_assert(fabs(variance - 1) <= 5 * sqrt(2) / root, "variance %g", variance);
        double within = 0;
        for (size_t i = 0; i < n; i++)
            within += fabsf(x[i]) < 1;
        cr_assert(fabs(within / (double)n - 0.682689492) <= 5 * sqrt(0.682689492 * 0.317310508) / root, "%g",
                  within);
        for (size_t apart = 1; apart <= 8; apart += 7) {
            double product = 0;
            for (size_t i = 0; i + apart < n; i++)
                product += (double)x[i] * (double)x[i + apart];
            cr_assert(fabs(product / (double)n) <= 5 / root, "correlation %g", product / (double)n);
        }
    }
    free(x);
}

/* ---- dropout by position ---- */

Test(random, dropout_keeps_by_definition)
{
    const size_t rows[] = {0, 1, 77, (size_t)5 << 32};
    for (size_t r = 0; r < COUNT(rows); r++)
        for (int key = 0; key < 50; key++) {
            uint32_t counter[4] = {(uint32_t)key / 4, (uint32_t)rows[r], (uint32_t)((uint64_t)rows[r] >> 32),
                                   0x64726F70};
            uint32_t word[4];
            philox4x32(word, counter, 123);
            cr_assert_eq(dropout_keeps(123, rows[r], key, 0.3f), word[key % 4] * 0x1p-32 >= (double)0.3f);
        }
}

Test(random, dropout_keeps_does_not_mind_the_order)
{
    enum { ROWS = 37, KEYS = 41 };
    bool keep[ROWS][KEYS];
    for (int row = 0; row < ROWS; row++)
        for (int key = 0; key < KEYS; key++)
            keep[row][key] = dropout_keeps(5, (size_t)row, key, 0.5f);
    for (int key = KEYS - 1; key >= 0; key--)
        for (int row = 0; row < ROWS; row++) {
            dropout_keeps(6, (size_t)row, key, 0.5f);
            cr_assert_eq(dropout_keeps(5, (size_t)row, key, 0.5f), keep[row][key], "row %d, key %d", row,
                         key);
        }
}

Test(random, dropout_keeps_depends_on_seed_row_and_key)
{
    int differ_seed = 0, differ_row = 0, differ_high_row = 0, differ_key = 0;
    for (int key = 0; key < 1000; key++) {
        bool keep = dropout_keeps(1, 1, key, 0.5f);
        differ_seed += keep != dropout_keeps(2, 1, key, 0.5f);
        differ_row += keep != dropout_keeps(1, 2, key, 0.5f);
        differ_high_row += keep != dropout_keeps(1, ((size_t)1 << 32) + 1, key, 0.5f);
        differ_key += keep != dropout_keeps(1, 1, key + 1, 0.5f);
    }
    const int differ[] = {differ_seed, differ_row, differ_high_row, differ_key};
    for (size_t i = 0; i < COUNT(differ); i++)
        cr_assert(differ[i] > 400 && differ[i] < 600, "%zu: %d of 1000", i, differ[i]);
}

/* u >= p stays, so that p = 0 keeps even u = 0. Some words are floats exactly, and show on which side the
 * line is. */
Test(random, dropout_keeps_draws_the_line_at_p)
{
    int exact = 0;
    for (int key = 0; key < 10000; key++) {
        uint32_t word[4];
        philox4x32(word, (uint32_t[4]){(uint32_t)key / 4, 7, 0, 0x64726F70}, 123);
        float u = (float)word[key % 4] * 0x1p-32f;
        if ((double)u != word[key % 4] * 0x1p-32)
            continue;
        exact++;
        cr_assert(dropout_keeps(123, 7, key, u));
        cr_assert_not(dropout_keeps(123, 7, key, nextafterf(u, 2)));
    }
    cr_assert(exact > 10);
}

Test(random, dropout_keeps_its_share)
{
    const float ps[] = {0, 0.1f, 0.5f, 0.9f};
    for (size_t i = 0; i < COUNT(ps); i++) {
        double p = (double)ps[i], n = 1e6, kept = 0;
        for (size_t row = 0; row < 1000; row++)
            for (int key = 0; key < 1000; key++)
                kept += dropout_keeps(42, row, key, ps[i]);
        cr_assert(fabs(kept / n - (1 - p)) <= 5 * sqrt(p * (1 - p) / n), "p %g: kept %g", p, kept / n);
    }
}
