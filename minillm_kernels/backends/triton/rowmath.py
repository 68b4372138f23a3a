"""The row mathematics as Triton functions: csrc/rowmath/state.h for tiles, whose essay has the formulas.

A tile is [K, LANES, VEC] columns of one row: VEC neighbours are one 16-byte load, LANES is the number of threads, K
the loads that a thread has in flight. Axes 0 and 2 lie inside a thread, so each thread keeps a state of its own (the
fields of a state are [LANES]) and the main loops have neither a barrier nor a shuffle; the lanes are merged once, at
the end. Rows start anywhere, but tiles start on multiples of VEC elements: the first tile of a row may begin up to
VEC - 1 columns before it (`lead`), under a mask, so that one compiled kernel serves every row width.

An element of a constexpr tuple is a plain integer in Triton 3.6: what a function of Triton takes as a constexpr gets
a name with that annotation first. And a tuple that holds a None cannot be compared with None there: kernels that take
such a tuple, or None in its place, are told which by an argument PAIR.

A state is (ms, mt, Zs, Zt, A, B, C), in the order of state.h. Merging any number of states is `rescale` to their
common origins, then addition. Origins start at -FLT_MAX rather than -inf, so that no difference of them is NaN.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ...rows import DIFFERENTIABLE, RowStats

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # -FLT_MAX
NAN: tl.constexpr = tl.constexpr(float("nan"))
MINUS_INF: tl.constexpr = tl.constexpr(float("-inf"))
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


def _statistic(name: str) -> tl.constexpr:
    """Its row in the [STATISTICS, N] tensor of row_stats."""
    return tl.constexpr(RowStats._fields.index(name))


def _coefficient(name: str) -> tl.constexpr:
    """Its row in the [COEFFICIENTS, N] tensor of row_grad."""
    return tl.constexpr(DIFFERENTIABLE.index(name))


STUDENT_ORIGIN: tl.constexpr = _statistic("student_origin")
STUDENT_LOGZ: tl.constexpr = _statistic("student_logz")
TEACHER_ORIGIN: tl.constexpr = _statistic("teacher_origin")
TEACHER_LOGZ: tl.constexpr = _statistic("teacher_logz")
REVERSE_KL: tl.constexpr = _statistic("reverse_kl")
FORWARD_KL: tl.constexpr = _statistic("forward_kl")
STUDENT_ENTROPY: tl.constexpr = _statistic("student_entropy")
STUDENT_LOGPROBS: tl.constexpr = _statistic("student_logprobs")
TEACHER_LOGPROBS: tl.constexpr = _statistic("teacher_logprobs")
STUDENT_LOGSUMEXP: tl.constexpr = _statistic("student_logsumexp")
TEACHER_LOGSUMEXP: tl.constexpr = _statistic("teacher_logsumexp")
STATISTICS: tl.constexpr = tl.constexpr(len(RowStats._fields))
C_REVERSE_KL: tl.constexpr = _coefficient("reverse_kl")
C_FORWARD_KL: tl.constexpr = _coefficient("forward_kl")
C_STUDENT_LOGPROBS: tl.constexpr = _coefficient("student_logprobs")
C_STUDENT_ENTROPY: tl.constexpr = _coefficient("student_entropy")
C_STUDENT_LOGSUMEXP: tl.constexpr = _coefficient("student_logsumexp")
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


# ---- where rows and tiles lie


@triton.jit
def program(AXIS: tl.constexpr, BACKWARDS: tl.constexpr):
    """This program's row (axis 0) or part of a row (axis 1). A second visit goes backwards: what the first one read
    last is in the L2 cache still."""
    if BACKWARDS:
        return tl.num_programs(AXIS) - 1 - tl.program_id(AXIS)
    else:
        return tl.program_id(AXIS)


@triton.jit
def row_offset(rows, row):
    """Elements from the pointer to the first column of a row; launch.Rows says why its numbers are 2x + 3."""
    inner = (rows.inner - 3) >> 1
    outer_stride = (rows.outer_stride - 3) >> 1
    inner_stride = (rows.inner_stride - 3) >> 1
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def tile_columns(SHAPE: tl.constexpr):
    """[K, LANES, VEC] column numbers from the start of a tile."""
    K: tl.constexpr = SHAPE[0]
    LANES: tl.constexpr = SHAPE[1]
    VEC: tl.constexpr = SHAPE[2]
    k = tl.arange(0, K)[:, None, None] * (LANES * VEC)
    lane = tl.arange(0, LANES)[None, :, None] * VEC
    return k + lane + tl.arange(0, VEC)[None, None, :]


@triton.jit
def aligned_start(rows, row, lead, ALIGNED: tl.constexpr, SHAPE: tl.constexpr):
    """The pointer to the first tile of a row, `lead` columns before the row."""
    VEC: tl.constexpr = SHAPE[2]
    offset = row_offset(rows, row) - lead
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return rows.pointer + offset


@triton.jit
def tile_span(V, width, lead, SHAPE: tl.constexpr, BACKWARDS: tl.constexpr = False):
    """This program's part of the tiles of a row of that width: [first, last), of which [inner, outer) lie wholly
    inside the V columns. The parts are the programs of axis 1."""
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    n_tiles = tl.cdiv(width + lead, SIZE)
    each = tl.cdiv(n_tiles, tl.num_programs(1))
    first = tl.minimum(program(1, BACKWARDS) * each, n_tiles)
    last = tl.minimum(first + each, n_tiles)
    inner = tl.minimum(tl.maximum(first, tl.minimum(lead, 1)), last)
    outer = tl.maximum(tl.minimum(last, (V + lead) // SIZE), inner)
    return first, inner, outer, last


@triton.jit
def edge_tile(i, first, inner, outer):
    """The i-th tile that is not wholly inside: those of [first, inner), then those from `outer` on."""
    before = inner - first
    return tl.where(i < before, first + i, outer + i - before)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to the type of an output. The interpreter truncates to bf16 where the hardware rounds to nearest."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000, bits)
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def zero_row(out, width, lead, SHAPE: tl.constexpr, BACKWARDS: tl.constexpr = False):
    """Zeros over this program's part of a row of a gradient."""
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    columns = tile_columns(SHAPE)
    zero = tl.zeros(columns.shape, out.dtype.element_ty)
    first, inner, outer, last = tile_span(width, width, lead, SHAPE, BACKWARDS)
    for tile in range(inner, outer):
        tl.store(out + tile * SIZE + columns, zero)
    for i in range(inner - first + last - outer):
        at = edge_tile(i, first, inner, outer) * SIZE + columns
        tl.store(out + at, zero, (at >= lead) & (at < width + lead))


