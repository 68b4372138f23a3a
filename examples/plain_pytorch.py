"""Reverse KL in a plain PyTorch loop: from logits, and from hidden states and head weights.

The second form never holds the logits of the batch, which are the largest tensors of distillation, twice.

    python examples/plain_pytorch.py
"""

from collections.abc import Iterable

import torch
from tiny import ragged_batch, tiny_llama
from torch import Tensor, nn

from minillm_kernels import fused_linear_rkl_loss, fused_rkl_loss

Batch = dict[str, Tensor]


def train(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], learning_rate: float = 3e-3
) -> list[float]:
    """The loss of each step. Labels mask; logits at t predict the token at t + 1, hence the two slices."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits
        logits = student(**inputs).logits
        loss = fused_rkl_loss(logits[:, :-1], teacher_logits[:, :-1], batch["labels"][:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_without_logits(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], learning_rate: float = 3e-3
) -> list[float]:
    """The same steps; rows that the labels mask out do not reach the vocabulary at all.

    A head with a bias, a soft-cap or a logit scale is `minillm_kernels.Head(weight, bias, softcap, scale)`.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_hidden = teacher.base_model(**inputs).last_hidden_state
        hidden = student.base_model(**inputs).last_hidden_state
        loss = fused_linear_rkl_loss(
            hidden[:, :-1],
            student.lm_head.weight,
            teacher_hidden[:, :-1],
            teacher.lm_head.weight.detach(),
            batch["labels"][:, 1:],
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for loop in (train, train_without_logits):
        student, teacher = tiny_llama(layers=1, seed=1), tiny_llama(layers=2)
        losses = loop(student, teacher, [ragged_batch()] * 30)
        print(f"{loop.__name__}: {losses[0]:.4f} -> {losses[-1]:.4f} nats a token")
