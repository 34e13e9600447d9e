/* The shapes are in the header. */
#include "flash_modules.h"

#include <math.h>

#include "flash_tiled_simd.h"
#include "matmul.h"

/* Every head's attention, read from qkv = x weight^T and written to context as they lie. */
static void project_and_attend(float *context, float *qkv, float *lse, float *scratch, const float *x,
                               const float *weight, const AttentionShape *s)
{
    FlashView view = flash_packed_view(qkv, context, lse, s);
    matmul('N', 'T', s->batch * s->tokens, 3 * s->embed_out, s->embed, 1, x, s->embed, weight, s->embed, 0,
           qkv, flash_packed_step(s));
    flash_attention(&view, scratch, s);
}

void sdpa_module(float *out, float *qkv, float *context, float *lse, float *scratch, const float *x,
                 const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                 const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    project_and_attend(context, qkv, lse, scratch, x, qkv_weight, s);
    linear(out, context, proj_weight, proj_bias, rows, C, C);
}

void torch_mha_module(float *out, float *qkv, float *context, float *lse, float *attended, float *scratch,
                      const float *x, const float *in_proj_weight, const float *inner_weight,
                      const float *proj_weight, const float *proj_bias, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    project_and_attend(context, qkv, lse, scratch, x, in_proj_weight, s);
    linear(attended, context, inner_weight, NULL, rows, C, C);
    linear(out, attended, proj_weight, proj_bias, rows, C, C);
}

void true_may_attend(float *bias, const bool *tensor, size_t n)
{
    for (size_t i = 0; i < n; i++)
        bias[i] = tensor[i] ? 0 : -INFINITY;
}

void true_may_not_attend(float *bias, const bool *tensor, size_t n)
{
    for (size_t i = 0; i < n; i++)
        bias[i] = tensor[i] ? -INFINITY : 0;
}