# ---- logits


@triton.jit
def lead_of(rows, row, SHAPE: tl.constexpr):
    """Columns between the last multiple of VEC elements and the start of a row."""
    return (row_offset(rows, row) % SHAPE[2]).to(tl.int32)


@triton.jit
def row_pair(student, teacher, row, lead, ALIGNED: tl.constexpr, SHAPE: tl.constexpr):
    """The pointers to the first tile of both models' row; the student's twice where there is no teacher."""
    s = aligned_start(student, row, lead, True, SHAPE)
    if teacher is None:
        t = s
    else:
        t = aligned_start(teacher, row, lead, ALIGNED, SHAPE)
    return s, t


@triton.jit
def load_pair(pointers, columns, lead, V, PAIR: tl.constexpr, MASKED: tl.constexpr):
    """A tile of both models in fp32, -inf beyond the row; of the student twice where there is no teacher."""
    s, t = pointers
    if MASKED:
        there = (columns >= lead) & (columns < V + lead)
        a = tl.load(s + columns, there, other=MINUS_INF).to(tl.float32)
        b = a
        if PAIR:
            b = tl.load(t + columns, there, other=MINUS_INF).to(tl.float32)
    else:
        a = tl.load(s + columns).to(tl.float32)
        b = a
        if PAIR:
            b = tl.load(t + columns).to(tl.float32)
    return a, b


@triton.jit
def is_minus_inf(a):
    """Of half the number, in fp32: a comparison of the number itself is made in the type it was loaded in."""
    return 0.5 * a == MINUS_INF


@triton.jit
def outside(a, b):
    """-inf in one model and not NaN or +inf in the other; by halves: the sum of two finite numbers may overflow."""
    return 0.5 * a + 0.5 * b == MINUS_INF


