/* The gradients over a block mask's lists with chapter 7's tile steps, and FlexAttention's module. The shapes are in the
 * header; chapter 7 has the arithmetic.
 *
 * Chapter 7 walks with a range of keys past all queries. Here the transposed lists say which query block comes next,
 * so the blocks in no list are never come by; and of each tile the closed form says whether anyone has to be asked.
 */
#include "../07_flash_tiled/flash_tiled_simd_backward.h"
#include "block_sparse.h"
#include "matmul.h"

/* How far the queries before t reach that lie in a block that some key block of key <= .. < end lists; 0 if there are none. */
static int queries_end(const void *lists, int b, int h, int t, int key, int end)
{
    const BlockMask *transposed = lists;
    int N = transposed->block, reach = 0;
    for (int j = key / N; j <= (end - 1) / N; j++) {
        int listed;
        const ListedBlock *list = block_list(transposed, b, h, j, &listed);
        int n = listed_before(list, listed, (t - 1) / N + 1); /* how many begin before t */
        if (n > 0)
            reach = larger(reach, smaller(t, (list[n - 1].key_block + 1) * N));
    }
    return reach;
}

static int how_many(const AttentionShape *s, int b, int t, int t_end, int key, int end)
{
    return closed_form(s, b, t, t_end, key, end); /* BLOCK_EMPTY, BLOCK_PARTIAL, BLOCK_FULL */
}

static FlashKnown known_from(const BlockMask *transposed)
{
    return (FlashKnown){.lists = transposed, .queries_end = queries_end, .how_many = how_many};
}

void attention_block_sparse_simd_backward(const AttentionBackward *a, float *scratch,
                                          const BlockMask *transposed, const AttentionShape *s)
{
    FlashBackward g = flash_backward(a, s);
    g.known = known_from(transposed);
    flash_attention_backward(&g, scratch, s);
}

void flex_attention_backward(float *dx, float *d_qkv_weight, float *d_proj_weight, float *d_proj_bias,
                             float *d_qkv, float *d_context, float *scratch, const float *dout,
                             const float *qkv, const float *context, const float *lse, const float *x,
                             const float *qkv_weight, const float *proj_weight, const BlockMask *transposed,
                             const AttentionShape *s)
{
    int rows = s->batch * s->tokens, C_out = s->embed_out;
    linear_backward(d_context, 0, d_proj_weight, d_proj_bias, dout, C_out, context, proj_weight, rows, C_out,
                    C_out);

    /* As forward read its columns of qkv, so backward writes those of d_qkv. */
    FlashBackward g = {.view = flash_packed_view(qkv, (float *)context, (float *)lse, s),
                       .dout = d_context,
                       .dq = d_qkv,
                       .dk = d_qkv + C_out,
                       .dv = d_qkv + 2 * C_out,
                       .known = known_from(transposed)};
    flash_attention_backward(&g, scratch, s);

    linear_backward(dx, 0, d_qkv_weight, NULL, d_qkv, flash_packed_step(s), x, qkv_weight, rows, s->embed,
                    3 * C_out);
}
