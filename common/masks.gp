# The block masks as pictures: dark blocks are full, light ones partial, white ones are never visited. Variables: data (a TSV with
# columns mask, query_block, key_block, kind), output (without ending), machine is not needed: nothing here was timed.
set encoding utf8
set datafile separator "\t"
masks = system(sprintf("awk -F '\\t' 'NR > 1 && !seen[$1]++ { print $1 }' '%s'", data))
rows(mask) = sprintf("< awk -F '\\t' -v OFS='\\t' -v mask='%s' 'NR > 1 && $1 == mask { print $3, $2, ($4 == \"full\" ? 2 : $4 == \"partial\" ? 1 : 0) }' '%s'", mask, data)
blocks = int(system(sprintf("awk -F '\\t' 'NR > 1 && $2 > n { n = $2 } END { print n + 1 }' '%s'", data)))
set size ratio 1
set xrange [-0.5:blocks-0.5]
set yrange [blocks-0.5:-0.5]
unset key
unset colorbox
unset xtics
unset ytics
set border lc rgb "#555555"
set cbrange [0:2]
set palette defined (0 "#ffffff", 1 "#9cc3e4", 2 "#1b6ca8")
do for [ending in "svg png"] {
    if (ending eq "svg") {
        set terminal svg size 960,700 font "DejaVu Sans,12" background rgb "white" noenhanced
    } else {
        set terminal pngcairo size 960,700 font "DejaVu Sans,10" background rgb "white" noenhanced
    }
    set output output . "." . ending
    set multiplot layout 2,3 title "Block masks: full blocks dark, partial ones light, empty ones never visited"
    set xlabel "key blocks" offset 0,0.5
    set ylabel "query blocks" offset 1,0
    do for [i=1:words(masks)] {
        set title word(masks, i) noenhanced
        plot rows(word(masks, i)) using 1:2:3 with image pixels
    }
    unset multiplot
}
