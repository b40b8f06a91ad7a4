// Tensor cores on the CPU: what cuda/tensor_core.h declares, with the same meaning. The strict machine has all of it,
// and checks its use (strict.cpp). The fast one has one lane in a warp, so that only the last two functions make sense
// there: TENSOR_CORES is false, and a call of the others is an error, unless it is in a part that is never compiled:
// behind `if constexpr (TENSOR_CORES)`.
#pragma once
#include "cuda_bf16.h"
#include "cuda_runtime.h"

#define UNROLL                              // see cuda/tensor_core.h

#ifdef CUDA_STRICT
constexpr bool TENSOR_CORES = true;
namespace cuda_on_cpu {
// Registers go by value: TSan would take an array whose address is passed on for memory that threads share, because the
// blocks use the same stacks.
struct Accumulators { float c[4]; };
struct Words { unsigned r[4]; };
unsigned char* shared_memory();
Accumulators mma(Accumulators c, Words a, unsigned b0, unsigned b1);
Words ldmatrix(const void* row, bool transposed);
void copy_async(void* shared, const void* global, bool there);
void copy_commit();
void copy_wait(int n);
}
inline unsigned char* shared_memory() { return cuda_on_cpu::shared_memory(); }
__forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto sums = cuda_on_cpu::mma({{c[0], c[1], c[2], c[3]}}, {{a[0], a[1], a[2], a[3]}}, b0, b1);
    for (int i = 0; i < 4; i++) c[i] = sums.c[i];
}
__forceinline__ void ldmatrix(unsigned (&r)[4], const void* row) {
    auto words = cuda_on_cpu::ldmatrix(row, false);
    for (int i = 0; i < 4; i++) r[i] = words.r[i];
}
__forceinline__ void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
    auto words = cuda_on_cpu::ldmatrix(row, true);
    for (int i = 0; i < 4; i++) r[i] = words.r[i];
}
inline void copy_async(void* shared, const void* global, bool there) {
    cuda_on_cpu::copy_async(shared, global, there);
}
inline void copy_commit() { cuda_on_cpu::copy_commit(); }
template <int N> void copy_wait() { cuda_on_cpu::copy_wait(N); }
#else
constexpr bool TENSOR_CORES = false;
OUTSIDE_STRICT unsigned char* shared_memory();
OUTSIDE_STRICT void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
OUTSIDE_STRICT void ldmatrix(unsigned (&r)[4], const void* row);
OUTSIDE_STRICT void ldmatrix_transposed(unsigned (&r)[4], const void* row);
OUTSIDE_STRICT void copy_async(void* shared, const void* global, bool there);
OUTSIDE_STRICT void copy_commit();
template <int N> OUTSIDE_STRICT void copy_wait();
#endif

// As ex2.approx.ftz: subnormal numbers are 0. (One that is given has a power of 1 anyway.)
inline float fast_exp2(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}

inline unsigned pack_bf16(float low, float high) {
    return __float2bfloat16(low).bits | (unsigned)__float2bfloat16(high).bits << 16;
}
