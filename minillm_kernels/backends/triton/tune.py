"""Opt-in search for the tile shapes of this GPU: python -m minillm_kernels.backends.triton.tune [V ...]

The table of launch.py is what everybody gets, without a search at run time: the same bits on every start. `tune` times
its alternatives on the current device and puts the fastest into the table of this process; the script prints it, to be
written there. Another shape adds in another order: results keep their accuracy, not their last bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import triton.testing

from ...rows import DIFFERENTIABLE, Pair
from . import grad, launch, stats

# (loads of 16 bytes in flight a thread and tensor, warps): more of both cover more latency, and spill beyond these.
CANDIDATES = [(loads, warps) for loads in (1, 2, 4) for warps in (4, 8, 16)]


def tune(
    width: int,
    n_rows: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    bench: Callable[[Callable[[], object]], float] | None = None,
) -> dict[tuple[int, int], float]:
    """Milliseconds of statistics and gradient of a row pair [n_rows, width], by candidate; the fastest one serves rows
    of this length from now on. `bench` is triton.testing.do_bench unless given."""
    timed = triton.testing.do_bench if bench is None else bench
    student, teacher = (torch.randn(n_rows, width, device=device).to(dtype) for _ in range(2))
    pair = Pair(student, teacher, temperature=1.0, vocab_size=width)
    coefficients = torch.ones(len(DIFFERENTIABLE), n_rows, device=device)
    lines = launch.TILES[launch.architecture()]
    index = next(i for i, (most, _, _) in enumerate(lines) if width <= most)
    before, times = lines[index], {}

    def both() -> None:
        found = stats.row_stats(pair, None, None)
        grad.row_grad(pair, None, found, coefficients)

    try:
        for loads, warps in CANDIDATES:
            lines[index] = (before[0], loads, warps)
            times[loads, warps] = timed(both)
    finally:
        best = min(times, key=times.__getitem__) if len(times) == len(CANDIDATES) else before[1:]
        lines[index] = (before[0], *best)
    return times


def main() -> None:
    for width in [int(x) for x in sys.argv[1:]] or [4096, 151936]:
        times = tune(width)
        for shape, ms in sorted(times.items(), key=lambda item: item[1]):
            print(f"V {width}: (loads, warps) = {shape}  {ms:.4f} ms")
    print(f"{launch.architecture()}: {launch.TILES[launch.architecture()]},")


if __name__ == "__main__":
    main()
