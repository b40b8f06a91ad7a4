// What every CUDA program needs: errors that end it with one line, text, checked calls, streams, memory, copies, and
// inside kernels warps and random numbers.
//
// Included once, by olmoe.cu, after floatX and WARP. The ranks are included here because an error of one rank ends all.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <unistd.h>
#include <cuda_runtime.h>
#include <cublas_v2.h>
#include <nccl.h>

// One line on standard error and exit code 1.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

#include "ranks.h"          // who the other ranks are, and whether they live
static Ranks ranks;

constexpr int BLOCK = 256;                  // threads of a block
constexpr int EXPERT_STREAMS = 8;           // streams over which the experts' matmuls are spread

// ------------------------------------------------------------------------------------------------
// Errors and text

void die(const char* format, ...) {
    fflush(stdout);
    if (ranks.rank > 0) {                   // rank 0 reports what all ranks see, and its end ends the others; ...
        sleep(ranks_state->watching ? 1 : 3);       // (mpirun takes its time to end them)
        if (!ranks_first_of_machine()) ranks_end(); // ... one rank of a machine reports what only that machine sees
    }
    char line[4096], *end = line + sizeof line - 2, *at = line + sprintf(line, "olmoe: ");
    if (ranks.rank > 0) at += sprintf(at, "rank %d: ", ranks.rank);
    va_list args;
    va_start(args, format);
    at += std::min<int>(vsnprintf(at, end - at, format, args), (int)(end - at) - 1);
    va_end(args);
    std::replace_if(line, at, [](char c) { return (unsigned char)c < 32; }, '?');   // a file's name may hold a newline
    strcpy(at, "\n");
    fputs(line, stderr);                    // in one piece: other ranks write also
    ranks_end();                            // returns where there are no others
    exit(1);
}

// printf into a string of at most 4,095 bytes
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
    char buffer[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

// 1234567 as "1.235 M", with a unit behind the prefix
std::string human(double x, const char* unit = "") {
    const char* prefix[] = {"", "k", "M", "G", "T", "P"};
    int i = 0;
    while (std::fabs(x) >= 1000 && i < 5) { x /= 1000; i++; }
    return text(i || *unit ? "%.4g %s%s" : "%.4g%s%s", x, prefix[i], unit);
}

std::string human_time(double seconds) {
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60) return text("%ds", (int)s);
    if (s < 3600) return text("%dm%02ds", (int)(s / 60), (int)(s % 60));
    return text("%ldh%02dm", s / 3600, (int)(s % 3600 / 60));
}

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ------------------------------------------------------------------------------------------------
// Checked calls

#define cudaCheck(call) do { cudaError_t e_ = (call); \
    if (e_ != cudaSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); } while (0)
#define ncclCheck(call) do { ncclResult_t r_ = (call); \
    if (r_ != ncclSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(r_)); } while (0)
#define cublasCheck(call) do { cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) \
        die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(s_)); } while (0)

inline cudaDataType cuda_type(const float*) { return CUDA_R_32F; }
inline cudaDataType cuda_type(const __nv_bfloat16*) { return CUDA_R_16BF; }
inline ncclDataType_t nccl_type(const float*) { return ncclFloat; }
inline ncclDataType_t nccl_type(const __nv_bfloat16*) { return ncclBfloat16; }

inline int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }
inline int blocks_for(size_t threads) { return ceil_div(threads, BLOCK); }
inline int blocks_for_rows(size_t rows) { return blocks_for(rows * WARP); }     // a warp for each row

// ------------------------------------------------------------------------------------------------
// The device and its streams

// A stream, and the cuBLAS handle that works on it with a workspace of its own: only so does cuBLAS promise equal bits.
struct Stream {
    cudaStream_t stream;
    cublasHandle_t cublas;
    cudaEvent_t event;
    void* workspace;
};

static int main_device = 0;                     // this rank's GPU
static Stream main_stream;                      // everything, in order, except
static Stream expert_streams[EXPERT_STREAMS];   // the matmuls of the experts
static cudaStream_t comm_stream;                // the collectives

std::vector<cudaStream_t> all_streams() {
    std::vector<cudaStream_t> streams = {main_stream.stream, comm_stream};
    for (const Stream& s : expert_streams) streams.push_back(s.stream);
    return streams;
}

void stream_create(Stream* s) {
    cudaCheck(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&s->event, cudaEventDisableTiming));
    cublasCheck(cublasCreate(&s->cublas));
    cublasCheck(cublasSetStream(s->cublas, s->stream));
    s->workspace = nullptr;
    if (CUBLAS_WORKSPACE_BYTES > 0) {
        cudaCheck(cudaMalloc(&s->workspace, CUBLAS_WORKSPACE_BYTES));
        cublasCheck(cublasSetWorkspace(s->cublas, s->workspace, CUBLAS_WORKSPACE_BYTES));
    }
    // fp32 stays fp32 (no TF32), bf16 sums in fp32
    int mode = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    cublasCheck(cublasSetMathMode(s->cublas, (cublasMath_t)mode));
}

void stream_destroy(Stream* s) {
    cublasCheck(cublasDestroy(s->cublas));
    if (s->workspace) cudaCheck(cudaFree(s->workspace));
    cudaCheck(cudaEventDestroy(s->event));
    cudaCheck(cudaStreamDestroy(s->stream));
}

