"""What every benchmark shares: verify, then time; bandwidth against torch.add on tensors of that size; peak memory.

A kernel alone is also held to its roofline, measured here: the call itself (on rows of 64 columns), and the slower of
memory (torch.add's bandwidth) and arithmetic (one row over and over by one thread, so that it stays in its cache).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS, WARMUP = 15, 3


def median_seconds(fn: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for i in range(rounds + WARMUP):
        start = time.perf_counter()
        fn()
        if i >= WARMUP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process, or "VmHWM": its peak since it was last reset."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def extra_peak_bytes(fn: Callable[[], object]) -> int | None:
    """How far one call raises this process's resident memory, at its peak; None where the kernel does not tell."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets the peak
        before = resident_bytes()
        keep = fn()
        peak = resident_bytes("VmHWM")
        del keep
        return peak - before
    except OSError:
        return None


class Measure:
    """Times one row of a table and writes beside it what bounds it."""

    def __init__(self, benchmark, group: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.benchmark, self.shape, self.dtype = benchmark, shape, dtype
        benchmark.group = group

    def __call__(
        self,
        fn: Callable,
        *,
        tensors: float = 0,
        setup: Callable | None = None,
        rounds: int = ROUNDS,
        kernel: Callable | None = None,
        **info,
    ) -> None:
        """tensors: how many times the logits' size the call must at least read and write. kernel: for the roofline,
        kernel(logits, shape) is what `fn` would be on other logits."""
        arguments = setup()[0] if setup else ()
        peak = extra_peak_bytes(lambda: fn(*arguments))
        self.benchmark.pedantic(fn, setup=setup, rounds=rounds, warmup_rounds=min(WARMUP, rounds // 3))
        rows, columns = self.shape
        size = rows * columns * torch.empty((), dtype=self.dtype).element_size()
        extra = self.benchmark.extra_info
        extra.update(info, shape=f"{rows}x{columns}", dtype=str(self.dtype).removeprefix("torch."))
        extra.update(logits_MiB=round(size / 2**20, 1), threads=torch.get_num_threads())
        if peak is not None:
            extra["peak_extra_MiB"] = round(peak / 2**20, 1)
        if tensors and self.benchmark.stats is not None:  # None under --benchmark-disable
            gb_s = tensors * size / self.benchmark.stats.stats.median / 1e9
            extra.update(bytes=int(tensors * size), GB_s=round(gb_s, 2))
            extra["fraction_of_add"] = round(gb_s / add_bandwidth(self.shape, self.dtype), 3)
            if kernel is not None:
                extra.update(roofline(kernel, self.shape, self.dtype, tensors, self.benchmark.stats.stats.median))


Tensors = Callable[[tuple[int, int], int], Tensor]  # logits of a shape and a seed


def roofline(
    kernel: Callable[[Tensors, tuple[int, int]], Callable[[], object]],
    shape: tuple[int, int],
    dtype: torch.dtype,
    tensors: float,
    seconds: float,
) -> dict[str, object]:
    """What bounds a kernel that took `seconds` on `shape`, and how much of that time the bound explains."""

    def make(shape: tuple[int, int], seed: int) -> Tensor:
        return logits(shape, dtype, seed)

    threads = torch.get_num_threads()
    call = median_seconds(kernel(make, (shape[0], 64)))
    torch.set_num_threads(1)
    one_row, nothing = (median_seconds(kernel(make, (1, columns))) for columns in (shape[1], 64))
    arithmetic = shape[0] * (one_row - nothing) / threads
    torch.set_num_threads(threads)
    memory = tensors * shape[0] * shape[1] * dtype.itemsize / (add_bandwidth(shape, dtype) * 1e9)
    parts = {"call": call, "arithmetic": arithmetic, "memory": memory}
    return {
        "bound_by": max(parts, key=parts.__getitem__),
        "of_bound": round((call + max(arithmetic, memory)) / seconds, 3),
        **{f"{name}_ms": round(value * 1e3, 4) for name, value in parts.items()},
    }


_add_bandwidth: dict[tuple, float] = {}


def add_bandwidth(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """GB/s of torch.add(a, b, out=c): two reads and a write of tensors of this size, measured once in this run; the
    median of several places in memory, of which some are twice as fast as others."""
    key = (shape, dtype)
    if key not in _add_bandwidth:
        places = [[torch.ones(shape, dtype=dtype) for _ in range(3)] for _ in range(5)]  # zeros would share a page
        seconds = statistics.median(median_seconds(lambda p=p: torch.add(p[0], p[1], out=p[2])) for p in places)
        _add_bandwidth[key] = 3 * shape[0] * shape[1] * dtype.itemsize / seconds / 1e9
    return _add_bandwidth[key]


def logits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Like a language model's: most of the mass on few tokens."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.5
    return z.to(dtype)
