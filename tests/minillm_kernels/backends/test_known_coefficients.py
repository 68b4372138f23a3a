"""Gradients whose coefficients are known beforehand: formed with the statistics, and brought to what arrives for the
loss by row_grad's factor or by row_scale."""

import cases
import pytest
import torch
from cases import BF16, FP16, FP32, NAMES

import minillm_kernels as mk
from minillm_kernels.backends import choose
from minillm_kernels.rows import Pair


def problem(dtype, n=7, V=517):
    s, t = cases.Case(V, (n,), dtype, FP32).logits()
    coefficients = torch.randn(5, n)
    coefficients[:, 1] = 0
    return Pair(s, t, 0.7, V), torch.arange(n), coefficients


@pytest.mark.parametrize("n", [7, 70])  # rows that are split over threads, and whole ones
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_at_once_are_the_bits_of_two_operations(implementation, dtype, n):
    pair, ids, coefficients = problem(dtype, n)
    pair.student[1] = torch.nan  # not read
    chosen = choose.BACKENDS[implementation]
    stats, grad = chosen.row_stats_grad(pair, ids, coefficients)
    assert torch.equal(stats, chosen.row_stats(pair, ids, (coefficients != 0).any(0)))
    assert torch.equal(grad, chosen.row_grad(pair, ids, stats, coefficients))
    assert not stats[:, 1].any() and not grad[1].any()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_a_factor_multiplies_the_coefficients(implementation, dtype):
    """The bits of a gradient of such coefficients; what stands there already stays where it is 1."""
    pair, ids, coefficients = problem(dtype)
    chosen = choose.BACKENDS[implementation]
    stats = chosen.row_stats(pair, ids, None)
    for factor in (0.0, 1.0, 1.7):
        expected = chosen.row_grad(pair, ids, stats, coefficients * factor)
        out = expected.clone() if factor == 1.0 else torch.full_like(expected, 7)
        chosen.row_grad(pair, ids, stats, coefficients, out=out, factor=torch.tensor(factor))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(3, 517), (1, 4111), (0, 5)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_scaling(implementation, dtype, shape):
    x = torch.randn(shape).to(dtype)
    for factor in (1.0, 1.7, 0.0):
        y = x.clone()
        y[:1, :1] = torch.nan
        expected = (y.float() * factor).to(dtype) if factor else torch.zeros_like(y)
        choose.BACKENDS[implementation].row_scale(y, torch.tensor(factor))
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_an_upstream_gradient_is_rounded_once(backend, name, dtype):
    """Scaled after the loss, in 16 bits too: what arrives is part of the weights."""
    pair, _, _ = problem(dtype)
    found = []
    for inside, outside in ((1.7, 1.0), (1.0, 1.7)):
        x = pair.student.clone().requires_grad_()
        weights = torch.full((7,), inside)
        loss = mk.fused_divergence_loss(x, pair.teacher, name, weights=weights, reduction="sum")
        (loss * outside).backward()
        found.append(x.grad)
    tolerance = 1e-6 if dtype == FP32 else 0
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
