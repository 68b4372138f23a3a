"""Counts what makes the host wait for the device, on a machine that has none.

A read of a value (`float(x)`, `bool(x)`, `x.tolist()`, `x.cpu()`), an operation whose shape depends on values
(`nonzero`, a boolean index), and a move to the device that is not told `non_blocking`. On a CPU the first two are
operators, seen by a dispatch mode; the others end without an operator there, and are seen as calls of functions.
Tensors of minillm/data never leave the host and do not count.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount,
}  # fmt: skip
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
OURS = str(Path(__file__).parents[2] / "minillm") + "/"


class Waits:
    """A context; `found` counts the places that waited, as "file:line"."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __enter__(self) -> "Waits":
        self.modes = (_Operators(self), _Calls(self))
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, ours_alone: bool = False) -> None:
        frame, inner = sys._getframe(2), ""
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            name = frame.f_code.co_filename
            if "/site-packages/" in name and "/torch/utils/" not in name and not inner:
                inner = f" in {Path(name).name}:{frame.f_lineno}"
            frame = frame.f_back
        if frame is None or "/minillm/data/" in frame.f_code.co_filename or (ours_alone and inner):
            return
        self.found[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}{inner}"] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in BY_INDEX and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        by_count = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if func.overloadpacket in READS or by_mask or by_count:
            self.waits.note()
        return func(*args, **kwargs or {})


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = func is Tensor.to and any(isinstance(x, (torch.device, str)) for x in (*args, *kwargs.values()))
        makes = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        makes = makes and not isinstance(args[0], Tensor)
        if func in (Tensor.tolist, Tensor.cpu, Tensor.cuda):
            self.waits.note()
        elif makes or (moves and not kwargs.get("non_blocking")):
            self.waits.note(ours_alone=True)  # nothing tells whether those of other packages move anything
        return func(*args, **kwargs)
