/* The command line as a reader meets it: the built programs are run, with right words and with wrong ones. A
 * wrong one must end with the exit code it should, say one line on stderr that begins with "error: " and
 * holds what it should, and leave no file behind. */
#include "npy.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SELF "01_self_attention"
#define CAUSAL "02_causal_attention"
#define WRAPPER "03_multihead_wrapper"
#define PACKED "04_packed_qkv"
#define EINSUM "05_einsum_style"
#define ONLINE "06_online_softmax"
#define FLASH "07_flash_tiled"
#define GQA "08_gqa"
#define SPARSE "09_block_sparse"

typedef struct {
    const char *chapter, *words;
    int exit_code;
    const char *says; /* part of the error's line */
} BadLine;

static const BadLine bad[] = {
    /* words */
    {FLASH, "--no-such-option", 2, "--no-such-option"},
    {FLASH, "stray", 2, "stray"},
    {FLASH, "--tokens", 2, "--tokens needs a value"},
    {FLASH, "--causal=yes", 2, "--causal=yes"},
    {FLASH, "-z", 2, "-z"},
    {FLASH, "--kernel fast", 2, "it has materialised"},
    {FLASH, "--kernel ''", 2, "no kernel \"\""},
    {FLASH, "--device gpu", 2, "one of cpu, simt, cuda, auto"},
    {FLASH, "--pass sideways", 2, "one of forward, backward, both"},
    {FLASH, "--dtype f64", 2, "one of f32, bf16"},
    {FLASH, "--rng mt", 2, "one of cpu, cuda"},
    {FLASH, "--rng cuda:0x5", 2, "two sizes"},
    {FLASH, "--rng cuda:100x10", 2, "108x2048"},
    /* numbers */
    {FLASH, "--tokens 0", 2, "from 1"},
    {FLASH, "--tokens -5", 2, "from 1"},
    {FLASH, "--tokens 12abc", 2, "12abc"},
    {FLASH, "--tokens 99999999999999999999", 2, "whole number"},
    {FLASH, "--tokens ''", 2, "whole number"},
    {FLASH, "--heads 1.5", 2, "1.5"},
    {FLASH, "--scale wide", 2, "wide"},
    {FLASH, "--scale nan", 2, "nan"},
    {FLASH, "--scale inf", 2, "inf"},
    {FLASH, "--dropout 1", 2, "0 <= P < 1"},
    {FLASH, "--dropout -0.1", 2, "0 <= P < 1"},
    {FLASH, "--dropout nan", 2, "0 <= P < 1"},
    {FLASH, "--seed -1", 2, "--seed"},
    {FLASH, "--seed 18446744073709551616", 2, "--seed"},
    {FLASH, "--threads 0", 2, "--threads"},
    {FLASH, "--tile 64", 2, "64x32"},
    {FLASH, "--tile 0x4", 2, "64x32"},
    {FLASH, "--tile 4x4x4", 2, "64x32"},
    {SPARSE, "--block 0", 2, "--block"},
    {FLASH, "--repeat 3", 2, "goes with --bench"},
    {FLASH, "--tsv x.tsv", 2, "goes with --bench"},
    {FLASH, "--dout randn", 2, "--pass backward"},
    {FLASH, "--check --bench", 2, "--check"},
    /* sizes that contradict each other */
    {FLASH, "--heads 5 --embed 768", 2, "--heads 5 does not divide --embed 768"},
    {PACKED, "--heads 5 --embed 768", 2, "--heads 5 does not divide --embed 768"},
    {PACKED, "--heads 3 --head-size 4 --embed-out 13", 2, "--embed-out says 13"},
    {GQA, "--heads 8 --kv-heads 3", 2, "--kv-heads 3 does not divide --heads 8"},
    {GQA, "--heads 4 --kv-heads 8", 2, "--kv-heads 8"},
    {FLASH, "--batch 2 --lengths 5,6,7", 2, "--batch says 2"},
    {FLASH, "--tokens 9 --lengths 10", 2, "10"},
    {FLASH, "--lengths 5,,6", 2, "--lengths"},
    {FLASH, "--lengths -1", 2, "--lengths"},
    {FLASH, "--lengths 4x", 2, "--lengths"},
    {FLASH, "--tokens 9 --mask documents:4,4", 2, "--mask documents says 8"},
    {FLASH, "--mask documents:4,0", 2, "documents"},
    {FLASH, "--mask windows:4", 2, "windows"},
    {FLASH, "--mask window", 2, "window"},
    {FLASH, "--mask window:0", 2, "window"},
    {FLASH, "--mask window:5:6", 2, "window"},
    {FLASH, "--mask dilated:5", 2, "dilated"},
    {FLASH, "--mask prefix:999999999999", 2, "prefix"},
    {FLASH, "--batch 1000000000 --heads 1000000000 --tokens 1000000000", 2, "it must be 1 to 16777216"},
    {PACKED, "--batch 100000 --tokens 100000 --embed 12", 2,
     "--batch 100000 times --tokens 100000 is more than"},
    /* what a kernel cannot do */
    {FLASH, "--kernel tiled --heads 4 --kv-heads 2 --head-size 8", 2,
     "kernel tiled takes as many --kv-heads as --heads"},
    {SELF, "--kernel v1 --heads 3", 2, "kernel v1"},
    {PACKED, "--kernel torch-mha --embed 6 --embed-out 12 --heads 3", 2, "kernel torch-mha"},
    {PACKED, "--kernel packed-qkv --bias randn", 2, "takes no --bias"},
    {PACKED, "--kernel packed-qkv --mask window:3", 2, "own mask"},
    {PACKED, "--kernel packed-qkv --lengths 3", 2, "--lengths"},
    {PACKED, "--kernel packed-qkv --scale 2", 2, "--scale"},
    {PACKED, "--kernel packed-qkv --tokens 5 --key-tokens 6", 2, "--key-tokens"},
    {ONLINE, "--kernel online --x x.npy", 2, "not --x"},
    {PACKED, "--kernel packed-qkv --q q.npy", 2, "takes --x"},
    {FLASH, "--kernel tiled --dtype bf16", 2, "takes --dtype f32"},
    {ONLINE, "--dtype bf16", 2, "f32"},
    {FLASH, "--kernel simd --dtype bf16 --pass both --heads 1 --tokens 3 --bias randn", 2, "takes no --bias"},
    {FLASH, "--kernel tiled --heads 1 --tokens 3 --pass both --dout x.npy", 2,
     "--dout has shape (1, 10, 12)"},
    {PACKED, "--pass backward --dout nan.npy", 1, "NaN"},
    {FLASH, "--kernel simd --tile 4x4", 2, "no --tile"},
    {SPARSE, "--kernel dense-mask --block 4", 2, "no --block"},
    {CAUSAL, "--kernel causal --dropout 0.5 --rng cuda", 2, "CPU stream"},
    /* devices and memory */
    {FLASH, "--device cuda", 3, "--device cpu"},
#ifdef HAVE_SIMT
    {FLASH, "claims --device tpu", 2, "--device simt|cuda"},
    {FLASH, "claims --tsv", 2, "--tsv FILE"},
    {FLASH, "claims --device cuda", 3, "leave it out"},
    {FLASH, "--device simt --kernel mma", 2, "kernel mma takes --dtype bf16, not f32"},
    {FLASH, "--device simt --kernel tiled --dtype bf16", 2, "kernel tiled takes --dtype f32, not bf16"},
    {FLASH, "--device simt --kernel mma --dtype bf16 --head-size 5", 2,
     "kernel mma takes --head-size 8, 16 .. 256, not 5"},
    {FLASH, "--device simt --kernel pipelined --dtype bf16 --heads 1 --tokens 9 --head-size 264", 2,
     "kernel pipelined takes --head-size 8, 16 .. 256, not 264"},
    {FLASH, "--device simt --kernel pipelined --dtype bf16 --pass both --heads 1 --tokens 9 --head-size 136",
     2, "kernel pipelined has a backward for --head-size 8, 16 .. 128 only"},
    {FLASH, "--device simt --kernel simd", 2, "for --device simt; it has tiled"},
#else
    {FLASH, "--device simt", 3, "no-C++-compiler"},
#endif
    {FLASH, "--kernel materialised --batch 32 --heads 32 --tokens 8192 --head-size 224", 3,
     "kernel materialised needs"},
    {FLASH, "--kernel tiled --batch 100000 --heads 100 --tokens 8192 --head-size 64", 3,
     "kernel tiled needs"},
    /* files */
    {FLASH, "--q absent.npy", 2, "absent.npy"},
    {FLASH, "--q .", 2, "--q"},
    {FLASH, "--q empty.npy", 2, "empty.npy"},
    {FLASH, "--q text.npy", 2, "text.npy"},
    {FLASH, "--q truncated.npy", 2, "truncated.npy"},
    {FLASH, "--q fortran.npy", 2, "fortran.npy"},
    {FLASH, "--q int.npy", 2, "int.npy"},
    {FLASH, "--q huge.npy", 2, "huge.npy"},
    {FLASH, "--q x.npy", 2, "(B,NH,T,HS)"},
    {FLASH, "--q q.npy --heads 5", 2, "--q says 2, but --heads says 5"},
    {FLASH, "--q q.npy --k k.npy --tokens 4", 2, "--tokens says 4"},
    {FLASH, "--q q.npy --v x.npy", 2, "--v"},
    {FLASH, "--q q.npy --bias x.npy", 2, "does not broadcast"},
    {FLASH, "--q nan.npy", 1, "1 of 30 numbers are NaN, the first at index 7"},
    {FLASH, "--bias nan.npy", 1, "NaN"},
    {PACKED, "--x q.npy", 2, "--x"},
    {PACKED, "--x nan.npy", 1, "NaN"},
    /* places that cannot be written */
    {FLASH, "--heads 1 --tokens 2 --save q.npy", 2, "--save"},
    {FLASH, "--heads 1 --tokens 2 --save /proc/no/such", 2, "--save"},
    {FLASH, "--heads 1 --tokens 2 --bench --tsv text.npy", 2, "text.npy"},
    {FLASH, "--heads 1 --tokens 2 --bench --tsv /proc/no/such.tsv", 2, "--tsv"},
    {FLASH, "--heads 1 --tokens 2 --bench --tsv .", 2, "--tsv"},
    /* every chapter answers alike */
    {SELF, "--nonsense", 2, "--nonsense"},
    {CAUSAL, "--tokens x", 2, "--tokens"},
    {WRAPPER, "--heads 7 --embed 12", 2, "--heads 7 does not divide --embed 12"},
    {EINSUM, "--x absent.npy", 2, "absent.npy"},
    {ONLINE, "--kernel nothing", 2, "chapter 6 has no kernel"},
    {SPARSE, "--mask nothing", 2, "nothing"},
};
enum { BAD = sizeof bad / sizeof bad[0] };

