# Speed over T on a GPU, a line a kernel, its name at its end. Variables: data (TSVs of --bench rows, and of PyTorch's), kernels,
# output (without ending), title_text.
set encoding utf8
rows = "awk -F '\\t' 'FNR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } { print $at[\"kernel\"], $at[\"tokens\"], $at[\"gflops\"] / 1000 }' " . data
points(name) = sprintf("< %s | awk '$1 == \"%s\" { print $2, $3 }' | sort -n", rows, name)
# The names from the lowest up, each at least a line above the one before.
names = "< " . rows . " | sort -k1,1 -k2,2n | awk '{ t[$1] = $2; y[$1] = $3; if (!low || $3 < low) low = $3; if ($3 > high) high = $3 } END { for (k in y) print k, t[k], y[k], (high / low) ^ 0.045 }' | sort -k3,3g | awk '{ y = NR > 1 && $3 < y * $4 ? y * $4 : $3; print $1, $2, y }'"
set logscale xy
set xtics (32, 64, 1024, 2048, 4096, 8192, 16384)
set format y "%g"
set xlabel "T, tokens of a sequence"
set ylabel "TFLOP/s (higher is better)"
set grid ytics lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set title title_text noenhanced
set rmargin 16
unset key
colour(i) = word("#8a8a8a #b58900 #2aa198 #6c71c4 #1b6ca8 #d9853b #cb4b16 #859900 #444444 #d33682", (i - 1) % 10 + 1)
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 960,540 font "DejaVu Sans,13" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 960,540 font "DejaVu Sans,11" background rgb "white" noenhanced
    }
    set output output . "." . ending
    plot for [i=1:words(kernels)] points(word(kernels, i)) using 1:2 with linespoints pt 7 ps 0.6 lw 2 lc rgb colour(i), \
         for [i=1:words(kernels)] names using (strcol(1) eq word(kernels, i) ? $2 : NaN):3:1 with labels left offset 1,0 textcolor rgb colour(i)
}
