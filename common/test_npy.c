/* .npy files: what NumPy writes, what we write, and what nobody should. */
#include "npy.h"

#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static uint8_t bytes[4096];
static size_t length;
static NpyArray array;

/* A file in bytes[]: magic, version, the header as given, and data_bytes of a pattern. */
static void make_file(int major, const char *header, size_t data_bytes)
{
    size_t header_bytes = strlen(header);
    memcpy(bytes, "\x93NUMPY", 6);
    bytes[6] = (uint8_t)major, bytes[7] = 0;
    bytes[8] = (uint8_t)header_bytes, bytes[9] = (uint8_t)(header_bytes >> 8);
    length = 10;
    if (major > 1)
        bytes[10] = bytes[11] = 0, length = 12;
    memcpy(bytes + length, header, header_bytes);
    length += header_bytes;
    for (size_t i = 0; i < data_bytes; i++)
        bytes[length + i] = (uint8_t)(i * 37);
    length += data_bytes;
}

/* From memory of exactly that size, so that the sanitizer sees a read past its end. */
static const char *parse(void)
{
    uint8_t *exact = malloc(length ? length : 1);
    memcpy(exact, bytes, length);
    memset(&array, 0xFF, sizeof array);
    const char *problem = parse_npy(&array, exact, length);
    free(exact);
    return problem;
}

static void expect_message(const char *problem, const char *fragment, const char *what)
{
    cr_assert_not_null(problem, "accepted: %s", what);
    cr_assert_null(array.data);
    cr_assert_not_null(strstr(problem, fragment), "%s: \"%s\" does not say \"%s\"", what, problem, fragment);
    for (const char *c = problem; *c; c++)
        cr_assert((unsigned char)*c >= ' ' && *c != 127, "control character in \"%s\"", problem);
}

/* ---- what is right ---- */

Test(npy, reads_any_spelling_of_the_header)
{
    const char *const headers[] = {
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }        \n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}\n",
        "{\"descr\": \"<f4\", \"fortran_order\": False, \"shape\": (2, 3), }\n",
        "{'descr':'<f4','fortran_order':False,'shape':(2,3)}\n",
        "  { 'descr' : '<f4' , 'fortran_order' : False , 'shape' : ( 2 , 3 , ) , }  \r\n\t\n",
    };
    for (int major = 1; major <= 3; major++)
        for (size_t i = 0; i < COUNT(headers); i++) {
            make_file(major, headers[i], 24);
            const char *problem = parse();
            cr_assert_null(problem, "%s: %s", headers[i], problem);
            cr_assert_eq(array.axes, 2);
            cr_assert(array.size[0] == 2 && array.size[1] == 3 && array.count == 6);
            cr_assert_arr_eq(array.data, bytes + length - 24, 24);
            free(array.data);
        }
}

Test(npy, reads_doubles_rounded_to_float)
{
    const double numbers[] = {0.1, -1e-50, INFINITY, -INFINITY, NAN, 1e300};
    make_file(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (6,), }", 48);
    memcpy(bytes + length - 48, numbers, 48);
    cr_assert_null(parse());
    cr_assert_eq(array.axes, 1);
    cr_assert_eq(array.data[0], 0.1f);
    cr_assert_eq(array.data[1], 0);
    cr_assert_eq(array.data[2], INFINITY);
    cr_assert_eq(array.data[3], -INFINITY);
    cr_assert(isnan(array.data[4]));
    cr_assert_eq(array.data[5], INFINITY);
    free(array.data);
}

/* io.BytesIO(); np.save(b, np.float32([[1.5, -2], [0.25, 3]])); b.getvalue() (NumPy 2) */
Test(npy, reads_what_numpy_wrote)
{
    const char head[] = "\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }";
    const float data[] = {1.5f, -2, 0.25f, 3};
    memset(bytes, ' ', 128);
    memcpy(bytes, head, sizeof head - 1);
    bytes[127] = '\n';
    memcpy(bytes + 128, data, 16);
    length = 144;
    cr_assert_null(parse());
    cr_assert(array.axes == 2 && array.size[0] == 2 && array.size[1] == 2);
    cr_assert_arr_eq(array.data, data, 16);
    free(array.data);
}

