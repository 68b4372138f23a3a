"""row_divergence and its gradient: JSD, skew KL and TVD, whose mixture needs both normalisers first.

The formulas are those of csrc/rowmath/divergence.h. The value and sum_v q_v slope_v take one more read of the pair,
2V elements; the gradient another, and one write. Each divergence is a kernel of its own; beta is a run-time value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import MIXTURE_DIVERGENCES, Pair
from . import rowmath as rm
from .launch import Rows, per_row, tiles_of

JSD: tl.constexpr = tl.constexpr(MIXTURE_DIVERGENCES.index("jsd"))
SKEW_FORWARD_KL: tl.constexpr = tl.constexpr(MIXTURE_DIVERGENCES.index("skew_forward_kl"))
SKEW_REVERSE_KL: tl.constexpr = tl.constexpr(MIXTURE_DIVERGENCES.index("skew_reverse_kl"))
TVD: tl.constexpr = tl.constexpr(MIXTURE_DIVERGENCES.index("tvd"))


@triton.jit
def divergence_term(a, b, origins, scale, beta, KIND: tl.constexpr):
    """(q, value, q * slope) of a tile: f(q, p) and q dD/dq, logarithms in base 2.

    value is in units of ln 2 but for TVD, q * slope for JSD alone (`slope_unit`). Columns outside the support have
    q = p = 0 and add nothing; every logarithm is finite, so that 0 times it is 0.
    """
    ms, mt, log2Zs, log2Zt = origins
    out = rm.outside(a, b)
    lq = rm.log2_probability(tl.where(out, rm.MINUS_INF, a), ms, log2Zs, scale)
    lp = rm.log2_probability(tl.where(out, rm.MINUS_INF, b), mt, log2Zt, scale)
    q = tl.exp2(lq)
    p = tl.exp2(lp)
    if KIND == TVD:
        d = q - p
        half = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, d))  # d: 0 at ties, NaN stays NaN
        value = d * half
        q_slope = q * half
    else:
        if KIND == SKEW_REVERSE_KL:
            of_q = beta * q
            m = (1.0 - beta) * p + of_q
        else:
            of_q = (1.0 - beta) * q
            m = beta * p + of_q
        underflow = m < rm.SMALLEST_NORMAL  # then both probabilities are below 1e-38 and add nothing
        lm = rm.log2_fast(tl.where(underflow, 1.0, m))
        log_p_m = tl.where(underflow, 0.0, lp - lm)
        log_q_m = tl.where(underflow, 0.0, lq - lm)
        if KIND == JSD:
            q_slope = of_q * log_q_m
            value = beta * p * log_p_m + q_slope
        elif KIND == SKEW_FORWARD_KL:
            q_slope = -of_q * tl.exp2(log_p_m)  # p/m
            value = p * log_p_m
        else:
            value = q * log_q_m
            q_slope = value * rm.LN2 + (q - of_q * tl.exp2(log_q_m))
    return q, value, q_slope


@triton.jit
def value_unit(KIND: tl.constexpr):
    unit: tl.constexpr = 1.0 if KIND == TVD else rm.LN2
    return unit


@triton.jit
def slope_unit(KIND: tl.constexpr):
    unit: tl.constexpr = rm.LN2 if KIND == JSD else 1.0
    return unit


@triton.jit
def normalisers(stats, N, row):
    """(ms, mt, log2 Zs, log2 Zt)."""
    stats += row
    ms = tl.load(stats + rm.STUDENT_ORIGIN * N)
    mt = tl.load(stats + rm.TEACHER_ORIGIN * N)
    log2Zs = tl.load(stats + rm.STUDENT_LOGZ * N) * rm.LOG2E
    return ms, mt, log2Zs, tl.load(stats + rm.TEACHER_LOGZ * N) * rm.LOG2E


@triton.jit
def add_terms(total, centre, a, b, origins, scale, beta, KIND: tl.constexpr):
    _, value, q_slope = divergence_term(a, b, origins, scale, beta, KIND)
    return total + rm.in_lane(value), centre + rm.in_lane(q_slope)


@triton.jit(do_not_specialize=["N", "V"])
def row_divergence_kernel(
    student,  # Rows
    teacher,  # Rows
    mask,
    stats,  # [STATISTICS, N]
    partial,  # [2, N, parts]
    N,
    V,
    inv_T,
    beta,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    LANES: tl.constexpr = SHAPE[1]
    row = rm.program(0, True)  # after row_stats; the gradient then goes forwards
    scale = inv_T * rm.LOG2E
    if mask is not None:
        V = tl.where(tl.load(mask + row), V, 0)
    lead = rm.lead_of(student, row, SHAPE)
    pointers = rm.row_pair(student, teacher, row, lead, ALIGNED, SHAPE)
    columns = rm.tile_columns(SHAPE)
    origins = normalisers(stats, N, row)
    total = tl.zeros([LANES], tl.float32)
    centre = tl.zeros([LANES], tl.float32)
    first, inner, outer, last = rm.tile_span(V, V, lead, SHAPE, True)
    for tile in range(inner, outer):
        a, b = rm.load_pair(pointers, tile * SIZE + columns, lead, V, True, False)
        total, centre = add_terms(total, centre, a, b, origins, scale, beta, KIND)
    for i in range(inner - first + last - outer):
        tile = rm.edge_tile(i, first, inner, outer)
        a, b = rm.load_pair(pointers, tile * SIZE + columns, lead, V, True, True)
        total, centre = add_terms(total, centre, a, b, origins, scale, beta, KIND)
    at = partial + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, tl.sum(total, 0) * value_unit(KIND))
    tl.store(at + N.to(tl.int64) * tl.num_programs(1), tl.sum(centre, 0) * slope_unit(KIND))


@triton.jit
def divergence_gradient(a, b, origins, centre, factor, scale, beta, KIND: tl.constexpr):
    q, _, q_slope = divergence_term(a, b, origins, scale, beta, KIND)
    return tl.where(rm.outside(a, b) | rm.is_minus_inf(a), 0.0, (q_slope - q * centre) * factor)


@triton.jit(do_not_specialize=["N", "V", "width"])
def row_divergence_grad_kernel(
    student,  # Rows
    teacher,  # Rows
    stats,  # [STATISTICS, N]
    values,  # [2, N]: the divergence and sum q slope
    upstream,  # [N]
    grad,  # Rows of that width: 0 from V on
    N,
    V,
    width,
    inv_T,
    beta,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    row = tl.program_id(0)
    scale = inv_T * rm.LOG2E
    lead = rm.lead_of(student, row, SHAPE)
    pointers = rm.row_pair(student, teacher, row, lead, ALIGNED, SHAPE)
    out = rm.aligned_start(grad, row, lead, ALIGNED, SHAPE)
    columns = rm.tile_columns(SHAPE)
    origins = normalisers(stats, N, row)
    centre = tl.load(values + N + row) / slope_unit(KIND)
    factor = tl.load(upstream + row) * inv_T * slope_unit(KIND)
    if factor != 0.0:
        first, inner, outer, last = rm.tile_span(V, width, lead, SHAPE)
        for tile in range(inner, outer):
            at = tile * SIZE + columns
            a, b = rm.load_pair(pointers, at, lead, V, True, False)
            g = divergence_gradient(a, b, origins, centre, factor, scale, beta, KIND)
            tl.store(out + at, rm.rounded(g, out.dtype.element_ty))
        for i in range(inner - first + last - outer):
            at = rm.edge_tile(i, first, inner, outer) * SIZE + columns
            a, b = rm.load_pair(pointers, at, lead, V, True, True)
            g = divergence_gradient(a, b, origins, centre, factor, scale, beta, KIND)
            tl.store(out + at, rm.rounded(g, out.dtype.element_ty), (at >= lead) & (at < width + lead))
    else:
        rm.zero_row(out, width, lead, SHAPE)


def row_divergence(pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
    student, teacher, temperature, vocab_size = pair
    assert teacher is not None
    n_rows = pair.n_rows
    tiles = tiles_of(n_rows, vocab_size, student, teacher)
    partial = torch.empty((2, n_rows, tiles.parts), dtype=torch.float32, device=student.device)
    if n_rows > 0:
        row_divergence_kernel[(n_rows, tiles.parts)](
            Rows.of(student),
            Rows.of(teacher),
            per_row(mask, torch.bool),
            per_row(stats, torch.float32),
            partial,
            n_rows,
            vocab_size,
            1.0 / temperature,
            beta,
            KIND=MIXTURE_DIVERGENCES.index(divergence),
            ALIGNED=tiles.aligned,
            SHAPE=tiles.shape,
            **tiles.options,
        )
    return (partial[..., 0] if tiles.parts == 1 else partial.sum(-1)).reshape(2, *student.shape[:-1])


def row_divergence_grad(
    pair: Pair,
    stats: Tensor,
    values: Tensor,
    scale: Tensor,
    divergence: str,
    beta: float,
    out: Tensor | None = None,
) -> Tensor:
    student, teacher, temperature, vocab_size = pair
    assert teacher is not None
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if out is None else out
    n_rows = pair.n_rows
    if n_rows == 0:
        return grad
    tiles = tiles_of(n_rows, student.shape[-1], student, teacher, grad)
    row_divergence_grad_kernel[(n_rows, tiles.parts)](
        Rows.of(student),
        Rows.of(teacher),
        per_row(stats, torch.float32),
        per_row(values, torch.float32),
        per_row(scale, torch.float32),
        Rows.of(grad),
        n_rows,
        vocab_size,
        student.shape[-1],
        1.0 / temperature,
        beta,
        KIND=MIXTURE_DIVERGENCES.index(divergence),
        ALIGNED=tiles.aligned,
        SHAPE=tiles.shape,
        **tiles.options,
    )
    return grad
