// NCCL's names on machines with CUDA but without NCCL: one rank, whose collectives are copies. In the include path only
// where the Makefile finds no NCCL.
#pragma once
#include "../nccl.h"
#include <string.h>
#include <vector>

struct ncclComm { int unused; };

inline const char* ncclGetErrorString(ncclResult_t result) {
    if (result == ncclSuccess) return "no error";
    if (result == ncclInvalidUsage)
        return "this program was built without NCCL, for one rank: install NCCL and build it again";
    return "invalid argument or CUDA error";
}
inline const char* ncclGetLastError(ncclComm_t) { return ""; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId) {
    memset(uniqueId, 0, sizeof *uniqueId);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId, int rank) {
    if (nranks != 1) return ncclInvalidUsage;
    if (rank != 0) return ncclInvalidArgument;
    *comm = new ncclComm;
    return ncclSuccess;
}
inline ncclResult_t ncclCommSplit(ncclComm_t, int color, int, ncclComm_t* newcomm, ncclConfig_t*) {
    *newcomm = color == NCCL_SPLIT_NOCOLOR ? nullptr : new ncclComm;
    return ncclSuccess;
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) { delete comm; return ncclSuccess; }
inline ncclResult_t ncclCommCount(const ncclComm_t, int* count) { *count = 1; return ncclSuccess; }
inline ncclResult_t ncclCommUserRank(const ncclComm_t, int* rank) { *rank = 0; return ncclSuccess; }

inline ncclResult_t nccl_copy(const void* from, void* to, size_t count, ncclDataType_t type, cudaStream_t stream) {
    size_t size = type == ncclInt8 || type == ncclUint8 ? 1
                : type == ncclBfloat16 ? 2
                : type == ncclInt64 || type == ncclFloat64 ? 8 : 4;
    if (from == to || count == 0) return ncclSuccess;
    cudaError_t error = cudaMemcpyAsync(to, from, count * size, cudaMemcpyDeviceToDevice, stream);
    return error == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
inline ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype,
                                  ncclRedOp_t, ncclComm_t, cudaStream_t stream) {
    return nccl_copy(sendbuff, recvbuff, count, datatype, stream);
}
inline ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount, ncclDataType_t datatype,
                                      ncclRedOp_t, ncclComm_t, cudaStream_t stream) {
    return nccl_copy(sendbuff, recvbuff, recvcount, datatype, stream);
}
inline ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount, ncclDataType_t datatype,
                                  ncclComm_t, cudaStream_t stream) {
    return nccl_copy(sendbuff, recvbuff, sendcount, datatype, stream);
}
inline ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count, ncclDataType_t datatype, int,
                                  ncclComm_t, cudaStream_t stream) {
    return nccl_copy(sendbuff, recvbuff, count, datatype, stream);
}

// The n-th send of a group belongs to its n-th receive.
struct NcclMessage { const void* from; void* to; size_t count; ncclDataType_t type; cudaStream_t stream; };
inline std::vector<NcclMessage> nccl_sends, nccl_receives;
inline int nccl_depth = 0;
inline ncclResult_t ncclGroupStart() { nccl_depth++; return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (nccl_depth == 0) return ncclInvalidUsage;
    if (--nccl_depth > 0) return ncclSuccess;
    std::vector<NcclMessage> sends, receives;
    sends.swap(nccl_sends);
    receives.swap(nccl_receives);
    if (sends.size() != receives.size()) return ncclInvalidArgument;
    for (size_t i = 0; i < sends.size(); i++) {
        const NcclMessage &send = sends[i], &receive = receives[i];
        if (send.count != receive.count || send.type != receive.type || send.stream != receive.stream)
            return ncclInvalidArgument;
        ncclResult_t result = nccl_copy(send.from, receive.to, send.count, send.type, send.stream);
        if (result != ncclSuccess) return result;
    }
    return ncclSuccess;
}
inline ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer,
                             ncclComm_t, cudaStream_t stream) {
    if (peer != 0 || nccl_depth == 0) return ncclInvalidArgument;
    nccl_sends.push_back({sendbuff, nullptr, count, datatype, stream});
    return ncclSuccess;
}
inline ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer,
                             ncclComm_t, cudaStream_t stream) {
    if (peer != 0 || nccl_depth == 0) return ncclInvalidArgument;
    nccl_receives.push_back({nullptr, recvbuff, count, datatype, stream});
    return ncclSuccess;
}
