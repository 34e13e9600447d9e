#!/bin/sh
# The nine bars as a table, forward with what the notebook's author measured beside them: notebook_table.sh FILE.tsv
awk -F '\t' '
    BEGIN {
        split("wrapper split-heads packed-qkv einsum sdpa sdpa-mask torch-mha torch-mha-noweights flex", order, " ")
        split("4.68 3.08 3.81 4.11 1.10 1.80 3.04 2.13 13.9", a100, " ")
        split("179 166 190 196 110 99.5 198 168 -", m3, " ")
    }
    NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
    { ms[$at["kernel"]] = $at["ms_median"]; share[$at["kernel"]] = $at["percent_of_peak"]; mib[$at["kernel"]] = $at["peak_mib"]; forward = $at["pass"] == "forward" }
    END {
        printf "  %-22s %10s %10s %12s   %s\n", "implementation", "ms", "% of peak", "memory MiB", forward ? "published ms: A100, M3 MacBook Air" : ""
        for (i = 1; i <= 9; i++) {
            k = order[i]
            if (k in ms)
                printf "  %d %-20s %10.1f %10.0f %12.0f   %6s %6s\n", i, k, ms[k], share[k], mib[k], forward ? a100[i] : "", forward ? m3[i] : ""
        }
    }' "$1"
