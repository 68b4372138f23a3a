"""Several processes of one run: the first one speaks for all, and one that is lost ends the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from minillm.run.directory import RunDirectory


class WorkerLost(RuntimeError):
    """Another process of a distributed run has ended, and this one cannot go on without it."""

    @staticmethod
    def caused(error: RuntimeError) -> bool:
        """Gloo and NCCL have no exception of their own for it."""
        words = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
        return any(word in str(error) for word in words)

    @classmethod
    def of(cls, error: RuntimeError, run: RunDirectory) -> "WorkerLost":
        first = str(error).strip().partition("\n")[0][:200]
        return cls(f"another process of this run has ended ({first}); its own output says why. {run.how_to_resume()}")


@contextmanager
def first_process_tells() -> Iterator[None]:
    """What the other processes print goes nowhere."""
    import torch
    from accelerate import PartialState

    # without cpu=True, several processes on a machine without accelerator would be as many runs of their own
    state = PartialState(cpu=not torch.accelerator.is_available())
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        nullcontext() if state.is_main_process else redirect_stdout(nowhere),
    ):
        yield
