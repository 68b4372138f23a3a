"""Checks of the public functions' arguments, before any kernel runs: each error says what was wrong, what was
expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .rows import rows_overlap, share_memory

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where float32 holds 1/T, and for logits 1e5 apart their distance over T^2, which a gradient is made of.
TEMPERATURES = (1e-15, 1e37)


def check_logits(student: Tensor, teacher: Tensor | None, least: int = 1) -> None:
    """Floating-point [..., V], contiguous columns, equal leading shapes, one device, a teacher without gradient; at
    least so many columns, 0 where other ranks have them."""
    compiling = torch.compiler.is_compiling()
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if x is None:
            continue
        check_tensor(name, x)
        check_no_tangent(name, x)
        if x.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] < least:
            raise ValueError(f"{name} must be [..., V] with V >= {least}, got shape {tuple(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} in its last dimension; the vocabulary must be contiguous (1):"
                " call .contiguous(), or transpose so that the vocabulary comes last"
            )
        if not compiling and x._is_zerotensor():
            raise ValueError(f"{name} have no memory of their own (torch._efficientzerotensor): call .clone()")
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
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
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


def resolve_vocab_size(vocab_size: int | None, *head_sizes: int, least: int = 1) -> int:
    """The number of leading columns that count, at least `least`: by default the smaller head."""
    smaller = min(head_sizes)
    if vocab_size is None:
        return smaller
    if not least <= vocab_size <= smaller:
        sizes = " and ".join(map(str, head_sizes))
        raise ValueError(f"vocab_size {vocab_size} must lie between 1 and the smaller head (head sizes {sizes})")
    return vocab_size


def check_inplace(student: Tensor, **read: object) -> None:
    """A gradient may be written over the student's rows: they share no memory with each other, nor with what else is
    read (tensors by name; others are passed over)."""
    if rows_overlap(student):
        raise ValueError(
            f"inplace=True cannot write a gradient over student_logits of strides {student.stride()}: several rows "
            "share one memory; call .contiguous() first, or pass inplace=False"
        )
    for name, x in read.items():
        if isinstance(x, Tensor) and share_memory(student, x if name == "teacher_logits" else x.unsqueeze(-1)):
            raise ValueError(
                f"inplace=True cannot write a gradient over student_logits that share memory with {name}: pass "
                f"{name}.clone(), or inplace=False"
            )


def check_temperature(temperature: float, zero_allowed: bool = False) -> float:
    temperature = float(temperature)
    if not 0.0 <= temperature < math.inf or (temperature == 0 and not zero_allowed):  # NaN fails the first
        expected = "a finite number >= 0 (0 = argmax)" if zero_allowed else "a finite number > 0"
        raise ValueError(f"temperature must be {expected}, got {temperature}")
    low, high = TEMPERATURES
    if temperature != 0 and not low <= temperature <= high:
        raise ValueError(
            f"temperature must lie in [{low:g}, {high:g}], where float32 holds the quotients, got {temperature}"
        )
    return temperature


def check_unit_interval(name: str, value: float) -> float:
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return value


def check_law(teacher: Tensor | None, alpha: float, top_k: int, top_p: float) -> None:
    """Of the mixture that tokens are drawn from."""
    check_unit_interval("alpha", alpha)
    if teacher is None and alpha > 0:
        raise ValueError(f"alpha = {alpha} samples from the teacher too: pass teacher_logits, or alpha=0")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"top_k must be a whole number >= 0 (0 = no limit), got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1] (1 = no limit), got {top_p}")


def check_uniforms(uniforms: Tensor, logits: Tensor) -> None:
    """Two a row. Whether they lie in [0, 1) a backend can say where it need not wait for the device."""
    check_tensor("uniforms", uniforms)
    shape = (*logits.shape[:-1], 2)
    if uniforms.shape != shape or uniforms.dtype != torch.float64:
        raise ValueError(
            f"uniforms must be float64 of shape {shape}, got {uniforms.dtype} of shape {tuple(uniforms.shape)}"
        )
    if uniforms.device != logits.device:
        raise ValueError(f"uniforms are on {uniforms.device}, the logits on {logits.device}: move one of them")


def check_token_ids(token_ids: Tensor, logits: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The ids as int64, 0 in rows that do not count, and which rows count."""
    counts = rows_that_count("token_ids", token_ids, logits, ignore_index)
    return torch.where(counts, token_ids.long(), 0), counts


def rows_that_count(name: str, token_ids: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """[...] bool of one integer a row, compared as int64: in a narrower type -100 may be a token (156 in uint8)."""
    check_integers(name, token_ids, logits)
    return token_ids.long() != ignore_index


def check_integers(name: str, x: Tensor, logits: Tensor) -> None:
    """One integer a row."""
    check_tensor(name, x)
    if x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    if x.shape != logits.shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(logits.shape[:-1])}, got {tuple(x.shape)}")
    if x.device != logits.device:
        raise ValueError(f"{name} are on {x.device}, the logits on {logits.device}: move one of them")


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
        number = normalizer.reshape(()).to(like.device, dtype, non_blocking=True)
    elif not 0 <= normalizer < math.inf:  # NaN fails
        raise ValueError(f"normalizer must be a finite number >= 0, got {normalizer}")
    else:
        number = torch.full((), normalizer, dtype=dtype, device=like.device)
    return nonzero(number)


def nonzero(denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, math.inf, denominator)
