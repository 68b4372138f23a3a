"""Time and peak memory of the phases of a step: rollout, score, update, validation, save; and a time in words."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Every moment belongs to one phase: the innermost one open, else `update`."""

    def __init__(self) -> None:
        self.phase, self.since = "update", time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self.phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def reset(self) -> dict[str, float]:
        """Seconds per phase since the last reset, as time/PHASE, and GiB at its peak, as memory/PHASE."""
        self._switch(self.phase)
        result = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        result |= {f"memory/{phase}": peak for phase, peak in self.peaks.items()}
        self.seconds, self.peaks = {}, {}
        return result

    def _switch(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the work queued here would be counted where somebody waits for it
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        peak = _peak()
        if peak is not None:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), peak)
        self.phase, self.since = phase, now


def duration(seconds: float) -> str:
    """Such as 2m05s."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _peak() -> float | None:
    """GiB at the peak since the last call: of the CUDA device, else of this process; None where nothing tells."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
        return peak / 2**30
    except (OSError, StopIteration):
        return None
