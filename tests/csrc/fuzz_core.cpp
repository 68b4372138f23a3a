// Random calls of the CPU row operations, for a sanitizer to watch: fuzz_core CASES SEED. Rows at any byte, with gaps or
// overlapping, in memory of exactly their size; every special value; numbers from the edges of what csrc/python lets through,
// and uniforms from outside. Exits 1 where an output is not written, or something else is, or a promise of args.h is broken.
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cpu/entry.h"

using namespace minillm;

static std::mt19937_64 random_bits;
static int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
static bool once_in(int64_t n) { return below(n) == 0; }
template <class T, size_t N>
static T one_of(const T (&list)[N]) {
    return list[below(N)];
}

static int64_t case_number = 0;
static void require(bool condition, const char* what) {
    if (condition) return;
    printf("case %lld: %s\n", (long long)case_number, what);
    exit(1);
}

static DType any_type() {
    const DType types[] = {DType::fp32, DType::bf16, DType::fp16};
    return one_of(types);
}
static float any_float() {
    const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f,
                             65504.0f, -65504.0f, 88.0f, -104.0f};
    return once_in(3) ? one_of(special) : float(below(2001) - 1000) / 100.0f;
}

// N rows of `width` columns in memory that ends where they end, each of the bytes known.
struct Memory {
    std::vector<char> bytes;
    Rows rows;
    int64_t N, width;

    Memory(int64_t N, int64_t width, DType dtype, bool may_overlap) : N(N), width(width) {
        rows.dtype = dtype;
        const int64_t size = size_of(rows.dtype), askew = once_in(4) ? 1 + below(size) : 0;
        rows.inner = N > 1 && once_in(2) ? 1 + below(N) : N > 0 ? N : 1;
        const int64_t outer = N > 0 ? (N + rows.inner - 1) / rows.inner : 0, gap = once_in(2) ? below(40) : 0;
        rows.inner_stride = may_overlap && once_in(4) ? below(width + 1) : width + gap;
        rows.outer_stride = may_overlap && once_in(4) ? below(width + 1) : rows.inner * rows.inner_stride + gap;
        const int64_t elements = N > 0 ? (outer - 1) * rows.outer_stride + (rows.inner - 1) * rows.inner_stride + width : 0;
        bytes.resize(askew + elements * size);
        rows.data = bytes.data() + askew;
        for (int64_t i = 0; i < N; ++i)
            if (!once_in(8)) fill(i);
    }
    void fill(int64_t row) {
        const bool tame = once_in(2);
        for (int64_t v = 0; v < width; ++v) {
            const float x = tame ? float(below(801) - 400) / 100.0f : any_float();
            uint32_t bits;
            memcpy(&bits, &x, 4);
            const uint16_t half = uint16_t(once_in(50) ? random_bits() : bits >> 16);
            memcpy(rows.row(row) + v * size_of(rows.dtype), rows.dtype == DType::fp32 ? (void*)&bits : (void*)&half,
                   size_of(rows.dtype));
        }
    }
    bool is_zero(int64_t row, int64_t begin, int64_t end) const {
        for (const char* p = rows.row(row) + begin * size_of(rows.dtype); p < rows.row(row) + end * size_of(rows.dtype); ++p)
            if (*p != 0) return false;
        return true;
    }
    // Whether only columns of rows differ.
    void require_gaps_kept(const std::vector<char>& before) const {
        std::vector<bool> own(bytes.size());
        for (int64_t i = 0; i < N; ++i)
            for (int64_t b = 0; b < width * size_of(rows.dtype); ++b) own[rows.row(i) - bytes.data() + b] = true;
        for (size_t b = 0; b < bytes.size(); ++b) require(own[b] || bytes[b] == before[b], "written between the rows");
    }
};

static constexpr float UNWRITTEN = -12345.678f;  // no result is

struct Case {
    int64_t N, V;
    bool pair;
    Memory student, teacher;
    std::vector<uint8_t> mask;
    std::vector<int64_t> ids;
    std::vector<float> stats, coefficients;
    Pair rows;

