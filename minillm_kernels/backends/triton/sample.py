"""row_sample: a token of the mixture alpha p + (1 - alpha) q of two rows, with its log-probability under each.

csrc/rowmath/sampling.h has the method: a coin picks the model, and one uniform the token by a two-level inverse CDF.
One read of each row leaves the largest logit and the mass of every tile; one program a row then picks the tile and,
from one more read of that tile alone, the token. V elements a row and model. Tile masses are summed in fp32, prefixes
in fp64, in vocabulary order. Filters are in cutoff.py; the argmax of a mixture is one read more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import Pair
from ..reference import check_uniforms
from . import rowmath as rm
from .cutoff import cutoffs_of, weight
from .launch import PROGRAMS, Rows, per_row

# Tiles of mass: 2048 columns, two 16-byte loads of 16-bit logits for each of 128 threads. One shape for all types, so
# that the tiles of both models are the same columns where their rows start alike.
LOADS: tl.constexpr = tl.constexpr(2)
LANES: tl.constexpr = tl.constexpr(128)
VEC: tl.constexpr = tl.constexpr(8)
SIZE: tl.constexpr = tl.constexpr(2048)
CHUNK: tl.constexpr = tl.constexpr(128)  # masses that a program looks at together
NONE: tl.constexpr = tl.constexpr(1 << 30)  # above every column
WARPS = 4


class Model(NamedTuple):
    """A row operand of the sampler."""

    rows: Rows
    mass: Tensor  # [2, N, tiles]: the maximum and the sum of each tile
    cutoffs: Tensor | None  # [N]


@triton.jit
def first_tile(model, row):
    """Where the tiles of a row start: `lead` columns before it, on a multiple of VEC."""
    lead = rm.lead_of(model.rows, row, (LOADS, LANES, VEC))
    return lead, rm.aligned_start(model.rows, row, lead, True, (LOADS, LANES, VEC))


@triton.jit
def cutoff_of(model, row):
    cut = rm.MINUS_INF
    if model.cutoffs is not None:
        cut = tl.load(model.cutoffs + row)
    return cut


@triton.jit
def store_mass(model, N, tiles, row, tile, z, scale, cut):
    """(max, sum e^((z - max)/T) over the columns that are kept) of a tile."""
    largest = tl.max(tl.max(tl.max(z, 2), 1), 0)
    w = weight(z, tl.maximum(largest, rm.LOWEST), scale, cut)
    at = model.mass + row.to(tl.int64) * tiles + tile
    tl.store(at, largest)
    tl.store(at + N.to(tl.int64) * tiles, tl.sum(tl.sum(tl.sum(w, 2), 1), 0))


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def tile_mass_kernel(model, N, V, tiles, inv_T):
    row = tl.program_id(0)
    scale = inv_T * rm.LOG2E
    cut = cutoff_of(model, row)
    lead, start = first_tile(model, row)
    columns = rm.tile_columns((LOADS, LANES, VEC))
    first, inner, outer, last = rm.tile_span(V, V, lead, (LOADS, LANES, VEC))
    for tile in range(inner, outer):
        z = tl.load(start + tile * SIZE + columns).to(tl.float32)
        store_mass(model, N, tiles, row, tile, z, scale, cut)
    for i in range(inner - first + last - outer):
        tile = rm.edge_tile(i, first, inner, outer)
        at = tile * SIZE + columns
        z = tl.load(start + at, (at >= lead) & (at < V + lead), other=rm.MINUS_INF).to(tl.float32)
        store_mass(model, N, tiles, row, tile, z, scale, cut)


@triton.jit
def load_masses(model, N, tiles, row, n_tiles, start):
    """CHUNK tiles' numbers, maxima and sums, in fp64."""
    tile = start + tl.arange(0, CHUNK)
    at = model.mass + row.to(tl.int64) * tiles + tile
    largest = tl.load(at, tile < n_tiles, other=rm.MINUS_INF).to(tl.float64)
    return tile, largest, tl.load(at + N.to(tl.int64) * tiles, tile < n_tiles, other=0.0).to(tl.float64)


