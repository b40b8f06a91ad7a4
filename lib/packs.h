// Rows in kernels. A row belongs to a warp, and a lane takes P neighbouring columns of it at a time, a pack. P is PACK,
// 16 bytes of floatX, or 1 where rows are no multiples of it (LAUNCH_PACKS). A GPU's memory is busy only while enough
// bytes are on their way, and a thread waits for them at its first use of one, or at a store before the next load. So a
// lane loads all its packs of a row, up to K, before it computes. They stay in registers, for a second pass, too; what
// is beyond them is read where it is used. On a CPU with one lane a pack has one column and none are kept: the loops
// are plain loops over columns, which vectorise.
//
// Included once, by olmoe.cu, after cuda.h.
#pragma once
#include <tensor_core.h>
#include "cuda.h"
#include "trace.h"

constexpr int PACK = WARP == 1 ? 1 : 16 / (int)sizeof(floatX);
constexpr int KEPT_PACKS = 8;               // packs of a row: with 32 lanes 2,048 columns of bf16, 1,024 of fp32

// Arguments of kernels that overlap no other one. Only then may nvcc let loads of one pass stores of another.
template <typename T> using In = const T* __restrict__;
template <typename T> using Out = T* __restrict__;

// P numbers in fp32
template <int P> struct Floats {
    float v[P];
    __device__ __forceinline__ float& operator[](int e) { return v[e]; }
    __device__ __forceinline__ float operator[](int e) const { return v[e]; }
    __device__ __forceinline__ float sum() const {
        float all = v[0];
        UNROLL for (int e = 1; e < P; e++) all += v[e];
        return all;
    }
};
template <int P> __device__ __forceinline__ Floats<P> operator+(Floats<P> a, const Floats<P>& b) {
    UNROLL for (int e = 0; e < P; e++) a[e] += b[e];
    return a;
}
template <int P> __device__ __forceinline__ Floats<P> operator-(Floats<P> a, const Floats<P>& b) {
    UNROLL for (int e = 0; e < P; e++) a[e] -= b[e];
    return a;
}
template <int P> __device__ __forceinline__ Floats<P> operator*(Floats<P> a, const Floats<P>& b) {
    UNROLL for (int e = 0; e < P; e++) a[e] *= b[e];
    return a;
}
template <int P> __device__ __forceinline__ Floats<P> operator*(Floats<P> a, float b) {
    UNROLL for (int e = 0; e < P; e++) a[e] *= b;
    return a;
}

// P neighbours in memory, moved by 16 bytes or, where they are fewer, at once
template <typename T, int P> struct alignas(sizeof(T) * P < 16 ? sizeof(T) * P : 16) Pack {
    T v[P];
    __device__ __forceinline__ Floats<P> floats() const {
        Floats<P> all;
        UNROLL for (int e = 0; e < P; e++) all[e] = (float)v[e];
        return all;
    }
};
template <int P, typename T> __device__ __forceinline__ Pack<T, P> load_pack(const T* from) {
    if constexpr (P == 1) return {{*from}};                     // g++ vectorises copies of numbers, not of structs
    else return *(const Pack<T, P>*)from;
}
template <typename T, int P> __device__ __forceinline__ Pack<T, P> to_pack(const Floats<P>& values) {
    Pack<T, P> pack;
    UNROLL for (int e = 0; e < P; e++) pack.v[e] = (T)values[e];
    return pack;
}
template <typename T, int P> __device__ __forceinline__ void store_pack(T* to, const Pack<T, P>& pack) {
    if constexpr (P == 1) *to = pack.v[0];
    else *(Pack<T, P>*)to = pack;
}
template <typename T, int P> __device__ __forceinline__ void store_pack(T* to, const Floats<P>& values) {
    if constexpr (P == 1) *to = (T)values[0];
    else store_pack(to, to_pack<T>(values));
}
// Rounded to floatX and back
template <int P> __device__ __forceinline__ Floats<P> in_floatX(const Floats<P>& values) {
    return to_pack<floatX>(values).floats();
}
template <int P, typename T> __device__ __forceinline__ Floats<P> load_floats(const T* from) {
    return load_pack<P>(from).floats();
}

// A pack's place: the first of its columns, its number among those that are kept, and of pairs see below
template <bool KEPT> struct At {
    static constexpr bool kept = KEPT;
    int column, k, j;
};

