# Attention in C, step by step. `make` alone lists what there is to type.
#
#   BUILD=dir     where everything built goes            CC=clang     another compiler
#   SETUP=no      install nothing, look only             SANITIZE=yes AddressSanitizer and UBSan
#   ARCH=flags    the processor built for (default: this one)
#   SIMT=no       without the CPU stand-in for CUDA threads   CUDA=no     without nvcc   NVCC=path

CHAPTERS := 01_self_attention 02_causal_attention 03_multihead_wrapper 04_packed_qkv 05_einsum_style \
            06_online_softmax 07_flash_tiled 08_gqa 09_block_sparse
BUILD    ?= build
SETUP    ?= yes
SANITIZE ?= no
export BUILD SETUP

# This processor if the compiler builds for its kind, else (a cross compiler) what the compiler takes by itself.
MACHINE  := $(subst arm64,aarch64,$(shell uname -m))
NATIVE   := $(if $(filter aarch64,$(MACHINE)),-mcpu=native,-march=native)
ARCH     ?= $(if $(filter $(MACHINE)-%,$(subst arm64,aarch64,$(shell $(CC) -dumpmachine))),$(NATIVE))
OPTIMISE ?= -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast
WARN     := -Wall -Wextra -Wshadow -Wstrict-prototypes $(if $(CI),-Werror)
ifeq ($(SANITIZE),yes)
OPTIMISE := -O1 -DUNROLL= -Wno-pass-failed -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
endif

.PHONY: help
help:

# What this machine has: a few lines of make, found once by looking (common/probe.sh) and again after `make clean`.
ifeq ($(filter clean setup format,$(MAKECMDGOALS)),)
-include $(BUILD)/config.mk
endif
$(BUILD)/config.mk: common/probe.sh
	@mkdir -p $(BUILD)
	@CC="$(CC)" NVCC="$(NVCC)" sh common/probe.sh > $@.new && mv $@.new $@

# The same, looking again: set-up may have installed something. Nothing is rebuilt where nothing has changed.
.PHONY: probe
probe:
	@mkdir -p $(BUILD)
	@CC="$(CC)" NVCC="$(NVCC)" sh common/probe.sh > $(BUILD)/config.new
	@cmp -s $(BUILD)/config.new $(BUILD)/config.mk || cp $(BUILD)/config.new $(BUILD)/config.mk

CPPFLAGS += -D_GNU_SOURCE -Icommon $(BLAS_CPPFLAGS) $(SIMT_CPPFLAGS) $(CUDA_CPPFLAGS)
CFLAGS   += -std=c11 -g $(OPTIMISE) $(ARCH) $(WARN) $(OPENMP_CFLAGS)
LDLIBS   += $(CUDA_LIBS) $(BLAS_LIBS) $(OPENMP_LIBS) -lm

# A .cu file is compiled twice: as C++ for the CPU stand-in for CUDA threads, and by nvcc for GPUs.
WARN_CXX   := $(filter-out -Wstrict-prototypes,$(WARN)) -Wno-missing-field-initializers
SIMT_FLAGS := -std=c++17 -g $(OPTIMISE) $(ARCH) $(WARN_CXX) -fno-exceptions -fno-rtti $(OPENMP_CFLAGS) \
              $(if $(filter yes,$(SANITIZE)),-fno-sanitize=vptr $(if $(findstring clang,$(SIMT_CXX)),-fno-sanitize=function))
CUDA_FLAGS := -std=c++17 -O3 -lineinfo -gencode arch=compute_80,code=sm_80 \
              -gencode arch=compute_90,code=\"sm_90,compute_90\" $(if $(CI),-Werror all-warnings) \
              -Xcompiler -Wall,-Wextra,-Wno-missing-field-initializers,-fno-exceptions,-fno-threadsafe-statics
