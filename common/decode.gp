# One token at a time: milliseconds a token over the length so far. Variables: data (a TSV with columns machine, kernel, tokens,
# ms_per_token), output (without ending), machine, title_text.
set encoding utf8
set datafile separator "\t"
set logscale xy
set grid lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xlabel "tokens so far"
set ylabel "milliseconds for the next token (lower is better)"
set title title_text . "\n" . machine noenhanced
set rmargin 22
unset key
array colour[4] = ["#d9853b", "#1b6ca8", "#3d8b4f", "#8a4fa3"]
set xtics (16, 64, 256, 1024, 4096, 16384)
set format y "%g"
rows(kernel) = sprintf("< awk -F '\\t' -v OFS='\\t' -v kernel='%s' 'NR > 1 && $2 == kernel { print $3, $4, kernel }' '%s'", kernel, data)
last(kernel) = rows(kernel) . " | tail -n 1"
kernels = system(sprintf("awk -F '\\t' 'NR > 1 && !seen[$2]++ { print $2 }' '%s'", data))
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 860,540 font "DejaVu Sans,13" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 860,540 font "DejaVu Sans,11" background rgb "white" noenhanced
    }
    set output output . "." . ending
    plot for [i=1:words(kernels)] rows(word(kernels, i)) using 1:2 with linespoints lw 2 pt 7 ps 0.6 lc rgb colour[i], \
         for [i=1:words(kernels)] last(word(kernels, i)) using 1:2:3 with labels left offset 1,0 textcolor rgb colour[i]
}
