"""Which implementation runs: the choice, the refusals, the environment variable, the fall-back that is logged once."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import Case
from processes import in_a_process

import minillm_kernels as mk
from minillm_kernels import available_backends, last_backend, use_backend
from minillm_kernels.backends import choose, cpu
from minillm_kernels.rows import DIVERGENCES

needs_core = pytest.mark.skipif(cpu.backend.unavailable() is not None, reason=str(cpu.backend.unavailable()))


def test_available_backends():
    available = available_backends()
    assert set(available) == {"cuda", "triton", "cpu", "reference"}
    assert available["reference"] == "ok"
    assert all(reason == "ok" or len(reason) > 20 for reason in available.values())


@needs_core
def test_cpu_tensors_take_the_compiled_core():
    s, t = Case(60).logits()
    mk.fused_rkl_loss(s, t)
    assert available_backends()["cpu"] == "ok" and last_backend() == "cpu"


@needs_core
def test_use_backend_nests_and_is_undone_by_an_exception():
    s, t = Case(60).logits()
    with use_backend("reference"):
        mk.fused_rkl_loss(s, t)
        assert last_backend() == "reference"
        with use_backend("cpu"):
            mk.mixed_sample(s, t)
            assert last_backend() == "cpu"
        mk.mixed_sample(s, t)
        assert last_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    mk.fused_rkl_loss(s, t)
    assert last_backend() == "cpu"


@needs_core
def test_backward_runs_where_forward_ran():
    s, t = Case(60).logits()
    s.requires_grad_()
    with use_backend("reference"):
        loss = mk.fused_rkl_loss(s, t) + mk.fused_divergence_loss(s, t, "jsd")
    mk.fused_rkl_loss(s, t)
    assert last_backend() == "cpu"
    loss.backward()
    assert last_backend() == "reference"
    loss = mk.fused_rkl_loss(s, t)
    with use_backend("reference"):
        loss.backward()
    assert last_backend() == "cpu"


def test_a_machine_is_asked_once_what_runs_on_it(monkeypatch):
    """Drivers take their time to answer."""
    asked = []
    counted = replace(cpu.backend, why_not=lambda: asked.append(1))
    monkeypatch.setitem(choose.BACKENDS, "cpu", counted)
    try:
        for _ in range(3):
            mk.fused_rkl_loss(torch.zeros(2, 4), torch.zeros(2, 4))
            with use_backend("cpu"):
                mk.fused_rkl_loss(torch.zeros(2, 4, requires_grad=True), torch.zeros(2, 4)).backward()
        assert asked == [1]
    finally:
        choose._ready.discard(counted)


def test_an_unknown_backend_is_an_error():
    expected = "unknown backend 'gpu': expected one of cuda, triton, cpu, reference"
    with pytest.raises(ValueError, match=expected), use_backend("gpu"):
        pass


@pytest.mark.parametrize("name", [n for n, state in available_backends().items() if state != "ok"])
def test_an_unavailable_backend_raises_and_never_falls_back(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "), use_backend(name):
        pass


@needs_core
def test_float64_goes_to_the_reference_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(choose, "_logged", set())
    s, t = Case(60).logits()
    with caplog.at_level(logging.WARNING, logger="minillm_kernels"):
        for _ in range(3):
            mk.fused_rkl_loss(s.double(), t)
            mk.mixed_sample(s, t.double())
            assert last_backend() == "reference"
    assert [r.message for r in caplog.records] == [
        "backend 'cpu' is passed over: it takes float32, bfloat16 and float16, not float64"
    ]


@needs_core
def test_a_forced_backend_refuses_what_it_cannot_take():
    s, t = Case(60).logits()
    refusal = "backend 'cpu' cannot do this: it takes float32, bfloat16 and float16, not float64"
    with use_backend("cpu"):
        for call in (
            lambda: mk.fused_rkl_loss(s.double(), t),
            lambda: mk.fused_divergence_loss(s, t.double(), "jsd"),
            lambda: mk.token_logprobs(s.double(), torch.zeros(3, dtype=torch.int64)),
            lambda: mk.mixed_sample(s.double(), None, 0.0),
        ):
            with pytest.raises(RuntimeError, match=refusal):
                call()


RUN = """
import torch, minillm_kernels as mk
mk.fused_rkl_loss(torch.randn(2, 9), torch.randn(2, 9))
print(mk.last_backend())
"""


def test_the_environment_variable_is_use_backend_from_outside():
    assert in_a_process(RUN, MINILLM_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    wrong = in_a_process(RUN, MINILLM_KERNELS_BACKEND="gpu")
    assert wrong.returncode != 0 and "unknown backend 'gpu'" in wrong.stderr


@needs_core
def test_inside_the_environment_variable_use_backend_decides():
    code = RUN.replace("mk.fused", "c = mk.use_backend('cpu'); c.__enter__()\nmk.fused")
    assert in_a_process(code, MINILLM_KERNELS_BACKEND="reference").stdout.strip() == "cpu"


def test_an_unavailable_backend_in_the_environment_raises_when_used():
    missing = [n for n, state in available_backends().items() if state != "ok"]
    if not missing:
        pytest.skip("every backend is available here")
    result = in_a_process(RUN, MINILLM_KERNELS_BACKEND=missing[0])
    assert result.returncode != 0 and f"backend '{missing[0]}' cannot do this" in result.stderr


def test_without_the_compiled_core_the_reference_runs_and_the_reason_is_given():
    """As after an installation without a C++ compiler."""
    code = f"""
