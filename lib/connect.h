// The communicators of the groups of ranks: made, used for the first time, watched and closed.
//
// Included once, by olmoe.cu, after its groups and `collective`.
#pragma once
#include "ranks.h"

// NCCL connects two ranks, and takes its buffers, at the first call that needs it. This makes such calls, so that the
// model's memory is allocated from what is really free.
void comm_first_use() {
    const size_t n = (1 << 20) / sizeof(floatX);        // small and large calls take different ways
    const size_t all = n * world.size;
    floatX *from, *to;
    for (floatX** p : {&from, &to}) {
        cudaCheck(cudaMalloc((void**)p, all * sizeof(floatX)));
        cudaCheck(cudaMemsetAsync(*p, 0, all * sizeof(floatX), comm_stream));
    }
    auto use = [&](const Group& g, auto call) {
        for (size_t count : {(size_t)1, n})
            if (g.size > 1) collective("first use of NCCL", -1, SUMS, 0, [&] { call(g, count); });
    };
    const ncclDataType_t type = nccl_type(from);
    for (const Group* group : {&world, &replica_group}) {
        use(*group, [&](const Group& g, size_t count) {
            ncclCheck(ncclAllReduce(from, to, count, type, ncclSum, g.comm, comm_stream));
        });
        if (!shard_optimizer) continue;
        use(*group, [&](const Group& g, size_t count) {
            ncclCheck(ncclReduceScatter(from, to, count, type, ncclSum, g.comm, comm_stream));
        });
        use(*group, [&](const Group& g, size_t count) {
            ncclCheck(ncclAllGather(from, to, count, type, g.comm, comm_stream));
        });
    }
    use(expert_group, [&](const Group& g, size_t count) {
        for (int r = 0; r < g.size; r++) {
            ncclCheck(ncclSend(from, count, type, r, g.comm, comm_stream));
            ncclCheck(ncclRecv(to + r * n, count, type, r, g.comm, comm_stream));
        }
    });
    cudaCheck(cudaStreamSynchronize(comm_stream));
    for (floatX* p : {from, to}) cudaCheck(cudaFree(p));
}

// What NCCL found out after its calls had returned, or "". The thread of the watch asks.
std::string comm_error() {
    for (const Group* g : {&world, &replica_group, &expert_group}) {
        ncclResult_t error = ncclSuccess;
        if (!g->comm || ncclCommGetAsyncError(g->comm, &error) != ncclSuccess || error == ncclInProgress) continue;
        if (error != ncclSuccess) return "NCCL: " + nccl_reason(error, g->comm);
    }
    return "";
}

// Connects the ranks, all in the same order. A group of all ranks uses the communicator of all, a group of one none.
void comm_open() {
    cudaCheck(cudaStreamCreateWithFlags(&comm_stream, cudaStreamNonBlocking));
    for (cudaEvent_t* e : {&comm_event, &arrival_events[0], &arrival_events[1]})
        cudaCheck(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
    cudaCheck(cudaMalloc((void**)&comm_buffer, COMM_BUFFER * sizeof(double)));
    cudaCheck(cudaMallocHost((void**)&comm_host, COMM_BUFFER * sizeof(double)));
    if (world.size == 1) return;
    measure_overhead("NCCL", " measured", 0, [] {
        ncclCheck(ncclCommInitRank(&world.comm, world.size, nccl_shared_id(world.rank), world.rank));
        for (Group* g : {&expert_group, &replica_group}) {
            const int color = g == &expert_group ? replica_group.rank : expert_group.rank;
            if (g->size == world.size) g->comm = world.comm;
            else if (g->size > 1) ncclCheck(ncclCommSplit(world.comm, color, g->rank, &g->comm, nullptr));
        }
        comm_first_use();
    });
    ranks_watch_library(comm_error);
}

void comm_close() {
    ranks_watch_library(nullptr);
    cudaCheck(cudaStreamSynchronize(comm_stream));
    for (Group* g : {&expert_group, &replica_group}) {
        if (g->comm && g->comm != world.comm) ncclCheck(ncclCommDestroy(g->comm));
        g->comm = nullptr;
    }
    if (world.comm) ncclCheck(ncclCommDestroy(world.comm));
    world.comm = nullptr;
    cudaCheck(cudaFree(comm_buffer));
    cudaCheck(cudaFreeHost(comm_host));
    for (cudaEvent_t e : {comm_event, arrival_events[0], arrival_events[1]}) cudaCheck(cudaEventDestroy(e));
    cudaCheck(cudaStreamDestroy(comm_stream));
}
