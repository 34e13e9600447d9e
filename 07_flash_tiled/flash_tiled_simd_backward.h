/* The gradients of flash attention near the processor's multiply-add peak. Chapter 8 may call this too: a
 * key/value head may be read by several query heads.
 *
 * Takes all that the forward takes. A row with no key allowed gives zeros. A NaN that a row can see reaches
 * its gradients; one that it may not see may reach the gradients of its neighbours in a tile (0 * NaN is
 * NaN). Keys beyond the valid length are not read. The same bits for any number of threads. */
#ifndef FLASH_TILED_SIMD_BACKWARD_H
#define FLASH_TILED_SIMD_BACKWARD_H

#include "flash_tiled_backward.h"
#include "flash_tiled_simd.h"

enum {
    FLASH_BACK_ROWS = 120,                         /* queries and */
    FLASH_BACK_KEYS = 288,                         /* keys of a tile */
    FLASH_BACK_UNIT = LANES > TILE ? LANES : TILE, /* what TILE queries see begins at multiples of it */
    FLASH_BACK_STEP = VECTORS * LANES,             /* keys of a register tile of scores */
    FLASH_BACK_THREADS = 32,                       /* at most */
};

/* What a caller knows of the mask beyond attends(): chapter 9's block lists. NULL: nothing. */
typedef struct {
    const void *lists;
    /* The queries before t that have to meet some key of key <= .. < end reach up to this one, which does not; 0 if there are none. */
    int (*queries_end)(const void *lists, int b, int h, int t, int key, int end);
    /* Of the pairs t <= .. < t_end, key <= .. < end: 0 if none may attend, 1 if some may, 2 if all. */
    int (*how_many)(const AttentionShape *s, int b, int t, int t_end, int key, int end);
} FlashKnown;

/* view: q, k, v, out and lse as forward was given them and left them; lse must be there. */
typedef struct {
    FlashView view;
    const float *dout;   /* lies as out does */
    float *dq, *dk, *dv; /* written: dq lies as q does, dk and dv as k and v do */
    float *dbias;        /* written if s->bias is there: in its layout */
    FlashKnown known;
} FlashBackward;

/* Contiguous tensors: q, k, v, out and lse as flash_view() takes them; nothing known of the mask. */
FlashBackward flash_backward(const AttentionBackward *g, const AttentionShape *s);

/* A block of up to FLASH_BACK_KEYS keys of one key/value head, which the queries walk past. Its life:
 *
 *     FlashBackBlock x = {.g = .., .s = .., .b = .., .kv_head = ..};
 *     flash_back_begin(&x, scratch, number);
 *     for each head h that reads kv_head:
 *         for (int t = T; flash_back_before(&x, t); t = x.t)
 *             if (flash_back_weigh(&x)) {
 *                 flash_back_add_to_keys(&x);
 *                 flash_back_add_to_queries(&x);
 *             } */
typedef struct {
    int from, to; /* the keys that TILE queries see lie in from .. to - 1, counted from the block's first */
    int sure_from,
        sure_to; /* of these, whole register tiles that each query sees, with nothing added or dropped */
} FlashSight;
typedef struct {
    /* Filled in by the caller. */
    const FlashBackward *g;
    const AttentionShape *s;
    int b, kv_head;
    int h;     /* the queries' head; */
    float *dq; /* the gradient of query t */

    int key, keys;                              /* the keys key .. key + keys - 1 meet */
    int t, rows;                                /* the queries t .. t + rows - 1, */
    const float *from_q, *from_dout, *from_out; /* their rows of Q, dO and O, where the caller has them */

    /* Kept between the steps, in scratch. width is HS rounded up; what lies beyond a row's HS numbers, the last query or
     * the last key, is zero. ROWS is FLASH_BACK_ROWS, KEYS is FLASH_BACK_KEYS. */
    int width;
    int stride; /* from one row to the next, a vector more: rows 512 bytes apart share few places of the first cache */
    int part; /* numbers of a register tile of dQ, dK or dV: up to VECTORS vectors, a row cut as evenly as can be */
    float *k_columns, *v_columns; /* (width,KEYS): K^T, V^T */
    float *k_rows;                /* (KEYS,stride): K times scale and log2 e */
    float *q, *dout;              /* (ROWS,stride): Q times scale and log2 e, dO */
    float *weights;               /* (ROWS,KEYS): D */
    float *d_scores;              /* (ROWS,KEYS): dS over log2 e */
    float *kept;                  /* (ROWS,KEYS): dropout's factor, 0 or 1 / (1 - p) */
    float *lse, *delta; /* (ROWS): lse times log2 e, +inf for a row that saw nothing; rowsum(dout * out) */
    FlashSight sight[FLASH_BACK_ROWS / TILE];
    /* The queries that see any of TILE keys: seen_from .. seen_to - 1, multiples of TILE; none if seen_to is less. */
    int seen_from[FLASH_BACK_KEYS / TILE], seen_to[FLASH_BACK_KEYS / TILE];
    bool summed[FLASH_BACK_KEYS / TILE]; /* is anything in dk and dv of TILE keys yet? */
} FlashBackBlock;

