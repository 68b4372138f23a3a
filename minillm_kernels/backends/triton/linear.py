"""linear_stats and linear_grad_tile: the row operations on logits that are never in memory.

A program takes BM rows and walks over vocabulary tiles of BN columns. For each it forms the logits of both models on
the tensor cores (z = hW^T, fp32 accumulators), applies bias, scale and soft-cap, and folds them into a state a row,
as stats.py does with logits from memory. Few rows: the vocabulary is split over programs, and the kernel that merges
a row's parts is the one of stats.py. No locks, no atomics: the same bits every time.

linear_grad_tile forms the same logits again and writes dL/d(hW^T + b) for one vocabulary tile of all rows;
minillm_kernels/hidden/tiled.py sends it on by two matmuls.

Rows that do not count are not read. 16-bit operands are multiplied exactly, fp32 ones in fp32 (no TF32).

Legend: N rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ...rows import RowStats
from . import rowmath as rm
from .grad import gradient, gradient_row
from .launch import MAX_PARTS, PROGRAMS, checked_token_ids, per_row
from .stats import STATE_FIELDS, merge_parts, store_state


class Operand(NamedTuple):
    """A vocabulary head as the kernels take it."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None
    H: int
    hidden_stride: int
    weight_stride: int
    scale: float
    softcap: float | None


class Blocks(NamedTuple):
    shape: tuple[int, int, int]  # BM, BN, BK
    warps: int
    stages: int


# By bytes of an operand. 16-bit: 64 x 128 over 8 warps leaves the two models' tiles and the state in 255 registers
# (128 x 128 spills on every architecture); three stages of both operands are 72 KiB, two programs on an H100. fp32 has
# no tensor cores here, and half as many columns.
BLOCKS = {2: Blocks((64, 128, 64), 8, 3), 4: Blocks((64, 64, 32), 8, 2)}


@triton.jit
def tanh(x):
    """Accurate, also near 0."""
    if rm.INTERPRETED:
        e = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0.0, -y, y)
    else:
        return libdevice.tanh(x)


@triton.jit
def logits_tile(head, rows, there, columns, V, BLOCK: tl.constexpr):
    """[BM, BN] logits in fp32, after bias, scale and soft-cap. Rows that are not there come as if h were 0."""
    BM: tl.constexpr = BLOCK[0]
    BN: tl.constexpr = BLOCK[1]
    BK: tl.constexpr = BLOCK[2]
    inside = columns < V
    h_at = head.hidden + rows.to(tl.int64)[:, None] * head.hidden_stride
    w_at = head.weight + columns.to(tl.int64)[:, None] * head.weight_stride
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, head.H, BK):
        k = start + tl.arange(0, BK)[None, :]
        h = tl.load(h_at + k, there[:, None] & (k < head.H), other=0.0)
        w = tl.load(w_at + k, inside[:, None] & (k < head.H), other=0.0)
        if rm.INTERPRETED:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    if head.bias is not None:
        z += tl.load(head.bias + columns, inside, other=0.0).to(tl.float32)[None, :]
    z *= head.scale
    if head.softcap is not None:
        z = head.softcap * tanh(z / head.softcap)
    return z


@triton.jit(do_not_specialize=["N", "V"])
def linear_stats_kernel(
    student,  # Operand
    teacher,  # Operand, or None
    mask,
    token_ids,
    partial,  # [STATE_FIELDS, N, parts]
    N,
    V,
    inv_T,
    PAIR: tl.constexpr,  # there is a teacher
    BLOCK: tl.constexpr,
):
    BM: tl.constexpr = BLOCK[0]
    BN: tl.constexpr = BLOCK[1]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    there = rows < N
    if mask is not None:
        there = there & tl.load(mask + rows, there, other=0).to(tl.int1)
    token = tl.full([BM], -1, tl.int64)
    if token_ids is not None:
        token = tl.load(token_ids + rows, there, other=-1)
    each = tl.cdiv(tl.cdiv(V, BN), tl.num_programs(1))
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, tl.cdiv(V, BN))
    if tl.max(there.to(tl.int32), 0) == 0:
        last = first
    scale = inv_T * rm.LOG2E
    state = rm.empty_state(BM)
    token_s = tl.zeros([BM], tl.float32)
    token_t = tl.zeros([BM], tl.float32)
    for tile in range(first, last):
        columns = tile * BN + tl.arange(0, BN)
        inside = (columns < V)[None, :]
        is_token = columns[None, :] == token[:, None]
        a = tl.where(inside, logits_tile(student, rows, there, columns, V, BLOCK), rm.MINUS_INF)
        token_s += tl.sum(tl.where(is_token, a, 0.0), 1)
        b = a
        if PAIR:
            b = tl.where(inside, logits_tile(teacher, rows, there, columns, V, BLOCK), rm.MINUS_INF)
            token_t += tl.sum(tl.where(is_token, b, 0.0), 1)
        state = rm.add_tile(state, a, b, scale, PAIR)
    if PAIR:
        store_state(partial, N, rows, there, state, token_s, token_t)
    else:
        store_state(partial, N, rows, there, state, token_s, token_s)


