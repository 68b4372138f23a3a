"""What the fused linear functions are given, checked: hidden states and vocabulary heads of one or two models."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments
from ..backends import choose
from .chunked import default_chunk_rows
from .tiled import TILED

PerModel = float | tuple[float | None, float | None] | None


class Heads:
    """Checked, flattened to [N, H], and cast under autocast; `leading` is the shape of the results."""

    def __init__(
        self,
        student: tuple[Tensor, Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        softcap: PerModel,
        logit_scale: PerModel,
        impl: str,
        chunk_rows: int | None,
        temperature: float,
        vocab_size: int | None,
    ) -> None:
        _check_head("student", *student)
        self.leading = student[0].shape[:-1]
        if teacher is not None:
            _check_head("teacher", *teacher)
            if teacher[0].shape[:-1] != self.leading:
                raise ValueError(
                    f"student_hidden {tuple(student[0].shape)} and teacher_hidden {tuple(teacher[0].shape)} must have "
                    "the same leading shape; only the last dimension, the hidden size, may differ"
                )
            if any(x is not None and x.requires_grad for x in teacher) and torch.is_grad_enabled():
                raise ValueError(
                    "the teacher's hidden states or head require a gradient, but the teacher is a constant here: "
                    "compute them under no_grad() or pass them detached"
                )
        self.tensors = (*_as_linear(*student), *((None,) * 3 if teacher is None else _as_linear(*teacher)))
        weights = [head[1] for head in (student, teacher) if head is not None]
        smaller = min(w.shape[0] for w in weights)
        if vocab_size is not None and not 1 <= vocab_size <= smaller:
            sizes = " and ".join(str(w.shape[0]) for w in weights)
            raise ValueError(f"vocab_size {vocab_size} must lie between 1 and the smaller head (head sizes {sizes})")
        self.vocab_size = smaller if vocab_size is None else vocab_size
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be a whole number >= 1, got {chunk_rows}")
        rows, backend = _driver(impl, chunk_rows)
        element = self.tensors[1].element_size()
        self.settings = (
            _per_model("softcap", softcap, none=0.0),
            _per_model("logit_scale", logit_scale, none=1.0),
            arguments.check_temperature(temperature),
            self.vocab_size,
            default_chunk_rows(self.vocab_size, element, len(weights)) if rows is None else rows,
            backend,
        )

    @property
    def like_logits(self) -> Tensor:
        """A tensor without memory that has the logits' leading shape, device and type, for argument checks."""
        hidden = self.tensors[0]
        return hidden.new_empty(1).expand(*self.leading, 1).detach()

    @property
    def needs(self) -> list[bool]:
        return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in self.tensors[:3]]


def flat(x: Tensor | None) -> Tensor | None:
    """[N] of [...]."""
    return None if x is None else x.reshape(-1)


def _driver(impl: str, chunk_rows: int | None) -> tuple[int | None, str]:
    """(chunk_rows, backend): the tiled kernels are Triton's alone, whatever the device's first choice is."""
    backend = choose.requested()
    if impl == "chunked":
        return chunk_rows, backend
    if impl != "tiled":
        raise ValueError(f'impl must be "chunked" or "tiled", got {impl!r}')
    if chunk_rows is not None:
        raise ValueError('chunk_rows belongs to impl="chunked"; impl="tiled" has no chunks: leave it out')
    if backend not in ("auto", "triton"):
        raise RuntimeError(f'impl="tiled" runs on the triton backend, not on {backend!r}: use impl="chunked"')
    return TILED, "triton"


def _check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden must be [..., H] and {model}_weight [V, H], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{model}_bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    autocast = torch.is_autocast_enabled(weight.device.type)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{model}_{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype != weight.dtype and not autocast:
            raise TypeError(f"{model}_{name} is {x.dtype}, {model}_weight {weight.dtype}: cast one of them")
        if x.device != weight.device:
            raise ValueError(f"{model}_{name} is on {x.device}, {model}_weight on {weight.device}: move one of them")


def _as_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states as [N, H], and the types that torch.nn.functional.linear would compute in."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def _per_model(name: str, value: PerModel, none: float) -> list[float]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number for both models or a (student, teacher) pair, got {value!r}")
    numbers = [none if x is None else float(x) for x in pair]
    if name == "softcap" and any(x is not None and not float(x) > 0 for x in pair):
        raise ValueError(f"softcap must be a number > 0 or None, got {value!r}")
    return numbers
