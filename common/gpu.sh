#!/bin/sh
# make gpu: all that wants a GPU, in this order: every kernel against the oracle, the claims that need one, the notebook's implementations,
# the A100's rows, every kernel over T, (32,32,2048,224), then compute-sanitizer; tables and charts. Needs neither Criterion nor a network. Results land in build/gpu, step by step (steps.sh); to
# start anew, remove it.   GPU=simt: the same on the CPU stand-in, at sizes for it.
set -u
build=${BUILD:-build}
device=${GPU:-cuda}
folder=$build/gpu
list=$folder/steps
if ! "$build/07_flash_tiled/run" --list | grep '^tiled ' | grep -q "[ ,]$device\(,\|\$\)"; then
    echo "error: no kernel can run with --device $device here; ./run --list says why. GPU=simt make gpu tries it on the CPU" >&2
    exit 3
fi
mkdir -p "$folder/check" "$folder/claims" "$folder/notebook" "$folder/memory" "$folder/a100" "$folder/tokens" "$folder/sanitizer" || exit 2
. common/steps.sh

if [ "$device" = simt ]; then
    notebook="--batch 1 --tokens 48 --embed 24 --heads 3" most=96 lengths="32 64" tokens_in_all=64 width=64 sizes="16 32" repeat=2 batches="1 2" memory="--heads 2 --tokens 40 --head-size 224"
else
    notebook="--batch 8 --tokens 1024 --embed 768 --heads 12" most=8192 lengths="1024 2048 4096 8192 16384" tokens_in_all=16384
    width=2048 sizes="64 128" repeat=20 batches="1 32" memory="--heads 32 --tokens 2048 --head-size 224"
fi

# kernels_of CHAPTER qkv|x [PASS]: its kernels that the device can run, those that have the pass
kernels_of() {
    "$build/$1/run" --list | awk -v takes="$2" -v pass="${3:-forward}" -v device="$device" \
        '$2 == takes && $3 ~ pass && $NF ~ "(^|,)" device "(,|$)" { print $1 }'
}

# dtype_of CHAPTER KERNEL: the one it takes; passes_of: what it has, as options
dtype_of() { "$build/$1/run" --list | awk -v kernel="$2" '$1 == kernel { print $4 }'; }
passes_of() { "$build/$1/run" --list | awk -v kernel="$2" '$1 == kernel { print $3 ~ /backward/ ? "--pass both --dout randn" : "--pass forward" }'; }

# ---- The steps: FILE, seconds, chapter, options ----

check_steps() {
    for program in "$build"/0*/run; do
        chapter=$(basename "$(dirname "$program")")
        step "check/$chapter" 20 "$chapter" "--check --device $device"
    done
}

notebook_steps() {
    for chapter in 03_multihead_wrapper 04_packed_qkv 05_einsum_style 07_flash_tiled 09_block_sparse; do
        for kernel in $(kernels_of $chapter x | grep -v 'loops\|stacked'); do
            for pass in forward both; do
                step "notebook/$kernel-$pass" 5 $chapter "--device $device --kernel $kernel --pass $pass --repeat $repeat $notebook"
            done
        done
    done
}