Test(npy, reads_a_long_header)
{
    static char header[3001];
    memset(header, ' ', 3000);
    memcpy(header, "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1)}", 63);
    for (int major = 1; major <= 3; major++) {
        make_file(major, header, 4);
        cr_assert_null(parse());
        cr_assert(array.axes == 4 && array.count == 1);
        free(array.data);
    }
}

/* ---- what is wrong ---- */

#define HEAD "{'descr': '<f4', 'fortran_order': False, 'shape': "

Test(npy, refuses_hostile_headers)
{
    const struct {
        const char *header, *fragment;
    } hostile[] = {
        /* not a dict */
        {"", "not a dict"},
        {"\n", "not a dict"},
        {"hello", "not a dict"},
        {"{", "not a dict"},
        {"{'", "not a dict"},
        {"{'descr", "not a dict"},
        {"{'descr\"", "not a dict"},
        {"{'descr'", "not a dict"},
        {"{'descr' '<f4'}", "not a dict"},
        {"{descr: '<f4'}", "not a dict"},
        {"{,}", "not a dict"},
        {"{'descr': '<f4',, 'fortran_order': False, 'shape': (3,)}", "not a dict"},
        {"{'descr': '<f4' 'fortran_order': False, 'shape': (3,)}", "not a dict"},
        {HEAD "(3,)", "not a dict"},
        {HEAD "(3,),", "not a dict"},
        {"['descr', '<f4']", "not a dict"},
        {"\xEF\xBB\xBF" HEAD "(3,)}", "not a dict"},
        {HEAD "(3,)} {", "follows"},
        {HEAD "(3,)}\n__import__('os')", "follows"},
        /* keys */
        {"{}", "lacks the key 'descr'"},
        {"{'descr': '<f4', 'shape': (3,)}", "lacks the key 'fortran_order'"},
        {"{'descr': '<f4', 'fortran_order': False}", "lacks the key 'shape'"},
        {"{'fortran_order': False, 'shape': (3,)}", "lacks the key 'descr'"},
        {HEAD "(3,), 'descr': '<f4'}", "'descr' twice"},
        {HEAD "(3,), 'shape': (3,)}", "'shape' twice"},
        {HEAD "(3,), 'order': 'C'}", "key 'order'"},
        {"{'DESCR': '<f4', 'fortran_order': False, 'shape': (3,)}", "key 'DESCR'"},
        {"{'de\nscr\x1B[31m\x7F': '<f4', 'fortran_order': False, 'shape': (3,)}", "key 'de?scr?[31m?'"},
        {"{'\xC2\x9B\xFF': 1}", "key '?\?\?'"},
        {"{'%s%n%s%n': 1}", "key '%s%n%s%n'"},
        {"{'abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz': 1}", "key 'abcdefghijklmnopqrstuvwx..'"},
        /* dtypes */
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (3,)}",
         "'>f4', not '<f4' or '<f8'; save x.astype('float32')"},
        {"{'descr': '<f2', 'fortran_order': False, 'shape': (3,)}", "dtype is '<f2'"},
        {"{'descr': '<i8', 'fortran_order': False, 'shape': (3,)}", "dtype is '<i8'"},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", "dtype is '|O'"},
        {"{'descr': '|b1', 'fortran_order': False, 'shape': (3,)}", "dtype is '|b1'"},
        {"{'descr': '', 'fortran_order': False, 'shape': (3,)}", "dtype is ''"},
        {"{'descr': '<f4\n', 'fortran_order': False, 'shape': (3,)}", "dtype is '<f4?'"},
        {"{'descr': '<f44', 'fortran_order': False, 'shape': (3,)}", "dtype is '<f44'"},
        {"{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3,)}", "save one field of it"},
        {"{'descr': 4, 'fortran_order': False, 'shape': (3,)}", "save one field of it"},
        /* order */
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (3,)}", "np.ascontiguousarray"},
        {"{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}", "neither True nor False"},
        {"{'descr': '<f4', 'fortran_order': false, 'shape': (3,)}", "neither True nor False"},
        {"{'descr': '<f4', 'fortran_order': 'False', 'shape': (3,)}", "neither True nor False"},
        {"{'descr': '<f4', 'fortran_order': Falsehood, 'shape': (3,)}", "not a dict"},
        /* shapes */
        {HEAD "()}", "np.atleast_1d"},
        {HEAD "( )}", "np.atleast_1d"},
        {HEAD "3}", "not a tuple"},
        {HEAD "(3)}", "not a tuple"},
        {HEAD "[3]}", "not a tuple"},
        {HEAD "(,)}", "not a tuple"},
        {HEAD "(3,,1)}", "not a tuple"},
        {HEAD "(3 1)}", "not a tuple"},
        {HEAD "(3,1", "not a tuple"},
        {HEAD "(3,1]}", "not a tuple"},
        {HEAD "(-3,)}", "not a tuple"},
        {HEAD "(+3,)}", "not a tuple"},
        {HEAD "(3.0,)}", "not a tuple"},
        {HEAD "(0x3,)}", "not a tuple"},
        {HEAD "(3L,)}", "not a tuple"},
        {HEAD "('3',)}", "not a tuple"},
        {HEAD "((3,),)}", "not a tuple"},
        {HEAD "None}", "not a tuple"},
        {HEAD "(1,1,1,1,3)}", "more than 4 axes"},
        {HEAD "(1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,3)}", "more than 4 axes"},
        {HEAD "(0,)}", "(0,), which holds no number"},
        {HEAD "(3, 0)}", "(3, 0), which holds no number"},
        {HEAD "(18446744073709551615, 0)}", "which holds no number"},
        /* sizes that do not fit the 12 bytes of data */
        {HEAD "(4,)}", "(4,) of 4 bytes each, more than the 12 bytes of data"},
        {HEAD "(2,)}", "(2,) of 4 bytes each, fewer than the 12 bytes of data"},
        {HEAD "(1, 1, 1, 1)}", "fewer than the 12 bytes"},
        {HEAD "(3, 2)}", "more than the 12 bytes"},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}",
         "(3,) of 8 bytes each, more than the 12 bytes"},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", "fewer than the 12 bytes"},
        /* products and numbers that overflow, among them to 3 elements or 12 bytes modulo 2^64 */
        {HEAD "(4611686018427387907,)}", "more than the 12 bytes"},
        {HEAD "(4294967296, 4294967296)}", "more than the 12 bytes"},
        {HEAD "(4294967296, 4294967296, 3)}", "more than the 12 bytes"},
        {HEAD "(3, 6148914691236517206)}", "more than the 12 bytes"},
        {HEAD "(6148914691236517205, 3)}", "more than the 12 bytes"},
        {HEAD "(65536, 65536, 65536, 65536)}", "more than the 12 bytes"},
        {HEAD "(18446744073709551615,)}", "more than the 12 bytes"},
        {HEAD "(18446744073709551616,)}", "not a tuple"},
        {HEAD "(18446744073709551619,)}", "not a tuple"},
        {HEAD "(340282366920938463463374607431768211459,)}", "not a tuple"},
    };
    cr_assert(COUNT(hostile) >= 30);
    for (int major = 1; major <= 3; major++)
        for (size_t i = 0; i < COUNT(hostile); i++) {
            make_file(major, hostile[i].header, 12);
            expect_message(parse(), hostile[i].fragment, hostile[i].header);
        }
    /* the same header with nothing wrong in it */
    make_file(1, HEAD "(3,)}", 12);
    cr_assert_null(parse());
    free(array.data);
}

