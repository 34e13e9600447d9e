#include "npy.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "files are little-endian, and numbers are copied as they are");

static char message[4608]; /* the last failure's */

/* Writes the message, without control characters: a path may hold any. */
static const char *refuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
static const char *refuse(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    for (char *c = message; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127)
            *c = '?';
    return message;
}

void size_text(char *text, size_t length, const size_t *size, int axes)
{
    size_t used = (size_t)snprintf(text, length, "(");
    for (int i = 0; i < axes && used < length; i++)
        used += (size_t)snprintf(text + used, length - used, i ? ", %zu" : "%zu", size[i]);
    if (used < length)
        snprintf(text + used, length - used, axes == 1 ? ",)" : ")");
}

/* ---- the header: a Python dict, {'descr': '<f4', 'fortran_order': False, 'shape': (8, 1024, 768), } ---- */

typedef struct {
    const uint8_t *at, *end;
} Text;

typedef struct {
    char text[28]; /* of what the header quotes, as much as a message may show */
} Quoted;

static void skip_spaces(Text *t)
{
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\t' || *t->at == '\r' || *t->at == '\n'))
        t->at++;
}

/* Takes these characters, if they come next. */
static bool take(Text *t, const char *expected)
{
    skip_spaces(t);
    size_t length = strlen(expected);
    if ((size_t)(t->end - t->at) < length || memcmp(t->at, expected, length) != 0)
        return false;
    t->at += length;
    return true;
}

/* Takes 'text' or "text". What is no plain ASCII becomes ?, and what is too long is cut off with dots: no
 * name that matters holds either. */
static bool take_quoted(Text *t, Quoted *quoted)
{
    const char *quote = take(t, "'") ? "'" : take(t, "\"") ? "\"" : NULL;
    const uint8_t *close = quote ? memchr(t->at, *quote, (size_t)(t->end - t->at)) : NULL;
    if (!close)
        return false;
    size_t length = (size_t)(close - t->at), kept = length < 24 ? length : 24;
    for (size_t i = 0; i < kept; i++)
        quoted->text[i] = t->at[i] >= ' ' && t->at[i] < 127 ? (char)t->at[i] : '?';
    strcpy(quoted->text + kept, length > kept ? ".." : "");
    t->at = close + 1;
    return true;
}

/* Takes decimal digits, if they are a size_t. */
static bool take_number(Text *t, size_t *number)
{
    skip_spaces(t);
    const uint8_t *start = t->at;
    for (*number = 0; t->at < t->end && *t->at >= '0' && *t->at <= '9'; t->at++) {
        size_t digit = *t->at - (size_t)'0';
        if (*number > (SIZE_MAX - digit) / 10)
            return false;
        *number = *number * 10 + digit;
    }
    return t->at > start;
}

static const char *take_shape(Text *t, NpyArray *array)
{
    const char *expected = "the header's shape is not a tuple of sizes such as (8, 1024, 768) or (8,)";
    if (!take(t, "("))
        return refuse("%s", expected);
    while (!take(t, ")")) {
        if (array->axes == NPY_MAX_AXES)
            return refuse("the array has more than %d axes; reshape it to at most %d", NPY_MAX_AXES,
                          NPY_MAX_AXES);
        if (!take_number(t, &array->size[array->axes++]))
            return refuse("%s", expected);
        if (take(t, ","))
            continue;
        if (array->axes == 1 || !take(t, ")")) /* (8) is no tuple */
            return refuse("%s", expected);
        break;
    }
    if (array->axes == 0)
        return refuse("the array is a single number, of shape (); np.atleast_1d(x) gives it an axis");
    return NULL;
}

