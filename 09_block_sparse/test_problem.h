/* What the chapter's tests share: a problem, its lists, the kernels on it, and the same sums in double. */
#ifndef TEST_PROBLEM_H
#define TEST_PROBLEM_H

#include "block_sparse.h"
#include "chapter.h"

extern const Chapter chapter;

/* ---- Shapes and their lists ---- */

/* One batch entry, one head. drop_shape() frees the document numbers, if any. */
AttentionShape shape_of(const char *mask, int tokens, int key_tokens, int block);
void drop_shape(AttentionShape *s);

/* From the predicate, or from the closed form where it is NULL. To be freed: its listed. */
BlockMask lists_of(const AttentionShape *s, MaskPredicate *predicate, bool by_batch, bool by_head);
BlockKind kind_at(const BlockMask *mask, int b, int h, int i, int j);

/* How many pairs of a rectangle may attend, and what that makes of it. */
long allowed(const AttentionShape *s, MaskPredicate *predicate, int b, int h, int q, int q_end, int kv,
             int kv_end);
BlockKind kind_of_count(long pairs, long all);

/* Every block against a count of its pairs; lists ascending, of nothing but partial and full blocks. */
void expect_right_lists(const BlockMask *mask, MaskPredicate *predicate, const AttentionShape *s,
                        const char *name);

enum { MASKS = 17, BLOCKS = 13 };
extern const char *const masks[MASKS];
extern const int block_sizes[BLOCKS];

/* A window that is wider in each head and starts later in each batch entry, but key 0 is always seen. */
bool window_by_head(const AttentionShape *s, int b, int h, int q, int kv);
/* Every other key, from the odd queries only. */
bool checkers(const AttentionShape *s, int b, int h, int q, int kv);

/* ---- A problem, and the kernels on it ---- */

/* The last two are of the .cu files, and run on the CPU stand-in for a GPU's threads. */
enum { DENSE, SPARSE, SIMD, DENSE_SIMT, SPARSE_SIMT, KERNELS };
extern const char *const names[KERNELS];
int kernels_here(void); /* KERNELS, or fewer where there is no compiler for the stand-in */

typedef struct {
    AttentionShape s;
    float *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv, *dbias; /* dbias: room for (1,1,T,TK) */
} Inputs;

/* Everything but the outputs and gradients drawn. Takes s's document numbers over; tear_down() frees all. */
Inputs set_up(AttentionShape s, int batch, int heads, int head_size);
Inputs set_up_grouped(AttentionShape s, int batch, int heads, int kv_heads, int head_size);
void tear_down(Inputs *p);

/* mask: its lists, which only SPARSE and SIMD can be given; for the book's own masks NULL. */
void attend(const Inputs *p, int kernel, const BlockMask *mask);
/* Forward and backward. */
void differentiate(const Inputs *p, int kernel, const BlockMask *mask);

/* The largest difference of out and lse, or of dq, dk, dv and dbias, from those over the allowed pairs, each asked for,
 * in double. */
double error_against(const Inputs *p, MaskPredicate *predicate);
double gradient_error(const Inputs *p, MaskPredicate *predicate);

/* dq, dk and dv behind one another, to be freed. */
float *gradients_of(const Inputs *p);

#endif
