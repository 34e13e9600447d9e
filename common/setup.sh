#!/bin/sh
# Finds what is missing on this machine and installs it through the system's package manager when it may (as root, or with
# a sudo that asks no password); else prints the one command to type. Goes on without what is optional.
#
#   setup.sh          for make demo: a C and a C++ compiler, a CBLAS, gnuplot
#   setup.sh tests    also Criterion
#   setup.sh ci       also make, git, clang with its sanitizers and fuzzer, clang-format; on x86-64 a compiler for arm64
#                     and an emulator that runs what it builds
#
# SETUP=no skips all of it.
set -u
want=${1:-demo}
[ "${SETUP:-yes}" = no ] && exit 0

has() { command -v "$1" > /dev/null 2>&1; }

tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# Looks at the machine anew: what is there (for people), what is missing (for the package manager).
look() {
    found= missing=
    compiler=${CC:-cc}
    if has "$compiler" && printf '#include <stdio.h>\nint main(void) { return 0; }\n' > "$tmp/a.c" &&
        "$compiler" -o "$tmp/a" "$tmp/a.c" 2> /dev/null; then
        found="$found compiler"
        CC=$compiler sh common/probe.sh > "$tmp/config"
        if grep -q SIMT_CXX "$tmp/config"; then found="$found c++"; else missing="$missing c++"; fi
        if grep -q BLAS_NAME "$tmp/config"; then found="$found blas"; else missing="$missing blas"; fi
        if [ "$want" != demo ]; then
            if grep -q HAVE_CRITERION "$tmp/config"; then found="$found criterion"; else missing="$missing criterion"; fi
        fi
    else
        missing="$missing compiler c++ blas"
        [ "$want" = demo ] || missing="$missing criterion"
    fi
    if has gnuplot; then found="$found gnuplot"; else missing="$missing gnuplot"; fi
    if [ "$want" = ci ]; then
        for tool in make git clang clang-format; do
            if has $tool; then found="$found $tool"; else missing="$missing $tool"; fi
        done
        if has clang; then
            printf 'int main(void) { return 0; }\n' > "$tmp/a.c"
            if clang -fsanitize=address,undefined -o "$tmp/a" "$tmp/a.c" 2> /dev/null &&
                printf '#include <omp.h>\nint main(void) { return 0; }\n' > "$tmp/a.c" &&
                clang -fopenmp -o "$tmp/a" "$tmp/a.c" 2> /dev/null; then
                found="$found clang-libraries"
            else
                missing="$missing clang-libraries"
            fi
        else
            missing="$missing clang-libraries"
        fi
        if [ "$(uname -m)" = x86_64 ]; then
            printf '#include <stdio.h>\nint main(void) { return 0; }\n' > "$tmp/a.c"
            if has aarch64-linux-gnu-gcc && aarch64-linux-gnu-gcc -o "$tmp/a" "$tmp/a.c" 2> /dev/null; then
                found="$found arm64-compiler"
            else
                missing="$missing arm64-compiler"
            fi
            if has qemu-aarch64; then found="$found arm64-emulator"; else missing="$missing arm64-emulator"; fi
        fi
    fi
}

# A package that is not in every release, if this one has it: one unknown name would stop all from being installed.
if_apt_has() {
    for package in "$@"; do
        [ -z "$(apt-cache policy "$package" 2> /dev/null | grep 'Candidate: [0-9]')" ] || echo "$package"
    done
}

