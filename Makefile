# make                       the program for this machine: ./olmoe
# make setup                 install what is missing
# make setup-page            the browser of make test-page
# make DEVICE=cpu|cuda PRECISION=FP32|BF16 [STRICT=1] [SANITIZE=address|undefined|thread] olmoe test_olmoe
# make MARCH=haswell         for another processor than this one (the fast build of the CPU; g++ -march)
# make DEVICE=cuda SM=90     for another GPU than this machine's: its compute capability (H100: 90), or several, "80 90"
# make CXXFLAGS="-g ..."     further options of g++, after those of the build
# make cuda                  compile for all GPUs, warnings and register spills are errors
# make test-gpu              does all of it work on this GPU? MINUTES=10 at most, and a report to send: build/test-gpu.txt
# make DEVICE=cuda SM=90 test-gpu-build      build its programs on a machine without a GPU, to carry over
# make train                 train a small model on a generated corpus; DATA=my.txt: on a text
# make finetune              fine-tune that model: conversations, then preferences; SEED=2: another run
# make clean                 remove what was built; runs (build/train*, build/finetune), build/venv and build/llama.cpp stay

.DEFAULT_GOAL := olmoe
.DELETE_ON_ERROR:
.SUFFIXES:

# The name of a text is never expanded, by no make and for no command: a $ in it is a $.
override DATA := $(value DATA)

# Where setup or clean is one of several goals, they run one after another, setup first, also with -j (which then holds
# within each). Each has its own make, which sees what those before it have installed or removed.
ifneq ($(and $(filter setup setup-page clean,$(MAKECMDGOALS)),$(word 2,$(MAKECMDGOALS))),)
.NOTPARALLEL:
.PHONY: $(sort $(MAKECMDGOALS))
$(sort $(MAKECMDGOALS)):
	+@$(MAKE) --no-print-directory $@
$(sort $(filter-out setup setup-page,$(MAKECMDGOALS))): $(sort $(filter setup setup-page,$(MAKECMDGOALS)))
else

# ------------------------------------------------------------------------------------------------
# Machine: CUDA where there are an NVIDIA device and nvcc, else the CPU.

NVCC ?= $(firstword $(wildcard $(shell command -v nvcc 2>/dev/null) /usr/local/cuda/bin/nvcc) nvcc)
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
ifndef DEVICE
  ifeq ($(wildcard /dev/nvidia[0-9]*),)
    DEVICE := cpu
    WHY := no NVIDIA device here
  else ifeq ($(shell $(NVCC) --version >/dev/null 2>&1 && echo yes),)
    DEVICE := cpu
    WHY := there is an NVIDIA device but no nvcc
  else
    DEVICE := cuda
    WHY := an NVIDIA device and nvcc
  endif
else
  WHY := DEVICE=$(DEVICE) was given
endif
ifeq ($(filter cpu cuda,$(DEVICE)),)
  $(error DEVICE=$(DEVICE): write DEVICE=cpu or DEVICE=cuda)
endif
# The tests run an FP32 program, because their tolerances are for fp32. What they need in BF16 they build themselves.
PRECISION ?= $(if $(filter cuda,$(DEVICE)),$(if $(filter test test-parallel,$(MAKECMDGOALS)),FP32,BF16),FP32)
ifeq ($(filter FP32 BF16,$(PRECISION)),)
  $(error PRECISION=$(PRECISION): write PRECISION=FP32 or PRECISION=BF16)
endif
ifneq ($(SANITIZE),)
  ifeq ($(filter address undefined thread,$(SANITIZE)),)
    $(error SANITIZE=$(SANITIZE): write address, undefined or thread)
  endif
  override STRICT := 1
endif
ifneq ($(filter-out 0 1,$(STRICT)),)
  $(error STRICT=$(STRICT): write STRICT=1)
endif
ifneq ($(filter 1,$(STRICT)),)
  ifneq ($(DEVICE),cpu)
    $(error STRICT and SANITIZE are builds of the CPU: add DEVICE=cpu)
  endif
endif

comma := ,
lower = $(subst F,f,$(subst P,p,$(subst B,b,$(1))))
BUILD := build/$(DEVICE)-$(call lower,$(PRECISION))$(if $(filter 1,$(STRICT)),-strict)$(if $(SANITIZE),-$(SANITIZE))
DEFINES := $(if $(filter BF16,$(PRECISION)),-DPRECISION_BF16)
ifeq ($(DEVICE),cpu)
  DEFINES += -DCUBLAS_WORKSPACE_BYTES=0 -DNCCL_BY_MPI=1
