/* All blocks of a problem: which rows share one, which keys it meets, which thread does it. The contracts are in
 * flash_tiled_simd.h. */
#include "flash_tiled_simd.h"

#include "threads.h"

void flash_begin_rows(FlashBlock *block)
{
    block->asked = 0;
    block->leads = true;
    for (int j = 0; j < VECTORS; j++)
        block->first_of[j] = block->end_of[j] = 0;
    for (int r = 0, j = 0; r < FLASH_ROWS; r++, j = r / LANES) {
        block->m[r] = block->l[r] = 0;
        block->first[r] = block->end[r] = 0;
        if (r >= block->rows)
            continue;
        block->one_run = flash_bounds(block->s, block->b, block->row[r].t, &block->first[r], &block->end[r]);
        block->first_of[j] = r % LANES ? smaller(block->first_of[j], block->first[r]) : block->first[r];
        block->end_of[j] = larger(block->end_of[j], block->end[r]);
    }
}

void flash_look_ahead(FlashBlock *block)
{
    if (block->asked == block->rows)
        return;
    const FlashRow *row = &block->row[block->asked++];
    const float *q = row->q + block->q_ahead;
    int last = larger(0, row->t + block->s->key_tokens - block->s->tokens);
    ptrdiff_t key = last * (ptrdiff_t)block->key_step + block->k_ahead;
    for (int d = 0; d < block->s->head_size; d += 16) {
        __builtin_prefetch(row->out + d, 1);
        __builtin_prefetch(q + d, 0, 2);
        __builtin_prefetch(block->k + key + d, 0, 2);
        __builtin_prefetch(block->v + key + d, 0, 2);
    }
}

void flash_look_ahead_for_keys(const FlashBlock *block, int key)
{
    size_t at = (size_t)key * block->key_step;
    for (int i = 0; i < TILE; i++, at += block->key_step)
        for (int d = 0; d < block->s->head_size; d += 16) {
            __builtin_prefetch(block->k + at + d, 0, 2);
            __builtin_prefetch(block->v + at + d, 0, 2);
        }
}

/* Tiles are cut at multiples of so many keys. */
static int unit_of(const FlashBlock *block)
{
    return block->attend_pairs ? block->unit : TILE;
}
static int round_down(int n, int unit)
{
    return n / unit * unit;
}

/* The vectors from .. to - 1 hold all rows that may see the key; returns how many keys on this holds. */
static int seeing_vectors(const FlashBlock *block, int key, int keys, int *from, int *to)
{
    *from = VECTORS;
    *to = 0;
    for (int j = 0; j < VECTORS; j++) {
        int first = round_down(block->first_of[j], unit_of(block));
        int end = round_up(block->end_of[j], unit_of(block));
        if (first <= key && key < end) {
            *from = smaller(*from, j);
            *to = j + 1;
        }
        if (first > key)
            keys = smaller(keys, first - key);
        if (end > key)
            keys = smaller(keys, end - key);
    }
    return keys;
}

/* Attends to a tile of the keys key <= t2 < end; returns where the next one begins. */
static int attend_some(FlashBlock *block, int key, int end, bool look)
{
    int from = 0, to = (block->rows + LANES - 1) / LANES, keys = smaller(FLASH_KEYS, end - key);
    if (look)
        keys = seeing_vectors(block, key, keys, &from, &to);
    if (from < to)
        (block->attend_pairs ? block->attend_pairs : flash_attend_tile)(block, key, keys, look || keys % TILE,
                                                                        from, to - from);
    return key + keys;
}

void flash_attend(FlashBlock *block, int first, int end, bool look)
{
    for (int key = first; key < end;)
        key = attend_some(block, key, end, look);
}

static void find_keys(FlashBlock *block)
{
    int first = block->first[0], all_first = first, end = block->end[0], all_end = end;
    for (int r = 1; r < block->rows; r++) {
        first = smaller(first, block->first[r]);
        all_first = larger(all_first, block->first[r]);
        end = larger(end, block->end[r]);
        all_end = smaller(all_end, block->end[r]);
    }
    FlashSpan *left = &block->left;
    left->first = round_down(first, unit_of(block));
    left->all_first = round_up(all_first, unit_of(block));
    left->all_end = round_down(all_end, unit_of(block));
    left->end = end;
    left->one_run = block->one_run && !block->s->bias;
    if (!left->one_run || left->all_first >= left->all_end)
        left->all_first = left->all_end = end;
}

void flash_attend_allowed(FlashBlock *const *block, int n)
{
    for (int i = 0; i < n; i++) {
        find_keys(block[i]);
        block[i]->leads = i == n - 1;
    }
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < n; i++) {
            FlashSpan *left = &block[i]->left;
            bool before = left->first < left->all_first, look = before || left->first >= left->all_end;
            int end = before ? left->all_first : look ? left->end : left->all_end;
            if (left->first < end)
                left->first = attend_some(block[i], left->first, end, look);
            more |= left->first < left->end;
        }
    }
}

/* ---- All blocks of a problem ---- */

static size_t blocks_of(size_t rows)
{
    return (rows + FLASH_ROWS - 1) / FLASH_ROWS;
}

/* As large as leaves each thread enough of them: then all threads are done at about the same time. */
FlashTeams flash_teams(size_t heads, size_t rows)
{
    enum { ENOUGH = 16 };
    int threads = smaller(omp_get_max_threads(), FLASH_THREADS);
    size_t blocks = blocks_of(rows), wanted = heads * blocks / (ENOUGH * threads);
    FlashTeams teams = {.rows = rows};
    teams.blocks = wanted < 1 ? 1 : wanted < FLASH_TEAM ? (int)wanted : FLASH_TEAM;
    teams.of_a_head = (blocks + teams.blocks - 1) / teams.blocks;
    teams.count = heads * teams.of_a_head;
    teams.threads = teams.count < (size_t)threads ? larger(1, (int)teams.count) : threads;
    return teams;
}

