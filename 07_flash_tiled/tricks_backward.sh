# The tricks of the fast backward pass, and what takes each of them away. tricks.sh tells how to read this.

trick registers 'the product is called, not inlined: its sums go through memory' \
    'a sum in a register is neither loaded nor stored'
edit vectors.h 'INLINE void multiply_add(' 'static __attribute__((noinline)) void multiply_add('

trick exp2 '`exp2f`, one weight after the other' \
    'a few instructions give 2^x of a whole vector'
edit flash_tiled_simd_backward.c 'w = exp2_vector(score), one = (Vector){0} + 1;' 'w, one = (Vector){0} + 1;
        for (int lane = 0; lane < LANES; lane++)
            w[lane] = exp2f(score[lane]);'

trick triangle 'all queries meet all keys, and what lies above the diagonal is masked' \
    'eight queries know which keys they see, and all products keep to these' causal
edit flash_view_backward.c 'kind == 0 ? 0 : smaller(span.end - x->key, x->keys)' 'x->keys'
edit flash_view_backward.c 'return span.first < x->key + x->keys && x->key < span.end;' 'return span.end >= 0;'
edit flash_view_backward.c 'int first = first_query(s, x->b, x->key, true), own' 'int first = 0, own'

trick keys '48 keys a block' \
    'with 288 the queries, and dq, come from memory a sixth as often'
edit flash_tiled_simd_backward.h 'FLASH_BACK_KEYS = 288,' 'FLASH_BACK_KEYS = 48,'

trick queries '24 queries at a time' \
    'with 120, dk and dv are loaded and stored a fifth as often'
edit flash_tiled_simd_backward.h 'FLASH_BACK_ROWS = 120,' 'FLASH_BACK_ROWS = 24,'

trick addresses "a tile's addresses are worked out before its loop" \
    'registers do not hold them all, and each comes back at the cost of a multiply-add'
edit vectors.h '__asm__("" : "+r"(address))' '(void)0'

trick clear 'dk and dv are set to 0 first' \
    'their first sums begin at 0 in registers, and nothing is read'
edit flash_view_backward.c 'int flash_back_key_blocks(const AttentionShape *s)' 'static void clear_unseen(const FlashBackBlock *x);
int flash_back_key_blocks(const AttentionShape *s)'
edit flash_view_backward.c 'memset(x->summed, 0, sizeof x->summed);' 'memset(x->summed, 0, sizeof x->summed);
    clear_unseen(x);
    memset(x->summed, 1, sizeof x->summed);'

trick bursts "all that memory is asked for, it is asked for with a row's first tile" \
    'a row or two with each tile hold nothing up'
edit flash_tiled_simd_backward.c 'for (int i = key / STEP; i < TILE; i += KEYS / STEP)' 'for (int i = 0; key == 0 && i < TILE; i++)'

trick ahead 'nothing is asked for ahead' \
    'the next queries and dq come from memory while these meet keys'
edit flash_tiled_simd_backward.c 'for (int i = key / STEP; i < TILE; i += KEYS / STEP)' 'for (int i = 0; false && i < TILE; i++)'
