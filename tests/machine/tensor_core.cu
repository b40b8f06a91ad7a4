// Matrix products on tensor cores, with operands stored either way, sizes that are no multiples of a tile, and tiles
// that asynchronous copies bring while earlier ones are used. They are compared with float64. A GPU may add in another
// order than a chain of fmaf, but the strict machine and ptxrun do not, so that their bits are the same.
// The fast machine runs only the tests of fast_exp2 and pack_bf16.
//   tensor_core [time]
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tensor_core.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>
typedef __nv_bfloat16 bf16;

static int failures = 0;
static void check(bool ok, const char* what) {
    if (!ok) { failures++; printf("FAILED %s\n", what); }
}
static unsigned bits_of(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float float_of(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
template <class T> static T* device(const std::vector<T>& from) {
    T* p;
    cudaMalloc(&p, from.size() * sizeof(T));
    cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}
template <class T> static std::vector<T> host(const T* from, size_t n) {
    std::vector<T> to(n);
    check(cudaMemcpy(to.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "cudaMemcpy");
    return to;
}

// ---- products

constexpr int TILE = 64, WARPS = 4, TILE_BYTES = TILE * TILE * 2;

// 16-byte chunk c of row r is at chunk c xor r, so that the 8 rows of a matrix lie in different banks.
__device__ inline unsigned char* chunk(unsigned char* tile, int r, int c) {
    return tile + r * TILE * 2 + ((c ^ (r & 7)) * 16);
}

// Begins to copy the tile at (row, column) of x (rows, stride); zeros outside of it.
__device__ inline void load(unsigned char* tile, const bf16* x, int row, int column, int rows, int stride) {
    for (int i = threadIdx.x; i < TILE * TILE / 8; i += WARPS * 32) {
        int r = row + i / 8, c = column + i % 8 * 8;
        bool there = r < rows && c < stride;
        copy_async(chunk(tile, i / 8, i % 8), there ? x + (size_t)r * stride + c : x, there);
    }
}

// C (M, N) = A B. A is stored as (M, K), or as (K, M) where A_TURNED; B as (N, K), or as (K, N) where B_TURNED. A block
// has a tile of C, a warp 16 rows of it.
template <bool A_TURNED, bool B_TURNED, int STAGES>
__global__ void product(float* C, const bf16* A, const bf16* B, int M, int N, int K, int A_stride, int B_stride) {
    int lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16, i = lane / 8, j = lane % 8;
    int row = blockIdx.x * TILE, column = blockIdx.y * TILE, tiles = (K + TILE - 1) / TILE;
    unsigned char *a_tiles = shared_memory(), *b_tiles = a_tiles + STAGES * TILE_BYTES;
    auto load_tiles = [&](int tile) {
        int stage = tile % STAGES, k = tile * TILE;
        if (tile < tiles) {
            load(a_tiles + stage * TILE_BYTES, A, A_TURNED ? k : row, A_TURNED ? row : k, A_TURNED ? K : M, A_stride);
            load(b_tiles + stage * TILE_BYTES, B, B_TURNED ? k : column, B_TURNED ? column : k, B_TURNED ? K : N,
                 B_stride);
        }
        copy_commit();
    };
    for (int tile = 0; tile < STAGES - 1; tile++) load_tiles(tile);

    float c[TILE / 8][4] = {};
    for (int tile = 0; tile < tiles; tile++) {
        copy_wait<STAGES - 2>();
        __syncthreads();                        // the tile has come, and all warps are done with the one before
        load_tiles(tile + STAGES - 1);
        unsigned char *a_tile = a_tiles + tile % STAGES * TILE_BYTES, *b_tile = b_tiles + tile % STAGES * TILE_BYTES;
        for (int k = 0; k < TILE; k += 16) {
            unsigned a[4], b[4];
            if (A_TURNED) ldmatrix_transposed(a, chunk(a_tile, k + i / 2 * 8 + j, m / 8 + i % 2));
            else ldmatrix(a, chunk(a_tile, m + i % 2 * 8 + j, k / 8 + i / 2));
            for (int n = 0; n < TILE; n += 16) {
                if (B_TURNED) ldmatrix_transposed(b, chunk(b_tile, k + i % 2 * 8 + j, n / 8 + i / 2));
                else ldmatrix(b, chunk(b_tile, n + i / 2 * 8 + j, k / 8 + i % 2));
                mma(c[n / 8], a, b[0], b[1]);
                mma(c[n / 8 + 1], a, b[2], b[3]);
            }
        }
    }
    for (int n = 0; n < TILE / 8; n++)
        for (int e = 0; e < 4; e++) {
            int r = row + m + lane / 4 + e / 2 * 8, col = column + n * 8 + lane % 4 * 2 + e % 2;
            if (r < M && col < N) C[(size_t)r * N + col] = c[n][e];
        }
}

static uint32_t random_state = 1;
static float random_number() {                  // -1 to 1
    random_state = random_state * 1664525 + 1013904223;
    return (float)(int)random_state / 2147483648.f;
}

// A matrix of random numbers (rows, columns), and the same in memory, whose rows have a multiple of 8 elements.
struct Matrix {
    int rows, columns, stride;
    std::vector<bf16> stored;
    Matrix(int r, int c) : rows(r), columns(c), stride((c + 7) / 8 * 8), stored((size_t)r * stride, (bf16)0.f) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) stored[(size_t)i * stride + j] = (bf16)random_number();
    }
    float at(int i, int j) const { return (float)stored[(size_t)i * stride + j]; }
};

template <bool A_TURNED, bool B_TURNED, int STAGES> static void test_product(int M, int N, int K) {
    Matrix A(A_TURNED ? K : M, A_TURNED ? M : K), B(B_TURNED ? K : N, B_TURNED ? N : K);
    bf16 *dA = device(A.stored), *dB = device(B.stored);
    std::vector<float> C((size_t)M * N, NAN);
    float* dC = device(C);
    auto kernel = product<A_TURNED, B_TURNED, STAGES>;
    int bytes = 2 * STAGES * TILE_BYTES;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess, "attribute");
    dim3 grid((M + TILE - 1) / TILE, (N + TILE - 1) / TILE);
    product<A_TURNED, B_TURNED, STAGES><<<grid, WARPS * 32, bytes>>>(dC, dA, dB, M, N, K, A.stride, B.stride);
    C = host(dC, C.size());

    double worst = 0;                           // share of what rounding in each of K additions may cause
    bool chain = true;
    uint32_t hash = 2166136261u;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0, sizes = 0;
            float in_order = 0, got = C[(size_t)i * N + j];
            for (int k = 0; k < K; k++) {
                float a = A_TURNED ? A.at(k, i) : A.at(i, k), b = B_TURNED ? B.at(k, j) : B.at(j, k);
                sum += (double)a * b;
                sizes += fabs((double)a * b);
                in_order = fmaf(a, b, in_order);
            }
            double share = fabs(got - sum) / (K * ldexp(sizes, -24));
            worst = share <= worst ? worst : share;             // a NaN stays
            chain = chain && bits_of(got) == bits_of(in_order);
            hash = (hash ^ bits_of(got)) * 16777619u;
        }
    check(worst <= 1, "a product is too far from float64");
    printf("%d x %d x %d, A%s B%s, %d stages: %.2g of the tolerance, %s a chain of fmaf, hash %08x\n", M, N, K,
           A_TURNED ? "^T" : "", B_TURNED ? "^T" : "", STAGES, worst, chain ? "as" : "not as", hash);
    cudaFree(dA); cudaFree(dB); cudaFree(dC);
}

