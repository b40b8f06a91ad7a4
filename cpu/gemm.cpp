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

static void run_sgemm(const Gemm& g, const float* A, const float* B, float* C) {
    dnnl_status_t status = dnnl_sgemm(g.transb ? 'T' : 'N', g.transa ? 'T' : 'N', g.n, g.m, g.k, g.alpha, B, g.ldb, A, g.lda, g.beta, C, g.ldc);
    if (status != dnnl_success) { fprintf(stderr, "oneDNN: sgemm %d x %d x %d failed with status %d\n", g.m, g.n, g.k, (int)status); abort(); }
}

// A primitive is code generated for one shape; making one takes longer than running a small one, so they are kept.
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
    p.src = dnnl::memory::desc({g.batch, g.n, g.k}, type::bf16, {g.strideB, g.transb ? 1 : g.ldb, g.transb ? g.ldb : 1});
    p.weights = dnnl::memory::desc({g.batch, g.k, g.m}, type::bf16, {g.strideA, g.transa ? 1 : g.lda, g.transa ? g.lda : 1});
    p.dst = dnnl::memory::desc({g.batch, g.n, g.m}, g.typeC == CUDA_R_32F ? type::f32 : type::bf16, {g.strideC, g.ldc, 1});
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

static void run_bf16(const Gemm& g) {
    // oneDNN divides a primitive's work over threads when it is made, so those of a parallel region are their own.
    typedef std::tuple<bool, bool, bool, int, int, int, int, int, int, int, long long, long long, long long, float, float, int> Key;
    static std::map<Key, Product> cache;
    static std::mutex mutex;
    static thread_local dnnl::stream stream(engine());
    Key key(omp_in_parallel(), g.transa, g.transb, g.m, g.n, g.k, g.batch, g.lda, g.ldb, g.ldc, g.strideA, g.strideB, g.strideC, g.alpha, g.beta, g.typeC);
    Product* p = nullptr;
    {
        std::lock_guard<std::mutex> lock(mutex);
        auto found = cache.find(key);
        if (found != cache.end()) p = &found->second;
    }
    if (!p) {
        Product made = make_product(g);
        std::lock_guard<std::mutex> lock(mutex);
        p = &cache.emplace(key, made).first->second;
    }
    dnnl::memory src(p->src, engine(), (void*)g.B), weights(p->weights, engine(), (void*)g.A), dst(p->dst, engine(), g.C);
    p->primitive.execute(stream, {{DNNL_ARG_SRC, src}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, dst}});
    stream.wait();
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
    if (g.typeAB == CUDA_R_16BF) { run_bf16(g); return; }
    const float *A = (const float*)g.A, *B = (const float*)g.B;
    float* C = (float*)g.C;
    if (g.batch >= omp_get_max_threads() && g.batch > 1) {
#pragma omp parallel for schedule(static)
        for (int b = 0; b < g.batch; b++) run_sgemm(g, A + b * g.strideA, B + b * g.strideB, C + b * g.strideC);
    } else {
        for (int b = 0; b < g.batch; b++) run_sgemm(g, A + b * g.strideA, B + b * g.strideB, C + b * g.strideC);
    }
}
