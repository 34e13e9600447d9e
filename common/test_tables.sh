#!/bin/sh
# Tests common/tables.sh with a program that only pretends: a refusal, a failed step, a stop, going on after them.
set -u
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
for chapter in 03_multihead_wrapper 04_packed_qkv 05_einsum_style 07_flash_tiled; do
    mkdir -p "$tmp/$chapter"
    cat > "$tmp/$chapter/run" << 'STUB'
#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
*"--kernel sdpa"*) echo "error: kernel sdpa needs 17.2 GiB and 3.0 GiB are free" >&2; exit 3 ;;
*"--kernel stacked"*) [ -f "$LOG.mended" ] || { echo "error: broken" >&2; exit 1; } ;;
esac
[ ! -f "$LOG.slow" ] || sleep 1
while [ "$1" != --tsv ]; do shift; done
printf 'machine\tkernel\tthreads\tms_median\nm\tpacked-qkv\t1\t2.5\n' > "$2"
STUB
    chmod +x "$tmp/$chapter/run"
done
export LOG="$tmp/log"
run() { BUILD=$tmp sh common/tables.sh wrapper > "$tmp/out" 2> "$tmp/err"; }
runs() { echo $(($(wc -l < "$tmp/log"))); }
expect() { # WHAT GOT WANTED
    [ "$2" = "$3" ] || { echo "error: tables.sh: $1: $2, not $3" >&2; cat "$tmp/out" "$tmp/err" >&2; exit 1; }
}
touch "$tmp/log.slow"
BUILD=$tmp sh common/tables.sh wrapper > "$tmp/out" 2> /dev/null &
sleep 0.5
kill -TERM $!
wait $!
expect "exit code when stopped" $? 130
expect "what it says when stopped" "$(grep -c 'Stopped with .* left' "$tmp/out")" 1
rm "$tmp/log.slow" "$tmp/log"
stopped=$(find "$tmp/tables" -name '*-*-*.tsv' | wc -l)
run; expect "exit code with failed steps" $? 1
threads=$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)
steps=$((threads > 1 ? 30 : 15))
expect "steps run" "$(runs)" $((steps - stopped))
expect "failed steps reported" "$(grep -c 'error: broken' "$tmp/err")" $((steps / 3))
expect "refused steps" "$(grep -l 'needs 17.2 GiB' "$tmp"/tables/wrapper/*.refused | wc -l | tr -d ' ')" $((steps / 3))
touch "$tmp/log.mended"
run; expect "exit code when mended" $? 0
expect "steps run, the failed ones again" "$(runs)" $((steps - stopped + steps / 3))
run; expect "exit code with nothing left" $? 0
expect "steps run with nothing left" "$(runs)" $((steps - stopped + steps / 3))
expect "rows, one a step that was not refused" "$(($(wc -l < "$tmp/tables/wrapper.tsv")))" $((1 + steps * 2 / 3))
expect "packed-qkv's median" "$(sed -n 's/^| packed-qkv | \([^ ]*\).*/\1/p' "$tmp/tables/wrapper.md")" 2500
BUILD=$tmp sh common/tables.sh claims > "$tmp/out" 2> "$tmp/err"
expect "exit code of claims" $? 0
expect "claims, all steps but the refused ones" "$(find "$tmp/tables/claims" -name '*.tsv' | wc -l | tr -d ' ')" 31
BUILD=$tmp sh common/tables.sh nonsense > /dev/null 2>&1
expect "exit code for a table there is not" $? 2
echo "tables.sh: all checks passed"
