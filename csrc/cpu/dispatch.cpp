// The CPU entry points: picks, once, the widest instruction set that this processor has among those compiled in.
#include "entry.h"

namespace minillm::cpu {

struct Operations {
    const char* name;
#define MINILLM_POINTER(name, Args) void (*name)(const Args&);
    MINILLM_ROW_OPERATIONS(MINILLM_POINTER)
};

// The operations of an instruction set: the names of Operations, looked up in the namespace that they were compiled in.
#define MINILLM_ADDRESS(name, Args) &name,
#define MINILLM_DECLARE_ISA(isa)                                                                  \
    namespace isa {                                                                               \
    MINILLM_ROW_OPERATIONS(MINILLM_DECLARE)                                                       \
    static const Operations operations = {#isa, MINILLM_ROW_OPERATIONS(MINILLM_ADDRESS)};         \
    }

MINILLM_DECLARE_ISA(baseline)
#ifdef MINILLM_X86
MINILLM_DECLARE_ISA(avx2)
MINILLM_DECLARE_ISA(avx512)
#endif

static const Operations* chosen = nullptr;

bool use_instruction_set(const char* name) {
    const Operations* usable[3] = {&baseline::operations};
    int n = 1;
#ifdef MINILLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        usable[n++] = &avx2::operations;
    if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        usable[n++] = &avx512::operations;
#endif
    for (int i = n - 1; i >= 0; --i)
        if (name == nullptr || __builtin_strcmp(name, usable[i]->name) == 0) {
            chosen = usable[i];
            return true;
        }
    return false;
}

static const Operations& in_use() {
    if (chosen == nullptr) use_instruction_set(nullptr);
    return *chosen;
}

const char* instruction_set() { return in_use().name; }
#define MINILLM_FORWARD(name, Args) \
    void name(const Args& a) { in_use().name(a); }
MINILLM_ROW_OPERATIONS(MINILLM_FORWARD)

}  // namespace minillm::cpu
