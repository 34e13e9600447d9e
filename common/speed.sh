#!/bin/sh
# make speed: how near to the processor's multiply-add peak the kernels come, and PyTorch beside them where PYTHON has it.
# make speed-NAME: one of the tables, or the charts (speed-tokens).
#
# A case is a kernel, a shape, a pass and a number of threads. In each round every case is run by ours, by PyTorch as installed and by
# PyTorch with MKL's fast path forced, one after the other; a figure is the median of the rounds. ./run holds each result against the
# oracle before it is timed. A run is a step (steps.sh). All lands in build/speed; to start anew, remove it.
#
#   THREADS="1 2"   numbers of threads         ROUNDS=3   at most; what takes seconds has fewer
#   QUICK=1         one round of the small cases, into build/speed/quick
#
# speed.sh render: measures nothing, writes the tables and charts of what is there.
set -u
build=${BUILD:-build}
python=${PYTHON:-python3}
threads=${THREADS:-1 2}
folder=$build/speed${QUICK:+/quick}
list=$folder/steps
measure=yes
[ "${1:-}" = render ] && measure=no && shift
groups="core features bf16 grouped token masks modules materialised"
wanted=${*:-$groups tokens}
for name in $wanted; do
    case " $groups tokens " in
    *" $name "*) ;;
    *) echo "error: there is no table $name; there are $groups tokens" >&2; exit 2 ;;
    esac
done
mkdir -p "$folder/rows" || exit 2
. common/steps.sh
trap 'exit 130' INT TERM # until there are steps

# ---- The cases: GROUP, PASS, THREADS, CHAPTER, OPTIONS; a group is a table, and its cases stand in this order. A case may be in two ----

first=${threads%% *} last=${threads##* } # one thread, and all that are asked for

# case_of GROUP CHAPTER OPTIONS [PASSES [THREADS]]
case_of() {
    for pass in ${4:-forward backward}; do
        for count in ${5:-$threads}; do
            printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$pass" "$count" "$2" "$3"
        done
    done
}

# with_dtype CHAPTER KERNEL DTYPE: does the CPU have it?
with_dtype() {
    "$build/$1/run" --list | awk -v kernel="$2" -v dtype="$3" \
        '$1 == kernel && $4 ~ "(^|,)" dtype "(,|$)" && $NF ~ "(^|,)cpu(,|$)" { found = 1 } END { exit !found }'
}

cases() {
    simd="--kernel simd --heads" flash=07_flash_tiled
    for shape in "12 --tokens 1024 --head-size 64" "8 --tokens 4096 --head-size 64" "8 --tokens 4096 --head-size 128" "1 --tokens 4096 --head-size 64"; do
        case_of core $flash "$simd $shape"
        case_of core $flash "$simd $shape --causal"
    done

    # The first is plain; the others are held against it.
    for feature in "--tokens 1024 --head-size 64" "--tokens 1000 --head-size 64" "--tokens 1024 --head-size 40" \
        "--tokens 1024 --head-size 64 --bias randn" "--tokens 1024 --head-size 64 --lengths 700" "--tokens 1024 --head-size 64 --dropout 0.1"; do
        case_of features $flash "$simd 12 $feature" "" "$last"
    done

    if with_dtype $flash simd bf16; then
        for size in 64 128; do
            case_of bf16 $flash "$simd 8 --tokens 4096 --head-size $size --dtype bf16" "" "$first"
            case_of bf16 $flash "$simd 8 --tokens 4096 --head-size $size --dtype bf16 --causal" "" "$first"
        done
    fi

    case_of grouped 08_gqa "$simd 32 --kv-heads 8 --tokens 2048 --head-size 128 --causal"
    case_of token 08_gqa "$simd 32 --kv-heads 8 --tokens 1 --key-tokens 32768 --head-size 128" forward

    case_of masks 09_block_sparse "$simd 8 --tokens 4096 --head-size 64 --mask window:256"
    case_of masks 09_block_sparse "$simd 4 --tokens 16384 --head-size 64 --mask window:512"
    case_of masks 09_block_sparse "$simd 8 --tokens 4096 --head-size 64 --mask causal"

    notebook="--batch 8 --tokens 1024 --embed 768 --heads 12"
    for kernel in $flash:sdpa $flash:torch-mha-noweights 09_block_sparse:flex; do
        case_of modules "${kernel%:*}" "--kernel ${kernel#*:} $notebook" "forward both" "$last"
    done
    for kernel in 03_multihead_wrapper:wrapper 04_packed_qkv:split-heads 04_packed_qkv:packed-qkv 05_einsum_style:einsum; do
        case_of materialised "${kernel%:*}" "--kernel ${kernel#*:} $notebook" "forward both" "$last"
    done
    case_of materialised $flash "--kernel materialised --heads 12 --tokens 1024 --head-size 64" "" "$last"

    for tokens in 128 256 512 1024 2048 4096 8192 16384; do # the chart
        for size in 64 128; do
            case_of tokens $flash "$simd 8 --tokens $tokens --head-size $size"
            case_of tokens $flash "$simd 8 --tokens $tokens --head-size $size --causal"
        done
    done
}

# steps_of SETS ROUNDS GROUPS: their steps
steps_of() { awk -v sets="$1" -v most="$2" -v wanted="$3" -v quick="${QUICK:+1}" -f common/speed_steps.awk "$folder/cases"; }

# ---- Walking them ----

# A case that a kernel refuses (exit 2 or 3) has no row.
walk_ours() {
    walk_rows "$@" 2> "$folder/problem" && return 0
    reason=$(sed -n 's/^error: kernel [^ ]* //p' "$folder/$1.log" 2> /dev/null)
    if [ -n "$reason" ] && grep -q 'ended with 2:' "$folder/problem"; then
        echo "$reason" > "$folder/$1.refused"
        rm -f "$folder/$1.log"
    else
        cat "$folder/problem" >&2
        return 1
    fi
}

# PyTorch answers through two pipes, started when it is first asked.
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null; rm -f "$folder/ask" "$folder/answer"' EXIT
walk_pytorch() { # NAME SET OPTIONS..
    name=$1
    shift
    if [ -z "$server" ]; then
        rm -f "$folder/ask" "$folder/answer"
        mkfifo "$folder/ask" "$folder/answer" || return 1
        "$python" common/pytorch_peers.py --serve < "$folder/ask" > "$folder/answer" 2> "$folder/pytorch.log" &
        server=$!
        exec 4> "$folder/ask" 5< "$folder/answer"
        trap '' PIPE
    fi
    answer=
    echo "$*" >&4 && read -r answer <&5
    case $answer in
    refused*) echo "${answer#refused }" > "$folder/$name.refused" ;;
    [0-9]*) echo "$answer" > "$folder/$name.new" && mv "$folder/$name.new" "$folder/$name.tsv" ;;
    *)
        echo "error: PyTorch ($1) gave no answer to $*:" >&2
        tail -n 3 "$folder/pytorch.log" >&2
        [ -n "$answer" ] || server= # it ended
        return 1
        ;;
    esac
}

