"""Reverse KL in a Megatron-style trainer, whose tensor parallelism leaves each rank V/P columns of the logits.

The columns of all ranks never meet: one all-gather of 7 numbers a row is all that the loss needs. With Megatron-LM,
`GPTModel(..., parallel_output=True)` takes the place of `VocabParallelModel`, and
`parallel_state.get_tensor_model_parallel_group()` that of `group`.

    torchrun --nproc_per_node 2 examples/megatron_vocab_parallel.py
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import VOCABULARY, ragged_batch, tiny_llama
from torch import Tensor, nn

from minillm_kernels import fused_rkl_loss

Batch = dict[str, Tensor]
DIVISIBLE_BY = 8  # Megatron pads the vocabulary to a multiple of it (make_vocab_size_divisible_by) times the ranks


class CopyToRegion(torch.autograd.Function):
    """Megatron's copy_to_tensor_model_parallel_region: the gradient of what every rank has is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class VocabParallelModel(nn.Module):
    """A model whose head is a ColumnParallelLinear(gather_output=False): this rank's rows of it."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.body, self.group = model.base_model, group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        weight = model.lm_head.weight.detach()
        padding = -len(weight) % (DIVISIBLE_BY * ranks)
        padded = torch.cat((weight, weight.new_zeros(padding, weight.shape[1])))
        self.head = nn.Parameter(padded.chunk(ranks)[rank].clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.linear(CopyToRegion.apply(hidden, self.group), self.head)  # [B, T, V/P]


def loss_func(
    teacher_logits: Tensor, labels: Tensor, group: dist.ProcessGroup, logits: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What Megatron calls with the model's output. The same loss on every rank: nothing to reduce over them. The
    padding of the vocabulary does not count."""
    loss = fused_rkl_loss(logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], vocab_size=VOCABULARY, group=group)
    return loss, {"reverse kl": loss.detach()}


def forward_step(batches: Iterator[Batch], student: nn.Module, teacher: nn.Module) -> tuple[Tensor, partial]:
    batch = next(batches)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        teacher_logits = teacher(**inputs)
    return student(**inputs), partial(loss_func, teacher_logits, batch["labels"], student.group)


def train(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Batch], group: dist.ProcessGroup
) -> tuple[list[float], VocabParallelModel]:
    """The loss of each step, and the student: this rank's part of it."""
    student, teacher = VocabParallelModel(student, group), VocabParallelModel(teacher, group)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    data, losses = iter(batches), []
    for _ in batches:
        output, loss_of = forward_step(data, student, teacher)
        loss, metrics = loss_of(output)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics["reverse kl"].item())
    return losses, student


if __name__ == "__main__":
    dist.init_process_group("gloo")
    losses, _ = train(tiny_llama(layers=1, seed=1), tiny_llama(layers=2), [ragged_batch()] * 30, dist.group.WORLD)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: {losses[0]:.4f} -> {losses[-1]:.4f} nats a token")
    dist.destroy_process_group()
