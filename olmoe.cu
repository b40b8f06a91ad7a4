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
Matrices are row-major; a linear layer's weight is (out, in) and computes y = x W^T, as in PyTorch.

Kernels have two shapes. Elementwise: a thread for each element. Row: a warp for each row, whose lanes stride over the
columns and meet only in warp_sum, warp_max and warp_argmax. There is no shared memory and there are no atomics, so that the
same inputs give the same bits, and so that the same text runs fast on a CPU, where a warp has one lane (cpu/).
*/
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <string>
#include <vector>
#include <unistd.h>
#include <sys/stat.h>

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_profiler_api.h>
#include <cublas_v2.h>

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
#ifndef CUBLAS_WORKSPACE_BYTES
#define CUBLAS_WORKSPACE_BYTES (32 << 20)   // what cuBLAS recommends for Hopper; one for each stream
#endif

constexpr int BLOCK = 256;                  // threads of a block
constexpr int PER_LANE = WARP == 1 ? 64 : 16;   // columns that a lane keeps in registers while it adds up rows
constexpr int CHUNK = WARP * PER_LANE;      // columns that a warp keeps so
constexpr int SLABS = 256;                  // at most so many partial sums when rows are added up
constexpr int ATTENTION_BLOCK = 256;        // queries whose scores exist at the same time
constexpr int EXPERT_STREAMS = 8;           // streams over which the experts' matmuls are spread

// ------------------------------------------------------------------------------------------------
// Errors and CUDA utilities

// One line on standard error and exit code 1.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void die(const char* format, ...) {
    fflush(stdout);
    va_list args;
    va_start(args, format);
    fprintf(stderr, "olmoe: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

#define cudaCheck(call) do { cudaError_t e_ = (call); \
    if (e_ != cudaSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); } while (0)
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

static Stream main_stream;                      // everything, in order, except
static Stream expert_streams[EXPERT_STREAMS];   // the matmuls of the experts

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
    cudaCheck(cudaSetDevice(0));
    stream_create(&main_stream);
    for (Stream& s : expert_streams) stream_create(&s);
}

void device_close() {
    cudaCheck(cudaDeviceSynchronize());
    stream_destroy(&main_stream);
    for (Stream& s : expert_streams) stream_destroy(&s);
}

// The expert streams go on from where the main stream is, and the main stream from where all of them are.
void fork_expert_streams() {
    cudaCheck(cudaEventRecord(main_stream.event, main_stream.stream));
    for (Stream& s : expert_streams) cudaCheck(cudaStreamWaitEvent(s.stream, main_stream.event, 0));
}

void join_expert_streams() {
    for (Stream& s : expert_streams) {
        cudaCheck(cudaEventRecord(s.event, s.stream));
        cudaCheck(cudaStreamWaitEvent(main_stream.stream, s.event, 0));
    }
}

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
#include "dataloader.h"     // token files -> batches, in OLMo's order
#include "checkpoint.h"     // Hugging Face directories, training state

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
    embedding_forward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(x, ids, w, N, C);
    cudaCheck(cudaGetLastError());
}

void embedding_backward(floatX* dw /* (V, C) += */, const floatX* dx /* (N, C) */, const int* touched /* (rows) ids */,
                               const int* start /* (rows+1) */, const int* tokens /* (N) */, int rows, int C) {
    embedding_backward_kernel<<<blocks_for_rows(rows), BLOCK, 0, main_stream.stream>>>(dw, dx, touched, start, tokens, rows, C);
    cudaCheck(cudaGetLastError());
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

// dw_i = sum over rows of dy_i x_i r. One warp per slab of rows.
__global__ void rmsnorm_backward_weight_kernel(float* partial, const floatX* dy, const floatX* x, const float* r, int N, int C, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;

    size_t begin = N * slab / slabs, end = N * (slab + 1) / slabs;
    for (int column = lane; column < C; column += CHUNK) {
        float sum[PER_LANE] = {};
        for (size_t row = begin; row < end; row++) {
            const floatX *g = dy + row * C, *in = x + row * C;
            float scale = r[row];
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) sum[c] += (float)g[column + c * WARP] * (float)in[column + c * WARP] * scale;
        }
        for (int c = 0; c < PER_LANE; c++)
            if (column + c * WARP < C) partial[slab * C + column + c * WARP] = sum[c];
    }
}

void rmsnorm_forward(floatX* y /* (N, C) */, float* r /* (N) */, const floatX* x /* (N, C) */, const floatX* w /* (C) */, int N, int C, float eps) {
    rmsnorm_forward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(y, r, x, w, N, C, eps);
    cudaCheck(cudaGetLastError());
}

void rmsnorm_backward(floatX* dx /* (N, C) += */, floatX* dw /* (C) += */, float* partial /* (SLABS, C) scratch */,
                             const floatX* dy, const floatX* x, const floatX* w, const float* r, int N, int C) {
    int slabs = slabs_for(N);
    rmsnorm_backward_input_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(dx, dy, x, w, r, N, C);
    rmsnorm_backward_weight_kernel<<<blocks_for_rows(slabs), BLOCK, 0, main_stream.stream>>>(partial, dy, x, r, N, C, slabs);
    sum_slabs_kernel<<<blocks_for(C), BLOCK, 0, main_stream.stream>>>(dw, partial, C, slabs);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------
// QK-norm and RoPE.  q and k are normalised over the whole projection, all heads together (Dehghani et al. 2023; OLMoE
// §4.2.5), and then rotated in pairs (j, j + D/2) of each head by the angle  t theta^(-2j/D)  at position t (Su et al. 2021).
// Statistics, tables and rotation are fp32; it is rounded where OLMo rounds: after r, after w, after the rotation.

// One warp per token. qk (N, 2C) receives q and k; v stays where the projection left it.
__global__ void qk_norm_rope_forward_kernel(floatX* qk, float* r, const floatX* qkv, const floatX* q_norm, const floatX* k_norm,
                                            const float* cosine, const float* sine, int N, int T, int C, int D, float eps) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP, half = D / 2;
    if (row >= (size_t)N) return;
    cosine += (row % T) * half; sine += (row % T) * half;

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

// dw of q_norm (columns 0..C-1) and k_norm (columns C..2C-1) side by side. One warp per slab of tokens.
__global__ void qk_norm_backward_weight_kernel(float* partial, const float* dqkv32, const floatX* qkv, const float* r, int N, int C, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;

    size_t begin = N * slab / slabs, end = N * (slab + 1) / slabs;
    for (int part = 0; part < 2; part++)
        for (int column = lane; column < C; column += CHUNK) {
            float sum[PER_LANE] = {};
            for (size_t row = begin; row < end; row++) {
                const float* dy = dqkv32 + row * 3 * C + part * C;
                const floatX* x = qkv + row * 3 * C + part * C;
                float scale = r[row * 2 + part];
                for (int c = 0; c < PER_LANE; c++)
                    if (column + c * WARP < C) sum[c] += dy[column + c * WARP] * (float)x[column + c * WARP] * scale;
            }
            for (int c = 0; c < PER_LANE; c++)
                if (column + c * WARP < C) partial[(part * slabs + slab) * C + column + c * WARP] = sum[c];
        }
}

void qk_norm_rope_forward(floatX* qk /* (N, 2C) */, float* r /* (N, 2) */, const floatX* qkv /* (N, 3C) */, const floatX* q_norm /* (C) */,
                                 const floatX* k_norm /* (C) */, const float* cosine /* (T, D/2) */, const float* sine, int N, int T, int C, int D, float eps) {
    qk_norm_rope_forward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(qk, r, qkv, q_norm, k_norm, cosine, sine, N, T, C, D, eps);
    cudaCheck(cudaGetLastError());
}

void qk_norm_rope_backward(floatX* dqkv /* (N, 3C) */, floatX* dq_norm /* (C) += */, floatX* dk_norm /* (C) += */, float* partial /* (2 SLABS, C) scratch */,
                                  float* dqkv32 /* (N, 3C), changed */, const floatX* qkv, const float* r, const floatX* q_norm, const floatX* k_norm,
                                  const float* cosine, const float* sine, int N, int T, int C, int D) {
    int slabs = slabs_for(N);
    qk_norm_rope_backward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(dqkv, dqkv32, qkv, r, q_norm, k_norm, cosine, sine, N, T, C, D);
    qk_norm_backward_weight_kernel<<<blocks_for_rows(slabs), BLOCK, 0, main_stream.stream>>>(partial, dqkv32, qkv, r, N, C, slabs);
    sum_slabs_kernel<<<blocks_for(C), BLOCK, 0, main_stream.stream>>>(dq_norm, partial, C, slabs);
    sum_slabs_kernel<<<blocks_for(C), BLOCK, 0, main_stream.stream>>>(dk_norm, partial + (size_t)slabs * C, C, slabs);
    cudaCheck(cudaGetLastError());
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
// One warp per query row. Recomputes P.
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
    for (int j = lane; j <= t; j += WARP) dscores[j] = (floatX)((float)probs[j] * (dprobs[j] - delta));
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
            attention_softmax_forward_kernel<<<blocks_for_rows((size_t)H * n), BLOCK, 0, main_stream.stream>>>(probs, lse + (size_t)b * H * T, scores, H, n, S, t0, T);
            cudaCheck(cudaGetLastError());
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
            attention_softmax_backward_kernel<<<blocks_for_rows((size_t)H * n), BLOCK, 0, main_stream.stream>>>(probs, dscores, dprobs, scores, lse + (size_t)b * H * T, H, n, S, t0, T);
            cudaCheck(cudaGetLastError());
            gemm(main_stream, dv, 3 * C, probs, S, true, dO, C, false, S, D, n, 1, add, H, D, square, D);
            gemm(main_stream, dq, 3 * C, dscores, S, false, k, 2 * C, false, n, D, S, scale, 0, H, D, square, D);
            gemm(main_stream, dk, 3 * C, dscores, S, true, q, 2 * C, false, S, D, n, scale, add, H, D, square, D);
        }
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
    router_forward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(probs, lse, experts, weights, logits, N, E, K, normalize);
    router_mean_kernel<<<blocks_for_rows(slabs), BLOCK, 0, main_stream.stream>>>(partial, probs, N, E, slabs);
    cudaCheck(cudaGetLastError());
}

