// Runs the row operations on small rows and compares them with the definitions in double: statistics, gradient, divergence,
// sampling. Exits 1 at the first that differs. Those of the CPU, or with HOST_CUDA the host build of the CUDA kernels.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "args.h"
#ifdef HOST_CUDA
#include "cuda/launch.h"
#include "host_cuda.h"
#else
#include "cpu/entry.h"
#endif

using namespace minillm;
using Vector = std::vector<double>;

static Vector softmax(const Vector& z) {
    double max = -INFINITY, sum = 0;
    for (double x : z) max = fmax(max, x);
    Vector p(z.size());
    for (size_t i = 0; i < z.size(); ++i) sum += p[i] = exp(z[i] - max);
    for (double& x : p) x /= sum;
    return p;
}

static void expect(const char* what, int64_t V, double actual, double wanted, double tolerance) {
    if (fabs(actual - wanted) <= tolerance * (1 + fabs(wanted))) return;
    printf("%s, V = %lld: %.9g instead of %.9g\n", what, (long long)V, actual, wanted);
    exit(1);
}

#ifdef HOST_CUDA
template <class Args>
static void run(std::string (*operation)(const Args&, const cuda::Launch&), const Args& a) {
    cuda::Launch l;
    l.workspace = malloc(cuda::workspace(a));  // exactly, so that a sanitizer sees a byte too many
    const std::string error = operation(a, l);
    free(l.workspace);
    if (error.empty()) return;
    printf("%s\n", error.c_str());
    exit(1);
}
#define DEFINE(name, Args) \
    static void name(const Args& a) { run(cuda::name, a); }
MINILLM_ROW_OPERATIONS(DEFINE)
#else
using namespace minillm::cpu;
#endif

static uint32_t seed = 1;
static double uniform() { return (seed = seed * 1664525u + 1013904223u) / 4294967296.0; }

