/*
OLMoE in one file of CUDA: the model of "OLMoE: Open Mixture-of-Experts Language Models" (Muennighoff et al. 2024,
arXiv 2409.02060), trained by hand-written forward and backward passes.

Read it from the top: utilities, then each layer's forward beside its backward, then the model as structs of named
pointers, then olmoe_forward and olmoe_backward as flat lists of calls, then AdamW, then the commands. A token's way
through the model is told in docs/tour.md.

Letters, used everywhere:
    B  sequences of a micro-batch       C  channels (hidden size)     E  experts of a layer
    T  tokens of a sequence             H  attention heads            K  experts that each token visits
    N  B*T, tokens of a micro-batch     D  C/H, size of a head        F  width of an expert
    L  layers                           V  vocabulary (padded)        R  N*K, rows routed to experts
Matrices are row-major; a linear layer's weight is (out, in) and computes y = x W^T, as in PyTorch. Only gemm, which knows no
tokens, has letters of its own: M, N, K for rows, columns and the length of the sums.

Kernels have two shapes. Elementwise: a thread for each element. Row: a warp for each row, whose lanes stride over the
columns and meet only in warp_sum, warp_max and warp_argmax. There is no shared memory and there are no atomics, so that the
same inputs give the same bits, and so that the same text runs fast on a CPU, where a warp has one lane (cpu/).
*/
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <fstream>
#include <iostream>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include <fcntl.h>
#include <unistd.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_profiler_api.h>
#include <cublas_v2.h>
#include <nccl.h>

// ------------------------------------------------------------------------------------------------
// Build-time choices

#ifdef PRECISION_BF16
typedef __nv_bfloat16 floatX;               // parameters, gradients, activations; all arithmetic is fp32
constexpr bool BF16 = true;
#else
typedef float floatX;
constexpr bool BF16 = false;
#endif

#ifndef WARP
#define WARP 32                             // lanes of a warp: 32 on a GPU, 1 in the fast CPU build
#endif
#ifndef SEPARATE_ALLOCATIONS
#define SEPARATE_ALLOCATIONS 0              // 1: every tensor in an allocation of its own, so that an overrun is seen
#endif
#ifndef ATTENTION_BLOCK
#define ATTENTION_BLOCK 256                 // queries whose scores exist at the same time
#endif
#ifndef CUBLAS_WORKSPACE_BYTES
#define CUBLAS_WORKSPACE_BYTES (32 << 20)   // what cuBLAS recommends for Hopper; one for each stream
#endif

#ifndef NCCL_BY_MPI
#define NCCL_BY_MPI 0                       // 1: collectives go through MPI (cpu/), so it has to start the ranks
#endif

constexpr int BLOCK = 256;                  // threads of a block
constexpr int PER_LANE = WARP == 1 ? 64 : 16;   // columns that a lane keeps in registers while it adds up rows
constexpr int CHUNK = WARP * PER_LANE;      // columns that a warp keeps so
constexpr int SLABS = 256;                  // at most so many partial sums when rows are added up
constexpr int EXPERT_STREAMS = 8;           // streams over which the experts' matmuls are spread

// ------------------------------------------------------------------------------------------------
// Errors and CUDA utilities

// One line on standard error and exit code 1.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

#include "lib/ranks.h"          // who the other ranks are, and whether they live
static Ranks ranks;

void die(const char* format, ...) {
    fflush(stdout);
    if (ranks.rank > 0) {                   // an error that all ranks see is told by rank 0, whose end ends the others; one of a machine by one of its ranks
        sleep(ranks_state->watching ? 1 : 3);      // mpirun takes its time to end the others
        if (!ranks_first_of_machine()) ranks_end();
    }
    char line[4096], *end = line + sizeof line - 2, *at = line + sprintf(line, "olmoe: ");
    if (ranks.rank > 0) at += sprintf(at, "rank %d: ", ranks.rank);
    va_list args;
    va_start(args, format);
    at += std::min<int>(vsnprintf(at, end - at, format, args), (int)(end - at) - 1);
    va_end(args);
    std::replace_if(line, at, [](char c) { return (unsigned char)c < 32; }, '?');      // a file's name may hold a newline
    strcpy(at, "\n");
    fputs(line, stderr);                    // in one piece: other ranks write, too
    ranks_end();                            // returns where there are no others
    exit(1);
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
    char buffer[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

std::string human(double x, const char* unit = "") {
    const char* prefix[] = {"", "k", "M", "G", "T", "P"};
    int i = 0;
    while (std::fabs(x) >= 1000 && i < 5) { x /= 1000; i++; }
    char text[64];
    snprintf(text, sizeof text, i || *unit ? "%.4g %s%s" : "%.4g%s%s", x, prefix[i], unit);
    return text;
}

#define cudaCheck(call) do { cudaError_t e_ = (call); \
    if (e_ != cudaSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); } while (0)
#define ncclCheck(call) do { ncclResult_t r_ = (call); \
    if (r_ != ncclSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(r_)); } while (0)
#define cublasCheck(call) do { cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(s_)); } while (0)

inline int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }
inline int blocks_for(size_t threads) { return ceil_div(threads, BLOCK); }
inline int blocks_for_rows(size_t rows) { return blocks_for(rows * WARP); }
inline double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

__device__ inline size_t thread_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

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
    cublasCheck(cublasSetMathMode(s->cublas, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
}

void stream_destroy(Stream* s) {
    cublasCheck(cublasDestroy(s->cublas));
    if (s->workspace) cudaCheck(cudaFree(s->workspace));
    cudaCheck(cudaEventDestroy(s->event));
    cudaCheck(cudaStreamDestroy(s->stream));
}

void device_open() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) die("no CUDA device found; build for the CPU with: make DEVICE=cpu");
    bool bound = devices == 1 && getenv("CUDA_VISIBLE_DEVICES");        // the launcher shows each rank its own GPU
    if (!NCCL_BY_MPI && !bound && ranks.local_size > devices) die("%d ranks on this machine, which has %d GPU%s; start one for each", ranks.local_size, devices, devices > 1 ? "s" : "");
    if (!NCCL_BY_MPI && !bound) main_device = ranks.local_rank;         // ranks on a CPU share it
    cudaCheck(cudaSetDevice(main_device));
    stream_create(&main_stream);
    for (Stream& s : expert_streams) stream_create(&s);
}

void device_close() {
    cudaCheck(cudaDeviceSynchronize());
    stream_destroy(&main_stream);
    for (Stream& s : expert_streams) stream_destroy(&s);
}

// --trace FILE: when each kernel and collective was issued and when it ran, by stream, in the format of Chrome's tracing, which
// Perfetto opens. An event behind each piece of work says when it ended; it began when it was issued or when the stream had ended
// what stood before.
struct Trace {
    struct Entry { const char* name; int layer; cudaStream_t stream; double issued; cudaEvent_t end; };
    std::vector<Entry> entries;
    bool on = false;
    int layer = -1;             // that the main thread is at
    double start = 0;
    cudaEvent_t origin;
};
static Trace trace;

// Stands behind each kernel, matmul and collective: errors of the launch, and the trace.
void launched(const char* name, cudaStream_t stream, int layer = trace.layer) {
    cudaCheck(cudaGetLastError());
    if (!trace.on) return;
    Trace::Entry e = {name, layer, stream, seconds_now() - trace.start, nullptr};
    cudaCheck(cudaEventCreateWithFlags(&e.end, 0));
    cudaCheck(cudaEventRecord(e.end, stream));
    trace.entries.push_back(e);
}

// A kernel in the main stream, in blocks of BLOCK threads
#define LAUNCH(kernel, blocks, ...) do { kernel<<<blocks, BLOCK, 0, main_stream.stream>>>(__VA_ARGS__); launched(#kernel, main_stream.stream); } while (0)

// Tracing begins with the device idle; the origin is now on the host and on every stream.
void trace_begin() {
    cudaCheck(cudaDeviceSynchronize());
    if (trace.start == 0) {
        trace.start = seconds_now();
        cudaCheck(cudaEventCreateWithFlags(&trace.origin, 0));
        cudaCheck(cudaEventRecord(trace.origin, main_stream.stream));
    }
    trace.on = true;
    for (cudaStream_t s : all_streams()) launched("", s);
}

void trace_end() {
    cudaCheck(cudaDeviceSynchronize());
    trace.on = false;
}

void trace_write(const std::string& path) {
    FILE* f = fopen(path.c_str(), "w");
    if (!f) die("cannot write %s: %s", path.c_str(), strerror(errno));
    std::vector<cudaStream_t> streams = all_streams();
    std::vector<double> end(streams.size(), 0);         // of what stood before, in microseconds
    fprintf(f, "{\"traceEvents\":[\n{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":%d,\"tid\":0,\"args\":{\"name\":\"issued\"}}", ranks.rank);
    for (size_t i = 0; i < streams.size(); i++)
        fprintf(f, ",\n{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":%d,\"tid\":%zu,\"args\":{\"name\":\"%s\"}}", ranks.rank, i + 1, i == 0 ? "main stream" : i == 1 ? "collectives" : "expert stream");
    for (size_t i = 0; i < trace.entries.size(); i++) {
        const Trace::Entry& e = trace.entries[i];
        size_t stream = std::find(streams.begin(), streams.end(), e.stream) - streams.begin();
        float ms;
        cudaCheck(cudaEventElapsedTime(&ms, trace.origin, e.end));
        double issued = e.issued * 1e6, begin = issued < ms * 1e3 ? std::max(end[stream], issued) : end[stream];    // a CPU has run it before the call returns
        end[stream] = ms * 1e3;
        cudaCheck(cudaEventDestroy(e.end));
        if (e.name[0] == 0) continue;
        std::string args = text("\"args\":{\"number\":%zu,\"layer\":%d}", i, e.layer);
        fprintf(f, ",\n{\"ph\":\"i\",\"name\":\"%s\",\"pid\":%d,\"tid\":0,\"ts\":%.3f,%s}", e.name, ranks.rank, issued, args.c_str());
        fprintf(f, ",\n{\"ph\":\"X\",\"name\":\"%s\",\"pid\":%d,\"tid\":%zu,\"ts\":%.3f,\"dur\":%.3f,%s}", e.name, ranks.rank, stream + 1, begin, end[stream] - begin, args.c_str());
    }
    trace.entries.clear();
    fprintf(f, "\n]}\n");
    if (fclose(f) != 0) die("cannot write %s: %s", path.c_str(), strerror(errno));
}

// What the stream does next could not begin before here.
void waited(cudaStream_t stream) { if (trace.on) launched("", stream); }

// Copies in the main stream's order. Plain cudaMemcpy and cudaMemset work in the default stream, for which the main stream,
// being non-blocking, does not wait. `from` may change as soon as copy_to_device returns.
template <typename T> void copy_to_device(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyHostToDevice, main_stream.stream));
}

template <typename T> void copy_to_host(T* to, const T* from, size_t n) {
    cudaCheck(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToHost, main_stream.stream));
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

// ------------------------------------------------------------------------------------------------
// Many GPUs, one process ("rank") each:
//   data parallel      every rank trains on its own rows of a batch; gradients are summed over the ranks
//   expert parallel    --ep G: G neighbouring ranks share the experts, E/G each, and send one another the rows to compute. All
//                      else is data parallel, and so are the experts over the ranks that hold the same ones
//   ZeRO-1             --zero 1: of each tensor a rank keeps AdamW's state for an even share, updates it, and gathers the others'
//                      (Rajbhandari et al. 2020)
// All collectives run in one stream, in the program's order, which is the same on all ranks: of two at the same time NCCL
// promises no progress. The main stream goes on meanwhile; events hold back what has to wait.

struct Group { ncclComm_t comm = nullptr; int rank = 0, size = 1; };
static Group world;             // all ranks
static Group expert_group;      // ranks that share the experts, neighbours
static Group replica_group;     // ranks that hold the same experts as this one
static bool zero = false;       // ZeRO-1

static cudaEvent_t comm_event;
static double* comm_buffer;                     // (COMM_BUFFER) for host_sum
constexpr size_t COMM_BUFFER = 1 << 14;

// Bytes that this rank gave to collectives since the start, by purpose; docs/scaling.md has the formulas
enum Traffic { GRADIENTS, PARAMETERS, ROWS, COUNTS, SUMS, TRAFFICS };
static double traffic[TRAFFICS];

inline ncclDataType_t nccl_type(const float*) { return ncclFloat; }
inline ncclDataType_t nccl_type(const __nv_bfloat16*) { return ncclBfloat16; }

// Sizes of the groups for n ranks of which this is number `rank`; `olmoe info` plans with it, without communicating.
void layout_set(int rank, int n, int ep, bool zero_1) {
    world.rank = rank; world.size = n;
    expert_group.rank = rank % ep; expert_group.size = ep;
    replica_group.rank = rank / ep; replica_group.size = n / ep;
    zero = zero_1 && n > 1;
}

// Connects the ranks, all in the same order.
void comm_open() {
    cudaCheck(cudaStreamCreateWithFlags(&comm_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&comm_event, cudaEventDisableTiming));
    cudaCheck(cudaMalloc((void**)&comm_buffer, COMM_BUFFER * sizeof(double)));
    if (world.size == 1) return;
    ncclUniqueId id;
    if (world.rank == 0) ncclCheck(ncclGetUniqueId(&id));
    ranks_broadcast(&id, sizeof id);
    ncclCheck(ncclCommInitRank(&world.comm, world.size, id, world.rank));
    ncclCheck(ncclCommSplit(world.comm, replica_group.rank, expert_group.rank, &expert_group.comm, nullptr));
    ncclCheck(ncclCommSplit(world.comm, expert_group.rank, replica_group.rank, &replica_group.comm, nullptr));
}

void comm_close() {
    cudaCheck(cudaStreamSynchronize(comm_stream));
    for (Group* g : {&expert_group, &replica_group, &world}) if (g->comm) { ncclCheck(ncclCommDestroy(g->comm)); g->comm = nullptr; }
    cudaCheck(cudaFree(comm_buffer));
    cudaCheck(cudaEventDestroy(comm_event));
    cudaCheck(cudaStreamDestroy(comm_stream));
}

// The collectives go on from where the main stream is, and the main stream from where the collectives are.
void comm_after_main() {
    cudaCheck(cudaEventRecord(main_stream.event, main_stream.stream));
    cudaCheck(cudaStreamWaitEvent(comm_stream, main_stream.event, 0));
    waited(comm_stream);
}

void main_after_comm() {
    cudaCheck(cudaEventRecord(comm_event, comm_stream));
    cudaCheck(cudaStreamWaitEvent(main_stream.stream, comm_event, 0));
    waited(main_stream.stream);
}

// The calls that `body` makes are one collective, of a layer or, with -1, of none. The name is what the watch and the trace call it.
template <typename Body> void collective(const char* name, int layer, Traffic purpose, size_t bytes, Body body) {
    ranks_note(name, layer);
    traffic[purpose] += (double)bytes;
    ncclCheck(ncclGroupStart());
    body();
    ncclCheck(ncclGroupEnd());
    launched(name, comm_stream, layer);
}

// Adds x up over all ranks, on the host; all get the same bits.
void host_sum(std::vector<double>* x) {
    if (world.size == 1) return;
    for (size_t begin = 0; begin < x->size(); begin += COMM_BUFFER) {
        size_t n = std::min(COMM_BUFFER, x->size() - begin);
        cudaCheck(cudaMemcpyAsync(comm_buffer, x->data() + begin, n * sizeof(double), cudaMemcpyHostToDevice, comm_stream));
        collective("sum of numbers", -1, SUMS, n * sizeof(double), [&] { ncclCheck(ncclAllReduce(comm_buffer, comm_buffer, n, ncclDouble, ncclSum, world.comm, comm_stream)); });
        cudaCheck(cudaMemcpyAsync(x->data() + begin, comm_buffer, n * sizeof(double), cudaMemcpyDeviceToHost, comm_stream));
        cudaCheck(cudaStreamSynchronize(comm_stream));
    }
}

double host_sum(double x) {
    std::vector<double> v = {x};
    host_sum(&v);
    return v[0];
}

// ------------------------------------------------------------------------------------------------
// The model's shape; its files, its data, its tokenizer

struct OlmoeConfig {
    int L = 0;                              // layers                     num_hidden_layers
    int C = 0;                              // channels                   hidden_size
    int H = 0;                              // heads; D = C / H           num_attention_heads
    int V = 0;                              // vocabulary, padded         vocab_size
    int E = 0, K = 0, F = 0;                // experts, per token, width  num_experts, num_experts_per_tok, intermediate_size
    int max_T = 4096;                       // longest sequence           max_position_embeddings
    float rope_theta = 10000.f;
    float rms_norm_eps = 1e-5f;
    bool norm_topk_prob = false;            // divide the K weights by their sum; OLMoE does not
    float initializer_range = 0.02f;
    int eos_token_id = 50279, pad_token_id = 1;   // -1: none
};

#include "tokenizer.h"      // text <-> token ids
#include "commands/tokenize.h"       // text files -> token files
#include "dataloader.h"     // token files -> batches, in OLMo's order
#include "lib/checkpoint.h"     // Hugging Face directories, training state

// ------------------------------------------------------------------------------------------------
// Matrix multiplication, by cuBLAS

cudaDataType cuda_type(const float*) { return CUDA_R_32F; }
cudaDataType cuda_type(const __nv_bfloat16*) { return CUDA_R_16BF; }

// out (M, N) = alpha op(a) op(b) + beta out, row-major with row lengths ld*, for each of `batch` matrices that stand
// stride_* elements apart. op(a) is (M, K) and op(b) is (K, N). cuBLAS is column-major and so computes
// out^T = op(b)^T op(a)^T, which in memory is the same thing.
template <typename Out>
void gemm(const Stream& s, Out* out, int ldo, const floatX* a, int lda, bool transpose_a, const floatX* b, int ldb, bool transpose_b,
                 int M, int N, int K, float alpha, float beta, int batch = 1, size_t stride_o = 0, size_t stride_a = 0, size_t stride_b = 0) {
    if (M == 0 || N == 0) return;
    cublasOperation_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    if (batch == 1)
        cublasCheck(cublasGemmEx(s.cublas, op_b, op_a, N, M, K, &alpha, b, cuda_type(b), ldb, a, cuda_type(a), lda, &beta,
                                 out, cuda_type(out), ldo, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    else
        cublasCheck(cublasGemmStridedBatchedEx(s.cublas, op_b, op_a, N, M, K, &alpha, b, cuda_type(b), ldb, (long long)stride_b, a, cuda_type(a), lda,
                                               (long long)stride_a, &beta, out, cuda_type(out), ldo, (long long)stride_o, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    launched("matmul", s.stream);
}

// y (N, O) = x (N, I) W^T, with W (O, I); added to y where beta is 1
template <typename Out>
void matmul_forward(const Stream& s, Out* y, const floatX* x, const floatX* w, int N, int I, int O, float beta = 0) {
    gemm(s, y, O, x, I, false, w, I, true, N, O, I, 1, beta);
}

// dx (N, I) = dy (N, O) W; added to dx where beta is 1
void matmul_backward_input(const Stream& s, floatX* dx, const floatX* dy, const floatX* w, int N, int I, int O, float beta = 0) {
    gemm(s, dx, I, dy, O, false, w, I, false, N, I, O, 1, beta);
}

// dW (O, I) += dy^T x: accumulates over micro-batches
void matmul_backward_weight(const Stream& s, floatX* dw, const floatX* dy, const floatX* x, int N, int I, int O) {
    gemm(s, dw, I, dy, O, true, x, I, false, O, I, N, 1, 1);
}

// ------------------------------------------------------------------------------------------------
// Token embedding:   x_t = W[id_t]

// One warp per token.
__global__ void embedding_forward_kernel(floatX* x, const int* ids, const floatX* w, int N, int C) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    const floatX* from = w + (size_t)ids[row] * C;
    for (int i = lane; i < C; i += WARP) x[row * C + i] = from[i];
}

// dW[id] += sum of dx_t over the tokens t with this id. The host has sorted the tokens by id (index_tokens below); one warp
// adds the rows of one id, in the order of their positions.
__global__ void embedding_backward_kernel(floatX* dw, const floatX* dx, const int* touched, const int* start, const int* tokens, int rows, int C) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)rows) return;
    dw += (size_t)touched[row] * C;

    for (int column = lane; column < C; column += CHUNK) {
        float sum[PER_LANE] = {};
        for (int j = start[row]; j < start[row + 1]; j++) {
            const floatX* from = dx + (size_t)tokens[j] * C;
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) sum[c] += (float)from[column + c * WARP];
        }
        for (int c = 0; c < PER_LANE; c++)
            if (column + c * WARP < C) dw[column + c * WARP] = (floatX)((float)dw[column + c * WARP] + sum[c]);
    }
}

void embedding_forward(floatX* x /* (N, C) */, const int* ids /* (N) */, const floatX* w /* (V, C) */, int N, int C) {
    LAUNCH(embedding_forward_kernel, blocks_for_rows(N), x, ids, w, N, C);
}

void embedding_backward(floatX* dw /* (V, C) += */, const floatX* dx /* (N, C) */, const int* touched /* (rows) ids */,
                               const int* start /* (rows+1) */, const int* tokens /* (N) */, int rows, int C) {
    LAUNCH(embedding_backward_kernel, blocks_for_rows(rows), dw, dx, touched, start, tokens, rows, C);
}

// ------------------------------------------------------------------------------------------------
// Sums over rows without atomics: a warp adds a slab of consecutive rows into a line of its own, then a thread for each
// column adds the lines in order. The first half is each layer's own; this is the second.

inline int slabs_for(int rows) { return std::min(SLABS, ceil_div(rows, 16)); }

// One thread per column. Accumulates into the gradient.
__global__ void sum_slabs_kernel(floatX* dw, const float* partial, int C, int slabs) {
    size_t i = thread_index();
    if (i >= (size_t)C) return;
    float sum = 0;
    for (int slab = 0; slab < slabs; slab++) sum += partial[(size_t)slab * C + i];
    dw[i] = (floatX)((float)dw[i] + sum);
}

// ------------------------------------------------------------------------------------------------
// RMSNorm (Zhang & Sennrich 2019):   y_i = w_i x_i r,   r = 1 / sqrt(mean_j x_j^2 + eps)
// Before attention, before the experts, and at the end.

// One warp per row. Reads x twice (the second time from cache), writes y: 3 floatX an element.
__global__ void rmsnorm_forward_kernel(floatX* y, float* r, const floatX* x, const floatX* w, int N, int C, float eps) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    x += row * C; y += row * C;

    float square = 0;
    for (int i = lane; i < C; i += WARP) square += (float)x[i] * (float)x[i];
    float scale = 1 / sqrtf(warp_sum(square) / C + eps);
    for (int i = lane; i < C; i += WARP) y[i] = (floatX)((float)(floatX)((float)x[i] * scale) * (float)w[i]);   // rounded before w, as OLMo does
    if (lane == 0) r[row] = scale;                                                                               // kept for backward
}

// With g_i = dy_i w_i:   dx_i = r (g_i - x_i r^2 mean_j g_j x_j)
//                        term 1: through the numerator; term 2: through r, which every x_j moves
// One warp per row. Accumulates, because the residual stream's own gradient is already in dx.
__global__ void rmsnorm_backward_input_kernel(floatX* dx, const floatX* dy, const floatX* x, const floatX* w, const float* r, int N, int C) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    x += row * C; dx += row * C; dy += row * C;

    float dot = 0, scale = r[row];
    for (int i = lane; i < C; i += WARP) dot += (float)dy[i] * (float)w[i] * (float)x[i];
    float term2 = warp_sum(dot) / C * scale * scale;
    for (int i = lane; i < C; i += WARP) dx[i] = (floatX)((float)dx[i] + scale * ((float)dy[i] * (float)w[i] - (float)x[i] * term2));
}

// dw_i = sum over rows of dy_i x_i r. One warp per slab of rows; rows of dy and x stand `stride` elements apart, r's r_stride.
template <typename T> __global__ void norm_backward_weight_kernel(float* partial, const T* dy, const floatX* x, const float* r, int N, int C, int stride, int r_stride, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;

    size_t begin = N * slab / slabs, end = N * (slab + 1) / slabs;
    for (int column = lane; column < C; column += CHUNK) {
        float sum[PER_LANE] = {};
        for (size_t row = begin; row < end; row++) {
            const T* g = dy + row * stride;
            const floatX* in = x + row * stride;
            float scale = r[row * r_stride];
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) sum[c] += (float)g[column + c * WARP] * (float)in[column + c * WARP] * scale;
        }
        for (int c = 0; c < PER_LANE; c++)
            if (column + c * WARP < C) partial[slab * C + column + c * WARP] = sum[c];
    }
}

template <typename T> void norm_backward_weight(floatX* dw /* (C) += */, float* partial /* (SLABS, C) scratch */, const T* dy, const floatX* x, const float* r, int N, int C, int stride, int r_stride) {
    int slabs = slabs_for(N);
    LAUNCH(norm_backward_weight_kernel, blocks_for_rows(slabs), partial, dy, x, r, N, C, stride, r_stride, slabs);
    LAUNCH(sum_slabs_kernel, blocks_for(C), dw, partial, C, slabs);
}

void rmsnorm_forward(floatX* y /* (N, C) */, float* r /* (N) */, const floatX* x /* (N, C) */, const floatX* w /* (C) */, int N, int C, float eps) {
    LAUNCH(rmsnorm_forward_kernel, blocks_for_rows(N), y, r, x, w, N, C, eps);
}

void rmsnorm_backward(floatX* dx /* (N, C) += */, floatX* dw /* (C) += */, float* partial /* (SLABS, C) scratch */,
                             const floatX* dy, const floatX* x, const floatX* w, const float* r, int N, int C) {
    LAUNCH(rmsnorm_backward_input_kernel, blocks_for_rows(N), dx, dy, x, w, r, N, C);
    norm_backward_weight(dw, partial, dy, x, r, N, C, C, 1);
}

// ------------------------------------------------------------------------------------------------
// QK-norm and RoPE.  q and k are normalised over the whole projection, all heads together (Dehghani et al. 2023; OLMoE
// §4.2.5), and then rotated in pairs (j, j + D/2) of each head by the angle  t theta^(-2j/D)  at position t (Su et al. 2021).
// Statistics, tables and rotation are fp32; it is rounded where OLMo rounds: after r, after w, after the rotation.

// One warp per token. qk (N, 2C) receives q and k; v stays where the projection left it. Null positions: rows of T run from 0 on.
__global__ void qk_norm_rope_forward_kernel(floatX* qk, float* r, const floatX* qkv, const floatX* q_norm, const floatX* k_norm,
                                            const float* cosine, const float* sine, const int* positions, int N, int T, int C, int D, float eps) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP, half = D / 2;
    if (row >= (size_t)N) return;
    size_t position = positions ? positions[row] : row % T;
    cosine += position * half; sine += position * half;

    for (int part = 0; part < 2; part++) {                      // q, then k
        const floatX *x = qkv + row * 3 * C + part * C, *w = part ? k_norm : q_norm;
        floatX* y = qk + row * 2 * C + part * C;
        float square = 0;
        for (int i = lane; i < C; i += WARP) square += (float)x[i] * (float)x[i];
        float scale = 1 / sqrtf(warp_sum(square) / C + eps);
        for (int h = 0; h < C; h += D)
            for (int j = lane; j < half; j += WARP) {
                float a = (float)(floatX)((float)(floatX)((float)x[h + j] * scale) * (float)w[h + j]);
                float b = (float)(floatX)((float)(floatX)((float)x[h + j + half] * scale) * (float)w[h + j + half]);
                y[h + j] = (floatX)(a * cosine[j] - b * sine[j]);
                y[h + j + half] = (floatX)(b * cosine[j] + a * sine[j]);
            }
        if (lane == 0) r[row * 2 + part] = scale;
    }
}

