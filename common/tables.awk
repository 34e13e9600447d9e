# Writes one of make tables' tables as Markdown, with median.awk: -v table=NAME [reference] NAME.refused NAME.tsv [more.tsv]
# Rows are found by column names; where steps took turns, a figure is the median of their medians.

BEGIN { FS = "\t" }

function ratio(a, b) { return middle(a) != "" && middle(b) > 0 ? short(middle(a) / middle(b)) : "-" }
function cell(key) { return middle(key) != "" ? short(middle(key)) : key in refused ? refused[key] : "-" }

/^#/ { next }
FILENAME ~ /\.refused$/ { refused[$1] = $2; next }
FILENAME != last { last = FILENAME; split("", at); for (i = 1; i <= NF; i++) at[$i] = i; next }
FILENAME ~ /reference/ {
    where = get("pass") SUBSEP get("T") SUBSEP get("dropout") + 0 SUBSEP get("bias") SUBSEP get("causal")
    published[where] = get("cuda") " | " get("triton") " | " get("unfused")
    slower[where] = get("triton") > 0 ? short(get("unfused") / get("triton")) : "-"
    next
}
{ machine = get("machine") }
table == "a100" {
    add(get("kernel") "-" get("tokens") "-" get("dropout") + 0 "-" get("bias") "-" (get("mask") == "causal") "-" get("pass"), get("ms_median"))
}
table == "layers" {
    rows[++n] = sprintf("| %s | %s | %s | %s | %s | %s |", get("layers"), get("tokens"), get("kernel"), short(get("ms")), short(get("peak_mib")), get("how"))
}
table == "wrapper" { add(get("kernel") "-" get("threads"), get("ms_median")); if (get("threads") > most) most = get("threads") }
table == "memory" {
    key = get("kernel") "-" get("batch")
    add(key, get("ms_median"))
    text[key] = short(get("ms_median")) " | " short(get("percent_of_peak")) " | " short(get("peak_mib"))
}
table == "tokens" {
    key = substr(get("chapter"), 1, 2) "-" get("kernel")
    add(key "-" get("tokens"), get("ms_median"))
    mib[key "-" get("tokens")] = get("peak_mib")
}
table == "claims" && ("claim" in at) { numbers[++n] = "| " get("claim") " | `07: ./run claims` | " short(get("figure")) " " get("unit") " |" }
table == "claims" && !("claim" in at) { add(get("kernel") "-" get("pass"), get("ms_median")) }

