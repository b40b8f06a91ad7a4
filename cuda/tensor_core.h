// Tensor cores of a GPU, from sm_80 on: PTX instructions that CUDA has no function for, and those that go with them.
// cpu/tensor_core.h declares the same for the CPU. All functions are for device code. A warp's 32 lanes call mma and
// ldmatrix together. Lane 4 g + t, with g 0 to 7 and t 0 to 3, holds of each matrix:
//   A (16, 16)   rows g, g + 8; columns 2t, 2t + 1 and 8 more   a[0]: g, 2t   a[1]: g + 8, 2t   a[2]: g, 2t + 8   a[3]
//   B (16, 8)    column g; rows 2t, 2t + 1 and 8 more           b0: 2t        b1: 2t + 8
//   C (16, 8)    rows g, g + 8; columns 2t, 2t + 1              c[0], c[1]: row g   c[2], c[3]: row g + 8
// An unsigned holds two bf16, the first one in its lower half. PTX ISA 8.x, "Matrix multiply-accumulate operation using
// mma instruction" and "ldmatrix".
#pragma once

// What differs between the targets: can kernels be launched that use this header?
constexpr bool TENSOR_CORES = true;
#define UNROLL _Pragma("unroll")            // before a loop over registers: they have no index at run time

// The dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory_of_block[];
    return memory_of_block;
}

// C += A B, m16n8k16: bf16 in, fp32 sums.
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices (8, 8) of bf16 from shared memory. Lane 8 i + j gives the address of row j of matrix i: 8 bf16, aligned
// to 16 bytes. r[i] is of matrix i: row g, columns 2t and 2t + 1.
__device__ inline void ldmatrix(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
// The same, but r[i] is of matrix i: rows 2t and 2t + 1, column g.
__device__ inline void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// Begins a copy of 16 bytes from global to shared memory, both aligned to 16 bytes; where `there` is false, of zeros,
// and nothing is read. The bytes have come after a wait of the same thread that covers the copy's group; for other
// threads after a barrier that follows it.
__device__ inline void copy_async(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(__cvta_generic_to_global(global)),
                    "r"(there ? 16 : 0) : "memory");
}
// Ends a group: of all copies that this thread has begun since it last ended one. A group may be empty.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N.
template <int N> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// 2^x, relative error 2^-22. Below 2^-126 it is 0.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two bf16, rounded to nearest, ties to even.
__device__ inline unsigned pack_bf16(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
