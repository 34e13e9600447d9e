#include "options.h"
#include "error.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* One row an option: getopt's table, the help text and where a plain value goes are all made of it. */
typedef enum { FLAG, TEXT, SIZE, SPECIAL } OptionKind;
enum { HELP = 256, DEVICE, SCALE, DROPOUT, TILE, SEED, RNG, PASS, DTYPE, THREADS, REPEAT, PLAIN };

#define AT(member) offsetof(Options, member)
static const struct {
    const char *name, *value, *help;
    OptionKind kind;
    size_t place; /* in Options; of a SPECIAL option, which one it is */
} rows[] = {
    {"help", NULL, "this list", SPECIAL, HELP},
    {"list", NULL, "the kernels, a line each: name, takes, passes, dtypes, devices", FLAG, AT(list)},
    {"check", NULL, "walk the ugly shapes against the oracle; exit 1 on a failure", FLAG, AT(check)},
    {"kernel", "NAME|all", "which version; all (the default) that take the input given", TEXT, AT(kernel)},
    {"device", "auto|cpu|simt|cuda", "default cpu; simt is the CPU stand-in for CUDA threads", SPECIAL,
     DEVICE},
    {"batch", "B", "sequences", SIZE, AT(batch)},
    {"tokens", "T", "queries of a sequence", SIZE, AT(tokens)},
    {"key-tokens", "TK", "keys of a sequence, default T", SIZE, AT(key_tokens)},
    {"embed", "C", "width of x", SIZE, AT(embed)},
    {"embed-out", "C_OUT", "width over all heads, default C", SIZE, AT(embed_out)},
    {"heads", "NH", "query heads", SIZE, AT(heads)},
    {"kv-heads", "NKV", "key and value heads, default NH (chapter 8: NH/4)", SIZE, AT(kv_heads)},
    {"head-size", "HS", "width of a head", SIZE, AT(head_size)},
    {"x", "FILE", "x (B,T,C) or (T,C) from a .npy file, for kernels that take x", TEXT, AT(x_path)},
    {"q", "FILE", "q (B,NH,T,HS) from a .npy file, for kernels that take qkv", TEXT, AT(q_path)},
    {"k", "FILE", "k (B,NKV,TK,HS)", TEXT, AT(k_path)},
    {"v", "FILE", "v (B,NKV,TK,HS)", TEXT, AT(v_path)},
    {"bias", "FILE|randn", "added to the scores; 2 to 4 axes that broadcast to (B,NH,T,TK)", TEXT,
     AT(bias_path)},
    {"dout", "FILE|randn", "the gradient of out, for the backward pass; default all ones", TEXT,
     AT(dout_path)},
    {"causal", NULL, "no query sees a later key", FLAG, AT(causal)},
    {"mask", "NAME[:ARG]", "causal, window:W, prefix:P, local-global:W:G, dilated:W:D, documents:L1,..", TEXT,
     AT(mask)},
    {"lengths", "L1,L2,..", "the valid keys of each batch entry", TEXT, AT(lengths)},
    {"scale", "X", "of the scores, default 1/sqrt(HS)", SPECIAL, SCALE},
    {"dropout", "P", "0 <= P < 1, on the attention weights", SPECIAL, DROPOUT},
    {"tile", "BRxBC", "the plain kernels' tile (chapters 6 to 8), default 64x64", SPECIAL, TILE},
    {"block", "N", "the block mask's block (chapter 9), default 128", SIZE, AT(block)},
    {"seed", "N", "of all random numbers, default 123", SPECIAL, SEED},
    {"rng", "cpu|cuda[:SMSxTHREADS]", "PyTorch's stream on a CPU (default) or a GPU (108x2048: an A100)",
     SPECIAL, RNG},
    {"pass", "forward|backward|both", "default forward", SPECIAL, PASS},
    {"dtype", "f32|bf16", "default f32", SPECIAL, DTYPE},
    {"threads", "N", "default all cores", SPECIAL, THREADS},
    {"save", "DIR", "write out, lse, weights as .npy into DIR (several kernels: DIR/KERNEL/)", TEXT,
     AT(save)},
    {"bench", NULL, "time the kernels, interleaved", FLAG, AT(bench)},
    {"repeat", "N", "of --bench, default 10", SPECIAL, REPEAT},
    {"tsv", "FILE", "append the rows of --bench to FILE", TEXT, AT(tsv)},
};
enum { ROWS = sizeof rows / sizeof rows[0] };

