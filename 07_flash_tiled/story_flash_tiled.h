/* The story of chapter 7: ./run without options. */
#ifndef STORY_FLASH_TILED_H
#define STORY_FLASH_TILED_H

#include "chapter.h"

/* The workspace of sdpa and sdpa-mask, and ATTENDED of torch-mha-noweights. */
enum { QKV, CONTEXT, SCRATCH, LSE, ATTENDED };

void tell_flash_tiled(Story *story);

#endif
