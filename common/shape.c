#include "shape.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LARGEST_SIZE = 1 << 24, LARGEST_PRODUCT = 1 << 30 };

/* How each mask is written: its name, then its numbers, each behind a colon. */
static const struct MaskForm {
    MaskKind kind;
    const char *name;
    int numbers; /* documents: a list of any length */
    const char *pattern;
} mask_forms[] = {
    {MASK_NONE, "none", 0, "none"},
    {MASK_CAUSAL, "causal", 0, "causal"},
    {MASK_WINDOW, "window", 1, "window:W"},
    {MASK_PREFIX, "prefix", 1, "prefix:P"},
    {MASK_LOCAL_GLOBAL, "local-global", 2, "local-global:W:G"},
    {MASK_DILATED, "dilated", 2, "dilated:W:D"},
    {MASK_DOCUMENTS, "documents", 0, "documents:L1,L2,.."},
};
enum { MASK_FORMS = sizeof mask_forms / sizeof mask_forms[0] };

static const char *complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
static const char *complain(const char *format, ...)
{
    static char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return message;
}

static const char *validate_sizes(const AttentionShape *s)
{
    bool module = s->embed || s->embed_out;
    /* With heads that do not divide the width, the head size is whatever the division left: say the cause. */
    if (module && s->embed_out >= 1 && s->heads >= 1 && s->embed_out % s->heads)
        return complain("--heads %d does not divide --embed%s %d", s->heads,
                        s->embed == s->embed_out ? "" : "-out", s->embed_out);
    const struct {
        const char *option;
        int size, smallest;
    } sizes[] = {
        {"--batch", s->batch, 1},
        {"--tokens", s->tokens, 1},
        {"--key-tokens", s->key_tokens, 1},
        {"--heads", s->heads, 1},
        {"--kv-heads", s->kv_heads, 1},
        {"--head-size", s->head_size, 1},
        {"--embed", s->embed, module},
        {"--embed-out", s->embed_out, module},
        {"--tile (rows)", s->tile_rows, 0}, /* 0: no kernel asked for it */
        {"--tile (columns)", s->tile_columns, 0},
        {"--block", s->block, 0},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].size < sizes[i].smallest || sizes[i].size > LARGEST_SIZE)
            return complain("%s is %d: it must be 1 to %d", sizes[i].option, sizes[i].size, LARGEST_SIZE);

    if (s->heads % s->kv_heads)
        return complain("--kv-heads %d does not divide --heads %d", s->kv_heads, s->heads);
    if (module && (int64_t)s->heads * s->head_size != s->embed_out)
        return complain("--heads %d times --head-size %d is %lld, not --embed%s %d", s->heads, s->head_size,
                        (long long)s->heads * s->head_size, s->embed == s->embed_out ? "" : "-out",
                        s->embed_out);
    if (module && s->tokens != s->key_tokens)
        return complain("--key-tokens %d is not --tokens %d: a module's keys are made from the same x",
                        s->key_tokens, s->tokens);

    /* Kernels count slabs (b, h) and the width of all heads in an int, and elements in a size_t. */
    if ((int64_t)s->batch * s->heads > LARGEST_PRODUCT)
        return complain("--batch %d times --heads %d is more than %d", s->batch, s->heads, LARGEST_PRODUCT);
    if ((int64_t)s->heads * s->head_size > LARGEST_PRODUCT)
        return complain("--heads %d times --head-size %d is more than %d", s->heads, s->head_size,
                        LARGEST_PRODUCT);
    /* A module's products run over all B*T rows at once, and a product's sizes are ints. */
    if (s->embed > 0 && (int64_t)s->batch * s->tokens > LARGEST_PRODUCT)
        return complain("--batch %d times --tokens %d is more than %d", s->batch, s->tokens, LARGEST_PRODUCT);
    double queries = (double)s->batch * s->heads * s->tokens;
    double largest = fmax(queries * s->head_size, queries * s->key_tokens);
    largest = fmax(largest, (double)s->batch * s->kv_heads * s->key_tokens * s->head_size);
    largest = fmax(largest, (double)s->batch * s->tokens * s->embed);
    if (largest > 0x1p60)
        return complain("these sizes make a tensor of %.1e numbers, more than any memory holds: "
                        "lower --batch, --heads or --tokens",
                        largest);
    return NULL;
}

