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
#include <map>
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

// Why a call failed. Some errors are those of a kernel that ran before, and may come with any call after it.
inline std::string cuda_reason(cudaError_t error) {
    const bool of_kernel = error >= cudaErrorIllegalAddress && error <= cudaErrorLaunchFailure;
    return cudaGetErrorString(error) + std::string(of_kernel ? "; --sync finds the kernel" : "");
}

// NCCL's last error has more than the name of its kind.
inline std::string nccl_reason(ncclResult_t result, ncclComm_t comm = nullptr) {
    const char* last = ncclGetLastError(comm);
    return ncclGetErrorString(result) + (last && *last ? std::string(" (") + last + ")" : "");
}

#define cudaCheck(call) do { cudaError_t e_ = (call); \
    if (e_ != cudaSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cuda_reason(e_).c_str()); } while (0)
#define ncclCheck(call) do { ncclResult_t r_ = (call); \
    if (r_ != ncclSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, nccl_reason(r_).c_str()); } while (0)
#define cublasCheck(call) do { cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) \
        die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(s_)); } while (0)

inline cudaDataType cuda_type(const float*) { return CUDA_R_32F; }
inline cudaDataType cuda_type(const __nv_bfloat16*) { return CUDA_R_16BF; }
inline ncclDataType_t nccl_type(const float*) { return ncclFloat; }
inline ncclDataType_t nccl_type(const __nv_bfloat16*) { return ncclBfloat16; }

constexpr __host__ __device__ int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }
inline int blocks_for(size_t threads) { return ceil_div(threads, BLOCK); }
inline int blocks_for_rows(size_t rows) { return blocks_for(rows * WARP); }     // a warp for each row

// ------------------------------------------------------------------------------------------------
// Streams

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
static cudaStream_t copy_stream;                // copies to the host that wait for a part of the main stream,
static cudaEvent_t copy_event;                  // which is what comes before this

std::vector<cudaStream_t> all_streams() {
    std::vector<cudaStream_t> streams = {main_stream.stream, comm_stream, copy_stream};
    for (const Stream& s : expert_streams) streams.push_back(s.stream);
    return streams;
}

const char* stream_name(cudaStream_t stream) {
    return stream == main_stream.stream ? "main stream" : stream == comm_stream ? "collectives"
         : stream == copy_stream ? "copies" : "expert stream";
}

// Bytes of the device that are in use
double device_used() {
    size_t free = 0, total = 0;
    cudaCheck(cudaMemGetInfo(&free, &total));
    return (double)(total - free);
}

// A part of the memory plan
struct MemoryPart { const char* name; double bytes; const char* remark; };

// What CUDA and its libraries take beside the plan, as measured when they start; on a CPU nothing
static std::vector<MemoryPart> device_overhead;

