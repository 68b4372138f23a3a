"""The GKD loss of ms-swift replaced: the same sum over tokens, without log-softmaxes of both models.

`gkd_loss` takes what `swift.rlhf_trainers.gkd_loss.gkd_loss` takes of a teacher's whole logits, and returns the total
and the number of tokens; assign it to that name in `swift.rlhf_trainers.gkd_trainer` before the trainer is built.
Written against ms-swift 4.6.0. Heads of unequal size: here the columns that both have are compared; ms-swift pads the
smaller one by the other model's logits.

    python examples/ms_swift_gkd.py
"""

from types import SimpleNamespace
from typing import Any

import torch
from tiny import ragged_batch, tiny_llama
from torch import Tensor

from minillm_kernels import fused_divergence_loss


def gkd_loss(
    student_logits: Tensor, teacher_output: Any, labels: Tensor, beta: float, temperature: float, **unused: Any
) -> tuple[Tensor, Tensor]:
    told = labels if teacher_output.labels is None else teacher_output.labels  # behind a prompt of the teacher's own
    rows, teacher_rows = student_logits[labels != -100], teacher_output.full_logits[told != -100]
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "reduction": "sum"}
    return fused_divergence_loss(rows, teacher_rows, "jsd", **options), (labels != -100).sum()


if __name__ == "__main__":
    batch, student, teacher = ragged_batch(), tiny_llama(layers=1, seed=1), tiny_llama(layers=2)
    labels = batch.pop("labels").roll(-1, dims=1)  # shifted, as ms-swift passes them
    labels[:, -1] = -100
    with torch.no_grad():
        output = SimpleNamespace(full_logits=teacher(**batch).logits, labels=None)
    total, count = gkd_loss(student(**batch).logits, output, labels, beta=0.5, temperature=1.0)
    (total / count).backward()
    print("JSD per token", round(float(total.detach() / count), 4))
