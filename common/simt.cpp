/* Jumps from one stack to another are what longjmp's own check would stop. */
#undef _FORTIFY_SOURCE

#include "simt.h"
#include "error.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>
#ifdef SIMT_ONE_BY_ONE
#include <sanitizer/common_interface_defs.h>
#endif

__thread SimtThread simt_thread;

static const unsigned WARP = 32, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP, GIVEN = 32;
#ifdef SIMT_ONE_BY_ONE
enum { STACK = 1 << 18 }; /* AddressSanitizer puts space between variables */
#else
enum { STACK = 1 << 16 };
#endif

/* ---- Fibres. A context, which asks the system, starts one; a jump goes on with it. The compiler's own jump, where it has one,
 * saves three registers; the library's is several times as slow, and clears AddressSanitizer's memory of the stack. ---- */

#ifdef __x86_64__
typedef void *Jump[5];
#define SAVE_PLACE(jump) __builtin_setjmp(jump)
#define GO_TO_PLACE(jump) __builtin_longjmp(jump, 1)
#else
typedef jmp_buf Jump;
#define SAVE_PLACE(jump) _setjmp(jump)
#define GO_TO_PLACE(jump) _longjmp(jump, 1)
#endif
#define UNWATCHED __attribute__((noinline, no_sanitize_address))

struct Stack {
    Jump place; /* to go on from */
    char *bottom;
    size_t size;
    void *followed; /* AddressSanitizer's own notes on it */
};

/* Not in go(): a function that is jumped back into must not jump. */
UNWATCHED static void leave(Stack *to, const ucontext_t *first)
{
    if (first)
        setcontext(first);
    GO_TO_PLACE(to->place);
}

/* Goes on with `to`, or with `first` if it has not run yet; returns when somebody goes on with `from`. */
UNWATCHED static void go(Stack *from, Stack *to, const ucontext_t *first)
{
#ifdef SIMT_ONE_BY_ONE
    __sanitizer_start_switch_fiber(&from->followed, to->bottom, to->size);
#endif
    if (SAVE_PLACE(from->place) == 0)
        leave(to, first);
#ifdef SIMT_ONE_BY_ONE
    __sanitizer_finish_switch_fiber(from->followed, nullptr, nullptr);
#endif
}

/* ---- A block, on one processor thread ---- */

enum State { RUNS, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    void *to;
    const void *from;
    size_t bytes;
    unsigned group;
};

struct Fibre {
    Stack stack;
    State state;
    SimtPlace place; /* where it waits */
    uint3 index;
    alignas(16) char given[2][GIVEN]; /* to the other lanes, in the last exchange and the one before */
    unsigned exchanges;
    Copy *copies; /* under way */
    unsigned copy_count, copy_room, groups;
};

struct Block {
    Stack scheduler;
    Fibre fibre[MOST_THREADS];
    unsigned threads, running;
    uint64_t random;
    const char *kernel;
    char *shared;
    void (*body)(const void *);
    const void *context;
};
static thread_local Block *block;

void *simt_shared()
{
    return block->shared;
}

/* xorshift64*: a number below n. */
static unsigned draw(unsigned n)
{
    uint64_t x = block->random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    block->random = x;
    return (unsigned)((x * 0x2545F4914F6CDD1D >> 32) * n >> 32);
}

/* A fibre gives way to the scheduler, in this state. */
static void give_way(State state, SimtPlace place)
{
    Fibre *me = &block->fibre[block->running];
    me->state = state;
    me->place = place;
    go(&me->stack, &block->scheduler, nullptr);
}

void simt_wait_for_warp(SimtPlace place)
{
    give_way(AT_WARP, place);
}

void simt_wait_for_block(SimtPlace place)
{
    give_way(AT_BLOCK, place);
}

/* A lane overwrites what it gave two exchanges later, and by then all have been at the barrier in between. */
void simt_give(const void *value, size_t bytes, SimtPlace place)
{
    Fibre *me = &block->fibre[block->running];
    memcpy(me->given[++me->exchanges % 2], value, bytes);
    simt_wait_for_warp(place);
}