// What `start` takes of the device, but for the bytes that are planned
template <typename Body> void measure_overhead(const char* name, const char* remark, double planned, Body start) {
    const double before = device_used();
    start();
    if (!NCCL_BY_MPI) device_overhead.push_back({name, std::max(0.0, device_used() - before - planned), remark});
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

// ------------------------------------------------------------------------------------------------
// Memory

// Collects the tensors of a struct, then allocates them as one block, or each on its own where overruns are to be seen.
struct Memory {
    struct Item { void** pointer; size_t bytes; };
    std::vector<Item> items;
    std::vector<void*> blocks;

    // The bytes of all tensors that are allocated, by address; and those from p to the end of its tensor, 0: of none
    static inline std::map<const char*, size_t> allocated;
    static size_t bytes_from(const void* p) {
        auto after = allocated.upper_bound((const char*)p);
        if (after == allocated.begin()) return 0;
        const auto& [begin, size] = *--after;
        return begin + size > (const char*)p ? (size_t)(begin + size - (const char*)p) : 0;
    }

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
    // Each item `times` over, cleared or as it is. False where there is no room.
    bool allocate(size_t times = 1, bool clear = false) {
        char* block = nullptr;
        if (!SEPARATE_ALLOCATIONS) {
            if (cudaMalloc((void**)&block, bytes(times)) != cudaSuccess) return false;
            blocks.push_back(block);
        }
        for (Item& i : items) {
            if (!SEPARATE_ALLOCATIONS) { *i.pointer = block; block += aligned(times * i.bytes); }
            else if (cudaMalloc(i.pointer, times * i.bytes) != cudaSuccess) return false;
            else blocks.push_back(*i.pointer);
            allocated[(char*)*i.pointer] = times * i.bytes;
            if (clear) cudaCheck(cudaMemsetAsync(*i.pointer, 0, times * i.bytes, main_stream.stream));
        }
        return true;
    }
    void release() {
        for (void* b : blocks) cudaCheck(cudaFree(b));
        for (Item& i : items) allocated.erase((char*)*i.pointer);
        blocks.clear();
    }
};

// ------------------------------------------------------------------------------------------------
// Copies in the main stream's order. Plain cudaMemcpy and cudaMemset work in the default stream, for which the main
// stream, being non-blocking, does not wait.
//
// CUDA does not promise when an asynchronous copy of ordinary (pageable) memory returns: before it has read the memory,
// or only after all that is in the stream. So copies go through pinned memory, two slabs of it in turn.

constexpr size_t STAGING_BYTES = 4 << 20;
struct Staging {
    char* slabs[2];
    cudaEvent_t copied[2];                  // all copies of a slab are done
    int slab;                               // that is being filled, ...
    size_t used;                            // ... up to here
};
static Staging staging;

void staging_open() {
    for (int i : {0, 1}) {
        cudaCheck(cudaMallocHost((void**)&staging.slabs[i], STAGING_BYTES));
        cudaCheck(cudaEventCreateWithFlags(&staging.copied[i], cudaEventDisableTiming));
        cudaCheck(cudaEventRecord(staging.copied[i], main_stream.stream));
    }
}

void staging_close() {
    for (int i : {0, 1}) {
        cudaCheck(cudaFreeHost(staging.slabs[i]));
        cudaCheck(cudaEventDestroy(staging.copied[i]));
    }
}

// Pinned memory for the next copy, at most STAGING_BYTES. Waits until the copies that had it are done.
char* staging_room(size_t bytes) {
    if (staging.used + bytes > STAGING_BYTES) {
        cudaCheck(cudaEventRecord(staging.copied[staging.slab], main_stream.stream));
        staging.slab ^= 1;
        staging.used = 0;
        cudaCheck(cudaEventSynchronize(staging.copied[staging.slab]));
    }
    char* room = staging.slabs[staging.slab] + staging.used;
    staging.used += (bytes + 255) / 256 * 256;
    return room;
}

// `from` may change as soon as this returns.
template <typename T> void copy_to_device(T* to, const T* from, size_t n) {
    for (size_t at = 0, part; at < n * sizeof(T); at += part) {
        part = std::min(STAGING_BYTES, n * sizeof(T) - at);
        char* room = staging_room(part);
        memcpy(room, (const char*)from + at, part);
        cudaCheck(cudaMemcpyAsync((char*)to + at, room, part, cudaMemcpyHostToDevice, main_stream.stream));
    }
}

template <typename T> void copy_to_device(T* to, const std::vector<T>& from) {
    copy_to_device(to, from.data(), from.size());
}

// Waits for the stream.
template <typename T> void copy_to_host(T* to, const T* from, size_t n, cudaStream_t stream = main_stream.stream) {
    for (size_t at = 0, part; at < n * sizeof(T); at += part) {
        part = std::min(STAGING_BYTES, n * sizeof(T) - at);
        char* room = staging_room(part);
        cudaCheck(cudaMemcpyAsync(room, (const char*)from + at, part, cudaMemcpyDeviceToHost, stream));
        cudaCheck(cudaStreamSynchronize(stream));
        memcpy((char*)to + at, room, part);
    }
}

// For the large arrays of files, without staging: each waits until its copy is done.
template <typename T> void copy_to_device_sync(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, main_stream.stream));
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

