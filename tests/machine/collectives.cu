// Every collective with every type, on as many ranks as mpirun starts, compared bit for bit with sums that this program
// makes in the order of the ranks. Prints a hash of all results, which has to be the same in every run.
//   mpirun -np N collectives [CASE]     CASE: huge, or one of those in differ(), in which the ranks do different things
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mpi.h>
#include <nccl.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#define CHECK(call) do { \
        int r_ = (int)(call); \
        if (r_ != 0) { printf("rank %d, line %d: %s gave %d\n", rank, __LINE__, #call, r_); exit(1); } \
    } while (0)

static int rank = 0, ranks = 1, failures = 0;
static ncclComm_t world;
static cudaStream_t stream;
static uint64_t hash = 1469598103934665603u;

static void expect(bool right, const char* what, const char* type, size_t n) {
    if (right) return;
    printf("FAILED on rank %d: %s of %zu %s\n", rank, what, n, type);
    failures++;
}

// Element i of rank r. Floats of several magnitudes, so that another order of adding would give other bits.
template <class T> static T value(int r, size_t i) {
    uint64_t x = (i * 37 + (uint64_t)r + 1) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 32;
    if (std::is_integral<T>::value) return (T)x;
    static const double magnitudes[] = {1e-3, 1e-2, 0.1, 1, 10, 100, 1000, 1e4};
    return (T)(float)(((double)(x >> 12) / (double)(1ull << 52) - 0.5) * magnitudes[x % 8]);
}
template <class T> static T combined(ncclRedOp_t op, int n, size_t i) {
    typedef std::conditional_t<std::is_same<T, __nv_bfloat16>::value, float, T> Sum;
    volatile Sum sum = (Sum)value<T>(0, i);
    for (int r = 1; r < n; r++) {
        Sum x = (Sum)value<T>(r, i);
        if (op == ncclSum) {
            if constexpr (std::is_integral<T>::value) sum = (T)((uint64_t)sum + (uint64_t)x);
            else sum = sum + x;
        } else if (op == ncclMax ? x > sum : x < sum) {
            sum = x;
        }
    }
    return (T)sum;
}

// Buffers on the device and what came back
template <class T> struct Buffer {
    T* data = nullptr;
    size_t count;
    Buffer(size_t n) : count(n) {
        CHECK(cudaMalloc(&data, (n + 1) * sizeof(T)));
        CHECK(cudaMemset(data, 0x55, (n + 1) * sizeof(T)));
        CHECK(cudaDeviceSynchronize());
    }
    ~Buffer() { cudaFree(data); }
    void put(size_t at, const std::vector<T>& x) {
        CHECK(cudaMemcpy(data + at, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
        CHECK(cudaDeviceSynchronize());
    }
    std::vector<T> get() {
        std::vector<T> x(count);
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(x.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};
template <class T> static bool same(const std::vector<T>& got, const std::vector<T>& want) {
    const unsigned char* bytes = (const unsigned char*)want.data();
    for (size_t i = 0; i < want.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    return got.size() == want.size() && (want.empty() || memcmp(got.data(), want.data(), want.size() * sizeof(T)) == 0);
}

template <class T> static void test(ncclDataType_t type, const char* name, size_t n, ncclComm_t comm) {
    int me, size;
    CHECK(ncclCommUserRank(comm, &me));
    CHECK(ncclCommCount(comm, &size));
    std::vector<T> mine(n), all(n * size), want(n);
    for (size_t i = 0; i < n; i++) mine[i] = value<T>(me, i);
    for (bool in_place : {false, true}) {
        for (ncclRedOp_t op : {ncclSum, ncclMax, ncclMin}) {
            Buffer<T> send(n), receive(n);
            for (size_t i = 0; i < n; i++) want[i] = combined<T>(op, size, i);
            send.put(0, mine);
            CHECK(ncclAllReduce(send.data, in_place ? send.data : receive.data, n, type, op, comm, stream));
            expect(same(in_place ? send.get() : receive.get(), want),
                   in_place ? "all-reduce in place" : "all-reduce", name, n);

            Buffer<T> long_send(n * size);
            for (size_t i = 0; i < n * size; i++) all[i] = value<T>(me, i);
            for (size_t i = 0; i < n; i++) want[i] = combined<T>(op, size, me * n + i);
            long_send.put(0, all);
            CHECK(ncclReduceScatter(long_send.data, in_place ? long_send.data + me * n : receive.data, n,
                                    type, op, comm, stream));
            std::vector<T> got = in_place ? long_send.get() : receive.get();
            if (in_place) got = std::vector<T>(got.begin() + me * n, got.begin() + (me + 1) * n);
            expect(same(got, want), in_place ? "reduce-scatter in place" : "reduce-scatter", name, n);
        }
        Buffer<T> send(n), gathered(n * size);
        send.put(0, mine);
        gathered.put(me * n, mine);
        CHECK(ncclAllGather(in_place ? gathered.data + me * n : send.data, gathered.data, n, type, comm, stream));
        for (int r = 0; r < size; r++) for (size_t i = 0; i < n; i++) all[r * n + i] = value<T>(r, i);
        expect(same(gathered.get(), all), in_place ? "all-gather in place" : "all-gather", name, n);
        for (int root = 0; root < size; root++) {
            Buffer<T> receive(n);
            send.put(0, mine);
            CHECK(ncclBroadcast(send.data, in_place ? send.data : receive.data, n, type, root, comm, stream));
            for (size_t i = 0; i < n; i++) want[i] = value<T>(root, i);
            expect(same(in_place ? send.get() : receive.get(), want),
                   in_place ? "broadcast in place" : "broadcast", name, n);
        }
    }
    // From every rank a to every rank b, itself included: (a + 2 b) % 5 % 3 times n elements, sent in two parts
    auto count = [&](int from, int to) { return (size_t)((from + 2 * to) % 5 % 3) * n; };
    size_t sent = 0, received = 0;
    for (int r = 0; r < size; r++) { sent += count(me, r); received += count(r, me); }
    std::vector<T> out(sent), in(received);
    for (size_t i = 0; i < sent; i++) out[i] = value<T>(me, i);
    size_t to = 0;
    for (int r = 0; r < size; r++) {
        size_t from = 0;
        for (int before = 0; before < me; before++) from += count(r, before);
        for (size_t i = 0; i < count(r, me); i++) in[to++] = value<T>(r, from + i);
    }
    Buffer<T> send(sent), receive(received);
    send.put(0, out);
    CHECK(ncclGroupStart());
    size_t s = 0, d = 0;
    for (int r = 0; r < size; r++) {
        size_t outgoing = count(me, r), incoming = count(r, me);
        for (size_t part : {outgoing / 3, outgoing - outgoing / 3}) {
            CHECK(ncclSend(send.data + s, part, type, r, comm, stream));
            s += part;
        }
        for (size_t part : {incoming / 3, incoming - incoming / 3}) {
            CHECK(ncclRecv(receive.data + d, part, type, r, comm, stream));
            d += part;
        }
    }
    CHECK(ncclGroupEnd());
    expect(same(receive.get(), in), "sends and receives", name, n);
}

static void test_types(size_t n, ncclComm_t comm) {
    test<int8_t>(ncclChar, "int8", n, comm);
    test<uint8_t>(ncclUint8, "uint8", n, comm);
    test<int32_t>(ncclInt, "int32", n, comm);
    test<int64_t>(ncclInt64, "int64", n, comm);
    test<float>(ncclFloat, "float", n, comm);
    test<double>(ncclDouble, "double", n, comm);
    test<__nv_bfloat16>(ncclBfloat16, "bfloat16", n, comm);
}

// Sums that are longer than the pieces in which nccl.cpp makes them
static void test_pieces() {
    const size_t n = ((size_t)1 << 22) + 4099;
    std::vector<float> mine(n * ranks), want(n * ranks);
    for (size_t i = 0; i < n * ranks; i++) {
        mine[i] = value<float>(rank, i);
        want[i] = combined<float>(ncclSum, ranks, i);
    }
    Buffer<float> x(n * ranks), y(n);
    x.put(0, mine);
    CHECK(ncclReduceScatter(x.data, y.data, n, ncclFloat, ncclSum, world, stream));
    std::vector<float> own(want.begin() + n * rank, want.begin() + n * (rank + 1));
    expect(same(y.get(), own), "reduce-scatter", "float", n);
    CHECK(ncclAllReduce(x.data, x.data, n * ranks, ncclFloat, ncclSum, world, stream));
    expect(same(x.get(), want), "all-reduce", "float", n * ranks);
}

// Groups of several collectives, in two communicators and on two streams, and work on both streams around them
static void test_group(ncclComm_t other_comm) {
    const size_t n = 1001;
    cudaStream_t second;
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    int other_size, other_rank;
    CHECK(ncclCommCount(other_comm, &other_size));
    CHECK(ncclCommUserRank(other_comm, &other_rank));
    std::vector<float> mine(n), want(n);
    for (size_t i = 0; i < n; i++) mine[i] = value<float>(rank, i);
    Buffer<float> x(n), y(n), z(n);
    for (Buffer<float>* b : {&x, &y}) b->put(0, mine);
    CHECK(ncclGroupStart());
    CHECK(ncclAllReduce(x.data, x.data, n, ncclFloat, ncclSum, world, stream));
    CHECK(ncclGroupStart());
    CHECK(ncclAllReduce(y.data, y.data, n, ncclFloat, ncclMax, other_comm, second));
    CHECK(ncclSend(x.data + n, 0, ncclFloat, (rank + 1) % ranks, world, second));
    CHECK(ncclRecv(y.data + n, 0, ncclFloat, (rank + ranks - 1) % ranks, world, second));
    CHECK(ncclGroupEnd());
    CHECK(ncclGroupEnd());
    // All streams of a group wait for all of it
    CHECK(cudaMemcpyAsync(z.data, x.data, n * sizeof(float), cudaMemcpyDeviceToDevice, second));
    CHECK(cudaStreamSynchronize(second));
    for (size_t i = 0; i < n; i++) want[i] = combined<float>(ncclSum, ranks, i);
    expect(same(z.get(), want), "sum in a group", "float", n);
    std::vector<float> got = y.get();
    bool right = true;
    for (size_t i = 0; i < n; i++) {
        float largest = -INFINITY;
        for (int r = 0; r < ranks; r++) if (r % 2 == rank % 2) largest = fmaxf(largest, value<float>(r, i));
        right = right && got[i] == largest;
    }
    expect(right, "maximum in a group", "float", n);
    CHECK(cudaStreamDestroy(second));
}

// Two communicators on two streams. The ranks wait for them in different orders, or for the second one only.
static void test_orders(ncclComm_t copy) {
    const size_t n = 5000;
    cudaStream_t second;
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    std::vector<float> mine(n), want(n);
    for (size_t i = 0; i < n; i++) { mine[i] = value<float>(rank, i); want[i] = combined<float>(ncclSum, ranks, i); }
    for (int round = 0; round < 12; round++) {
        Buffer<float> x(n), y(n);
        x.put(0, mine);
        y.put(0, mine);
        CHECK(ncclAllReduce(x.data, x.data, n, ncclFloat, ncclSum, world, stream));
        CHECK(ncclAllReduce(y.data, y.data, n, ncclFloat, ncclSum, copy, second));
        bool first = (round + rank) % 2 == 0;
        if (first) CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaStreamSynchronize(second));
        expect(same(y.get(), want) && same(x.get(), want), "sums on two streams", "float", n);
    }
    CHECK(cudaStreamDestroy(second));
}

// More elements than an int counts: 2.1 GB on each of two ranks
static void test_huge() {
    const size_t n = ((size_t)1 << 31) + 12345, part = 1 << 24;
    uint8_t* x;
    CHECK(cudaMalloc(&x, n));
    CHECK(cudaMemset(x, rank + 1, n));
    CHECK(cudaMemset(x + n - 1, 10 * (rank + 1), 1));
    CHECK(cudaDeviceSynchronize());
    auto all_are = [&](int value, int last) {
        std::vector<uint8_t> got(part);
        CHECK(cudaStreamSynchronize(stream));
        size_t wrong = 0;
        for (size_t i = 0; i < n; i += part) {
            size_t m = n - i < part ? n - i : part;
            CHECK(cudaMemcpy(got.data(), x + i, m, cudaMemcpyDeviceToHost));
            for (size_t j = 0; j < m; j++) wrong += got[j] != (i + j == n - 1 ? last : value);
        }
        return wrong == 0;
    };
    CHECK(ncclAllReduce(x, x, n, ncclUint8, ncclSum, world, stream));
    expect(all_are(3, 30), "all-reduce", "uint8", n);
    if (rank == 0) CHECK(cudaMemset(x, 7, n));
    CHECK(cudaDeviceSynchronize());
    if (rank == 0) CHECK(ncclSend(x, n, ncclUint8, 1, world, stream));
    else CHECK(ncclRecv(x, n, ncclUint8, 0, world, stream));
    expect(all_are(7, 7), "send and receive", "uint8", n);
    CHECK(cudaFree(x));
}

// ---- cases in which the ranks do different things: reported, with exit code 99

static void differ(const char* what) {
    Buffer<float> x(64), y(64);
    x.put(0, std::vector<float>(64, 1));
    y.put(0, std::vector<float>(64, 2));
    bool odd = rank == ranks - 1;
    if (strcmp(what, "counts") == 0)
        CHECK(ncclAllReduce(x.data, x.data, odd ? 63 : 64, ncclFloat, ncclSum, world, stream));
    if (strcmp(what, "calls") == 0) {
        if (odd) CHECK(ncclAllReduce(x.data, x.data, 64, ncclFloat, ncclSum, world, stream));
        else CHECK(ncclBroadcast(x.data, x.data, 64, ncclFloat, 0, world, stream));
    }
    if (strcmp(what, "roots") == 0)
        CHECK(ncclBroadcast(x.data, x.data, 64, ncclFloat, odd ? 0 : ranks - 1, world, stream));
    if (strcmp(what, "types") == 0)
        CHECK(ncclAllReduce(x.data, x.data, 64, odd ? ncclFloat : ncclInt, ncclSum, world, stream));
    if (strcmp(what, "sizes") == 0) {
        CHECK(ncclGroupStart());
        CHECK(ncclSend(x.data, odd ? 10 : 64, ncclFloat, (rank + 1) % ranks, world, stream));
        CHECK(ncclRecv(y.data, 64, ncclFloat, (rank + ranks - 1) % ranks, world, stream));
        CHECK(ncclGroupEnd());
    }
    CHECK(cudaStreamSynchronize(stream));
    if (strcmp(what, "touch") == 0 && odd) *(volatile float*)x.data = 3;        // MPI also has handlers of faults
}

int main(int argc, char** argv) {
    const char* what = argc > 1 ? argv[1] : "";
    if (getenv("OMPI_COMM_WORLD_SIZE")) {
        int provided;
        MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    }
    ncclUniqueId id;
    if (rank == 0) CHECK(ncclGetUniqueId(&id));
    if (ranks > 1) MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    expect(ncclCommInitRank(&world, ranks, id, ranks) == ncclInvalidArgument, "init of a wrong rank", "ranks", ranks);
#ifdef NCCL_BY_MPI                      // NCCL itself would wait for the rank that is missing
    ncclResult_t refused = getenv("OMPI_COMM_WORLD_SIZE") ? ncclInvalidArgument : ncclInvalidUsage;
    expect(ncclCommInitRank(&world, ranks + 1, id, rank) == refused, "init of too many", "ranks", ranks + 1);
#endif
    CHECK(ncclCommInitRank(&world, ranks, id, rank));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

    if (strcmp(what, "huge") == 0) {
        test_huge();
    } else if (*what) {
        differ(what);
    } else {
        // Even and odd ranks; all, from the last to the first; all; all but the last
        ncclComm_t half, reversed, copy, none;
        CHECK(ncclCommSplit(world, rank % 2, rank, &half, nullptr));
        CHECK(ncclCommSplit(world, 0, -rank, &reversed, nullptr));
        CHECK(ncclCommSplit(world, 3, 0, &copy, nullptr));
        CHECK(ncclCommSplit(world, rank < ranks - 1 ? 1 : NCCL_SPLIT_NOCOLOR, rank, &none, nullptr));
        int at = -1;
        CHECK(ncclCommUserRank(reversed, &at));
        expect(at == ranks - 1 - rank && (none == nullptr) == (rank == ranks - 1), "split", "ranks", ranks);
        for (size_t n : {0, 1, 7, 1000, 20011}) test_types(n, world);
        test_pieces();
        for (ncclComm_t comm : {half, reversed, none}) if (comm) test_types(129, comm);
        test_group(half);
        test_orders(copy);
#ifdef NCCL_BY_MPI
        expect(ncclGroupEnd() == ncclInvalidUsage, "wrong use", "calls", 0);
        expect(ncclAllReduce(nullptr, nullptr, 4, ncclFloat, ncclSum, world, stream) == ncclInvalidArgument,
               "wrong use", "calls", 0);
        expect(ncclSend(nullptr, 0, ncclFloat, ranks, world, stream) == ncclInvalidArgument, "wrong use", "calls", 0);
#endif
        for (ncclComm_t comm : {half, reversed, copy, none}) if (comm) CHECK(ncclCommDestroy(comm));
    }
    CHECK(ncclCommDestroy(world));
    if (failures) printf("rank %d: %d failed\n", rank, failures);
    else printf("rank %d of %d: hash %016llx\n", rank, ranks, (unsigned long long)hash);
    int initialised;
    MPI_Initialized(&initialised);
    if (initialised) MPI_Finalize();
    return failures > 0;
}
