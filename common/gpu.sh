#!/bin/sh
# make gpu: all that wants a GPU, in this order: every kernel against the oracle, the notebook's implementations, the A100's rows, every
# kernel over T, then compute-sanitizer. Needs neither Criterion nor a network. Results land in build/gpu.
#
# Each step is one command and leaves one file; a step whose file is there is done. So a run that was stopped goes on where it was: type the
# same command. To start anew, remove build/gpu.   GPU=simt: the same on the CPU stand-in, at sizes for it.
set -u
build=${BUILD:-build}
device=${GPU:-cuda}
out=$build/gpu
mkdir -p "$out" || exit 2

if ! "$build/07_flash_tiled/run" --list | grep '^tiled ' | grep -q "[ ,]$device\(,\|\$\)"; then
    echo "error: no kernel can run with --device $device here; ./run --list says why. GPU=simt make gpu tries it on the CPU" >&2
    exit 3
fi
if [ "$device" = simt ]; then
    notebook="--batch 1 --tokens 48 --embed 24 --heads 3" most=96 lengths="32 64" tokens_in_all=64 width=64 sizes="16 32" repeat=2
else
    notebook="--batch 8 --tokens 1024 --embed 768 --heads 12" most=8192 lengths="1024 2048 4096 8192 16384" tokens_in_all=16384
    width=2048 sizes="64 128" repeat=20
fi

# kernels_of CHAPTER qkv|x: its kernels that the device can run
kernels_of() {
    "$build/$1/run" --list | awk -v takes="$2" -v device="$device" '$2 == takes && $NF ~ "(^|,)" device "(,|$)" { print $1 }'
}

# ---- The steps: FILE, chapter, options; separated by tabs ----

steps() {
    for program in "$build"/0*/run; do
        chapter=$(basename "$(dirname "$program")")
        printf 'check/%s.txt\t%s\t--check --device %s\n' "$chapter" "$chapter" "$device"
    done
    for chapter in 03_multihead_wrapper 04_packed_qkv 05_einsum_style 07_flash_tiled 09_block_sparse; do
        for kernel in $(kernels_of $chapter x | grep -v 'loops\|stacked'); do
            for pass in forward both; do
                printf 'notebook/%s-%s.tsv\t%s\t--bench --device %s --kernel %s --pass %s --repeat %s %s\n' \
                    "$kernel" $pass $chapter "$device" "$kernel" $pass $repeat "$notebook"
            done
        done
    done
    for kernel in 06_online_softmax:materialised 07_flash_tiled:tiled; do
        tokens=$((most / 4))
        while [ $tokens -le $most ]; do
            for options in "" "--dropout 0.1" "--bias randn" "--dropout 0.1 --bias randn"; do
                for causal in "" --causal; do
                    for pass in forward backward both; do
                        printf 'a100/%s-%s-%s-%s.tsv\t%s\t--bench --device %s --kernel %s --pass %s --repeat %s --heads 12 --tokens %s --head-size 128 %s %s\n' \
                            "${kernel#*:}" $tokens "$(echo "$options$causal" | tr -d ' -')" $pass "${kernel%:*}" "$device" "${kernel#*:}" $pass \
                            $repeat $tokens "$options" "$causal"
                    done
                done
            done
            tokens=$((tokens * 2))
        done
    done
    for chapter in 06_online_softmax 07_flash_tiled; do
        for kernel in $(kernels_of $chapter qkv); do
            for size in $sizes; do
                for tokens in $lengths; do
                    for causal in "" --causal; do
                        for pass in forward backward; do
                            printf 'tokens/%s-%s-%s-%s-%s.tsv\t%s\t--bench --device %s --kernel %s --pass %s --repeat %s --batch %s --heads %s --tokens %s --head-size %s %s\n' \
                                "$kernel" "$size" $tokens "${causal#--}" $pass $chapter "$device" "$kernel" $pass $repeat \
                                $((tokens_in_all / tokens)) $((width / size)) $tokens "$size" "$causal"
                        done
                    done
                done
            done
        done
    done
    command -v compute-sanitizer > /dev/null 2>&1 && [ "$device" = cuda ] || return 0
    for program in "$build"/0*/run; do
        chapter=$(basename "$(dirname "$program")")
        for kernel in $(kernels_of "$chapter" qkv) $(kernels_of "$chapter" x); do
            size="--heads 2 --tokens 70 --head-size 40 --causal"
            kernels_of "$chapter" x | grep -qx "$kernel" && size="--batch 2 --tokens 40 --embed 24 --heads $([ "${chapter%%_*}" -lt 3 ] && echo 1 || echo 3)"
            for tool in memcheck racecheck; do
                printf 'sanitizer/%s-%s-%s.txt\t%s\t%s --device cuda --kernel %s --pass both --dout randn %s\n' \
                    "$chapter" "$kernel" $tool "$chapter" "$tool" "$kernel" "$size"
            done
        done
    done
}

# ---- Walking them ----

steps > "$out/steps"
trap 'echo "Stopped. The same command goes on from here."; exit 130' INT TERM
status=0 number=0 count=$(($(wc -l < "$out/steps")))
echo "$count steps, those that are done already among them. It may be stopped (Ctrl-C) and taken up again."
tab=$(printf '\t')
while IFS=$tab read -r file chapter options <&3; do
    number=$((number + 1))
    [ ! -f "$out/$file" ] || continue
    mkdir -p "$out/$(dirname "$file")"
    [ ! -t 1 ] || printf '\r\033[K%d of %d: %s' $number "$count" "$file"
    program=$build/$chapter/run
    # shellcheck disable=SC2086 # options are words
    case $file in
    check/*) timeout 600 "$program" $options > "$out/new" 2>&1 ;;
    sanitizer/*) timeout 600 compute-sanitizer --error-exitcode 1 --tool ${options%% *} "$program" ${options#* } > "$out/new" 2>&1 ;;
    *) rm -f "$out/new"; timeout 600 "$program" $options --tsv "$out/new" > "$out/log" 2>&1 ;;
    esac
    code=$?
    if [ $code = 0 ] && [ -f "$out/new" ]; then
        mv "$out/new" "$out/$file"
    elif [ $code = 2 ] || [ $code = 3 ]; then # refused: a pass, a shape or the memory for it is not there
        sed -n 's/^error: //p' "$out/log" > "$out/$file"
    else
        [ ! -t 1 ] || printf '\n'
        echo "✗ $file (exit $code): $program $options"
        case $file in check/*) grep '✗' "$out/new" | head -n 5 ;; sanitizer/*) grep '=====' "$out/new" | head -n 8 ;; *) tail -n 3 "$out/log" ;; esac
        status=1
    fi
done 3< "$out/steps"
[ ! -t 1 ] || printf '\r\033[K'

# ---- One TSV each ----

for name in notebook a100 tokens; do
    [ -d "$out/$name" ] || continue
    awk 'FNR == 1 && $1 == "machine" { if (!header++) print; next } FNR > 1' FS='\t' "$out/$name"/*.tsv > "$out/$name.tsv"
    echo "$out/$name.tsv: $(($(wc -l < "$out/$name.tsv") - 1)) rows"
done
grep -h 'checks passed' "$out"/check/*.txt
[ $status = 0 ] && echo "All steps are done." || echo "Some steps failed: the same command tries them again." >&2
exit $status
