// Launches in all the forms that cpu/rewrite has to read: templates, several lines, macros, dim3, any number of blocks
// and threads.
#include <cuda_runtime.h>
#include <cstdio>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

template <typename T, int N> struct Pair { T a[N]; };
template <typename T, int N> __global__ void templated(T* y, Pair<T, N> p, int n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)n) y[i] += p.a[i % N];
}
namespace inner {
__global__ void count(int* y, int n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)n) y[i]++;
}
}
__global__ void three_dimensions(int* y) {
    size_t block = blockIdx.x + gridDim.x * (blockIdx.y + (size_t)gridDim.y * blockIdx.z);
    size_t thread = threadIdx.x + blockDim.x * (threadIdx.y + (size_t)blockDim.y * threadIdx.z);
    y[block * (blockDim.x * blockDim.y * blockDim.z) + thread]++;
}
#define LAUNCH(kernel, blocks, ...) kernel<<<blocks, 128>>>(__VA_ARGS__)
static int ceil_div(int a, int b) { return (a + b - 1) / b; }
template <typename T> void add(T* y, T value, int n) {
    constexpr int two = 2;
    templated<T, two><<<ceil_div(n, 64), 64>>>(y, Pair<T, two>{{value, value}}, n);
}

static int failures = 0;
static void check(const std::vector<int>& got, int want, const char* what) {
    for (int x : got) if (x != want) { printf("FAILED %s: %d instead of %d\n", what, x, want); failures++; return; }
}

// A fill, launches and a copy, each large enough for all cores. The first launch of a kernel is measured, and so there
// are two.
static void on_all_cores(const char* what) {
    const int n = 1 << 21;
    int* y;
    cudaMalloc(&y, n * sizeof(int));
    cudaMemset(y, 0, n * sizeof(int));
    for (int repeat = 0; repeat < 2; repeat++) inner::count<<<ceil_div(n, 256), 256>>>(y, n);
    std::vector<int> got(n);
    cudaMemcpy(got.data(), y, n * sizeof(int), cudaMemcpyDeviceToHost);
    check(got, 2, what);
    cudaFree(y);
}

// The threads that shared the parent's work are not in a child: it works alone, and the parent on all cores again.
static void fork_between_launches() {
    on_all_cores("before a fork");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);                          // ends it where it waits for threads that are not there
        on_all_cores("in a child");
        fflush(stdout);
        _exit(failures > 0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check({status}, 0, "how a child ended");
    on_all_cores("after a fork");
}

int main() {
    const int n = 1000;
    int* y;
    cudaMalloc(&y, n * sizeof(int));
    cudaMemset(y, 0, n * sizeof(int));
    add(y, 1, n);
    inner::count<<<ceil_div(n, 256), 256>>>(y, n);
    LAUNCH(inner::count, (n + 127) / 128, y, n);
    templated<int, 3> <<<
        dim3(ceil_div(n, 32)),      // a comment
        dim3(32), 0, nullptr
    >>> (y,
         Pair<int, 3>{{1, 1, 1}}, n);
    int shift = 1 << 2, less = shift << 1;
    std::vector<int> got(n);
    cudaMemcpy(got.data(), y, n * sizeof(int), cudaMemcpyDeviceToHost);
    check(got, 4, "sum of four launches");
    if (less != 8) failures++;
    // Every thread of a launch runs once, whatever its shape
    for (dim3 grid : {dim3(1), dim3(3), dim3(129), dim3(2, 3, 4), dim3(1, 7)})
        for (dim3 block : {dim3(1), dim3(7), dim3(256), dim3(1024), dim3(33, 3), dim3(5, 2, 3)}) {
            size_t count = (size_t)grid.x * grid.y * grid.z * block.x * block.y * block.z;
            int* z;
            cudaMalloc(&z, count * sizeof(int));
            cudaMemset(z, 0, count * sizeof(int));
            for (int repeat = 0; repeat < 3; repeat++) three_dimensions<<<grid, block>>>(z);
            std::vector<int> each(count);
            cudaMemcpy(each.data(), z, count * sizeof(int), cudaMemcpyDeviceToHost);
            check(each, 3, "each thread ran in each of three launches");
            cudaFree(z);
        }
    fork_between_launches();
    printf(failures ? "%d failed\n" : "launches ok\n", failures);
    return failures > 0;
}
