/* The gradient of a bias on a GPU, for .cu files. A number of it was added to one score, or to many where it was broadcast: its
 * gradient is the sum of theirs. */
#ifndef COMMON_CUDA_BROADCAST_H
#define COMMON_CUDA_BROADCAST_H

#include "cuda_warp.h"
#include "shape.h"

/* The keys t2 <= .. < t2_end of a rectangle of pairs are divided among `lanes` threads. */
typedef struct {
    int b, h, t, t_end, t2, t2_end, lane, lanes;
} Rectangle;

/* A thread to each number of the bias; a warp where it is shared along the keys, whose lanes divide them always in the
 * same way. sum(rectangle) is the sum of dS over a thread's share. */
template <class Sum>
__device__ static void sum_into_bias(float *dbias, const AttentionShape *s, const Broadcast &axes,
                                     const Sum &sum)
{
    const size_t *stride = s->bias_stride;
    int lanes = axes.shared[3] > 1 ? WARP : 1, lane = threadIdx.x % lanes;
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;

    for (size_t i = thread / lanes; i < axes.elements; i += threads / lanes) {
        int k0 = (int)(i % axes.own[3]), t0 = (int)(i / axes.own[3] % axes.own[2]);
        int h0 = (int)(i / axes.own[3] / axes.own[2] % axes.own[1]);
        int b0 = (int)(i / axes.own[3] / axes.own[2] / axes.own[1]);
        float total = 0;
        for (int b = b0; b < b0 + axes.shared[0]; b++)
            for (int h = h0; h < h0 + axes.shared[1]; h++)
                total += sum(Rectangle{b, h, t0, t0 + axes.shared[2], k0, k0 + axes.shared[3], lane, lanes});
        if (lanes > 1)
            total = warp_sum(total);
        if (lane == 0)
            dbias[b0 * stride[0] + h0 * stride[1] + t0 * stride[2] + k0 * stride[3]] = total;
    }
}

/* A thread's share of a rectangle, pair by pair: score(t, t2) is dS. */
template <class Score> __device__ static float sum_of_pairs(const Rectangle &r, const Score &score)
{
    float sum = 0;
    for (int t = r.t; t < r.t_end; t++) {
        float row_sum = 0; /* a sum of sums loses less to rounding than one long one */
        for (int t2 = r.t2 + r.lane; t2 < r.t2_end; t2 += r.lanes)
            row_sum += score(t, t2);
        sum += row_sum;
    }
    return sum;
}

/* dS where it lies in memory, (B,NH,T,TK). */
struct StoredScores {
    const float *d_scores;
    const AttentionShape *s;

    __device__ float operator()(const Rectangle &r) const
    {
        return sum_of_pairs(
            r, [&](int t, int t2) { return d_scores[lse_index(s, r.b, r.h, t) * s->key_tokens + t2]; });
    }
};

[[maybe_unused]] __global__ static void sum_scores_kernel(float *dbias, const float *d_scores,
                                                          AttentionShape shape, Broadcast axes)
{
    sum_into_bias(dbias, &shape, axes, StoredScores{d_scores, &shape});
}

/* dbias, as the bias lies in memory, from d_scores (B,NH,T,TK). */
static inline void device_bias_gradient(float *dbias, const float *d_scores, const AttentionShape *s)
{
    Broadcast axes = broadcast_of(s);
    LAUNCH(sum_scores_kernel, blocks_for(axes.elements), MOST_WARPS * WARP, 0, dbias, d_scores, *s, axes);
}

#endif
