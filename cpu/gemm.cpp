// cuBLAS's functions, and the products themselves by oneDNN: fp32 by its sgemm, bf16 by its matmul primitive.
#include "gemm.h"
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
cublasStatus_t cublasCreate(cublasHandle_t* handle) { *handle = new cublasContext{nullptr}; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy(cublasHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) { handle->stream = stream; return CUBLAS_STATUS_SUCCESS; }
// Kept for the GPU's sake: oneDNN has its own memory and always computes in full precision.
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
                                          const void* alpha, const void* A, cudaDataType_t Atype, int lda, long long strideA,
                                          const void* B, cudaDataType_t Btype, int ldb, long long strideB,
                                          const void* beta, void* C, cudaDataType_t Ctype, int ldc, long long strideC,
                                          int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    bool ta = transa == CUBLAS_OP_T, tb = transb == CUBLAS_OP_T;
    auto at_least = [](int ld, int rows) { return ld >= rows && ld >= 1; };
    if (!handle || !alpha || !beta || m < 0 || n < 0 || k < 0 || batch < 0
        || !at_least(lda, ta ? k : m) || !at_least(ldb, tb ? n : k) || !at_least(ldc, m)) return CUBLAS_STATUS_INVALID_VALUE;
    if (Atype != Btype || (Atype == CUDA_R_32F && Ctype != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m == 0 || n == 0 || batch == 0) return CUBLAS_STATUS_SUCCESS;
    if (!C || (k > 0 && (!A || !B))) return CUBLAS_STATUS_INVALID_VALUE;
    enqueue_gemm({ta, tb, m, n, k, batch, *(const float*)alpha, *(const float*)beta, A, B, C, lda, ldb, ldc,
                  strideA, strideB, strideC, Atype, Ctype}, handle->stream);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
                            const void* alpha, const void* A, cudaDataType_t Atype, int lda,
                            const void* B, cudaDataType_t Btype, int ldb,
                            const void* beta, void* C, cudaDataType_t Ctype, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0,
                                      beta, C, Ctype, ldc, 0, 1, compute, algorithm);
}

// ------------------------------------------------------------------------------------------------
// A column-major matrix is its transpose in row-major: C' (n, m) = op(B)' (n, k) op(A)' (k, m). So B goes first.

static void run_fp32(const Gemm& g, const float* A, const float* B, float* C) {
    dnnl_status_t status = dnnl_sgemm(g.transb ? 'T' : 'N', g.transa ? 'T' : 'N', g.n, g.m, g.k, g.alpha, B, g.ldb, A, g.lda, g.beta, C, g.ldc);
    if (status != dnnl_success) { fprintf(stderr, "oneDNN: sgemm %d x %d x %d failed with status %d\n", g.m, g.n, g.k, (int)status); abort(); }
}

// A primitive is code generated for one shape, a tenth to several megabytes of it, and making one takes as long as running
// it. So they are kept, and the dimension that changes from step to step, the rows that an expert received, comes in
// multiples of ROWS and in rests smaller than that.
constexpr int ROWS = 32;

struct Product {
    dnnl::memory::desc src, weights, dst;
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
    if (g.alpha != 1) attributes.set_output_scales(0, {g.alpha});
    if (g.beta != 0) {
        dnnl::post_ops sum;
        sum.append_sum(g.beta);
        attributes.set_post_ops(sum);
    }
    p.primitive = dnnl::matmul(dnnl::matmul::primitive_desc(dnnl::matmul::desc(p.src, p.weights, p.dst), attributes, engine()));
    return p;
}

static void run_product(const Gemm& g, const void* A, const void* B, void* C) {
    // oneDNN divides a primitive's work over threads when it is made.
    typedef std::tuple<int, bool, bool, int, int, int, int, int, int, float, float, int> Key;
    static std::map<Key, Product> cache;
    static std::mutex mutex;
    static thread_local dnnl::stream stream(engine());
    Key key(omp_in_parallel() ? 1 : omp_get_max_threads(), g.transa, g.transb, g.m, g.n, g.k, g.lda, g.ldb, g.ldc, g.alpha, g.beta, g.typeC);
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
    p.primitive.execute(stream, {{DNNL_ARG_SRC, src}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, dst}});
    stream.wait();
}

static void run_bf16(const Gemm& g, const uint16_t* A, const uint16_t* B, void* C) {
    if (!g.transa && g.transb && g.k % ROWS != 0) {
        // A sum over rows (a weight's gradient): copied, and filled up with rows of zeros. Two products, one after the
        // other, would round C twice.
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
        run_product(rest, A, B + (size_t)whole.n * g.ldb, (char*)C + (size_t)whole.n * (size_t)g.ldc * bytes_of(g.typeC));
    } else {
        run_product(g, A, B, C);
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
    // Below some 10 microseconds of work, waking the other threads takes longer than doing without them.
    int threads = omp_get_max_threads();
    bool alone = flops(g) < 4e6 && threads > 1 && !omp_in_parallel();
    if (alone) omp_set_num_threads(1);
    // One product at a time: oneDNN's own batches have no fast code for heads that lie side by side in a row.
    auto run = [&](int b) {
        char *A = (char*)g.A + b * g.strideA * (long long)bytes_of(g.typeAB), *B = (char*)g.B + b * g.strideB * (long long)bytes_of(g.typeAB);
        char* C = (char*)g.C + b * g.strideC * (long long)bytes_of(g.typeC);
        if (g.typeAB == CUDA_R_32F) run_fp32(g, (float*)A, (float*)B, (float*)C);
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
