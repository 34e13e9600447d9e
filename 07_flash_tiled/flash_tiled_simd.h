/* Flash attention near the processor's multiply-add peak, as steps that other chapters can call: grouped
 * heads (8) and block masks (9) bring a loop of their own and nothing else.
 *
 * A block is up to FLASH_ROWS query rows that look at the same keys and values. Its life:
 *
 *     FlashBlock block = {.s = s, .b = b, .k = k, .v = v, .key_step = HS, .rows = n};
 *     for each i < n: block.row[i] = (FlashRow){.q = .., .out = .., .lse = .., .h = .., .t = ..};
 *     flash_begin(&block, scratch);
 *     flash_attend(&block, first, end, look);      any number of times, each key at most once
 *     flash_finish(&block);
 *
 * A block belongs to one thread, and its result does not depend on which one. Blocks that read the same keys may be taken
 * as a team, which walks along the keys together: flash_attend_allowed().
 * Dao, Fu, Ermon, Rudra and Re 2022 (FlashAttention), Dao 2023 (FlashAttention-2). */
#ifndef FLASH_TILED_SIMD_H
#define FLASH_TILED_SIMD_H

#include "shape.h"
#include "vectors.h"

enum {
    FLASH_ROWS = VECTORS * LANES, /* 48 with AVX-512, 24 with AVX2, else 12 */
    FLASH_KEYS = 128,             /* keys are taken in tiles of so many */
    FLASH_TEAM = 4,               /* blocks of a team, at most */
    FLASH_THREADS = 128,          /* threads that there is scratch for */
};

typedef struct {
    const float *q; /* HS numbers, read by flash_begin */
    float *out;     /* HS numbers, written by flash_finish */
    float *lse;     /* one number, written by flash_finish; NULL: not wanted */
    int h, t;       /* which query this is, for mask, bias and dropout; h counts over all NH heads */
} FlashRow;

/* Of some rows none sees a key outside first .. end - 1, and each sees all of all_first .. all_end - 1 if one_run (but for
 * a bias of -inf). */
typedef struct {
    int first, end, all_first, all_end;
    bool one_run;
} FlashSpan;

typedef struct FlashBlock FlashBlock;
struct FlashBlock {
    /* Filled in by the caller. */
    const AttentionShape *s; /* head_size, scale, mask, causal, lengths, bias, dropout */
    int b;
    const float *k, *v; /* key t2: HS numbers at k + t2 * key_step; its value: at v + t2 * key_step */
    size_t key_step;
    /* Numbers from a row's query to that of a row which the thread will probably take next, and from the one's keys to the
     * other's. 0: nothing is known. */
    ptrdiff_t q_ahead, k_ahead;
    int rows;                 /* 1 .. FLASH_ROWS; multiples of LANES waste nothing */
    FlashRow row[FLASH_ROWS]; /* in any order; fastest with rows side by side that see the same keys */

    /* Kept between the steps. Lane i of everything belongs to row[i]. */
    float *q_columns; /* (HS, FLASH_ROWS): the transposed queries, times scale and log2 e */
    float
        *out_columns; /* (HS, FLASH_ROWS): the transposed output, not yet divided by l; HS rounded up to 16 */
    _Alignas(64) float m[FLASH_ROWS]; /* scores are weighed as 2^(score - m); not always the largest score */
    _Alignas(64) float l[FLASH_ROWS]; /* the sum of the weights so far; 0: nothing to attend to yet */
    _Alignas(64) int first[FLASH_ROWS]; /* a row sees no key outside first <= t2 < end */
    _Alignas(64) int end[FLASH_ROWS];
    int first_of[VECTORS], end_of[VECTORS]; /* nor does any row of a vector outside these */
    bool one_run;   /* each row sees every key from its first to its end, if there is no bias */
    bool leads;     /* the last of its team: flash_look_ahead_for_keys() is for it to do */
    int asked;      /* flash_look_ahead() has been at so many rows */
    FlashSpan left; /* the keys that flash_attend_allowed() has yet to attend to */

