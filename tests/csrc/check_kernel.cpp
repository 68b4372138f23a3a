// row_stats_kernel and row_stats_finish_kernel, and row_stats_grad_kernel, on fp32 pairs, under several orders of the threads,
// and the sums of the filters: prints "ok" or what is wrong. tests/csrc/test_host_cuda.py compiles it with mutated kernels.
#include "cuda/row_sample_filter.cuh"
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
static std::vector<float> run(const float* s, const float* t, int64_t N, int64_t V, int splits) {
    std::vector<float> stats(STATISTICS * N, NAN);
    std::vector<RowState<float>> states(N * splits, RowState<float>::empty());
    StatsArgs a;
    a.student = {const_cast<char*>(reinterpret_cast<const char*>(s)), DType::fp32, N, 0, V};
    a.teacher = {const_cast<char*>(reinterpret_cast<const char*>(t)), DType::fp32, N, 0, V};
    a.N = N;
    a.V = V;
    a.stats = stats.data();
    host_cuda::allow_everything();
    host_cuda::allow(s, N * V * 4);
    host_cuda::allow(t, N * V * 4);
    host_cuda::allow(stats.data(), STATISTICS * N * 4);
    std::string error = host_cuda::launch("", row_stats_kernel<float, float>, 2, THREADS, 0, 1, a, splits, states.data());
    require(error.empty(), error);
    error = host_cuda::launch("", row_stats_finish_kernel, 1, THREADS, 0, 1, a, splits, states.data());
    require(error.empty(), error);
    return stats;
}

// The gradient of the reverse KL, by one block, or one cluster of blocks, which goes on from row to row.
static void run_fused(const float* s, const float* t, int64_t N, int64_t V, int cluster,
                      std::vector<float>& stats, std::vector<float>& grad) {
    std::vector<float> coefficients(COEFFICIENTS * N, 0.0f);
    for (int64_t i = 0; i < N; ++i) coefficients[C_REVERSE_KL * N + i] = 1.0f;
    StatsGradArgs a;
    a.student = {const_cast<char*>(reinterpret_cast<const char*>(s)), DType::fp32, N, 0, V};
    a.teacher = {const_cast<char*>(reinterpret_cast<const char*>(t)), DType::fp32, N, 0, V};
    a.N = N;
    a.V = a.width = V;
    a.coefficients = coefficients.data();
    a.stats_out = stats.data();
    a.grad = {reinterpret_cast<char*>(grad.data()), DType::fp32, N, 0, V};
    host_cuda::allow(grad.data(), N * V * 4);
    host_cuda::allow(stats.data(), STATISTICS * N * 4);
    const auto kernel = cluster == 1   ? row_stats_grad_kernel<float, float, 1>
                        : cluster == 2 ? row_stats_grad_kernel<float, float, 2>
                                       : row_stats_grad_kernel<float, float, 4>;
    const int64_t held = 2 * held_bytes(slice_of(V, cluster), 4);
    const std::string error = host_cuda::launch("", kernel, cluster, THREADS, held, cluster, a);
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

// A row's definitions, in double.
struct Right {
    double Zs = 0, Zt = 0, kl = 0;
    const float *s, *t;

    Right(const float* s, const float* t, int64_t V) : s(s), t(t) {
        for (int64_t v = 0; v < V; ++v) {
            Zs += exp(double(s[v]));
            Zt += exp(double(t[v]));
            kl += exp(double(s[v])) * (double(s[v]) - double(t[v]));
        }
        kl = kl / Zs - log(Zs) + log(Zt);
    }
    double gradient(int64_t v) const {
        return exp(double(s[v])) / Zs * (double(s[v]) - double(t[v]) - log(Zs) + log(Zt) - kl);
    }
};

static void require_same(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
    require(memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0, what);
}

static void check(int64_t N, int64_t V) {
    std::vector<float> student(1 + N * V), teacher(1 + N * V);  // rows begin behind an aligned address, which is not theirs
    const float *s = student.data() + 1, *t = teacher.data() + 1;
    uint32_t random = 1;
    for (std::vector<float>* x : {&student, &teacher})
        for (float& z : *x) z = float((random = random * 1664525u + 1013904223u) >> 8) / float(1 << 21) - 4.0f;
    std::vector<Right> right;
    for (int64_t i = 0; i < N; ++i) right.emplace_back(&s[i * V], &t[i * V], V);
    const auto require_right = [&](const std::vector<float>& stats) {
        for (int64_t i = 0; i < N; ++i)
            require(fabs(stats[REVERSE_KL * N + i] - right[i].kl) < 3e-6 * (1 + right[i].kl),
                    "wrong: " + std::to_string(V) + " columns");
    };
    for (int splits : {1, 3}) {
        const std::vector<float> stats = run(s, t, N, V, splits);
        require_right(stats);
        for (host_cuda::settings.seed = 1; host_cuda::settings.seed <= 8; ++host_cuda::settings.seed)
            require_same(run(s, t, N, V, splits), stats, "differs under another order");
        host_cuda::settings.seed = 0;
    }
    for (int cluster : {1, 2, 4}) {
        std::vector<float> stats(STATISTICS * N, NAN), grad(N * V, NAN);
        run_fused(s, t, N, V, cluster, stats, grad);
        require_right(stats);
        if (cluster == 1) require_same(stats, run(s, t, N, V, 1), "wrong: statistics with the gradient");
        for (int64_t i = 0; i < N * V; ++i)
            require(fabs(grad[i] - right[i / V].gradient(i % V)) < 1e-6, "wrong: a gradient of a cluster");
        for (host_cuda::settings.seed = 1; host_cuda::settings.seed <= 4; ++host_cuda::settings.seed) {
            std::vector<float> again(STATISTICS * N, NAN), grad_again(N * V, NAN);
            run_fused(s, t, N, V, cluster, again, grad_again);
            require_same(again, stats, "differs with the gradient under another order");
            require_same(grad_again, grad, "differs with the gradient under another order");
        }
        host_cuda::settings.seed = 0;
    }
}

int main() {
    check_wide_sums();
    // At every distance to an aligned address; one unit, none, what shows most first.
    for (int64_t V : {1029, 9001, 1028, LINE + 8, LINE + 7, 7, 1}) check(4, V);
    printf("ok\n");
}