endif

# ------------------------------------------------------------------------------------------------
# Several ranks: MPI starts them. Their collectives go through MPI on CPUs, and through NCCL on GPUs. Where one of them is
# missing, a header of cpu/ takes its place, and the program has one rank. They are looked up at their first use.

MPICC ?= mpicc
MPI_CFLAGS = $(eval MPI_CFLAGS := $(or $(shell flags=$$($(MPICC) --showme:compile 2>/dev/null) && g++ $$flags -include mpi.h -E -x c++ /dev/null \
  >/dev/null 2>&1 && echo -DOMPI_SKIP_MPICXX $$flags),-Icpu/no_mpi))$(MPI_CFLAGS)
MPI_LIBS = $(if $(filter -Icpu/no_mpi,$(MPI_CFLAGS)),,$(eval MPI_LIBS := $(shell $(MPICC) --showme:link))$(MPI_LIBS))

# The folder of NCCL: NCCL_HOME, CUDA's folder, or the system's
NCCL = $(eval NCCL := $(patsubst %/include/nccl.h,%,$(firstword $(wildcard $(addsuffix /include/nccl.h,$(NCCL_HOME) $(patsubst %/bin/nvcc,%, \
  $(realpath $(shell command -v $(NVCC) 2>/dev/null))) /usr /usr/local)))))$(NCCL)
