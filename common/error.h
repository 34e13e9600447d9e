/* How a program of this book ends: one line on stderr, and an exit code that scripts can trust. */
#ifndef COMMON_ERROR_H
#define COMMON_ERROR_H

enum {
    EXIT_PASSED = 0,       /* every check passed */
    EXIT_CHECK_FAILED = 1, /* a result was wrong, or an input file held NaN */
    EXIT_USAGE = 2,        /* bad usage or bad input */
    EXIT_UNAVAILABLE = 3,  /* no such device, or not enough memory */
};

#ifdef __cplusplus
extern "C" {
#endif

/* Prints "error: MESSAGE" and ends the program. The message says what was wrong and what would be right. */
void die(int exit_code, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif

#endif
