// Runs a CUDA launch on one CPU core: blocks one after another, each CUDA thread as a fiber that runs until it has to
// wait for others. Whatever goes wrong ends the launch with a report that names block, thread, file and line.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#pragma GCC push_options
#pragma GCC optimize("O1", "no-omit-frame-pointer")  // kernels stay at -O0

struct uint3 {
    unsigned int x, y, z;
};
struct dim3 : uint3 {
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : uint3{x, y, z} {}
};

// Plain variables, set at each switch of fibers, so that a debugger's conditions can name them.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

// What `extern __shared__` arrays name: all of them the same memory. The loader sets its size where there are any.
#ifndef CPU_CUDA_DYNAMIC_BYTES
#define CPU_CUDA_DYNAMIC_BYTES 1
#endif
extern "C" {
[[gnu::visibility("hidden")]] alignas(128) thread_local unsigned char cpu_cuda_dynamic[CPU_CUDA_DYNAMIC_BYTES];
[[gnu::visibility("hidden")]] extern thread_local unsigned char cpu_cuda_beyond[4096];
}
// Room behind all shared memory, so that a write past its end is found before it does harm: .tcommon is linked last.
asm(R"(
.pushsection .tcommon, "awT", @nobits
.hidden cpu_cuda_beyond
.globl cpu_cuda_beyond
.balign 16
cpu_cuda_beyond:
    .zero 4096
.popsection
)");

namespace cpu_cuda {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCopies = 1 << 15;  // under way in a block: of 16 bytes, more than shared memory holds
constexpr unsigned char kPoison = 0xA5;
constexpr size_t kReportBytes = 1024;
constexpr int kDepth = 12;

// What the loader hands over, and gets back. Mirrored, field by field, by compiler.py.
struct Launch {
    unsigned int grid[3], block[3];
    int threads_reversed, blocks_reversed, warps_alternate;
    int seconds;  // of CPU time, before the launch counts as hung; 0 for any
    int argument_count;
    void* const* arguments;
    const size_t* argument_bytes;
    size_t shared_bytes;
    char* stacks;  // kMaxThreads stacks, each with an inaccessible page at its low end
    size_t stack_bytes;
    // Results; all zero if the launch went well. A signal comes with what was touched, and by whom.
    int signal, writes;
    char* address;
    size_t calls[kDepth];  // innermost first, as offsets in this library
    char report[kReportBytes];
};

// Where a thread waits.
struct Place {
    const char* call;
    const char* file;
    int line;
};

enum class State { kReady, kAtBarrier, kInWarp, kEnded };

// An asynchronous copy that has not been waited for.
struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;  // copied, and written behind them
    int group;
    Copy* next;
};

struct Fiber {
    void* stack_pointer;
    uint3 thread;
    State state;
    Place place;
    unsigned int mask;  // of the lanes that it waits for
    void* visit;        // what it brings there
    Copy *oldest_copy, *newest_copy;
    int copy_groups;  // that it has ended
};

static Launch* launch;
static Fiber fibers[kMaxThreads];
static unsigned int ready[kMaxThreads / kLanes], in_warp[kMaxThreads / kLanes];  // lanes that can run, that wait
static int threads, current;
static bool failed;
static void* scheduler;  // its stack pointer
static void (*body)();

// Switching -----------------------------------------------------------------------------------------------------------
#if defined(__x86_64__) && !defined(CPU_CUDA_UCONTEXT)
// Saves the registers that a call must keep, and swaps stack pointers: about 50 times as fast as swapcontext.
extern "C" void cpu_cuda_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden cpu_cuda_switch
.globl cpu_cuda_switch
cpu_cuda_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.popsection
)");
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + launch->stack_bytes);
    *--top = nullptr;  // the return address of `entry`: here backtraces end
    *--top = reinterpret_cast<void*>(entry);
    *--top = nullptr;  // %rbp: here chains of frames end
    fiber.stack_pointer = top - 5;
}
inline void to_fiber() { cpu_cuda_switch(&scheduler, fibers[current].stack_pointer); }
inline void to_scheduler() { cpu_cuda_switch(&fibers[current].stack_pointer, scheduler); }
#else
static ucontext_t contexts[kMaxThreads], scheduler_context;
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    ucontext_t& context = contexts[&fiber - fibers];
    getcontext(&context);
    context.uc_stack = {stack, 0, launch->stack_bytes};
    makecontext(&context, entry, 0);
}
inline void to_fiber() { swapcontext(&scheduler_context, &contexts[current]); }
inline void to_scheduler() { swapcontext(&contexts[current], &scheduler_context); }
#endif

