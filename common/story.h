/* Telling a chapter's story: ./run without options. What stories are made of is in chapter.h. */
#ifndef COMMON_STORY_H
#define COMMON_STORY_H

#include "chapter.h"

/* Tells it; returns the exit code: 1 if there was a cross. */
int tell_story(const Chapter *chapter, int threads);

/* Is case i of the checks about this kernel? */
bool check_names_kernel(const Chapter *chapter, int i, const char *kernel);

#endif
