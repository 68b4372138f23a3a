"""Losses between two rows of logits: reverse KL, and the other divergences that distillation uses.

No function writes a softmax; memory beyond the gradient is O(rows). A scalar forms the gradient with the loss
(loss_ops.py); reduction="none" reads the logits once more in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import arguments
from ..parallel.split import checked_rows
from ..rows import DIVERGENCES, RowStats
from .loss_ops import differentiable
from .ops import call
from .reduction import reduced, scalar_weights, split_normalizer

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def fused_rkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    group: object = None,
) -> Tensor:
    r"""Reverse KL divergence KL(q || p) = sum_v q_v (log q_v - log p_v) of student q and teacher p, in nats per row.

    It is the exact per-token part of MiniLLM's gradient (Gu et al., ICLR 2024, eq. 3). There is no factor T^2.

    A column that is -inf in one of the models is outside the support of both: the true KL, +inf where only the teacher
    excludes a token, is replaced by that of the renormalised rest. A row without support gives NaN with gradient 0.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64. Differentiable. Columns contiguous; the leading
            dimensions may be strided, so `logits[:, :-1]` is not copied.
        teacher_logits: [..., V_t], any of these types, constant. The heads may differ in size: see `vocab_size`.
        labels: [...] integers. Only a mask: rows with `ignore_index` do not count. Nothing is shifted.
        weights: broadcastable to [...], constant. A row of weight 0 is not read: its loss and gradient are exactly 0.
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        reduction: "none" gives w * l, [...]; "sum" their sum; "mean" sum(w * l)/sum(w); "batchmean" sum(w * l) over
            the number of rows that count (label not ignored, weight not 0). Nothing that counts gives 0.
        normalizer: replaces the denominator of "mean" and "batchmean": the global token count under accumulation. A
            number >= 0 or a constant tensor of one element; 0 gives 0.
        ignore_index: the label of rows that do not count; they are not read.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        inplace: the backward pass writes the gradient over `student_logits` (saves a tensor of their size). Their rows
            share no memory with each other, nor with the other tensors.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        A float32 scalar, or [...] for "none"; float64 when an input is float64.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices or numbers do not fit, a constant requires a gradient, or `inplace` would
            overwrite what is read.
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        A student that knows nothing and a teacher that is sure of token 1, of four:

        >>> import torch
        >>> from minillm_kernels import fused_rkl_loss
        >>> student = torch.zeros(2, 4, requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> loss = fused_rkl_loss(student, teacher, labels=torch.tensor([1, -100]))  # the second row is masked
        >>> round(loss.item(), 4)
        1.0029
        >>> loss.backward()
        >>> student.grad[0, 1] < 0, student.grad[1].any()
        (tensor(True), tensor(False))
    """
    return fused_divergence_loss(
        student_logits,
        teacher_logits,
        "reverse_kl",
        labels,
        weights=weights,
        temperature=temperature,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        inplace=inplace,
        group=group,
    )


def fused_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    group: object = None,
) -> Tensor:
    """A divergence of student q and teacher p, in nats per row ("tvd": a number in [0, 1]).

    "jsd" is the generalised Jensen-Shannon divergence of GKD (Agarwal et al., ICLR 2024); the skewed divergences are
    those of DistiLLM (Ko et al., ICML 2024). The parameters, more than a dozen, are those of `fused_rkl_loss` with the
    divergence and its beta.

    Args:
        student_logits: [..., V], differentiable, as in `fused_rkl_loss`.
        teacher_logits: [..., V_t], constant.
        divergence: one of

            - "reverse_kl": KL(q || p)
            - "forward_kl": KL(p || q)
            - "jsd": beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; exactly beta = 0 gives the
              forward, exactly beta = 1 the reverse KL, as in TRL (the limit itself is 0)
            - "skew_forward_kl": KL(p || beta p + (1 - beta) q)
            - "skew_reverse_kl": KL(q || (1 - beta) p + beta q)
            - "tvd": 1/2 sum |p - q|, subgradient 0 at ties
        labels: [...] integers. Only a mask: rows with `ignore_index` do not count.
        beta: the mixture's coefficient, in [0, 1]; not used by the first two and "tvd".
        weights: broadcastable to [...], constant. A row of weight 0 is not read.
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        reduction: "none", "sum", "mean" or "batchmean", as in `fused_rkl_loss`.
        normalizer: replaces the denominator of "mean" and "batchmean".
        ignore_index: the label of rows that do not count; they are not read.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        inplace: the backward pass writes the gradient over `student_logits`; nothing else shares their memory.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        A float32 scalar, or [...] for "none"; float64 when an input is float64.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit, a constant requires a gradient, or `inplace` would
            overwrite what is read.
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        >>> import torch
        >>> from minillm_kernels import fused_divergence_loss
        >>> student, teacher = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
        >>> for name in ("forward_kl", "jsd", "tvd"):
        ...     print(name, round(fused_divergence_loss(student, teacher, name).item(), 4))
        forward_kl 0.5493
        jsd 0.1308
        tvd 0.5
    """
    student_logits, teacher_logits, vocab_size, backend = checked_rows(
        student_logits, teacher_logits, vocab_size, group
    )
    temperature = arguments.check_temperature(temperature)
    name = check_divergence(divergence, beta, reduction)
    w = row_weights(student_logits, labels, weights, ignore_index)
    settings = (temperature, vocab_size, backend)
    compiling = torch.compiler.is_compiling()
    denominator = split_normalizer(normalizer if reduction != "none" else None, student_logits)
    if reduction != "none" and (compiling or differentiable(student_logits)):
        scalar = (*denominator, reduction, name, beta, inplace, not compiling)
        loss = call("divergence_loss", student_logits, teacher_logits, w, *scalar, *settings)[0]
        _check_constants(inplace, student_logits, labels, weights)
        return loss
    mask = None if w is None else w != 0
    if name in RowStats._fields:
        stats = call("row_stats", student_logits, teacher_logits, None, mask, inplace, *settings)
        per_row = stats[RowStats._fields.index(name)]
    else:
        with torch.no_grad():  # the formula of row_divergence's gradient includes the way through the normalisers
            stats = call("row_stats", student_logits, teacher_logits, None, mask, False, *settings)
        args = (student_logits, teacher_logits, mask, stats, inplace, name, beta, *settings)
        per_row = call("row_divergence", *args)[0]
    _check_constants(inplace, student_logits, labels, weights)
    if reduction != "none":  # nobody will differentiate it: the sum of the rows is all
        return reduced(per_row, scalar_weights(per_row, w, reduction, *denominator))
    return per_row if w is None else per_row * w


def _check_constants(inplace: bool, logits: Tensor, labels: Tensor | None, weights: Tensor | None) -> None:
    """What the operator, which has checked the logits, does not see. Compiled code does not come by here."""
    if inplace and not torch.compiler.is_compiling():
        arguments.check_inplace(logits, labels=labels, weights=weights)


def check_divergence(divergence: str, beta: float, reduction: str) -> str:
    """Checks the three; returns what to compute: where a mixture is one of the two models, the KL that is left."""
    beta = arguments.check_unit_interval("beta", beta)
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    check_reduction(reduction)
    if divergence == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta == 1.0 else "forward_kl"
    if beta == 0.0 and divergence.startswith("skew_"):
        return divergence.removeprefix("skew_")
    return divergence


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")


def row_weights(logits: Tensor, labels: Tensor | None, weights: Tensor | None, ignore_index: int) -> Tensor | None:
    """The weight of each row in the accumulation type, 0 where a label is ignored; None when every row counts once."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    w = None if weights is None else arguments.check_per_row("weights", weights, logits).to(dtype)
    if labels is not None:
        counts = arguments.rows_that_count("labels", labels, logits, ignore_index)
        w = counts.to(dtype) if w is None else torch.where(counts, w, 0)
    return w


class FusedRKLLoss(nn.Module):
    """`fused_rkl_loss` as a module, with its options fixed.

    Args:
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        reduction: "none", "sum", "mean" or "batchmean", as in `fused_rkl_loss`.
        ignore_index: the label of rows that do not count.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        inplace: the backward pass writes the gradient over the student's logits.
        group: as in `fused_rkl_loss`.

    Raises:
        ValueError: a temperature or reduction that `fused_rkl_loss` would refuse.

    Examples:
        >>> import torch
        >>> from minillm_kernels import FusedRKLLoss
        >>> loss = FusedRKLLoss(temperature=2.0, reduction="sum")
        >>> loss
        FusedRKLLoss(temperature=2.0, reduction='sum', vocab_size=None)
        >>> round(loss(torch.zeros(3, 4), torch.tensor([0.0, 6.0, 0.0, 0.0]).expand(3, 4)).item(), 4)
        3.0087
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        vocab_size: int | None = None,
        inplace: bool = False,
        group: object = None,
    ) -> None:
        super().__init__()
        arguments.check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of these logits.

        Args:
            student_logits: [..., V], differentiable.
            teacher_logits: [..., V_t], constant.
            labels: [...] integers. Only a mask: rows with `ignore_index` do not count.
            weights: broadcastable to [...], constant.
            normalizer: replaces the denominator of "mean" and "batchmean".

        Returns:
            What `fused_rkl_loss` returns.
        """
        return fused_rkl_loss(
            student_logits,
            teacher_logits,
            labels,
            weights=weights,
            normalizer=normalizer,
            temperature=self.temperature,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            vocab_size=self.vocab_size,
            inplace=self.inplace,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, vocab_size={self.vocab_size}"
