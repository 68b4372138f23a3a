"""Exposure bias: how much faster a student errs along text that it sampled than along text that its teacher sampled.

ExAccErr, the excess accumulated error (Arora et al., 2022; MiniLLM, appendix B.5), with p the teacher and q the
student:

    R(l)   = Σ_{t≤l} 1/|X_t| Σ_{x∈X_t} k_q(x,t)          regret along prefixes sampled by the student
    l·ε(l) = Σ_{t≤l} 1/|X_t| Σ_{x∈X_t} k_p(x,t)          what the regret would be without exposure bias
    ExAccErr(l) = (R(l) / (l·ε(l)) - 1) · 100 %

k_q(x,t) is the mean of KL(p‖q)(y<t) over the student's samples of prompt x that are at least t tokens long, k_p(x,t)
over the teacher's, and X_t holds the prompts of which a sample of each model is. So both sums are over the same
prompts, each with the same weight. A mean over all samples that are long enough (`weighting` "samples" of older
results) is over other prompts for the student than for the teacher where their lengths differ, and shows an excess
where every prompt has none.

If the student equals its teacher up to rounding, ε is 0 and the quotient is undefined: NaN. Both models are sampled
`eval.samples` times per prompt, at temperature 1 from the whole vocabulary. The curve ends at the last length that a
quarter of the samples of each model, and a quarter of the prompts in both, reach. Standard errors come from the
jackknife over prompts.

Legend: P prompts, S samples of each, T positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DEFINITION = (
    "ExAccErr(l) = 100 (R(l) / (l eps(l)) - 1); R and l eps: sums over t <= l of the mean, over the prompts of which "
    "a sample of each model reaches position t, of each prompt's mean KL(teacher||student), in nats, over its samples "
    "that reach it, prefixes sampled from the student (R) or the teacher (l eps) at temperature 1 from the whole "
    "vocabulary; standard errors: jackknife over prompts"
)
ROUNDING = 1e-5
"""Nats per token; the error of the kernels in fp32 is below it."""


@dataclass(frozen=True)
class Reaching:
    """How many samples are at least l tokens long, for l = 1, 2, …"""

    student: list[int]
    teacher: list[int]


@dataclass(frozen=True)
class ExposureBias:
    """Curves by the length l of a response; undefined values are NaN."""

    definition: str
    length: list[int]
    """l = 1, 2, …, tokens."""
    regret: list[float]
    """R(l), nats."""
    expected: list[float]
    """l·ε(l), nats."""
    exaccerr: list[float]
    """ExAccErr(l), percent."""
    standard_error: list[float]
    """Of ExAccErr(l), percent."""
    samples_reaching: Reaching
    weighting: str = "samples"
    """What the means at each position are over: "prompts", or "samples" in results of before."""

    @property
    def name(self) -> str:
        """Of the quotient, for tables: the two weightings are not to be compared."""
        return "prompt-weighted ExAccErr" if self.weighting == "prompts" else "ExAccErr"


def excess_accumulated_error(
    student: Tensor, teacher: Tensor, student_lengths: Tensor, teacher_lengths: Tensor
) -> ExposureBias:
    """The curves of two tables of KL(p‖q), `student` [P, S, T] along samples of the student and `teacher` [P, S', T]
    along samples of the teacher. The lengths are [P, S] and [P, S'] tokens; values beyond them are not read.

    Raises ValueError for samples of different prompts.
    """
    if len(student) != len(teacher):
        raise ValueError(f"ExAccErr needs both models on the same prompts; got {len(student)} and {len(teacher)}")
    along = [_by_prompt(*pair) for pair in ((student, student_lengths), (teacher, teacher_lengths))]
    reach = [counts.sum(0) for _, counts in along]
    samples = [lengths.numel() for lengths in (student_lengths, teacher_lengths)]
    both, prompts = (along[0][1] > 0) & (along[1][1] > 0), len(student)
    reach, samples = [*reach, both.sum(0)], [*samples, prompts]
    enough = torch.stack([4 * r >= n for r, n in zip(reach, samples, strict=True)]).all(0)
    length = int(enough.long().cumprod(0).sum())
    means = [torch.where(both, totals / counts.clamp(min=1), 0) for totals, counts in along]
    regret, expected = ((mean.sum(0) / both.sum(0)).cumsum(-1)[:length] for mean in means)
    without_one = [((mean.sum(0) - mean) / (both.sum(0) - both.long())).cumsum(-1)[:, :length] for mean in means]
    excess = 100 * (regret / expected - 1)
    excess[expected <= ROUNDING * torch.arange(1, length + 1)] = torch.nan
    replicas = 100 * (without_one[0] / without_one[1] - 1)
    error = ((prompts - 1) * replicas.var(0, correction=0)).sqrt() + 0 * excess  # NaN where that is
    return ExposureBias(
        definition=DEFINITION,
        length=list(range(1, length + 1)),
        regret=regret.tolist(),
        expected=expected.tolist(),
        exaccerr=excess.tolist(),
        standard_error=error.tolist(),
        samples_reaching=Reaching(*(counts[:length].long().tolist() for counts in reach[:2])),
        weighting="prompts",
    )


def _by_prompt(divergence: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[P, T] sums over a prompt's samples that reach each position, and their number."""
    running = torch.arange(divergence.shape[2]) < lengths[..., None]
    return torch.where(running, divergence, 0).double().sum(1), running.double().sum(1)
