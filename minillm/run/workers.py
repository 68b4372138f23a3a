"""Several processes of one run: the first one speaks for all, and one that is lost ends the others."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any

from minillm.terminal import say, unbroken_output

START_SECONDS = 180
"""How long the processes of a run wait for each other at the start. They are launched together, and all that comes
before is imports."""
PEER_SECONDS = "MINILLM_PEER_SECONDS"
"""Environment variable: how long a process waits for another one whose host does not answer; torch's own default, of
ten or thirty minutes, where it is not set."""


class WorkerLost(RuntimeError):
    """Another process of a distributed run has ended, and this one cannot go on without it."""

    @staticmethod
    def caused(error: RuntimeError) -> bool:
        """Gloo and NCCL have no exception of their own for it."""
        words = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe", "Timed out")
        return any(word in str(error) for word in words)

    @classmethod
    def of(cls, error: RuntimeError, go_on: str) -> "WorkerLost":
        return cls(f"another process of this run has ended ({_first_line(error)}); its own output says why. {go_on}")


def resume_after_restart(asked: str) -> str:
    """What a run resumes from: as asked, and from its newest checkpoint where torchrun has started it again, by the
    command of the first time."""
    return "auto" if _restarts() else asked


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _store_of_this_start() -> dict[str, Any]:
    """Arguments of init_process_group. torchrun keeps the store in which processes find each other when it starts them
    again, and those before are still in it: look below another name. Agents on several hosts count restarts each for
    itself; there torchrun must be told to make a new store (docs/scale.md)."""
    if not _restarts() or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    from torch.distributed import PrefixStore, rendezvous

    store, rank, processes = next(rendezvous("env://"))
    return {"store": PrefixStore(f"restart-{_restarts()}", store), "rank": rank, "world_size": processes}


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0][:200]


@contextmanager
def first_process_tells() -> Iterator[None]:
    """Join the other processes. What they print goes nowhere, and what the first one prints keeps nobody from working.

    Raises WorkerLost where another process ends; one that does not appear within START_SECONDS ends this process, with
    a message and status 2.
    """
    import torch
    from accelerate import PartialState

    try:
        with _limited(START_SECONDS):
            # without cpu=True, several processes on a machine without accelerator would be as many runs of their own
            limits: dict[str, Any] = _store_of_this_start()
            if PEER_SECONDS in os.environ:
                limits["timeout"] = timedelta(seconds=float(os.environ[PEER_SECONDS]))
            state = PartialState(cpu=not torch.accelerator.is_available(), **limits)
    except torch.distributed.DistError as error:
        raise WorkerLost(f"the processes of this run have not found each other: {_first_line(error)}") from error
    with (
        unbroken_output(),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        nullcontext() if state.is_main_process else redirect_stdout(nowhere),
    ):
        try:
            yield
        except WorkerLost:
            raise
        except RuntimeError as error:
            if state.num_processes == 1 or not WorkerLost.caused(error):
                raise
            raise WorkerLost.of(error, "--resume auto goes on from the last checkpoint, if there is one") from error


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """The rendezvous has a limit of its own that is as long as that of every later wait: hours, where many work."""

    def give_up() -> None:
        say(
            f"minillm: the other processes of this run have not appeared within {seconds:g} s; their own output says "
            "why",
            error=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
