/* The gradients of the modules in flash_modules.h, for dropout too. d_NAME is the gradient of NAME and lies as
 * it does; all of them are written. What forward wrote is read: qkv, context, lse (and attended). */
#ifndef FLASH_MODULES_BACKWARD_H
#define FLASH_MODULES_BACKWARD_H

#include "shape.h"

/* Memory that a backward pass needs beside the gradients. */
typedef struct {
    float *d_qkv;      /* as qkv */
    float *d_context;  /* (B,T,C_out) */
    float *d_attended; /* (B,T,C): torch_mha_module only */
    float *scratch;    /* flash_backward_scratch(s) floats */
} ModuleScratch;

void sdpa_module_backward(float *d_x, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                          const ModuleScratch *scratch, const float *d_out, const float *qkv,
                          const float *context, const float *lse, const float *x, const float *qkv_weight,
                          const float *proj_weight, const AttentionShape *s);

void torch_mha_module_backward(float *d_x, float *d_in_proj_weight, float *d_inner_weight,
                               float *d_proj_weight, float *d_proj_bias, const ModuleScratch *scratch,
                               const float *d_out, const float *qkv, const float *context, const float *lse,
                               const float *attended, const float *x, const float *in_proj_weight,
                               const float *inner_weight, const float *proj_weight, const AttentionShape *s);

#endif
