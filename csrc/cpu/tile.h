// defines: Buffer, parallel_for, Scratch, load, load_two, widen_tile, store_tile, value_at, maximum_of, maxima_of, for_pairs,
// for_one
//
// A tile is up to TILE columns of one row in fp32. fp32 rows are read in place, but for those that lie askew in memory; other
// types are widened into scratch memory once, and everything after that is independent of the element type.
#pragma once

#include <stdlib.h>

#include <new>

#include "simd.h"

namespace minillm::cpu::MINILLM_ISA {

// Uninitialised memory of n elements; std::bad_alloc where there is not so much. Not made inside a parallel_for, which no
// exception may leave.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t n) : data(static_cast<T*>(malloc((n > 0 ? n : 1) * sizeof(T)))) {
        if (data == nullptr) throw std::bad_alloc();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data); }
};

// body(i) for i in [0, n) on OpenMP's threads: with torch imported first these are torch's own.
template <class Body>
void parallel_for(int threads, int64_t n, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (n > 1 && threads > 1)
    for (int64_t i = 0; i < n; ++i) body(i);
}

template <class T, T V>
struct Constant {
    static constexpr T value = V;
};

struct alignas(64) Scratch {
    float x[TILE];
};

// Tiles are padded with -inf to whole registers: pads are columns outside the support, so the loops have no tail.
MINILLM_HD int64_t padded_size(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Column i of a row of that type (i counts columns), a register of them.
template <DType D>
MINILLM_HD F32 load(const char* row, int64_t i) {
    const char* p = row + i * size_of(D);
    if constexpr (D == DType::fp32) return F32::load(p);
    if constexpr (D == DType::bf16) return widen_bf16(p);
    return widen_fp16(p);
}
// Columns i to i + 2 LANES in two registers; in any order, which is the same for all rows of that type: a word of two bf16
// numbers is one shift and one mask.
struct Two {
    F32 a, b;
};
template <DType D>
MINILLM_HD Two load_two(const char* row, int64_t i) {
    if constexpr (D == DType::bf16) {
        WordVector w;
        memcpy(&w, row + i * 2, sizeof w);
        return {F32((FloatVector)(w << 16)), F32((FloatVector)(w & 0xffff0000u))};
    }
    return {load<D>(row, i), load<D>(row, i + LANES)};
}

template <DType D>
using TypeTag = Constant<DType, D>;

// body(TypeTag<D>()) for the type of some rows: one instantiation each of the loops that read memory.
template <class Body>
MINILLM_HD auto with_type(DType type, const Body& body) {
    if (type == DType::fp32) return body(TypeTag<DType::fp32>());
    if (type == DType::bf16) return body(TypeTag<DType::bf16>());
    return body(TypeTag<DType::fp16>());
}

MINILLM_HD F32 widen(DType dtype, const void* p) { return dtype == DType::bf16 ? widen_bf16(p) : widen_fp16(p); }

// The n columns of a row from `begin` on, as fp32; valid while the scratch is.
static inline const float* widen_tile(const Rows& rows, int64_t row, int64_t begin, int64_t n, Scratch& scratch) {
    const int64_t padded = padded_size(n);
    const char* p = rows.row(row) + begin * size_of(rows.dtype);
    if (rows.dtype == DType::fp32) {
        const bool aligned = reinterpret_cast<uintptr_t>(p) % alignof(float) == 0;
        if (n == padded && aligned) return reinterpret_cast<const float*>(p);
        memcpy(scratch.x, p, n * sizeof(float));
    } else {
        const int64_t whole = n / LANES * LANES;
        if (rows.dtype == DType::bf16)
            for (int64_t i = 0; i < whole; i += LANES) widen_bf16(p + 2 * i).store(scratch.x + i);
        else
            for (int64_t i = 0; i < whole; i += LANES) widen_fp16(p + 2 * i).store(scratch.x + i);
        if (whole < n) {
            uint16_t tail[LANES] = {};
            memcpy(tail, p + 2 * whole, (n - whole) * sizeof(uint16_t));
            widen(rows.dtype, tail).store(scratch.x + whole);
        }
    }
    for (int64_t i = n; i < padded; ++i) scratch.x[i] = -INFINITY;
    return scratch.x;
}

// The inverse: writes n columns of a row from `begin` on.
static inline void store_tile(const Rows& rows, int64_t row, int64_t begin, int64_t n, const Scratch& scratch,
                              bool finite) {
    char* p = rows.row(row) + begin * size_of(rows.dtype);
    if (rows.dtype == DType::fp32) {
        memcpy(p, scratch.x, n * sizeof(float));
        return;
    }
    const int64_t whole = n / LANES * LANES;
    if (rows.dtype == DType::bf16 && finite)
        for (int64_t i = 0; i < whole; i += LANES) narrow_bf16(F32::load(scratch.x + i), p + 2 * i, true);
    else if (rows.dtype == DType::bf16)
        for (int64_t i = 0; i < whole; i += LANES) narrow_bf16(F32::load(scratch.x + i), p + 2 * i, false);
    else
        for (int64_t i = 0; i < whole; i += LANES) narrow_fp16(F32::load(scratch.x + i), p + 2 * i);
    if (whole < n) {
        uint16_t tail[LANES];
        const F32 x = F32::load(scratch.x + whole);
        rows.dtype == DType::bf16 ? narrow_bf16(x, tail, false) : narrow_fp16(x, tail);
        memcpy(p + 2 * whole, tail, (n - whole) * sizeof(uint16_t));
    }
}

// One column's value, for the token of a row.
static inline float value_at(const Rows& rows, int64_t row, int64_t column) {
    const char* p = rows.row(row) + column * size_of(rows.dtype);
    if (rows.dtype == DType::fp32) {
        float x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    uint16_t tail[LANES] = {};
    memcpy(tail, p, sizeof(uint16_t));
    return widen(rows.dtype, tail).v[0];
}

// (z - m)/T, kept finite where it would overflow or where the column is outside: exp2_fast gives 0 for it, and 0 * x is 0.
MINILLM_HD F32 finite(F32 x) { return select(x < F32(-FLT_MAX), F32(-FLT_MAX), x); }

// The maximum of a tile, NaN ignored.
static inline float maximum_of(const float* z, int64_t n) {
    F32 m(-INFINITY);
    for (int64_t i = 0; i < padded_size(n); i += LANES) m = max_of(F32::load(z + i), m);
    return max_lane(m);
}

// The maxima of both models over the support.
struct Maxima {
    float s, t;
};
static inline Maxima maxima_of(const float* s, const float* t, int64_t n) {
    F32 ms(-INFINITY), mt(-INFINITY);
    for (int64_t i = 0; i < padded_size(n); i += LANES) {
        const F32 a = F32::load(s + i), b = F32::load(t + i), low(-INFINITY);
        const IntVector out = outside(a, b);
        ms = max_of(select(out, low, a), ms);
        mt = max_of(select(out, low, b), mt);
    }
    return {max_lane(ms), max_lane(mt)};
}

// body(i, s, t) for every register of a tile, with s and t as in rowmath: relative to their origins, in units of ln 2
// (scale = log2(e)/T), and finite.
template <class Body>
MINILLM_HD void for_pairs(const float* S, const float* T, int64_t n, float ms, float mt, float scale, Body body) {
    const F32 vms(ms), vmt(mt), k(scale), low(-FLT_MAX);
    for (int64_t i = 0; i < padded_size(n); i += LANES) {
        const F32 a = F32::load(S + i), b = F32::load(T + i);
        const IntVector out = outside(a, b);
        body(i, select(out, low, finite((a - vms) * k)), select(out, low, finite((b - vmt) * k)));
    }
}

// The same for one model: body(i, s).
template <class Body>
MINILLM_HD void for_one(const float* S, int64_t n, float ms, float scale, Body body) {
    const F32 vms(ms), k(scale);
    for (int64_t i = 0; i < padded_size(n); i += LANES) {
        const F32 a = F32::load(S + i);
        body(i, select(a == F32(-INFINITY), F32(-FLT_MAX), finite((a - vms) * k)));
    }
}

}  // namespace minillm::cpu::MINILLM_ISA
