// Between start and stop the fast machine counts and times kernels and GEMMs (see fast.cpp). Without CUDA_PROFILE=FILE.json
// in the environment, and in the strict machine, both do nothing.
#pragma once
#include "cuda_runtime.h"

cudaError_t cudaProfilerStart();
cudaError_t cudaProfilerStop();
