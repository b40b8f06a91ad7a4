// MPI's names where there is no MPI: one rank, with no other one to exchange messages with. In the include path only
// where the Makefile finds no MPI.
#pragma once
#include <stdlib.h>
#include <string.h>

typedef int MPI_Comm, MPI_Datatype, MPI_Request, MPI_Info, MPI_Op;
struct MPI_Status { int MPI_SOURCE, MPI_TAG, MPI_ERROR; };
enum { MPI_COMM_NULL, MPI_COMM_WORLD };
// The value of a type is its size in bytes
enum { MPI_BYTE = 1, MPI_CHAR = 1, MPI_INT = 4, MPI_FLOAT = 4, MPI_DOUBLE = 8, MPI_INT64_T = 8, MPI_UINT64_T = 8 };
enum { MPI_SUM, MPI_MAX, MPI_MIN };
enum { MPI_SUCCESS, MPI_ERR_OTHER };
enum { MPI_THREAD_SINGLE, MPI_THREAD_FUNNELED, MPI_THREAD_SERIALIZED, MPI_THREAD_MULTIPLE };
enum { MPI_UNDEFINED = -32766, MPI_COMM_TYPE_SHARED = 0, MPI_INFO_NULL = 0, MPI_REQUEST_NULL = 0 };
#define MPI_IN_PLACE ((void*)-1)
#define MPI_STATUS_IGNORE ((MPI_Status*)nullptr)
#define MPI_STATUSES_IGNORE ((MPI_Status*)nullptr)

inline int mpi_state = 0;               // 1: initialised, 2: finalised
inline int MPI_Init_thread(int*, char***, int required, int* provided) {
    *provided = required;
    mpi_state = 1;
    return MPI_SUCCESS;
}
inline int MPI_Initialized(int* flag) { *flag = mpi_state > 0; return MPI_SUCCESS; }
inline int MPI_Finalized(int* flag) { *flag = mpi_state == 2; return MPI_SUCCESS; }
inline int MPI_Finalize() { mpi_state = 2; return MPI_SUCCESS; }

inline int MPI_Comm_rank(MPI_Comm, int* rank) { *rank = 0; return MPI_SUCCESS; }
inline int MPI_Comm_size(MPI_Comm, int* size) { *size = 1; return MPI_SUCCESS; }
inline int MPI_Comm_dup(MPI_Comm comm, MPI_Comm* copy) { *copy = comm; return MPI_SUCCESS; }
inline int MPI_Comm_split(MPI_Comm comm, int color, int, MPI_Comm* part) {
    *part = color == MPI_UNDEFINED ? (MPI_Comm)MPI_COMM_NULL : comm;
    return MPI_SUCCESS;
}
inline int MPI_Comm_split_type(MPI_Comm comm, int, int, MPI_Info, MPI_Comm* part) {
    *part = comm;
    return MPI_SUCCESS;
}
inline int MPI_Comm_free(MPI_Comm* comm) { *comm = MPI_COMM_NULL; return MPI_SUCCESS; }

inline int MPI_Bcast(void*, int, MPI_Datatype, int, MPI_Comm) { return MPI_SUCCESS; }
inline int MPI_Allreduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op, MPI_Comm) {
    if (from != MPI_IN_PLACE && count > 0) memcpy(to, from, (size_t)count * (size_t)type);
    return MPI_SUCCESS;
}

// Never called: a rank's messages to itself do not go through MPI.
inline int MPI_Isend(const void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request*) { return MPI_ERR_OTHER; }
inline int MPI_Irecv(void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request*) { return MPI_ERR_OTHER; }
inline int MPI_Get_count(const MPI_Status*, MPI_Datatype, int* count) { *count = 0; return MPI_SUCCESS; }
inline int MPI_Testall(int, MPI_Request*, int* flag, MPI_Status*) { *flag = 1; return MPI_SUCCESS; }