@triton.jit
def relative(z, origin, scale):
    """(z - origin) log2(e)/T, finite where it would overflow: 2^x is 0 for it, and 0 * x is 0. NaN stays."""
    return tl.maximum((z - origin) * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_fast(x):
    """log2 of normal numbers in one instruction, to 2^-22 (absolute near 1): the accurate one takes twenty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def log2_probability(z, origin, log2Z, scale):
    """log2 of the probability of a logit, from the saved statistics; finite as `relative`."""
    return tl.maximum((z - origin) * scale - log2Z, LOWEST, propagate_nan=tl.PropagateNan.ALL)


# ---- the state


@triton.jit
def origin_change(old, new, scale):
    """(old - new)/T in units of ln 2, and 2^ of it; 0 and 1 for equal origins, also when both are infinite."""
    d = tl.where(old == new, 0.0, (old - new) * scale)
    return d, tl.exp2(d)


@triton.jit
def rescale(state, ms, mt, scale, PAIR: tl.constexpr):
    """The same columns' state relative to other origins. A, B, C are in units of ln 2 inside a kernel."""
    old_s, old_t, Zs, Zt, A, B, C = state
    ds, f = origin_change(old_s, ms, scale)
    # A part that vanishes against the other adds nothing, however large its differences are.
    if PAIR:
        dt, g = origin_change(old_t, mt, scale)
        A = tl.where(f == 0.0, 0.0, f * (A + Zs * (ds - dt)))
        C = tl.where(g == 0.0, 0.0, g * (C + Zt * (dt - ds)))
        Zt = g * Zt
    B = tl.where(f == 0.0, 0.0, f * (B + Zs * ds))
    return ms, mt, f * Zs, Zt, A, B, C


@triton.jit
def plus(a, b):
    """The union of two states of equal origins."""
    return a[0], a[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6]


@triton.jit
def empty_state(LANES: tl.constexpr):
    origin = tl.full([LANES], LOWEST, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    return origin, origin, zero, zero, zero, zero, zero


# A tile may also be [LANES, columns], as matmuls make them: then a lane is a row.


@triton.jit
def in_lane(x):
    """The sum of a tile over the columns of each lane."""
    if len(x.shape) == 2:
        return tl.sum(x, 1)
    else:
        return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    if len(x.shape) == 2:
        return tl.max(x, 1)
    else:
        return tl.max(tl.max(x, 2), 0)


@triton.jit
def over_columns(lane, x):
    """A value for each lane, in the shape that broadcasts against a tile."""
    if len(x.shape) == 2:
        return lane[:, None]
    else:
        return lane[None, :, None]


@triton.jit
def add_tile(state, a, b, scale, PAIR: tl.constexpr):
    """A state and the columns of a tile: logits a of the student and b of the teacher, -inf where there is none."""
    if PAIR:
        out = outside(a, b)
        a = tl.where(out, MINUS_INF, a)
        b = tl.where(out, MINUS_INF, b)
        mt = tl.maximum(state[1], lane_max(b))
        t = relative(b, over_columns(mt, b), scale)
    ms = tl.maximum(state[0], lane_max(a))
    s = relative(a, over_columns(ms, a), scale)
    es = tl.exp2(s)
    if PAIR:
        et = tl.exp2(t)
        d = s - t
        sums = ms, mt, in_lane(es), in_lane(et), in_lane(es * d), in_lane(es * s), in_lane(-et * d)
    else:
        mt = state[1]
        sums = ms, mt, in_lane(es), 0.0, 0.0, in_lane(es * s), 0.0
    state = rescale(state, ms, mt, scale, PAIR)
    return plus(state, sums)


@triton.jit
def merge_all(state, scale, PAIR: tl.constexpr):
    """One state (scalars) from the states of a vector of lanes or parts."""
    ms = tl.max(state[0], 0)
    mt = tl.max(state[1], 0)
    x = rescale(state, ms, mt, scale, PAIR)
    return ms, mt, tl.sum(x[2], 0), tl.sum(x[3], 0), tl.sum(x[4], 0), tl.sum(x[5], 0), tl.sum(x[6], 0)