void router_backward(floatX* dlogits /* (N, E) */, float* g /* (N, E) scratch */, const float* dweights /* (N, K) */, const float* probs, const float* lse,
                            const int* experts, const float* weights, const int* counts /* (E) */, int N, int E, int K, bool normalize, float lb_scale, float z_scale) {
    router_backward_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(dlogits, g, dweights, probs, lse, experts, weights, counts, N, E, K, normalize, lb_scale, z_scale);
    cudaCheck(cudaGetLastError());
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

// out_row = x_t for each routed row: the experts' input, and in backward the gradient of their output. One warp per row.
__global__ void gather_kernel(floatX* out, const floatX* x, const int* assignment_of, int R, int C, int K) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)R) return;
    x += (size_t)(assignment_of[row] / K) * C;
    for (int i = lane; i < C; i += WARP) out[row * C + i] = x[i];
}

void dispatch(int* row_of /* (R) */, int* assignment_of /* (R) */, int* counts /* (E) */, int* histogram /* (R/DISPATCH_SLAB, E) scratch */,
                     const int* experts /* (N, K) */, int R, int E) {
    int slabs = ceil_div(R, DISPATCH_SLAB);
    dispatch_count_kernel<<<blocks_for_rows(slabs), BLOCK, 0, main_stream.stream>>>(histogram, experts, R, E, slabs);
    dispatch_scan_kernel<<<blocks_for(E), BLOCK, 0, main_stream.stream>>>(counts, histogram, E, slabs);
    dispatch_place_kernel<<<blocks_for_rows(slabs), BLOCK, 0, main_stream.stream>>>(row_of, assignment_of, histogram, counts, experts, R, E, slabs);
    cudaCheck(cudaGetLastError());
}

void gather(floatX* out /* (R, C) */, const floatX* x /* (N, C) */, const int* assignment_of /* (R) */, int R, int C, int K) {
    gather_kernel<<<blocks_for_rows(R), BLOCK, 0, main_stream.stream>>>(out, x, assignment_of, R, C, K);
    cudaCheck(cudaGetLastError());
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
// One warp per routed row. Reads gate_up, dh; writes dgate_up and w h: 6 floatX for each of F columns.
__global__ void swiglu_backward_kernel(floatX* dgate_up, floatX* weighted_h, float* dweights, const floatX* dh, const floatX* gate_up, const float* weights,
                                       const int* assignment_of, int R, int F) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)R) return;
    const floatX *g = gate_up + row * 2 * F, *u = g + F;
    floatX *dg = dgate_up + row * 2 * F, *du = dg + F;
    dh += row * F; weighted_h += row * F;

    float w = weights[assignment_of[row]], dot = 0;
    for (int i = lane; i < F; i += WARP) {
        float x = (float)g[i], up = (float)u[i], d = (float)dh[i];
        float s = 1 / (1 + expf(-x)), silu = x * s;
        dot += silu * up * d;
        dg[i] = (floatX)(w * d * up * s * (1 + x * (1 - s)));
        du[i] = (floatX)(w * d * silu);
        weighted_h[i] = (floatX)(w * silu * up);
    }
    dot = warp_sum(dot);
    if (lane == 0) dweights[assignment_of[row]] = dot;
}

// In these, the rows of expert e stand behind those of the experts before it; `counts` is on the host.
void experts_gate_up(floatX* gate_up /* (R, 2F) */, const floatX* x /* (R, C) */, const floatX* w /* (E, 2F, C) */, const int* counts /* (E) */, int E, int C, int F) {
    fork_expert_streams();
    for (size_t e = 0, first = 0; e < (size_t)E; first += counts[e++])
        if (counts[e] > 0) matmul_forward(expert_streams[e % EXPERT_STREAMS], gate_up + first * 2 * F, x + first * C, w + e * 2 * F * C, counts[e], C, 2 * F);
    join_expert_streams();
}

void swiglu_forward(floatX* h /* (R, F) */, const floatX* gate_up /* (R, 2F) */, int R, int F) {
    swiglu_forward_kernel<<<blocks_for_rows(R), BLOCK, 0, main_stream.stream>>>(h, gate_up, R, F);
    cudaCheck(cudaGetLastError());
}

void experts_down(floatX* y /* (R, C) */, const floatX* h /* (R, F) */, const floatX* w /* (E, C, F) */, const int* counts /* (E) */, int E, int C, int F) {
    fork_expert_streams();
    for (size_t e = 0, first = 0; e < (size_t)E; first += counts[e++])
        if (counts[e] > 0) matmul_forward(expert_streams[e % EXPERT_STREAMS], y + first * C, h + first * F, w + e * C * F, counts[e], F, C);
    join_expert_streams();
}

