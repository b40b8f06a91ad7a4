// The strict machine: finds mistakes that a GPU forgives most of the time. See strict.cpp for what it checks.
#pragma once
#include <functional>
#include <type_traits>

// One fiber runs at a time, so these are plain variables. They are set whenever another fiber continues.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// A pointer among the arguments of a kernel must not point to ordinary host memory.
void check_kernel_pointer(const char* kernel, int argument, const void* pointer);
// `address` is the kernel's; null where the launch asks for no shared memory.
void enqueue_launch(const char* name, const void* address, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                    std::function<void()> thread);
cudaError_t allow_shared_memory(const void* kernel, cudaFuncAttribute attribute, int bytes);

// Waits until all threads of the block that have not returned have called it, all from the same line.
void barrier(const char* file, int line);
// Waits until all lanes of mask have called it, then returns the value that lane `source` gave.
enum Collective { SHFL_XOR, SHFL, SYNCWARP, MMA, LDMATRIX, LDMATRIX_TRANSPOSED, BARRIER };
uint64_t exchange(Collective kind, unsigned mask, uint64_t value, int source_or_xor);

template <class T> T exchange_as(Collective kind, unsigned mask, T value, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA exchanges 32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(kind, mask, bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class Kernel> struct Launch {
    const char* name;
    Kernel kernel;
    const void* address;
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;

    // Arguments are copied now and read later, as on the GPU.
    template <class... Args> void operator()(Args... args) const {
        int position = 0;
        auto check = [&](auto argument) {
            position++;
            if constexpr (std::is_pointer<decltype(argument)>::value)
                check_kernel_pointer(name, position, (const void*)argument);
        };
        (check(args), ...);
        Kernel body = kernel;
        enqueue_launch(name, address, grid, block, shared, stream, [body, args...] { body(args...); });
    }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, const void* address, dim3 grid, dim3 block, size_t shared = 0,
                      cudaStream_t stream = nullptr) {
    return {name, kernel, address, grid, block, shared, stream};
}

}  // namespace cuda_on_cpu

template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return cuda_on_cpu::exchange_as(cuda_on_cpu::SHFL_XOR, mask, value, lanes);
}
template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_on_cpu::exchange_as(cuda_on_cpu::SHFL, mask, value, lane);
}
static inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_cpu::exchange(cuda_on_cpu::SYNCWARP, mask, 0, 0); }
// The line is the caller's.
static inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_on_cpu::barrier(file, line);
}
template <class T> cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
    return cuda_on_cpu::allow_shared_memory((const void*)kernel, attribute, value);
}
