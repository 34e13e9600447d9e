#!/bin/sh
# make demo: the nine stories, the notebook's timings, time over T, and the charts; everything lands in build/demo.
set -u
build=${BUILD:-build}
demo=$build/demo
status=0
began=$(date +%s)

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }

rm -rf "$demo"
mkdir -p "$demo/common"
for program in "$build"/0*/run; do
    mkdir -p "$demo/$(basename "$(dirname "$program")")"
done

for program in "$build"/0*/run; do
    chapter=$(basename "$(dirname "$program")")
    say "== $chapter: ./run"
    { "$program"; echo $? > "$demo/status"; } | tee "$demo/$chapter/story.txt"
    [ "$(cat "$demo/status")" = 0 ] || status=1
done
rm -f "$demo/status"

# bench CHAPTER TSV OPTIONS..: times into a TSV; says so, and goes on, where it fails
bench() {
    chapter=$1 tsv=$demo/$2
    shift 2
    "$build/$chapter/run" --bench --tsv "$tsv" "$@" > "$demo/log" || { cat "$demo/log"; status=1; }
}

say "== What plain loops reach, and what dropout costs"
size="--batch 1 --tokens 1024 --heads 1 --repeat 5"
bench 01_self_attention 01_self_attention/speed.tsv $size --kernel dot-product
bench 01_self_attention 01_self_attention/speed.tsv $size --kernel v2
bench 02_causal_attention 02_causal_attention/speed.tsv $size --kernel causal
bench 02_causal_attention 02_causal_attention/speed.tsv $size --kernel causal --dropout 0.1

# nine PASS TSV REPEAT [OPTIONS..]: the notebook's implementations 1 to 9
nine() {
    notebook="--batch 8 --tokens 1024 --embed 768 --heads 12 --pass $1 --repeat $3" file=$2
    shift 3
    for kernel in 03_multihead_wrapper:wrapper 04_packed_qkv:split-heads 04_packed_qkv:packed-qkv 05_einsum_style:einsum \
        07_flash_tiled:sdpa 07_flash_tiled:sdpa-mask 04_packed_qkv:torch-mha 07_flash_tiled:torch-mha-noweights 09_block_sparse:flex; do
        bench "${kernel%:*}" "common/$file" $notebook "$@" --kernel "${kernel#*:}"
    done
}

say "== The notebook's nine implementations, 8 x 1024 tokens x 768, 12 heads, forward"
nine forward notebook.tsv 5
sh common/notebook_table.sh "$demo/common/notebook.tsv"
say "== The same, forward and backward"
nine both notebook_both.tsv 2
sh common/notebook_table.sh "$demo/common/notebook_both.tsv"
if "$build/07_flash_tiled/run" --list | grep -q '^sdpa .*,cuda$'; then
    say "== The same on the GPU, forward; then both"
    nine forward notebook_gpu.tsv 20 --device cuda
    sh common/notebook_table.sh "$demo/common/notebook_gpu.tsv"
    nine both notebook_gpu_both.tsv 20 --device cuda
    sh common/notebook_table.sh "$demo/common/notebook_gpu_both.tsv"
fi

say "== Time over T, 4 heads of 64"
for tokens in 128 256 512 1024 2048 4096; do
    repeat=$((tokens > 1024 ? 3 : 7))
    size="--heads 4 --tokens $tokens --head-size 64 --repeat $repeat"
    bench 06_online_softmax 06_online_softmax/tokens.tsv $size --causal
    for kernel in materialised tiled simd; do
        bench 07_flash_tiled 07_flash_tiled/tokens.tsv $size --causal --kernel $kernel
    done
    bench 07_flash_tiled 09_block_sparse/tokens.tsv $size --mask window:256 --kernel materialised
    for kernel in dense-mask block-sparse simd; do
        bench 09_block_sparse 09_block_sparse/tokens.tsv $size --mask window:256 --kernel $kernel
        bench 09_block_sparse 09_block_sparse/tokens_backward.tsv $size --mask window:256 --kernel $kernel --pass backward
    done
    printf '  T = %s done\n' "$tokens"
done
"$build/08_gqa/run" decode --tsv "$demo/08_gqa/decode.tsv" || status=1
"$build/09_block_sparse/run" mask --tsv "$demo/09_block_sparse/masks.tsv" > "$demo/log" || { cat "$demo/log"; status=1; }
rm -f "$demo/log"

sh common/charts.sh "$demo" || status=1
say "Done in $(($(date +%s) - began)) s. Tables and charts:"
find "$demo" -name '*.png' -o -name '*.svg' -o -name '*.tsv' | sort | sed 's/^/  /'
[ $status = 0 ] && echo "All numbers hold." || echo "Something above did not hold: look for ✗ or error." >&2
exit $status
