"""Top-k and top-p of a row as one cut-off logit.

Both filters ask the same: the smallest z with W(z' > z) < target, where W counts tokens (target k) or sums probability
(target top_p) of what is left (csrc/rowmath/sampling.h). The answer is searched among the keys of all floats, in their
order as integers: each pass over the row evaluates W at PIVOTS thresholds and divides the range by as many, so 32 bits
take 8 passes, which come from L2. One program a row, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowmath as rm
from .launch import Rows

PIVOTS: tl.constexpr = tl.constexpr(16)
TILE: tl.constexpr = tl.constexpr(4096)


@triton.jit
def ordered_key(x):
    """a < b <=> ordered_key(a) < ordered_key(b) as signed integers, for all floats but NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_key(key):
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_tile(row, tile, V):
    columns = tile * TILE + tl.arange(0, TILE)
    return tl.load(row + columns, columns < V, other=rm.MINUS_INF).to(tl.float32)


@triton.jit
def weight(z, largest, scale, cut):
    """e^((z - max)/T), 0 below the cut-off. NaN stays."""
    x = tl.exp2(rm.relative(z, largest, scale))
    return tl.where((z < cut) | (z == rm.MINUS_INF), 0.0, x)


@triton.jit
def search(row, V, largest, scale, cut, target, BY_MASS: tl.constexpr):
    """The smallest z >= cut with W(z' > z) < target."""
    low = ordered_key(tl.full([], rm.MINUS_INF, tl.float32)).to(tl.int64) - 1  # W > target here; the answer is above
    high = ordered_key(largest).to(tl.int64)  # W = 0 here
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS)), high)
        above = tl.zeros([PIVOTS], tl.float64)
        for tile in range(tl.cdiv(V, TILE)):
            z = load_tile(row, tile, V)
            if BY_MASS:
                w = weight(z, largest, scale, cut)
            else:
                w = tl.where(z == rm.MINUS_INF, 0.0, 1.0)
            larger = ordered_key(z)[None, :] > pivots.to(tl.int32)[:, None]
            above += tl.sum(tl.where(larger, w[None, :], 0.0), 1).to(tl.float64)
        failing = tl.sum((above >= target).to(tl.int64), 0)  # W decreases: these come first
        high = tl.minimum(low + step * (failing + 1), high)
        low = low + step * failing
    return from_ordered_key(high.to(tl.int32))


@triton.jit(do_not_specialize=["V", "top_k"])
def cutoff_kernel(rows, cutoffs, V, inv_T, top_k, top_p):
    """cutoffs[row]: the smallest logit that both filters keep; -inf in rows that cannot be drawn from."""
    i = tl.program_id(0)
    row = rows.pointer + rm.row_offset(rows, i)
    scale = inv_T * rm.LOG2E
    largest = tl.full([], rm.MINUS_INF, tl.float32)
    for tile in range(tl.cdiv(V, TILE)):
        largest = tl.maximum(largest, tl.max(load_tile(row, tile, V), 0))
    cut = tl.full([], rm.MINUS_INF, tl.float32)
    if top_k > 0:
        cut = search(row, V, largest, scale, cut, top_k, False)
    Z = tl.full([], 0.0, tl.float64)
    for tile in range(tl.cdiv(V, TILE)):
        Z += tl.sum(weight(load_tile(row, tile, V), largest, scale, cut), 0).to(tl.float64)
    if Z > 0.0:  # neither NaN nor empty
        if top_p < 1.0:
            cut = tl.maximum(cut, search(row, V, largest, scale, cut, Z * top_p, True))
    else:
        cut = tl.full([], rm.MINUS_INF, tl.float32)
    tl.store(cutoffs + i, cut)


def cutoffs_of(x: Tensor, n_rows: int, temperature: float, top_k: int, top_p: float, vocab_size: int) -> Tensor | None:
    """[N] fp32, or None where nothing is filtered."""
    top_k = top_k if 0 < top_k < vocab_size else 0
    if top_k == 0 and top_p >= 1.0:
        return None
    cutoffs = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    cutoff_kernel[(n_rows,)](Rows.of(x), cutoffs, vocab_size, 1.0 / temperature, top_k, top_p, num_warps=16)
    return cutoffs
