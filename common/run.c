#include "run.h"
#include "error.h"
#include "memory.h"
#include "narrow.h"
#include "oracle_backward.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const float sentence[6][3] = {
    {0.43f, 0.15f, 0.89f}, /* Your */
    {0.55f, 0.87f, 0.66f}, /* journey */
    {0.57f, 0.85f, 0.64f}, /* starts */
    {0.22f, 0.58f, 0.33f}, /* with */
    {0.77f, 0.25f, 0.10f}, /* one */
    {0.05f, 0.80f, 0.55f}, /* step */
};

/* ---- Opening: inputs, parameters, outputs, workspace ---- */

static float *own_floats(Run *run, size_t n)
{
    return run->owned[run->owned_count++] = allocate_floats(n);
}

/* A tensor from its file, or drawn from the stream; times `magnify`, and rounded where it is to be bf16: so the oracle gets
 * what the kernel gets. */
static const float *input(Run *run, const NpyArray *file, RandomStream *stream, size_t count, float magnify,
                          bool bf16)
{
    if (file->data && magnify == 1 && !bf16)
        return file->data;
    float *tensor = own_floats(run, count);
    if (file->data)
        memcpy(tensor, file->data, count * sizeof *tensor);
    else
        draw_randn(stream, tensor, count);
    for (size_t i = 0; magnify != 1 && i < count; i++)
        tensor[i] *= magnify;
    for (size_t i = 0; bf16 && i < count; i++)
        tensor[i] = bf16_to_float(bf16_from_float(tensor[i]));
    return tensor;
}

static bool can_share(const Run *run, const Run *other, float magnify)
{
    const AttentionShape *a = &run->problem.shape, *b = &other->problem.shape;
    bool same = magnify == 1 && run->kernel->takes == other->kernel->takes &&
                run->kernel->bf16 == other->kernel->bf16 && run->problem.seed == other->problem.seed &&
                run->problem.rng == other->problem.rng && run->problem.sentence == other->problem.sentence;
    if (run->kernel->takes == TAKES_X)
        return same && a->batch == b->batch && a->tokens == b->tokens && a->embed == b->embed;
    return same && query_count(a) == query_count(b) && key_count(a) == key_count(b) && a->heads == b->heads &&
           a->tokens == b->tokens && a->batch == b->batch;
}

static void open_inputs(Run *run, const Options *o, const Run *inputs_of, float magnify)
{
    AttentionShape *s = &run->problem.shape;
    RandomStream *stream = &run->after_x;
    bool bf16 = run->kernel->bf16;
    seed_stream(stream, run->problem.rng, run->problem.seed);
    if (o->multiprocessors) {
        run->after_x.multiprocessors = o->multiprocessors;
        run->after_x.threads_per_multiprocessor = o->threads_per_multiprocessor;
    }
    if (inputs_of && can_share(run, inputs_of, magnify)) {
        run->t.x = inputs_of->t.x;
        run->t.q = inputs_of->t.q;
        run->t.k = inputs_of->t.k;
        run->t.v = inputs_of->t.v;
        s->bias = inputs_of->problem.shape.bias;
        memcpy(s->bias_stride, inputs_of->problem.shape.bias_stride, sizeof s->bias_stride);
        run->after_x = inputs_of->after_x;
        return;
    }
    if (run->problem.sentence)
        run->t.x = &sentence[0][0];
    else if (run->kernel->takes == TAKES_X)
        run->t.x = input(run, &o->x, stream, x_count(s), magnify, false);
    else {
        run->t.q = input(run, &o->q, stream, query_count(s), magnify, bf16);
        run->t.k = input(run, &o->k, stream, key_count(s), magnify, bf16);
        run->t.v = input(run, &o->v, stream, key_count(s), 1, bf16);
        if (o->bias_randn)
            s->bias = input(run, &o->bias, stream, bias_elements(s), 1, false);
    }
}

static size_t kept_weights(const Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    return run->kernel->weights == WEIGHTS_PER_HEAD   ? weights_count(s)
           : run->kernel->weights == WEIGHTS_AVERAGED ? weights_count(s) / s->heads
                                                      : 0;
}

