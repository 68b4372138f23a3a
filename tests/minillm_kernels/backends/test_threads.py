"""Same input, same bits, whatever the number of threads; and one thread pool in the process, torch's."""

import sys
import textwrap
import time

import oracle
import pytest
import torch
from cases import BF16, FP16, FP32, NAMES, Case
from processes import in_a_process

import minillm_kernels as mk
from minillm_kernels.rows import DIVERGENCES

# Rows split over columns (1, 3), one unit a row (70); above 32768 elements, so that threads are used at all.
SHAPES = [
    Case(151936, (1,), BF16),
    Case(50257, (3,)),
    Case(2065, (70,), FP16, BF16),
    Case(6161, (5,), pattern="both_inf"),
]


def _everything(case: Case):
    s, t = case.logits()
    s.requires_grad_()
    ids, rows = case.token_ids(), torch.arange(case.leading[0])
    weights = (rows % 3 != 1).float()
    results = [*mk.distill_stats(s, t, ids), *mk.token_logprobs(s, ids, return_entropy=True)]
    results += [mk.fused_divergence_loss(s, t, d, weights=weights, reduction="none") for d in DIVERGENCES]
    finite = [torch.where(x.isfinite(), x, 0).sum() for x in results if x.requires_grad]
    results.append(oracle.gradient(sum(finite), s))
    uniforms = torch.rand(*case.leading, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for options in ({}, dict(top_k=50), dict(top_p=0.9), dict(temperature=0.0)):
        results += mk.mixed_sample(s, t, uniforms=uniforms, **options)
    return results


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads(instruction_set, case):
    """Of the compiled backend: the reference is torch's own operations."""
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(_everything(case))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.detach().nan_to_num(7), b.detach().nan_to_num(7))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_bits_do_not_depend_on_the_other_rows(implementation, dtype):
    """Row i gives the same bits wherever it stands among equally many rows."""
    s, t = Case(4111, (5,), dtype).logits()
    order = torch.tensor([3, 0, 4, 1, 2])
    a, b = s.clone().requires_grad_(), s[order].clone().requires_grad_()
    first, second = (mk.fused_rkl_loss(x, y, reduction="none") for x, y in ((a, t), (b, t[order])))
    first.sum().backward()
    second.sum().backward()
    assert torch.equal(first[order], second) and torch.equal(a.grad[order], b.grad)


def test_bits_do_not_depend_on_where_the_rows_lie(instruction_set):
    """Not on alignment, nor on strides: the same rows at an odd address and with a gap between them."""
    s, t = Case(4111, (3,)).logits()
    expected = mk.distill_stats(s, t, torch.zeros(3, dtype=torch.int64))
    room = torch.full((3, 5000), torch.nan)
    for offset in (1, 3, 16):
        moved = room[:, offset : offset + 4111]
        moved.copy_(s)
        for a, b in zip(expected, mk.distill_stats(moved, t, torch.zeros(3, dtype=torch.int64)), strict=True):
            assert torch.equal(a, b)


POOL = """
    import os, re, torch, minillm_kernels as mk
    def threads(): return len(os.listdir("/proc/self/task"))
    torch.set_num_threads(2)
    a = torch.randn(1000, 1000)
    for _ in range(3): a @ a; (a + 1).exp()
    before = threads()
    s = torch.randn(64, 50257, requires_grad=True)
    for _ in range(3):
        mk.fused_rkl_loss(s, torch.randn(64, 50257)).backward()
        mk.mixed_sample(s, None, 0.0)
    assert mk.last_backend() == "cpu"
    openmp = {m.group() for m in re.finditer(r"/\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read())}
    print(before, threads(), len(openmp), openmp)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_thread_pool(core):
    """The kernels' threads are torch's: one OpenMP library is mapped, and no thread is added to those of torch."""
    result = in_a_process(textwrap.dedent(POOL))
    assert result.returncode == 0, result.stderr
    before, after, libraries, names = result.stdout.strip().split(" ", 3)
    assert libraries == "1", names
    assert int(after) <= int(before), result.stdout


def test_threads_are_used(core):
    """The process's CPU time exceeds that of the calling thread alone."""
    torch.set_num_threads(2)
    s, t = torch.randn(64, 50257), torch.randn(64, 50257)
    mk.fused_rkl_loss(s, t)
    process, caller = time.process_time(), time.thread_time()
    for _ in range(20):
        mk.fused_rkl_loss(s, t)
    assert time.process_time() - process > 1.2 * (time.thread_time() - caller)