Test(npy, refuses_a_zero_byte_in_the_header)
{
    make_file(1, HEAD "(3,)} ", 12);
    bytes[length - 13] = 0;
    expect_message(parse(), "follows", "a zero byte at the end");
    make_file(1, HEAD "(3,)}", 12);
    bytes[13] = 0;
    expect_message(parse(), "key 'd?scr'", "a zero byte in a key");
}

Test(npy, refuses_what_is_no_npy_file)
{
    const struct {
        const char *start;
        size_t length;
        const char *fragment;
    } files[] = {
        {"", 0, "not a .npy file"},
        {"\x93", 1, "not a .npy file"},
        {"\x93NUMPY\1", 8, "not a .npy file"},
        {"\x93NUMPx\1\0\0\0\0\0", 12, "not a .npy file"},
        {"PK\3\4 and so on", 13, "np.save"},
        {"1.0, 2.0, 3.0\n", 14, "not a .npy file"},
        {"\x93NUMPY\0\0v\0\0\0", 12, "version is 0.0, not 1.0, 2.0 or 3.0"},
        {"\x93NUMPY\4\0v\0\0\0", 12, "version is 4.0"},
        {"\x93NUMPY\1\1v\0\0\0", 12, "version is 1.1"},
        {"\x93NUMPY\xFF\xFFv\0\0\0", 12, "version is 255.255"},
        {"\x93NUMPY\1\0\0\0", 10, "not a dict"},
        {"\x93NUMPY\1\0\1\0", 10, "ends inside its header, after 10 bytes"},
        {"\x93NUMPY\1\0\xFF\xFF{'descr'", 18, "ends inside its header"},
        {"\x93NUMPY\2\0\0\0", 10, "ends inside its header"},
        {"\x93NUMPY\2\0\0\0\0", 11, "ends inside its header"},
        {"\x93NUMPY\2\0\xFF\xFF\xFF\xFF{}", 14, "ends inside its header"},
        {"\x93NUMPY\2\0\0\0\1\0{}", 14, "ends inside its header"},
        {"\x93NUMPY\3\0\0\0\0\x80{}", 14, "ends inside its header"},
    };
    for (size_t i = 0; i < COUNT(files); i++) {
        memcpy(bytes, files[i].start, files[i].length);
        length = files[i].length;
        expect_message(parse(), files[i].fragment, files[i].start);
    }
}

