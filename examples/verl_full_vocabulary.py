"""Distillation losses of verl's form [B, T], over the whole vocabulary where verl has the teacher's top k.

verl's `forward_kl_topk` is Σ p (log p - log q) over the k tokens that the teacher finds likeliest (docs/algo/opd.md);
with k = V it is the forward KL that `distillation_losses` computes, from final states and heads, so that no log-probs
[B, T, V] exist. The teacher sends its states, H numbers a token. Written against verl 0.9.1.

    python examples/verl_full_vocabulary.py
"""

from typing import Any

import torch
from tiny import ragged_batch, tiny_llama
from torch import Tensor

from minillm.model.head import read_head
from minillm_kernels import Head, fused_linear_divergence_loss


def distillation_losses(
    student_states: Tensor, student_head: Head, teacher_states: Tensor, teacher_head: Head, response_mask: Tensor,
    divergence: str = "forward_kl",
) -> dict[str, Tensor]:  # fmt: skip
    """What verl's loss functions return beside their metrics of the top k; other divergences as well."""
    losses = fused_linear_divergence_loss(
        student_states, student_head, teacher_states, teacher_head, divergence, weights=response_mask, reduction="none"
    )
    return {"distillation_losses": losses}


def token_mean(losses: Tensor, response_mask: Tensor) -> Tensor:
    """verl's `agg_loss` in the mode token-mean."""
    return (losses * response_mask).sum() / response_mask.sum()


if __name__ == "__main__":
    batch, student, teacher = ragged_batch(), tiny_llama(layers=1, seed=1), tiny_llama(layers=2)
    mask = (batch.pop("labels").roll(-1, dims=1) != -100).float()
    mask[:, -1] = 0
    states: Any = student.model(**batch).last_hidden_state
    with torch.no_grad():
        theirs = teacher.model(**batch).last_hidden_state
    heads = read_head(student), read_head(teacher).detach()
    losses = distillation_losses(states, heads[0], theirs, heads[1], mask)["distillation_losses"]
    token_mean(losses, mask).backward()
    print("forward KL per token", round(float(token_mean(losses.detach(), mask)), 4))