END {
    print "Measured on: " machine ".\n"
    if (table == "a100") {
        print "| pass | T | dropout | bias | causal | A100, CUDA | Triton | unfused | unfused / Triton | ours: materialised, ms | simd, ms | materialised / simd |"
        print "|---|---|---|---|---|---|---|---|---|---|---|---|"
        split("forward backward both", passes, " ")
        for (p = 1; p <= 3; p++)
            for (T = 2048; T <= 8192; T *= 2)
                for (bias = 0; bias <= 1; bias++)
                    for (dropout = 0; dropout <= 0.1; dropout += 0.1)
                        for (causal = 0; causal <= 1; causal++) {
                            what = T "-" dropout "-" bias "-" causal "-" passes[p]
                            where = passes[p] SUBSEP T SUBSEP dropout SUBSEP bias SUBSEP causal
                            if (passes[p] == "backward") {
                                less("materialised-" T "-" dropout "-" bias "-" causal)
                                less("simd-" T "-" dropout "-" bias "-" causal)
                            }
                            print "| " passes[p] " | " T " | " dropout " | " bias " | " causal " | " published[where] " | " slower[where] " | " \
                                cell("materialised-" what) " | " cell("simd-" what) " | " ratio("materialised-" what, "simd-" what) " |"
                        }
    } else if (table == "layers") {
        print "| layers | T | kernel | ms | MiB | how |"
        print "|---|---|---|---|---|---|"
        for (i = 1; i <= n; i++)
            print rows[i]
    } else if (table == "wrapper") {
        print "| kernel | 1 thread, us | over `sdpa` | " most " threads, us | over `sdpa` |"
        print "|---|---|---|---|---|"
        split("stacked packed-qkv sdpa", kernels, " ")
        for (k = 1; k <= 3; k++)
            print "| " kernels[k] " | " short(1000 * middle(kernels[k] "-1")) " | " ratio(kernels[k] "-1", "sdpa-1") " | " short(1000 * middle(kernels[k] "-" most)) " | " ratio(kernels[k] "-" most, "sdpa-" most) " |"
    } else if (table == "memory") {
        print "| batch | kernel | ms | percent of peak | MiB beyond inputs and outputs |"
        print "|---|---|---|---|---|"
        split("1 4 32", batches, " ")
        split("materialised simd", kernels, " ")
        for (b = 1; b <= 3; b++)
            for (k = 1; k <= 2; k++) {
                key = kernels[k] "-" batches[b]
                print "| " batches[b] " | " kernels[k] " | " (key in text ? text[key] : refused[key] " | | ") " |"
            }
    } else if (table == "tokens") {
        for (part = 1; part <= 2; part++) {
            print (part == 1 ? "Milliseconds, median" : "\nMiB beyond inputs and outputs") ", over T:\n"
            print "| kernel | 128 | 256 | 512 | 1024 | 2048 | 4096 | 8192 | 16384 |\n|---|---|---|---|---|---|---|---|---|"
            m = split("01-sdpa 06-online 07-materialised 07-tiled 07-simd 08-repeat-kv 08-grouped 08-simd 09-dense-mask 09-block-sparse 09-simd " \
                      "03-stacked 03-wrapper 04-split-heads 04-packed-qkv 04-torch-mha 05-einsum-loops 05-einsum 07-sdpa 07-sdpa-mask " \
                      "07-torch-mha-noweights 08-llama 09-flex", kernels, " ")
            for (k = 1; k <= m; k++) {
                line = "| " kernels[k] " |"
                for (T = 128; T <= 16384; T *= 2) {
                    key = kernels[k] "-" T
                    reason = refused[key]
                    sub(/ and .*/, "", reason)
                    too_slow = sub(/not run: it would take /, "", reason)
                    if (reason == "" || (part == 2 && too_slow)) # no seconds among MiB
                        reason = "-"
                    line = line " " (middle(key) == "" ? reason : part == 1 ? short(middle(key)) : short(mib[key])) " |"
                }
                print line
            }
        }
    } else if (table == "claims") {
        print "| claim, as a ratio of times | command, `--batch 8 --tokens 1024 --embed 768 --heads 12 --bench` | forward; forward and backward |"
        print "|---|---|---|"
        claim("three projections over one packed", "`04: --kernel split-heads`, `packed-qkv`", "split-heads", "packed-qkv")
        claim("a mask tensor over the flag", "`07: --kernel sdpa-mask`, `sdpa`", "sdpa-mask", "sdpa")
        claim("weights returned over not", "`04: --kernel torch-mha`, `07: torch-mha-noweights`", "torch-mha", "torch-mha-noweights")
        claim("einsum over products", "`05: --kernel einsum`, `04: split-heads`", "einsum", "split-heads")
        for (i = 1; i <= n; i++)
            print numbers[i]
    }
}
# Where backward was not timed by itself it is both less forward.
function less(what) {
    if (middle(what "-backward") == "" && middle(what "-both") != "" && middle(what "-forward") != "")
        add(what "-backward", middle(what "-both") - middle(what "-forward"))
    else if (middle(what "-backward") == "" && (what "-both") in refused)
        refused[what "-backward"] = refused[what "-both"]
}
function claim(what, command, a, b) {
    print "| " what " | " command " | " ratio(a "-forward", b "-forward") "; " ratio(a "-both", b "-both") " |"
}
