"""On-policy distillation in a verl-style trainer: an actor whose head is split over ranks learns from its responses.

The two calls of an actor worker, on the heads' rows of this rank: `compute_log_prob`, which fills old_log_probs, and
`update_policy`, MiniLLM's loss. The heads are DTensors, as `parallelize_module` and tensor-parallel models of
transformers have them: the group is their mesh's, and their gradients are DTensors for the optimizer. Plain slices
take `group=` instead.

    torchrun --nproc_per_node 2 examples/verl_vocab_parallel.py
"""

import torch
import torch.distributed as dist
from tiny import ragged_batch, tiny_llama
from torch import Tensor, nn
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from minillm_kernels import MiniLLMLoss, fused_linear_distill_stats, fused_linear_minillm_loss

Packed = dict[str, Tensor]


class VocabParallelActor(nn.Module):
    """A model with its head's rows split over the mesh."""

    def __init__(self, model: nn.Module, mesh: dist.DeviceMesh) -> None:
        super().__init__()
        self.body = model.base_model
        self.lm_head = parallelize_module(model.lm_head, mesh, ColwiseParallel())

    def hidden(self, packed: Packed) -> Tensor:
        """[tokens, H] of the positions that predict a response's token. verl packs the sequences without padding; here
        they are padded, and what does not count is left out afterwards."""
        inputs = {"input_ids": packed["input_ids"], "attention_mask": packed["attention_mask"]}
        return self.body(**inputs).last_hidden_state[:, :-1][packed["counts"]]


def pack(batch: dict[str, Tensor], returns: Tensor) -> Packed:
    """returns [B, T - 1]: the reward that follows each token, normalised by length."""
    counts = batch["labels"][:, 1:] != -100
    return {**batch, "counts": counts, "responses": batch["labels"][:, 1:][counts], "advantages": returns[counts]}


@torch.no_grad()
def compute_log_prob(actor: VocabParallelActor, teacher: VocabParallelActor, packed: Packed) -> dict[str, Tensor]:
    """Per token of the responses, the same on every rank: one all-gather of 9 numbers a token."""
    models = (actor.hidden(packed), actor.lm_head.weight, teacher.hidden(packed), teacher.lm_head.weight)
    stats = fused_linear_distill_stats(*models, packed["responses"])
    return {
        "old_log_probs": stats.student_logprobs,
        "ref_log_prob": stats.teacher_logprobs,
        "entropys": stats.student_entropy,
    }


def update_policy(
    actor: VocabParallelActor, teacher: VocabParallelActor, packed: Packed, old_log_probs: Tensor
) -> MiniLLMLoss:
    """Leaves the gradients in the actor: one more all-reduce, of the hidden states' gradient."""
    with torch.no_grad():
        teacher_hidden = teacher.hidden(packed)
    result = fused_linear_minillm_loss(
        actor.hidden(packed),
        actor.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight.detach(),
        packed["responses"],
        advantages=packed["advantages"],
        old_logprobs=old_log_probs,
    )
    result.loss.backward()
    return result


def returns_of(batch: dict[str, Tensor]) -> Tensor:
    """Some numbers in place of MiniLLM's returns."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch["labels"][:, 1:].shape, generator=generator)


def train(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], steps: int) -> list[float]:
    """The reverse KL before each step, on one batch of responses."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    actor = VocabParallelActor(student, mesh)
    teacher = VocabParallelActor(teacher, mesh).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3)
    packed = pack(batch, returns_of(batch))
    old = compute_log_prob(actor, teacher, packed)["old_log_probs"]
    kl = []
    for _ in range(steps):
        kl.append(update_policy(actor, teacher, packed, old).reverse_kl.mean().item())
        optimizer.step()
        optimizer.zero_grad()
    return kl


if __name__ == "__main__":
    dist.init_process_group("gloo")
    kl = train(tiny_llama(layers=1, seed=1), tiny_llama(layers=2), ragged_batch(), steps=20)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: reverse KL {kl[0]:.4f} -> {kl[-1]:.4f} nats a token")
    dist.destroy_process_group()
