/* Chapter 7's tile steps over a block mask's lists, and FlexAttention's module on them. The shapes are in the
 * header. */
#include "block_sparse.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "matmul.h"

enum { FINE = 16 }; /* a partial block is looked at in strips of so many keys */

/* Up to FLASH_ROWS rows of a head, of one query block or of several, and the keys that they are yet to meet. Neighbours of one
 * kind wait for each other, as long runs are fast. */
typedef struct {
    FlashBlock block;
    int t0, t1; /* the rows t0 <= t < t1 */
    int first, end;
    bool look; /* ask about each pair */
} Piece;

static void meet_keys(Piece *x)
{
    flash_attend(&x->block, x->first, x->end, x->look);
    x->first = x->end;
}

static void add_keys(Piece *x, int first, int end, BlockKind kind)
{
    bool look = kind == BLOCK_PARTIAL || x->block.s->bias;
    if (x->end != first || x->look != look || first - x->first >= FLASH_KEYS) {
        meet_keys(x);
        x->first = first;
        x->look = look;
    }
    x->end = end;
}

/* The piece meets the keys first .. end - 1, a block that its rows or its neighbours list. Its rows are others than the list's:
 * the closed form says anew whether the block is full for them, and of what is not, which strips are empty or full. */
static void add_block(Piece *x, int first, int end)
{
    const AttentionShape *s = x->block.s;
    BlockKind whole = closed_form(s, x->block.b, x->t0, x->t1, first, end);
    if (whole == BLOCK_FULL)
        add_keys(x, first, end, BLOCK_FULL);
    for (int strip = first; whole == BLOCK_PARTIAL && strip < end; strip += FINE) {
        int strip_end = smaller(strip + FINE, end);
        BlockKind kind = closed_form(s, x->block.b, x->t0, x->t1, strip, strip_end);
        if (kind != BLOCK_EMPTY)
            add_keys(x, strip, strip_end, kind);
    }
}

/* The first key block after block j that some query block of i .. last lists; key_blocks if there is none. */
static int next_listed(const BlockMask *mask, int b, int h, int i, int last, int j)
{
    int next = mask->key_blocks;
    for (; i <= last; i++) {
        int listed;
        const ListedBlock *list = block_list(mask, b, h, i, &listed);
        int n = listed_before(list, listed, j + 1);
        if (n < listed)
            next = smaller(next, list[n].key_block);
    }
    return next;
}

/* Over heads that lie as the view says; see FlashView. A team of pieces takes the blocks of its lists together. */
static void attend_view(const FlashView *view, float *scratch, const BlockMask *mask, const AttentionShape *s)
{
    FlashTeams teams = flash_teams((size_t)s->batch * s->heads, s->tokens);
    int N = mask->block;
#pragma omp parallel for schedule(dynamic) num_threads(teams.threads)
    for (size_t n = 0; n < teams.count; n++) {
        size_t head = n / teams.of_a_head;
        int b = (int)(head / s->heads), h = (int)(head % s->heads), pieces = 0;
        Piece piece[FLASH_TEAM];
        while (pieces < teams.blocks &&
               flash_begin_in_view(&piece[pieces].block, view, scratch, s, &teams, n, pieces)) {
            Piece *x = &piece[pieces++];
            x->t0 = x->block.row[0].t, x->t1 = x->t0 + x->block.rows;
            x->first = x->end = 0;
            x->look = false;
        }
        for (int p = 0; p < pieces; p++)
            piece[p].block.leads = p == pieces - 1;
        int i = piece[0].t0 / N, last = (piece[pieces - 1].t1 - 1) / N;
        for (int j = -1; (j = next_listed(mask, b, h, i, last, j)) < mask->key_blocks;)
            for (int p = 0; p < pieces; p++)
                add_block(&piece[p], j * N, smaller(j * N + N, s->key_tokens));
        for (int p = 0; p < pieces; p++) {
            meet_keys(&piece[p]);
            flash_finish(&piece[p].block);
        }
    }
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
    int rows = s->batch * s->tokens, C = s->embed, C_out = s->embed_out;
    matmul('N', 'T', rows, 3 * C_out, C, 1, x, C, qkv_weight, C, 0, qkv, flash_packed_step(s));

    /* A head's queries are HS columns of qkv, its keys and values HS others: nothing is copied. */
    FlashView view = flash_packed_view(qkv, context, lse, s);
    attend_view(&view, scratch, mask, s);

    linear(out, context, proj_weight, proj_bias, rows, C_out, C_out);
}
