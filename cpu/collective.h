// Collectives in both machines: recorded when NCCL is called, run over MPI.
#pragma once
#include "nccl.h"
#include <vector>

struct NcclCall {
    enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECEIVE } kind;
    const void* send;
    void* receive;
    size_t count;                       // elements of the shorter buffer, as in the call
    ncclDataType_t type;
    ncclRedOp_t op;
    int peer;                           // root, destination or source; else 0
    ncclComm_t comm;
    cudaStream_t stream;
};

const char* name_of(const NcclCall& c);
size_t bytes_of(ncclDataType_t type);               // 0: there is no such type
// Bytes that this rank reads at `send` and writes at `receive`
size_t sent_bytes(const NcclCall& c);
size_t received_bytes(const NcclCall& c);
// Where `receive` begins, in bytes after `send`, when the call works in place
ptrdiff_t in_place_offset(const NcclCall& c);

// Runs a group's collectives in their order, then its sends and receives, all at once. Returns when they are done.
void run_collectives(const std::vector<NcclCall>& group);

// How the NCCL functions give a group to the machine: fast.cpp and strict.cpp each define them.
void enqueue_collectives(const std::vector<NcclCall>& group);
// Returns when all groups that were given have run.
void finish_collectives();
