/* Tiles of bf16 in shared memory, and their products on tensor cores. TENSOR_CORES.md derives who holds what.
 *
 * Lane l of a warp, g = l / 4 and t = l % 4, holds of a 16 x 8 result the rows g and g + 8, and of each the columns 2 t and
 * 2 t + 1: number i lies at row g + i / 2 * 8, column 2 t + i % 2. */
#ifndef TENSOR_TILES_H
#define TENSOR_TILES_H

#include "cuda_tensor.h"
#include "cuda_warp.h"
#include "kernel.h"
#include "philox.h"

#include <stdio.h>

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; /* exp(x) is exp2(x * LOG2_E), and cheaper so */

/* Row `row`, columns 8 * chunk .. + 7 of a tile whose rows hold D numbers, D a multiple of 64. Eight rows at one chunk lie
 * in eight different groups of banks. */
template <int D, class T> __device__ static T *place(T *tile, int row, int chunk)
{
    return tile + row * D + ((chunk ^ (row & 7)) << 3);
}

/* s += A B^T: M times 16 rows of A, from row `first` on, times N rows of B. b2 is fetched while b is multiplied by. */
template <int M, int N, int D>
__device__ static void multiply_rows(float (&s)[M][N / 8][4], const bf16 *a, int first, const bf16 *b)
{
    int lane = threadIdx.x % WARP;
    uint32_t left[M][4], right[2][4];
    int b_row = (lane & 7) + 8 * (lane >> 4), b_chunk = lane >> 3 & 1;
    load_matrix_4(right[0], place<D>(b, b_row, b_chunk));
    UNROLL for (int k = 0; k < D / 16; k++) UNROLL for (int n = 0; n < N / 16; n++)
    {
        int i = k * (N / 16) + n, next_k = (i + 1) / (N / 16), next_n = (i + 1) % (N / 16);
        if (n == 0) {
            UNROLL for (int m = 0; m < M; m++)
                load_matrix_4(left[m], place<D>(a, first + 16 * m + (lane & 15), 2 * k + (lane >> 4)));
        }
        if (i + 1 < D / 16 * (N / 16))
            load_matrix_4(right[(i + 1) % 2], place<D>(b, 16 * next_n + b_row, 2 * next_k + b_chunk));
        UNROLL for (int m = 0; m < M; m++)
        {
            mma_bf16(s[m][2 * n], left[m], right[i % 2]);
            mma_bf16(s[m][2 * n + 1], left[m], right[i % 2] + 2);
        }
    }
}

/* o += P V: the lanes' own P, which as it lies is a left factor, times N rows of V. */
template <int M, int N, int D>
__device__ static void multiply_add(float (&o)[M][D / 8][4], const float (&p)[M][N / 8][4], const bf16 *v)
{
    int lane = threadIdx.x % WARP, v_row = lane & 15, v_chunk = lane >> 4;
    uint32_t left[M][4], right[2][4];
    load_matrix_4_transposed(right[0], place<D>(v, v_row, v_chunk));
    UNROLL for (int k = 0; k < N / 16; k++) UNROLL for (int n = 0; n < D / 16; n++)
    {
        int i = k * (D / 16) + n, next_k = (i + 1) / (D / 16), next_n = (i + 1) % (D / 16);
        if (n == 0) {
            UNROLL for (int m = 0; m < M; m++) UNROLL for (int r = 0; r < 4; r++) left[m][r] =
                pack_bf16(p[m][2 * k + r / 2][r % 2 * 2], p[m][2 * k + r / 2][r % 2 * 2 + 1]);
        }
        if (i + 1 < D / 16 * (N / 16))
            load_matrix_4_transposed(right[(i + 1) % 2],
                                     place<D>(v, 16 * next_k + v_row, 2 * next_n + v_chunk));
        UNROLL for (int m = 0; m < M; m++)
        {
            mma_bf16(o[m][2 * n], left[m], right[i % 2]);
            mma_bf16(o[m][2 * n + 1], left[m], right[i % 2] + 2);
        }
    }
}

/* Over the four lanes that share a row. */
__device__ static inline float row_largest(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ static inline float row_sum(float x)
{
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/* A row of 16 x D results, to bf16 in memory: HS numbers of it, times `factor`. */
template <int D>
__device__ static void store_row(bf16 *to, const float (&o)[D / 8][4], int half, float factor, int HS)
{
    int t = threadIdx.x % 4;
    UNROLL for (int n = 0; n < D / 8; n++) if (8 * n < HS) * (uint32_t *)(to + 8 * n + 2 * t) =
        pack_bf16(factor * o[n][2 * half], factor * o[n][2 * half + 1]);
}

/* May the queries from `first` on all attend to every key of a tile that ends at `to`? False where it would take asking each. */
__device__ static inline bool attends_to_tile(const AttentionShape *s, int b, int first, int to)
{
    if (to > s->key_tokens || (s->lengths && to > s->lengths[b]))
        return false;
    bool causal = s->causal || s->mask.kind == MASK_CAUSAL;
    return (s->mask.kind == MASK_NONE || s->mask.kind == MASK_CAUSAL) &&
           (!causal || to - 1 <= first + s->key_tokens - s->tokens);
}

static const char *refuses_head_size(const AttentionShape *s, int most)
{
    static char reason[80];
    snprintf(reason, sizeof reason, "takes --head-size 8, 16 .. %d, not %d", most, s->head_size);
    return s->head_size % 8 || s->head_size > most ? reason : NULL;
}

#endif
