// The strict machine's runtime. It runs the same kernels as the fast one, with warps of 32 lanes, and looks for
// mistakes that a GPU forgives most of the time. It reports what it finds in a block of text on standard error, and the
// process ends with exit code 99. It finds:
//   - races and missing warp barriers: threads are fibers. Wherever one waits, the next one is drawn with the seed
//     CUDA_SEED, and so is the order of the blocks. Results that depend on the order change with the seed.
//   - overruns: an allocation ends at a page that may not be touched, and the bytes before it are checked after each
//     kernel.
//   - use of freed memory (addresses are never used twice) and of uninitialised memory (all bytes 0xff: NaN, -1).
//   - host code that touches device memory, which is locked except while device work runs; kernels and copies that get
//     a pointer to the wrong kind of memory.
//   - missing synchronisation: work on streams waits until the program waits for it, and the order between streams is
//     also drawn, within what events allow. cudaMemset and cudaMemcpy are no more synchronous than CUDA promises.
//   - collectives whose buffers overlap where NCCL forbids it, or for which the ranks' calls differ.
//   - launches beyond CUDA's limits, warp functions whose masks do not match the lanes that call them, lanes that wait
//     forever, __syncthreads that not all threads of a block call in the same line.
//   - of shared memory: use before it is written, or of a block that is over, overruns, missing barriers. The bytes of
//     an asynchronous copy come when its thread waits for it, and not before; until then they are uninitialised.
// It does not find: overflow of index products, a kernel's pointers inside of structs, accesses outside of their
// allocation but inside of another one, races in which every order gives the same result, a missing event between two
// collectives (they run in the order of their calls). Only one thread of the host may call CUDA and touch its memory.
#include "collective.h"
#include "cuda_profiler_api.h"
#include "gemm.h"
#include "nvtx3/nvToolsExt.h"
#include "tensor_core.h"
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <omp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_TSAN)                       // this file itself is compiled without TSan: it must not see the scheduler
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

static uint64_t random_state;
static inline uint32_t random_below(uint32_t n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(((random_state >> 32) * n) >> 32);
}

// ------------------------------------------------------------------------------------------------
// Reports

static const char* running_kernel = nullptr;      // its name, while device code runs
static bool a_thread_runs = false;                // a report then names it
static const char* running_call = nullptr;        // a copy or a product, while one runs

