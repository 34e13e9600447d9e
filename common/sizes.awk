# Reads the TSV of make table-tokens for common/sizes.gp: sizes.awk -v column=NAME -v kernels="07-tiled 07-simd .." -v want=WHAT
#   curves   each kernel's lines "T value", in the order of kernels; two empty lines behind each
#   names    "T value place name number": a curve's last point, and how high at the right edge its name stands. Names are sorted by
#            where their curves, drawn on, would meet that edge (at T = edge), and neighbours push each other away until they stand a factor `apart` from
#            each other.
#   zeros    the names of the kernels whose value is 0 everywhere; a log scale has no place for them
BEGIN { FS = OFS = "\t"; count = split(kernels, list, " ") }
NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
{
    name = substr($at["chapter"], 1, 2) "-" $at["kernel"]
    measured[name] = 1
    if ($at[column] > 0) {
        n = ++points[name]
        x[name, n] = $at["tokens"]
        y[name, n] = $at[column]
    }
}
function drawn_on(name,    n, slope) {
    n = points[name]
    slope = n > 1 ? log(y[name, n] / y[name, n - 1]) / log(x[name, n] / x[name, n - 1]) : 1
    return y[name, n] * (edge / x[name, n]) ^ slope
}
END {
    for (i = 1; i <= count; i++) {
        name = list[i]
        if (want == "zeros" && measured[name] && !points[name])
            zeros = zeros (zeros ? ", " : "") name
        if (want == "curves") {
            for (n = 1; n <= points[name]; n++)
                print x[name, n], y[name, n]
            if (!points[name])
                print "NaN", "NaN"
            print "\n"
        }
        if (want == "names" && points[name]) {
            place[++named] = drawn_on(name)
            number[named] = i
        }
    }
    if (want == "zeros")
        print zeros
    for (i = 2; i <= named; i++)
        for (j = i; j > 1 && place[j] < place[j - 1]; j--) {
            swap = place[j]; place[j] = place[j - 1]; place[j - 1] = swap
            swap = number[j]; number[j] = number[j - 1]; number[j - 1] = swap
        }
    for (round = 1; round <= 200; round++)
        for (i = 2; i <= named; i++)
            if (place[i] < apart * place[i - 1]) {
                middle = sqrt(place[i] * place[i - 1])
                place[i] = middle * sqrt(apart)
                place[i - 1] = middle / sqrt(apart)
            }
    for (i = 1; i <= named; i++) {
        name = list[number[i]]
        n = points[name]
        print x[name, n], y[name, n], place[i], name, number[i]
    }
}
