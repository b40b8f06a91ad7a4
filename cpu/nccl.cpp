// NCCL's functions over MPI, for ranks that are processes on CPUs. Everything is sent in messages between two ranks.
//   - A sum's terms are added in the order of the ranks, by one rank, which sends the result to the others: the same
//     bits on all of them and in every run. bfloat16 is summed in float and rounded once.
//   - Ranks share cores, so a rank that waits must not keep a core busy, as MPI's own waiting does.
//   - MPI is called from the thread that calls NCCL or waits for a stream: MPI_THREAD_FUNNELED is enough.
// If ranks do not make the same calls, a GPU waits forever or computes with wrong numbers. Here the process reports it
// and ends with exit code 99.
#include "collective.h"
#include <algorithm>
#include <cuda_bf16.h>
#include <mpi.h>
#include <omp.h>
#include <random>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <type_traits>
#include <unistd.h>

struct ncclComm {
    MPI_Comm mpi;                       // unused where there is one rank, which needs no MPI
    int rank, size;
    bool closed = false;                // never deleted: work that is still queued may name it
};

[[noreturn]] static void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
static void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "cuda-on-cpu: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    _exit(99);
}

// ------------------------------------------------------------------------------------------------
// What a call reads and writes

const char* name_of(const NcclCall& c) {
    static const char* names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast",
                                  "ncclSend", "ncclRecv"};
    return names[c.kind];
}
size_t bytes_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32: case ncclFloat32: return 4;
        case ncclInt64: case ncclFloat64: return 8;
    }
    return 0;
}
static size_t bytes(const NcclCall& c) { return c.count * bytes_of(c.type); }
size_t sent_bytes(const NcclCall& c) {
    if (c.kind == NcclCall::RECEIVE || (c.kind == NcclCall::BROADCAST && c.comm->rank != c.peer)) return 0;
    return bytes(c) * (c.kind == NcclCall::REDUCE_SCATTER ? (size_t)c.comm->size : 1);
}
size_t received_bytes(const NcclCall& c) {
    if (c.kind == NcclCall::SEND) return 0;
    return bytes(c) * (c.kind == NcclCall::ALL_GATHER ? (size_t)c.comm->size : 1);
}
ptrdiff_t in_place_offset(const NcclCall& c) {
    ptrdiff_t own = (ptrdiff_t)bytes(c) * c.comm->rank;
    return c.kind == NcclCall::REDUCE_SCATTER ? own : c.kind == NcclCall::ALL_GATHER ? -own : 0;
}

// ------------------------------------------------------------------------------------------------
// Messages

struct Message {
    char* data;
    size_t bytes;
    int peer;
    ncclComm_t comm;
};
enum Tag { OF_COLLECTIVES, OF_PAIRS, OF_CALLS };        // a message sent for one purpose is never received for another
constexpr size_t LARGEST = 1 << 30;                     // MPI counts in int

// Gives the core away between two tests of the requests: while the messages may be on their way, only to threads that
// are ready to run, and then for a time that grows to 100 microseconds. MPI moves long messages only while it is
// called, unless the system lets it read the memory of another process.
static void wait_for(std::vector<MPI_Request>& requests, std::vector<MPI_Status>& statuses, size_t bytes) {
    double start = omp_get_wtime(), waited = 0, on_their_way = 200e-6 + 1e-9 * (double)bytes;
    for (int done = 0;;) {
        MPI_Testall((int)requests.size(), requests.data(), &done, statuses.data());
        if (done) return;
        if (waited < on_their_way) {
            sched_yield();
        } else {
            timespec nap = {0, (long)std::min(100e3, 0.1e9 * waited)};
            nanosleep(&nap, nullptr);
        }
        waited = omp_get_wtime() - start;
    }
}

// What a rank sends to itself: the n-th send in a communicator belongs to the n-th receive.
static void deliver(std::vector<Message> sends, const std::vector<Message>& receives) {
    for (const Message& r : receives) {
        auto s = std::find_if(sends.begin(), sends.end(), [&](const Message& m) { return m.comm == r.comm; });
        if (s == sends.end()) fail("ncclRecv from the own rank, %d, without an ncclSend in the same group", r.peer);
        if (s->bytes != r.bytes) fail("rank %d sends itself %zu bytes and receives %zu", r.peer, s->bytes, r.bytes);
        if (r.bytes > 0) memmove(r.data, s->data, r.bytes);
        sends.erase(s);
    }
    if (!sends.empty()) fail("ncclSend to the own rank, %d, without an ncclRecv in the same group", sends[0].peer);
}