    /* NULL; bf16: what does a tile in flash_attend_tile()'s place. Its tiles begin at a multiple of `unit` keys; without `ask`
     * they end there too. */
    void (*attend_pairs)(FlashBlock *block, int key, int keys, bool ask, int from, int vectors);
    int unit;
};

/* How many floats of scratch one block needs, a multiple of 64 bytes. It must be 64-byte aligned; what is in
 * it does not matter. */
size_t flash_scratch(int head_size);

/* Reads the queries; m = l = out = 0. */
void flash_begin(FlashBlock *block, float *scratch);

/* The part of it that asks for no numbers: bounds; m = l = 0. */
void flash_begin_rows(FlashBlock *block);

/* Attends to the keys first <= t2 < end, which must exist (0 <= first, end <= TK); an empty range is nothing.
 *
 *   look = false   every row sees every key of the range, and s->bias is NULL: nobody is asked.
 *   look = true    attends() and the bias are asked about each pair. One that they forbid weighs nothing.
 *
 * Dropout, if any, is drawn by position in both. A long range in one call is faster than many short ones. NaN
 * in a key that a row may not see stays out of that row; NaN in a value of the range reaches every row of the
 * block, as 0 * NaN is NaN. */
void flash_attend(FlashBlock *block, int first, int end, bool look);

/* One tile: at most FLASH_KEYS keys, by the block's vectors from .. from + vectors - 1 (1 .. VECTORS of them). ask: what
 * flash_ask() says of each pair counts; without, each row sees every key, and keys is a multiple of TILE. */
void flash_attend_tile(FlashBlock *block, int key, int keys, bool ask, int from, int vectors);

/* top: the largest score - m of the tile. Would the weights 2^(score - m) fit into floats with this m? Where not, m
 * moves to the largest score, and what was summed up so far is mended; true if the tile must be scored again. */
bool flash_raise_maximum(FlashBlock *block, const Vector top[VECTORS], int from, int vectors);

/* Attends to every key that mask, causality, lengths and bias let the rows of n blocks see: the run of keys that all
 * rows of a block see without looking, the keys before and after it with. All that a chapter without block lists needs
 * between begin and finish. Blocks that read the same keys take a tile each in turn: so the tile comes once from far
 * away, and then from a cache. */
void flash_attend_allowed(FlashBlock *const *block, int n);

/* What flash_attend() is told of its keys key .. key + keys - 1 by mask, lengths and bias (flash_pairs.c): terms
 * (keys, FLASH_ROWS) = the bias times log2 e, -inf where a row may not look and in the rows up to the next multiple
 * of TILE keys. Only in the vectors from .. from + vectors - 1. Returns where the bias of the first of these rows goes on at
 * key + keys; without a bias, terms. */
const float *flash_ask(const FlashBlock *block, float *terms, int key, int keys, int from, int vectors);

/* p (keys, FLASH_ROWS) times 0 or 1 / (1 - dropout), drawn by position; in the same vectors. */
void flash_drop_out(const FlashBlock *block, float *p, int key, int keys, int from, int vectors);

/* Row t of batch entry b sees no key outside first <= t2 < end; true if it sees all within (but for a bias of
 * -inf), as with most masks. */
bool flash_bounds(const AttentionShape *s, int b, int t, int *first, int *end);

/* The same of rows t .. t + rows - 1. */
FlashSpan flash_span(const AttentionShape *s, int b, int t, int rows);

/* Asks memory for a row's output, for the query q_ahead of its own, and for the key and value k_ahead of the last it sees under a
 * causal mask: few at a time, as only so much can be under way, and in the midst of multiply-adds, so that nobody waits. */
void flash_look_ahead(FlashBlock *block);

/* Asks memory for TILE keys and their values, from this one on. */
void flash_look_ahead_for_keys(const FlashBlock *block, int key);

