#!/bin/sh
# Tests common/speed.sh with programs that only pretend, ours and PyTorch: turns, a refusal, a failed step, a stop, going on; then the
# tables' arithmetic on rows made up here.
set -u
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
for chapter in 03_multihead_wrapper 04_packed_qkv 05_einsum_style 07_flash_tiled 08_gqa 09_block_sparse; do
    mkdir -p "$tmp/$chapter"
    cat > "$tmp/$chapter/run" << 'STUB'
#!/bin/sh
[ "$1" != --list ] || { echo "simd qkv forward,backward f32,bf16 cpu"; exit 0; }
echo "ours $*" >> "$LOG"
case "$*" in
*bf16*"--pass backward"*) echo "error: kernel simd has no backward pass in bf16" >&2; exit 2 ;;
*"--lengths"*) [ -f "$LOG.mended" ] || { echo "error: broken" >&2; exit 1; } ;;
esac
[ ! -f "$LOG.slow" ] || sleep 1
case "$*" in *--key-tokens*) echo "simd  10  9 .. 11  2.0 GFLOP/s  12.3 GB/s, 64% of reading" ;; esac
heads=12
while [ "$1" != --tsv ]; do
    case $1 in --heads) heads=$2 ;; --pass) pass=$2 ;; --threads) threads=$2 ;; esac
    shift
done
printf 'machine\tkernel\tdtype\tpass\theads\tkv_heads\ttokens\tkey_tokens\thead_size\tmask\tthreads\tms_median\tgflops\tpercent_of_peak\tmax_abs_err\tchecked\n' > "$2"
printf 'm\tsimd\tf32\t%s\t%s\t%s\t1024\t1024\t64\tnone\t%s\t10\t90\t80\t1e-7\tall\n' "$pass" "$heads" "$heads" "$threads" >> "$2"
STUB
    chmod +x "$tmp/$chapter/run"
done
cat > "$tmp/python" << 'STUB'
#!/bin/sh
[ "$1" != -c ] || exit 0
while read -r line; do
    echo "$line" >> "$LOG"
    case $line in
    "installed "*window*backward*) echo "refused no backward pass" ;;
    installed*dropout*) [ -f "$LOG.mended" ] || exit 1; echo "19 20 21" ;;
    installed*) echo "19 20 21" ;;
    *) echo "4 5 6" ;;
    esac
done
STUB
chmod +x "$tmp/python"
export LOG="$tmp/log" QUICK=1 THREADS="1 2"
speed() { BUILD=$tmp PYTHON=$tmp/python sh common/speed.sh "$@" > "$tmp/out" 2> "$tmp/err"; }
runs() { echo $(($(wc -l < "$LOG"))); }
expect() { # WHAT GOT WANTED
    [ "$2" = "$3" ] || { echo "error: speed.sh: $1: $2, not $3" >&2; cat "$tmp/out" "$tmp/err" >&2; exit 1; }
}
folder=$tmp/speed/quick

touch "$LOG.slow"
BUILD=$tmp PYTHON=$tmp/python sh common/speed.sh features bf16 masks > "$tmp/out" 2> /dev/null &
program=$!
for _ in $(seq 300); do
    [ -z "$(find "$folder/rows" -name '*.tsv' 2> /dev/null)" ] || break
    sleep 0.1
done
kill -TERM $program
wait $program
expect "exit code when stopped" $? 130
expect "what it says when stopped" "$(grep -c 'Stopped with .* left' "$tmp/out")" 1
rm "$LOG.slow" "$LOG"
stopped=$(find "$folder/rows" -name '*.tsv' | wc -l)
[ "$stopped" -gt 0 ] || expect "steps done when stopped" 0 some
speed features bf16 masks
expect "exit code with failed steps" $? 1
steps=$(($(wc -l < "$folder/steps")))
expect "steps run" "$(runs)" $((steps - stopped))
expect "failed steps of ours reported" "$(grep -c 'error: broken' "$tmp/err")" 2
expect "failed steps of PyTorch's reported" "$(grep -c 'error: PyTorch (installed) gave no answer' "$tmp/err")" 2
expect "turns" "$(cut -d ' ' -f 1 "$folder/steps" | cut -f 1 | sed 's/.*-//' | head -n 6 | tr '\n' ' ')" "ours installed forced ours installed forced "
touch "$LOG.mended"
before=$(runs)
speed features bf16 masks
expect "exit code when mended" $? 0
expect "steps run, the failed ones again" "$(runs)" $((before + 4))
speed features bf16 masks
expect "exit code with nothing left" $? 0
expect "steps run with nothing left" "$(runs)" $((before + 4))
expect "what ours refuses has no row" "$(grep -c 'backward' "$folder/bf16.md")" 0
expect "what PyTorch refuses is said" "$(grep -c '^PyTorch has no figure for .*: no backward pass.$' "$folder/masks.md")" 1
expect "a row" "$(grep -m 1 'forward' "$folder/features.md")" "| 12 heads, T 1024, HS 64 | forward | 80.0 | 10 | 1 | 40.0 | 2 | 160.0 | 0.5 |"
expect "pipes left" "$(find "$folder" -name ask -o -name answer)" ""
BUILD=$tmp PYTHON=$tmp/none sh common/speed.sh > /dev/null 2>&1
expect "exit code without the PyTorch it was begun with" $? 2
speed nonsense
expect "exit code for a table there is not" $? 2
rm -r "$folder"
BUILD=$tmp PYTHON=$tmp/none sh common/speed.sh > "$tmp/out" 2>&1
expect "exit code without PyTorch" $? 0
expect "tables without PyTorch" "$(find "$folder" -name '*.md' | wc -l | tr -d ' ')" 8
expect "the percent of reading" "$(grep -c '| 64.0 | 64.0 | 10 / 10 |' "$folder/token.md")" 1
expect "words of PyTorch" "$(grep -l PyTorch "$folder"/*.md)" ""