/* Reads the whole header into array's axes and size, and the bytes of one number. */
static const char *take_header(Text *t, NpyArray *array, size_t *number_bytes)
{
    enum { DESCR, FORTRAN_ORDER, SHAPE, KEYS };
    static const char *const names[KEYS] = {"descr", "fortran_order", "shape"};
    bool seen[KEYS] = {false};
    const char *expected =
        "the header is not a dict {'descr': '<f4', 'fortran_order': False, 'shape': (8,)}; "
        "write the file with np.save";

    if (!take(t, "{"))
        return refuse("%s", expected);
    while (!take(t, "}")) {
        Quoted name, dtype;
        if (!take_quoted(t, &name) || !take(t, ":"))
            return refuse("%s", expected);
        int key = 0;
        while (key < KEYS && strcmp(name.text, names[key]) != 0)
            key++;
        if (key == KEYS)
            return refuse("the header has the key '%s'; it may have descr, fortran_order and shape only",
                          name.text);
        if (seen[key])
            return refuse("the header has the key '%s' twice; once is right", name.text);
        seen[key] = true;

        if (key == DESCR) {
            if (!take_quoted(t, &dtype))
                return refuse("the dtype is not '<f4' or '<f8' but more than a name; save one field of it");
            *number_bytes = strcmp(dtype.text, "<f4") == 0 ? 4 : strcmp(dtype.text, "<f8") == 0 ? 8 : 0;
            if (*number_bytes == 0)
                return refuse("the dtype is '%s', not '<f4' or '<f8'; save x.astype('float32')", dtype.text);
        } else if (key == FORTRAN_ORDER) {
            if (take(t, "True"))
                return refuse("the array is in Fortran order, columns first; save np.ascontiguousarray(x)");
            if (!take(t, "False"))
                return refuse("the header's fortran_order is neither True nor False; False is right");
        } else {
            const char *problem = take_shape(t, array);
            if (problem)
                return problem;
        }
        if (take(t, ","))
            continue;
        if (!take(t, "}"))
            return refuse("%s", expected);
        break;
    }
    for (int key = 0; key < KEYS; key++)
        if (!seen[key])
            return refuse("the header lacks the key '%s'; write the file with np.save", names[key]);
    skip_spaces(t);
    if (t->at < t->end)
        return refuse("something follows the header's dict; only spaces and a newline may");
    return NULL;
}

/* ---- the file: magic, version, header's length, header, data ---- */

const char *parse_npy(NpyArray *array, const uint8_t *bytes, size_t length)
{
    *array = (NpyArray){0};
    if (length >= 4 && memcmp(bytes, "PK\3\4", 4) == 0)
        return refuse("this is an archive (.npz or zip), not a .npy file; write each array with np.save");
    if (length < 10 || memcmp(bytes, "\x93NUMPY", 6) != 0)
        return refuse("this is not a .npy file, it does not start with \\x93NUMPY; write it with np.save");
    int major = bytes[6], minor = bytes[7];
    if (major < 1 || major > 3 || minor != 0)
        return refuse("the format's version is %d.%d, not 1.0, 2.0 or 3.0; write the file with np.save",
                      major, minor);

    size_t start = major == 1 ? 10 : 12;
    size_t header = bytes[8] | (size_t)bytes[9] << 8;
    if (length >= start && major > 1)
        header |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
    if (length < start || header > length - start)
        return refuse("the file ends inside its header, after %zu bytes; copy or write it again", length);

    NpyArray found = {.count = 1};
    size_t number_bytes = 0;
    Text text = {bytes + start, bytes + start + header};
    const char *problem = take_header(&text, &found, &number_bytes);
    if (problem)
        return problem;

    const uint8_t *data = text.end;
    size_t data_bytes = length - start - header, numbers = data_bytes / number_bytes;
    char shape[100];
    size_text(shape, sizeof shape, found.size, found.axes);
    for (int i = 0; i < found.axes; i++)
        if (found.size[i] == 0)
            return refuse("the shape is %s, which holds no number; every size must be at least 1", shape);
    for (int i = 0; i < found.axes; i++) {
        if (found.size[i] > numbers / found.count)
            return refuse("the shape is %s of %zu bytes each, more than the %zu bytes of data in the file; "
                          "copy or write it again",
                          shape, number_bytes, data_bytes);
        found.count *= found.size[i];
    }
    if (data_bytes > found.count * number_bytes)
        return refuse("the shape is %s of %zu bytes each, fewer than the %zu bytes of data in the file; "
                      "write one array to a file",
                      shape, number_bytes, data_bytes);

    found.data = malloc(found.count * sizeof *found.data);
    if (!found.data)
        return refuse("no memory for the shape %s; free some, or take a smaller array", shape);
    if (number_bytes == sizeof(float)) {
        memcpy(found.data, data, data_bytes);
    } else {
        for (size_t i = 0; i < found.count; i++) {
            double number;
            memcpy(&number, data + i * sizeof number, sizeof number);
            found.data[i] = (float)number;
        }
    }
    *array = found;
    return NULL;
}

