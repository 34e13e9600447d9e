#!/bin/sh
# What has this machine got? Tries a compiler, an OpenMP, a CBLAS, Criterion, gnuplot, a C++ compiler and nvcc, and prints
# what it found as variables for make. Nothing here fails: what is missing is left empty. OPENMP=no, BLAS=no, SIMT=no and
# CUDA=no look away from what is there.
set -u
CC=${CC:-cc}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# try PROGRAM FLAGS..: does this small program build with these flags?
try() {
    printf '%s\n' "$1" > "$tmp/try.c"
    shift
    $CC "$tmp/try.c" -o "$tmp/try" "$@" > /dev/null 2>&1
}

if [ "${OPENMP:-}" != no ] && try '#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }' -fopenmp; then
    echo "OPENMP_CFLAGS := -fopenmp"
    echo "OPENMP_LIBS := -fopenmp"
elif try 'int main(void) { return 0; }' -fopenmp-simd; then # one thread, but `omp simd` still makes vectors
    echo "OPENMP_CFLAGS := -fopenmp-simd -Wno-unknown-pragmas"
else
    echo "OPENMP_CFLAGS := -Wno-unknown-pragmas"
fi

blas_program='#include <cblas.h>
int main(void) { float a = 1, b = 2, c = 0;
cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 1, 1, 1, 1, &a, 1, &b, 1, 0, &c, 1); return c != 2; }'
accelerate_program='#include <Accelerate/Accelerate.h>
int main(void) { return 0; }'
if [ "${BLAS:-}" = no ]; then
    :
elif try "$blas_program
void openblas_set_num_threads(int); void (*p)(int) = openblas_set_num_threads;" -lopenblas; then
    echo "BLAS_NAME := OpenBLAS"
    echo "BLAS_CPPFLAGS := -DHAVE_CBLAS -DHAVE_OPENBLAS"
    echo "BLAS_LIBS := -lopenblas"
elif try "$accelerate_program" -framework Accelerate; then
    echo "BLAS_NAME := Accelerate"
    echo "BLAS_CPPFLAGS := -DHAVE_CBLAS -DHAVE_ACCELERATE -DACCELERATE_NEW_LAPACK"
    echo "BLAS_LIBS := -framework Accelerate"
elif try "$blas_program" -lblis; then
    echo "BLAS_NAME := BLIS"
    echo "BLAS_CPPFLAGS := -DHAVE_CBLAS"
    echo "BLAS_LIBS := -lblis"
fi # a bare libblas is often the reference one, many times slower than the plain loops that stand in

if try '#include <criterion/criterion.h>
Test(a, b) { cr_assert(1); }' -lcriterion; then
    echo "HAVE_CRITERION := yes"
fi
if command -v gnuplot > /dev/null 2>&1; then
    echo "HAVE_GNUPLOT := yes"
fi

# A C++ compiler, for the CPU stand-in for CUDA threads: one whose objects this C compiler links.
case $CC in
*clang*) candidates="$(echo "$CC" | sed 's/clang/clang++/')" ;;
*) candidates="${CXX:-} c++ g++ clang++" ;;
esac
for cxx in $candidates; do
    [ "${SIMT:-}" != no ] || break
    echo 'extern "C" int main() { return 0; }' > "$tmp/try.cpp"
    if $cxx -std=c++17 -fno-exceptions -fno-rtti -c "$tmp/try.cpp" -o "$tmp/cxx.o" > /dev/null 2>&1 &&
        $CC "$tmp/cxx.o" -o "$tmp/try" > /dev/null 2>&1; then
        echo "SIMT_CXX := $cxx"
        echo "SIMT_CPPFLAGS := -DHAVE_SIMT"
        break
    fi
done

# nvcc with its runtime to link, and cuBLAS. A device is looked for when a program runs, not here.
for nvcc in ${NVCC:-nvcc} /usr/local/cuda/bin/nvcc; do
    [ "${CUDA:-}" != no ] && path=$(command -v "$nvcc") || continue
    root=$(dirname "$(dirname "$(readlink -f "$path")")")
    lib=$root/lib64
    [ -d "$lib" ] || lib=$root/lib
    printf '#include <cuda_runtime.h>\nint main(void) { int n; cudaGetDeviceCount(&n); return 0; }\n' > "$tmp/try.cu"
    "$nvcc" -std=c++17 -arch=sm_90 -c "$tmp/try.cu" -o "$tmp/cuda.o" > /dev/null 2>&1 || continue
    for runtime in "-lcudart_static -ldl -lpthread -lrt" "-lcudart -Wl,-rpath,$lib"; do
        $CC "$tmp/cuda.o" -o "$tmp/try" -L"$lib" $runtime > /dev/null 2>&1 || continue
        echo "NVCC := $path"
        cublas=
        if $CC "$tmp/cuda.o" -o "$tmp/try" -L"$lib" -Wl,--no-as-needed -lcublas $runtime > /dev/null 2>&1 &&
            [ -f "$root/include/cublas_v2.h" ]; then
            cublas="-lcublas -Wl,-rpath,$lib"
            echo "CUDA_CPPFLAGS := -DHAVE_CUDA -DHAVE_CUBLAS"
        else
            echo "CUDA_CPPFLAGS := -DHAVE_CUDA"
        fi
        echo "CUDA_LIBS := -L$lib $cublas $runtime"
        break 2
    done
done
