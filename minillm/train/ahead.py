"""Rollouts sampled ahead of their use: the next batch of responses, while the student learns from the one before.

A copy of the student samples, as the student was when the sampling began: so the responses do not depend on how fast
either goes. It has a thread of its own, and on a card a stream of its own. When the responses are used, the student
has learnt from the batch before; what the objective asks of it is read anew (`renewed`), and the law that sampled is
known exactly, so that the importance weights hold.
"""

import contextvars
import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minillm.model.head import CausalLM
from minillm.model.rollout import Rollout


class Ahead:
    """Samples one rollout at a time."""

    def __init__(self, student: CausalLM, dtype: torch.dtype) -> None:
        """dtype: that in which the student computes; its copy is held in it."""
        self.student, self.dtype = student, dtype
        self.older: CausalLM | None = None
        self.thread = ThreadPoolExecutor(1, "rollout")
        self.stream = torch.cuda.Stream(student.device) if student.device.type == "cuda" else None
        self.sampling: Future[Rollout] | None = None

    def start(self, draw: Callable[[CausalLM], Rollout]) -> None:
        """Sample by `draw`, which takes the copy of the student as it is now."""
        if self.older is None:
            self.older = _frozen(self.student, self.dtype)
        else:
            for old, new in zip(self.older.parameters(), self.student.parameters(), strict=True):
                if new.requires_grad:
                    old.data.copy_(new.data)
        older = self.older
        on_stream: AbstractContextManager = nullcontext()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            on_stream = torch.cuda.stream(self.stream)

        def run() -> Rollout:
            with on_stream:
                return draw(older)

        self.sampling = self.thread.submit(contextvars.copy_context().run, run)

    def take(self) -> Rollout | None:
        """The rollout that was begun, once; None where there is none. Raises what sampling it raised."""
        if self.sampling is None:
            return None
        rollout, self.sampling = self.sampling.result(), None
        if self.stream is not None:
            now = torch.cuda.current_stream(self.stream.device)
            now.wait_stream(self.stream)
            for value in rollout:
                if isinstance(value, Tensor):
                    value.record_stream(now)
        return rollout


def _frozen(student: CausalLM, dtype: torch.dtype) -> CausalLM:
    """A copy whose trained weights are of this dtype; it shares those that are not trained."""
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    older = copy.deepcopy(student, memo=shared)
    for old, new in zip(older.parameters(), student.parameters(), strict=True):
        if new.requires_grad:
            old.requires_grad_(False).data = new.data.to(dtype, copy=True)
    return older
