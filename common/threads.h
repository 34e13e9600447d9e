/* OpenMP's functions; where there is no OpenMP, what they come to with one thread. */
#ifndef COMMON_THREADS_H
#define COMMON_THREADS_H

#ifdef _OPENMP
#include <omp.h>
#else
static inline void omp_set_num_threads(int threads)
{
    (void)threads;
}
static inline int omp_get_max_threads(void)
{
    return 1;
}
static inline int omp_get_thread_num(void)
{
    return 0;
}
#endif

#endif
