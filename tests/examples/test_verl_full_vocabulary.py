"""The whole-vocabulary form of verl's loss: equal to the formula in its documentation, Σ p (log p - log q) over the
teacher's k likeliest tokens, at k = V. verl itself needs Ray, and is not installed here."""

import eager
import pytest
import torch
import verl_full_vocabulary as example

from minillm_kernels import Head


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_is_the_formula_at_k_equal_to_the_vocabulary(divergence):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 16, generator=generator).requires_grad_()
    theirs = torch.randn(2, 5, 24, generator=generator)
    weight = torch.randn(301, 16, generator=generator).requires_grad_()
    teacher_weight = torch.randn(301, 24, generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).float()

    log_q = (states @ weight.T).log_softmax(-1)
    log_p, ids = (theirs @ teacher_weight.T).log_softmax(-1).topk(301, dim=-1)  # as a server would send them
    log_q = log_q.gather(-1, ids)
    a, b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    expected = (a.exp() * (a - b)).sum(-1)

    found = example.distillation_losses(states, Head(weight), theirs, Head(teacher_weight), mask, divergence)
    found = found["distillation_losses"]
    torch.testing.assert_close(found, expected * mask, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(example.token_mean(found, mask), (states, weight), retain_graph=True)
    for one, other in zip(
        ours, torch.autograd.grad(example.token_mean(expected, mask), (states, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_runs_as_a_script():
    eager.run_script("verl_full_vocabulary")
