"""Checks of the public functions' arguments, before any kernel runs: each error says what was wrong, what was
expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(student: Tensor, teacher: Tensor | None) -> None:
    """Floating-point [..., V], contiguous columns, equal leading shapes, one device, a teacher without gradient."""
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if x is None:
            continue
        check_tensor(name, x)
        check_no_tangent(name, x)
        if x.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name} must be [..., V] with V >= 1, got shape {tuple(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} in its last dimension; the vocabulary must be contiguous (1):"
                " call .contiguous(), or transpose so that the vocabulary comes last"
            )
    if teacher is None:
        return
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must have the same "
            "leading shape; only the last dimension, the head size, may differ"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_logits are on {student.device}, teacher_logits on {teacher.device}: move one of them"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits require a gradient, but the teacher is a constant here: compute them under no_grad() "
            "or pass teacher_logits.detach()"
        )


def check_no_tangent(name: str, x: Tensor) -> None:
    """An operator without a forward-mode formula would drop a tangent without a word."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name} carry a tangent, but minillm_kernels has no forward-mode derivatives (torch.func.jvp, "
            "torch.autograd.forward_ad); use backward(), or the plain formula (log_softmax) where one is needed"
        )


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    check_no_tangent(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def resolve_vocab_size(vocab_size: int | None, *head_sizes: int) -> int:
    """The number of leading columns that count: by default the smaller head."""
    smaller = min(head_sizes)
    if vocab_size is None:
        return smaller
    if not 1 <= vocab_size <= smaller:
        sizes = " and ".join(map(str, head_sizes))
        raise ValueError(f"vocab_size {vocab_size} must lie between 1 and the smaller head (head sizes {sizes})")
    return vocab_size


def check_inplace(inplace: bool, student: Tensor) -> None:
    if inplace and any(size > 1 and stride == 0 for size, stride in zip(student.shape, student.stride(), strict=True)):
        raise ValueError(
            f"inplace=True cannot write a gradient over student_logits of strides {student.stride()}: several rows "
            "share one memory; call .contiguous() first, or pass inplace=False"
        )


def check_temperature(temperature: float, zero_allowed: bool = False) -> float:
    temperature = float(temperature)
    if not 0.0 <= temperature < math.inf or (temperature == 0 and not zero_allowed):  # NaN fails the first
        expected = "a finite number >= 0 (0 = argmax)" if zero_allowed else "a finite number > 0"
        raise ValueError(f"temperature must be {expected}, got {temperature}")
    return temperature


def check_unit_interval(name: str, value: float) -> float:
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return value


def check_token_ids(token_ids: Tensor, logits: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The ids as int64, 0 in rows that do not count, and which rows count."""
    counts = rows_that_count("token_ids", token_ids, logits, ignore_index)
    return torch.where(counts, token_ids.long(), 0), counts


def rows_that_count(name: str, token_ids: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """[...] bool of one integer a row, compared as int64: in a narrower type -100 may be a token (156 in uint8)."""
    check_tensor(name, token_ids)
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {token_ids.dtype}")
    if token_ids.shape != logits.shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(logits.shape[:-1])}, got {tuple(token_ids.shape)}")
    if token_ids.device != logits.device:
        raise ValueError(f"{name} are on {token_ids.device}, the logits on {logits.device}: move one of them")
    return token_ids.long() != ignore_index


def check_per_row(name: str, x: Tensor, logits: Tensor) -> Tensor:
    """A per-row constant, broadcast to the leading shape."""
    check_tensor(name, x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} require a gradient, but are constants here: pass {name}.detach()")
    if x.device != logits.device:
        raise ValueError(f"{name} are on {x.device}, the logits on {logits.device}: move one of them")
    try:
        return x.expand(logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the leading shape {tuple(logits.shape[:-1])}, got {tuple(x.shape)}"
        ) from None


def check_normalizer(normalizer: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A denominator [] of that type, on the device of `like`; infinite for 0, so that what counts for nothing is 0."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a tensor of one element, got shape {tuple(normalizer.shape)}"
            )
        if normalizer.requires_grad and torch.is_grad_enabled():
            raise ValueError("normalizer requires a gradient, but is a constant here: pass normalizer.detach()")
        number = normalizer.reshape(()).to(like.device, dtype)
    elif not 0 <= normalizer < math.inf:  # NaN fails
        raise ValueError(f"normalizer must be a finite number >= 0, got {normalizer}")
    else:
        number = torch.full((), normalizer, dtype=dtype, device=like.device)
    return nonzero(number)


def nonzero(denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, math.inf, denominator)


def check_group(group: object) -> None:
    if group is not None:
        raise NotImplementedError("group= (a vocabulary split over ranks) is not implemented; pass group=None")
