/* Forward's steps in reverse. The shapes are in flash_modules.h. */
#include "flash_modules_backward.h"

#include "flash_tiled_simd_backward.h"
#include "matmul.h"

/* sum (width) = the sum of y's rows (rows,width): 128 of them at a time, so that sums of many terms stay
 * exact. */
static void sum_rows(float *sum, const float *y, size_t rows, int width)
{
    enum { COLUMNS = 64, ROWS = 128 };
#pragma omp parallel for
    for (int c0 = 0; c0 < width; c0 += COLUMNS) {
        int columns = width - c0 < COLUMNS ? width - c0 : COLUMNS;
        for (int c = 0; c < columns; c++)
            sum[c0 + c] = 0;
        for (size_t r0 = 0; r0 < rows; r0 += ROWS) {
            float part[COLUMNS] = {0};
            for (size_t r = r0; r < r0 + ROWS && r < rows; r++)
                for (int c = 0; c < columns; c++)
                    part[c] += y[r * width + c0 + c];
            for (int c = 0; c < columns; c++)
                sum[c0 + c] += part[c];
        }
    }
}

/* The gradient of linear(): with y = x W^T + bias, d_x = d_y W, d_weight = d_y^T x, d_bias = the sum of d_y's
 * rows (NULL: there is no bias). Rows of d_y are step numbers apart. */
static void linear_backward(float *d_x, float *d_weight, float *d_bias, const float *d_y, int step,
                            const float *x, const float *weight, size_t rows, int inputs, int outputs)
{
    matmul('N', 'N', (int)rows, inputs, outputs, 1, d_y, step, weight, inputs, 0, d_x, inputs);
    matmul('T', 'N', outputs, inputs, (int)rows, 1, d_y, step, x, inputs, 0, d_weight, inputs);
    if (d_bias)
        sum_rows(d_bias, d_y, rows, outputs);
}

/* Every head's gradients, written to d_qkv where its queries, keys and values lie in qkv. */
static void attend_packed_backward(const ModuleScratch *scratch, const float *qkv, const float *context,
                                   const float *lse, const AttentionShape *s)
{
    int C = s->embed_out;
    FlashBackward g = {
        .view = flash_packed_view(qkv, (float *)context, (float *)lse, s),
        .dout = scratch->d_context,
        .dq = scratch->d_qkv,
        .dk = scratch->d_qkv + C,
        .dv = scratch->d_qkv + 2 * C,
    };
    flash_attention_backward(&g, scratch->scratch, s);
}

void sdpa_module_backward(float *d_x, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                          const ModuleScratch *scratch, const float *d_out, const float *qkv,
                          const float *context, const float *lse, const float *x, const float *qkv_weight,
                          const float *proj_weight, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    linear_backward(scratch->d_context, d_proj_weight, d_proj_bias, d_out, C, context, proj_weight, rows, C,
                    C);
    attend_packed_backward(scratch, qkv, context, lse, s);
    linear_backward(d_x, d_qkv_weight, NULL, scratch->d_qkv, flash_packed_step(s), x, qkv_weight, rows,
                    s->embed, 3 * C);
}

void torch_mha_module_backward(float *d_x, float *d_in_proj_weight, float *d_inner_weight,
                               float *d_proj_weight, float *d_proj_bias, const ModuleScratch *scratch,
                               const float *d_out, const float *qkv, const float *context, const float *lse,
                               const float *attended, const float *x, const float *in_proj_weight,
                               const float *inner_weight, const float *proj_weight, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    linear_backward(scratch->d_attended, d_proj_weight, d_proj_bias, d_out, C, attended, proj_weight, rows, C,
                    C);
    linear_backward(scratch->d_context, d_inner_weight, NULL, scratch->d_attended, C, context, inner_weight,
                    rows, C, C);
    attend_packed_backward(scratch, qkv, context, lse, s);
    linear_backward(d_x, d_in_proj_weight, NULL, scratch->d_qkv, flash_packed_step(s), x, in_proj_weight,
                    rows, C, 3 * C);
}
