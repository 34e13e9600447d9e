/* The shapes are in the header. */
#include "flash_modules.h"

#include <math.h>

#include "flash_tiled_simd.h"
#include "matmul.h"

FlashView packed_view(float *context, float *lse, const float *qkv, const AttentionShape *s)
{
    size_t C = s->embed_out, HS = s->head_size, T = s->tokens;
    return (FlashView){
        .q = qkv,
        .k = qkv + C,
        .v = qkv + 2 * C,
        .out = context,
        .lse = lse,
        .q_token = 3 * C,
        .k_token = 3 * C,
        .out_token = C,
        .q_head = HS,
        .k_head = HS,
        .out_head = HS,
        .q_batch = T * 3 * C,
        .k_batch = T * 3 * C,
        .out_batch = T * C,
    };
}

/* Every head's attention, read from qkv and written to context as they lie. */
static void attend_packed(float *context, float *lse, float *scratch, const float *qkv,
                          const AttentionShape *s)
{
    FlashView view = packed_view(context, lse, qkv, s);
    flash_attention(&view, scratch, s);
}

void sdpa_module(float *out, float *qkv, float *context, float *lse, float *scratch, const float *x,
                 const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                 const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    linear(qkv, x, qkv_weight, NULL, rows, s->embed, 3 * C);
    attend_packed(context, lse, scratch, qkv, s);
    linear(out, context, proj_weight, proj_bias, rows, C, C);
}

void torch_mha_module(float *out, float *qkv, float *context, float *lse, float *attended, float *scratch,
                      const float *x, const float *in_proj_weight, const float *inner_weight,
                      const float *proj_weight, const float *proj_bias, const AttentionShape *s)
{
    size_t rows = (size_t)s->batch * s->tokens;
    int C = s->embed_out;
    linear(qkv, x, in_proj_weight, NULL, rows, C, 3 * C);
    attend_packed(context, lse, scratch, qkv, s);
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