// The rotation's transpose is the rotation by the opposite angle; behind it, RMSNorm's backward over the whole projection.
// One warp per token. dqkv32 (N, 3C) holds dq, dk, dv; what leaves the rotation is written back there, for the weight
// gradients; dqkv (N, 3C) receives the gradient of the projection.
__global__ void qk_norm_rope_backward_kernel(floatX* dqkv, float* dqkv32, const floatX* qkv, const float* r, const floatX* q_norm, const floatX* k_norm,
                                             const float* cosine, const float* sine, int N, int T, int C, int D) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP, half = D / 2;
    if (row >= (size_t)N) return;
    cosine += (row % T) * half; sine += (row % T) * half;
    dqkv += row * 3 * C; dqkv32 += row * 3 * C; qkv += row * 3 * C;

    for (int part = 0; part < 2; part++) {
        const floatX *x = qkv + part * C, *w = part ? k_norm : q_norm;
        float *dy = dqkv32 + part * C, dot = 0, scale = r[row * 2 + part];
        for (int h = 0; h < C; h += D)
            for (int j = lane; j < half; j += WARP) {
                float a = dy[h + j], b = dy[h + j + half];
                float da = a * cosine[j] + b * sine[j], db = b * cosine[j] - a * sine[j];
                dy[h + j] = da;
                dy[h + j + half] = db;
                dot += da * (float)w[h + j] * (float)x[h + j] + db * (float)w[h + j + half] * (float)x[h + j + half];
            }
        float term2 = warp_sum(dot) / C * scale * scale;
        __syncwarp();                                           // the next loop gives dy's elements to other lanes
        for (int i = lane; i < C; i += WARP) dqkv[part * C + i] = (floatX)(scale * (dy[i] * (float)w[i] - (float)x[i] * term2));
    }
    for (int i = lane; i < C; i += WARP) dqkv[2 * C + i] = (floatX)dqkv32[2 * C + i];
}

void qk_norm_rope_forward(floatX* qk /* (N, 2C) */, float* r /* (N, 2) */, const floatX* qkv /* (N, 3C) */, const floatX* q_norm /* (C) */,
                                 const floatX* k_norm /* (C) */, const float* cosine /* (T, D/2) */, const float* sine, const int* positions /* (N) or null */,
                                 int N, int T, int C, int D, float eps) {
    LAUNCH(qk_norm_rope_forward_kernel, blocks_for_rows(N), qk, r, qkv, q_norm, k_norm, cosine, sine, positions, N, T, C, D, eps);
}

void qk_norm_rope_backward(floatX* dqkv /* (N, 3C) */, floatX* dq_norm /* (C) += */, floatX* dk_norm /* (C) += */, float* partial /* (SLABS, C) scratch */,
                                  float* dqkv32 /* (N, 3C), changed */, const floatX* qkv, const float* r, const floatX* q_norm, const floatX* k_norm,
                                  const float* cosine, const float* sine, int N, int T, int C, int D) {
    LAUNCH(qk_norm_rope_backward_kernel, blocks_for_rows(N), dqkv, dqkv32, qkv, r, q_norm, k_norm, cosine, sine, N, T, C, D);
    norm_backward_weight(dq_norm, partial, dqkv32, qkv, r, N, C, 3 * C, 2);
    norm_backward_weight(dk_norm, partial, dqkv32 + C, qkv + C, r + 1, N, C, 3 * C, 2);
}

// ------------------------------------------------------------------------------------------------
// Causal attention:   S = q k^T / sqrt(D),   P_ij = exp(S_ij - lse_i) for j <= i, else 0,   o = P v
// In blocks of ATTENTION_BLOCK queries against all keys up to the block's end: no T x T matrix ever exists, and the causal
// half of the work is left out but for the blocks on the diagonal. lse is kept, the rest is recomputed by backward.

// One warp per query row i of a head: scores (H, n, S) of the queries t0 .. t0+n-1, keys 0 .. S-1.
__global__ void attention_softmax_forward_kernel(floatX* probs, float* lse, const float* scores, int H, int n, int S, int t0, int T) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)H * n) return;
    int head = (int)(row / n), t = t0 + (int)(row % n);
    scores += row * S; probs += row * S;

    float max = -INFINITY, sum = 0;
    for (int j = lane; j <= t; j += WARP) max = fmaxf(max, scores[j]);
    max = warp_max(max);
    for (int j = lane; j <= t; j += WARP) sum += expf(scores[j] - max);
    float total = max + logf(warp_sum(sum));
    for (int j = lane; j <= t; j += WARP) probs[j] = (floatX)expf(scores[j] - total);
    for (int j = t + 1 + lane; j < S; j += WARP) probs[j] = (floatX)0.f;
    if (lane == 0) lse[(size_t)head * T + t] = total;
}

// dS_ij = P_ij (dP_ij - delta_i) / sqrt(D),   delta_i = sum_j P_ij dP_ij      (the factor is in the matmuls that read dS)
// One warp per query row. Recomputes P; rounded to floatX it is only for dv, whose forward met the rounded P.
__global__ void attention_softmax_backward_kernel(floatX* probs, floatX* dscores, const float* dprobs, const float* scores, const float* lse, int H, int n, int S, int t0, int T) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)H * n) return;
    int head = (int)(row / n), t = t0 + (int)(row % n);
    scores += row * S; probs += row * S; dprobs += row * S; dscores += row * S;

    float total = lse[(size_t)head * T + t], delta = 0;
    for (int j = lane; j <= t; j += WARP) {
        float p = expf(scores[j] - total);
        probs[j] = (floatX)p;
        delta += p * dprobs[j];
    }
    delta = warp_sum(delta);
    for (int j = lane; j <= t; j += WARP) dscores[j] = (floatX)((BF16 ? expf(scores[j] - total) : (float)probs[j]) * (dprobs[j] - delta));
    for (int j = t + 1 + lane; j < S; j += WARP) { probs[j] = (floatX)0.f; dscores[j] = (floatX)0.f; }
}

void attention_forward(floatX* out /* (N, C) */, float* lse /* (B, H, T) */, float* scores /* (H, ATTENTION_BLOCK, T) scratch */, floatX* probs /* the same */,
                              const floatX* qk /* (N, 2C) */, const floatX* qkv /* (N, 3C), for v */, int B, int T, int C, int H) {
    int D = C / H;
    for (int b = 0; b < B; b++)
        for (int t0 = 0; t0 < T; t0 += ATTENTION_BLOCK) {
            int n = std::min(ATTENTION_BLOCK, T - t0), S = t0 + n;
            const floatX *q = qk + ((size_t)b * T + t0) * 2 * C, *k = qk + (size_t)b * T * 2 * C + C, *v = qkv + (size_t)b * T * 3 * C + 2 * C;
            gemm(main_stream, scores, S, q, 2 * C, false, k, 2 * C, true, n, S, D, 1 / sqrtf((float)D), 0, H, (size_t)n * S, D, D);
            LAUNCH(attention_softmax_forward_kernel, blocks_for_rows((size_t)H * n), probs, lse + (size_t)b * H * T, scores, H, n, S, t0, T);
            gemm(main_stream, out + ((size_t)b * T + t0) * C, C, probs, S, false, v, 3 * C, false, n, D, S, 1, 0, H, D, (size_t)n * S, D);
        }
}

// dv = P^T do,   dP = do v^T,   dq = dS k,   dk = dS^T q. The last block covers all keys and comes first, so that it sets dk and
// dv, and the others add to them, in fp32.
void attention_backward(float* dqkv32 /* (N, 3C) */, float* scores, floatX* probs, float* dprobs, floatX* dscores /* four scratch (H, ATTENTION_BLOCK, T) */,
                               const floatX* dout /* (N, C) */, const floatX* qk, const floatX* qkv, const float* lse, int B, int T, int C, int H) {
    int D = C / H;
    float scale = 1 / sqrtf((float)D);
    for (int b = 0; b < B; b++)
        for (int t0 = (T - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK; t0 >= 0; t0 -= ATTENTION_BLOCK) {
            int n = std::min(ATTENTION_BLOCK, T - t0), S = t0 + n;
            const floatX *q = qk + ((size_t)b * T + t0) * 2 * C, *k = qk + (size_t)b * T * 2 * C + C, *v = qkv + (size_t)b * T * 3 * C + 2 * C;
            const floatX* dO = dout + ((size_t)b * T + t0) * C;
            float *dq = dqkv32 + ((size_t)b * T + t0) * 3 * C, *dk = dqkv32 + (size_t)b * T * 3 * C + C, *dv = dk + C;
            float add = S == T ? 0.f : 1.f;
            size_t square = (size_t)n * S;
            gemm(main_stream, scores, S, q, 2 * C, false, k, 2 * C, true, n, S, D, scale, 0, H, square, D, D);
            gemm(main_stream, dprobs, S, dO, C, false, v, 3 * C, true, n, S, D, 1, 0, H, square, D, D);
            LAUNCH(attention_softmax_backward_kernel, blocks_for_rows((size_t)H * n), probs, dscores, dprobs, scores, lse + (size_t)b * H * T, H, n, S, t0, T);
            gemm(main_stream, dv, 3 * C, probs, S, true, dO, C, false, S, D, n, 1, add, H, D, square, D);
            gemm(main_stream, dq, 3 * C, dscores, S, false, k, 2 * C, false, n, D, S, scale, 0, H, D, square, D);
            gemm(main_stream, dk, 3 * C, dscores, S, true, q, 2 * C, false, S, D, n, scale, add, H, D, square, D);
        }
}

// Generation: keys and values of a layer stay in a cache (S, H, P, D), P positions for each of S sequences. A head's stand together,
// because they are read together. A row belongs to sequence slots[row], at positions[row] in it.

// One warp per row and head: its k and v into the cache
__global__ void cache_store_kernel(floatX* keys, floatX* values, const floatX* qk, const floatX* qkv, const int* slots, const int* positions, int N, int H, int D, int P) {
    size_t warp = thread_index() / WARP, row = warp / H, head = warp % H;
    int lane = threadIdx.x % WARP, C = H * D;
    if (row >= (size_t)N || positions[row] >= P) return;        // the filling behind a short prompt may reach beyond the cache
    const floatX *k = qk + row * 2 * C + C + head * D, *v = qkv + row * 3 * C + 2 * C + head * D;
    size_t to = ((slots[row] * (size_t)H + head) * P + positions[row]) * D;
    for (int i = lane; i < D; i += WARP) keys[to + i] = k[i];
    for (int i = lane; i < D; i += WARP) values[to + i] = v[i];
}

// One query q of a sequence, at position t:   P = softmax_j(q k_j / sqrt(D)) over j <= t,   o = sum_j P_j v_j
// One warp per row and head; P is rounded as in attention_softmax_forward_kernel. Reads the cache once: 2 C floatX for each of a sequence's positions.
__global__ void attention_cached_kernel(floatX* out, float* scores, const floatX* qk, const floatX* keys, const floatX* values, const int* slots, const int* positions,
                                        int N, int H, int D, int P, float scale) {
    size_t warp = thread_index() / WARP, row = warp / H, head = warp % H;
    int lane = threadIdx.x % WARP, C = H * D;
    if (row >= (size_t)N) return;
    size_t cached = (slots[row] * (size_t)H + head) * P * D;
    const floatX *q = qk + row * 2 * C + head * D, *k = keys + cached, *v = values + cached;
    int keys_here = positions[row] + 1;
    scores += warp * P;

    for (int j = 0; j < keys_here; j++) {
        float dot = 0;
        const floatX* key = k + (size_t)j * D;
        for (int i = lane; i < D; i += WARP) dot += (float)q[i] * (float)key[i];
        dot = warp_sum(dot) * scale;
        if (lane == 0) scores[j] = dot;
    }
    __syncwarp();
    float max = -INFINITY, sum = 0;
    for (int j = lane; j < keys_here; j += WARP) max = fmaxf(max, scores[j]);
    max = warp_max(max);
    for (int j = lane; j < keys_here; j += WARP) sum += expf(scores[j] - max);
    float lse = max + logf(warp_sum(sum));
    for (int j = lane; j < keys_here; j += WARP) scores[j] = (float)(floatX)expf(scores[j] - lse);
    __syncwarp();
    for (int column = lane; column < D; column += CHUNK) {
        float total[PER_LANE] = {};
        for (int j = 0; j < keys_here; j++) {
            const floatX* value = v + (size_t)j * D;
            float p = scores[j];
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < D) total[c] += p * (float)value[column + c * WARP];
        }
        for (int c = 0; c < PER_LANE; c++)
            if (column + c * WARP < D) out[row * C + head * D + column + c * WARP] = (floatX)total[c];
    }
}

void cache_store(floatX* keys /* (S, H, P, D) */, floatX* values, const floatX* qk /* (N, 2C) */, const floatX* qkv /* (N, 3C) */, const int* slots /* (N) */, const int* positions /* (N) */, int N, int C, int H, int P) {
    LAUNCH(cache_store_kernel, blocks_for_rows((size_t)N * H), keys, values, qk, qkv, slots, positions, N, H, C / H, P);
}

void attention_cached(floatX* out /* (N, C) */, float* scores /* (N, H, P) scratch */, const floatX* qk /* (N, 2C) */, const floatX* keys /* (S, H, P, D) */, const floatX* values,
                             const int* slots /* (N) */, const int* positions /* (N) */, int N, int C, int H, int P) {
    LAUNCH(attention_cached_kernel, blocks_for_rows((size_t)N * H), out, scores, qk, keys, values, slots, positions, N, H, C / H, P, 1 / sqrtf((float)(C / H)));
}

// ------------------------------------------------------------------------------------------------
// Router:   z = m Wr^T,   p = softmax(z) over all E experts,   the K largest p are the token's experts and their weights
// (OLMoE eq. 1). The weights are not renormalised, unless norm_topk_prob. Of equal z the lower expert id comes first.
//
// Auxiliary losses, for one micro-batch (as trained, which is not quite as printed in the paper):
//     LB = alpha E / (L N K) sum_l sum_i c_li Pbar_li       c: tokens sent to expert i, a constant; Pbar: mean p   (Shazeer 2017)
//     Z  = beta / (L N K) sum_l sum_t lse_lt^2              lse = log sum_i exp z_i                                (Zoph 2022)

// One warp per token. Writes p (N, E), lse (N), and the chosen ids and weights (N, K) in order of probability.
__global__ void router_forward_kernel(float* probs, float* lse, int* experts, float* weights, const float* logits, int N, int E, int K, bool normalize) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    const float* z = logits + row * E;
    float* p = probs + row * E;

    float max = -INFINITY, sum = 0;
    for (int i = lane; i < E; i += WARP) max = fmaxf(max, z[i]);
    max = warp_max(max);
    for (int i = lane; i < E; i += WARP) sum += expf(z[i] - max);
    sum = warp_sum(sum);
    for (int i = lane; i < E; i += WARP) p[i] = expf(z[i] - max) / sum;
    if (lane == 0) lse[row] = max + logf(sum);

    // K times the best of those that stand behind the one chosen last. By z, not p: where exp is vectorised, equal z in
    // different lanes of a vector can give p that differ in the last bit.
    __syncwarp();                                               // p is read by lanes that did not write it
    float last = INFINITY, total = 0;
    int last_id = -1;
    for (int k = 0; k < K; k++) {
        float best = -INFINITY;
        int best_id = E;
        for (int i = lane; i < E; i += WARP)
            if ((z[i] < last || (z[i] == last && i > last_id)) && (z[i] > best || best_id == E)) { best = z[i]; best_id = i; }
        warp_argmax(best, best_id);
        bool found = best_id < E;                               // not where z is NaN: then any valid id, and the loss will tell
        float weight = found ? p[best_id] : NAN;
        if (!found) best_id = k;
        if (lane == 0) { experts[row * K + k] = best_id; weights[row * K + k] = weight; }
        total += weight;
        last = best; last_id = best_id;
    }
    __syncwarp();
    if (normalize) for (int k = lane; k < K; k += WARP) weights[row * K + k] /= total;
}

// With g_i = dLoss/dp_i:   dz_j = p_j (g_j - sum_i p_i g_i) + 2 beta lse p_j / (L N K)
//     term 1: the K experts' weights w_k; with norm_topk_prob w_k = p_k / s, s the sum of the chosen p, and so g_k = (dw_k - sum_i w_i dw_i) / s
//     term 2: load balancing, g_i = alpha E c_i / (L N^2 K), the same for every token
//     term 3: the z-loss
// One warp per token; g (N, E) is its scratch. lb_scale = alpha E / (L N^2 K) and z_scale = 2 beta / (L N K), both over the
// number of micro-batches.
__global__ void router_backward_kernel(floatX* dlogits, float* g, const float* dweights, const float* probs, const float* lse, const int* experts, const float* weights,
                                       const int* counts, int N, int E, int K, bool normalize, float lb_scale, float z_scale) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    const float *p = probs + row * E, *w = weights + row * K, *dw = dweights + row * K;
    const int* id = experts + row * K;
    dlogits += row * E; g += row * E;

    float chosen = 1, mean = 0;
    if (normalize) {
        chosen = 0;
        for (int k = lane; k < K; k += WARP) { chosen += p[id[k]]; mean += w[k] * dw[k]; }
        chosen = warp_sum(chosen);
        mean = warp_sum(mean);
    }
    for (int i = lane; i < E; i += WARP) g[i] = lb_scale * (float)counts[i];
    __syncwarp();
    for (int k = lane; k < K; k += WARP) g[id[k]] += (dw[k] - mean) / chosen;
    __syncwarp();
    float dot = 0;
    for (int i = lane; i < E; i += WARP) dot += p[i] * g[i];
    dot = warp_sum(dot);
    float z_term = z_scale * lse[row];
    for (int i = lane; i < E; i += WARP) dlogits[i] = (floatX)(p[i] * (g[i] - dot + z_term));
}

// Sum of p over a slab of tokens, for Pbar. One warp per slab; the host adds the lines.
__global__ void router_mean_kernel(float* partial, const float* probs, int N, int E, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;
    size_t begin = N * slab / slabs, end = N * (slab + 1) / slabs;
    for (int i = lane; i < E; i += WARP) {
        float sum = 0;
        for (size_t row = begin; row < end; row++) sum += probs[row * E + i];
        partial[slab * E + i] = sum;
    }
}

void router_forward(float* probs /* (N, E) */, float* lse /* (N) */, int* experts /* (N, K) */, float* weights /* (N, K) */, float* partial /* (SLABS, E) */,
                           const float* logits /* (N, E) */, int N, int E, int K, bool normalize) {
    int slabs = slabs_for(N);
    LAUNCH(router_forward_kernel, blocks_for_rows(N), probs, lse, experts, weights, logits, N, E, K, normalize);
    LAUNCH(router_mean_kernel, blocks_for_rows(slabs), partial, probs, N, E, slabs);
}

void router_backward(floatX* dlogits /* (N, E) */, float* g /* (N, E) scratch */, const float* dweights /* (N, K) */, const float* probs, const float* lse,
                            const int* experts, const float* weights, const int* counts /* (E) */, int N, int E, int K, bool normalize, float lb_scale, float z_scale) {
    LAUNCH(router_backward_kernel, blocks_for_rows(N), dlogits, g, dweights, probs, lse, experts, weights, counts, N, E, K, normalize, lb_scale, z_scale);
}

// ------------------------------------------------------------------------------------------------
// Dispatch: the R = N K assignments a = t K + k, sorted by expert; within an expert they keep their order. Dropless: an expert
// takes whatever it is sent. A counting sort in three kernels over slabs of assignments: count, scan, place. An expert's counter
// belongs to one lane (expert % WARP), so that nothing is atomic.

constexpr int DISPATCH_SLAB = 256;          // assignments that one warp counts and places

// One warp per slab: histogram (slabs, E)
__global__ void dispatch_count_kernel(int* histogram, const int* experts, int R, int E, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;
    histogram += slab * E;

    int begin = (int)slab * DISPATCH_SLAB, end = begin + DISPATCH_SLAB < R ? begin + DISPATCH_SLAB : R;
    for (int e = lane; e < E; e += WARP) histogram[e] = 0;
    for (int base = begin; base < end; base += WARP) {
        int mine = base + lane < end ? experts[base + lane] : -1;
        for (int j = 0; j < WARP; j++) {
            int e = __shfl_sync(0xffffffff, mine, j);
            if (e >= 0 && e % WARP == lane) histogram[e]++;
        }
    }
}

// One thread per expert: its counts become its first row in each slab, relative to the expert's first row
__global__ void dispatch_scan_kernel(int* counts, int* histogram, int E, int slabs) {
    size_t e = thread_index();
    if (e >= (size_t)E) return;
    int sum = 0;
    for (int slab = 0; slab < slabs; slab++) {
        int n = histogram[(size_t)slab * E + e];
        histogram[(size_t)slab * E + e] = sum;
        sum += n;
    }
    counts[e] = sum;
}

// One warp per slab: row_of (R) gives an assignment's row, assignment_of (R) a row's assignment
__global__ void dispatch_place_kernel(int* row_of, int* assignment_of, int* histogram, const int* counts, const int* experts, int R, int E, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;
    histogram += slab * E;

    for (int e = lane; e < E; e += WARP) {
        int first = 0;
        for (int i = 0; i < e; i++) first += counts[i];
        histogram[e] += first;
    }
    int begin = (int)slab * DISPATCH_SLAB, end = begin + DISPATCH_SLAB < R ? begin + DISPATCH_SLAB : R;
    for (int base = begin; base < end; base += WARP) {
        int mine = base + lane < end ? experts[base + lane] : -1;
        for (int j = 0; j < WARP; j++) {
            int e = __shfl_sync(0xffffffff, mine, j);
            if (e >= 0 && e % WARP == lane) {
                int row = histogram[e]++;
                row_of[base + j] = row;
                assignment_of[row] = base + j;
            }
        }
    }
}

// out_row = x_i with i = index_row / K: of the rows' assignments the tokens, and so the experts' input and in backward the gradient of
// their output; with K = 1 rows in another order. One warp per row.
template <typename T> __global__ void gather_kernel(T* out, const T* x, const int* index, int R, int C, int K) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)R) return;
    x += (size_t)(index[row] / K) * C;
    for (int i = lane; i < C; i += WARP) out[row * C + i] = x[i];
}

void dispatch(int* row_of /* (R) */, int* assignment_of /* (R) */, int* counts /* (E) */, int* histogram /* (ceil(R / DISPATCH_SLAB), E) scratch */,
                     const int* experts /* (N, K) */, int R, int E) {
    int slabs = ceil_div(R, DISPATCH_SLAB);
    LAUNCH(dispatch_count_kernel, blocks_for_rows(slabs), histogram, experts, R, E, slabs);
    LAUNCH(dispatch_scan_kernel, blocks_for(E), counts, histogram, E, slabs);
    LAUNCH(dispatch_place_kernel, blocks_for_rows(slabs), row_of, assignment_of, histogram, counts, experts, R, E, slabs);
}

template <typename T> void gather(T* out /* (R, C) */, const T* x /* (N, C) */, const int* index /* (R) */, int R, int C, int K) {
    LAUNCH(gather_kernel, blocks_for_rows(R), out, x, index, R, C, K);
}

// Between the ranks that share the experts. counts (E): rows that this rank sends to each expert. arrivals (G, E/G): rows that each
// of the G ranks sends to each expert of this one. What is sent is in the order of dispatch; what arrives stands by expert, and
// within it by rank, so that an expert's rows are one matrix. Nothing is padded, nothing dropped.

// Fills in arrivals; waits, because the next calls need them on the host. The counts have been copied to the host, so the main stream
// is done with them.
void exchange_counts(int* arrivals /* (G, E/G) on the host */, int* arrivals_device /* the same on the device */, const int* counts_device /* (E) */, int E, int layer) {
    int G = expert_group.size, mine = E / G;
    collective("exchange of counts", layer, COUNTS, (size_t)(E - mine) * sizeof(int), [&] {
        for (int g = 0; g < G; g++) {
            ncclCheck(ncclSend(counts_device + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
            ncclCheck(ncclRecv(arrivals_device + g * mine, mine, ncclInt, g, expert_group.comm, comm_stream));
        }
    });
    cudaCheck(cudaMemcpyAsync(arrivals, arrivals_device, E * sizeof(int), cudaMemcpyDeviceToHost, comm_stream));
    cudaCheck(cudaStreamSynchronize(comm_stream));
}

// Rows of `width` elements to the ranks of their experts, or with `back` from there to where they came from.
template <typename T>
void exchange_rows(T* to, const T* from, const int* counts, const int* arrivals, int E, size_t width, bool back, const char* name, int layer) {
    int G = expert_group.size, mine = E / G;
    size_t leaving = 0;                     // rows that go to other ranks
    for (int i = 0; i < E; i++)
        if (i / mine != expert_group.rank) leaving += back ? arrivals[i] : counts[i];
    comm_after_main();
    collective(name, layer, ROWS, leaving * width * sizeof(T), [&] {
        size_t row = 0;
        for (int e = 0; e < E; row += counts[e++])              // this rank's rows
            if (counts[e] > 0) {
                if (back) ncclCheck(ncclRecv(to + row * width, counts[e] * width, nccl_type(to), e / mine, expert_group.comm, comm_stream));
                else ncclCheck(ncclSend(from + row * width, counts[e] * width, nccl_type(from), e / mine, expert_group.comm, comm_stream));
            }
        row = 0;
        for (int e = 0; e < mine; e++)                          // this rank's experts
            for (int g = 0; g < G; row += arrivals[g++ * mine + e])
                if (arrivals[g * mine + e] > 0) {
                    size_t n = arrivals[g * mine + e] * width;
                    if (back) ncclCheck(ncclSend(from + row * width, n, nccl_type(from), g, expert_group.comm, comm_stream));
                    else ncclCheck(ncclRecv(to + row * width, n, nccl_type(to), g, expert_group.comm, comm_stream));
                }
    });
    main_after_comm();
}

// ------------------------------------------------------------------------------------------------
// Experts (SwiGLU, Shazeer 2020):   g = x W_gate^T,   u = x W_up^T,   h = silu(g) u,   y = h W_down^T,   silu(g) = g sigmoid(g)
// gate and up are one matrix (2F, C). Each expert multiplies its own run of rows; experts without rows are left out.

// One warp per row: h (R, F) from gate_up (R, 2F).
__global__ void swiglu_forward_kernel(floatX* h, const floatX* gate_up, int R, int F) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)R) return;
    const floatX *g = gate_up + row * 2 * F, *u = g + F;
    h += row * F;
    for (int i = lane; i < F; i += WARP) {
        float x = (float)g[i];
        h[i] = (floatX)(x / (1 + expf(-x)) * (float)u[i]);
    }
}

// The expert's output is weighted by the router: y' = w y. Let dh = dy' W_down, not yet weighted. Then
//     dw = <dy', y> = <dh, h>                         so y need not be kept
//     dgate = w dh u s (1 + g (1 - s)),   dup = w dh g s,   s = sigmoid(g)
//     dW_down = (w dy')^T h = dy'^T (w h)             so w h is written for that matmul
// One warp per routed row. Reads gate_up, dh; writes dgate_up and w h: 6 floatX for each of F columns. Where assignment_of is
// null, weights and dweights are by row.
__global__ void swiglu_backward_kernel(floatX* dgate_up, floatX* weighted_h, float* dweights, const floatX* dh, const floatX* gate_up, const float* weights,
                                       const int* assignment_of, int R, int F) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)R) return;
    const floatX *g = gate_up + row * 2 * F, *u = g + F;
    floatX *dg = dgate_up + row * 2 * F, *du = dg + F;
    dh += row * F; weighted_h += row * F;

    size_t a = assignment_of ? (size_t)assignment_of[row] : row;
    float w = weights[a], dot = 0;
    for (int i = lane; i < F; i += WARP) {
        float x = (float)g[i], up = (float)u[i], d = (float)dh[i];
        float s = 1 / (1 + expf(-x)), silu = x * s;
        dot += silu * up * d;
        dg[i] = (floatX)(w * d * up * s * (1 + x * (1 - s)));
        du[i] = (floatX)(w * d * silu);
        weighted_h[i] = (floatX)(w * silu * up);
    }
    dot = warp_sum(dot);
    if (lane == 0) dweights[a] = dot;
}

// For each of E experts that has rows, in a stream of its own: body(stream, e, first row, rows). The rows of expert e stand behind those
// of the experts before it; `counts` is on the host. The expert streams go on from where the main stream is, and the main stream from
// where all of them are.
template <typename Body> void for_experts(const int* counts, int E, Body body) {
    cudaCheck(cudaEventRecord(main_stream.event, main_stream.stream));
    for (Stream& s : expert_streams) { cudaCheck(cudaStreamWaitEvent(s.stream, main_stream.event, 0)); waited(s.stream); }
    for (size_t e = 0, first = 0; e < (size_t)E; first += counts[e++])
        if (counts[e] > 0) body(expert_streams[e % EXPERT_STREAMS], e, first, counts[e]);
    for (Stream& s : expert_streams) {
        cudaCheck(cudaEventRecord(s.event, s.stream));
        cudaCheck(cudaStreamWaitEvent(main_stream.stream, s.event, 0));
    }
    waited(main_stream.stream);
}

void experts_gate_up(floatX* gate_up /* (R, 2F) */, const floatX* x /* (R, C) */, const floatX* w /* (E, 2F, C) */, const int* counts /* (E) */, int E, int C, int F) {
    for_experts(counts, E, [=](const Stream& s, size_t e, size_t first, int n) { matmul_forward(s, gate_up + first * 2 * F, x + first * C, w + e * 2 * F * C, n, C, 2 * F); });
}

