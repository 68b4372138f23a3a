"""Signals that ask a run to stop: finish the step, save, say how to go on, exit 0.

SIGTERM and SIGUSR1, as schedulers send them before they take a machine away; SIGINT, which is Ctrl-C, where a second
one stops at once; SIGHUP, when a terminal closes, unless nohup has it ignored.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]  # Windows has two of them


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let all of them call `handler`; returns those before. In the main thread."""
    ignored = "SIGHUP" in signal.Signals.__members__ and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {number: signal.signal(number, handler) for number in SIGNALS if not (ignored and number == signal.SIGHUP)}


class Interrupted(Exception):
    """The run was asked to stop, and everything up to here is saved; the message says how to go on."""


class Interrupt:
    """Context in which such a signal is noted rather than obeyed; `asked` tells all processes alike."""

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> "Interrupt":
        self.ours = threading.current_thread() is threading.main_thread()  # only there are signals handled
        if self.ours:
            self.before = handle(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ours:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop."""
        if accelerator.num_processes == 1:
            return self.noted
        return bool(accelerator.reduce(torch.tensor(float(self.noted), device=accelerator.device), "sum") > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.noted:
                raise KeyboardInterrupt
            print("stopping after this step; Ctrl-C again stops at once", flush=True)
        self.noted = True


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Outside the training loop there is nothing to save: end at once, by an exception. In the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("Nothing was being trained; --resume auto goes on from the last checkpoint")

    before = handle(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
