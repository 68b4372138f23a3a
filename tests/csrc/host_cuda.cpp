// The scheduler behind host_cuda.h: fibers, rendezvous, shared memory. host_memory.cpp has global memory and the calls of cudart.
#include "host_cuda.h"

#include "host_fibers.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <deque>
#include <map>

namespace host_cuda {

Settings settings;
Executor executor;

namespace {

constexpr size_t STACK = SANITIZED ? 256 << 10 : 64 << 10;
constexpr unsigned MAX_THREADS = 1024, MAX_CLUSTER = 8, MAX_FIBERS = 2048;

enum class State { ready, in_barrier, in_warp, in_cluster, done };

struct Fiber : Context {
    State state = State::ready;
    Collective what = Collective::none;
    unsigned mask = 0;
    uint64_t value = 0;
    int source = 0;
    std::deque<std::vector<std::pair<void*, const void*>>> copies = {{}};  // groups; the last is open
    bool has_arrived = false;  // in the cluster, and did not wait yet
    int64_t arrived_in = 0;    // which meeting of the cluster
};

// Of the blocks that run at the same time: one, or those of a cluster.
struct Block {
    unsigned in_barrier = 0, finished = 0;
    std::map<const void*, std::pair<void*, size_t>> variables;
    char* dynamic_memory = nullptr;
};

Fiber fibers[MAX_FIBERS];  // block after block
Block cluster[MAX_CLUSTER];
Context outside;
char* stacks = nullptr;
unsigned n_threads = 0, n_blocks = 0, first_block = 0, current = 0, arrived_threads = 0;
int64_t meetings = 0;  // of the cluster
std::vector<unsigned> ready;
std::string problem;
const std::function<void()>* body = nullptr;
uint64_t random_state = 0, priority[MAX_FIBERS];
size_t dynamic_bytes = 0;

unsigned n_fibers() { return n_blocks * n_threads; }
unsigned rank_of(unsigned fiber) { return fiber / n_threads; }
Block& own() { return cluster[rank_of(current)]; }

uint64_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

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
        threadIdx = {current % n_threads, 0, 0};
        blockIdx = {first_block + rank_of(current), 0, 0};
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

std::string name_of(unsigned fiber) {
    return "thread " + std::to_string(fiber % n_threads) + " of block " + std::to_string(first_block + rank_of(fiber));
}

// Not in start(), whose frame is never left: its variables would stay poisoned for the next fiber on that stack.
__attribute__((noinline)) void check_copies() {
    for (const auto& group : fibers[current].copies)
        if (!group.empty()) fail("returns with copies to shared memory that it did not wait for");
    if (fibers[current].has_arrived) fail("returns without waiting for the cluster in which it has arrived");
}

void start() {
#if SANITIZED
    arrived(nullptr);
#endif
    (*body)();
    check_copies();
    fibers[current].state = State::done;
    ++own().finished;
    switch_to(fibers[current], next(), true);
    abort();
}

void draw_priorities() {
    uint64_t warp = 0;
    for (unsigned i = 0; i < n_fibers(); ++i) {
        if (i % n_threads % 32 == 0) warp = draw() >> 32 << 32;
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

std::string place_of(const Fiber& fiber) {
    const char* const collectives[] = {"", "a shuffle", "a ballot", "__syncwarp"};
    if (fiber.state == State::in_barrier) return "__syncthreads";
    return fiber.state == State::in_cluster ? "the cluster" : collectives[int(fiber.what)];
}

// A cluster's blocks together, or a block alone.
void run_blocks(size_t dynamic_shared) {
    ready.clear();
    arrived_threads = 0;
    dynamic_bytes = dynamic_shared;
    for (unsigned i = 0; i < n_blocks; ++i) {
        cluster[i] = Block();
        if (dynamic_shared == 0) continue;
        cluster[i].dynamic_memory = static_cast<char*>(malloc(dynamic_shared));
        memset(cluster[i].dynamic_memory, 0xff, dynamic_shared);
    }
    draw_priorities();
    for (unsigned i = 0; i < n_fibers(); ++i) {
        prepare(i);
        ready.push_back(i);
    }
    while (Fiber* fiber = next()) switch_to(outside, fiber, false);
    unsigned finished = 0;
    for (unsigned i = 0; i < n_blocks; ++i) finished += cluster[i].finished;
    if (problem.empty() && finished < n_fibers()) {
        problem = "deadlock:";
        unsigned told = 0;
        for (unsigned i = 0; i < n_fibers() && told < 4; ++i) {
            if (fibers[i].state == State::done) continue;
            ++told;
            problem += " " + name_of(i) + " waits in " + place_of(fibers[i]) + ";";
        }
        problem += " " + std::to_string(finished) + " of " + std::to_string(n_fibers()) + " threads have returned";
    }
    for (unsigned i = 0; i < n_blocks; ++i) {
        for (auto& [key, variable] : cluster[i].variables) free(variable.first);
        free(cluster[i].dynamic_memory);
    }
}

void* shared_in(Block& block, const void* key, size_t bytes) {
    auto& variable = block.variables[key];
    if (variable.first == nullptr) {
        variable = {malloc(bytes), bytes};
        memset(variable.first, 0xff, bytes);
    }
    return variable.first;
}

}  // namespace

void fail(const std::string& what) {
    if (problem.empty()) problem = name_of(current) + ": " + what;
    switch_to(fibers[current], nullptr, true);
    abort();
}

std::string run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, size_t dynamic_shared,
                unsigned blocks_a_cluster) {
    if (threads == 0 || threads > MAX_THREADS || blocks == 0 || dynamic_shared > size_t(settings.shared_memory) ||
        blocks_a_cluster == 0 || blocks_a_cluster > unsigned(settings.most_blocks_a_cluster) ||
        blocks % blocks_a_cluster != 0 || blocks_a_cluster * threads > MAX_FIBERS)
        return "invalid launch configuration";
    if (stacks == nullptr)
        stacks = static_cast<char*>(
            mmap(nullptr, MAX_FIBERS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    problem.clear();
    body = &kernel;
    n_threads = threads;
    n_blocks = blocks_a_cluster;
    blockDim = dim3(threads);
    gridDim = dim3(blocks);
    random_state = settings.seed * 0x9e3779b97f4a7c15u + 1;
    ++counters.launches;
    for (first_block = 0; first_block < blocks && problem.empty(); first_block += n_blocks) {
        counters.blocks += n_blocks;
        run_blocks(dynamic_shared);
    }
    count_sectors();
    return problem;
}

int lane() { return int(current % n_threads % 32); }

void barrier() {
    fibers[current].state = State::in_barrier;
    if (++own().in_barrier < n_threads) return wait();
    own().in_barrier = 0;
    const unsigned first = current / n_threads * n_threads;
    for (unsigned i = first; i < first + n_threads; ++i)
        if (i != current) wake(i);
    fibers[current].state = State::ready;
}

// The last one to arrive ends the meeting.
void arrive_in_cluster() {
    Fiber& self = fibers[current];
    if (self.has_arrived) fail("arrives twice in the cluster without waiting");
    self.has_arrived = true;
    self.arrived_in = meetings;
    if (++arrived_threads < n_fibers()) return;
    arrived_threads = 0;
    ++meetings;
    for (unsigned i = 0; i < n_fibers(); ++i)
        if (fibers[i].state == State::in_cluster) wake(i);
}

void wait_for_cluster() {
    Fiber& self = fibers[current];
    if (!self.has_arrived) fail("waits for the cluster without having arrived");
    if (self.arrived_in == meetings) {
        self.state = State::in_cluster;
        wait();
    }
    self.has_arrived = false;
}

void* of_block(const void* shared, int rank) {
    if (rank < 0 || unsigned(rank) >= n_blocks) fail("looks for block " + std::to_string(rank) + " of its cluster");
    Block& other = cluster[rank];
    if (other.finished > 0) fail("reads the shared memory of block " + std::to_string(rank) + ", which has returned");
    const uintptr_t at = reinterpret_cast<uintptr_t>(shared);
    for (const auto& [key, variable] : own().variables) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(variable.first);
        if (begin <= at && at < begin + variable.second)
            return static_cast<char*>(shared_in(other, key, variable.second)) + (at - begin);
    }
    fail("looks for a place that is no variable of its shared memory");
}

uint64_t rendezvous(Collective what, unsigned mask, uint64_t value, int source) {
    Fiber& self = fibers[current];
    const unsigned block = current / n_threads * n_threads, first = block + (current - block) / 32 * 32;
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
        if (first + i >= block + n_threads || fibers[first + i].state == State::done)
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


void* shared(const void* key, size_t bytes) { return shared_in(own(), key, bytes); }
void* dynamic_shared() { return own().dynamic_memory; }
size_t dynamic_shared_bytes() { return dynamic_bytes; }

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