const char *read_npy(NpyArray *array, const char *path)
{
    *array = (NpyArray){0};
    struct stat info;
    /* O_NONBLOCK: a pipe that nobody writes to must not hold us up. */
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0 || fstat(file, &info) != 0) {
        const char *reason = strerror(errno);
        if (file >= 0)
            close(file);
        return refuse("%.4000s: cannot be opened (%s); name a .npy file that can be read", path, reason);
    }
    if (!S_ISREG(info.st_mode)) {
        close(file);
        return refuse("%.4000s: this is %s; name a .npy file", path,
                      S_ISDIR(info.st_mode) ? "a directory" : "a pipe or a device, not a file");
    }

    /* Mapped, not read: what is no .npy file is refused before much of it comes into memory. */
    size_t length = (size_t)info.st_size;
    void *bytes = length ? mmap(NULL, length, PROT_READ, MAP_PRIVATE, file, 0) : NULL;
    const char *reason = bytes == MAP_FAILED ? strerror(errno) : NULL;
    close(file);
    if (reason)
        return refuse("%.4000s: cannot be read (%s); name a .npy file that can be read", path, reason);
    char problem[512] = "";
    if (parse_npy(array, bytes, length))
        snprintf(problem, sizeof problem, "%.500s", message);
    if (length)
        munmap(bytes, length);
    return *problem ? refuse("%.4000s: %s", path, problem) : NULL;
}

static bool write_all(FILE *file, const float *data, size_t count, const size_t *size, int axes)
{
    char shape[100], header[256];
    size_text(shape, sizeof shape, size, axes);
    int length =
        snprintf(header, sizeof header,
                 "\x93NUMPY\1%c%c%c{'descr': '<f4', 'fortran_order': False, 'shape': %s, }", 0, 0, 0, shape);
    /* Spaces and a newline fill it up to a multiple of 64, which aligns the data. */
    size_t total = ((size_t)length + 1 + 63) / 64 * 64;
    memset(header + length, ' ', total - (size_t)length);
    header[total - 1] = '\n';
    header[8] = (char)(total - 10); /* below 256: four sizes have no more than 80 digits */
    return fwrite(header, 1, total, file) == total && fwrite(data, sizeof *data, count, file) == count;
}

const char *write_npy(const char *path, const float *data, const size_t *size, int axes)
{
    size_t count = 1;
    for (int i = 0; i < axes; i++)
        count *= size[i];
    if (axes < 1 || axes > NPY_MAX_AXES || count == 0)
        return refuse("%.4000s: not written, an array has 1 to %d axes and no size of 0", path, NPY_MAX_AXES);

    struct stat info;
    char temporary[4096];
    int length = snprintf(temporary, sizeof temporary, "%s.%ld.new", path, (long)getpid());
    if (length >= (int)sizeof temporary)
        return refuse("%.4000s: cannot be written, the path is too long; choose a shorter one", path);
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return refuse("%.4000s: cannot be written, it is not a file; choose another path", path);

    FILE *file = fopen(temporary, "wbx"); /* x: never over a file that somebody else is writing */
    if (!file)
        return refuse("%.4000s: cannot be made (%s); choose a folder that can be written to", temporary,
                      strerror(errno));
    bool written = write_all(file, data, count, size, axes);
    written = fclose(file) == 0 && written;
    if (!written || rename(temporary, path) != 0) {
        const char *reason = strerror(errno);
        remove(temporary);
        return refuse("%.4000s: cannot be written (%s); make room, or choose another folder", path, reason);
    }
    return NULL;
}
