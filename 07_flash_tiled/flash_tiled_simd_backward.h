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
    FLASH_BACK_ROWS = 48,               /* queries and */
    FLASH_BACK_KEYS = 4 * VECTORS * 16, /* keys of a tile: 192 */
    FLASH_BACK_SHARES = 32,             /* with fewer key/value heads (B * NKV), their keys are shared out */
    FLASH_BACK_LISTS = 64,              /* how many lists of work there are at most */
};

/* What a caller knows of the mask beyond attends(): chapter 9's block lists. NULL: nothing. */
typedef struct {
    const void *lists;
    /* The first query at or after t that has to meet some key of key <= .. < end; T if there is none. */
    int (*next_query)(const void *lists, const AttentionShape *s, int b, int h, int t, int key, int end);
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

/*   delta     (B,NH,T)                      written: rowsum(dout * out)
 *   partial   flash_backward_partials(s)    what tasks that share a head add to dq: some times (B,NH,T,HS)
 *   scratch   flash_backward_scratch(s)     64-byte aligned */
void flash_attention_backward(const FlashBackward *g, float *delta, float *partial, float *scratch,
                              const AttentionShape *s);
size_t flash_backward_partials(const AttentionShape *s);
size_t flash_backward_scratch(const AttentionShape *s);

/* The same for contiguous tensors. */
void attention_simd_backward(const AttentionBackward *g, float *delta, float *partial, float *scratch,
                             const AttentionShape *s);

#endif
