/* Forward's steps in reverse. The shapes are in flash_modules.h. */
#include "flash_modules_backward.h"

#include "flash_tiled_simd_backward.h"
#include "matmul.h"

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
    linear_backward(scratch->d_context, 0, d_proj_weight, d_proj_bias, d_out, C, context, proj_weight, rows,
                    C, C);
    attend_packed_backward(scratch, qkv, context, lse, s);
    linear_backward(d_x, 0, d_qkv_weight, NULL, scratch->d_qkv, flash_packed_step(s), x, qkv_weight, rows,
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
    linear_backward(scratch->d_attended, 0, d_proj_weight, d_proj_bias, d_out, C, attended, proj_weight, rows,
                    C, C);
    linear_backward(scratch->d_context, 0, d_inner_weight, NULL, scratch->d_attended, C, context,
                    inner_weight, rows, C, C);
    attend_packed_backward(scratch, qkv, context, lse, s);
    linear_backward(d_x, 0, d_in_proj_weight, NULL, scratch->d_qkv, flash_packed_step(s), x, in_proj_weight,
                    rows, C, 3 * C);
}
