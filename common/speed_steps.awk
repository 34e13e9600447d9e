# The cases of make speed become steps (steps.sh), round by round, and in a round one set after the other: ours, then PyTorch's. Reads
# speed.sh's cases. Variables: sets, most (rounds), wanted (groups), quick. A step is rows/CASE-ROUND-SET; how often a case is run in a round, and in how
# many, follows from its work alone.
BEGIN { FS = OFS = "\t" }

function option(name, otherwise,    value) {
    if (!match($5 " ", "--" name " [^ ]+"))
        return otherwise
    value = substr($5, RSTART, RLENGTH)
    sub(/.* /, "", value)
    return value
}

# About how many GFLOP a case is.
function work(    T, TK, mask, share, flops, times) {
    T = option("tokens", 1024)
    TK = option("key-tokens", T)
    mask = option("mask", "none")
    share = $5 ~ /--causal/ || mask == "causal" || option("embed", 0) ? 0.5 : 1
    if (sub(/window:/, "", mask))
        share = mask / TK
    flops = 4 * option("batch", 1) * T * TK * option("embed", option("heads", 12) * option("head-size", 64)) * share
    times = $2 == "forward" ? 1 : $2 == "backward" ? 2.5 : 3.5
    flops += 8 * option("batch", 1) * T * option("embed", 0) * option("embed", 0) # a module's projections
    return 1e-9 * times * flops
}

index(" " wanted " ", " " $1 " ") {
    name = $6 "-" $3
    if (seen[name]++)
        next
    gflop = work()
    if (quick && gflop > 60)
        next
    seconds = gflop / 100 / $3
    n++
    repeat = quick || seconds > 1 ? 1 : seconds > 0.2 ? 3 : 7
    rounds[n] = quick || seconds > 4 ? 1 : seconds > 1 ? 2 : 3
    if (rounds[n] > most)
        rounds[n] = most
    if (rounds[n] > longest)
        longest = rounds[n]
    before = $2 == "backward" ? seconds / 2.5 : 0 # its forward pass
    warm = repeat > 1
    # Ours runs once for the check, and forward before each backward.
    expected[n, "ours"] = 0.4 + (1 + warm + repeat) * (seconds + before)
    expected[n, "forced"] = 0.1 + before + (warm + repeat) * seconds
    expected[n, "installed"] = 2 * expected[n, "forced"]
    step[n] = "rows/" name
    chapter[n] = $4
    options[n] = $5 " --pass " $2 " --threads " $3 " --repeat " repeat ($2 == "forward" ? "" : " --dout randn")
}
END {
    m = split(sets, set, " ")
    for (round = 1; round <= longest; round++)
        for (i = 1; i <= n; i++)
            for (s = 1; s <= m && round <= rounds[i]; s++)
                print step[i] "-" round "-" set[s], sprintf("%.2f", expected[i, set[s]]), (set[s] == "ours" ? chapter[i] : set[s]), options[i]
}