// The packs of a lane: of n columns from `first` on, or with PAIRS of the n columns of a row that are in the first half
// of their head: column h D + j, j < half, whose partner is `half` to the right.
template <int P_, int K_ = KEPT_PACKS, bool PAIRS = false> struct Columns {
    static constexpr int P = P_, K = WARP == 1 ? 2048 : K_, CHUNK = K * WARP * P;
    int n, first = 0, half = 1;

    template <bool KEPT> __device__ __forceinline__ At<KEPT> at(int i, int k) const {
        return PAIRS ? At<KEPT>{i + i / half * half, k, i % half} : At<KEPT>{i, k, 0};
    }
    // body(At) of the CHUNK from `first` on, unrolled: At::k is the index of an array that stays in registers
    template <typename Body> __device__ __forceinline__ void kept(Body body) const {
        const int lane = threadIdx.x % WARP;
        if constexpr (WARP == 1) {
            const int end = min(n, first + K);
            for (int i = first + lane; i < end; i += WARP) body(at<true>(i, i - first));
        } else {
            UNROLL for (int k = 0; k < K; k++) {
                const int i = first + (k * WARP + lane) * P;
                if (i < n) body(at<true>(i, k));
            }
        }
    }
    // body(At) of all columns: those kept, and then the others
    template <typename Body> __device__ __forceinline__ void all(Body body) const {
        const int lane = threadIdx.x % WARP;
        if constexpr (WARP > 1) {
            kept(body);
            for (int i = CHUNK + lane * P; i < n; i += WARP * P) body(at<false>(i, 0));
        } else if constexpr (PAIRS) {
            for (int h = 0; h < n; h += half)
                for (int j = lane; j < half; j += WARP) body(At<false>{2 * h + j, 0, j});
        } else {
            for (int i = lane; i < n; i += WARP) body(at<false>(i, 0));
        }
    }
};

template <int P> using Pairs = Columns<P, KEPT_PACKS / 2, true>;

// body(columns) of each chunk of a row, for kernels that need each number once
template <int P, int K = KEPT_PACKS, typename Body> __device__ __forceinline__ void for_chunks(int n, Body body) {
    for (int first = 0; first < n; first += Columns<P, K>::CHUNK) body(Columns<P, K>{n, first});
}

// A row in memory. What the lane has loaded of it, or set, is kept, as far as there is room.
template <typename T, typename Columns> struct Row {
    static constexpr int P = Columns::P;
    T* memory;
    using P_ = Pack<std::remove_const_t<T>, P>;
    // As words: of two bf16 in registers of their own each would take 32 bits
    using Kept = std::conditional_t<sizeof(P_) % 4 == 0, Pack<unsigned, (sizeof(P_) + 3) / 4>, P_>;
    Kept packs[WARP == 1 ? 1 : Columns::K];

    __device__ __forceinline__ explicit Row(T* to) : memory(to) {}
    __device__ __forceinline__ Row(T* from, const Columns& columns) : memory(from) {
        if constexpr (WARP > 1) {
            if (columns.n - columns.first >= Columns::CHUNK) {      // without a branch at each
                UNROLL for (int k = 0; k < Columns::K; k++) {
                    const int i = columns.first + (k * WARP + (int)threadIdx.x % WARP) * P;
                    packs[k] = *(const Kept*)(from + columns.template at<true>(i, k).column);
                }
            } else columns.kept([&](auto at) { packs[at.k] = *(const Kept*)(from + at.column); });
        }
    }
    template <bool KEPT> __device__ __forceinline__ auto pack(At<KEPT> at) const {
        if constexpr (KEPT && WARP > 1) {
            P_ pack;
            memcpy(&pack, &packs[at.k], sizeof pack);
            return pack;
        }
        else return load_pack<P>(memory + at.column);
    }
    template <bool KEPT> __device__ __forceinline__ Floats<P> operator[](At<KEPT> at) const {
        return pack(at).floats();
    }
    // The largest of the kept columns and `best`
    __device__ __forceinline__ float largest(const Columns& columns, float best) const {
        if constexpr (WARP == 1) {
            const int first = columns.first, end = min(columns.n, first + Columns::K);
            for (int i = first; i < end; i += WARP) best = fmaxf(best, (float)memory[i]);
        } else {
            columns.kept([&](auto at) { UNROLL for (int e = 0; e < P; e++) best = fmaxf(best, (*this)[at][e]); });
        }
        return best;
    }
    // Both return the values rounded to T. keep: memory gets only what there is no room for.
    template <bool KEPT>
    __device__ __forceinline__ Floats<P> set(At<KEPT> at, const Floats<P>& values, bool kept = true) {
        const auto pack = to_pack<T>(values);
        store_pack(memory + at.column, values);
        if constexpr (KEPT && WARP > 1) if (kept) memcpy(&packs[at.k], &pack, sizeof pack);
        return pack.floats();
    }
    template <bool KEPT> __device__ __forceinline__ Floats<P> keep(At<KEPT> at, const Floats<P>& values) {
        const auto pack = to_pack<T>(values);
        if constexpr (KEPT && WARP > 1) memcpy(&packs[at.k], &pack, sizeof pack);
        else store_pack(memory + at.column, values);
        return pack.floats();
    }
};

// A line of sums in memory, which a warp sets. Those that are kept get there at the end.
template <typename Columns> struct LineOfSums {
    static constexpr int P = Columns::P;
    float* line;
    Floats<P> sums[WARP == 1 ? 1 : Columns::K];

    __device__ __forceinline__ LineOfSums(float* to, const Columns& columns) : line(to) {
        columns.all([&](auto at) {
            if constexpr (at.kept) sums[at.k] = {};
            else store_pack(line + at.column, Floats<P>{});
        });
    }
    template <bool KEPT> __device__ __forceinline__ void add(At<KEPT> at, const Floats<P>& values) {
        if constexpr (KEPT) sums[at.k] = sums[at.k] + values;
        else store_pack(line + at.column, load_floats<P>(line + at.column) + values);
    }
    __device__ __forceinline__ void store(const Columns& columns) const {
        if constexpr (WARP > 1) columns.kept([&](auto at) { store_pack(line + at.column, sums[at.k]); });
    }
};