a100_steps() {
    for tokens in $((most / 4)) $((most / 2)) $most; do
        for kernel in 06_online_softmax:materialised 07_flash_tiled:tiled 07_flash_tiled:pipelined; do
            dtype=$(dtype_of "${kernel%:*}" "${kernel#*:}")
            for features in "" "--dropout 0.1" "--bias randn" "--dropout 0.1 --bias randn"; do
                for causal in "" --causal; do
                    for pass in forward backward both; do
                        name=${kernel#*:}-$tokens-$(echo "$features$causal" | tr -d ' -')-$pass
                        step "a100/$name" 5 "${kernel%:*}" \
                            "--device $device --dtype $dtype --kernel ${kernel#*:} --pass $pass --repeat $repeat --heads 12 --tokens $tokens --head-size 128 $features $causal"
                    done
                done
            done
        done
    done
}

tokens_steps() {
    for pass in forward backward; do
        for chapter in 06_online_softmax 07_flash_tiled; do
            for kernel in $(kernels_of $chapter qkv $pass); do
                dtype=$(dtype_of $chapter "$kernel")
                for size in $sizes; do
                    for tokens in $lengths; do
                        for causal in "" --causal; do
                            step "tokens/$kernel-$size-$tokens-${causal#--}-$pass" 5 $chapter \
                                "--device $device --dtype $dtype --kernel $kernel --pass $pass --repeat $repeat --batch $((tokens_in_all / tokens)) --heads $((width / size)) --tokens $tokens --head-size $size $causal"
                        done
                    done
                done
            done
        done
    done
}

# The SDPA notebook's (32,32,2048,224), for which its math path had no memory. What takes more than there is says so.
memory_steps() {
    for kernel in 06_online_softmax:materialised $(kernels_of 07_flash_tiled qkv | sed 's/^/07_flash_tiled:/'); do
        for batch in $batches; do
            step "memory/${kernel#*:}-$batch" 10 "${kernel%:*}" \
                "--device $device --dtype $(dtype_of "${kernel%:*}" "${kernel#*:}") --kernel ${kernel#*:} --repeat $repeat --batch $batch $memory"
        done
    done
}

sanitizer_steps() {
    [ "$device" = cuda ] && command -v compute-sanitizer > /dev/null 2>&1 || return 0
    for program in "$build"/0*/run; do
        chapter=$(basename "$(dirname "$program")")
        heads=$([ "${chapter%%_*}" -lt 3 ] && echo 1 || echo 3)
        for tool in memcheck racecheck; do
            for kernel in $(kernels_of "$chapter" qkv); do
                step "sanitizer/$chapter-$kernel-$tool" 20 "$chapter" "$tool --device $device --kernel $kernel --dtype $(dtype_of "$chapter" "$kernel") $(passes_of "$chapter" "$kernel") --heads 2 --tokens 70 --head-size 40 --causal"
            done
            for kernel in $(kernels_of "$chapter" x); do
                step "sanitizer/$chapter-$kernel-$tool" 20 "$chapter" "$tool --device $device --kernel $kernel $(passes_of "$chapter" "$kernel") --batch 2 --tokens 40 --embed 24 --heads $heads"
            done
        done
    done
}

# ---- Walking them ----

too_slow() { return 1; }

walk() {
    case $1 in
    check/*) name=$1 program=$build/$2/run && shift 2 && walk_output "$name" "$program" "$@" ;;
    sanitizer/*)
        name=$1 program=$build/$2/run tool=$3
        shift 3
        walk_output "$name" compute-sanitizer --error-exitcode 1 --tool "$tool" "$program" "$@"
        ;;
    *) walk_rows "$@" ;;
    esac
}

{ check_steps; step claims/numbers 10 07_flash_tiled "claims --device $device"; notebook_steps; a100_steps; tokens_steps; memory_steps; sanitizer_steps; } > "$list"
touch "$folder/seconds"
walk_all
for name in notebook a100 tokens memory; do
    awk 'FNR > 1 || !header++' "$folder/$name"/*.tsv > "$folder/$name.tsv"
    echo "$folder/$name.tsv: $(($(wc -l < "$folder/$name.tsv") - 1)) rows"
done
grep -h 'checks passed' "$folder"/check/*.txt

# ---- Charts: the notebook's, and every kernel over T ----

# rows FILE NAME VALUE ..: its rows whose columns NAME have these values, under its header
rows() {
    file=$1
    shift
    awk -F '\t' -v wanted="$*" '
        BEGIN { n = split(wanted, want, " ") }
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; print; next }
        { for (i = 1; i < n; i += 2) if ($at[want[i]] != want[i + 1]) next; print }' "$file"
}
mkdir -p "$folder/common" "$folder/07_flash_tiled"
rows "$folder/notebook.tsv" pass forward > "$folder/common/notebook_gpu.tsv"
rows "$folder/notebook.tsv" pass both > "$folder/common/notebook_gpu_both.tsv"
for size in $sizes; do
    for mask in none causal; do
        for pass in forward backward; do
            rows "$folder/tokens.tsv" head_size $size mask $mask pass $pass > "$folder/07_flash_tiled/ladder_${size}_${mask}_$pass.tsv"
        done
    done
done
sh common/charts.sh "$folder"
[ $status = 0 ] && echo "All steps are done." || echo "Some steps failed: the same command tries them again." >&2
exit $status