void swiglu_forward(floatX* h /* (R, F) */, const floatX* gate_up /* (R, 2F) */, int R, int F) {
    if (R == 0) return;                     // no rank sent anything
    LAUNCH(swiglu_forward_kernel, blocks_for_rows(R), h, gate_up, R, F);
}

void experts_down(floatX* y /* (R, C) */, const floatX* h /* (R, F) */, const floatX* w /* (E, C, F) */, const int* counts /* (E) */, int E, int C, int F) {
    for_experts(counts, E, [=](const Stream& s, size_t e, size_t first, int n) { matmul_forward(s, y + first * C, h + first * F, w + e * C * F, n, F, C); });
}

void experts_backward(floatX* dx /* (R, C) */, floatX* dw_gate_up /* += */, floatX* dw_down /* += */, float* dweights /* (N, K) */,
                             floatX* dh /* (R, F) scratch */, floatX* weighted_h /* (R, F) scratch */, floatX* dgate_up /* (R, 2F) scratch */,
                             const floatX* dy /* (R, C), not weighted */, const floatX* x, const floatX* gate_up, const float* weights /* (N, K) */, const int* assignment_of /* or null, weights by row */,
                             const floatX* w_gate_up, const floatX* w_down, const int* counts, int R, int E, int C, int F) {
    if (R == 0) return;
    for_experts(counts, E, [=](const Stream& s, size_t e, size_t first, int n) { matmul_backward_input(s, dh + first * F, dy + first * C, w_down + e * C * F, n, F, C); });
    LAUNCH(swiglu_backward_kernel, blocks_for_rows(R), dgate_up, weighted_h, dweights, dh, gate_up, weights, assignment_of, R, F);
    for_experts(counts, E, [=](const Stream& s, size_t e, size_t first, int n) {
        matmul_backward_weight(s, dw_down + e * C * F, dy + first * C, weighted_h + first * F, n, F, C);
        matmul_backward_input(s, dx + first * C, dgate_up + first * 2 * F, w_gate_up + e * 2 * F * C, n, C, 2 * F);
        matmul_backward_weight(s, dw_gate_up + e * 2 * F * C, dgate_up + first * 2 * F, x + first * C, n, C, 2 * F);
    });
}

// ------------------------------------------------------------------------------------------------
// Combine:   out_t = residual_t + sum_k w_tk y_tk,   y_tk the row of assignment t K + k

// One warp per token; sums in fp32, k by k, and rounds once. Null weights are all 1 and a null residual is 0: the backward of
// gather, dm_t = sum_k dx_tk.
__global__ void combine_kernel(floatX* out, const floatX* residual, const floatX* y, const float* weights, const int* row_of, int N, int C, int K) {
    size_t token = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (token >= (size_t)N) return;
    out += token * C;

    for (int column = lane; column < C; column += CHUNK) {
        float sum[PER_LANE] = {};
        if (residual)
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) sum[c] = (float)residual[token * C + column + c * WARP];
        for (int k = 0; k < K; k++) {
            const floatX* from = y + (size_t)row_of[token * K + k] * C;
            float w = weights ? weights[token * K + k] : 1.f;
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) sum[c] += w * (float)from[column + c * WARP];
        }
        for (int c = 0; c < PER_LANE; c++)
            if (column + c * WARP < C) out[column + c * WARP] = (floatX)sum[c];
    }
}

void combine(floatX* out /* (N, C) */, const floatX* residual /* (N, C) or null */, const floatX* y /* (R, C) */, const float* weights /* (N, K) or null */,
                    const int* row_of /* (R) */, int N, int C, int K) {
    LAUNCH(combine_kernel, blocks_for_rows(N), out, residual, y, weights, row_of, N, C, K);
}

// ------------------------------------------------------------------------------------------------
// Cross entropy, fused with its gradient:   loss_t = lse_t - z_target,   dz_v = (softmax_v - [v = target]) scale
// The softmax goes over all V columns, padding included, as OLMoE trained. A target of -100 is ignored: loss and gradient 0.

// One warp per token. The gradient overwrites the logits where scale is not 0.
__global__ void cross_entropy_kernel(float* losses, floatX* logits, const int* targets, int N, int V, float scale) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    logits += row * V;
    int target = targets[row];

    float max = -INFINITY, sum = 0;
    for (int i = lane; i < V; i += WARP) max = fmaxf(max, (float)logits[i]);
    max = warp_max(max);
    for (int i = lane; i < V; i += WARP) sum += expf((float)logits[i] - max);
    float lse = max + logf(warp_sum(sum));
    if (lane == 0) losses[row] = target >= 0 ? lse - (float)logits[target] : 0.f;
    if (scale == 0) return;
    __syncwarp();                                               // the target's logit is read before it is overwritten
    float factor = target >= 0 ? scale : 0.f;
    for (int i = lane; i < V; i += WARP) logits[i] = (floatX)(factor * (expf((float)logits[i] - lse) - (i == target ? 1.f : 0.f)));
}

void cross_entropy(float* losses /* (N) */, floatX* logits /* (N, V), overwritten by their gradient */, const int* targets /* (N) */, int N, int V, float scale) {
    LAUNCH(cross_entropy_kernel, blocks_for_rows(N), losses, logits, targets, N, V, scale);
}

// ------------------------------------------------------------------------------------------------
// Random numbers: Philox-4x32-10 (Salmon et al. 2011) of the seed, the parameter's position in the model and, where AdamW asks, the update's number,
// so that they depend on nothing else.

struct Philox { unsigned x[4]; };
__host__ __device__ inline Philox philox(uint64_t seed, uint64_t position, unsigned step = 0) {
    unsigned c0 = (unsigned)position, c1 = (unsigned)(position >> 32), c2 = step, c3 = 0, k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
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
//                      remainder   Remainder, the lower half of the master's bits; the weight is the upper half, rounded
//                      none        NoMaster: the weight itself is updated, and rounded at random (stochastic rounding)
//     --moments        fp32, bf16  float or __nv_bfloat16, rounded at random
// Weights are masters rounded with halves away from zero: bits + 0x8000, of which the upper half is taken. So the remainder's first
// bit tells whether it was rounded up, and weight and remainder together are the master's 32 bits, where rounding halves to even
// would need one more. Rounding at random adds 16 random bits instead: up as often as the lower half is large, so that the mean is
// right, where rounding to nearest would drop each update below half of the last bit, and let v forget nothing with --beta2 0.999.

struct Remainder { unsigned short bits; };
struct NoMaster {};
enum class Masters { none, fp32, remainder };       // none in an FP32 build: the weights are fp32
constexpr unsigned HALF_AWAY = 0x8000;

__host__ __device__ inline unsigned float_bits(float x) { unsigned u; memcpy(&u, &x, 4); return u; }

__host__ __device__ inline void store(float* to, float x, unsigned) { *to = x; }
__host__ __device__ inline void store(__nv_bfloat16* to, float x, unsigned addend) {
    unsigned bits = float_bits(x);
    unsigned short upper = (unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + addend) >> 16);     // a NaN stays one
    memcpy((void*)to, &upper, 2);
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

// ------------------------------------------------------------------------------------------------
// AdamW (Loshchilov & Hutter 2019), for one element at step s = 1, 2, ...; everything is decayed, norms and embeddings too:
//     p <- p (1 - lr wd);   m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
//     p <- p - lr m / (1-b1^s) / (sqrt(v / (1-b2^s)) + eps)
// g is the gradient times grad_scale, which clips the global norm.

// One thread per element: 28 bytes moved in fp32, 28 with bf16 parameters and gradients and an fp32 master. position: of p[0] in the model.
template <typename Master, typename Moment>
__global__ void adamw_kernel(floatX* p, Master* master, const floatX* g, Moment* m, Moment* v, size_t n, float grad_scale, float decay, float step_size,
                             float beta1, float beta2, float v_scale, float eps, uint64_t seed, size_t position, unsigned step) {
    constexpr bool no_master = std::is_same<Master, NoMaster>::value, at_random = sizeof(Moment) == 2 || (BF16 && no_master);
    size_t i = thread_index();
    if (i >= n) return;
    if (!no_master) master += i;
    Philox random = {};
    if constexpr (at_random) random = philox(seed, position + i, step);
    float grad = (float)g[i] * grad_scale;
    float m_new = beta1 * (float)m[i] + (1 - beta1) * grad;
    float v_new = beta2 * (float)v[i] + (1 - beta2) * grad * grad;
    float value = master_of(master, p + i) * decay - step_size * m_new / (sqrtf(v_new * v_scale) + eps);
    store(m + i, m_new, random.x[0] & 0xffff);
    store(v + i, v_new, random.x[1] & 0xffff);
    store(master, value, 0);
    store(p + i, value, no_master ? random.x[2] & 0xffff : HALF_AWAY);
}

template <typename Master, typename Moment>
void adamw(floatX* p /* (n) */, Master* master /* (n), or null for NoMaster */, const floatX* g /* (n) */, Moment* m /* (n) */, Moment* v /* (n) */, size_t n, int64_t step, float grad_scale,
           double lr, double beta1, double beta2, double eps, double weight_decay, uint64_t seed, size_t position) {
    float step_size = (float)(lr / (1 - pow(beta1, (double)step))), v_scale = (float)(1 / (1 - pow(beta2, (double)step)));
    LAUNCH(adamw_kernel, blocks_for(n), p, master, g, m, v, n, grad_scale, (float)(1 - lr * weight_decay), step_size,
                                        (float)beta1, (float)beta2, v_scale, (float)eps, seed, position, (unsigned)step);
}

// Sum of squares of each run of SQUARE_SUM_RUN elements, for the global norm; the host adds them up. One warp per run.
constexpr int SQUARE_SUM_RUN = 4096;
__global__ void square_sum_kernel(float* sums, const floatX* x, size_t n) {
    size_t run = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (run * SQUARE_SUM_RUN >= n) return;
    x += run * SQUARE_SUM_RUN;
    int length = n - run * SQUARE_SUM_RUN < SQUARE_SUM_RUN ? (int)(n - run * SQUARE_SUM_RUN) : SQUARE_SUM_RUN;
    float sum = 0;
    for (int i = lane; i < length; i += WARP) sum += (float)x[i] * (float)x[i];
    sum = warp_sum(sum);
    if (lane == 0) sums[run] = sum;
}

// ------------------------------------------------------------------------------------------------
// Initialisation:   weights ~ normal(0, std) truncated at 3 std, norms 1 (OLMoE Table 10)

// One thread per element. Each gets four normal deviates (Box & Muller 1958) and takes the first within 3 std; that none of
// them is has probability 5e-11, and gives 0.
template <typename T> __global__ void init_normal_kernel(T* p, size_t n, size_t position, uint64_t seed, float std) {
    size_t i = thread_index();
    if (i >= n) return;
    Philox random = philox(seed, position + i);
    float value = 0;
    for (int pair = 1; pair >= 0; pair--) {
        float radius = sqrtf(-2 * logf(uniform(random.x[2 * pair]))), angle = 6.2831853f * uniform(random.x[2 * pair + 1]);
        float a = radius * cosf(angle), b = radius * sinf(angle);
        value = fabsf(b) <= 3 ? b : value;
        value = fabsf(a) <= 3 ? a : value;
    }
    store(p + i, value * std, HALF_AWAY);
}

template <typename T> __global__ void fill_kernel(T* p, size_t n, float value) {
    size_t i = thread_index();
    if (i >= n) return;
    store(p + i, value, HALF_AWAY);
}

// ------------------------------------------------------------------------------------------------
// The model in memory

// Collects the tensors of a struct, then allocates them as one block, or each on its own where overruns are to be seen.
struct Memory {
    struct Item { void** pointer; size_t bytes; };
    std::vector<Item> items;
    std::vector<void*> blocks;

    template <typename T> void add(T** pointer, size_t count) { items.push_back({(void**)pointer, std::max<size_t>(count, 1) * sizeof(T)}); }
    static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
    size_t bytes(size_t times = 1) const { size_t sum = 0; for (const Item& i : items) sum += aligned(times * i.bytes); return sum; }
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

struct LayerParameters {
    floatX* attn_norm;      // (C)
    floatX* qkv;            // (3C, C)  rows of q, k, v
    floatX* q_norm;         // (C)
    floatX* k_norm;         // (C)
    floatX* attn_out;       // (C, C)
    floatX* ffn_norm;       // (C)
    floatX* router;         // (E, C)
    floatX* gate_up;        // (E, 2F, C)  each expert's rows of gate, then of up
    floatX* down;           // (E, C, F)
};
struct Parameters {
    floatX* embed;          // (V, C)
    std::vector<LayerParameters> layers;
    floatX* final_norm;     // (C)
    floatX* lm_head;        // (V, C)
};

// A tensor of Parameters and its place in the flat order of all parameters (checkpoint.h), layer after layer. Of the experts a rank
// holds its part: elements [base + g count, base + (g+1) count) on rank g of an expert group.
struct Span {
    floatX** pointer;
    size_t base, offset, count;             // flat: the whole tensor's first element; this rank's first element; elements of this rank
    bool norm, expert;
    size_t share;                           // elements of one rank's even share, of which the last ranks may have fewer or none; as many are allocated as shares make
    size_t state;                           // where AdamW's state of the first element that this rank updates stands in m, v and master
    const Group& group() const { return expert ? replica_group : world; }                   // the ranks that hold it
    size_t allocated() const { return zero ? share * group().size : count; }
    // The elements of a rank's share, [begin, end): its to save and, under ZeRO-1, to update
    size_t begin(int rank) const { return std::min(rank * share, count); }
    size_t end(int rank) const { return std::min((rank + 1) * share, count); }
    // Those that this rank updates
    size_t update_begin() const { return zero ? begin(group().rank) : 0; }
    size_t update_count() const { return zero ? end(group().rank) - update_begin() : count; }
};
constexpr int LAYER_TENSORS = 9, FIRST_LAYER_TENSOR = 1;    // tensors of a layer in the list, behind the embedding

std::vector<Span> parameter_spans(Parameters* p, const OlmoeConfig& c) {
    std::vector<Span> spans;
    size_t offset = 0, state = 0, C = c.C, G = expert_group.size;
    auto add = [&](floatX** pointer, size_t count, bool norm = false, bool expert = false) {
        size_t mine = expert ? count / G : count, first = expert ? offset + expert_group.rank * mine : offset;
        Span s = {pointer, offset, first, mine, norm, expert, 0, state};
        s.share = (mine + s.group().size - 1) / s.group().size;
        state += s.update_count();
        offset += count;
        spans.push_back(s);
    };
    p->layers.resize(c.L);
    add(&p->embed, c.V * C);
    for (LayerParameters& l : p->layers) {
        add(&l.attn_norm, C, true);
        add(&l.qkv, 3 * C * C);
        add(&l.q_norm, C, true);
        add(&l.k_norm, C, true);
        add(&l.attn_out, C * C);
        add(&l.ffn_norm, C, true);
        add(&l.router, c.E * C);
        add(&l.gate_up, (size_t)c.E * 2 * c.F * C, false, true);
        add(&l.down, (size_t)c.E * C * c.F, false, true);
    }
    add(&p->final_norm, C, true);
    add(&p->lm_head, c.V * C);
    return spans;
}

size_t num_parameters(const OlmoeConfig& c) {
    Parameters p;
    Span last = parameter_spans(&p, c).back();
    return last.base + last.count;
}

// Elements of AdamW's m, of v and of the masters on this rank
size_t num_updated(const std::vector<Span>& spans) { return spans.back().state + spans.back().update_count(); }

// Parameters that a token meets: K of the E experts
size_t num_active_parameters(const OlmoeConfig& c) { return num_parameters(c) - (size_t)c.L * (c.E - c.K) * 3 * c.C * c.F; }

const Span& span_at(const std::vector<Span>& spans, size_t offset) {
    return std::upper_bound(spans.begin(), spans.end(), offset, [](size_t o, const Span& s) { return o < s.base; })[-1];
}

// The element at a flat position, wherever its tensor was allocated; null where another rank has it
floatX* parameter_at(const std::vector<Span>& spans, size_t offset) {
    const Span& s = span_at(spans, offset);
    return offset >= s.offset && offset < s.offset + s.count ? *s.pointer + (offset - s.offset) : nullptr;
}

// Who saves the element at a flat position, and where its run of elements ends
std::pair<int, size_t> owner_of(const std::vector<Span>& spans, size_t offset) {
    const Span& s = span_at(spans, offset);
    size_t part = (offset - s.base) / s.count, at = (offset - s.base) % s.count, r = at / s.share;
    return {s.expert ? (int)(r * expert_group.size + part) : (int)r, offset - at + s.end((int)r)};
}

// Of the flat elements [offset, offset + count), which lie in one tensor, those that this rank updates: body(first of them, where
// their state is, how many)
template <typename Body> void for_updated(const std::vector<Span>& spans, size_t offset, size_t count, Body body) {
    const Span& s = span_at(spans, offset);
    size_t mine = s.offset + s.update_begin(), begin = std::max(offset, mine), end = std::min(offset + count, mine + s.update_count());
    if (begin < end) body(begin, s.state + begin - mine, end - begin);
}

// What backward needs of a layer. Marked 1 or 2: at that --recompute level or above, one buffer for all layers, and computed again.
struct LayerActivations {
    floatX* x;              // (N, C)      residual stream at the layer's input
    floatX* attn_in;        // (N, C)    1 rmsnorm(x)
    float* attn_r;          // (N)         its 1/rms
    floatX* qkv;            // (N, 3C)   2 projections, before norm and rotation
    float* qk_r;            // (N, 2)      1/rms of q and k
    floatX* qk;             // (N, 2C)   1 q and k after norm and rotation
    float* attn_lse;        // (B, H, T)
    floatX* attn;           // (N, C)    2 attention's output, heads side by side
    floatX* x_mid;          // (N, C)    2 residual stream behind attention
    floatX* ffn_in;         // (N, C)    1 rmsnorm(x_mid)
    float* ffn_r;           // (N)
    float* router_logits;   // (N, E)    2
    float* router_probs;    // (N, E)    2
    float* router_lse;      // (N)         one array for all layers: the host reads it
    float* router_partial;  // (SLABS, E)  likewise
    int* experts;           // (N, K)      ids, by probability; likewise
    float* weights;         // (N, K)      their probabilities
    int* counts;            // (E)         rows of each expert; likewise
    int* row_of;            // (R)         row of an assignment
    int* assignment_of;     // (R)         assignment of a row
    floatX* expert_in;      // (R, C)    1 rows of ffn_in by expert; with --ep those that arrived, as all of (R, ...) below
    floatX* gate_up;        // (R, 2F)   2
};

struct Activations {
    int* inputs;            // (N) token ids
    int* targets;           // (N) -100: ignored
    int* touched;           // (N) ids that occur, ...
    int* touched_start;     // (N+1) ... where each one's tokens begin in
    int* touched_tokens;    // (N) the tokens sorted by id
    float* cosine;          // (T, D/2) RoPE tables
    float* sine;            // (T, D/2)
    std::vector<LayerActivations> layers;
    floatX* x;              // (N, C) residual stream behind the last layer
    floatX* final_out;      // (N, C) rmsnorm of it
    float* final_r;         // (N)
    floatX* logits;         // (N, V) overwritten by its gradient in cross_entropy
    float* losses;          // (N)
    // scratch of forward and backward
    float* scores;          // (H, ATTENTION_BLOCK, T)
    floatX* probs;          // (H, ATTENTION_BLOCK, T)
    int* histogram;         // (ceil(R / DISPATCH_SLAB), E)
    floatX* h;              // (R, F)  silu(gate) up; in backward times the weight
    floatX* expert_out;     // (R, C)  in backward the gradient of expert_in
    floatX* routed;         // (R, C)  with --ep: rows of this rank, to be sent or come back
    int* arrivals;          // (E)     with --ep, see exchange_counts
    int* global_counts;     // (L, E)  with --lb global: rows of each expert over all ranks
    // scratch of backward
    floatX* dx;             // (N, C)  gradient of the residual stream, all the way down
    floatX* dbranch;        // (N, C)  gradient inside a branch
    floatX* dattn;          // (N, C)
    float* dqkv32;          // (N, 3C)
    floatX* dqkv;           // (N, 3C)
    float* dprobs;          // (H, ATTENTION_BLOCK, T)
    floatX* dscores;        // (H, ATTENTION_BLOCK, T)
    floatX* drouter;        // (N, E)
    float* drouter_probs;   // (N, E)
    float* dweights;        // (N, K)
    floatX* dexpert_out;    // (R, C)
    float* row_weights;     // (R)     with --ep: weights of this rank's rows, then their gradients
    float* arrived_weights; // (R)     with --ep: of the rows that arrived, and their gradients behind them
    float* arrived_dweights;// (R)
    floatX* dh;             // (R, F)
    floatX* dgate_up;       // (R, 2F)
    float* partial;         // (SLABS, C)
    float* square_sums;     // one for each run of SQUARE_SUM_RUN gradients
};

// A micro-batch's losses; loss is what was differentiated.
struct Losses {
    double loss = 0, lb = 0, z = 0;
    double nll = 0;         // sum of -log p(target) over the targets that count
    int64_t valid = 0;      // their number
};

// Buffers of rows whose number follows the routing, under expert parallelism; an item is a row. They grow when more rows arrive than ever before.
struct RowBuffers : Memory { size_t rows = 0; };

// Keys and values of the sequences that are being generated
struct Cache {
    int S = 0, P = 0;                       // sequences, positions of each
    floatX *keys = nullptr, *values = nullptr;  // (L, S, H, P, D)
    float* scores = nullptr;                // (S, H, P) scratch
    int *slots = nullptr, *positions = nullptr; // (N) of the rows at work
    int* last = nullptr;                    // (S) rows whose logits are asked for
    floatX* x = nullptr;                    // (S, C) their residual stream
    Memory memory;
    bool one = false;                       // the rows at work are one a sequence, not whole prompts
};

struct Olmoe {
    OlmoeConfig config;
    int max_B = 0, max_T = 0, recompute = 0;
    Parameters params, grads;
    std::vector<Span> param_spans, grad_spans;
    Masters masters = BF16 ? Masters::fp32 : Masters::none;
    bool narrow_moments = false;
    void *m = nullptr, *v = nullptr, *master = nullptr;     // AdamW's state, flat, as these two say; see with_state
    Activations acts;
    Memory params_memory, grads_memory, optimizer_memory, acts_memory, backward_memory;

    int B = 0, T = 0, N = 0, R = 0;         // of the micro-batch in acts
    int touched = 0;                        // different ids in it
    std::vector<int> counts;                // (L, E) rows that this rank sends to each expert, on the host
    std::vector<int> arrivals;              // (L, G, E/G) rows that each rank of the expert group sends to each expert here: counts, where G is 1
    std::vector<int> expert_rows;           // (L, E/G) their sums over the ranks
    bool backward = false;                  // allocated for it
    std::vector<RowBuffers> layer_rows;     // (L) with --ep: expert_in and gate_up of a layer, where each keeps its own
    RowBuffers scratch_rows;                // with --ep: what all layers share
    bool lb_global = false;                 // load balancing over the rows of all ranks
    Cache cache;                            // S is 0 but for generation
    std::vector<float> losses, router_lse, router_partial;      // (N), (L, N), (L, SLABS, E) on the host
    std::vector<int> experts;               // (L, N, K) on the host, when asked for
    std::vector<int> targets;               // (N)
};

enum class Use { inference, gradients, training };      // training: gradients and AdamW's state

// Fills in what a model of this shape needs, without allocating: `olmoe info` prints it, olmoe_allocate allocates it. With S > 0 it
// generates S sequences of up to P tokens: then B x T is the largest batch of prompts, and only S rows have logits.
void olmoe_plan(Olmoe* m, const OlmoeConfig& config, int B, int T, int recompute, Use use, int S = 0, int P = 0) {
    m->config = config; m->max_B = B; m->max_T = T; m->recompute = recompute;
    size_t N = (size_t)B * T, C = config.C, E = config.E, K = config.K, F = config.F, V = config.V, L = config.L, R = N * K;
    if (R > INT32_MAX / 2) die("--batch %d x --seq %d is too large for one micro-batch; use a smaller --batch", B, T);

    m->param_spans = parameter_spans(&m->params, config);
    m->grad_spans = parameter_spans(&m->grads, config);
    for (Span& s : m->param_spans) m->params_memory.add(s.pointer, s.allocated());
    bool backward = m->backward = use != Use::inference;
    if (backward) for (Span& s : m->grad_spans) m->grads_memory.add(s.pointer, s.allocated());
    if (use == Use::training) {
        size_t n = num_updated(m->param_spans);
        auto add = [&](void** pointer, size_t bytes) { m->optimizer_memory.add((char**)pointer, n * bytes); };
        add(&m->m, m->narrow_moments ? 2 : 4);
        add(&m->v, m->narrow_moments ? 2 : 4);
        if (m->masters != Masters::none) add(&m->master, m->masters == Masters::remainder ? 2 : 4);
    }

    Activations& a = m->acts;
    a.layers.resize(L);
    Memory& mem = m->acts_memory;
    bool sharing = expert_group.size > 1;
    m->layer_rows.assign(L, {});
    RowBuffers& rows = m->scratch_rows = {};
    mem.add(&a.inputs, N); mem.add(&a.targets, N);
    size_t angles = (size_t)std::max(T, P) * (C / config.H / 2), classified = S > 0 ? S : N;
    mem.add(&a.cosine, angles); mem.add(&a.sine, angles);
    LayerActivations& all = a.layers[0];                     // allocated for all layers at once, see share_activations
    mem.add(&all.router_lse, L * N); mem.add(&all.router_partial, L * SLABS * E); mem.add(&all.experts, L * R); mem.add(&all.counts, L * E);
    for (LayerActivations& l : a.layers) {
        bool first = &l == &all, keep1 = first || recompute < 1, keep2 = first || recompute < 2;
        if (first || backward) mem.add(&l.x, N * C);
        if (keep2 || !backward) mem.add(&l.router_logits, N * E);
        if (!backward && !first) continue;                  // without backward, one layer's buffers serve all, but for the router's logits
        if (keep1) { mem.add(&l.attn_in, N * C); mem.add(&l.qk, N * 2 * C); mem.add(&l.ffn_in, N * C); }
        if (keep1 && sharing) (backward && recompute < 1 ? m->layer_rows[&l - &all] : rows).add(&l.expert_in, C);
        if (keep1 && !sharing) mem.add(&l.expert_in, R * C);
        if (keep2) { mem.add(&l.qkv, N * 3 * C); mem.add(&l.attn, N * C); mem.add(&l.x_mid, N * C); mem.add(&l.router_probs, N * E); }
        if (keep2 && sharing) (backward && recompute < 2 ? m->layer_rows[&l - &all] : rows).add(&l.gate_up, 2 * F);
        if (keep2 && !sharing) mem.add(&l.gate_up, R * 2 * F);
        mem.add(&l.attn_r, N); mem.add(&l.qk_r, N * 2); mem.add(&l.attn_lse, (size_t)config.H * N); mem.add(&l.ffn_r, N);
        mem.add(&l.weights, R); mem.add(&l.row_of, R); mem.add(&l.assignment_of, R);
    }
    size_t square = (size_t)config.H * std::min(ATTENTION_BLOCK, T) * T;
    mem.add(&a.x, N * C); mem.add(&a.final_out, classified * C); mem.add(&a.final_r, classified); mem.add(&a.logits, classified * V); mem.add(&a.losses, N);
    mem.add(&a.scores, square); mem.add(&a.probs, square);
    mem.add(&a.histogram, ceil_div(R, DISPATCH_SLAB) * E); mem.add(&a.global_counts, L * E);
    if (sharing) { mem.add(&a.routed, R * C); mem.add(&a.arrivals, E); rows.add(&a.h, F); rows.add(&a.expert_out, C); }
    else { mem.add(&a.h, R * F); mem.add(&a.expert_out, R * C); }
    Cache& cache = m->cache;
    cache.S = S; cache.P = P;
    if (S > 0) {
        cache.memory.add(&cache.keys, L * S * P * C); cache.memory.add(&cache.values, L * S * P * C); cache.memory.add(&cache.scores, (size_t)S * config.H * P);
        cache.memory.add(&cache.slots, N); cache.memory.add(&cache.positions, N); cache.memory.add(&cache.last, S); cache.memory.add(&cache.x, S * C);
    }
    if (!backward) return;

    Memory& back = m->backward_memory;
    back.add(&a.touched, N); back.add(&a.touched_start, N + 1); back.add(&a.touched_tokens, N);
    back.add(&a.dx, N * C); back.add(&a.dbranch, N * C); back.add(&a.dattn, N * C); back.add(&a.dqkv32, N * 3 * C); back.add(&a.dqkv, N * 3 * C);
    back.add(&a.dprobs, square); back.add(&a.dscores, square);
    back.add(&a.drouter, N * E); back.add(&a.drouter_probs, N * E); back.add(&a.dweights, R);
    if (sharing) {
        back.add(&a.row_weights, R);
        rows.add(&a.dexpert_out, C); rows.add(&a.dh, F); rows.add(&a.dgate_up, 2 * F); rows.add(&a.arrived_weights, 1); rows.add(&a.arrived_dweights, 1);
    } else { back.add(&a.dexpert_out, R * C); back.add(&a.dh, R * F); back.add(&a.dgate_up, R * 2 * F); }
    back.add(&a.partial, SLABS * C);
    size_t runs = 0;
    for (Span& s : m->grad_spans) runs += ceil_div(s.share, SQUARE_SUM_RUN);
    back.add(&a.square_sums, runs);
}

// Layers that share a buffer with layer 0 get its address; arrays over all layers get their layer's part.
void share_activations(Olmoe* m) {
    const OlmoeConfig& c = m->config;
    size_t N = (size_t)m->max_B * m->max_T;
    LayerActivations& first = m->acts.layers[0];
    for (int l = 1; l < c.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        if (!m->backward) { float* logits = a.router_logits; a = first; a.router_logits = logits; }
        if (m->backward && m->recompute >= 1) { a.attn_in = first.attn_in; a.qk = first.qk; a.ffn_in = first.ffn_in; a.expert_in = first.expert_in; }
        if (m->backward && m->recompute >= 2) {
            a.qkv = first.qkv; a.attn = first.attn; a.x_mid = first.x_mid; a.gate_up = first.gate_up;
            a.router_logits = first.router_logits; a.router_probs = first.router_probs;
        }
        a.router_lse = first.router_lse + l * N;
        a.router_partial = first.router_partial + (size_t)l * SLABS * c.E;
        a.experts = first.experts + l * N * c.K;
        a.counts = first.counts + (size_t)l * c.E;
    }
}

// What the plan needs, part by part, and its sum
std::vector<std::pair<std::string, std::string>> memory_plan(const Olmoe& m, double* bytes = nullptr) {
    std::vector<std::pair<std::string, std::string>> plan;
    double sum = 0;
    auto add = [&](const char* what, double bytes, const char* remark = "") { if (bytes > 0) plan.push_back({what, human(bytes, "B") + remark}); sum += bytes; };
    add("parameters", (double)m.params_memory.bytes());
    add("gradients", (double)m.grads_memory.bytes());
    add("optimizer", (double)m.optimizer_memory.bytes());
    add("activations", (double)m.acts_memory.bytes());
    add("backward", (double)m.backward_memory.bytes());
    add("cache", (double)m.cache.memory.bytes());
    size_t rows = (size_t)m.max_B * m.max_T * m.config.K * 5 / 4, arriving = m.scratch_rows.bytes(rows);    // with the quarter that reserve_rows adds
    for (const RowBuffers& r : m.layer_rows) arriving += r.bytes(rows);
    if (expert_group.size > 1) add("arriving rows", (double)arriving, " at even routing");
    add("cuBLAS", (1.0 + EXPERT_STREAMS) * CUBLAS_WORKSPACE_BYTES);
    if (bytes) *bytes = sum;
    plan.push_back({"sum", human(sum, "B") + (world.size > 1 && !NCCL_BY_MPI ? " and NCCL's buffers" : "")});
    return plan;
}

void memory_allocate(const Olmoe& m, Memory* memory, const std::string& what, size_t times = 1) {
    if (memory->allocate(times)) return;
    std::string plan;
    for (auto& [name, size] : memory_plan(m)) plan += (plan.empty() ? "" : ", ") + name + " " + size;
    die("no memory for %s (%s); the plan: %s. Smaller --batch or --seq, or --recompute, make room", what.c_str(), human((double)memory->bytes(times), "B").c_str(), plan.c_str());
}

// Room for so many rows, and a quarter more, in the row buffers of layer l and in those that all layers share. What is in them is lost.
// Waits for the device: growing is rare.
void reserve_rows(Olmoe* m, int l, size_t rows) {
    for (RowBuffers* b : {&m->layer_rows[l], &m->scratch_rows}) {
        if (rows <= b->rows || b->items.empty()) continue;
        if (b->rows > 0) fprintf(stderr, "note: rank %d: %zu rows arrive for the experts of layer %d, there was room for %zu; it grows\n", world.rank, rows, l, b->rows);
        cudaCheck(cudaDeviceSynchronize());
        b->release();
        b->rows = rows + rows / 4;
        memory_allocate(*m, b, text("%zu rows for the experts of layer %d", b->rows, l), b->rows);
    }
    share_activations(m);
}

void olmoe_allocate(Olmoe* m, const OlmoeConfig& config, int B, int T, int recompute, Use use, int S = 0, int P = 0) {
    olmoe_plan(m, config, B, T, recompute, use, S, P);
    memory_allocate(*m, &m->params_memory, "the parameters");
    memory_allocate(*m, &m->acts_memory, "the activations");
    if (S > 0) memory_allocate(*m, &m->cache.memory, "the cache of keys and values");
    if (use != Use::inference) {
        memory_allocate(*m, &m->grads_memory, "the gradients");
        memory_allocate(*m, &m->backward_memory, "backward");
    }
    if (use == Use::training) {
        memory_allocate(*m, &m->optimizer_memory, "the optimizer");
        for (void* moment : {m->m, m->v}) cudaCheck(cudaMemsetAsync(moment, 0, num_updated(m->param_spans) * (m->narrow_moments ? 2 : 4), main_stream.stream));
    }
    for (int l = 0; l < config.L && expert_group.size > 1; l++) reserve_rows(m, l, (size_t)B * T * config.K);
    share_activations(m);

    // RoPE's angles in fp32, as everyone computes them: at position 4000 a more exact product would be another model
    int half = config.C / config.H / 2;
    T = std::max(T, P);
    std::vector<float> cosine((size_t)T * half), sine((size_t)T * half);
    for (int j = 0; j < half; j++) {
        float inverse = (float)(1 / pow((double)config.rope_theta, 2.0 * j / (2 * half)));
        for (int t = 0; t < T; t++) {
            float angle = (float)t * inverse;
            cosine[(size_t)t * half + j] = (float)cos((double)angle);
            sine[(size_t)t * half + j] = (float)sin((double)angle);
        }
    }
    copy_to_device(m->acts.cosine, cosine.data(), cosine.size());
    copy_to_device(m->acts.sine, sine.data(), sine.size());
}

void olmoe_free(Olmoe* m) {
    cudaCheck(cudaDeviceSynchronize());
    for (Memory* mem : {&m->params_memory, &m->grads_memory, &m->optimizer_memory, &m->acts_memory, &m->backward_memory, &m->cache.memory}) mem->release();
    for (RowBuffers& rows : m->layer_rows) rows.release();
    m->scratch_rows.release();
}

// AdamW's state from element `at` on: body(master, m, v), pointers of the types that they are kept in
template <typename Body> void with_state(const Olmoe& model, size_t at, Body body) {
    auto with_moments = [&](auto* master) {
        if (model.narrow_moments) body(master, (__nv_bfloat16*)model.m + at, (__nv_bfloat16*)model.v + at);
        else body(master, (float*)model.m + at, (float*)model.v + at);
    };
    if constexpr (BF16) {
        if (model.masters == Masters::fp32) return with_moments((float*)model.master + at);
        if (model.masters == Masters::remainder) return with_moments((Remainder*)model.master + at);
    }
    with_moments((NoMaster*)nullptr);
}

// n elements of AdamW's state from element `at` on, whose weights are p, as fp32 on the host: to it, and back
void state_to_host(const Olmoe& model, State which, size_t at, const floatX* p, float* to, size_t n) {
    with_state(model, at, [&](auto* master, auto* m, auto* v) {
        std::vector<std::decay_t<decltype(*m)>> moments(which == State::master ? 0 : n);
        std::vector<std::decay_t<decltype(*master)>> masters(n - moments.size());
        std::vector<floatX> weights(masters.size());
        copy_to_host(moments.data(), which == State::m ? m : v, moments.size());
        copy_to_host(masters.data(), master, masters.size());
        copy_to_host(weights.data(), p, weights.size());
        for (size_t i = 0; i < n; i++) to[i] = which == State::master ? master_of(&masters[i], &weights[i]) : (float)moments[i];
    });
}

// A master also sets the weight.
void state_to_device(Olmoe* model, State which, size_t at, floatX* p, const float* from, size_t n) {
    with_state(*model, at, [&](auto* master, auto* m, auto* v) {
        std::vector<std::decay_t<decltype(*m)>> moments(which == State::master ? 0 : n);
        std::vector<std::decay_t<decltype(*master)>> masters(n - moments.size());
        std::vector<floatX> weights(masters.size());
        for (size_t i = 0; i < moments.size(); i++) store(&moments[i], from[i], HALF_AWAY);
        for (size_t i = 0; i < masters.size(); i++) { store(&masters[i], from[i], 0); store(&weights[i], from[i], HALF_AWAY); }
        copy_to_device(which == State::m ? m : v, moments.data(), moments.size());
        copy_to_device(master, masters.data(), masters.size());
        copy_to_device(p, weights.data(), weights.size());
    });
}

void olmoe_init(Olmoe* m, uint64_t seed) {
    for (const Span& s : m->param_spans) {
        auto fill = [&](auto* p, size_t offset, size_t n) {
            if (s.norm && n > 0) LAUNCH(fill_kernel, blocks_for(n), p, n, 1.f);
            else if (n > 0) LAUNCH(init_normal_kernel, blocks_for(n), p, n, offset, seed, m->config.initializer_range);
        };
        fill(*s.pointer, s.offset, s.count);
        if (m->master) with_state(*m, s.state, [&](auto* master, auto*, auto*) { fill(master, s.offset + s.update_begin(), s.update_count()); });
    }
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

constexpr size_t COPY_CHUNK = 1 << 22;      // elements copied or converted at a time

// body(first, count) for parts of [0, n), a thread of the host each
template <typename Body> void on_threads(size_t n, Body body) {
    size_t parts = std::max<size_t>(1, std::min<size_t>(std::thread::hardware_concurrency(), n >> 18));
    std::vector<std::thread> threads;
    for (size_t i = 1; i < parts; i++) threads.emplace_back(body, n * i / parts, n * (i + 1) / parts - n * i / parts);
    body(0, n / parts);
    for (std::thread& t : threads) t.join();
}

// How far rank 0 is, on the terminal; nothing where standard error is none.
struct Progress {
    const char* what;
    double bytes, done = 0, begin = seconds_now(), shown = 0;
    bool on = ranks.rank == 0 && isatty(2);

    Progress(const char* what_, double bytes_) : what(what_), bytes(bytes_) {}
    void add(double n) {
        double now = seconds_now();
        done += n;
        if (!on || now - shown < 0.2) return;
        fprintf(stderr, "\r%s: %.0f %% of %.2f GB, %.2f GB/s ", what, 100 * done / bytes, bytes / 1e9, done / 1e9 / (now - begin));
        shown = now;
    }
    ~Progress() { if (shown > 0) fprintf(stderr, "\r%s: %.2f GB in %.1f s, %.2f GB/s\n", what, done / 1e9, seconds_now() - begin, done / 1e9 / (seconds_now() - begin)); }
};

// Weights from a Hugging Face directory, in the order of the file, of the experts those of this rank. What the file holds as floatX
// goes from its pages straight into place; the rest, and the master copy, is converted by way of a chunk of floats.
void olmoe_load(Olmoe* m, const std::string& dir) {
    ModelWeights weights;
    weights_open(&weights, dir, m->config);
    const std::vector<HfTensor> tensors = hf_tensors(m->config);
    std::vector<size_t> order;
    double bytes = 0;
    for (size_t i = 0; i < tensors.size(); i++)
        if (parameter_at(m->param_spans, tensors[i].offset)) { order.push_back(i); bytes += (double)weights_tensor(weights, i).bytes; }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights_tensor(weights, a).data < weights_tensor(weights, b).data; });

    Progress progress("loading", bytes);
    std::vector<float> chunk;
    std::vector<floatX> narrow;
    for (size_t i : order) {
        const SafeTensor& t = weights_tensor(weights, i);
        const bool same = t.dtype == (BF16 ? "BF16" : "F32");
        for (size_t begin = 0; begin < tensors[i].count; begin += COPY_CHUNK) {
            size_t n = std::min(COPY_CHUNK, tensors[i].count - begin), offset = tensors[i].offset + begin;
            ranks_alive();
            if (same) copy_to_device(parameter_at(m->param_spans, offset), (const floatX*)t.data + begin, n);   // at any alignment
            if (!same || m->master) {
                chunk.resize(n);
                narrow.resize(same ? 0 : n);
                on_threads(n, [&](size_t first, size_t count) {
                    tensor_to_float(chunk.data() + first, t, begin + first, count);
                    for (size_t j = first; j < first + count && !same; j++) if (m->master) store(&narrow[j], chunk[j], HALF_AWAY); else narrow[j] = (floatX)chunk[j];
                });
                if (!same) copy_to_device(parameter_at(m->param_spans, offset), narrow.data(), n);
                if (m->master) for_updated(m->param_spans, offset, n, [&](size_t first, size_t state, size_t count) { state_to_device(m, State::master, state, parameter_at(m->param_spans, first), chunk.data() + (first - offset), count); });
            }
            tensor_read(t, begin, n);
            progress.add((double)(n * dtype_bytes(t.dtype)));
        }
    }
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    weights_close(&weights);
}

// ------------------------------------------------------------------------------------------------
// Forward

// Everything of one layer, from its residual stream x to the next. `again`: for backward, under --recompute 2; stops where
// backward needs no more, and the host has the counts already.
void layer_forward(Olmoe* m, int l, bool again) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerActivations& a = m->acts.layers[l];
    Activations& s = m->acts;
    int N = m->N, R = m->R, C = c.C, E = c.E, K = c.K, F = c.F;
    trace.layer = l;
    ranks_alive();
    int G = expert_group.size, *counts = &m->counts[(size_t)l * E], *arrivals = &m->arrivals[(size_t)l * E], *rows_of = &m->expert_rows[(size_t)l * (E / G)];
    floatX* next = l + 1 < c.L ? m->acts.layers[l + 1].x : s.x;

    rmsnorm_forward(a.attn_in, a.attn_r, a.x, p.attn_norm, N, C, c.rms_norm_eps);
    matmul_forward(main_stream, a.qkv, a.attn_in, p.qkv, N, C, 3 * C);
    Cache& cache = m->cache;
    size_t cached = (size_t)l * cache.S * cache.P * C;
    qk_norm_rope_forward(a.qk, a.qk_r, a.qkv, p.q_norm, p.k_norm, s.cosine, s.sine, cache.one ? cache.positions : nullptr, N, m->T, C, C / c.H, c.rms_norm_eps);
    if (cache.S > 0) cache_store(cache.keys + cached, cache.values + cached, a.qk, a.qkv, cache.slots, cache.positions, N, C, c.H, cache.P);
    if (cache.S > 0 && !cache.one && l + 1 == c.L) return;     // of prompts' last layer only the last tokens matter: olmoe_prefill
    if (cache.one) attention_cached(a.attn, cache.scores, a.qk, cache.keys + cached, cache.values + cached, cache.slots, cache.positions, N, C, c.H, cache.P);
    else attention_forward(a.attn, a.attn_lse, s.scores, s.probs, a.qk, a.qkv, m->B, m->T, C, c.H);
    cudaCheck(cudaMemcpyAsync(a.x_mid, a.x, (size_t)N * C * sizeof(floatX), cudaMemcpyDeviceToDevice, main_stream.stream));
    matmul_forward(main_stream, a.x_mid, a.attn, p.attn_out, N, C, C, 1);

    rmsnorm_forward(a.ffn_in, a.ffn_r, a.x_mid, p.ffn_norm, N, C, c.rms_norm_eps);
    matmul_forward(main_stream, a.router_logits, a.ffn_in, p.router, N, C, E);
    router_forward(a.router_probs, a.router_lse, a.experts, a.weights, a.router_partial, a.router_logits, N, E, K, c.norm_topk_prob);
    dispatch(a.row_of, a.assignment_of, a.counts, s.histogram, a.experts, R, E);
    if (!again) {                           // the matmuls' shapes are given by the host
        copy_to_host(counts, a.counts, E);
        if (G == 1) std::copy(counts, counts + E, arrivals);
        else exchange_counts(arrivals, s.arrivals, a.counts, E, l);
        for (int i = 0; i < E; i++) rows_of[i % (E / G)] += arrivals[i];
        if (G > 1) reserve_rows(m, l, std::accumulate(rows_of, rows_of + E / G, (size_t)0));
    }
    int rows = std::accumulate(rows_of, rows_of + E / G, 0);    // that the experts of this rank compute: R, where there is one rank
    gather(G > 1 ? s.routed : a.expert_in, a.ffn_in, a.assignment_of, R, C, K);
    if (G > 1) exchange_rows(a.expert_in, s.routed, counts, arrivals, E, C, false, "dispatch to the experts", l);
    experts_gate_up(a.gate_up, a.expert_in, p.gate_up, rows_of, E / G, C, F);
    if (again) return;
    swiglu_forward(s.h, a.gate_up, rows, F);
    experts_down(s.expert_out, s.h, p.down, rows_of, E / G, C, F);
    if (G > 1) exchange_rows(s.routed, s.expert_out, counts, arrivals, E, C, true, "return from the experts", l);
    combine(next, a.x_mid, G > 1 ? s.routed : s.expert_out, a.weights, a.row_of, N, C, K);
}

