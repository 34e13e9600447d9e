# The tricks of the fast kernel, and what takes each of them away: make ladder (common/ladder.sh) reads this.
#
#   trick NAME 'WHAT STANDS IN ITS PLACE' 'WHY IT IS THERE' [causal]     causal: it does nothing elsewhere
#                                  NAME is a folder of build/ladder: not rows, quick, new or backward, which it has already
#   edit FILE 'TEXT' 'ANOTHER'     of the trick before it; the text is in one place of the file, within a line
#
# What is left has to be right in the cases that make ladder times, which have no bias, and need not be in others.

trick registers 'the product is called, not inlined: its sums go through memory' \
    'a sum in a register is neither loaded nor stored'
edit vectors.h 'INLINE void multiply_add_ahead(' 'static __attribute__((noinline)) void multiply_add_ahead('

trick exp2 '`exp2f`, one weight after the other' \
    'a few instructions give 2^x of a whole vector'
edit flash_tiled_simd.c 'found[j] += *at = exp2_vector(*at);' '{
                for (int lane = 0; lane < LANES; lane++)
                    (*at)[lane] = exp2f((*at)[lane]);
                found[j] += *at;
            }'

trick table '2^x is a polynomial with seven terms' \
    'where 32 powers fit into two registers (AVX-512), three terms do'
edit vectors.h 'const float shift = 393216.0f;' 'const float shift = 393216.0f;
    static const float seven[] = {1.534581201e-4f, 1.339993122e-3f, 9.618488957e-3f, 5.550328777e-2f,
                                  2.402264689e-1f, 6.931472057e-1f, 1.0f};
    Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), q = (Vector){0} + seven[0];
    UNROLL for (int i = 1; i < 7; i++) q = q * (x - whole) + seven[i];
    if (true)
        return (Vector)_mm512_scalef_ps((__m512)q, (__m512)whole);'

trick pass '2^x takes a pass of its own over the tile, behind the scores' \
    'beside a product it fills places that multiply-adds leave free'
edit flash_tiled_simd.c 'found[j] += *at = exp2_vector(*at);' ';'
edit flash_tiled_simd.c 'if (is_odd(block, sum, key, keys, from, vectors))' 'for (int i = 0; i < keys; i++)
        UNROLL for (int j = 0; j < vectors; j++)
        {
            Vector *at = (Vector *)(p + i * FLASH_ROWS) + from + j;
            *at = exp2_vector(*at);
            sum[j] += *at;
        }
    if (is_odd(block, sum, key, keys, from, vectors))'

trick triangle 'tiles above the diagonal are scored and then masked' \
    'what no row sees is left out' causal
edit flash_view.c 'keys = seeing_vectors(block, key, keys, &from, &to);' '(void)seeing_vectors;'
edit flash_view.c 'left->end = end;' 'left->end = block->s->key_tokens;'

trick sums 'the sums of 2 keys at a time' \
    'with more (AVX-512: 8) no multiply-add waits for the one before it, and a vector that is loaded is used for each of them'
edit vectors.h 'VECTORS = 3,' '
#define TILE 2
    VECTORS = 3,'

trick copies 'keys and values are copied before they are used' \
    'lanes are queries, so keys and values are broadcast number by number from where they lie'
edit flash_tiled_simd.c 'const float *k[TILE];' 'float copy[TILE * HS];
        const float *k[TILE];'
edit flash_tiled_simd.c 'k[i] = block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step + d;' \
    'k[i] = d + (float *)memcpy(copy + i * HS, block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step, HS * sizeof *copy);'
edit flash_tiled_simd.c 'enum { HEADROOM' 'static _Thread_local float copies[FLASH_KEYS * 256];
enum { HEADROOM'
edit flash_tiled_simd.c 'flash_look_ahead(block);' 'for (int i = 0; d == 0 && i < keys; i++)
        memcpy(copies + i * block->key_step, block->v + (size_t)(key + i) * block->key_step, block->key_step * sizeof *copies);
    flash_look_ahead(block);'
edit flash_tiled_simd.c '*first = block->v + (size_t)key * block->key_step + d;' '*first = copies + d;'

trick keys '16 keys a tile' \
    'with 128 the output is loaded and stored an eighth as often'
edit flash_tiled_simd.h 'FLASH_KEYS = 128,' 'FLASH_KEYS = 16,'

trick vectors 'blocks of one vector of queries' \
    'with three, a number that is broadcast is used three times'
edit vectors.h 'VECTORS = 3,' 'VECTORS = 1,'

trick maximum 'm follows the largest score in each tile, and what it rose by is taken off the scores' \
    'softmax needs no maximum but a number near it'
edit flash_tiled_simd.c 'HEADROOM = 13' 'HEADROOM = 0'
edit flash_tiled_simd.c 'Vector sum[VECTORS], top[VECTORS];' 'Vector sum[VECTORS] = {0}, top[VECTORS], rise[VECTORS], *m = (Vector *)block->m + from;
    score_tile(block, p, top, key, keys, ask, false, from, vectors);
    for (int j = 0; j < vectors; j++)
        rise[j] = -m[j];
    flash_raise_maximum(block, top, from, vectors);
    for (int j = 0; j < vectors; j++)
        rise[j] += m[j];
    for (int i = 0; i < keys; i++)
        UNROLL for (int j = 0; j < vectors; j++)
        {
            Vector *at = (Vector *)(p + i * FLASH_ROWS) + from + j;
            *at = exp2_vector(*at - rise[j]);
            sum[j] += *at;
        }
    if (false)'
edit flash_tiled_simd.c 'if (is_odd(block, sum, key, keys, from, vectors))' 'if (false)'

trick exponent 'scale, log2 e and m come in behind the product' \
    'the product is the exponent already'
edit flash_tiled_simd.c 's->scale * log2e * load_first' 'load_first'
edit flash_tiled_simd.c 'd ? (Vector){0} : -m[j];' '(Vector){0};'
edit flash_tiled_simd.c 'if (weigh)' '*at = block->s->scale * log2e * *at - m[j];
            if (weigh)'

trick prefetch 'no tile is fetched ahead' \
    'while one tile is multiplied, memory is asked for the next, a few rows at a time'
edit flash_tiled_simd.c 'keys, LANES == 16, next,' 'keys, false, next,'
edit flash_tiled_simd.c 'LANES < 16 && block->leads' 'false'

trick team 'each block of queries walks along the keys alone' \
    'a tile that comes from far away serves four blocks'
edit flash_tiled_simd.h 'FLASH_TEAM = 4,' 'FLASH_TEAM = 1,'

trick diagonal 'along the diagonal whole blocks are scored and then masked' \
    'single vectors of queries that see none of the keys are left out' causal
edit flash_view.c 'keys = seeing_vectors(block, key, keys, &from, &to);' '(void)seeing_vectors;'

trick transpose 'queries and output are turned number by number' \
    'squares of vectors are turned in registers'
edit vectors.h 'UNROLL for (int round = 1; round < LANES; round *= 2)' 'for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            float x = row[i][j];
            row[i][j] = row[j][i];
            row[j][i] = x;
        }
    for (int round = LANES; round < LANES; round *= 2)'
