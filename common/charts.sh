#!/bin/sh
# Draws the charts of a folder of measurements (build/demo, or the chapters' measured/ folders): charts.sh FOLDER
# FOLDER holds common/notebook.tsv, 06_online_softmax/tokens.tsv and so on; each chart lands beside its TSV as SVG and PNG.
set -u
folder=$1
if ! command -v gnuplot > /dev/null 2>&1; then
    echo "No charts: gnuplot is missing; install gnuplot-nox and type make demo again."
    exit 0
fi
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# column FILE NAME: a column's values
column() { awk -F '\t' -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } { print $at[name] }' "$1"; }
# first FILE NAME: the first of them
first() { column "$1" "$2" | head -n 1; }
machine_of() { first "$1" machine; }
threads_of() {
    case $(first "$1" device):$(first "$1" threads) in
    cpu:1) echo "1 thread" ;;
    cpu:*) echo "$(first "$1" threads) threads" ;;
    *) echo "device $(first "$1" device)" ;;
    esac
}

# nine_bars NAME PEERS WHAT: common/NAME.tsv, with PyTorch's bars from common/PEERS.tsv where there are any
nine_bars() {
    notebook=$folder/common/$1.tsv peers=$folder/common/$2.tsv
    [ -f "$notebook" ] || return 0
    [ -f "$peers" ] || peers=/dev/null
    awk -F '\t' -v OFS='\t' -v ours="$notebook" '
        BEGIN {
            split("wrapper split-heads packed-qkv einsum sdpa sdpa-mask torch-mha torch-mha-noweights flex", order, " ")
        }
        FNR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        FILENAME == ours { ms[$at["kernel"]] = $at["ms_median"]; next }
        { peer[$at["kernel"], $at["kernel_set"]] = $at["ms_median"] }
        END {
            for (i = 1; i <= 9; i++)
                if (order[i] in ms)
                    print i, "\"" i " " order[i] "\"", ours_of(order[i]), value(order[i], "installed"), value(order[i], "forced")
        }
        function ours_of(kernel) { return (kernel, "ours") in peer ? peer[kernel, "ours"] : ms[kernel] } # of the same run
        function value(kernel, set) { return (kernel, set) in peer ? peer[kernel, set] : "nan" }
    ' "$peers" "$notebook" | tr '\t' ' ' > "$tmp/bars"
    gnuplot -e "data='$tmp/bars'; output='$folder/common/$1'; machine='$(machine_of "$notebook"), $(threads_of "$notebook")'; what='$3'; peers=$([ "$peers" = /dev/null ] && echo 0 || grep -c -m 2 'wrapper.*\(installed\|forced\)' "$peers"); title_text='Nine ways to multi-head attention: $(first "$notebook" batch) x $(first "$notebook" tokens) tokens x $(first "$notebook" embed), $(first "$notebook" heads) heads'" common/notebook.gp || exit 1
}
nine_bars notebook pytorch "forward"
nine_bars notebook_both pytorch_both "forward and backward"
nine_bars notebook_gpu pytorch_gpu "forward"
nine_bars notebook_gpu_both pytorch_gpu_both "forward and backward"

# The ladder on a GPU: 07_flash_tiled/ladder_HEADSIZE_MASK_PASS.tsv, with PyTorch's backends from pytorch_attention.tsv where there are any
for tsv in "$folder"/07_flash_tiled/ladder_*.tsv; do
    [ -f "$tsv" ] && [ "$(wc -l < "$tsv")" -gt 1 ] || continue
    peers=$folder/pytorch_attention.tsv
    [ -f "$peers" ] || peers=/dev/null
    awk -F '\t' -v OFS='\t' -v size="$(first "$tsv" head_size)" -v mask="$(first "$tsv" mask)" -v pass="$(first "$tsv" pass)" '
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; print; next }
        $at["head_size"] == size && $at["mask"] == mask && $at["pass"] == pass {
            sub(/_ATTENTION/, "", $at["kernel"])
            $at["kernel"] = "PyTorch-" tolower($at["kernel"]) ($at["dtype"] == "bfloat16" ? "-bf16" : "")
            print
        }' "$peers" > "$tmp/peers"
    kernels=$({ column "$tsv" kernel; column "$tmp/peers" kernel; } | awk '!seen[$0]++' | tr '\n' ' ')
    gnuplot -e "data='$tsv $tmp/peers'; output='${tsv%.tsv}'; kernels='$kernels'; title_text=\"$(first "$tsv" pass), heads of $(first "$tsv" head_size), $(($(first "$tsv" tokens) * $(first "$tsv" batch))) tokens in all, mask $(first "$tsv" mask)\n$(machine_of "$tsv"), $(threads_of "$tsv")\"" common/ladder.gp || exit 1
done

# over_tokens FOLDER NAME KERNELS TITLE: FOLDER/NAME.tsv becomes a chart of that name
over_tokens() {
    tsv=$folder/$1/$2.tsv
    [ -f "$tsv" ] || return 0
    gnuplot -e "data='$tsv'; output='$folder/$1/$2'; kernels='$3'; machine='$(machine_of "$tsv"), $(threads_of "$tsv")'; title_text='$4'" common/tokens.gp || exit 1
}
over_tokens 06_online_softmax tokens "materialised online" "Attention over T: 4 heads of 64, causal"
over_tokens 07_flash_tiled tokens "materialised tiled simd" "Attention over T: 4 heads of 64, causal"
over_tokens 09_block_sparse tokens "materialised dense-mask block-sparse simd" "Attention over T: 4 heads of 64, window of 256 keys"
over_tokens 09_block_sparse tokens_backward "dense-mask block-sparse simd" "Backward over T: 4 heads of 64, window of 256 keys"

decode=$folder/08_gqa/decode.tsv
if [ -f "$decode" ]; then
    gnuplot -e "data='$decode'; output='$folder/08_gqa/decode'; machine='$(machine_of "$decode")'; title_text='The next token: with a KV cache, and recomputing everything'" common/decode.gp || exit 1
fi
masks=$folder/09_block_sparse/masks.tsv
if [ -f "$masks" ]; then
    gnuplot -e "data='$masks'; output='$folder/09_block_sparse/masks'" common/masks.gp || exit 1
fi