[[noreturn]] static void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
static void report(const char* format, ...) {
    char text[2048];
    int n = snprintf(text, sizeof text, "cuda-on-cpu: ");
    va_list args;
    va_start(args, format);
    n += vsnprintf(text + n, sizeof text - n, format, args);
    va_end(args);
    if (running_kernel && n < (int)sizeof text)
        n += snprintf(text + n, sizeof text - n, "\n  in kernel %s, grid (%u, %u, %u), block (%u, %u, %u)",
                      running_kernel, gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z);
    if (a_thread_runs && n < (int)sizeof text)
        n += snprintf(text + n, sizeof text - n, ": block (%u, %u, %u), thread (%u, %u, %u)",
                      blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    if (!running_kernel && running_call && n < (int)sizeof text)
        n += snprintf(text + n, sizeof text - n, "\n  in %s", running_call);
    fflush(stdout);
    n = std::min(n, (int)sizeof text - 1);
    text[n++] = '\n';
    if (write(2, text, (size_t)n) < 0) _exit(99);
    _exit(99);
}

// ------------------------------------------------------------------------------------------------
// Memory. Device and pinned memory each have a range of addresses of their own, which is used once, from its start:
//     | inaccessible | front slack, allocation, at most 15 bytes | inaccessible | ...

constexpr size_t PAGE = 4096, GUARD = 16 * PAGE, CHECKED = 64;
constexpr unsigned char POISON = 0xff;

struct Allocation {
    char *begin, *pages, *end_pages;
    size_t bytes;
    bool freed, open;                   // open: may be touched now
};
struct Arena {
    const char* kind;
    char *begin, *next, *end;
    std::vector<Allocation> all;        // by address
    bool holds(const void* p) const { return p >= begin && p < end; }
};
static Arena device{"device", nullptr, nullptr, nullptr, {}}, pinned{"pinned host", nullptr, nullptr, nullptr, {}};
static bool locked = true;
static std::vector<uint32_t> opened;

static void protect(const Allocation& a, int protection) {
    if (mprotect(a.pages, (size_t)(a.end_pages - a.pages), protection) != 0) { perror("mprotect"); abort(); }
}
// While device work runs, an allocation is opened when it is first touched (in on_fault): most allocations are not.
static void lock_device() {
    locked = true;
    if (opened.empty()) return;
    for (uint32_t i : opened) device.all[i].open = false;
    opened.clear();
    if (mprotect(device.begin, (size_t)(device.next - device.begin), PROT_NONE) != 0) { perror("mprotect"); abort(); }
}

// The last allocation that begins at or before p, or the first one.
static const Allocation* nearest(const Arena& arena, const void* p) {
    if (arena.all.empty()) return nullptr;
    auto before = [](const char* address, const Allocation& a) { return address < a.pages; };
    auto after = std::upper_bound(arena.all.begin(), arena.all.end(), (const char*)p, before);
    return after == arena.all.begin() ? &*after : &*(after - 1);
}

static bool open_allocation(const void* p) {
    static std::mutex mutex;            // several threads of a matrix product may touch an operand at the same time
    std::lock_guard<std::mutex> lock(mutex);
    Allocation* a = locked || !device.holds(p) ? nullptr : (Allocation*)nearest(device, p);
    if (!a || a->freed || (char*)p < a->pages || (char*)p >= a->end_pages) return false;
    if (a->open) return true;
    protect(*a, PROT_READ | PROT_WRITE);
    a->open = true;
    opened.push_back((uint32_t)(a - device.all.data()));
    return true;
}

// Shared memory of the block that runs. Its pages are its own: the next block's are other ones.
//     | inaccessible | front slack, the block's bytes, at most 127 bytes | inaccessible | ...
constexpr size_t SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10, SHARED_ALIGNMENT = 128;
struct Shared {
    char *first, *end;                  // addresses for all blocks, used in turns
    char *begin, *pages, *end_pages;
    size_t bytes;
    bool ever(const void* p) const { return p >= first && p < end; }
    bool holds(const void* p, size_t n) const { return p >= begin && (char*)p + n <= begin + bytes; }
};
static Shared shared;

static void describe_shared(const char* p, char* text, size_t size) {
    if (shared.bytes == 0 || p < shared.pages - GUARD / 2 || p >= shared.end_pages + GUARD / 2)
        snprintf(text, size, shared.bytes == 0 ? "%p is shared memory, of which this launch has none"
                                               : "%p is shared memory of a block that is over", (const void*)p);
    else if (p < shared.begin)
        snprintf(text, size, "%p is %zu bytes before the block's %zu bytes of shared memory", (const void*)p,
                 (size_t)(shared.begin - p), shared.bytes);
    else if (p >= shared.begin + shared.bytes)
        snprintf(text, size, "%p is %zu bytes after the end of the block's %zu bytes of shared memory", (const void*)p,
                 (size_t)(p - shared.begin) - shared.bytes, shared.bytes);
    else
        snprintf(text, size, "%p is byte %zu of the block's %zu bytes of shared memory", (const void*)p,
                 (size_t)(p - shared.begin), shared.bytes);
}

static const char* describe(const void* address) {
    static char text[512];
    const char* p = (const char*)address;
    if (shared.ever(p)) {
        describe_shared(p, text, sizeof text);
        return text;
    }
    const Arena* arena = device.holds(p) ? &device : pinned.holds(p) ? &pinned : nullptr;
    if (!arena) {
        const char* format = p < (char*)65536 ? "%p is a null pointer or a small offset from one"
                                              : "%p is ordinary host memory";
        snprintf(text, sizeof text, format, address);
        return text;
    }
    const Allocation* a = nearest(*arena, p);
    if (!a) {
        snprintf(text, sizeof text, "%p is %s memory that was never allocated", address, arena->kind);
        return text;
    }
    const Allocation* next = a + 1 < arena->all.data() + arena->all.size() ? a + 1 : nullptr;
    if (p >= a->begin + a->bytes && next && next->begin - p < p - (a->begin + a->bytes)) a = next;
    const char* end = a->begin + a->bytes;
    char place[64];
    if (p < a->begin) snprintf(place, sizeof place, "%zu bytes before", (size_t)(a->begin - p));
    else if (p >= end) snprintf(place, sizeof place, "%zu bytes after the end of", (size_t)(p - end));
    else snprintf(place, sizeof place, "byte %zu of", (size_t)(p - a->begin));
    size_t number = (size_t)(a - arena->all.data()) + 1;
    snprintf(text, sizeof text, "%p is %s %s%s allocation %zu of %zu bytes", address, place, a->freed ? "freed " : "",
             arena->kind, number, a->bytes);
    return text;
}

static cudaError_t allocate(Arena& arena, void** pointer, size_t bytes) {
    *pointer = nullptr;
    if (bytes == 0) return cudaSuccess;
    size_t rounded = (bytes + 15) / 16 * 16, size = (rounded + PAGE - 1) / PAGE * PAGE;
    size_t left = (size_t)(arena.end - arena.next);
    if (bytes > left || size + GUARD > left) return cudaErrorMemoryAllocation;
    Allocation a{arena.next + size - rounded, arena.next, arena.next + size, bytes, false, &arena == &pinned};
    protect(a, PROT_READ | PROT_WRITE);
    memset(a.pages, POISON, size);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(a.pages, a.begin - a.pages);
    ASAN_POISON_MEMORY_REGION(a.begin + bytes, a.end_pages - a.begin - bytes);
#endif
    if (&arena == &device) protect(a, PROT_NONE);
    arena.all.push_back(a);
    opened.reserve(device.all.capacity());          // the handler of faults must not allocate
    arena.next += size + GUARD;
    *pointer = a.begin;
    return cudaSuccess;
}

static void release(Arena& arena, void* pointer, const char* call) {
    if (!pointer) return;
    Allocation* a = arena.holds(pointer) ? (Allocation*)nearest(arena, pointer) : nullptr;
    if (!a || a->begin != pointer) report("%s: not the start of an allocation: %s", call, describe(pointer));
    if (a->freed) report("%s: freed twice: %s", call, describe(pointer));
    a->freed = true;
    protect(*a, PROT_NONE);
    madvise(a->pages, (size_t)(a->end_pages - a->pages), MADV_DONTNEED);
}

// Overruns too short to reach a page of the guard: the bytes just before an allocation, and up to 15 after it.
static void check_slack() {
#ifndef __SANITIZE_ADDRESS__        // which sees each access to them
    for (Arena* arena : {&device, &pinned})
        for (const Allocation& a : arena->all) {
            if (a.freed || !a.open) continue;
            char* from = std::max(a.pages, a.begin - CHECKED);
            for (char* p = from; p < a.begin; p++)
                if (*p != (char)POISON) report("overwritten: %s", describe(p));
            for (char* p = a.begin + a.bytes; p < a.end_pages; p++)
                if (*p != (char)POISON) report("overwritten: %s", describe(p));
        }
#endif
}

static void open_shared(size_t bytes) {
    shared.bytes = bytes;
    if (bytes == 0) { shared.begin = shared.first; return; }
    size_t rounded = (bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    size_t size = (rounded + PAGE - 1) / PAGE * PAGE;
    shared.pages = shared.end_pages + GUARD;
    if (shared.pages + size + GUARD > shared.end) shared.pages = shared.first + GUARD;
    shared.end_pages = shared.pages + size;
    shared.begin = shared.end_pages - rounded;
    if (mprotect(shared.pages, size, PROT_READ | PROT_WRITE) != 0) { perror("mprotect"); abort(); }
    memset(shared.pages, POISON, size);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(shared.pages, shared.begin - shared.pages);
    ASAN_POISON_MEMORY_REGION(shared.begin + bytes, shared.end_pages - shared.begin - bytes);
#endif
}
static void close_shared() {
    if (shared.bytes == 0) return;
    size_t size = (size_t)(shared.end_pages - shared.pages);
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(shared.pages, size);
#else
    for (char* p = shared.pages; p < shared.end_pages; p++) {
        if (p == shared.begin) p += shared.bytes;
        if (p < shared.end_pages && *p != (char)POISON) report("overwritten: %s", describe(p));
    }
#endif
    if (mprotect(shared.pages, size, PROT_NONE) != 0) { perror("mprotect"); abort(); }
    madvise(shared.pages, size, MADV_DONTNEED);
    shared.bytes = 0;
    shared.begin = shared.first;
}

// `bytes` at p must be inside one allocation of device memory, or of pinned memory where that is allowed.
static void check_range(const char* call, const char* what, const void* p, size_t bytes, bool pinned_too) {
    const Arena* arena = device.holds(p) ? &device : pinned_too && pinned.holds(p) ? &pinned : nullptr;
    if (bytes == 0 && !arena) return;
    if (!arena) report("%s: %s must be device memory: %s", call, what, describe(p));
    const Allocation* a = nearest(*arena, p);
    if (a->freed || (char*)p < a->begin || (char*)p + bytes > a->begin + a->bytes)
        report("%s: %s of %zu bytes is not inside of an allocation: its first byte, %s",
               call, what, bytes, describe(p));
}
static void check_host_range(const char* call, const char* what, const void* p, size_t bytes) {
    if (bytes == 0) return;
    if (device.holds(p)) report("%s: %s must be host memory: %s", call, what, describe(p));
    if (pinned.holds(p)) check_range(call, what, p, bytes, true);
}

void check_kernel_pointer(const char* kernel, int argument, const void* p) {
    if (p && !device.holds(p) && !pinned.holds(p))
        report("launch of %s: argument %d must be device memory: %s", kernel, argument, describe(p));
}

// ------------------------------------------------------------------------------------------------
// Fibers

struct Fiber {
    char *stack, *top;
    void* saved = nullptr;               // stack pointer, or ucontext_t
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
#endif
    void* tsan = nullptr;
};
static Fiber host_fiber;                 // the stack that launches
static Fiber* current_fiber = &host_fiber;

#if defined(__x86_64__)
// Saves what a function has to keep by the ABI, changes the stack, and returns there.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
    .text
    .globl cuda_on_cpu_switch
    .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
static void prepare(Fiber* fiber, void (*entry)()) {
    void** sp = (void**)((uintptr_t)fiber->top & ~(uintptr_t)15);
    *--sp = nullptr;                     // where entry would return to; also aligns the stack as a call does
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    fiber->saved = sp;
}
static void switch_stack(Fiber* from, Fiber* to) { cuda_on_cpu_switch(&from->saved, to->saved); }
#else
static void prepare(Fiber* fiber, void (*entry)()) {
    ucontext_t* context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = fiber->stack;
    context->uc_stack.ss_size = (size_t)(fiber->top - fiber->stack);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    fiber->saved = context;
}
static void switch_stack(Fiber* from, Fiber* to) {
    if (!from->saved) from->saved = new ucontext_t;
    swapcontext((ucontext_t*)from->saved, (ucontext_t*)to->saved);
}
#endif

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

static void switch_to(Fiber* to) {
    Fiber* from = current_fiber;
    current_fiber = to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, (size_t)(to->top - to->stack));
#endif
    switch_stack(from, to);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
    const char* access = "access";
#if defined(__x86_64__)
    access = ((ucontext_t*)context)->uc_mcontext.gregs[REG_ERR] & 2 ? "write" : "read";
#else
    (void)context;
#endif
    const void* p = info->si_addr;
    if (open_allocation(p)) return;
    if (running_kernel && p >= current_fiber->stack - PAGE && p < current_fiber->stack)
        report("a thread needs more than the %zu bytes of its stack", STACK);
    if (running_kernel || running_call) report("invalid %s: %s", access, describe(p));
    if (device.holds(p)) {
        const Allocation* a = nearest(device, p);
        if (a && !a->freed && p >= a->begin && p < a->begin + a->bytes)
            report("host code touches device memory (%s): %s; copy it with cudaMemcpy", access, describe(p));
        report("invalid %s by host code: %s", access, describe(p));
    }
    if (pinned.holds(p)) report("invalid %s by host code: %s", access, describe(p));
    signal(signal_number, SIG_DFL);      // an ordinary crash: it happens again, and ends the process as usual
}

// ------------------------------------------------------------------------------------------------
// A block. Its threads are ready, wait for their warp or their block, or are done. The next one is drawn uniformly from
// those that are ready. Every second block with shared memory, by a draw, runs warp by warp: the next thread is one of
// the first warp that has a ready one, in an order that is drawn anew at each barrier. So a warp is ahead of others by
// as much as the barriers allow, which shows where one is missing; with the uniform draw they stay close together.
// A thread that has not begun needs no stack of its own yet: the fiber whose thread has ended runs it, so that kernels
// without warp functions and barriers never switch.

struct Copy {
    void* to;
    const void* from;                    // null: zeros
    int group;
    Copy* next;
};
struct Thread {
    Fiber* fiber;                        // where it waits; null: has not begun
    bool waiting;
    Collective kind;
    unsigned mask;
    int lane_asked;                      // or the number to xor the lane with
    uint64_t value, result;
    int groups;                          // of asynchronous copies that it has ended
    Copy *first_copy, *last_copy;        // those that it has not waited for, in order
    uint3 index;                         // threadIdx
    void* tsan;
};
constexpr int WARP_LANES = 32, MOST_WARPS = 32;
constexpr unsigned ALL_LANES = 0xffffffff;
struct Warp {
    unsigned lanes, done, waiting;       // bits of those that exist, have returned, wait for other lanes
    bool at_barrier;                     // one of them waits for the block
    bool uniform;                        // all lanes that wait do so for `kind` and `mask`: nearly always
    Collective kind;
    unsigned mask;
};
static std::vector<Thread> threads;
static std::vector<Warp> warps;
struct Ready { int count, threads[MOST_WARPS * WARP_LANES]; };
static Ready ready[MOST_WARPS];                     // by the rank of the warp if a block runs warp by warp; else in [0]
static bool by_warp;
static int rank_of_warp[MOST_WARPS], first_ready;   // all before first_ready are empty
static struct { const char* file; int line, arrived; } block_barrier;
static int current, unfinished, handed_over;
static const std::function<void()>* body;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Fiber*> idle;         // those without a thread, each waiting inside work()
#if defined(CUDA_TSAN)
static char begun, ended;
static char warp_tags[64];               // two for each warp, used in turns
static char warp_turn[32];
static char block_tags[2], block_turn;   // the same for the block
static std::vector<void*> tsan_threads;
static uint32_t tsan_shift;
#endif

static inline int draw() {
    while (ready[first_ready].count == 0) first_ready++;
    Ready& from = ready[first_ready];
    uint32_t i = random_below((uint32_t)from.count);
    int thread = from.threads[i];
    from.threads[i] = from.threads[--from.count];
    return thread;
}
static inline void make_ready(int thread) {
    int rank = by_warp ? rank_of_warp[thread / WARP_LANES] : 0;
    Ready& to = ready[rank];
    to.threads[to.count++] = thread;
    if (rank < first_ready) first_ready = rank;
}
static void draw_order_of_warps() {
    for (int i = 0; i < (int)warps.size(); i++) {
        int j = (int)random_below((uint32_t)i + 1);
        rank_of_warp[i] = rank_of_warp[j];
        rank_of_warp[j] = i;
    }
}

static inline void set_current(int thread) {
    current = thread;
    threadIdx = threads[thread].index;
}

static const char* const collective_names[] = {"__shfl_xor_sync", "__shfl_sync", "__syncwarp", "mma", "ldmatrix",
                                               "ldmatrix_transposed", "__syncthreads"};

static void describe_warp(int warp, char* text, size_t size) {
    size_t n = 0;
    text[0] = 0;
    int first = warp * WARP_LANES, last = std::min(first + WARP_LANES, (int)threads.size());
    for (int kind = 0; kind <= BARRIER; kind++) {
        unsigned lanes = 0, mask = 0;
        for (int i = first; i < last; i++)
            if (threads[i].waiting && threads[i].kind == kind) {
                lanes |= 1u << (i - first);
                mask = threads[i].mask;
            }
        if (!lanes || n >= size) continue;
        n += (size_t)snprintf(text + n, size - n, "; lanes %08x wait in %s", lanes, collective_names[kind]);
        if (kind <= SYNCWARP && n < size) n += (size_t)snprintf(text + n, size - n, " with mask %08x", mask);
    }
    if (warps[warp].done && n < size) snprintf(text + n, size - n, "; lanes %08x have returned", warps[warp].done);
}

static inline void complete_shuffle(int warp, unsigned here, int lane) {
    int first = warp * WARP_LANES;
    Thread& t = threads[first + lane];
    int source = t.kind == SHFL_XOR ? lane ^ t.lane_asked : t.lane_asked & (WARP_LANES - 1);
    if (source < 0 || source >= WARP_LANES || !(here >> source & 1)) {
        char text[512];
        describe_warp(warp, text, sizeof text);
        set_current(first + lane);
        report("a shuffle with mask %08x reads lane %d, which does not take part%s", t.mask, source, text);
    }
    t.result = threads[first + source].value;
}

static void report_copies_at_end() {
    int n = 0;
    for (const Copy* copy = threads[current].first_copy; copy; copy = copy->next) n++;
    report("a thread returns without a wait for %d of its asynchronous copies: the first one, to %s",
           n, describe(threads[current].first_copy->to));
}

// What mma and ldmatrix take and give, on the stack of the lane that calls them.
struct MmaOperands { Accumulators c; Words a; unsigned b[2]; };
struct MatrixRow { uint16_t row[8]; Words r; };

// Each sum in order of k, in fp32. Products of two bf16 are exact (but for over- and underflow), so that this is what a
// chain of fmaf gives.
static void complete_mma(const Thread* lanes) {
    typedef float Four __attribute__((vector_size(16)));
    alignas(16) float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < WARP_LANES; lane++) {
        const MmaOperands* of = (const MmaOperands*)lanes[lane].value;
        int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; i++) {
            float* to = &a[g + i % 2 * 8][t + i / 2 * 8];
            to[0] = __uint_as_float(of->a.r[i] << 16);
            to[1] = __uint_as_float(of->a.r[i] & 0xffff0000);
        }
        for (int i = 0; i < 2; i++) {
            b[t + 8 * i][g] = __uint_as_float(of->b[i] << 16);
            b[t + 8 * i + 1][g] = __uint_as_float(of->b[i] & 0xffff0000);
            memcpy(&c[g + 8 * i][t], of->c.c + 2 * i, 8);
        }
    }
    for (int i = 0; i < 16; i++) {
        Four *sums = (Four*)c[i], left = sums[0], right = sums[1];
        for (int k = 0; k < 16; k++) {
            const Four* factors = (const Four*)b[k];
            left += a[i][k] * factors[0];
            right += a[i][k] * factors[1];
        }
        sums[0] = left;
        sums[1] = right;
    }
    for (int lane = 0; lane < WARP_LANES; lane++)
        for (int i = 0; i < 2; i++)
            memcpy(((MmaOperands*)lanes[lane].value)->c.c + 2 * i, &c[lane / 4 + i * 8][lane % 4 * 2], 8);
}

