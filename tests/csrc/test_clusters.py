"""Rows of which a block holds half, and another one of its cluster the rest (csrc/cuda/cluster.cuh)."""

from __future__ import annotations

import dataclasses

import host_build
import oracle
import pytest
import tolerance
import torch

from minillm_kernels.backends import cuda, reference
from minillm_kernels.rows import Pair, RowStats

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))


def logits(N: int, V: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """[N, V] that starts `offset` elements behind an aligned address."""
    return torch.empty(N * V + offset, dtype=dtype)[offset:].view(N, V).copy_(3 * torch.randn(N, V))


def at_once(*args, **kwargs):
    run = dataclasses.replace(cuda.backend, holds_rows=lambda operations, pair: True)
    return run.row_stats_grad(*args, **kwargs)


def shared_memory_of(V: int, element: int) -> int:
    """With which two halves of a row pair fit a multiprocessor, but two row pairs do not."""
    held = 2 * (-(-V // 16) * 8 * element // 16 * 16 + 16)
    return 2 * (held + (2 << 10)) - (1 << 10)


# Slices of whole vectors and odd ones; a last slice that is short, of one column, of less than a vector.
CASES = [(4099, 3), (8190, 5), (517, 1), (17, 0), (9, 1)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("V", "offset"), CASES)
def test_a_cluster_gives_the_definitions(cuda_on_host, dtype, V, offset):
    """No row aligned; a head that is wider than the vocabulary; columns outside the support, a slice of which nothing
    is left, a row without a coefficient, one of another offset; tokens of several slices."""
    N, temperature = 6, 0.7
    s, t = logits(N, V + 3, dtype, offset), logits(N, V + 3, dtype, 7 - offset)
    s[0, V // 2] = t[0, V // 3] = s[1, V - 1] = -torch.inf
    s[4, : -(-V // 2)] = -torch.inf
    s[5] += 200
    ids = torch.tensor([0, V - 1, V // 2, V // 3, V - 1, 1])
    coefficients = torch.randn(5, N)
    coefficients[:, 3] = 0
    cuda_on_host.shared_memory(shared_memory_of(V, dtype.itemsize))
    cuda_on_host.count(True)
    stats, grad = at_once(Pair(s, t, temperature, V), ids, coefficients)
    assert cuda_on_host.counters()["blocks"] == 2 * N
    cuda_on_host.count(False)
    counted = torch.arange(N) != 3
    s64, t64 = s[counted, :V].double(), t[counted, :V].double()
    truth = oracle.statistics(s64, t64, ids[counted], temperature)
    for name, x in truth.items():
        tolerance.assert_values(stats[RowStats._fields.index(name)][counted], x, what=name)
    pair = Pair(s64, t64, temperature, V)
    exact = reference.backend.row_stats(pair, ids[counted], None)
    right = reference.backend.row_grad(pair, ids[counted], exact, coefficients[:, counted])
    log_q, log_p = oracle.log_probabilities(s64, t64, temperature)
    terms = tolerance.gradient_terms(log_q, log_p, coefficients[:, counted], temperature, ids[counted])
    tolerance.assert_gradient(grad[counted, :V], right, terms)
    assert not grad[3].any() and not stats[:, 3].any() and not grad[:, V:].any()
    at_once(Pair(s, t, temperature, V), ids, coefficients, s)  # over the student
    assert torch.equal(s, grad)


@pytest.mark.parametrize("column", [0, 2100, 4098])
def test_what_is_not_finite_comes_out_of_its_own_row_alone(cuda_on_host, column):
    s, t = logits(3, 4099, BF16), logits(3, 4099, BF16)
    plain = at_once(Pair(s, t, 1.0, 4099), None, torch.ones(5, 3))
    s[1, column] = torch.nan
    t[2] = -torch.inf  # no support
    cuda_on_host.shared_memory(shared_memory_of(4099, 2))
    stats, grad = at_once(Pair(s, t, 1.0, 4099), None, torch.ones(5, 3))
    kl = RowStats._fields.index("reverse_kl")
    assert stats[kl].isnan().tolist() == [False, True, True]
    torch.testing.assert_close(grad[0], plain[1][0])
    assert grad[1].isnan().all() and not grad[2].any()


@pytest.mark.parametrize("V", [4099, 8190])
def test_the_order_of_the_threads_of_all_blocks_does_not_matter(cuda_on_host, V):
    s, t, ones = logits(3, V, BF16, 3), logits(3, V, BF16), torch.ones(5, 3)
    cuda_on_host.shared_memory(shared_memory_of(V, 2))
    results = []
    for seed in range(4):
        cuda_on_host.seed(seed)
        results.append(at_once(Pair(s, t, 1.0, V), None, ones))
    cuda_on_host.seed(0)
    for stats, grad in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("offset", [0, 3])
def test_nothing_outside_the_rows_is_read_or_written(cuda_on_host, offset):
    """By the aligned vectors of the last slice, whose columns end before the row does."""
    N, V = 2, 4200
    s, t, g = (logits(N, V, BF16, offset) for _ in range(3))
    stats, ones, m = torch.empty(11, N), torch.ones(5, N), cuda_on_host
    m.shared_memory(shared_memory_of(V, 2))
    for x in (s, t, g):
        for i in range(N):
            m.allow(x[i].data_ptr(), (V - 5) * 2)
    m.allow(stats.data_ptr(), stats.nbytes)
    rows = [(x.data_ptr(), 1, N, 0, V) for x in (s, t, g)]
    try:
        outputs = (stats.data_ptr(), rows[2], V - 5)
        m.row_stats_grad((lambda size: 0, 0), (rows[0], rows[1], N, V - 5, 1.0), 0, ones.data_ptr(), *outputs)
    finally:
        m.allow_everything()


@pytest.mark.parametrize("V", [32000, 50257])
def test_a_cluster_moves_six_bytes_a_column(cuda_on_host, V):
    """bf16 pairs on an H100; where rows are not aligned, a sector at the ends of each slice besides."""
    s, t = logits(1, V, BF16), logits(1, V, BF16)
    assert cuda.backend.holds_rows(cuda.backend.operations, Pair(s.expand(66, V), t.expand(66, V), 1.0, V))
    cuda_on_host.count(True)
    stats, grad = at_once(Pair(s, t, 1.0, V), None, torch.eye(5)[:1].T.contiguous())
    c = cuda_on_host.counters()
    cuda_on_host.count(False)
    assert (c["blocks"], c["launches"]) == (2, 1)
    assert c["loaded"] == 4 * V and c["stored"] == 2 * V + 11 * 4
    assert 32 * (c["sectors_loaded"] + c["sectors_stored"]) <= 1.001 * 6 * V
    pair = Pair(s.double(), t.double(), 1.0, V)
    exact = reference.backend.row_stats(pair, None, None)
    tolerance.assert_values(stats[4:6], exact[4:6])
    right = reference.backend.row_grad(pair, None, exact, torch.eye(5)[:1].T)
    log_q, log_p = oracle.log_probabilities(pair.student, pair.teacher)
    tolerance.assert_gradient(grad, right, tolerance.gradient_terms(log_q, log_p, torch.eye(5)[:1].T, 1.0))


def blocks_of(module, V: int, dtype: torch.dtype) -> int:
    """How many blocks hold a row, 0: none do; from the fewest rows that are enough for 132 multiprocessors."""
    code = {FP32: 0, BF16: 1}[dtype]
    return next((blocks for blocks in (2, 1) if module.holds_rows(132 // blocks, V, code)), 0)


def test_how_many_blocks_hold_a_row(cuda_on_host):
    """Where two of them share a multiprocessor; one alone on a device without clusters."""
    m = cuda_on_host
    assert [blocks_of(m, V, BF16) for V in (28000, 32000, 50257, 58000, 128256)] == [1, 2, 2, 0, 0]
    assert [blocks_of(m, V, FP32) for V in (14000, 27000, 32000)] == [1, 2, 0]
    m.most_blocks_a_cluster(1)  # an A100
    m.shared_memory(163 << 10)
    assert [blocks_of(m, V, BF16) for V in (20000, 32000)] == [1, 0]