void print_options(FILE *file)
{
    for (int i = 0; i < ROWS; i++) {
        char option[64];
        snprintf(option, sizeof option, "--%s %s", rows[i].name, rows[i].value ? rows[i].value : "");
        fprintf(file, "  %-30s %s\n", option, rows[i].help);
    }
}

/* A whole number from lowest to highest and nothing after it. */
static long long whole_number(const char *option, const char *text, long long lowest, long long highest)
{
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (errno || end == text || *end || text[0] == ' ' || text[0] == '+' || number < lowest ||
        number > highest)
        die(EXIT_USAGE, "--%s takes a whole number from %lld to %lld, not \"%.40s\"", option, lowest, highest,
            text);
    return number;
}

static double real_number(const char *option, const char *text, const char *range, double lowest,
                          double below)
{
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end || text[0] == ' ' || !(number >= lowest && number < below))
        die(EXIT_USAGE, "--%s takes a number %s, not \"%.40s\"", option, range, text);
    return number;
}

/* The place of text among the words, which end with NULL. */
static int one_of(const char *option, const char *text, const char *const *words)
{
    char all[128] = "";
    for (int i = 0; words[i]; i++) {
        if (strcmp(text, words[i]) == 0)
            return i;
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", words[i]);
    }
    die(EXIT_USAGE, "--%s takes one of %s, not \"%.40s\"", option, all, text);
}

/* "64x32" */
static void two_sizes(const char *option, const char *text, int *first, int *second)
{
    char end;
    if (strspn(text, "0123456789x") != strlen(text) || sscanf(text, "%9dx%9d%c", first, second, &end) != 2 ||
        *first < 1 || *second < 1)
        die(EXIT_USAGE, "--%s takes two sizes such as 64x32, not \"%.40s\"", option, text);
}

static void read_array(NpyArray *array, const char *option, const char *path)
{
    if (!path)
        return;
    const char *wrong = read_npy(array, path);
    if (wrong)
        die(EXIT_USAGE, "--%s %s", option, wrong);
    size_t count = 0, first = 0;
    for (size_t i = array->count; i-- > 0;)
        if (isnan(array->data[i])) {
            count++;
            first = i;
        }
    if (count)
        die(EXIT_CHECK_FAILED, "--%s %s: %zu of %zu numbers are NaN, the first at index %zu; mend the file",
            option, path, count, array->count, first);
}