static void complete_ldmatrix(const Thread* lanes, bool transposed) {
    auto element = [&](int matrix, int row, int column) -> unsigned {
        return ((const MatrixRow*)lanes[8 * matrix + row].value)->row[column];
    };
    for (int lane = 0; lane < WARP_LANES; lane++) {
        unsigned* r = ((MatrixRow*)lanes[lane].value)->r.r;
        int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; i++)
            r[i] = transposed ? element(i, t, g) | element(i, t + 1, g) << 16
                              : element(i, g, t) | element(i, g, t + 1) << 16;
    }
}

// If all lanes that wait for each other with `mask` have come, they are ready. Lanes that have returned do not count.
static void try_complete(int warp, unsigned mask) {
    int first = warp * WARP_LANES;
    Warp& w = warps[warp];
    unsigned here = w.waiting & mask;
    if (!w.uniform)
        for (int lane = 0; lane < WARP_LANES; lane++)
            if ((here >> lane & 1) && threads[first + lane].mask != mask) here &= ~(1u << lane);
    if (mask & w.lanes & ~w.done & ~here) return;
    if (!here) return;
    Collective kind = threads[first + __builtin_ctz(here)].kind;
    if (kind == SHFL || kind == SHFL_XOR) {
        for (int lane = 0; lane < WARP_LANES; lane++)
            if (here >> lane & 1) complete_shuffle(warp, here, lane);
    } else if (kind != SYNCWARP) {
        if (here != ALL_LANES) {
            char text[512];
            describe_warp(warp, text, sizeof text);
            set_current(first + __builtin_ctz(here));
            report("%s takes all 32 lanes of a warp, and lanes %08x are missing%s",
                   collective_names[kind], ~here, text);
        }
        if (kind == MMA) complete_mma(&threads[first]);
        else complete_ldmatrix(&threads[first], kind == LDMATRIX_TRANSPOSED);
    }
    for (int lane = 0; lane < WARP_LANES; lane++)
        if (here >> lane & 1) {
            threads[first + lane].waiting = false;
            make_ready(first + lane);
        }
    w.waiting &= ~here;
#if defined(CUDA_TSAN)
    warp_turn[warp] ^= 1;
#endif
}