// The residual stream behind the last layer, of a micro-batch of B sequences of T tokens, B and T at most those of olmoe_allocate.
// inputs (B, T) on the host.
void olmoe_layers(Olmoe* m, const int* inputs, int B, int T) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    m->B = B; m->T = T; m->N = B * T; m->R = m->N * c.K;
    m->counts.assign((size_t)c.L * c.E, 0);
    m->arrivals.assign((size_t)c.L * c.E, 0);
    m->expert_rows.assign((size_t)c.L * c.E / expert_group.size, 0);
    for (int t = 0; t < m->N; t++)
        if (inputs[t] < 0 || inputs[t] >= c.V) die("token id %d at position %d of the batch is outside the vocabulary of %d", inputs[t], t, c.V);
    copy_to_device(a.inputs, inputs, m->N);

    embedding_forward(a.layers[0].x, a.inputs, m->params.embed, m->N, c.C);
    for (int l = 0; l < c.L; l++) layer_forward(m, l, false);
}

// Logits (rows, V) of rows of the residual stream
void olmoe_classify(Olmoe* m, const floatX* x /* (rows, C) */, int rows) {
    const OlmoeConfig& c = m->config;
    rmsnorm_forward(m->acts.final_out, m->acts.final_r, x, m->params.final_norm, rows, c.C, c.rms_norm_eps);
    matmul_forward(main_stream, m->acts.logits, m->acts.final_out, m->params.lm_head, rows, c.C, c.V);
}

// Logits of all tokens of a micro-batch, as olmoe_layers takes it
void olmoe_forward(Olmoe* m, const int* inputs, int B, int T) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    olmoe_layers(m, inputs, B, T);
    if (m->lb_global && world.size > 1) {   // the host has waited for the counts: no event is needed before
        collective("sum of the experts' rows", -1, COUNTS, (size_t)c.L * c.E * sizeof(int), [&] {
            ncclCheck(ncclAllReduce(a.layers[0].counts, a.global_counts, (size_t)c.L * c.E, ncclInt, ncclSum, world.comm, comm_stream));
        });
        main_after_comm();
    }
    olmoe_classify(m, a.x, m->N);
}

// Generation: runs rows through the layers, keeps their keys and values in the cache, and leaves the logits of n of them in acts.logits.
// Prompts: B sequences in the slots given, each filled up to T tokens behind its own, whose logits are those of its last token. What
// the filling leaves in the cache is overwritten before it is read. The last layer gives its keys and values; the last tokens then
// go through it as in olmoe_decode.
void olmoe_prefill(Olmoe* m, const int* inputs /* (B, T) */, const int* slots /* (B) */, const int* lengths /* (B) */, int B, int T) {
    std::vector<int> slot(B * T), position(B * T), last(B), last_position(B);
    for (int t = 0; t < B * T; t++) { slot[t] = slots[t / T]; position[t] = t % T; }
    for (int b = 0; b < B; b++) { last_position[b] = lengths[b] - 1; last[b] = b * T + last_position[b]; }
    copy_to_device(m->cache.slots, slot.data(), slot.size());
    copy_to_device(m->cache.positions, position.data(), position.size());
    copy_to_device(m->cache.last, last.data(), last.size());
    m->cache.one = false;
    olmoe_layers(m, inputs, B, T);

    int L = m->config.L, C = m->config.C;
    gather(m->cache.x, m->acts.layers[L - 1].x, m->cache.last, B, C, 1);
    cudaCheck(cudaMemcpyAsync(m->acts.layers[L - 1].x, m->cache.x, (size_t)B * C * sizeof(floatX), cudaMemcpyDeviceToDevice, main_stream.stream));
    copy_to_device(m->cache.slots, slots, B);
    copy_to_device(m->cache.positions, last_position.data(), B);
    m->cache.one = true;
    m->N = B; m->T = 1; m->R = B * m->config.K;
    layer_forward(m, L - 1, false);
    olmoe_classify(m, m->acts.x, B);
}

// One token each of n sequences
void olmoe_decode(Olmoe* m, const int* inputs /* (n) */, const int* slots /* (n) */, const int* positions /* (n) */, int n) {
    copy_to_device(m->cache.slots, slots, n);
    copy_to_device(m->cache.positions, positions, n);
    m->cache.one = true;
    olmoe_layers(m, inputs, n, 1);
    olmoe_classify(m, m->acts.x, n);
}

// Cross entropy against targets (B, T) on the host, -100 = ignored. With a scale other than 0 the logits become their gradient.
void olmoe_cross_entropy(Olmoe* m, const int* targets, float scale) {
    m->targets.assign(targets, targets + m->N);
    for (int t = 0; t < m->N; t++)
        if (targets[t] != -100 && (targets[t] < 0 || targets[t] >= m->config.V)) die("target %d at position %d of the batch is outside the vocabulary of %d", targets[t], t, m->config.V);
    copy_to_device(m->acts.targets, targets, m->N);
    cross_entropy(m->acts.losses, m->acts.logits, m->acts.targets, m->N, m->config.V, scale);
}

// Waits for the device and returns the losses of the micro-batch; lb and z by the formulas above router_forward_kernel, lb with
// lb_global over the rows of all ranks.
// ce_scale is what its sum of -log p counts in `loss` (1 / divisor).
Losses olmoe_losses(Olmoe* m, double ce_scale, double lb_coef = 0, double z_coef = 0) {
    const OlmoeConfig& c = m->config;
    size_t N = m->N, E = c.E, stride = (size_t)m->max_B * m->max_T;
    m->losses.resize(N);
    m->router_lse.resize(c.L * stride);
    m->router_partial.resize((size_t)c.L * SLABS * E);
    copy_to_host(m->losses.data(), m->acts.losses, N);
    copy_to_host(m->router_lse.data(), m->acts.layers[0].router_lse, m->router_lse.size());
    copy_to_host(m->router_partial.data(), m->acts.layers[0].router_partial, m->router_partial.size());

    Losses r;
    for (size_t t = 0; t < N; t++)
        if (m->targets[t] >= 0) { r.nll += m->losses[t]; r.valid++; }
    std::vector<double> counts(m->counts.begin(), m->counts.end()), p(c.L * E, 0);      // (L, E) rows; sum of p over the tokens
    for (int l = 0; l < c.L; l++) {
        for (size_t i = 0; i < E; i++)
            for (int slab = 0; slab < slabs_for(m->N); slab++) p[l * E + i] += m->router_partial[((size_t)l * SLABS + slab) * E + i];
        for (size_t t = 0; t < N; t++) r.z += (double)m->router_lse[l * stride + t] * m->router_lse[l * stride + t];
    }
    double tokens = (double)N;
    if (m->lb_global && lb_coef != 0) { host_sum(&counts); host_sum(&p); tokens *= world.size; }
    for (size_t i = 0; i < c.L * E; i++) r.lb += counts[i] * (p[i] / tokens);
    r.lb *= lb_coef * E / (c.L * tokens * c.K);
    r.z *= z_coef / ((double)c.L * N * c.K);
    r.loss = r.nll * ce_scale + r.lb + r.z;
    return r;
}

// ------------------------------------------------------------------------------------------------
// Backward

// The inverse of the embedding's look-up: which ids occur, and where. By the host, because a sort by id keeps the positions in order.
void index_tokens(Olmoe* m, const int* inputs) {
    std::vector<int> tokens(m->N), touched, start;
    for (int t = 0; t < m->N; t++) tokens[t] = t;
    std::stable_sort(tokens.begin(), tokens.end(), [&](int a, int b) { return inputs[a] < inputs[b]; });
    for (int i = 0; i < m->N; i++)
        if (i == 0 || inputs[tokens[i]] != inputs[tokens[i - 1]]) { touched.push_back(inputs[tokens[i]]); start.push_back(i); }
    start.push_back(m->N);
    m->touched = (int)touched.size();
    copy_to_device(m->acts.touched, touched.data(), touched.size());
    copy_to_device(m->acts.touched_start, start.data(), start.size());
    copy_to_device(m->acts.touched_tokens, tokens.data(), tokens.size());
}

// layer_forward backwards. dx is the gradient of the residual stream: behind the layer when this is called, before it afterwards.
// Calls exchanged() behind its last exchange of rows, where there is one.
template <typename Body> void layer_backward(Olmoe* m, int l, float lb_scale, float z_scale, Body exchanged) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerParameters& g = m->grads.layers[l];
    LayerActivations& a = m->acts.layers[l];
    Activations& s = m->acts;
    int N = m->N, R = m->R, C = c.C, E = c.E, K = c.K, F = c.F;
    trace.layer = l;
    ranks_alive();
    int G = expert_group.size, rows = std::accumulate(&m->expert_rows[(size_t)l * (E / G)], &m->expert_rows[(size_t)(l + 1) * (E / G)], 0);
    const int *counts = &m->counts[(size_t)l * E], *arrivals = &m->arrivals[(size_t)l * E], *rows_of = &m->expert_rows[(size_t)l * (E / G)];

    if (m->recompute >= 2) {
        layer_forward(m, l, true);
    } else if (m->recompute >= 1) {
        rmsnorm_forward(a.attn_in, a.attn_r, a.x, p.attn_norm, N, C, c.rms_norm_eps);
        qk_norm_rope_forward(a.qk, a.qk_r, a.qkv, p.q_norm, p.k_norm, s.cosine, s.sine, nullptr, N, m->T, C, C / c.H, c.rms_norm_eps);
        rmsnorm_forward(a.ffn_in, a.ffn_r, a.x_mid, p.ffn_norm, N, C, c.rms_norm_eps);
        gather(G > 1 ? s.routed : a.expert_in, a.ffn_in, a.assignment_of, R, C, K);
        if (G > 1) exchange_rows(a.expert_in, s.routed, counts, arrivals, E, C, false, "dispatch to the experts", l);
    }

    // experts: x = x_mid + sum_k w y, so dx goes on to x_mid as it is, and to the experts
    gather(G > 1 ? s.routed : s.dexpert_out, s.dx, a.assignment_of, R, C, K);
    if (G > 1) {                            // the rows' gradients and weights go to the experts, ...
        gather(s.row_weights, a.weights, a.assignment_of, R, 1, 1);
        exchange_rows(s.dexpert_out, s.routed, counts, arrivals, E, C, false, "gradients to the experts", l);
        exchange_rows(s.arrived_weights, s.row_weights, counts, arrivals, E, 1, false, "weights to the experts", l);
    }
    experts_backward(s.expert_out, g.gate_up, g.down, G > 1 ? s.arrived_dweights : s.dweights, s.dh, s.h, s.dgate_up, s.dexpert_out, a.expert_in, a.gate_up,
                     G > 1 ? s.arrived_weights : a.weights, G > 1 ? nullptr : a.assignment_of, p.gate_up, p.down, rows_of, rows, E / G, C, F);
    if (G > 1) {                            // ... and come back as those of their inputs and weights
        exchange_rows(s.routed, s.expert_out, counts, arrivals, E, C, true, "gradients from the experts", l);
        exchange_rows(s.row_weights, s.arrived_dweights, counts, arrivals, E, 1, true, "weight gradients from the experts", l);
        gather(s.dweights, s.row_weights, a.row_of, R, 1, 1);
        exchanged();
    }
    combine(s.dbranch, nullptr, G > 1 ? s.routed : s.expert_out, nullptr, a.row_of, N, C, K);
    router_backward(s.drouter, s.drouter_probs, s.dweights, a.router_probs, a.router_lse, a.experts, a.weights, m->lb_global && world.size > 1 ? s.global_counts + (size_t)l * E : a.counts, N, E, K, c.norm_topk_prob, lb_scale, z_scale);
    matmul_backward_weight(main_stream, g.router, s.drouter, a.ffn_in, N, C, E);
    matmul_backward_input(main_stream, s.dbranch, s.drouter, p.router, N, C, E, 1);
    rmsnorm_backward(s.dx, g.ffn_norm, s.partial, s.dbranch, a.x_mid, p.ffn_norm, a.ffn_r, N, C);

    // attention: x_mid = x + attn W^T
    matmul_backward_weight(main_stream, g.attn_out, s.dx, a.attn, N, C, C);
    matmul_backward_input(main_stream, s.dattn, s.dx, p.attn_out, N, C, C);
    attention_backward(s.dqkv32, s.scores, s.probs, s.dprobs, s.dscores, s.dattn, a.qk, a.qkv, a.attn_lse, m->B, m->T, C, c.H);
    qk_norm_rope_backward(s.dqkv, g.q_norm, g.k_norm, s.partial, s.dqkv32, a.qkv, a.qk_r, p.q_norm, p.k_norm, s.cosine, s.sine, N, m->T, C, C / c.H);
    matmul_backward_weight(main_stream, g.qkv, s.dqkv, a.attn_in, N, C, 3 * C);
    matmul_backward_input(main_stream, s.dbranch, s.dqkv, p.qkv, N, C, 3 * C);
    rmsnorm_backward(s.dx, g.attn_norm, s.partial, s.dbranch, a.x, p.attn_norm, a.attn_r, N, C);
}