static void test_products() {
    if constexpr (TENSOR_CORES) {
        test_product<false, false, 2>(16, 8, 16);
        test_product<false, false, 2>(1, 1, 1);
        test_product<false, true, 2>(67, 35, 129);
        test_product<true, false, 2>(35, 67, 200);
        test_product<true, true, 2>(70, 130, 77);
        test_product<true, true, 4>(130, 65, 333);              // 64 KB of shared memory
        test_product<false, false, 4>(63, 65, 257);
    }
}

// ---- barriers

// y[i] of a block is the sum of its x[0] .. x[i]. Warps beyond n return before the first barrier.
template <int unused> __global__ void prefix_sums(float* y, const float* x, int n) {
    int i = threadIdx.x;
    if (i / 32 * 32 >= n) return;
    x += (size_t)blockIdx.x * n;
    float *now = (float*)shared_memory(), *next = now + n;
    if (i < n) now[i] = x[i];
    for (int step = 1; step < n; step *= 2) {
        __syncthreads();
        if (i < n) next[i] = now[i] + (i >= step ? now[i - step] : 0);
        float* swap = now;
        now = next;
        next = swap;
    }
    if (i < n) y[(size_t)blockIdx.x * n + i] = now[i];
}
static void test_barriers() {
    if constexpr (TENSOR_CORES) {
        for (int n : {1, 33, 100, 1000}) {
            std::vector<float> x((size_t)3 * n), y(x.size(), NAN);
            for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i % 7);
            float *dx = device(x), *dy = device(y);
            prefix_sums<0><<<3, std::min(1024, n + 50), 2 * n * sizeof(float)>>>(dy, dx, n);
            y = host(dy, y.size());
            bool right = true;
            for (int b = 0; b < 3; b++) {
                float sum = 0;
                for (int i = 0; i < n; i++) right = right && y[(size_t)b * n + i] == (sum += x[(size_t)b * n + i]);
            }
            check(right, "sums by a block");
        }
    }
}