/* dout, drawn after everything else or all ones, and room for each gradient. */
static void open_gradients(Run *run, const Options *o)
{
    const AttentionShape *s = &run->problem.shape;
    bool module = run->kernel->takes == TAKES_X;
    if (o->dout.data || o->dout_randn)
        run->t.dout = input(run, &o->dout, &run->after_inputs, run->out_size, 1, run->kernel->bf16);
    else {
        float *dout = own_floats(run, run->out_size);
        for (size_t i = 0; i < run->out_size; i++)
            dout[i] = 1;
        run->t.dout = dout;
    }
    if (module)
        run->t.dx = own_floats(run, x_count(s));
    else {
        run->t.dq = own_floats(run, query_count(s));
        run->t.dk = own_floats(run, key_count(s));
        run->t.dv = own_floats(run, key_count(s));
        if (s->bias)
            run->t.dbias = own_floats(run, bias_elements(s));
    }
    for (int i = 0; i < run->parameters.count; i++)
        run->t.d_parameter[i] = run->parameters.list[i].gradient = allocate_floats(parameter_count(run, i));
}

Refusal open_run(Run *run, const Chapter *chapter, const Kernel *kernel, const Options *o,
                 const Run *inputs_of, float magnify)
{
    memset(run, 0, sizeof *run);
    run->kernel = kernel;
    resolve_problem(&run->problem, chapter, kernel, o);
    run->owned[run->owned_count++] = run->problem.document;
    run->owned[run->owned_count++] = run->problem.lengths;
    AttentionShape *s = &run->problem.shape;
    Refusal refusal = {0};
    if (run->problem.reason[0]) {
        refusal.exit_code = EXIT_USAGE;
        snprintf(refusal.reason, sizeof refusal.reason, "%s", run->problem.reason);
        close_run(run);
        return refusal;
    }

    /* Count before asking: what is asked for lazily would else be missed when it is too late. */
    bool module = kernel->takes == TAKES_X;
    int buffers = kernel->workspace ? kernel->workspace(s, run->workspace_size) : 0;
    run->out_size = module ? (size_t)s->batch * s->tokens * s->embed_out : query_count(s);
    run->weights_size = kept_weights(run);
    double extra = kernel->weights == WEIGHTS_PER_HEAD ? 4.0 * (double)run->weights_size : 0;
    for (int i = 0; i < buffers; i++)
        extra += 4.0 * (double)run->workspace_size[i];
    run->pass = o->pass;
    run->bias_axes = o->bias_randn ? 4 : o->bias.axes;
    const size_t drawn[4] = {1, s->heads, s->tokens, s->key_tokens};
    memcpy(run->bias_size, o->bias_randn ? drawn : o->bias.size, sizeof run->bias_size);
    bool backward = o->pass != PASS_FORWARD;
    int backward_buffers = backward && kernel->backward_workspace
                               ? kernel->backward_workspace(s, run->backward_workspace_size)
                               : 0;
    memset(run->workspace_size + buffers, 0, (MAX_BUFFERS - buffers) * sizeof *run->workspace_size);
    for (int i = 0; i < backward_buffers; i++)
        extra += 4.0 * (double)run->backward_workspace_size[i];
    memset(run->backward_workspace_size + backward_buffers, 0,
           (MAX_BUFFERS - backward_buffers) * sizeof *run->backward_workspace_size);
    double inputs = module ? 4.0 * (double)x_count(s) + 16.0 * s->embed * (double)s->embed_out
                           : 4.0 * (double)query_count(s) + 8.0 * (double)key_count(s);
    double need = extra + 4.0 * (double)run->out_size + 4.0 * (double)run->weights_size + inputs +
                  (backward ? inputs + 4.0 * (double)run->out_size : 0) +
                  (s->dropout > 0 && kernel->dropout != DROPOUT_POSITION ? (double)weights_count(s) : 0) +
                  (o->bias_randn ? 4.0 * s->heads * (double)s->tokens * s->key_tokens : 0);
    if (kernel->weights == WEIGHTS_PER_HEAD)
        need -= 4.0 * (double)run->weights_size;              /* counted in extra */
    bool bf16_here = kernel->bf16 && o->device == DEVICE_CPU; /* its tensors stand beside their float32 */
    if (bf16_here)
        need += 0.5 * (need - extra);
    double room = (double)available_memory();
    if (need > 0.95 * room) {
        refusal.exit_code = EXIT_UNAVAILABLE;
        snprintf(refusal.reason, sizeof refusal.reason,
                 "needs %s and %s are free; take a smaller --batch or fewer --tokens%s", bytes_text(need),
                 bytes_text(room), extra > need / 2 ? ", or a tiled kernel (chapter 7)" : "");
        close_run(run);
        return refusal;
    }
    run->extra_bytes = (size_t)extra;
    run->device = bf16_here ? &accelerator_cpu : accelerator(o->device);
    double device_room = run->device ? (double)run->device->free_memory() : need;
    if (need > device_room) {
        refusal.exit_code = EXIT_UNAVAILABLE;
        snprintf(refusal.reason, sizeof refusal.reason,
                 "needs %s and the device has %s free; take a smaller --batch or fewer --tokens",
                 bytes_text(need), bytes_text(device_room));
        close_run(run);
        return refusal;
    }
    if (need >= 1 << 30)
        printf("kernel %s needs %s, %s of it beyond inputs and outputs; %s are free\n", kernel->name,
               bytes_text(need), bytes_text(extra), bytes_text(room));

    open_inputs(run, o, inputs_of, magnify);
    run->after_inputs = run->after_x;
    if (kernel->parameters) {
        run->parameters.stream = &run->after_inputs;
        kernel->parameters(&run->parameters, s);
        for (int i = 0; i < run->parameters.count; i++)
            run->t.parameter[i] = run->parameters.list[i].data;
    }
    run->t.out = own_floats(run, run->out_size);
    if (!module)
        run->t.lse = own_floats(run, lse_count(s));
    if (run->weights_size)
        run->t.weights = own_floats(run, run->weights_size);
    for (int i = 0; i < buffers && !run->device; i++)
        run->t.workspace[i] = own_floats(run, run->workspace_size[i]);
    if (backward)
        open_gradients(run, o);
    for (int i = 0; i < backward_buffers && !run->device; i++)
        run->t.backward_workspace[i] = own_floats(run, run->backward_workspace_size[i]);
    if (run->device)
        open_on_device(run);
    return refusal;
}