// Threads that have returned do not count at a barrier, but a warp comes as a whole: nvcc compiles __syncthreads to an
// instruction for all lanes of a warp (PTX's barrier.sync.aligned).
static void check_whole_warp(int warp) {
    if (!warps[warp].at_barrier || !warps[warp].done) return;
    char text[512];
    describe_warp(warp, text, sizeof text);
    report("a divergent barrier: __syncthreads takes all lanes of a warp%s", text);
}

// If all threads that have not returned have come to __syncthreads, they are ready.
static void try_open_barrier() {
    if (block_barrier.arrived < unfinished) return;
    block_barrier.arrived = 0;
    if (by_warp) draw_order_of_warps();
    for (Warp& w : warps) w.at_barrier = false;
    for (int i = 0; i < (int)threads.size(); i++)
        if (threads[i].waiting) {
            threads[i].waiting = false;
            make_ready(i);
        }
#if defined(CUDA_TSAN)
    block_turn ^= 1;
#endif
}

// What a fiber does: it runs threads from their beginning, one after another, and switches to threads that wait in
// other fibers.
static void work() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {
        int thread = handed_over;
        handed_over = -1;
        if (thread < 0) {
            if (unfinished == 0) {
                idle.push_back(current_fiber);
                switch_to(&host_fiber);
                continue;
            }
            thread = draw();
        }
        Fiber* elsewhere = threads[thread].fiber;
        set_current(thread);
        if (elsewhere) {
            idle.push_back(current_fiber);
#if defined(CUDA_TSAN)
            __tsan_switch_to_fiber(threads[thread].tsan, 1);
#endif
            switch_to(elsewhere);
            continue;
        }
#if defined(CUDA_TSAN)
        // Each thread is a thread of TSan: it comes after the launch and before what follows the launch, and the warp's
        // barriers order it. Other blocks use TSan's threads again, in another order: otherwise TSan would take the
        // blocks for ordered.
        void* its = tsan_threads[((size_t)thread + tsan_shift) % tsan_threads.size()];
        threads[thread].tsan = its;
        __tsan_switch_to_fiber(its, 1);
        __tsan_acquire(&begun);
        (*body)();
        __tsan_release(&ended);
        __tsan_switch_to_fiber(current_fiber->tsan, 1);
#else
        (*body)();
#endif
        if (threads[current].first_copy) report_copies_at_end();
        unfinished--;
        int warp = current / WARP_LANES, first = warp * WARP_LANES;
        warps[warp].done |= 1u << (current - first);
        for (int i = first; warps[warp].waiting && i < first + WARP_LANES && i < (int)threads.size(); i++)
            if (threads[i].waiting && threads[i].kind != BARRIER) try_complete(warp, threads[i].mask);
        if (block_barrier.arrived > 0) {
            check_whole_warp(warp);
            try_open_barrier();
        }
    }
}