static char root[4096], folder[] = "/tmp/command-line-XXXXXX";

static void write_bytes(const char *name, const char *bytes, size_t length)
{
    FILE *file = fopen(name, "wb");
    cr_assert(file && fwrite(bytes, 1, length, file) == length && fclose(file) == 0);
}

static void write_header(const char *name, const char *dictionary, size_t floats)
{
    char bytes[512] = "\x93NUMPY\x01\x00\x76\x00";
    memset(bytes + 10, ' ', 118);
    memcpy(bytes + 10, dictionary, strlen(dictionary));
    bytes[127] = '\n';
    write_bytes(name, bytes, 128 + 4 * floats);
}

/* A folder of its own, with good files and bad ones; the working directory from then on. */
static void enter_folder(void)
{
    setenv("CUDA_VISIBLE_DEVICES", "", 1); /* no device, whatever machine this is */
    cr_assert(getcwd(root, sizeof root) && mkdtemp(folder) && chdir(folder) == 0);
    float numbers[120];
    for (int i = 0; i < 120; i++)
        numbers[i] = sinf((float)i);
    cr_assert_null(write_npy("q.npy", numbers, (const size_t[]){1, 2, 3, 5}, 4));
    cr_assert_null(write_npy("k.npy", numbers, (const size_t[]){1, 2, 4, 5}, 4));
    cr_assert_null(write_npy("x.npy", numbers, (const size_t[]){1, 10, 12}, 3));
    cr_assert_null(write_npy("bias.npy", numbers, (const size_t[]){3, 4}, 2));
    numbers[7] = NAN;
    cr_assert_null(write_npy("nan.npy", numbers, (const size_t[]){1, 1, 6, 5}, 4));
    write_bytes("empty.npy", "", 0);
    write_bytes("text.npy", "these are no numbers\n", 21);
    write_header("truncated.npy", "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 30, 5), }", 20);
    write_header("fortran.npy", "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1, 2, 3), }", 6);
    write_header("int.npy", "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1, 2, 3), }", 6);
    write_header("huge.npy",
                 "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4, 4), }", 6);
}

