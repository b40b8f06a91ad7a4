// CUDA's names for the fast machine's profiler (fast.cpp): between start and stop it counts and times kernels,
// ranges of NVTX and matrix products, and stop prints the profile on standard error, one line of JSON. In the strict
// machine both do nothing.
#pragma once
#include "cuda_runtime.h"

cudaError_t cudaProfilerStart();
cudaError_t cudaProfilerStop();
