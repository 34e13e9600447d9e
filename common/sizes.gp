# Time and memory of every kernel over T, log-log: the attention core above, whole modules below. A thin line leads from a curve's
# last point to its name. Variables: data (a TSV), output (without ending), machine.
set encoding utf8
set datafile separator "\t"
set logscale xy
set grid lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xlabel "tokens T"
set xtics (128, 256, 1024, 4096, 16384)
set rmargin 23
unset key
array colour[12] = ["#1b6ca8", "#d9853b", "#3d8b4f", "#8a4fa3", "#8a8a8a", "#b33a3a", "#2a9d8f", "#a0772d", "#5a5ab5", "#c05a94", "#4f7a28", "#333333"]
array kernels[2] = ["01-sdpa 06-online 07-materialised 07-tiled 07-simd 08-repeat-kv 08-grouped 08-simd 09-dense-mask 09-block-sparse 09-simd", \
    "03-stacked 03-wrapper 04-split-heads 04-packed-qkv 04-torch-mha 05-einsum-loops 05-einsum 07-sdpa 07-sdpa-mask 07-torch-mha-noweights 08-llama 09-flex"]
array inputs[2] = ["q, k, v to out", "whole modules"]
array columns[2] = ["ms_median", "peak_mib"]
array what[2] = ["time", "memory beyond inputs and outputs"]
array units[2] = ["milliseconds, median (lower is better)", "MiB (lower is better)"]
array from[4] = [0.05, 1e-6, 0.05, 0.05] # panel by panel: the least value,
array to[4] = [1e6, 1e6, 1e6, 1e6]       # the largest,
array apart[4] = [1.6, 2.3, 1.6, 1.58]   # and how far names stand apart
edge = 40000
read(want, column, part, apart) = sprintf("< awk -f common/sizes.awk -v want=%s -v column=%s -v kernels='%s' -v edge=%d -v apart=%g '%s'", \
    want, column, kernels[part], edge, apart, data)
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 1240,1120 font "DejaVu Sans,12" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 1240,1120 font "DejaVu Sans,10" background rgb "white" noenhanced
    }
    set output output . "." . ending
    set multiplot layout 2,2 title "Attention over T: 12 causal heads of 64, forward\n" . machine noenhanced
    do for [part=1:2] {
        do for [c=1:2] {
            panel = 2 * part - 2 + c
            low = from[panel]
            set title inputs[part] . ": " . what[c]
            set ylabel units[c]
            set format y "%g"
            set xrange [128:edge]
            set yrange [low:to[panel]]
            unset label
            zeros = system(substr(read("zeros", columns[c], part, 1), 3, -1))
            if (c == 2 && strlen(zeros) > 0) { set label 1 "none at all: " . zeros at graph 0.03, 0.04 textcolor rgb "#333333" }
            set label 2 "O(T)" at 4096, low * 2 * (4096. / 128) * 0.5 left textcolor rgb "#777777"
            set label 3 "O(T²)" at 700, low * 2 * (700. / 128)**2 * 0.45 left textcolor rgb "#777777"
            plot for [i=1:words(kernels[part])] read("curves", columns[c], part, 1) index i - 1 using 1:2 with linespoints lw 1.6 pt 7 ps 0.5 lc rgb colour[i], \
                 for [i=1:words(kernels[part])] read("names", columns[c], part, apart[panel]) using ($5 == i ? $1 : NaN):2:(edge - $1):($3 - $2) with vectors nohead lw 0.4 lc rgb colour[i], \
                 for [i=1:words(kernels[part])] read("names", columns[c], part, apart[panel]) using ($5 == i ? edge : NaN):3:4 with labels left offset 0.4, 0 textcolor rgb colour[i], \
                 low * 2 * x / 128 with lines dt 2 lc rgb "#999999", low * 2 * (x / 128)**2 with lines dt 3 lc rgb "#999999"
        }
    }
    unset multiplot
}
