// A known number of launches and products between cudaProfilerStart and cudaProfilerStop, and some outside.
#include <cublas_v2.h>
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>

__global__ void fill(float* y, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 1;
}
template <typename T> __global__ void scale(T* y, T factor, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] *= factor;
}

int main(int argc, char**) {                // any argument: without the profiler
    const size_t n = 1 << 16;
    float *y, one = 1, zero = 0;
    cudaStream_t streams[2];
    cublasHandle_t handle;
    cudaMalloc(&y, n * sizeof(float));
    cublasCreate(&handle);
    fill<<<n / 256, 256>>>(y, n);
    if (argc == 1) cudaProfilerStart();
    for (int i = 0; i < 3; i++) fill<<<n / 256, 256>>>(y, n);
    scale<float><<<n / 256, 256>>>(y, 2, n);
    cudaMemset(y, 0, n * sizeof(float));
    for (cudaStream_t& s : streams) {
        cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
        cublasSetStream(handle, s);
        float* C = y + 8192 + (&s - streams) * 4096;
        for (int i = 0; i < 2; i++)
            cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, 64, 32, 16, &one, y, CUDA_R_32F, 16,
                         y + 4096, CUDA_R_32F, 16, &one, C, CUDA_R_32F, 64, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    }
    for (int i = 0; i < 2; i++)
        cublasGemmStridedBatchedEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, y, CUDA_R_32F, 8, 64,
                                   y, CUDA_R_32F, 8, 64, &zero, y + 32768, CUDA_R_32F, 8, 64, 3,
                                   CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    cudaProfilerStop();
    fill<<<n / 256, 256>>>(y, n);
    cublasDestroy(handle);
    for (cudaStream_t s : streams) cudaStreamDestroy(s);
    cudaFree(y);
}
