// The fast machine: a launch is done when it returns. The threads of a block are a loop that g++ may vectorise, and
// blocks are spread over OpenMP's threads. No thread can see another one: there is no shared memory and no barrier, and
// a warp has one lane. So any split of the threads over cores is right.
#pragma once
#include <omp.h>

// static and __thread, nothing else: with inline or extern thread-local variables g++ does not vectorise.
static __thread uint3 threadIdx __attribute__((unused)), blockIdx __attribute__((unused));
static __thread dim3 blockDim __attribute__((unused)), gridDim __attribute__((unused));

// A warp has one lane, which has no other one to exchange with.
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int) { return value; }
template <class T> static inline T __shfl_sync(unsigned, T value, int) { return value; }
static inline void __syncwarp(unsigned = 0xffffffff) {}

// What the fast machine has not. A call is an error where it is compiled, not where a template only mentions it.
#define OUTSIDE_STRICT __attribute__((error("this is outside the strict build")))
void __syncthreads() OUTSIDE_STRICT;
template <class T> OUTSIDE_STRICT cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value);

namespace cuda_on_cpu {

double begin_launch();                              // runs the matrix products that are still queued; the time in ns
double end_launch(const char* name, double start);  // ns since then
void bad_launch();
inline bool valid(dim3 grid, dim3 block) {
    size_t threads = (size_t)block.x * block.y * block.z;
    return threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffff
        && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
}

// Cores get a launch's threads in units of this many, which are whole vectors.
constexpr unsigned UNIT = 16;

// Units first .. last - 1 of a launch. Everything is passed by value: what a region of OpenMP captures by reference
// would be loaded again in each iteration of the thread loop. ivdep: the threads of a launch are independent. flatten:
// lambdas in a kernel become part of it, so that the sums that they add to are in registers.
template <class Kernel, class... Args>
__attribute__((noinline, flatten))
void run_units(Kernel kernel, dim3 grid, dim3 block, size_t first, size_t last, Args... args) {
    size_t units = (block.x + UNIT - 1) / UNIT, rows = (size_t)block.y * block.z;
    gridDim = grid;
    blockDim = block;
    while (first < last) {
        size_t b = first / units / rows, row = first / units % rows, unit = first % units;
        size_t end = unit + (last - first) < units ? unit + (last - first) : units;
        unsigned x0 = (unsigned)unit * UNIT, x1 = end == units ? block.x : (unsigned)end * UNIT;
        first += end - unit;
        blockIdx.x = (unsigned)(b % grid.x);
        blockIdx.y = (unsigned)(b / grid.x % grid.y);
        blockIdx.z = (unsigned)(b / grid.x / grid.y);
        threadIdx.y = (unsigned)(row % block.y);
        threadIdx.z = (unsigned)(row / block.y);
#pragma GCC ivdep
        for (unsigned x = x0; x < x1; x++) {
            threadIdx.x = x;
            kernel(args...);
        }
    }
}

template <class Kernel> struct Launch {
    const char* name;
    Kernel kernel;
    dim3 grid, block;

    template <class... Args> void operator()(Args... args) const {
        if (!valid(grid, block)) { bad_launch(); return; }
        size_t units = (size_t)grid.x * grid.y * grid.z * ((block.x + UNIT - 1) / UNIT) * block.y * block.z;
        int threads = omp_get_max_threads();
        // A parallel region costs microseconds. The time of this kernel's last launch decides whether it is worth one.
        static double ns_per_unit = 100;
        double start = begin_launch();
        bool parallel = threads > 1 && units > 1 && ns_per_unit * (double)units > 10000;
        // Each core gets several pieces, in turns: with one piece a core, the rows of a triangle would leave the first
        // core idle. One core alone takes the same pieces: g++'s loop may compute few threads in another way than many,
        // and the time that a launch took must not change a bit of a result.
        size_t pieces = units < 8 * (size_t)threads ? units : 8 * (size_t)threads;
#pragma omp parallel for schedule(static, 1) if(parallel)
        for (size_t p = 0; p < pieces; p++)
            run_units(kernel, grid, block, units * p / pieces, units * (p + 1) / pieces, args...);
        ns_per_unit = end_launch(name, start) / (double)units * (parallel ? threads : 1);
    }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, const void* /* address */, dim3 grid, dim3 block,
                      size_t /* shared */ = 0, cudaStream_t = nullptr) {
    return {name, kernel, grid, block};
}

}  // namespace cuda_on_cpu