static Fiber* fresh_fiber() {
    if (!idle.empty()) {
        Fiber* fiber = idle.back();
        idle.pop_back();
        return fiber;
    }
    char* memory = (char*)mmap(nullptr, STACK + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + PAGE, STACK, PROT_READ | PROT_WRITE) != 0) {
        perror("cuda-on-cpu: stacks of fibers");
        abort();
    }
    Fiber* fiber = new Fiber;
    fibers.emplace_back(fiber);
    fiber->stack = memory + PAGE;
    fiber->top = memory + PAGE + STACK - 192 * (fibers.size() % 64);      // the same cache lines for all would be slow
#if defined(CUDA_TSAN)
    fiber->tsan = __tsan_create_fiber(0);
#endif
    prepare(fiber, work);
    return fiber;
}

// Lanes that wait in a warp function for this one, or that this one will wait for, must be in the same function.
static void check_meeting(Collective kind, unsigned mask, int warp, int lane) {
    int first = warp * WARP_LANES;
    for (int i = 0; i < WARP_LANES && first + i < (int)threads.size(); i++) {
        const Thread& other = threads[first + i];
        bool meets = (mask >> i & 1) || (other.mask >> lane & 1);
        if (!other.waiting || !meets || (other.mask == mask && other.kind == kind)) continue;
        char text[512], with_mask[32] = "";
        describe_warp(warp, text, sizeof text);
        if (kind <= SYNCWARP) snprintf(with_mask, sizeof with_mask, " with mask %08x", mask);
        report("lane %d calls %s%s, but lanes that it %s wait elsewhere%s", lane, collective_names[kind], with_mask,
               kind == BARRIER ? "leaves behind" : "names", text);
    }
}

// Gives the processor to the next thread, until this one is ready and drawn. There is a next one: lanes that wait for
// each other in different places have been reported.
static inline void give_way(int me, char* tag) {
    int next = draw();
    if (next != me) {
        set_current(next);
        Fiber* to = threads[next].fiber;
        if (!to) {
            handed_over = next;
            to = fresh_fiber();
        }
#if defined(CUDA_TSAN)
        __tsan_switch_to_fiber(threads[next].fiber ? threads[next].tsan : to->tsan, 1);
#endif
        switch_to(to);
    }
#if defined(CUDA_TSAN)
    if (tag) __tsan_acquire(tag);
#else
    (void)tag;
#endif
}

uint64_t exchange(Collective kind, unsigned mask, uint64_t value, int lane_asked) {
    int me = current, warp = me / WARP_LANES, lane = me % WARP_LANES;
    Thread& t = threads[me];
    if (!(mask >> lane & 1)) report("lane %d calls a warp function whose mask %08x leaves it out", lane, mask);
    Warp& w = warps[warp];
    bool same = w.uniform && w.kind == kind && w.mask == mask && !w.at_barrier;
    if (w.waiting == 0 && !w.at_barrier) {
        w.uniform = same = true;
        w.kind = kind;
        w.mask = mask;
    }
    if (!same) {
        w.uniform = false;
        check_meeting(kind, mask, warp, lane);
    }
    w.waiting |= 1u << lane;
    t.waiting = true;
    t.kind = kind;
    t.mask = mask;
    t.value = value;
    t.lane_asked = lane_asked;
    t.fiber = current_fiber;
    char* tag = nullptr;
#if defined(CUDA_TSAN)
    tag = &warp_tags[2 * warp + warp_turn[warp]];
    __tsan_release(tag);
#endif
    try_complete(warp, mask);
    give_way(me, tag);
    return t.result;
}