Test(npy, refuses_every_shorter_or_longer_file)
{
    make_file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", 24);
    size_t right = length;
    for (length = 0; length < right; length++)
        cr_assert_not_null(parse(), "%zu of %zu bytes", length, right);
    for (length = right + 1; length < right + 30; length++)
        cr_assert_not_null(parse(), "%zu bytes in place of %zu", length, right);
    length = right;
    cr_assert_null(parse());
    free(array.data);
}

/* Each byte changed to each value: it parses or it is refused, and never reads astray. */
Test(npy, survives_every_changed_byte)
{
    make_file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", 24);
    for (size_t i = 0; i < length - 24; i++) {
        uint8_t before = bytes[i];
        for (int value = 0; value < 256; value++) {
            bytes[i] = (uint8_t)value;
            const char *problem = parse();
            if (problem)
                expect_message(problem, "", "a changed byte");
            else
                cr_assert(array.count == 6 || array.count == 3, "byte %zu", i);
            free(array.data);
        }
        bytes[i] = before;
    }
}

/* ---- files ---- */

static char folder[64];

static void make_folder(void)
{
    strcpy(folder, "/tmp/test_npy.XXXXXX");
    cr_assert_not_null(mkdtemp(folder));
}

static void remove_folder(void)
{
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    cr_assert_eq(system(command), 0);
}

/* One after another: the caller may need two at once. */
static const char *in_folder(const char *name)
{
    static char paths[2][256];
    static int next;
    next = !next;
    snprintf(paths[next], sizeof paths[next], "%s/%s", folder, name);
    return paths[next];
}

static int files_in_folder(void)
{
    char command[100];
    int count = -1;
    snprintf(command, sizeof command, "ls -A %s | wc -l", folder);
    FILE *pipe = popen(command, "r");
    cr_assert_not_null(pipe);
    cr_assert_eq(fscanf(pipe, "%d", &count), 1);
    pclose(pipe);
    return count;
}

TestSuite(npy_files, .init = make_folder, .fini = remove_folder);

