#!/bin/sh
# Fills in the blocks of the READMEs from sources, outputs and TSV files, so that none of them goes stale.
#
#   readme.sh           rewrites every README.md that differs
#   readme.sh --check   changes nothing; exit 1 if one differs
#
# Markers, each alone on its line and closed by <!-- end -->:
#   <!-- listing: FILE "FROM" -->             lines of FILE from the first that holds FROM to the next that is exactly }
#   <!-- listing: FILE "FROM" "TO" -->        ... to the next that holds TO
#   <!-- output: FILE -->                     all of FILE; with "FROM" "TO" those lines
#   <!-- table: FILE column,column [where column=value[,column=value]] -->     columns of a TSV, as a table
# And anywhere in a line:
#   <!--value FILE COLUMN WHERE-->12.3<!--/-->            a number from a TSV, from the first row where column=value,.. holds
#   <!--ratio FILE COLUMN WHERE WHERE-->4.5<!--/-->       one row's number over another's
#   <!--at FILE "TEXT"-->[FILE:1](FILE#L1)    the link is set to the first line of FILE that holds TEXT
set -u
status=0
for readme in README.md 0*/README.md 0*/cuda/README.md; do
    [ -f "$readme" ] || continue
    new=$(mktemp) || exit 1
    if ! awk -v folder="$(dirname "$readme")" -v readme="$readme" -f common/readme.awk "$readme" > "$new"; then
        status=1
    elif ! cmp -s "$readme" "$new"; then
        if [ "${1:-}" = --check ]; then
            echo "error: $readme is stale; make figures or sh common/readme.sh rewrites it:" >&2
            diff "$readme" "$new" | head -n 20 >&2
            status=1
        else
            cat "$new" > "$readme"
            echo "rewrote $readme"
        fi
    fi
    rm -f "$new"
done
exit $status
