"""A CUDA graph on a machine without a card: the operators of one call, with the tensors that they were called with,
called again and again without the Python around them.

As a graph does, a replay reads and writes the memory that was there when it was recorded, whatever names point at by
then, and takes every number that is no tensor as it was. What a graph cannot hold is an error: a value read by the
host, a shape that depends on values.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from waits import BY_INDEX, READS


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in BY_INDEX and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or func.overloadpacket in READS:
            raise RuntimeError(f"{func} cannot be held by a graph")
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Recorded:
    """In the place of minillm.model.static.Replayed."""

    made: ClassVar[list["Recorded"]] = []

    def __init__(self, device: torch.device) -> None:
        self.warm = False
        self.calls: list[tuple] = []
        self.replays = 0
        Recorded.made.append(self)

    def __call__(self, work: Callable[[], object]) -> None:
        if not self.warm:
            self.warm = True
            work()
        elif not self.calls:
            with _Calls() as mode:
                work()
            self.calls = mode.calls
        else:
            self.replays += 1
            with _disable_current_modes():  # one launch, of which nothing is seen
                self.replay()

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Count(TorchDispatchMode):
    """Operators that the host dispatches one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += 1
        return func(*args, **kwargs or {})
