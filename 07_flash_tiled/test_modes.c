/* ./run layers and ./run claims: what they write. */
#include "claims.h"
#include "layers.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A new file's name. */
static char *new_file(void)
{
    static char path[] = "/tmp/modes-XXXXXX";
    int file = mkstemp(path);
    cr_assert(file >= 0);
    close(file);
    return path;
}

/* Both kernels hold their inputs, out and lse for each layer; the naive one two T x T matrices more with dropout, and
 * one without. */
Test(layers, hold_the_matrices_of_each_layer_or_none)
{
    for (int matrices = 1; matrices <= 2; matrices++) {
        char *path = new_file(), *p = matrices == 2 ? "0.1" : "0";
        char *words[] = {"--layers", "3", "--tokens",  "96", "--batch", "2",
                         "--repeat", "1", "--dropout", p,    "--tsv",   path};
        cr_assert(run_layers(sizeof words / sizeof *words, words) == 0);
        FILE *file = fopen(path, "r");
        char line[1000], kernel[40], how[40];
        double layer[2], once, peak, forward_ms, ms;
        cr_assert(file && fgets(line, sizeof line, file));
        for (int i = 0; i < 2; i++) {
            cr_assert(fgets(line, sizeof line, file));
            int fields =
                sscanf(line, "%*[^\t]\t3\t96\t2\t8\t64\t%*f\t%*d\t%39s\t%lf\t%lf\t%lf\t%lf\t%lf\t%39s",
                       kernel, &forward_ms, &ms, &layer[i], &once, &peak, how);
            cr_assert(fields == 7, "%s", line);
            cr_expect(strcmp(kernel, i ? "simd" : "materialised") == 0 && strcmp(how, "measured") == 0);
            cr_expect(0 < forward_ms && forward_ms < ms);
            cr_expect(fabs(peak - once - 3 * layer[i]) <= 1e-4);
        }
        double mib = 4.0 / (1 << 20), numbers = 2 * 96 * 512, rows = 2 * 8 * 96;
        cr_expect(fabs(layer[1] - mib * (4 * numbers + rows)) <= 1e-5, "%g", layer[1]);
        cr_expect(fabs(layer[0] - layer[1] - mib * matrices * rows * 96) <= 1e-5, "%g", layer[0] - layer[1]);
        fclose(file);
        unlink(path);
        memcpy(path, "/tmp/modes-XXXXXX", 18);
    }
}

Test(claims, hold)
{
    char *path = new_file();
    char *words[] = {"--tsv", path};
    cr_expect(run_claims(2, words) == 0);
    FILE *file = fopen(path, "r");
    char line[1000];
    int lines = 0;
    while (file && fgets(line, sizeof line, file)) {
        const char *tab = line;
        for (int i = 0; i < 3; i++) {
            tab = strchr(tab, '\t');
            cr_assert(tab++, "four columns: %s", line);
        }
        lines++;
    }
    cr_expect(lines == 1 + 10 + 2 + 6);
    cr_assert(file);
    fclose(file);
    unlink(path);
}

#ifdef HAVE_SIMT
Test(claims, of_a_device_hold_on_the_stand_in)
{
    char path[] = "/tmp/claims-XXXXXX";
    int file = mkstemp(path);
    cr_assert(file >= 0);
    close(file);
    char *words[] = {"--device", "simt", "--tsv", path};
    cr_expect(run_claims(4, words) == 0);
    FILE *tsv = fopen(path, "r");
    int lines = 0;
    for (int c; tsv && (c = getc(tsv)) != EOF;)
        lines += c == '\n';
    cr_expect(lines == 6, "a header and five figures, not %d lines", lines);
    if (tsv)
        fclose(tsv);
    remove(path);
}
#endif
