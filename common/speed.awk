# The tables and charts of make speed, with median.awk: -v want=GROUP cases [pytorch.tsv] ours.tsv prints a table of Markdown,
# -v want=chart-THREADS what speed.gp draws. A figure is the median over the rounds. What is PyTorch's is compared within a round: its
# percent is ours times our time over its time, so that both are of the peak that was measured in that round.

BEGIN {
    FS = OFS = "\t"
    chart = want ~ /^chart-/
    split("installed forced", sets, " ")
    title["installed"] = "PyTorch"
    title["forced"] = "PyTorch forced"
}

# ---- Reading ----

FILENAME ~ /cases$/ {
    if (chart ? $1 == "tokens" && want == "chart-" $3 : $1 == want) {
        wanted[$6 "-" $3] = 1
        if (!rows_known[$6]++)
            order[++rows] = $6
        if (!counts_known[$3]++)
            counts[++threads] = $3
        if (!(($2, $3) in plain))
            plain[$2, $3] = $6 "-" $3 # the first of its pass
        row_of[$6 "-" $3] = $6
    }
    next
}
FNR == 1 {
    split("", at)
    for (i = 1; i <= NF; i++)
        at[$i] = i
    next
}
!(get("case") in wanted) { next }
"kernel_set" in at {
    if (get("refused") != "")
        refused[get("case"), get("kernel_set")] = get("refused")
    else
        ms[get("case"), get("round"), get("kernel_set")] = get("ms_median")
    next
}
{
    machine = get("machine")
    name = get("case")
    round = get("round")
    time = get("ms_median")
    share = want == "token" ? get("gb_per_s") : get("percent_of_peak")
    add(name "-ours", share)
    add(name "-ms", time)
    if (get("percent_of_peak") > 0)
        add("peak", 100 * get("gflops") / get("percent_of_peak"))
    if (get("percent_of_bandwidth") != "")
        add(name "-bandwidth", get("percent_of_bandwidth"))
    for (s = 1; s <= 2; s++)
        if ((name, round, sets[s]) in ms) {
            add(name "-" sets[s], share * time / ms[name, round, sets[s]])
            add(name "-" sets[s] "-over", ms[name, round, sets[s]] / time)
            timed[sets[s]] = 1
        }
    rate[name, round] = get("gflops")
    base = plain[get("pass"), get("threads")] SUBSEP round # that case stands before the others in each round
    if (base in rate)
        add(name "-plain", rate[base] / get("gflops"))
    label[row_of[name]] = description() " | " get("pass")
    if (chart)
        point(name)
    runs++
    samples += get("checked") == "sample"
    if (error !~ /nan/ && !(get("max_abs_err") <= error)) # NaN wins, and stays
        error = get("max_abs_err")
}

function description(    text, mask) {
    if (get("embed") > 0)
        return "`" get("kernel") "`, " get("batch") " x " get("tokens") " x " get("embed") ", " get("heads") " heads"
    text = get("heads") (get("heads") == 1 ? " head" : " heads")
    if (get("kv_heads") != get("heads"))
        text = text " over " get("kv_heads")
    text = text ", T " get("tokens")
    if (get("key_tokens") != get("tokens"))
        text = text ", TK " get("key_tokens")
    text = text ", HS " get("head_size")
    mask = get("mask")
    sub(/^none\+?/, "", mask)
    return (get("kernel") == "simd" ? "" : "`" get("kernel") "`, ") text (mask == "" ? "" : ", " mask) \
        (get("bias") > 0 ? ", bias" : "") (get("dropout") > 0 ? ", dropout " get("dropout") : "")
}

# ---- A table ----

# The median, and how far the rounds are apart.
function spread(key,    n, text) {
    n = sort_values(key)
    if (n == 0)
        return "-"
    text = n > 1 ? sprintf(" (%.0f..%.0f)", sorted[1], sorted[n]) : ""
    return sprintf("%.1f%s", middle(key), text)
}
# One cell for all numbers of threads: 12 / 6.3
function slashed(row, what,    t, text, value) {
    for (t = 1; t <= threads; t++) {
        value = middle(row "-" counts[t] what)
        text = text (t > 1 ? " / " : "") (value == "" ? "-" : short(value))
    }
    return text
}
function cells(row, what,    t, text) {
    for (t = 1; t <= threads; t++)
        text = text " " spread(row "-" counts[t] what) " |"
    return text
}
function plural(n) { return n (n == 1 ? " thread" : " threads") }
# "1 / 2 threads"
function all_counts(    t, text) {
    for (t = 1; t < threads; t++)
        text = text counts[t] " / "
    return text plural(counts[threads])
}
function heads(who,    t, text) {
    for (t = 1; t <= threads; t++)
        text = text " " who ", " plural(counts[t]) " |"
    return text
}

