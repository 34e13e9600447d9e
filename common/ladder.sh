#!/bin/sh
# make ladder: what each trick of chapter 7's fast kernel is worth. For each of 07_flash_tiled/tricks.sh a program is built from copies of
# the kernel's files with that trick taken away, all else as it was. Whole and lesser kernels take turns, and ./run holds each against
# the oracle before it is timed. A run is a step (steps.sh). All lands in build/ladder; to start anew, remove it.
#
#   ROUNDS=7   at most      QUICK=1   one round of small cases, into build/ladder/quick      TRICKS=file   other tricks
#
# ladder.sh render: measures nothing, writes the table of what is there.
set -u
build=${BUILD:-build}
programs=$build/ladder
folder=$programs${QUICK:+/quick}
list=$folder/steps
status=0
fail() { echo "error: $*" >&2; exit 1; }
mkdir -p "$folder/rows" || exit 2

# ---- Kernels less a trick each: lines NAME, WHAT, WHY, ONLY in tricks; a folder of sources each ----

trick() { # NAME WHAT WHY [ONLY]
    finish
    name=$1 edits=0
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >> "$folder/tricks"
    rm -rf "$folder/new"
    mkdir -p "$folder/new" "$programs/$name"
    cp 07_flash_tiled/flash_tiled_simd.[ch] 07_flash_tiled/flash_view.c 07_flash_tiled/flash_pairs.c common/vectors.h "$folder/new/"
}

edit() { # FILE TEXT REPLACEMENT
    TEXT=$2 REPLACEMENT=$3 awk '
        BEGIN { text = ENVIRON["TEXT"] }
        (at = index($0, text)) > 0 {
            found += 1 + (index(substr($0, at + 1), text) > 0)
            $0 = substr($0, 1, at - 1) ENVIRON["REPLACEMENT"] substr($0, at + length(text))
        }
        { print }
        END { if (found != 1) print found + 0 > "/dev/stderr"; exit found != 1 }' "$folder/new/$1" > "$folder/edited" 2> "$folder/found" ||
        fail "trick $name: $1 has this in $(cat "$folder/found") places, not in one: $2"
    mv "$folder/edited" "$folder/new/$1"
    edits=$((edits + 1))
}

# Only a file that has become another is replaced, so that only what is changed is built again.
finish() {
    [ -n "${name:-}" ] || return 0
    [ $edits -gt 0 ] || fail "trick $name: nothing is edited"
    for file in "$folder/new"/*; do
        cmp -s "$file" "$programs/$name/${file##*/}" || cp "$file" "$programs/$name/"
    done
    wanted="$wanted $programs/$name/run"
}

names() { cut -f 1 "$folder/tricks"; }

# ---- The steps: rows/TRICK-CASE-ROUND ----

steps() {
    for round in $(seq "$rounds"); do
        while IFS='	' read -r case seconds options; do
            while IFS='	' read -r name _ _ only; do
                case "$options" in *"--$only"*) ;; *) continue ;; esac
                program=ladder/$name kernel=simd repeat=
                [ "$name" != whole ] || program=07_flash_tiled
                [ "$name" != tiled ] || program=07_flash_tiled kernel=tiled repeat="--repeat 1"
                step "rows/$name-$case-$round" "$seconds" "$program" "--kernel $kernel --threads 1 $options $repeat"
            done < "$folder/tricks"
        done < "$folder/cases"
    done
}

if [ "${1:-}" != render ]; then
    printf 'whole\tNothing\t\t\n' > "$folder/tricks"
    wanted=
    . "${TRICKS:-07_flash_tiled/tricks.sh}"
    finish
    rm -rf "$folder/new" "$folder/found"
    printf 'tiled\tAll of it: `tiled`\t\t\n' >> "$folder/tricks"
    # shellcheck disable=SC2086 # words
    make -s -j"$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)" BUILD="$build" $wanted || exit 1

    rounds=${ROUNDS:-7}
    if [ -n "${QUICK:-}" ]; then
        rounds=1
        printf 'full\t0.1\t--heads 2 --tokens 200 --head-size 64 --repeat 1\ncausal\t0.1\t--heads 2 --tokens 200 --head-size 64 --causal --repeat 1\n'
    else
        printf 'full\t3\t--heads 8 --tokens 4096 --head-size 64 --repeat 3\ncausal\t0.5\t--heads 12 --tokens 1024 --head-size 64 --causal --repeat 15\n'
    fi > "$folder/cases"
    . common/steps.sh
    steps > "$list"
    # What another program than today's has left is measured again.
    for name in $(names); do
        program=$programs/$name/run
        [ -f "$program" ] || program=$build/07_flash_tiled/run
        find "$folder/rows" -name "$name-*" ! -newer "$program" -exec rm {} +
    done
    touch "$folder/seconds"
    walk() { walk_rows "$@"; }
    too_slow() { return 1; }
    walk_all
elif [ ! -f "$folder/cases" ]; then
    echo "error: nothing is measured in $folder yet; type make ladder first" >&2
    exit 2
fi

# ---- The table ----

rm -f "$folder/ladder.tsv"
for file in "$folder"/rows/*.tsv; do
    [ -f "$file" ] || fail "no kernel could be run"
    step=${file##*/}
    awk -F '\t' -v OFS='\t' -v step="${step%.tsv}" -v first="$([ -f "$folder/ladder.tsv" ] || echo yes)" '
        { split(step, part, "-") }
        NR == 1 && first { print $0, "trick", "case", "round" }
        NR > 1 { print $0, part[1], part[2], part[3] }' "$file" >> "$folder/ladder.tsv"
done
awk -f common/median.awk -f common/ladder.awk "$folder/tricks" "$folder/cases" "$folder/ladder.tsv" > "$folder/ladder.md" || status=1
[ "${1:-}" = render ] || { echo; cat "$folder/ladder.md"; }
exit $status