Test(npy_files, come_back_as_they_went)
{
    const struct {
        int axes;
        size_t size[4];
    } shapes[] = {{1, {7}},       {1, {1}},          {2, {3, 5}},
                  {3, {2, 1, 9}}, {4, {2, 3, 4, 5}}, {4, {1, 1, 1, 1000}},
                  {2, {1000, 1}}};
    for (size_t s = 0; s < COUNT(shapes); s++) {
        size_t count = 1;
        for (int i = 0; i < shapes[s].axes; i++)
            count *= shapes[s].size[i];
        float *data = malloc(count * sizeof *data);
        for (size_t i = 0; i < count; i++)
            data[i] = (float)i * 0.37f - 3;
        const char *path = in_folder("x.npy");
        cr_assert_null(write_npy(path, data, shapes[s].size, shapes[s].axes));
        const char *problem = read_npy(&array, path);
        cr_assert_null(problem, "%s", problem);
        cr_assert_eq(array.axes, shapes[s].axes);
        cr_assert_arr_eq(array.size, shapes[s].size, (size_t)array.axes * sizeof *array.size);
        cr_assert_eq(array.count, count);
        cr_assert_arr_eq(array.data, data, count * sizeof *data);
        cr_assert_eq(files_in_folder(), 1);
        free(data), free(array.data);
    }
}

Test(npy_files, keep_every_bit_of_nan_infinity_and_zero)
{
    const uint32_t bits[] = {0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000,
                             0xFF800000, 0x80000000, 1,          0x7F7FFFFF};
    float data[COUNT(bits)];
    memcpy(data, bits, sizeof data);
    cr_assert_null(write_npy(in_folder("x.npy"), data, (size_t[]){COUNT(bits)}, 1));
    cr_assert_null(read_npy(&array, in_folder("x.npy")));
    cr_assert_arr_eq(array.data, bits, sizeof bits);
    free(array.data);
}

/* np.save(path, np.float32([1, 2])) (NumPy 2) gives these bytes, and so do we. */
Test(npy_files, are_written_as_numpy_writes_them)
{
    uint8_t expected[136];
    const char head[] = "\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
    const float data[] = {1, 2};
    memset(expected, ' ', 128);
    memcpy(expected, head, sizeof head - 1);
    expected[127] = '\n';
    memcpy(expected + 128, data, 8);

    cr_assert_null(write_npy(in_folder("x.npy"), data, (size_t[]){2}, 1));
    FILE *file = fopen(in_folder("x.npy"), "rb");
    cr_assert_not_null(file);
    length = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    cr_assert_eq(length, 136);
    cr_assert_arr_eq(bytes, expected, 136);
}

Test(npy_files, have_the_permissions_of_any_new_file)
{
    struct stat info;
    umask(022);
    cr_assert_null(write_npy(in_folder("x.npy"), (float[]){1}, (size_t[]){1}, 1));
    cr_assert_eq(stat(in_folder("x.npy"), &info), 0);
    cr_assert_eq(info.st_mode & 0777, 0644);
}

Test(npy_files, say_what_cannot_be_read)
{
    const char *path = in_folder("absent.npy");
    expect_message(read_npy(&array, path), "absent.npy: cannot be opened (No such file or directory)",
                   "absent");
    cr_assert_eq(strncmp(read_npy(&array, path), path, strlen(path)), 0);
    path = folder;
    expect_message(read_npy(&array, path), ": this is a directory; name a .npy file", "a directory");
    cr_assert_eq(strncmp(read_npy(&array, path), path, strlen(path)), 0);
    path = in_folder("pipe");
    cr_assert_eq(mkfifo(path, 0600), 0);
    expect_message(read_npy(&array, path), "not a file; name a .npy file", "a pipe");
    expect_message(read_npy(&array, "/dev/zero"), "/dev/zero: this is a pipe or a device", "a device");
    expect_message(read_npy(&array, ""), ": cannot be opened", "no name");

    fclose(fopen(in_folder("empty.npy"), "wb"));
    path = in_folder("empty.npy");
    expect_message(read_npy(&array, path), "empty.npy: this is not a .npy file", "an empty file");
    cr_assert_eq(strncmp(read_npy(&array, path), path, strlen(path)), 0);

    expect_message(read_npy(&array, in_folder("two\nlines\x1B[1m.npy")), "two?lines?[1m.npy",
                   "a strange name");
    if (geteuid() != 0) { /* root may read anything */
        chmod(in_folder("empty.npy"), 0);
        expect_message(read_npy(&array, in_folder("empty.npy")), "Permission denied", "not ours to read");
    }
}