void barrier(const char* file, int line) {
    int me = current, warp = me / WARP_LANES;
    Thread& t = threads[me];
    if (block_barrier.arrived > 0 && (line != block_barrier.line || strcmp(file, block_barrier.file) != 0))
        report("a divergent barrier: this thread calls __syncthreads at %s:%d, others of its block wait in that at "
               "%s:%d", file, line, block_barrier.file, block_barrier.line);
    if (warps[warp].waiting) check_meeting(BARRIER, 0, warp, me % WARP_LANES);
    block_barrier.file = file;
    block_barrier.line = line;
    block_barrier.arrived++;
    warps[warp].at_barrier = true;
    t.waiting = true;
    t.kind = BARRIER;
    t.mask = 0;
    t.fiber = current_fiber;
    check_whole_warp(warp);
    char* tag = nullptr;
#if defined(CUDA_TSAN)
    tag = &block_tags[(int)block_turn];
    __tsan_release(tag);
#endif
    try_open_barrier();
    give_way(me, tag);
}

// ------------------------------------------------------------------------------------------------
// Tensor cores, shared memory, asynchronous copies (tensor_core.h)

unsigned char* shared_memory() { return (unsigned char*)shared.begin; }

Accumulators mma(Accumulators c, Words a, unsigned b0, unsigned b1) {
    MmaOperands operands{c, a, {b0, b1}};
    exchange(MMA, ALL_LANES, (uint64_t)&operands, 0);
    return operands.c;
}

static Copy copy_store[1 << 16], *free_copy;         // not in the heap: TSan would see how threads move and free it

static void check_shared(const char* call, const char* what, const void* p) {
    if ((uintptr_t)p % 16 != 0) report("%s: %s is not aligned to 16 bytes: %s", call, what, describe(p));
    if (!shared.holds(p, 16)) report("%s: %s is not in the block's shared memory: %s", call, what, describe(p));
}

// The row is read now, when the lane comes: another warp may write at any time from here on.
Words ldmatrix(const void* row, bool transposed) {
    Collective kind = transposed ? LDMATRIX_TRANSPOSED : LDMATRIX;
    check_shared(collective_names[kind], "the row", row);
    MatrixRow operands;
    memcpy(operands.row, row, sizeof operands.row);
    for (int i = 0; i < 8; i++)
        if (operands.row[i] == 0xffff)         // no operation gives this NaN
            report("%s reads shared memory that is not initialised, or to which a copy is under way: %s",
                   collective_names[kind], describe((const uint16_t*)row + i));
    exchange(kind, ALL_LANES, (uint64_t)&operands, 0);
    return operands.r;
}

void copy_async(void* to, const void* from, bool there) {
    check_shared("copy_async", "the destination", to);
    if ((uintptr_t)from % 16 != 0) report("copy_async: the source is not aligned to 16 bytes: %s", describe(from));
    if (there) check_range("copy_async", "the source", from, 16, true);
    memset(to, POISON, 16);
    if (!free_copy) report("copy_async: the block has begun more than %zu copies that no thread has waited for",
                           sizeof copy_store / sizeof *copy_store);
    Copy* copy = free_copy;
    free_copy = copy->next;
    Thread& t = threads[current];
    *copy = {to, there ? from : nullptr, t.groups, nullptr};
    (t.first_copy ? t.last_copy->next : t.first_copy) = copy;
    t.last_copy = copy;
}
void copy_commit() { threads[current].groups++; }
// Others may run before the bytes come: they see what a copy overwrites too early, or what they use without a barrier.
void copy_wait(int n) {
    int me = current;
    threads[me].fiber = current_fiber;
    make_ready(me);
    give_way(me, nullptr);
    Thread& t = threads[me];
    while (t.first_copy && t.first_copy->group + n < t.groups) {
        Copy* copy = t.first_copy;
        if (copy->from) memcpy(copy->to, copy->from, 16);
        else memset(copy->to, 0, 16);
        t.first_copy = copy->next;
        copy->next = free_copy;
        free_copy = copy;
    }
}

static void run_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                       const std::function<void()>& thread) {
    running_kernel = name;
    gridDim = grid;
    blockDim = block;
    body = &thread;
    size_t blocks = (size_t)grid.x * grid.y * grid.z;
    int size = (int)(block.x * block.y * block.z);
    static std::vector<uint32_t> order;
    order.resize(blocks);
    for (size_t i = 0; i < blocks; i++) {
        size_t j = random_below((uint32_t)i + 1);
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
#if defined(CUDA_TSAN)
    void* host_tsan = __tsan_get_current_fiber();
    while (tsan_threads.size() < 2 * (size_t)size) tsan_threads.push_back(__tsan_create_fiber(0));
#endif
    a_thread_runs = true;
    for (uint32_t b : order) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        threads.assign((size_t)size, Thread());
        warps.assign((size_t)(size + WARP_LANES - 1) / WARP_LANES, Warp());
        for (int i = 0; i < size; i++) warps[i / WARP_LANES].lanes |= 1u << i % WARP_LANES;
        open_shared(shared_bytes);
        by_warp = shared_bytes > 0 && warps.size() > 1 && random_below(2) == 1;
        if (by_warp) draw_order_of_warps();
        first_ready = 0;
        uint3 index = {0, 0, 0};
        for (int i = 0; i < size; i++) {
            threads[i].index = index;
            if (++index.x == block.x) { index.x = 0; index.y++; }
            if (index.y == block.y) { index.y = 0; index.z++; }
            make_ready(i);
        }
        block_barrier.arrived = 0;
        unfinished = size;
        handed_over = -1;
        Fiber* fiber = fresh_fiber();
#if defined(CUDA_TSAN)
        __tsan_release(&begun);             // also the poison of shared memory
        tsan_shift = random_below((uint32_t)tsan_threads.size());
        __tsan_switch_to_fiber(fiber->tsan, 1);
#endif
        switch_to(fiber);
#if defined(CUDA_TSAN)
        __tsan_switch_to_fiber(host_tsan, 1);
#endif
        a_thread_runs = false;              // not known which one has written where it must not
        close_shared();
        a_thread_runs = true;
    }
#if defined(CUDA_TSAN)
    __tsan_acquire(&ended);
#endif
    a_thread_runs = false;
    check_slack();
    running_kernel = nullptr;
}

// ------------------------------------------------------------------------------------------------
// Streams. Work is queued, and runs when the program waits for it or for work that needs it.

}  // namespace cuda_on_cpu
using namespace cuda_on_cpu;

struct Work {
    std::function<void()> run;
    CUstream_st* after = nullptr;        // an event: waits until that stream has done `until` pieces of work
    uint64_t until = 0;
};
struct CUstream_st {
    std::deque<Work> queue;
    uint64_t queued = 0, completed = 0;
    bool destroyed = false;
};
struct CUevent_st {
    CUstream_st* stream = nullptr;
    uint64_t position = 0;
    bool timing = false, destroyed = false;
    double ms = 0;                       // when the record ran
};
// The first one is the null stream. None is ever deleted, because events name them.
static std::vector<std::unique_ptr<CUstream_st>> streams;
static std::vector<std::unique_ptr<CUevent_st>> events;

