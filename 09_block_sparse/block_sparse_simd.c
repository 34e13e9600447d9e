/* Chapter 7's tile steps over a block mask's lists, and FlexAttention's module on them. The shapes are in the
 * header. */
#include "block_sparse.h"

#include "../07_flash_tiled/flash_tiled_simd.h"
#include "matmul.h"

enum { FINE = 16 }; /* a partial block is looked at in strips of so many keys */

/* Up to FLASH_ROWS of the rows of a query block, and the keys that they are yet to meet. Neighbours of one kind wait for
 * each other, as long runs are fast. */
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

/* The piece meets a block of the list. It has fewer rows than the list is of, so of a partial block some strips are
 * empty for it and some are full: asked once more, the closed form leaves out a good part. */
static void add_block(Piece *x, const ListedBlock *listed, int N)
{
    const AttentionShape *s = x->block.s;
    int first = listed->key_block * N, end = smaller(first + N, s->key_tokens);
    if (listed->kind == BLOCK_FULL) {
        add_keys(x, first, end, BLOCK_FULL);
        return;
    }
    for (int strip = first; strip < end; strip += FINE) {
        int strip_end = smaller(strip + FINE, end);
        BlockKind kind = closed_form(s, x->block.b, x->t0, x->t1, strip, strip_end);
        if (kind != BLOCK_EMPTY)
            add_keys(x, strip, strip_end, kind);
    }
}

/* A block of N rows is cut into pieces, and these into teams, which take the blocks of their list together. */
static FlashTeams teams_of(const AttentionShape *s)
{
    return flash_teams((size_t)s->batch * s->heads * ((s->tokens - 1) / s->block + 1), s->block);
}

size_t block_sparse_scratch(const AttentionShape *s)
{
    FlashTeams teams = teams_of(s);
    return flash_team_scratch(&teams, s->head_size);
}

/* Over heads that lie as the view says; see FlashView. */
static void attend_view(const FlashView *view, float *scratch, const BlockMask *mask, const AttentionShape *s)
{
    FlashTeams teams = teams_of(s);
    int ahead = flash_threads(&teams) * smaller(s->block, teams.blocks * FLASH_ROWS);
#pragma omp parallel for schedule(dynamic) num_threads(flash_threads(&teams))
    for (size_t n = 0; n < teams.count; n++) {
        size_t of_all = n / teams.of_a_head, bh = of_all / mask->query_blocks; /* the query block, the head */
        int i = (int)(of_all % mask->query_blocks), N = mask->block;
        int rows = smaller(N, s->tokens - i * N), pieces = 0, listed;
        float *own = flash_own_scratch(scratch, &teams, s->head_size);
        Piece piece[FLASH_TEAM];
        for (size_t first, past; flash_rows_of(&teams, n, pieces, &first, &past) && (int)first < rows;
             pieces++) {
            Piece *x = &piece[pieces];
            *x = (Piece){.t0 = i * N + (int)first, .t1 = i * N + smaller((int)past, rows)};
            flash_begin_in_view(&x->block, view, own + pieces * flash_scratch(s->head_size), s, bh, x->t0,
                                x->t1, ahead);
        }
        for (int p = 0; p < pieces; p++)
            piece[p].block.leads = p == pieces - 1;
        const ListedBlock *list = block_list(mask, (int)(bh / s->heads), (int)(bh % s->heads), i, &listed);
        for (int j = 0; j < listed; j++)
            for (int p = 0; p < pieces; p++)
                add_block(&piece[p], &list[j], N);
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
