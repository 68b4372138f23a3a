"""What each rank does with the examples that split a vocabulary, beside the same in one process."""

import eager
import megatron_vocab_parallel as megatron
import torch
import torch.distributed as dist
import verl_vocab_parallel as verl
from tiny import VOCABULARY, ragged_batch
from torch.distributed.tensor import init_device_mesh

from minillm_kernels import minillm_loss


def megatron_trains_what_one_process_trains() -> None:
    batches = [ragged_batch(seed=i) for i in range(3)]
    (student, teacher), (expected, _) = eager.models(), eager.models()
    losses, part = megatron.train(student, teacher, batches, dist.group.WORLD)
    for loss, whole in zip(losses, eager.train(expected, teacher, batches), strict=True):
        assert abs(loss - whole) <= 1e-6 * whole, f"{loss} instead of {whole}"
    eager.assert_same_parameters(part.body, expected.base_model, 1e-5)
    step = len(part.head)
    rows = slice(dist.get_rank() * step, min(VOCABULARY, (dist.get_rank() + 1) * step))
    assert (part.head[: rows.stop - rows.start] - expected.lm_head.weight[rows]).abs().max() <= 1e-5


def verl_updates_what_one_process_updates() -> None:
    batch = ragged_batch()
    (student, teacher), (expected, whole_teacher) = eager.models(), eager.models()
    packed = verl.pack(batch, verl.returns_of(batch))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    actor, tutor = verl.VocabParallelActor(student, mesh), verl.VocabParallelActor(teacher, mesh)
    scores = verl.compute_log_prob(actor, tutor, packed)
    result = verl.update_policy(actor, tutor, packed, scores["old_log_probs"])

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits, theirs = (m(**inputs).logits[:, :-1][packed["counts"]] for m in (expected, whole_teacher))
    log_q, log_p = logits.log_softmax(-1), theirs.log_softmax(-1).detach()
    token = packed["responses"].unsqueeze(-1)
    truth = {
        "old_log_probs": log_q.gather(-1, token).squeeze(-1),
        "ref_log_prob": log_p.gather(-1, token).squeeze(-1),
        "entropys": -(log_q.exp() * log_q).sum(-1),
    }
    for name, x in truth.items():
        torch.testing.assert_close(scores[name], x.detach(), rtol=1e-5, atol=1e-5)
    loss = minillm_loss(logits, theirs.detach(), packed["responses"], advantages=packed["advantages"],
                        old_logprobs=truth["old_log_probs"].detach()).loss  # fmt: skip
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)
    largest = max(x.grad.abs().max() for x in expected.parameters())
    for x, y in zip(actor.body.parameters(), expected.base_model.parameters(), strict=True):
        assert (x.grad - y.grad).abs().max() <= 1e-5 * largest
    assert (actor.lm_head.weight.grad.full_tensor() - expected.lm_head.weight.grad).abs().max() <= 1e-5 * largest


def verl_learns() -> None:
    kl = verl.train(*eager.models(), ragged_batch(), steps=8)
    assert kl[-1] < 0.9 * kl[0]
