# The table of make ladder, with median.awk: tricks ladder.tsv. A figure is the median over the rounds; what a kernel loses is taken from
# the whole kernel's percent in the same round.
BEGIN { FS = OFS = "\t" }

FILENAME ~ /tricks$/ {
    order[++rows] = $1
    what[$1] = $2
    why[$1] = $3
    next
}
FNR == 1 {
    for (i = 1; i <= NF; i++)
        at[$i] = i
    next
}
{
    machine = get("machine")
    name = get("case")
    if (!(name in text)) {
        column[++columns] = name
        text[name] = get("heads") " heads, T " get("tokens") ", HS " get("head_size") (get("mask") == "causal" ? ", causal" : "")
    }
    percent[get("trick"), name, get("round")] = get("percent_of_peak")
    if (get("round") > rounds)
        rounds = get("round") + 0
    runs++
    samples += get("checked") == "sample"
    if (error !~ /nan/ && !(get("max_abs_err") <= error)) # NaN wins, and stays
        error = get("max_abs_err")
}

# The median, and how far the rounds are apart.
function spread(key,    n, text) {
    n = sort_values(key)
    text = n == 0 ? "-" : sprintf("%.1f", middle(key)) (n > 1 ? sprintf(" (%.0f..%.0f)", sorted[1], sorted[n]) : "")
    sub(/\(-0\./, "(0.", text)
    return text
}
function row(trick, what, why,    c, r, key, line) {
    line = "| " what " | " why " |"
    for (c = 1; c <= columns; c++) {
        key = trick "-" column[c]
        for (r = 1; r <= rounds; r++)
            if ((trick, column[c], r) in percent) {
                add(key, percent[trick, column[c], r])
                if (("whole", column[c], r) in percent && trick != "whole")
                    add(key "-loss", percent["whole", column[c], r] - percent[trick, column[c], r])
            }
        line = line " " spread(key) " | " spread(key "-loss") " |"
    }
    print line
}

END {
    print "Measured on: " machine ", 1 thread. In percent of the multiply-add peak, and what that loses in points of it: median (lowest..highest) of " rounds (rounds == 1 ? " round" : " rounds") ".\n"
    line = "| in place of the trick | why it is there |"
    for (c = 1; c <= columns; c++)
        line = line " " text[column[c]] " | loses |"
    print line
    gsub(/[^|]+/, "---", line)
    print line
    for (i = 1; i <= rows; i++)
        row(order[i], what[order[i]], why[order[i]])
    row("tiled", "none of the tricks: `tiled`", "")
    printf "\nEvery timed run was held against the oracle, %d of %d by sample; the largest error was %s.\n", samples, runs, error
}