import logging, sys
sys.modules["minillm_kernels._core"] = None
logging.basicConfig(format="%(message)s")
{RUN}
print(mk.available_backends()["cpu"])
try:
    mk.use_backend("cpu").__enter__()
except RuntimeError as error:
    print(error)
"""
    result = in_a_process(code, MINILLM_KERNELS_BACKEND="")
    ran, reason, error = result.stdout.splitlines()
    assert ran == "reference"
    assert reason.startswith("the compiled core is missing (") and "install a C++ compiler and run" in reason
    assert error == f"backend 'cpu' is not available: {reason}"
    assert result.stderr.strip() == f"backend 'cpu' is passed over: {reason}"


def test_a_core_that_was_built_from_other_sources_is_not_used():
    """As after an update of an editable installation: its statistics may lie in another order."""
    code = f"""
import sys, types
old = types.ModuleType("minillm_kernels._core")
old.STATISTICS = ("REVERSE_KL",)
sys.modules["minillm_kernels._core"] = old
{RUN}
print(mk.available_backends()["cpu"])
"""
    ran, reason = in_a_process(code, MINILLM_KERNELS_BACKEND="").stdout.splitlines()
    assert ran == "reference"
    assert reason.startswith("the compiled core was built from other sources (STATISTICS differ); run `pip install -e")


def both_sides(first: str, second: str) -> tuple[str, str]:
    """What two runs of rows see, the first having begun before the second and going on after it."""
    s, t = Case(60).logits()
    inside, done = threading.Event(), threading.Event()
    seen = []

    def run() -> None:
        with use_backend(first):
            inside.set()
            done.wait(30)
            mk.fused_rkl_loss(s, t)
            seen.append(last_backend())

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(30)
    with use_backend(second):
        mk.fused_rkl_loss(s, t)
        here = last_backend()
        done.set()
        thread.join()
    return here, seen[0]


@needs_core
def test_threads_keep_their_own_choice():
    """The one that came last must not decide for the one that is still inside."""
    assert both_sides("reference", "cpu") == ("cpu", "reference")
    s, t = Case(60).logits()
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:  # nor is a choice inherited
        pool.submit(mk.fused_rkl_loss, s, t).result()
        assert last_backend() == "cpu"


@needs_core
def test_tasks_keep_their_own_choice():
    s, t = Case(60).logits()

    async def task(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0)  # the other task enters its own
            mk.fused_rkl_loss(s, t)
            return last_backend()

    async def both() -> list[str]:
        return await asyncio.gather(task("reference"), task("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"]


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(dtype):
    """Pairwise, on one input for all functions: to fp32 rounding, the gradients to that of the student's type."""
    s, t = Case(2500, (6,), dtype).logits()
    ids = torch.tensor([0, 5, 2499, 17, 2047, 2048])

    def everything():
        x = s.clone().requires_grad_()
        stats = mk.distill_stats(x, t, ids)
        divergences = [mk.fused_divergence_loss(x, t, d) for d in DIVERGENCES]
        logprobs = mk.token_logprobs(x, ids, return_entropy=True)
        total = sum(v.sum() for v in (*stats, *divergences, *logprobs) if v.requires_grad)
        return (*stats, *divergences, *logprobs, *torch.autograd.grad(total, x))

    results = []
    for name in ("cpu", "reference"):
        with use_backend(name):
            results.append(everything())
    *values, grad = zip(*results, strict=True)
    for ours, theirs in values:
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=3e-6)
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(*grad, rtol=rtol, atol=1e-6)