void close_run(Run *run)
{
    close_on_device(run);
    for (int i = 0; i < run->owned_count; i++)
        free(run->owned[i]);
    for (int i = 0; i < run->parameters.count; i++) {
        free(run->parameters.list[i].data);
        free(run->parameters.list[i].gradient);
    }
    run->owned_count = run->parameters.count = 0;
}

static void launch_forward(Run *run)
{
    if (run->device) {
        run->kernel->forward(&run->on_device, &run->device_shape);
        return;
    }
    run->dropout_stream = run->after_inputs;
    run->problem.shape.dropout_stream = &run->dropout_stream;
    run->kernel->forward(&run->t, &run->problem.shape);
}

static void launch_backward(Run *run)
{
    if (run->device)
        run->kernel->backward(&run->on_device, &run->device_shape);
    else
        run->kernel->backward(&run->t, &run->problem.shape);
}

void launch_run(void *context)
{
    Run *run = context;
    if (run->pass != PASS_BACKWARD)
        launch_forward(run);
    if (run->pass != PASS_FORWARD)
        launch_backward(run);
}

void forward_run(Run *run)
{
    launch_forward(run);
    if (run->device)
        run->device->finish();
}

void backward_run(Run *run)
{
    launch_backward(run);
    if (run->device)
        run->device->finish();
}

/* ---- Counting ---- */

static bool half_by_convention(const AttentionShape *s)
{
    bool causal = s->mask.kind == MASK_CAUSAL || (s->mask.kind == MASK_NONE && s->causal);
    return causal && !s->lengths && s->tokens == s->key_tokens;
}