static void leave_folder(void)
{
    char command[4200];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    cr_assert(chdir(root) == 0 && system(command) == 0);
}

static int run(const char *chapter, const char *words)
{
    char command[8500];
    const char *build = getenv("BUILD");
    build = build && *build ? build : "build";
    snprintf(command, sizeof command, "'%s%s%s/%s/run' %s >stdout.txt 2>stderr.txt",
             *build == '/' ? "" : root, *build == '/' ? "" : "/", build, chapter, words);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void read_text(const char *name, char *text, size_t size)
{
    FILE *file = fopen(name, "r");
    cr_assert(file);
    text[fread(text, 1, size - 1, file)] = '\0';
    fclose(file);
}

static int files_in_folder(void)
{
    FILE *pipe = popen("find . -type f | wc -l", "r");
    int count = -1;
    cr_assert(pipe && fscanf(pipe, "%d", &count) == 1);
    pclose(pipe);
    return count;
}

ParameterizedTestParameters(command_line, bad_words)
{
    int *numbers = cr_malloc(BAD * sizeof *numbers);
    for (int i = 0; i < BAD; i++)
        numbers[i] = i;
    return cr_make_param_array(int, numbers, BAD);
}

ParameterizedTest(int *i, command_line, bad_words, .init = enter_folder, .fini = leave_folder)
{
    const BadLine *line = &bad[*i];
    char text[4096];
    int before = files_in_folder();
    int exit_code = run(line->chapter, line->words);
    read_text("stderr.txt", text, sizeof text);
    cr_expect(exit_code == line->exit_code, "%s %s: exit %d, not %d: %s", line->chapter, line->words,
              exit_code, line->exit_code, text);
    cr_expect(strncmp(text, "error: ", 7) == 0 && strchr(text, '\n') == text + strlen(text) - 1,
              "%s %s: not one line of error: \"%s\"", line->chapter, line->words, text);
    cr_expect(strstr(text, line->says), "%s %s: \"%s\" is not in: %s", line->chapter, line->words, line->says,
              text);
    cr_expect(files_in_folder() == before + 2, "%s %s left a file behind", line->chapter, line->words);
}

TestSuite(command_line_good, .init = enter_folder, .fini = leave_folder);

Test(command_line_good, files_in_files_out)
{
    char text[4096];
    NpyArray out, lse;
    int exit_code =
        run(FLASH, "--q q.npy --k k.npy --v k.npy --bias bias.npy --causal --save deep/er --kernel tiled");
    read_text("stderr.txt", text, sizeof text);
    cr_assert(exit_code == 0, "%s", text);
    cr_assert_null(read_npy(&out, "deep/er/out.npy"));
    cr_assert_null(read_npy(&lse, "deep/er/lse.npy"));
    cr_expect(out.axes == 4 && out.size[1] == 2 && out.size[2] == 3 && out.size[3] == 5);
    cr_expect(lse.axes == 3 && lse.size[2] == 3);
}

Test(command_line_good, several_kernels_save_into_folders_of_their_own)
{
    cr_assert(run(FLASH, "--q q.npy --k k.npy --v k.npy --save saved") == 0);
    NpyArray a, b;
    cr_assert_null(read_npy(&a, "saved/tiled/out.npy"));
    cr_assert_null(read_npy(&b, "saved/simd/out.npy"));
    for (size_t i = 0; i < a.count; i++)
        cr_expect(fabsf(a.data[i] - b.data[i]) < 1e-5f);
    cr_assert_null(read_npy(&a, "saved/materialised/weights.npy"));
    cr_expect(a.axes == 4 && a.size[2] == 3 && a.size[3] == 4);
}

Test(command_line_good, module_reads_x_of_two_axes)
{
    float numbers[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    cr_assert_null(write_npy("two.npy", numbers, (const size_t[]){3, 4}, 2));
    cr_assert(run(PACKED, "--x two.npy --heads 2 --kernel packed-qkv --save saved") == 0);
    NpyArray out;
    cr_assert_null(read_npy(&out, "saved/out.npy"));
    cr_expect(out.axes == 3 && out.size[0] == 1 && out.size[1] == 3 && out.size[2] == 4);
}

Test(command_line_good, gradients_are_saved)
{
    cr_assert(
        run(FLASH, "--q q.npy --k k.npy --v k.npy --bias bias.npy --kernel tiled --pass both --save saved") ==
        0);
    NpyArray dk, dbias;
    cr_assert_null(read_npy(&dk, "saved/dk.npy"));
    cr_assert_null(read_npy(&dbias, "saved/dbias.npy"));
    cr_expect(dk.axes == 4 && dk.size[2] == 4);
    cr_expect(dbias.axes == 2 && dbias.size[0] == 3 && dbias.size[1] == 4, "as the bias was");
    cr_assert(run(WRAPPER, "--kernel stacked --pass backward --dout randn --save module") == 0);
    cr_assert_null(read_npy(&dk, "module/d_heads.1.W_key.weight.npy"));
    cr_expect(dk.axes == 2 && dk.size[0] == 2 && dk.size[1] == 3);
    cr_assert_null(read_npy(&dk, "module/dx.npy"));
    cr_expect(dk.axes == 3 && dk.size[1] == 6 && dk.size[2] == 3);
}

Test(command_line_good, tsv_has_the_columns_and_grows)
{
    char text[16384], first[4096];
    const char *columns =
        "machine\tchapter\tkernel\tdevice\tdtype\tpass\tbatch\theads\tkv_heads\ttokens\tkey_tokens\t"
        "head_size\tembed\tembed_out\tmask\tbias\tdropout\tthreads\trepeats\tms_min\tms_median\tms_p95\t"
        "gflops\tgb_per_s\tpercent_of_peak\tpairs_kept\tpeak_mib\tmax_abs_err\tchecked\n";
    const char *words =
        "--kernel tiled --heads 2 --tokens 70 --head-size 16 --causal --bench --repeat 3 --tsv rows.tsv";
    cr_assert(run(FLASH, words) == 0);
    read_text("rows.tsv", first, sizeof first);
    cr_assert(run(FLASH, words) == 0);
    read_text("rows.tsv", text, sizeof text);
    cr_expect(strncmp(text, columns, strlen(columns)) == 0, "%s", text);
    cr_expect(strncmp(text, first, strlen(first)) == 0, "the rows that were there must stay");
    int lines = 0;
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    cr_expect(lines == 3, "a header and two rows, not %d lines", lines);
}

Test(command_line_good, list_help_and_quiet_pipes)
{
    char text[16384];
    cr_assert(run(FLASH, "--list") == 0);
    read_text("stdout.txt", text, sizeof text);
#ifdef HAVE_SIMT
    cr_expect(strstr(text, "\ntiled qkv forward,backward f32 cpu,simt,cuda(no-"));
    cr_expect(strstr(text, "\npipelined qkv forward,backward bf16 simt,cuda(no-"));
    cr_expect(strstr(text, "\nsdpa x forward,backward f32 cpu,simt,cuda(no-"));
#else
    cr_expect(strstr(text, "\ntiled qkv forward,backward f32 cpu,simt(no-C++-compiler),cuda(no-"));
#endif
    cr_expect(strstr(text, "\nsimd qkv forward,backward f32,bf16 cpu\n"));
    cr_assert(run(FLASH, "--help") == 0);
    read_text("stdout.txt", text, sizeof text);
    cr_expect(strstr(text, "--key-tokens TK") && strstr(text, "tiled"));
    cr_assert(run(FLASH, "--kernel tiled --tokens 40 --bench --repeat 2") == 0);
    read_text("stderr.txt", text, sizeof text);
    cr_expect(*text == '\0', "no progress in a pipe, but: %s", text);
}

Test(command_line_good, an_infinite_bias_forbids_and_a_seed_repeats)
{
    float bias[12];
    for (int i = 0; i < 12; i++)
        bias[i] = i % 3 ? 0.0f : -INFINITY;
    cr_assert_null(write_npy("forbid.npy", bias, (const size_t[]){3, 4}, 2));
    cr_expect(run(FLASH, "--q q.npy --k k.npy --v k.npy --bias forbid.npy") == 0);
    cr_assert(run(FLASH, "--kernel simd --tokens 50 --seed 7 --save a") == 0);
    cr_assert(run(FLASH, "--kernel simd --tokens 50 --seed 7 --threads 1 --save b") == 0);
    cr_expect(system("cmp -s a/out.npy b/out.npy") == 0, "the same seed, other threads: the same bytes");
}

Test(command_line_good, a_full_disk_is_no_success)
{
    cr_expect(run(FLASH, "--list >/dev/full 2>stderr.txt #") == 2);
}
