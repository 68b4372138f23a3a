// defines: NoTeacher, load_one, load_raw, store_one, value_at, Raw, Row, Columns, Chunk, Part, relative, warp_reduce, across_warps,
// block_reduce: what the kernels share
//
// A block of THREADS works on one part of one row at a time: the whole row, or one of `splits` runs of chunks when there are
// fewer rows than blocks that the card holds. In a chunk a thread takes CHUNK columns, as UNITS vectors of 16 bytes (of 8
// where a 16-bit row goes with an fp32 row) that are THREADS vectors apart: all its loads are in flight before the first is
// used, and a warp's loads are whole sectors. Which columns are a thread's does not depend on where the row lies, so a row
// gives the same bits anywhere. A row that is not aligned is read by the two aligned vectors around each unit, the second of
// them from the L1 cache, and these loads too are all in flight before the first is used. Columns that no unit holds are
// taken one by one, a thread each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <float.h>
#include <string.h>

#include "../args.h"

#ifdef __CUDACC__  // tests/csrc/host_cuda.h has these for the host
#define MINILLM_SHARED(T, name) __shared__ T name
#define MINILLM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define MINILLM_TOUCH(p, bytes, store)  // the host counts and checks what is read and written
#endif

namespace minillm::cuda {

constexpr int WARP = 32, THREADS = 256, WARPS = THREADS / WARP, CHUNK = 16;
// What a multiprocessor must hold at least: 128 registers a thread. Two blocks have 32 KB of loads in flight; an H100 asks
// for 18 KB (3.35 TB/s, 132 multiprocessors, 700 ns). One 16-bit model alone takes twice as many columns at a time, or it
// would have half as much in flight.
constexpr int BLOCKS = 2;
constexpr unsigned ALL_LANES = ~0u;

struct NoTeacher {};  // in place of an element type

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class E>
__device__ E load_raw(const E* p) {
    MINILLM_TOUCH(p, sizeof(E), false);
    return *p;
}
template <class E>
__device__ float load_one(const E* p) {
    return widen(load_raw(p));
}
__device__ inline void store_one(float* p, float x) {
    MINILLM_TOUCH(p, 4, true);
    *p = x;
}
__device__ inline void store_one(__nv_bfloat16* p, float x) {
    MINILLM_TOUCH(p, 2, true);
    *p = __float2bfloat16_rn(x);
}
__device__ inline void store_one(__half* p, float x) {
    MINILLM_TOUCH(p, 2, true);
    *p = __float2half_rn(x);
}

__device__ inline bool unread(const uint8_t* mask, int64_t row) { return mask != nullptr && mask[row] == 0; }

template <class E>
__device__ E* row_of(const Rows& rows, int64_t row) {
    if constexpr (std::is_same_v<E, NoTeacher>) return nullptr;
    return reinterpret_cast<E*>(rows.row(row));
}

// One column of a row whose type is known only now.
__device__ inline float value_at(const char* row, DType dtype, int64_t column) {
    const char* p = row + column * size_of(dtype);
    if (dtype == DType::fp32) return load_one(reinterpret_cast<const float*>(p));
    if (dtype == DType::bf16) return load_one(reinterpret_cast<const __nv_bfloat16*>(p));
    return load_one(reinterpret_cast<const __half*>(p));
}
__device__ inline float value_at(const Rows& rows, int64_t row, int64_t column) {
    return value_at(rows.row(row), rows.dtype, column);
}

// N columns as they lie in memory. Indices are constants once the loops are unrolled.
template <class E, int N>
struct Raw {
    uint32_t word[N * sizeof(E) / 4];