void experts_backward(floatX* dx /* (R, C) */, floatX* dw_gate_up /* += */, floatX* dw_down /* += */, float* dweights /* (N, K) */,
                             floatX* dh /* (R, F) scratch */, floatX* weighted_h /* (R, F) scratch */, floatX* dgate_up /* (R, 2F) scratch */,
                             const floatX* dy /* (R, C), not weighted */, const floatX* x, const floatX* gate_up, const float* weights /* (N, K) */, const int* assignment_of,
                             const floatX* w_gate_up, const floatX* w_down, const int* counts, int R, int E, int C, int F) {
    fork_expert_streams();
    for (size_t e = 0, first = 0; e < (size_t)E; first += counts[e++])
        if (counts[e] > 0) matmul_backward_input(expert_streams[e % EXPERT_STREAMS], dh + first * F, dy + first * C, w_down + e * C * F, counts[e], F, C);
    join_expert_streams();
    swiglu_backward_kernel<<<blocks_for_rows(R), BLOCK, 0, main_stream.stream>>>(dgate_up, weighted_h, dweights, dh, gate_up, weights, assignment_of, R, F);
    cudaCheck(cudaGetLastError());
    fork_expert_streams();
    for (size_t e = 0, first = 0; e < (size_t)E; first += counts[e++])
        if (counts[e] > 0) {
            const Stream& s = expert_streams[e % EXPERT_STREAMS];
            matmul_backward_weight(s, dw_down + e * C * F, dy + first * C, weighted_h + first * F, counts[e], F, C);
            matmul_backward_input(s, dx + first * C, dgate_up + first * 2 * F, w_gate_up + e * 2 * F * C, counts[e], C, 2 * F);
            matmul_backward_weight(s, dw_gate_up + e * 2 * F * C, dgate_up + first * 2 * F, x + first * C, counts[e], C, 2 * F);
        }
    join_expert_streams();
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
    combine_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(out, residual, y, weights, row_of, N, C, K);
    cudaCheck(cudaGetLastError());
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
    cross_entropy_kernel<<<blocks_for_rows(N), BLOCK, 0, main_stream.stream>>>(losses, logits, targets, N, V, scale);
    cudaCheck(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------
// AdamW (Loshchilov & Hutter 2019), for one element at step s = 1, 2, ...; everything is decayed, norms and embeddings too:
//     p <- p (1 - lr wd);   m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
//     p <- p - lr m / (1-b1^s) / (sqrt(v / (1-b2^s)) + eps)
// g is the gradient times grad_scale, which clips the global norm. master is p in fp32 where floatX is narrower, else null.

// One thread per element: 28 bytes moved in fp32, 28 with bf16 parameters and gradients and an fp32 master.
__global__ void adamw_kernel(floatX* p, float* master, const floatX* g, float* m, float* v, size_t n, float grad_scale, float decay, float step_size,
                             float beta1, float beta2, float v_scale, float eps) {
    size_t i = thread_index();
    if (i >= n) return;
    float grad = (float)g[i] * grad_scale;
    float m_new = beta1 * m[i] + (1 - beta1) * grad;
    float v_new = beta2 * v[i] + (1 - beta2) * grad * grad;
    float value = (master ? master[i] : (float)p[i]) * decay - step_size * m_new / (sqrtf(v_new * v_scale) + eps);
    m[i] = m_new;
    v[i] = v_new;
    if (master) master[i] = value;
    p[i] = (floatX)value;
}

void adamw(floatX* p, float* master /* or null */, const floatX* g, float* m, float* v, size_t n, int64_t step, float grad_scale,
                  double lr, double beta1, double beta2, double eps, double weight_decay) {
    float step_size = (float)(lr / (1 - pow(beta1, (double)step))), v_scale = (float)(1 / (1 - pow(beta2, (double)step)));
    adamw_kernel<<<blocks_for(n), BLOCK, 0, main_stream.stream>>>(p, master, g, m, v, n, grad_scale, (float)(1 - lr * weight_decay), step_size,
                                                                 (float)beta1, (float)beta2, v_scale, (float)eps);
    cudaCheck(cudaGetLastError());
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
// Initialisation:   weights ~ normal(0, std) truncated at 3 std, norms 1 (OLMoE Table 10). The random numbers are Philox-4x32-10
// (Salmon et al. 2011) of the seed and the parameter's position in the model, so they depend on nothing else.

struct Philox { unsigned x[4]; };
__host__ __device__ inline Philox philox(uint64_t seed, uint64_t counter) {
    unsigned c0 = (unsigned)counter, c1 = (unsigned)(counter >> 32), c2 = 0, c3 = 0, k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        unsigned n0 = (unsigned)(b >> 32) ^ c1 ^ k0, n2 = (unsigned)(a >> 32) ^ c3 ^ k1;
        c1 = (unsigned)b; c3 = (unsigned)a; c0 = n0; c2 = n2;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}
__host__ __device__ inline float uniform(unsigned x) { return ((float)(x >> 8) + 0.5f) * 0x1p-24f; }      // in (0, 1]

// One thread per element. Each gets four normal deviates (Box & Muller 1958) and takes the first within 3 std; that none of
// them is has probability 5e-11, and gives 0.
__global__ void init_normal_kernel(floatX* p, float* master, size_t n, size_t position, uint64_t seed, float std) {
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
    if (master) master[i] = value * std;
    p[i] = (floatX)(value * std);
}

__global__ void fill_kernel(floatX* p, float* master, size_t n, float value) {
    size_t i = thread_index();
    if (i >= n) return;
    if (master) master[i] = value;
    p[i] = (floatX)value;
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
    size_t bytes() const { size_t sum = 0; for (const Item& i : items) sum += aligned(i.bytes); return sum; }
    void allocate(const char* what) {
        char* block = nullptr;
        if (!SEPARATE_ALLOCATIONS) {
            if (cudaMalloc((void**)&block, bytes()) != cudaSuccess) die("no memory for %s (%.2f GB); olmoe info shows the plan, and --batch and --recompute change that of the activations", what, bytes() / 1e9);
            blocks.push_back(block);
        }
        for (Item& i : items) {
            if (SEPARATE_ALLOCATIONS) { cudaCheck(cudaMalloc(i.pointer, i.bytes)); blocks.push_back(*i.pointer); }
            else { *i.pointer = block; block += aligned(i.bytes); }
        }
    }
    void release() { for (void* b : blocks) cudaCheck(cudaFree(b)); blocks.clear(); items.clear(); }
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

// A tensor of Parameters and its place in the flat order of all parameters (checkpoint.h), layer after layer
struct Span { floatX** pointer; size_t offset, count; bool norm; };

std::vector<Span> parameter_spans(Parameters* p, const OlmoeConfig& c) {
    std::vector<Span> spans;
    size_t offset = 0, C = c.C;
    auto add = [&](floatX** pointer, size_t count, bool norm = false) { spans.push_back({pointer, offset, count, norm}); offset += count; };
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
        add(&l.gate_up, (size_t)c.E * 2 * c.F * C);
        add(&l.down, (size_t)c.E * C * c.F);
    }
    add(&p->final_norm, C, true);
    add(&p->lm_head, c.V * C);
    return spans;
}

size_t num_parameters(const OlmoeConfig& c) {
    Parameters p;
    Span last = parameter_spans(&p, c).back();
    return last.offset + last.count;
}

// Parameters that a token meets: K of the E experts
size_t num_active_parameters(const OlmoeConfig& c) { return num_parameters(c) - (size_t)c.L * (c.E - c.K) * 3 * c.C * c.F; }

// The element at a flat position, wherever its tensor was allocated
floatX* parameter_at(const std::vector<Span>& spans, size_t offset) {
    auto after = std::upper_bound(spans.begin(), spans.end(), offset, [](size_t o, const Span& s) { return o < s.offset; });
    return *after[-1].pointer + (offset - after[-1].offset);
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
    floatX* expert_in;      // (R, C)    1 rows of ffn_in by expert
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
    int* histogram;         // (R / DISPATCH_SLAB, E)
    floatX* h;              // (R, F)  silu(gate) up; in backward times the weight
    floatX* expert_out;     // (R, C)  in backward the gradient of expert_in
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
    floatX* dh;             // (R, F)
    floatX* dgate_up;       // (R, 2F)
    float* partial;         // (2 SLABS, C)
    float* square_sums;     // one for each run of SQUARE_SUM_RUN gradients
};

// A micro-batch's losses. ce is the mean over the targets that count; loss is what was differentiated.
struct Losses {
    double loss = 0, ce = 0, lb = 0, z = 0;
    double nll = 0;         // sum of -log p(target) over the targets that count
    int64_t valid = 0;      // their number
};

struct Olmoe {
    OlmoeConfig config;
    int max_B = 0, max_T = 0, recompute = 0;
    Parameters params, grads;
    std::vector<Span> param_spans, grad_spans;
    float *m = nullptr, *v = nullptr;       // AdamW's moments, flat
    float* master = nullptr;                // fp32 parameters, flat; null in an fp32 build
    Activations acts;
    Memory params_memory, grads_memory, optimizer_memory, acts_memory, backward_memory;

    int B = 0, T = 0, N = 0, R = 0;         // of the micro-batch in acts
    int touched = 0;                        // different ids in it
    std::vector<int> counts;                // (L, E) rows of each expert, on the host
    std::vector<float> losses, router_lse, router_partial;      // (N), (L, N), (L, SLABS, E) on the host
    std::vector<int> experts;               // (L, N, K) on the host, when asked for
    std::vector<int> targets;               // (N)
};

// Fills in what a model of this shape needs, without allocating: `olmoe info` prints it, olmoe_allocate allocates it.
void olmoe_plan(Olmoe* m, const OlmoeConfig& config, int B, int T, int recompute, bool training) {
    m->config = config; m->max_B = B; m->max_T = T; m->recompute = recompute;
    size_t N = (size_t)B * T, C = config.C, E = config.E, K = config.K, F = config.F, V = config.V, L = config.L, R = N * K;
    if (R > INT32_MAX / 2) die("--batch %d x --seq %d is too large for one micro-batch; use a smaller --batch", B, T);

    m->param_spans = parameter_spans(&m->params, config);
    m->grad_spans = parameter_spans(&m->grads, config);
    for (Span& s : m->param_spans) m->params_memory.add(s.pointer, s.count);
    if (training) {
        for (Span& s : m->grad_spans) m->grads_memory.add(s.pointer, s.count);
        m->optimizer_memory.add(&m->m, num_parameters(config));
        m->optimizer_memory.add(&m->v, num_parameters(config));
        if (BF16) m->optimizer_memory.add(&m->master, num_parameters(config));
    }

    Activations& a = m->acts;
    a.layers.resize(L);
    Memory& mem = m->acts_memory;
    mem.add(&a.inputs, N); mem.add(&a.targets, N);
    mem.add(&a.cosine, (size_t)T * (C / config.H / 2)); mem.add(&a.sine, (size_t)T * (C / config.H / 2));
    LayerActivations& all = a.layers[0];                     // allocated for all layers at once, see share_activations
    mem.add(&all.router_lse, L * N); mem.add(&all.router_partial, L * SLABS * E); mem.add(&all.experts, L * R); mem.add(&all.counts, L * E);
    for (LayerActivations& l : a.layers) {
        bool first = &l == &all, keep1 = first || recompute < 1, keep2 = first || recompute < 2;
        if (first || training) mem.add(&l.x, N * C);
        if (!training && !first) continue;                  // without backward, one layer's buffers serve all
        if (keep1) { mem.add(&l.attn_in, N * C); mem.add(&l.qk, N * 2 * C); mem.add(&l.ffn_in, N * C); mem.add(&l.expert_in, R * C); }
        if (keep2) { mem.add(&l.qkv, N * 3 * C); mem.add(&l.attn, N * C); mem.add(&l.x_mid, N * C); mem.add(&l.gate_up, R * 2 * F); }
        if (keep2) { mem.add(&l.router_logits, N * E); mem.add(&l.router_probs, N * E); }
        mem.add(&l.attn_r, N); mem.add(&l.qk_r, N * 2); mem.add(&l.attn_lse, (size_t)config.H * N); mem.add(&l.ffn_r, N);
        mem.add(&l.weights, R); mem.add(&l.row_of, R); mem.add(&l.assignment_of, R);
    }
    size_t square = (size_t)config.H * std::min(ATTENTION_BLOCK, T) * T;
    mem.add(&a.x, N * C); mem.add(&a.final_out, N * C); mem.add(&a.final_r, N); mem.add(&a.logits, N * V); mem.add(&a.losses, N);
    mem.add(&a.scores, square); mem.add(&a.probs, square);
    mem.add(&a.histogram, ceil_div(R, DISPATCH_SLAB) * E); mem.add(&a.h, R * F); mem.add(&a.expert_out, R * C);
    if (!training) return;

    Memory& back = m->backward_memory;
    back.add(&a.touched, N); back.add(&a.touched_start, N + 1); back.add(&a.touched_tokens, N);
    back.add(&a.dx, N * C); back.add(&a.dbranch, N * C); back.add(&a.dattn, N * C); back.add(&a.dqkv32, N * 3 * C); back.add(&a.dqkv, N * 3 * C);
    back.add(&a.dprobs, square); back.add(&a.dscores, square);
    back.add(&a.drouter, N * E); back.add(&a.drouter_probs, N * E); back.add(&a.dweights, R);
    back.add(&a.dexpert_out, R * C); back.add(&a.dh, R * F); back.add(&a.dgate_up, R * 2 * F); back.add(&a.partial, 2 * SLABS * C);
    size_t runs = 0;
    for (Span& s : m->grad_spans) runs += ceil_div(s.count, SQUARE_SUM_RUN);
    back.add(&a.square_sums, runs);
}

// Layers that share a buffer with layer 0 get its address; arrays over all layers get their layer's part.
void share_activations(Olmoe* m, bool training) {
    const OlmoeConfig& c = m->config;
    size_t N = (size_t)m->max_B * m->max_T;
    LayerActivations& first = m->acts.layers[0];
    for (int l = 1; l < c.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        if (!training) { floatX* x = first.x; a = first; a.x = x; }
        if (!training || m->recompute >= 1) { a.attn_in = first.attn_in; a.qk = first.qk; a.ffn_in = first.ffn_in; a.expert_in = first.expert_in; }
        if (!training || m->recompute >= 2) {
            a.qkv = first.qkv; a.attn = first.attn; a.x_mid = first.x_mid; a.gate_up = first.gate_up;
            a.router_logits = first.router_logits; a.router_probs = first.router_probs;
        }
        a.router_lse = first.router_lse + l * N;
        a.router_partial = first.router_partial + (size_t)l * SLABS * c.E;
        a.experts = first.experts + l * N * c.K;
        a.counts = first.counts + (size_t)l * c.E;
    }
}

void olmoe_allocate(Olmoe* m, const OlmoeConfig& config, int B, int T, int recompute, bool training) {
    olmoe_plan(m, config, B, T, recompute, training);
    m->params_memory.allocate("parameters");
    m->acts_memory.allocate("activations");
    if (training) {
        m->grads_memory.allocate("gradients");
        m->optimizer_memory.allocate("optimizer state");
        m->backward_memory.allocate("backward");
        cudaCheck(cudaMemsetAsync(m->m, 0, num_parameters(config) * sizeof(float), main_stream.stream));
        cudaCheck(cudaMemsetAsync(m->v, 0, num_parameters(config) * sizeof(float), main_stream.stream));
    }
    share_activations(m, training);

    // RoPE's angles in fp32, as everyone computes them: at position 4000 a more exact product would be another model
    int half = config.C / config.H / 2;
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
    for (Memory* mem : {&m->params_memory, &m->grads_memory, &m->optimizer_memory, &m->acts_memory, &m->backward_memory}) mem->release();
}

void olmoe_init(Olmoe* m, uint64_t seed) {
    for (const Span& s : m->param_spans) {
        float* master = m->master ? m->master + s.offset : nullptr;
        if (s.norm) fill_kernel<<<blocks_for(s.count), BLOCK, 0, main_stream.stream>>>(*s.pointer, master, s.count, 1.f);
        else init_normal_kernel<<<blocks_for(s.count), BLOCK, 0, main_stream.stream>>>(*s.pointer, master, s.count, s.offset, seed, m->config.initializer_range);
    }
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

constexpr size_t COPY_CHUNK = 1 << 22;      // elements converted at a time

// Weights from a Hugging Face directory, converted to floatX (and, exactly, into the master copy).
void olmoe_load(Olmoe* m, const std::string& dir) {
    ModelWeights weights;
    weights_open(&weights, dir, m->config);
    std::vector<HfTensor> tensors = hf_tensors(m->config);
    std::vector<float> chunk;
    std::vector<floatX> narrow;
    for (size_t i = 0; i < tensors.size(); i++)
        for (size_t begin = 0; begin < tensors[i].count; begin += COPY_CHUNK) {
            size_t n = std::min(COPY_CHUNK, tensors[i].count - begin), offset = tensors[i].offset + begin;
            chunk.resize(n);
            narrow.resize(n);
            tensor_to_float(chunk.data(), weights_tensor(weights, i), begin, n);
            for (size_t j = 0; j < n; j++) narrow[j] = (floatX)chunk[j];
            copy_to_device(parameter_at(m->param_spans, offset), narrow.data(), n);
            if (m->master) copy_to_device(m->master + offset, chunk.data(), n);
        }
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
    int* counts = &m->counts[(size_t)l * E];
    floatX* next = l + 1 < c.L ? m->acts.layers[l + 1].x : s.x;

    rmsnorm_forward(a.attn_in, a.attn_r, a.x, p.attn_norm, N, C, c.rms_norm_eps);
    matmul_forward(main_stream, a.qkv, a.attn_in, p.qkv, N, C, 3 * C);
    qk_norm_rope_forward(a.qk, a.qk_r, a.qkv, p.q_norm, p.k_norm, s.cosine, s.sine, N, m->T, C, C / c.H, c.rms_norm_eps);
    attention_forward(a.attn, a.attn_lse, s.scores, s.probs, a.qk, a.qkv, m->B, m->T, C, c.H);
    cudaCheck(cudaMemcpyAsync(a.x_mid, a.x, (size_t)N * C * sizeof(floatX), cudaMemcpyDeviceToDevice, main_stream.stream));
    matmul_forward(main_stream, a.x_mid, a.attn, p.attn_out, N, C, C, 1);

    rmsnorm_forward(a.ffn_in, a.ffn_r, a.x_mid, p.ffn_norm, N, C, c.rms_norm_eps);
    matmul_forward(main_stream, a.router_logits, a.ffn_in, p.router, N, C, E);
    router_forward(a.router_probs, a.router_lse, a.experts, a.weights, a.router_partial, a.router_logits, N, E, K, c.norm_topk_prob);
    dispatch(a.row_of, a.assignment_of, a.counts, s.histogram, a.experts, R, E);
    if (!again) {                           // the matmuls' shapes are given by the host
        cudaCheck(cudaMemcpyAsync(counts, a.counts, E * sizeof(int), cudaMemcpyDeviceToHost, main_stream.stream));
        cudaCheck(cudaStreamSynchronize(main_stream.stream));
    }
    gather(a.expert_in, a.ffn_in, a.assignment_of, R, C, K);
    experts_gate_up(a.gate_up, a.expert_in, p.gate_up, counts, E, C, F);
    if (again) return;
    swiglu_forward(s.h, a.gate_up, R, F);
    experts_down(s.expert_out, s.h, p.down, counts, E, C, F);
    combine(next, a.x_mid, s.expert_out, a.weights, a.row_of, N, C, K);
}

// Logits of a micro-batch of B sequences of T tokens, B and T at most those of olmoe_allocate. inputs (B, T) on the host.
void olmoe_forward(Olmoe* m, const int* inputs, int B, int T) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    m->B = B; m->T = T; m->N = B * T; m->R = m->N * c.K;
    m->counts.assign((size_t)c.L * c.E, 0);
    for (int t = 0; t < m->N; t++)
        if (inputs[t] < 0 || inputs[t] >= c.V) die("token id %d at position %d of the batch is outside the vocabulary of %d", inputs[t], t, c.V);
    copy_to_device(a.inputs, inputs, m->N);

    embedding_forward(a.layers[0].x, a.inputs, m->params.embed, m->N, c.C);
    for (int l = 0; l < c.L; l++) layer_forward(m, l, false);
    rmsnorm_forward(a.final_out, a.final_r, a.x, m->params.final_norm, m->N, c.C, c.rms_norm_eps);
    matmul_forward(main_stream, a.logits, a.final_out, m->params.lm_head, m->N, c.C, c.V);
}

// Cross entropy against targets (B, T) on the host, -100 = ignored. With a scale other than 0 the logits become their gradient.
void olmoe_cross_entropy(Olmoe* m, const int* targets, float scale) {
    m->targets.assign(targets, targets + m->N);
    for (int t = 0; t < m->N; t++)
        if (targets[t] != -100 && (targets[t] < 0 || targets[t] >= m->config.V)) die("target %d at position %d of the batch is outside the vocabulary of %d", targets[t], t, m->config.V);
    copy_to_device(m->acts.targets, targets, m->N);
    cross_entropy(m->acts.losses, m->acts.logits, m->acts.targets, m->N, m->config.V, scale);
}

// Waits for the device and returns the losses of the micro-batch; lb and z by the formulas above router_forward_kernel.
// ce_scale is what its sum of -log p counts in `loss` (1 / divisor).
Losses olmoe_losses(Olmoe* m, double ce_scale, double lb_coef, double z_coef) {
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
    for (int l = 0; l < c.L; l++) {
        for (size_t i = 0; i < E; i++) {
            double mean = 0;
            for (int slab = 0; slab < slabs_for(m->N); slab++) mean += m->router_partial[((size_t)l * SLABS + slab) * E + i];
            r.lb += m->counts[l * E + i] * (mean / N);
        }
        for (size_t t = 0; t < N; t++) r.z += (double)m->router_lse[l * stride + t] * m->router_lse[l * stride + t];
    }
    r.lb *= lb_coef * E / ((double)c.L * N * c.K);
    r.z *= z_coef / ((double)c.L * N * c.K);
    r.ce = r.valid ? r.nll / r.valid : 0;
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
void layer_backward(Olmoe* m, int l, float lb_scale, float z_scale) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerParameters& g = m->grads.layers[l];
    LayerActivations& a = m->acts.layers[l];
    Activations& s = m->acts;
    int N = m->N, R = m->R, C = c.C, E = c.E, K = c.K, F = c.F;
    const int* counts = &m->counts[(size_t)l * E];

    if (m->recompute >= 2) {
        layer_forward(m, l, true);
    } else if (m->recompute >= 1) {
        rmsnorm_forward(a.attn_in, a.attn_r, a.x, p.attn_norm, N, C, c.rms_norm_eps);
        qk_norm_rope_forward(a.qk, a.qk_r, a.qkv, p.q_norm, p.k_norm, s.cosine, s.sine, N, m->T, C, C / c.H, c.rms_norm_eps);
        rmsnorm_forward(a.ffn_in, a.ffn_r, a.x_mid, p.ffn_norm, N, C, c.rms_norm_eps);
        gather(a.expert_in, a.ffn_in, a.assignment_of, R, C, K);
    }

    // experts: x = x_mid + sum_k w y, so dx goes on to x_mid as it is, and to the experts
    gather(s.dexpert_out, s.dx, a.assignment_of, R, C, K);
    experts_backward(s.expert_out, g.gate_up, g.down, s.dweights, s.dh, s.h, s.dgate_up, s.dexpert_out, a.expert_in, a.gate_up, a.weights, a.assignment_of,
                     p.gate_up, p.down, counts, R, E, C, F);
    combine(s.dbranch, nullptr, s.expert_out, nullptr, a.row_of, N, C, K);
    router_backward(s.drouter, s.drouter_probs, s.dweights, a.router_probs, a.router_lse, a.experts, a.weights, a.counts, N, E, K, c.norm_topk_prob, lb_scale, z_scale);
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

// Adds the micro-batch's gradients to grads, after olmoe_forward on the same inputs and olmoe_cross_entropy with a scale.
// The auxiliary losses count 1 / micro_batches each.
void olmoe_backward(Olmoe* m, const int* inputs, double lb_coef, double z_coef, int micro_batches) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    double N = m->N, LNK = c.L * N * c.K * micro_batches;
    index_tokens(m, inputs);

    matmul_backward_weight(main_stream, m->grads.lm_head, a.logits, a.final_out, m->N, c.C, c.V);
    matmul_backward_input(main_stream, a.dbranch, a.logits, m->params.lm_head, m->N, c.C, c.V);
    cudaCheck(cudaMemsetAsync(a.dx, 0, (size_t)m->N * c.C * sizeof(floatX), main_stream.stream));
    rmsnorm_backward(a.dx, m->grads.final_norm, a.partial, a.dbranch, a.x, m->params.final_norm, a.final_r, m->N, c.C);
    for (int l = c.L - 1; l >= 0; l--) layer_backward(m, l, (float)(lb_coef * c.E / (LNK * N)), (float)(2 * z_coef / LNK));
    embedding_backward(m->grads.embed, a.dx, a.touched, a.touched_start, a.touched_tokens, m->touched, c.C);
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
        square_sum_kernel<<<blocks_for_rows(ceil_div(s.count, SQUARE_SUM_RUN)), BLOCK, 0, main_stream.stream>>>(m->acts.square_sums + runs, *s.pointer, s.count);
        runs += ceil_div(s.count, SQUARE_SUM_RUN);
    }
    cudaCheck(cudaGetLastError());
    std::vector<float> sums(runs);
    copy_to_host(sums.data(), m->acts.square_sums, runs);

    double total = 0;
    size_t run = 0;
    if (bad) *bad = nullptr;
    for (const Span& s : m->grad_spans) {
        double square = 0;
        for (size_t end = run + ceil_div(s.count, SQUARE_SUM_RUN); run < end; run++) square += sums[run];
        if (bad && !*bad && !std::isfinite(square)) *bad = &s;
        total += square;
    }
    return sqrt(total);
}

struct AdamWOptions { double lr = 4e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0; };

// One AdamW step, step = 1, 2, ...; clips as torch.nn.utils.clip_grad_norm_ does.
void olmoe_update(Olmoe* m, int64_t step, double grad_norm, const AdamWOptions& o) {
    float grad_scale = o.grad_clip > 0 ? (float)std::min(1.0, o.grad_clip / (grad_norm + 1e-6)) : 1.f;
    for (size_t i = 0; i < m->param_spans.size(); i++) {
        const Span& s = m->param_spans[i];
        adamw(*s.pointer, m->master ? m->master + s.offset : nullptr, *m->grad_spans[i].pointer, m->m + s.offset, m->v + s.offset, s.count, step, grad_scale,
              o.lr, o.beta1, o.beta2, o.eps, o.weight_decay);
    }
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
        if (*text == 0 || *end || !(number >= o->min && number <= o->max)) die("option %s: '%s' is not a number from %g to %g", argv[i - 1], text, o->min, o->max);
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

std::string human(double x, const char* unit = "") {
    const char* prefix[] = {"", "k", "M", "G", "T", "P"};
    int i = 0;
    while (std::fabs(x) >= 1000 && i < 5) { x /= 1000; i++; }
    char text[64];
    snprintf(text, sizeof text, i || *unit ? "%.4g %s%s" : "%.4g%s%s", x, prefix[i], unit);
    return text;
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

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
    char buffer[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

void box_shapes(std::vector<std::pair<std::string, std::string>>* box, const OlmoeConfig& c) {
    box->push_back({"layers, channels, heads", text("L %d  C %d  H %d (of size %d)", c.L, c.C, c.H, c.C / c.H)});
    box->push_back({"experts", text("%d of %d for each token, width %d", c.K, c.E, c.F)});
    box->push_back({"vocabulary", text("%d", c.V)});
    box->push_back({"parameters", text("%zu (%s)", num_parameters(c), human((double)num_parameters(c)).c_str())});
    box->push_back({"active", text("%zu (%s)", num_active_parameters(c), human((double)num_active_parameters(c)).c_str())});
}

void box_memory(std::vector<std::pair<std::string, std::string>>* box, const Olmoe& m) {
    double workspace = (1.0 + EXPERT_STREAMS) * CUBLAS_WORKSPACE_BYTES, sum = workspace;
    std::pair<const char*, const Memory*> parts[] = {{"memory: parameters", &m.params_memory}, {"memory: gradients", &m.grads_memory},
        {"memory: optimizer", &m.optimizer_memory}, {"memory: activations", &m.acts_memory}, {"memory: backward", &m.backward_memory}};
    for (auto& p : parts) if (!p.second->items.empty()) { box->push_back({p.first, human((double)p.second->bytes(), "B")}); sum += (double)p.second->bytes(); }
    if (workspace > 0) box->push_back({"memory: cuBLAS", human(workspace, "B")});
    box->push_back({"memory: sum", human(sum, "B")});
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
    cudaCheck(cudaGetDeviceProperties(&p, 0));
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

void domains_open(DomainTable* d, const std::string& npy, const OlmoeConfig& c) {
    d->documents = documents_read(npy);
    for (const Document& doc : d->documents) {
        std::string name = document_domain(doc);
        size_t i = std::find(d->names.begin(), d->names.end(), name) - d->names.begin();
        if (i == d->names.size()) d->names.push_back(name);
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
        if (next == tokenizer.eos) break;
        said += tokenizer_decode(tokenizer, next);
        ids.push_back(next);
    }
    return said;
}

struct Validation { double loss = 0, bits_per_byte = 0; };   // nats a token; bits a byte where tokens are bytes, EOS not counted as one

// One pass over the sequences of a file, or over its first max_batches batches where that is not 0.
Validation validate(Olmoe* m, DataLoader* data, int64_t max_batches, bool bytes, int eos, Balance* balance, DomainTable* domains) {
    int T = m->max_T;
    std::vector<int> inputs((size_t)m->max_B * T), targets((size_t)m->max_B * T);
    double nll = 0;
    int64_t tokens = 0, ends = 0;
    balance->reset(m->config);
    for (int64_t batch = 0; max_batches == 0 || batch < max_batches; batch++) {
        size_t first = (size_t)batch * m->max_B, rows = dataloader_rows(data, first, m->max_B, inputs.data(), targets.data());
        if (rows == 0) break;
        olmoe_forward(m, inputs.data(), (int)rows, T);
        olmoe_cross_entropy(m, targets.data(), 0);
        Losses l = olmoe_losses(m, 0, 0, 0);
        nll += l.nll;
        tokens += l.valid;
        ends += std::count(targets.begin(), targets.begin() + rows * T, eos);
        balance->add(*m);
        if (domains) domains_add(domains, m, first * T);
    }
    Validation v;
    v.loss = tokens ? nll / tokens : 0;
    if (bytes && tokens > ends) v.bits_per_byte = nll / (tokens - ends) / log(2.0);
    return v;
}

// ------------------------------------------------------------------------------------------------
// olmoe train

struct TrainOptions {
    std::string config, model, out, tokenizer, schedule = "cosine", order = "global", resume, warmup = "2500", steps = "1000", decay_steps, ce_divisor = "all", prompt;
    std::vector<std::string> data, val;
    int64_t B = 4, T = 0, global_batch = 0, seed = 6198, recompute = 0;
    int64_t save_every = 0, keep_last = 0, keep_every = 0, val_every = 0, val_batches = 0, sample_every = 0, sample_tokens = 200, log_every = 1;
    double lr = 4e-4, min_lr = -1, lb_coef = 0.01, z_coef = 0.001, skip_spikes = 0, peak_tflops = 0;
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
        {"tokenizer", Option::TEXT, &o->tokenizer, "NAME", "to print sampled text: bytes"},
        {"steps", Option::STEPS, &o->steps, "S", "stop after step S (a T behind a number means tokens: 5e12T)"},
        {"batch", Option::INTEGER, &o->B, "B", "sequences of a micro-batch", 1, 1 << 20},
        {"seq", Option::INTEGER, &o->T, "T", "tokens of a sequence; 0: max_position_embeddings of the config", 0, 1 << 20},
        {"global-batch", Option::INTEGER, &o->global_batch, "G", "sequences of a step, accumulated over micro-batches; 0: as --batch", 0, 1 << 24},
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
        {"lb-coef", Option::NUMBER, &o->lb_coef, "X", "weight of the load-balancing loss", 0, 1e3},
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
        {"val-every", Option::INTEGER, &o->val_every, "S", "steps between validations and reports of expert balance; 0: only at the end"},
        {"val-batches", Option::INTEGER, &o->val_batches, "N", "batches of a validation; 0: all"},
        {"sample-every", Option::INTEGER, &o->sample_every, "S", "steps between samples of text; 0: only at the end"},
        {"sample-tokens", Option::INTEGER, &o->sample_tokens, "N", "length of a sample", 1, 1 << 20},
        {"sample-prompt", Option::TEXT, &o->prompt, "TEXT", "what samples begin with"},
        {"log-every", Option::INTEGER, &o->log_every, "S", "steps between lines on the screen (log.jsonl has every step)", 1},
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
        if (bad(parameter_at(m->param_spans, t.offset), t.count)) return "the parameter " + t.name;
    for (int l = 0; l < m->config.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        std::string layer = " of layer " + std::to_string(l);
        if (bad(a.x, N * C)) return "the residual stream at the input" + layer;
        if (m->recompute >= 2 && bad(a.router_lse, N)) return "the router logits" + layer;
        if (m->recompute >= 2) continue;
        if (bad(a.qkv, N * 3 * C)) return "the qkv projection" + layer;
        if (bad(a.attn, N * C)) return "the attention output" + layer;
        if (bad(a.router_lse, N)) return "the router logits" + layer;
        if (bad(a.gate_up, (size_t)m->R * 2 * m->config.F)) return "the experts' gate and up projections" + layer;
    }
    if (bad(m->acts.x, N * C)) return "the residual stream behind the last layer";
    return "the logits";
}

volatile sig_atomic_t stop_requested = 0;
void request_stop(int) { stop_requested = 1; }

void save_checkpoint(Olmoe* m, const TrainOptions& o, int64_t step, const Json& state) {
    cudaCheck(cudaDeviceSynchronize());
    checkpoint_save(o.out, step, m->config, BF16, [&](State which, size_t offset, size_t count, void* dst) {
        if (which == State::weights) copy_to_host((floatX*)dst, parameter_at(m->param_spans, offset), count);
        else copy_to_host((float*)dst, (which == State::m ? m->m : which == State::v ? m->v : m->master) + offset, count);
    }, state, o.tokenizer == "bytes" ? "" : o.tokenizer);
    checkpoint_prune(o.out, (int)o.keep_last, (int)o.keep_every);
}

// Drops the lines of steps behind `step` from a log, so that a resumed run's log reads as if it had never stopped.
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
    s["batch"] = o.B;
    s["order"] = o.order;
    s["repetition_filter"] = !o.no_filter;
    s["data_fingerprint"] = text("%016lx", dataloader_fingerprint(&data));
    s["precision"] = BF16 ? "BF16" : "FP32";
    s["schedule"] = {{"kind", schedule.kind}, {"lr", schedule.lr}, {"min_lr", schedule.min_lr}, {"warmup_steps", schedule.warmup}, {"decay_steps", schedule.total}};
    s["adamw"] = {{"beta1", o.adamw.beta1}, {"beta2", o.adamw.beta2}, {"eps", o.adamw.eps}, {"weight_decay", o.adamw.weight_decay}, {"grad_clip", o.adamw.grad_clip}};
    s["losses"] = {{"lb_coef", o.lb_coef}, {"z_coef", o.z_coef}, {"ce_divisor", o.ce_divisor}};
    s["skip_spikes"] = {{"deviations", o.skip_spikes}, {"losses", spikes.losses}, {"norms", spikes.norms}};
    return s;
}

// Moments and master weights, step and data position of a checkpoint; refuses one of another run.
void resume(Olmoe* m, const std::string& dir, const TrainOptions& o, DataLoader* data, int64_t* step, int64_t* updates, SpikeWindow* spikes) {
    Json s = checkpoint_trainer_state(dir);
    try {
        auto same = [&](const char* what, const Json& now) {
            if (s.at(what) != now) die("%s: the checkpoint's %s is %s, this run's is %s; they must be equal to resume; to start anew choose another --out", dir.c_str(), what, s.at(what).dump().c_str(), now.dump().c_str());
        };
        same("precision", BF16 ? "BF16" : "FP32");
        same("seed", o.seed);
        same("seq", o.T);
        same("global_batch", o.global_batch);
        same("batch", o.B);                 // the load-balancing loss is a micro-batch's own
        same("order", o.order);
        same("repetition_filter", !o.no_filter);
        same("data_fingerprint", text("%016lx", dataloader_fingerprint(data)));
        *step = s.at("step");
        *updates = s.at("updates");
        spikes->losses = s.at("skip_spikes").at("losses").get<std::vector<double>>();
        spikes->norms = s.at("skip_spikes").at("norms").get<std::vector<double>>();
        dataloader_seek(data, s.at("epoch"), s.at("position"));
    } catch (const Json::exception& e) {
        die("%s/trainer_state.json: %s", dir.c_str(), e.what());
    }
    olmoe_load(m, dir);
    checkpoint_optimizer_read(dir, m->config, BF16, [&](State which, size_t offset, size_t count, const float* src) {
        float* to = which == State::m ? m->m : which == State::v ? m->v : m->master;
        copy_to_device(to + offset, src, count);
    });
}

std::string join(const std::vector<std::string>& words) {
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
    options_parse(argc, argv, "train --config FILE | --model DIR  --data FILES [--val FILES] --out DIR [options]", train_options(&o));
    if (o.config.empty() == o.model.empty()) die("train needs either --config FILE (random weights) or --model DIR (a Hugging Face directory)");
    if (o.data.empty()) die("train needs --data FILES; make them with: olmoe tokenize --tokenizer bytes --out FILE.npy TEXTS");
    if (o.out.empty()) die("train needs --out DIR for its log and checkpoints");

    OlmoeConfig config;
    config_read(&config, o.config.empty() ? o.model : o.config);
    if (o.T == 0) o.T = config.max_T;
    if (o.T > config.max_T) die("--seq %ld is longer than the config's max_position_embeddings %d", o.T, config.max_T);
    if (o.global_batch == 0) o.global_batch = o.B;
    if (o.global_batch % o.B != 0) die("--global-batch %ld is not a multiple of --batch %ld", o.global_batch, o.B);
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

    DataLoader data, val;
    dataloader_open(&data, o.data, (int)o.T, config.V, o.order == "global" ? DataOrder::global : DataOrder::sequential, o.seed, !o.no_filter);
    if (o.global_batch > (int64_t)data.instances) die("--global-batch %ld is more than the %zu sequences of the data; use a smaller one, or a smaller --seq", o.global_batch, data.instances);
    if (!o.val.empty()) dataloader_open(&val, o.val, (int)o.T, config.V, DataOrder::sequential, 0, false);
    if (mkdir(o.out.c_str(), 0777) != 0 && errno != EEXIST) die("cannot make the directory %s: %s", o.out.c_str(), strerror(errno));
    auto existing = checkpoint_list(o.out);                  // (step, directory), newest first
    if (o.resume.empty() && !existing.empty()) die("%s holds checkpoints already; go on from them with --resume, or choose another --out", o.out.c_str());
    std::string from = o.resume == "newest" ? checkpoint_newest(o.out) : o.resume;
    if (o.resume == "newest" && from.empty() && !existing.empty()) die("no checkpoint in %s is undamaged; to start anew choose another --out", o.out.c_str());
    if (!from.empty() && o.resume != "newest") checkpoint_check(from);

    device_open();
    double peak = o.peak_tflops > 0 ? o.peak_tflops * 1e12 : measure_peak(), flops = flops_per_token(config, (int)o.T);
    Olmoe m;
    olmoe_allocate(&m, config, (int)o.B, (int)o.T, (int)o.recompute, true);
    int64_t step = 0, updates = 0;
    SpikeWindow spikes;
    if (!from.empty()) {
        OlmoeConfig theirs;
        config_read(&theirs, from);
        if (config_json(theirs, BF16) != config_json(config, BF16)) die("%s is a checkpoint of another config than %s", from.c_str(), (o.config.empty() ? o.model : o.config).c_str());
        resume(&m, from, o, &data, &step, &updates, &spikes);
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
    box.push_back({"precision", BF16 ? "BF16, fp32 master weights, moments and sums" : "FP32"});
    box.push_back({"peak", human(peak, "FLOP/s") + (o.peak_tflops > 0 ? " (given)" : " (a large matmul, measured)")});
    box_memory(&box, m);
    box.push_back({"", ""});
    box.push_back({"data", text("%s: %s tokens, %s sequences of %ld", join(o.data).c_str(), human((double)dataloader_tokens(&data)).c_str(), human((double)data.instances).c_str(), o.T)});
    box.push_back({"validation", o.val.empty() ? "none" : text("%s: %s tokens", join(o.val).c_str(), human((double)dataloader_tokens(&val)).c_str())});
    box.push_back({"order", o.order + (o.no_filter ? "" : ", repetitive sequences without targets")});
    box.push_back({"step", text("%s tokens: %ld sequences of %ld in micro-batches of %ld", human(tokens_per_step).c_str(), o.global_batch, o.T, o.B)});
    box.push_back({"steps", text("%ld (%s tokens, %.2f epochs)", steps, human(steps * tokens_per_step).c_str(), steps * (double)o.global_batch / data.instances)});
    box.push_back({"learning rate", text("%g, %s to %g at step %.0f, warm-up %.0f", schedule.lr, schedule.kind.c_str(), learning_rate(schedule, schedule.total), schedule.total, schedule.warmup)});
    box.push_back({"AdamW", text("betas %g %g, eps %g, weight decay %g, clip %g", o.adamw.beta1, o.adamw.beta2, o.adamw.eps, o.adamw.weight_decay, o.adamw.grad_clip)});
    box.push_back({"auxiliary losses", text("load balancing %g, router z %g; cross entropy divided by %s targets", o.lb_coef, o.z_coef, o.ce_divisor.c_str())});
    box.push_back({"recompute, skip spikes", text("%ld, %g", o.recompute, o.skip_spikes)});
    box.push_back({"seed", text("%ld", o.seed)});
    box.push_back({"out", o.out + (from.empty() ? "" : ", resumed from " + from)});
    print_box(box);

    std::string log_path = o.out + "/log.jsonl";
    if (!from.empty()) log_truncate(log_path, step);
    FILE* log = fopen(log_path.c_str(), from.empty() ? "w" : "a");
    if (!log) die("cannot write %s: %s", log_path.c_str(), strerror(errno));
    if (ftell(log) == 0) {
        Json first = config_json(config, BF16), run = trainer_state(o, data, 0, 0, spikes, schedule);
        for (auto& r : run.items()) if (r.key() != "step" && r.key() != "updates" && r.key() != "epoch" && r.key() != "position") first[r.key()] = r.value();
        first["steps"] = steps;
        fprintf(log, "%s\n", Json{{"config", first}}.dump().c_str());
    }
    struct sigaction action = {};
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESETHAND;         // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    struct sigaction hangup;                // a closed terminal, unless nohup said that it doesn't matter
    sigaction(SIGHUP, nullptr, &hangup);
    if (hangup.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, nullptr);
    signal(SIGXFSZ, SIG_IGN);               // a limit on file sizes is an error of the write, not the end of the program
    if (step >= steps) printf("nothing to do: %s is at step %ld of %ld\n", o.out.c_str(), step, steps);

    int micro_batches = (int)(o.global_batch / o.B);
    size_t micro = (size_t)o.B * o.T;
    std::vector<int> inputs(micro * micro_batches), targets(micro * micro_batches);
    Balance balance;
    balance.reset(config);
    double started = seconds_now();
    int64_t first_step = step, saved = step;
    bool profile = getenv("CUDA_PROFILE") != nullptr;
    while (step < steps && !stop_requested) {
        double start = seconds_now();
        step++;
        if (profile && step == steps) cudaCheck(cudaProfilerStart());
        dataloader_next(&data, (int)o.global_batch, 0, 1, inputs.data(), targets.data());
        int64_t valid = std::count_if(targets.begin(), targets.end(), [](int t) { return t >= 0; });
        double ce_scale = o.ce_divisor == "all" ? 1 / tokens_per_step : 1.0 / std::max<int64_t>(valid, 1);

        olmoe_zero_grad(&m);
        Losses sum;
        for (int i = 0; i < micro_batches; i++) {
            olmoe_forward(&m, &inputs[i * micro], (int)o.B, (int)o.T);
            olmoe_cross_entropy(&m, &targets[i * micro], (float)ce_scale);
            olmoe_backward(&m, &inputs[i * micro], o.lb_coef, o.z_coef, micro_batches);
            Losses l = olmoe_losses(&m, ce_scale, o.lb_coef / micro_batches, o.z_coef / micro_batches);
            if (!std::isfinite(l.loss)) die("step %ld: the loss is not finite; first in %s. The last checkpoint in %s is untouched", step, find_non_finite(&m).c_str(), o.out.c_str());
            sum.nll += l.nll; sum.valid += l.valid; sum.lb += l.lb; sum.z += l.z; sum.loss += l.loss;
            balance.add(m);
        }
        sum.ce = sum.valid ? sum.nll / sum.valid : 0;
        const Span* bad = nullptr;
        double norm = olmoe_grad_norm(&m, &bad);
        if (!std::isfinite(norm)) {
            std::string name = "all of them together";
            for (const HfTensor& t : hf_tensors(config)) if (bad && t.offset == bad->offset) name = t.name;
            die("step %ld: the gradient is not finite; first in the tensor that begins with %s. The last checkpoint in %s is untouched", step, name.c_str(), o.out.c_str());
        }
        bool skip = o.skip_spikes > 0 && (is_outlier(spikes.losses, sum.loss, o.skip_spikes) || is_outlier(spikes.norms, norm, o.skip_spikes));
        if (o.skip_spikes > 0) { spike_window_push(&spikes.losses, sum.loss); spike_window_push(&spikes.norms, norm); }
        o.adamw.lr = learning_rate(schedule, (double)step);
        if (!skip) olmoe_update(&m, ++updates, norm, o.adamw);
        cudaCheck(cudaStreamSynchronize(main_stream.stream));
        if (profile && step == steps) cudaCheck(cudaProfilerStop());
        double seconds = seconds_now() - start, rate = tokens_per_step / seconds;

        bool last = step == steps || stop_requested;
        if (step % o.log_every == 0 || last || step == first_step + 1)
            printf("step %*ld/%ld | loss %.4f ce %.4f lb %.5f z %.5f | norm %.3f%s | lr %.2e | %.1f ms | %s tok/s | %.0f%% of peak | eta %s\n", (int)std::to_string(steps).size(), step, steps,
                   sum.loss, sum.ce, sum.lb, sum.z, norm, skip ? " SKIPPED" : "", o.adamw.lr, 1000 * seconds, human(rate).c_str(), 100 * rate * flops / peak,
                   human_time((seconds_now() - started) / (step - first_step) * (steps - step)).c_str());
        fprintf(log, "{\"step\":%ld,\"loss\":%.9g,\"ce_loss\":%.9g,\"lb_loss\":%.9g,\"z_loss\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"ms\":%.9g,\"tokens_per_s\":%.9g",
                step, sum.loss, sum.ce, sum.lb, sum.z, norm, o.adamw.lr, 1000 * seconds, rate);
        if (skip) fprintf(log, ",\"skipped\":true");
        if (last || (o.val_every > 0 && step % o.val_every == 0)) {
            if (!o.val.empty()) {
                DomainTable domains;
                if (last && o.val.size() == 1) domains_open(&domains, o.val[0], config);
                Validation v = validate(&m, &val, o.val_batches, have_tokenizer && tokenizer.bytes, have_tokenizer ? tokenizer.eos : -1, &balance, domains.documents.empty() ? nullptr : &domains);
                printf("  validation loss %.4f", v.loss);
                fprintf(log, ",\"val_loss\":%.9g", v.loss);
                if (v.bits_per_byte > 0) { printf(", %.4f bits per byte", v.bits_per_byte); fprintf(log, ",\"val_bpb\":%.9g", v.bits_per_byte); }
                printf("\n");
                if (domains.names.size() > 1) print_domains(domains, config);
            }
            print_balance(balance);
            fprintf(log, ",\"balance\":[");
            for (int l = 0; l < config.L; l++) {
                LayerBalance b = layer_balance(balance, l);
                fprintf(log, "%s{\"max_over_mean\":%.9g,\"entropy\":%.9g,\"dead\":%d}", l ? "," : "", b.max_over_mean, b.entropy, b.dead);
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
        if (last || stop_requested || (o.save_every > 0 && step % o.save_every == 0)) {
            save_checkpoint(&m, o, step, trainer_state(o, data, step, updates, spikes, schedule));
            saved = step;
        }
        fflush(stdout);
    }
    if (stop_requested && saved < step) save_checkpoint(&m, o, step, trainer_state(o, data, step, updates, spikes, schedule));   // asked for while it saved
    if (stop_requested) printf("stopped at step %ld and saved; go on with --resume\n", step);
    if (dataloader_masked(&data) > 0) printf("%ld sequences were repetitive and had no targets\n", dataloader_masked(&data));
    if (fclose(log) != 0) die("cannot write %s: %s", log_path.c_str(), strerror(errno));
    olmoe_free(&m);
    device_close();
    dataloader_close(&data);
    if (!o.val.empty()) dataloader_close(&val);
    return 0;
}

// ------------------------------------------------------------------------------------------------
// olmoe verify: compares what this program computes with a reference file (its format: README.md)

struct Verify {
    int compared = 0, failed = 0;
    double rtol = 0, atol = 0;              // atol > 0: elementwise atol + rtol |ref|, else relative L2
};

void verify_line(Verify* v, const std::string& name, double error, double tolerance, const std::string& worst) {
    bool ok = error <= tolerance;           // false for NaN
    v->compared++;
    v->failed += !ok;
    printf("%-58s %9.2e  %6.1f %%  %s%s\n", name.c_str(), error, 100 * error / tolerance, ok ? "ok" : "FAILED", worst.empty() ? "" : (" (worst " + worst + ")").c_str());
}

// `largest` is the largest norm of a gradient: an all-zero reference allows 1e-6 of it.
void verify_tensor(Verify* v, const std::string& name, const std::vector<float>& ours, const std::vector<float>& ref, double largest = 1) {
    double difference = 0, square = 0, worst = -1, excess = 0;
    size_t at = 0;
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
        {"rtol", Option::NUMBER, &rtol, "X", "relative L2 tolerance of a tensor; -1: the file's, else 1e-4 in FP32, 3e-2 in BF16", -1, 1e3},
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
    v.rtol = rtol >= 0 ? rtol : number("rtol", BF16 ? 3e-2 : 1e-4);
    v.atol = number("atol", 0);

    device_open();
    Olmoe m;
    olmoe_allocate(&m, c, (int)B, (int)T, 0, true);
    olmoe_load(&m, model);
    printf("%-58s %9s  %8s\n", "tensor", "error", "of limit");
    olmoe_forward(&m, inputs.data(), (int)B, (int)T);
    cudaCheck(cudaDeviceSynchronize());
    std::vector<float> logits = device_floats(m.acts.logits, (size_t)B * T * c.V);
    if (const SafeTensor* t = f.find("logits")) verify_tensor(&v, "logits", logits, floats(t));
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
            verify_line(&v, text("%s.experts (%.2f %% agree)", prefix.c_str(), 100 * (1 - share)), share, BF16 ? 1 : 1e-12, where);
        }
    }
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
// olmoe info, olmoe tokenize, main

int command_info(int argc, char** argv) {
    std::string config, model;
    int64_t B = 4, T = 0, recompute = 0;
    options_parse(argc, argv, "info --config FILE | --model DIR [options]", {
        {"config", Option::TEXT, &config, "FILE", "a config.json"},
        {"model", Option::TEXT, &model, "DIR", "a Hugging Face directory"},
        {"batch", Option::INTEGER, &B, "B", "sequences of a micro-batch", 1, 1 << 20},
        {"seq", Option::INTEGER, &T, "T", "tokens of a sequence; 0: max_position_embeddings", 0, 1 << 20},
        {"recompute", Option::INTEGER, &recompute, "0|1|2", "as in train", 0, 2},
    });
    if (config.empty() == model.empty()) die("info needs either --config FILE or --model DIR");
    OlmoeConfig c;
    config_read(&c, config.empty() ? model : config);
    if (T == 0) T = c.max_T;
    Olmoe m;
    olmoe_plan(&m, c, (int)B, (int)T, (int)recompute, true);
    std::vector<std::pair<std::string, std::string>> box = {{"model", config.empty() ? model : config}};
    box_shapes(&box, c);
    box.push_back({"", ""});
    box.push_back({"FLOP a token", text("%s forward and backward at T = %ld, causal", human(flops_per_token(c, (int)T), "FLOP").c_str(), T)});
    box.push_back({"", ""});
    box.push_back({"training", text("%s, %ld x %ld tokens a micro-batch, --recompute %ld", BF16 ? "BF16" : "FP32", B, T, recompute)});
    box_memory(&box, m);
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
    options_parse(argc, argv, "tokenize --tokenizer bytes --out FILE.npy INPUT...", {
        {"tokenizer", Option::TEXT, &name, "NAME", "bytes: an id is a byte, 256 ends a document"},
        {"out", Option::TEXT, &out, "FILE.npy", "uint16 tokens without a header; FILE.csv.gz lists the documents"},
    }, &inputs);
    if (name.empty() || out.empty() || inputs.empty()) die("tokenize needs --tokenizer bytes, --out FILE.npy and inputs (.txt: a document a file; .jsonl: a document a line)");
    if (out.size() < 5 || out.compare(out.size() - 4, 4, ".npy") != 0) die("--out %s: the name of a token file ends in .npy", out.c_str());
    Tokenizer t;
    tokenizer_open(&t, name);
    TokenizeCounts counts = tokenize_files(t, inputs, out);
    printf("%s: %zu documents, %zu tokens\n", out.c_str(), counts.documents, counts.tokens);
    return 0;
}

#ifndef TESTING
int main(int argc, char** argv) {
    struct { const char* name; int (*run)(int, char**); const char* help; } commands[] = {
        {"train", command_train, "train a model, from random weights or from a Hugging Face directory"},
        {"verify", command_verify, "compare logits, losses, gradients and routing with a reference file"},
        {"tokenize", command_tokenize, "text to token files"},
        {"info", command_info, "parameters, FLOPs and memory plan of a config or a model"},
    };
    setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
    for (auto& c : commands) if (argc > 1 && strcmp(argv[1], c.name) == 0) return c.run(argc, argv);
    bool help = argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0);
    if (argc > 1 && !help) die("unknown command '%s'; see olmoe --help", argv[1]);
    printf("usage: olmoe COMMAND [options]; olmoe COMMAND --help lists them\n");
    for (auto& c : commands) printf("  %-10s %s\n", c.name, c.help);
    return help ? 0 : 1;
}
#endif
