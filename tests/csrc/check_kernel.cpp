// row_stats_kernel and row_stats_finish_kernel, and row_stats_grad_kernel, on fp32 pairs, under several orders of the threads,
// and the sums of the filters: prints "ok" or what is wrong. tests/csrc/test_host_cuda.py compiles it with mutated kernels.
#include "cuda/row_sample.cuh"
#include "cuda/row_stats.cuh"
#include "cuda/row_stats_grad.cuh"

#include <stdio.h>
#include <stdlib.h>

#include <vector>

using namespace minillm;
using namespace minillm::cuda;

static void require(bool condition, const std::string& what) {
    if (condition) return;
    printf("%s\n", what.c_str());
    exit(0);
}

// Fewer blocks than parts, so that a block goes on from one to the next.
static std::vector<float> run(const std::vector<float>& s, const std::vector<float>& t, int64_t N, int64_t V, int splits) {
    std::vector<float> stats(STATISTICS * N, NAN);
    std::vector<RowState<float>> states(N * splits, RowState<float>::empty());
    StatsArgs a;
    a.student = {const_cast<char*>(reinterpret_cast<const char*>(s.data())), DType::fp32, N, 0, V};
    a.teacher = {const_cast<char*>(reinterpret_cast<const char*>(t.data())), DType::fp32, N, 0, V};
    a.N = N;
    a.V = V;
    a.stats = stats.data();
    host_cuda::allow_everything();
    host_cuda::allow(s.data(), N * V * 4);
    host_cuda::allow(t.data(), N * V * 4);
    host_cuda::allow(stats.data(), STATISTICS * N * 4);
    std::string error = host_cuda::launch("", row_stats_kernel<float, float>, 2, THREADS, 0, a, splits, states.data());
    require(error.empty(), error);
    error = host_cuda::launch("", row_stats_finish_kernel, 1, THREADS, 0, a, splits, states.data());
    require(error.empty(), error);
    return stats;
}

// By one block, which goes on from row to row. Into stats, and the gradient.
static void run_fused(const std::vector<float>& s, const std::vector<float>& t, int64_t N, int64_t V, int splits,
                      std::vector<float>& stats, std::vector<float>& grad) {
    const std::vector<float> ones(COEFFICIENTS * N, 1.0f);
    StatsGradArgs a;
    a.student = {const_cast<char*>(reinterpret_cast<const char*>(s.data())), DType::fp32, N, 0, V};
    a.teacher = {const_cast<char*>(reinterpret_cast<const char*>(t.data())), DType::fp32, N, 0, V};
    a.N = N;
    a.V = a.width = V;
    a.coefficients = ones.data();
    a.stats_out = stats.data();
    a.grad = {reinterpret_cast<char*>(grad.data()), DType::fp32, N, 0, V};
    host_cuda::allow(grad.data(), N * V * 4);
    host_cuda::allow(stats.data(), STATISTICS * N * 4);
    const std::string error =
        host_cuda::launch("", row_stats_grad_kernel<float, float>, 1, THREADS, 2 * held_bytes(V, 4), a, splits);
    require(error.empty(), error);
}

// Sums of 64 bits by halves: of every size, and where the lower half wraps exactly.
static void check_wide_sums() {
    unsigned long long sum = 0, right = 0, x = 1;
    for (int i = 0; i < 10000; ++i) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        const unsigned long long more = i % 100 == 0 ? (1ull << 32) - unsigned(right) : x >> (17 + i % 47);
        add_wide(sum, more);
        require(sum == (right += more), "a wide sum is wrong");
    }
}

int main() {
    check_wide_sums();
    for (int64_t V : {1, 7, 1029, 9001})
        for (int splits : {1, 3}) {
            const int64_t N = 3;
            std::vector<float> s(N * V), t(N * V);
            uint32_t random = 1;
            for (std::vector<float>* x : {&s, &t})
                for (float& z : *x) z = float((random = random * 1664525u + 1013904223u) >> 8) / float(1 << 21) - 4.0f;
            const std::vector<float> stats = run(s, t, N, V, splits);
            for (int64_t i = 0; i < N; ++i) {
                double Zs = 0, Zt = 0, kl = 0;
                for (int64_t v = 0; v < V; ++v) {
                    Zs += exp(double(s[i * V + v]));
                    Zt += exp(double(t[i * V + v]));
                    kl += exp(double(s[i * V + v])) * (double(s[i * V + v]) - double(t[i * V + v]));
                }
                kl = kl / Zs - log(Zs) + log(Zt);
                require(fabs(stats[REVERSE_KL * N + i] - kl) < 3e-6 * (1 + kl), "wrong: " + std::to_string(V) + " columns");
            }
            std::vector<float> fused(STATISTICS * N, NAN), grad(N * V, NAN);
            run_fused(s, t, N, V, splits, fused, grad);
            const size_t bytes = STATISTICS * N * 4;
            require(memcmp(fused.data(), stats.data(), bytes) == 0, "wrong: statistics with the gradient");
            for (uint64_t seed = 1; seed <= 8; ++seed) {
                host_cuda::settings.seed = seed;
                const std::vector<float> again = run(s, t, N, V, splits);
                std::vector<float> grad_again(N * V, NAN);
                run_fused(s, t, N, V, splits, fused, grad_again);
                require(memcmp(fused.data(), stats.data(), bytes) == 0 && memcmp(grad_again.data(), grad.data(), N * V * 4) == 0,
                        "differs with the gradient under order " + std::to_string(seed));
                require(memcmp(again.data(), stats.data(), bytes) == 0, "differs under order " + std::to_string(seed));
            }
            host_cuda::settings.seed = 0;
        }
    printf("ok\n");
}
