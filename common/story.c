#include "story.h"
#include "error.h"
#include "matmul.h"
#include "memory.h"
#include "run.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STORY_RUNS = 32, WIDTH = 100 };

struct Story {
    const Chapter *chapter;
    int threads;
    int ticks, crosses;
    struct {
        Options options;
        Run run;
        StoryRun result;
        char words[256];
    } * runs[MAX_STORY_RUNS];
    int run_count;
};

void story_heading(Story *story, const char *format, ...)
{
    (void)story;
    va_list arguments;
    va_start(arguments, format);
    printf("\n");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}

/* Characters of UTF-8: its continuation bytes do not count. */
static int columns_of(const char *text, size_t bytes)
{
    int columns = 0;
    for (size_t i = 0; i < bytes; i++)
        columns += (text[i] & 0xC0) != 0x80;
    return columns;
}

/* Prints text as it stands, lines longer than WIDTH broken at a space. */
static void print_wrapped(const char *text)
{
    int column = 0;
    while (*text) {
        size_t spaces = strspn(text, " "), length = strcspn(text + spaces, " \n");
        int columns = columns_of(text + spaces, length);
        if (column && column + (int)spaces + columns > WIDTH) {
            printf("\n");
            column = spaces = 0;
            text += strspn(text, " ");
        }
        fwrite(text, 1, spaces + length, stdout);
        column += (int)spaces + columns;
        text += spaces + length;
        if (*text == '\n') {
            printf("\n");
            column = 0;
            text++;
        }
    }
    printf("\n");
}

void story_say(Story *story, const char *format, ...)
{
    (void)story;
    char text[2000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    print_wrapped(text);
    fflush(stdout);
}

static void count_mark(Story *story, bool holds)
{
    story->ticks += holds;
    story->crosses += !holds;
}

void story_claim(Story *story, bool holds, const char *format, ...)
{
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("  %s %s\n", holds ? "✓" : "✗", text);
    count_mark(story, holds);
    fflush(stdout);
}

void story_expect(Story *story, const char *what, const float *ours, const double *published, int rows,
                  int columns)
{
    story_beside(story, what, "published", ours, published, rows, columns);
}

void story_beside(Story *story, const char *what, const char *word, const float *ours,
                  const double *their_rows, int rows, int columns)
{
    printf("  %s\n", what);
    const int a_line = columns > 6 ? 4 : columns; /* wide rows are folded */
    for (int r = 0; r < rows; r++)
        for (int from = 0; from < columns; from += a_line) {
            int to = from + a_line < columns ? from + a_line : columns;
            bool good = true;
            printf("   ");
            for (int c = from; c < to; c++) {
                float mine = ours[r * columns + c];
                double theirs = their_rows[r * columns + c];
                printf(" %7.4f", mine);
                bool same = isinf(theirs) ? (double)mine == theirs : fabs((double)mine - theirs) <= 1e-4;
                good = good && same;
            }
            printf("   %s", word);
            for (int c = from; c < to; c++)
                printf(" %7.4f", their_rows[r * columns + c]);
            printf("  %s\n", good ? "✓" : "✗");
            count_mark(story, good);
        }
    fflush(stdout);
}

void story_notebook(Story *story, const StoryRun *run, const double values[6], double norm)
{
    static const size_t places[6][3] = {{0, 0, 0},     {0, 1, 1},     {1, 511, 100},
                                        {3, 512, 383}, {5, 700, 640}, {7, 1023, 767}};
    float ours[6];
    double squares = 0;
    for (int i = 0; i < 6; i++)
        ours[i] = run->t.out[(places[i][0] * 1024 + places[i][1]) * 768 + places[i][2]];
    for (size_t i = 0; i < (size_t)8 * 1024 * 768; i++)
        squares += (double)run->t.out[i] * run->t.out[i];
    story_beside(story, "out[0,0,0] [0,1,1] [1,511,100] [3,512,383] [5,700,640] [7,1023,767]", "PyTorch's",
                 ours, values, 1, 6);
    story_claim(story, fabs(sqrt(squares) - norm) <= 1e-6 * norm, "norm %.5f, PyTorch's %.5f", sqrt(squares),
                norm);
}

const StoryRun *story_run(Story *story, const char *kernel_name, const char *words)
{
    const Kernel *kernel = kernel_named(story->chapter, kernel_name);
    if (!kernel || story->run_count == MAX_STORY_RUNS)
        die(EXIT_USAGE, "the story asks for kernel %s once too often, or there is none", kernel_name);
    int i = story->run_count++;
    story->runs[i] = allocate_zeroed(1, sizeof *story->runs[i]);
    char *argv[40] = {"run"};
    int argc = 1;
    snprintf(story->runs[i]->words, sizeof story->runs[i]->words, "%s", words);
    for (char *word = strtok(story->runs[i]->words, " "); word && argc < 39; word = strtok(NULL, " "))
        argv[argc++] = word;
    parse_options(&story->runs[i]->options, argc, argv);

    Run *run = &story->runs[i]->run;
    Refusal refusal = open_run(run, story->chapter, kernel, &story->runs[i]->options, NULL, 1);
    if (refusal.exit_code)
        die(refusal.exit_code, "kernel %s %s", kernel_name, refusal.reason);
    if (!check_run(run)) {
        char text[400];
        check_text(text, sizeof text, run);
        story_claim(story, false, "%s against the oracle: %s", kernel_name, text);
    }
    story->runs[i]->result =
        (StoryRun){run->problem.shape, run->t, &run->parameters, run->out, run->extra_bytes};
    return &story->runs[i]->result;
}

void story_time(Story *story, const char *names, const char *words)
{
    enum { MOST = 8 };
    Run *runs[MOST] = {0};
    BenchmarkRow rows[MOST];
    char list[256];
    int first = story->run_count, count = 0;
    snprintf(list, sizeof list, "%s", names);
    char *rest = list;
    for (char *name; (name = strtok_r(rest, " ", &rest)) && count < MOST; count++) {
        story_run(story, name, words);
        runs[count] = &story->runs[first + count]->run;
    }
    char problem[200];
    problem_text(problem, sizeof problem, runs[0]);
    story_heading(story, "Time: %s", problem);
    printf("%s; %s; %d thread%s\n", machine_name(), matmul_library(), story->threads,
           story->threads > 1 ? "s" : "");
    time_runs(rows, runs, count, story->chapter, 5, story->threads);
    print_row_header();
    for (int i = 0; i < count; i++)
        print_row(&rows[i]);
}

int tell_story(const Chapter *chapter, int threads)
{
    Story story = {.chapter = chapter, .threads = threads};
    printf("Chapter %d: %s\n", chapter->number, chapter->title);
    chapter->story(&story);
    for (int i = 0; i < story.run_count; i++) {
        close_run(&story.runs[i]->run);
        free_options(&story.runs[i]->options);
        free(story.runs[i]);
    }
    printf("\n%s %d of %d hold\n", story.crosses ? "✗" : "✓", story.ticks, story.ticks + story.crosses);
    return story.crosses ? EXIT_CHECK_FAILED : EXIT_PASSED;
}