static const char *validate_documents(const AttentionShape *s)
{
    const int *document = s->mask.document;
    if (!document)
        return complain("--mask documents: no lengths given, as in documents:L1,L2,..");
    if (s->tokens != s->key_tokens)
        return complain(
            "--mask documents: the lengths add up to %d, --tokens is %d: both and --key-tokens must be equal",
            s->key_tokens, s->tokens);
    for (int t = 1; t < s->key_tokens; t++)
        if (document[t] < document[t - 1])
            return complain("--mask documents: the documents are not in ascending order at token %d", t);
    return NULL;
}

const char *validate_shape(const AttentionShape *s)
{
    const char *wrong = validate_sizes(s);
    if (wrong)
        return wrong;
    if (!isfinite(s->scale))
        return complain("--scale is %g: it must be a finite number", s->scale);
    if (!(s->dropout >= 0 && s->dropout < 1))
        return complain("--dropout is %g: it must be at least 0 and below 1", s->dropout);
    for (int b = 0; s->lengths && b < s->batch; b++)
        if (s->lengths[b] < 0 || s->lengths[b] > s->key_tokens)
            return complain("--lengths holds %d: it must be 0 to %d, the number of key tokens", s->lengths[b],
                            s->key_tokens);
    if (s->mask.kind == MASK_DOCUMENTS)
        return validate_documents(s);
    if (s->mask.width < 0 || s->mask.extra < (s->mask.kind == MASK_DILATED))
        return complain("--mask: its numbers must be 1 or more, not %d and %d", s->mask.width, s->mask.extra);
    return NULL;
}

/* Reads a separator and a whole number of at least 1, digits only, and moves past them. Numbers beyond
 * LARGEST_SIZE count as that: no distance among the keys is as long. */
static bool read_number(const char **text, char separator, int *number)
{
    int64_t n = 0;
    const char *c = *text;
    if (*c++ != separator)
        return false;
    for (; *c >= '0' && *c <= '9'; c++) {
        n = n * 10 + (*c - '0');
        if (n > INT_MAX)
            return false;
    }
    *text = c;
    *number = n < LARGEST_SIZE ? (int)n : LARGEST_SIZE;
    return n >= 1;
}

/* What was given, for a message: its first characters, those that cannot be printed replaced. */
static const char *quote(const char *text)
{
    static char quoted[64];
    size_t length = strnlen(text, 41);
    snprintf(quoted, sizeof quoted, "'%.40s%s'", text, length > 40 ? ".." : "");
    for (char *c = quoted; *c; c++)
        if (*c < ' ' || *c > '~')
            *c = '?';
    return quoted;
}

static const char *parse_documents(Mask *mask, const char *text, const char *lengths, int **document,
                                   int *document_tokens)
{
    int64_t tokens = 0;
    int length = 0;
    const char *rest = lengths;
    for (char separator = ':'; *rest || separator == ':'; separator = ',') {
        if (!read_number(&rest, separator, &length))
            return complain(
                "--mask %s: documents:L1,L2,.. takes lengths of 1 or more with commas between them",
                quote(text));
        tokens += length;
        if (tokens > LARGEST_SIZE)
            return complain("--mask %s: the lengths may add up to %d at most", quote(text), LARGEST_SIZE);
    }
    int *numbers = malloc((size_t)tokens * sizeof *numbers);
    if (!numbers)
        return complain("--mask %s: not enough memory for %d tokens", quote(text), (int)tokens);
    int token = 0;
    rest = lengths;
    for (int number = 0; *rest; number++) {
        read_number(&rest, *rest, &length);
        for (int i = 0; i < length; i++)
            numbers[token++] = number;
    }
    *document = numbers;
    *document_tokens = token;
    *mask = (Mask){.kind = MASK_DOCUMENTS, .document = numbers};
    return NULL;
}

const char *parse_mask(Mask *mask, const char *text, int **document, int *document_tokens)
{
    *mask = (Mask){.kind = MASK_NONE};
    *document = NULL;
    *document_tokens = 0;
    size_t name_length = strcspn(text, ":");
    const struct MaskForm *form = NULL;
    for (int i = 0; i < MASK_FORMS; i++)
        if (strlen(mask_forms[i].name) == name_length && !memcmp(mask_forms[i].name, text, name_length))
            form = &mask_forms[i];
    if (!form)
        return complain(
            "--mask %s is not one of none, causal, window:W, prefix:P, local-global:W:G, dilated:W:D, "
            "documents:L1,L2,..",
            quote(text));

    const char *rest = text + name_length;
    if (form->kind == MASK_DOCUMENTS)
        return parse_documents(mask, text, rest, document, document_tokens);
    int number[2] = {0, 0};
    bool right = true;
    for (int i = 0; i < form->numbers && right; i++)
        right = read_number(&rest, ':', &number[i]);
    if (!right || *rest)
        return complain("--mask %s: it takes the form %s%s", quote(text), form->pattern,
                        form->numbers ? ", with whole numbers from 1 to 2147483647" : "");
    *mask = (Mask){.kind = form->kind, .width = number[0], .extra = number[1]};
    return NULL;
}