@triton.jit
def mass_in_row(largest, mass, row_max, inv_T):
    """Relative to the row's maximum. An empty tile has no maximum to be relative to."""
    return tl.where(mass == 0.0, 0.0, mass * exp_difference(largest, row_max, inv_T))


@triton.jit
def exp_difference(a, b, inv_T):
    """e^((a - b)/T) of fp32 logits, for fp64 sums of masses that are rounded to fp32 themselves. (Twice the registers,
    and branches, is what fp64's own exponential takes.)"""
    return tl.exp2((a - b).to(tl.float32) * (inv_T * rm.LOG2E)).to(tl.float64)


@triton.jit
def law_of(model, N, V, tiles, row, inv_T):
    """(max, Z) of a row in fp64. Z = 0: no column is left; NaN: the row holds NaN or +inf."""
    n_tiles = tl.cdiv(V + rm.lead_of(model.rows, row, (LOADS, LANES, VEC)), SIZE)
    row_max = tl.full([], rm.MINUS_INF, tl.float64)
    for start in range(0, n_tiles, CHUNK):
        _, largest, mass = load_masses(model, N, tiles, row, n_tiles, start)
        row_max = tl.maximum(row_max, tl.max(tl.where(mass == 0.0, rm.MINUS_INF, largest), 0))
    Z = tl.full([], 0.0, tl.float64)
    for start in range(0, n_tiles, CHUNK):
        _, largest, mass = load_masses(model, N, tiles, row, n_tiles, start)
        Z += tl.sum(mass_in_row(largest, mass, row_max, inv_T), 0)
    return row_max, Z


@triton.jit
def first_above(w, running, threshold, index):
    """The first index whose running sum exceeds the threshold, else NONE; and the last one with any mass, else -1."""
    first = tl.min(tl.where((w != 0.0) & (running > threshold), index, NONE), 0)
    return first, tl.max(tl.where(w != 0.0, index, -1), 0)


@triton.jit
def draw(model, N, V, tiles, row, u, row_max, Z, inv_T):
    """The first token whose cumulative probability exceeds u; the last possible one if rounding leaves u beyond it."""
    lead = rm.lead_of(model.rows, row, (LOADS, LANES, VEC))
    n_tiles = tl.cdiv(V + lead, SIZE)
    target = u * Z
    tile_before = tl.full([], 0.0, tl.float64)  # the mass before the tile that is chosen
    tile_max = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], 0, tl.int32)
    found = tl.full([], False, tl.int1)
    before = tl.full([], 0.0, tl.float64)
    for start in range(0, n_tiles, CHUNK):
        tile, largest, mass = load_masses(model, N, tiles, row, n_tiles, start)
        w = mass_in_row(largest, mass, row_max, inv_T)
        first, last = first_above(w, before + tl.cumsum(w, 0), target, tile)
        here = tl.minimum(first, last)
        take = (found == 0) & (here >= 0)
        chosen = tl.where(take, here, chosen)
        tile_before = tl.where(take, before + tl.sum(tl.where(tile < here, w, 0.0), 0), tile_before)
        tile_max = tl.where(take, tl.sum(tl.where(tile == here, largest, 0.0), 0), tile_max)
        found = found | (first != NONE)
        before += tl.sum(w, 0)
    columns = chosen * SIZE - lead + tl.arange(0, SIZE)
    there = (columns >= 0) & (columns < V)
    z = tl.load(model.rows.pointer + rm.row_offset(model.rows, row) + columns, there, other=rm.MINUS_INF)
    w = weight(z.to(tl.float32), tile_max.to(tl.float32), inv_T * rm.LOG2E, cutoff_of(model, row))
    rest = (target - tile_before) * exp_difference(row_max, tile_max, inv_T)
    first, last = first_above(w, tl.cumsum(w.to(tl.float64), 0), rest, columns)
    return tl.minimum(first, last)