    static int64_t columns() {
        const int64_t around[] = {1, 4, 8, 16, 32, 2048, 4096};
        return once_in(2) ? 1 + below(80) : std::max<int64_t>(1, one_of(around) + below(7) - 3);
    }
    Case(int64_t N, int64_t V, int64_t beyond)
        : N(N), V(V), pair(!once_in(4)), student(N, V + beyond, any_type(), true),
          teacher(pair ? N : 0, V + below(9), any_type(), true) {
        const double inverse[] = {1.0, 1.0, 0.3, 2.0, 1e15, 1e-37, 0.0, 2e38};
        rows.student = student.rows;
        if (pair) rows.teacher = teacher.rows;
        rows.N = N;
        rows.V = V;
        rows.inv_T = one_of(inverse);
        rows.threads = once_in(10) ? 3 : 1;
        for (int64_t i = 0; i < N; ++i) {
            mask.push_back(!once_in(4));
            ids.push_back(below(V));
        }
        stats.assign(STATISTICS * N, UNWRITTEN);
        for (int64_t i = 0; i < COEFFICIENTS * N; ++i) coefficients.push_back(once_in(3) ? any_float() : once_in(2));
    }
    const uint8_t* mask_or_none() const { return once_in(2) ? nullptr : mask.data(); }
    const int64_t* ids_or_none() const { return once_in(2) ? nullptr : ids.data(); }
    void require_written(const std::vector<float>& out) const {
        for (float x : out) require(x != UNWRITTEN, "a result is not written");
    }
};

template <class Args>
static Args of(const Case& c) {
    Args a;
    static_cast<Pair&>(a) = c.rows;
    return a;
}

// The gradient over the student, where its rows allow that, or into memory of its own; `reads(row)` says whether it is zeros.
template <class Args, class Reads>
static void check_gradient(Case& c, Args a, void (*operation)(const Args&), const Reads& reads) {
    const int64_t width = c.student.width;
    Memory own(c.N, width, c.student.rows.dtype, false);
    const bool nested = c.student.rows.inner_stride >= width &&
                        c.student.rows.outer_stride >= c.student.rows.inner * c.student.rows.inner_stride;
    Memory& out = nested && once_in(2) ? c.student : own;
    const std::vector<char> before = out.bytes;
    a.grad = out.rows;
    a.width = width;
    operation(a);
    out.require_gaps_kept(before);
    for (int64_t i = 0; i < c.N; ++i) {
        require(out.is_zero(i, c.V, width), "columns beyond V are not 0");
        require(reads(i) || out.is_zero(i, 0, c.V), "a row that does not count has a gradient");
    }
}

static void check_losses(Case& c) {
    auto a = of<StatsArgs>(c);
    a.mask = c.mask_or_none();
    a.token_ids = c.ids_or_none();
    a.stats = c.stats.data();
    cpu::row_stats(a);
    c.require_written(c.stats);
    for (int64_t i = 0; i < c.N; ++i)
        for (int s = 0; s < STATISTICS; ++s)
            require(a.mask == nullptr || a.mask[i] != 0 || c.stats[s * c.N + i] == 0.0f, "a masked row has statistics");
    if (once_in(5))
        for (float& x : c.stats) x = any_float();  // of other rows

    const Divergence divergences[] = {Divergence::jsd, Divergence::skew_forward_kl, Divergence::skew_reverse_kl, Divergence::tvd};
    const float betas[] = {0.0f, 0.3f, 1.0f, 1e-30f};
    std::vector<float> values(2 * c.N, UNWRITTEN), scale;
    for (int64_t i = 0; i < c.N; ++i) scale.push_back(once_in(3) ? any_float() : 1.0f);
    auto d = of<DivergenceArgs>(c);
    d.divergence = one_of(divergences);
    d.beta = one_of(betas);
    d.mask = a.mask;
    d.stats = c.stats.data();
    d.out = values.data();
    if (c.pair) {
        cpu::row_divergence(d);
        c.require_written(values);
    }
    if (c.pair && once_in(2)) {
        auto g = of<DivergenceGradArgs>(c);
        g.divergence = d.divergence;
        g.beta = d.beta;
        g.stats = c.stats.data();
        g.values = values.data();
        g.scale = scale.data();
        check_gradient(c, g, cpu::row_divergence_grad, [&](int64_t i) { return scale[i] != 0.0f; });
        return;
    }
    const auto reads = [&](int64_t i) {
        for (int k = 0; k < COEFFICIENTS; ++k)
            if (c.coefficients[k * c.N + i] != 0.0f) return true;
        return false;
    };
    if (once_in(2)) {  // statistics and gradient in one visit
        std::vector<float> found(STATISTICS * c.N, UNWRITTEN);
        auto g = of<StatsGradArgs>(c);
        g.token_ids = a.token_ids;
        g.coefficients = c.coefficients.data();
        g.stats_out = found.data();
        check_gradient(c, g, cpu::row_stats_grad, reads);
        c.require_written(found);
        return;
    }
    auto g = of<GradArgs>(c);
    g.token_ids = a.token_ids;
    g.stats = c.stats.data();
    g.coefficients = c.coefficients.data();
    const float factor = any_float();
    if (once_in(3) && factor != 1.0f) g.factor = &factor;
    check_gradient(c, g, cpu::row_grad, reads);
}