/* Another lane may have gone on to its next exchange: this lane's count says which of the two to read. */
const void *simt_given(unsigned from)
{
    unsigned thread = block->running / WARP * WARP + from;
    unsigned which = block->fibre[block->running].exchanges % 2;
    return thread < block->threads ? block->fibre[thread].given[which] : nullptr;
}

void simt_start_copy(void *to, const void *from, size_t bytes)
{
    Fibre *me = &block->fibre[block->running];
    if (me->copy_count == me->copy_room) {
        me->copy_room = 2 * me->copy_room + 16;
        me->copies = (Copy *)realloc(me->copies, me->copy_room * sizeof *me->copies);
        if (!me->copies)
            die(EXIT_UNAVAILABLE, "no room for a block's threads");
    }
    memset(to, 0xFF, bytes);
    me->copies[me->copy_count++] = {to, from, bytes, me->groups};
}

void simt_close_group()
{
    block->fibre[block->running].groups++;
}

void simt_wait_for_groups(unsigned newest)
{
    Fibre *me = &block->fibre[block->running];
    unsigned left = 0;
    for (unsigned i = 0; i < me->copy_count; i++) {
        const Copy *copy = &me->copies[i];
        if (copy->group + newest >= me->groups)
            me->copies[left++] = *copy;
        else if (copy->from)
            memcpy(copy->to, copy->from, copy->bytes);
        else
            memset(copy->to, 0, copy->bytes);
    }
    me->copy_count = left;
}

static void expect_no_copies()
{
    const Fibre *me = &block->fibre[block->running];
    const uint3 *at = &simt_thread.block;
    if (me->copy_count == 0)
        return;
#pragma omp critical(simt)
    die(EXIT_CHECK_FAILED, "%s, block (%u,%u,%u): thread %u ends with %u copies under way; it lacks a wait",
        block->kernel, at->x, at->y, at->z, block->running, me->copy_count);
}

/* A fibre's whole life: the body for one block after another. */
static void live()
{
#ifdef SIMT_ONE_BY_ONE
    Stack *scheduler = &block->scheduler;
    __sanitizer_finish_switch_fiber(nullptr, (const void **)&scheduler->bottom, &scheduler->size);
#endif
    for (;;) {
        block->body(block->context);
        expect_no_copies();
        give_way(DONE, {"its end", "", 0});
    }
}

static void resume(unsigned thread)
{
    Fibre *fibre = &block->fibre[thread];
    block->running = thread;
    simt_thread.thread = fibre->index;
    simt_thread.lane = thread % WARP;
    if (fibre->stack.bottom) {
        go(&block->scheduler, &fibre->stack, nullptr);
        return;
    }
    ucontext_t first;
    fibre->stack.bottom = (char *)malloc(STACK);
    fibre->stack.size = STACK;
    if (!fibre->stack.bottom)
        die(EXIT_UNAVAILABLE, "no room for a block's threads");
    getcontext(&first);
    first.uc_stack.ss_sp = fibre->stack.bottom;
    first.uc_stack.ss_size = STACK;
    first.uc_link = nullptr;
    makecontext(&first, live, 0);
    go(&block->scheduler, &fibre->stack, &first);
}

/* ---- Whose turn it is ---- */

/* Two threads that should wait together: do they wait at the same place? */
static void expect_together(unsigned one, unsigned other)
{
    const Fibre *a = &block->fibre[one], *b = &block->fibre[other];
    bool same_file = a->place.file == b->place.file || strcmp(a->place.file, b->place.file) == 0;
    bool same_call = a->place.what == b->place.what || strcmp(a->place.what, b->place.what) == 0;
    if (a->state == b->state && a->place.line == b->place.line && same_file && same_call)
        return;
    const uint3 *at = &simt_thread.block;
#pragma omp critical(simt)
    die(EXIT_CHECK_FAILED,
        "%s, block (%u,%u,%u): thread %u has come to %s (%s:%d), thread %u of the same %s to %s (%s:%d)",
        block->kernel, at->x, at->y, at->z, one, a->place.what, a->place.file, a->place.line, other,
        one / WARP == other / WARP ? "warp" : "block", b->place.what, b->place.file, b->place.line);
}

