#include "resolve.h"
#include "error.h"

#include <math.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

/* A size and who said so. Whoever speaks second must agree. */
typedef struct {
    int value; /* 0: nobody has spoken */
    char source[32];
} Size;

static void say(Size *size, size_t value, const char *source)
{
    if (value == 0)
        return;
    if (value > 1 << 30)
        die(EXIT_USAGE, "%s says %zu; sizes go up to %d", source, value, 1 << 30);
    if (size->value && size->value != (int)value)
        die(EXIT_USAGE, "%s says %zu, but %s says %d; leave one of them out or make them agree", source,
            value, size->source, size->value);
    if (!size->value)
        snprintf(size->source, sizeof size->source, "%s", source);
    size->value = (int)value;
}

/* Only where nobody has spoken. */
static void otherwise(Size *size, int value, const char *source)
{
    if (!size->value)
        say(size, value, source);
}

typedef struct {
    Size batch, tokens, key_tokens, embed, embed_out, heads, kv_heads, head_size;
} Sizes;

static int quotient(const Size *whole, const Size *part)
{
    if (whole->value % part->value)
        die(EXIT_USAGE, "%s %d does not divide %s %d", part->source, part->value, whole->source,
            whole->value);
    return whole->value / part->value;
}

static void need_axes(const NpyArray *array, int axes, const char *option, const char *layout)
{
    char sizes[96];
    size_text(sizes, sizeof sizes, array->size, array->axes);
    if (array->axes != axes)
        die(EXIT_USAGE, "%s has shape %s; it takes %d axes, %s", option, sizes, axes, layout);
}

static void sizes_of_core(Sizes *z, const Options *o, const Defaults *defaults, int group)
{
    const struct {
        const NpyArray *array;
        const char *option, *layout;
    } files[3] = {
        {&o->q, "--q", "(B,NH,T,HS)"}, {&o->k, "--k", "(B,NKV,TK,HS)"}, {&o->v, "--v", "(B,NKV,TK,HS)"}};
    for (int i = 0; i < 3; i++) {
        if (!files[i].array->data)
            continue;
        const size_t *size = files[i].array->size;
        need_axes(files[i].array, 4, files[i].option, files[i].layout);
        say(&z->batch, size[0], files[i].option);
        say(i == 0 ? &z->heads : &z->kv_heads, size[1], files[i].option);
        say(i == 0 ? &z->tokens : &z->key_tokens, size[2], files[i].option);
        say(&z->head_size, size[3], files[i].option);
    }
    Size *width = z->embed_out.value ? &z->embed_out : &z->embed;
    if (width->value && z->head_size.value)
        say(&z->heads, quotient(width, &z->head_size), width->source);
    otherwise(&z->batch, defaults->batch, "the default");
    otherwise(&z->tokens, defaults->tokens, "the default");
    otherwise(&z->heads, defaults->heads, "--heads (by default)");
    if (width->value)
        say(&z->head_size, quotient(width, &z->heads), width->source);
    otherwise(&z->key_tokens, defaults->key_tokens ? defaults->key_tokens : z->tokens.value, "the default");
    otherwise(&z->head_size, defaults->head_size, "the default");
    int kv_heads = z->heads.value;
    if (group > 1) { /* the most that divide the heads and leave at least `group` heads to each */
        kv_heads = z->heads.value / group;
        while (kv_heads > 1 && z->heads.value % kv_heads)
            kv_heads--;
    }
    otherwise(&z->kv_heads, kv_heads > 0 ? kv_heads : 1, "--kv-heads (by default)");
    z->embed.value = z->embed_out.value = 0;
}

static void sizes_of_module(Sizes *z, const Options *o, const Defaults *defaults, int group)
{
    if (o->x.data) {
        if (o->x.axes != 2)
            need_axes(&o->x, 3, "--x", "(B,T,C), or 2 axes (T,C)");
        const size_t *size = o->x.size + o->x.axes - 2;
        say(&z->batch, o->x.axes == 3 ? o->x.size[0] : 1, "--x");
        say(&z->tokens, size[0], "--x");
        say(&z->embed, size[1], "--x");
    }
    otherwise(&z->batch, defaults->batch, "the default");
    otherwise(&z->tokens, defaults->tokens, "the default");
    z->key_tokens = z->tokens; /* find_reason() has a word on others */
    otherwise(&z->embed, defaults->embed, "the default");
    if (z->heads.value && z->head_size.value) {
        if (z->heads.value > (1 << 30) / z->head_size.value)
            die(EXIT_USAGE, "--heads %d times --head-size %d is more than %d", z->heads.value,
                z->head_size.value, 1 << 30);
        say(&z->embed_out, (size_t)z->heads.value * z->head_size.value, "--heads times --head-size");
    }
    if (defaults->embed_out)
        otherwise(&z->embed_out, defaults->embed_out, "--embed-out (by default)");
    otherwise(&z->embed_out, z->embed.value, z->embed.source);
    if (z->head_size.value)
        say(&z->heads, quotient(&z->embed_out, &z->head_size), "--embed-out over --head-size");
    otherwise(&z->heads, defaults->heads, "--heads (by default)");
    say(&z->head_size, quotient(&z->embed_out, &z->heads), "--embed-out over --heads");
    int kv_heads = z->heads.value / (group > 1 ? group : 1);
    while (kv_heads > 1 && z->heads.value % kv_heads)
        kv_heads--;
    otherwise(&z->kv_heads, kv_heads > 0 ? kv_heads : 1, "--kv-heads (by default)");
}