double run_flops(const Run *run, Pass pass)
{
    static const double attention_times[] = {1, 2.5, 3.5}, projection_times[] = {1, 2, 3};
    const AttentionShape *s = &run->problem.shape;
    double pairs = half_by_convention(s) ? 0.5 * (double)weights_count(s) : count_pairs(s);
    double projections = 0;
    for (int i = 0; i < run->parameters.count; i++)
        if (run->parameters.list[i].axes == 2)
            projections += 2.0 * s->batch * s->tokens * (double)parameter_count(run, i);
    return attention_times[pass] * 4 * pairs * s->head_size + projection_times[pass] * projections;
}

double run_bytes(const Run *run, Pass pass)
{
    const AttentionShape *s = &run->problem.shape;
    double number = run->kernel->bf16 ? 2 : 4;
    double inputs =
        number * (run->kernel->takes == TAKES_X ? (double)x_count(s)
                                                : (double)query_count(s) + 2.0 * (double)key_count(s));
    double out = number * (double)run->out_size;
    for (int i = 0; i < run->parameters.count; i++)
        inputs += 4.0 * (double)parameter_count(run, i);
    inputs += 4.0 * (double)bias_elements(s);
    double forward = inputs + out;
    double backward =
        2 * inputs + 2 * out; /* inputs, out and dout are read, a gradient of each input written */
    return pass == PASS_FORWARD ? forward : pass == PASS_BACKWARD ? backward : forward + backward;
}

/* ---- Saving, and words ---- */

/* FOLDER/NAME.npy, unless something went wrong before or there is no such tensor. */
static const char *save(const char *wrong, const char *folder, const char *name, const float *tensor,
                        const size_t *size, int axes)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.npy", folder, name);
    return wrong || !tensor ? wrong : write_npy(path, tensor, size, axes);
}

const char *save_run(const Run *run, const char *folder)
{
    const AttentionShape *s = &run->problem.shape;
    const Tensors *t = &run->t;
    const size_t q[4] = {s->batch, s->heads, s->tokens, s->head_size};
    const size_t k[4] = {s->batch, s->kv_heads, s->key_tokens, s->head_size};
    const size_t x[3] = {s->batch, s->tokens, s->embed}, out[3] = {s->batch, s->tokens, s->embed_out};
    const size_t per_head[4] = {s->batch, s->heads, s->tokens, s->key_tokens};
    const size_t averaged[3] = {s->batch, s->tokens, s->key_tokens};
    bool module = run->kernel->takes == TAKES_X, by_head = run->kernel->weights == WEIGHTS_PER_HEAD;

    const char *wrong = save(NULL, folder, "out", t->out, module ? out : q, module ? 3 : 4);
    wrong = save(wrong, folder, "lse", t->lse, q, 3);
    wrong = save(wrong, folder, "weights", t->weights, by_head ? per_head : averaged, by_head ? 4 : 3);
    wrong = save(wrong, folder, "dq", t->dq, q, 4);
    wrong = save(wrong, folder, "dk", t->dk, k, 4);
    wrong = save(wrong, folder, "dv", t->dv, k, 4);
    wrong = save(wrong, folder, "dbias", t->dbias, run->bias_size, run->bias_axes);
    wrong = save(wrong, folder, "dx", t->dx, x, 3);
    for (int i = 0; i < run->parameters.count; i++) {
        char name[64];
        snprintf(name, sizeof name, "d_%s", run->parameters.list[i].name);
        wrong = save(wrong, folder, name, run->parameters.list[i].gradient, run->parameters.list[i].size,
                     run->parameters.list[i].axes);
    }
    return wrong;
}

void problem_text(char *text, size_t size, const Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    char mask[64];
    mask_text(mask, sizeof mask, s);
    if (run->kernel->takes == TAKES_X)
        snprintf(text, size, "x (%d,%d,%d) to (%d,%d,%d), %d head%s of %d, mask %s", s->batch, s->tokens,
                 s->embed, s->batch, s->tokens, s->embed_out, s->heads, s->heads > 1 ? "s" : "", s->head_size,
                 mask);
    else
        snprintf(text, size, "q (%d,%d,%d,%d), k and v (%d,%d,%d,%d), mask %s%s", s->batch, s->heads,
                 s->tokens, s->head_size, s->batch, s->kv_heads, s->key_tokens, s->head_size, mask,
                 s->bias ? ", bias" : "");
}
