# Fills in the blocks of one README: see readme.sh. Variables: folder, readme.

function fail(message) {
    print "error: " readme ":" NR ": " message > "/dev/stderr"
    failed = 1
}

# The n-th text between double quotes in s.
function quoted(s, n,    parts) {
    return split(s, parts, "\"") >= 2 * n ? parts[2 * n] : ""
}

function file_at(name) {
    return folder "/" name
}

# Lines of a file from one that holds `from` to one that holds `to` (or is exactly "}" where there is no `to`).
function print_lines(name, from, to, whole,    line, inside, found) {
    while ((getline line < file_at(name)) > 0) {
        if (!found && (whole || index(line, from)))
            inside = found = 1
        else if (inside && !whole && (to != "" ? index(line, to) : line == "}")) {
            print line
            inside = 0
            continue
        }
        if (inside)
            print line
    }
    close(file_at(name))
    if (!found)
        fail("\"" from "\" is not in " file_at(name))
    else if (inside && !whole)
        fail("no end after \"" from "\" in " file_at(name))
}

function number(text) {
    return text ~ /^-?[0-9.]+(e[-+]?[0-9]+)?$/ && text ~ /[.e]/ ? sprintf("%.4g", text) : text
}

function print_table(name, columns, where,    line, n, want, fields, place, i, header, conditions, c, pair, keep, rule, rows) {
    n = split(columns, want, ",")
    c = split(where, conditions, ",")
    if ((getline line < file_at(name)) <= 0) {
        fail(file_at(name) " cannot be read")
        return
    }
    i = split(line, fields, "\t")
    for (; i > 0; i--)
        place[fields[i]] = i
    header = "|"
    rule = "|"
    for (i = 1; i <= n; i++) {
        if (!(want[i] in place))
            fail(file_at(name) " has no column " want[i])
        header = header " " want[i] " |"
        rule = rule "---|"
    }
    print header
    print rule
    while ((getline line < file_at(name)) > 0) {
        split(line, fields, "\t")
        keep = 1
        for (i = 1; i <= c; i++) {
            split(conditions[i], pair, "=")
            if (fields[place[pair[1]]] != pair[2])
                keep = 0
        }
        if (!keep)
            continue
        rows++
        line = "|"
        for (i = 1; i <= n; i++)
            line = line " " number(fields[place[want[i]]]) " |"
        print line
    }
    close(file_at(name))
    if (!rows)
        fail("no row of " file_at(name) " where " where)
}

function line_of(name, text,    line, n, found) {
    while ((getline line < file_at(name)) > 0) {
        n++
        if (index(line, text)) {
            found = n
            break
        }
    }
    close(file_at(name))
    if (!found)
        fail("\"" text "\" is not in " file_at(name))
    return found
}

function link_lines(s,    out, start, stop, tag, name, n, link) {
    out = ""
    while ((start = index(s, "<!--at ")) > 0) {
        stop = index(s, "-->")
        if (!stop) {
            fail("a marker <!--at without -->")
            break
        }
        tag = substr(s, start, stop - start + 3)
        out = out substr(s, 1, start - 1) tag
        s = substr(s, stop + 3)
        split(tag, link, " ")
        name = link[2]
        n = line_of(name, quoted(tag, 1))
        if (!match(s, /^\[[^]]*\]\([^)]*\)/)) {
            fail("no link behind " tag)
            break
        }
        s = substr(s, RLENGTH + 1)
        out = out "[" name ":" n "](" name "#L" n ")"
    }
    return out s
}

# The value of a column in the first row of a TSV where all conditions hold.
function lookup(name, column, where,    line, fields, place, conditions, c, pair, i, keep, value, found) {
    c = split(where, conditions, ",")
    if ((getline line < file_at(name)) <= 0) {
        fail(file_at(name) " cannot be read")
        return 0
    }
    for (i = split(line, fields, "\t"); i > 0; i--)
        place[fields[i]] = i
    while (!found && (getline line < file_at(name)) > 0) {
        split(line, fields, "\t")
        keep = 1
        for (i = 1; i <= c; i++) {
            split(conditions[i], pair, "=")
            if (!(pair[1] in place) || fields[place[pair[1]]] != pair[2])
                keep = 0
        }
        if (keep) {
            value = fields[place[column]]
            found = 1
        }
    }
    close(file_at(name))
    if (!found || !(column in place))
        fail(file_at(name) " has no " column " where " where)
    return value
}

# Three significant digits, and no fewer than the whole number has.
function short(value) {
    return value >= 100 ? sprintf("%.0f", value) : sprintf("%.3g", value)
}

function fill_values(s,    out, start, stop, close_at, tag, word, value, divisor) {
    out = ""
    while (match(s, /<!--(value|ratio) /)) {
        start = RSTART
        stop = index(substr(s, start), "-->") + start - 1
        close_at = index(s, "<!--/-->")
        if (stop < start || close_at < stop) {
            fail("a value or ratio without --> or <!--/-->")
            break
        }
        tag = substr(s, start, stop - start + 3)
        split(substr(tag, 5, length(tag) - 7), word, " ")
        value = lookup(word[2], word[3], word[4])
        if (word[1] == "ratio") {
            divisor = lookup(word[2], word[3], word[5])
            value = divisor > 0 ? value / divisor : 0
        }
        out = out substr(s, 1, start - 1) tag short(value) "<!--/-->"
        s = substr(s, close_at + 8)
    }
    return out s
}

inside && /^<!-- end -->$/ {
    inside = 0
}
inside {
    next
}
{
    print fill_values(link_lines($0))
}
/^<!-- listing: / {
    print "```c"
    print_lines($3, quoted($0, 1), quoted($0, 2), 0)
    print "```"
    inside = 1
}
/^<!-- output: / {
    print "```"
    print_lines($3, quoted($0, 1), quoted($0, 2), quoted($0, 1) == "")
    print "```"
    inside = 1
}
/^<!-- include: / { # Markdown that a script wrote
    print_lines($3, "", "", 1)
    inside = 1
}
/^<!-- table: / {
    where = $0 ~ / where / ? $6 : ""
    print_table($3, $4, where)
    inside = 1
}
END {
    if (inside)
        fail("a block without <!-- end -->")
    exit failed
}