bool flash_rows_of(const FlashTeams *teams, size_t n, int i, size_t *first, size_t *past)
{
    *first = (n % teams->of_a_head * teams->blocks + i) * FLASH_ROWS;
    *past = *first + FLASH_ROWS < teams->rows ? *first + FLASH_ROWS : teams->rows;
    return i < teams->blocks && *first < teams->rows;
}

size_t flash_next_team(const FlashTeams *teams, size_t n)
{
    size_t next = n + teams->threads;
    return next < teams->count ? next : n;
}

size_t flash_team_scratch(size_t heads, size_t rows, int head_size)
{
    size_t blocks = heads * blocks_of(rows), most = FLASH_THREADS * FLASH_TEAM;
    return (blocks < most ? blocks : most) * flash_scratch(head_size);
}

float *flash_own_scratch(float *scratch, const FlashTeams *teams, int head_size, int i)
{
    return scratch + (omp_get_thread_num() * teams->blocks + i) * flash_scratch(head_size);
}

size_t flash_view_scratch(const AttentionShape *s)
{
    return flash_team_scratch((size_t)s->batch * s->heads, s->tokens, s->head_size);
}

/* Where query t of a head lies in a view, and where key t lies; heads are counted over all batch entries. */
static size_t query_at(const FlashView *view, const AttentionShape *s, size_t head, size_t t)
{
    return head / s->heads * view->q_batch + head % s->heads * view->q_head + t * view->q_token;
}
static size_t key_at(const FlashView *view, const AttentionShape *s, size_t head, size_t t)
{
    size_t kv_head = head % s->heads / (s->heads / s->kv_heads);
    return head / s->heads * view->k_batch + kv_head * view->k_head + t * view->k_token;
}

bool flash_begin_in_view(FlashBlock *block, const FlashView *view, float *scratch, const AttentionShape *s,
                         const FlashTeams *teams, size_t n, int i)
{
    size_t t0, t1, next_t0, next_t1, next = flash_next_team(teams, n);
    if (!flash_rows_of(teams, n, i, &t0, &t1))
        return false;
    flash_rows_of(teams, next, i, &next_t0, &next_t1);
    size_t head = n / teams->of_a_head, next_head = next / teams->of_a_head;
    size_t b = head / s->heads, h = head % s->heads;
    *block = (FlashBlock){.s = s,
                          .b = (int)b,
                          .k = view->k + key_at(view, s, head, 0),
                          .v = view->v + key_at(view, s, head, 0),
                          .key_step = view->k_token,
                          .q_ahead = query_at(view, s, next_head, next_t0) - query_at(view, s, head, t0),
                          .k_ahead = key_at(view, s, next_head, next_t0) - key_at(view, s, head, t0),
                          .rows = (int)(t1 - t0)};
    for (size_t t = t0; t < t1; t++)
        block->row[t - t0] = (FlashRow){
            .q = view->q + query_at(view, s, head, t),
            .out = view->out + b * view->out_batch + h * view->out_head + t * view->out_token,
            .lse = view->lse ? view->lse + lse_index(s, (int)b, (int)h, (int)t) : NULL,
            .h = (int)h,
            .t = (int)t,
        };
    flash_begin(block, flash_own_scratch(scratch, teams, s->head_size, i));
    return true;
}

void flash_attention(const FlashView *view, float *scratch, const AttentionShape *s)
{
    FlashTeams teams = flash_teams((size_t)s->batch * s->heads, s->tokens);
#pragma omp parallel for schedule(dynamic) num_threads(teams.threads)
    for (size_t n = 0; n < teams.count; n++) {
        FlashBlock block[FLASH_TEAM], *team[FLASH_TEAM];
        int blocks = 0;
        for (; flash_begin_in_view(&block[blocks], view, scratch, s, &teams, n, blocks); blocks++)
            team[blocks] = &block[blocks];
        flash_attend_allowed(team, blocks);
        for (int i = 0; i < blocks; i++)
            flash_finish(team[i]);
    }
}

FlashView flash_view(const float *q, const float *k, const float *v, float *out, float *lse,
                     const AttentionShape *s)
{
    FlashView view = {.q = q, .k = k, .v = v, .out = out, .lse = lse};
    view.q_token = view.k_token = view.out_token = s->head_size;
    view.q_head = view.out_head = (size_t)s->tokens * s->head_size;
    view.q_batch = view.out_batch = s->heads * view.q_head;
    view.k_head = (size_t)s->key_tokens * s->head_size;
    view.k_batch = s->kv_heads * view.k_head;
    return view;
}

size_t flash_packed_step(const AttentionShape *s)
{
    return (size_t)3 * s->heads * s->head_size + 16;
}

FlashView flash_packed_view(const float *qkv, float *context, float *lse, const AttentionShape *s)
{
    size_t HS = s->head_size, C = HS * s->heads, T = s->tokens, step = flash_packed_step(s);
    FlashView view = {.q = qkv, .k = qkv + C, .v = qkv + 2 * C, .out = context, .lse = lse};
    view.q_token = view.k_token = step;
    view.out_token = C;
    view.q_head = view.k_head = view.out_head = HS;
    view.q_batch = view.k_batch = T * step;
    view.out_batch = T * C;
    return view;
}

void attention_simd(float *out, float *lse, float *scratch, const float *q, const float *k, const float *v,
                    const AttentionShape *s)
{
    FlashView view = flash_view(q, k, v, out, lse, s);
    flash_attention(&view, scratch, s);
}