// A row of n columns to another
template <int P, typename To, typename From>
__device__ __forceinline__ void copy_row(To* to, const From* from, int n) {
    for_chunks<P>(n, [&](auto columns) {
        const Row row(from, columns);
        columns.kept([&](auto at) {
            if constexpr (std::is_same<To, From>::value) store_pack(to + at.column, row.pack(at));
            else store_pack(to + at.column, row[at]);
        });
    });
}

// Are all rows of n elements from these pointers on made of packs?
template <typename... T> bool packs_fit(size_t n, const T*... p) {
    return n % PACK == 0 && ((uintptr_t(p) % 16 == 0) && ...);
}

// A kernel whose first template argument is P, of which `blocks` may also make use: PACK where `fit`, or else 1
#define LAUNCH_PACKS(kernel, fit, blocks, ...) do { \
    if (PACK > 1 && (fit)) { \
        [[maybe_unused]] constexpr int P = PACK; \
        LAUNCH_NAMED(#kernel, kernel<PACK>, blocks, __VA_ARGS__); \
    } else { \
        [[maybe_unused]] constexpr int P = 1; \
        LAUNCH_NAMED(#kernel, kernel<1>, blocks, __VA_ARGS__); \
    } } while (0)

// ------------------------------------------------------------------------------------------------
// Sums over rows without atomics: a warp adds a slab of consecutive rows into a line of its own. Then the lines are
// added here, in an order that depends on nothing but their number.

constexpr int SLABS = 1024;                 // at most so many lines, ...
constexpr int SLAB_ROWS = WARP == 1 ? 16 : 8; // ... each of so many rows, or of more where there are many
inline int slabs_for(int rows) { return std::min(SLABS, ceil_div(rows, SLAB_ROWS)); }

// One warp per 8 columns, whose lanes go over the lines: out_i = (add) out_i + sum of the lines' i
template <int P, typename T>
__global__ void sum_slabs_kernel(Out<T> out, In<float> lines, int C, int slabs, bool add) {
    constexpr int Q = P < 4 ? P : 4, SIDE = WARP == 1 ? 1 : 8 / Q;      // 32 bytes, the least that memory gives
    const int lane = threadIdx.x % WARP;
    const size_t first = thread_index() / WARP * SIDE * Q, column = first + lane % SIDE * Q;
    if (first >= (size_t)C) return;
    const size_t from = WARP == 1 || column < (size_t)C ? column : 0;   // lanes beyond C add, but do not store
    Floats<Q> sum = {};
    for (int slab = lane / SIDE; slab < slabs; slab += WARP / SIDE)
        sum = sum + load_floats<Q>(lines + (size_t)slab * C + from);
    for (int o = WARP / 2; o >= SIDE; o /= 2)
        UNROLL for (int e = 0; e < Q; e++) sum[e] += __shfl_xor_sync(0xffffffff, sum[e], o);
    if (WARP > 1 && (lane >= SIDE || column >= (size_t)C)) return;
    if (add) sum = sum + load_floats<Q>(out + column);
    store_pack(out + column, sum);
}

template <typename T>
void sum_slabs(T* out /* (C) */, const float* lines /* (slabs, C) */, int C, int slabs, bool add) {
    const int warps = ceil_div(C, WARP == 1 ? 1 : 8);
    if (out) LAUNCH_PACKS(sum_slabs_kernel, C % PACK == 0, blocks_for_rows(warps), out, lines, C, slabs, add);
}

constexpr int SQUARE_SUM_RUN = 4096;
// Sum of squares of each run of SQUARE_SUM_RUN elements, for the global norm; the host adds them up. One warp per run.
template <int P> __global__ void square_sum_kernel(Out<float> sums, In<floatX> x, size_t n) {
    size_t run = thread_index() / WARP;
    if (run * SQUARE_SUM_RUN >= n) return;
    x += run * SQUARE_SUM_RUN;
    int length = n - run * SQUARE_SUM_RUN < SQUARE_SUM_RUN ? (int)(n - run * SQUARE_SUM_RUN) : SQUARE_SUM_RUN;
    float sum = 0;
    for_chunks<P>(length, [&](auto columns) {
        const Row row(x, columns);
        columns.kept([&](auto at) { sum += (row[at] * row[at]).sum(); });
    });
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sums[run] = sum;
}

void square_sum(float* sums /* one a run */, const floatX* x /* (n) */, size_t n) {
    LAUNCH_PACKS(square_sum_kernel, packs_fit(n, x), blocks_for_rows(ceil_div(n, SQUARE_SUM_RUN)), sums, x, n);
}
