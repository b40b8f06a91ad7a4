// Mistakes that the strict machine must find, each in a few lines, and the same lines without the mistake.
//   bugs NAME bug|fixed     exit code 0: the result is right; 1: it is wrong; 99: the machine reported the mistake
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <nccl.h>
#include <tensor_core.h>
#include <cstdio>
#include <cstring>
#include <vector>

static bool bug;
static cudaStream_t a, b;          // two streams
static float* host;                // 256 floats of pinned memory

template <class T> static T* device(size_t n) {
    T* p;
    cudaMalloc(&p, n * sizeof(T));
    return p;
}
// Are all n floats at device pointer p equal to `want`?
static int result(const float* p, int n, float want) {
    std::vector<float> got(n);
    cudaDeviceSynchronize();
    cudaMemcpy(got.data(), p, n * sizeof(float), cudaMemcpyDeviceToHost);
    for (float x : got) if (!(x == want)) return 1;
    return 0;
}

__global__ void fill(float* y, int n, float value) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = value;
}
__global__ void copy(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}

// ---- kernels: threads of a warp

__global__ void neighbours(float* y, int* scratch, bool synchronise) {
    int lane = threadIdx.x;
    scratch[lane] = lane;
    if (synchronise) __syncwarp();
    y[lane] = (float)(scratch[(lane + 1) % 32] - (lane + 1) % 32);
}
static int missing_syncwarp() {
    float* y = device<float>(32);
    int* scratch = device<int>(32);
    cudaMemsetAsync(scratch, 0, 128, a);
    neighbours<<<1, 32, 0, a>>>(y, scratch, !bug);
    return result(y, 32, 0);
}

__global__ void swap_in_place(float* y, bool synchronise) {     // reads by other lanes must come before the overwrite
    float x = y[31 - threadIdx.x];
    if (synchronise) __syncwarp();
    y[threadIdx.x] = x - (float)(31 - (int)threadIdx.x);
}
static int overwritten_too_early() {
    float* y = device<float>(32);
    for (int i = 0; i < 32; i++) host[i] = (float)i;
    cudaMemcpyAsync(y, host, 128, cudaMemcpyHostToDevice, a);
    swap_in_place<<<1, 32, 0, a>>>(y, !bug);
    return result(y, 32, 0);
}

__global__ void last_block(float* y, bool first_only) { if (!first_only || blockIdx.x == 0) y[0] = (float)blockIdx.x; }
static int block_order() {
    float* y = device<float>(1);
    last_block<<<8, 1, 0, a>>>(y, !bug);
    return result(y, 1, 0);
}

__global__ void divergent(float* y, bool together) {
    float v = 1;
    if (together || threadIdx.x < 16) v = __shfl_xor_sync(0xffffffff, v, 1);
    else __syncwarp();
    y[threadIdx.x] = v;
}
static int mismatched_calls() {
    float* y = device<float>(32);
    divergent<<<1, 32, 0, a>>>(y, !bug);
    return result(y, 32, 1);
}

__global__ void masked(float* y, unsigned low) {
    y[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 16 ? low : 0xffff0000, 1.f, 1);
}
static int mismatched_masks() {
    float* y = device<float>(32);
    masked<<<1, 32, 0, a>>>(y, bug ? 0x0001ffff : 0x0000ffff);
    return result(y, 32, 1);
}
static int mask_without_caller() {
    float* y = device<float>(32);
    masked<<<1, 32, 0, a>>>(y, bug ? 0x00007fff : 0x0000ffff);
    return result(y, 32, 1);
}

__global__ void returned(float* y, unsigned lanes) {
    if (threadIdx.x >= lanes) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 16);
}
static int shuffle_from_returned_lane() {
    float* y = device<float>(32);
    cudaMemsetAsync(y, 0, 128, a);
    returned<<<1, 32, 0, a>>>(y, bug ? 8 : 32);
    return result(y, bug ? 8 : 32, 1);
}

