# The table of make ladder, with median.awk: tricks cases ladder.tsv. A figure is the median over the rounds; a loss is taken from the
# whole kernel's percent in the same round.
BEGIN { FS = OFS = "\t" }

FILENAME ~ /tricks$/ {
    order[++rows] = $1
    what[$1] = $2
    why[$1] = $3
    next
}
FILENAME ~ /cases$/ {
    column[++columns] = $1
    next
}
FNR == 1 {
    for (i = 1; i <= NF; i++)
        at[$i] = i
    next
}
{
    machine = get("machine")
    case_text[get("case")] = get("heads") " heads, T " get("tokens") ", HS " get("head_size") (get("mask") == "causal" ? ", causal" : "")
    percent[get("trick"), get("case"), get("round")] = get("percent_of_peak")
    if (get("round") > rounds)
        rounds = get("round")
    runs++
    if (error !~ /nan/ && !(get("max_abs_err") <= error)) # NaN wins, and stays
        error = get("max_abs_err")
}

# The median, and how far the rounds are apart; digits behind the point.
function spread(key, digits,    n) {
    n = sort_values(key)
    if (n == 0)
        return "-"
    return sprintf("%.1f", middle(key)) (n > 1 ? sprintf(" (%." digits "f..%." digits "f)", sorted[1], sorted[n]) : "")
}

END {
    print "Measured on: " machine ", 1 thread. In percent of the multiply-add peak, and in points of it; median (lowest..highest of " rounds (rounds == 1 ? " round" : " rounds") ").\n"
    line = "| without it | why it is there |"
    for (c = 1; c <= columns; c++)
        line = line " " case_text[column[c]] " | loses |"
    print line
    gsub(/[^|]+/, "---", line)
    print line
    for (i = 1; i <= rows; i++) {
        line = "| " what[order[i]] " | " why[order[i]] " |"
        for (c = 1; c <= columns; c++) {
            key = order[i] "-" column[c]
            for (r = 1; r <= rounds; r++)
                if ((order[i], column[c], r) in percent) {
                    add(key, percent[order[i], column[c], r])
                    if (("whole", column[c], r) in percent)
                        add(key "-loss", percent["whole", column[c], r] - percent[order[i], column[c], r])
                }
            line = line " " spread(key, 0) " | " (order[i] == "whole" ? "-" : spread(key "-loss", 1)) " |"
        }
        print line
    }
    printf "\nEach of the %d timed runs was held against the oracle; the largest error was %s.\n", runs, error
}
