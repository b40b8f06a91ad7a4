// Tiles of bf16 matrices in shared memory, and products of them on tensor cores, by warps. A place in shared memory is
// its offset in bytes. Sums of a warp are fragments of mma: c[m][n] has rows 16 m and columns 8 n of a matrix, of which
// lane 4 g + t has elements 2t and 2t + 1 of rows g (c[m][n][0 and 1]) and g + 8 (2 and 3).
//
// Included once, by olmoe.cu, after cuda.h.
#pragma once
#include <tensor_core.h>
#include "cuda.h"

// In shared memory a tile is rows of COLUMNS bf16, in which 16-byte chunk c of row r stands at c xor (r mod 8): the
// same chunk of 8 rows lies in 8 different groups of banks, so that all accesses below are free of conflicts.
template <int COLUMNS> __device__ inline unsigned chunk_at(int r, int c) {
    return r * COLUMNS * 2 + ((c ^ r % 8) << 4);
}

// Where in a tile this lane's row is for ldmatrix of 16 x 16 elements in the tile's corner: as A or, transposed, as B;
// and as B, whose columns are the tile's rows. xor 32 n goes 16 n columns to the right.
template <int COLUMNS> __device__ inline unsigned operand_a() {
    return chunk_at<COLUMNS>(threadIdx.x % 16, threadIdx.x % 32 / 16);
}
template <int COLUMNS> __device__ inline unsigned operand_b() {
    return chunk_at<COLUMNS>(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2);
}

// Starts copying ROWS rows of a head to a tile, from `row` of T on, zeros for those beyond T. 16 bytes a thread, a row
// by D/8 neighbours.
template <int D, int ROWS, int THREADS>
__device__ inline void load_tile(unsigned tile, const __nv_bfloat16* from, int stride, int row, int T) {
    constexpr int STEP = THREADS * 8 / D;   // a multiple of 8: a thread's chunks are all in the same place of their row
    const int r = threadIdx.x / (D / 8), c = threadIdx.x % (D / 8);
    unsigned char* to = shared_memory() + tile + chunk_at<D>(r, c);
    from += (size_t)(row + r) * stride + c * 8;
    UNROLL for (int i = 0; i < ROWS; i += STEP)
        copy_async(to + i * D * 2, from + (size_t)i * stride, row + r + i < T);
}

// c (16 M, 8 N) += A B^T for a warp, from tiles of A (16 M, D) and B (8 N, D)
template <int D, int M, int N>
__device__ inline void add_product(float (&c)[M][N][4], unsigned a_tile, unsigned b_tile) {
    UNROLL for (int k = 0; k < D / 16; k++) {
        unsigned a[M][4], b[4];
        UNROLL for (int m = 0; m < M; m++) ldmatrix(a[m], shared_memory() + (a_tile ^ 32 * k) + m * 16 * D * 2);
        UNROLL for (int n = 0; n < N / 2; n++) {
            ldmatrix(b, shared_memory() + (b_tile ^ 32 * k) + n * 16 * D * 2);
            UNROLL for (int m = 0; m < M; m++) {
                mma(c[m][2 * n], a[m], b[0], b[1]);
                mma(c[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c (16 M, 8 N) += A B for a warp, from A (16 M, 16) in registers and the tile of B (16, 8 N)
template <int M, int N>
__device__ inline void add_outer_product(float (&c)[M][N][4], const unsigned (&a)[M][4], unsigned b_tile) {
    UNROLL for (int n = 0; n < N / 2; n++) {
        unsigned b[4];
        ldmatrix_transposed(b, shared_memory() + (b_tile ^ 32 * n));
        UNROLL for (int m = 0; m < M; m++) {
            mma(c[m][2 * n], a[m], b[0], b[1]);
            mma(c[m][2 * n + 1], a[m], b[2], b[3]);
        }
    }
}

// c (16 M, D) += A B for a warp, from the tile of B (8 N, D) and sums A (16 M, 8 N), which never leave the registers:
// rounded to bf16 in pairs they are the A of mma as they are
template <int D, int M, int N>
__device__ inline void add_product_of_sums(float (&c)[M][D / 8][4], const float (&sums)[M][N][4], unsigned b_tile) {
    UNROLL for (int k = 0; k < N / 2; k++) {
        unsigned a[M][4];
        UNROLL for (int i = 0; i < 4 * M; i++) {
            const float* pair = &sums[i / 4][2 * k + i % 4 / 2][i % 2 * 2];
            a[i / 4][i % 4] = pack_bf16(pair[0], pair[1]);
        }
        add_outer_product(c, a, b_tile + k * 16 * D * 2);
    }
}

// Writes a warp's 16 M rows of sums, times `factor`, as bf16 into a tile, from its row and column on.
template <int COLUMNS, int M, int N>
__device__ inline void put_rows(unsigned tile, const float (&c)[M][N][4], float factor, int row, int column) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int e = 0; e < 4; e += 2)
            UNROLL for (int n = 0; n < N; n++) {
                const unsigned at = chunk_at<COLUMNS>(row + m * 16 + g + e * 4, column / 8 + n) + t * 4;
                *(unsigned*)(shared_memory() + tile + at) = pack_bf16(c[m][n][e] * factor, c[m][n][e + 1] * factor);
            }
}

// Writes the ROWS rows of a tile, to `row` of T on, by 16 bytes a thread; those beyond T not.
template <int D, int ROWS, int THREADS>
__device__ inline void store_tile(__nv_bfloat16* to, unsigned tile, int stride, int row, int T) {
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int r = i / (D / 8), c = i % (D / 8);
        const uint4* chunk = (const uint4*)(shared_memory() + tile + chunk_at<D>(r, c));
        if (row + r < T) *(uint4*)(to + (size_t)(row + r) * stride + c * 8) = *chunk;
    }
}
