// The CPU entry points: picks, once, the widest instruction set that this processor has among those compiled in.
#include "entry.h"

namespace minillm::cpu {

struct Operations {
    const char* name;
    void (*row_stats)(const StatsArgs&);
    void (*row_grad)(const GradArgs&);
    void (*row_divergence)(const DivergenceArgs&);
    void (*row_divergence_grad)(const DivergenceGradArgs&);
    void (*row_sample)(const SampleArgs&);
};

#define MINILLM_DECLARE_ISA(isa)                           \
    namespace isa {                                        \
    void row_stats(const StatsArgs&);                      \
    void row_grad(const GradArgs&);                        \
    void row_divergence(const DivergenceArgs&);            \
    void row_divergence_grad(const DivergenceGradArgs&);   \
    void row_sample(const SampleArgs&);                    \
    }                                                      \
    static const Operations isa##_operations = {           \
        #isa, isa::row_stats, isa::row_grad, isa::row_divergence, isa::row_divergence_grad, isa::row_sample};

MINILLM_DECLARE_ISA(baseline)
#ifdef MINILLM_X86
MINILLM_DECLARE_ISA(avx2)
MINILLM_DECLARE_ISA(avx512)
#endif

static const Operations* chosen = nullptr;

bool use_instruction_set(const char* name) {
    const Operations* usable[3] = {&baseline_operations};
    int n = 1;
#ifdef MINILLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        usable[n++] = &avx2_operations;
    if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        usable[n++] = &avx512_operations;
#endif
    for (int i = n - 1; i >= 0; --i)
        if (name == nullptr || __builtin_strcmp(name, usable[i]->name) == 0) {
            chosen = usable[i];
            return true;
        }
    return false;
}

static const Operations& operations() {
    if (chosen == nullptr) use_instruction_set(nullptr);
    return *chosen;
}

const char* instruction_set() { return operations().name; }
void row_stats(const StatsArgs& a) { operations().row_stats(a); }
void row_grad(const GradArgs& a) { operations().row_grad(a); }
void row_divergence(const DivergenceArgs& a) { operations().row_divergence(a); }
void row_divergence_grad(const DivergenceGradArgs& a) { operations().row_divergence_grad(a); }
void row_sample(const SampleArgs& a) { operations().row_sample(a); }

}  // namespace minillm::cpu
