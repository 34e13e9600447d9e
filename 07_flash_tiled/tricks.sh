# The tricks of the fast kernel, and what takes each of them away: make ladder (common/ladder.sh) reads this.
#
#   trick NAME 'WHAT IS TAKEN AWAY' 'WHY IT WAS THERE' [causal]     causal: worth nothing elsewhere
#   edit FILE 'TEXT' 'WHAT STANDS THERE THEN'                       of the trick before it; TEXT is in one place of FILE, in a line
#
# The copies have to be right in the cases that are timed, no more: some know no bias.

trick exp2 '`exp2f`, one weight after the other' \
    'A polynomial gives 2^x for a whole vector'
edit flash_tiled_simd.c '*at = exp2_vector(*at);' 'for (int lane = 0; lane < LANES; lane++)
                (*at)[lane] = exp2f((*at)[lane]);'

trick triangle 'The tiles above the diagonal are scored and masked' \
    'What no row sees is left out' causal
edit flash_view.c 'keys = seeing_vectors(block, key, keys, &from, &to);' '(void)seeing_vectors;'
edit flash_view.c 'flash_attend(block, all_end, end, true);' 'flash_attend(block, all_end, block->s->key_tokens, true);'

trick registers 'How many vectors there are is a variable: the sums lie in memory' \
    'Where it is a constant, each sum is a register'
edit flash_tiled_simd.c 'switch (2 * vectors + ask) {' 'attend_tile(block, key, keys, ask, from, vectors);
    switch (0) {'
edit vectors.h 'UNROLL for (int j = 0; j < VECTORS; j++) if (j < (vectors))' 'for (int j = 0; j < (vectors); j++)'

trick sums '2 x 3 sums at a time' \
    'With 8 x 3 no multiply-add waits for the one before it, and a vector that is loaded is used 8 times'
edit vectors.h 'VECTORS = 3,' '
#define TILE 2
    VECTORS = 3,'

trick vectors '8 x 1 sums, and blocks of 16 queries' \
    'A number of a key or value that is broadcast is used 3 times'
edit vectors.h 'VECTORS = 3,' 'VECTORS = 1,'

trick maximum 'The maximum is followed at once, and what m rose by is taken off the scores' \
    'Softmax needs no maximum but a number near it'
edit flash_tiled_simd.c 'headroom = 20;' 'headroom = 0;'
edit flash_tiled_simd.c 'if (raise_maximum(block, top, from, vectors))' 'Vector *m = (Vector *)block->m + from, rise[VECTORS];
    for (int j = 0; j < vectors; j++)
        rise[j] = -m[j];
    raise_maximum(block, top, from, vectors);
    for (int j = 0; j < vectors; j++)
        rise[j] += m[j];
    for (int i = 0; i < keys; i++)
        for (int j = 0; j < vectors; j++)
            ((Vector *)(p + i * FLASH_ROWS))[from + j] -= rise[j];
    if (false)'

trick keys '16 keys a tile' \
    'With 128 the output is loaded and stored an eighth as often'
edit flash_tiled_simd.h 'FLASH_KEYS = 128,' 'FLASH_KEYS = 16,'

trick copies 'Each tile of keys and values is copied first' \
    'Lanes are queries, so numbers of keys and values are broadcast from where they lie'
edit flash_tiled_simd.c 'const float *k[TILE];' 'float copy[TILE * HS];
        const float *k[TILE];'
edit flash_tiled_simd.c 'k[i] = block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step;' \
    'k[i] = memcpy(copy + i * HS, block->k + (size_t)(key + smaller(i0 + i, keys - 1)) * block->key_step, HS * sizeof *copy);'
edit flash_tiled_simd.c 'for (int d = 0; d < HS; d += TILE) {' 'float copy[FLASH_KEYS * HS];
    for (int i = 0; i < keys; i++)
        memcpy(copy + i * HS, block->v + (size_t)(key + i) * block->key_step, HS * sizeof *copy);
    for (int d = 0; d < HS; d += TILE) {'
edit flash_tiled_simd.c 'v[i] = block->v + (size_t)key * block->key_step + ' 'v[i] = copy + '
edit flash_tiled_simd.c 'multiply_add(c, vectors, v, block->key_step, ' 'multiply_add(c, vectors, v, HS, '

trick exponent 'scale, log2 e and m wait until the product is there' \
    'The product is the exponent already'
edit flash_tiled_simd.c 's->scale * log2e * load_first' 'load_first'
edit flash_tiled_simd.c 'd ? (Vector){0} : -m[j];' '(Vector){0};'
edit flash_tiled_simd.c 'top[j] = vector_max(scores[i * VECTORS + j], top[j]);' '{
            Vector *at = scores + i * VECTORS + j;
            *at = block->s->scale * log2e * *at - m[j];
            top[j] = vector_max(*at, top[j]);
        }'

trick prefetch 'Memory rests during 2^x' \
    'It is asked for the next tile of keys and values'
edit flash_tiled_simd.c '__builtin_prefetch(block->k + next + d, 0, 2);' '(void)next;'
edit flash_tiled_simd.c '__builtin_prefetch(block->v + next + d, 0, 2);' ''

trick diagonal 'Along the diagonal whole tiles are scored and masked' \
    'Single vectors of queries that see nothing are left out' causal
edit flash_view.c 'keys = seeing_vectors(block, key, keys, &from, &to);' '(void)seeing_vectors;'

trick transpose 'Queries and output are turned number by number' \
    'A square of vectors is turned in registers'
edit vectors.h 'UNROLL for (int round = 1; round < LANES; round *= 2)' 'for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            float x = row[i][j];
            row[i][j] = row[j][i];
            row[j][i] = x;
        }
    for (int round = LANES; round < LANES; round *= 2)'