template <typename T> void copy_to_host_sync(T* to, const T* from, size_t n) {
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
// The device, from its opening to its end

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
    cudaCheck(cudaFree(nullptr));           // makes the context
    if (!NCCL_BY_MPI) device_overhead = {{"CUDA", device_used(), " measured, with what other programs hold"}};
    measure_overhead("cuBLAS", " measured", (1.0 + EXPERT_STREAMS) * CUBLAS_WORKSPACE_BYTES, [] {
        stream_create(&main_stream);
        for (Stream& s : expert_streams) stream_create(&s);
    });
    cudaCheck(cudaStreamCreateWithFlags(&copy_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&copy_event, cudaEventDisableTiming));
    staging_open();
}

void device_close() {
    cudaCheck(cudaDeviceSynchronize());
    staging_close();
    stream_destroy(&main_stream);
    for (Stream& s : expert_streams) stream_destroy(&s);
    cudaCheck(cudaEventDestroy(copy_event));
    cudaCheck(cudaStreamDestroy(copy_stream));
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

// The sum of v of this lane and those before it
__device__ inline int warp_prefix(int v) {
    const int lane = threadIdx.x % WARP;
    for (int o = 1; o < WARP; o *= 2) {
        const int before = __shfl_sync(0xffffffff, v, (lane - o) & (WARP - 1));
        if (lane >= o) v += before;
    }
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

// ------------------------------------------------------------------------------------------------
// How AdamW's state is kept. In a BF16 build the weights have masters in fp32, of which they are the rounding:
//     --master-weights fp32        float, a copy
//                      remainder   Remainder, the lower half of the master's bits; the weight is the rounded upper half
//                      none        NoMaster: the weight itself is updated, and rounded at random (stochastic rounding)
//     --moments        fp32, bf16  float or __nv_bfloat16, rounded at random
// Weights are masters rounded with halves away from zero: bits + 0x8000, of which the upper half is taken. So the
// remainder's first bit shows whether it was rounded up, and weight and remainder together are the master's 32 bits,
// where rounding halves to even would need one more. Rounding at random adds 16 random bits instead: up as often as the
// lower half is large, so that the mean is right. Rounding to nearest would drop each update below half of the last
// bit, and let v forget nothing with --beta2 0.999.

struct Remainder { unsigned short bits; };
struct NoMaster {};
enum class Masters { none, fp32, remainder };       // none in an FP32 build: the weights are fp32
constexpr unsigned HALF_AWAY = 0x8000;

__host__ __device__ inline unsigned float_bits(float x) { unsigned u; memcpy(&u, &x, 4); return u; }

__host__ __device__ inline void store(float* to, float x, unsigned) { *to = x; }
__host__ __device__ inline void store(__nv_bfloat16* to, float x, unsigned addend) {
    unsigned bits = float_bits(x);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    *to = __ushort_as_bfloat16((unsigned short)(nan ? 0x7fff : (bits + addend) >> 16));     // a NaN stays one
}
__host__ __device__ inline void store(NoMaster*, float, unsigned) {}
__host__ __device__ inline void store(Remainder* to, float x, unsigned) { to->bits = (unsigned short)float_bits(x); }

// The master of weight p
__host__ __device__ inline float master_of(const float* master, const floatX*) { return *master; }
__host__ __device__ inline float master_of(const NoMaster*, const floatX* p) { return (float)*p; }
__host__ __device__ inline float master_of(const Remainder* remainder, const floatX* p) {
    unsigned bits = ((float_bits((float)*p) >> 16) - (remainder->bits >> 15)) << 16 | remainder->bits;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
