#!/bin/sh
# Tests common/ladder.sh: each trick of the fast kernel can still be taken away and the results hold; an edit that finds no place or two,
# one that changes no file, and a kernel whose result is wrong are told.
set -u
build=${BUILD:-build}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
export QUICK=1
rm -rf "$build/ladder/quick" "$build/ladder/backward/quick"
expect() { # WHAT GOT WANTED
    [ "$2" = "$3" ] || { echo "error: ladder.sh: $1: $2, not $3" >&2; cat "$tmp/out" "$tmp/err" >&2; exit 1; }
}
ladder() { TRICKS=$1 sh common/ladder.sh > "$tmp/out" 2> "$tmp/err"; }

# all_hold FOLDER [PASS]
all_hold() {
    sh common/ladder.sh ${2:+"$2"} > "$tmp/out" 2> "$tmp/err"
    expect "exit code" $? 0
    runs=$(wc -l < "$1/steps")
    expect "runs held against the oracle" "$(grep -c "0 of $((runs)) by sample" "$tmp/out")" 1
    expect "rows without a figure" "$(grep '| - | - | - | - |' "$1/ladder.md")" ""
}
all_hold "$build/ladder/backward/quick" backward
rm -r "$build/ladder/backward/quick"
all_hold "$build/ladder/quick"
before=$(find "$build/ladder" -name run -newer "$tmp")
sh common/ladder.sh > "$tmp/out" 2> "$tmp/err"
expect "exit code with nothing left" $? 0
expect "programs built again" "$(find "$build/ladder" -name run -newer "$tmp")" "$before"

# wrong EDIT..: a trick that cannot be right
wrong() {
    { echo "trick wrong 'something' 'some reason'"; echo "${1:-}"; } > "$tmp/tricks.sh"
    ladder "$tmp/tricks.sh"
}
wrong "edit flash_view.c 'no such text' ''"
expect "exit code where an edit finds no place" $? 1
expect "what it says" "$(grep -c 'trick wrong: this stands in flash_view.c in 0 places, not in one: no such text' "$tmp/err")" 1
wrong "edit vectors.h 'Vector' ''"
expect "exit code where an edit finds many places" $? 1
wrong
expect "exit code without an edit" $? 1
wrong "edit vectors.h '1.44269504f' '1.4f'"
expect "exit code of a wrong result" $? 1
expect "what it says" "$(grep -c '^error: .*ladder/wrong/run --bench .* ended with 1' "$tmp/err")" 2
rm -r "$build/ladder/quick" "$build/ladder/wrong"
echo "ladder.sh: all checks passed"
