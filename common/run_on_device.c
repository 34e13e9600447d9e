/* A run whose kernel computes on a device: t's tensors have a copy each in the device's memory. */
#include "memory.h"
#include "narrow.h"
#include "oracle_backward.h"
#include "run.h"

#include <stdlib.h>
#include <string.h>

static void *own_device(Run *run, size_t bytes)
{
    return run->device_owned[run->device_owned_count++] = run->device->allocate(bytes);
}

static float *device_floats(Run *run, size_t count)
{
    return own_device(run, count * sizeof(float));
}

/* NULL stays NULL. */
static void *uploaded(Run *run, const void *host, size_t bytes)
{
    if (!host)
        return NULL;
    void *device = own_device(run, bytes);
    run->device->copy_to(device, host, bytes);
    return device;
}

static const float *uploaded_floats(Run *run, const float *host, size_t count)
{
    return uploaded(run, host, count * sizeof(float));
}

/* ---- q, k, v, out and their gradients: float32, or bf16 behind the same pointers ---- */

static size_t number_bytes(const Run *run)
{
    return run->kernel->bf16 ? sizeof(uint16_t) : sizeof(float);
}

static float *device_numbers(Run *run, size_t count)
{
    return own_device(run, count * number_bytes(run));
}

static const float *uploaded_numbers(Run *run, const float *host, size_t count)
{
    if (!host || !run->kernel->bf16)
        return uploaded_floats(run, host, count);
    uint16_t *narrow = allocate_zeroed(count, sizeof *narrow);
    for (size_t i = 0; i < count; i++)
        narrow[i] = bf16_from_float(host[i]);
    void *device = uploaded(run, narrow, count * sizeof *narrow);
    free(narrow);
    return device;
}

/* An array behind each tensor that a pass writes, and its size. */
typedef struct {
    float *host, *device;
    size_t count, number; /* number: its bytes in the device's memory */
} Output;
enum { MOST_OUTPUTS = 5 + MAX_PARAMETERS };

static int outputs_of(Output *list, const Run *run, Pass pass)
{
    const AttentionShape *s = &run->problem.shape;
    const Tensors *t = &run->t, *d = &run->on_device;
    size_t number = number_bytes(run), f32 = sizeof(float);
    int count = 0;
    if (pass == PASS_FORWARD) {
        list[count++] = (Output){t->out, d->out, run->out_size, number};
        list[count++] = (Output){t->lse, d->lse, t->lse ? lse_count(s) : 0, f32};
        list[count++] = (Output){t->weights, d->weights, run->weights_size, f32};
        return count;
    }
    list[count++] = (Output){t->dq, d->dq, query_count(s), number};
    list[count++] = (Output){t->dk, d->dk, key_count(s), number};
    list[count++] = (Output){t->dv, d->dv, key_count(s), number};
    list[count++] = (Output){t->dbias, d->dbias, bias_elements(s), f32};
    list[count++] = (Output){t->dx, d->dx, x_count(s), f32};
    for (int i = 0; i < run->parameters.count; i++)
        list[count++] = (Output){t->d_parameter[i], d->d_parameter[i], parameter_count(run, i), f32};
    return count;
}

void open_on_device(Run *run)
{
    const AttentionShape *s = &run->problem.shape;
    const Tensors *t = &run->t;
    Tensors *d = &run->on_device;
    bool backward = run->pass != PASS_FORWARD;

    run->device_shape = *s;
    run->device_shape.lengths = uploaded(run, s->lengths, s->batch * sizeof *s->lengths);
    run->device_shape.mask.document =
        uploaded(run, s->mask.document, s->key_tokens * sizeof *s->mask.document);
    run->device_shape.bias = uploaded_floats(run, s->bias, bias_elements(s));
    run->device_shape.dropout_stream = NULL;

    d->q = uploaded_numbers(run, t->q, query_count(s));
    d->k = uploaded_numbers(run, t->k, key_count(s));
    d->v = uploaded_numbers(run, t->v, key_count(s));
    d->x = uploaded_floats(run, t->x, x_count(s));
    for (int i = 0; i < run->parameters.count; i++)
        d->parameter[i] = uploaded_floats(run, t->parameter[i], parameter_count(run, i));
    d->out = device_numbers(run, run->out_size);
    d->lse = t->lse ? device_floats(run, lse_count(s)) : NULL;
    d->weights = t->weights ? device_floats(run, run->weights_size) : NULL;
    for (int i = 0; i < MAX_BUFFERS; i++) /* where a size is 0, as without dropout, there is none */
        d->workspace[i] = run->workspace_size[i] ? device_floats(run, run->workspace_size[i]) : NULL;
    if (!backward)
        return;
    d->dout = uploaded_numbers(run, t->dout, run->out_size);
    d->dq = t->dq ? device_numbers(run, query_count(s)) : NULL;
    d->dk = t->dk ? device_numbers(run, key_count(s)) : NULL;
    d->dv = t->dv ? device_numbers(run, key_count(s)) : NULL;
    d->dbias = t->dbias ? device_floats(run, bias_elements(s)) : NULL;
    d->dx = t->dx ? device_floats(run, x_count(s)) : NULL;
    for (int i = 0; i < run->parameters.count; i++)
        d->d_parameter[i] = device_floats(run, parameter_count(run, i));
    for (int i = 0; i < MAX_BUFFERS; i++)
        d->backward_workspace[i] =
            run->backward_workspace_size[i] ? device_floats(run, run->backward_workspace_size[i]) : NULL;
}

void poison_on_device(Run *run, Pass pass)
{
    if (!run->device)
        return;
    Output list[MOST_OUTPUTS];
    for (int i = outputs_of(list, run, pass); i-- > 0;)
        if (list[i].device)
            run->device->fill_with_nan(list[i].device, list[i].count * list[i].number);
    bool forward = pass == PASS_FORWARD;
    float *const *workspace = forward ? run->on_device.workspace : run->on_device.backward_workspace;
    const size_t *size = forward ? run->workspace_size : run->backward_workspace_size;
    for (int i = 0; i < MAX_BUFFERS; i++)
        if (workspace[i])
            run->device->fill_with_nan(workspace[i], size[i] * sizeof(float));
}

static void fetch(const Run *run, const Output *output)
{
    run->device->copy_from(output->host, output->device, output->count * output->number);
    const uint16_t *narrow =
        (const uint16_t *)output->host; /* the front half of host; widened from the back on */
    for (size_t i = output->count; output->number == sizeof *narrow && i-- > 0;) {
        float wide = bf16_to_float(narrow[i]);
        memcpy(output->host + i, &wide, sizeof wide);
    }
}

void fetch_from_device(Run *run, Pass pass)
{
    if (!run->device)
        return;
    Output list[MOST_OUTPUTS];
    for (int i = outputs_of(list, run, pass); i-- > 0;)
        if (list[i].device)
            fetch(run, &list[i]);
}

void close_on_device(Run *run)
{
    for (int i = 0; i < run->device_owned_count; i++)
        run->device->release(run->device_owned[i]);
    run->device_owned_count = 0;
}
