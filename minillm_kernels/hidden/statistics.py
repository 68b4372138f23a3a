"""Statistics of hidden states and heads, and losses that are linear in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .. import arguments
from ..logits import statistics
from ..logits.loss_ops import weighted_sum
from ..logits.ops import call
from ..logits.reduction import check_coefficients, weighted_rows
from ..logits.statistics import DistillLoss, DistillStats
from . import ops  # noqa: F401  (registers torch.ops.minillm)
from .float16 import formed_late
from .head import Head, as_heads, models_here
from .operands import flat, like_logits, named, needs_of, operands

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(statistics.Options, total=False):
    """The keywords of `fused_linear_token_logprobs` but return_entropy, which alone decides on the result's type."""

    impl: str
    chunk_rows: int | None
    gather: bool


@overload
def fused_linear_token_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    token_ids: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def fused_linear_token_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    token_ids: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
def fused_linear_token_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    token_ids: Tensor,
    *,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of one token per row, in nats, of hidden states and a head. Differentiable.

    It is `token_logprobs` of the logits that the head makes, which never exist for all rows at once. The backward pass
    forms them again.

    Args:
        hidden: [..., H] last hidden states, differentiable.
        head: their `Head` or weight [V, H], differentiable.
        token_ids: [...] integers in [0, vocab_size).
        impl: "chunked" or "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        temperature: the logits are divided by it.
        return_entropy: also return the entropy of each row, from the same sweep.
        ignore_index: rows with this id are not read: 0, with gradient 0.
        vocab_size: only the first `vocab_size` columns count, by default all.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        [...] float32 (float64 for float64 inputs); with `return_entropy` a pair of them, log-probabilities and
        entropies. A token whose logit is -inf has log-probability -inf and gradient 0.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" with a split vocabulary.

    Examples:
        >>> import torch
        >>> from minillm_kernels import Head, fused_linear_token_logprobs
        >>> hidden, head = torch.randn(2, 8), Head(torch.randn(50, 8), torch.randn(50))
        >>> logprobs = fused_linear_token_logprobs(hidden, head, torch.tensor([7, -100]))
        >>> expected = head.logits(hidden).log_softmax(-1)[0, 7]
        >>> torch.isclose(logprobs[0], expected, rtol=1e-4), logprobs[1]
        (tensor(True), tensor(0.))
    """
    (head,) = as_heads(head)
    ranks, (model,) = models_here(group, (hidden, head))
    if head.weight is None:
        options: statistics.Options = {"temperature": temperature, "ignore_index": ignore_index}
        options |= {"vocab_size": vocab_size, "group": ranks}
        both = statistics.token_logprobs(model[0], token_ids, return_entropy=True, **options)
        return both if return_entropy else both[0]
    heads = operands(model, None, impl, chunk_rows, gather, temperature, vocab_size, ranks)
    like = like_logits(heads, hidden.shape[:-1])
    ids, counts = arguments.check_token_ids(token_ids, like, ignore_index)
    stats = named(call("linear_stats", flat(ids), flat(counts), *heads), like)
    return (stats.student_logprobs, stats.student_entropy) if return_entropy else stats.student_logprobs


def fused_linear_distill_stats(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    token_ids: Tensor,
    *,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillStats:
    """Both KL divergences, both log-probabilities of a token per row, the student's entropy and both log-sum-exps.

    It is `distill_stats` of the logits that the heads make, which never exist for all rows at once. The backward pass
    forms them again.

    Args:
        student_hidden: [..., H], differentiable, as in `fused_linear_rkl_loss`.
        student_head: its `Head` or weight [V, H], differentiable.
        teacher_hidden: [..., H_t], constant.
        teacher_head: its `Head` or weight [V_t, H_t], constant.
        token_ids: [...] integers in [0, vocab_size).
        impl: "chunked" or "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        temperature: both models' logits are divided by it.
        ignore_index: rows with this id are not read: all is 0, with gradient 0.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        DistillStats, [...] each. A token outside the support has log-probabilities -inf and gradient 0.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices, names or numbers do not fit, or the teacher requires a gradient.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" with a split vocabulary.

    Examples:
        >>> import torch
        >>> from minillm_kernels import fused_linear_distill_stats
        >>> hidden, weight, teacher_weight = torch.randn(2, 8), torch.randn(50, 8), torch.randn(50, 8)
        >>> stats = fused_linear_distill_stats(hidden, weight, hidden, teacher_weight, torch.tensor([7, -100]))
        >>> stats.reverse_kl > 0
        tensor([ True, False])
    """
    student_head, teacher_head = as_heads(student_head, teacher_head)
    ranks, (student, teacher) = models_here(group, (student_hidden, student_head), (teacher_hidden, teacher_head))
    if student[1].weight is None or teacher[1].weight is None:
        return statistics.distill_stats(
            student[1].logits(student[0]),
            teacher[1].logits(teacher[0]),
            token_ids,
            temperature=temperature,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            group=ranks,
        )
    heads = operands(student, teacher, impl, chunk_rows, gather, temperature, vocab_size, ranks)
    like = like_logits(heads, student_hidden.shape[:-1])
    ids, counts = arguments.check_token_ids(token_ids, like, ignore_index)
    stats = call("linear_stats", flat(ids), flat(counts), *heads)
    return DistillStats.of(named(stats, like))


def fused_linear_distill_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    reverse_kl: float | Tensor = 0.0,
    forward_kl: float | Tensor = 0.0,
    student_logprobs: float | Tensor = 0.0,
    student_entropy: float | Tensor = 0.0,
    student_logsumexp: float | Tensor = 0.0,
    impl: str = "chunked",
    chunk_rows: int | None = None,
    gather: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: object = None,
) -> DistillLoss:
    r"""Any loss that is linear in the statistics of `distill_stats`, and its gradients, in one sweep over the logits.

    It is `distill_loss`, where the sum is written down, of the logits that the heads make, which never exist for all
    rows at once. Cross entropy is `student_logprobs=-1 / n`, without a teacher three matmuls; distillation mixed with
    it costs the four of either alone. The parameters, more than a dozen, are those of `distill_loss` with a head for
    each model and how to go about it.

    Args:
        student_hidden: [..., H], differentiable, as in `fused_linear_rkl_loss`.
        student_head: its `Head` or weight [V, H], differentiable.
        teacher_hidden: [..., H_t], constant; None, like its head, where no coefficient needs a teacher.
        teacher_head: its `Head` or weight [V_t, H_t], constant.
        token_ids: [...] integers in [0, vocab_size); None where every row counts and no log-probability is asked for.
        reverse_kl: the coefficient of KL(q || p): a number, or a constant tensor broadcastable to [...] (weights, the
            1 / n of a mean).
        forward_kl: of KL(p || q), likewise.
        student_logprobs: of log q(token).
        student_entropy: of H(q).
        student_logsumexp: of the log-sum-exp of the student's logits, after the temperature.
        impl: "chunked" or "tiled", as in `fused_linear_rkl_loss`.
        chunk_rows: rows in the buffer of "chunked".
        gather: leave rows that do not count out of the matmuls, as in `fused_linear_rkl_loss`.
        temperature: both models' logits are divided by it.
        ignore_index: rows with this id do not count. Nor do rows whose coefficients are all 0.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the heads' rows, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so.

    Returns:
        DistillLoss(loss, stats): a float32 scalar (float64 for float64 inputs), and the statistics for logging.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: no coefficient, a divergence without a teacher, log-probabilities without token_ids; shapes,
            devices, names or numbers that do not fit; a constant that requires a gradient.
        IndexError: a token outside the vocabulary, on CPU tensors (on CUDA: NaN).
        RuntimeError: "tiled" where the Triton backend does not run.
        NotImplementedError: "tiled" with a split vocabulary.

    Examples:
        Cross entropy with two labels, of a model alone:

        >>> import torch
        >>> from minillm_kernels import fused_linear_distill_loss
        >>> hidden, weight = torch.randn(3, 8), torch.randn(50, 8, requires_grad=True)
        >>> labels = torch.tensor([7, 9, -100])
        >>> loss, stats = fused_linear_distill_loss(hidden, weight, token_ids=labels, student_logprobs=-1 / 2)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels), rtol=1e-4)
        True
        >>> loss.backward()
    """
    if teacher_hidden is None or teacher_head is None:
        if teacher_hidden is not teacher_head:
            raise ValueError("teacher_hidden and teacher_head come together: pass both, or neither")
        ranks, (student,) = models_here(group, (student_hidden, as_heads(student_head)[0]))
        teacher = None
    else:
        student_head, teacher_head = as_heads(student_head, teacher_head)
        ranks, (student, teacher) = models_here(group, (student_hidden, student_head), (teacher_hidden, teacher_head))
    given = (reverse_kl, forward_kl, student_logprobs, student_entropy, student_logsumexp)
    if student[1].weight is None or (teacher is not None and teacher[1].weight is None):
        return statistics.distill_loss(
            student[1].logits(student[0]),
            None if teacher is None else teacher[1].logits(teacher[0]),
            token_ids,
            reverse_kl=reverse_kl,
            forward_kl=forward_kl,
            student_logprobs=student_logprobs,
            student_entropy=student_entropy,
            student_logsumexp=student_logsumexp,
            temperature=temperature,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            group=ranks,
        )
    heads = operands(student, teacher, impl, chunk_rows, gather, temperature, vocab_size, ranks)
    like = like_logits(heads, student_hidden.shape[:-1])
    check_coefficients(given, teacher is not None, token_ids)
    rows = weighted_rows(given, like, token_ids, ignore_index)
    ids, counts, coefficients = flat(rows.token_ids), flat(rows.counts), rows.coefficients.reshape(5, heads.n_rows)
    if formed_late(heads):
        stats = call("linear_stats", ids, counts, *heads)
        loss = weighted_sum(stats, coefficients)
    else:
        loss, stats, *_gradients = call("linear_stats_loss", ids, counts, coefficients, needs_of(heads), *heads)
    return DistillLoss(loss, DistillStats.of(named(stats.detach(), like)))
