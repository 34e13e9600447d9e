/* One attention problem: its sizes, its scale, and which query may attend to which key.
 *
 * Letters, everywhere in the book: B batch, T tokens (queries), TK key tokens, C embedding width, NH heads,
 * NKV key/value heads, HS head size, group = NH / NKV. Every tensor is row-major, its last axis contiguous:
 *   q, out (B,NH,T,HS)    k, v (B,NKV,TK,HS)    lse (B,NH,T)    weights, bias (B,NH,T,TK)    x (B,T,C)
 */
#ifndef COMMON_SHAPE_H
#define COMMON_SHAPE_H

#include "host_device.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct RandomStream RandomStream;

/* Which keys a query sees. Masks with T != TK are aligned bottom-right, as in FlashAttention 2: query q
 * stands at place p = q + TK - T among the keys. A mask with p < 0 for some rows leaves those rows nothing to
 * attend to. */
typedef enum {
    MASK_NONE,
    MASK_CAUSAL,       /* kv <= p */
    MASK_WINDOW,       /* 0 <= p - kv < W */
    MASK_PREFIX,       /* kv < P or kv <= p */
    MASK_LOCAL_GLOBAL, /* |p - kv| < W or kv < G or p < G */
    MASK_DILATED,      /* 0 <= p - kv < W*D and (p - kv) % D == 0 */
    MASK_DOCUMENTS,    /* the same document and kv <= p */
    MASK_FUTURE, /* kv > p: what the notebook's sixth implementation really computes; no option names it */
} MaskKind;

typedef struct {
    MaskKind kind;
    int width; /* W or P */
    int extra; /* G or D */
    const int
        *document; /* MASK_DOCUMENTS: (TK), the number of the document each position belongs to, ascending */
} Mask;

typedef struct AttentionShape {
    int batch, tokens, key_tokens;
    int heads, kv_heads, head_size;
    int embed,
        embed_out; /* modules: the width of x, and of all heads together (heads * head_size); cores: 0 */
    float scale;   /* score = scale * q.k + bias */
    Mask mask;
    bool causal;           /* --causal, on top of the mask: what all of them allow */
    const int *lengths;    /* (B): the valid keys of each batch entry; NULL: all of them */
    const float *bias;     /* added to the scaled score, -inf forbids; NULL: none */
    size_t bias_stride[4]; /* of its axes B, NH, T, TK; 0 where it is broadcast */
    float dropout;         /* 0 <= p < 1 */
    RandomStream
        *dropout_stream;   /* kernels that materialise the weights draw from it, as PyTorch does on a CPU */
    uint64_t dropout_seed; /* tiled kernels draw by position from this seed: see dropout_keeps() */
    int tile_rows, tile_columns; /* Br, Bc of the plain tiled kernels */
    int block;                   /* the block mask's block */
} AttentionShape;

/* One past the last key that row t of batch entry b can see: what a loop over the keys need not pass.
 * Causality and padding are in it; attends() has the last word on each pair below it. */
HOST_DEVICE static inline int keys_end(const AttentionShape *s, int b, int t)
{
    int end = s->lengths ? s->lengths[b] : s->key_tokens;
    int place = t + s->key_tokens - s->tokens;
    MaskKind kind = s->mask.kind;
    int limit = place + 1;
    if (kind == MASK_PREFIX && limit < s->mask.width && !s->causal)
        limit = s->mask.width;
    bool limited = s->causal || kind == MASK_CAUSAL || kind == MASK_WINDOW || kind == MASK_DILATED ||
                   kind == MASK_DOCUMENTS || kind == MASK_PREFIX;
    if (limited && limit < end)
        end = limit;
    return end < 0 ? 0 : end;
}

/* May query t of batch entry b and head h attend to key t2? Everything but a bias of -inf. */
HOST_DEVICE static inline bool attends(const AttentionShape *s, int b, int h, int t, int t2)
{
    (void)h; /* no built-in mask looks at the head */
    int place = t + s->key_tokens - s->tokens;
    int distance = place - t2;
    const Mask *mask = &s->mask;
    if (s->lengths && t2 >= s->lengths[b])
        return false;
    if (s->causal && distance < 0)
        return false;
    switch (mask->kind) {
    case MASK_NONE: return true;
    case MASK_CAUSAL: return distance >= 0;
    case MASK_WINDOW: return distance >= 0 && distance < mask->width;
    case MASK_PREFIX: return t2 < mask->width || distance >= 0;
    case MASK_LOCAL_GLOBAL:
        return (distance < mask->width && -distance < mask->width) || t2 < mask->extra || place < mask->extra;
    case MASK_DILATED:
        return distance >= 0 && distance / mask->extra < mask->width && distance % mask->extra == 0;
    case MASK_DOCUMENTS: return distance >= 0 && mask->document[place] == mask->document[t2];
    case MASK_FUTURE: return distance < 0;
    }
    return false;
}

