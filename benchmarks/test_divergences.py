"""The mixture divergences: each kernel alone, and their loss against eager.

Bounds: row_divergence reads both rows once more, with the normalisers known; its gradient reads them again and writes
one. jsd and the skew divergences take two exponentials and one or two logarithms a column, tvd two exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measuring import Tensors, logits

from minillm_kernels import fused_divergence_loss, use_backend
from minillm_kernels.rows import MIXTURE_DIVERGENCES

SHAPE, BETA = (256, 50257), 0.5


def eager_jsd(student, teacher):
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) + torch.log(torch.tensor(BETA))
    sides = [F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)]
    return BETA * sides[0] + (1 - BETA) * sides[1]


def ours(student, teacher):
    with use_backend("cpu"):
        return fused_divergence_loss(student, teacher, "jsd", beta=BETA)


@pytest.mark.parametrize("row", ["minillm", "eager", "torch.compile"])
def test_jsd_forward_backward(measure, row):
    student, teacher = logits(SHAPE, torch.float32, 0).requires_grad_(), logits(SHAPE, torch.float32, 1)
    fn = {"minillm": ours, "eager": eager_jsd, "torch.compile": torch.compile(eager_jsd, dynamic=False)}[row]

    def forward_backward(loss_fn, student, teacher):
        student.grad = None
        loss = loss_fn(student, teacher)
        loss.backward()
        return loss.detach(), student.grad

    truth, exact = forward_backward(eager_jsd, student.detach().double().requires_grad_(), teacher.double())
    loss, gradient = forward_backward(fn, student, teacher)
    error = float((gradient - exact).abs().max() / exact.abs().max())
    assert abs(loss - truth) < 1e-5 * (1 + truth)
    assert error < 1e-4
    del exact, gradient
    measure(f"jsd forward+backward fp32-{SHAPE[0]}x{SHAPE[1]}", SHAPE, torch.float32)(
        lambda: forward_backward(fn, student, teacher), tensors=7, rounds=3, implementation=row, gradient_error=error
    )


def kernel(name: str, divergence: str, make: Tensors, shape: tuple[int, int]) -> Callable[[], object]:
    """A call of it on logits of that shape."""
    student, teacher, out = (make(shape, seed) for seed in range(3))
    ops, settings = torch.ops.minillm, (divergence, BETA, 1.0, shape[1], "cpu")
    stats = ops.row_stats(student, teacher, None, None, False, 1.0, shape[1], "cpu")
    values, scale = ops.row_divergence(student, teacher, None, stats, False, *settings), torch.ones(shape[0])
    exact = fused_divergence_loss(student[:2].double(), teacher[:2].double(), divergence, beta=BETA, reduction="none")
    assert torch.allclose(values[0, :2].double(), exact, atol=1e-5)
    if name == "row_divergence":
        return lambda: ops.row_divergence(student, teacher, None, stats, False, *settings)
    return lambda: ops.row_divergence_grad_(out, teacher, stats, values, scale, *settings)


@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
@pytest.mark.parametrize("name", ["row_divergence", "row_divergence_grad"])
def test_kernels(measure, name, divergence):
    measure(f"kernels fp32-{SHAPE[0]}x{SHAPE[1]}", SHAPE, torch.float32)(
        kernel(name, divergence, lambda shape, seed: logits(shape, torch.float32, seed), SHAPE),
        tensors={"row_divergence": 2, "row_divergence_grad": 3}[name],
        rounds=9,
        implementation=f"{name}, {divergence}",
        kernel=partial(kernel, name, divergence),
    )
