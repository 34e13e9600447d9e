#include "vector_math.h"
#include "vectors.h"

#include <math.h>

/* In a plain loop each comparison waits for the one before, and the compiler may not change their order. LANES maxima side by
 * side are one vector, and wait LANES times less. */
float largest_of(const float *x, int n)
{
    Vector lanes = (Vector){0} - INFINITY, next;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(&next, x + i, sizeof next);
        lanes = vector_max(next, lanes);
    }
    float largest = -INFINITY;
    for (int j = 0; j < LANES; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    for (; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
}