// Reports -------------------------------------------------------------------------------------------------------------
inline void report(const Fiber& fiber, const char* format, ...) {
    char *out = launch->report, *const end = out + kReportBytes;
    const uint3 b = blockIdx, t = fiber.thread;
    out += snprintf(out, end - out, "block (%u,%u,%u) thread (%u,%u,%u) ", b.x, b.y, b.z, t.x, t.y, t.z);
    const Place& p = fiber.place;
    if (p.call) out += snprintf(out, end - out - 200, "%.600s:%d: %s: ", p.file, p.line, p.call);
    va_list values;
    va_start(values, format);
    vsnprintf(out, end - out, format, values);
    va_end(values);
    failed = true;
}

// Ends the launch from within a fiber, which is never resumed.
template <typename... Values>
[[noreturn]] void fail(const Place& place, const char* format, Values... values) {
    fibers[current].place = place;
    report(fibers[current], format, values...);
    to_scheduler();
    __builtin_unreachable();
}

void run_block();

inline void on_signal(int signal, siginfo_t* info, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    const auto& registers = machine.gregs;
    size_t code = registers[REG_RIP], frame = registers[REG_RBP], top = registers[REG_RSP];
    const int writes = registers[REG_ERR] >> 1 & 1;
#elif defined(__aarch64__)
    size_t code = machine.pc, frame = machine.regs[29], top = machine.sp;
    const int writes = -1;  // not told
#endif
    const auto stack = reinterpret_cast<size_t>(launch->stacks + current * launch->stack_bytes);
    if (top < stack || top >= stack + launch->stack_bytes) {  // no kernel was running in this thread
        if (signal != SIGVTALRM) ::signal(signal, SIG_DFL);   // the watchdog comes again, any other is a crash
        return;
    }
    Dl_info library;
    dladdr(reinterpret_cast<void*>(run_block), &library);
    for (int i = 0; i < kDepth; ++i) {
        launch->calls[i] = code - reinterpret_cast<size_t>(library.dli_fbase);
        if (frame % sizeof(size_t) || frame < stack || frame >= stack + launch->stack_bytes - 2 * sizeof(size_t)) break;
        code = reinterpret_cast<size_t*>(frame)[1] - 1;  // within the call
        frame = reinterpret_cast<size_t*>(frame)[0];
    }
    launch->signal = signal;
    launch->writes = writes;
    launch->address = static_cast<char*>(info->si_addr);
    fibers[current].place = {};
    report(fibers[current], "%s", "");
    to_scheduler();
}

// Waiting -------------------------------------------------------------------------------------------------------------
inline void wake(int index) {
    fibers[index].state = State::kReady;
    ready[index / kLanes] |= 1u << index % kLanes;
}

inline void wait(State state, const Place& place, unsigned int mask = 0) {
    fibers[current].state = state;
    fibers[current].place = place;
    fibers[current].mask = mask;
    to_scheduler();
}

inline bool same(const Place& a, const Place& b) {
    return a.line == b.line && strcmp(a.call, b.call) == 0 && strcmp(a.file, b.file) == 0;
}

static int arrived, votes, counted;

