# The notebook's speed chart: implementations 1 to 9 as bars. Variables: data (number, label, ms, PyTorch ms or nan, forced ms
# or nan), output (without ending), machine, what (forward or both), peers (how many of PyTorch's columns are filled: 0, 1, 2), title_text.
set encoding utf8
number(ms) = ms < 10 ? sprintf("%.2g", ms) : sprintf("%.0f", ms)
set style data boxes
set boxwidth (peers ? 0.27 : 0.6)
set style fill solid 1.0 noborder
set grid ytics lc rgb "#dddddd"
set border 3 lc rgb "#555555"
set tics nomirror textcolor rgb "#333333"
set xtics rotate by -35 left
set ylabel "milliseconds, " . what . " (shorter is better)"
set title title_text . "\n" . machine noenhanced
set yrange [0:*]
set offsets 0.3, 0.6, 0, 0
set rmargin 6
set tmargin at screen 0.82 # below the three names
unset key
ours = "#1b6ca8"; installed = "#d9853b"; forced = "#8a8a8a"
set label 1 "this book" at screen 0.98, 0.97 right textcolor rgb ours
if (peers) {
    set label 2 "PyTorch as installed" at screen 0.98, 0.93 right textcolor rgb installed
    if (peers > 1) { set label 3 "PyTorch, MKL forced fast" at screen 0.98, 0.89 right textcolor rgb forced }
}
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size (peers ? 1160 : 960),540 font "DejaVu Sans,13" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size (peers ? 1160 : 960),540 font "DejaVu Sans,11" background rgb "white" noenhanced
    }
    set output output . "." . ending
    if (peers) {
        plot data using ($1-0.28):3 lc rgb ours, \
             data using ($1-0.28):3:(number($3)) with labels offset 0,0.6 font ",9" textcolor rgb ours, \
             data using 1:4:xtic(2) lc rgb installed, \
             data using 1:4:(number($4)) with labels offset 0,0.6 font ",9" textcolor rgb installed, \
             data using ($1+0.28):5 lc rgb forced, \
             data using ($1+0.28):5:(number($5)) with labels offset 0,0.6 font ",9" textcolor rgb forced
    } else {
        plot data using 1:3:xtic(2) lc rgb ours, \
             data using 1:3:(number($3)) with labels offset 0,0.6 textcolor rgb ours
    }
}