// Sums the gradients of tensors first .. last-1 over the ranks that hold them, or of each the rank's share under ZeRO-1, while the main
// stream goes on.
void reduce_gradients(Olmoe* m, size_t first, size_t last, int layer) {
    for (bool expert : {false, true}) {
        const Group& group = expert ? replica_group : world;
        size_t bytes = 0;
        for (size_t i = first; i < last; i++) if (m->grad_spans[i].expert == expert) bytes += m->grad_spans[i].allocated() * sizeof(floatX);
        if (group.size == 1 || bytes == 0) continue;
        comm_after_main();
        collective(expert ? "reduction of the experts' gradients" : "reduction of gradients", layer, GRADIENTS, bytes, [&] {
            for (size_t i = first; i < last; i++) {
                const Span& s = m->grad_spans[i];
                if (s.expert != expert) continue;
                floatX* g = *s.pointer;
                if (zero) ncclCheck(ncclReduceScatter(g, g + group.rank * s.share, s.share, nccl_type(g), ncclSum, group.comm, comm_stream));
                else ncclCheck(ncclAllReduce(g, g, s.count, nccl_type(g), ncclSum, group.comm, comm_stream));
            }
        });
    }
}

// Adds the micro-batch's gradients to grads, after olmoe_forward on the same inputs and olmoe_cross_entropy with a scale.
// The auxiliary losses count 1 / (micro_batches * ranks) each. In the `last` micro-batch of a step each layer's gradients are summed over
// the ranks as soon as they are complete, while the main stream goes on with the layer below. With --ep they are summed a little later,
// behind the exchanges of the layer below: these, in the same stream, would wait for the sum, and the main stream for them.
void olmoe_backward(Olmoe* m, const int* inputs, double lb_coef, double z_coef, int micro_batches, bool last = false) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    double N = m->N, LNK = c.L * N * c.K * micro_batches * world.size, lb_tokens = m->lb_global ? N * world.size : N;
    size_t tensors = m->grad_spans.size();
    index_tokens(m, inputs);

    matmul_backward_weight(main_stream, m->grads.lm_head, a.logits, a.final_out, m->N, c.C, c.V);
    matmul_backward_input(main_stream, a.dbranch, a.logits, m->params.lm_head, m->N, c.C, c.V);
    cudaCheck(cudaMemsetAsync(a.dx, 0, (size_t)m->N * c.C * sizeof(floatX), main_stream.stream));
    rmsnorm_backward(a.dx, m->grads.final_norm, a.partial, a.dbranch, a.x, m->params.final_norm, a.final_r, m->N, c.C);
    struct { size_t first, last; int layer; } complete = {tensors - 2, tensors, -1};       // gradients that are not yet summed
    auto reduce = [&] { if (last) reduce_gradients(m, complete.first, complete.last, complete.layer); };
    bool later = expert_group.size > 1;
    if (!later) reduce();
    for (int l = c.L - 1; l >= 0; l--) {
        layer_backward(m, l, (float)(lb_coef * c.E / (LNK * lb_tokens)), (float)(2 * z_coef / LNK), reduce);
        complete = {FIRST_LAYER_TENSOR + (size_t)l * LAYER_TENSORS, FIRST_LAYER_TENSOR + (size_t)(l + 1) * LAYER_TENSORS, l};
        if (!later) reduce();
    }
    if (later) reduce();
    embedding_backward(m->grads.embed, a.dx, a.touched, a.touched_start, a.touched_tokens, m->touched, c.C);
    if (last) { reduce_gradients(m, 0, FIRST_LAYER_TENSOR, -1); main_after_comm(); }
}

// ------------------------------------------------------------------------------------------------
// Update

void olmoe_zero_grad(Olmoe* m) {
    for (const Span& s : m->grad_spans) cudaCheck(cudaMemsetAsync(*s.pointer, 0, s.count * sizeof(floatX), main_stream.stream));
}

// Global L2 norm of the gradients. Where it is not finite, *bad is the first tensor's span that is not.
double olmoe_grad_norm(Olmoe* m, const Span** bad = nullptr) {
    size_t runs = 0;
    for (const Span& s : m->grad_spans) {
        size_t begin = s.begin(s.group().rank), n = s.end(s.group().rank) - begin;      // each rank its share, the sums are added
        if (n == 0) continue;
        LAUNCH(square_sum_kernel, blocks_for_rows(ceil_div(n, SQUARE_SUM_RUN)), m->acts.square_sums + runs, *s.pointer + begin, n);
        runs += ceil_div(n, SQUARE_SUM_RUN);
    }
    std::vector<float> sums(runs);
    copy_to_host(sums.data(), m->acts.square_sums, runs);

    std::vector<double> squares;            // by tensor
    size_t run = 0;
    for (const Span& s : m->grad_spans) {
        squares.push_back(0);
        for (size_t end = run + ceil_div(s.end(s.group().rank) - s.begin(s.group().rank), SQUARE_SUM_RUN); run < end; run++) squares.back() += sums[run];
    }
    host_sum(&squares);
    double total = 0;
    if (bad) *bad = nullptr;
    for (size_t i = 0; i < squares.size(); i++) {
        if (bad && !*bad && !std::isfinite(squares[i])) *bad = &m->grad_spans[i];
        total += squares[i];
    }
    return sqrt(total);
}

struct AdamWOptions { double lr = 4e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0; uint64_t seed = 6198; };

// Under ZeRO-1: the shares of tensors first .. last-1 that the others updated, while the main stream goes on.
void gather_parameters(Olmoe* m, size_t first, size_t last, int layer) {
    for (bool expert : {false, true}) {
        const Group& group = expert ? replica_group : world;
        size_t bytes = 0;
        for (size_t i = first; i < last; i++) if (m->param_spans[i].expert == expert) bytes += m->param_spans[i].share * sizeof(floatX);
        if (!zero || group.size == 1 || bytes == 0) continue;
        comm_after_main();
        collective(expert ? "gathering of the experts" : "gathering of parameters", layer, PARAMETERS, bytes, [&] {
            for (size_t i = first; i < last; i++) {
                const Span& s = m->param_spans[i];
                if (s.expert == expert) ncclCheck(ncclAllGather(*s.pointer + group.rank * s.share, *s.pointer, s.share, nccl_type(*s.pointer), group.comm, comm_stream));
            }
        });
    }
}

// One AdamW step, step = 1, 2, ...; clips as torch.nn.utils.clip_grad_norm_ does.
void olmoe_update(Olmoe* m, int64_t step, double grad_norm, const AdamWOptions& o) {
    float grad_scale = o.grad_clip > 0 ? (float)std::min(1.0, o.grad_clip / (grad_norm + 1e-6)) : 1.f;
    for (size_t i = 0; i < m->param_spans.size(); i++) {
        const Span& s = m->param_spans[i];
        size_t begin = s.update_begin(), n = s.update_count();
        if (n > 0)
            with_state(*m, s.state, [&](auto* master, auto* moment1, auto* moment2) {
                adamw(*s.pointer + begin, master, *m->grad_spans[i].pointer + begin, moment1, moment2, n, step, grad_scale, o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.seed, s.offset + begin);
            });
        bool layer_end = i >= FIRST_LAYER_TENSOR && (i - FIRST_LAYER_TENSOR + 1) % LAYER_TENSORS == 0 && i + 2 < m->param_spans.size();
        if (layer_end) gather_parameters(m, i + 1 - LAYER_TENSORS, i + 1, (int)((i - FIRST_LAYER_TENSOR) / LAYER_TENSORS));
    }
    gather_parameters(m, 0, FIRST_LAYER_TENSOR, -1);
    gather_parameters(m, m->param_spans.size() - 2, m->param_spans.size(), -1);
    if (zero) main_after_comm();
}

// ------------------------------------------------------------------------------------------------
// Command-line options: one table parses, checks and prints --help

struct Option {
    enum Kind { INTEGER, NUMBER, STEPS, TEXT, CHOICE, LIST, FLAG, MAYBE };
    const char* name;
    Kind kind;
    void* value;            // int64_t, double, std::string (STEPS, TEXT, CHOICE, MAYBE), std::vector<std::string>, bool
    const char* values;     // what stands for the value in --help; the words of a CHOICE, between |
    const char* help;
    double min = 0, max = 1e18;
};

std::string option_default(const Option& o) {
    char text[64] = "";
    if (o.kind == Option::INTEGER) snprintf(text, sizeof text, "%ld", *(int64_t*)o.value);
    if (o.kind == Option::NUMBER) snprintf(text, sizeof text, "%g", *(double*)o.value);
    if (o.kind == Option::INTEGER || o.kind == Option::NUMBER) return text;
    if (o.kind == Option::LIST || o.kind == Option::FLAG || o.kind == Option::MAYBE) return "";
    return *(std::string*)o.value;
}

void options_help(const char* usage, const std::vector<Option>& options) {
    printf("usage: olmoe %s\n", usage);
    for (const Option& o : options) {
        std::string left = std::string("--") + o.name + (o.kind == Option::FLAG ? "" : std::string(" ") + o.values), fallback = option_default(o);
        printf("  %-34s %s%s\n", left.c_str(), o.help, fallback.empty() ? "" : (" (" + fallback + ")").c_str());
    }
}

// Fills the values of `options` from the arguments behind the command. `rest` takes what belongs to no option, or is null.
void options_parse(int argc, char** argv, const char* usage, const std::vector<Option>& options, std::vector<std::string>* rest = nullptr) {
    for (int i = 2; i < argc; i++) {
        std::string arg = argv[i];
        if (arg == "--help" || arg == "-h") { options_help(usage, options); exit(0); }
        if (arg.compare(0, 2, "--") != 0) {
            if (!rest) die("unexpected argument '%s'; see olmoe %s --help", argv[i], argv[1]);
            rest->push_back(arg);
            continue;
        }
        const Option* o = nullptr;
        for (const Option& candidate : options) if (arg == std::string("--") + candidate.name) o = &candidate;
        if (!o) die("unknown option '%s'; see olmoe %s --help", argv[i], argv[1]);
        bool another = i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0;
        if (o->kind == Option::FLAG) { *(bool*)o->value = true; continue; }
        if (o->kind == Option::MAYBE) { *(std::string*)o->value = another ? argv[++i] : "newest"; continue; }
        if (o->kind == Option::LIST) {
            if (!another) die("option %s needs at least one value", argv[i]);
            while (i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0) ((std::vector<std::string>*)o->value)->push_back(argv[++i]);
            continue;
        }
        if (i + 1 >= argc || (!another && o->kind != Option::TEXT)) die("option %s needs a value: %s", argv[i], o->values);
        const char* text = argv[++i];
        if (o->kind == Option::TEXT || o->kind == Option::STEPS) { *(std::string*)o->value = text; continue; }
        if (o->kind == Option::CHOICE) {
            if (strchr(text, '|') || ("|" + std::string(o->values) + "|").find("|" + std::string(text) + "|") == std::string::npos) die("option %s: '%s' is not one of %s", argv[i - 1], text, o->values);
            *(std::string*)o->value = text;
            continue;
        }
        char* end;
        double number = strtod(text, &end);
        if (*text == 0 || *end || !(number >= o->min && number <= o->max)) die("option %s: '%s' is not a number from %.10g to %.10g", argv[i - 1], text, o->min, o->max);
        if (o->kind == Option::NUMBER) { *(double*)o->value = number; continue; }
        if (number != std::floor(number)) die("option %s: '%s' is not a whole number", argv[i - 1], text);
        *(int64_t*)o->value = (int64_t)number;
    }
}

// A number of steps, or of tokens where a T stands behind it ("5e12T"), in steps of tokens_per_step
double parse_steps(const char* option, const std::string& text, double tokens_per_step) {
    char* end;
    double number = strtod(text.c_str(), &end);
    if (end == text.c_str() || (*end && strcmp(end, "T") != 0) || !(number >= 0 && number <= 1e18) || (!*end && number != std::floor(number)))
        die("option --%s: '%s' is not a whole number of steps, or of tokens with a T behind it (5e12T)", option, text.c_str());
    return *end ? number / tokens_per_step : number;
}

// ------------------------------------------------------------------------------------------------
// Learning rate

struct Schedule {
    std::string kind = "cosine";
    double lr = 4e-4, min_lr = 4e-5;
    double warmup = 0, total = 1;           // in steps; fractions come from counts of tokens
};

// Learning rate of step s = 1, 2, ..., as OLMo counts: the tokens of step s are already seen. Warm-up is linear from 0.1 lr. The
// cosine and the line end at min_lr after `total` steps; anneal is a line from lr to 0 without warm-up (OLMoE's last 100 B tokens).
double learning_rate(const Schedule& s, double step) {
    if (s.kind == "anneal") return s.lr * std::max(0.0, 1 - step / s.total);
    if (step < s.warmup) return s.lr * (0.1 + 0.9 * step / s.warmup);
    if (s.kind == "constant") return s.lr;
    double x = s.total > s.warmup ? std::min(1.0, (step - s.warmup) / (s.total - s.warmup)) : 1;
    if (s.kind == "linear") return s.lr + (s.min_lr - s.lr) * x;
    return s.min_lr + (s.lr - s.min_lr) * (1 + cos(M_PI * x)) / 2;
}

// ------------------------------------------------------------------------------------------------
// Numbers about a model and a machine

// Forward and backward, causal attention counted as half of its square: 2 FLOP a weight and token forward, twice that backward
double flops_per_token(const OlmoeConfig& c, int T) {
    return 6.0 * (num_active_parameters(c) - (double)c.V * c.C) + 6.0 * c.L * c.C * (double)T;
}

std::string human_time(double seconds) {
    char text[64];
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60) snprintf(text, sizeof text, "%ds", (int)s);
    else if (s < 3600) snprintf(text, sizeof text, "%dm%02ds", (int)(s / 60), (int)(s % 60));
    else snprintf(text, sizeof text, "%ldh%02dm", s / 3600, (int)(s % 3600 / 60));
    return text;
}

// A table in a box: rows of key and value; an empty key is a rule
void print_box(const std::vector<std::pair<std::string, std::string>>& rows) {
    size_t key = 0, value = 0;
    for (auto& r : rows) { key = std::max(key, r.first.size()); value = std::max(value, r.second.size()); }
    std::string rule = "+" + std::string(key + 2, '-') + "+" + std::string(value + 2, '-') + "+";
    printf("%s\n", rule.c_str());
    for (auto& r : rows) {
        if (r.first.empty()) printf("%s\n", rule.c_str());
        else printf("| %-*s | %-*s |\n", (int)key, r.first.c_str(), (int)value, r.second.c_str());
    }
    printf("%s\n", rule.c_str());
}

void box_shapes(std::vector<std::pair<std::string, std::string>>* box, const OlmoeConfig& c) {
    box->push_back({"layers, channels, heads", text("L %d  C %d  H %d (of size %d)", c.L, c.C, c.H, c.C / c.H)});
    box->push_back({"experts", text("%d of %d for each token, width %d", c.K, c.E, c.F)});
    box->push_back({"vocabulary", text("%d", c.V)});
    box->push_back({"parameters", text("%zu (%s)", num_parameters(c), human((double)num_parameters(c)).c_str())});
    box->push_back({"active", text("%zu (%s)", num_active_parameters(c), human((double)num_active_parameters(c)).c_str())});
}

void box_memory(std::vector<std::pair<std::string, std::string>>* box, const Olmoe& m) {
    for (auto& [name, size] : memory_plan(m)) box->push_back({"memory: " + name, size});
}

// FLOP/s of a large matmul in floatX, which stands for the machine's peak
double measure_peak() {
    double best = 0;
    for (int n = 1024; n <= 8192; n *= 2) {
        floatX *a, *b, *c;
        for (floatX** p : {&a, &b, &c}) { cudaCheck(cudaMalloc((void**)p, (size_t)n * n * sizeof(floatX))); cudaCheck(cudaMemset(*p, 0, (size_t)n * n * sizeof(floatX))); }
        double seconds = 0;
        for (int i = 0; i < 4; i++) {
            cudaCheck(cudaDeviceSynchronize());
            double start = seconds_now();
            matmul_forward(main_stream, c, a, b, n, n, n);
            cudaCheck(cudaStreamSynchronize(main_stream.stream));
            seconds = seconds_now() - start;
            best = std::max(best, 2.0 * n * n * n / seconds);
        }
        for (floatX* p : {a, b, c}) cudaCheck(cudaFree(p));
        if (seconds > 2e-3) break;
    }
    return best;
}

std::string machine_name() {
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, main_device));
    return p.name;
}

// ------------------------------------------------------------------------------------------------
// Expert balance: rows that each expert of each layer received

struct Balance {
    int L = 0, E = 0;
    std::vector<double> counts;             // (L, E)
    void reset(const OlmoeConfig& c) { L = c.L; E = c.E; counts.assign((size_t)L * E, 0); }
    void add(const Olmoe& m) { for (size_t i = 0; i < counts.size(); i++) counts[i] += m.counts[i]; }
};

struct LayerBalance { double max_over_mean = 0, entropy = 0; int dead = 0; };   // entropy of the load over ln E: 1 is even

LayerBalance layer_balance(const Balance& b, int l) {
    LayerBalance r;
    double sum = 0, max = 0;
    for (int e = 0; e < b.E; e++) { sum += b.counts[l * b.E + e]; max = std::max(max, b.counts[l * b.E + e]); }
    for (int e = 0; e < b.E; e++) {
        double share = sum > 0 ? b.counts[l * b.E + e] / sum : 0;
        if (share > 0) r.entropy -= share * log(share);
        else r.dead++;
    }
    r.entropy = b.E > 1 ? r.entropy / log((double)b.E) : 1;
    r.max_over_mean = sum > 0 ? max * b.E / sum : 0;
    return r;
}

void print_balance(const Balance& b) {
    printf("  experts by layer, max/mean load (entropy, dead):");
    for (int l = 0; l < b.L; l++) {
        LayerBalance r = layer_balance(b, l);
        printf("%s %.2f (%.3f, %d)", l ? "," : "", r.max_over_mean, r.entropy, r.dead);
    }
    printf("\n");
}

// Which experts read which kind of text: assignments (L, domains, E) over a validation file whose documents are known
struct DomainTable {
    std::vector<Document> documents;        // by position in the file
    std::vector<std::string> names;
    std::vector<int> domain_of;             // (documents)
    std::vector<double> counts;             // (L, domains, E)
};

// None where the documents' ids name more than 64: they are numbers of documents then.
void domains_open(DomainTable* d, const std::string& npy, const OlmoeConfig& c) {
    d->documents = documents_read(npy);
    for (const Document& doc : d->documents) {
        std::string name = document_domain(doc);
        size_t i = std::find(d->names.begin(), d->names.end(), name) - d->names.begin();
        if (i == d->names.size()) d->names.push_back(name);
        if (d->names.size() > 64) { *d = {}; return; }
        d->domain_of.push_back((int)i);
    }
    d->counts.assign((size_t)c.L * d->names.size() * c.E, 0);
}

// Adds the micro-batch in m, whose tokens stand in the file from `first` on.
void domains_add(DomainTable* d, Olmoe* m, size_t first) {
    const OlmoeConfig& c = m->config;
    size_t stride = (size_t)m->max_B * m->max_T * c.K, documents = d->documents.size();
    m->experts.resize(c.L * stride);
    copy_to_host(m->experts.data(), m->acts.layers[0].experts, m->experts.size());
    size_t doc = 0;
    for (int t = 0; t < m->N; t++) {
        while (doc < documents && (size_t)d->documents[doc].end <= first + t) doc++;
        if (doc == documents) return;
        for (int l = 0; l < c.L; l++)
            for (int k = 0; k < c.K; k++)
                d->counts[((size_t)l * d->names.size() + d->domain_of[doc]) * c.E + m->experts[l * stride + (size_t)t * c.K + k]]++;
    }
}

// For each layer how many bits an assignment's expert tells about its domain, and for the layer where that is most, the share of
// each domain's assignments that each expert gets (100/E would be no preference).
void print_domains(const DomainTable& d, const OlmoeConfig& c) {
    size_t M = d.names.size(), E = c.E;
    std::vector<double> bits(c.L, 0);
    std::vector<double> share(d.counts.size());
    for (int l = 0; l < c.L; l++) {
        for (size_t i = 0; i < M; i++) {
            double sum = 0;
            for (size_t e = 0; e < E; e++) sum += d.counts[(l * M + i) * E + e];
            for (size_t e = 0; e < E; e++) share[(l * M + i) * E + e] = sum > 0 ? d.counts[(l * M + i) * E + e] / sum : 0;
        }
        for (size_t e = 0; e < E; e++) {
            double mean = 0;
            for (size_t i = 0; i < M; i++) mean += share[(l * M + i) * E + e] / M;
            for (size_t i = 0; i < M; i++)
                if (share[(l * M + i) * E + e] > 0) bits[l] += share[(l * M + i) * E + e] / M * log2(share[(l * M + i) * E + e] / mean);
        }
    }
    int best = (int)(std::max_element(bits.begin(), bits.end()) - bits.begin());
    printf("experts by domain: an assignment's expert tells, of %.2f bits of domain,", log2((double)M));
    for (int l = 0; l < c.L; l++) printf("%s %.2f in layer %d", l ? "," : "", bits[l], l);
    printf("\nlayer %d, %% of a domain's assignments (%.1f = no preference; * = twice that or more):\n  expert", best, 100.0 / E);
    for (size_t e = 0; e < E; e++) printf(" %5zu", e);
    printf("\n");
    for (size_t i = 0; i < M; i++) {
        printf("  %-12s", d.names[i].c_str());
        for (size_t e = 0; e < E; e++) {
            double s = share[(best * M + i) * E + e];
            printf("%s%4.1f%s", e ? " " : "", 100 * s, s * E >= 2 ? "*" : " ");
        }
        printf("\n");
    }
}

// ------------------------------------------------------------------------------------------------
// Sampled text, and validation

// Continues `ids` by up to `count` tokens with the window of tokens that the model was allocated for, and returns what they say.
// The random numbers depend on seed and position alone.
std::string sample_text(Olmoe* m, const Tokenizer& tokenizer, std::vector<int> ids, int count, double temperature, uint64_t seed) {
    std::string said;
    std::vector<floatX> logits(m->config.V);
    std::vector<double> p(tokenizer.vocab);
    for (int i = 0; i < count; i++) {
        int T = (int)std::min<size_t>(ids.size(), m->max_T);
        olmoe_forward(m, ids.data() + ids.size() - T, 1, T);
        copy_to_host(logits.data(), m->acts.logits + (size_t)(T - 1) * m->config.V, logits.size());
        double max = -INFINITY, sum = 0;
        for (size_t v = 0; v < p.size(); v++) max = std::max(max, (double)(float)logits[v]);
        for (size_t v = 0; v < p.size(); v++) sum += p[v] = exp(((double)(float)logits[v] - max) / temperature);
        double r = uniform(philox(seed, i).x[0]) * sum;
        int next = 0;
        while (next + 1 < (int)p.size() && r >= p[next]) r -= p[next++];
        next = (int)host_sum(world.rank == 0 ? next : 0);           // rounding may differ between ranks, the text may not
        if (next == tokenizer.eos) break;
        said += tokenizer_decode(tokenizer, next);
        ids.push_back(next);
    }
    return said;
}

struct Validation { double loss = 0, bits_per_byte = 0; };   // nats a token; bits a byte where tokens are bytes, EOS not counted as one

// One pass over the sequences of a file, or over its first max_batches batches where that is not 0. The ranks take turns; one that has
// no batch left joins the others' exchanges with a row that counts for nothing.
Validation validate(Olmoe* m, DataLoader* data, int64_t max_batches, bool bytes, int eos, Balance* balance, DomainTable* domains) {
    int T = m->max_T;
    std::vector<int> inputs((size_t)m->max_B * T), targets((size_t)m->max_B * T);
    double nll = 0, tokens = 0, ends = 0;
    int64_t batches = ceil_div(data->instances, m->max_B);
    if (max_batches > 0) batches = std::min(batches, max_batches);
    balance->reset(m->config);
    for (int64_t round = 0; round < batches; round += world.size) {
        int64_t batch = round + world.rank;
        size_t first = (size_t)batch * m->max_B, rows = batch < batches ? dataloader_rows(data, first, m->max_B, inputs.data(), targets.data()) : 0;
        if (rows == 0) std::fill(inputs.begin(), inputs.begin() + T, 0);
        olmoe_forward(m, inputs.data(), std::max((int)rows, 1), T);
        if (rows == 0) continue;
        olmoe_cross_entropy(m, targets.data(), 0);
        Losses l = olmoe_losses(m, 0);
        nll += l.nll;
        tokens += l.valid;
        ends += std::count(targets.begin(), targets.begin() + rows * T, eos);
        balance->add(*m);
        if (domains) domains_add(domains, m, first * T);
    }
    std::vector<double> sums = {nll, tokens, ends};
    host_sum(&sums);
    nll = sums[0]; tokens = sums[1]; ends = sums[2];
    host_sum(&balance->counts);
    if (domains) host_sum(&domains->counts);
    Validation v;
    v.loss = tokens > 0 ? nll / tokens : 0;
    if (bytes && tokens > ends) v.bits_per_byte = nll / (tokens - ends) / log(2.0);
    return v;
}

// ------------------------------------------------------------------------------------------------
// olmoe train

constexpr const char *MASTERS_CHOICE = "fp32|remainder|none", *MOMENTS_CHOICE = "fp32|bf16";

// How olmoe_plan and olmoe_allocate will keep AdamW's state; before them. Refuses what needs a BF16 build.
void choose_state(Olmoe* m, const std::string& masters, const std::string& moments) {
    if (!BF16 && masters != "fp32") die("--master-weights %s needs a BF16 build (make PRECISION=BF16): here the weights are fp32", masters.c_str());
    if (BF16) m->masters = masters == "fp32" ? Masters::fp32 : masters == "remainder" ? Masters::remainder : Masters::none;
    m->narrow_moments = moments == "bf16";
}

struct TrainOptions {
    std::string config, model, out, tokenizer, schedule = "cosine", order = "global", resume, master_weights = "fp32", moments = "fp32", warmup = "2500", steps = "1000", decay_steps, ce_divisor = "all", prompt, lb = "rank", trace, rendezvous;
    std::vector<std::string> data, val;
    int64_t B = 4, T = 0, global_batch = 0, seed = 6198, recompute = 0;
    int64_t ep = 1, zero = 0, save_every = 0, keep_last = 0, keep_every = 0, val_every = 0, val_batches = 0, sample_every = 0, sample_tokens = 200, log_every = 1;
    double lr = 4e-4, min_lr = -1, lb_coef = 0.01, z_coef = 0.001, skip_spikes = 0, peak_tflops = 0, timeout = 600;
    AdamWOptions adamw;
    bool no_filter = false;
};