static int *parse_lengths(const char *text, int *count)
{
    int *lengths = malloc((strlen(text) / 2 + 2) * sizeof *lengths);
    if (!lengths)
        die(EXIT_UNAVAILABLE, "not enough memory for --lengths");
    *count = 0;
    for (const char *at = text;;) {
        char *end;
        long long length = strtoll(at, &end, 10);
        if (*at < '0' || *at > '9' || length > 1 << 30 || (*end && *end != ','))
            die(EXIT_USAGE,
                "--lengths takes whole numbers from 0, one for each batch entry, as 5,3,0; not \"%.60s\"",
                text);
        lengths[(*count)++] = (int)length;
        if (!*end)
            return lengths;
        at = end + 1;
    }
}

static void broadcast_bias(AttentionShape *s, const NpyArray *bias)
{
    char have[96], want[96];
    const size_t full[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    size_text(have, sizeof have, bias->size, bias->axes);
    size_text(want, sizeof want, full, 4);
    if (bias->axes < 2)
        die(EXIT_USAGE, "--bias has shape %s; it takes 2 to 4 axes that broadcast to %s", have, want);
    size_t stride = 1;
    for (int axis = 3, own = bias->axes - 1; axis >= 0; axis--, own--) {
        size_t size = own >= 0 ? bias->size[own] : 1;
        if (size != full[axis] && size != 1)
            die(EXIT_USAGE, "--bias of shape %s does not broadcast to %s", have, want);
        s->bias_stride[axis] = size == 1 ? 0 : stride;
        stride *= size;
    }
}

/* dout is shaped as out. */
static void match_dout(const AttentionShape *s, const NpyArray *dout, bool module)
{
    char have[96], want[96];
    const size_t core[4] = {s->batch, s->heads, s->tokens, s->head_size};
    const size_t whole[3] = {s->batch, s->tokens, s->embed_out};
    int axes = module ? 3 : 4;
    size_text(have, sizeof have, dout->size, dout->axes);
    size_text(want, sizeof want, module ? whole : core, axes);
    if (strcmp(have, want) != 0)
        die(EXIT_USAGE, "--dout has shape %s; out, and so dout, is %s", have, want);
}

/* Why this kernel cannot do what was asked, in words that follow "kernel NAME"; "" if it can. */
static void find_reason(Problem *p, const Kernel *kernel, const Options *o)
{
    const AttentionShape *s = &p->shape;
    const char *reason = NULL;
    bool module = kernel->takes == TAKES_X;
    if (module && (o->q.data || o->k.data || o->v.data))
        reason = "takes --x, not --q, --k or --v";
    else if (!module && o->x.data)
        reason = "takes --q, --k and --v, not --x";
    else if (module && o->key_tokens && o->key_tokens != s->tokens)
        reason = "attends to its own tokens: --key-tokens is --tokens";
    else if (o->pass != PASS_FORWARD && !kernel->backward)
        reason = "has the pass forward only";
    else if (kernel->bf16 && o->dtype == DTYPE_F32)
        reason = "takes --dtype bf16, not f32";
    else if (!kernel->bf16 && o->dtype == DTYPE_BF16)
        reason = "takes --dtype f32, not bf16";
    else if (s->kv_heads != s->heads && !kernel->grouped)
        reason = "takes as many --kv-heads as --heads";
    else if (module && (o->bias_path || o->has_scale))
        reason = "is a whole module: it takes no --bias and no --scale";
    else if (module && kernel->own_mask != OWN_MASK_OPTION && o->lengths)
        reason = "is a whole module: it takes no --lengths";
    else if (module && kernel->own_mask != OWN_MASK_OPTION && (o->causal || o->mask) &&
             !(kernel->own_mask == OWN_MASK_CAUSAL && (!o->mask || strcmp(o->mask, "causal") == 0)))
        reason = "has its module's own mask, and takes no --mask or --causal";
    else if (o->dropout > 0 && kernel->dropout == DROPOUT_NONE)
        reason = "takes no --dropout";
    else if (o->dropout > 0 && kernel->dropout != DROPOUT_POSITION && p->rng == STREAM_CUDA)
        reason = "draws --dropout from PyTorch's CPU stream: leave out --rng cuda";
    else if (o->tile_rows && !kernel->tiled)
        reason = "has no --tile to choose";
    else if (o->block && !kernel->blocked)
        reason = "has no --block to choose";
    if (!reason && kernel->refuses)
        reason = kernel->refuses(s);
    if (!reason && kernel->refuses_backward && o->pass != PASS_FORWARD)
        reason = kernel->refuses_backward(s);
    snprintf(p->reason, sizeof p->reason, "%s", reason ? reason : "");
}

void resolve_problem(Problem *p, const Chapter *chapter, const Kernel *kernel, const Options *o)
{
    static const Defaults book_module = {.batch = 8, .tokens = 1024, .embed = 768, .heads = 12};
    static const Defaults book_core = {.batch = 1, .tokens = 1024, .heads = 12, .head_size = 64};
    bool module = kernel->takes == TAKES_X;
    *p = (Problem){.rng = o->has_rng ? o->rng : STREAM_CPU, .seed = o->has_seed ? o->seed : 123};

    Sizes z = {0};
    say(&z.batch, o->batch, "--batch");
    say(&z.tokens, o->tokens, "--tokens");
    say(&z.key_tokens, o->key_tokens, "--key-tokens");
    say(&z.embed, o->embed, "--embed");
    say(&z.embed_out, o->embed_out, "--embed-out");
    say(&z.heads, o->heads, "--heads");
    say(&z.kv_heads, o->kv_heads, "--kv-heads");
    say(&z.head_size, o->head_size, "--head-size");

    int length_count = 0;
    if (o->lengths) {
        p->lengths = parse_lengths(o->lengths, &length_count);
        say(&z.batch, length_count, "the count of --lengths");
    }
    Mask mask = {0};
    if (o->mask) {
        int document_tokens;
        const char *wrong = parse_mask(&mask, o->mask, &p->document, &document_tokens);
        if (wrong)
            die(EXIT_USAGE, "%s", wrong);
        if (p->document) {
            say(&z.tokens, document_tokens, "--mask documents");
            say(&z.key_tokens, document_tokens, "--mask documents");
        }
    }

    /* Sizes not given come from the kernel's own defaults only where none was given at all. */
    bool any = o->x.data || o->q.data || o->k.data || o->v.data;
    for (const Size *size = &z.batch; size <= &z.head_size; size++)
        any = any || size->value;
    Defaults defaults = module ? book_module : book_core;
    if (kernel->defaults && !any) {
        defaults = *kernel->defaults;
        p->sentence = module && defaults.sentence;
        if (!o->has_rng)
            p->rng = defaults.rng;
        if (!o->has_seed && defaults.seed)
            p->seed = defaults.seed;
    } else if (kernel->defaults && kernel->defaults->heads == 1 && module)
        defaults.heads = 1; /* chapters 1 and 2 know one head only */
    (module ? sizes_of_module : sizes_of_core)(&z, o, &defaults, kernel->grouped ? chapter->group : 1);

    AttentionShape *s = &p->shape;
    *s = (AttentionShape){
        .batch = z.batch.value,
        .tokens = z.tokens.value,
        .key_tokens = z.key_tokens.value,
        .heads = z.heads.value,
        .kv_heads = z.kv_heads.value,
        .head_size = z.head_size.value,
        .embed = z.embed.value,
        .embed_out = z.embed_out.value,
        .mask = mask,
        .causal = o->causal,
        .lengths = p->lengths,
        .dropout = (float)o->dropout,
        .dropout_seed = p->seed,
        .tile_rows = o->tile_rows ? o->tile_rows : 64,
        .tile_columns = o->tile_columns ? o->tile_columns : 64,
        .block = o->block ? o->block : 128,
    };
    /* A bias still to be drawn, (1,NH,T,TK), is there already: what a kernel refuses and its workspace may depend on it. */
    static const float to_be_drawn;
    if (!module)
        s->bias = o->bias_randn ? &to_be_drawn : o->bias.data;
    if (!module && o->bias_randn) {
        s->bias_stride[1] = (size_t)s->tokens * s->key_tokens;
        s->bias_stride[2] = s->key_tokens;
        s->bias_stride[3] = 1;
    }
    s->scale = o->has_scale ? o->scale : kernel->unscaled ? 1.0f : (float)(1 / sqrt(s->head_size));
    find_reason(p, kernel, o);
    if (module && kernel->own_mask != OWN_MASK_OPTION)
        s->mask = (Mask){.kind = kernel->own_mask == OWN_MASK_CAUSAL   ? MASK_CAUSAL
                                 : kernel->own_mask == OWN_MASK_FUTURE ? MASK_FUTURE
                                                                       : MASK_NONE};
    if (module && kernel->own_mask == OWN_MASK_OPTION && !o->mask)
        s->mask.kind = MASK_CAUSAL;
    if (module && kernel->own_mask != OWN_MASK_OPTION)
        s->causal = false;
    const char *wrong = validate_shape(s);
    if (wrong)
        die(EXIT_USAGE, "%s", wrong);
    if (o->bias.data && !module)
        broadcast_bias(s, &o->bias);
    if (o->dout.data && !p->reason[0])
        match_dout(s, &o->dout, module);
}
