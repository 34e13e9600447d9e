/* The GPU that the CUDA runtime calls device 0. Built by nvcc alone. */
#include "benchmark.h"
#include "device.h"
#include "error.h"
#include "memory.h"
#ifdef HAVE_CUBLAS
#include "cublas.h"
#endif

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#define CHECK(call) check(call, #call, __LINE__)
static void check(cudaError_t status, const char *call, int line)
{
    if (status != cudaSuccess)
        die(EXIT_UNAVAILABLE, "CUDA: %s in %.60s (%s:%d)", cudaGetErrorString(status), call, __FILE__, line);
}

static const char *missing(void)
{
    int count = 0, major = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
        return "no-device";
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess)
        return "no-device";
    return major < 8 ? "older-than-sm_80" : nullptr;
}

static const char *machine(void)
{
    static char name[300];
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    snprintf(name, sizeof name, "%s", properties.name);
    return name;
}

static size_t free_memory(void)
{
    size_t room, all;
    CHECK(cudaMemGetInfo(&room, &all));
    return room;
}

static void *allocate(size_t bytes)
{
    void *memory = nullptr;
    cudaError_t status = cudaMalloc(&memory, bytes ? bytes : 1);
    if (status == cudaErrorMemoryAllocation)
        die(EXIT_UNAVAILABLE, "the device has no room for %s; take a smaller --batch or fewer --tokens",
            bytes_text((double)bytes));
    CHECK(status);
    return memory;
}

static void release(void *memory)
{
    CHECK(cudaFree(memory));
}

static void copy_to(void *device, const void *host, size_t bytes)
{
    CHECK(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}

static void copy_from(void *host, const void *device, size_t bytes)
{
    CHECK(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

static void fill_with_nan(void *floats, size_t bytes)
{
    CHECK(cudaMemset(floats, 0xFF, bytes));
}

static void finish(void)
{
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
}

/* By events on the device, which do not count what the host does meanwhile. Before each run a buffer twice as large as the
 * last-level cache is written, so that the run finds nothing there of the one before. */
static double time_ms(void (*run)(void *context), void *context)
{
    static cudaEvent_t start, stop;
    static void *buffer;
    static size_t bytes;
    if (!buffer) {
        int cache = 0;
        CHECK(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, 0));
        bytes = 2 * (size_t)cache;
        CHECK(cudaMalloc(&buffer, bytes + 1));
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&stop));
    }
    CHECK(cudaMemsetAsync(buffer, 0, bytes));
    CHECK(cudaEventRecord(start));
    run(context);
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    return ms;
}

static void multiply(float *out, const float *a, const float *b, int n, bool tf32)
{
#ifdef HAVE_CUBLAS
    CHECK_CUBLAS(
        cublasSetMathMode(cublas_handle(), tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_PEDANTIC_MATH));
    device_matmul('N', 'N', n, n, n, 1, a, n, b, n, 0, out, n);
    CHECK_CUBLAS(cublasSetMathMode(cublas_handle(), CUBLAS_PEDANTIC_MATH));
#else
    (void)out, (void)a, (void)b, (void)n, (void)tf32;
    die(EXIT_UNAVAILABLE, "this build has no cuBLAS; install it beside nvcc and type make again");
#endif
}

#ifdef HAVE_CUBLAS
static void multiply_bf16(uint16_t *out, const uint16_t *a, const uint16_t *b, int n)
{
    float one = 1, zero = 0;                                               /* sums are float32 */
    CHECK_CUBLAS(cublasSetMathMode(cublas_handle(), CUBLAS_DEFAULT_MATH)); /* tensor cores */
    CHECK_CUBLAS(cublasGemmEx(cublas_handle(), CUBLAS_OP_N, CUBLAS_OP_N, n, n, n, &one, a, CUDA_R_16BF, n, b,
                              CUDA_R_16BF, n, &zero, out, CUDA_R_16BF, n, CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
    CHECK_CUBLAS(cublasSetMathMode(cublas_handle(), CUBLAS_PEDANTIC_MATH));
}

/* Of two n x n matrices, their product behind them. */
static void multiply_for_peak(void *matrices, int n, bool bf16)
{
    size_t next = (size_t)n * n;
    float *a = (float *)matrices;
    uint16_t *a16 = (uint16_t *)matrices;
    bf16 ? multiply_bf16(a16 + 2 * next, a16, a16 + next, n) : multiply(a + 2 * next, a, a + next, n, false);
}
#endif

/* cuBLAS' own product of two large matrices: in float32 what the vendor reaches without tensor cores, in bf16 with them. */
static double peak_gflops(double ms, bool bf16)
{
#ifdef HAVE_CUBLAS
    const int n = bf16 ? 8192 : 4096;
    static void *matrices[2];
    if (!matrices[bf16]) {
        size_t bytes = 3 * (bf16 ? sizeof(uint16_t) : sizeof(float)) * n * n;
        CHECK(cudaMalloc(&matrices[bf16], bytes));
        CHECK(cudaMemset(matrices[bf16], 0x3D, bytes));
        multiply_for_peak(matrices[bf16], n, bf16); /* the first is slow */
    }
    finish();
    double start = now(), seconds, rounds = 0;
    do {
        multiply_for_peak(matrices[bf16], n, bf16);
        finish();
        rounds++;
        seconds = now() - start;
    } while (seconds < 1e-3 * ms);
    return rounds * 2e-9 * n * n * n / seconds;
#else
    (void)ms;
    (void)bf16;
    return 0;
#endif
}

extern "C" const Accelerator accelerator_cuda = {
    .name = "cuda",
    .missing = missing,
    .machine = machine,
    .free_memory = free_memory,
    .allocate = allocate,
    .release = release,
    .copy_to = copy_to,
    .copy_from = copy_from,
    .fill_with_nan = fill_with_nan,
    .finish = finish,
    .time_ms = time_ms,
    .peak_gflops = peak_gflops,
    .multiply = multiply,
};
