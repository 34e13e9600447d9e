# Percent of the multiply-add peak over T, a panel for each pass and head size; a thin line leads from a curve's last point to its name.
# Variables: data (what speed.awk prints for a chart), output (without ending).
set encoding utf8
fact(name) = system(sprintf("awk -F '\\t' '$1 == \"%s\" { print $2 }' '%s'", name, data))
lines(kind, panel, curve) = sprintf("< awk -F '\\t' '$1 == \"%s\" && $2 == %d && $3 == %d' '%s'", kind, panel, curve, data)
panels = int(fact("panels"))
set datafile separator "\t"
set logscale x 2
set xtics (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
set xrange [110:22000]
set yrange [0:100]
set ytics 20
set grid ytics lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xlabel "tokens T"
set ylabel "percent of peak (higher is better)"
set rmargin 23
unset key
array colour[3] = ["#1b6ca8", "#d9853b", "#8a8a8a"]
paint(c) = colour[(c - 1) % 3 + 1]
dash(c) = c > 3 ? 2 : 1
curve(i) = int(word(list, i)) # the panel's i-th: 1 to 3 full, 4 to 6 causal
set arrow 1 from graph 0, first 100 to graph 1, first 100 nohead lw 2 lc rgb "#333333" front
set label 1 "multiply-add peak" at graph 0, first 100 left offset 0.5, 0.7 textcolor rgb "#333333"
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 1240,900 font "DejaVu Sans,12" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 1240,900 font "DejaVu Sans,10" background rgb "white" noenhanced
    }
    set output output . "." . ending
    set multiplot layout (panels + 1) / 2, 2 title "How near the peak: 8 heads, float32\n" . fact("machine") . "; 100% = " . fact("peak") . " GFLOP/s of multiply-adds alone\n" noenhanced
    do for [p=1:panels] {
        set title fact(sprintf("panel%d", p))
        list = fact(sprintf("curves%d", p))
        plot for [i=1:words(list)] lines("point", p, curve(i)) using 4:5 with linespoints lw 1.8 pt 7 ps 0.5 dt dash(curve(i)) lc rgb paint(curve(i)), \
             for [i=1:words(list)] lines("name", p, curve(i)) using 4:5:(22000 - $4):($6 - $5) with vectors nohead lw 0.4 lc rgb paint(curve(i)), \
             for [i=1:words(list)] lines("name", p, curve(i)) using (22000):6:7 with labels left offset 0.4, 0 textcolor rgb paint(curve(i))
    }
    unset multiplot
}
