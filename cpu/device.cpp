// What both machines report about the device: the processor and its memory.
#include "cuda_runtime.h"
#include "processor.h"
#include <omp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

// The value of a line "key: value" in a file of /proc, or what it was before.
static void read_line(const char* path, const char* key, char* value, size_t size) {
    FILE* f = fopen(path, "r");
    if (!f) return;
    char line[512];
    while (fgets(line, sizeof line, f)) {
        char* colon = strchr(line, ':');
        if (strncmp(line, key, strlen(key)) != 0 || !colon) continue;
        colon[strcspn(colon, "\n")] = 0;
        snprintf(value, size, "%s", colon + 1 + strspn(colon + 1, " \t"));
        break;
    }
    fclose(f);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    char available[64] = "";
    read_line("/proc/meminfo", "MemAvailable", available, sizeof available);
    long long kilobytes = 0;
    *total = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    *free = sscanf(available, "%lld", &kilobytes) == 1 ? (size_t)kilobytes * 1024 : *total;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (device != 0) return cudaErrorInvalidDevice;
    size_t free;
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "CPU");
    read_line("/proc/cpuinfo", "model name", properties->name, sizeof properties->name);
    properties->multiProcessorCount = omp_get_max_threads();
    return cudaMemGetInfo(&free, &properties->totalGlobalMem);
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration of a launch: grid and block need 1 or more of each and at most 1024 threads "
                   "a block";
        case cudaErrorInvalidDevice: return "invalid device";
        case cudaErrorInvalidResourceHandle:
            return "invalid handle: an event without timing, or one that was never recorded";
        case cudaErrorIllegalAddress: return "an illegal memory access";
        case cudaErrorLaunchFailure: return "a kernel failed";
        case cudaErrorNotReady: return "not ready: what comes before the event has not run";
    }
    return "unknown error";
}

// A macro of g++ is 1 where the build uses its feature; else the name is no macro, and remains a name.
#define TEXT_OF(x) #x
#define F(name, macro) TEXT_OF(macro)[0] == '1',
static constexpr bool used[] = {PROCESSOR_FEATURES(F) false};
#undef F
static constexpr unsigned long long set_of_used() {
    unsigned long long set = 0;
    for (unsigned long i = 0; i < sizeof used; i++) set |= (unsigned long long)used[i] << i;
    return set;
}
static_assert(sizeof used <= 64, "a set has 64 bits");
constexpr unsigned long long processor_needs = set_of_used();