// The nearest value of a type below fp32, and its bits.
static uint16_t narrow(float x, DType type) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (type == DType::bf16) return uint16_t(bits >> 16);
    const int exponent = int((bits >> 23) & 255) - 112;  // normal fp16 numbers only
    return uint16_t((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}
static double widened(uint16_t h, DType type) {
    if (type == DType::bf16) {
        const uint32_t bits = uint32_t(h) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    return (h & 0x8000 ? -1 : 1) * ldexp(1 + (h & 0x3ff) / 1024.0, (h >> 10 & 31) - 15);
}

struct Logits {
    std::vector<char> memory;  // exactly N rows, so that a sanitizer sees one element too many
    std::vector<Vector> values;
    Rows rows;

    Logits(int64_t N, int64_t V, DType type) : memory(N * V * size_of(type)), values(N, Vector(V)) {
        rows = {memory.data(), type, N, 0, V};
        for (int64_t i = 0; i < N; ++i)
            for (int64_t v = 0; v < V; ++v) {
                const float x = float((uniform() < 0.5 ? -1 : 1) * (0.01 + 4 * uniform()));
                char* p = rows.row(i) + v * size_of(type);
                if (type == DType::fp32) {
                    memcpy(p, &x, 4);
                    values[i][v] = x;
                } else {
                    const uint16_t h = narrow(x, type);
                    memcpy(p, &h, 2);
                    values[i][v] = widened(h, type);
                }
            }
    }
};

static void check(int64_t N, int64_t V, DType student_type, DType teacher_type) {
    Logits s(N, V, student_type), t(N, V, teacher_type);
    std::vector<int64_t> ids(N);
    for (int64_t& y : ids) y = int64_t(uniform() * V);
    std::vector<float> stats(STATISTICS * N), coefficients(COEFFICIENTS * N, 0.0f), grad(N * V);

    StatsArgs a;
    a.student = s.rows;
    a.teacher = t.rows;
    a.N = N;
    a.V = V;
    a.token_ids = ids.data();
    a.stats = stats.data();
    row_stats(a);

    // A row of zeros among the coefficients: its gradient is not computed.
    for (int64_t i = 0; i + 1 < N || N == 1; ++i) {
        coefficients[C_REVERSE_KL * N + i] = 1.0f;
        coefficients[C_STUDENT_LOGPROBS * N + i] = -0.5f;
        if (N == 1) break;
    }
    GradArgs g;
    static_cast<Pair&>(g) = a;
    g.token_ids = ids.data();
    g.stats = stats.data();
    g.coefficients = coefficients.data();
    std::vector<char> out(N * V * size_of(student_type));
    g.grad = {out.data(), student_type, N, 0, V};
    g.width = V;
    row_grad(g);

#ifdef HOST_CUDA
    const bool at_once = student_type == teacher_type;
#else
    const bool at_once = true;
#endif
    if (at_once) {  // the same bits by one operation
        StatsGradArgs f;
        static_cast<GradArgs&>(f) = g;
        std::vector<char> out_at_once(out.size());
        std::vector<float> stats_at_once(stats.size());
        f.stats = nullptr;
        f.stats_out = stats_at_once.data();
        f.grad.data = out_at_once.data();
        row_stats_grad(f);
        if (memcmp(out_at_once.data(), out.data(), out.size()) != 0) expect("gradient at once", V, NAN, 0, 0);
        for (int64_t i = 0; i < N; ++i)
            if (coefficients[i] != 0.0f) expect("KL at once", V, stats_at_once[REVERSE_KL * N + i], stats[REVERSE_KL * N + i], 0);
#ifdef HOST_CUDA
        std::vector<char> out_of_cluster(out.size());
        f.grad.data = out_of_cluster.data();
        const int held = host_cuda::settings.shared_memory;
        // Room for two halves of a row pair: two blocks hold it, which add in another order.
        host_cuda::settings.shared_memory = int(2 * (V * size_of(student_type) + 128) + (4 << 10));
        row_stats_grad(f);
        host_cuda::settings.shared_memory = held;
        f.grad.data = out_at_once.data();
        for (int64_t i = 0; i < N; ++i)
            if (coefficients[i] != 0.0f)
                expect("KL of a cluster", V, stats_at_once[REVERSE_KL * N + i], stats[REVERSE_KL * N + i], 1e-6);
        for (size_t i = 0; i < out.size() && student_type == DType::fp32; i += 4) {
            float one, other;
            memcpy(&one, out.data() + i, 4);
            memcpy(&other, out_of_cluster.data() + i, 4);
            expect("gradient of a cluster", V, other, one, 1e-6);
        }
#endif

        // Twice the gradient, and once nothing.
        const float two = 2.0f, one = 1.0f;
        ScaleArgs x;
        static_cast<Pair&>(x) = a;
        x.student = f.grad;
        x.factor = &two;
        row_scale(x);
        x.factor = &one;
        row_scale(x);
        for (size_t i = 0; i < out.size() && student_type == DType::fp32; i += 4) {
            float once, twice;
            memcpy(&once, out.data() + i, 4);
            memcpy(&twice, out_at_once.data() + i, 4);
            expect("scaled gradient", V, twice, 2.0f * once, 0);
        }
    }

    DivergenceArgs d;
    static_cast<Pair&>(d) = a;
    d.divergence = Divergence::jsd;
    d.beta = 0.3f;
    d.stats = stats.data();
    std::vector<float> jsd(2 * N);
    d.out = jsd.data();
    row_divergence(d);

    std::vector<double> uniforms(2 * N);
    for (double& u : uniforms) u = uniform();
    std::vector<int64_t> tokens(N);
    std::vector<float> logprobs(3 * N);
    std::vector<uint8_t> from_teacher(N);
    SampleArgs m;
    static_cast<Pair&>(m) = a;
    m.uniforms = uniforms.data();
    m.alpha = 0.2;
    m.token_ids = tokens.data();
    m.logprobs = logprobs.data();
    m.from_teacher = from_teacher.data();
    row_sample(m);

    // The gradient of jsd adds up to 0 over a row; filtered, a token has a probability; greedy, it is the likeliest.
    DivergenceGradArgs dg;
    static_cast<Pair&>(dg) = a;
    dg.divergence = d.divergence;
    dg.beta = d.beta;
    dg.stats = stats.data();
    dg.values = jsd.data();
    const std::vector<float> ones(N, 1.0f);
    dg.scale = ones.data();
    std::vector<char> jsd_grad(N * V * size_of(student_type));
    dg.grad = {jsd_grad.data(), student_type, N, 0, V};
    dg.width = V;
    row_divergence_grad(dg);
    for (int64_t i = 0; i < N && student_type == DType::fp32; ++i) {
        double sum = 0;
        for (int64_t v = 0; v < V; ++v) {
            float x;
            memcpy(&x, jsd_grad.data() + (i * V + v) * 4, 4);
            sum += x;
        }
        expect("sum of a gradient", V, sum, 0, 1e-6);
    }
    for (bool greedy : {false, true}) {
        SampleArgs f = m;
        f.greedy = greedy;
        f.alpha = 0;
        f.top_k = greedy ? 0 : 5;
        f.top_p = greedy ? 1.0 : 0.9;
        std::vector<int64_t> kept(N);
        f.token_ids = kept.data();
        row_sample(f);
        for (int64_t i = 0; i < N; ++i) {
            int64_t above = 0;
            for (int64_t v = 0; v < V; ++v) above += s.values[i][v] > s.values[i][kept[i]];
            if (above >= (greedy ? 1 : 5)) expect("rank of a token", V, double(above), 0, 0);
        }
        row_sample(m);  // for the checks below
    }

    const double rounding = student_type == DType::fp32 ? 1e-5 : student_type == DType::bf16 ? 8e-3 : 1e-3;
    for (int64_t i = 0; i < N; ++i) {
        const Vector q = softmax(s.values[i]), p = softmax(t.values[i]);
        double rkl = 0, entropy = 0, divergence = 0;
        for (int64_t v = 0; v < V; ++v) {
            rkl += q[v] * log(q[v] / p[v]);
            entropy -= q[v] * log(q[v]);
            const double mixture = 0.3 * p[v] + 0.7 * q[v];
            divergence += 0.3 * p[v] * log(p[v] / mixture) + 0.7 * q[v] * log(q[v] / mixture);
        }
        expect("reverse KL", V, stats[REVERSE_KL * N + i], rkl, 3e-6);
        expect("entropy", V, stats[STUDENT_ENTROPY * N + i], entropy, 3e-6);
        expect("log q(y)", V, stats[STUDENT_LOGPROBS * N + i], log(q[ids[i]]), 3e-6);
        expect("log p(y)", V, stats[TEACHER_LOGPROBS * N + i], log(p[ids[i]]), 3e-6);
        expect("jsd", V, jsd[i], divergence, 3e-6);
        const double cr = coefficients[C_REVERSE_KL * N + i], cy = coefficients[C_STUDENT_LOGPROBS * N + i];
        for (int64_t v = 0; v < V; ++v) {
            const double wanted = cr * q[v] * (log(q[v] / p[v]) - rkl) + cy * ((v == ids[i]) - q[v]);
            double actual;
            if (student_type == DType::fp32) {
                float x;
                memcpy(&x, out.data() + (i * V + v) * 4, 4);
                actual = x;
            } else {
                uint16_t h;
                memcpy(&h, out.data() + (i * V + v) * 2, 2);
                if (student_type == DType::fp16 && (h & 0x7c00) == 0) continue;  // denormal: not what widened() reads
                actual = widened(h, student_type);
            }
            if (fabs(actual - wanted) > rounding * fabs(wanted) + 1e-6) expect("gradient", V, actual, wanted, 0);
        }
        const Vector& law = from_teacher[i] ? p : q;
        expect("coin", V, from_teacher[i], uniforms[2 * i] < 0.2, 0);
        double before = 0;
        for (int64_t v = 0; v < tokens[i]; ++v) before += law[v];
        const double u = uniforms[2 * i + 1];
        if (!(before <= u + 1e-5 && u < before + law[tokens[i]] + 1e-5)) expect("token", V, double(tokens[i]), -1, 0);
        expect("mixture log-probability", V, logprobs[2 * N + i], log(0.2 * p[tokens[i]] + 0.8 * q[tokens[i]]), 3e-6);
    }
}

int main() {
#ifdef HOST_CUDA
    const std::vector<int64_t> sizes = {1, 17, 4095, 5000};  // beside a vector, and a block's chunk of an fp32 row
#else
    const std::vector<int64_t> sizes = {1, 2, 3, 15, 16, 17, 31, 33, 127, 2047, 2048, 2049, 5000};  // registers, tiles, and beside
#endif
    const DType types[] = {DType::fp32, DType::bf16, DType::fp16};
    int cases = 0;
#ifdef HOST_CUDA
    for (const char* name : {"cuda"}) {
        host_cuda::settings.seed = 1;
#else
    for (const char* name : {"baseline", "avx2", "avx512"}) {
        if (!use_instruction_set(name)) continue;
#endif
        for (int64_t V : sizes)
            for (int64_t N : {1, 3})
                for (DType s : types)
                    for (DType t : types) check(N, V, s, t), ++cases;
        printf("%s ok\n", name);
    }
    printf("%d cases\n", cases);
}
