"""row_stats: every statistic of a student row, or of a row pair, in one read.

2V elements a row pair, two exponentials an element. One program a row where there are many; few rows are split over
several programs, whose states a second small kernel merges. The formulas are in rowmath.py and csrc/rowmath/state.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import Pair, RowStats
from . import rowmath as rm
from .launch import MAX_PARTS, Rows, checked_token_ids, per_row, tiles_of

STATE_FIELDS = 9  # of `partial`: the state's, and the logits of the row's token


@triton.jit
def row_state(student, teacher, row, V, scale, ALIGNED: tl.constexpr, SHAPE: tl.constexpr):
    """The states of the lanes over this program's part of a row."""
    SIZE: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    LANES: tl.constexpr = SHAPE[1]
    PAIR: tl.constexpr = teacher is not None
    lead = rm.lead_of(student, row, SHAPE)
    pointers = rm.row_pair(student, teacher, row, lead, ALIGNED, SHAPE)
    columns = rm.tile_columns(SHAPE)
    first, inner, outer, last = rm.tile_span(V, V, lead, SHAPE)
    state = rm.empty_state(LANES)
    for tile in range(inner, outer):
        a, b = rm.load_pair(pointers, tile * SIZE + columns, lead, V, PAIR, False)
        state = rm.add_tile(state, a, b, scale, PAIR)
    for i in range(inner - first + last - outer):
        tile = rm.edge_tile(i, first, inner, outer)
        a, b = rm.load_pair(pointers, tile * SIZE + columns, lead, V, PAIR, True)
        state = rm.add_tile(state, a, b, scale, PAIR)
    return state


@triton.jit
def token_logits(student, teacher, token_ids, row, V):
    """The logits of a row's token; those of column 0 for a token outside the vocabulary."""
    a = 0.0
    b = 0.0
    if token_ids is not None:
        y = tl.load(token_ids + row)
        y = tl.where((y >= 0) & (y < V), y, 0)
        a = tl.load(student.pointer + rm.row_offset(student, row) + y).to(tl.float32)
        b = a
        if teacher is not None:
            b = tl.load(teacher.pointer + rm.row_offset(teacher, row) + y).to(tl.float32)
    return a, b


@triton.jit
def finish(out, N, row, state, a, b, token_ids, V, inv_T, PAIR: tl.constexpr):
    """Writes the statistics of a row: out is [STATISTICS, N]; a, b are the logits of its token."""
    ms, mt, Zs, Zt, A, B, C = state
    out += row
    for i in tl.static_range(rm.STATISTICS):
        tl.store(out + i * N, 0.0)
    empty = Zs == 0.0
    if PAIR:
        empty = empty & (Zt == 0.0)
    lnZs = tl.where(empty, rm.NAN, tl.log2(Zs) * rm.LN2)
    tl.store(out + rm.STUDENT_ORIGIN * N, ms)
    tl.store(out + rm.STUDENT_LOGZ * N, lnZs)
    tl.store(out + rm.STUDENT_ENTROPY * N, lnZs - B * rm.LN2 / Zs)
    tl.store(out + rm.STUDENT_LOGSUMEXP * N, ms * inv_T + lnZs)
    if PAIR:
        lnZt = tl.where(empty, rm.NAN, tl.log2(Zt) * rm.LN2)
        tl.store(out + rm.TEACHER_ORIGIN * N, mt)
        tl.store(out + rm.TEACHER_LOGZ * N, lnZt)
        tl.store(out + rm.REVERSE_KL * N, A * rm.LN2 / Zs - lnZs + lnZt)
        tl.store(out + rm.FORWARD_KL * N, C * rm.LN2 / Zt - lnZt + lnZs)
        tl.store(out + rm.TEACHER_LOGSUMEXP * N, mt * inv_T + lnZt)
    if token_ids is not None:
        y = tl.load(token_ids + row)
        known = (y >= 0) & (y < V)  # an error would need a synchronisation: NaN
        absent = rm.outside(a, b) & (Zs == Zs) & (empty == 0)
        log_q = tl.where(absent, rm.MINUS_INF, (a - ms) * inv_T - lnZs)
        tl.store(out + rm.STUDENT_LOGPROBS * N, tl.where(known, log_q, rm.NAN))
        if PAIR:
            log_p = tl.where(absent, rm.MINUS_INF, (b - mt) * inv_T - lnZt)
            tl.store(out + rm.TEACHER_LOGPROBS * N, tl.where(known, log_p, rm.NAN))


@triton.jit
def zero_row(out, N, row):
    for i in tl.static_range(rm.STATISTICS):
        tl.store(out + i * N + row, 0.0)


