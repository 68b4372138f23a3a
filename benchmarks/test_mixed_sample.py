"""A decode step's sampling: a token of the mixture of two models with its three log-probabilities."""

from __future__ import annotations

import pytest
import torch
from measuring import logits, median_seconds

from minillm_kernels import mixed_sample, use_backend

SHAPES = [((8, 49152), torch.float32), ((8, 151936), torch.bfloat16)]
IDS = ["fp32-8x49152", "bf16-8x151936"]
ALPHA = 0.2


def eager(student, teacher):
    """Softmax of both, blend, torch.multinomial, gather."""
    q, p = student.float().softmax(-1), teacher.float().softmax(-1)
    mixture = (1 - ALPHA) * q + ALPHA * p
    y = torch.multinomial(mixture, 1)
    return y, *(x.gather(-1, y).log() for x in (q, p, mixture))


def ours(student, teacher):
    with use_backend("cpu"):
        return mixed_sample(student, teacher, ALPHA)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=IDS)
@pytest.mark.parametrize("row", ["minillm", "eager", "torch.compile"])
def test_sample(measure, row, shape, dtype):
    student, teacher = logits(shape, dtype, 0), logits(shape, dtype, 1)
    fn = {"minillm": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}[row]
    if row == "minillm":
        y, _, _, mixture, _ = fn(student, teacher)
        law = (1 - ALPHA) * student.double().softmax(-1) + ALPHA * teacher.double().softmax(-1)
        assert torch.allclose(mixture.double(), law.gather(-1, y[:, None]).log().squeeze(-1), atol=1e-5)

    def kernel(make, shape):
        z = make(shape, 0), make(shape, 1)
        return lambda: fn(*z)

    measure(f"mixed_sample {IDS[SHAPES.index((shape, dtype))]}", shape, dtype)(
        lambda: fn(student, teacher), tensors=2, implementation=row, kernel=kernel if row == "minillm" else None
    )


def test_decode_step(measure):
    """The sampler right behind the heads' matmuls, as in a rollout: do two thread pools get in each other's way?"""
    hidden, weight = torch.randn(8, 576), torch.randn(49152, 576) * 0.1

    def heads():
        return hidden @ weight.T, hidden @ weight.T

    student, teacher = heads()
    matmuls, sample = median_seconds(heads), median_seconds(lambda: ours(student, teacher))
    measure("mixed_sample after the heads' matmuls", (8, 49152), torch.float32)(
        lambda: ours(*heads()),
        implementation="two matmuls + mixed_sample",
        matmuls_alone_ms=round(matmuls * 1e3, 3),
        sample_alone_ms=round(sample * 1e3, 3),
    )
