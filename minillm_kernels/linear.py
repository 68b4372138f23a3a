"""Losses and statistics of hidden states and head weights: the logits of all rows never exist at once.

Each function is its namesake on logits applied to z = hW^T + b, then z * logit_scale, then softcap * tanh(z /
softcap), for student and teacher; how it is computed is in chunked.py and tiled.py. Arguments that all share:

    student_hidden [..., H], student_weight [V, H], student_bias [V] or None: differentiable, of one type; under
    autocast
        they are cast as torch.nn.functional.linear casts.
    teacher_hidden [..., H_t], teacher_weight [V_t, H_t], teacher_bias: constants. Hidden and head sizes may differ.
    softcap, logit_scale: a number for both models or a (student, teacher) pair; softcap None: none.
    impl: "chunked", four matmuls on a buffer of some rows' logits; or "tiled", logits formed tile by tile on the
        tensor cores and never in memory (Triton; tiled.py says what it costs and computes).
    chunk_rows: rows a chunk; by default both models' logits of a chunk take at most 64 MiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, backends, linear_ops, losses, policy  # noqa: F401  (linear_ops registers torch.ops.minillm)
from .chunked import default_chunk_rows
from .policy import MiniLLMLoss
from .rows import MIXTURE_DIVERGENCES, RowStats
from .statistics import DistillStats
from .tiled import COMPUTES, TILED

PerModel = float | tuple[float | None, float | None] | None


class _Heads:
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


def _driver(impl: str, chunk_rows: int | None) -> tuple[int | None, str]:
    """(chunk_rows, backend): the tiled kernels are Triton's alone, whatever the device's first choice is."""
    backend = backends.requested()
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


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def fused_linear_rkl_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    """`fused_rkl_loss` of hidden states and head weights (the arguments at the top of this file).

    A scalar reduction forms the gradients in the same sweep as the loss: four matmuls. Rows that do not count (ignored
    label, weight 0) are left out of the matmuls. reduction="none" forms the logits again in the backward pass.
    """
    return fused_linear_divergence_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        "reverse_kl",
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        softcap=softcap,
        logit_scale=logit_scale,
        impl=impl,
        chunk_rows=chunk_rows,
        weights=weights,
        temperature=temperature,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        group=group,
    )


def fused_linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: str,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    """`fused_divergence_loss` of hidden states and head weights; see `fused_linear_rkl_loss`."""
    arguments.check_group(group)
    name = losses.check_divergence(divergence, beta, reduction)
    if impl == "tiled" and name in MIXTURE_DIVERGENCES:
        raise NotImplementedError(
            f'impl="tiled" computes {COMPUTES}; {name}, whose mixture needs both normalisers first: use impl="chunked"'
        )
    heads = _Heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        softcap,
        logit_scale,
        impl,
        chunk_rows,
        temperature,
        vocab_size,
    )
    w = losses.row_weights(heads.like_logits, labels, weights, ignore_index)
    if reduction == "none":
        mask = None if w is None else _flat(w != 0)
        if name in MIXTURE_DIVERGENCES:
            per_row = torch.ops.minillm.linear_divergence(*heads.tensors, mask, name, beta, *heads.settings)
        else:
            stats = torch.ops.minillm.linear_stats(*heads.tensors, None, mask, *heads.settings)
            per_row = stats[RowStats._fields.index(name)]
        per_row = per_row.reshape(heads.leading)
        return per_row if w is None else per_row * w
    if w is None:
        w = torch.ones(heads.leading, dtype=losses.accumulator(student_hidden), device=student_hidden.device)
    row_weights = _flat(losses.normalized(w, reduction, normalizer))
    return torch.ops.minillm.linear_divergence_loss(
        *heads.tensors, row_weights, name, beta, heads.needs, *heads.settings
    )[0]


def fused_linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of hidden states and a head. The backward pass forms the logits again."""
    arguments.check_group(group)
    heads = _Heads((hidden, weight, bias), None, softcap, logit_scale, impl, chunk_rows, temperature, vocab_size)
    arguments.check_token_ids("token_ids", token_ids, heads.like_logits)
    mask = token_ids != ignore_index
    ids = torch.where(mask, token_ids, 0)
    stats = torch.ops.minillm.linear_stats(*heads.tensors, _flat(ids), _flat(mask), *heads.settings)
    stats = RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0)))
    return (stats.student_logprob, stats.student_entropy) if return_entropy else stats.student_logprob


def fused_linear_distill_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillStats:
    """`distill_stats` of hidden states and head weights. The backward pass forms the logits again."""
    arguments.check_group(group)
    heads = _Heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        softcap,
        logit_scale,
        impl,
        chunk_rows,
        temperature,
        vocab_size,
    )
    arguments.check_token_ids("token_ids", token_ids, heads.like_logits)
    if mask is not None:
        mask = arguments.check_per_row("mask", mask, heads.like_logits) != 0
        token_ids = torch.where(mask, token_ids, 0)
    stats = torch.ops.minillm.linear_stats(*heads.tensors, _flat(token_ids), _flat(mask), *heads.settings)
    return DistillStats.of(RowStats(*(x.reshape(heads.leading) for x in stats.unbind(0))))


def fused_linear_minillm_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_ids: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    importance_weights: Tensor | None = None,
    mask: Tensor,
    clip_range: float = 0.2,
    single_step: float = 1.0,
    weight_single_step: bool = True,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> MiniLLMLoss:
    """`minillm_loss` of hidden states and head weights, value and gradients in one sweep: four matmuls."""
    heads = _Heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        softcap,
        logit_scale,
        impl,
        chunk_rows,
        temperature,
        vocab_size,
    )
    like = heads.like_logits
    arguments.check_token_ids("token_ids", token_ids, like)
    rows, counts = policy.check_policy(
        like, advantages, old_logprobs, importance_weights, mask, clip_range, single_step, weight_single_step
    )
    ids = torch.where(counts, token_ids, 0)
    loss, stats, *_gradients = torch.ops.minillm.linear_minillm_loss(
        *heads.tensors,
        _flat(ids),
        _flat(counts),
        torch.stack([x.reshape(-1) for x in rows]),
        1.0 / policy.denominator(counts, normalizer, rows.advantages.dtype),
        clip_range,
        entropy_coef,
        heads.needs,
        *heads.settings,
    )
    detached = RowStats(*(x.reshape(heads.leading) for x in stats.detach().unbind(0)))
    return policy.summarize(detached, rows, counts, clip_range, entropy_coef, normalizer)._replace(loss=loss)


class FusedLinearRKLLoss(nn.Module):
    """`fused_linear_rkl_loss` with its options fixed."""

    def __init__(
        self,
        *,
        softcap: PerModel = None,
        logit_scale: PerModel = 1.0,
        impl: str = "chunked",
        chunk_rows: int | None = None,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        losses.check_divergence("reverse_kl", 0.5, reduction)
        arguments.check_temperature(temperature)
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "impl": impl,
            "chunk_rows": chunk_rows,
            "temperature": temperature,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
        }

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return fused_linear_rkl_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weights=weights,
            normalizer=normalizer,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
