#include "device.h"

const Accelerator *accelerator(Device device)
{
#ifdef HAVE_SIMT
    if (device == DEVICE_SIMT)
        return &accelerator_simt;
#endif
#ifdef HAVE_CUDA
    if (device == DEVICE_CUDA)
        return &accelerator_cuda;
#endif
    (void)device;
    return NULL;
}

const char *device_name(Device device)
{
    static const char *const names[] = {"cpu", "simt", "cuda", "auto"};
    return names[device];
}

const char *device_missing(Device device)
{
    if (device == DEVICE_CPU)
        return NULL;
    const Accelerator *there = accelerator(device);
    return there ? there->missing() : device == DEVICE_SIMT ? "no-C++-compiler" : "no-nvcc";
}
