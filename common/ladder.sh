#!/bin/sh
# make ladder: what each trick of chapter 7's fast kernel is worth. For each in 07_flash_tiled/tricks.sh a program is built from copies of
# the kernel's files with that trick taken away, all else as it was. The whole kernel and the lesser ones take turns, and ./run holds
# each against the oracle before it is timed. A run is a step (steps.sh). All lands in build/ladder; to start anew, remove it.
#
#   ROUNDS=7   of all kernels     QUICK=1   one round of small cases, into build/ladder/quick: is all in place?     TRICKS=file   others
#
# ladder.sh backward: the same for the backward pass, with tricks_backward.sh, in build/ladder/backward.
# ladder.sh [backward] render: measures nothing, writes the table of what is there.
set -u
build=${BUILD:-build}
pass=forward programs=ladder tricks=tricks.sh
files='07_flash_tiled/flash_tiled_simd.[ch] 07_flash_tiled/flash_view.c'
if [ "${1:-}" = backward ]; then
    pass=backward programs=ladder/backward tricks=tricks_backward.sh
    files='07_flash_tiled/flash_tiled_simd_backward.[ch] 07_flash_tiled/flash_view_backward.c'
    shift
fi
folder=$build/$programs${QUICK:+/quick}
list=$folder/steps
measure=yes
[ "${1:-}" = render ] && measure=no
fail() {
    echo "error: $*" >&2
    exit 1
}
tab=$(printf '\t')
mkdir -p "$folder/rows" || exit 2
. common/steps.sh
trap 'exit 130' INT TERM # until there are steps

# ---- What tricks.sh says: trick adds a line NAME, WHAT, WHY, ONLY to tricks, and copies; edit changes one of them ----

trick() {
    lay
    name=$1 edits=0
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >> "$folder/tricks"
    rm -rf "$folder/new"
    mkdir -p "$folder/new" "$build/$programs/$name"
    for file in $files 07_flash_tiled/flash_pairs.c common/vectors.h; do
        cp "$file" "$folder/new/"
    done
}

edit() {
    TEXT=$2 REPLACEMENT=$3 awk '
        BEGIN { text = ENVIRON["TEXT"] }
        (at = index($0, text)) > 0 {
            places += 1 + (index(substr($0, at + 1), text) > 0)
            $0 = substr($0, 1, at - 1) ENVIRON["REPLACEMENT"] substr($0, at + length(text))
        }
        { print }
        END {
            if (places != 1)
                print "in " places + 0 " places, not in one" > "/dev/stderr"
            exit places != 1
        }' "$folder/new/$1" > "$folder/edited" 2> "$folder/wrong" || fail "trick $name: this stands in $1 $(cat "$folder/wrong"): $2"
    mv "$folder/edited" "$folder/new/$1"
    edits=$((edits + 1))
}

# The copies of the last trick go where they are built. A file that is there already stays, so that nothing is built twice.
lay() {
    [ -n "$name" ] || return 0
    [ $edits -gt 0 ] || [ "$name" = whole ] || fail "trick $name: nothing is edited"
    for file in "$folder/new"/*; do
        cmp -s "$file" "$build/$programs/$name/${file##*/}" || cp "$file" "$build/$programs/$name/"
    done
    wanted="$wanted $build/$programs/$name/run"
}

# ---- The steps: rows/TRICK-CASE-ROUND; cases are lines CASE, SECONDS, OPTIONS ----

cases() {
    if [ -n "${QUICK:-}" ]; then
        printf 'full\t0.1\t--heads 2 --tokens 200 --head-size 64 --repeat 1\n'
        printf 'causal\t0.1\t--heads 2 --tokens 200 --head-size 64 --causal --repeat 1\n'
    else
        printf 'full\t3\t--heads 8 --tokens 4096 --head-size 64 --repeat 3\n'
        printf 'causal\t1\t--heads 12 --tokens 1024 --head-size 64 --causal --repeat 15\n'
    fi
}

steps() {
    for round in $(seq "$1"); do
        while IFS=$tab read -r case seconds options; do
            while IFS=$tab read -r name what why only; do
                case "$options" in *"${only:+--$only}"*) ;; *) continue ;; esac
                step "rows/$name-$case-$round" "$seconds" "$programs/$name" "--kernel simd --pass $pass --threads 1 $options"
            done < "$folder/tricks"
            step "rows/tiled-$case-$round" "$seconds" "$programs/whole" "--kernel tiled --pass $pass --threads 1 $options --repeat 1"
        done < "$folder/cases"
    done
}

too_slow() { return 1; }
walk() { walk_rows "$@"; }

if [ $measure = yes ]; then
    rm -f "$folder/tricks"
    name='' wanted=''
    trick whole 'the kernel as it is' ''
    . "${TRICKS:-07_flash_tiled/$tricks}"
    lay
    rm -rf "$folder/new" "$folder/wrong"
    # shellcheck disable=SC2086 # words
    make -s -j"$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)" BUILD="$build" $wanted || exit 1
    for program in $wanted; do # one is new: all of them are measured again, in turn
        [ -z "$(find "$folder/rows" -type f ! -newer "$program" -print -exec rm {} \;)" ] || rm -f "$folder/seconds"
    done
    cases > "$folder/cases"
    steps "$([ -n "${QUICK:-}" ] && echo 1 || echo "${ROUNDS:-7}")" > "$list"
    touch "$folder/seconds"
    trap interrupted INT TERM
    walk_all
elif [ ! -f "$list" ]; then
    echo "error: nothing is measured in $folder yet; type make ladder first" >&2
    exit 2
fi

# ---- The table ----

# All rows in one file, whose last three columns say of what they are.
cut -f 1 "$list" | while read -r step; do
    [ ! -f "$folder/$step.tsv" ] || printf '%s\t%s\n' "$step" "$folder/$step.tsv"
done | awk -F '\t' -v OFS='\t' '
    {
        split(substr($1, 6), part, "-")
        if ((getline header < $2) > 0 && (getline row < $2) > 0) {
            if (!rows++)
                print header, "trick", "case", "round"
            print row, part[1], part[2], part[3]
        }
        close($2)
    }' > "$folder/ladder.tsv"
[ -s "$folder/ladder.tsv" ] || fail "no kernel could be run"
awk -f common/median.awk -f common/ladder.awk "$folder/tricks" "$folder/ladder.tsv" > "$folder/ladder.md" || status=1
if [ -n "${QUICK:-}" ]; then
    tail -n 1 "$folder/ladder.md" # the times of small cases mean nothing
elif [ $measure = yes ]; then
    echo
    cat "$folder/ladder.md"
fi
exit $status
