#ifndef LIST_TIMES_H
#define LIST_TIMES_H

/* ./run lists [--tsv FILE]: how much of attention's time goes into making the block lists. */
int run_list_times(int argc, char **argv);

#endif