# Which packages bring them, by package manager.
packages() {
    for part in $missing; do
        case "$1:$part" in
        apt-get:compiler) echo gcc libc6-dev ;;
        apt-get:c++) echo g++ ;;
        apt-get:blas) echo libopenblas-openmp-dev ;;
        apt-get:criterion) echo libcriterion-dev ;;
        apt-get:gnuplot) echo gnuplot-nox fonts-dejavu-core ;;
        apt-get:clang-libraries) echo libomp-dev; if_apt_has libclang-rt-dev ;;
        apt-get:arm64-compiler) if_apt_has gcc-aarch64-linux-gnu libc6-dev-arm64-cross ;;
        apt-get:arm64-emulator) if_apt_has qemu-user ;;
        dnf:compiler) echo gcc glibc-devel ;;
        dnf:c++) echo gcc-c++ ;;
        dnf:blas) echo openblas-devel ;;
        dnf:criterion) echo libcriterion-devel ;;
        dnf:clang-libraries) echo libomp-devel compiler-rt ;;
        dnf:clang-format) echo clang-tools-extra ;;
        dnf:arm64-* | brew:arm64-*) ;; # a cross compiler without a C library, or none
        pacman:compiler) echo gcc ;;
        pacman:c++ | brew:c++) echo gcc ;;
        pacman:blas) echo openblas ;;
        pacman:criterion) ;; # not in its official repositories
        pacman:clang-libraries) echo openmp ;;
        pacman:clang-format) echo clang ;;
        pacman:arm64-compiler) echo aarch64-linux-gnu-gcc ;;
        pacman:arm64-emulator) echo qemu-user ;;
        brew:compiler) echo gcc ;;
        brew:blas) ;; # Accelerate is part of macOS
        brew:clang-libraries) echo libomp ;;
        *) echo "$part" ;;
        esac
    done | tr '\n' ' ' | sed 's/ $//'
}

say_what() {
    for part in $found; do echo "  ✓ $part"; done
    for part in $missing; do
        case $part in
        compiler) echo "  ✗ compiler    a C compiler: nothing works without one" ;;
        blas) echo "  ✗ blas        OpenBLAS: matrix products several times faster than the plain loops that stand in" ;;
        c++) echo "  ✗ c++         runs the CUDA kernels on this processor (--device simt)" ;;
        gnuplot) echo "  ✗ gnuplot     draws the charts" ;;
        criterion) echo "  ✗ criterion   runs the tests" ;;
        arm64-*) echo "  ✗ $part: without it, what is built for arm64 is not tried" ;;
        *) echo "  ✗ $part" ;;
        esac
    done
}

echo "Looking for what the chapters need:"
look
say_what
if [ -n "$missing" ]; then
    manager=
    for candidate in apt-get dnf pacman brew; do
        has $candidate && manager=$candidate && break
    done
    root=
    if [ "$manager" = brew ] || [ "$(id -u)" = 0 ]; then
        allowed=yes
    elif has sudo && sudo -n true 2> /dev/null; then
        allowed=yes root="sudo -n "
    else
        allowed=no
    fi
    if [ "$manager" = apt-get ] && [ $allowed = yes ]; then # first: a bare machine knows no packages yet
        ${root}apt-get update -q > "$tmp/log" 2>&1
    fi
    list=$(packages "$manager")
    case $manager in
    apt-get) command="apt-get install -y $list" ;;
    dnf) command="dnf install -y $list" ;;
    pacman) command="pacman -S --noconfirm $list" ;;
    brew) command="brew install $list" ;;
    *) command= ;;
    esac
    if [ -z "$command" ] || [ -z "$list" ]; then
        echo "No package manager that this script knows has them; install by hand what is marked ✗."
    elif [ $allowed = no ]; then
        echo "To install what is missing, type:  sudo $command"
    else
        echo "Installing: $list"
        [ "$manager" != apt-get ] || command="env DEBIAN_FRONTEND=noninteractive $command"
        if $root$command >> "$tmp/log" 2>&1 < /dev/null; then
            look
            say_what
        else
            tail -n 5 "$tmp/log" >&2
            echo "That did not work; going on without. The command was: $root$command"
        fi
    fi
fi
case " $missing " in
*" compiler "*)
    echo "error: no C compiler works here; install one (gcc or clang) and type make again" >&2
    exit 3
    ;;
esac
exit 0
