r"""Distillation from a teacher of whom only the k most likely tokens are known, and the mass of all others together.

Both laws are taken over k + 1 outcomes: the teacher's top tokens S, and one bucket r for the rest,

    p_r = 1 - Σ_S p_v        q_r = 1 - Σ_S q_v        D(p, q) = D((p_S, p_r), (q_S, q_r))

so that a divergence stays one: never negative, 0 where both agree on S, and at most the divergence over the whole
vocabulary (the data processing inequality). For forward KL the two differ by p_r KL(p ‖ q | not S), what is unknown of
the teacher. Without the bucket, as where top-k log-probs are renormalised or summed alone, a student could lower the
loss by what it does outside of S.

The kernels compute it without forming the k + 1 outcomes: D(p, q) is the divergence over the vocabulary between the
student and the teacher p̃ that has the student's own shape outside of S,

    p̃_v = p_v  for v in S        p̃_v = p_r q_v / q_r  otherwise

and for every divergence here, all of the form Σ q_v f(p_v / q_v), so is its gradient, with p̃ held constant: the ratio
p̃_v / q_v is one number outside of S.

Legend: N rows, k tokens of each, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm.model.head import Output
from minillm_kernels import fused_divergence_loss

BUFFER = 1 << 24
"""Logits of the student that exist at once."""


class TopK(NamedTuple):
    """What is known of a teacher's law."""

    token_ids: Tensor
    """[N, k] int64, its most likely tokens."""
    logprobs: Tensor
    """[N, k] float32, their log-probs in nats."""
    tail: Tensor
    """[N] float32, the log of the mass of all others."""

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "TopK":
        """Of logits [N, V], with k below V."""
        logprobs = logits.float().log_softmax(-1)
        kept, token_ids = logprobs.topk(k, dim=-1)
        return cls(token_ids, kept, logprobs.scatter(1, token_ids, -torch.inf).logsumexp(-1))

    def to(self, device: torch.device) -> "TopK":
        return TopK(*(tensor.to(device, non_blocking=True) for tensor in self))

    def logits(self, columns: int) -> Tensor:
        """[N, V] log-probs of a law that it could be: the rest spread evenly."""
        share = self.tail - torch.log(torch.tensor(float(columns - self.token_ids.shape[1])))
        return share[:, None].repeat(1, columns).scatter(1, self.token_ids, self.logprobs)

    def outcomes(self) -> Tensor:
        """[N, k + 1] log-probs: the tokens, then the rest."""
        return torch.cat([self.logprobs, self.tail[:, None]], dim=1)

    def outcomes_of(self, logits: Tensor) -> Tensor:
        """[N, k + 1] log-probs of another model on the same outcomes, of its logits [N, V]."""
        logprobs = logits.log_softmax(-1)
        rest = logprobs.scatter(1, self.token_ids, -torch.inf).logsumexp(-1)
        return torch.cat([logprobs.gather(1, self.token_ids), rest[:, None]], dim=1)


def top_k_divergence(
    student: Output,
    teacher: TopK,
    divergence: str,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The divergence over the teacher's k tokens and one bucket for all others, summed over the rows, in nats.

    Args:
        student: states [N, H] and head. Differentiable.
        teacher: what is known of its law, at this temperature; constant. Its tokens are below `vocab_size`.
        divergence: as in `minillm_kernels.fused_divergence_loss`.
        beta: the coefficient of "jsd" and of the skew divergences.
        temperature: the student's logits are divided by it; the teacher's were when its law was taken.
        vocab_size: the columns that count; None: all of the student's head.

    Returns:
        A scalar of float32.

    Raises:
        ValueError: as `fused_divergence_loss`.

    Example:
        >>> import torch
        >>> from minillm_kernels import Head
        >>> from minillm.model.head import Output
        >>> from minillm.teacher.top_k import TopK, top_k_divergence
        >>> student = Output(torch.randn(6, 8), Head(torch.randn(50, 8)))
        >>> law = TopK.of(torch.randn(6, 50), k=4)
        >>> bool(top_k_divergence(student, law, "forward_kl") > 0)
        True
        >>> itself = TopK.of(student.head.logits(student.states), k=4)
        >>> bool(top_k_divergence(student, itself, "reverse_kl").abs() < 1e-4)
        True
    """
    states, head = student

    def summed(states: Tensor, law: TopK) -> Tensor:
        logits = head.logits(states)[:, :vocab_size]
        spread = _spread(logits.detach(), law, temperature)
        return fused_divergence_loss(
            logits, spread, divergence, beta=beta, temperature=temperature, reduction="sum"
        ).float()

    columns = vocab_size or (states.shape[1] if head.weight is None else len(head.weight))
    rows = max(16, BUFFER // columns)
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        law = TopK(*(tensor[part] for tensor in teacher))
        total = total + checkpoint(summed, states[part], law, use_reentrant=False)
    return total


@torch.no_grad()
def _spread(logits: Tensor, law: TopK, temperature: float) -> Tensor:
    """[N, V] logits, before the temperature, of the teacher that is the student outside of its own tokens."""
    scaled = logits.float() / temperature
    rest = scaled.scatter(1, law.token_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return (scaled - rest + law.tail[:, None]).scatter(1, law.token_ids, law.logprobs) * temperature
