"""Gradients in float16, whose numbers end at 6e-8 (normal ones at 6e-5): a row's share in the mean over thousands of
rows, times a probability, is below that.

Two rules keep them. The gradient of a scalar loss is formed in the backward pass, when what arrives for the loss, a
loss scale above all, is known: six matmuls where chunks take four. And the gradient of the logits is held in a unit in
which the largest coefficient is no small number; what the matmuls make of it is brought back in fp32. The unit is a
power of two, computed on the device, where the host does not look. bfloat16 has the range of float32, and no unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Operands

LARGEST = 64.0  # a coefficient over the temperature, or half of it: |log q/p| of thousands of nats is not yet infinite
_SMALLEST = 2.0**-100  # that is told from 0: a unit is a normal number of fp32, and so is what it divides


def formed_late(heads: Operands) -> bool:
    """Whether the gradient of a scalar loss waits for the backward pass."""
    return heads.student_weight.dtype == torch.float16


def in_units(coefficients: Tensor, heads: Operands) -> tuple[Tensor, Tensor | None]:
    """The coefficients of rows [..., N] over the unit, and the unit [], at most 1; None where there is none."""
    if heads.student_weight.dtype != torch.float16 or coefficients.numel() == 0:
        return coefficients, None
    largest = torch.where(coefficients.isfinite(), coefficients.abs(), 0).amax() / heads.temperature
    largest = largest.clamp(min=_SMALLEST)
    power = largest / largest.frexp().mantissa  # exact
    unit = (power / LARGEST).clamp(max=1.0)
    return coefficients / unit, unit