@triton.jit(do_not_specialize=["N", "V", "start", "width"])
def linear_grad_kernel(
    student,  # Operand
    teacher,  # Operand, or None
    token_ids,
    stats,  # [STATISTICS, N]
    coefficients,  # [COEFFICIENTS, N]
    grad,  # [N, width], the columns from `start` on
    stride,
    width,
    N,
    V,
    start,
    inv_T,
    PAIR: tl.constexpr,  # there is a teacher
    BLOCK: tl.constexpr,
):
    BM: tl.constexpr = BLOCK[0]
    BN: tl.constexpr = BLOCK[1]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = start + inner
    known = tl.minimum(rows, N - 1)
    k, wanted = gradient_row(stats, coefficients, N, known, inv_T, 1.0)
    ms, mt, log2Zs, log2Zt, kd, ks, k1, kp, ky = k
    origins = ms[:, None], mt[:, None], log2Zs[:, None], log2Zt[:, None]
    k = origins + (kd[:, None], ks[:, None], k1[:, None], kp[:, None], ky[:, None])  # noqa: RUF005
    there = (rows < N) & wanted
    g = tl.zeros([BM, BN], tl.float32)
    if tl.max(there.to(tl.int32), 0) != 0:
        token = tl.full([BM], -1, tl.int64)
        if token_ids is not None:
            token = tl.load(token_ids + known)
        a = logits_tile(student, rows, there, columns, V, BLOCK)
        b = a
        if PAIR:
            b = logits_tile(teacher, rows, there, columns, V, BLOCK)
        g = gradient(k, a, b, columns[None, :] == token[:, None], inv_T * rm.LOG2E, PAIR)
        if student.softcap is not None:
            x = a / student.softcap
            g *= 1.0 - x * x
        g = tl.where(there[:, None], g * student.scale, 0.0)
    at = grad + rows.to(tl.int64)[:, None] * stride + inner[None, :]
    inside = (rows < N)[:, None] & (inner < width)[None, :] & (columns < V)[None, :]
    tl.store(at, rm.rounded(g, grad.dtype.element_ty), inside)


def operand(head) -> Operand:
    """Of a minillm_kernels.hidden.operands.Projection."""
    for name, x in (("hidden states", head.hidden), ("head weight", head.weight)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"the {name} have strides {x.stride()}: impl='tiled' needs the last dimension contiguous; call "
                ".contiguous(), or use impl='chunked'"
            )
    strides = head.hidden.stride(0), head.weight.stride(0)
    return Operand(
        head.hidden, head.weight, head.bias, head.hidden.shape[1], *strides, head.scale, head.softcap or None
    )


def blocks_of(student, teacher) -> Blocks:
    return BLOCKS[max(h.weight.element_size() for h in (student, teacher) if h is not None)]


def linear_stats(student, teacher, token_ids, mask, temperature: float, vocab_size: int) -> Tensor:
    """As stats.row_stats, [len(RowStats), N], of the logits of two Heads."""
    N = student.hidden.shape[0]
    stats = torch.empty((len(RowStats._fields), N), dtype=torch.float32, device=student.hidden.device)
    if N == 0:
        return stats
    blocks = blocks_of(student, teacher)
    BM, BN, _ = blocks.shape
    parts = max(1, min(MAX_PARTS, triton.cdiv(vocab_size, BN), PROGRAMS // triton.cdiv(N, BM)))
    partial = torch.empty((STATE_FIELDS, N, parts), dtype=torch.float32, device=stats.device)
    mask = per_row(mask, torch.bool)
    token_ids = checked_token_ids(token_ids, mask, vocab_size)
    linear_stats_kernel[(triton.cdiv(N, BM), parts)](
        operand(student),
        None if teacher is None else operand(teacher),
        mask,
        token_ids,
        partial,
        N,
        vocab_size,
        1.0 / temperature,
        PAIR=teacher is not None,
        BLOCK=blocks.shape,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    merge_parts(partial, mask, token_ids, stats, vocab_size, 1.0 / temperature, teacher is not None)
    return stats


def linear_grad_tile(
    student, teacher, token_ids, stats, coefficients, temperature: float, vocab_size: int, out, start
):
    """Writes dL/d(hW^T + b) of the columns from `start` on into out [N, width], in the student's type."""
    N, width = out.shape
    blocks = blocks_of(student, teacher)
    BM, BN, _ = blocks.shape
    linear_grad_kernel[(triton.cdiv(N, BM), triton.cdiv(width, BN))](
        operand(student),
        None if teacher is None else operand(teacher),
        per_row(token_ids, torch.int64),
        per_row(stats, torch.float32),
        per_row(coefficients, torch.float32),
        out,
        out.stride(0),
        width,
        N,
        vocab_size,
        start,
        1.0 / temperature,
        PAIR=teacher is not None,
        BLOCK=blocks.shape,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out
