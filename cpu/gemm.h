// Matrix products in both machines: recorded when cuBLAS is called, run by oneDNN.
#pragma once
#include "cublas_v2.h"

struct Gemm {
    bool transa, transb;
    int m, n, k, batch;
    float alpha, beta;
    const void* A;
    const void* B;
    void* C;
    int lda, ldb, ldc;
    long long strideA, strideB, strideC;
    cudaDataType typeAB, typeC;
};

inline size_t bytes_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }
// Bytes from a matrix's first element to the end of its last one, over the whole batch.
inline size_t extent(int rows, int columns, int ld, int batch, long long stride, cudaDataType type) {
    if (rows == 0 || columns == 0 || batch == 0) return 0;
    return ((size_t)(batch - 1) * (size_t)stride + (size_t)(columns - 1) * (size_t)ld + (size_t)rows) * bytes_of(type);
}
inline size_t extent_A(const Gemm& g) {
    return extent(g.transa ? g.k : g.m, g.transa ? g.m : g.k, g.lda, g.batch, g.strideA, g.typeAB);
}
inline size_t extent_B(const Gemm& g) {
    return extent(g.transb ? g.n : g.k, g.transb ? g.k : g.n, g.ldb, g.batch, g.strideB, g.typeAB);
}
inline size_t extent_C(const Gemm& g) { return extent(g.m, g.n, g.ldc, g.batch, g.strideC, g.typeC); }
inline double flops(const Gemm& g) { return 2.0 * g.m * g.n * g.k * g.batch; }

// Do two ranges of bytes have one in common?
inline bool overlap(const void* a, size_t bytes_a, const void* b, size_t bytes_b) {
    return bytes_a > 0 && bytes_b > 0
        && (const char*)a < (const char*)b + bytes_b && (const char*)b < (const char*)a + bytes_a;
}

// With all threads, or with one when called inside a parallel region.
void run_gemm(const Gemm& g);

// How the cuBLAS functions give a product to the machine: fast.cpp and strict.cpp each define it.
void enqueue_gemm(const Gemm& g, cudaStream_t stream);