/* Writes out and lse = m + log l of each row; zeros and -inf for a row that saw no key. */
void flash_finish(FlashBlock *block);

/* How the rows of a problem are shared out: they are `heads` lists of some rows, cut into blocks, and these into teams.
 * The threads take one team after the other; a thread keeps its scratch from team to team: it stays in the cache. The more
 * threads there are, the smaller are the teams, which changes no number; the memory depends on the shape alone.
 *
 *     FlashTeams teams = flash_teams(heads, rows);
 *     #pragma omp parallel for schedule(dynamic) num_threads(teams.threads)
 *     for (size_t n = 0; n < teams.count; n++)
 *         for (int i = 0; flash_rows_of(&teams, n, i, &first, &past); i++)
 *             block i of a team, the rows first .. past - 1 of list n / teams.of_a_head, in flash_own_scratch(scratch, &teams, HS, i)
 */
typedef struct {
    size_t rows;             /* of a list */
    int blocks;              /* of a team, at most */
    size_t of_a_head, count; /* teams */
    int threads;             /* that take them */
} FlashTeams;
FlashTeams flash_teams(size_t heads, size_t rows);
bool flash_rows_of(const FlashTeams *teams, size_t n, int i, size_t *first, size_t *past);

/* The team that a thread which is at team n will probably take next; n if there is none. */
size_t flash_next_team(const FlashTeams *teams, size_t n);

/* Floats of scratch for all threads, however many there are; the part of it for block i of the thread that asks. */
size_t flash_team_scratch(size_t heads, size_t rows, int head_size);
float *flash_own_scratch(float *scratch, const FlashTeams *teams, int head_size, int i);

/* Heads that lie somewhere in larger rows, as in a packed projection (B,T,3C), which is then read in place:
 * query (b,h,t) is the HS numbers at q + b * q_batch + h * q_head + t * q_token, and likewise the rest. */
typedef struct {
    const float *q, *k, *v; /* the first number of (0, 0, 0) */
    float *out, *lse;       /* lse (B,NH,T); NULL: not wanted */
    /* From one batch entry, head, token to the next, in floats. */
    size_t q_batch, q_head, q_token;
    size_t k_batch, k_head, k_token; /* of k and of v */
    size_t out_batch, out_head, out_token;
} FlashView;

/* The view of contiguous q, out (B,NH,T,HS), k and v (B,NKV,TK,HS). */
FlashView flash_view(const float *q, const float *k, const float *v, float *out, float *lse,
                     const AttentionShape *s);

/* The view of one packed projection qkv: a row for each token, its queries, then its keys, then its values, NH heads of HS each;
 * context (B,T,NH*HS) is out. Rows of qkv are flash_packed_step(s) numbers apart, a line of the cache more than they have: without
 * it the keys of a tile lie in few places of the first cache (a quarter with rows of 3 * 768), and drive each other out. */
FlashView flash_packed_view(const float *qkv, float *context, float *lse, const AttentionShape *s);
size_t flash_packed_step(const AttentionShape *s);

/* flash_begin() with the rows of block i of team n, whose heads are counted over all batch entries; false if there is no such
 * block. scratch is that of all threads. */
bool flash_begin_in_view(FlashBlock *block, const FlashView *view, float *scratch, const AttentionShape *s,
                         const FlashTeams *teams, size_t n, int i);

/* The whole of attention over such views, in parallel; scratch: flash_view_scratch(s) floats. NKV = NH. */
void flash_attention(const FlashView *view, float *scratch, const AttentionShape *s);
size_t flash_view_scratch(const AttentionShape *s);

/* The same for contiguous q (B,NH,T,HS), k and v (B,NH,TK,HS), out (B,NH,T,HS), lse (B,NH,T). out may be q. */
void attention_simd(float *out, float *lse, float *scratch, const float *q, const float *k, const float *v,
                    const AttentionShape *s);

#endif
