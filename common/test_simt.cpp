#include "test_simt.h"
#include "cuda_tensor.h"
#include "cuda_thread.h"

#ifdef SIMT_ONE_BY_ONE
/* What ends in the middle leaves memory behind: that is not what is tested. */
extern "C" int __lsan_is_turned_off(void)
{
    return 1;
}
#endif

void simt_test_seed(uint64_t seed)
{
    simt_set_seed(seed);
}

bool simt_has_bounds(void)
{
#ifdef SIMT_ONE_BY_ONE
    return true;
#else
    return false;
#endif
}

/* ---- Missing barriers ---- */

__global__ static void reverse_blocks_kernel(float *out, bool barrier)
{
    DYNAMIC_SHARED(float, shared);
    unsigned n = blockDim.x, i = threadIdx.x;
    shared[i] = (float)i;
    if (barrier)
        __syncthreads();
    out[blockIdx.x * n + i] = shared[n - 1 - i];
}

void reverse_blocks(float *out, int blocks, int threads, bool barrier)
{
    LAUNCH(reverse_blocks_kernel, blocks, threads, threads * sizeof(float), out, barrier);
}

__global__ static void reverse_warps_kernel(float *out, bool barrier)
{
    DYNAMIC_SHARED(float, shared);
    unsigned i = threadIdx.x;
    shared[i] = (float)i;
    if (barrier)
        __syncwarp();
    out[blockIdx.x * 32 + i] = shared[31 - i];
}

void reverse_warps(float *out, int blocks, bool barrier)
{
    LAUNCH(reverse_warps_kernel, blocks, 32, 32 * sizeof(float), out, barrier);
}

__global__ static void tree_sum_kernel(float *out, bool late)
{
    __shared__ float part[256];
    part[threadIdx.x] = (float)threadIdx.x;
    for (unsigned half = 128; half > 0; half /= 2) {
        if (!late || half >= 32)
            __syncthreads();
        if (threadIdx.x < half)
            part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        out[blockIdx.x] = part[0];
}

void tree_sums(float *out, int blocks, bool late)
{
    LAUNCH(tree_sum_kernel, blocks, 256, 0, out, late);
}

/* ---- What there is ---- */

__global__ static void number_threads_kernel(int *out)
{
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] += (int)(block * threads + thread);
}

void number_threads(int *out)
{
    LAUNCH(number_threads_kernel, dim3(2, 3, 2), dim3(3, 5, 2), 0, out);
}

__global__ static void ask_the_warp_kernel(unsigned *out)
{
    const unsigned all = 0xFFFFFFFFu;
    unsigned lane = threadIdx.x, mine = 100 + lane;
    out[0 * 32 + lane] = __shfl_sync(all, mine, 5);
    out[1 * 32 + lane] = __shfl_xor_sync(all, mine, 3);
    out[2 * 32 + lane] = (unsigned)__shfl_down_sync(all, (double)mine, 4);
    out[3 * 32 + lane] = __shfl_up_sync(all, mine, 1);
    out[4 * 32 + lane] = __ballot_sync(all, lane % 3 == 0);
    out[5 * 32 + lane] = __any_sync(all, lane == 9);
    out[6 * 32 + lane] = __all_sync(all, lane < 20);
}

void ask_the_warp(unsigned *out, int threads)
{
    LAUNCH(ask_the_warp_kernel, 1, threads, 0, out);
}

__global__ static void add_atomically_kernel(float *quarter, unsigned *count, int *largest)
{
    atomicAdd(quarter, 0.25f);
    atomicAdd(count, 1u);
    atomicMax(largest, (int)(blockIdx.x * blockDim.x + threadIdx.x));
}

void add_atomically(float *quarter, unsigned *count, int *largest, int blocks)
{
    LAUNCH(add_atomically_kernel, blocks, 128, 0, quarter, count, largest);
}

/* Lane (g, t) has of d's two halves, 8 columns each, rows g and g + 8, columns 2 t and 2 t + 1. */
__global__ static void tensor_core_kernel(float *d, const float *c, const uint16_t *a, const uint16_t *b,
                                          bool turned)
{
    unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t left[4], right[4];
    load_matrix_4(left, a + (lane & 15) * 16 + 8 * (lane >> 4));
    if (turned)
        load_matrix_4(right, b + ((lane & 7) + 8 * (lane >> 4)) * 16 + 8 * (lane >> 3 & 1));
    else
        load_matrix_4_transposed(right, b + (lane & 15) * 16 + 8 * (lane >> 4));
    for (unsigned half = 0; half < 2; half++) {
        float sum[4];
        unsigned place[4];
        for (unsigned i = 0; i < 4; i++) {
            place[i] = (g + i / 2 * 8) * 16 + 8 * half + 2 * t + i % 2;
            sum[i] = c[place[i]];
        }
        mma_bf16(sum, left, right + 2 * half);
        for (unsigned i = 0; i < 4; i++)
            d[place[i]] = sum[i];
    }
}