__global__ void deep(float* y, int n) {
    float local[32768];
    for (int i = 0; i < n; i++) ((volatile float*)local)[32767 - i] = 1;
    y[0] = ((volatile float*)local)[32767];
}
static int stack_overflow() {
    float* y = device<float>(1);
    deep<<<1, 1, 0, a>>>(y, bug ? 32768 : 1024);
    return result(y, 1, 1);
}

// ---- memory

static int write_after_end() {
    float* y = device<float>(64);
    fill<<<1, 128, 0, a>>>(y, bug ? 65 : 64, 1);
    return result(y, 64, 1);
}
static int write_shortly_after_end() {          // within the 16 bytes to which an allocation's end is rounded
    float* y = device<float>(65);
    fill<<<1, 128, 0, a>>>(y, bug ? 66 : 65, 1);
    return result(y, 65, 1);
}
static int write_before_begin() {
    float* y = device<float>(64);
    fill<<<1, 128, 0, a>>>(y, 64, 1);
    fill<<<1, 1, 0, a>>>(y - (bug ? 1 : 0), 1, 1);
    return result(y, 64, 1);
}
static int read_after_end() {
    float *x = device<float>(64), *y = device<float>(128);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    fill<<<1, 128, 0, a>>>(y, 128, 1);
    copy<<<1, 128, 0, a>>>(y, x, bug ? 65 : 64);
    return result(y, 128, 1);
}
static int uninitialised() {
    float *x = device<float>(64), *y = device<float>(64);
    if (!bug) cudaMemsetAsync(x, 0, 256, a);
    copy<<<1, 64, 0, a>>>(y, x, 64);
    return result(y, 64, 0);
}
static int use_after_free() {
    float *x = device<float>(64), *y = device<float>(64);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    if (bug) cudaFree(x);
    device<float>(64);
    copy<<<1, 64, 0, a>>>(y, x, 64);
    return result(y, 64, 1);
}
static int double_free() {
    float* y = device<float>(64);
    cudaFree(y);
    if (bug) cudaFree(y);
    return 0;
}
static int free_of_middle() {
    float* y = device<float>(64);
    cudaFree(y + (bug ? 4 : 0));
    return 0;
}
static int free_of_host_memory() {
    std::vector<float> x(64);
    cudaFree(bug ? x.data() : device<float>(64));
    return 0;
}
static int host_reads_device() {
    float *y = device<float>(64), x;
    fill<<<1, 64, 0, a>>>(y, 64, 1);
    cudaStreamSynchronize(a);
    if (bug) x = y[3]; else cudaMemcpy(&x, y + 3, 4, cudaMemcpyDeviceToHost);
    return x != 1;
}
static int host_writes_device() {
    float *y = device<float>(1), x = 1;
    if (bug) *y = x; else cudaMemcpy(y, &x, 4, cudaMemcpyHostToDevice);
    return result(y, 1, 1);
}
static int kernel_gets_host_pointer() {
    std::vector<float> x(64, 1);
    float *dx = device<float>(64), *y = device<float>(64);
    cudaMemcpyAsync(dx, x.data(), 256, cudaMemcpyHostToDevice, a);
    copy<<<1, 64, 0, a>>>(y, bug ? x.data() : dx, 64);
    return result(y, 64, 1);
}
static int null_pointer() {
    float* y = device<float>(64);
    fill<<<1, 64, 0, a>>>(bug ? nullptr : y, 64, 1);
    return result(y, 64, 1);
}
static int copy_in_wrong_direction() {
    std::vector<float> x(64, 1);
    float* y = device<float>(64);
    cudaMemcpy(y, x.data(), 256, bug ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice);
    return result(y, 64, 1);
}
static int copy_too_long() {
    std::vector<float> x(80, 1);
    float* y = device<float>(64);
    cudaMemcpy(y, x.data(), bug ? 260 : 256, cudaMemcpyHostToDevice);
    return result(y, 64, 1);
}
static int memset_too_long() {
    float* y = device<float>(64);
    cudaMemsetAsync(y, 0, bug ? 65 * 4 : 64 * 4, a);
    return result(y, 64, 0);
}
static int product_too_large() {
    cublasHandle_t handle;
    float *x = device<float>(64), *y = device<float>(bug ? 63 : 64), one = 1, zero = 0;
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    cublasCreate(&handle);
    cublasSetStream(handle, a);
    cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, x, CUDA_R_32F, 8, x, CUDA_R_32F, 8,
                 &zero, y, CUDA_R_32F, 8, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    cublasDestroy(handle);
    return result(y, 63, 8);
}