// Defaults are OLMoE-1B-7B's (configs/OLMoE-1B-7B-0924.yml of allenai/OLMoE), as far as they don't depend on the machine.
std::vector<Option> train_options(TrainOptions* o) {
    return {
        {"config", Option::TEXT, &o->config, "FILE", "start from random weights in the shape of this config.json"},
        {"model", Option::TEXT, &o->model, "DIR", "start from the weights of a Hugging Face directory"},
        {"data", Option::LIST, &o->data, "FILES", "token files to train on (.npy of uint16, or llm.c's .bin)"},
        {"val", Option::LIST, &o->val, "FILES", "token files to validate on"},
        {"out", Option::TEXT, &o->out, "DIR", "directory for log.jsonl and checkpoints"},
        {"resume", Option::MAYBE, &o->resume, "[DIR]", "go on from the newest complete checkpoint in --out, or from DIR"},
        {"tokenizer", Option::TEXT, &o->tokenizer, "NAME", "to print sampled text, and for the checkpoints: bytes, a tokenizer.json, or a directory that holds one"},
        {"steps", Option::STEPS, &o->steps, "S", "stop after step S (a T behind a number means tokens: 5e12T)"},
        {"batch", Option::INTEGER, &o->B, "B", "sequences of a micro-batch of a rank", 1, 1 << 20},
        {"seq", Option::INTEGER, &o->T, "T", "tokens of a sequence; 0: max_position_embeddings of the config", 0, 1 << 20},
        {"global-batch", Option::INTEGER, &o->global_batch, "G", "sequences of a step, accumulated over ranks and micro-batches; 0: ranks x --batch", 0, 1 << 24},
        {"lr", Option::NUMBER, &o->lr, "X", "peak learning rate", 0, 1e3},
        {"min-lr", Option::NUMBER, &o->min_lr, "X", "learning rate that cosine and linear end at; -1: 0.1 lr", -1, 1e3},
        {"warmup", Option::STEPS, &o->warmup, "S", "steps of linear warm-up from 0.1 lr"},
        {"schedule", Option::CHOICE, &o->schedule, "cosine|linear|constant|anneal", "course of the learning rate behind the warm-up"},
        {"decay-steps", Option::STEPS, &o->decay_steps, "S", "step at which the schedule ends, if not at --steps"},
        {"beta1", Option::NUMBER, &o->adamw.beta1, "X", "AdamW", 0, 0.999999},
        {"beta2", Option::NUMBER, &o->adamw.beta2, "X", "AdamW", 0, 0.999999},
        {"eps", Option::NUMBER, &o->adamw.eps, "X", "AdamW", 1e-30, 1},
        {"weight-decay", Option::NUMBER, &o->adamw.weight_decay, "X", "AdamW, of all parameters", 0, 10},
        {"grad-clip", Option::NUMBER, &o->adamw.grad_clip, "X", "largest global gradient norm; 0: no limit", 0, 1e9},
        {"master-weights", Option::CHOICE, &o->master_weights, MASTERS_CHOICE, "what AdamW updates in a BF16 build: an fp32 copy; the same bits from 16 more for each weight; the weights, rounded at random"},
        {"moments", Option::CHOICE, &o->moments, MOMENTS_CHOICE, "AdamW's moments: in fp32, or rounded at random"},
        {"lb-coef", Option::NUMBER, &o->lb_coef, "X", "weight of the load-balancing loss", 0, 1e3},
        {"lb", Option::CHOICE, &o->lb, "rank|global", "load-balancing loss of each rank's micro-batch, as OLMoE trained, or over those of all ranks"},
        {"z-coef", Option::NUMBER, &o->z_coef, "X", "weight of the router z-loss", 0, 1e3},
        {"ce-divisor", Option::CHOICE, &o->ce_divisor, "all|valid", "the sum of the cross entropy is divided by all positions, as OLMoE did, or by those with a target"},
        {"seed", Option::INTEGER, &o->seed, "N", "of initialisation and data order", 0, 9e15},
        {"order", Option::CHOICE, &o->order, "global|sequential", "sequences shuffled over the whole data set, or as they stand"},
        {"no-filter", Option::FLAG, &o->no_filter, "", "train on sequences of 32 or more repetitions, too"},
        {"skip-spikes", Option::NUMBER, &o->skip_spikes, "X", "skip the update where loss or gradient norm is X deviations above the last 128; 0: never", 0, 1e6},
        {"recompute", Option::INTEGER, &o->recompute, "0|1|2", "keep all activations; recompute the cheap ones; recompute whole layers", 0, 2},
        {"save-every", Option::INTEGER, &o->save_every, "S", "steps between checkpoints; 0: only at the end"},
        {"keep-last", Option::INTEGER, &o->keep_last, "N", "delete all but the newest N checkpoints; 0: keep all", 0, 1 << 30},
        {"keep-every", Option::INTEGER, &o->keep_every, "S", "but never delete those of every S steps", 0, 1 << 30},
        {"val-every", Option::INTEGER, &o->val_every, "S", "steps between validations and reports of expert balance (of the validation data, else of the steps since the last); 0: only at the end"},
        {"val-batches", Option::INTEGER, &o->val_batches, "N", "batches of a validation; 0: all"},
        {"sample-every", Option::INTEGER, &o->sample_every, "S", "steps between samples of text; 0: only at the end"},
        {"sample-tokens", Option::INTEGER, &o->sample_tokens, "N", "length of a sample", 1, 1 << 20},
        {"sample-prompt", Option::TEXT, &o->prompt, "TEXT", "what samples begin with"},
        {"log-every", Option::INTEGER, &o->log_every, "S", "steps between lines on the screen (log.jsonl has every step)", 1},
        {"ep", Option::INTEGER, &o->ep, "G", "expert parallel: so many neighbouring ranks share the experts", 1, 1 << 16},
        {"zero", Option::INTEGER, &o->zero, "0|1", "1: AdamW's state is spread over the ranks that hold the same parameters (ZeRO-1)", 0, 1},
        {"rendezvous", Option::TEXT, &o->rendezvous, "HOST:PORT|FILE", "where ranks meet that neither mpirun nor srun with PMIx started"},
        {"timeout", Option::NUMBER, &o->timeout, "S", "seconds after which a rank that does not answer ends the run", 1, 1e6},
        {"trace", Option::TEXT, &o->trace, "FILE", "when kernels and collectives of the first three steps were issued and ran, for Perfetto; ranks above 0 add their number to the name"},
        {"peak-tflops", Option::NUMBER, &o->peak_tflops, "X", "the machine's peak, for the share of it that is used; 0: that of a large matmul, measured", 0, 1e9},
    };
}

// Is this step's loss or gradient norm an outlier of the last 128? The window is part of the checkpoint, so that resuming decides alike.
constexpr size_t SPIKE_WINDOW = 128;
struct SpikeWindow { std::vector<double> losses, norms; };

bool is_outlier(const std::vector<double>& window, double x, double deviations) {
    if (window.size() < SPIKE_WINDOW / 2) return false;
    double mean = 0, square = 0;
    for (double v : window) mean += v / window.size();
    for (double v : window) square += (v - mean) * (v - mean) / window.size();
    return x > mean + deviations * sqrt(square);
}

void spike_window_push(std::vector<double>* window, double x) {
    window->push_back(x);
    if (window->size() > SPIKE_WINDOW) window->erase(window->begin());
}

// Names the first tensor, in the order of the forward pass, that holds a NaN or an infinity. Only called when the run has to stop.
std::string find_non_finite(Olmoe* m) {
    auto bad = [&](const auto* device, size_t n) {
        std::vector<std::decay_t<decltype(*device)>> host(n);
        copy_to_host(host.data(), device, n);
        for (auto x : host) if (!std::isfinite((float)x)) return true;
        return false;
    };
    size_t N = m->N, C = m->config.C;
    std::vector<HfTensor> tensors = hf_tensors(m->config);
    for (const HfTensor& t : tensors)
        if (floatX* here = parameter_at(m->param_spans, t.offset)) if (bad(here, t.count)) return "the parameter " + t.name;
    for (int l = 0; l < m->config.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        std::string layer = " of layer " + std::to_string(l);
        if (bad(a.x, N * C)) return "the residual stream at the input" + layer;
        if (m->recompute >= 2 && bad(a.router_lse, N)) return "the router logits" + layer;
        if (m->recompute >= 2) continue;
        if (bad(a.qkv, N * 3 * C)) return "the qkv projection" + layer;
        if (bad(a.attn, N * C)) return "the attention output" + layer;
        if (bad(a.router_lse, N)) return "the router logits" + layer;
        size_t mine = m->config.E / expert_group.size, rows = std::accumulate(&m->expert_rows[l * mine], &m->expert_rows[l * mine] + mine, (size_t)0);
        if (bad(a.gate_up, rows * 2 * m->config.F)) return "the experts' gate and up projections" + layer;
    }
    if (bad(m->acts.x, N * C)) return "the residual stream behind the last layer";
    return "the logits";
}

// Ctrl-C and its like. No handler runs on a thread that computes: oneDNN's sgemm has its stack pointer in the heap, and a signal's frame
// would overwrite what lies there (oneDNN issue 4845). All threads block the signals and one waits for them, so this comes before any
// other thread is started.
static std::atomic<bool> stopping_saves = false;    // there are steps to finish: else a signal ends the program
static std::atomic<bool> stop_requested = false;

void signals_watch() {
    signal(SIGPIPE, SIG_IGN);               // of a screen that went away (| tee, | head): training goes on and saves
    sigset_t signals;
    struct sigaction hangup;
    sigaction(SIGHUP, nullptr, &hangup);
    sigemptyset(&signals);
    for (int s : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&signals, s);    // mpirun hands SIGUSR1 to its ranks without ending them (scripts/launch_node.sh)
    if (hangup.sa_handler != SIG_IGN) sigaddset(&signals, SIGHUP);      // a closed terminal, unless nohup said that it doesn't matter
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    std::thread([signals] {
        for (int s; sigwait(&signals, &s) == 0; ) {
            if (!stopping_saves || (s == SIGINT && stop_requested)) {   // a second Ctrl-C ends the program at once; launchers send SIGTERM more than once
                signal(s, SIG_DFL);
                pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
                raise(s);
            }
            stop_requested = true;
        }
    }).detach();
}

void save_checkpoint(Olmoe* m, const TrainOptions& o, int64_t step, const Json& state, const std::string& tokenizer_json) {
    cudaCheck(cudaDeviceSynchronize());
    Savers savers = {world.rank, world.size, [&](size_t offset) { return owner_of(m->param_spans, offset); }, [](std::vector<double>* x) { host_sum(x); }};
    checkpoint_save(o.out, step, m->config, BF16, m->masters != Masters::none, [&](State which, size_t offset, size_t count, void* dst) {
        ranks_alive();
        if (which == State::weights) copy_to_host((floatX*)dst, parameter_at(m->param_spans, offset), count);
        else for_updated(m->param_spans, offset, count, [&](size_t first, size_t at, size_t n) { state_to_host(*m, which, at, parameter_at(m->param_spans, first), (float*)dst, n); });
    }, state, tokenizer_json, savers);
    if (world.rank == 0) checkpoint_prune(o.out, (int)o.keep_last, (int)o.keep_every);
}

// Drops the lines of steps behind `step` from a log, so that a resumed run's log reads as if it had never stopped (but for
// the expert balance without --val, which counts from where the run went on).
void log_truncate(const std::string& path, int64_t step) {
    std::string old, kept;
    if (!file_contents(&old, path)) return;
    for (size_t begin = 0, end; (end = old.find('\n', begin)) != std::string::npos; begin = end + 1) {
        std::string line = old.substr(begin, end + 1 - begin);
        size_t at = line.find("{\"step\":");
        if (at == 0 && atoll(line.c_str() + 8) > step) continue;
        kept += line;
    }
    if (kept == old) return;
    std::string temporary = path + ".tmp";
    FILE* f = fopen(temporary.c_str(), "w");
    if (!f || fwrite(kept.data(), 1, kept.size(), f) != kept.size() || fclose(f) != 0) die("cannot write %s: %s", temporary.c_str(), strerror(errno));
    if (rename(temporary.c_str(), path.c_str()) != 0) die("cannot replace %s: %s", path.c_str(), strerror(errno));
}

// What a checkpoint says of the run beside weights and moments; nothing in it depends on the machine, the time, or where files lie.
Json trainer_state(const TrainOptions& o, const DataLoader& data, int64_t step, int64_t updates, const SpikeWindow& spikes, const Schedule& schedule) {
    Json s;
    s["step"] = step;
    s["updates"] = updates;                 // steps that were not skipped: AdamW's count
    s["epoch"] = data.epoch;
    s["position"] = data.position;
    s["seed"] = o.seed;
    s["seq"] = o.T;
    s["global_batch"] = o.global_batch;
    s["micro_batch"] = o.B * world.size;    // of all ranks together
    s["load_balancing"] = o.lb;
    s["order"] = o.order;
    s["repetition_filter"] = !o.no_filter;
    s["data_fingerprint"] = text("%016lx", dataloader_fingerprint(&data));
    s["precision"] = BF16 ? "BF16" : "FP32";
    s["schedule"] = {{"kind", schedule.kind}, {"lr", schedule.lr}, {"min_lr", schedule.min_lr}, {"warmup_steps", schedule.warmup}, {"decay_steps", schedule.total}};
    s["adamw"] = {{"beta1", o.adamw.beta1}, {"beta2", o.adamw.beta2}, {"eps", o.adamw.eps}, {"weight_decay", o.adamw.weight_decay}, {"grad_clip", o.adamw.grad_clip},
                  {"master_weights", o.master_weights}, {"moments", o.moments}};
    s["losses"] = {{"lb_coef", o.lb_coef}, {"z_coef", o.z_coef}, {"ce_divisor", o.ce_divisor}};
    s["skip_spikes"] = {{"deviations", o.skip_spikes}, {"losses", spikes.losses}, {"norms", spikes.norms}};
    return s;
}

// Moments and master weights, step and data position of a checkpoint; refuses one of another run. What is different and may be,
// the recipe, goes to `changed`.
void resume(Olmoe* m, const std::string& dir, const TrainOptions& o, const Schedule& schedule, DataLoader* data, int64_t* step, int64_t* updates, SpikeWindow* spikes,
            std::vector<std::pair<std::string, std::string>>* changed) {
    Json s = checkpoint_trainer_state(dir);
    try {
        auto same = [&](const char* what, const Json& now) {
            if (s.at(what) != now) die("%s: the checkpoint's %s is %s, this run's is %s; they must be equal to resume; to start anew choose another --out", dir.c_str(), what, s.at(what).dump().c_str(), now.dump().c_str());
        };
        same("precision", BF16 ? "BF16" : "FP32");
        same("seed", o.seed);
        same("seq", o.T);
        same("global_batch", o.global_batch);
        same("order", o.order);
        same("repetition_filter", !o.no_filter);
        same("data_fingerprint", text("%016lx", dataloader_fingerprint(data)));
        *step = s.at("step");
        *updates = s.at("updates");
        spikes->losses = s.at("skip_spikes").at("losses").get<std::vector<double>>();
        spikes->norms = s.at("skip_spikes").at("norms").get<std::vector<double>>();
        dataloader_seek(data, s.at("epoch"), s.at("position"));
        Json now = trainer_state(o, *data, 0, 0, *spikes, schedule);
        for (const char* what : {"schedule", "adamw", "losses", "micro_batch", "load_balancing"})
            if (s.at(what) != now.at(what)) changed->push_back({text("%s until step %ld", what, *step), s.at(what).dump()});
    } catch (const Json::exception& e) {
        die("%s/trainer_state.json: %s", dir.c_str(), e.what());
    }
    olmoe_load(m, dir);
    auto updated = [&](size_t offset, size_t count) { ranks_alive(); bool any = false; for_updated(m->param_spans, offset, count, [&](size_t, size_t, size_t) { any = true; }); return any; };
    checkpoint_optimizer_read(dir, m->config, m->masters != Masters::none, [&](State which, size_t offset, size_t count, const float* src) {
        for_updated(m->param_spans, offset, count, [&](size_t first, size_t at, size_t n) { state_to_device(m, which, at, parameter_at(m->param_spans, first), src + (first - offset), n); });
    }, updated);
}

// Names of files for the table: up to three in full
std::string join(const std::vector<std::string>& words) {
    if (words.size() > 3) return words[0] + text(" and %zu more", words.size() - 1);
    std::string s;
    for (const std::string& w : words) s += (s.empty() ? "" : " ") + w;
    return s;
}

// A sample on the screen: newlines indented, other controls as dots, and what is no UTF-8 as U+FFFD, which the JSON library does
void print_sample(const std::string& prompt, const std::string& said) {
    std::string valid = Json::parse(Json(prompt + said).dump(-1, ' ', false, Json::error_handler_t::replace));
    printf("  sample: ");
    for (char ch : valid) {
        if (ch == '\n') printf("\n    | ");
        else printf("%c", (unsigned char)ch < 32 || ch == 127 ? '.' : ch);
    }
    printf("\n");
}

int command_train(int argc, char** argv) {
    TrainOptions o;
    ranks.rank = ranks_number();            // until they have met: an error of all is told by one
    options_parse(argc, argv, "train --config FILE | --model DIR  --data FILES [--val FILES] --out DIR [options]", train_options(&o));
    if (o.config.empty() == o.model.empty()) die("train needs either --config FILE (random weights) or --model DIR (a Hugging Face directory)");
    if (o.data.empty()) die("train needs --data FILES; make them with: olmoe tokenize --tokenizer NAME --out FILE.npy TEXTS");
    if (o.out.empty()) die("train needs --out DIR for its log and checkpoints");
    Olmoe m;
    choose_state(&m, o.master_weights, o.moments);

    signals_watch();
    ranks = ranks_start(o.rendezvous, NCCL_BY_MPI);
    ranks_watch(o.timeout);
    stopping_saves = ranks.size > 1;        // a signal to one rank while they start must not end the others: they make one step
    if (ranks.rank > 0 && !freopen("/dev/null", "w", stdout)) die("cannot open /dev/null: %s", strerror(errno));     // rank 0 speaks for all
    if (ranks.size % o.ep != 0) die("%d ranks can't be divided into groups of --ep %ld", ranks.size, o.ep);
    layout_set(ranks.rank, ranks.size, (int)o.ep, o.zero == 1);

    OlmoeConfig config;
    config_read(&config, o.config.empty() ? o.model : o.config);
    if (config.E % o.ep != 0) die("the model's %d experts can't be divided among --ep %ld ranks", config.E, o.ep);
    o.adamw.seed = (uint64_t)o.seed;
    if (o.T == 0) o.T = config.max_T;
    if (o.T > config.max_T) die("--seq %ld is longer than the config's max_position_embeddings %d", o.T, config.max_T);
    if (o.global_batch == 0) o.global_batch = o.B * world.size;
    if (o.global_batch % (o.B * world.size) != 0) die("--global-batch %ld is not a multiple of %s--batch %ld", o.global_batch, world.size > 1 ? text("%d ranks x ", world.size).c_str() : "", o.B);
    double tokens_per_step = (double)o.global_batch * o.T;
    int64_t steps = (int64_t)parse_steps("steps", o.steps, tokens_per_step);
    Schedule schedule;
    schedule.kind = o.schedule;
    schedule.lr = o.lr;
    schedule.min_lr = o.min_lr < 0 ? 0.1 * o.lr : o.min_lr;
    schedule.warmup = o.schedule == "anneal" ? 0 : parse_steps("warmup", o.warmup, tokens_per_step);
    schedule.total = o.decay_steps.empty() ? steps : parse_steps("decay-steps", o.decay_steps, tokens_per_step);

    Tokenizer tokenizer;
    bool have_tokenizer = !o.tokenizer.empty();
    if (have_tokenizer) tokenizer_open(&tokenizer, o.tokenizer);
    if (have_tokenizer && tokenizer.vocab > config.V) die("the tokenizer's %d ids don't fit the model's vocabulary of %d", tokenizer.vocab, config.V);
    std::string tokenizer_json;             // for the checkpoints; read now, lest it should be missing then
    if (!tokenizer.path.empty() && !file_contents(&tokenizer_json, tokenizer.path)) die("cannot read %s: %s", tokenizer.path.c_str(), strerror(errno));

    DataLoader data, val;
    dataloader_open(&data, o.data, (int)o.T, config.V, o.order == "global" ? DataOrder::global : DataOrder::sequential, o.seed, !o.no_filter);
    if (o.global_batch > (int64_t)data.instances) die("--global-batch %ld is more than the %zu sequences of the data; use a smaller one, or a smaller --seq", o.global_batch, data.instances);
    DomainTable domains;
    if (!o.val.empty()) dataloader_open(&val, o.val, (int)o.T, config.V, DataOrder::sequential, 0, false);
    if (!o.val.empty()) dataloader_check(&val, o.val_batches > 0 ? (size_t)(o.val_batches * o.B) : val.instances, ranks_alive);     // not after hours
    if (o.val.size() == 1) domains_open(&domains, o.val[0], config);
    if (mkdir(o.out.c_str(), 0777) != 0 && errno != EEXIST) die("cannot make the directory %s: %s", o.out.c_str(), strerror(errno));
    device_open();
    comm_open();
    int lock = world.rank == 0 ? open(o.out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;       // held until the process ends; where the file system has no locks, none
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) die("another run is writing into %s; wait for its end, or choose another --out", o.out.c_str());
    // rank 0 looks for the newest checkpoint, and reads all of the one to resume from; the others take the same
    std::string from = o.resume == "newest" && world.rank == 0 ? checkpoint_newest(o.out, ranks_alive) : o.resume;
    if (!from.empty() && o.resume != "newest" && world.rank == 0) checkpoint_check(from, ranks_alive);
    int64_t newest = (int64_t)host_sum(world.rank > 0 || from.empty() || o.resume != "newest" ? 0 : atof(from.c_str() + from.rfind("step-") + 5) + 1);
    if (o.resume == "newest") from = newest ? o.out + text("/step-%08ld", newest - 1) : "";
    auto existing = checkpoint_list(o.out);                  // (step, directory), newest first
    if (o.resume.empty() && !existing.empty()) die("%s holds checkpoints already; go on from them with --resume, or choose another --out", o.out.c_str());
    if (o.resume == "newest" && from.empty() && !existing.empty()) die("no checkpoint in %s is undamaged; to start anew choose another --out", o.out.c_str());
    OlmoeConfig theirs;
    if (!from.empty()) config_read(&theirs, from);
    if (!from.empty() && config_json(theirs, BF16) != config_json(config, BF16)) die("%s is a checkpoint of another config than %s", from.c_str(), (o.config.empty() ? o.model : o.config).c_str());
    if (access(o.out.c_str(), W_OK) != 0) die("cannot write into %s: %s", o.out.c_str(), strerror(errno));
    if (world.size > 1) {                   // checkpoints are written by all ranks into one directory
        std::string mark = o.out + "/.shared";
        FILE* f = world.rank == 0 ? fopen(mark.c_str(), "w") : nullptr;
        if (f) fclose(f);
        host_sum(0.0);
        bool seen = access(mark.c_str(), F_OK) == 0;
        double blind = host_sum(seen ? 0 : 1);
        if (world.rank == 0) unlink(mark.c_str());
        if (blind > 0) die("--out %s: %.0f of %d ranks do not see in it what rank 0 writes; it has to lie on a file system that all machines share", o.out.c_str(), blind, world.size);
    }

    double peak = o.peak_tflops > 0 ? o.peak_tflops * 1e12 : measure_peak(), flops = flops_per_token(config, (int)o.T);
    olmoe_allocate(&m, config, (int)o.B, (int)o.T, (int)o.recompute, Use::training);
    m.lb_global = o.lb == "global";
    int64_t step = 0, updates = 0;
    SpikeWindow spikes;
    std::vector<std::pair<std::string, std::string>> changed;
    if (!from.empty()) {
        resume(&m, from, o, schedule, &data, &step, &updates, &spikes, &changed);
        if (o.resume != "newest" && !existing.empty() && existing[0].first > step)
            die("%s holds checkpoints of later steps than %s; choose another --out, or remove them", o.out.c_str(), from.c_str());
    } else if (!o.model.empty()) {
        olmoe_load(&m, o.model);
    } else {
        olmoe_init(&m, o.seed);
    }
    std::vector<std::pair<std::string, std::string>> box = {{"model", o.config.empty() ? o.model : o.config}};
    box_shapes(&box, config);
    box.push_back({"", ""});
    box.push_back({"machine", machine_name()});
    if (world.size > 1)
        box.push_back({"ranks", text("%d, started by %s; experts over %d, each held by %d; ZeRO-1 %s", world.size, ranks.started_by.c_str(), expert_group.size, replica_group.size, zero ? "on" : "off")});
    box.push_back({"precision", BF16 ? "BF16, sums in fp32" : "FP32"});
    box.push_back({"AdamW's state", text("%smoments in %s", !BF16 ? "" : m.masters == Masters::fp32 ? "master weights in fp32, " : m.masters == Masters::remainder ? "master weights as remainders of 16 bits, " : "no master weights, ", o.moments.c_str())});
    box.push_back({"peak", human(peak, "FLOP/s") + (o.peak_tflops > 0 ? " (given)" : " (a large matmul, measured)")});
    box_memory(&box, m);
    box.push_back({"", ""});
    box.push_back({"data", text("%s: %s tokens, %s sequences of %ld", join(o.data).c_str(), human((double)dataloader_tokens(&data)).c_str(), human((double)data.instances).c_str(), o.T)});
    box.push_back({"validation", o.val.empty() ? "none" : text("%s: %s tokens", join(o.val).c_str(), human((double)dataloader_tokens(&val)).c_str())});
    box.push_back({"order", o.order + (o.no_filter ? "" : ", repetitive sequences without targets")});
    box.push_back({"step", text("%s tokens: %ld sequences of %ld in micro-batches of %s%ld", human(tokens_per_step).c_str(), o.global_batch, o.T, world.size > 1 ? text("%d x ", world.size).c_str() : "", o.B)});
    box.push_back({"steps", text("%ld (%s tokens, %.2f epochs)", steps, human(steps * tokens_per_step).c_str(), steps * (double)o.global_batch / data.instances)});
    box.push_back({"learning rate", text("%g, %s to %g at step %.0f, warm-up %.0f", schedule.lr, schedule.kind.c_str(), learning_rate(schedule, schedule.total), schedule.total, schedule.warmup) + (schedule.warmup > 0 && schedule.warmup >= steps ? ": longer than the run" : "")});
    box.push_back({"AdamW", text("betas %g %g, eps %g, weight decay %g, clip %g", o.adamw.beta1, o.adamw.beta2, o.adamw.eps, o.adamw.weight_decay, o.adamw.grad_clip)});
    box.push_back({"auxiliary losses", text("load balancing %g%s, router z %g; cross entropy divided by %s targets", o.lb_coef, world.size == 1 ? "" : m.lb_global ? " over all ranks" : " rank by rank", o.z_coef, o.ce_divisor.c_str())});
    box.push_back({"recompute, skip spikes", text("%ld, %g", o.recompute, o.skip_spikes)});
    box.push_back({"seed", text("%ld", o.seed)});
    box.push_back({"out", o.out + (from.empty() ? "" : ", resumed from " + from)});
    box.insert(box.end(), changed.begin(), changed.end());
    print_box(box);

    std::string log_path = o.out + "/log.jsonl";
    if (!from.empty() && world.rank == 0) log_truncate(log_path, step);
    std::string trace_path = world.rank > 0 ? o.trace + "." + std::to_string(world.rank) : o.trace;
    if (!o.trace.empty()) trace_write(trace_path);          // an error now, not after three steps
    FILE* log = fopen(world.rank == 0 ? log_path.c_str() : "/dev/null", from.empty() ? "w" : "a");
    if (!log) die("cannot write %s: %s", log_path.c_str(), strerror(errno));
    if (ftell(log) == 0) {
        Json first = config_json(config, BF16), run = trainer_state(o, data, 0, 0, spikes, schedule);
        for (auto& r : run.items()) if (r.key() != "step" && r.key() != "updates" && r.key() != "epoch" && r.key() != "position") first[r.key()] = r.value();
        first["steps"] = steps;
        fprintf(log, "%s\n", Json{{"config", first}}.dump().c_str());
    }
    stopping_saves = true;
    if (step >= steps) printf("nothing to do: %s is at step %ld of %ld\n", o.out.c_str(), step, steps);

    int micro_batches = (int)(o.global_batch / (o.B * world.size)), parts = micro_batches * world.size;
    size_t micro = (size_t)o.B * o.T;
    std::vector<int> inputs(micro * micro_batches), targets(micro * micro_batches);
    Balance balance;
    balance.reset(config);
    double started = seconds_now();
    int64_t first_step = step;
    bool profile = getenv("CUDA_PROFILE") != nullptr;      // the profiler sees the last step only (scripts/bench.py, nsys -c cudaProfilerApi)
    bool stop = false;
    while (step < steps && !stop) {
        double start = seconds_now(), traffic_before[TRAFFICS];
        std::copy(traffic, traffic + TRAFFICS, traffic_before);
        step++;
        if (profile && step == steps) cudaCheck(cudaProfilerStart());
        if (!o.trace.empty() && step <= first_step + 3) trace_begin();      // the first three steps
        dataloader_next(&data, (int)o.global_batch, world.rank, world.size, inputs.data(), targets.data());
        double ce_scale = 1 / tokens_per_step;
        if (o.ce_divisor == "valid") ce_scale = 1 / std::max(1.0, host_sum((double)std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; })));

        olmoe_zero_grad(&m);
        Losses sum;
        std::string not_finite;             // where this rank met the first NaN or infinity
        for (int i = 0; i < micro_batches; i++) {
            olmoe_forward(&m, &inputs[i * micro], (int)o.B, (int)o.T);
            olmoe_cross_entropy(&m, &targets[i * micro], (float)ce_scale);
            olmoe_backward(&m, &inputs[i * micro], o.lb_coef, o.z_coef, micro_batches, i == micro_batches - 1);
            Losses l = olmoe_losses(&m, ce_scale, o.lb_coef / parts, o.z_coef / parts);
            if (!std::isfinite(l.loss) && not_finite.empty()) not_finite = find_non_finite(&m);
            sum.nll += l.nll; sum.valid += l.valid; sum.lb += l.lb; sum.z += l.z; sum.loss += l.loss;
            balance.add(m);
        }
        // the sums over the ranks, and who met what: the same numbers on each, so that all decide alike
        std::vector<double> sums = {sum.nll, (double)sum.valid, sum.lb, sum.z, sum.loss, (double)stop_requested};
        sums.resize(6 + world.size, 0);
        sums[6 + world.rank] = !not_finite.empty();
        host_sum(&sums);
        sum.nll = sums[0]; sum.valid = (int64_t)sums[1]; sum.lb = sums[2]; sum.z = sums[3]; sum.loss = sums[4];
        stop = sums[5] > 0;
        for (int r = 0; r < world.size; r++)
            if (sums[6 + r] > 0) {
                if (r == world.rank) die("step %ld: the loss is not finite; first in %s. The last checkpoint in %s is untouched", step, not_finite.c_str(), o.out.c_str());
                sleep(3);                   // that rank's line comes first, and its end ends all
            }
        double ce = sum.valid ? sum.nll / sum.valid : 0;            // whatever the divisor that trains
        const Span* bad = nullptr;
        double norm = olmoe_grad_norm(&m, &bad);
        if (!std::isfinite(norm)) {
            std::string name = "all of them together";
            for (const HfTensor& t : hf_tensors(config)) if (bad && t.offset == bad->base) name = t.name;
            die("step %ld: the gradient is not finite; first in the tensor that begins with %s. The last checkpoint in %s is untouched", step, name.c_str(), o.out.c_str());
        }
        bool skip = o.skip_spikes > 0 && (is_outlier(spikes.losses, sum.loss, o.skip_spikes) || is_outlier(spikes.norms, norm, o.skip_spikes));
        if (o.skip_spikes > 0) { spike_window_push(&spikes.losses, sum.loss); spike_window_push(&spikes.norms, norm); }
        o.adamw.lr = learning_rate(schedule, (double)step);
        if (!skip) olmoe_update(&m, ++updates, norm, o.adamw);
        cudaCheck(cudaStreamSynchronize(main_stream.stream));
        if (profile && step == steps) cudaCheck(cudaProfilerStop());
        double seconds = seconds_now() - start, rate = tokens_per_step / seconds;

        if (trace.on) {
            trace_end();
            if (step == std::min(first_step + 3, steps) || stop) trace_write(trace_path);
        }
        bool last = step == steps;          // a run that is stopped only saves: it may not have long
        if (step % o.log_every == 0 || last || stop || step == first_step + 1)
            printf("step %*ld/%ld | loss %.4f ce %.4f lb %.5f z %.5f | norm %.3f%s | lr %.2e | %.1f ms | %s tok/s | %.0f%% of peak | eta %s\n", (int)std::to_string(steps).size(), step, steps,
                   sum.loss, ce, sum.lb, sum.z, norm, skip ? " SKIPPED" : "", o.adamw.lr, 1000 * seconds, human(rate).c_str(), 100 * rate * flops / (peak * world.size),
                   human_time((seconds_now() - started) / (step - first_step) * (steps - step)).c_str());
        fprintf(log, "{\"step\":%ld,\"loss\":%.9g,\"ce_loss\":%.9g,\"lb_loss\":%.9g,\"z_loss\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"ms\":%.9g,\"tokens_per_s\":%.9g",
                step, sum.loss, ce, sum.lb, sum.z, norm, o.adamw.lr, 1000 * seconds, rate);
        if (world.size > 1) {               // bytes that rank 0 gave to collectives in this step
            const char* names[TRAFFICS] = {"gradients", "parameters", "rows", "counts", "sums"};
            for (int i = 0; i < TRAFFICS; i++) fprintf(log, "%s\"%s\":%.0f", i ? "," : ",\"sent_bytes\":{", names[i], traffic[i] - traffic_before[i]);
            fprintf(log, "}");
        }
        if (skip) fprintf(log, ",\"skipped\":true");
        if (last || (o.val_every > 0 && step % o.val_every == 0)) {
            if (!o.val.empty()) {
                Validation v = validate(&m, &val, o.val_batches, have_tokenizer && tokenizer.bytes, have_tokenizer ? tokenizer.eos : -1, &balance, last && domains.names.size() > 1 ? &domains : nullptr);
                printf("  validation loss %.4f", v.loss);
                fprintf(log, std::isfinite(v.loss) ? ",\"val_loss\":%.9g" : ",\"val_loss\":null", v.loss);
                if (v.bits_per_byte > 0 && std::isfinite(v.loss)) { printf(", %.4f bits per byte", v.bits_per_byte); fprintf(log, ",\"val_bpb\":%.9g", v.bits_per_byte); }
                printf("\n");
                if (last && domains.names.size() > 1) print_domains(domains, config);
            }
            if (o.val.empty()) host_sum(&balance.counts);
            print_balance(balance);
            fprintf(log, ",\"balance\":[");
            for (int l = 0; l < config.L; l++) {
                LayerBalance b = layer_balance(balance, l);
                fprintf(log, "%s{\"max_over_mean\":%.9g,\"entropy\":%.9g,\"dead\":%d,\"counts\":[", l ? "," : "", b.max_over_mean, b.entropy, b.dead);
                for (int e = 0; e < config.E; e++) fprintf(log, "%s%.0f", e ? "," : "", balance.counts[(size_t)l * config.E + e]);
                fprintf(log, "]}");
            }
            fprintf(log, "]");
            balance.reset(config);
        }
        fprintf(log, "}\n");
        if (fflush(log) != 0) die("cannot write %s: %s", log_path.c_str(), strerror(errno));
        if (have_tokenizer && (last || (o.sample_every > 0 && step % o.sample_every == 0))) {
            std::vector<int> ids = tokenizer_encode(tokenizer, o.prompt);
            ids.insert(ids.begin(), tokenizer.eos);
            print_sample(o.prompt, sample_text(&m, tokenizer, ids, (int)o.sample_tokens, 0.8, o.seed + step));
        }
        if (last || stop || (o.save_every > 0 && step % o.save_every == 0)) save_checkpoint(&m, o, step, trainer_state(o, data, step, updates, spikes, schedule), tokenizer_json);
        fflush(stdout);
    }
    if (stop) printf("stopped at step %ld and saved; go on with --resume\n", step);
    if (double masked = host_sum((double)dataloader_masked(&data))) printf("%.0f sequences were repetitive and had no targets\n", masked);
    if (fclose(log) != 0) die("cannot write %s: %s", log_path.c_str(), strerror(errno));
    olmoe_free(&m);
    comm_close();
    device_close();
    ranks_leave();
    dataloader_close(&data);
    if (!o.val.empty()) dataloader_close(&val);
    return 0;
}

