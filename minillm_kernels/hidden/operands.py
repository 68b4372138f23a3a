"""What the fused linear functions are given, checked: hidden states and vocabulary heads of one or two models.

Legend: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..backends import choose
from ..parallel.ranks import Ranks
from ..parallel.split import Split, columns
from ..rows import RowStats, accumulator
from .head import Head, check_hidden


class Projection(NamedTuple):
    """Hidden states and the head that reads them, of one model."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']
    softcap: float  # 0: none
    scale: float


class Operands(NamedTuple):
    """What every operation of ops.py takes last: two projections, and how to go about them."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    softcap: list[float]  # of both models
    scale: list[float]
    temperature: float
    vocab_size: int
    impl: str
    chunk_rows: int | None
    gather: bool
    backend: str | Split

    @property
    def student(self) -> Projection:
        return Projection(self.student_hidden, self.student_weight, self.student_bias, self.softcap[0], self.scale[0])

    @property
    def teacher(self) -> Projection | None:
        if self.teacher_hidden is None or self.teacher_weight is None:
            return None
        return Projection(self.teacher_hidden, self.teacher_weight, self.teacher_bias, self.softcap[1], self.scale[1])

    @property
    def accumulator(self) -> torch.dtype:
        """The type of values per row."""
        return accumulator(self.student_weight, self.teacher_weight)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]

    @property
    def settings(self) -> tuple:
        """What is no tensor."""
        return self[6:]

    @property
    def n_rows(self) -> int:
        return self.student_hidden.shape[0]


def operands(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head] | None,
    impl: str,
    chunk_rows: int | None,
    gather: bool,
    temperature: float,
    vocab_size: int | None,
    ranks: Ranks | None = None,
) -> Operands:
    """Checked, flattened to [N, H] and cast as `torch.nn.functional.linear` casts. Both heads have weights."""
    names = ("hidden", "head") if teacher is None else ("student_hidden", "student_head")
    models = [_projection(*names, *student)]
    if teacher is not None:
        _check_teacher(*teacher, student[0])
        models.append(_projection("teacher_hidden", "teacher_head", *teacher))
    backend: str | Split = _check_driver(impl, chunk_rows, gather)
    temperature = arguments.check_temperature(temperature)
    vocab_size, above_ranks = columns(ranks, vocab_size, *(model.weight.shape[0] for model in models))
    if ranks is not None:
        if impl == "tiled":
            raise NotImplementedError('impl="tiled" needs the whole vocabulary on one rank: use impl="chunked"')
        backend = above_ranks
    own, other = models[0], models[1] if teacher is not None else None
    return Operands(
        own.hidden,
        own.weight,
        own.bias,
        None if other is None else other.hidden,
        None if other is None else other.weight,
        None if other is None else other.bias,
        softcap=[model.softcap for model in models],
        scale=[model.scale for model in models],
        temperature=temperature,
        vocab_size=vocab_size,
        impl=impl,
        chunk_rows=chunk_rows,
        gather=gather,
        backend=backend,
    )


def needs_of(heads: Operands) -> list[bool]:
    """Which of the student's hidden states, weight and bias want a gradient. No property: older torch cannot trace one
    of a named tuple."""
    student = (heads.student_hidden, heads.student_weight, heads.student_bias)
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in student]


def like_logits(heads: Operands, leading: torch.Size) -> Tensor:
    """A tensor without memory that has the logits' leading shape, device and type, for the checks of arguments."""
    return heads.student_hidden.detach().new_empty(1).expand(*leading, 1)


def named(stats: Tensor, like: Tensor) -> RowStats:
    """Of [len(RowStats), N], in the leading shape of `like`."""
    return RowStats(*stats.reshape(len(stats), *like.shape[:-1]).unbind(0))


def flat(x: Tensor | None) -> Tensor | None:
    """[N] of [...]."""
    return None if x is None else x.reshape(-1)


def _projection(hidden_name: str, head_name: str, hidden: Tensor, head: Head) -> Projection:
    weight, bias = head.weight, head.bias
    assert weight is not None
    check_hidden(hidden_name, hidden, weight)
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device)
    for name, x in ((hidden_name, hidden), (f"the bias of {head_name}", bias)):
        if x is None:
            continue
        if x.dtype != weight.dtype and not autocast:
            raise TypeError(f"{name} is {x.dtype}, the weight of {head_name} {weight.dtype}: cast one of them")
        if x.device != weight.device:
            raise ValueError(
                f"{name} is on {x.device}, the weight of {head_name} on {weight.device}: move one of them"
            )
    if autocast and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return Projection(hidden, weight, bias, float(head.softcap or 0.0), float(head.scale))


def _check_teacher(hidden: Tensor, head: Head, student_hidden: Tensor) -> None:
    arguments.check_tensor("teacher_hidden", hidden)
    if hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(hidden.shape)} must have the "
            "same leading shape; only the last dimension, the hidden size, may differ"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)):
        raise ValueError(
            "teacher_hidden or teacher_head require a gradient, but the teacher is a constant here: compute the "
            "hidden states under no_grad(), and pass weight.detach() or Head.detach(), or freeze the teacher by "
            "requires_grad_(False)"
        )


def _check_driver(impl: str, chunk_rows: int | None, gather: bool) -> str:
    """Returns the backend to ask for: the tiled kernels are Triton's alone, whatever the device's first choice is."""
    backend = choose.requested()
    if impl not in ("chunked", "tiled"):
        raise ValueError(f'impl must be "chunked" or "tiled", got {impl!r}')
    if impl == "chunked":
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be a whole number >= 1, got {chunk_rows}")
        return backend
    if chunk_rows is not None:
        raise ValueError('chunk_rows belongs to impl="chunked"; impl="tiled" has no chunks: leave it out')
    if gather:
        raise ValueError(
            'gather belongs to impl="chunked"; impl="tiled" passes over blocks of masked rows: leave it out'
        )
    if backend not in ("auto", "triton"):
        raise RuntimeError(f'impl="tiled" runs on the triton backend, not on {backend!r}: use impl="chunked"')
    return "triton"