// ---- streams

static int host_reads_too_early() {
    float* y = device<float>(64);
    fill<<<1, 64, 0, a>>>(y, 64, 1);
    cudaMemcpyAsync(host, y, 256, cudaMemcpyDeviceToHost, a);
    if (!bug) cudaStreamSynchronize(a);
    return !(host[5] == 1);
}
static int host_overwrites_too_early() {
    float* y = device<float>(64);
    for (int i = 0; i < 64; i++) host[i] = 1;
    cudaMemcpyAsync(y, host, 256, cudaMemcpyHostToDevice, a);
    if (!bug) cudaStreamSynchronize(a);
    for (int i = 0; i < 64; i++) host[i] = 2;
    return result(y, 64, 1);
}
static int missing_event() {                    // b reads before a has written
    float *x = device<float>(64), *y = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    cudaEventRecord(event, a);
    if (!bug) cudaStreamWaitEvent(b, event, 0);
    copy<<<1, 64, 0, b>>>(y, x, 64);
    cudaStreamSynchronize(b);
    int wrong = result(y, 64, 1);
    cudaEventDestroy(event);
    return wrong;
}
static int overtaking_stream() {                // a overwrites before b has read
    float *x = device<float>(64), *y = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    fill<<<1, 64, 0, b>>>(x, 64, 1);
    copy<<<1, 64, 0, b>>>(y, x, 64);
    cudaEventRecord(event, b);
    cudaStreamWaitEvent(a, event, 0);
    fill<<<1, 64, 0, a>>>(x, 64, 2);
    cudaEventRecord(event, a);
    if (!bug) cudaStreamWaitEvent(b, event, 0);
    copy<<<1, 64, 0, b>>>(y, x, 64);
    return result(y, 64, 2);
}
static int event_recorded_too_early() {
    float *x = device<float>(64), *y = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (bug) cudaEventRecord(event, a);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    if (!bug) cudaEventRecord(event, a);
    cudaStreamWaitEvent(b, event, 0);
    copy<<<1, 64, 0, b>>>(y, x, 64);
    return result(y, 64, 1);
}
static int event_never_recorded() {
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (!bug) cudaEventRecord(event, a);
    cudaStreamWaitEvent(b, event, 0);
    return 0;
}
// cudaMemset returns before it is done, and a does not wait for the null stream
static int memset_beside_stream() {
    float *x = device<float>(64), *y = device<float>(64);
    cudaMemset(x, 0, 256);
    if (!bug) cudaDeviceSynchronize();
    copy<<<1, 64, 0, a>>>(y, x, 64);
    return result(y, 64, 0);
}
static int use_of_destroyed_stream() {
    float* y = device<float>(64);
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (bug) cudaStreamDestroy(stream);
    fill<<<1, 64, 0, stream>>>(y, 64, 1);
    int wrong = result(y, 64, 1);
    if (!bug) cudaStreamDestroy(stream);
    return wrong;
}

// ---- collectives of one rank. Those of several are in tests/machine/collectives.cu

