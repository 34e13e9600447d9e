#!/bin/sh
# make figures [MACHINE=name]: keeps what make demo and make tables measured. Copies TSVs, charts and outputs into each chapter's
# measured/ (the front page's into common/measured/, the tables into 07_flash_tiled/measured/tables/), with the machine's name if
# one is given, and rewrites the READMEs' blocks.
set -u
build=${BUILD:-build}
demo=$build/demo
tables=$build/tables
if [ ! -f "$demo/common/notebook.tsv" ] && [ ! -d "$tables" ]; then
    echo "error: nothing is measured yet; type make demo (or make tables) first" >&2
    exit 2
fi
if [ -n "${MACHINE:-}" ]; then
    find "$demo" "$tables" -name '*.tsv' ! -name masks.tsv 2> /dev/null | while read -r tsv; do
        awk -F '\t' -v OFS='\t' -v name="$MACHINE" 'NR > 1 { $1 = name } { print }' "$tsv" > "$tsv.new" && mv "$tsv.new" "$tsv"
    done
    sh common/charts.sh "$demo" || exit 1
fi
for folder in "$demo"/*/; do
    [ -d "$folder" ] || continue
    chapter=$(basename "$folder")
    mkdir -p "$chapter/measured"
    for file in "$folder"*; do
        [ -f "$file" ] && cp "$file" "$chapter/measured/"
    done
done
if [ -d "$tables" ]; then
    sh common/tables.sh render || exit 1
    mkdir -p 07_flash_tiled/measured/tables
    for file in "$tables"/*.tsv "$tables"/*.md "$tables"/*.svg "$tables"/*.png; do
        [ -f "$file" ] && cp "$file" 07_flash_tiled/measured/tables/
    done
fi
sh common/readme.sh
