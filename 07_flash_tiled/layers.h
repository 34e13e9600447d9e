/* ./run layers: attention with the T x TK matrix and without it, over many layers. */
#ifndef LAYERS_H
#define LAYERS_H

/* Gets the words after "layers"; prints; returns the exit code. */
int run_layers(int argc, char **argv);

#endif