    __device__ float operator[](int i) const {
        if constexpr (sizeof(E) == 4) return __uint_as_float(word[i]);
        const uint32_t w = word[i / 2];
        // A bf16 number is the upper half of an fp32 one.
        if constexpr (std::is_same_v<E, __nv_bfloat16>) return __uint_as_float(i % 2 ? w & 0xffff0000u : w << 16);
        __half_raw h;
        h.x = static_cast<unsigned short>(i % 2 ? w >> 16 : w);
        return __half2float(h);
    }
    static __device__ Raw of(const float (&x)[N]) {
        Raw r;
        if constexpr (sizeof(E) == 4) {
            memcpy(r.word, x, sizeof r.word);
        } else {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                if constexpr (std::is_same_v<E, __nv_bfloat16>) {
                    const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
                    memcpy(&r.word[i], &two, 4);
                } else {
                    const __half2 two = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
                    memcpy(&r.word[i], &two, 4);
                }
            }
        }
        return r;
    }
    // Columns that do not exist: -inf, as those outside the support.
    static __device__ Raw absent() {
        constexpr uint32_t minus_infinity =
            sizeof(E) == 4 ? 0xff800000u : std::is_same_v<E, __nv_bfloat16> ? 0xff80ff80u : 0xfc00fc00u;
        Raw r;
#pragma unroll
        for (uint32_t& w : r.word) w = minus_infinity;
        return r;
    }
};
template <int N>
struct Raw<NoTeacher, N> {
    __device__ float operator[](int) const { return 0.0f; }
    static __device__ Raw absent() { return {}; }
};

// One load of 8 or 16 bytes.
template <class R, class E>
__device__ R load_aligned(const E* p) {
    MINILLM_TOUCH(p, sizeof(R), false);
    R r;
    if constexpr (sizeof(R) == 16) {
        const uint4 x = *reinterpret_cast<const uint4*>(p);
        r.word[0] = x.x, r.word[1] = x.y, r.word[2] = x.z, r.word[3] = x.w;
    } else {
        const uint2 x = *reinterpret_cast<const uint2*>(p);
        r.word[0] = x.x, r.word[1] = x.y;
    }
    return r;
}

// A row as units of N columns, wherever it lies. A unit lies in two aligned vectors, or is one; they must lie in the row.
template <class E, int N>
struct Row {
    using Unit = Raw<E, N>;
    const E* p;
    unsigned behind;  // bytes that p is behind an aligned address

    __device__ explicit Row(const E* p) : p(p), behind(reinterpret_cast<uintptr_t>(p) % sizeof(Unit)) {}

    __device__ bool aligned() const { return behind == 0; }
    __device__ Unit load_first(int unit) const { return load_aligned<Unit>(p + unit * N - behind / sizeof(E)); }
    __device__ Unit load_second(int unit) const { return aligned() ? Unit::absent() : load_first(unit + 1); }
    // The words from byte `behind` of both on, by powers of two.
    __device__ Unit join(const Unit& first, const Unit& second) const {
        constexpr int WORDS = sizeof(Unit) / 4;
        uint32_t w[2 * WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) w[i] = first.word[i], w[i + WORDS] = second.word[i];
#pragma unroll
        for (int step = WORDS / 2; step > 0; step /= 2)
#pragma unroll
            for (int i = 0; i + step < 2 * WORDS; ++i) w[i] = behind / 4 & unsigned(step) ? w[i + step] : w[i];
        Unit r;
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            r.word[i] = sizeof(E) == 2 ? __funnelshift_r(w[i], w[i + 1], 8 * (behind & 2)) : w[i];
        return r;
    }
};
template <int N>
struct Row<NoTeacher, N> {
    __device__ explicit Row(const NoTeacher*) {}
    __device__ bool aligned() const { return true; }
    __device__ Raw<NoTeacher, N> load_first(int) const { return {}; }
    __device__ Raw<NoTeacher, N> load_second(int) const { return {}; }
    __device__ Raw<NoTeacher, N> join(const Raw<NoTeacher, N>&, const Raw<NoTeacher, N>&) const { return {}; }
};

// Units of a row that may not be aligned: the constructor asks for all their vectors at once, join() waits. Those that do not
// exist are absent(): so are both their vectors, and what is joined of them.
template <class E, int N, int UNITS>
struct Unaligned {
    Raw<E, N> first[UNITS], second[UNITS];