/* True where no pair is forbidden by mask, causality or padding: a kernel may then skip asking. */
HOST_DEVICE static inline bool attends_to_all(const AttentionShape *s)
{
    return s->mask.kind == MASK_NONE && !s->causal && !s->lengths;
}

/* Query (b,h,t)'s row of a bias that is there: key t2's number lies t2 * bias_stride[3] further on. */
HOST_DEVICE static inline const float *bias_row(const AttentionShape *s, int b, int h, int t)
{
    return s->bias + b * s->bias_stride[0] + h * s->bias_stride[1] + t * s->bias_stride[2];
}

HOST_DEVICE static inline float bias_at(const AttentionShape *s, int b, int h, int t, int t2)
{
    return s->bias ? bias_row(s, b, h, t)[t2 * s->bias_stride[3]] : 0.0f;
}

/* How the bias was broadcast: along each axis it holds `own` numbers, each shared by `shared` pairs; `elements` in all. */
typedef struct {
    int own[4], shared[4];
    size_t elements;
} Broadcast;

static inline Broadcast broadcast_of(const AttentionShape *s)
{
    const int size[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    Broadcast axes;
    axes.elements = 1;
    for (int i = 0; i < 4; i++) {
        axes.own[i] = s->bias_stride[i] ? size[i] : 1;
        axes.shared[i] = s->bias_stride[i] ? 1 : size[i];
        axes.elements *= axes.own[i];
    }
    return axes;
}

/* Where a row of HS numbers starts: query (b, h, t) in q or out; key (b, h, t2) in k or v, h counted over the
 * query's heads: a group of NH / NKV query heads shares one key/value head. */
HOST_DEVICE static inline size_t query_row(const AttentionShape *s, int b, int h, int t)
{
    return (((size_t)b * s->heads + h) * s->tokens + t) * s->head_size;
}

HOST_DEVICE static inline size_t key_row(const AttentionShape *s, int b, int h, int t2)
{
    int kv_head = h / (s->heads / s->kv_heads);
    return (((size_t)b * s->kv_heads + kv_head) * s->key_tokens + t2) * s->head_size;
}

/* The row's place in lse (B,NH,T); times TK, in weights (B,NH,T,TK). */
HOST_DEVICE static inline size_t lse_index(const AttentionShape *s, int b, int h, int t)
{
    return ((size_t)b * s->heads + h) * s->tokens + t;
}

/* Counts of elements. validate_shape() has made sure that none of them overflows. */
HOST_DEVICE static inline size_t query_count(const AttentionShape *s)
{
    return query_row(s, s->batch, 0, 0);
}
HOST_DEVICE static inline size_t key_count(const AttentionShape *s)
{
    return (size_t)s->batch * s->kv_heads * s->key_tokens * s->head_size;
}
HOST_DEVICE static inline size_t lse_count(const AttentionShape *s)
{
    return (size_t)s->batch * s->heads * s->tokens;
}
HOST_DEVICE static inline size_t weights_count(const AttentionShape *s)
{
    return lse_count(s) * s->key_tokens;
}

/* NULL if the sizes make sense, else what is wrong, ready to stand behind "error: " (a static buffer). Every
 * size is at least 1, heads are a multiple of kv_heads, and no count of elements nears SIZE_MAX. */
const char *validate_shape(const AttentionShape *s);

/* Reads "causal", "window:W", "prefix:P", "local-global:W:G", "dilated:W:D" or "documents:L1,L2,..". Returns
 * NULL, or what is wrong (a static buffer). For documents, *document is set to a malloc'ed array of
 * *document_tokens numbers (the lengths' sum), which the caller frees; else it is set to NULL. */
const char *parse_mask(Mask *mask, const char *text, int **document, int *document_tokens);

/* The mask as parse_mask reads it, for titles and TSV rows: "none", "causal", "window:256+lengths", ... */
void mask_text(char *text, size_t size, const AttentionShape *s);

/* How many (query, key) pairs the masks allow over all batch entries and heads (bias not looked at). */
double count_pairs(const AttentionShape *s);

#endif