too_slow() { return 1; }
walk() {
    case $2 in
    installed | forced) walk_pytorch "$@" ;;
    *) walk_ours "$@" ;;
    esac
}

if [ $measure = yes ]; then
    # A sixth column, a name from what is run: the row of a table that the case belongs to. With the number of threads it names the case.
    cases | awk -F '\t' -v OFS='\t' '{ name = $4 "-" $5; gsub(/--kernel |--/, "", name); gsub(/ /, "-", name); print $0, name "-" $2 }' > "$folder/cases"
    sets=ours
    if "$python" -c 'import torch' 2> /dev/null; then
        sets="ours installed forced"
    else
        echo "PyTorch is left out: $python has none. With one: rm -r $folder; make speed PYTHON=python-with-torch"
    fi
    if [ -f "$folder/sets" ] && [ "$(cat "$folder/sets")" != "$sets" ]; then
        echo "error: $folder was begun with: $(cat "$folder/sets"). They take turns, so none can be left out or come later; remove $folder to start anew" >&2
        exit 2
    fi
    echo "$sets" > "$folder/sets"
    steps_of "$sets" "${ROUNDS:-3}" "$wanted" > "$list"
    touch "$folder/seconds"
    trap interrupted INT TERM
    walk_all
elif [ ! -f "$folder/cases" ]; then
    echo "error: nothing is measured in $folder yet; type make speed first" >&2
    exit 2
fi

# ---- Tables and charts ----

# All rows in two files, whose last two columns say which case and round they are of.
rm -f "$folder/ours.tsv" "$folder/pytorch.tsv"
steps_of "ours installed forced" 99 "$groups tokens" | awk -F '\t' -v OFS='\t' -v folder="$folder" '
    {
        n = split($1, part, "-")
        set = part[n]
        round = part[n - 1]
        name = substr($1, 6, length($1) - 5 - length(set) - length(round) - 2)
        file = folder "/" $1 (set == "ours" ? ".tsv" : ".refused")
        if (set == "ours") {
            if ((getline header < file) > 0 && (getline row < file) > 0) {
                reading = ""
                getline reading < (folder "/" $1 ".reading")
                if (!ours++)
                    print header, "percent_of_bandwidth", "case", "round" > (folder "/ours.tsv")
                print row, reading, name, round > (folder "/ours.tsv")
                machine = row
                sub(/\t.*/, "", machine)
            }
            close(file)
            close(folder "/" $1 ".reading")
            next
        }
        reason = row = ""
        getline reason < file
        close(file)
        file = folder "/" $1 ".tsv"
        getline row < file
        close(file)
        if (reason row == "")
            next
        if (!pytorch++)
            print "machine", "kernel_set", "ms_min", "ms_median", "ms_max", "refused", "case", "round" > (folder "/pytorch.tsv")
        split(row, ms, " ")
        print machine, set, ms[1], ms[2], ms[3], reason, name, round > (folder "/pytorch.tsv")
    }'
if [ ! -f "$folder/ours.tsv" ]; then
    echo "error: no case could be run" >&2
    exit 1
fi
pytorch=$folder/pytorch.tsv
[ -f "$pytorch" ] || pytorch=

# speed WANT: from the rows, by speed.awk
speed() { awk -f common/median.awk -f common/speed.awk -v want="$1" "$folder/cases" $pytorch "$folder/ours.tsv"; }

for group in $groups; do
    case " $wanted " in *" $group "*) ;; *) continue ;; esac
    speed "$group" > "$folder/$group.md" || status=1
    [ -s "$folder/$group.md" ] || { rm -f "$folder/$group.md"; continue; }
    [ $measure = no ] || { printf '\n== %s\n\n' "$group"; cat "$folder/$group.md"; }
done
if command -v gnuplot > /dev/null 2>&1; then
    for count in $(cut -f 1,3 "$folder/cases" | sed -n 's/^tokens	//p' | sort -u); do
        speed "chart-$count" > "$folder/chart-$count"
        [ -s "$folder/chart-$count" ] && gnuplot -e "data='$folder/chart-$count'; output='$folder/tokens-$count'" common/speed.gp || [ ! -s "$folder/chart-$count" ] || status=1
        rm -f "$folder/chart-$count"
    done
else
    echo "No charts: gnuplot is missing; install gnuplot-nox and type make speed again."
fi
[ $measure = no ] || printf '\nTables and charts are in %s.\n' "$folder"
exit $status