// All messages at once, so that no two ranks can wait for each other. Between two ranks they arrive in the order of
// the lists.
static void exchange(const std::vector<Message>& sends, const std::vector<Message>& receives, Tag tag) {
    std::vector<MPI_Request> requests;
    std::vector<const Message*> received;               // of the first requests
    std::vector<int> sizes;
    size_t bytes = 0;
    std::vector<Message> own_sends, own_receives;
    for (const std::vector<Message>* list : {&receives, &sends})
        for (const Message& m : *list) {
            if (m.peer == m.comm->rank) {
                (list == &sends ? own_sends : own_receives).push_back(m);
                continue;
            }
            size_t at = 0;
            do {
                int size = (int)std::min(m.bytes - at, LARGEST);
                requests.emplace_back();
                if (list == &sends) {
                    MPI_Isend(m.data + at, size, MPI_BYTE, m.peer, tag, m.comm->mpi, &requests.back());
                } else {
                    MPI_Irecv(m.data + at, size, MPI_BYTE, m.peer, tag, m.comm->mpi, &requests.back());
                    received.push_back(&m);
                    sizes.push_back(size);
                }
                at += (size_t)size;
                bytes += (size_t)size;
            } while (at < m.bytes);
        }
    deliver(std::move(own_sends), own_receives);
    if (requests.empty()) return;
    std::vector<MPI_Status> statuses(requests.size());
    wait_for(requests, statuses, bytes);
    for (size_t i = 0; i < received.size(); i++) {      // MPI itself ends the program if a message is too long
        const Message& m = *received[i];
        int size;
        MPI_Get_count(&statuses[i], MPI_BYTE, &size);
        if (size == sizes[i]) continue;
        fail("rank %d receives %zu bytes from rank %d, which sent fewer", m.comm->rank, m.bytes, m.peer);
    }
}

// ------------------------------------------------------------------------------------------------
// Sums

template <class T> static T combine(ncclRedOp_t op, T a, T b) {
    if constexpr (std::is_integral<T>::value) {
        typedef std::make_unsigned_t<T> U;
        return op == ncclSum ? (T)((U)a + (U)b) : (op == ncclMax) == (a < b) ? b : a;     // sums wrap around
    } else {
        return op == ncclSum ? a + b : op == ncclMax ? fmax(a, b) : fmin(a, b);
    }
}

// y = x[0] + x[1] + ..., from left to right. y may be one of the x.
template <class T, class Sum>
static void reduce(T* y, const std::vector<const char*>& x, size_t count, ncclRedOp_t op) {
    constexpr size_t BLOCK = 2048;
#pragma omp parallel for schedule(static) if(count > 1 << 17)
    for (size_t first = 0; first < count; first += BLOCK) {
        size_t n = std::min(BLOCK, count - first);
        Sum sum[BLOCK];
        for (size_t i = 0; i < n; i++) sum[i] = (Sum)((const T*)x[0])[first + i];
        for (size_t r = 1; r < x.size(); r++) {
            const T* term = (const T*)x[r] + first;
            for (size_t i = 0; i < n; i++) sum[i] = combine(op, sum[i], (Sum)term[i]);
        }
        for (size_t i = 0; i < n; i++) y[first + i] = (T)sum[i];
    }
}
static void reduce(void* y, const std::vector<const char*>& x, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    switch (type) {
        case ncclInt8: reduce<int8_t, int8_t>((int8_t*)y, x, count, op); break;
        case ncclUint8: reduce<uint8_t, uint8_t>((uint8_t*)y, x, count, op); break;
        case ncclInt32: reduce<int32_t, int32_t>((int32_t*)y, x, count, op); break;
        case ncclInt64: reduce<int64_t, int64_t>((int64_t*)y, x, count, op); break;
        case ncclFloat32: reduce<float, float>((float*)y, x, count, op); break;
        case ncclFloat64: reduce<double, double>((double*)y, x, count, op); break;
        case ncclBfloat16: reduce<__nv_bfloat16, float>((__nv_bfloat16*)y, x, count, op); break;
    }
}

// ------------------------------------------------------------------------------------------------
// Collectives. Long sums are made in pieces, because each rank needs room for a piece.

constexpr size_t PIECE = 1 << 22;       // elements
struct Slice { size_t first, count; };  // of a buffer's elements, one for each rank

// Rank r gets slice r from all ranks and writes its sum to y.
static void reduce_slices(const NcclCall& c, const std::vector<Slice>& slices, char* y) {
    static std::vector<char> others;
    const size_t size = bytes_of(c.type), own = slices[c.comm->rank].count;
    others.resize((size_t)c.comm->size * own * size);
    std::vector<Message> sends, receives;
    std::vector<const char*> terms;
    for (int r = 0; r < c.comm->size; r++) {
        char *mine = (char*)c.send + slices[r].first * size, *theirs = others.data() + (size_t)r * own * size;
        terms.push_back(r == c.comm->rank ? mine : theirs);
        if (r == c.comm->rank) continue;
        sends.push_back({mine, slices[r].count * size, r, c.comm});
        receives.push_back({theirs, own * size, r, c.comm});
    }
    exchange(sends, receives, OF_COLLECTIVES);
    reduce(y, terms, own, c.type, c.op);
}