    template <class UnitOf, class Exists>
    __device__ Unaligned(const Row<E, N>& row, const UnitOf& unit_of, const Exists& exists) {
#pragma unroll
        for (int j = 0; j < UNITS; ++j) {
            first[j] = exists(j) ? row.load_first(unit_of(j)) : Raw<E, N>::absent();
            second[j] = exists(j) ? row.load_second(unit_of(j)) : Raw<E, N>::absent();
        }
    }
    __device__ void join(Raw<E, N> (&x)[UNITS], const Row<E, N>& row) const {
#pragma unroll
        for (int j = 0; j < UNITS; ++j) x[j] = row.join(first[j], second[j]);
    }
};

// To an aligned address, in one store.
template <class E, int N>
__device__ void store(E* p, const Raw<E, N>& r) {
    MINILLM_TOUCH(p, sizeof r, true);
    if constexpr (sizeof r == 16)
        *reinterpret_cast<uint4*>(p) = make_uint4(r.word[0], r.word[1], r.word[2], r.word[3]);
    else
        *reinterpret_cast<uint2*>(p) = make_uint2(r.word[0], r.word[1]);
}

// How many columns make a vector.
template <class S, class T = NoTeacher>
constexpr int UNIT = sizeof(S) == 4 || sizeof(T) == 4 ? 4 : 8;

constexpr int LINE = 64;  // bf16 columns in a line of the cache

// The columns of a row: `head` single ones, `units` vectors of WIDTH, the rest single ones again. There are WIDTH at least on
// each side, so that the aligned vectors around every unit lie in the row; in front LINE, so that those of a warp begin where
// a line does if the row does. Offsets inside a row fit 31 bits (the launchers check), those of rows need 64.
template <class S, class T, int EACH = std::is_same_v<T, NoTeacher> && sizeof(S) == 2 ? 2 * CHUNK : CHUNK>
struct Columns {
    static constexpr int WIDTH = UNIT<S, T>;
    static constexpr int UNITS = EACH / WIDTH, COLUMNS = EACH;  // of a thread and chunk
    int V, head, units;

    // `more` columns in front, so that the units of a gradient are aligned.
    __device__ explicit Columns(int64_t V, int more = 0)
        : V(int(V)), head(min(LINE + more, this->V)), units(max(this->V - head - WIDTH, 0) / WIDTH) {}

    template <class E>
    __device__ Row<E, WIDTH> row(const E* p) const {
        return Row<E, WIDTH>(p + head);
    }
    __device__ int chunks() const { return (units + UNITS * THREADS - 1) / (UNITS * THREADS); }
    __device__ int unit(int chunk, int j) const { return (chunk * UNITS + j) * THREADS + int(threadIdx.x); }
    // The single column that is this thread's, or -1.
    __device__ int single() const {
        const int i = threadIdx.x, v = i < head ? i : i + units * WIDTH;
        return v < V ? v : -1;
    }
};

// The single column of a thread, of both models. Where a block waits for all its columns: asked for before the units, used
// after them.
template <class S, class T>
struct Single {
    int v;  // -1: the thread has none
    S s = {};
    T t = {};

    template <class C>
    __device__ Single(const C& c, const S* student, const T* teacher, bool any = true) : v(any ? c.single() : -1) {
        if (v < 0) return;
        s = load_raw(student + v);
        if constexpr (!std::is_same_v<T, NoTeacher>) t = load_raw(teacher + v);
    }
    __device__ float student() const { return widen(s); }
    __device__ float teacher() const {
        if constexpr (std::is_same_v<T, NoTeacher>) return 0.0f;
        else return widen(t);
    }
};

// The units of a thread and chunk, of both models. Units that do not exist are absent(). A branch for each common case, so
// that its loads follow each other.
template <class S, class T, int EACH>
struct Chunk {
    using C = Columns<S, T, EACH>;
    Raw<S, C::WIDTH> s[C::UNITS];
    Raw<T, C::WIDTH> t[C::UNITS];