# Three rounds of two cases, on one thread and two; PyTorch's second round is slow, and all is twice as slow in round 3.
printf 'core\tforward\t1\tc\to\ta\ncore\tforward\t2\tc\to\ta\ncore\tforward\t1\tc\to\tb\nfeatures\tforward\t1\tc\to\ta\nfeatures\tforward\t1\tc\to\tb\n' > "$tmp/cases"
printf 'machine\tkernel_set\tms_min\tms_median\tms_max\trefused\tcase\tround\nm\tinstalled\t1\t20\t1\t\ta-1\t1\nm\tinstalled\t1\t60\t1\t\ta-1\t2\nm\tinstalled\t1\t40\t1\t\ta-1\t3\nm\tforced\t\t\t\tnone\tb-1\t1\n' > "$tmp/pytorch.tsv"
row() { printf 'm\tsimd\tforward\t%s\t8\t2\t1\t5\t64\tcausal\t1\t0\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" "$6" "$7" "$8"; }
{
    printf 'machine\tkernel\tpass\tthreads\theads\tkv_heads\ttokens\tkey_tokens\thead_size\tmask\tbias\tdropout\tms_median\tgflops\tpercent_of_peak\tmax_abs_err\tchecked\tcase\tround\n'
    row 1 10 100 80 1e-7 all a-1 1
    row 2 6 190 70.25 1e-7 all a-2 1
    row 1 10 50 40 1e-7 all b-1 1
    row 1 10 100 84 3e-6 sample a-1 2
    row 1 20 50 81 1e-7 all a-1 3
    row 1 20 40 60 1e-7 all b-1 3
} > "$tmp/ours.tsv"
table() { awk -f common/median.awk -f common/speed.awk -v want="$1" "$tmp/cases" "$tmp/pytorch.tsv" "$tmp/ours.tsv" > "$tmp/out"; }
table core
case="8 heads over 2, T 1, TK 5, HS 64, causal, bias | forward"
expect "medians, spreads, ratios" "$(sed -n 5p "$tmp/out")" "| $case | 81.0 (80..84) | 70.2 | 10 / 6 | 40.0 (14..40) | - | 2 / - |"
expect "no figures" "$(sed -n 6p "$tmp/out")" "| $case | 50.0 (40..60) | - | 15 / - | - | - | - / - |"
expect "samples and the largest error" "$(grep -c '1 of 6 by sample; the largest error was 3e-6' "$tmp/out")" 1
table features
expect "over the first case, in its round" "$(sed -n 6p "$tmp/out" | cut -d '|' -f 6)" " 1.62 "
printf 'token\tforward\t1\tc\to\ta\n' > "$tmp/cases"
awk -F '\t' -v OFS='\t' '{ print $0, (NR == 1 ? "gb_per_s" : 10 + NR), (NR == 1 ? "percent_of_bandwidth" : 70 + NR) }' "$tmp/ours.tsv" > "$tmp/new" && mv "$tmp/new" "$tmp/ours.tsv"
table token
expect "GB/s and percent of bandwidth" "$(sed -n 5p "$tmp/out")" "| $case | 15.0 (12..16) | 75.0 (72..76) | 10 | 6.0 (2..8) | 2 |"
printf 'core\tforward\t1\tc\to\ta\n' > "$tmp/cases"
sed 's/3e-6/nan/' "$tmp/ours.tsv" > "$tmp/new" && mv "$tmp/new" "$tmp/ours.tsv"
table core
expect "an error of NaN" "$(grep -c 'error was nan' "$tmp/out")" 1
echo "speed.sh: all checks passed"
