/* Decoding against a KV cache: is it right, and what does it save? */
#ifndef DECODE_H
#define DECODE_H

/* Decodes 70 tokens one by one with a growing cache, for multi-head, grouped and multi-query attention. NULL
 * if each gives the row of out that the whole causal call gives; else what is off (a static buffer). */
const char *decode_equals_causal(void);

/* ./run decode [--tsv FILE]: milliseconds for one more token after 64 .. 32768 with the cache, to 4096 also with the
 * whole causal call anew. Returns the exit code. */
int run_decode(int argc, char **argv);

#endif
