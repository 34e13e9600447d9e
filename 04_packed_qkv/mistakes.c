#include "mistakes.h"

AttentionShape folded_batch(const AttentionShape *s)
{
    AttentionShape wrong = *s;
    wrong.batch = 1;
    wrong.tokens = wrong.key_tokens = s->batch * s->tokens;
    return wrong;
}

AttentionShape third_of_a_head(const AttentionShape *s)
{
    AttentionShape wrong = *s;
    wrong.head_size = s->head_size / 3;
    wrong.tokens = wrong.key_tokens = 3 * s->tokens;
    return wrong;
}

AttentionShape without_transpose(const AttentionShape *s)
{
    AttentionShape wrong = *s;
    wrong.batch = s->batch * s->heads;
    wrong.heads = wrong.kv_heads = 1;
    return wrong;
}
