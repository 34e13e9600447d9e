#!/bin/sh
# make figures [MACHINE=name]: keeps what make demo measured. Copies its TSVs, charts and outputs into each chapter's measured/ (the
# front page's into common/measured/), with the machine's name if one is given, and rewrites the READMEs' blocks.
set -u
build=${BUILD:-build}
demo=$build/demo
if [ ! -f "$demo/common/notebook.tsv" ]; then
    echo "error: nothing is measured yet; type make demo first" >&2
    exit 2
fi
if [ -n "${MACHINE:-}" ]; then
    find "$demo" -name '*.tsv' ! -name masks.tsv | while read -r tsv; do
        awk -F '\t' -v OFS='\t' -v name="$MACHINE" 'NR > 1 { $1 = name } { print }' "$tsv" > "$tsv.new" && mv "$tsv.new" "$tsv"
    done
    sh common/charts.sh "$demo" || exit 1
fi
for folder in "$demo"/*/; do
    chapter=$(basename "$folder")
    mkdir -p "$chapter/measured"
    for file in "$folder"*; do
        [ -f "$file" ] && cp "$file" "$chapter/measured/"
    done
done
sh common/readme.sh