// All threads of the block meet; returns in how many of them `vote` is true.
inline int barrier(const Place& place, bool vote) {
    static int first;
    if (arrived == 0) first = current;
    const Fiber& leader = fibers[first];
    if (arrived > 0 && !same(leader.place, place)) {
        fail(place, "thread (%u,%u,%u) waits for the same barrier at %s:%d, in %s", leader.thread.x, leader.thread.y,
             leader.thread.z, leader.place.file, leader.place.line, leader.place.call);
    }
    votes += vote;
    if (++arrived < threads) {
        wait(State::kAtBarrier, place);
        return counted;
    }
    counted = votes;
    arrived = votes = 0;
    for (int i = 0; i < threads; ++i) wake(i);
    to_scheduler();
    return counted;
}

// All lanes in `mask` meet, each with a value; lane l gets its own pick(l, at), where at(k) is the value of lane k.
template <typename T, typename Pick>
T meet(const Place& place, unsigned int mask, T value, Pick pick) {
    struct Visit {
        T value, result;
        Pick pick;
    } visit{value, value, pick};
    const int lane = current % kLanes, first = current - lane;
    const int lanes = threads - first < kLanes ? threads - first : kLanes;
    if (!(mask >> lane & 1)) fail(place, "the mask %#x leaves out the calling lane %d", mask, lane);
    if (lanes < kLanes && mask >> lanes) fail(place, "the mask %#x names lanes beyond a warp of %d", mask, lanes);
    fibers[current].visit = &visit;
    unsigned int& waiting = in_warp[current / kLanes];
    waiting |= 1u << lane;
    if ((waiting & mask) != mask) {
        wait(State::kInWarp, place, mask);
        return visit.result;
    }
    for (int k = 0; k < lanes; ++k) {
        const Fiber& other = fibers[first + k];
        if (k == lane || !(mask >> k & 1) || (other.mask == mask && same(other.place, place))) continue;
        fail(place, "with mask %#x, but its lane %d waits in %s with mask %#x at %s:%d", mask, k, other.place.call,
             other.mask, other.place.file, other.place.line);
    }
    waiting &= ~mask;
    const auto at = [=](int k) {
        T found;
        memset(&found, kPoison, sizeof(T));  // what a lane outside of the mask holds is undefined
        return mask >> k & 1 ? static_cast<Visit*>(fibers[first + k].visit)->value : found;
    };
    for (int k = 0; k < lanes; ++k) {
        if (!(mask >> k & 1)) continue;
        Visit& other = *static_cast<Visit*>(fibers[first + k].visit);
        other.result = other.pick(k, at);
        wake(first + k);
    }
    to_scheduler();
    return visit.result;
}

inline void report_deadlock() {
    for (int i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == State::kEnded) continue;
        for (int k = 0; k < threads; ++k) {
            const Fiber& other = fibers[k];
            const bool named = k / kLanes == i / kLanes && fiber.mask >> k % kLanes & 1;
            if ((fiber.state == State::kInWarp && !named) || other.state == fiber.state) continue;
            const uint3 t = other.thread;
            if (other.state == State::kEnded) {
                report(fiber, "deadlock: thread (%u,%u,%u) has ended", t.x, t.y, t.z);
            } else {
                report(fiber, "deadlock: thread (%u,%u,%u) waits in %s at %s:%d", t.x, t.y, t.z, other.place.call,
                       other.place.file, other.place.line);
            }
            return;
        }
    }
}

// Asynchronous copies ---------------------------------------------------------------------------------------------------
// As late as a GPU may be: none is done before its own thread waits for it, so that a missing wait always shows.
static Copy copies[kMaxCopies], *free_copies;
static int used_copies;

