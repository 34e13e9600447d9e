/* HOST_DEVICE stands before a function that a GPU's kernels call too: a rule of the book stands once. */
#ifndef COMMON_HOST_DEVICE_H
#define COMMON_HOST_DEVICE_H

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

#endif
