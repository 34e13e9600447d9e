# Time and memory of every kernel over T, log-log: the attention core above, whole modules below, each name at its curve's end.
# Variables: data (a TSV), output (without ending), machine.
set encoding utf8
set datafile separator "\t"
set logscale xy
set grid lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xlabel "tokens T"
set xtics (128, 512, 2048, 8192)
set xrange [128:20000]
set rmargin 24
unset key
array colour[12] = ["#1b6ca8", "#d9853b", "#3d8b4f", "#8a4fa3", "#8a8a8a", "#b33a3a", "#2a9d8f", "#a0772d", "#5a5ab5", "#c05a94", "#4f7a28", "#333333"]
cores = "01-sdpa 06-online 07-materialised 07-tiled 07-simd 08-repeat-kv 08-grouped 08-simd 09-dense-mask 09-block-sparse 09-simd"
modules = "03-stacked 03-wrapper 04-split-heads 04-packed-qkv 04-torch-mha 05-einsum-loops 05-einsum 07-sdpa 07-sdpa-mask 07-torch-mha-noweights 08-llama 09-flex"
# A kernel's rows: T and a column. Its name: at the last of them, pushed up where it would lie on another (by a factor `apart`).
field = "awk -F '\\t' -v OFS='\\t' -v column='%s' -v kernels='%s' -v apart=%g 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } { key = substr($at[\"chapter\"], 1, 2) \"-\" $at[\"kernel\"] } "
rows(column, kernel) = "< " . sprintf(field, column, kernel, 1) . sprintf("key == kernels && $at[column] > 0 { print $at[\"tokens\"], $at[column] }' '%s'", data)
names(column, kernels, apart) = "< " . sprintf(field, column, kernels, apart) . sprintf("$at[column] > 0 { x[key] = $at[\"tokens\"]; y[key] = $at[column] } END { n = split(kernels, k, \" \"); for (i = 1; i <= n; i++) if (k[i] in x) print x[k[i]], y[k[i]], k[i], i }' '%s' | sort -k 2,2g | awk -F '\\t' -v OFS='\\t' -v apart=%g '{ if ($2 < apart * last) $2 = apart * last; last = $2; print }'", data, apart)
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 1240,1120 font "DejaVu Sans,12" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 1240,1120 font "DejaVu Sans,10" background rgb "white" noenhanced
    }
    set output output . "." . ending
    set multiplot layout 2,2 title "Attention over T: 12 causal heads of 64, forward\n" . machine noenhanced
    do for [part=1:2] {
        kernels = part == 1 ? cores : modules
        set title (part == 1 ? "q, k, v to out: time" : "x to out, projections included: time")
        set ylabel "milliseconds, median (lower is better)"
        set format y "%g"
        plot for [i=1:words(kernels)] rows("ms_median", word(kernels, i)) using 1:2 with linespoints lw 1.6 pt 7 ps 0.5 lc rgb colour[i], \
             for [i=1:words(kernels)] names("ms_median", kernels, 1.55) using ($4 == i ? 17500 : NaN):2:3 with labels left textcolor rgb colour[i], \
             0.02 * x / 128 with lines dt 2 lc rgb "#999999", 0.02 * (x / 128)**2 with lines dt 3 lc rgb "#999999", \
             "+" using (2600):(0.02 * 2600 / 128 * 0.6):("O(T)") every ::0::0 with labels left textcolor rgb "#777777", \
             "+" using (700):(0.02 * (700. / 128)**2 * 0.5):("O(T²)") every ::0::0 with labels left textcolor rgb "#777777"
        set title (part == 1 ? "q, k, v to out: memory beyond inputs and outputs" : "x to out: memory beyond inputs and outputs")
        set ylabel "MiB (lower is better)"
        plot for [i=1:words(kernels)] rows("peak_mib", word(kernels, i)) using 1:2 with linespoints lw 1.6 pt 7 ps 0.5 lc rgb colour[i], \
             for [i=1:words(kernels)] names("peak_mib", kernels, 1.9) using ($4 == i ? 17500 : NaN):2:3 with labels left textcolor rgb colour[i], \
             0.01 * x / 128 with lines dt 2 lc rgb "#999999", 0.01 * (x / 128)**2 with lines dt 3 lc rgb "#999999", \
             "+" using (2600):(0.01 * 2600 / 128 * 0.6):("O(T)") every ::0::0 with labels left textcolor rgb "#777777", \
             "+" using (700):(0.01 * (700. / 128)**2 * 0.5):("O(T²)") every ::0::0 with labels left textcolor rgb "#777777"
    }
    unset multiplot
}
