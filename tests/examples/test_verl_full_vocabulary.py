"""The whole-vocabulary form of verl's loss: equal to the formula in its documentation, Σ p (log p - log q) over the
teacher's k likeliest tokens, at k = V, and to its own function where verl is installed: that one file, without Ray."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import eager
import pytest
import torch
import verl_full_vocabulary as example

from minillm_kernels import Head

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).float()


def tensors():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 16, generator=generator).requires_grad_()
    theirs = torch.randn(2, 5, 24, generator=generator)
    weight = torch.randn(301, 16, generator=generator).requires_grad_()
    return states, weight, theirs, torch.randn(301, 24, generator=generator)


def compare(found, expected, states, weight):
    torch.testing.assert_close(found, expected * MASK, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(example.token_mean(found, MASK), (states, weight), retain_graph=True)
    theirs = torch.autograd.grad(example.token_mean(expected, MASK), (states, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_is_the_formula_at_k_equal_to_the_vocabulary(divergence):
    states, weight, theirs, teacher_weight = tensors()
    log_q = (states @ weight.T).log_softmax(-1)
    log_p, ids = (theirs @ teacher_weight.T).log_softmax(-1).topk(301, dim=-1)  # as a server would send them
    log_q = log_q.gather(-1, ids)
    a, b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    expected = (a.exp() * (a - b)).sum(-1)

    found = example.distillation_losses(states, Head(weight), theirs, Head(teacher_weight), MASK, divergence)
    compare(found["distillation_losses"], expected, states, weight)


def test_is_what_verl_computes(monkeypatch):
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("verl is not installed: pip install --no-deps verl")
    for name, values in {
        "verl": {}, "verl.utils": {}, "verl.workers": {},
        "verl.utils.ulysses": {"get_ulysses_sequence_parallel_world_size": lambda: 1, "slice_input_tensor": None},
        "verl.workers.config": {"DistillationConfig": object, "DistillationLossConfig": object},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    path = f"{next(iter(found.submodule_search_locations))}/trainer/distillation/fsdp/losses.py"
    spec = importlib.util.spec_from_file_location("losses_of_verl", path)
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)

    states, weight, theirs, teacher_weight = tensors()
    log_p, ids = (theirs @ teacher_weight.T).log_softmax(-1).topk(301, dim=-1)
    nested = [torch.nested.nested_tensor(list(x), layout=torch.jagged) for x in (log_p, ids)]
    packed = (states @ weight.T).reshape(1, 10, 301)  # verl's form of a batch without padding
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))
    expected = losses.compute_forward_kl_topk(packed, *nested, config, "thd")["distillation_losses"].view(2, 5)
    ours = example.distillation_losses(states, Head(weight), theirs, Head(teacher_weight), MASK)
    compare(ours["distillation_losses"], expected, states, weight)


def test_runs_as_a_script():
    eager.run_script("verl_full_vocabulary")
