"""What the launchers share: how rows lie in memory, tile shapes, and how many programs a row is split over."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...rows import row_strides
from ..reference import check_token_ids


class Rows(NamedTuple):
    """A pointer and the numbers x of its rows.RowStrides, as 2x + 3: Triton compiles anew where an integer inside a
    tuple is 1 or a multiple of 16, do_not_specialize notwithstanding, and this is neither."""

    pointer: Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    @staticmethod
    def of(x: Tensor) -> Rows:
        inner, outer_stride, inner_stride = row_strides(x)
        return Rows(x, 2 * inner + 3, 2 * outer_stride + 3, 2 * inner_stride + 3)


class Tiles(NamedTuple):
    """How a row operation is cut: SHAPE is [K, LANES, VEC] of rowmath.py."""

    shape: tuple[int, int, int]
    warps: int
    parts: int  # programs a row
    aligned: bool  # the rows of all tensors start on the same columns modulo VEC

    @property
    def options(self) -> dict[str, int]:
        """Two programs of 256 threads fit a multiprocessor's registers. Left alone, ptxas aims at three and spills."""
        limit = {} if triton.knobs.runtime.interpret else {"maxnreg": 128}
        return {"num_warps": self.warps, **limit}


# (architecture, V at most) -> (loads of 16 bytes in flight a thread and tensor, warps). Architectures without a line
# take the nearest older one; the interpreter the first. Short rows: more threads would have no columns. Long rows:
# what is in flight must cover bandwidth times latency, 3.35 TB/s * 600 ns / 132 = 15 KB on an H100's multiprocessor
# and 11 KB on an A100's: 256 threads * 2 tensors * 2 loads of 16 bytes are 16 KB, and two such programs fit. A B200
# wants 32 KB, which two programs are; four loads a thread would take 200 registers there, and leave one program.
TILES: dict[int, list[tuple[int, int, int]]] = {
    80: [(4096, 1, 4), (1 << 31, 2, 8)],
    90: [(4096, 1, 4), (1 << 31, 2, 8)],
    100: [(4096, 1, 4), (1 << 31, 2, 8)],
}
# Programs to launch at least: eight for each of 132 multiprocessors; or sixteen, so that the last wave is short, where
# the parts are long enough to be worth their merge. The same numbers for all devices, since the order of additions,
# hence the bits, must not depend on the device.
PROGRAMS, EVEN_PROGRAMS, LONG_PART = 1056, 2112, 16384
MAX_PARTS = 64


def architecture() -> int:
    """Compute capability, e.g. 90, of the current device; the interpreter has none and passes for the oldest."""
    if triton.knobs.runtime.interpret:
        return min(TILES)
    return _architecture_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _architecture_of(_device: int) -> int:
    """Of the current device, which is that one: a driver takes longer to say it than the rest of a launch."""
    return max(a for a in TILES if a <= max(int(triton.runtime.driver.active.get_current_target().arch), min(TILES)))


def tiles_of(n_rows: int, width: int, *tensors: Tensor | None) -> Tiles:
    given = [x for x in tensors if x is not None]
    vec = 4 if all([x.element_size() == 4 for x in given]) else 8
    loads, warps = next((k, w) for most, k, w in TILES[architecture()] if width <= most)
    shape = (loads, 32 * warps, vec)
    n_tiles = -(-(width + vec - 1) // (loads * 32 * warps * vec))
    rows = max(n_rows, 1)
    enough, even = PROGRAMS // rows, min(-(-EVEN_PROGRAMS // rows), width // LONG_PART)
    parts = max(1, min(MAX_PARTS, n_tiles, max(enough, even)))
    return Tiles(shape, warps, parts, len({_phase(x, vec) for x in given}) == 1)


def _phase(x: Tensor, vec: int) -> tuple[int, ...]:
    """Where the rows start, modulo vec: equal for two tensors if each row of one starts as that of the other. By every
    leading dimension: row_strides may put those of one tensor together, and not those of the other."""
    strides = [s % vec if size > 1 else 0 for size, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return (x.data_ptr() // x.element_size() % vec, *strides)


def per_row(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small per-row tensor as the kernels expect it: O(N) at most is copied."""
    return None if x is None else x.to(dtype).contiguous()


def checked_token_ids(token_ids: Tensor | None, mask: Tensor | None, vocab_size: int) -> Tensor | None:
    """As int64. On a CPU (the interpreter) a token outside the vocabulary is an error; on a GPU, where looking would
    synchronise, its log-probability is NaN."""
    token_ids = per_row(token_ids, torch.int64)
    if token_ids is not None and token_ids.device.type == "cpu" and token_ids.numel():
        check_token_ids(token_ids if mask is None else token_ids.masked_fill(~mask, 0), vocab_size)
    return token_ids
