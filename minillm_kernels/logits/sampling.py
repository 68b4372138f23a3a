"""Sampling from the mixture of a teacher and a student, without forming the mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..parallel.split import checked_rows
from .ops import call


class MixedSample(NamedTuple):
    """One token per row, with its log-probabilities under the laws actually sampled: filtered and tempered.

    Attributes:
        token_ids: [...] int64.
        student_logprobs: [...] log q(token), in nats, float32 (float64 for float64 logits).
        teacher_logprobs: [...] log p(token), likewise; None where no teacher was given.
        mixture_logprobs: [...] log(alpha p(token) + (1 - alpha) q(token)), likewise.
        from_teacher: [...] bool, whether the teacher's side of the mixture drew the token.

    Examples:
        >>> import torch
        >>> from minillm_kernels import mixed_sample
        >>> drawn = mixed_sample(torch.zeros(3, 4), None, alpha=0)
        >>> drawn.student_logprobs.exp(), drawn.teacher_logprobs
        (tensor([0.2500, 0.2500, 0.2500]), None)
    """

    token_ids: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    mixture_logprobs: Tensor
    from_teacher: Tensor


def mixed_sample(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    alpha: float = 0.2,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    vocab_size: int | None = None,
    group: object = None,
) -> MixedSample:
    """Draws a token per row from alpha p + (1 - alpha) q, teacher p and student q (Gu et al., ICLR 2024, eq. 4).

    Exact by composition: a coin picks the model, one inverse-CDF draw picks the token from that model alone. A column
    of -inf is removed from that model alone. A row that holds NaN or +inf, or has no column left in one of the models,
    gives token 0 with NaN log-probabilities.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64; a constant here.
        teacher_logits: [..., V_t], likewise; None when alpha = 0.
        alpha: the teacher's share, in [0, 1]; 0 samples from the student, 1 from the teacher.
        temperature: divides both models' logits, in [1e-15, 1e37]; 0 takes the argmax of alpha p + (1 - alpha) q at
            T = 1, lowest index first.
        top_k: keep each model's `top_k` largest logits (0 = all), ties at the cut-off included.
        top_p: then keep, of each model, the tokens before which less than `top_p` of its mass lies.
        generator: torch's, for the uniforms.
        uniforms: float64 [..., 2] in [0, 1) instead: [..., 0] picks the model (teacher iff below alpha), [..., 1] the
            token (the first in vocabulary order whose cumulative probability exceeds it). The same uniforms give the
            same tokens.
        vocab_size: only the first `vocab_size` columns count, by default the smaller head.
        group: a process group whose ranks hold the logits' columns, a vocabulary split over ranks as the kernels'
            page says; None where they are whole, or DTensors that say so. The uniforms of its first rank count
            for all.

    Returns:
        MixedSample: tokens, log-probabilities in nats, and which model drew.

    Raises:
        TypeError: an argument is no tensor, or of a type that does not fit.
        ValueError: shapes, devices or numbers do not fit, or alpha > 0 without a teacher; a uniform outside [0, 1), on
            CPU tensors. On CUDA, where finding out would wait for the device, it draws some token of the model.
        RuntimeError: the logits carry a forward-mode tangent.
        NotImplementedError: top_k or top_p with a split vocabulary.

    Examples:
        The first coin is below alpha, the second is not:

        >>> import torch
        >>> from minillm_kernels import mixed_sample
        >>> student, teacher = torch.tensor([[0.5, 0.5]] * 2).log(), torch.tensor([[0.9, 0.1]] * 2).log()
        >>> uniforms = torch.tensor([[0.1, 0.6], [0.7, 0.6]], dtype=torch.float64)
        >>> drawn = mixed_sample(student, teacher, alpha=0.2, uniforms=uniforms)
        >>> drawn.from_teacher, drawn.token_ids
        (tensor([ True, False]), tensor([0, 1]))
        >>> drawn.mixture_logprobs.exp()
        tensor([0.5800, 0.4200])
    """
    with torch.no_grad():  # constants here, the teacher too
        student_logits, teacher_logits, vocab_size, backend = checked_rows(
            student_logits, teacher_logits, vocab_size, group
        )
    student_logits = student_logits.detach()
    teacher_logits = None if teacher_logits is None else teacher_logits.detach()
    alpha = float(alpha)
    arguments.check_law(teacher_logits, alpha, top_k, top_p)
    temperature = arguments.check_temperature(temperature, zero_allowed=True)
    leading = student_logits.shape[:-1]
    if uniforms is None:
        # generator=None would forbid dynamic shapes
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        uniforms = torch.rand(*leading, 2, dtype=torch.float64, device=student_logits.device, **source)
    else:
        arguments.check_uniforms(uniforms, student_logits)
    token_ids, logprobs, from_teacher = call(
        "row_sample",
        student_logits,
        teacher_logits,
        uniforms,
        alpha,
        temperature,
        int(top_k),
        float(top_p),
        vocab_size,
        backend,
    )
    student, teacher, mixture = logprobs.unbind(0)
    return MixedSample(token_ids, student, None if teacher_logits is None else teacher, mixture, from_teacher)