void device_open() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
        die("no CUDA device found; build for the CPU with: make DEVICE=cpu");
    bool bound = devices == 1 && getenv("CUDA_VISIBLE_DEVICES");        // the launcher shows each rank its own GPU
    if (!NCCL_BY_MPI && !bound) {                                       // ranks on a CPU share it
        if (ranks.local_size > devices)
            die("%d ranks on this machine, which has %d GPU%s; start one for each", ranks.local_size, devices,
                devices > 1 ? "s" : "");
        main_device = ranks.local_rank;
    }
    cudaCheck(cudaSetDevice(main_device));
    stream_create(&main_stream);
    for (Stream& s : expert_streams) stream_create(&s);
}

void device_close() {
    cudaCheck(cudaDeviceSynchronize());
    stream_destroy(&main_stream);
    for (Stream& s : expert_streams) stream_destroy(&s);
}

std::string machine_name() {
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, main_device));
    return p.name;
}

// Rank 0 makes an id for NCCL, the others get it.
ncclUniqueId nccl_shared_id(int rank) {
    ncclUniqueId id = {};
    if (rank == 0) ncclCheck(ncclGetUniqueId(&id));
    ranks_broadcast(&id, sizeof id);
    return id;
}

// ------------------------------------------------------------------------------------------------
// Memory

// Collects the tensors of a struct, then allocates them as one block, or each on its own where overruns are to be seen.
struct Memory {
    struct Item { void** pointer; size_t bytes; };
    std::vector<Item> items;
    std::vector<void*> blocks;

    // `count` elements for each of the pointers
    template <typename... T> void add(size_t count, T**... pointers) {
        (items.push_back({(void**)pointers, std::max<size_t>(count, 1) * sizeof(T)}), ...);
    }
    static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
    size_t bytes(size_t times = 1) const {
        size_t sum = 0;
        for (const Item& i : items) sum += aligned(times * i.bytes);
        return sum;
    }
    // Each item `times` over. False where there is no room.
    bool allocate(size_t times = 1) {
        char* block = nullptr;
        if (!SEPARATE_ALLOCATIONS) {
            if (cudaMalloc((void**)&block, bytes(times)) != cudaSuccess) return false;
            blocks.push_back(block);
        }
        for (Item& i : items) {
            if (!SEPARATE_ALLOCATIONS) { *i.pointer = block; block += aligned(times * i.bytes); continue; }
            if (cudaMalloc(i.pointer, times * i.bytes) != cudaSuccess) return false;
            blocks.push_back(*i.pointer);
        }
        return true;
    }
    void release() { for (void* b : blocks) cudaCheck(cudaFree(b)); blocks.clear(); }
};

// ------------------------------------------------------------------------------------------------
// Copies in the main stream's order. Plain cudaMemcpy and cudaMemset work in the default stream, for which the main
// stream, being non-blocking, does not wait. `from` may change as soon as copy_to_device returns.

template <typename T> void copy_to_device(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, main_stream.stream));
}

template <typename T> void copy_to_device(T* to, const std::vector<T>& from) {
    copy_to_device(to, from.data(), from.size());
}

template <typename T> void copy_to_host(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToHost, main_stream.stream));
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

template <typename T> void copy_on_device(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToDevice, main_stream.stream));
}

template <typename T> void clear_on_device(T* to, size_t n) {
    cudaCheck(cudaMemsetAsync(to, 0, n * sizeof(T), main_stream.stream));
}

// n elements of the device as floats on the host
template <typename T> std::vector<float> device_floats(const T* device, size_t n) {
    std::vector<T> host(n);
    copy_to_host(host.data(), device, n);
    return std::vector<float>(host.begin(), host.end());
}

// ------------------------------------------------------------------------------------------------
// Inside kernels: a row belongs to a warp, whose lanes meet in these only

__device__ inline size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline float warp_sum(float v) {
    for (int o = WARP / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
    return v;
}

__device__ inline float warp_max(float v) {
    for (int o = WARP / 2; o > 0; o /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, o));
    return v;
}

// The largest v of the warp and its index; of equal ones, the lowest index.
__device__ inline void warp_argmax(float& v, int& index) {
    for (int o = WARP / 2; o > 0; o /= 2) {
        float other = __shfl_xor_sync(0xffffffff, v, o);
        int other_index = __shfl_xor_sync(0xffffffff, index, o);
        if (other > v || (other == v && other_index < index)) { v = other; index = other_index; }
    }
}

// ------------------------------------------------------------------------------------------------
// Random numbers: Philox-4x32-10 (Salmon et al. 2011) of the seed, the parameter's position in the model and, where
// AdamW asks, the update's number, so that they depend on nothing else.

struct Philox { unsigned x[4]; };
__host__ __device__ inline Philox philox(uint64_t seed, uint64_t position, unsigned step = 0) {
    unsigned c0 = (unsigned)position, c1 = (unsigned)(position >> 32), c2 = step, c3 = 0;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        unsigned n0 = (unsigned)(b >> 32) ^ c1 ^ k0, n2 = (unsigned)(a >> 32) ^ c3 ^ k1;
        c1 = (unsigned)b; c3 = (unsigned)a; c0 = n0; c2 = n2;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}
__host__ __device__ inline float uniform(unsigned x) { return ((float)(x >> 8) + 0.5f) * 0x1p-24f; }      // in (0, 1]