@triton.jit
def logprob(model, row, token, row_max, Z, inv_T):
    z = tl.load(model.rows.pointer + rm.row_offset(model.rows, row) + token).to(tl.float32)
    out = (z < cutoff_of(model, row)) | (z == rm.MINUS_INF)
    return tl.where(out, rm.MINUS_INF, (z - row_max.to(tl.float32)) * inv_T - tl.log2(Z.to(tl.float32)) * rm.LN2)


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def argmax_kernel(student, teacher, values, tokens, N, V, tiles, alpha, inv_T, PAIR: tl.constexpr):
    """The largest alpha p + (1 - alpha) q of this program's part of a row, and the lowest token that has it: both
    [N, parts]. Without a teacher the student's logits alone decide."""
    row = tl.program_id(0)
    scale = inv_T * rm.LOG2E
    lead, s = first_tile(student, row)
    first, _, _, last = rm.tile_span(V, V, lead, (LOADS, LANES, VEC))
    if PAIR:
        t = rm.aligned_start(teacher.rows, row, lead, False, (LOADS, LANES, VEC))
        s_max, s_Z = law_of(student, N, V, tiles, row, inv_T)
        t_max, t_Z = law_of(teacher, N, V, tiles, row, inv_T)
    value = tl.full([], rm.MINUS_INF, tl.float64)
    token = tl.full([], 0, tl.int32)
    for tile in range(first, last):
        at = tile * SIZE + rm.tile_columns((LOADS, LANES, VEC))
        there = (at >= lead) & (at < V + lead)
        z = tl.load(s + at, there, other=rm.MINUS_INF).to(tl.float32)
        x = z.to(tl.float64)
        if PAIR:
            q = weight(z, s_max.to(tl.float32), scale, cutoff_of(student, row)).to(tl.float64) / s_Z
            z = tl.load(t + at, there, other=rm.MINUS_INF).to(tl.float32)
            p = weight(z, t_max.to(tl.float32), scale, cutoff_of(teacher, row)).to(tl.float64) / t_Z
            x = tl.where(there, alpha * p + (1.0 - alpha) * q, rm.MINUS_INF)
        largest = tl.max(tl.max(tl.max(x, 2), 1), 0)
        lowest = tl.min(tl.min(tl.min(tl.where(x == largest, at - lead, NONE), 2), 1), 0)
        token = tl.where(largest > value, lowest, token)
        value = tl.maximum(value, largest)
    at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + at, value)
    tl.store(tokens + at, token)


@triton.jit
def mixture_logprob(log_alpha, log_rest, lq, lp):
    """ln(alpha e^lp + (1 - alpha) e^lq), also where one of the four is -inf."""
    a = log_alpha + lp
    b = log_rest + lq
    high = tl.maximum(a, b)
    total = high + tl.log2(tl.exp2((a - high) * rm.LOG2E) + tl.exp2((b - high) * rm.LOG2E)) * rm.LN2
    return tl.where(high == rm.MINUS_INF, high, total)


