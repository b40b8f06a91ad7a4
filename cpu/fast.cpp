// The fast machine's runtime: device memory is ordinary memory, a copy is done when it returns, streams and events have
// nothing to order. Only matrix products wait: those that a program puts on several streams may run at the same time on
// a GPU, so they are collected until anything else happens and then share the cores, one product a core.
#include "collective.h"
#include "cuda_profiler_api.h"
#include "gemm.h"
#include "nvtx3/nvToolsExt.h"
#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

// By default OpenMP's threads spin for milliseconds at the end of each kernel. Where another program also wants the
// cores, a spinning thread keeps the one that it waits for from running, and a step takes up to ten times as long.
// Spinning for microseconds is as fast on an idle machine. libgomp reads its environment before any code of the program
// runs, so the program starts itself again.
__attribute__((constructor)) static void sleep_soon(int, char** argv, char**) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv(path, argv);                      // returns only if it fails: then all is as it was
}

// fork takes the calling thread alone along, and libgomp in the child would wait for the others: the child works alone.
__attribute__((constructor)) static void alone_after_fork() {
    pthread_atfork(nullptr, nullptr, [] { omp_set_num_threads(1); });
}

struct CUstream_st { std::vector<Gemm> products; };
struct CUevent_st { bool timing, recorded; double ms; };
static CUstream_st null_stream;
static cudaError_t last_error = cudaSuccess;
static cudaError_t fail(cudaError_t error) { return last_error = error; }

static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ------------------------------------------------------------------------------------------------
// Matrix products

typedef std::vector<std::vector<Gemm>> Group;      // products that may run at the same time, by stream
static std::vector<CUstream_st*> waiting;          // streams with products, in the order of their first one

static bool depends(const Gemm& later, const Gemm& earlier) {
    size_t C = extent_C(earlier), C2 = extent_C(later);
    return overlap(later.A, extent_A(later), earlier.C, C) || overlap(later.B, extent_B(later), earlier.C, C)
        || overlap(later.C, C2, earlier.C, C) || overlap(later.C, C2, earlier.A, extent_A(earlier))
        || overlap(later.C, C2, earlier.B, extent_B(earlier));
}

// A product's bits depend on the number of threads that it runs with, so every decision here depends on shapes alone.
static void run_group(const Group& group) {
    int threads = omp_get_max_threads();
    if (group.size() == 1 || threads == 1) {
        for (auto& stream : group) for (auto& g : stream) run_gemm(g);
        return;
    }
    // The products of a stream are one chain, or one chain each where none touches another one's output.
    std::vector<std::pair<double, std::vector<const Gemm*>>> chains;
    double total = 0;
    for (auto& stream : group) {
        bool independent = true;
        for (size_t i = 1; i < stream.size() && independent; i++)
            for (size_t j = 0; j < i && independent; j++) independent = !depends(stream[i], stream[j]);
        for (size_t i = 0; i < stream.size(); i++) {
            if (i == 0 || independent) chains.push_back({0, {}});
            chains.back().first += flops(stream[i]);
            chains.back().second.push_back(&stream[i]);
            total += flops(stream[i]);
        }
    }
    std::stable_sort(chains.begin(), chains.end(), [](auto& a, auto& b) { return a.first > b.first; });
    // The chains that are longer than a fair share of the work come first: all threads run each of their products.
    size_t first = 0;
    while (first < chains.size() && chains[first].first > total / threads * 1.5) {
        for (const Gemm* g : chains[first].second) run_gemm(*g);
        total -= chains[first++].first;
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = first; i < chains.size(); i++)
        for (const Gemm* g : chains[i].second) run_gemm(*g);
}

// ------------------------------------------------------------------------------------------------
// Profile: calls and time of each kernel and of each range of NVTX, and the list of matrix products, which run again at
// the end by themselves.

struct Count { long calls; double ms; };
static struct Profile {
    bool on;
    double start, gemm_ms, memory_ms;
    std::map<std::string, Count> kernels, ranges;      // ranges by path
    std::vector<Group> groups;
    std::vector<double> group_ms;
} profile;