NCCL_LIB = $(firstword $(wildcard $(addsuffix /libnccl.so,$(addprefix $(NCCL)/,lib64 lib lib/*-linux-gnu))))
NCCL_CFLAGS = $(if $(NCCL_LIB),$(filter-out -I/usr/include,-I$(NCCL)/include),-Icpu/no_nccl)
NCCL_LIBS = $(if $(NCCL_LIB),-L$(patsubst %/libnccl.so,%,$(NCCL_LIB)) -lnccl)

# Changes when MPI or NCCL is installed or removed: what depends on them is then built again.
RANK_FLAGS := $(if $(filter cpu,$(DEVICE)),$(BUILD)/cpu/ranks.flags)
.PHONY: FORCE
$(RANK_FLAGS) build/ranks.flags: FORCE
	@mkdir -p $(@D)
	@echo '$(MPI_CFLAGS) $(MPI_LIBS) $(NCCL_CFLAGS) $(NCCL_LIBS)' | cmp -s - $@ || echo '$(MPI_CFLAGS) $(MPI_LIBS) $(NCCL_CFLAGS) $(NCCL_LIBS)' > $@

WITHOUT = $(if $(filter -Icpu/no_mpi,$(MPI_CFLAGS)),$(comma) without MPI)$(if $(filter cuda,$(DEVICE)),$(if $(NCCL_LIB),,$(comma) without NCCL))
ifneq ($(if $(MAKECMDGOALS),$(filter olmoe test_olmoe train finetune test bench,$(MAKECMDGOALS)),olmoe),)
  $(info Building for $(if $(filter cuda,$(DEVICE)),CUDA,the CPU) in $(PRECISION)$(if $(filter 1,$(STRICT)), (strict$(if $(SANITIZE),$(comma) $(SANITIZE) sanitizer)))$(WITHOUT): $(WHY).)
endif

.PHONY: olmoe test_olmoe setup setup-page cuda ptx clean

# ./olmoe and ./test_olmoe are links to the build that was asked for last.
olmoe test_olmoe: %: $(BUILD)/%
	@ln -sf $< $@

setup:
	@scripts/setup.sh

setup-page:
	@scripts/setup.sh page

clean:
	rm -rf $(filter-out build/train% build/finetune build/venv build/llama.cpp,$(wildcard build/*)) olmoe test_olmoe

# ------------------------------------------------------------------------------------------------
# CPU: preprocess, rewrite the launches, compile. The preprocessor's .d file lists the headers.

ifeq ($(DEVICE),cpu)
CXX := g++
MARCH := native
CXXFLAGS :=
# -g1 has the line numbers that sanitizers and backtraces print; with all of -g compiling takes 1.5 times as long.
OPTIONS := -g1 -fno-math-errno -Wall -Wextra
ifeq ($(STRICT),1)
  DEFINES += -DCUDA_STRICT -DWARP=32 -DSEPARATE_ALLOCATIONS=1 -DHEAD_ROWS=5
  OPTIONS += -O1                                # -O2 takes twice as long to compile and runs no faster: fibers take the time
  MACHINE := strict
else
  # Not -ffast-math: it may delete isnan, and turn !(error <= tolerance) into error > tolerance.
  # Packs of 16 bytes (4 or 8 iterations) must stay loops for the thread loop around them to vectorise.
  DEFINES += -DWARP=1 -DATTENTION_BLOCK=128
  OPTIONS += -O3 -march=$(MARCH) -fassociative-math -fno-signed-zeros -fno-trapping-math --param max-completely-peel-times=4
  MACHINE := fast
endif
# CXXFLAGS of the command line (not of the environment) come after what they may change and before what the build needs.
MACHINE_FLAGS := $(OPTIONS) $(CXXFLAGS) -std=c++17 -fopenmp -fno-finite-math-only
FLAGS := $(MACHINE_FLAGS)
ifneq ($(SANITIZE),)
  SANITIZE_FLAGS := -fsanitize=$(SANITIZE) -fno-omit-frame-pointer $(if $(filter undefined,$(SANITIZE)),-fno-sanitize-recover=all)
  FLAGS += $(SANITIZE_FLAGS)
  # TSan has to see what the fibers do, but not their scheduler.
  MACHINE_FLAGS += $(if $(filter thread,$(SANITIZE)),-DCUDA_TSAN,$(SANITIZE_FLAGS))
endif
LDLIBS := -ldnnl -lutf8proc -lz -lmvec -lm
MACHINE_OBJECTS := $(addprefix $(BUILD)/cpu/,$(MACHINE).o gemm.o nccl.o device.o $(if $(filter fast,$(MACHINE)),processor.o))

# Changes with the options, the compiler, and what -march=native means on this processor: all is then compiled again.
COMPILER := $(BUILD)/cpu/compiler.flags
$(COMPILER): FORCE
	@mkdir -p $(@D)
	@macros=$$($(CXX) $(FLAGS) -dM -E -x c++ /dev/null) && \
	now='$(subst ','\'',$(CXX) $(FLAGS) $(MACHINE_FLAGS) $(DEFINES))'" $$(echo "$$macros" | cksum)" && \
	{ echo "$$now" | cmp -s - $@ || echo "$$now" > $@; }

$(BUILD)/%.o: %.cu cpu/rewrite Makefile $(RANK_FLAGS) $(COMPILER)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(DEFINES) -Icpu -I. $(MPI_CFLAGS) -MMD -MP -MT $@ -MF $(@:.o=.d) -E -x c++ $< -o $(@:.o=.i)
	cpu/rewrite < $(@:.o=.i) > $(@:.o=.ii)
	$(CXX) $(FLAGS) -fpreprocessed -x c++ -c $(@:.o=.ii) -o $@

$(BUILD)/cpu/%.o: cpu/%.cpp Makefile $(COMPILER)
	@mkdir -p $(@D)
	$(CXX) $(MACHINE_FLAGS) $(DEFINES) -Icpu $(if $(filter nccl,$*),$(MPI_CFLAGS)) -MMD -MP -c $< -o $@
$(BUILD)/cpu/nccl.o: $(RANK_FLAGS)
# Sums over ranks are added in the order of the ranks. Other files may reorder their sums.
$(BUILD)/cpu/nccl.o: MACHINE_FLAGS += -fno-associative-math
# Runs on any processor, whatever CXXFLAGS say, to report that the rest does not.
$(BUILD)/cpu/processor.o: MACHINE_FLAGS := -std=c++17 -O1 -g1 -Wall -Wextra $(if $(filter x86_64,$(shell uname -m)),-march=x86-64)

$(BUILD)/%: $(BUILD)/%.o $(MACHINE_OBJECTS)
	$(CXX) $(FLAGS) $^ $(LDLIBS) $(MPI_LIBS) -o $@

.SECONDARY:
-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/tests/machine/*.d)
endif

# ------------------------------------------------------------------------------------------------
# CUDA

NVCCFLAGS = -O3 -std=c++17 -Icuda -Xcompiler -Wall,-Wextra $(filter -I% -D%,$(MPI_CFLAGS)) $(NCCL_CFLAGS)
LIBRARIES = -lcublas -lutf8proc -lz $(NCCL_LIBS) $(patsubst -Wl$(comma)%,-Xlinker %,$(filter -L% -l% -Wl%,$(MPI_LIBS)))

# The GPU that is built for. Each of a list also gets its PTX, which later GPUs compile at the start.
SM ?= native
ifeq ($(DEVICE),cuda)
ifneq ($(SM),native)
digits = $(if $(2),$(call digits,$(subst $(firstword $(2)),,$(1)),$(wordlist 2,99,$(2))),$(1))
ifneq ($(if $(strip $(SM)),$(strip $(call digits,$(SM),0 1 2 3 4 5 6 7 8 9 a f)),nothing),)
  $(error SM=$(SM): write SM=native, or compute capabilities without the point, as in SM=90 or SM="80 90")
endif
endif
ARCH = $(if $(filter native,$(SM)),-arch=native,$(foreach sm,$(SM),-gencode 'arch=compute_$(sm),code=[compute_$(sm),sm_$(sm)]'))

# Changes with the GPU that is built for: all is then compiled again. Where no device answers, nvcc itself only warns, and
# compiles for the oldest GPU that it knows, on which BF16 is slow.
$(BUILD)/gpu.flags: FORCE
	@mkdir -p $(@D)
	@now='$(SM)'; [ "$$now" != native ] || { \
	said=$$($(NVCC) -arch=native --dryrun -x cu -c /dev/null 2>&1) && now=$$(echo "$$said" | grep -o 'sm_[0-9][0-9a-f]*' | sort -u) && \
	[ -n "$$now" ] && case $$said in *"Cannot find valid GPU"*) false;; esac; } || { \
	echo 'make: SM=native, but $(NVCC) finds no GPU here; name the one to build for: SM=90 (H100, H200), 80 (A100), 86 (A10, RTX 30), 89 (L4, L40S, RTX 40), 100 (B200), 120 (RTX 50)' >&2; exit 1; }; \
	echo "$$now" | cmp -s - $@ || echo "$$now" > $@

$(BUILD)/%: %.cu Makefile build/ranks.flags $(BUILD)/gpu.flags
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -lineinfo $(ARCH) $(DEFINES) -MMD -MP -MF $@.d $< -o $@ $(LIBRARIES)
endif

# Compiled for each generation of GPUs, but not run. ptxas's lines are printed; a spilled register is an error.
GENCODE := $(foreach sm,80 90 100,-gencode arch=compute_$(sm),code=sm_$(sm))
CUDA_CHECKS := $(foreach p,fp32 bf16,$(foreach t,olmoe test_olmoe,build/cuda-all-$(p)/$(t)))
cuda: $(CUDA_CHECKS)
	@for f in $^; do echo "$$f:"; grep -E "Compiling entry|Used|spill" $$f.ptxas | sed "s/^ptxas info *: //"; done
	@! grep -E "[1-9][0-9]* bytes spill" $(addsuffix .ptxas,$^) || { echo "make cuda: registers spill" >&2; exit 1; }
	@echo "make cuda: no warnings, no spills: $$(cat $(addsuffix .ptxas,$^) | grep -c Used) kernels for sm_80, sm_90 and sm_100"

build/cuda-all-fp32/%: %.cu Makefile build/ranks.flags
	$(call compile_for_all,)
build/cuda-all-bf16/%: %.cu Makefile build/ranks.flags
	$(call compile_for_all,-DPRECISION_BF16)
define compile_for_all
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -Xcompiler -Werror -Werror all-warnings -Xptxas -v $(GENCODE) $(1) -MMD -MP -MF $@.d $< -o $@ $(LIBRARIES) >$@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@mv $@.log $@.ptxas
endef

# Kernels as PTX, CUDA's runtime and cuBLAS as shared libraries: a tool can put its own libraries in their place.
ptx: $(foreach p,fp32 bf16,$(foreach t,olmoe test_olmoe,build/ptx-$(p)/$(t)))
build/ptx-fp32/%: %.cu Makefile build/ranks.flags
	$(call compile_to_ptx,)
build/ptx-bf16/%: %.cu Makefile build/ranks.flags
	$(call compile_to_ptx,-DPRECISION_BF16)
define compile_to_ptx
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -cudart shared -no-compress -gencode arch=compute_90,code=compute_90 $(1) -MMD -MP -MF $@.d $< -o $@ $(LIBRARIES)
endef

-include $(wildcard build/cuda-*/*.d build/ptx-*/*.d build/ptx-*/tests/machine/*.d)

# ------------------------------------------------------------------------------------------------
# Train on the generated corpus, or on any text: make train DATA=my.txt. Called again, it continues from what is saved.
# A text's name is no name of make's, which could not hold all of them: split_text.py itself looks whether the text has
# changed, and names its folder. In a shell's command the name is in quotes.

RUN := build/train
ifneq ($(and $(DATA),$(filter train build/train-%,$(MAKECMDGOALS))),)
define line_break


endef
ifneq ($(findstring $(line_break),$(DATA)),)
  $(error DATA: a line break in the name of a text. Rename it, or make a link to it)
endif
TEXT := '$(subst ','\'',$(DATA))'
FOLDER := $(shell $(PYTHON) scripts/split_text.py --folder $(TEXT) 2>&1)
ifneq ($(filter-out 0,$(.SHELLSTATUS)),)
  $(error $(FOLDER))
endif
RUN := build/train-$(FOLDER)
endif
TRAIN_OPTIONS ?= --steps 2200 --batch 8 --lr 4e-3 --warmup 100
TASKS := $(if $(TEXT),,$(foreach task,stories arithmetic dialogues programs,$(RUN)/tasks/$(task).jsonl))

.PHONY: train
train: olmoe $(RUN)/train.npy $(RUN)/val.npy $(TASKS)
	./olmoe train --config configs/tiny.json --tokenizer bytes --data $(RUN)/train.npy --val $(RUN)/val.npy --out $(RUN)/run --resume \
	  --val-every 200 --sample-every 550 --save-every 550 --routing-every 550 --keep-last 2 --log-every 25 \
	  $(if $(TASKS),--eval-tasks $(TASKS) --eval-every 1100 --eval-start) $(TRAIN_OPTIONS)
	./olmoe routing --model "$$(ls -d $(RUN)/run/step-* | tail -n 1)" --tokenizer bytes --data $(RUN)/val.npy --out $(RUN)/routing.json --page $(RUN)/routing.html
	$(PYTHON) scripts/learned.py $(RUN) $(RUN)/run
	@echo "what its experts do, to look through in a browser: $(RUN)/routing.html"

# SFT, then DPO, of the model of the default run, on conversations about the world of its corpus. Called again, it goes on
# from what is saved.
SEED := 1
.PHONY: finetune
finetune: train
	$(PYTHON) scripts/finetune.py --base build/train/run --out build/finetune/seed-$(SEED) --seed $(SEED)

ifdef TEXT
$(RUN)/train.txt: FORCE
	$(PYTHON) scripts/split_text.py $(TEXT) $(RUN)
$(RUN)/val.txt: $(RUN)/train.txt
$(RUN)/%.npy: $(RUN)/%.txt | olmoe
	./olmoe tokenize --tokenizer bytes --out $@ $<
else
$(RUN)/train.jsonl: scripts/make_corpus.py
	$(PYTHON) scripts/make_corpus.py --out $(RUN)
$(RUN)/val.jsonl $(TASKS): $(RUN)/train.jsonl
$(RUN)/%.npy: $(RUN)/%.jsonl | olmoe
	./olmoe tokenize --tokenizer bytes --out $@ $<
endif

# ------------------------------------------------------------------------------------------------
# Tests

# Each test command ends with a table and a line: N passed, M failed. TALLY=FILE adds the counts to a file.
RUN_TESTS = $(PYTHON) tests/run.py $(if $(TALLY),--tally $(TALLY))

.PHONY: test test-peers test-page test-full-size test-ptx test-mutants
test: olmoe
	OLMOE=$(BUILD)/olmoe \
	$(RUN_TESTS) $(filter-out tests/test_peers.py tests/test_tokenizer_peers.py tests/test_evaluate_peers.py tests/test_routing_peers.py tests/test_tensorboard.py tests/test_rows_parquet.py tests/test_tasks_arrow.py tests/test_page.py tests/test_full_size.py tests/test_ptxrun.py tests/test_mutants.py,$(sort $(wildcard tests/test_*.py))) tests/machine

# Every layout of 2 and 4 ranks against one rank
.PHONY: test-parallel
test-parallel: olmoe
	OLMOE=$(BUILD)/olmoe OLMOE_LAYOUTS=all $(RUN_TESTS) tests/test_parallel.py tests/test_ranks.py

# Against transformers on PyTorch, TRL, lm-evaluation-harness and `tokenizers`, in a Python environment of their own,
# build/venv
build/venv/made: scripts/requirements.txt
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install -q --disable-pip-version-check -r scripts/requirements.txt
	@touch $@
.PHONY: venv bench
venv: build/venv/made

test-peers: build/venv/made
	$(MAKE) DEVICE=cpu PRECISION=BF16 olmoe
	$(MAKE) DEVICE=cpu PRECISION=FP32 olmoe
	OLMOE=build/cpu-fp32/olmoe OLMOE_BF16=build/cpu-bf16/olmoe build/venv/bin/python tests/run.py $(if $(TALLY),--tally $(TALLY)) tests/test_peers.py tests/test_tokenizer_peers.py tests/test_evaluate_peers.py tests/test_routing_peers.py tests/test_tensorboard.py tests/test_rows_parquet.py tests/test_tasks_arrow.py tests/test_finetune.py

# The page of `olmoe routing` in chromium, where that and its driver are installed
test-page: build/venv/made
	build/venv/bin/python tests/run.py $(if $(TALLY),--tally $(TALLY)) tests/test_page.py

# OLMoE-1B-7B at its full size with random weights: 14 GB of disk, 16 GB of memory
test-full-size: build/venv/made
	$(MAKE) DEVICE=cpu PRECISION=BF16 olmoe
	OLMOE=build/cpu-bf16/olmoe build/venv/bin/python tests/run.py -s $(if $(TALLY),--tally $(TALLY)) tests/test_full_size.py

# The nvcc-built programs on an emulator of PTX: PTXRUN=FOLDER
export OLMOE_DATA ?= $(wildcard ../shared/data)
export PTXRUN ?= $(wildcard ../shared/tools/ptxrun)
test-ptx: ptx
	$(RUN_TESTS) tests/test_ptxrun.py

# What a first day on a GPU begins with: scripts/test_gpu.py, which also builds, so that its report has that. With nvcc the
# programs are those of test-gpu-build, made anew where they are older than their sources; without it, as they are. What
# they were last built from is noted beside them, for the report.
.PHONY: test-gpu test-gpu-build test-gpu-fp32 test-gpu-bf16
MINUTES ?= 10
test-gpu:
	@$(PYTHON) scripts/test_gpu.py --minutes $(MINUTES)

test-gpu-build: test-gpu-fp32 test-gpu-bf16
	@note=build/test-gpu-built.txt; new=; \
	for f in $(foreach p,fp32 bf16,build/cuda-$(p)/olmoe build/cuda-$(p)/test_olmoe); do [ $$note -nt $$f ] || new=1; done; \
	[ -z "$$new" ] || { echo "commit $$(git describe --always --dirty --abbrev=12 2>/dev/null || echo not known)"; \
	  echo "SM $(or $(SM),native)"; $(NVCC) --version | sed -n /release/p; } > $$note
test-gpu-fp32 test-gpu-bf16: test-gpu-%: build/ranks.flags
	@$(MAKE) --no-print-directory DEVICE=cuda PRECISION=$(if $(filter bf16,$*),BF16,FP32) $(addprefix build/cuda-$*/,olmoe test_olmoe)

# Faults of one line, each of which a named test has to notice. MUTANTS_FOR_CI=SECONDS (since .ci/run started): those of
# the files that the change touches, and as many of the others as fit (tests/ci_mutants.py).
test-mutants:
	$(RUN_TESTS) tests/test_mutants.py $(if $(MUTANTS_FOR_CI),-p ci_mutants --ci-seconds $(MUTANTS_FOR_CI))

# Times of kernels, of matmuls alone, and of transformers, tokenizers, llama.cpp and lm-evaluation-harness; on an idle
# machine
bench: build/venv/made
	$(PYTHON) scripts/bench.py

endif   # setup or clean among other goals