/* All lanes of a warp, until each waits; returns for what. Their order is a random start and direction. */
static State run_warp(unsigned warp)
{
    unsigned first = warp * WARP, count = block->threads - first < WARP ? block->threads - first : WARP;
    unsigned start = draw(count), step = draw(2) ? 1 : count - 1;
    for (unsigned i = 0; i < count; i++)
        resume(first + (start + i * step) % count);
    for (unsigned i = 1; i < count; i++)
        expect_together(first, first + i);
    return block->fibre[first].state;
}

/* One warp after another, drawn at random, each to its next barrier; when all wait for the block, or are done, together. */
static void run_block()
{
    unsigned warps = (block->threads + WARP - 1) / WARP, ready[MOST_WARPS];
    for (unsigned i = 0; i < block->threads; i++)
        block->fibre[i].exchanges = block->fibre[i].groups = 0;
    do {
        unsigned count = warps;
        for (unsigned i = 0; i < warps; i++)
            ready[i] = i;
        while (count > 0) {
            unsigned which = draw(count);
            if (run_warp(ready[which]) != AT_WARP)
                ready[which] = ready[--count];
        }
        for (unsigned warp = 1; warp < warps; warp++)
            expect_together(0, warp * WARP);
    } while (block->fibre[0].state != DONE);
}

/* ---- A launch ---- */

static uint64_t seed;

void simt_set_seed(uint64_t new_seed)
{
    seed = new_seed + 1;
}

static void open_block(const char *kernel, dim3 size, size_t shared_bytes, void (*body)(const void *),
                       const void *context)
{
    if (!block)
        block = (Block *)calloc(1, sizeof(Block));
    char *shared = (char *)malloc(shared_bytes ? shared_bytes : 1);
    if (!block || !shared)
        die(EXIT_UNAVAILABLE, "no room for a block's threads");
    block->threads = size.x * size.y * size.z;
    block->kernel = kernel;
    block->shared = shared;
    block->body = body;
    block->context = context;
    for (unsigned i = 0; i < block->threads; i++)
        block->fibre[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    simt_thread.block_size = size;
}

void simt_run(const char *kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(const void *),
              const void *context)
{
    size_t threads = (size_t)size.x * size.y * size.z, blocks = (size_t)grid.x * grid.y * grid.z;
    if (threads < 1 || threads > MOST_THREADS || shared_bytes > 232448 || blocks < 1 || grid.y > 65535 ||
        grid.z > 65535)
        die(EXIT_UNAVAILABLE,
            "%s: a block takes 1 to %u threads and 227 KiB, not %zu threads and %zu bytes; a grid 1 to "
            "65535 blocks along y and z, not %u and %u",
            kernel, MOST_THREADS, threads, shared_bytes, grid.y, grid.z);
    if (!seed)
        simt_set_seed(getenv("SIMT_SEED") ? strtoull(getenv("SIMT_SEED"), nullptr, 10) : 0);

    /* A small launch is not worth the start of another processor's threads. */
    [[maybe_unused]] bool side_by_side = blocks * threads >= 1 << 15;
#ifndef SIMT_ONE_BY_ONE
#pragma omp parallel if (side_by_side)
#endif
    {
        open_block(kernel, size, shared_bytes, body, context);
        simt_thread.grid_size = grid;
#ifndef SIMT_ONE_BY_ONE
#pragma omp for schedule(dynamic)
#endif
        for (size_t i = 0; i < blocks; i++) {
            simt_thread.block = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                                 (unsigned)(i / grid.x / grid.y)};
            block->random = (seed + i) * 0x9E3779B97F4A7C15 | 1;
            memset(block->shared, 0xFF, shared_bytes);
            run_block();
        }
        free(block->shared);
    }
}
