// Where the program is: launches, which are checked and traced; layers and collectives, which messages, the trace and
// the watch over the ranks (ranks.h) name; steps, phases and layers as NVTX ranges, which Nsight Systems shows.
//
// --trace FILE shows when each kernel and collective was issued and when it ran, by stream, in the format of Chrome's
// tracing, which Perfetto opens. An event after each piece of work records when it ended. It began when it was issued
// or when the work before it in its stream had ended, whichever came later.
//
// Included once, by olmoe.cu, after cuda.h.
#pragma once
#include <nvtx3/nvToolsExt.h>
#include "cuda.h"
#include "options.h"

struct Trace {
    struct Entry { const char* name; int layer; cudaStream_t stream; double issued; cudaEvent_t end; };
    std::vector<Entry> entries;
    bool on = false;
    int layer = -1;             // that the main thread is at; -1: none
    double start = 0;
    cudaEvent_t origin;
};
static Trace trace;

// NVTX ranges, one in another: a step, or what is done between steps; a phase of it; a layer. A new one ends those of
// its kind and below.
enum class Range { step, phase, layer };
void at_range(Range kind, const std::string& name /* "": none */) {
    static std::vector<Range> open;
    for (; !open.empty() && open.back() >= kind; open.pop_back()) nvtxRangePop();
    if (name.empty()) return;
    nvtxRangePushA(name.c_str());
    open.push_back(kind);
}

void at_step(const std::string& name) { at_range(Range::step, name); }
void at_phase(const std::string& name) { at_range(Range::phase, name); }

// What follows is of layer l. A sign of life for the other ranks.
void at_layer(int l) {
    trace.layer = l;
    at_range(Range::layer, l < 0 ? "" : text("layer %d", l));
    ranks_alive();
}

// A collective begins, of a layer or, with -1, of none: what messages about a rank that does not come name.
void at_collective(const char* name, int layer) { ranks_note(name, layer); }

// --sync and --check-finite
struct LaunchChecks {
    bool sync = false;          // waits after every launch, so that its error is not found after a later one
    bool finite = false;        // looks at what every kernel and matmul wrote
};
static LaunchChecks launch_checks;

// The options of a command, with those of all commands that compute.
std::vector<Option> with_launch_checks(std::vector<Option> options) {
    options.push_back({"sync", &launch_checks.sync, "",
                       "wait after every kernel, so that an error is reported where it happened"});
    options.push_back({"check-finite", &launch_checks.finite, "",
                       "end at the first kernel or matmul whose result is not finite (slow)"});
    return options;
}

std::string of_layer(int layer) { return layer < 0 ? "" : text(" of layer %d", layer); }

// After each kernel, matmul and collective: errors of the launch, and the trace.
void launched(const char* name, cudaStream_t stream, int layer = trace.layer) {
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && launch_checks.sync) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) {
        const char* which = launch_checks.sync ? "" : ", or what ran before it";
        die("%s%s (%s)%s: %s", name, of_layer(layer).c_str(), stream_name(stream), which, cuda_reason(error).c_str());
    }
    if (!trace.on) return;
    Trace::Entry e = {name, layer, stream, seconds_now() - trace.start, nullptr};
    cudaCheck(cudaEventCreateWithFlags(&e.end, 0));
    cudaCheck(cudaEventRecord(e.end, stream));
    trace.entries.push_back(e);
}

// One warp for each run of NON_FINITE_RUN elements: how many of them are not finite
constexpr int NON_FINITE_RUN = 4096;
template <typename T> __global__ void count_non_finite_kernel(float* counts, const T* x, size_t n) {
    size_t run = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (run * NON_FINITE_RUN >= n) return;
    x += run * NON_FINITE_RUN;
    int length = n - run * NON_FINITE_RUN < NON_FINITE_RUN ? (int)(n - run * NON_FINITE_RUN) : NON_FINITE_RUN;
    float count = 0;
    for (int i = lane; i < length; i += WARP) count += isfinite((float)x[i]) ? 0.f : 1.f;
    count = warp_sum(count);
    if (lane == 0) counts[run] = count;
}

// Ends the program where one of n elements on the device is not finite. `what` wrote them, to its `argument`, before
// what the main stream does next.
template <typename T> void check_finite(const char* what, const std::string& argument, const T* x, size_t n) {
    float* device_counts = nullptr;
    const size_t runs = (size_t)ceil_div(n, NON_FINITE_RUN);
    if (n == 0) return;
    cudaCheck(cudaMalloc((void**)&device_counts, runs * sizeof(float)));
    count_non_finite_kernel<<<blocks_for_rows(runs), BLOCK, 0, main_stream.stream>>>(device_counts, x, n);
    const std::vector<float> counts = device_floats(device_counts, runs);
    cudaCheck(cudaFree(device_counts));
    const auto bad = std::find_if(counts.begin(), counts.end(), [](float count) { return count > 0; });
    if (bad == counts.end()) return;
    size_t at = (size_t)(bad - counts.begin()) * NON_FINITE_RUN;
    const std::vector<float> run = device_floats(x + at, std::min<size_t>(NON_FINITE_RUN, n - at));
    const auto first = std::find_if(run.begin(), run.end(), [](float value) { return !std::isfinite(value); });
    at += (size_t)(first - run.begin());
    die("%s%s: what it wrote to %s is not finite, first %g at %zu of %zu", what, of_layer(trace.layer).c_str(),
        argument.c_str(), *first, at, n);
}

