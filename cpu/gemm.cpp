// cuBLAS's functions, and the matrix products themselves: fp32 by oneDNN's sgemm, bf16 by its matmul primitive, and
// thin products of both types by loops in this file.
#include "gemm.h"
#include <algorithm>
#include <cuda_bf16.h>
#include <dnnl.hpp>
#include <map>
#include <mutex>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <tuple>
#include <vector>

struct cublasContext { cudaStream_t stream; };

const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "success";
        case CUBLAS_STATUS_INVALID_VALUE: return "a size, leading dimension or pointer is invalid";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "this combination of types is not supported";
    }
    return "unknown status";
}
cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    *handle = new cublasContext{nullptr};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
// These two change nothing: oneDNN has its own memory and always computes in full precision.
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void* alpha,
                                          const void* A, cudaDataType_t Atype, int lda, long long strideA,
                                          const void* B, cudaDataType_t Btype, int ldb, long long strideB,
                                          const void* beta, void* C, cudaDataType_t Ctype, int ldc, long long strideC,
                                          int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    bool ta = transa == CUBLAS_OP_T, tb = transb == CUBLAS_OP_T;
    auto at_least = [](int ld, int rows) { return ld >= rows && ld >= 1; };
    if (!handle || !alpha || !beta || m < 0 || n < 0 || k < 0 || batch < 0
        || !at_least(lda, ta ? k : m) || !at_least(ldb, tb ? n : k) || !at_least(ldc, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (Atype != Btype || (Atype == CUDA_R_32F && Ctype != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m == 0 || n == 0 || batch == 0) return CUBLAS_STATUS_SUCCESS;
    if (!C || (k > 0 && (!A || !B))) return CUBLAS_STATUS_INVALID_VALUE;
    enqueue_gemm({ta, tb, m, n, k, batch, *(const float*)alpha, *(const float*)beta, A, B, C, lda, ldb, ldc,
                  strideA, strideB, strideC, Atype, Ctype}, handle->stream);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                            int m, int n, int k,
                            const void* alpha, const void* A, cudaDataType_t Atype, int lda,
                            const void* B, cudaDataType_t Btype, int ldb,
                            const void* beta, void* C, cudaDataType_t Ctype, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0,
                                      beta, C, Ctype, ldc, 0, 1, compute, algorithm);
}

// ------------------------------------------------------------------------------------------------
// A column-major matrix is its transpose in row-major: C' (n, m) = op(B)' (n, k) op(A)' (k, m). So B comes first.

static void run_fp32(const Gemm& g, const float* A, const float* B, float* C) {
    auto run = [&](int from, int rows) {                // of op(A)
        const float* first = A + (size_t)from * (g.transa ? g.lda : 1);
        dnnl_status_t status = dnnl_sgemm(g.transb ? 'T' : 'N', g.transa ? 'T' : 'N', g.n, rows, g.k,
                                          g.alpha, B, g.ldb, first, g.lda, g.beta, C + from, g.ldc);
        if (status == dnnl_success) return;
        fprintf(stderr, "oneDNN: sgemm %d x %d x %d failed with status %d\n", rows, g.n, g.k, (int)status);
        abort();
    };
    // oneDNN first copies an A that it has to transpose (W in y = W x). Where C has few columns, each of its threads
    // copies all of A, and two threads were hardly faster than one. So each thread gets rows of its own, in multiples
    // of a vector's length, if there are enough rows.
    const int threads = omp_get_max_threads(), rows = (g.m + 16 * threads - 1) / (16 * threads) * 16;
    if (!g.transa || threads == 1 || omp_in_parallel() || rows * (threads - 1) >= g.m) return run(0, g.m);
#pragma omp parallel for schedule(static)
    for (int from = 0; from < g.m; from += rows) run(from, std::min(rows, g.m - from));
}

// A primitive is code that is generated for one shape: 0.1 to several megabytes, and making it takes as long as running
// it. So primitives are kept. The dimension that changes from step to step, the rows that an expert received, is split
// into a multiple of ROWS and a rest smaller than ROWS, or padded to a multiple.
constexpr int ROWS = 32;

struct Product {
    dnnl::memory::desc src, weights, dst, scratchpad;
    dnnl::matmul primitive;
};

static dnnl::engine& engine() {
    static dnnl::engine e(dnnl::engine::kind::cpu, 0);
    return e;
}

static Product make_product(const Gemm& g) {
    using type = dnnl::memory::data_type;
    Product p;
    p.src = dnnl::memory::desc({g.n, g.k}, type::bf16, {g.transb ? 1 : g.ldb, g.transb ? g.ldb : 1});
    p.weights = dnnl::memory::desc({g.k, g.m}, type::bf16, {g.transa ? 1 : g.lda, g.transa ? g.lda : 1});
    p.dst = dnnl::memory::desc({g.n, g.m}, g.typeC == CUDA_R_32F ? type::f32 : type::bf16, {g.ldc, 1});
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    dnnl::post_ops after;
#if DNNL_VERSION_MAJOR >= 3
    if (g.alpha != 1) after.append_eltwise(dnnl::algorithm::eltwise_linear, g.alpha, 0);
#else
    if (g.alpha != 1) attributes.set_output_scales(0, {g.alpha});
#endif
    if (g.beta != 0) after.append_sum(g.beta);
    attributes.set_post_ops(after);
#if DNNL_VERSION_MAJOR >= 3
    dnnl::matmul::primitive_desc described(engine(), p.src, p.weights, p.dst, attributes);
#else
    dnnl::matmul::primitive_desc described(dnnl::matmul::desc(p.src, p.weights, p.dst), attributes, engine());
#endif
    p.scratchpad = described.scratchpad_desc();
    p.primitive = dnnl::matmul(described);
    return p;
}

static void run_product(const Gemm& g, const void* A, const void* B, void* C) {
    // oneDNN divides a primitive's work over threads when the primitive is made, so the key has their number.
    typedef std::tuple<int, bool, bool, int, int, int, int, int, int, float, float, int> Key;
    static std::map<Key, Product> cache;
    static std::mutex mutex;
    static thread_local dnnl::stream stream(engine());
    Key key(omp_in_parallel() ? 1 : omp_get_max_threads(), g.transa, g.transb, g.m, g.n, g.k, g.lda, g.ldb, g.ldc,
            g.alpha, g.beta, g.typeC);
    Product p;
    {
        std::lock_guard<std::mutex> lock(mutex);
        auto found = cache.find(key);
        if (found != cache.end()) p = found->second;
    }
    if (!p.primitive) {
        p = make_product(g);
        std::lock_guard<std::mutex> lock(mutex);
        if (cache.size() >= 1000) cache.clear();
        cache.emplace(key, p);
    }
    dnnl::memory src(p.src, engine(), (void*)B), weights(p.weights, engine(), (void*)A), dst(p.dst, engine(), C);
    // By default the scratchpad belongs to the thread that made the primitive, and another thread's may be too small.
    static thread_local std::vector<char> scratch;
    if (scratch.size() < p.scratchpad.get_size() + 64) scratch.resize(p.scratchpad.get_size() + 64);
    dnnl::memory scratchpad(p.scratchpad, engine(), (void*)(((uintptr_t)scratch.data() + 63) / 64 * 64));
    p.primitive.execute(stream, {{DNNL_ARG_SRC, src}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, dst},
                                 {DNNL_ARG_SCRATCHPAD, scratchpad}});
    stream.wait();
}