@triton.jit
def store_state(partial, N, row, there, state, a, b):
    """Into [STATE_FIELDS, N, parts], as this program's part. The parts of a token's logits a, b add up to them."""
    at = partial + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    field = N.to(tl.int64) * tl.num_programs(1)
    for i in tl.static_range(7):
        tl.store(at + i * field, state[i], there)
    tl.store(at + 7 * field, a, there)
    tl.store(at + 8 * field, b, there)


@triton.jit(do_not_specialize=["N", "V"])
def row_stats_kernel(
    student,  # Rows
    teacher,  # Rows, or None
    mask,
    token_ids,
    stats,  # [STATISTICS, N]
    partial,  # [STATE_FIELDS, N, parts], written where parts > 1
    N,
    V,
    inv_T,
    ALIGNED: tl.constexpr,
    SHAPE: tl.constexpr,
):
    row = tl.program_id(0)
    PAIR: tl.constexpr = teacher is not None
    read = True
    if mask is not None:
        read = tl.load(mask + row)
    if read:
        scale = inv_T * rm.LOG2E
        state = row_state(student, teacher, row, V, scale, ALIGNED, SHAPE)
        state = rm.merge_all(state, scale, PAIR)
        a, b = token_logits(student, teacher, token_ids, row, V)
        if tl.num_programs(1) == 1:
            finish(stats, N, row, state, a, b, token_ids, V, inv_T, PAIR)
        else:
            only_once = tl.program_id(1) == 0
            store_state(partial, N, row, True, state, tl.where(only_once, a, 0.0), tl.where(only_once, b, 0.0))
    elif tl.num_programs(1) == 1:
        zero_row(stats, N, row)


@triton.jit(do_not_specialize=["N", "V", "parts"])
def merge_parts_kernel(
    partial, mask, token_ids, stats, N, V, inv_T, parts, PAIR: tl.constexpr, MAX_PARTS: tl.constexpr
):
    """The statistics of a row from the states of its parts, always merged in this order."""
    row = tl.program_id(0)
    read = True
    if mask is not None:
        read = tl.load(mask + row)
    if read:
        part = tl.arange(0, MAX_PARTS)
        at = partial + row.to(tl.int64) * parts + part
        field = N.to(tl.int64) * parts
        there = part < parts
        ms = tl.load(at, there, other=rm.LOWEST)
        mt = tl.load(at + field, there, other=rm.LOWEST)
        Zs = tl.load(at + 2 * field, there, other=0.0)
        Zt = tl.load(at + 3 * field, there, other=0.0)
        A = tl.load(at + 4 * field, there, other=0.0)
        B = tl.load(at + 5 * field, there, other=0.0)
        C = tl.load(at + 6 * field, there, other=0.0)
        a = tl.sum(tl.load(at + 7 * field, there, other=0.0), 0)
        b = tl.sum(tl.load(at + 8 * field, there, other=0.0), 0)
        state = rm.merge_all((ms, mt, Zs, Zt, A, B, C), inv_T * rm.LOG2E, PAIR)
        finish(stats, N, row, state, a, b, token_ids, V, inv_T, PAIR)
    else:
        zero_row(stats, N, row)


def merge_parts(
    partial: Tensor, mask: Tensor | None, token_ids: Tensor | None, stats: Tensor, vocab_size: int, inv_T: float, pair
) -> None:
    n_rows, parts = partial.shape[1:]
    args = (partial, mask, token_ids, stats, n_rows, vocab_size, inv_T, parts)
    merge_parts_kernel[(n_rows,)](*args, PAIR=pair, MAX_PARTS=MAX_PARTS, num_warps=1)


def row_stats(pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
    student, teacher, temperature, vocab_size = pair
    stats = torch.empty((len(RowStats._fields), *student.shape[:-1]), dtype=torch.float32, device=student.device)
    n_rows = pair.n_rows
    if n_rows == 0:
        return stats
    tiles = tiles_of(n_rows, vocab_size, student, teacher)
    mask = per_row(mask, torch.bool)
    token_ids = checked_token_ids(token_ids, mask, vocab_size)
    partial = torch.empty((STATE_FIELDS, n_rows, tiles.parts), dtype=torch.float32, device=student.device)
    row_stats_kernel[(n_rows, tiles.parts)](
        Rows.of(student),
        None if teacher is None else Rows.of(teacher),
        mask,
        token_ids,
        stats,
        partial,
        n_rows,
        vocab_size,
        1.0 / temperature,
        ALIGNED=tiles.aligned,
        SHAPE=tiles.shape,
        **tiles.options,
    )
    if tiles.parts > 1:
        merge_parts(partial, mask, token_ids, stats, vocab_size, 1.0 / temperature, teacher is not None)
    return stats