static ncclComm_t one_rank() {
    ncclUniqueId id;
    ncclComm_t comm = nullptr;
    ncclGetUniqueId(&id);
    if (ncclCommInitRank(&comm, 1, id, 0) != ncclSuccess) fprintf(stderr, "ncclCommInitRank failed\n");
    return comm;
}
static int sum_too_long() {
    float *x = device<float>(65), *y = device<float>(64);
    fill<<<1, 65, 0, a>>>(x, 65, 1);
    ncclAllReduce(x, y, bug ? 65 : 64, ncclFloat, ncclSum, one_rank(), a);
    return result(y, 64, 1);
}
static int sum_of_host_memory() {
    float* y = device<float>(64);
    fill<<<1, 64, 0, a>>>(y, 64, 1);
    ncclAllReduce(bug ? host : y, y, 64, ncclFloat, ncclSum, one_rank(), a);
    return result(y, 64, 1);
}
static int sum_not_in_place() {
    float* y = device<float>(72);
    fill<<<1, 128, 0, a>>>(y, 72, 1);
    ncclAllReduce(y, y + (bug ? 8 : 0), 64, ncclFloat, ncclSum, one_rank(), a);
    return result(y, 72, 1);
}
static int gather_not_in_place() {
    float* y = device<float>(72);
    fill<<<1, 128, 0, a>>>(y, 72, 1);
    ncclAllGather(y + (bug ? 8 : 0), y, 64, ncclFloat, one_rank(), a);
    return result(y, 64, 1);
}
static int received_twice() {
    float *x = device<float>(128), *y = device<float>(128);
    ncclComm_t comm = one_rank();
    fill<<<1, 128, 0, a>>>(x, 128, 1);
    ncclGroupStart();
    for (int i = 0; i < 2; i++) {
        ncclSend(x + 64 * i, 64, ncclFloat, 0, comm, a);
        ncclRecv(y + (64 - bug) * i, 64, ncclFloat, 0, comm, a);
    }
    ncclGroupEnd();
    return result(y, 128, 1);
}
static int never_received() {
    float *x = device<float>(64), *y = device<float>(64);
    ncclComm_t comm = one_rank();
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    ncclGroupStart();
    ncclSend(x, 64, ncclFloat, 0, comm, a);
    if (!bug) ncclRecv(y, 64, ncclFloat, 0, comm, a);
    ncclGroupEnd();
    return result(y, 64, 1);
}
static int sum_without_event() {                // of what a has not written
    float *x = device<float>(64), *y = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    cudaEventRecord(event, a);
    if (!bug) cudaStreamWaitEvent(b, event, 0);
    ncclAllReduce(x, y, 64, ncclFloat, ncclSum, one_rank(), b);
    cudaStreamSynchronize(b);
    return result(y, 64, 1);
}
static int use_before_sum() {                   // a reads what b has not summed
    float *x = device<float>(64), *y = device<float>(64), *z = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    fill<<<1, 64, 0, b>>>(x, 64, 1);
    ncclAllReduce(x, y, 64, ncclFloat, ncclSum, one_rank(), b);
    cudaEventRecord(event, b);
    if (!bug) cudaStreamWaitEvent(a, event, 0);
    copy<<<1, 64, 0, a>>>(z, y, 64);
    return result(z, 64, 1);
}
static int overwritten_before_sum() {           // a writes over what b has not read
    float *x = device<float>(64), *y = device<float>(64);
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    fill<<<1, 64, 0, b>>>(x, 64, 1);
    cudaStreamSynchronize(b);
    ncclAllReduce(x, y, 64, ncclFloat, ncclSum, one_rank(), b);
    cudaEventRecord(event, b);
    if (!bug) cudaStreamWaitEvent(a, event, 0);
    fill<<<1, 64, 0, a>>>(x, 64, 2);
    return result(y, 64, 1);
}

// ---- shared memory and barriers