static void special_option(Options *o, size_t which, const char *text)
{
    switch (which) {
    case HELP: o->help = true; break;
    case DEVICE:
        o->device =
            (Device)one_of("device", text, (const char *const[]){"cpu", "simt", "cuda", "auto", NULL});
        break;
    case SCALE:
        o->scale = (float)real_number("scale", text, "between -1e30 and 1e30", -1e30, 1e30);
        o->has_scale = true;
        break;
    case DROPOUT: o->dropout = real_number("dropout", text, "P with 0 <= P < 1", 0, 1); break;
    case TILE: two_sizes("tile", text, &o->tile_rows, &o->tile_columns); break;
    case SEED:
        errno = 0;
        o->seed = strtoull(text, NULL, 10);
        if (errno || !*text || strspn(text, "0123456789") != strlen(text))
            die(EXIT_USAGE, "--seed takes a whole number from 0 to 18446744073709551615, not \"%.40s\"",
                text);
        o->has_seed = true;
        break;
    case RNG:
        o->has_rng = true;
        o->rng = strncmp(text, "cuda", 4) == 0 ? STREAM_CUDA : STREAM_CPU;
        if (strncmp(text, "cuda:", 5) != 0)
            one_of("rng", text, (const char *const[]){"cpu", "cuda", NULL});
        else {
            two_sizes("rng cuda:", text + 5, &o->multiprocessors, &o->threads_per_multiprocessor);
            if (o->multiprocessors > 65536 || o->threads_per_multiprocessor < 256 ||
                o->threads_per_multiprocessor > 65536)
                die(EXIT_USAGE,
                    "--rng cuda: takes up to 65536 multiprocessors of 256 to 65536 threads: 108x2048");
        }
        break;
    case PASS:
        o->pass = (Pass)one_of("pass", text, (const char *const[]){"forward", "backward", "both", NULL});
        break;
    case DTYPE: o->dtype = (Dtype)one_of("dtype", text, (const char *const[]){"f32", "bf16", NULL}); break;
    case THREADS: o->threads = (int)whole_number("threads", text, 1, 1024); break;
    case REPEAT:
        o->repeat = (int)whole_number("repeat", text, 1, 100000);
        o->has_repeat = true;
        break;
    }
}

void parse_options(Options *o, int argc, char **argv)
{
    struct option table[ROWS + 1] = {{0}};
    for (int i = 0; i < ROWS; i++)
        table[i] =
            (struct option){rows[i].name, rows[i].value ? required_argument : no_argument, NULL, PLAIN + i};

    *o = (Options){.repeat = 10};
    optind = 0; /* start afresh: a story parses options many times */
    opterr = 0;
    for (int id; (id = getopt_long(argc, argv, ":h", table, NULL)) != -1;) {
        const char *word = optind > 0 && optind <= argc ? argv[optind - 1] : "";
        if (id == 'h')
            o->help = true;
        else if (id == ':')
            die(EXIT_USAGE, "option %.60s needs a value; ./run --help lists them", word);
        else if (id == '?')
            die(EXIT_USAGE, "%.60s is no option, or takes no value; ./run --help lists them", word);
        else {
            void *place = (char *)o + rows[id - PLAIN].place;
            switch (rows[id - PLAIN].kind) {
            case FLAG: *(bool *)place = true; break;
            case TEXT: *(const char **)place = optarg; break;
            case SIZE: *(int *)place = (int)whole_number(rows[id - PLAIN].name, optarg, 1, 1 << 30); break;
            case SPECIAL: special_option(o, rows[id - PLAIN].place, optarg); break;
            }
        }
    }
    if (optind < argc)
        die(EXIT_USAGE, "\"%.60s\" is no option; ./run --help lists them", argv[optind]);
    if ((o->tsv || o->has_repeat) && !o->bench)
        die(EXIT_USAGE, "%s goes with --bench", o->tsv ? "--tsv" : "--repeat");
    if (o->dout_path && o->pass == PASS_FORWARD)
        die(EXIT_USAGE, "--dout goes with --pass backward or --pass both");
    if (o->check && (o->bench || o->save))
        die(EXIT_USAGE, "--check brings its own inputs; leave out %s", o->bench ? "--bench" : "--save");

    o->bias_randn = o->bias_path && strcmp(o->bias_path, "randn") == 0;
    read_array(&o->x, "x", o->x_path);
    read_array(&o->q, "q", o->q_path);
    read_array(&o->k, "k", o->k_path);
    read_array(&o->v, "v", o->v_path);
    read_array(&o->bias, "bias", o->bias_randn ? NULL : o->bias_path);
    o->dout_randn = o->dout_path && strcmp(o->dout_path, "randn") == 0;
    read_array(&o->dout, "dout", o->dout_randn ? NULL : o->dout_path);
}

void free_options(Options *o)
{
    free(o->x.data);
    free(o->q.data);
    free(o->k.data);
    free(o->v.data);
    free(o->bias.data);
    free(o->dout.data);
}