// ------------------------------------------------------------------------------------------------
// olmoe verify: compares what this program computes with a reference file (its format: README.md)

struct Verify {
    int compared = 0, failed = 0;
    double rtol = 0, atol = 0;              // of what comes next; atol > 0: elementwise atol + rtol |ref|, else relative L2
};

void verify_line(Verify* v, const std::string& name, double error, double tolerance, const std::string& worst) {
    bool ok = error <= tolerance;           // false for NaN
    v->failed += !ok;
    printf("%-58s %9.2e  %6.1f %%  %s%s\n", name.c_str(), error, 100 * error / tolerance, ok ? "ok" : "FAILED", worst.empty() ? "" : (" (worst " + worst + ")").c_str());
}

// `largest` is the largest norm of a gradient: an all-zero reference allows 1e-6 of it.
void verify_tensor(Verify* v, const std::string& name, const std::vector<float>& ours, const std::vector<float>& ref, double largest = 1) {
    double difference = 0, square = 0, worst = -1, excess = 0;
    size_t at = 0;
    v->compared++;
    for (size_t i = 0; i < ref.size(); i++) {
        double d = std::fabs((double)ours[i] - ref[i]);
        difference += d * d;
        square += (double)ref[i] * ref[i];
        if (!std::isnan(worst) && !(d <= worst)) { worst = d; at = i; }     // a NaN stays the worst
        double e = d / (v->atol + v->rtol * std::fabs(ref[i]));
        if (v->atol > 0 && !std::isnan(excess) && !(e <= excess)) excess = e;
    }
    std::string where = text("%.6g for %.6g at %zu", (double)ours[at], (double)ref[at], at);
    if (v->atol > 0) verify_line(v, name + " (elementwise)", excess, 1, where);
    else if (square == 0) verify_line(v, name + " (zero)", sqrt(difference), 1e-6 * largest, where);
    else verify_line(v, name, sqrt(difference / square), v->rtol, where);
}

std::vector<float> device_floats(const floatX* device, size_t n) {
    std::vector<floatX> host(n);
    copy_to_host(host.data(), device, n);
    return std::vector<float>(host.begin(), host.end());
}

int command_verify(int argc, char** argv) {
    std::string model, reference;
    double rtol = -1;
    options_parse(argc, argv, "verify --model DIR --reference FILE.safetensors [options]", {
        {"model", Option::TEXT, &model, "DIR", "Hugging Face directory"},
        {"reference", Option::TEXT, &reference, "FILE", "safetensors: inputs, targets and what is to be compared"},
        {"rtol", Option::NUMBER, &rtol, "X", "relative L2 tolerance of a tensor; -1: as the file says (README.md), else 1e-4 in FP32, 3e-2 in BF16", -1, 1e3},
    });
    if (model.empty() || reference.empty()) die("verify needs --model DIR and --reference FILE");
    OlmoeConfig c;
    config_read(&c, model);
    Safetensors f;
    safetensors_open(&f, reference);
    auto number = [&](const char* key, double fallback) {
        auto at = f.metadata.find(key);
        if (at == f.metadata.end()) return fallback;
        char* end;
        double x = strtod(at->second.c_str(), &end);
        if (at->second.empty() || *end) die("%s: metadata %s '%s' is not a number", reference.c_str(), key, at->second.c_str());
        return x;
    };
    auto shaped = [&](const char* name, const char* dtype, const std::vector<int64_t>& shape) -> const SafeTensor* {
        const SafeTensor* t = f.find(name);
        if (t && t->dtype != dtype) die("%s: %s is %s, it should be %s", reference.c_str(), name, t->dtype.c_str(), dtype);
        if (t && t->shape != shape) die("%s: %s has shape %s, it should be %s", reference.c_str(), name, Json(t->shape).dump().c_str(), Json(shape).dump().c_str());
        return t;
    };
    const SafeTensor *inputs_tensor = f.find("inputs"), *targets_tensor = f.find("targets");
    if (!inputs_tensor || inputs_tensor->shape.size() != 2) die("%s: needs a tensor `inputs` I32 [B, T]", reference.c_str());
    int64_t B = inputs_tensor->shape[0], T = inputs_tensor->shape[1];
    if (B < 1 || T < 1 || B > 1 << 20 || T > c.max_T) die("%s: inputs of %ld x %ld tokens; max_position_embeddings is %d", reference.c_str(), B, T, c.max_T);
    shaped("inputs", "I32", {B, T});
    shaped("targets", "I32", {B, T});
    auto ints = [](const SafeTensor* t) { std::vector<int> v(t->bytes / 4); memcpy(v.data(), t->data, t->bytes); return v; };
    auto floats = [](const SafeTensor* t) { std::vector<float> v(t->bytes / 4); memcpy(v.data(), t->data, t->bytes); return v; };
    std::vector<int> inputs = ints(inputs_tensor), targets(B * T, -100);
    if (targets_tensor) targets = ints(targets_tensor);

    // every tensor of the file must be one that is understood
    std::vector<HfTensor> tensors = hf_tensors(c);
    std::vector<const SafeTensor*> grads(tensors.size(), nullptr);
    bool backward = false;
    size_t to_compare = 0;
    for (const SafeTensor& t : f.tensors) {
        int layer = 0, used = 0;
        if (t.name == "inputs" || t.name == "targets") continue;
        to_compare++;
        if (t.name == "logits") { shaped("logits", "F32", {B, T, c.V}); continue; }
        if (t.name == "logits_mean") { shaped("logits_mean", "F32", {B, T}); continue; }
        if (t.name == "logits_slice") {
            if (t.shape.size() != 3 || t.shape[1] < 1 || t.shape[1] > T || t.shape[2] < 1 || t.shape[2] > c.V) die("%s: logits_slice should be F32 [B, t, n]", reference.c_str());
            shaped("logits_slice", "F32", {B, t.shape[1], t.shape[2]});
            continue;
        }
        if (t.name == "losses") {
            if (t.shape.size() != 1 || t.shape[0] < 1) die("%s: losses should be F32 [S]", reference.c_str());
            shaped("losses", "F32", t.shape);
            backward = true;
        } else if (t.name == "loss" || t.name == "ce_loss" || t.name == "lb_loss" || t.name == "z_loss") {
            shaped(t.name.c_str(), "F32", {1});
        } else if (sscanf(t.name.c_str(), "router.%d.logits%n", &layer, &used) == 1 && used == (int)t.name.size() && layer >= 0 && layer < c.L) {
            shaped(t.name.c_str(), "F32", {B, T, c.E});
            continue;
        } else if (sscanf(t.name.c_str(), "router.%d.experts%n", &layer, &used) == 1 && used == (int)t.name.size() && layer >= 0 && layer < c.L) {
            shaped(t.name.c_str(), "I32", {B, T, c.K});
            continue;
        } else {
            size_t i = 0;
            while (i < tensors.size() && t.name != "grad." + tensors[i].name) i++;
            if (i == tensors.size()) die("%s: unknown tensor %s", reference.c_str(), t.name.c_str());
            shaped(t.name.c_str(), "F32", tensors[i].shape);
            grads[i] = &t;
            backward = true;
        }
        if (!targets_tensor) die("%s: %s can't be compared without `targets`", reference.c_str(), t.name.c_str());
    }
    if (to_compare == 0) die("%s: nothing to compare", reference.c_str());
    double lb_coef = number("lb_coef", 0), z_coef = number("z_coef", 0);
    std::string divisor = f.metadata.count("ce_divisor") ? f.metadata["ce_divisor"] : "valid";
    if (divisor != "valid" && divisor != "all") die("%s: metadata ce_divisor '%s' is neither valid nor all", reference.c_str(), divisor.c_str());
    int64_t valid = std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; });
    double ce_scale = divisor == "all" ? 1.0 / (B * T) : 1.0 / std::max<int64_t>(valid, 1);
    Verify v;
    bool for_bf16 = BF16 && f.metadata.count("bf16_rtol");      // then rtol and atol are those of fp32
    const double tolerance = rtol >= 0 ? rtol : for_bf16 ? number("bf16_rtol", 0) : number("rtol", BF16 ? 3e-2 : 1e-4);
    v.atol = for_bf16 ? 0 : number("atol", 0);
    // In BF16, where the file says how far PyTorch's own bf16 runs are from it: 1.25 times the worse of its two attentions
    auto peers_limit = [&](const char* what, double otherwise) -> double {
        std::string eager = std::string("bf16_eager_") + what, sdpa = std::string("bf16_sdpa_") + what;
        return BF16 && rtol < 0 && f.metadata.count(eager) && f.metadata.count(sdpa) ? 1.25 * std::max(number(eager.c_str(), 0), number(sdpa.c_str(), 0)) : otherwise;
    };

    device_open();
    Olmoe m;
    olmoe_allocate(&m, c, (int)B, (int)T, 0, f.find("losses") ? Use::training : backward ? Use::gradients : Use::inference);
    olmoe_load(&m, model);
    printf("%-58s %9s  %8s\n", "tensor", "error", "of limit");
    olmoe_forward(&m, inputs.data(), (int)B, (int)T);
    cudaCheck(cudaDeviceSynchronize());
    std::vector<float> logits = device_floats(m.acts.logits, (size_t)B * T * c.V);
    v.rtol = peers_limit("logits", tolerance);
    if (const SafeTensor* t = f.find("logits")) verify_tensor(&v, "logits", logits, floats(t));
    v.rtol = tolerance;
    if (const SafeTensor* t = f.find("logits_mean")) {
        std::vector<float> mean(B * T);
        for (int64_t i = 0; i < B * T; i++) {
            double sum = 0;
            for (int j = 0; j < c.V; j++) sum += logits[i * c.V + j];
            mean[i] = (float)(sum / c.V);
        }
        verify_tensor(&v, "logits_mean", mean, floats(t));
    }
    if (const SafeTensor* t = f.find("logits_slice")) {
        std::vector<float> slice;
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < t->shape[1]; i++)
                slice.insert(slice.end(), &logits[(b * T + i) * c.V], &logits[(b * T + i) * c.V] + t->shape[2]);
        verify_tensor(&v, "logits_slice", slice, floats(t));
    }
    v.rtol = peers_limit("router", tolerance);
    size_t sets = 0, other_sets = 0;        // expert sets of tokens, over all layers; those that differ
    for (int l = 0; l < c.L; l++) {
        std::string prefix = "router." + std::to_string(l);
        const SafeTensor *logits_ref = f.find(prefix + ".logits"), *experts_ref = f.find(prefix + ".experts");
        std::vector<float> ref_logits;
        if (logits_ref) {
            std::vector<float> z((size_t)B * T * c.E);
            copy_to_host(z.data(), m.acts.layers[l].router_logits, z.size());
            ref_logits = floats(logits_ref);
            verify_tensor(&v, prefix + ".logits", z, ref_logits);
        }
        if (experts_ref) {
            // a rank may differ where the reference's own logits of the two experts are as good as equal
            std::vector<int> ids((size_t)B * T * c.K), ref = ints(experts_ref);
            copy_to_host(ids.data(), m.acts.layers[l].experts, ids.size());
            size_t differ = 0, first = 0;
            for (size_t i = 0; i < ids.size(); i++) {
                if (ref[i] < 0 || ref[i] >= c.E) die("%s: %s.experts holds the id %d, there are %d experts", reference.c_str(), prefix.c_str(), ref[i], c.E);
                bool close = !ref_logits.empty() && std::fabs(ref_logits[i / c.K * c.E + ids[i]] - ref_logits[i / c.K * c.E + ref[i]]) < 1e-5f;
                if (ids[i] != ref[i] && !close && differ++ == 0) first = i;
            }
            std::string where = differ ? text("expert %d for %d at token %zu", ids[first], ref[first], first / c.K) : "";
            double share = (double)differ / ids.size();
            v.compared++;
            verify_line(&v, text("%s.experts (%.2f %% agree)", prefix.c_str(), 100 * (1 - share)), share, BF16 ? 1 : 1e-12, where);
            for (size_t t = 0; t < ids.size(); t += c.K, sets++) {      // now in whatever order
                std::sort(&ids[t], &ids[t] + c.K);
                std::sort(&ref[t], &ref[t] + c.K);
                other_sets += !std::equal(&ids[t], &ids[t] + c.K, &ref[t]);
            }
        }
    }
    if (double limit = peers_limit("experts", 0); limit > 0 && sets > 0)
        verify_line(&v, text("tokens with other experts, all layers (%zu of %zu)", other_sets, sets), (double)other_sets / sets, limit, "");
    v.rtol = tolerance;
    bool scalars = f.find("loss") || f.find("ce_loss") || f.find("lb_loss") || f.find("z_loss");
    if (scalars || backward) {
        const SafeTensor* losses_ref = f.find("losses");
        AdamWOptions o;
        o.lr = number("lr", 4e-4); o.beta1 = number("beta1", 0.9); o.beta2 = number("beta2", 0.95); o.eps = number("eps", 1e-8);
        o.weight_decay = number("weight_decay", 0.1); o.grad_clip = number("grad_clip", 0);
        int steps = losses_ref ? (int)losses_ref->shape[0] : 1;
        std::vector<float> losses;
        for (int s = 0; s < steps; s++) {
            if (s > 0) olmoe_forward(&m, inputs.data(), (int)B, (int)T);
            olmoe_cross_entropy(&m, targets.data(), (float)ce_scale);
            if (backward) {
                olmoe_zero_grad(&m);
                olmoe_backward(&m, inputs.data(), lb_coef, z_coef, 1);
            }
            Losses l = olmoe_losses(&m, ce_scale, lb_coef, z_coef);
            losses.push_back((float)l.loss);
            if (s == 0) {
                const std::pair<const char*, double> terms[] = {{"loss", l.loss}, {"ce_loss", l.nll * ce_scale}, {"lb_loss", l.lb}, {"z_loss", l.z}};
                for (auto& term : terms)
                    if (const SafeTensor* t = f.find(term.first)) verify_tensor(&v, term.first, {(float)term.second}, floats(t));
                double largest = 0;
                for (const SafeTensor* t : grads) {
                    double square = 0;
                    if (t) for (float x : floats(t)) square += (double)x * x;
                    largest = std::max(largest, sqrt(square));
                }
                for (size_t i = 0; i < tensors.size(); i++)
                    if (grads[i]) verify_tensor(&v, grads[i]->name, device_floats(parameter_at(m.grad_spans, tensors[i].offset), tensors[i].count), floats(grads[i]), largest);
            }
            if (s + 1 < steps) olmoe_update(&m, s + 1, olmoe_grad_norm(&m), o);
        }
        if (losses_ref) verify_tensor(&v, "losses", losses, floats(losses_ref));
    }
    if ((size_t)v.compared != to_compare) die("%s: %zu tensors are to be compared, %d were; is a router's layer written with zeros?", reference.c_str(), to_compare, v.compared);
    printf("%d tensors compared, %zu in the reference, %zu parameters in the model: %s\n", v.compared, to_compare, tensors.size(), v.failed ? "they DIFFER" : "they agree");
    olmoe_free(&m);
    device_close();
    safetensors_close(&f);
    return v.failed > 0;
}

// ------------------------------------------------------------------------------------------------
// olmoe generate: prompts go through the training forward, then each step runs one row of every sequence at work, against the cache

struct SamplingOptions {
    double temperature = 0.8, top_p = 1, min_p = 0, repetition_penalty = 1;
    int64_t top_k = 0;
};

// The next token after logits (V), and the log of its probability in the model as it is. In this order, as in transformers: the penalty
// (Keskar et al. 2019) of tokens seen before, temperature, the top_k largest, the fewest that have top_p of the probability together, and
// of these the ones that have min_p of the largest's. temperature 0: the largest, of equal ones the lowest id. random: uniform in (0, 1].
int choose_token(const std::vector<float>& unchanged, const SamplingOptions& o, const std::vector<int>& seen, double random, double* logprob) {
    const int V = (int)unchanged.size();
    float largest = -INFINITY;
    for (int i = 0; i < V; i++) largest = fmaxf(largest, unchanged[i]);
    double sum = 0;
    for (int i = 0; i < V; i++) sum += expf(unchanged[i] - largest);
    const double lse = largest + log(sum);
    if (!std::isfinite(lse)) die("the model's logits are not finite; are its weights damaged?");
    std::vector<float> penalised;
    if (o.repetition_penalty != 1) {
        penalised = unchanged;
        for (int id : std::set<int>(seen.begin(), seen.end()))
            if (id < V) penalised[id] = (float)(penalised[id] > 0 ? penalised[id] / o.repetition_penalty : penalised[id] * o.repetition_penalty);
        largest = *std::max_element(penalised.begin(), penalised.end());
    }
    const std::vector<float>& logits = penalised.empty() ? unchanged : penalised;

    int best = (int)(std::find(logits.begin(), logits.end(), largest) - logits.begin()), chosen = best;
    if (o.temperature > 0) {
        std::vector<std::pair<double, int>> p(logits.size());       // probability over the largest's, -id: of equal ones the lower is the larger pair
        double total = 0, kept = 0;
        for (size_t i = 0; i < p.size(); i++) total += (p[i] = {exp(((double)logits[i] - logits[best]) / o.temperature), -(int)i}).first;
        size_t n = 0, sorted = 0;
        auto sort_to = [&](size_t end) { std::partial_sort(p.begin() + sorted, p.begin() + end, p.end(), std::greater<>()); sorted = end; };
        if (o.top_k > 0 && o.top_k < (int64_t)p.size()) {
            sort_to(o.top_k);
            p.resize(o.top_k);
            total = 0;
            for (auto& [probability, id] : p) total += probability;
        }
        if (o.top_p < 1 || o.min_p > 0) {                           // sorted only as far as it matters
            for (; n < p.size(); kept += p[n++].first) {
                if (n == sorted) sort_to(std::min(p.size(), 4 * sorted + 64));
                if (n > 0 && ((o.top_p < 1 && kept >= o.top_p * total) || p[n].first < o.min_p)) break;
            }
            p.resize(n);
            total = kept;
        }
        size_t i = 0;
        for (double r = random * total; i + 1 < p.size() && r > p[i].first; i++) r -= p[i].first;
        chosen = -p[i].second;
    }
    *logprob = unchanged[chosen] - lse;
    return chosen;
}

// A text to be continued
struct Sequence {
    std::vector<int> ids;                   // the prompt's tokens, then those generated
    size_t prompt = 0;                      // tokens of the prompt
    int number = 0, sample = 0;             // of the prompt among the inputs, of the sample among its prompt's
    Json id;                                // what the input calls it
    int slot = -1;                          // in the cache
    std::vector<double> logprobs;           // of the tokens generated
    TextStream stream;
    std::string text, finish;               // generated; "eos", "stop" (a stop string, which is not part of text), "length"
};

struct GenerateOptions {
    SamplingOptions sampling;
    std::vector<std::string> stop;
    int64_t max_tokens = 128, seed = 0;
    int eos = -1;
    const Tokenizer* tokenizer = nullptr;
};

struct GenerateCounts { size_t prompt = 0, generated = 0; double prefill_seconds = 0, decode_seconds = 0; };

// Appends the next token to a sequence, and says in `finish` whether it was the last.
void sequence_append(Sequence* s, const std::vector<float>& logits, const GenerateOptions& o, size_t most) {
    double logprob, random = uniform(philox((uint64_t)o.seed, (uint64_t)s->number << 40 | (uint64_t)s->sample << 20 | (s->ids.size() - s->prompt)).x[0]);
    int id = choose_token(logits, o.sampling, s->ids, random, &logprob);
    s->ids.push_back(id);
    s->logprobs.push_back(logprob);
    if (id == o.eos) s->finish = "eos";
    else if ((int64_t)(s->ids.size() - s->prompt) == o.max_tokens || s->ids.size() == most) s->finish = "length";
    if (!o.tokenizer) return;
    size_t before = s->text.size();
    if (id != o.eos) s->text += stream_next(&s->stream, *o.tokenizer, id);
    if (!s->finish.empty()) s->text += stream_end(&s->stream);
    size_t found = std::string::npos;
    for (const std::string& stop : o.stop) found = std::min(found, s->text.find(stop, before - std::min(before, stop.size() - 1)));
    if (found != std::string::npos) { s->text.resize(found); s->finish = "stop"; }
}