devices = $(if $(SIMT_CXX),$(patsubst %.cu,$(BUILD)/%.simt.o,$(1))) $(if $(NVCC),$(patsubst %.cu,$(BUILD)/%.cuda.o,$(1)))
COMMON_DEVICES := $(if $(SIMT_CXX),$(patsubst %.cpp,$(BUILD)/%.simt.o,$(filter-out common/test_%,$(wildcard common/*.cpp)))) \
                  $(if $(NVCC),$(BUILD)/common/device_cuda.cuda.o)

COMMON_SOURCES := $(filter-out common/test_% common/fuzz_%,$(wildcard common/*.c))
COMMON_LIBRARY := $(BUILD)/common/libcommon.a
objects = $(patsubst %.c,$(BUILD)/%.o,$(1))

# Chapters 8 and 9 call chapter 7's fast tile steps.
BORROWS_08_gqa          := $(wildcard 07_flash_tiled/flash_*simd*.c 07_flash_tiled/flash_pairs.c 07_flash_tiled/flash_view*.c 07_flash_tiled/flash_bias_backward.c)
BORROWS_09_block_sparse := $(BORROWS_08_gqa)

$(BUILD)/%.o: %.c $(BUILD)/config.mk
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(if $(findstring /test_,$<),$(CRITERION_CFLAGS)) -MMD -MP -c -o $@ $<

$(BUILD)/%.simt.o: %.cu $(BUILD)/config.mk
	@mkdir -p $(@D)
	$(SIMT_CXX) -x c++ -DSIMT $(CPPFLAGS) $(SIMT_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/%.simt.o: %.cpp $(BUILD)/config.mk
	@mkdir -p $(@D)
	$(SIMT_CXX) -DSIMT $(CPPFLAGS) $(SIMT_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/%.cuda.o: %.cu $(BUILD)/config.mk
	@mkdir -p $(@D)
	$(NVCC) $(CPPFLAGS) $(CUDA_FLAGS) -MMD -MP -c -o $@ $<

# A chapter's main.c again for its tests, which bring a main of their own.
$(BUILD)/%/main_for_test.o: %/main.c $(BUILD)/config.mk
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -Dmain=chapter_program -MMD -MP -c -o $@ $<

$(COMMON_LIBRARY): $(call objects,$(COMMON_SOURCES)) $(COMMON_DEVICES)
	rm -f $@ && $(AR) rcs $@ $^

# chapter_rules(folder)
define chapter_rules
ALGORITHMS_$(1) := $$(filter-out $(1)/main.c $(1)/test_% $(1)/fuzz_%,$$(wildcard $(1)/*.c)) $$(BORROWS_$(1))
DEVICES_$(1)    := $$(call devices,$$(wildcard $(1)/*.cu $(1)/cuda/*.cu))
TESTS_$(1)      := $$(wildcard $(1)/test_*.c)
$$(BUILD)/$(1)/run: $$(call objects,$(1)/main.c $$(ALGORITHMS_$(1))) $$(DEVICES_$(1)) $$(COMMON_LIBRARY)
	$$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(LDLIBS)
$$(BUILD)/$(1)/test: $$(BUILD)/$(1)/main_for_test.o $$(call objects,$$(ALGORITHMS_$(1)) $$(TESTS_$(1)) common/test_chapter.c) $$(DEVICES_$(1)) $$(COMMON_LIBRARY)
	$$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(LDLIBS) -lcriterion
.PHONY: $(1) chapter-$(patsubst 0%,%,$(firstword $(subst _, ,$(1)))) $(patsubst 0%,%,$(firstword $(subst _, ,$(1))))
chapter-$(patsubst 0%,%,$(firstword $(subst _, ,$(1)))): $$(BUILD)/$(1)/run
	@ln -sfn $$< run
	@echo "built $(1): ./run tells its story, ./run --help lists the options"
$(patsubst 0%,%,$(firstword $(subst _, ,$(1)))): chapter-$(patsubst 0%,%,$(firstword $(subst _, ,$(1))))
endef
$(foreach chapter,$(CHAPTERS),$(eval $(call chapter_rules,$(chapter))))

PROGRAMS := $(CHAPTERS:%=$(BUILD)/%/run)
TESTS    := $(BUILD)/common/test $(CHAPTERS:%=$(BUILD)/%/test)

$(BUILD)/common/test: $(call objects,$(filter-out common/test_chapter.c,$(wildcard common/test_*.c))) \
                      $(if $(SIMT_CXX),$(BUILD)/common/test_simt.simt.o) $(COMMON_LIBRARY)
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcriterion

.PHONY: all tests test demo figures tables speed gpu peers fuzz setup clean format
all: $(PROGRAMS)
tests: $(PROGRAMS) $(TESTS)

help: probe
	@sh common/help.sh

setup:
	@sh common/setup.sh
	@$(MAKE) --no-print-directory probe

demo:
	@sh common/setup.sh
	@$(MAKE) --no-print-directory probe
	@$(MAKE) --no-print-directory all
	@sh common/demo.sh

test:
	@sh common/setup.sh tests
	@$(MAKE) --no-print-directory probe
	@sh common/test.sh

figures:
	@sh common/figures.sh

# The tables that others have published, measured here: all of them, or one (table-a100).
tables: all
	@sh common/tables.sh
table-%: all
	@sh common/tables.sh $*

# All that wants a GPU, one step after the other; GPU=simt tries it on the stand-in.
gpu: all
	@sh common/gpu.sh

# How near to the processor's peak the kernels come, and PyTorch beside them where a Python with PyTorch is at hand.
PYTHON ?= python3
speed: all
	@PYTHON="$(PYTHON)" sh common/speed.sh
speed-%: all
	@PYTHON="$(PYTHON)" sh common/speed.sh $*

# The fast kernel less one trick at a time. A folder holds copies of these files; one of them is changed (common/ladder.sh).
# ladder_rules(folder, files)
define ladder_rules
$$(BUILD)/$(1)/%/run: $$(addprefix $$(BUILD)/$(1)/%/,$(2) flash_pairs.c vectors.h) \
                      $$(filter-out $$(call objects,$$(addprefix 07_flash_tiled/,$$(filter %.c,$(2) flash_pairs.c))), \
                      $$(call objects,07_flash_tiled/main.c $$(ALGORITHMS_07_flash_tiled))) $$(DEVICES_07_flash_tiled) $$(COMMON_LIBRARY)
	$$(CC) -I$$(@D) -I07_flash_tiled $$(CPPFLAGS) $$(CFLAGS) -w $$(LDFLAGS) -o $$@ $$(filter %.c %.o %.a,$$^) $$(LDLIBS)
endef
$(eval $(call ladder_rules,ladder,flash_tiled_simd.c flash_tiled_simd.h flash_view.c))
$(eval $(call ladder_rules,ladder/backward,flash_tiled_simd_backward.c flash_tiled_simd_backward.h flash_view_backward.c))
.PHONY: ladder
ladder: $(BUILD)/07_flash_tiled/run
	@sh common/ladder.sh && sh common/ladder.sh backward

# PyTorch's own bars beside ours.
peers: all
	@$(PYTHON) common/pytorch_peers.py && sh common/charts.sh $(BUILD)/$(if $(filter cuda,$(DEVICE)),gpu,demo)

# libFuzzer on what reads foreign bytes. FUZZ_SECONDS each, side by side.
FUZZ_SECONDS ?= 60
FUZZERS := $(BUILD)/fuzz/npy $(BUILD)/fuzz/einsum
FUZZ_FLAGS := -std=c11 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -D_GNU_SOURCE -Icommon
$(BUILD)/fuzz/npy: common/fuzz_npy.c common/npy.c
	@mkdir -p $(@D)
	clang $(FUZZ_FLAGS) -o $@ $^ -lm
$(BUILD)/fuzz/einsum: 05_einsum_style/fuzz_einsum.c 05_einsum_style/einsum.c common/matmul.c common/error.c
	@mkdir -p $(@D)
	clang $(FUZZ_FLAGS) -Wno-unknown-pragmas -o $@ $^ -lm
fuzz: $(FUZZERS)
	@mkdir -p $(FUZZERS:%=%-corpus)
	@for f in $(FUZZERS); do \
	    ( cd $(BUILD)/fuzz && timeout $$(($(FUZZ_SECONDS) + 60)) ./$$(basename $$f) -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 \
	        $$(basename $$f)-corpus > $$(basename $$f).log 2>&1; echo $$? > $$(basename $$f).status ) & \
	done; wait; \
	for f in $(FUZZERS); do \
	    grep -E 'number_of_executed_units|ERROR|SUMMARY' $$f.log | sed "s|^|$$(basename $$f): |"; \
	    [ "$$(cat $$f.status)" = 0 ] || { tail -n 30 $$f.log; exit 1; }; \
	done

format:
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cu' '*.cpp')

clean:
	rm -rf $(BUILD) run

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