/* How many floats of scratch a block needs; it must be 64-byte aligned, what is in it does not matter. */
size_t flash_back_block_floats(int head_size);

int flash_back_key_blocks(const AttentionShape *s);

/* Says which keys are in block number `number` of that many, and where in scratch all lies. */
void flash_back_lay_out(FlashBackBlock *x, float *scratch, int number);

/* Reads the keys and values of block number `number` of that many. */
void flash_back_begin(FlashBackBlock *x, float *scratch, int number);

/* The last queries before t that these keys have to meet; false if there are none. */
bool flash_back_before(FlashBackBlock *x, int t);

/* sight and seen of these queries; false if none sees any key. */
bool flash_back_look(FlashBackBlock *x);

/* Where these queries lie, their lse, and what flash_ask_row() says of each; rows from `rows` on see nothing. */
void flash_back_ask(FlashBackBlock *x);

/* Asks memory for what row r of the next queries has in Q, and row r of these in dq; or in dO and O. To be called with a row
 * or two at a time, between the products: many at once hold up what these need from the second cache. */
void flash_back_look_ahead(const FlashBackBlock *x, int r, bool is_q);

/* D and dS of these queries and keys, where the first see the second; false if none sees any. */
bool flash_back_weigh(FlashBackBlock *x);

/* Adds to dk and dv, and to dq, in memory, what follows from D and dS. */
void flash_back_add_to_keys(FlashBackBlock *x);
void flash_back_add_to_queries(const FlashBackBlock *x);

/* What waits in weights to be added to scores of the block's row r: its bias times log2 e, or -inf where it may not look; and
 * kept, if there is dropout. For the keys in its sight that are not sure, and those up to the next multiple of
 * FLASH_BACK_UNIT (flash_pairs.c). */
void flash_ask_row(const FlashBackBlock *x, int r);

/* The gradient of a bias (flash_bias_backward.c). Has each pair a number of its own? Then dS of these queries and keys is
 * written, and zeros for the queries from them to t - 1, which did not meet the keys; returns the first query that is written. */
bool flash_bias_is_of_pairs(const AttentionShape *s);
int flash_back_write_bias(const FlashBackBlock *x, int t);

/* If not, the first adds their dS to it. The second does job number `job` of flash_bias_jobs(s), which share no number of
 * the bias. */
void flash_back_add_bias(const FlashBackBlock *x);
void flash_bias_gradient(FlashBackBlock x, float *scratch, size_t job);
size_t flash_bias_jobs(const AttentionShape *s);

/* scratch: flash_backward_scratch(s) floats, 64-byte aligned. */
void flash_attention_backward(const FlashBackward *g, float *scratch, const AttentionShape *s);
size_t flash_backward_scratch(const AttentionShape *s);

/* The same for contiguous tensors. */
void attention_simd_backward(const AttentionBackward *g, float *scratch, const AttentionShape *s);

#endif
