// The launchers of the row_divergence kernels.
#include "row_divergence.cuh"

#include "launch.cuh"

namespace minillm::cuda {

// body(constant D, S(), T()); there is always a teacher.
template <class Body>
static std::string with_divergence(Divergence divergence, const Pair& a, const Body& body) {
    return with_type(a.student.dtype, [&](auto s) {
        return with_type(a.teacher.dtype, [&](auto t) {
            const auto call = [&](auto d) { return body(d, s, t); };
            switch (divergence) {
#define MINILLM_CASE(name) \
    case Divergence::name: return call(std::integral_constant<Divergence, Divergence::name>());
                MINILLM_DIVERGENCES(MINILLM_CASE)
            }
            return std::string("row_divergence: unknown divergence");
        });
    });
}

int64_t workspace(const DivergenceArgs& a) { return a.N * splits(a.N, a.V) * int64_t(sizeof(DivergenceSums)); }

std::string row_divergence(const DivergenceArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    const int parts = splits(a.N, a.V);
    auto* sums = static_cast<DivergenceSums*>(l.workspace);
    const std::string error = with_divergence(a.divergence, a, [&](auto d, auto s, auto t) {
        return launch("row_divergence_kernel", a, l, row_divergence_kernel<d.value, decltype(s), decltype(t)>, {a.N * parts},
                      a, parts, sums);
    });
    if (!error.empty()) return error;
    return launch("row_divergence_finish_kernel", a, l, row_divergence_finish_kernel, {(a.N + THREADS - 1) / THREADS}, a,
                  parts, sums);
}

std::string row_divergence_grad(const DivergenceGradArgs& a, const Launch& l) {
    if (a.N == 0) return "";
    const int parts = splits(a.N, a.V);
    return with_divergence(a.divergence, a, [&](auto d, auto s, auto t) {
        return launch("row_divergence_grad_kernel", a, l, row_divergence_grad_kernel<d.value, decltype(s), decltype(t)>,
                      {a.N * parts}, a, parts);
    });
}

}  // namespace minillm::cuda