// Does oneDNN have products of bf16 for this processor? It needs AVX-512.
static bool has_bf16() {
    static const bool has = dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core;
    return has;
}

// Where it has none: operands are widened to fp32, which is exact, for one block of C at a time, so that the widened
// numbers stay in the cache.
static void run_widened(const Gemm& g, const __nv_bfloat16* A, const __nv_bfloat16* B, void* C) {
    constexpr int ELEMENTS = 1 << 18;                   // in the block of an operand
    static thread_local std::vector<float> wide_A, wide_B, wide_C;
    const int most = std::max(16, ELEMENTS / g.k), rows = std::min(g.m, most), columns = std::min(g.n, most);
    // `outer` runs of `inner` elements
    auto widen = [&](std::vector<float>* wide, const __nv_bfloat16* from, int ld, int outer, int inner) {
        wide->resize((size_t)outer * inner);
        float* to = wide->data();
#pragma omp parallel for schedule(static) if(!omp_in_parallel() && (size_t)outer * inner > 100000)
        for (int j = 0; j < outer; j++)
            for (int i = 0; i < inner; i++) to[(size_t)j * inner + i] = (float)from[(size_t)j * ld + i];
    };
    for (int j = 0; j < g.n; j += columns) {
        Gemm block = g;
        block.n = std::min(columns, g.n - j);
        if (g.transb) widen(&wide_B, B + j, g.ldb, g.k, block.ldb = block.n);
        else widen(&wide_B, B + (size_t)j * g.ldb, g.ldb, block.n, block.ldb = g.k);
        for (int i = 0; i < g.m; i += rows) {
            block.m = std::min(rows, g.m - i);
            if (g.transa) widen(&wide_A, A + (size_t)i * g.lda, g.lda, block.m, block.lda = g.k);
            else widen(&wide_A, A + i, g.lda, g.k, block.lda = block.m);
            if (g.typeC == CUDA_R_32F) {
                run_fp32(block, wide_A.data(), wide_B.data(), (float*)C + (size_t)j * g.ldc + i);
                continue;
            }
            __nv_bfloat16* narrow = (__nv_bfloat16*)C + (size_t)j * g.ldc + i;
            block.ldc = block.m;
            if (g.beta != 0) widen(&wide_C, narrow, g.ldc, block.n, block.m);
            else wide_C.resize((size_t)block.n * block.m);
            run_fp32(block, wide_A.data(), wide_B.data(), wide_C.data());
            for (int column = 0; column < block.n; column++)
                for (int row = 0; row < block.m; row++)
                    narrow[(size_t)column * g.ldc + row] = (__nv_bfloat16)wide_C[(size_t)column * block.m + row];
        }
    }
}