/* "documents:3,5,.." with as many lengths as leave room for what follows. */
static void documents_text(char *text, size_t size, const AttentionShape *s)
{
    size_t used = (size_t)snprintf(text, size, "documents");
    const int *document = s->mask.document;
    for (int start = 0, end; start < s->key_tokens; start = end) {
        for (end = start + 1; end < s->key_tokens && document[end] == document[start]; end++)
            ;
        char length[16];
        size_t digits = (size_t)snprintf(length, sizeof length, "%c%d", start ? ',' : ':', end - start);
        bool fits = used + digits + sizeof ",.." <= size;
        used += (size_t)snprintf(text + used, size - used, "%s", fits ? length : ",..");
        if (!fits)
            return;
    }
}

void mask_text(char *text, size_t size, const AttentionShape *s)
{
    const Mask *mask = &s->mask;
    bool one_causal = s->causal && (mask->kind == MASK_NONE || mask->kind == MASK_CAUSAL);
    const char *more = s->causal && !one_causal ? "+causal" : "";
    const char *padding = s->lengths ? "+lengths" : "";
    const char *name = mask->kind == MASK_FUTURE ? "future" : one_causal ? "causal" : "";
    int numbers = 0;
    for (int i = 0; i < MASK_FORMS && !*name; i++)
        if (mask_forms[i].kind == mask->kind) {
            name = mask_forms[i].name;
            numbers = mask_forms[i].numbers;
        }
    char body[64];
    if (mask->kind == MASK_DOCUMENTS)
        documents_text(body, sizeof body - sizeof "+causal+lengths", s);
    else if (numbers == 0)
        snprintf(body, sizeof body, "%s", name);
    else if (numbers == 1)
        snprintf(body, sizeof body, "%s:%d", name, mask->width);
    else
        snprintf(body, sizeof body, "%s:%d:%d", name, mask->width, mask->extra);
    snprintf(text, size, "%s%s%s", body, more, padding);
}

static int64_t between(int64_t low, int64_t value, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* How many of the keys 0..end-1 the mask allows a query at this place; document_start is where its document
 * begins. */
static int64_t keys_allowed(const Mask *mask, int64_t place, int64_t end, int64_t document_start)
{
    int64_t width = mask->width, extra = mask->extra;
    int64_t passed = between(0, place + 1, end); /* the keys up to and with the query's own place */
    switch (mask->kind) {
    case MASK_NONE: return end;
    case MASK_CAUSAL: return passed;
    case MASK_WINDOW: return passed - between(0, place + 1 - width, end);
    case MASK_PREFIX: return between(0, width, end) > passed ? between(0, width, end) : passed;
    case MASK_LOCAL_GLOBAL: {
        if (place < extra)
            return end;
        int64_t global = between(0, extra, end);
        int64_t near = between(global, place + 1 - width, end), far = between(global, place + width, end);
        return global + (far > near ? far - near : 0);
    }
    case MASK_DILATED: { /* steps of D back from the place, the first that reaches below end to the last */
        if (place < 0)
            return 0;
        int64_t first = place < end ? 0 : (place - end) / extra + 1;
        int64_t last = place / extra < width ? place / extra : width - 1;
        return last >= first ? last - first + 1 : 0;
    }
    case MASK_DOCUMENTS: return passed - between(0, document_start, end);
    case MASK_FUTURE: return end - passed;
    }
    return 0;
}

double count_pairs(const AttentionShape *s)
{
    double pairs = 0;
    int batches = s->lengths ? s->batch : 1; /* without lengths every batch entry is alike */
    for (int b = 0; b < batches; b++) {
        int64_t valid = s->lengths ? s->lengths[b] : s->key_tokens;
        int64_t document_start = 0, in_batch_entry = 0;
        for (int t = 0; t < s->tokens; t++) {
            int64_t place = (int64_t)t + s->key_tokens - s->tokens;
            int64_t end = s->causal ? between(0, place + 1, valid) : valid;
            if (s->mask.kind == MASK_DOCUMENTS && t > 0 && s->mask.document[t] != s->mask.document[t - 1])
                document_start = t;
            in_batch_entry += keys_allowed(&s->mask, place, end, document_start);
        }
        pairs += (double)in_batch_entry;
    }
    return pairs * (s->lengths ? 1 : s->batch) * s->heads;
}