__global__ void from_other_warp(float* y, bool synchronise) {
    float* shared = (float*)shared_memory();
    shared[threadIdx.x] = (float)threadIdx.x;
    if (synchronise) __syncthreads();
    y[threadIdx.x] = shared[63 - threadIdx.x] - (float)(63 - threadIdx.x);
}
static int missing_barrier() {
    float* y = device<float>(64);
    from_other_warp<<<1, 64, 256, a>>>(y, !bug);
    return result(y, 64, 0);
}
// Each warp takes a turn to write what all read: without the second barrier it writes before the others have read.
__global__ void take_turns(float* y, bool synchronise) {
    float* shared = (float*)shared_memory();
    float sum = 0;
    for (unsigned turn = 0; turn < 4; turn++) {
        if (threadIdx.x / 32 == turn) shared[threadIdx.x % 32] = (float)(turn + 1);
        __syncthreads();
        for (int i = 0; i < 4; i++) { __syncwarp(); sum += shared[(threadIdx.x + i) % 32]; }
        if (synchronise) __syncthreads();
    }
    y[threadIdx.x] = sum;
}
static int missing_second_barrier() {
    float* y = device<float>(128);
    take_turns<<<1, 128, 128, a>>>(y, !bug);
    return result(y, 128, 40);
}
__global__ void two_barriers(float* y, bool together) {
    if (together || threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}
static int divergent_barrier() {
    float* y = device<float>(64);
    two_barriers<<<1, 64, 0, a>>>(y, !bug);
    return result(y, 64, 1);
}
__global__ void barrier_or_warp(float* y, bool all) {
    if (all || threadIdx.x % 32 < 16) __syncthreads();
    else __syncwarp();
    y[threadIdx.x] = 1;
}
static int barrier_in_half_a_warp() {
    float* y = device<float>(64);
    barrier_or_warp<<<1, 64, 0, a>>>(y, !bug);
    return result(y, 64, 1);
}
// A whole warp that has returned is not waited for. Lanes of a warp that goes on must not return.
__global__ void early_return(float* y, unsigned n) {
    if (threadIdx.x >= n) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
static int barrier_after_lanes_returned() {
    float* y = device<float>(96);
    fill<<<1, 96, 0, a>>>(y, 96, 1);
    early_return<<<1, 96, 0, a>>>(y, bug ? 65 : 64);
    return result(y, 96, 1);
}
__global__ void read_first(float* y, bool write) {
    float* shared = (float*)shared_memory();
    if (write || blockIdx.x == 0) shared[threadIdx.x] = 1;
    y[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
}
static int shared_uninitialised() {             // what one block has written is not there in another one
    float* y = device<float>(64);
    read_first<<<2, 32, 128, a>>>(y, !bug);
    return result(y, 64, 1);
}
__global__ void leave_pointer(float* y, float** left, bool follow) {
    float* shared = (float*)shared_memory();
    shared[0] = 1;
    y[blockIdx.x] = follow && *left ? **left : shared[0];
    *left = shared;
}
static int shared_of_another_block() {
    float *y = device<float>(2), **left = device<float*>(1);
    cudaMemsetAsync(left, 0, sizeof(float*), a);
    leave_pointer<<<2, 1, 128, a>>>(y, left, bug);
    return result(y, 2, 1);
}
__global__ void write_shared(float* y, int at, float value) {
    float* shared = (float*)shared_memory();
    shared[0] = 1;
    shared[at] = value;
    y[0] = shared[0];
}
static int shared_after_end() {                 // 384 bytes are a multiple of the alignment
    float* y = device<float>(1);
    write_shared<<<1, 1, 384, a>>>(y, bug ? 96 : 95, 1);
    return result(y, 1, 1);
}
static int shared_shortly_after_end() {
    float* y = device<float>(1);
    write_shared<<<1, 1, 400, a>>>(y, bug ? 100 : 99, 1);
    return result(y, 1, 1);
}
static int shared_before_begin() {
    float* y = device<float>(1);
    write_shared<<<1, 1, 400, a>>>(y, bug ? -1 : 1, 1);
    return result(y, 1, 1);
}
static int shared_not_asked_for() {
    float* y = device<float>(1);
    write_shared<<<1, 1, bug ? 0 : 4, a>>>(y, 0, 1);
    return result(y, 1, 1);
}

// ---- tensor cores: a warp multiplies matrices of ones

constexpr unsigned ONES = 0x3f803f80;
__global__ void ones(float* y, unsigned lanes, bool return_others) {
    float c[4] = {};
    unsigned a[4] = {ONES, ONES, ONES, ONES};
    if (threadIdx.x < lanes) mma(c, a, ONES, ONES);
    else if (return_others) return;
    else __syncwarp();
    y[threadIdx.x] = c[0];
}
static int mma_after_lanes_returned() {
    float* y = device<float>(32);
    ones<<<1, 32, 0, a>>>(y, bug ? 16 : 32, true);
    return result(y, 32, 16);
}
static int mma_in_half_a_warp() {
    float* y = device<float>(32);
    ones<<<1, 32, 0, a>>>(y, bug ? 16 : 32, false);
    return result(y, 32, 16);
}
static int mma_in_small_block() {
    float* y = device<float>(16);
    ones<<<1, bug ? 16 : 32, 0, a>>>(device<float>(32), 32, true);
    fill<<<1, 16, 0, a>>>(y, 16, 1);
    return result(y, 16, 1);
}
// The first element that a lane gets by ldmatrix at these bytes of shared memory, of which `written` words are ones
__global__ void load_matrix(float* y, int written, int first, int stride, const void* elsewhere, unsigned lanes) {
    unsigned r[4], *shared = (unsigned*)shared_memory();
    for (int i = threadIdx.x; i < written; i += 32) shared[i] = ONES;
    __syncwarp();
    const void* row = (const char*)shared + first + (int)threadIdx.x * stride;
    if (threadIdx.x < lanes) ldmatrix(r, elsewhere && threadIdx.x == 9 ? elsewhere : row);
    else ldmatrix_transposed(r, row);
    y[threadIdx.x] = __uint_as_float(r[0] << 16);
}
static int ldmatrix_in_half_a_warp() {
    float* y = device<float>(32);
    load_matrix<<<1, 32, 512, a>>>(y, 128, 0, 16, nullptr, bug ? 16 : 32);
    return result(y, 32, 1);
}
static int ldmatrix_misaligned() {
    float* y = device<float>(32);
    load_matrix<<<1, 32, 512, a>>>(y, 128, 0, bug ? 8 : 16, nullptr, 32);
    return result(y, 32, 1);
}
static int ldmatrix_after_end() {
    float* y = device<float>(32);
    load_matrix<<<1, 32, 512, a>>>(y, 128, bug ? 16 : 0, 16, nullptr, 32);
    return result(y, 32, 1);
}
static int ldmatrix_of_global_memory() {
    float* y = device<float>(32);
    load_matrix<<<1, 32, 512, a>>>(y, 128, 0, 16, bug ? y : nullptr, 32);
    return result(y, 32, 1);
}
static int ldmatrix_uninitialised() {
    float* y = device<float>(32);
    load_matrix<<<1, 32, 512, a>>>(y, bug ? 127 : 128, 0, 16, nullptr, 32);
    return result(y, 32, 1);
}

// ---- asynchronous copies: two groups of 16 bytes a thread, from x to shared memory to y

struct Copies {
    int first_wait = 1, second_wait = 0;        // copy_wait<...> before the use of the first and second group; -1: none
    bool commit = true, last_wait = true, there = true, by_others = false, synchronise = true;
    int to = 0, from = 0;                       // bytes by which addresses are wrong
};
__device__ inline void wait_for_all_but(int groups) {
    if (groups == 1) copy_wait<1>();
    if (groups == 0) copy_wait<0>();
}
__global__ void copy_groups(float* y, const float* x, Copies with) {
    int i = 4 * threadIdx.x, n = 4 * blockDim.x, other = with.by_others ? n - 4 - i : i;
    float* shared = (float*)shared_memory();
    for (int group = 0; group < 2; group++) {
        char* to = (char*)(shared + group * n + i) + group * with.to;
        const char* from = (const char*)(x + group * n + i) + group * with.from;
        copy_async(to, from, group == 0 || with.there);
        if (with.commit || group == 0) copy_commit();
    }
    for (int group = 0; group < 2; group++) {
        wait_for_all_but(group == 0 ? with.first_wait : with.second_wait);
        if (with.by_others && with.synchronise) __syncthreads();
        for (int j = 0; j < 4; j++) y[group * n + other + j] = shared[group * n + other + j];
    }
    if (with.last_wait) {
        copy_commit();
        copy_wait<0>();
    }
}
static int copy_with(const Copies& with, float want = 1) {
    float *x = device<float>(512), *y = device<float>(512);
    fill<<<4, 128, 0, a>>>(x, 512, want);
    copy_groups<<<1, 64, 2048, a>>>(y, x, with);
    return result(y, 512, want);
}
static int missing_wait() {
    Copies with;
    if (bug) with.first_wait = -1;
    return copy_with(with);
}
static int wait_for_too_few() {
    Copies with;
    if (bug) with.second_wait = 1;
    return copy_with(with);
}
static int missing_commit() {
    Copies with;
    if (bug) with.commit = false;
    return copy_with(with);
}
static int wait_without_barrier() {
    Copies with;
    with.by_others = true;
    if (bug) with.synchronise = false;
    return copy_with(with);
}
static int copy_never_waited_for() {
    Copies with;
    if (bug) with.second_wait = 1;
    with.last_wait = false;
    return copy_with(with);
}
static int copy_to_misaligned() {
    Copies with;
    if (bug) with.to = 8;
    return copy_with(with);
}
static int copy_to_after_end() {
    Copies with;
    if (bug) with.to = 16;
    return copy_with(with);
}
static int copy_to_before_begin() {
    Copies with;
    if (bug) with.to = -2048;
    return copy_with(with);
}
static int copy_from_misaligned() {
    Copies with;
    if (bug) with.from = 4;
    return copy_with(with);
}
static int copy_from_after_end() {              // where nothing is there, nothing is read
    Copies with;
    with.from = 16;
    with.there = bug;
    return copy_with(with, 0);
}
// The next copy begins before all have read the last one. Its bytes are the same: they see that it is under way.
__global__ void reuse(float* y, const float* x, bool synchronise) {
    float *shared = (float*)shared_memory(), sum = 0;
    for (int tile = 0; tile < 3; tile++) {
        copy_async(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        sum += shared[threadIdx.x];
        if (synchronise) __syncthreads();
    }
    y[threadIdx.x] = sum;
}
static int copy_over_what_is_read() {
    float *x = device<float>(512), *y = device<float>(128);
    fill<<<4, 128, 0, a>>>(x, 512, 1);
    reuse<<<1, 128, 2048, a>>>(y, x, !bug);
    return result(y, 128, 3);
}

// ---- launches

static int too_many_threads() {
    float* y = device<float>(64);
    fill<<<1, bug ? 1025 : 1024, 0, a>>>(y, 64, 1);
    return result(y, 64, 1);
}
static int no_blocks() {
    float* y = device<float>(64);
    fill<<<bug ? 0 : 1, 64, 0, a>>>(y, 64, 1);
    return result(y, 64, 1);
}
static int grid_too_high() {
    float* y = device<float>(64);
    fill<<<dim3(1, bug ? 65536 : 65535), 64, 0, a>>>(y, 64, 1);
    return result(y, 64, 1);
}
static int too_much_shared_memory() {
    float* y = device<float>(64);
    fill<<<1, 64, bug ? 49153 : 49152, a>>>(y, 64, 1);
    return result(y, 64, 1);
}

static int more_shared_memory_than_set() {
    float* y = device<float>(64);
    cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000);
    fill<<<1, 64, bug ? 100001 : 100000, a>>>(y, 64, 1);
    return result(y, 64, 1);
}
template <int which> __global__ void fill_one_of_two(float* y) { y[threadIdx.x] = which; }
static int shared_memory_set_for_another() {    // instance of the same template
    float* y = device<float>(64);
    cudaFuncSetAttribute(fill_one_of_two<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    if (bug) fill_one_of_two<2><<<1, 64, 50000, a>>>(y);
    else fill_one_of_two<1><<<1, 64, 50000, a>>>(y);
    return result(y, 64, 1);
}
static int more_shared_memory_than_there_is() {
    float* y = device<float>(64);
    int most = 227 * 1024;
    cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, bug ? most + 1 : most);
    fill<<<1, 64, most, a>>>(y, 64, 1);
    return result(y, 64, 1);
}

// ---- for the sanitizers

__global__ void add_pack(float* y, const float* x, int offset) {
    float4 v = *(const float4*)(x + offset);
    y[0] = v.x + v.y;
}
static int misaligned_pack() {
    float *x = device<float>(64), *y = device<float>(1);
    fill<<<1, 64, 0, a>>>(x, 64, 1);
    add_pack<<<1, 1, 0, a>>>(y, x, bug ? 1 : 4);
    return result(y, 1, 2);
}
__global__ void index(float* y, int i, int stride) { y[0] = i * stride > 0 ? 1.f : 0.f; }
static int index_overflow() {
    float* y = device<float>(1);
    index<<<1, 1, 0, a>>>(y, 1 << 20, bug ? 1 << 12 : 1 << 10);
    return result(y, 1, 1);
}
__global__ void add_all(float* y, bool own) { y[own ? blockIdx.x : 0] = 1; }
static int blocks_write_the_same() {
    float* y = device<float>(4);
    fill<<<1, 4, 0, a>>>(y, 4, 1);
    add_all<<<4, 1, 0, a>>>(y, !bug);
    return result(y, 4, 1);
}

int main(int argc, char** argv) {
    struct { const char* name; int (*run)(); } cases[] = {
#define CASE(name) {#name, name}
        CASE(missing_syncwarp), CASE(overwritten_too_early), CASE(block_order), CASE(mismatched_calls),
        CASE(mismatched_masks), CASE(mask_without_caller), CASE(shuffle_from_returned_lane), CASE(stack_overflow),
        CASE(write_after_end), CASE(write_shortly_after_end), CASE(write_before_begin), CASE(read_after_end),
        CASE(uninitialised), CASE(use_after_free), CASE(double_free), CASE(free_of_middle), CASE(free_of_host_memory),
        CASE(host_reads_device), CASE(host_writes_device), CASE(kernel_gets_host_pointer), CASE(null_pointer),
        CASE(copy_in_wrong_direction), CASE(copy_too_long), CASE(memset_too_long), CASE(product_too_large),
        CASE(host_reads_too_early), CASE(host_overwrites_too_early), CASE(missing_event), CASE(overtaking_stream),
        CASE(event_recorded_too_early), CASE(event_never_recorded), CASE(memset_beside_stream),
        CASE(use_of_destroyed_stream), CASE(sum_too_long), CASE(sum_of_host_memory), CASE(sum_not_in_place),
        CASE(gather_not_in_place), CASE(received_twice), CASE(never_received), CASE(sum_without_event),
        CASE(use_before_sum), CASE(overwritten_before_sum), CASE(too_many_threads), CASE(no_blocks),
        CASE(grid_too_high), CASE(too_much_shared_memory), CASE(more_shared_memory_than_set),
        CASE(shared_memory_set_for_another), CASE(more_shared_memory_than_there_is),
        CASE(missing_barrier), CASE(missing_second_barrier), CASE(divergent_barrier), CASE(barrier_in_half_a_warp),
        CASE(barrier_after_lanes_returned), CASE(shared_uninitialised), CASE(shared_of_another_block),
        CASE(shared_after_end), CASE(shared_shortly_after_end), CASE(shared_before_begin), CASE(shared_not_asked_for),
        CASE(mma_after_lanes_returned), CASE(mma_in_half_a_warp), CASE(mma_in_small_block),
        CASE(ldmatrix_in_half_a_warp), CASE(ldmatrix_misaligned), CASE(ldmatrix_after_end),
        CASE(ldmatrix_of_global_memory), CASE(ldmatrix_uninitialised), CASE(missing_wait), CASE(wait_for_too_few),
        CASE(missing_commit), CASE(wait_without_barrier), CASE(copy_never_waited_for), CASE(copy_to_misaligned),
        CASE(copy_to_after_end), CASE(copy_to_before_begin), CASE(copy_from_misaligned), CASE(copy_from_after_end),
        CASE(copy_over_what_is_read), CASE(misaligned_pack), CASE(index_overflow), CASE(blocks_write_the_same),
    };
    if (argc == 1) {
        for (auto& c : cases) printf("%s\n", c.name);
        return 0;
    }
    bug = argc > 2 && strcmp(argv[2], "bug") == 0;
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaMallocHost(&host, 1024);
    for (auto& c : cases)
        if (strcmp(c.name, argv[1]) == 0) return c.run();
    fprintf(stderr, "no case %s\n", argv[1]);
    return 2;
}