static struct Start { Start(); } start;                         // after the vectors above
Start::Start() {
    const char* seed = getenv("CUDA_SEED");
    random_state = 0x9e3779b97f4a7c15 * (2 * (seed ? strtoull(seed, nullptr, 10) : 1) + 1);
    for (int i = 0; i < 10; i++) random_below(2);
    for (Arena* arena : {&device, &pinned}) {
        size_t size = (size_t)1 << 38;
        void* p = MAP_FAILED;
        while (p == MAP_FAILED && size > (size_t)1 << 30) {
            size /= 2;
            p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        }
        if (p == MAP_FAILED) { perror("cuda-on-cpu: address space"); abort(); }
        arena->begin = (char*)p;
        arena->next = arena->begin + GUARD;
        arena->end = arena->begin + size;
    }
    size_t size = (size_t)1 << 30;
    void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { perror("cuda-on-cpu: address space"); abort(); }
    shared.first = shared.begin = shared.end_pages = (char*)p;
    shared.end = shared.first + size;
    static char stack[64 << 10];            // for the handler: a fiber's own stack may be what overflowed
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    for (Copy& copy : copy_store) {
        copy.next = free_copy;
        free_copy = &copy;
    }
    omp_set_num_threads(1);                 // for oneDNN: the products of tests are too small for more
    streams.emplace_back(new CUstream_st);
    fibers.reserve(1025);                   // a fiber must not move them: TSan sees memmove
    idle.reserve(1025);
}

static CUstream_st* check_stream(cudaStream_t stream, const char* call) {
    if (!stream) return streams[0].get();
    for (auto& s : streams)
        if (s.get() == stream) {
            if (s->destroyed) report("%s: the stream has been destroyed", call);
            return stream;
        }
    report("%s: %p is not a stream", call, (void*)stream);
}
static CUevent_st* check_event(cudaEvent_t event, const char* call) {
    for (auto& e : events)
        if (e.get() == event) {
            if (e->destroyed) report("%s: the event has been destroyed", call);
            return event;
        }
    report("%s: %p is not an event", call, (void*)event);
}

static void enqueue(CUstream_st* stream, std::function<void()> run) {
    stream->queue.push_back({std::move(run), nullptr, 0});
    stream->queued++;
}

static bool blocked(const CUstream_st* s) {
    const Work& first = s->queue.front();
    return first.after && first.after->completed < first.until;
}

// Runs work until `stream` has completed `position` pieces, in one of three drawn ways: only what is needed for that
// (other streams are slow), first everything else that may run (other streams are fast), or in any order.
static void run_until(CUstream_st* stream, uint64_t position) {
    if (stream->completed >= position) return;
    locked = false;
    uint32_t manner = random_below(3);
    while (stream->completed < position) {
        CUstream_st* next = stream;
        std::vector<CUstream_st*> others;
        for (auto& s : streams)
            if (!s->queue.empty() && !blocked(s.get()) && (manner == 2 || s.get() != stream)) others.push_back(s.get());
        if (manner > 0 && !others.empty()) next = others[random_below((uint32_t)others.size())];
        while (blocked(next)) next = next->queue.front().after;
        Work work = std::move(next->queue.front());
        next->queue.pop_front();
        if (work.run) work.run();
        next->completed++;
    }
    lock_device();
}
static void run_all() {
    for (size_t i = 0, start = random_below((uint32_t)streams.size()); i < streams.size(); i++) {
        CUstream_st* s = streams[(start + i) % streams.size()].get();
        run_until(s, s->queued);
    }
}

// Bytes of shared memory that launches of a kernel may ask for, where that was set
static std::vector<std::pair<const void*, size_t>> allowed_shared;
static size_t allowed_for(const void* kernel) {
    for (auto& [its, bytes] : allowed_shared) if (its == kernel) return bytes;
    return SHARED_DEFAULT;
}
cudaError_t cuda_on_cpu::allow_shared_memory(const void* kernel, cudaFuncAttribute attribute, int bytes) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || (size_t)bytes > SHARED_MOST)
        report("cudaFuncSetAttribute: %d bytes of shared memory; CUDA allows at most %zu", bytes, SHARED_MOST);
    for (auto& [its, now] : allowed_shared)
        if (its == kernel) { now = (size_t)bytes; return cudaSuccess; }
    allowed_shared.push_back({kernel, (size_t)bytes});
    return cudaSuccess;
}

void cuda_on_cpu::enqueue_launch(const char* name, const void* address, dim3 grid, dim3 block, size_t shared_bytes,
                                 cudaStream_t stream, std::function<void()> thread) {
    unsigned long long threads_of_block = (unsigned long long)block.x * block.y * block.z;
    if (threads_of_block == 0 || threads_of_block > 1024 || block.z > 64)
        report("launch of %s: a block of (%u, %u, %u) threads; CUDA allows 1 to 1024, and 64 in z",
               name, block.x, block.y, block.z);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        report("launch of %s: a grid of (%u, %u, %u) blocks; CUDA allows 1 to 2147483647 in x, 65535 in y and z",
               name, grid.x, grid.y, grid.z);
    if (shared_bytes > allowed_for(address))
        report("launch of %s: %zu bytes of shared memory; CUDA allows %zu, as %s",
               name, shared_bytes, allowed_for(address), allowed_for(address) == SHARED_DEFAULT
               ? "cudaFuncSetAttribute has not set another number" : "cudaFuncSetAttribute has set");
    enqueue(check_stream(stream, "launch"), [=] { run_kernel(name, grid, block, shared_bytes, thread); });
}

void enqueue_gemm(const Gemm& g, cudaStream_t stream) {
    static char call[128];
    snprintf(call, sizeof call, "cublasGemm %d x %d x %d, batch %d", g.m, g.n, g.k, g.batch);
    check_range(call, "A", g.A, extent_A(g), false);
    check_range(call, "B", g.B, extent_B(g), false);
    check_range(call, "C", g.C, extent_C(g), false);
    enqueue(check_stream(stream, "cublasGemm"), [g] {
        running_call = "a matrix product";
        // A thread of oneDNN, whose stack pointer is in the heap, must not fault.
        for (const void* p : {g.A, g.B, (const void*)g.C}) open_allocation(p);
        run_gemm(g);
        running_call = nullptr;
    });
}

