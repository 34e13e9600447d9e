#!/bin/sh
# What `make` alone prints: what there is to type, and what was found on this machine.
set -u
build=${BUILD:-build}
mark() { [ -n "$2" ] && echo "  ✓ $1: $2" || echo "  ✗ $1: none; $3"; }
value() { sed -n "s/^$1 := *//p" "$build/config.mk" 2> /dev/null; }

cat << 'TEXT'
Attention in C, step by step

  make demo         everything: set-up, build, nine stories, timings, charts (under 5 minutes)
  make chapter-7    build one chapter (1 to 9; make 7 is the same), then:
    ./run             its story: published numbers beside ours, one timing
    ./run --help      its kernels and options
    ./run --check     its kernels against the oracle over the ugly shapes
  make test         every test
  make tables       published tables, measured here (most of an hour; can be stopped and taken up again)
  make speed        how near the kernels come to the processor's peak (20 minutes; PYTHON=python-with-torch puts PyTorch beside, most of an hour)
  make ladder       what each trick of chapter 7's fast kernels is worth (10 minutes)
  make gpu          on a machine with a GPU: every check, timing and race check there is for one (can be stopped and taken up again)
  make figures      after make demo, tables, speed, ladder or gpu: keep its tables and charts, rewrite the READMEs' blocks
  make clean        remove what was built

Found on this machine:
TEXT
mark "C compiler" "$(${CC:-cc} --version 2> /dev/null | head -n 1)" "install gcc or clang"
mark "threads" "$([ -n "$(value OPENMP_LIBS)" ] && echo OpenMP)" "kernels run on one core; install libomp-dev for clang"
mark "matrix products" "$(value BLAS_NAME)" "plain C loops stand in; install libopenblas-openmp-dev"
mark "charts" "$(command -v gnuplot > /dev/null && gnuplot --version)" "install gnuplot-nox"
mark "tests" "$([ -n "$(value HAVE_CRITERION)" ] && echo Criterion)" "install libcriterion-dev"
mark "C++ compiler" "$(value SIMT_CXX)" "the CUDA kernels' stand-in on this processor (--device simt) is left out; install g++"
nvcc=$(value NVCC)
mark "CUDA compiler" "$([ -n "$nvcc" ] && "$nvcc" --version | sed -n 's/.*release \([^,]*\).*/nvcc \1/p')$(value CUDA_LIBS | sed -n 's/.*-lcublas.*/ with cuBLAS/p')" "not needed: the chapters run on the CPU"
