#!/bin/sh
# make tables: the tables that others have published, measured anew on this machine.   make table-NAME: one of them.
#
# A table is a list of steps (steps.sh). To start anew, remove build/tables.
# tables.sh render: measures nothing, writes the tables of what is there.
set -u
build=${BUILD:-build}
tables=$build/tables
names="wrapper layers memory claims tokens a100"
measure=yes
[ "${1:-}" = render ] && measure=no && shift
wanted=${*:-$names}

for name in $wanted; do
    case " $names " in
    *" $name "*) ;;
    *) echo "error: there is no table $name; there are $names" >&2; exit 2 ;;
    esac
done
mkdir -p "$tables" || exit 2
. common/steps.sh

# ---- The steps: TABLE/FILE, seconds that it takes at 250 GFLOP/s, chapter, options ----

# The 72 rows of the A100's table. At T = 8192 backward is both less forward, to save a third of an hour.
steps_of_a100() {
    for tokens in 2048 4096 8192; do
        for kernel in materialised simd; do
            for features in "0 0" "0.1 0" "0 1" "0.1 1"; do
                dropout=${features% *} bias=${features#* }
                for causal in 0 1; do
                    for pass in forward backward both; do
                        [ $tokens-$pass != 8192-backward ] || continue
                        options="--kernel $kernel --pass $pass --batch 1 --heads 12 --tokens $tokens --head-size 128"
                        [ $dropout = 0 ] || options="$options --dropout $dropout"
                        [ $bias = 0 ] || options="$options --bias randn"
                        [ $causal = 0 ] || options="$options --causal"
                        options="$options --repeat $((tokens > 2048 ? 1 : 3))"
                        seconds=$(awk -v T=$tokens -v k=$kernel -v p=$pass -v d=$dropout -v b=$bias 'BEGIN {
                            s = (p == "forward" ? 1 : 3) * (d > 0 ? k == "simd" ? 4 : 2 : 1) * (b ? 1.7 : 1) * (k == "simd" ? 0.3 : 0.7) * (T > 2048 ? 0.7 : 1)
                            printf "%.1f", s * T * T / 4e6 }')
                        step "a100/$kernel-$tokens-$dropout-$bias-$causal-$pass" "$seconds" 07_flash_tiled "$options"
                    done
                done
            done
        done
    done
}

# Naive against flash in many layers, whose activations are held until the backward pass.
steps_of_layers() {
    step layers/12-512 15 07_flash_tiled "layers --layers 12 --tokens 512"
    step layers/24-512 25 07_flash_tiled "layers --layers 24 --tokens 512"
    step layers/48-1024 120 07_flash_tiled "layers --layers 48 --tokens 1024"
}

# A wrapper around 32 heads against one fused call, six tokens; the kernels take turns.
steps_of_wrapper() {
    for round in 1 2 3 4 5; do
        for kernel in 03_multihead_wrapper:stacked 04_packed_qkv:packed-qkv 07_flash_tiled:sdpa; do
            for threads in 1 $(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2); do
                step "wrapper/${kernel#*:}-$threads-$round" 0.2 "${kernel%:*}" \
                    "--kernel ${kernel#*:} --batch 1 --tokens 6 --embed 16 --embed-out 256 --heads 32 --threads $threads --repeat 201"
            done
        done
    done
}

# The SDPA notebook's large case, whole and in smaller batches.
steps_of_memory() {
    for batch in 1 4 32; do
        for kernel in materialised simd; do
            step "memory/$kernel-$batch" $((batch * 3)) 07_flash_tiled \
                "--kernel $kernel --batch $batch --heads 32 --tokens 2048 --head-size 224 --repeat $((batch < 32 ? 3 : 1))"
        done
    done
}

# Every kernel over T, 12 causal heads of 64. One whose next run would take over `patience` milliseconds stops there.
patience=3000
steps_of_tokens() {
    for tokens in 128 256 512 1024 2048 4096 8192 16384; do
        for chapter in "01_self_attention sdpa" "06_online_softmax online" "07_flash_tiled materialised tiled simd" \
            "08_gqa repeat-kv grouped simd" "09_block_sparse dense-mask block-sparse simd"; do
            for kernel in ${chapter#* }; do
                step "tokens/${chapter%%_*}-$kernel-$tokens" $((1 + tokens / 4000)) "${chapter%% *}" \
                    "--kernel $kernel --batch 1 --heads 12 --head-size 64 --tokens $tokens --causal --repeat $((tokens > 1024 ? 3 : 7))"
            done
        done
        for chapter in "03_multihead_wrapper stacked wrapper" "04_packed_qkv split-heads packed-qkv torch-mha" \
            "05_einsum_style einsum-loops einsum" "07_flash_tiled sdpa sdpa-mask torch-mha-noweights" "08_gqa llama" "09_block_sparse flex"; do
            for kernel in ${chapter#* }; do
                step "tokens/${chapter%%_*}-$kernel-$tokens" $((1 + tokens / 2000)) "${chapter%% *}" \
                    "--kernel $kernel --batch 1 --embed 768 --heads 12 --tokens $tokens --repeat $((tokens > 1024 ? 3 : 7))"
            done
        done
    done
}

# Claims that one hears: each is a ratio of two kernels, which take turns.
steps_of_claims() {
    for round in 1 2 3; do
        for pass in forward both; do
            for kernel in 04_packed_qkv:split-heads 04_packed_qkv:packed-qkv 05_einsum_style:einsum 07_flash_tiled:sdpa \
                07_flash_tiled:sdpa-mask 04_packed_qkv:torch-mha 07_flash_tiled:torch-mha-noweights; do
                step "claims/${kernel#*:}-$pass-$round" "$([ $pass = both ] && echo 12 || echo 4)" "${kernel%:*}" \
                    "--kernel ${kernel#*:} --pass $pass --batch 8 --tokens 1024 --embed 768 --heads 12 --repeat $([ $pass = both ] && echo 2 || echo 3)"
            done
        done
    done
    step claims/numbers 3 07_flash_tiled claims
}

# ---- Walking them ----

# column FILE NAME: a column's values
column() { awk -F '\t' -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next } { print $at[name] }' "$1"; }

# Why a kernel of the table over T need not run at this T: what it took at half of it says how long it would take.
too_slow() {
    case $1 in tokens/*) ;; *) return 1 ;; esac
    half=$tables/${1%-*}-$((${1##*-} / 2))
    if [ -f "$half.refused" ]; then
        reason=$(sed -n 's/^not run: it would take about \([0-9]*\) s$/\1/p' "$half.refused" | awk '{ print "not run: it would take about " 4 * $1 " s" }')
    elif [ -f "$half.tsv" ]; then
        reason=$(column "$half.tsv" ms_median | awk -v patience=$patience '4 * $1 > patience { printf "not run: it would take about %.0f s", 4 * $1 / 1000 }')
    else
        return 1
    fi
    [ -n "$reason" ]
}

walk() { walk_rows "$@"; }

folder=$tables
list=$tables/steps
for name in $wanted; do
    mkdir -p "$tables/$name"
    "steps_of_$name"
done | awk -F '\t' '!seen[$1]++' > "$list" # one core: 1 thread and all threads are the same
touch "$tables/seconds" # what each step took: its name, seconds, the estimate

[ $measure = no ] || walk_all

# ---- The tables themselves ----

for name in $wanted; do
    # One file of all rows, in the steps' order.
    header=no
    grep "^$name/" "$list" | grep -v /numbers | cut -f 1 | while read -r file; do
        [ -f "$tables/$file.tsv" ] || continue
        if [ $header = yes ]; then sed 1d "$tables/$file.tsv"; else cat "$tables/$file.tsv"; fi
        header=yes
    done > "$tables/$name.tsv"
    [ -s "$tables/$name.tsv" ] || { rm -f "$tables/$name.tsv"; continue; }
    for refused in "$tables/$name"/*.refused; do
        [ -f "$refused" ] && printf '%s\t%s\n' "$(basename "$refused" .refused)" "$(cat "$refused")"
    done > "$tables/$name.refused"
    case $name in
    a100) set -- 07_flash_tiled/reference/a100_flash_table.tsv "$tables/a100.refused" "$tables/a100.tsv" ;;
    claims) set -- "$tables/claims.refused" "$tables/claims.tsv" "$tables/claims/numbers.tsv" ;;
    *) set -- "$tables/$name.refused" "$tables/$name.tsv" ;;
    esac
    awk -f common/median.awk -f common/tables.awk -v table="$name" "$@" > "$tables/$name.md" || status=1
    if [ $measure = yes ]; then
        printf '\n== %s\n\n' "$name"
        cat "$tables/$name.md"
    fi
done
if [ -f "$tables/tokens.tsv" ] && command -v gnuplot > /dev/null 2>&1; then
    gnuplot -e "data='$tables/tokens.tsv'; output='$tables/tokens'; machine='$(column "$tables/tokens.tsv" machine | head -n 1)'" common/sizes.gp || status=1
fi
[ $measure = no ] || printf '\nTables and charts are in %s.\n' "$tables"
exit $status
