// The scheduler behind host_cuda.h: fibers, rendezvous, shared memory, and the few calls of cudart that the launchers make.
#include "host_cuda.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <deque>
#include <map>
#include <unordered_set>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_cuda {

Settings settings;
Executor executor;
Counters counters;

namespace {

constexpr size_t STACK = SANITIZED ? 256 << 10 : 64 << 10;
constexpr unsigned MAX_THREADS = 1024;

enum class State { ready, in_barrier, in_warp, done };

struct Context {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;
};

struct Fiber : Context {
    State state = State::ready;
    Collective what = Collective::none;
    unsigned mask = 0;
    uint64_t value = 0;
    int source = 0;
    std::deque<std::vector<std::pair<void*, const void*>>> copies = {{}};  // groups; the last is open
};

Fiber fibers[MAX_THREADS];
Context outside;
char* stacks = nullptr;
unsigned n_threads = 0, current = 0, in_barrier = 0, finished = 0;
std::vector<unsigned> ready;
std::string problem;
const std::function<void()>* body = nullptr;
uint64_t random_state = 0, priority[MAX_THREADS];
std::map<const void*, std::pair<void*, size_t>> variables;
char* dynamic_memory = nullptr;
size_t dynamic_bytes = 0;
std::map<uintptr_t, uintptr_t> allowed;  // begin -> end
std::unordered_set<uintptr_t> loaded, stored;

uint64_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

#ifdef __x86_64__
// Saves the registers that a call preserves, changes the stack, restores them.
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
    .text
    .globl host_cuda_switch
    .type host_cuda_switch, @function
host_cuda_switch:
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
    .size host_cuda_switch, . - host_cuda_switch
)");
#endif

char* stack_of(unsigned i) { return stacks + size_t(i) * STACK; }

#if SANITIZED
const void* outside_stack = nullptr;
size_t outside_size = 0;
bool from_outside = false;  // what the switch in progress left

void arrived(void* fake_stack) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
    if (from_outside) outside_stack = stack, outside_size = size;
}
#endif

// into == nullptr: back to run().
void switch_to(Context& from, Fiber* into, bool for_good) {
    Context& to = into == nullptr ? outside : *into;
    if (into != nullptr) {
        current = unsigned(into - fibers);
        threadIdx = {current, 0, 0};
    }
#if SANITIZED
    from_outside = &from == &outside;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, into ? stack_of(current) : outside_stack,
                                   into ? STACK : outside_size);
#else
    (void)for_good;
#endif
#ifdef __x86_64__
    host_cuda_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if SANITIZED
    arrived(from.fake_stack);
#endif
}

// Odd seeds: any of those that can run. Even ones: always the same order of warps, and of lanes, so that one warp goes as far
// as it can while another stands still.
size_t choose() {
    if (settings.seed == 0) return 0;
    if (settings.seed % 2 == 1) return draw() % ready.size();
    size_t first = 0;
    for (size_t i = 1; i < ready.size(); ++i)
        if (priority[ready[i]] > priority[ready[first]]) first = i;
    return first;
}

Fiber* next() {
    if (ready.empty() || !problem.empty()) return nullptr;
    const size_t i = choose();
    const unsigned thread = ready[i];
    if (settings.seed == 0) {
        ready.erase(ready.begin());
    } else {
        ready[i] = ready.back();
        ready.pop_back();
    }
    return &fibers[thread];
}

void wait() {
    Fiber& self = fibers[current];
    switch_to(self, next(), false);
}

void wake(unsigned thread) {
    fibers[thread].state = State::ready;
    ready.push_back(thread);
}

std::string name_of(unsigned thread) { return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x); }

[[noreturn]] void fail(const std::string& what) {
    if (problem.empty()) problem = name_of(current) + ": " + what;
    switch_to(fibers[current], nullptr, true);
    abort();
}

// Not in start(), whose frame is never left: its variables would stay poisoned for the next fiber on that stack.
__attribute__((noinline)) void check_copies() {
    for (const auto& group : fibers[current].copies)
        if (!group.empty()) fail("returns with copies to shared memory that it did not wait for");
}

void start() {
#if SANITIZED
    arrived(nullptr);
#endif
    (*body)();
    check_copies();
    fibers[current].state = State::done;
    ++finished;
    switch_to(fibers[current], next(), true);
    abort();
}

void draw_priorities() {
    uint64_t warp = 0;
    for (unsigned i = 0; i < n_threads; ++i) {
        if (i % 32 == 0) warp = draw() >> 32 << 32;
        priority[i] = warp | draw() >> 32;
    }
}

void prepare(unsigned i) {
    fibers[i] = Fiber();
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack_of(i) + STACK);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&start);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    fibers[i].stack_pointer = top;
#else
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stack_of(i);
    fibers[i].context.uc_stack.ss_size = STACK;
    makecontext(&fibers[i].context, &start, 0);
#endif
}

