# Long work as a list of steps, for the scripts that read this file: each is one command of a chapter's program and leaves a file of its
# own. A step whose file is there is done, so a run that was stopped goes on where it was: the same command does the rest.
#
#   folder    where the files go             list    the steps, a line each, by step()
#   too_slow NAME                            a script's own: true, with a reason, for what need not run
#   walk NAME CHAPTER OPTIONS..              a script's own: one step, by walk_rows or walk_output; 1 if it failed
#   walk_all                                 the steps that are left; status is 1 if one failed

# step NAME SECONDS CHAPTER OPTIONS: NAME is the file's, without its ending; SECONDS about how long it takes
step() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4"; }

now() { date +%s; }
terminal=no
[ -t 1 ] && terminal=yes
status=0

# walk_rows NAME CHAPTER OPTIONS..: leaves rows in NAME.tsv, or in NAME.refused the reason in one line; the percent of the reading
# speed, which people are told and which is no column, in NAME.reading
walk_rows() {
    file=$folder/$1 program=$build/$2/run
    shift 2
    case $1 in --*) set -- --bench "$@" ;; esac
    rm -f "$file.new"
    "$program" "$@" --tsv "$file.new" > "$file.log" 2>&1
    code=$?
    if [ $code = 0 ] && [ -f "$file.new" ]; then
        sed -n 's/.*, \([0-9]*\)% of reading.*/\1/p' "$file.log" > "$file.reading"
        [ -s "$file.reading" ] || rm "$file.reading"
        mv "$file.new" "$file.tsv"
    elif [ $code = 3 ]; then
        sed -n 's/^error: kernel [^ ]* //p' "$file.log" > "$file.refused"
    else
        [ $code = 130 ] || [ $code = 143 ] || { echo "error: $program $* ended with $code:"; tail -n 3 "$file.log"; } >&2
        return 1
    fi
    rm -f "$file.log"
}

# walk_output NAME COMMAND..: leaves what it prints in NAME.txt
walk_output() {
    file=$folder/$1
    shift
    if "$@" > "$file.log" 2>&1; then
        mv "$file.log" "$file.txt"
    else
        echo "error: $* ended with $?:" >&2
        grep -E '✗|=====|error' "$file.log" | head -n 6 >&2
        return 1
    fi
}

# left: steps left, and about how many minutes, as "12 steps, about 3 minutes"
left() {
    awk -F '\t' '
        FILENAME ~ /seconds$/ { took += $2; estimated += $3; done[$1] = 1; next }
        !($1 in done) { n++; seconds += $2 }
        END {
            if (estimated > 20) seconds *= took / estimated
            minutes = int(seconds / 60 + 0.9)
            printf "%d steps, about %d minute%s", n, minutes, minutes == 1 ? "" : "s"
        }' "$folder/seconds" "$list"
}

interrupted() {
    [ $terminal = no ] || printf '\r\033[K'
    echo "Stopped with $(left) left. The same command goes on from here."
    exit 130
}
trap interrupted INT TERM

walk_all() {
    echo "To measure: $(left). It may be stopped (Ctrl-C) and taken up again."
    tab=$(printf '\t')
    while IFS=$tab read -r name seconds chapter options <&3; do
        file=$folder/$name
        [ -f "$file.tsv" ] || [ -f "$file.txt" ] || [ -f "$file.refused" ] && continue
        [ $terminal = no ] || printf '\r\033[K%s left: %s' "$(left)" "$name"
        began=$(now)
        if too_slow "$name"; then
            echo "$reason" > "$file.refused"
        else
            # shellcheck disable=SC2086 # options are words
            walk "$name" "$chapter" $options || { status=1; continue; }
        fi
        printf '%s\t%s\t%s\n' "$name" $(($(now) - began)) "$seconds" >> "$folder/seconds"
    done 3< "$list"
    [ $terminal = no ] || printf '\r\033[K'
}