static void run_bf16(const Gemm& g, const uint16_t* A, const uint16_t* B, void* C) {
    if (!has_bf16()) return run_widened(g, (const __nv_bfloat16*)A, (const __nv_bfloat16*)B, C);
    if (!g.transa && g.transb && g.k % ROWS != 0) {
        // A sum over rows (a weight's gradient): the operands are copied and padded with rows of zeros. Two products,
        // one after the other, would round C twice.
        static thread_local std::vector<uint16_t> copy;
        Gemm padded = g;
        padded.k = (g.k + ROWS - 1) / ROWS * ROWS;
        padded.lda = g.m;
        padded.ldb = g.n;
        copy.resize((size_t)padded.k * (size_t)(g.m + g.n));
        uint16_t *A2 = copy.data(), *B2 = A2 + (size_t)padded.k * g.m;
#pragma omp parallel for schedule(static) if(!omp_in_parallel() && copy.size() > 100000)
        for (int i = 0; i < padded.k; i++) {
            if (i < g.k) {
                memcpy(A2 + (size_t)i * g.m, A + (size_t)i * g.lda, (size_t)g.m * 2);
                memcpy(B2 + (size_t)i * g.n, B + (size_t)i * g.ldb, (size_t)g.n * 2);
            } else {
                memset(A2 + (size_t)i * g.m, 0, (size_t)g.m * 2);
                memset(B2 + (size_t)i * g.n, 0, (size_t)g.n * 2);
            }
        }
        run_product(padded, A2, B2, C);
    } else if (!g.transb && g.n > ROWS && g.n % ROWS != 0) {
        Gemm whole = g, rest = g;
        rest.n = g.n % ROWS;
        whole.n = g.n - rest.n;
        run_product(whole, A, B, C);
        char* rest_of_C = (char*)C + (size_t)whole.n * (size_t)g.ldc * bytes_of(g.typeC);
        run_product(rest, A, B + (size_t)whole.n * g.ldb, rest_of_C);
    } else {
        run_product(g, A, B, C);
    }
}

// ------------------------------------------------------------------------------------------------
// Thin products: y = W x of one token or a few, as in generation. They take as long as reading W from memory, so W is
// read once, from its first number to its last, and bf16 is widened in registers. One thread sums an element, in an
// order that depends on the shape alone.

constexpr int THIN = 8;                 // columns at most
constexpr int LANES = 8;                // numbers of a vector
// Bytes by which W is prefetched: a processor's own prefetching ends with a page
constexpr int AHEAD = 8192;
typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

// 2 LANES numbers of a row. For bf16, a has those at even places and b those at odd ones. Each is the upper half of its
// fp32.
struct Numbers { Lanes a, b; };
static inline Numbers load(const float* p) {
    Numbers x;
    memcpy(&x.a, p, sizeof x.a);
    memcpy(&x.b, p + LANES, sizeof x.b);
    return x;
}
static inline Numbers load(const uint16_t* p) {
    Bits pairs;
    memcpy(&pairs, p, sizeof pairs);
    return {(Lanes)(pairs << 16), (Lanes)(pairs & 0xffff0000)};
}
template <class T> static inline Numbers load(const T* p, int count) {      // the last ones, padded with zeros
    T filled[2 * LANES] = {};
    memcpy(filled, p, count * sizeof(T));
    return load(filled);
}

