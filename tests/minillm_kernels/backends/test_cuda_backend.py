"""The backend "cuda" where it does not run: why, in words, and what runs instead."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import pytest
import torch

import minillm_kernels as mk
from minillm_kernels.backends import choose, compiled, cuda


def core(driver: int = 13000, runtime: int = 13000) -> SimpleNamespace:
    return SimpleNamespace(versions=lambda: (driver, runtime))


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        (None, "built without nvcc; put nvcc on PATH .* install again with MINILLM_CUDA=1"),
        (core(driver=0), "there is no CUDA driver"),
        (
            core(driver=12040),
            r"driver is too old: it supports CUDA 12\.4, the core was built with 13\.0; update the driver",
        ),
    ],
)
def test_why_it_does_not_run_here(monkeypatch, operations, reason):
    monkeypatch.setattr(compiled, "missing", None)
    monkeypatch.setattr(cuda, "operations", operations)
    assert re.search(reason, cuda.backend.unavailable() or "")


def test_an_older_driver_of_the_same_generation_is_no_reason(monkeypatch):
    """CUDA is compatible inside a major version; what is left is that this torch has no device."""
    monkeypatch.setattr(compiled, "missing", None)
    monkeypatch.setattr(cuda, "operations", core(driver=12020, runtime=12090))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.backend.unavailable() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in cuda.backend.unavailable()


def test_cuda_tensors_take_the_next_backend_and_the_reason_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(choose, "_logged", set())
    reason = "there is no CUDA driver on this machine"
    monkeypatch.setitem(choose.BACKENDS, "cuda", dataclasses.replace(cuda.backend, why_not=lambda: reason))
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="minillm_kernels"):
        for _ in range(3):
            choose.resolve("auto", tensor)
            assert mk.last_backend() in ("triton", "reference")
    passed_over = [r.message for r in caplog.records if "'cuda'" in r.message]
    assert passed_over == [f"backend 'cuda' is passed over: {reason}"]


def test_it_takes_cuda_tensors_of_three_types():
    cpu_tensor = torch.zeros(2, 3)
    assert cuda.backend.refusal(cpu_tensor) == "it takes CUDA tensors, not cpu"
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert cuda.backend.refusal(on_cuda) is None
    on_cuda.dtype = torch.float64
    assert cuda.backend.refusal(on_cuda) == "it takes float32, bfloat16 and float16, not float64"


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_of_hidden_states_read_the_logits_once(cuda_on_host, divergence, softcap):
    """Their row weights are known beforehand. On a card with more multiprocessors than rows it takes two launches,
    with the same bits."""
    hidden, weight = torch.randn(9, 16), torch.randn(4100, 16)
    results, launches = [], []
    for processors in (1, 132):
        cuda_on_host.processors(processors)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        cuda_on_host.count(True)
        with mk.use_backend("cuda"):
            student, teacher = (mk.Head(x, softcap=softcap) for x in (leaves[1], weight.flip(0)))
            models = (leaves[0], student, 2 * hidden, teacher)
            loss = mk.fused_linear_divergence_loss(*models, divergence, chunk_rows=5)
        launches.append(cuda_on_host.counters()["launches"])
        cuda_on_host.count(False)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert launches == [2, 6]  # two chunks; statistics, their merge and the gradient
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