void run_block() {
    ready.clear();
    in_barrier = finished = 0;
    draw_priorities();
    for (unsigned i = 0; i < n_threads; ++i) {
        prepare(i);
        ready.push_back(i);
    }
    while (Fiber* fiber = next()) switch_to(outside, fiber, false);
    if (problem.empty() && finished < n_threads) {
        problem = "deadlock in block " + std::to_string(blockIdx.x) + ":";
        const char* const names[] = {"", " in a shuffle", " in a ballot", " in __syncwarp"};
        unsigned told = 0;
        for (unsigned i = 0; i < n_threads && told < 4; ++i) {
            if (fibers[i].state == State::done) continue;
            ++told;
            problem += " thread " + std::to_string(i) + " waits" +
                       (fibers[i].state == State::in_barrier ? " in __syncthreads" : names[int(fibers[i].what)]) + ";";
        }
        problem += " " + std::to_string(finished) + " of " + std::to_string(n_threads) + " threads have returned";
    }
    for (auto& [key, variable] : variables) free(variable.first);
    variables.clear();
}

}  // namespace

std::string run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, size_t dynamic_shared) {
    if (threads == 0 || threads > MAX_THREADS || blocks == 0 || dynamic_shared > size_t(settings.shared_memory))
        return "invalid launch configuration";
    if (stacks == nullptr)
        stacks = static_cast<char*>(
            mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    problem.clear();
    body = &kernel;
    n_threads = threads;
    blockDim = dim3(threads);
    gridDim = dim3(blocks);
    random_state = settings.seed * 0x9e3779b97f4a7c15u + 1;
    ++counters.launches;
    for (unsigned b = 0; b < blocks && problem.empty(); ++b) {
        blockIdx = {b, 0, 0};
        ++counters.blocks;
        dynamic_bytes = dynamic_shared;
        if (dynamic_shared > 0) memset(dynamic_memory = static_cast<char*>(malloc(dynamic_shared)), 0xff, dynamic_shared);
        run_block();
        free(dynamic_memory);
        dynamic_memory = nullptr;
    }
    counters.sectors_loaded += int64_t(loaded.size());
    counters.sectors_stored += int64_t(stored.size());
    loaded.clear();
    stored.clear();
    return problem;
}

int lane() { return int(current % 32); }

void barrier() {
    fibers[current].state = State::in_barrier;
    if (++in_barrier < n_threads) return wait();
    in_barrier = 0;
    for (unsigned i = 0; i < n_threads; ++i)
        if (i != current) wake(i);
    fibers[current].state = State::ready;
}

uint64_t rendezvous(Collective what, unsigned mask, uint64_t value, int source) {
    Fiber& self = fibers[current];
    const unsigned first = current / 32 * 32;
    if (!(mask >> lane() & 1)) fail("calls a collective whose mask does not name it");
    if (!(mask >> source & 1)) fail("reads from lane " + std::to_string(source) + ", which the mask does not name");
    self.what = what;
    self.mask = mask;
    self.value = value;
    self.source = source;
    self.state = State::in_warp;
    bool complete = true;
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        if (first + i >= n_threads || fibers[first + i].state == State::done)
            fail("waits in a collective for lane " + std::to_string(i) + ", which has returned or does not exist");
        const Fiber& other = fibers[first + i];
        if (other.state != State::in_warp)
            complete = false;
        else if (other.what != what || other.mask != mask)
            fail("and lane " + std::to_string(i) + " wait in different collectives, or with different masks");
    }
    if (!complete) {
        wait();
        return self.value;
    }
    uint64_t results[32] = {}, ballot = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1) ballot |= (fibers[first + i].value & 1) << i;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1)
            results[i] = what == Collective::ballot ? ballot : fibers[first + fibers[first + i].source].value;
    for (unsigned i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        fibers[first + i].value = results[i];
        if (first + i != current) wake(first + i);
    }
    self.state = State::ready;
    return self.value;
}

void* shared(const void* key, size_t bytes) {
    auto& variable = variables[key];
    if (variable.first == nullptr) {
        variable = {malloc(bytes), bytes};
        memset(variable.first, 0xff, bytes);
    }
    return variable.first;
}

void* dynamic_shared() { return dynamic_memory; }

void allow(const void* begin, int64_t bytes) {
    uintptr_t& end = allowed[reinterpret_cast<uintptr_t>(begin)];
    end = std::max(end, reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes));
}
void allow_everything() { allowed.clear(); }

void touch(const void* p, int bytes, bool store) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p), held = reinterpret_cast<uintptr_t>(dynamic_memory);
    if (at % unsigned(bytes) != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes");
    if (dynamic_memory != nullptr && held <= at && at + unsigned(bytes) <= held + dynamic_bytes) return;
    if (!allowed.empty()) {
        auto i = allowed.upper_bound(at);
        bool inside = false;
        while (i != allowed.begin() && !inside) inside = at + unsigned(bytes) <= (--i)->second;
        if (!inside) fail(std::string(store ? "writes" : "reads") + " outside of the memory it was given");
    }
    if (!settings.count) return;
    (store ? counters.stored : counters.loaded) += bytes;
    for (uintptr_t sector = at / 32; sector <= (at + unsigned(bytes) - 1) / 32; ++sector) (store ? stored : loaded).insert(sector);
}

void copy_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("misaligned copy to shared memory");
    fibers[current].copies.back().push_back({to, from});
}

void commit_copies() { fibers[current].copies.emplace_back(); }

void wait_for_copies(size_t groups_left) {
    auto& copies = fibers[current].copies;
    for (; copies.size() > groups_left + 1; copies.pop_front())
        for (const auto& [to, from] : copies.front()) memcpy(to, from, 16);
}

}  // namespace host_cuda

// ---- cudart ------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? host_cuda::settings.processors
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? host_cuda::settings.shared_memory : 0;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    return bytes <= host_cuda::settings.shared_memory ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
