/* Jumps from one stack to another are what longjmp's own check would stop. */
#undef _FORTIFY_SOURCE

#include "simt.h"
#include "error.h"

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

enum { WARP = 32, MOST_THREADS = 1024, STACK = 1 << 16 };

enum State { RUNS, AT_WARP, AT_BLOCK, DONE };

/* A place on a stack to go on from. The first time a fibre runs, its context is set up; from then on _longjmp does, which
 * is several times faster as it asks nothing of the system. AddressSanitizer follows contexts only. */
#if defined(__SANITIZE_ADDRESS__)
#define FOLLOWED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FOLLOWED 1
#endif
#endif

struct Place {
    ucontext_t context;
    jmp_buf jump;
    bool has_jump;
};

static void go(Place *from, Place *to)
{
#ifdef FOLLOWED
    swapcontext(&from->context, &to->context);
#else
    from->has_jump = true;
    if (_setjmp(from->jump) != 0)
        return;
    if (to->has_jump)
        _longjmp(to->jump, 1);
    setcontext(&to->context);
#endif
}

static struct {
    Place scheduler;
    struct {
        Place place;
        char *stack;
        State state;
        uint32_t value[2]; /* for the other lanes, the last and the one before */
        unsigned exchanges;
    } thread[MOST_THREADS];
    unsigned threads, running;
    bool backwards;
    void *shared;
    void (*body)(void *);
    void *context;
} block;

void *simt_shared()
{
    return block.shared;
}

/* A fibre gives way to the scheduler, in this state. */
static void give_way(State state)
{
    auto *me = &block.thread[block.running];
    me->state = state;
    go(&me->place, &block.scheduler);
}

void simt_wait_for_warp()
{
    give_way(AT_WARP);
}

void simt_wait_for_block()
{
    give_way(AT_BLOCK);
}

/* A lane overwrites a value two exchanges later, and by then all have been at the barrier in between. */
uint32_t simt_exchange(uint32_t value, unsigned source)
{
    unsigned from = block.running / WARP * WARP + source, slot = block.thread[block.running].exchanges++ % 2;
    block.thread[block.running].value[slot] = value;
    simt_wait_for_warp();
    return from < block.threads ? block.thread[from].value[slot] : value;
}

static void run_thread()
{
    block.body(block.context);
    give_way(DONE);
}

static void resume(unsigned i)
{
    block.running = i;
    threadIdx = dim3(i, 0, 0);
    go(&block.scheduler, &block.thread[i].place);
}

/* All threads from first to past, one direction after the other, until each waits; returns how they all wait. */
static State run_together(unsigned first, unsigned past)
{
    for (unsigned i = first; i < past; i++) {
        unsigned which = block.backwards ? past - 1 - (i - first) : i;
        if (block.thread[which].state == RUNS)
            resume(which);
    }
    block.backwards = !block.backwards;
    State state = block.thread[first].state;
    for (unsigned i = first; i < past; i++)
        if (block.thread[i].state != state)
            die(EXIT_CHECK_FAILED, "threads %u and %u of block %u do not come to the same barrier", first, i,
                blockIdx.x);
    return state;
}

/* A warp until it waits for the block, or is done. */
static State run_warp(unsigned first, unsigned past)
{
    for (;;) {
        State state = run_together(first, past);
        if (state != AT_WARP)
            return state;
        for (unsigned i = first; i < past; i++)
            block.thread[i].state = RUNS;
    }
}

static void run_block()
{
    for (unsigned i = 0; i < block.threads; i++) {
        ucontext_t *place = &block.thread[i].place.context;
        block.thread[i].place.has_jump = false;
        getcontext(place);
        place->uc_stack.ss_sp = block.thread[i].stack;
        place->uc_stack.ss_size = STACK;
        place->uc_link = nullptr;
        makecontext(place, run_thread, 0);
        block.thread[i].state = RUNS;
        block.thread[i].exchanges = 0;
    }
    for (State state = RUNS; state != DONE;) {
        for (unsigned first = 0; first < block.threads; first += WARP) {
            unsigned past = first + WARP < block.threads ? first + WARP : block.threads;
            State warp = run_warp(first, past);
            if (first > 0 && warp != state)
                die(EXIT_CHECK_FAILED, "warps 0 and %u of block %u do not come to the same barrier",
                    first / WARP, blockIdx.x);
            state = warp;
        }
        for (unsigned i = 0; i < block.threads; i++)
            if (block.thread[i].state == AT_BLOCK)
                block.thread[i].state = RUNS;
    }
}

void simt_run(dim3 grid, unsigned threads, size_t shared_bytes, void (*body)(void *), void *context)
{
    if (threads < 1 || threads > MOST_THREADS || shared_bytes > 232448)
        die(EXIT_UNAVAILABLE, "a block takes 1 to %d threads and 227 KiB, not %u threads and %zu bytes",
            MOST_THREADS, threads, shared_bytes);
    block.threads = threads;
    block.body = body;
    block.context = context;
    block.backwards = false;
    block.shared = malloc(shared_bytes + 1);
    for (unsigned i = 0; i < threads; i++) {
        if (!block.thread[i].stack)
            block.thread[i].stack = (char *)malloc(STACK);
        if (!block.shared || !block.thread[i].stack)
            die(EXIT_UNAVAILABLE, "no room for a block's threads");
    }
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                memset(block.shared, 0xFF, shared_bytes);
                run_block();
            }
    free(block.shared);
    block.shared = nullptr;
}
