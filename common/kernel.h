/* A kernel is one row of a table: what it takes, what memory it needs, and the function to call. common/
 * draws or reads its inputs, allocates its outputs and workspace (counting every byte), checks it against the
 * oracle, times it. */
#ifndef COMMON_KERNEL_H
#define COMMON_KERNEL_H

#include "oracle.h"
#include "random.h"
#include "shape.h"

enum { MAX_BUFFERS = 8, MAX_PARAMETERS = 512 };

/* What a kernel reads and writes. Pointers that do not concern it are NULL. With Kernel.bf16 the numbers behind q, k, v, out,
 * dout, dq, dk and dv are bf16 where the kernel reads and writes them, and float32 rounded to bf16 for the oracle. */
typedef struct {
    const float *q, *k, *v;                 /* cores: (B,NH,T,HS), (B,NKV,TK,HS) twice */
    const float *x;                         /* modules: (B,T,C) */
    const float *parameter[MAX_PARAMETERS]; /* modules: in the order their parameters() drew them */
    float *out;                             /* cores (B,NH,T,HS), modules (B,T,C_out) */
    float *lse;                             /* cores: (B,NH,T) */
    float *weights;                         /* as Kernel.weights says */
    float *workspace[MAX_BUFFERS];          /* as Kernel.workspace asked, 64-byte aligned, uninitialised */
    /* The backward pass: dout is read; the gradients are written (not added to). */
    const float *dout;   /* as out */
    float *dq, *dk, *dv; /* cores: as q, k, v */
    float *dbias;        /* as the bias lies in memory, with its strides; NULL without a bias */
    float *dx;           /* modules: as x */
    float *d_parameter[MAX_PARAMETERS];     /* modules: as their parameters */
    float *backward_workspace[MAX_BUFFERS]; /* as Kernel.backward_workspace asked */
} Tensors;

/* A module's parameters, drawn one after another from one generator as its PyTorch constructor does. */
typedef struct {
    RandomStream *stream;
    int count;
    struct {
        char name[48]; /* the notebook's, "W_query.weight" */
        int axes;      /* 1 or 2 */
        size_t size[2];
        float *data, *gradient; /* gradient: NULL in a forward pass */
    } list[MAX_PARAMETERS];
} Parameters;

/* nn.Linear(inputs, outputs): NAME.weight (outputs, inputs), then NAME.bias (outputs) if there is one. */
void add_linear(Parameters *p, const char *name, int outputs, int inputs, bool bias);
/* A (rows, columns) matrix of U(-bound, bound), or of U[0, 1) for add_rand. */
void add_uniform(Parameters *p, const char *name, int rows, int columns, float bound);
void add_rand(Parameters *p, const char *name, int rows, int columns);
/* Draws n normal numbers and throws them away, as a constructor does whose tensors are initialised twice. */
void skip_randn(Parameters *p, size_t n);

typedef enum { TAKES_QKV, TAKES_X } Takes;
typedef enum {
    WEIGHTS_NONE,
    WEIGHTS_PER_HEAD /* (B,NH,T,TK) */,
    WEIGHTS_AVERAGED /* (B,T,TK) */
} WeightsKept;
typedef enum {
    DROPOUT_NONE,           /* refuses --dropout */
    DROPOUT_STREAM,         /* apply_dropout(s->dropout_stream, ..) over (B,NH,T,TK) in memory order */
    DROPOUT_STREAM_BY_HEAD, /* the same, all of head 0's (B,T,TK) first: a stack of single heads */
    DROPOUT_POSITION,       /* dropout_keeps(s->dropout_seed, row, key, p) */
} DropoutKind;
typedef enum {
    OWN_MASK_NONE,
    OWN_MASK_CAUSAL,
    OWN_MASK_FUTURE,
    OWN_MASK_OPTION /* --mask, causal if not given */
} OwnMask;

/* Sizes that stand in for what the command line does not say. 0: not set. */
typedef struct {
    int batch, tokens, key_tokens, embed, embed_out, heads, kv_heads, head_size;
    bool sentence;  /* x is the 6 x 3 sentence, and nothing is drawn for it */
    StreamKind rng; /* for when --rng does not say */
    uint64_t seed;  /* for when --seed does not say; 0: 123 */
} Defaults;

typedef struct Kernel {
    const char *name;
    const char *what; /* half a line for --help */
    Takes takes;
    void (*forward)(const Tensors *t, const AttentionShape *s);
    /* Called after forward, which left out, lse, weights and workspace as they are. NULL: the kernel has no
     * backward. */
    void (*backward)(const Tensors *t, const AttentionShape *s);
    int (*backward_workspace)(const AttentionShape *s, size_t floats[MAX_BUFFERS]);
    /* Fills floats[] with the number of floats of each workspace buffer and returns how many buffers. NULL:
     * none. */
    int (*workspace)(const AttentionShape *s, size_t floats[MAX_BUFFERS]);
    WeightsKept weights;
    DropoutKind dropout;
    bool grouped;             /* takes NKV < NH */
    bool tiled;               /* --tile concerns it */
    bool blocked;             /* --block concerns it */
    bool bf16;                /* takes --dtype bf16 in place of f32; a row of the same name may take f32 */
    const Defaults *defaults; /* used when no size is given on the command line; NULL: the book's */
    /* Why it cannot do this shape, as "takes one head, not --heads 3", to stand behind "error: kernel NAME ";
     * NULL: it can. */
    const char *(*refuses)(const AttentionShape *s);
    const char *(*refuses_backward)(const AttentionShape *s); /* what only its backward cannot do */

    /* Modules only. */
    OwnMask own_mask;
    bool unscaled;                                              /* scale is 1, not 1 / sqrt(HS) */
    void (*parameters)(Parameters *p, const AttentionShape *s); /* NULL: it has none */
    /* Fills module: its query, key, value arrays have room for NH (NKV) entries and are zero-initialised; set
     * module->query to NULL for a module without projections. */
    void (*describe)(OracleModule *module, OracleLinear *query, OracleLinear *key, OracleLinear *value,
                     const Tensors *t, const AttentionShape *s);
} Kernel;

/* The table at the end of FILE.cu, named for its build: DEVICE_TABLE(FILE) = { rows, {} }; */
#ifdef __cplusplus
#ifdef SIMT
#define DEVICE_TABLE(file) extern "C" const Kernel file##_simt[]
#else
#define DEVICE_TABLE(file) extern "C" const Kernel file##_cuda[]
#endif
#endif

#endif