// Each rank gives its slice of `receive` to all.
static void share_slices(const NcclCall& c, const std::vector<Slice>& slices) {
    const size_t size = bytes_of(c.type);
    const Slice& own = slices[c.comm->rank];
    std::vector<Message> sends, receives;
    for (int r = 0; r < c.comm->size; r++) {
        if (r == c.comm->rank) continue;
        sends.push_back({(char*)c.receive + own.first * size, own.count * size, r, c.comm});
        receives.push_back({(char*)c.receive + slices[r].first * size, slices[r].count * size, r, c.comm});
    }
    exchange(sends, receives, OF_COLLECTIVES);
}

// Each rank compares its call with its neighbour's: if all neighbours agree, all ranks do. This takes a message, so
// only the strict machine does it.
static void compare_calls(const NcclCall& c) {
#ifdef CUDA_STRICT
    char own[128] = "", before[128];
    int rank = c.comm->rank, size = c.comm->size, neighbour = (rank + size - 1) % size;
    snprintf(own, sizeof own, "%s of %zu elements of type %d, operation %d, root %d",
             name_of(c), c.count, c.type, c.op, c.peer);
    exchange({{own, sizeof own, (rank + 1) % size, c.comm}}, {{before, sizeof before, neighbour, c.comm}}, OF_CALLS);
    if (strcmp(own, before) != 0)
        fail("the ranks' calls differ: rank %d calls %s; rank %d calls %s", rank, own, neighbour, before);
#else
    (void)c;
#endif
}

static void run_collective(const NcclCall& c) {
    const size_t ranks = (size_t)c.comm->size, rank = (size_t)c.comm->rank;
    std::vector<Slice> slices(ranks);
    if (ranks == 1) {
        if (c.send != c.receive && c.count > 0) memmove(c.receive, c.send, bytes(c));
        return;
    }
    compare_calls(c);
    switch (c.kind) {
        case NcclCall::ALL_REDUCE:
            for (size_t first = 0; first < c.count; first += PIECE) {
                size_t n = std::min(PIECE, c.count - first);
                for (size_t r = 0; r < ranks; r++) {
                    size_t begin = n * r / ranks, end = n * (r + 1) / ranks;
                    slices[r] = {first + begin, end - begin};
                }
                reduce_slices(c, slices, (char*)c.receive + slices[rank].first * bytes_of(c.type));
                share_slices(c, slices);
            }
            break;
        case NcclCall::REDUCE_SCATTER:
            for (size_t first = 0; first < c.count; first += PIECE / ranks) {
                size_t n = std::min(PIECE / ranks, c.count - first);
                for (size_t r = 0; r < ranks; r++) slices[r] = {r * c.count + first, n};
                reduce_slices(c, slices, (char*)c.receive + first * bytes_of(c.type));
            }
            break;
        case NcclCall::ALL_GATHER: {
            char* own = (char*)c.receive + rank * bytes(c);
            if (c.send != own && c.count > 0) memmove(own, c.send, bytes(c));
            for (size_t r = 0; r < ranks; r++) slices[r] = {r * c.count, c.count};
            share_slices(c, slices);
            break;
        }
        default: {      // broadcast
            std::vector<Message> sends, receives;
            if ((int)rank != c.peer) {
                receives.push_back({(char*)c.receive, bytes(c), c.peer, c.comm});
            } else {
                if (c.send != c.receive && c.count > 0) memmove(c.receive, c.send, bytes(c));
                for (int r = 0; r < c.comm->size; r++)
                    if (r != c.peer) sends.push_back({(char*)c.send, bytes(c), r, c.comm});
            }
            exchange(sends, receives, OF_COLLECTIVES);
        }
    }
}

void run_collectives(const std::vector<NcclCall>& group) {
    std::vector<Message> sends, receives;
    for (const NcclCall& c : group) {
        if (c.comm->closed) continue;
        if (c.kind == NcclCall::SEND) sends.push_back({(char*)c.send, bytes(c), c.peer, c.comm});
        else if (c.kind == NcclCall::RECEIVE) receives.push_back({(char*)c.receive, bytes(c), c.peer, c.comm});
        else run_collective(c);
    }
    exchange(sends, receives, OF_PAIRS);
}

// ------------------------------------------------------------------------------------------------
// The API

static int group_depth = 0;
static std::vector<NcclCall> group;

