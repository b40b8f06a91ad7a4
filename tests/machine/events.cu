// Times between events: of work, in the order of a stream. And what cudaEventElapsedTime returns if there is no time.
#include <cuda_runtime.h>
#include <time.h>
#include <cstdio>
#include <initializer_list>

static int failures = 0;
static void expect(bool right, const char* what) {
    if (right) return;
    printf("FAILED: %s\n", what);
    failures++;
}

__global__ void fill(float* y, size_t n, float value) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = value;
}

int main() {
    const size_t n = 1 << 18;
    float *y, ms = -1, both = -1;
    cudaStream_t stream;
    cudaEvent_t before, between, after, never, untimed;
    cudaMalloc(&y, n * sizeof(float));
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t* e : {&before, &between, &after, &never}) cudaEventCreateWithFlags(e, cudaEventDefault);
    cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming);
    timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int repeat = 0; repeat < 2; repeat++) {          // an event may be recorded again
        cudaEventRecord(before, stream);
        fill<<<n / 256, 256, 0, stream>>>(y, n, 1);
        cudaEventRecord(between, stream);
        for (int i = 0; i < 4; i++) fill<<<n / 256, 256, 0, stream>>>(y, n, 2);
        cudaEventRecord(after, stream);
        cudaEventRecord(untimed, stream);
#ifdef CUDA_STRICT
        expect(cudaEventElapsedTime(&ms, before, after) == cudaErrorNotReady, "an error while the work has not run");
#endif
    }
    cudaEventSynchronize(after);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double wall = 1e3 * (double)(end.tv_sec - start.tv_sec) + 1e-6 * (double)(end.tv_nsec - start.tv_nsec);
    expect(cudaEventElapsedTime(&ms, before, between) == cudaSuccess && ms > 0, "a positive time");
    expect(cudaEventElapsedTime(&both, before, after) == cudaSuccess && both > ms && both < wall,
           "a longer time, within that of the program");
    expect(cudaEventElapsedTime(&ms, after, before) == cudaSuccess && ms == -both, "the same backwards");
    expect(cudaEventElapsedTime(&ms, before, untimed) == cudaErrorInvalidResourceHandle,
           "an error for an event without timing");
    expect(cudaEventElapsedTime(&ms, never, after) == cudaErrorInvalidResourceHandle,
           "an error for an event that was never recorded");
    printf(failures ? "%d failed\n" : "events ok\n", failures);
    return failures > 0;
}