// Row i of W with columns j .. j + N - 1 of x
template <int N, class T> static inline void thin_row(const Gemm& g, const T* A, const T* B, void* C, int i, int j) {
    const T *w = A + (size_t)i * g.lda, *x = B + (size_t)j * g.ldb;
    Numbers sums[N] = {};
    auto add = [&](int p, auto... count) {
        __builtin_prefetch((const char*)(w + p) + AHEAD);
        Numbers ws = load(w + p, count...);
        for (int c = 0; c < N; c++) {
            Numbers xs = load(x + (size_t)c * g.ldb + p, count...);
            sums[c].a += ws.a * xs.a;
            sums[c].b += ws.b * xs.b;
        }
    };
    int p = 0;
    for (; p + 2 * LANES <= g.k; p += 2 * LANES) add(p);
    if (p < g.k) add(p, g.k - p);
    for (int c = 0; c < N; c++) {
        Lanes v = sums[c].a + sums[c].b;
        float sum = g.alpha * (((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])));
        size_t at = (size_t)(j + c) * g.ldc + i;
        auto store = [&](auto* y) { y[at] = g.beta == 0 ? sum : sum + g.beta * (float)y[at]; };
        if (g.typeC == CUDA_R_32F) store((float*)C); else store((__nv_bfloat16*)C);
    }
}

static bool is_thin(const Gemm& g) { return g.transa && !g.transb && g.n <= THIN; }

template <class T> static void run_thin(const Gemm& g, const T* A, const T* B, void* C) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < g.m; i++) {
        int j = 0;
        for (; j + 4 <= g.n; j += 4) thin_row<4>(g, A, B, C, i, j);
        for (; j + 2 <= g.n; j += 2) thin_row<2>(g, A, B, C, i, j);
        if (j < g.n) thin_row<1>(g, A, B, C, i, j);
    }
}

// Products of length 0, which oneDNN refuses: C = beta C.
template <class T> static void scale(const Gemm& g) {
    for (int b = 0; b < g.batch; b++)
        for (int j = 0; j < g.n; j++)
            for (int i = 0; i < g.m; i++) {
                T& c = ((T*)g.C)[b * g.strideC + (size_t)j * g.ldc + i];
                c = g.beta == 0 ? (T)0.f : (T)(g.beta * (float)c);
            }
}

void run_gemm(const Gemm& g) {
    if (g.k == 0) {
        if (g.typeC == CUDA_R_32F) scale<float>(g); else scale<__nv_bfloat16>(g);
        return;
    }
    // For less than about 10 microseconds of work, waking the other threads takes longer than working without them.
    // Thin products read W, at 20 GB/s.
    int threads = omp_get_max_threads();
    bool little = is_thin(g) ? (double)g.m * g.k * g.batch * (double)bytes_of(g.typeAB) < 2e5 : flops(g) < 4e6;
    bool alone = little && threads > 1 && !omp_in_parallel();
    if (alone) omp_set_num_threads(1);
    // One product at a time: oneDNN has no fast code for batches of heads that are side by side in a row.
    auto run = [&](int b) {
        char* A = (char*)g.A + b * g.strideA * (long long)bytes_of(g.typeAB);
        char* B = (char*)g.B + b * g.strideB * (long long)bytes_of(g.typeAB);
        char* C = (char*)g.C + b * g.strideC * (long long)bytes_of(g.typeC);
        if (is_thin(g) && g.typeAB == CUDA_R_32F) run_thin(g, (float*)A, (float*)B, C);
        else if (is_thin(g)) run_thin(g, (uint16_t*)A, (uint16_t*)B, C);
        else if (g.typeAB == CUDA_R_32F) run_fp32(g, (float*)A, (float*)B, (float*)C);
        else run_bf16(g, (uint16_t*)A, (uint16_t*)B, C);
    };
    if (g.batch > 1 && g.batch >= omp_get_max_threads()) {
#pragma omp parallel for schedule(static)
        for (int b = 0; b < g.batch; b++) run(b);
    } else {
        for (int b = 0; b < g.batch; b++) run(b);
    }
    if (alone) omp_set_num_threads(threads);
}