static ncclResult_t issue(const NcclCall& c) {
    if (!c.comm || c.comm->closed || bytes_of(c.type) == 0) return ncclInvalidArgument;
    if (c.op != ncclSum && c.op != ncclMax && c.op != ncclMin) return ncclInvalidArgument;
    if (c.peer < 0 || c.peer >= c.comm->size) return ncclInvalidArgument;
    if ((!c.send && sent_bytes(c) > 0) || (!c.receive && received_bytes(c) > 0)) return ncclInvalidArgument;
    group.push_back(c);
    if (group_depth > 0) return ncclSuccess;
    return ncclGroupStart(), ncclGroupEnd();
}

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    if (group_depth == 0) return ncclInvalidUsage;
    if (--group_depth > 0 || group.empty()) return ncclSuccess;
    std::vector<NcclCall> calls;
    calls.swap(group);
    enqueue_collectives(calls);
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::ALL_REDUCE, sendbuff, recvbuff, count, datatype, op, 0, comm, stream});
}
ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t datatype,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::REDUCE_SCATTER, sendbuff, recvbuff, recvcount, datatype, op, 0, comm, stream});
}
ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::ALL_GATHER, sendbuff, recvbuff, sendcount, datatype, ncclSum, 0, comm, stream});
}
ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::BROADCAST, sendbuff, recvbuff, count, datatype, ncclSum, root, comm, stream});
}
ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::SEND, sendbuff, nullptr, count, datatype, ncclSum, peer, comm, stream});
}
ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    return issue({NcclCall::RECEIVE, nullptr, recvbuff, count, datatype, ncclSum, peer, comm, stream});
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId) {
    std::random_device random;
    for (char& c : uniqueId->internal) c = (char)random();
    return ncclSuccess;
}
// The ranks are the processes that MPI started. The id does not connect them, but they must all have the same one, as
// on GPUs.
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank) {
    if (nranks < 1 || rank < 0 || rank >= nranks) return ncclInvalidArgument;
    MPI_Comm mpi = MPI_COMM_NULL;
    if (nranks > 1) {
        int initialised, world_size, world_rank;
        MPI_Initialized(&initialised);
        if (!initialised) return ncclInvalidUsage;
        MPI_Comm_size(MPI_COMM_WORLD, &world_size);
        MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
        if (world_size != nranks || world_rank != rank) return ncclInvalidArgument;
        finish_collectives();
        MPI_Comm_dup(MPI_COMM_WORLD, &mpi);
        ncclUniqueId first = commId;
        MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, 0, mpi);
        if (memcmp(&first, &commId, sizeof first) != 0) return ncclInvalidArgument;
        if (!getenv("OMP_NUM_THREADS")) {       // the ranks of a machine share its cores
            MPI_Comm machine;
            int here;
            MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine);
            MPI_Comm_size(machine, &here);
            MPI_Comm_free(&machine);
            omp_set_num_threads(std::max(1, omp_get_num_procs() / here));
        }
    }
    *comm = new ncclComm{mpi, rank, nranks};
    return ncclSuccess;
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config) {
    if (!comm || comm->closed || config || (color < 0 && color != NCCL_SPLIT_NOCOLOR)) return ncclInvalidArgument;
    if (group_depth > 0) return ncclInvalidUsage;
    *newcomm = nullptr;
    MPI_Comm mpi = MPI_COMM_NULL;
    int rank = 0, size = 1;
    if (comm->size > 1) {
        finish_collectives();           // the other ranks may wait for this one in them
        MPI_Comm_split(comm->mpi, color == NCCL_SPLIT_NOCOLOR ? MPI_UNDEFINED : color, key, &mpi);
        if (mpi != MPI_COMM_NULL) {
            MPI_Comm_rank(mpi, &rank);
            MPI_Comm_size(mpi, &size);
        }
    }
    if (color != NCCL_SPLIT_NOCOLOR) *newcomm = new ncclComm{mpi, rank, size};
    return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm || comm->closed) return ncclInvalidArgument;
    finish_collectives();
    int finalized = 1;
    if (comm->mpi != MPI_COMM_NULL) MPI_Finalized(&finalized);
    if (!finalized) MPI_Comm_free(&comm->mpi);
    comm->closed = true;
    return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    if (!comm || comm->closed) return ncclInvalidArgument;
    *count = comm->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    if (!comm || comm->closed) return ncclInvalidArgument;
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    if (!comm || comm->closed) return ncclInvalidArgument;
    *error = ncclSuccess;
    return ncclSuccess;
}

const char* ncclGetLastError(ncclComm_t) { return ""; }
const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled CUDA error";
        case ncclSystemError: return "unhandled system error";
        case ncclInternalError: return "internal error";
        case ncclInvalidArgument:
            return "invalid argument: a null pointer, a rank or type that does not exist, or other ranks than MPI's";
        case ncclInvalidUsage:
            return "invalid usage: several ranks need MPI to be initialised, and groups need both ends";
        case ncclRemoteError: return "remote error";
        case ncclInProgress: return "in progress";
    }
    return "unknown result";
}
