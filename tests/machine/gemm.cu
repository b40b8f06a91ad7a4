// cuBLAS's products compared with sums in double: transposes, alpha and beta, batches, types, streams, a C that is not
// read when beta is 0, and few columns with several numbers of threads.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <omp.h>
#include <vector>

typedef __nv_bfloat16 bf16;
static int failures = 0;
static cublasHandle_t handle;
static cudaStream_t stream;

static unsigned state = 1;
static float uniform() { return (float)((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1; }

template <class T> static T* device(const std::vector<T>& v) {
    T* p;
    cudaMalloc(&p, v.size() * sizeof(T));
    cudaMemcpyAsync(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice, stream);
    return p;
}

template <class T, class U>
static void test(bool ta, bool tb, int m, int n, int k, int batch, float alpha, float beta, int pad) {
    int lda = (ta ? k : m) + pad, ldb = std::max(1, tb ? n : k) + pad, ldc = m + pad;
    size_t sA = (size_t)lda * (ta ? m : k), sB = (size_t)ldb * (tb ? k : n), sC = (size_t)ldc * n;
    std::vector<T> A(sA * batch), B(sB * batch);
    std::vector<U> C(sC * batch);
    for (T& x : A) x = (T)uniform();
    for (T& x : B) x = (T)uniform();
    for (U& x : C) x = (U)(beta == 0 ? NAN : uniform());
    T *dA = device(A), *dB = device(B);
    U* dC = device(C);
    cudaDataType_t type = sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF, typeC = sizeof(U) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    cublasOperation_t opA = ta ? CUBLAS_OP_T : CUBLAS_OP_N, opB = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t status = batch == 1
        ? cublasGemmEx(handle, opA, opB, m, n, k, &alpha, dA, type, lda, dB, type, ldb, &beta, dC, typeC, ldc,
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)
        : cublasGemmStridedBatchedEx(handle, opA, opB, m, n, k, &alpha, dA, type, lda, (long long)sA,
                                     dB, type, ldb, (long long)sB, &beta, dC, typeC, ldc, (long long)sC, batch,
                                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    std::vector<U> got(C.size());
    cudaStreamSynchronize(stream);
    cudaMemcpy(got.data(), dC, C.size() * sizeof(U), cudaMemcpyDeviceToHost);
    // k roundings of float in the sum; one of C's type at the end.
    double worst = status == CUBLAS_STATUS_SUCCESS ? 0 : INFINITY;
    double tolerance = 6e-8 * (k + 4) + (sizeof(U) == 2 ? 1.0 / 256 : 0);
    for (int b = 0; b < batch; b++)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double sum = 0, size = 0;
                for (int p = 0; p < k; p++) {
                    float x = (float)A[b * sA + (ta ? p + (size_t)i * lda : i + (size_t)p * lda)];
                    float y = (float)B[b * sB + (tb ? j + (size_t)p * ldb : p + (size_t)j * ldb)];
                    double product = (double)x * (double)y;
                    sum += product;
                    size += std::fabs(product);
                }
                size_t at = b * sC + i + (size_t)j * ldc;
                double want = alpha * sum + (beta == 0 ? 0 : beta * (double)(float)C[at]);
                size = std::fabs(alpha) * size + (beta == 0 ? 0 : std::fabs(beta * (double)(float)C[at]));
                double error = std::fabs((double)(float)got[at] - want) / (size + 1e-30);
                if (!(error <= worst)) worst = error;
            }
    // What is between the columns must not change.
    for (int b = 0; b < batch; b++)
        for (int j = 0; j < n; j++)
            for (int i = m; i < ldc; i++) {
                float before = (float)C[b * sC + i + (size_t)j * ldc], after = (float)got[b * sC + i + (size_t)j * ldc];
                if (!(before == after || (std::isnan(before) && std::isnan(after)))) worst = INFINITY;
            }
    if (!(worst <= tolerance)) {
        failures++;
        printf("FAILED %s->%s %c%c m %d n %d k %d batch %d alpha %g beta %g: error %g, tolerance %g\n",
               sizeof(T) == 4 ? "f32" : "bf16", sizeof(U) == 4 ? "f32" : "bf16",
               "NT"[ta], "NT"[tb], m, n, k, batch, alpha, beta, worst, tolerance);
    }
    cudaFree(dA);
    cudaFree(dB);
    cudaFree(dC);
}

// Two streams with products that depend on each other within a stream: C2 = A C1, C1 = A B.
static void test_order() {
    const int n = 96, count = 6;
    std::vector<float> A(n * n), B(n * n);
    for (float& x : A) x = uniform() / n;
    for (float& x : B) x = uniform();
    float *dA = device(A), *dB = device(B);
    cudaStreamSynchronize(stream);
    cudaStream_t streams[2];
    float* chain[2][count];
    const float one = 1, zero = 0;
    for (int s = 0; s < 2; s++) {
        cudaStreamCreateWithFlags(&streams[s], cudaStreamNonBlocking);
        for (float*& p : chain[s]) cudaMalloc(&p, n * n * 4);
    }
    for (int i = 0; i < count; i++)
        for (int s = 0; s < 2; s++) {
            const float* previous = i ? chain[s][i - 1] : dB;
            cublasSetStream(handle, streams[s]);
            cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, n, n, n, &one, dA, CUDA_R_32F, n, previous, CUDA_R_32F, n,
                         &zero, chain[s][i], CUDA_R_32F, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        }
    cublasSetStream(handle, stream);
    std::vector<double> want(B.begin(), B.end());
    for (int i = 0; i < count; i++) {
        std::vector<double> next(n * n);
        for (int c = 0; c < n; c++)
            for (int p = 0; p < n; p++)
                for (int r = 0; r < n; r++) next[c * n + r] += A[p * n + r] * want[c * n + p];
        want = next;
    }
    double norm = 0;
    for (double x : want) norm = std::fmax(norm, std::fabs(x));
    for (int s = 0; s < 2; s++) {
        std::vector<float> got(n * n);
        cudaStreamSynchronize(streams[s]);
        cudaMemcpy(got.data(), chain[s][count - 1], n * n * 4, cudaMemcpyDeviceToHost);
        double worst = 0;
        for (int i = 0; i < n * n; i++) {
            double error = std::fabs(got[i] - want[i]) / norm;
            if (!(error <= worst)) worst = error;
        }
        if (!(worst <= 1e-4)) { failures++; printf("FAILED chain of products on stream %d: error %g\n", s, worst); }
        for (float* p : chain[s]) cudaFree(p);
        cudaStreamDestroy(streams[s]);
    }
    cudaFree(dA);
    cudaFree(dB);
}

// A product with few columns, large enough for several threads, has the same bits with any number of them.
template <class T, class U> static void test_threads(int n) {
    const int m = 5003, k = 261;
    std::vector<T> A((size_t)m * k), B(n * k);
    for (T& x : A) x = (T)uniform();
    for (T& x : B) x = (T)uniform();
    T *dA = device(A), *dB = device(B);
    U* dC = device(std::vector<U>(m * n));
    cudaDataType_t type = sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF, typeC = sizeof(U) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    const float one = 1, zero = 0;
    const int most = omp_get_max_threads();
    std::vector<U> got[3];
    for (int threads : {1, 2, 3}) {
        omp_set_num_threads(threads);
        cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, dA, type, k, dB, type, k, &zero, dC, typeC, m,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        got[threads - 1].resize(m * n);
        cudaStreamSynchronize(stream);
        cudaMemcpy(got[threads - 1].data(), dC, m * n * sizeof(U), cudaMemcpyDeviceToHost);
        if (memcmp(got[threads - 1].data(), got[0].data(), m * n * sizeof(U)) != 0) {
            failures++;
            printf("FAILED n %d: other bits with %d threads\n", n, threads);
        }
    }
    omp_set_num_threads(most);
    cudaFree(dA);
    cudaFree(dB);
    cudaFree(dC);
}

int main() {
    cublasCreate(&handle);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cublasSetStream(handle, stream);
    int shapes[][4] = {{1, 1, 1, 1}, {7, 5, 3, 1}, {64, 48, 33, 1}, {33, 1, 100, 1},
                       {16, 130, 64, 3}, {5, 9, 17, 4}, {70, 90, 400, 1}, {128, 100, 200, 1}};
    for (auto& s : shapes)
        for (int t = 0; t < 4; t++)
            for (float beta : {0.f, 1.f}) {
                float alpha = t == 2 ? 0.125f : 1.f;
                test<float, float>(t & 1, t & 2, s[0], s[1], s[2], s[3], alpha, beta, t);
                test<bf16, bf16>(t & 1, t & 2, s[0], s[1], s[2], s[3], alpha, beta, t);
                test<bf16, float>(t & 1, t & 2, s[0], s[1], s[2], s[3], alpha, beta, t);
            }
    for (int n = 1; n <= 9; n++)            // few columns; and lengths around those of a vector
        for (int k : {1, 3, 8, 17, 100, 511})
            for (int m : {1, 3, 4, 30}) {
                float alpha = n % 2 ? 1.f : 0.5f, beta = k % 2 ? 0.f : n % 3 ? 1.f : -0.25f;
                test<float, float>(true, false, m, n, k, m == 3 ? 3 : 1, alpha, beta, k % 4);
                test<bf16, bf16>(true, false, m, n, k, m == 3 ? 3 : 1, alpha, beta, k % 4);
                test<bf16, float>(true, false, m, n, k, m == 3 ? 3 : 1, alpha, beta, k % 4);
            }
    for (int n : {1, 3, 8}) {
        test_threads<float, float>(n);
        test_threads<bf16, bf16>(n);
        test_threads<bf16, float>(n);
    }
    test<float, float>(false, false, 4, 4, 0, 1, 1, 1, 0);
    test<bf16, float>(false, false, 4, 4, 0, 1, 1, 0, 0);
    test_order();
    cublasDestroy(handle);
    cudaStreamDestroy(stream);
    printf(failures ? "%d failed\n" : "gemm ok\n", failures);
    return failures > 0;
}
