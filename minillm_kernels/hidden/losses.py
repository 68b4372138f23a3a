"""Losses of hidden states and heads: the logits of all rows never exist at once.

Each function is its namesake on logits applied to the logits that the heads make of the hidden states (head.py);
chunked.py and tiled.py say how it is computed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import arguments
from ..logits import losses
from ..logits.ops import call
from ..logits.reduction import reduced, scalar_weights, split_normalizer
from ..rows import MIXTURE_DIVERGENCES, RowStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)
from .float16 import formed_late
from .head import Head, as_heads, models_here
from .operands import flat, like_logits, needs_of, operands
from .tiled import COMPUTES


def fused_linear_rkl_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    labels: Tensor | None = None,
    *,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    r"""Reverse KL divergence KL(q || p) of student q and teacher p, in nats per row, of hidden states and heads.

    It is `fused_rkl_loss` (Gu et al., ICLR 2024, eq. 3) of the logits that the heads make, which never exist for all
    rows at once. A scalar reduction forms the gradients in the same sweep as the loss: four matmuls.
    reduction="none", and any loss in float16, whose scale must be known first, form the logits again in the backward
    pass. The parameters, more than a dozen, are those of `fused_rkl_loss` with a head for each model and how to go
    about it.

    Args:
        student_hidden: [..., H], the student's last hidden states. Differentiable.
        student_head: its `Head`, or the bare weight [V, H] of one. Differentiable; weight, bias and hidden states are
            of one type, or under autocast cast as `torch.nn.functional.linear` casts.
        teacher_hidden: [..., H_t], constant.
        teacher_head: its `Head` or weight [V_t, H_t], constant. Hidden and head sizes may differ from the student's.
        labels: [...] integers. Only a mask: rows with `ignore_index` do not count. Nothing is shifted.
        impl: "chunked", four matmuls on a buffer of some rows' logits; or "tiled", logits formed tile by tile on the
            tensor cores and never in memory (Triton's alone; six matmuls, reverse and forward KL only).
        chunk_rows: rows in the buffer of "chunked". By default both models' logits of a chunk take at most 96 MiB on a
            CPU; on CUDA, where few rows would leave the matmuls to wait for memory, they are 1024 to 4096 rows.
        gather: leave rows that do not count out of the matmuls, which pays where most rows do not. The host then waits
            for their numbers: not inside a CUDA graph. Without it no function here synchronises.
        weights: broadcastable to [...], constant. A row of weight 0 is not read: its loss and gradient are exactly 0.
        temperature: both models' logits are divided by it.
        reduction: "none" gives w * l, [...]; "sum" their sum; "mean" sum(w * l)/sum(w); "batchmean" sum(w * l) over
            the number of rows that count (label not ignored, weight not 0). Nothing that counts gives 0.
        normalizer: replaces the denominator of "mean" and "batchmean": the global token count under accumulation.
        ignore_index: the label of rows that do not count; they are not read.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        A float32 scalar, or [...] for "none"; float64 when an input is float64.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit, or a constant requires a gradient.
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" with a split vocabulary.

    Examples:
        >>> import torch
        >>> from minillm_kernels import fused_linear_rkl_loss, fused_rkl_loss
        >>> hidden, teacher_hidden = torch.randn(6, 8, requires_grad=True), torch.randn(6, 16)
        >>> weight, teacher_weight = torch.randn(50, 8, requires_grad=True), torch.randn(50, 16)
        >>> labels = torch.tensor([3, 1, 4, 1, -100, -100])
        >>> loss = fused_linear_rkl_loss(hidden, weight, teacher_hidden, teacher_weight, labels)
        >>> loss.backward()
        >>> hidden.grad.shape, weight.grad.shape
        (torch.Size([6, 8]), torch.Size([50, 8]))
        >>> logits, teacher_logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        >>> torch.allclose(loss, fused_rkl_loss(logits, teacher_logits, labels), rtol=1e-4)
        True
    """
    return fused_linear_divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        "reverse_kl",
        labels,
        impl=impl,
        chunk_rows=chunk_rows,
        gather=gather,
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
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    divergence: str,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor:
    """A divergence of student q and teacher p, in nats per row, of hidden states and heads.

    It is `fused_divergence_loss` of the logits that the heads make, computed as in `fused_linear_rkl_loss`, with whose
    parameters it has the divergence and its beta: more than a dozen.

    Args:
        student_hidden: [..., H], differentiable, as in `fused_linear_rkl_loss`.
        student_head: its `Head` or weight [V, H], differentiable.
        teacher_hidden: [..., H_t], constant.
        teacher_head: its `Head` or weight [V_t, H_t], constant.
        divergence: "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl" or "tvd", as in
            `fused_divergence_loss`.
        labels: [...] integers. Only a mask: rows with `ignore_index` do not count.
        beta: the mixture's coefficient, in [0, 1]; not used by the first two and "tvd".
        impl: "chunked", or for reverse and forward KL "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        weights: broadcastable to [...], constant. A row of weight 0 is not read.
        temperature: both models' logits are divided by it.
        reduction: "none", "sum", "mean" or "batchmean", as in `fused_linear_rkl_loss`.
        normalizer: replaces the denominator of "mean" and "batchmean".
        ignore_index: the label of rows that do not count; they are not read.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        A float32 scalar, or [...] for "none"; float64 when an input is float64.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit, or a constant requires a gradient.
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" for a divergence that it cannot compute, or with a split vocabulary.

    Examples:
        Two heads with the soft-cap of Gemma 2:

        >>> import torch
        >>> from minillm_kernels import Head, fused_linear_divergence_loss
        >>> hidden = torch.randn(6, 8)
        >>> student, teacher = Head(torch.randn(50, 8), softcap=30.0), Head(torch.randn(50, 8), softcap=30.0)
        >>> fused_linear_divergence_loss(hidden, student, hidden, teacher, "jsd", beta=0.1) > 0
        tensor(True)
        >>> fused_linear_divergence_loss(hidden, student, hidden, student, "jsd", beta=0.1).abs() < 1e-6
        tensor(True)
    """
    name = losses.check_divergence(divergence, beta, reduction)
    student_head, teacher_head = as_heads(student_head, teacher_head)
    ranks, (student, teacher) = models_here(group, (student_hidden, student_head), (teacher_hidden, teacher_head))
    if student[1].weight is None or teacher[1].weight is None:
        return losses.fused_divergence_loss(
            student[1].logits(student[0]),
            teacher[1].logits(teacher[0]),
            divergence,
            labels,
            beta=beta,
            weights=weights,
            temperature=temperature,
            reduction=reduction,
            normalizer=normalizer,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            group=ranks,
        )
    if impl == "tiled" and name in MIXTURE_DIVERGENCES:
        raise NotImplementedError(
            f'impl="tiled" computes {COMPUTES}; {name}, whose mixture needs both normalisers first: use impl="chunked"'
        )
    heads = operands(student, teacher, impl, chunk_rows, gather, temperature, vocab_size, ranks)
    like = like_logits(heads, student_hidden.shape[:-1])
    w = losses.row_weights(like, labels, weights, ignore_index)
    if reduction == "none" or formed_late(heads):
        mask = None if w is None else flat(w != 0)
        if name in MIXTURE_DIVERGENCES:
            per_row = call("linear_divergence", mask, name, beta, *heads)
        else:
            per_row = call("linear_stats", None, mask, *heads)[RowStats._fields.index(name)]
        per_row = per_row.reshape(like.shape[:-1])
        if reduction != "none":
            return reduced(
                per_row, scalar_weights(per_row, w, reduction, *split_normalizer(normalizer, student_hidden))
            )
        return per_row if w is None else per_row * w
    scalar = (*split_normalizer(normalizer, student_hidden), reduction, name, beta, needs_of(heads))
    return call("linear_divergence_loss", flat(w), *scalar, *heads)[0]


class FusedLinearRKLLoss(nn.Module):
    """`fused_linear_rkl_loss` as a module, with its options fixed.

    Args:
        impl: "chunked" or "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        temperature: both models' logits are divided by it.
        reduction: "none", "sum", "mean" or "batchmean".
        ignore_index: the label of rows that do not count.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: as in `fused_linear_rkl_loss`.

    Raises:
        ValueError: a temperature or reduction that `fused_linear_rkl_loss` would refuse.

    Examples:
        >>> import torch
        >>> from minillm_kernels import FusedLinearRKLLoss
        >>> loss = FusedLinearRKLLoss(temperature=2.0)
        >>> hidden, weight = torch.randn(6, 8), torch.randn(50, 8)
        >>> loss(hidden, weight, hidden, weight).abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        *,
        impl: str = "chunked",
        chunk_rows: int | None = None,
        gather: bool = False,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        vocab_size: int | None = None,
        group: object = None,
    ) -> None:
        super().__init__()
        losses.check_reduction(reduction)
        arguments.check_temperature(temperature)
        self.options: dict[str, Any] = {
            "impl": impl,
            "chunk_rows": chunk_rows,
            "gather": gather,
            "temperature": temperature,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
        }
        self.group = group

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Head | Tensor,
        teacher_hidden: Tensor,
        teacher_head: Head | Tensor,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of these hidden states and heads.

        Args:
            student_hidden: [..., H], differentiable.
            student_head: its `Head` or weight [V, H], differentiable.
            teacher_hidden: [..., H_t], constant.
            teacher_head: its `Head` or weight [V_t, H_t], constant.
            labels: [...] integers. Only a mask: rows with `ignore_index` do not count.
            weights: broadcastable to [...], constant.
            normalizer: replaces the denominator of "mean" and "batchmean".

        Returns:
            What `fused_linear_rkl_loss` returns.
        """
        models = (student_hidden, student_head, teacher_hidden, teacher_head)
        options = {**self.options, "group": self.group}
        return fused_linear_rkl_loss(*models, labels, weights=weights, normalizer=normalizer, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