static void check_scale() {
    const int64_t columns = Case::columns();
    Memory memory(1, columns, any_type(), false);
    const std::vector<char> before = memory.bytes;
    const float factor = once_in(3) ? 0.0f : any_float();
    ScaleArgs a;
    a.student = memory.rows;
    a.N = 1;
    a.V = columns;
    a.factor = &factor;
    cpu::row_scale(a);
    memory.require_gaps_kept(before);
    require(factor != 0.0f || memory.is_zero(0, 0, columns), "scaled by 0, and not 0");
    require(factor != 1.0f || memory.bytes == before, "scaled by 1, and changed");
}

static void check_samples(Case& c) {
    const double outside[] = {-1.0, 1.0, 2.0, -INFINITY, INFINITY, NAN, 1e300, 0.0};
    const double shares[] = {1.0, 1.0, 0.9, 1e-9, 1.0 - 1e-16};
    std::vector<double> uniforms;
    for (int64_t i = 0; i < 2 * c.N; ++i) uniforms.push_back(once_in(4) ? one_of(outside) : below(1 << 20) / double(1 << 20));
    std::vector<int64_t> tokens(c.N, -1);
    std::vector<float> logprobs(3 * c.N, UNWRITTEN);
    std::vector<uint8_t> from_teacher(c.N, 7);
    auto a = of<SampleArgs>(c);
    a.uniforms = uniforms.data();
    a.alpha = !c.pair || once_in(4) ? 0.0 : once_in(4) ? 1.0 : 0.4;
    a.top_p = one_of(shares);
    a.top_k = once_in(2) ? 0 : below(c.V + 3);
    a.greedy = once_in(4);
    a.token_ids = tokens.data();
    a.logprobs = logprobs.data();
    a.from_teacher = from_teacher.data();
    cpu::row_sample(a);
    c.require_written(logprobs);
    for (int64_t i = 0; i < c.N; ++i) {
        require(0 <= tokens[i] && tokens[i] < c.V, "a token is outside the vocabulary");
        require(from_teacher[i] <= (c.pair && !a.greedy), "a teacher that is not there, or not asked, has drawn");
    }
}

int main(int argc, char** argv) {
    const int64_t cases = argc > 1 ? atoll(argv[1]) : 1000, seed = argc > 2 ? atoll(argv[2]) : 0;
    for (const char* name : {"baseline", "avx2", "avx512"}) {
        if (!cpu::use_instruction_set(name)) continue;
        random_bits.seed(seed);
        for (case_number = 0; case_number < cases; ++case_number) {
            const int64_t rows[] = {0, 1, 2, 3, 5, 66};
            const int64_t N = one_of(rows), V = N > 5 ? 1 + below(40) : Case::columns();
            Case c(N, V, once_in(2) ? 0 : below(9));
            once_in(2) ? check_losses(c) : check_samples(c);
            if (once_in(8)) check_scale();
        }
        printf("%s: %lld cases from seed %lld ok\n", name, (long long)cases, (long long)seed);
    }
}