static void flush() {
    if (waiting.empty()) return;
    Group group;
    for (CUstream_st* stream : waiting) {
        group.push_back(std::move(stream->products));
        stream->products.clear();
    }
    waiting.clear();
    double start = profile.on ? now_ms() : 0;
    run_group(group);
    if (profile.on) {
        double ms = now_ms() - start;
        profile.gemm_ms += ms;
        profile.group_ms.push_back(ms);
        profile.groups.push_back(std::move(group));
    }
}

void enqueue_gemm(const Gemm& g, cudaStream_t stream) {
    if (!stream) stream = &null_stream;
    if (g.batch > 1) flush();
    if (stream->products.empty()) waiting.push_back(stream);
    stream->products.push_back(g);
    if (g.batch > 1) flush();
}

cudaError_t cudaProfilerStart() {
    flush();
    profile = Profile();
    profile.on = true;
    profile.start = now_ms();
    return cudaSuccess;
}

// Those that begin and end while the profile is on count.
struct OpenRange { std::string path; double start; };
static std::vector<OpenRange> open_ranges;

int nvtxRangePushA(const char* name) {
    const std::string path = open_ranges.empty() ? name : open_ranges.back().path + "/" + name;
    open_ranges.push_back({path, profile.on ? now_ms() : -1});
    return (int)open_ranges.size() - 1;
}

int nvtxRangePop() {
    if (open_ranges.empty()) return -1;
    const auto [path, start] = open_ranges.back();
    open_ranges.pop_back();
    if (profile.on && start >= profile.start) {
        Count& count = profile.ranges[path];
        count.calls++;
        count.ms += now_ms() - start;
    }
    return (int)open_ranges.size();
}

// All calls of products with one shape
struct GemmSum { Gemm shape; long calls; double ms, gflop; };

// The time of a group of several streams is divided over its products by their share of the work.
static std::map<std::string, GemmSum> sum_gemms() {
    std::map<std::string, GemmSum> sums;
    for (size_t i = 0; i < profile.groups.size(); i++) {
        double total = 0;
        for (auto& stream : profile.groups[i]) for (auto& g : stream) total += flops(g);
        for (auto& stream : profile.groups[i])
            for (auto& g : stream) {
                char key[160];
                snprintf(key, sizeof key, "%d %d %d %d %d %d %g %d %d",
                         g.m, g.n, g.k, g.batch, g.transa, g.transb, g.beta, g.typeAB, g.typeC);
                GemmSum& sum = sums.emplace(key, GemmSum{g, 0, 0, 0}).first->second;
                sum.calls++;
                sum.ms += total > 0 ? profile.group_ms[i] * flops(g) / total : 0;
                sum.gflop += flops(g) / 1e9;
            }
    }
    return sums;
}

// One line of JSON on standard error
static void write_profile(double wall_ms, double alone_ms) {
    std::string json, comma;
    auto add = [&](const char* format, auto... values) {
        char piece[256];
        snprintf(piece, sizeof piece, format, values...);
        json += piece;
    };
    add("{\"threads\": %d, \"wall_ms\": %.6g, ", omp_get_max_threads(), wall_ms);
    add("\"gemm_ms_in_step\": %.6g, \"gemm_ms_alone\": %.6g, ", profile.gemm_ms, alone_ms);
    add("\"memcpy_memset_ms\": %.6g", profile.memory_ms);
    for (auto [title, counts] : {std::pair{"kernels", &profile.kernels}, {"ranges", &profile.ranges}}) {
        add(", \"%s\": {", title);
        for (auto& [name, count] : *counts) {
            json += comma + "\"" + name;
            add("\": {\"calls\": %ld, \"ms\": %.6g}", count.calls, count.ms);
            comma = ", ";
        }
        json += "}";
        comma = "";
    }
    json += ", \"gemms\": [";
    for (auto& [key, sum] : sum_gemms()) {
        const Gemm& g = sum.shape;
        auto boolean = [](bool value) { return value ? "true" : "false"; };
        auto type = [](cudaDataType t) { return t == CUDA_R_32F ? "f32" : "bf16"; };
        json += comma;
        add("{\"m\": %d, \"n\": %d, \"k\": %d, \"batch\": %d, ", g.m, g.n, g.k, g.batch);
        add("\"transa\": %s, \"transb\": %s, \"beta\": %g, ", boolean(g.transa), boolean(g.transb), g.beta);
        add("\"type\": \"%s\", \"type_c\": \"%s\", ", type(g.typeAB), type(g.typeC));
        add("\"calls\": %ld, \"ms\": %.6g, \"gflop\": %.6g}", sum.calls, sum.ms, sum.gflop);
        comma = ", ";
    }
    fprintf(stderr, "%s]}\n", json.c_str());
}