inline void start_copy(const Place& place, void* to, const void* from, size_t bytes, size_t zeros) {
    const size_t addresses = reinterpret_cast<size_t>(to) | (bytes > 0 ? reinterpret_cast<size_t>(from) : 0);
    if (addresses % (bytes + zeros)) fail(place, "an address is no multiple of %zu bytes", bytes + zeros);
    for (size_t i = 0; i < bytes; ++i) {  // what faults, faults here
        static_cast<void>(static_cast<const volatile unsigned char*>(from)[i]);
    }
    if (free_copies == nullptr && used_copies == kMaxCopies) fail(place, "more than %d copies are under way", kMaxCopies);
    Copy* const copy = free_copies != nullptr ? free_copies : &copies[used_copies++];
    if (copy == free_copies) free_copies = copy->next;
    Fiber& fiber = fibers[current];
    *copy = {to, from, bytes, zeros, fiber.copy_groups, nullptr};
    (fiber.oldest_copy != nullptr ? fiber.newest_copy->next : fiber.oldest_copy) = copy;
    fiber.newest_copy = copy;
}

inline void end_copy_group() { ++fibers[current].copy_groups; }

// Does all copies of the calling thread but those of the `pending` groups that it ended last, and of the one it is at.
inline void finish_copies(int pending) {
    Fiber& fiber = fibers[current];
    while (fiber.oldest_copy != nullptr && fiber.oldest_copy->group < fiber.copy_groups - pending) {
        Copy* const copy = fiber.oldest_copy;
        memcpy(copy->to, copy->from, copy->bytes);
        memset(static_cast<char*>(copy->to) + copy->bytes, 0, copy->zeros);
        fiber.oldest_copy = copy->next;
        copy->next = free_copies;
        free_copies = copy;
    }
}

// Running -------------------------------------------------------------------------------------------------------------
inline void fiber_main() {
    body();
    fibers[current].state = State::kEnded;
    to_scheduler();
    __builtin_unreachable();
}

// A warp runs ahead of the others for as long as it can, or they take turns: what shows a missing barrier differs.
inline void run_block() {
    arrived = votes = 0;
    memset(in_warp, 0, sizeof(in_warp));
    free_copies = nullptr;
    used_copies = 0;
    for (int i = 0; i < threads; ++i) {
        fibers[i].oldest_copy = nullptr;
        fibers[i].copy_groups = 0;
        const unsigned int line = i / blockDim.x;
        fibers[i].thread = {i % blockDim.x, line % blockDim.y, line / blockDim.y};
        fibers[i].place = {};
        prepare(fibers[i], launch->stacks + i * launch->stack_bytes, fiber_main);
        wake(i);
    }
    const int warps = (threads + kLanes - 1) / kLanes;
    for (int turn = 0, idle = 0; idle < warps && !failed; turn = (turn + 1) % warps) {
        const int warp = launch->threads_reversed ? warps - 1 - turn : turn;
        if (ready[warp] == 0) {
            ++idle;
            continue;
        }
        const int lane = launch->threads_reversed ? 31 - __builtin_clz(ready[warp]) : __builtin_ctz(ready[warp]);
        ready[warp] &= ~(1u << lane);
        current = warp * kLanes + lane;
        threadIdx = fibers[current].thread;
        to_fiber();
        idle = 0;
        if (!launch->warps_alternate) turn = -1;
    }
    if (!failed) report_deadlock();
}

// __shared__ variables are thread_local ones, and nothing else of this library is: its TLS segment is shared memory.
struct Segment {
    unsigned char* begin;
    size_t bytes;
};
inline int find_segment(dl_phdr_info* library, size_t, void* found) {
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto& header = library->dlpi_phdr[i];
        const auto begin = static_cast<unsigned char*>(library->dlpi_tls_data);
        if (header.p_type == PT_TLS && begin <= cpu_cuda_dynamic && cpu_cuda_dynamic < begin + header.p_memsz) {
            *static_cast<Segment*>(found) = {begin, header.p_memsz};
        }
    }
    return 0;
}

