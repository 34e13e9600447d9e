# Figures that were measured several times, for the scripts that write tables: awk -f common/median.awk -f ...

# A column of this row by its name; at[name] is its place, from the header.
function get(name) { return name in at ? $at[name] : "" }

function short(value) { return value >= 100 ? sprintf("%.0f", value) : sprintf("%.3g", value) }
function add(key, value) { list[key] = list[key] " " value }

# The values added under a key, in order, in sorted[1..n]; returns n.
function sort_values(key,    n, i, j, swap) {
    n = split(list[key], sorted, " ")
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && sorted[j] + 0 < sorted[j - 1] + 0; j--) {
            swap = sorted[j]; sorted[j] = sorted[j - 1]; sorted[j - 1] = swap
        }
    return n
}

# The median of the values added under a key; "" if there are none.
function middle(key,    n) {
    n = sort_values(key)
    return n == 0 ? "" : n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
}
