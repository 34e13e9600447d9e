/* Chapter 7's tile steps over a block mask's lists, and FlexAttention's module on them. The shapes are in the
 * header. */
#include "block_sparse.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "matmul.h"

enum { FINE = 16 }; /* a partial block is cut into strips of so many keys */

/* Keys that wait to be attended to: neighbours of one kind go together, since long runs are fast. */
typedef struct {
    int first, end;
    bool look;
} Run;

static void add_keys(FlashBlock *block, Run *run, int first, int end, BlockKind kind)
{
    bool look = kind == BLOCK_PARTIAL || block->s->bias;
    if (run->end == first && run->look == look) {
        run->end = end;
        return;
    }
    flash_attend(block, run->first, run->end, run->look);
    *run = (Run){first, end, look};
}

/* The rows t0 <= t < t1 meet the blocks of their list. */
static void attend_listed(FlashBlock *block, const ListedBlock *list, int listed, const BlockMask *mask,
                          int t0, int t1)
{
    const AttentionShape *s = block->s;
    Run run = {0};
    for (int j = 0; j < listed; j++) {
        int first = list[j].key_block * mask->block;
        int end = first + mask->block < s->key_tokens ? first + mask->block : s->key_tokens;
        if (list[j].kind == BLOCK_FULL) {
            add_keys(block, &run, first, end, BLOCK_FULL);
            continue;
        }
        /* These rows are fewer than the block's, so of a partial block some strips are empty for them and
         * some are full: with blocks of 128 alone a window of 256 would do half as much work again. */
        for (int strip = first; strip < end; strip += FINE) {
            int strip_end = strip + FINE < end ? strip + FINE : end;
            BlockKind kind = closed_form(s, block->b, t0, t1, strip, strip_end);
            if (kind != BLOCK_EMPTY)
                add_keys(block, &run, strip, strip_end, kind);
        }
    }
    flash_attend(block, run.first, run.end, run.look);
}

static size_t row_blocks(const AttentionShape *s, int block)
{
    int each = (block - 1) / FLASH_ROWS + 1;
    return (size_t)s->batch * s->heads * ((s->tokens - 1) / block + 1) * each;
}

size_t block_sparse_scratch(const AttentionShape *s)
{
    return flash_task_scratch(row_blocks(s, s->block), s->head_size);
}

/* Over heads that lie as the view says; see FlashView. */
static void attend_view(const FlashView *view, float *scratch, const BlockMask *mask, const AttentionShape *s)
{
    int N = mask->block, each = (N - 1) / FLASH_ROWS + 1, group = s->heads / s->kv_heads;
    size_t blocks = row_blocks(s, N);

#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < FLASH_TASKS; task++)
        for (size_t n = flash_task(task, blocks); n < flash_task(task + 1, blocks); n++) {
            /* n counts (b, h, query block, rows within it) */
            int part = (int)(n % each), i = (int)(n / each % mask->query_blocks);
            int h = (int)(n / each / mask->query_blocks % s->heads),
                b = (int)(n / each / mask->query_blocks / s->heads);
            int block_end = (i + 1) * N < s->tokens ? (i + 1) * N : s->tokens;
            int t0 = i * N + part * FLASH_ROWS,
                t1 = t0 + FLASH_ROWS < block_end ? t0 + FLASH_ROWS : block_end;
            if (t0 >= t1)
                continue;

            size_t kv = b * view->k_batch + h / group * view->k_head;
            FlashBlock block = {.s = s,
                                .b = b,
                                .k = view->k + kv,
                                .v = view->v + kv,
                                .key_step = view->k_token,
                                .rows = t1 - t0};
            for (int t = t0; t < t1; t++)
                block.row[t - t0] = (FlashRow){
                    .q = view->q + b * view->q_batch + h * view->q_head + t * view->q_token,
                    .out = view->out + b * view->out_batch + h * view->out_head + t * view->out_token,
                    .lse = view->lse ? view->lse + lse_index(s, b, h, t) : NULL,
                    .h = h,
                    .t = t,
                };
            int listed;
            const ListedBlock *list = block_list(mask, b, h, i, &listed);
            flash_begin(&block, scratch + task * flash_scratch(s->head_size));
            attend_listed(&block, list, listed, mask, t0, t1);
            flash_finish(&block);
        }
}

void attention_block_sparse_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                                 const float *v, const BlockMask *mask, const AttentionShape *s)
{
    size_t HS = s->head_size, q_head = s->tokens * HS, k_head = s->key_tokens * HS;
    FlashView view = {
        .q = q,
        .k = k,
        .v = v,
        .out = out,
        .lse = lse,
        .q_batch = s->heads * q_head,
        .q_head = q_head,
        .q_token = HS,
        .k_batch = s->kv_heads * k_head,
        .k_head = k_head,
        .k_token = HS,
        .out_batch = s->heads * q_head,
        .out_head = q_head,
        .out_token = HS,
    };
    attend_view(&view, scratch, mask, s);
}

void flex_attention(float *out, float *qkv, float *context, float *scratch, const float *x,
                    const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                    const BlockMask *mask, const AttentionShape *s)
{
    size_t T = s->tokens, HS = s->head_size, C_out = s->embed_out, rows = s->batch * T;
    linear(qkv, x, qkv_weight, NULL, rows, s->embed, 3 * s->embed_out);

    /* q, k and v of a head are columns of qkv: nothing is copied. */
    FlashView view = {
        .q = qkv,
        .k = qkv + C_out,
        .v = qkv + 2 * C_out,
        .out = context,
        .q_batch = T * 3 * C_out,
        .q_head = HS,
        .q_token = 3 * C_out,
        .k_batch = T * 3 * C_out,
        .k_head = HS,
        .k_token = 3 * C_out,
        .out_batch = T * C_out,
        .out_head = HS,
        .out_token = C_out,
    };
    attend_view(&view, scratch, mask, s);

    linear(out, context, proj_weight, proj_bias, rows, s->embed_out, s->embed_out);
}
