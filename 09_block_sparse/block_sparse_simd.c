/* Chapter 7's tile steps over a block mask's lists, and FlexAttention's module on them. The shapes are in the
 * header. */
#include "block_sparse.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "matmul.h"

enum { FINE = 16 }; /* a partial block is looked at in strips of so many keys */

/* Keys that wait to be attended to. Neighbours of one kind go together, since long runs are fast. */
typedef struct {
    int first, end;
    bool look; /* ask about each pair */
} KeyRun;

static void add_keys(FlashBlock *block, KeyRun *run, int first, int end, BlockKind kind)
{
    bool look = kind == BLOCK_PARTIAL || block->s->bias;
    if (run->end == first && run->look == look) {
        run->end = end;
        return;
    }
    flash_attend(block, run->first, run->end, run->look);
    *run = (KeyRun){first, end, look};
}

/* The rows t0 <= t < t1 meet the blocks of their list. They are fewer than the block's own rows, so of a
 * partial block some strips are empty for them and some are full: asked once more, the closed form leaves
 * out a good part. */
static void attend_listed(FlashBlock *block, const ListedBlock *list, int listed, int N, int t0, int t1)
{
    const AttentionShape *s = block->s;
    KeyRun run = {0};
    for (int n = 0; n < listed; n++) {
        int first = list[n].key_block * N, end = smaller(first + N, s->key_tokens);
        if (list[n].kind == BLOCK_FULL) {
            add_keys(block, &run, first, end, BLOCK_FULL);
            continue;
        }
        for (int strip = first; strip < end; strip += FINE) {
            int strip_end = smaller(strip + FINE, end);
            BlockKind kind = closed_form(s, block->b, t0, t1, strip, strip_end);
            if (kind != BLOCK_EMPTY)
                add_keys(block, &run, strip, strip_end, kind);
        }
    }
    flash_attend(block, run.first, run.end, run.look);
}

/* A block of N rows is cut into pieces that fit a FlashBlock. */
static int pieces_of_block(const AttentionShape *s)
{
    return (s->block - 1) / FLASH_ROWS + 1;
}

static size_t all_pieces(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * ((s->tokens - 1) / s->block + 1) * pieces_of_block(s);
}

size_t block_sparse_scratch(const AttentionShape *s)
{
    return flash_task_scratch(all_pieces(s), s->head_size);
}

/* Asks for the rows t0 <= t < t1, HS numbers each, ahead of their use: a row is read or written once, and a window leaves
 * little time in between. */
INLINE void ask_for_rows(const float *head, size_t step, int t0, int t1, int HS, bool to_write)
{
    for (int t = t0; t < t1; t++)
        for (int d = 0; d < HS; d += 16) {
            if (to_write)
                __builtin_prefetch(head + t * step + d, 1);
            else
                __builtin_prefetch(head + t * step + d, 0, 2);
        }
}

/* Piece n of all, counted over (b, h, query block, pieces of the block). */
static void attend_piece(const FlashView *view, float *scratch, const BlockMask *mask,
                         const AttentionShape *s, size_t n)
{
    int N = mask->block, each = pieces_of_block(s);
    int piece = (int)(n % each), i = (int)(n / each % mask->query_blocks);
    size_t bh = n / each / mask->query_blocks, b = bh / s->heads, h = bh % s->heads;
    int t0 = i * N + piece * FLASH_ROWS, t1 = smaller(t0 + FLASH_ROWS, smaller((i + 1) * N, s->tokens));
    if (t0 >= t1)
        return; /* the last block is cut short */

    size_t head = b * view->k_batch + h / (s->heads / s->kv_heads) * view->k_head;
    FlashBlock block = {.s = s,
                        .b = (int)b,
                        .k = view->k + head,
                        .v = view->v + head,
                        .key_step = view->k_token,
                        .rows = t1 - t0};
    const float *q = view->q + b * view->q_batch + h * view->q_head;
    float *out = view->out + b * view->out_batch + h * view->out_head;
    for (int t = t0; t < t1; t++)
        block.row[t - t0] = (FlashRow){
            .q = q + t * view->q_token,
            .out = out + t * view->out_token,
            .lse = view->lse ? view->lse + lse_index(s, (int)b, (int)h, t) : NULL,
            .h = (int)h,
            .t = t,
        };
    int listed;
    const ListedBlock *list = block_list(mask, (int)b, (int)h, i, &listed);
    flash_begin(&block, scratch);
    ask_for_rows(out, view->out_token, t0, t1, s->head_size, true);
    ask_for_rows(q, view->q_token, t1, smaller(t1 + FLASH_ROWS, s->tokens), s->head_size, false);
    attend_listed(&block, list, listed, N, t0, t1);
    flash_finish(&block);
}

/* Over heads that lie as the view says; see FlashView. */
static void attend_view(const FlashView *view, float *scratch, const BlockMask *mask, const AttentionShape *s)
{
    size_t pieces = all_pieces(s);
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < FLASH_TASKS; task++)
        for (size_t n = flash_task(task, pieces); n < flash_task(task + 1, pieces); n++)
            attend_piece(view, scratch + task * flash_scratch(s->head_size), mask, s, n);
}

void attention_block_sparse_simd(float *out, float *lse, float *scratch, const float *q, const float *k,
                                 const float *v, const BlockMask *mask, const AttentionShape *s)
{
    FlashView view = flash_view(q, k, v, out, lse, s);
    attend_view(&view, scratch, mask, s);
}

void flex_attention(float *out, float *qkv, float *context, float *lse, float *scratch, const float *x,
                    const float *qkv_weight, const float *proj_weight, const float *proj_bias,
                    const BlockMask *mask, const AttentionShape *s)
{
    size_t T = s->tokens, HS = s->head_size, rows = s->batch * T;
    int C_out = s->embed_out;
    linear(qkv, x, qkv_weight, NULL, rows, s->embed, 3 * C_out);

    /* A head's queries are HS columns of qkv, its keys and values HS others: nothing is copied. */
    FlashView view = {.q = qkv, .k = qkv + C_out, .v = qkv + 2 * C_out, .out = context, .lse = lse};
    view.q_token = view.k_token = 3 * (size_t)C_out;
    view.q_head = view.k_head = view.out_head = HS;
    view.out_token = C_out;
    view.q_batch = view.k_batch = T * view.q_token;
    view.out_batch = T * view.out_token;
    attend_view(&view, scratch, mask, s);

    linear(out, context, proj_weight, proj_bias, rows, C_out, C_out);
}
