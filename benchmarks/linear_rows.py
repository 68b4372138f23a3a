"""Losses of hidden states and heads, forward + backward with the weight's gradient: ours and the peers.

"reverse_kl" of two models; "cross_entropy" of one, which libraries for training have chunked losses for.

As a script it is one process that runs one row once and prints, as JSON, its peak memory in bytes: "extra" beyond the
inputs, "working" beyond the inputs and the gradients, each counted from when it exists. The weight's gradient is as
large as the weight, and whoever asks for it must hold it; the working memory is what an implementation chooses.

    python benchmarks/linear_rows.py reverse_kl "minillm" 1024 576 49152
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import fused_linear_distill_loss, fused_linear_rkl_loss


def problem(N: int, H: int, V: int) -> tuple[Tensor, ...]:
    """student hidden [N, H] and weight [V, H] (with gradient), teacher's, logits with a spread of about 2.5."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 2.5 / H**0.5) * 2
    shapes = ((N, H), (V, H)) * 2
    drawn = [torch.randn(s, generator=generator) * k for s, k in zip(shapes, scales, strict=True)]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), *drawn[2:]


def minillm(hidden, weight, teacher_hidden, teacher_weight):
    return fused_linear_rkl_loss(hidden, weight, teacher_hidden, teacher_weight)


def eager(hidden, weight, teacher_hidden, teacher_weight):
    q = F.log_softmax(hidden @ weight.t(), -1)
    with torch.no_grad():
        p = F.log_softmax(teacher_hidden @ teacher_weight.t(), -1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def trl_chunked(hidden, weight, teacher_hidden, teacher_weight):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (hidden, weight, None, teacher_hidden, teacher_weight, None)
    return ChunkedDivergenceFunction.apply(*heads, 1.0, 1.0, 1.0, None, 1.0, None)[0].mean()


def liger_chunked(hidden, weight, teacher_hidden, teacher_weight):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


def four_matmuls(hidden, weight, teacher_hidden, teacher_weight):
    """By torch.mm, what no implementation can leave out: two heads forward, two matmuls back. Not a loss."""
    with torch.no_grad():
        z = hidden @ weight.t()
        teacher_hidden @ teacher_weight.t()
        hidden.grad, weight.grad = z @ weight, z.t() @ hidden
    return torch.zeros(())


def labels(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N]: tokens all over the vocabulary."""
    return torch.arange(len(hidden)) * 7919 % len(weight)


def minillm_cross_entropy(hidden, weight, *_teacher):
    ids = labels(hidden, weight)
    return fused_linear_distill_loss(hidden, weight, token_ids=ids, student_logprobs=-1 / len(hidden)).loss


def eager_cross_entropy(hidden, weight, *_teacher):
    return F.cross_entropy(hidden @ weight.t(), labels(hidden, weight))


def torch_chunked(hidden, weight, *_teacher):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels(hidden, weight), options=options)


def three_matmuls(hidden, weight, *_teacher):
    """By torch.mm, what no implementation can leave out. Not a loss."""
    with torch.no_grad():
        z = hidden @ weight.t()
        hidden.grad, weight.grad = z @ weight, z.t() @ hidden
    return torch.zeros(())


ROWS: dict[str, dict[str, Callable]] = {
    "reverse_kl": {
        "minillm": minillm,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "trl chunked": trl_chunked,
        "liger chunked": liger_chunked,
        "four matmuls": four_matmuls,
    },
    "cross_entropy": {
        "minillm": minillm_cross_entropy,
        "eager": eager_cross_entropy,
        "torch chunked": torch_chunked,
        "three matmuls": three_matmuls,
    },
}

# Rows that form the gradients in the forward pass, so that these are there when it ends.
GRADIENTS_IN_FORWARD = ("minillm", "liger chunked", "torch chunked")


def step(loss: str, row: str, tensors: tuple[Tensor, ...]) -> Tensor:
    tensors[0].grad = tensors[1].grad = None
    value = ROWS[loss][row](*tensors)
    if value.requires_grad:
        value.backward()
    return value.detach()


def peaks(loss: str, row: str, tensors: tuple[Tensor, ...]) -> dict[str, int]:
    """Of the two passes apart, in bytes. Linux only: it reads /proc."""
    from measuring import extra_peak_bytes, resident_bytes

    gradients = sum(x.numel() * x.element_size() for x in tensors[:2])
    before, losses = resident_bytes(), []
    forward = extra_peak_bytes(lambda: losses.append(ROWS[loss][row](*tensors)))
    held = resident_bytes() - before  # by the graph, and by the gradients where they are there already
    backward = held + extra_peak_bytes(losses[0].backward)
    working = max(forward - (gradients if row in GRADIENTS_IN_FORWARD else 0), backward - gradients)
    return {"extra": max(forward, backward), "working": working}


def main() -> None:
    loss, row, *shape = sys.argv[1:]
    N, H, V = map(int, shape)
    small = problem(8, H, V)
    step(loss, row, small)  # libraries, compiled code and thread pools are not part of the answer
    del small
    print(json.dumps(peaks(loss, row, problem(N, H, V))))


if __name__ == "__main__":
    main()