@triton.jit(do_not_specialize=["N", "V", "tiles"])
def pick_kernel(
    student,  # Model
    teacher,  # Model, or None
    uniforms,  # [N, 2] fp64
    greedy_tokens,  # [N] int32, or None: drawn
    token_ids,  # [N]
    logprobs,  # [3, N]: under the student, the teacher, the mixture
    from_teacher,  # [N]: the coin, and on return whether it counted
    N,
    V,
    tiles,
    inv_T,
    log_weights,  # (ln alpha, ln (1 - alpha))
    PAIR: tl.constexpr,  # there is a teacher
):
    """One program a row: the token and its log-probabilities."""
    row = tl.program_id(0)
    s_max, s_Z = law_of(student, N, V, tiles, row, inv_T)
    drawable = s_Z > 0.0  # neither NaN nor empty
    if PAIR:
        t_max, t_Z = law_of(teacher, N, V, tiles, row, inv_T)
        drawable = drawable & (t_Z > 0.0)
    coin = drawable & tl.load(from_teacher + row).to(tl.int1)
    token = tl.full([], 0, tl.int32)
    if drawable:
        if greedy_tokens is not None:
            token = tl.load(greedy_tokens + row)
        else:
            u = tl.load(uniforms + 2 * row.to(tl.int64) + 1)
            if PAIR:
                if coin:
                    token = draw(teacher, N, V, tiles, row, u, t_max, t_Z, inv_T)
                else:
                    token = draw(student, N, V, tiles, row, u, s_max, s_Z, inv_T)
            else:
                token = draw(student, N, V, tiles, row, u, s_max, s_Z, inv_T)
    lq = tl.where(drawable, logprob(student, row, token, s_max, s_Z, inv_T), rm.NAN)
    lp = tl.zeros([], tl.float32)
    mixture = lq
    if PAIR:
        lp = tl.where(drawable, logprob(teacher, row, token, t_max, t_Z, inv_T), rm.NAN)
        mixture = mixture_logprob(log_weights[0], log_weights[1], lq, lp)
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(from_teacher + row, coin)
    tl.store(logprobs + row, lq)
    tl.store(logprobs + N + row, lp)
    tl.store(logprobs + 2 * N + row, mixture)


def greedy(student: Model, teacher: Model | None, N: int, V: int, parts: int, alpha: float) -> Tensor:
    """[N] int32: the argmax of the mixture at T = 1, the lowest of several; one model alone where alpha is 0 or 1."""
    if teacher is not None and alpha in (0.0, 1.0):
        student, teacher = (teacher if alpha == 1.0 else student), None
    device, tiles = student.mass.device, student.mass.shape[2]
    values = torch.empty((N, parts), dtype=torch.float64, device=device)
    tokens = torch.empty((N, parts), dtype=torch.int32, device=device)
    pair = teacher is not None
    argmax_kernel[(N, parts)](student, teacher, values, tokens, N, V, tiles, alpha, 1.0, PAIR=pair, num_warps=WARPS)
    return tokens.gather(1, values.argmax(1, keepdim=True)).squeeze(1)


def row_sample(pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, temperature, vocab_size = pair
    leading, device = student.shape[:-1], student.device
    N, V = pair.n_rows, vocab_size
    token_ids = torch.empty(leading, dtype=torch.int64, device=device)
    logprobs = torch.empty((3, *leading), dtype=torch.float32, device=device)
    argmax = temperature == 0
    if uniforms.device.type == "cpu":
        check_uniforms(uniforms)
    # The coin is compared here, in fp64: a kernel's floating-point arguments are fp32.
    from_teacher = uniforms[..., 0] < (-math.inf if argmax or teacher is None else alpha)
    if N == 0:
        return token_ids, logprobs, from_teacher
    temperature = 1.0 if argmax else temperature
    tiles = triton.cdiv(V + VEC.value - 1, SIZE.value)
    parts = max(1, min(tiles, PROGRAMS // N))

    def model_of(x: Tensor) -> Model:
        cutoffs = cutoffs_of(x, N, temperature, top_k, top_p, V)
        mass = torch.empty((2, N, tiles), dtype=torch.float32, device=device)
        model = Model(Rows.of(x), mass, cutoffs)
        tile_mass_kernel[(N, parts)](model, N, V, tiles, 1.0 / temperature, num_warps=WARPS)
        return model

    q = model_of(student)
    p = None if teacher is None else model_of(teacher)
    pick_kernel[(N,)](
        q,
        p,
        per_row(uniforms, torch.float64),
        greedy(q, p, N, V, parts, alpha) if argmax else None,
        token_ids,
        logprobs,
        from_teacher,
        N,
        V,
        tiles,
        1.0 / temperature,
        tuple(math.log(x) if x > 0 else -math.inf for x in (alpha, 1.0 - alpha)),
        PAIR=p is not None,
        num_warps=WARPS,
    )
    return token_ids, logprobs, from_teacher