static void wait_for(CUstream_st* stream, CUstream_st* other, uint64_t position) {
    stream->queue.push_back({nullptr, other, position});
    stream->queued++;
}

static void check_collectives(const std::vector<NcclCall>& group) {
    for (const NcclCall& c : group) {
        size_t sent = sent_bytes(c), received = received_bytes(c);
        check_range(name_of(c), "sendbuff", c.send, sent, false);
        check_range(name_of(c), "recvbuff", c.receive, received, false);
        ptrdiff_t offset = (char*)c.receive - (char*)c.send;
        if (overlap(c.send, sent, c.receive, received) && offset != in_place_offset(c))
            report("%s: sendbuff and recvbuff overlap, but not as they do in place: recvbuff, %s, is %td bytes after "
                   "sendbuff; in place it would be %td", name_of(c), describe(c.receive), offset, in_place_offset(c));
        for (const NcclCall& other : group) {
            if (&other == &c) continue;
            if (overlap(c.receive, received, other.receive, received_bytes(other))
                || overlap(c.receive, received, other.send, sent_bytes(other)))
                report("%s writes what %s of the same group reads or writes: %s",
                       name_of(c), name_of(other), describe(c.receive));
        }
    }
}

// Two ranks that run their collectives in different orders wait for each other, so all run in the order of the calls.
static CUstream_st* last_collective = nullptr;
static uint64_t last_position = 0;

void enqueue_collectives(const std::vector<NcclCall>& group) {
    check_collectives(group);
    std::vector<CUstream_st*> used;         // by the group, which waits for all of them and for which all of them wait
    for (const NcclCall& c : group) {
        CUstream_st* s = check_stream(c.stream, name_of(c));
        if (std::find(used.begin(), used.end(), s) == used.end()) used.push_back(s);
    }
    CUstream_st* stream = used[0];
    for (CUstream_st* s : used) if (s != stream) wait_for(stream, s, s->queued);
    if (last_collective && last_collective != stream) wait_for(stream, last_collective, last_position);
    enqueue(stream, [group] {
        running_call = "a group of NCCL calls";
        // With MPI the system copies between processes, which does not open an allocation by a fault.
        for (const NcclCall& c : group) for (const void* p : {c.send, (const void*)c.receive}) open_allocation(p);
        run_collectives(group);
        running_call = nullptr;
    });
    last_collective = stream;
    last_position = stream->queued;
    for (CUstream_st* s : used) if (s != stream) wait_for(s, stream, last_position);
}
void finish_collectives() { if (last_collective) run_until(last_collective, last_position); }

// ------------------------------------------------------------------------------------------------
// The API

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(device, pointer, bytes); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pinned, pointer, bytes); }
cudaError_t cudaFree(void* pointer) {
    run_all();
    release(device, pointer, "cudaFree");
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
    run_all();
    release(pinned, pointer, "cudaFreeHost");
    return cudaSuccess;
}

static void check_copy(const char* call, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_device) check_range(call, "the destination", to, bytes, false);
    else check_host_range(call, "the destination", to, bytes);
    if (from_device) check_range(call, "the source", from, bytes, false);
    else check_host_range(call, "the source", from, bytes);
}
static void enqueue_copy(CUstream_st* stream, void* to, const void* from, size_t bytes) {
    enqueue(stream, [=] {
        running_call = "a copy";
        if (bytes > 0) memmove(to, from, bytes);        // C forbids null pointers even for 0 bytes
        running_call = nullptr;
    });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    check_copy("cudaMemcpy", to, from, bytes, kind);
    CUstream_st* stream = streams[0].get();
    enqueue_copy(stream, to, from, bytes);
    if (kind != cudaMemcpyDeviceToDevice) run_until(stream, stream->queued);
    return cudaSuccess;
}
// CUDA does not promise when it reads or writes ordinary host memory: here it is as late as for pinned memory.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    check_copy("cudaMemcpyAsync", to, from, bytes, kind);
    enqueue_copy(check_stream(stream, "cudaMemcpyAsync"), to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
    check_range("cudaMemset", "the destination", to, bytes, false);
    enqueue(check_stream(stream, "cudaMemset"), [=] {
        running_call = "cudaMemset";
        if (bytes > 0) memset(to, byte, bytes);
        running_call = nullptr;
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int byte, size_t bytes) { return cudaMemsetAsync(to, byte, bytes, nullptr); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    if (flags != cudaStreamNonBlocking) report("cudaStreamCreateWithFlags: only cudaStreamNonBlocking is supported");
    streams.emplace_back(new CUstream_st);
    *stream = streams.back().get();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    CUstream_st* s = check_stream(stream, "cudaStreamDestroy");
    run_until(s, s->queued);
    s->destroyed = true;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    CUstream_st* s = check_stream(stream, "cudaStreamSynchronize");
    run_until(s, s->queued);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    run_all();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    if (flags != cudaEventDisableTiming && flags != cudaEventDefault)
        report("cudaEventCreateWithFlags: only cudaEventDefault and cudaEventDisableTiming are supported");
    events.emplace_back(new CUevent_st);
    events.back()->timing = flags == cudaEventDefault;
    *event = events.back().get();
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    check_event(event, "cudaEventDestroy")->destroyed = true;
    return cudaSuccess;
}
static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    CUevent_st* e = check_event(event, "cudaEventRecord");
    e->stream = check_stream(stream, "cudaEventRecord");
    if (e->timing) enqueue(e->stream, [e] { e->ms = now_ms(); });
    e->position = e->stream->queued;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    CUevent_st* e = check_event(event, "cudaEventSynchronize");
    if (!e->stream) report("cudaEventSynchronize: the event was never recorded, so that this waits for nothing");
    run_until(e->stream, e->position);
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    CUstream_st* s = check_stream(stream, "cudaStreamWaitEvent");
    CUevent_st* e = check_event(event, "cudaStreamWaitEvent");
    if (!e->stream) report("cudaStreamWaitEvent: the event was never recorded, so that this waits for nothing");
    wait_for(s, e->stream, e->position);
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    CUevent_st* both[] = {check_event(start, "cudaEventElapsedTime"), check_event(end, "cudaEventElapsedTime")};
    for (CUevent_st* e : both) if (!e->timing || !e->stream) return cudaErrorInvalidResourceHandle;
    for (CUevent_st* e : both) if (e->stream->completed < e->position) return cudaErrorNotReady;
    *ms = (float)(both[1]->ms - both[0]->ms);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }       // what would be an error here has been reported
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
int nvtxRangePushA(const char*) { return 0; }
int nvtxRangePop() { return 0; }
