"""Reverse KL of two rows of logits: forward + backward, and each kernel alone.

Bounds: the pair of passes must read both rows twice and write a gradient, 5 tensors; the yardstick is torch.add on
tensors of that size in the same run. A fresh gradient also pays its page faults, which "in place" does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from measuring import Tensors, logits

from minillm_kernels import fused_rkl_loss, use_backend

SHAPES = [((256, 50257), torch.float32), ((192, 151936), torch.bfloat16)]
IDS = ["fp32-256x50257", "bf16-192x151936"]


def eager(student, teacher):
    q, p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def ours(student, teacher):
    with use_backend("cpu"):
        return fused_rkl_loss(student, teacher)


def ours_in_place(student, teacher):
    with use_backend("cpu"):
        return fused_rkl_loss(student, teacher, inplace=True)


def forward_backward(loss_fn, student, teacher):
    loss = loss_fn(student, teacher)
    loss.backward()
    return loss.detach(), student.grad


@cache
def truth_of(shape, dtype):
    """In float64, from the logits that all rows get."""
    student, teacher = logits(shape, dtype, 0), logits(shape, dtype, 1)
    return forward_backward(eager, student.double().requires_grad_(), teacher.double())


ALL = torch.get_num_threads()


@pytest.fixture(params=sorted({ALL, 1}, reverse=True))
def threads(request) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(ALL)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=IDS)
@pytest.mark.parametrize("row", ["minillm", "minillm in place", "eager", "torch.compile"])
def test_forward_backward(measure, threads, row, shape, dtype):
    student, teacher = logits(shape, dtype, 0).requires_grad_(), logits(shape, dtype, 1)
    loss_fn = {
        "minillm": ours,
        "minillm in place": ours_in_place,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }[row]
    truth, gradient = truth_of(shape, dtype)
    fresh = student.detach().clone()

    def setup():
        student.grad = None  # a fresh gradient each time, but for "in place"
        with torch.no_grad():
            student.copy_(fresh)
        return (loss_fn, student, teacher), {}

    loss, grad = forward_backward(*setup()[0])
    error = (grad.double() - gradient).abs().max() / gradient.abs().max()
    assert abs(loss - truth) < 1e-4 * (1 + truth)
    assert error < (2**-7 if dtype == torch.bfloat16 else 1e-5)
    del grad
    group = f"reverse_kl forward+backward {IDS[SHAPES.index((shape, dtype))]}"
    measure(group if threads == ALL else f"{group}, 1 thread", shape, dtype)(
        forward_backward, tensors=5, setup=setup, implementation=row, gradient_error=float(error)
    )


def kernel(name: str, make: Tensors, shape: tuple[int, int]) -> Callable[[], object]:
    """A call of it on logits of that shape."""
    student, teacher, out = (make(shape, seed) for seed in range(3))
    ops, settings = torch.ops.minillm, (1.0, shape[1], "cpu")
    stats = ops.row_stats(student, teacher, None, None, False, *settings)
    coefficients = torch.zeros(5, shape[0])
    coefficients[0] = 1 / shape[0]
    return {
        "row_stats": lambda: ops.row_stats(student, teacher, None, None, False, *settings),
        "row_grad": lambda: ops.row_grad_(out, teacher, None, stats, coefficients, *settings),
        "torch.add(out=)": lambda: torch.add(student, teacher, out=out),
    }[name]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=IDS)
@pytest.mark.parametrize(("name", "tensors"), [("row_stats", 2), ("row_grad", 3), ("torch.add(out=)", 3)])
def test_kernels(measure, name, tensors, shape, dtype):
    measure(f"kernels {IDS[SHAPES.index((shape, dtype))]}", shape, dtype)(
        kernel(name, lambda shape, seed: logits(shape, dtype, seed), shape),
        tensors=tensors,
        implementation=name,
        kernel=partial(kernel, name) if name != "torch.add(out=)" else None,
    )
