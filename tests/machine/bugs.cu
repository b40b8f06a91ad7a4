// Mistakes that the strict machine must find, each in a few lines, and the same lines without the mistake.
//   bugs NAME bug|fixed     exit code 0: the result is right; 1: it is wrong; 99: the machine reported the mistake
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <nccl.h>
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
        CASE(grid_too_high), CASE(too_much_shared_memory), CASE(misaligned_pack), CASE(index_overflow),
        CASE(blocks_write_the_same),
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