/* A terabyte of nothing: refused at its first bytes, or for its length, without being read. */
Test(npy_files, refuse_a_huge_file_at_once, .timeout = 20)
{
    FILE *file = fopen(in_folder("huge.npy"), "wb");
    if (ftruncate(fileno(file), (off_t)1 << 40) != 0)
        cr_skip_test("this file system takes no file of a terabyte");
    expect_message(read_npy(&array, in_folder("huge.npy")), "not a .npy file", "zeros");
    make_file(1, HEAD "(3,)}", 0);
    fwrite(bytes, 1, length, file);
    fclose(file);
    expect_message(read_npy(&array, in_folder("huge.npy")), "fewer than the 10995116", "a short shape");
}

Test(npy_files, are_not_touched_when_writing_fails)
{
    const float old[] = {1, 2, 3};
    static float large[100000];
    cr_assert_null(write_npy(in_folder("x.npy"), old, (size_t[]){3}, 1));

    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit, small = {4096, RLIM_INFINITY};
    getrlimit(RLIMIT_FSIZE, &limit);
    small.rlim_max = limit.rlim_max;
    setrlimit(RLIMIT_FSIZE, &small);
    const char *problem = write_npy(in_folder("x.npy"), large, (size_t[]){100000}, 1);
    setrlimit(RLIMIT_FSIZE, &limit);

    array.data = NULL;
    expect_message(problem, "x.npy: cannot be written (File too large)", "no room");
    cr_assert_eq(files_in_folder(), 1);
    cr_assert_null(read_npy(&array, in_folder("x.npy")));
    cr_assert(array.count == 3);
    cr_assert_arr_eq(array.data, old, sizeof old);
    free(array.data);
}

/* A file of the temporary one's name is somebody else's. */
Test(npy_files, are_not_written_over_a_temporary_file)
{
    char name[64];
    snprintf(name, sizeof name, "x.npy.%ld.new", (long)getpid());
    fclose(fopen(in_folder(name), "wb"));
    array.data = NULL;
    expect_message(write_npy(in_folder("x.npy"), (float[]){1}, (size_t[]){1}, 1), "(File exists)",
                   "in the way");
    cr_assert_eq(files_in_folder(), 1);
}

Test(npy_files, say_what_cannot_be_written)
{
    const float x[] = {1};
    const size_t one[] = {1, 1, 1, 1, 1}, zero[] = {1, 0};
    array.data = NULL;
    expect_message(write_npy(in_folder("no/such/x.npy"), x, one, 1), "(No such file or directory)",
                   "no folder");
    expect_message(write_npy(folder, x, one, 1), "is not a file", "a folder");
    expect_message(write_npy("/dev/null", x, one, 1), "/dev/null: cannot be written, it is not a file",
                   "a device");
    expect_message(write_npy(in_folder("x.npy"), x, one, 0), "1 to 4 axes", "no axes");
    expect_message(write_npy(in_folder("x.npy"), x, one, 5), "1 to 4 axes", "five axes");
    expect_message(write_npy(in_folder("x.npy"), x, zero, 2), "no size of 0", "size 0");
    static char path[5000];
    memset(path, 'x', sizeof path - 1);
    expect_message(write_npy(path, x, one, 1), "too long", "a long path");
    cr_assert_eq(files_in_folder(), 0);
}

/* ---- shapes as text ---- */

Test(npy, size_text)
{
    char text[100];
    const size_t size[] = {8, 1024, 768, SIZE_MAX};
    const char *const expected[] = {"()", "(8,)", "(8, 1024)", "(8, 1024, 768)",
                                    "(8, 1024, 768, 18446744073709551615)"};
    for (int axes = 0; axes <= 4; axes++) {
        size_text(text, sizeof text, size, axes);
        cr_assert_str_eq(text, expected[axes]);
        for (size_t room = 1; room < 10; room++) { /* cut off, never overrun */
            char *exact = malloc(room);
            size_text(exact, room, size, axes);
            cr_assert(strlen(exact) < room);
            free(exact);
        }
    }
}
