/* Where kernels run: this processor, a GPU, or the CPU stand-in for one. A GPU has memory of its own. */
#ifndef COMMON_DEVICE_H
#define COMMON_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

typedef enum {
    DEVICE_CPU,
    DEVICE_SIMT,
    DEVICE_CUDA,
    DEVICE_AUTO /* cuda where there is one, else cpu */
} Device;

/* What can be done with a device. Each function ends the program with exit 3 and one line where the device
 * fails. */
typedef struct {
    const char *name; /* as --device takes it */
    /* NULL if a device is there, else why not, in one word or words with hyphens: "no-device" */
    const char *(*missing)(void);
    const char *(*machine)(void); /* its name for people and TSV rows */
    size_t (*free_memory)(void);  /* bytes */
    void *(*allocate)(size_t bytes);
    void (*release)(void *memory); /* NULL: nothing */
    void (*copy_to)(void *device, const void *host, size_t bytes);
    void (*copy_from)(void *host, const void *device, size_t bytes);
    void (*fill_with_nan)(void *floats, size_t bytes);
    void (*finish)(void); /* waits for all that was launched */
    /* Milliseconds that what run(context) launches takes, without its wait; its last-level cache is emptied before. */
    double (*time_ms)(void (*run)(void *context), void *context);
    /* GFLOP/s of its vendor's own product of matrices, float32 (without TF32) or bf16; 0: nothing to compare with */
    double (*peak_gflops)(double ms, bool bf16);
    /* out (n,n) = a b, all on the device, by the vendor's library: in float32, or with its factors rounded to TF32, which has 10
     * bits of fraction where float32 has 23. Launched, not waited for. */
    void (*multiply)(float *out, const float *a, const float *b, int n, bool tf32);
} Accelerator;

#ifdef __cplusplus
extern "C" {
#endif

extern const Accelerator accelerator_cpu;  /* device_here.c: for kernels in bf16 */
extern const Accelerator accelerator_simt; /* device_here.c */
extern const Accelerator accelerator_cuda; /* device_cuda.cu; only where HAVE_CUDA is defined */

/* NULL for the CPU, and for a device that this build has no compiler for. */
const Accelerator *accelerator(Device device);

const char *device_name(Device device);

/* Why nothing can run there, as --list shows it behind the name: "no-nvcc", "no-device"; NULL: it can. */
const char *device_missing(Device device);

#ifdef __cplusplus
}
#endif

#endif