function table(    i, s, t, line, rule, row) {
    unit = want == "token" ? "GB/s of K and V" : "percent of the multiply-add peak"
    line = "| case | pass |" heads("ours") (middle(order[1] "-" counts[1] "-bandwidth") != "" ? heads("% of read bandwidth") : "") " ms |"
    if (want == "features")
        line = line " time for the same work, over the first |"
    for (s = 1; s <= 2; s++)
        if (sets[s] in timed)
            line = line heads(title[sets[s]]) " its time over ours |"
    print "Measured on: " machine ". In " unit ", median (lowest..highest round); ms and ratios with " all_counts() ".\n"
    print line
    rule = line
    gsub(/[^|]+/, "---", rule)
    print rule
    for (i = 1; i <= rows; i++) {
        row = order[i]
        if (!(row in label))
            continue
        line = "| " label[row] " |" cells(row, "-ours")
        if (middle(order[1] "-" counts[1] "-bandwidth") != "")
            line = line cells(row, "-bandwidth")
        line = line " " slashed(row, "-ms") " |"
        if (want == "features")
            line = line " " slashed(row, "-plain") " |"
        for (s = 1; s <= 2; s++)
            if (sets[s] in timed)
                line = line cells(row, "-" sets[s]) " " slashed(row, "-" sets[s] "-over") " |"
        print line
    }
    printf "\nEvery timed run was held against the oracle, %s of %s by sample; the largest error was %s.\n", samples + 0, runs, error
    for (i = 1; i <= rows; i++)
        for (t = 1; t <= threads; t++)
            for (s = 1; s <= 2; s++)
                if ((order[i] "-" counts[t], sets[s]) in refused && order[i] in label)
                    refuse(refused[order[i] "-" counts[t], sets[s]], label[order[i]])
    for (i = 1; i <= reasons; i++)
        print "PyTorch has no figure for " cases_of[reason[i]] ": " reason[i] "."
}
# A case among those that have this reason.
function refuse(why, which) {
    sub(/ \| /, ", ", which)
    if (!(why in cases_of))
        reason[++reasons] = why
    if (!named[why, which]++)
        cases_of[why] = cases_of[why] (cases_of[why] == "" ? "" : "; ") which
}

# ---- A chart: percent of peak over T. Panels: forward, backward for each head size; curves: sets, full and causal ----

function point(name,    panel) {
    panel = get("pass") ", HS " get("head_size")
    if (!panels_known[panel]++)
        panels[++panel_count] = panel
    panel_of[name] = panel
    T_of[name] = get("tokens")
    causal[name] = get("mask") == "causal"
}

function draw(    p, c, s, i, n, curve, key, value, labels, place, number, x, y, swap, round, middle_of, line) {
    curve[1] = "-ours"; curve[2] = "-forced"; curve[3] = "-installed"
    text["-ours"] = "ours"; text["-forced"] = title["forced"]; text["-installed"] = title["installed"]
    print "machine", machine ", " plural(counts[1])
    print "peak", sprintf("%.0f", middle("peak"))
    print "panels", panel_count
    for (p = 1; p <= panel_count; p++) {
        print "panel" p, panels[p]
        labels = 0
        for (c = 1; c <= 6; c++) { # ours, forced, installed; then the same causal
            s = curve[(c - 1) % 3 + 1]
            n = 0
            for (i = 1; i <= rows; i++) {
                key = order[i] "-" counts[1]
                if (panel_of[key] != panels[p] || causal[key] != (c > 3) || (value = middle(key s)) == "")
                    continue
                print "point", p, c, T_of[key], value
                n++
                x = T_of[key]
                y = value
            }
            if (n) {
                number[++labels] = c
                place[labels] = y
                end[c] = x OFS y
            }
        }
        # Names from below, pushed apart until they are `apart` percent from each other.
        for (i = 2; i <= labels; i++)
            for (n = i; n > 1 && place[n] < place[n - 1]; n--) {
                swap = place[n]; place[n] = place[n - 1]; place[n - 1] = swap
                swap = number[n]; number[n] = number[n - 1]; number[n - 1] = swap
            }
        for (round = 1; round <= 200; round++)
            for (i = 2; i <= labels; i++)
                if (place[i] < place[i - 1] + apart) {
                    middle_of = (place[i] + place[i - 1]) / 2
                    place[i] = middle_of + apart / 2
                    place[i - 1] = middle_of - apart / 2
                }
        line = ""
        for (i = 1; i <= labels; i++) {
            line = line " " number[i]
            print "name", p, number[i], end[number[i]], place[i], text[curve[(number[i] - 1) % 3 + 1]] (number[i] > 3 ? ", causal" : "")
        }
        print "curves" p, line
    }
}

END {
    apart = 5
    if (runs && chart)
        draw()
    else if (runs)
        table()
}
