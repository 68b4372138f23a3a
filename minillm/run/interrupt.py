"""SIGTERM, as schedulers send it before they take a machine away: finish the step, save, say how to go on, exit 0."""

import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """The run was asked to stop, and everything up to here is saved; the message says how to go on."""


class Interrupt:
    """Context in which SIGTERM is noted rather than obeyed; `asked` tells all processes alike."""

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> "Interrupt":
        self.ours = threading.current_thread() is threading.main_thread()  # only there are signals handled
        if self.ours:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ours:
            signal.signal(signal.SIGTERM, self.before)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop."""
        if accelerator.num_processes == 1:
            return self.noted
        return bool(accelerator.reduce(torch.tensor(float(self.noted), device=accelerator.device), "sum") > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True


def exit_on_sigterm() -> None:
    """Outside the training loop there is nothing to save: end at once, by an exception."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("Nothing was being trained; --resume auto goes on from the last checkpoint")

    signal.signal(signal.SIGTERM, stop)
