// The fast machine: a launch is done when it returns. Threads of a block are a loop that g++ may vectorise (no thread can
// see another one: there is no shared memory and no barrier, and a warp has one lane), so that any split of the threads
// over cores is right; blocks are spread over OpenMP's threads.
#pragma once
#include <omp.h>

// static and __thread, nothing else: with inline or extern thread-local variables g++ does not vectorise.
static __thread uint3 threadIdx __attribute__((unused)), blockIdx __attribute__((unused));
static __thread dim3 blockDim __attribute__((unused)), gridDim __attribute__((unused));

// A warp of one lane: nobody to exchange with.
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int) { return value; }
template <class T> static inline T __shfl_sync(unsigned, T value, int) { return value; }
static inline void __syncwarp(unsigned = 0xffffffff) {}

namespace cuda_on_cpu {

void begin_launch();    // runs the matrix products that are still queued
void end_launch(const char* name);
void bad_launch();
inline bool valid(dim3 grid, dim3 block) {
    size_t threads = (size_t)block.x * block.y * block.z;
    return threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffff
        && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
}

// Blocks first .. last - 1. Everything comes by value: what a region of OpenMP captures by reference would be loaded again
// in each iteration of the thread loop. Threads of a launch are independent, which is what ivdep says.
template <class Kernel, class... Args>
__attribute__((noinline)) void run_blocks(Kernel kernel, dim3 grid, dim3 block, size_t first, size_t last, Args... args) {
    gridDim = grid;
    blockDim = block;
    for (size_t b = first; b < last; b++) {
        blockIdx.x = (unsigned)(b % grid.x);
        blockIdx.y = (unsigned)(b / grid.x % grid.y);
        blockIdx.z = (unsigned)(b / grid.x / grid.y);
        for (unsigned z = 0; z < block.z; z++)
            for (unsigned y = 0; y < block.y; y++) {
                threadIdx.y = y;
                threadIdx.z = z;
#pragma GCC ivdep
                for (unsigned x = 0; x < block.x; x++) {
                    threadIdx.x = x;
                    kernel(args...);
                }
            }
    }
}

template <class Kernel> struct Launch {
    const char* name;
    Kernel kernel;
    dim3 grid, block;

    template <class... Args> void operator()(Args... args) const {
        if (!valid(grid, block)) { bad_launch(); return; }
        begin_launch();
        size_t blocks = (size_t)grid.x * grid.y * grid.z;
        size_t threads = (size_t)omp_get_max_threads();
        if (blocks == 1 || threads == 1) {
            run_blocks(kernel, grid, block, 0, blocks, args...);
        } else {
            // Dealt out in turns: with one piece a thread, a triangle's rows would leave the first thread idle.
            size_t pieces = blocks < 8 * threads ? blocks : 8 * threads;
#pragma omp parallel for schedule(static, 1)
            for (size_t p = 0; p < pieces; p++)
                run_blocks(kernel, grid, block, blocks * p / pieces, blocks * (p + 1) / pieces, args...);
        }
        end_launch(name);
    }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t /* shared */ = 0, cudaStream_t = nullptr) {
    return {name, kernel, grid, block};
}

}  // namespace cuda_on_cpu