inline void run_blocks() {
    cpu_cuda_dynamic[0] = 0;  // before its first use, a TLS segment has no place
    Segment shared{};
    dl_iterate_phdr(find_segment, &shared);
    const size_t blocks = size_t{gridDim.x} * gridDim.y * gridDim.z;
    for (size_t turn = 0; turn < blocks && !failed; ++turn) {
        const size_t block = launch->blocks_reversed ? blocks - 1 - turn : turn;
        const size_t line = block / gridDim.x;
        blockIdx = {unsigned(block % gridDim.x), unsigned(line % gridDim.y), unsigned(line / gridDim.y)};
        memset(shared.begin, kPoison, shared.bytes);
        run_block();
        for (size_t i = launch->shared_bytes; i < CPU_CUDA_DYNAMIC_BYTES && !failed; ++i) {
            if (cpu_cuda_dynamic[i] == kPoison) continue;
            fibers[0].place = {};
            report(fibers[0], "or another wrote byte %zu of %zu of dynamic shared memory", i, launch->shared_bytes);
        }
        for (size_t i = 0; i < sizeof(cpu_cuda_beyond) && !failed; ++i) {
            if (cpu_cuda_beyond[i] == kPoison) continue;
            fibers[0].place = {};
            report(fibers[0], "or another wrote %zu bytes past the end of shared memory", i);
        }
    }
}

template <typename... Parameters, size_t... k>
void call(void (*kernel)(Parameters...), std::index_sequence<k...>) {
    kernel(*static_cast<Parameters*>(launch->arguments[k])...);
}

inline bool accepts(int bound, int parameters, const size_t* parameter_bytes) {
    const auto refuse = [](const char* what, long long got, long long wanted) {
        snprintf(launch->report, kReportBytes, "launch: %s: got %lld, the kernel takes %lld", what, got, wanted);
        return false;
    };
    if (launch->argument_count != parameters) return refuse("number of arguments", launch->argument_count, parameters);
    for (int i = 0; i < parameters; ++i) {
        if (launch->argument_bytes[i] != parameter_bytes[i]) {
            return refuse("bytes of an argument", launch->argument_bytes[i], parameter_bytes[i]);
        }
    }
    constexpr unsigned int kGridLimits[] = {0x7fffffff, 0xffff, 0xffff}, kBlockLimits[] = {1024, 1024, 64};
    long long count = 1;
    for (int i = 0; i < 3; ++i) {
        const unsigned int grid = launch->grid[i], block = launch->block[i];
        if (grid < 1 || grid > kGridLimits[i]) return refuse("CTAs along an axis of the grid", grid, kGridLimits[i]);
        if (block < 1 || block > kBlockLimits[i]) return refuse("threads along an axis", block, kBlockLimits[i]);
        count *= block;
    }
    return count <= bound || refuse("threads of a CTA", count, bound);
}

// Runs `kernel`, of which no CTA may have more than `bound` threads.
template <typename... Parameters>
void run(void (*kernel)(Parameters...), int bound, Launch* request) {
    launch = request;
    constexpr size_t kBytes[] = {sizeof(Parameters)..., 0};
    if (!accepts(bound, sizeof...(Parameters), kBytes)) return;
    static void (*chosen)(Parameters...);
    chosen = kernel;
    body = [] { call(chosen, std::index_sequence_for<Parameters...>()); };
    gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
    blockDim = {launch->block[0], launch->block[1], launch->block[2]};
    threads = blockDim.x * blockDim.y * blockDim.z;
    failed = false;

    constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGVTALRM};
    struct sigaction action{}, earlier[6];
    alignas(16) static char signal_stack[1 << 16];
    const stack_t own{signal_stack, 0, sizeof(signal_stack)};
    stack_t previous;
    sigaltstack(&own, &previous);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 6; ++i) sigaction(kSignals[i], &action, &earlier[i]);
    const itimerval limit{{0, 10000}, {launch->seconds, 0}}, off{};
    setitimer(ITIMER_VIRTUAL, launch->seconds ? &limit : &off, nullptr);
    run_blocks();
    setitimer(ITIMER_VIRTUAL, &off, nullptr);
    for (int i = 0; i < 6; ++i) sigaction(kSignals[i], &earlier[i], nullptr);
    sigaltstack(&previous, nullptr);
}

}  // namespace cpu_cuda

#pragma GCC pop_options
