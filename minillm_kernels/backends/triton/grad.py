"""row_grad: the gradient of any weighted sum of a row's differentiable statistics, in one read and one write.

2V elements read and V written a row pair, two exponentials an element. With s, t relative to the saved origins and in
units of ln 2 (csrc/rowmath/gradient.h):

    dL/dz_v = q_v (k_d (s - t) + k_s s + k_1) - k_p p_v + [v = y] k_y

A row without a coefficient is not read: zeros are written. The gradient may be written over the student's logits. Rows
and their parts are walked backwards (rowmath.program).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import Pair
from . import rowmath as rm
from .launch import Rows, per_row, tiles_of


@triton.jit
def gradient_row(stats, coefficients, N, row, inv_T, factor):
    """The constants of a row, (ms, mt, log2 Zs, log2 Zt, kd, ks, k1, kp, ky), and whether it has any coefficient."""
    stats += row
    c = coefficients + row
    cr = factor * tl.load(c + rm.C_REVERSE_KL * N)
    cf = factor * tl.load(c + rm.C_FORWARD_KL * N)
    cy = factor * tl.load(c + rm.C_STUDENT_LOGPROBS * N)
    ch = factor * tl.load(c + rm.C_STUDENT_ENTROPY * N)
    cl = factor * tl.load(c + rm.C_STUDENT_LOGSUMEXP * N)
    wanted = (cr != 0.0) | (cf != 0.0) | (cy != 0.0) | (ch != 0.0) | (cl != 0.0)
    lnZs = tl.load(stats + rm.STUDENT_LOGZ * N)
    lnZt = tl.load(stats + rm.TEACHER_LOGZ * N)
    # log q(y) = -inf for a token outside the support: it has no gradient.
    cy = tl.where(tl.load(stats + rm.STUDENT_LOGPROBS * N) == rm.MINUS_INF, 0.0, cy)
    # Guarded, so that a statistic that no coefficient asks for (the KL of a one-model row) cannot bring a NaN in.
    of_kl = tl.where(cr == 0.0, 0.0, cr * (lnZs - lnZt + tl.load(stats + rm.REVERSE_KL * N)))
    of_entropy = tl.where(ch == 0.0, 0.0, ch * (lnZs - tl.load(stats + rm.STUDENT_ENTROPY * N)))
    k1 = inv_T * (cf - cy + cl - of_kl + of_entropy)
    ms = tl.load(stats + rm.STUDENT_ORIGIN * N)
    mt = tl.load(stats + rm.TEACHER_ORIGIN * N)
    kd = inv_T * cr * rm.LN2
    ks = inv_T * -ch * rm.LN2
    return (ms, mt, lnZs * rm.LOG2E, lnZt * rm.LOG2E, kd, ks, k1, inv_T * cf, inv_T * cy), wanted


@triton.jit
def gradient(k, a, b, is_token, scale, PAIR: tl.constexpr):
    """d/dz of a tile of logits a (student) and b (teacher); exactly 0 outside the support, or where a is -inf."""
    ms, mt, log2Zs, log2Zt, kd, ks, k1, kp, ky = k
    s = rm.relative(a, ms, scale)
    q = tl.exp2(s - log2Zs)
    if PAIR:
        t = rm.relative(b, mt, scale)
        of_q = kd * (s - t) + (ks * s + k1)
    else:
        of_q = ks * s + k1
    # A probability that underflowed has no gradient, whatever (perhaps infinite) logarithm stands beside it.
    g = tl.where(q == 0.0, 0.0, q * of_q)
    if PAIR:
        g -= kp * tl.exp2(t - log2Zt)
    g = tl.where(is_token, g + ky, g)
    return tl.where(rm.outside(a, b) | rm.is_minus_inf(a), 0.0, g)


@triton.jit(do_not_specialize=["N", "V", "width"])
def row_grad_kernel(
    student,  # Rows
    teacher,  # Rows, or None
    token_ids,
    stats,  # [STATISTICS, N]
    coefficients,  # [COEFFICIENTS, N]
    factor,  # of the coefficients, where they are those of the gradient that stands there already; or None
    grad,  # Rows of that width: 0 from V on
    N,
    V,
    width,
    inv_T,
    ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    PAIR: tl.constexpr = teacher is not None
    row = rm.program(0, True)
    lead = rm.lead_of(student, row, SHAPE)
    pointers = rm.row_pair(student, teacher, row, lead, ALIGNED, SHAPE)
    out = rm.aligned_start(grad, row, lead, ALIGNED, SHAPE)
    columns = rm.tile_columns(SHAPE)
    scale = inv_T * rm.LOG2E
    token = -1
    if token_ids is not None:
        token = tl.load(token_ids + row) + lead
    f = 1.0
    if factor is not None:
        f = tl.load(factor)
        if f == 1.0:
            return
    k, wanted = gradient_row(stats, coefficients, N, row, inv_T, f)
    if wanted:
        first, inner, outer, last = rm.tile_span(V, width, lead, SHAPE, True)
        for tile in range(inner, outer):
            at = tile * SIZE + columns
            a, b = rm.load_pair(pointers, at, lead, V, PAIR, False)
            g = gradient(k, a, b, at == token, scale, PAIR)
            tl.store(out + at, rm.rounded(g, out.dtype.element_ty))
        for i in range(inner - first + last - outer):
            at = rm.edge_tile(i, first, inner, outer) * SIZE + columns
            a, b = rm.load_pair(pointers, at, lead, V, PAIR, True)
            g = gradient(k, a, b, at == token, scale, PAIR)
            tl.store(out + at, rm.rounded(g, out.dtype.element_ty), (at >= lead) & (at < width + lead))
    else:
        rm.zero_row(out, width, lead, SHAPE, True)


def row_grad(
    pair: Pair,
    token_ids: Tensor | None,
    stats: Tensor,
    coefficients: Tensor,
    out: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    student, teacher, temperature, vocab_size = pair
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if out is None else out
    n_rows = pair.n_rows
    if n_rows == 0:
        return grad
    tiles = tiles_of(n_rows, student.shape[-1], student, teacher, grad)
    row_grad_kernel[(n_rows, tiles.parts)](
        Rows.of(student),
        None if teacher is None else Rows.of(teacher),
        per_row(token_ids, torch.int64),
        per_row(stats, torch.float32),
        per_row(coefficients, torch.float32),
        per_row(factor, torch.float32),
        Rows.of(grad),
        n_rows,
        vocab_size,
        student.shape[-1],
        1.0 / temperature,
        ALIGNED=tiles.aligned,
        SHAPE=tiles.shape,
        **tiles.options,
    )
    return grad