// The products run again on the same buffers, whose contents have no meaning afterwards.
cudaError_t cudaProfilerStop() {
    if (!profile.on) return cudaSuccess;
    flush();
    double wall_ms = now_ms() - profile.start;
    profile.on = false;
    double alone_ms = 0;
    for (int repeat = 0; repeat < 3; repeat++) {
        double start = now_ms();
        for (auto& group : profile.groups) run_group(group);
        double ms = now_ms() - start;
        if (repeat == 0 || ms < alone_ms) alone_ms = ms;
    }
    write_profile(wall_ms, alone_ms);
    profile = Profile();
    return cudaSuccess;
}

namespace cuda_on_cpu {
double begin_launch() {
    flush();
    return now_ms() * 1e6;
}
double end_launch(const char* name, double start) {
    double ns = now_ms() * 1e6 - start;
    if (profile.on) {
        Count& count = profile.kernels[name];
        count.calls++;
        count.ms += ns / 1e6;
    }
    return ns;
}
void bad_launch() { fail(cudaErrorInvalidConfiguration); }
}

void enqueue_collectives(const std::vector<NcclCall>& group) {
    double start = cuda_on_cpu::begin_launch();
    run_collectives(group);
    cuda_on_cpu::end_launch("NCCL", start);
}
void finish_collectives() {}

// ------------------------------------------------------------------------------------------------
// Memory

// A large allocation is a mapping of its own, in huge pages where the system has them: matrix products then have fewer
// misses in the TLB.
constexpr size_t HUGE_PAGE = 2 << 20;
static std::map<void*, size_t> mappings;
static std::mutex memory_mutex;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes < HUGE_PAGE) {
        *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
        return *pointer ? cudaSuccess : fail(cudaErrorMemoryAllocation);
    }
    size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char* p = (char*)mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    size_t skip = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
    if (skip > 0) munmap(p, skip);
    munmap(p + skip + size, HUGE_PAGE - skip);
    p += skip;
    madvise(p, size, MADV_HUGEPAGE);
    std::lock_guard<std::mutex> lock(memory_mutex);
    mappings[p] = size;
    *pointer = p;
    return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
    flush();
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto found = mappings.find(pointer);
    if (found == mappings.end()) {
        free(pointer);
    } else {
        munmap(pointer, found->second);
        mappings.erase(found);
    }
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

// One core reaches only part of the memory's bandwidth, so several cores share a long range.
template <class Function> static void over_range(size_t bytes, Function function) {
    flush();
    double start = profile.on ? now_ms() : 0;
    constexpr size_t PIECE = 1 << 18;
    if (bytes < 4 * PIECE) {
        function(0, bytes);
    } else {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < bytes; i += PIECE) function(i, std::min(PIECE, bytes - i));
    }
    if (profile.on) profile.memory_ms += now_ms() - start;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    over_range(bytes, [=](size_t i, size_t n) { memcpy((char*)to + i, (const char*)from + i, n); });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int byte, size_t bytes) {
    over_range(bytes, [=](size_t i, size_t n) { memset((char*)to + i, byte, n); });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) { return cudaMemset(to, byte, bytes); }

// ------------------------------------------------------------------------------------------------
// Streams, events, device

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { *stream = new CUstream_st; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { flush(); delete stream; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { flush(); return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { flush(); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { flush(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = new CUevent_st{flags != cudaEventDisableTiming, false, 0};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    flush();
    event->recorded = true;
    event->ms = now_ms();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { flush(); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    for (cudaEvent_t e : {start, end}) if (!e->timing || !e->recorded) return fail(cudaErrorInvalidResourceHandle);
    *ms = (float)(end->ms - start->ms);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
