"""Log-probabilities, entropies and divergences of given tokens, as one read of the logits gives them, and the losses
that are linear in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import arguments
from ..parallel.split import checked_rows
from ..rows import DIFFERENTIABLE, RowStats
from .loss_ops import wants_gradient
from .ops import call
from .reduction import check_coefficients, split_coefficients

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOGPROBS, _ENTROPY = (RowStats._fields.index(name) for name in ("student_logprobs", "student_entropy"))


class DistillStats(NamedTuple):
    """The statistics of each row of two models' logits, [...] each, in nats, float32 (float64 for float64 logits).

    Differentiable in the student: all but the teacher's two.

    Attributes:
        reverse_kl: KL(q || p) of student q and teacher p.
        forward_kl: KL(p || q).
        student_logprobs: log q(token).
        teacher_logprobs: log p(token), constant.
        student_entropy: H(q) = -sum q log q.
        student_logsumexp: log sum exp of the student's logits, after the temperature.
        teacher_logsumexp: the teacher's, constant.

    Examples:
        >>> import torch
        >>> from minillm_kernels import distill_stats
        >>> stats = distill_stats(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> stats.student_entropy  # log 4
        tensor([1.3863, 1.3863])
        >>> stats.reverse_kl
        tensor([0., 0.])
    """

    reverse_kl: Tensor
    forward_kl: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor

    @classmethod
    def of(cls, stats: RowStats) -> DistillStats:
        constant = stats.teacher_logprobs.detach(), stats.teacher_logsumexp.detach()
        return cls(
            stats.reverse_kl,
            stats.forward_kl,
            stats.student_logprobs,
            constant[0],
            stats.student_entropy,
            stats.student_logsumexp,
            constant[1],
        )


class DistillLoss(NamedTuple):
    """What `distill_loss` and `fused_linear_distill_loss` give.

    Attributes:
        loss: the scalar to differentiate.
        stats: `DistillStats` for logging, without gradient; 0 in rows that were not read, and 0 where a field is the
            teacher's or depends on it and there is none.

    Examples:
        >>> import torch
        >>> from minillm_kernels import distill_loss
        >>> logits = torch.zeros(2, 4)
        >>> loss, stats = distill_loss(logits, logits, torch.tensor([0, 3]), student_logprobs=-0.5)
        >>> loss, stats.student_logprobs
        (tensor(1.3863), tensor([-1.3863, -1.3863]))
    """

    loss: Tensor
    stats: DistillStats


class Options(TypedDict, total=False):
    """The keywords of `token_logprobs` but return_entropy, which alone decides on the result's type."""

    temperature: float
    ignore_index: int
    vocab_size: int | None
    group: object


@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, return_entropy: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, return_entropy: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of one token per row, log softmax(logits/T)[token], in nats. Differentiable.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; columns contiguous, leading dimensions may be strided.
        token_ids: [...] integers in [0, vocab_size).
        temperature: the logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        return_entropy: also return the entropy of each row, from the same read.
        ignore_index: rows with this id are not read: 0, with gradient 0.
        vocab_size: only the first `vocab_size` columns count, by default all.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        [...] float32 (float64 for float64 logits); with `return_entropy` a pair of them, log-probabilities and
        entropies. A token whose logit is -inf has log-probability -inf and gradient 0.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices or numbers do not fit.
        IndexError: a token outside the vocabulary, on CPU tensors. On CUDA, where finding out would wait for the
            device, its log-probability is NaN.
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        >>> import torch
        >>> from minillm_kernels import token_logprobs
        >>> logits = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
        >>> token_logprobs(logits, torch.tensor([0, 2])).exp()
        tensor([0.5000, 0.6000])
        >>> logprobs, entropy = token_logprobs(logits, torch.tensor([0, -100]), return_entropy=True)
        >>> entropy
        tensor([1.0397, 0.0000])
    """
    logits, _, vocab_size, backend = checked_rows(logits, None, vocab_size, group)
    temperature = arguments.check_temperature(temperature)
    counts = arguments.rows_that_count("token_ids", token_ids, logits, ignore_index)
    settings = (temperature, vocab_size, backend)
    stats = call("row_stats", logits, None, token_ids.long(), counts, False, *settings)
    logprobs = stats[_LOGPROBS]
    return (logprobs, stats[_ENTROPY]) if return_entropy else logprobs


def distill_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillStats:
    """Both KL divergences, both log-probabilities of a token per row, the student's entropy and both log-sum-exps.

    One read of the logits gives them all; the gradients of all differentiable fields together cost one more read and
    one write. The support is the columns finite in both models, for every statistic.

    Args:
        student_logits: [..., V], differentiable, as in `fused_rkl_loss`.
        teacher_logits: [..., V_t], constant.
        token_ids: [...] integers in [0, vocab_size).
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        ignore_index: rows with this id are not read: all is 0, with gradient 0.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        DistillStats, [...] each. A token outside the support has log-probabilities -inf and gradient 0.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices or numbers do not fit, or the teacher requires a gradient.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        >>> import torch
        >>> from minillm_kernels import distill_stats
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> stats = distill_stats(student, teacher, torch.tensor([0]))
        >>> stats.reverse_kl, stats.teacher_logprobs.exp()
        (tensor([0.5108]), tensor([0.9000]))
    """
    student_logits, teacher_logits, vocab_size, backend = checked_rows(
        student_logits, teacher_logits, vocab_size, group
    )
    temperature = arguments.check_temperature(temperature)
    counts = arguments.rows_that_count("token_ids", token_ids, student_logits, ignore_index)
    settings = (temperature, vocab_size, backend)
    stats = call("row_stats", student_logits, teacher_logits, token_ids.long(), counts, False, *settings)
    return DistillStats.of(RowStats(*stats.unbind(0)))


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    reverse_kl: float | Tensor = 0.0,
    forward_kl: float | Tensor = 0.0,
    student_logprobs: float | Tensor = 0.0,
    student_entropy: float | Tensor = 0.0,
    student_logsumexp: float | Tensor = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
    group: object = None,
) -> DistillLoss:
    r"""Any loss that is linear in the statistics of `distill_stats`: the sum over the rows that count of

        reverse_kl KL(q || p) + forward_kl KL(p || q) + student_logprobs log q(token) + student_entropy H(q)
        + student_logsumexp LSE

    with coefficients that are numbers or one number a row. Cross entropy with labels is `student_logprobs=-1 / n`;
    distillation mixed with it costs no more than either alone: one read, and one read and write for the gradient. The
    parameters are more than a dozen because five of them are the coefficients.

    Args:
        student_logits: [..., V], differentiable, as in `fused_rkl_loss`.
        teacher_logits: [..., V_t], constant; None where no coefficient needs it.
        token_ids: [...] integers in [0, vocab_size); None where every row counts and no log-probability is asked for.
        reverse_kl: the coefficient of KL(q || p): a number, or a constant tensor broadcastable to [...] (weights, the
            1 / n of a mean).
        forward_kl: of KL(p || q), likewise.
        student_logprobs: of log q(token).
        student_entropy: of H(q).
        student_logsumexp: of the log-sum-exp of the student's logits, after the temperature.
        temperature: both models' logits are divided by it; in [1e-15, 1e37], where float32 holds the quotients.
        ignore_index: rows with this id do not count. They are not read, nor are rows whose coefficients are all 0.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        inplace: the backward pass writes the gradient over `student_logits`; nothing else shares their memory.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        DistillLoss(loss, stats): a float32 scalar (float64 for float64 logits), and the statistics for logging.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: no coefficient, a divergence without a teacher, log-probabilities without token_ids; shapes,
            devices or numbers that do not fit; a constant that requires a gradient.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: the logits carry a forward-mode tangent (torch.func.jvp).

    Examples:
        Half distillation, half cross entropy with the label:

        >>> import torch
        >>> from minillm_kernels import distill_loss
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
        >>> loss, stats = distill_loss(student, teacher, torch.tensor([0]), forward_kl=0.5, student_logprobs=-0.5)
        >>> loss
        tensor(0.5306)
        >>> torch.isclose(loss, 0.5 * stats.forward_kl.sum() - 0.5 * stats.student_logprobs.sum())
        tensor(True)
    """
    student_logits, teacher_logits, vocab_size, backend = checked_rows(
        student_logits, teacher_logits, vocab_size, group
    )
    temperature = arguments.check_temperature(temperature)
    given = (reverse_kl, forward_kl, student_logprobs, student_entropy, student_logsumexp)
    check_coefficients(given, teacher_logits is not None, token_ids)
    if token_ids is not None:
        arguments.check_integers("token_ids", token_ids, student_logits)
    tensors, numbers = split_coefficients(given, student_logits)
    settings = (temperature, vocab_size, backend)
    needed = wants_gradient(student_logits)
    args = (student_logits, teacher_logits, token_ids, *tensors, numbers, ignore_index, inplace, needed, *settings)
    loss, stats, *_others = call("stats_loss", *args)
    if inplace and not torch.compiler.is_compiling():  # the operator has checked the logits; constants it does not see
        arguments.check_inplace(student_logits, token_ids=token_ids, **dict(zip(DIFFERENTIABLE, given, strict=True)))
    return DistillLoss(loss, DistillStats.of(RowStats(*stats.detach().unbind(0))))
