# make                       the program for this machine: ./olmoe
# make setup                 install what is missing
# make DEVICE=cpu|cuda PRECISION=FP32|BF16 [STRICT=1] [SANITIZE=address|undefined|thread] olmoe test_olmoe
# make cuda                  compile for all GPUs, warnings and register spills are errors
# make clean

.DEFAULT_GOAL := olmoe
.DELETE_ON_ERROR:
.SUFFIXES:

# ------------------------------------------------------------------------------------------------
# Machine: CUDA where there are a driver with a device and nvcc, else the CPU.

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
PRECISION ?= $(if $(filter cuda,$(DEVICE)),BF16,FP32)
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
  DEFINES += -DCUBLAS_WORKSPACE_BYTES=0
endif

ifneq ($(if $(MAKECMDGOALS),$(filter olmoe test_olmoe train test bench,$(MAKECMDGOALS)),olmoe),)
  $(info Building for $(if $(filter cuda,$(DEVICE)),CUDA,the CPU) in $(PRECISION)$(if $(filter 1,$(STRICT)), (strict$(if $(SANITIZE),$(comma) $(SANITIZE) sanitizer))): $(WHY).)
endif

.PHONY: olmoe test_olmoe setup cuda ptx clean

# The program that was asked for last lies at the top.
olmoe test_olmoe: %: $(BUILD)/%
	@ln -sf $< $@

setup:
	@scripts/setup.sh

clean:
	rm -rf build olmoe test_olmoe

# ------------------------------------------------------------------------------------------------
# CPU: preprocess, rewrite the launches, compile. The .d file of the preprocessor names the headers.

ifeq ($(DEVICE),cpu)
CXX := g++
CXXFLAGS := -std=c++17 -g -fopenmp -fno-math-errno -Wall -Wextra
ifeq ($(STRICT),1)
  DEFINES += -DCUDA_STRICT -DWARP=32 -DSEPARATE_ALLOCATIONS=1
  CXXFLAGS += -O2
  MACHINE := strict
else
  # Not -ffast-math: it may delete isnan, and turn !(error <= tolerance) into error > tolerance.
  # Packs of 16 bytes (4 or 8 iterations) must stay loops for the thread loop around them to vectorise.
  DEFINES += -DWARP=1
  CXXFLAGS += -O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math --param max-completely-peel-times=4
  MACHINE := fast
endif
MACHINE_FLAGS := $(CXXFLAGS)
ifneq ($(SANITIZE),)
  SANITIZE_FLAGS := -fsanitize=$(SANITIZE) -fno-omit-frame-pointer $(if $(filter undefined,$(SANITIZE)),-fno-sanitize-recover=all)
  CXXFLAGS += $(SANITIZE_FLAGS)
  # TSan must not see the scheduler of the fibers, only what they do.
  MACHINE_FLAGS += $(if $(filter thread,$(SANITIZE)),-DCUDA_TSAN,$(SANITIZE_FLAGS))
endif
LDLIBS := -ldnnl -lz -lmvec -lm
MACHINE_OBJECTS := $(addprefix $(BUILD)/cpu/,$(MACHINE).o gemm.o device.o)

$(BUILD)/%.o: %.cu cpu/rewrite Makefile
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(DEFINES) -Icpu -I. -MMD -MP -MT $@ -MF $(@:.o=.d) -E -x c++ $< -o $(@:.o=.i)
	cpu/rewrite < $(@:.o=.i) > $(@:.o=.ii)
	$(CXX) $(CXXFLAGS) -fpreprocessed -x c++ -c $(@:.o=.ii) -o $@

$(BUILD)/cpu/%.o: cpu/%.cpp Makefile
	@mkdir -p $(@D)
	$(CXX) $(MACHINE_FLAGS) $(DEFINES) -Icpu -MMD -MP -c $< -o $@

$(BUILD)/%: $(BUILD)/%.o $(MACHINE_OBJECTS)
	$(CXX) $(CXXFLAGS) $^ $(LDLIBS) -o $@

.SECONDARY:
-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d)
endif

# ------------------------------------------------------------------------------------------------
# CUDA

NVCCFLAGS := -O3 -std=c++17 -lineinfo -Xcompiler -Wall,-Wextra
GENCODE := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_100,code=sm_100

ifeq ($(DEVICE),cuda)
$(BUILD)/%: %.cu Makefile
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -arch=native $(DEFINES) -MMD -MP -MF $@.d $< -o $@ -lcublas -lz
-include $(wildcard $(BUILD)/*.d)
endif

# ------------------------------------------------------------------------------------------------