// Looks at the arguments of a kernel that it may have written to: pointers to numbers that are not const, each from
// there to the end of its tensor. names: of the arguments, separated by commas.
inline void check_results(const char*, const char*) {}
template <typename T, typename... Rest>
void check_results(const char* kernel, const char* names, const T& argument, const Rest&... rest) {
    while (*names == ' ' || *names == ',') names++;
    size_t length = 0;
    for (int open = 0; names[length] && (open > 0 || names[length] != ','); length++)
        open += (names[length] == '(') - (names[length] == ')');
    if constexpr (std::is_same<T, float*>::value || std::is_same<T, __nv_bfloat16*>::value)
        check_finite(kernel, std::string(names, length), argument, Memory::bytes_from(argument) / sizeof(*argument));
    check_results(kernel, names + length, rest...);
}

// A kernel in the main stream, in blocks of BLOCK threads
#define LAUNCH_NAMED(name, kernel, blocks, ...) do { \
    kernel<<<blocks, BLOCK, 0, main_stream.stream>>>(__VA_ARGS__); \
    launched(name, main_stream.stream); \
    if (launch_checks.finite) check_results(name, #__VA_ARGS__, __VA_ARGS__); } while (0)
#define LAUNCH(kernel, ...) LAUNCH_NAMED(#kernel, kernel, __VA_ARGS__)

// A kernel with its own number of threads and bytes of shared memory, whose arguments are one struct: what it writes is
// checked by the caller.
#define LAUNCH_SHARED(kernel, blocks, threads, bytes, arguments) do { \
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); \
    kernel<<<blocks, threads, bytes, main_stream.stream>>>(arguments); \
    launched(#kernel, main_stream.stream); } while (0)

// What the stream does next could not begin earlier than here.
void waited(cudaStream_t stream) { if (trace.on) launched("", stream); }

// Tracing begins with the device idle; the origin is now on the host and on every stream.
void trace_begin() {
    cudaCheck(cudaDeviceSynchronize());
    trace.start = seconds_now();
    cudaCheck(cudaEventCreateWithFlags(&trace.origin, 0));
    cudaCheck(cudaEventRecord(trace.origin, main_stream.stream));
    trace.on = true;
    for (cudaStream_t s : all_streams()) launched("", s);
}

void trace_write(const std::string& path) {
    FILE* f = fopen(path.c_str(), "w");
    if (!f) die("cannot write %s: %s", path.c_str(), strerror(errno));
    const int rank = ranks.rank;
    std::vector<cudaStream_t> streams = all_streams();
    std::vector<double> end(streams.size(), 0);         // of the work before, in microseconds
    auto thread_name = [&](const char* separator, size_t thread, const char* name) {
        fprintf(f, "%s{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":%d,\"tid\":%zu,\"args\":{\"name\":\"%s\"}}",
                separator, rank, thread, name);
    };
    fprintf(f, "{\"traceEvents\":[\n");
    thread_name("", 0, "issued");
    for (size_t i = 0; i < streams.size(); i++)
        thread_name(",\n", i + 1, stream_name(streams[i]));
    for (size_t i = 0; i < trace.entries.size(); i++) {
        const Trace::Entry& e = trace.entries[i];
        size_t stream = std::find(streams.begin(), streams.end(), e.stream) - streams.begin();
        float ms;
        cudaCheck(cudaEventElapsedTime(&ms, trace.origin, e.end));
        double issued = e.issued * 1e6, begin = end[stream];
        if (issued < ms * 1e3) begin = std::max(begin, issued);         // a CPU has run it before the call returns
        end[stream] = ms * 1e3;
        cudaCheck(cudaEventDestroy(e.end));
        if (e.name[0] == 0) continue;
        std::string args = text("\"args\":{\"number\":%zu,\"layer\":%d}", i, e.layer);
        fprintf(f, ",\n{\"ph\":\"i\",\"name\":\"%s\",\"pid\":%d,\"tid\":0,\"ts\":%.3f,%s}", e.name, rank, issued,
                args.c_str());
        fprintf(f, ",\n{\"ph\":\"X\",\"name\":\"%s\",\"pid\":%d,\"tid\":%zu,\"ts\":%.3f,\"dur\":%.3f,%s}", e.name, rank,
                stream + 1, begin, end[stream] - begin, args.c_str());
    }
    trace.entries.clear();
    fprintf(f, "\n]}\n");
    if (fclose(f) != 0) die("cannot write %s: %s", path.c_str(), strerror(errno));
}

void trace_end(const std::string& path) {
    cudaCheck(cudaDeviceSynchronize());
    trace.on = false;
    trace_write(path);
    cudaCheck(cudaEventDestroy(trace.origin));
}
