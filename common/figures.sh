#!/bin/sh
# make figures [MACHINE=name]: keeps what make demo, make tables, make speed, make ladder and make gpu measured. Copies TSVs, charts and outputs into each chapter's
# measured/ (the front page's into common/measured/, the tables into 07_flash_tiled/measured/tables/, what speed measured into 07_flash_tiled/measured/speed/, a GPU's into 07_flash_tiled/measured/gpu/), with the machine's name if
# one is given, and rewrites the READMEs' blocks.
set -u
build=${BUILD:-build}
demo=$build/demo
tables=$build/tables
speed=$build/speed
ladder=$build/ladder
gpu=$build/gpu
if [ ! -f "$demo/common/notebook.tsv" ] && [ ! -d "$tables" ] && [ ! -f "$speed/ours.tsv" ] && [ ! -f "$ladder/ladder.tsv" ] && [ ! -d "$gpu" ]; then
    echo "error: nothing is measured yet; type make demo (or make tables, make speed, make ladder, make gpu) first" >&2
    exit 2
fi
if [ -n "${MACHINE:-}" ]; then
    find "$demo" "$tables" "$speed" "$ladder" -name '*.tsv' ! -name masks.tsv 2> /dev/null | while read -r tsv; do
        awk -F '\t' -v OFS='\t' -v name="$MACHINE" 'NR > 1 { $1 = name } { print }' "$tsv" > "$tsv.new" && mv "$tsv.new" "$tsv"
    done
    sh common/charts.sh "$demo" || exit 1
fi
# keep FOLDER FILE..: copies those that are there
keep() {
    kept=$1
    shift
    mkdir -p "$kept"
    for file in "$@"; do
        [ -f "$file" ] && cp "$file" "$kept/"
    done
}
for folder in "$demo"/*/; do
    [ -d "$folder" ] && keep "$(basename "$folder")/measured" "$folder"*
done
if [ -d "$tables" ]; then
    sh common/tables.sh render || exit 1
    keep 07_flash_tiled/measured/tables "$tables"/*.tsv "$tables"/*.md "$tables"/*.svg "$tables"/*.png
fi
if [ -f "$speed/ours.tsv" ]; then
    sh common/speed.sh render || exit 1
    keep 07_flash_tiled/measured/speed "$speed"/*.tsv "$speed"/*.md "$speed"/*.svg "$speed"/*.png
fi
for pass in '' backward; do
    [ -f "$ladder/$pass/ladder.tsv" ] || continue
    sh common/ladder.sh $pass render || exit 1
    keep "07_flash_tiled/measured/$pass" "$ladder/$pass/ladder.tsv" "$ladder/$pass/ladder.md"
done
if [ -f "$gpu/tokens.tsv" ]; then
    if awk -F '\t' '$4 == "simt" { found = 1 } END { exit !found }' "$gpu/tokens.tsv"; then
        echo "$gpu is left out: the stand-in only tried it, and its times mean nothing"
    else
        keep 07_flash_tiled/measured/gpu "$gpu"/*.tsv "$gpu"/07_flash_tiled/* "$gpu"/common/*
        cp "$gpu/claims/numbers.tsv" 07_flash_tiled/measured/gpu/claims.tsv
    fi
fi
sh common/readme.sh