// ---- fast_exp2, pack_bf16

__global__ void powers(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = fast_exp2(x[i]);
}
__global__ void pack(unsigned* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = pack_bf16(x[i], x[n - 1 - i]);
}
static void test_functions() {
    std::vector<float> x = {0, -0.f, 1, -1, 127, 128, 1000, -125.5f, -126, -127, -1000, INFINITY, -INFINITY, NAN,
                            float_of(0x3f808000), float_of(0x3f818000), float_of(0x3f808001), float_of(0x7f7fffff),
                            float_of(1), float_of(0x80000001), float_of(0xffffffff), float_of(0x7f800001)};
    while (x.size() < 4001) x.push_back(random_number() * 126);
    int n = (int)x.size();
    float* dx = device(x);
    float* dy = device(x);
    unsigned* packed = device(std::vector<unsigned>(n));
    powers<<<(n + 127) / 128, 128>>>(dy, dx, n);
    pack<<<(n + 127) / 128, 128>>>(packed, dx, n);
    std::vector<float> y = host(dy, n);
    std::vector<unsigned> p = host(packed, n);
    auto rounded = [](float f) {                // to nearest, ties to even; NaN is 0x7fff
        unsigned u = bits_of(f);
        return std::isnan(f) ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    };
    bool right = true, powers_right = true;
    for (int i = 0; i < n; i++) {
        right = right && p[i] == (rounded(x[i]) | rounded(x[n - 1 - i]) << 16);
        double want = exp2((double)x[i]);
        bool ok = std::isnan(x[i]) ? std::isnan(y[i])
                : want > 3.4028235677973366e38 ? y[i] == INFINITY       // half a bit above the largest number
                : want < ldexp(1, -126) ? y[i] == 0 : fabs(y[i] - want) <= ldexp(want, -21);
        powers_right = powers_right && ok;
    }
    check(right, "pack_bf16");
    check(powers_right, "fast_exp2");
}

// ---- what a warp's mma and ldmatrix cost on the strict machine

template <int which> __global__ void repeat(float* y, int times) {
    int lane = threadIdx.x % 32;
    unsigned a[4], *words = (unsigned*)shared_memory();
    float c[4] = {};
    for (int i = threadIdx.x; i < 256; i += blockDim.x) words[i] = 0;
    __syncthreads();
    ldmatrix(a, words + lane * 4);
    for (int i = 0; i < times; i++)
        if (which == 0) mma(c, a, 0, 0);
        else if (which == 1) ldmatrix(a, words + lane * 4);
        else __syncwarp();
    y[threadIdx.x] = c[0] + (float)a[0];
}
template <int which> static void time_of(const char* name) {
    float* y = device(std::vector<float>(128));
    auto start = std::chrono::steady_clock::now();
    repeat<which><<<1, 128, 1024>>>(y, 100000);
    cudaDeviceSynchronize();
    double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    printf("%s: %.2f us a warp\n", name, us / 400000);
}

int main(int argc, char** argv) {
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        if constexpr (TENSOR_CORES) {
            time_of<0>("mma");
            time_of<1>("ldmatrix");
            time_of<2>("__syncwarp");
        }
        return 0;
    }
    test_products();
    test_barriers();
    test_functions();
    check(cudaDeviceSynchronize() == cudaSuccess && cudaGetLastError() == cudaSuccess, "no error");
    printf(failures ? "%d failed\n" : "tensor_core ok\n", failures);
    return failures > 0;
}