// Continues all sequences, as many at a time as the cache has slots. `told` is called with a sequence whenever it has a new token. What a
// sequence becomes depends neither on the others nor on their number, but for rounding in the matmuls.
template <typename Told> GenerateCounts generate(Olmoe* m, std::vector<Sequence>* sequences, const GenerateOptions& o, Told told) {
    const OlmoeConfig& c = m->config;
    const size_t V = c.V, usable = o.tokenizer ? std::min<size_t>(V, o.tokenizer->vocab) : V, rows = (size_t)m->max_B * m->max_T;
    std::vector<floatX> logits;
    std::vector<Sequence*> active;
    std::vector<int> free, ids, slots, positions, lengths;
    GenerateCounts counts;
    for (int slot = m->cache.S - 1; slot >= 0; slot--) free.push_back(slot);
    auto append = [&](Sequence* s, size_t row) {            // the padding of the vocabulary is never chosen
        sequence_append(s, std::vector<float>(logits.begin() + row * V, logits.begin() + row * V + usable), o, m->cache.P);
        counts.generated++;
        told(s);
    };
    auto fetch = [&](size_t n) { logits.resize(n * V); copy_to_host(logits.data(), m->acts.logits, n * V); };
    for (size_t next = 0; next < sequences->size() || !active.empty(); ) {
        // prompts into free slots, as many as fit into a batch; samples of one prompt share its row, and then copy its keys and values
        double start = seconds_now();
        std::vector<std::pair<Sequence*, int>> begun;       // and its row
        size_t longest = 0;
        lengths.clear(); slots.clear();
        for (; next < sequences->size() && begun.size() < free.size(); next++) {
            Sequence* s = &(*sequences)[next];
            bool same = !begun.empty() && begun.back().first->number == s->number;
            if (!same && (lengths.size() + 1) * std::max(longest, s->ids.size()) > rows) break;
            s->slot = free[free.size() - 1 - begun.size()];
            if (!same) { longest = std::max(longest, s->ids.size()); lengths.push_back((int)s->ids.size()); slots.push_back(s->slot); }
            begun.push_back({s, (int)lengths.size() - 1});
        }
        if (!begun.empty()) {
            free.resize(free.size() - begun.size());
            ids.assign(lengths.size() * longest, 0);
            for (auto& [s, row] : begun) std::copy(s->ids.begin(), s->ids.end(), ids.begin() + row * longest);
            olmoe_prefill(m, ids.data(), slots.data(), lengths.data(), (int)lengths.size(), (int)longest);
            fetch(lengths.size());
            for (auto& [s, row] : begun) {
                size_t P = m->cache.P, D = c.C / c.H, H = c.H, S = m->cache.S, n = (size_t)lengths[row] * D * sizeof(floatX);
                for (size_t h = 0; h < c.L * H && s->slot != slots[row]; h++)       // heads of all layers
                    for (floatX* cache : {m->cache.keys, m->cache.values}) {
                        floatX *to = cache + ((h / H * S + s->slot) * H + h % H) * P * D, *from = cache + ((h / H * S + slots[row]) * H + h % H) * P * D;
                        cudaCheck(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, main_stream.stream));
                    }
                append(s, row);
                active.push_back(s);
            }
            for (int n : lengths) counts.prompt += n;
            counts.prefill_seconds += seconds_now() - start;
        }
        for (size_t i = 0; i < active.size(); )
            if (active[i]->finish.empty()) i++;
            else { free.push_back(active[i]->slot); active.erase(active.begin() + i); }
        if (active.empty()) continue;
        start = seconds_now();
        ids.clear(); slots.clear(); positions.clear();
        for (Sequence* s : active) { ids.push_back(s->ids.back()); slots.push_back(s->slot); positions.push_back((int)s->ids.size() - 1); }
        olmoe_decode(m, ids.data(), slots.data(), positions.data(), (int)active.size());
        fetch(active.size());
        for (size_t i = 0; i < active.size(); i++) append(active[i], i);
        counts.decode_seconds += seconds_now() - start;
    }
    return counts;
}

// Token ids from text: 1,306,4658
std::vector<int> parse_ids(const std::string& text, int V) {
    std::vector<int> ids;
    for (const char* p = text.c_str(); ; p++) {
        char* end;
        long id = strtol(p, &end, 10);
        if (end == p || (*end && *end != ',') || id < 0 || id >= V) die("--ids %s: numbers from 0 to %d with commas between them", text.c_str(), V - 1);
        ids.push_back((int)id);
        p = end;
        if (!*p) return ids;
    }
}

int command_generate(int argc, char** argv) {
    GenerateOptions o;
    std::string model, input, ids, tokenizer_name, system_text;
    std::vector<std::string> prompts;
    int64_t n = 1, S = 8;
    bool chat = false, json = false, logprobs = false, stats = false;
    options_parse(argc, argv, "generate --model DIR --prompt TEXTS | --ids IDS | --input FILE.jsonl | --chat  [options]", {
        {"model", Option::TEXT, &model, "DIR", "Hugging Face directory, or a checkpoint"},
        {"prompt", Option::LIST, &prompts, "TEXTS", "texts to continue"},
        {"ids", Option::TEXT, &ids, "1,2,3", "token ids to continue, where there is no tokenizer"},
        {"input", Option::TEXT, &input, "FILE.jsonl", "a JSON object a line: {\"prompt\": TEXT}, {\"ids\": [...]} or {\"messages\": [{\"role\", \"content\"}, ...]}, and any \"id\"; - is standard input"},
        {"tokenizer", Option::TEXT, &tokenizer_name, "NAME", "bytes, or a tokenizer.json; default: the model's"},
        {"chat", Option::FLAG, &chat, "", "prompts are messages to an Instruct model; without any, talk to it"},
        {"system", Option::TEXT, &system_text, "TEXT", "with --chat: a system message before"},
        {"max-tokens", Option::INTEGER, &o.max_tokens, "N", "tokens to generate at most", 1, 1 << 20},
        {"temperature", Option::NUMBER, &o.sampling.temperature, "X", "0: always the likeliest token", 0, 1e3},
        {"top-k", Option::INTEGER, &o.sampling.top_k, "K", "only of the K likeliest tokens; 0: of all", 0, 1 << 30},
        {"top-p", Option::NUMBER, &o.sampling.top_p, "P", "only of the likeliest that have P of the probability together", 1e-9, 1},
        {"min-p", Option::NUMBER, &o.sampling.min_p, "P", "only of those that are P times as likely as the likeliest", 0, 1},
        {"repetition-penalty", Option::NUMBER, &o.sampling.repetition_penalty, "X", "divides positive logits of tokens seen before, and multiplies negative ones", 1e-3, 1e3},
        {"stop", Option::LIST, &o.stop, "TEXTS", "texts that end a sequence"},
        {"seed", Option::INTEGER, &o.seed, "N", "of the random choices", 0, 9e15},
        {"n", Option::INTEGER, &n, "N", "samples of each prompt", 1, 1 << 20},
        {"batch", Option::INTEGER, &S, "B", "sequences at a time", 1, 1 << 16},
        {"json", Option::FLAG, &json, "", "a JSON object a sample, a line each"},
        {"logprobs", Option::FLAG, &logprobs, "", "with --json: log-probabilities of the tokens in the model, at temperature 1"},
        {"stats", Option::FLAG, &stats, "", "tokens a second, on standard error"},
    });
    if (model.empty()) die("generate needs --model DIR");
    bool talk = chat && prompts.empty() && ids.empty() && input.empty();
    if (!talk && prompts.empty() + ids.empty() + input.empty() != 2) die("generate needs one of --prompt TEXTS, --ids IDS, --input FILE.jsonl, or --chat");
    for (const std::string& stop : o.stop) if (stop.empty()) die("--stop: an empty text would end every sequence at once");
    if (logprobs && !json) die("--logprobs needs --json");
    if (talk && (json || n > 1)) die("--%s needs prompts: --prompt or --input", json ? "json" : "n");
    if (chat && !ids.empty()) die("--chat takes texts, not --ids");
    if (!system_text.empty() && !chat) die("--system needs --chat");
    OlmoeConfig c;
    config_read(&c, model);
    Tokenizer tokenizer;
    if (tokenizer_name.empty() && access((model + "/tokenizer.json").c_str(), F_OK) == 0) tokenizer_name = model;
    if (!tokenizer_name.empty()) {
        tokenizer_open(&tokenizer, tokenizer_name);
        if (tokenizer.vocab > c.V) die("the tokenizer's %d ids don't fit the model's vocabulary of %d", tokenizer.vocab, c.V);
        o.tokenizer = &tokenizer;
    }
    o.eos = o.tokenizer ? tokenizer.eos : c.eos_token_id;
    if (!o.tokenizer && (chat || !prompts.empty() || !o.stop.empty())) die("%s has no tokenizer.json; give --tokenizer, or token ids by --ids", model.c_str());

    // the prompts
    std::vector<Sequence> sequences;
    std::vector<ChatMessage> messages;
    if (!system_text.empty()) messages.push_back({"system", system_text});
    auto encode = [&](const std::string& text) {
        std::vector<int> tokens = tokenizer_encode(tokenizer, text);
        if (tokens.empty()) tokens.push_back(o.eos);
        return tokens;
    };
    auto encode_chat = [&](const std::vector<ChatMessage>& said) { return encode(chat_prompt(said, true, tokenizer_decode(tokenizer, tokenizer.eos))); };
    auto asked = [&](const std::string& text) { std::vector<ChatMessage> all = messages; all.push_back({"user", text}); return encode_chat(all); };
    auto add = [&](const std::vector<int>& tokens, const Json& id) {
        int number = sequences.empty() ? 0 : sequences.back().number + 1;
        for (int i = 0; i < n; i++) {
            Sequence s;
            s.ids = tokens; s.prompt = tokens.size(); s.number = number; s.sample = i; s.id = id;
            sequences.push_back(s);
        }
    };
    for (const std::string& prompt : prompts) add(chat ? asked(prompt) : encode(prompt), nullptr);
    if (!ids.empty()) add(parse_ids(ids, c.V), nullptr);
    if (!input.empty()) {
        std::ifstream file;
        if (input != "-") file.open(input);
        std::istream& in = input == "-" ? std::cin : file;
        if (!in) die("%s: cannot be read: %s", input.c_str(), strerror(errno));
        std::string line;
        for (size_t number = 1; std::getline(in, line); number++) {
            if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
            Json j = json_parse(line);
            auto where = [&] { return input + ":" + std::to_string(number); };
            try {
                if (j.is_object() && j.contains("ids")) {
                    std::vector<int> tokens;
                    if (!j["ids"].is_array() || j["ids"].empty()) die("%s: ids is no list of token ids", where().c_str());
                    for (const Json& id : j["ids"]) {
                        if (!id.is_number_integer() || id < 0 || id >= c.V) die("%s: the id %s is none from 0 to %d", where().c_str(), json_shown(id).c_str(), c.V - 1);
                        tokens.push_back(id);
                    }
                    add(tokens, j.value("id", Json()));
                } else if (o.tokenizer && j.is_object() && j.contains("messages")) {
                    std::vector<ChatMessage> said;
                    if (!j["messages"].is_array() || j["messages"].empty()) die("%s: messages is no list of messages", where().c_str());
                    for (const Json& message : j["messages"]) said.push_back({message.at("role"), message.at("content")});
                    add(encode_chat(said), j.value("id", Json()));
                } else if (o.tokenizer && j.is_object() && j.contains("prompt")) {
                    std::string prompt = j["prompt"];
                    add(chat ? asked(prompt) : encode(prompt), j.value("id", Json()));
                } else die("%s: not a JSON object with %s", where().c_str(), o.tokenizer ? "\"prompt\", \"ids\" or \"messages\"" : "\"ids\" (there is no tokenizer)");
            } catch (const Json::exception& e) { die("%s: %s", where().c_str(), e.what()); }
        }
        if (sequences.empty()) die("%s: no prompt in it", input.c_str());
    }
    size_t longest = 0, total = 0;
    for (const Sequence& s : sequences) { longest = std::max(longest, s.ids.size()); total += s.sample == 0 ? s.ids.size() : 0; }
    if (talk) longest = c.max_T - 1;
    if (longest >= (size_t)c.max_T) die("a prompt of %zu tokens leaves no room: max_position_embeddings is %d", longest, c.max_T);
    S = talk ? 1 : std::min<int64_t>(S, sequences.size());
    int P = (int)std::min<int64_t>(c.max_T, longest + o.max_tokens), rows = (int)std::max({longest, std::min<size_t>(total, 2048), (size_t)S});

    device_open();
    Olmoe m;
    olmoe_allocate(&m, c, 1, rows, 0, Use::inference, (int)S, P);
    olmoe_load(&m, model);
    // what could still become a stop string is held back
    auto ready = [&](const Sequence& s) {
        size_t hold = 0;
        if (s.finish.empty())
            for (const std::string& stop : o.stop)
                for (size_t k = std::min(stop.size() - 1, s.text.size()); k > hold; k--)
                    if (s.text.compare(s.text.size() - k, k, stop, 0, k) == 0) hold = k;
        return s.text.size() - hold;
    };
    size_t printed = 0;
    auto stream_text = [&](Sequence* s) { size_t end = ready(*s); fwrite(s->text.data() + printed, 1, end - printed, stdout); printed = end; fflush(stdout); };
    while (talk) {
        if (isatty(STDIN_FILENO)) { printf("> "); fflush(stdout); }
        std::string line;
        if (!std::getline(std::cin, line)) break;
        messages.push_back({"user", line});
        sequences.clear();
        add(encode_chat(messages), nullptr);
        sequences.resize(1);
        if (sequences[0].ids.size() >= (size_t)c.max_T) die("the conversation has grown to %zu tokens: max_position_embeddings is %d", sequences[0].ids.size(), c.max_T);
        printed = 0;
        generate(&m, &sequences, o, stream_text);
        printf("\n");
        messages.push_back({"assistant", sequences[0].text});
    }
    if (!talk) {
        bool streaming = sequences.size() == 1 && !json && o.tokenizer;
        size_t told = 0;                    // sequences that are printed
        auto print = [&](const Sequence& s) {
            std::vector<int> generated(s.ids.begin() + s.prompt, s.ids.end());
            if (json) {
                Json j = {{"prompt", s.number}, {"sample", s.sample}};
                if (!s.id.is_null()) j["id"] = s.id;
                if (o.tokenizer) j["text"] = s.text;
                j["ids"] = generated;
                j["finish"] = s.finish;
                j["prompt_tokens"] = s.prompt;
                if (logprobs) j["logprobs"] = s.logprobs;
                printf("%s\n", j.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
                return;
            }
            if (sequences.size() > 1) printf("%s--- prompt %d, sample %d\n", told ? "\n" : "", s.number, s.sample);
            if (o.tokenizer) { fwrite(s.text.data(), 1, s.text.size(), stdout); printf("\n"); }
            for (size_t i = 0; i < generated.size() && !o.tokenizer; i++) printf("%d%s", generated[i], i + 1 < generated.size() ? "," : "\n");
        };
        GenerateCounts counts = generate(&m, &sequences, o, [&](Sequence* s) {
            if (streaming) stream_text(s);
            for (; !streaming && told < sequences.size() && !sequences[told].finish.empty(); told++) print(sequences[told]);      // in the order of the input
            fflush(stdout);
        });
        if (streaming) printf("\n");
        if (stats)
            fprintf(stderr, "prompts: %zu tokens, %.1f a second; generated: %zu tokens, %.1f a second behind the first of each\n", counts.prompt, counts.prompt / counts.prefill_seconds,
                    counts.generated, (counts.generated - sequences.size()) / std::max(counts.decode_seconds, 1e-9));
    }
    olmoe_free(&m);
    device_close();
    return 0;
}

// ------------------------------------------------------------------------------------------------
// olmoe info, olmoe tokenize, main

// What a rank gives to each kind of collective in a step of so many micro-batches, in bytes; rows at even routing. The formulas are in
// docs/scaling.md; the training log has what was really sent.
struct Scale { double gradients = 0, experts_gradients = 0, parameters = 0, experts_parameters = 0, rows = 0; };

Scale plan_traffic(const Olmoe& m, double tokens, int recompute) {
    const OlmoeConfig& c = m.config;
    Scale s;
    double x = sizeof(floatX), G = expert_group.size;
    for (const Span& span : m.param_spans) {
        if (span.group().size == 1) continue;
        (span.expert ? s.experts_gradients : s.gradients) += (double)span.allocated() * x;
        if (zero) (span.expert ? s.experts_parameters : s.parameters) += (double)span.share * x;
    }
    // rows to the experts and back, their gradients there and back, a weight and its gradient for each; again what --recompute forgets
    s.rows = tokens * c.L * c.K * ((recompute >= 1 ? 5 : 4) * c.C * x + 2 * sizeof(float)) * (G - 1) / G;
    return s;
}

int command_info(int argc, char** argv) {
    std::string config, model, master_weights = "fp32", moments = "fp32";
    int64_t B = 4, T = 0, recompute = 0, gpus = 1, ep = 1, zero_1 = 0, global_batch = 0, per_node = 8;
    double tflops = 400, memory = 80, memory_bandwidth = 3000, node_bandwidth = 300, network_bandwidth = 40;
    options_parse(argc, argv, "info --config FILE | --model DIR [options]", {
        {"config", Option::TEXT, &config, "FILE", "a config.json"},
        {"model", Option::TEXT, &model, "DIR", "a Hugging Face directory"},
        {"batch", Option::INTEGER, &B, "B", "sequences of a micro-batch", 1, 1 << 20},
        {"seq", Option::INTEGER, &T, "T", "tokens of a sequence; 0: max_position_embeddings", 0, 1 << 20},
        {"recompute", Option::INTEGER, &recompute, "0|1|2", "as in train", 0, 2},
        {"master-weights", Option::CHOICE, &master_weights, MASTERS_CHOICE, "as in train"},
        {"moments", Option::CHOICE, &moments, MOMENTS_CHOICE, "as in train"},
        {"memory", Option::NUMBER, &memory, "X", "GB of a GPU's memory", 1e-6, 1e9},
        {"gpus", Option::INTEGER, &gpus, "N", "plan of one of N GPUs: memory, bytes sent, time", 1, 1 << 16},
        {"ep", Option::INTEGER, &ep, "G", "as in train", 1, 1 << 16},
        {"zero", Option::INTEGER, &zero_1, "0|1", "as in train", 0, 1},
        {"global-batch", Option::INTEGER, &global_batch, "G", "as in train", 0, 1 << 24},
        {"gpus-per-node", Option::INTEGER, &per_node, "N", "GPUs that a fast network joins", 1, 1 << 16},
        {"tflops", Option::NUMBER, &tflops, "X", "TFLOP/s that a GPU sustains over forward and backward", 1e-6, 1e9},
        {"memory-bandwidth", Option::NUMBER, &memory_bandwidth, "X", "GB/s of a GPU's memory", 1e-6, 1e9},
        {"node-bandwidth", Option::NUMBER, &node_bandwidth, "X", "GB/s that a GPU sends to others of its node", 1e-6, 1e9},
        {"network-bandwidth", Option::NUMBER, &network_bandwidth, "X", "GB/s that a GPU sends to other nodes", 1e-6, 1e9},
    });
    if (config.empty() == model.empty()) die("info needs either --config FILE or --model DIR");
    OlmoeConfig c;
    config_read(&c, config.empty() ? model : config);
    if (T == 0) T = c.max_T;
    if (gpus % ep != 0) die("%ld ranks can't be divided into groups of --ep %ld", gpus, ep);
    if (c.E % ep != 0) die("the model's %d experts can't be divided among --ep %ld ranks", c.E, ep);
    if (global_batch == 0) global_batch = B * gpus;
    if (global_batch % (B * gpus) != 0) die("--global-batch %ld is not a multiple of %ld ranks x --batch %ld", global_batch, gpus, B);
    layout_set(0, (int)gpus, (int)ep, zero_1 == 1);
    Olmoe m;
    choose_state(&m, master_weights, moments);
    olmoe_plan(&m, c, (int)B, (int)T, (int)recompute, Use::training);
    std::vector<std::pair<std::string, std::string>> box = {{"model", config.empty() ? model : config}};
    box_shapes(&box, c);
    box.push_back({"", ""});
    box.push_back({"FLOP a token", text("%s forward and backward at T = %ld, causal", human(flops_per_token(c, (int)T), "FLOP").c_str(), T)});
    box.push_back({"", ""});
    box.push_back({"training", text("%s, %ld x %ld tokens a micro-batch, --recompute %ld", BF16 ? "BF16" : "FP32", B, T, recompute)});
    box_memory(&box, m);
    box.push_back({"", ""});
    box.push_back({text("fits %g GB?", memory), "--master-weights, --moments: all of the plan"});
    for (const char* masters : {"fp32", "remainder", "none"})
        for (const char* kept : {"fp32", "bf16"}) {
            if (!BF16 && strcmp(masters, "fp32") != 0) continue;
            Olmoe other;
            double sum;
            choose_state(&other, masters, kept);
            olmoe_plan(&other, c, (int)B, (int)T, (int)recompute, Use::training);
            memory_plan(other, &sum);
            box.push_back({sum <= memory * 1e9 ? "yes" : "no", text("%s, %s: %s", masters, kept, human(sum, "B").c_str())});
        }
    if (gpus > 1) {
        double tokens = (double)global_batch * T / gpus, dense = world.size, copies = replica_group.size, G = expert_group.size;      // tokens of a rank and step
        Scale sent = plan_traffic(m, tokens, (int)recompute);
        auto seconds = [&](double bytes, double ranks) { return bytes / (1e9 * (ranks <= per_node ? node_bandwidth : network_bandwidth)); };
        // on the wire a rank sends (n-1)/n of an array to reduce-scatter it, n-1 shares to gather one, and both to all-reduce
        double reduce = seconds(sent.gradients * (dense - 1) / dense * (zero ? 1 : 2), dense) + (copies > 1 ? seconds(sent.experts_gradients * (copies - 1) / copies * (zero ? 1 : 2), copies * G) : 0);
        double gather = seconds(sent.parameters * (dense - 1), dense) + seconds(sent.experts_parameters * (copies - 1), copies * G);
        double rows = seconds(sent.rows, G), compute = tokens * flops_per_token(c, (int)T) / (tflops * 1e12);
        // AdamW reads and writes its state, reads gradients, writes weights, and reads them where there is no fp32 copy
        double update = (2.0 * m.optimizer_memory.bytes() + (m.masters == Masters::fp32 ? 2 : 3) * sizeof(floatX) * num_updated(m.param_spans)) / (memory_bandwidth * 1e9);
        // what runs beside a reduction: the last backward, with --ep but for the experts (see olmoe_backward)
        double beside = compute * 2 / 3 * (B * gpus) / global_batch * (ep > 1 ? 1 - 18.0 * c.L * c.K * c.C * c.F / flops_per_token(c, (int)T) : 1), hidden = std::min(reduce, beside);
        double step = compute + rows + reduce - hidden + update + gather;
        box.push_back({"", ""});
        box.push_back({"layout", text("%ld GPUs, experts over %ld, each held by %d, ZeRO-1 %s", gpus, ep, replica_group.size, zero ? "on" : "off")});
        box.push_back({"step", text("%s tokens, %s a GPU", human((double)global_batch * T).c_str(), human(tokens).c_str())});
        box.push_back({"sent: gradients", human(sent.gradients + sent.experts_gradients, "B") + " a step"});
        box.push_back({"sent: parameters", human(sent.parameters + sent.experts_parameters, "B") + " a step"});
        box.push_back({"sent: rows", text("%s a step, %s a token", human(sent.rows, "B").c_str(), human(sent.rows / tokens, "B").c_str())});
        box.push_back({"time: compute", text("%.2f ms at %s", 1e3 * compute, human(tflops * 1e12, "FLOP/s").c_str())});
        box.push_back({"time: rows", text("%.2f ms", 1e3 * rows)});
        box.push_back({"time: gradients", text("%.2f ms, of which %.2f behind the last backward", 1e3 * reduce, 1e3 * hidden)});
        box.push_back({"time: update, gathering", text("%.2f ms, %.2f ms", 1e3 * update, 1e3 * gather)});
        box.push_back({"time: step (estimate)", text("%.2f ms, %s tokens/s a GPU, %s in all", 1e3 * step, human(tokens / step).c_str(), human(gpus * tokens / step).c_str())});
    }
    print_box(box);
    if (!model.empty()) {
        ModelWeights w;
        weights_open(&w, model, c);
        std::vector<HfTensor> tensors = hf_tensors(c);
        std::vector<std::pair<std::string, size_t>> dtypes;
        for (size_t i = 0; i < tensors.size(); i++) {
            const std::string& dtype = weights_tensor(w, i).dtype;
            size_t j = 0;
            while (j < dtypes.size() && dtypes[j].first != dtype) j++;
            if (j == dtypes.size()) dtypes.push_back({dtype, 0});
            dtypes[j].second += tensors[i].count;
        }
        printf("%zu tensors, all there:", tensors.size());
        for (auto& d : dtypes) printf(" %s in %s", human((double)d.second).c_str(), d.first.c_str());
        printf("\n");
        weights_close(&w);
    }
    return 0;
}

int command_tokenize(int argc, char** argv) {
    std::string name, out;
    std::vector<std::string> inputs;
    int64_t max_tokens = 0, save_every = 1 << 25;
    TokenizeOptions o;
    options_parse(argc, argv, "tokenize --tokenizer NAME --out FILE.npy INPUT...   (.txt: a document a file; .jsonl: a document a line; gzipped or not)", {
        {"tokenizer", Option::TEXT, &name, "NAME", "a tokenizer.json, or a directory that holds one; or bytes: an id is a byte, 256 ends a document"},
        {"out", Option::TEXT, &out, "FILE.npy", "uint16 tokens without a header; FILE.csv.gz lists the documents"},
        {"max-tokens", Option::INTEGER, &max_tokens, "N", "more than fit below N begin another file: FILE-00000.npy, FILE-00001.npy, ...; 0: one file", 0, 1e15},
        {"save-every", Option::INTEGER, &save_every, "N", "tokens between saves, from where a stopped run goes on when it is called again", 1, 1e15},
        {"restart", Option::FLAG, &o.restart, "", "start over, whatever a stopped run saved or an earlier one wrote"},
    }, &inputs);
    if (name.empty() || out.empty() || inputs.empty()) die("tokenize needs --tokenizer NAME, --out FILE.npy and inputs (.txt: a document a file; .jsonl: a document a line)");
    if (out.size() < 5 || !ends_with(out, ".npy")) die("--out %s: the name of a token file ends in .npy", out.c_str());
    Tokenizer t;
    tokenizer_open(&t, name);
    const char* threads = getenv("OMP_NUM_THREADS");
    o.max_tokens = (size_t)max_tokens;
    o.save_every = (size_t)save_every;
    size_t cores = std::max(1u, std::thread::hardware_concurrency());
    o.threads = threads && atoi(threads) > 0 ? std::min<size_t>(atoi(threads), 4 * cores) : cores;
    TokenizeCounts counts = tokenize_files(t, inputs, out, o);
    std::string more = counts.files > 1 ? text(" in %zu files", counts.files) : "";
    if (counts.damaged > 0) more += text(", %zu damaged lines left out", counts.damaged);
    printf("%s: %zu documents, %zu tokens%s\n", out.c_str(), counts.documents, counts.tokens, more.c_str());
    return 0;
}

#ifndef TESTING
int main(int argc, char** argv) {
    struct { const char* name; int (*run)(int, char**); const char* help; } commands[] = {
        {"train", command_train, "train a model, from random weights or from a Hugging Face directory"},
        {"generate", command_generate, "continue texts, or talk to an Instruct model"},
        {"verify", command_verify, "compare logits, losses, gradients and routing with a reference file"},
        {"tokenize", command_tokenize, "text to token files"},
        {"info", command_info, "parameters, FLOPs and memory plan of a config or a model"},
    };
    for (int fd : {0, 1, 2}) if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) return 1;     // where one is closed, a file would take its number, and the messages
    setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
    signal(SIGXFSZ, SIG_IGN);               // a limit on file sizes is an error of the write, not the end of the program
    signal(SIGBUS, [](int) { const char line[] = "olmoe: a file became shorter while it was read, or shared memory is full\n"; (void)!write(2, line, sizeof line - 1); _exit(1); });
    for (auto& c : commands)
        if (argc > 1 && strcmp(argv[1], c.name) == 0) {
            int code = 1;
            try { code = c.run(argc, argv); } catch (const std::bad_alloc&) { die("out of memory"); }
            if (fflush(stdout) != 0 || ferror(stdout)) die("cannot write to standard output: %s", strerror(errno));
            return code;
        }
    bool help = argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0);
    if (argc > 1 && !help) die("unknown command '%s'; see olmoe --help", argv[1]);
    printf("usage: olmoe COMMAND [options]; olmoe COMMAND --help lists them\n");
    for (auto& c : commands) printf("  %-10s %s\n", c.name, c.help);
    return help ? 0 : 1;
}
#endif
