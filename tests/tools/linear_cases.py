"""Two random heads and their hidden states, and what the fused linear functions are compared with: plain float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import Head

# 37 rows in chunks of 5: the last chunk is short. Hidden sizes differ. 1001 and 1010 columns: unequal heads, neither
# one a multiple of a register.
N, H, H_T, V, V_T = 37, 24, 32, 1001, 1010
SCALE, CAP, T, BETA = (0.7, 1.1), 5.0, 1.3, 0.3
# Relative to the largest entry: what two matmuls of this depth and a sum over 37 rows lose in that type.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 6e-2 / 8}


class Case:
    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.student = [draw(N, H), draw(V, H, scale=0.3), draw(V)]
        self.teacher = [draw(N, H_T), draw(V_T, H_T, scale=0.3), draw(V_T)]
        self.labels = torch.randint(V, (N,), generator=generator)
        self.labels[::3] = -100
        self.weights = torch.rand(N, generator=generator).to(torch.promote_types(dtype, torch.float32))
        self.weights[4] = 0

    def leaves(self) -> list[Tensor]:
        """Of the student: hidden states, weight and bias."""
        return [x.clone().requires_grad_() for x in self.student]

    def models(self, leaves: list[Tensor], cap: float | None = None, scale=SCALE) -> tuple:
        """Hidden states and head of the student, which consists of these leaves, and of the teacher."""
        (hidden, *student), (teacher_hidden, *teacher) = leaves, self.teacher
        return hidden, Head(*student, cap, scale[0]), teacher_hidden, Head(*teacher, cap, scale[1])


def plain_logits(student, teacher, cap, scale=SCALE) -> list[Tensor]:
    """In float64, from the same (rounded) parameters."""
    logits = []
    for (hidden, weight, bias), factor in zip((student, teacher), scale, strict=True):
        z = F.linear(hidden.double(), weight.double(), bias.double()) * factor
        logits.append(cap * torch.tanh(z / cap) if cap else z)
    return logits


def assert_close(actual: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for i, (a, b) in enumerate(zip(actual, truth, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        assert error < TOLERANCE[dtype], (i, float(error))