    __device__ Chunk(const C& c, const Row<S, C::WIDTH>& student, const Row<T, C::WIDTH>& teacher, int chunk) {
        const auto unit_of = [&](int j) { return c.unit(chunk, j); };
        if ((chunk + 1) * C::UNITS * THREADS > c.units) {
            read_unaligned(student, teacher, unit_of, [&](int j) { return unit_of(j) < c.units; });
        } else if (student.aligned() && teacher.aligned()) {
#pragma unroll
            for (int j = 0; j < C::UNITS; ++j) {
                s[j] = student.load_first(unit_of(j));
                t[j] = teacher.load_first(unit_of(j));
            }
        } else {
            read_unaligned(student, teacher, unit_of, [](int) { return true; });
        }
    }

private:
    template <class UnitOf, class Exists>
    __device__ void read_unaligned(const Row<S, C::WIDTH>& student, const Row<T, C::WIDTH>& teacher, const UnitOf& unit_of,
                                   const Exists& exists) {
        const Unaligned<S, C::WIDTH, C::UNITS> of_student(student, unit_of, exists);
        if constexpr (sizeof(S) == 4) {
            of_student.join(s, student);
            __syncwarp();  // keeps the compiler from asking for both models at once where that takes too many registers
        }
        const Unaligned<T, C::WIDTH, C::UNITS> of_teacher(teacher, unit_of, exists);
        if constexpr (sizeof(S) < 4) of_student.join(s, student);
        of_teacher.join(t, teacher);
    }
};

// A part of a row: chunks [first, last), and, in the last part, the single columns.
struct Part {
    int first, last;
    bool is_last;

    template <class C>
    __device__ Part(const C& c, int split, int splits)
        : first(split * c.chunks() / splits), last((split + 1) * c.chunks() / splits), is_last(split + 1 == splits) {}
};

// (z - origin) log2(e)/T + plus, kept finite: 2^x of it is 0 where it overflows or where the column is outside the support.
// One rounding, here and where it stands without the test: a column gives the same bits in a unit and alone.
__device__ inline float relative(float z, float origin, float k, bool is_outside, float plus = 0.0f) {
    const float x = fmaf(z - origin, k, plus);
    return is_outside || x < -FLT_MAX ? -FLT_MAX : x;  // NaN stays
}

// ---- reductions in a fixed order: the same bits every time ---------------------------------------------------------------

template <class X>
__device__ X shuffle_down(const X& x, int lanes) {
    static_assert(sizeof(X) % 4 == 0);
    uint32_t words[sizeof(X) / 4];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (uint32_t& w : words) w = __shfl_down_sync(ALL_LANES, w, lanes);
    X r;
    memcpy(&r, words, sizeof r);
    return r;
}

// In lane 0, of the first LANES lanes; all call it. A large X in a rolled loop: combining is long then, and this is once a row.
template <int LANES = WARP, class X, class Combine>
__device__ X warp_reduce(X x, const Combine& combine) {
    if constexpr (sizeof(X) <= 8) {
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x = combine(x, shuffle_down(x, lanes));
    } else {
#pragma unroll 1
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x = combine(x, shuffle_down(x, lanes));
    }
    return x;
}

template <class X>
struct OfWarps {
    X x[WARPS];
};

// In thread 0, of what the lanes 0 hold; `reduce` puts the first WARPS lanes of a warp together. All threads of the block must
// call it; the next call may follow at once.
template <class X, class Reduce>
__device__ X across_warps(X x, const Reduce& reduce) {
    MINILLM_SHARED(OfWarps<X>, warps);
    if (threadIdx.x % WARP == 0) warps.x[threadIdx.x / WARP] = x;
    __syncthreads();
    if (threadIdx.x < WARP) x = reduce(warps.x[threadIdx.x % WARPS]);
    __syncthreads();  // before a next call overwrites what warp 0 reads
    return x;
}
template <class X, class Combine>
__device__ X block_reduce(const X& x, const Combine& combine) {
    return across_warps(warp_reduce(x, combine), [&](const X& y) { return warp_reduce<WARPS>(y, combine); });
}

}  // namespace minillm::cuda