void multiply_by_tensor_core(float *d, const float *c, const uint16_t *a, const uint16_t *b, bool turned)
{
    LAUNCH(tensor_core_kernel, 1, 32, 0, d, c, a, b, turned);
}

/* ---- Copies under way; half precision ---- */

__global__ static void copy_two_tiles_kernel(float *out, const float *in, int newest)
{
    __shared__ float tiles[2][32];
    unsigned i = threadIdx.x;
    for (int tile = 0; tile < 2; tile++) {
        copy_async_4(&tiles[tile][i], in + 32 * tile + i, true);
        copy_async_commit();
    }
    if (newest == 1)
        copy_async_wait<1>();
    else if (newest == 0)
        copy_async_wait<0>();
    __syncthreads();
    for (int tile = 0; tile < 2; tile++)
        out[32 * tile + i] = tiles[tile][31 - i];
    __syncthreads();
    copy_async_wait<0>();
}

void copy_two_tiles(float *out, const float *in, int newest)
{
    LAUNCH(copy_two_tiles_kernel, 1, 32, 0, out, in, newest);
}

__global__ static void add_to_halves_kernel(uint16_t *out, float more)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = float_half(half_float({(uint16_t)i}) + more).bits;
}

void add_to_halves(uint16_t *out, float more)
{
    LAUNCH(add_to_halves_kernel, 256, 256, 0, out, more);
}

/* ---- What ends the program ---- */

__global__ static void some_threads_wait_kernel(int first)
{
    if ((int)threadIdx.x >= first)
        __syncthreads();
    __syncwarp();
}

void some_threads_wait_for_the_block(void)
{
    LAUNCH(some_threads_wait_kernel, 1, 64, 0, 40);
}

__global__ static void two_barriers_kernel(int middle)
{
    if ((int)threadIdx.x / 32 < middle)
        __syncthreads();
    else
        __syncthreads();
}

void two_barriers_at_once(void)
{
    LAUNCH(two_barriers_kernel, 1, 96, 0, 2);
}

__global__ static void half_a_warp_kernel(float *out)
{
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
    __syncwarp();
}

void half_a_warp_shuffles(void)
{
    float out[32];
    LAUNCH(half_a_warp_kernel, 1, 32, 0, &out[0]);
}

__global__ static void returns_early_kernel(int length)
{
    if ((int)threadIdx.x >= length)
        return;
    __syncthreads();
}

void one_thread_returns_early(void)
{
    LAUNCH(returns_early_kernel, 1, 64, 0, 63);
}

__global__ static void nothing_kernel(int)
{
}

__global__ static void copy_under_way_kernel(const float *in)
{
    __shared__ float tile[32];
    copy_async_4(&tile[threadIdx.x], in + threadIdx.x, true);
    copy_async_wait<0>(); /* of no group: the copy was not closed */
}

void ends_with_a_copy_under_way(void)
{
    const float in[32] = {};
    LAUNCH(copy_under_way_kernel, 1, 32, 0, &in[0]);
}

void too_many_threads(void)
{
    LAUNCH(nothing_kernel, 1, dim3(64, 32), 0, 0);
}

/* One thread of the second block reads one number too far. */
__global__ static void past_dynamic_kernel(float *out, int count)
{
    DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = 1;
    __syncthreads();
    if (blockIdx.x == 1)
        out[threadIdx.x] = shared[(int)threadIdx.x + count - 31];
}

void past_dynamic_shared(void)
{
    float out[32];
    LAUNCH(past_dynamic_kernel, 2, 32, 32 * sizeof(float), &out[0], 32);
}

__global__ static void past_static_kernel(float *out, int count)
{
    __shared__ float shared[32];
    const float *all = shared; /* or UBSan speaks first */
    shared[threadIdx.x] = 1;
    __syncthreads();
    if (blockIdx.x == 1)
        out[threadIdx.x] = all[(int)threadIdx.x + count - 31];
}

void past_static_shared(void)
{
    float out[32];
    LAUNCH(past_static_kernel, 2, 32, 0, &out[0], 32);
}

__global__ static void past_global_kernel(float *device, int count)
{
    device[(int)threadIdx.x + count - 31] = 1;
}

void past_global(float *device, int count)
{
    LAUNCH(past_global_kernel, 1, 32, 0, device, count);
}
