# Time over T, log-log, one curve a kernel, its name at the curve's end. Variables: data (a TSV), output (without ending), kernels
# (names with spaces between), machine, title_text.
set encoding utf8
set datafile separator "\t"
set logscale xy
set grid lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xlabel "tokens T"
set ylabel "milliseconds, median (lower is better)"
set title title_text . "\n" . machine noenhanced
set rmargin 16
unset key
array colour[5] = ["#1b6ca8", "#d9853b", "#3d8b4f", "#8a4fa3", "#8a8a8a"]
set xtics (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
set format y "%g"
# The rows of one kernel, sorted as they were measured.
rows(kernel) = sprintf("< awk -F '\\t' -v OFS='\\t' -v kernel='%s' 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } $at[\"kernel\"] == kernel { print $at[\"tokens\"], $at[\"ms_median\"], kernel }' '%s'", kernel, data)
# Where each name goes: at its curve's end, moved up where it would lie on another.
names = sprintf("< awk -F '\\t' -v OFS='\\t' -v kernels='%s' 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } { x[$at[\"kernel\"]] = $at[\"tokens\"]; y[$at[\"kernel\"]] = $at[\"ms_median\"] } END { n = split(kernels, k, \" \"); for (i = 1; i <= n; i++) print x[k[i]], y[k[i]], k[i], i }' '%s' | sort -k 2,2g | awk -F '\\t' -v OFS='\\t' '{ if ($2 < 1.4 * last) $2 = 1.4 * last; last = $2; print }'", kernels, data)
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 860,540 font "DejaVu Sans,13" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 860,540 font "DejaVu Sans,11" background rgb "white" noenhanced
    }
    set output output . "." . ending
    plot for [i=1:words(kernels)] rows(word(kernels, i)) using 1:2 with linespoints lw 2 pt 7 ps 0.6 lc rgb colour[i], \
         for [i=1:words(kernels)] names using ($4 == i ? $1 : NaN):2:3 with labels left offset 1,0 textcolor rgb colour[i]
}
