"""Time and peak memory of the phases of a step: rollout, score, update, validation, save; and a time in words."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Every moment belongs to one phase: the innermost one open, else `update`.

    On a GPU the moments are events in its queue of work, and nothing waits for them until `reset` is asked: the host
    may be far ahead of the device when a phase ends.
    """

    def __init__(self) -> None:
        self.phase, self.begun = "update", _now()
        self.spans: list[tuple[str, Moment, Moment]] = []
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
        if not isinstance(self.begun, float):
            self.begun.synchronize()
        seconds: dict[str, float] = {}
        for phase, begun, ended in self.spans:
            seconds[phase] = seconds.get(phase, 0.0) + _seconds(begun, ended)
        result = {f"time/{phase}": value for phase, value in seconds.items()}
        result |= {f"memory/{phase}": peak for phase, peak in self.peaks.items()}
        self.spans, self.peaks = [], {}
        return result

    def _switch(self, phase: str) -> None:
        now, peak = _now(), _peak()
        self.spans.append((self.phase, self.begun, now))
        if peak is not None:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), peak)
        self.phase, self.begun = phase, now


Moment = float | torch.cuda.Event


def _now() -> Moment:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begun: Moment, ended: Moment) -> float:
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        return begun.elapsed_time(ended) / 1000
    assert isinstance(begun, float) and isinstance(ended, float)
    return ended - begun


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
