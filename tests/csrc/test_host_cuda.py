"""The CUDA kernels in their host build: the same bits in any order of the threads, the least memory traffic, nothing
read that was not given; clean under sanitizers."""

from __future__ import annotations

import dataclasses
import subprocess

import host_build
import pytest
import torch

from minillm_kernels.backends import compiled, cuda
from minillm_kernels.rows import MIXTURE_DIVERGENCES, Pair

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))


def logits(N: int, V: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """[N, V] that starts `offset` elements behind an aligned address."""
    storage = torch.empty(N * V + offset, dtype=dtype)
    x = storage[offset:].view(N, V)
    return x.copy_(3 * torch.randn(N, V))


def in_one_launch() -> compiled.Compiled:
    """The backend with row_stats_grad in one launch whatever the number of rows."""
    return dataclasses.replace(cuda.backend, holds_rows=lambda operations, pair: True)


def holds_rows(s: torch.Tensor, t: torch.Tensor | None, V: int) -> bool:
    return cuda.backend.holds_rows(cuda.backend.operations, Pair(s, t, 1.0, V))


def everything(s: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of every operation, some rows masked or without a coefficient."""
    N, V = s.shape
    ids, uniforms, scale = torch.arange(N) % V, torch.rand(N, 2, dtype=torch.float64), torch.ones(N)
    mask = torch.arange(N) != 1
    coefficients = torch.randn(5, N) * mask
    stats = cuda.backend.row_stats(Pair(s, t, 0.7, V), ids, mask)
    out = [stats, cuda.backend.row_stats(Pair(s, None, 1.0, V), ids, None)]
    out += [
        cuda.backend.row_grad(Pair(s, t, 0.7, V), ids, stats, c)
        for c in (coefficients, coefficients * (torch.arange(5) < 1)[:, None])
    ]
    out.append(cuda.backend.row_grad(Pair(s, None, 1.0, V), ids, out[1], coefficients))
    if s.dtype == t.dtype:
        out += in_one_launch().row_stats_grad(Pair(s, t, 0.7, V), ids, coefficients)
    for divergence in MIXTURE_DIVERGENCES:
        values = cuda.backend.row_divergence(Pair(s, t, 0.7, V), mask, stats, divergence, 0.3)
        out += [
            values,
            cuda.backend.row_divergence_grad(Pair(s, t, 0.7, V), stats, values, scale * mask, divergence, 0.3),
        ]
    for temperature, *filters in ((1.0, 0, 1.0), (0.7, 20, 0.8), (0.0, 0, 1.0)):
        out += cuda.backend.row_sample(Pair(s, t, temperature, V), uniforms, 0.4, *filters)
    return out


# One column; part of a chunk; chunks of a whole block and single columns behind them; rows in three parts.
SHAPES = [(3, 1), (3, 517), (2, 4099), (2, 12304)]


@pytest.mark.parametrize(
    "types", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, FP16)], ids=lambda t: "-".join(map(NAMES.get, t))
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_the_threads_does_not_matter(cuda_on_host, types, shape):
    s, t = logits(*shape, types[0], offset=3), logits(*shape, types[1], offset=1)
    results = []
    for seed in range(4):
        torch.manual_seed(0)
        cuda_on_host.seed(seed)
        results.append(everything(s, t))
    cuda_on_host.seed(0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_nothing_outside_the_rows_is_read_or_written(cuda_on_host, dtype, offset):
    """Also of rows that are not aligned, whose aligned vectors reach beyond them."""
    N, V = 2, 4200
    s, t, g = logits(N, V, dtype, offset), logits(N, V, dtype, 7 - offset), torch.empty(N * V + 8, dtype=dtype)
    g = g[(offset * 3) % 8 :][: N * V].view(N, V)
    stats, out = torch.empty(11, N), torch.empty(2, N)
    tokens, logprobs, coin = torch.empty(N, dtype=torch.int64), torch.empty(3, N), torch.empty(N, dtype=torch.bool)
    uniforms, coefficients = torch.rand(N, 2, dtype=torch.float64), torch.ones(5, N)
    m, code = cuda_on_host, {FP32: 0, BF16: 1}[dtype]
    rows = [(x.data_ptr(), code, N, 0, V) for x in (s, t, g)]
    workspace = torch.empty(1 << 16)
    how = (lambda size: workspace.data_ptr(), 0)
    # The cut is in the vocabulary: columns from V - 5 on are those of another row.
    pair = (rows[0], rows[1], N, V - 5, 1.0)
    for x in (stats, out, logprobs):
        m.allow(x.data_ptr(), x.nbytes)
    for x in (s, t):
        for i in range(N):
            m.allow(x[i].data_ptr(), (V - 5) * x.element_size())
    for i in range(N):
        m.allow(g[i].data_ptr(), (V - 5) * g.element_size())
    try:
        m.row_stats(how, pair, 0, 0, stats.data_ptr())
        m.row_grad(how, pair, 0, stats.data_ptr(), coefficients.data_ptr(), rows[2], V - 5, 0)
        m.row_stats_grad(how, pair, 0, coefficients.data_ptr(), stats.data_ptr(), rows[2], V - 5)
        for kind in range(4):
            m.row_divergence(how, pair, kind, 0.5, 0, stats.data_ptr(), out.data_ptr())
            m.row_divergence_grad(
                how, pair, kind, 0.5, stats.data_ptr(), out.data_ptr(), coefficients.data_ptr(), rows[2], V - 5
            )
        for top_k, greedy in ((0, False), (20, False), (0, True)):
            outputs = (tokens.data_ptr(), logprobs.data_ptr(), coin.data_ptr())
            m.row_sample(how, pair, uniforms.data_ptr(), 0.5, top_k, 1.0, greedy, *outputs)
    finally:
        m.allow_everything()


def counted(module, body) -> dict:
    module.count(True)
    body()
    counters = module.counters()
    module.count(False)
    return counters


@pytest.mark.parametrize(
    "types", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=lambda t: "-".join(map(NAMES.get, t))
)
@pytest.mark.parametrize("V", [12288, 50257])
def test_each_row_is_read_and_written_once(cuda_on_host, types, V):
    """2V elements for statistics and values, 3V for gradients. What is not a row's: the statistics of a row."""
    N = 3
    s, t = logits(N, V, types[0]), logits(N, V, types[1])
    bytes_s, bytes_t = s.nbytes, t.nbytes
    stats = cuda.backend.row_stats(Pair(s, t, 1.0, V), None, None)
    values = cuda.backend.row_divergence(Pair(s, t, 1.0, V), None, stats, "jsd", 0.5)
    aligned = V % 8 == 0
    for operation, per_row, stored in (
        (lambda: cuda.backend.row_stats(Pair(s, t, 1.0, V), None, None), 0, 11 * 4 * N),
        (lambda: cuda.backend.row_grad(Pair(s, t, 1.0, V), None, stats, torch.ones(5, N)), 0, bytes_s),
        (lambda: cuda.backend.row_divergence(Pair(s, t, 1.0, V), None, stats, "jsd", 0.5), 0, 2 * 4 * N),
        (
            lambda: cuda.backend.row_divergence_grad(Pair(s, t, 1.0, V), stats, values, torch.ones(N), "jsd", 0.5),
            0,
            bytes_s,
        ),
        (
            lambda: cuda.backend.row_sample(Pair(s, t, 1.0, V), torch.rand(N, 2).double(), 0.5, 0, 1.0),
            3 * 1024 * 2 * 4,
            3 * 4 * N,
        ),
    ):
        c = counted(cuda_on_host, operation)
        # Sectors of 32 bytes: those that the rows lie in, and no other. Sampling reads a tile again.
        least = sum(-(-x.nbytes // 32) for x in (s, t))
        assert least <= c["sectors_loaded"] <= 1.01 * least + 2 * per_row / 32 + 2, c
        if aligned:
            assert bytes_s + bytes_t <= c["loaded"] <= bytes_s + bytes_t + N * per_row, c
        assert c["stored"] == stored, c


@pytest.mark.parametrize(("dtype", "V"), [(BF16, 27001), (FP16, 28664), (FP32, 12288), (FP32, 14332)])
def test_statistics_and_gradient_in_one_launch_read_each_row_once(cuda_on_host, dtype, V):
    """3V elements instead of 5V. 28664 and 14332 columns are the most of which 228 KB hold two, to a few."""
    N = 2
    s, t = logits(N, V, dtype), logits(N, V, dtype)
    cuda_on_host.processors(N)
    cuda_on_host.most_blocks_a_cluster(1)
    assert holds_rows(s, t, V)
    c = counted(cuda_on_host, lambda: in_one_launch().row_stats_grad(Pair(s, t, 1.0, V), None, torch.ones(5, N)))
    assert c["launches"] == 1
    assert c["loaded"] == s.nbytes + t.nbytes and c["stored"] == s.nbytes + 11 * 4 * N
    assert c["sectors_loaded"] <= sum(-(-x.nbytes // 32) + 1 for x in (s, t))


def test_which_rows_one_launch_takes(cuda_on_host):
    """Of one type, no wider than half of what a multiprocessor holds, as many as there are multiprocessors."""
    cuda_on_host.most_blocks_a_cluster(1)
    s = torch.empty(132, 28000, dtype=BF16)
    assert holds_rows(s, s, 28000)
    assert not holds_rows(s[1:], s[1:], 28000)
    assert not holds_rows(s, None, 28000)
    assert not holds_rows(s, s.float(), 28000)
    assert not holds_rows(s.float(), s.float(), 28000)
    cuda_on_host.shared_memory(163 << 10)  # an A100's
    assert not holds_rows(s, s, 28000)
    assert holds_rows(s, s, 20000)
    cuda_on_host.shared_memory(227 << 10)
    with pytest.raises(RuntimeError, match="row_stats_grad_kernel: takes a student and a teacher of one type"):
        in_one_launch().row_stats_grad(Pair(s, s.float(), 1.0, 28000), None, torch.ones(5, 132))
    with pytest.raises(RuntimeError, match="row_stats_grad_kernel: 28000 columns are more than this device holds"):
        in_one_launch().row_stats_grad(Pair(s.float(), s.float(), 1.0, 28000), None, torch.ones(5, 132))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
@pytest.mark.parametrize(("V", "offset"), [(1, 0), (5, 3), (517, 1), (4100, 0), (4099, 5), (8190, 7)])
def test_one_launch_gives_the_bits_of_two(cuda_on_host, dtype, V, offset):
    """Less than a vector; part of a chunk; whole chunks and single columns behind them, in pieces;
    none of the rows aligned. Columns outside the support, a row of NaN, one without a coefficient."""
    N = 5
    s, t = logits(N, V + 3, dtype, offset)[:, :V], logits(N, V, dtype, 7 - offset)
    s[0, V // 2] = t[0, V // 3] = s[1, -1] = -torch.inf
    t[2, V // 2] = torch.nan
    ids = torch.tensor([0, V - 1, V // 2, V, 0])
    coefficients = torch.randn(5, N)
    coefficients[1:, 0] = coefficients[:, 3] = 0
    stats = cuda.backend.row_stats(Pair(s, t, 0.7, V), ids, torch.arange(N) != 3)
    grad = cuda.backend.row_grad(Pair(s, t, 0.7, V), ids, stats, coefficients)
    one, g = in_one_launch().row_stats_grad(Pair(s, t, 0.7, V), ids, coefficients)
    assert torch.equal(one.nan_to_num(7), stats.nan_to_num(7)) and torch.equal(g.nan_to_num(7), grad.nan_to_num(7))
    in_one_launch().row_stats_grad(Pair(s, t, 0.7, V), ids, coefficients, s)
    assert torch.equal(s.nan_to_num(7), grad.nan_to_num(7))


def test_gradients_begin_with_the_rows_that_were_read_last(cuda_on_host):
    """They are in the cache of a GPU still. Blocks run in order here, so of rows in one place the last one written
    stays: the first."""
    s, t = torch.randn(5, 4111), torch.randn(5, 4111)
    run = host_build.backend(cuda_on_host)
    pair, ones = Pair(s, t, 1.0, 4111), torch.ones(5, 5)
    stats = run.row_stats(pair, None, None)
    right = run.row_grad(pair, None, stats, ones)
    place = torch.zeros(1, 4111)
    run.row_grad(pair, None, stats, ones, out=place.expand(5, 4111))
    assert torch.equal(place[0], right[0])


def test_rows_that_do_not_count_are_not_read(cuda_on_host):
    s, t = logits(4, 5000, BF16), logits(4, 5000, BF16)
    mask = torch.tensor([True, False, False, True])
    stats = cuda.backend.row_stats(Pair(s, t, 1.0, 5000), None, None)
    for operation in (
        lambda: cuda.backend.row_stats(Pair(s, t, 1.0, 5000), None, mask),
        lambda: cuda.backend.row_grad(Pair(s, t, 1.0, 5000), None, stats, torch.ones(5, 4) * mask),
        lambda: cuda.backend.row_divergence(Pair(s, t, 1.0, 5000), mask, stats, "tvd", 0.5),
    ):
        assert counted(cuda_on_host, operation)["loaded"] <= 1.01 * (s.nbytes + t.nbytes) / 2


def test_where_1_arrives_for_the_loss_nothing_is_moved(cuda_on_host):
    """Every block looks at the number, and no more; another number moves each row once."""
    s, t = logits(4, 5000, BF16), logits(4, 5000, BF16)
    pair, ones = Pair(s, t, 1.0, 5000), torch.ones(5, 4)
    stats, grad = cuda.backend.row_stats(pair, None, None), torch.zeros_like(s)
    for operation in (
        lambda factor: cuda.backend.row_grad(pair, None, stats, ones, out=grad, factor=factor),
        lambda factor: cuda.backend.row_scale(grad, factor),
    ):
        found = counted(cuda_on_host, lambda run=operation: run(torch.tensor(1.0)))
        assert found["stored"] == 0 and found["loaded"] <= 4 * 256 * found["blocks"]
        assert counted(cuda_on_host, lambda run=operation: run(torch.tensor(0.5)))["stored"] == grad.nbytes


SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DHOST_CUDA", "-w"]


def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    check = host_build.HARNESS / "check_core.cpp"
    objects = host_build.compile_all(tmp_path, [*host_build.sources(), check], *SANITIZERS)
    program = tmp_path / "check"
    subprocess.run(["g++", *SANITIZERS, *objects, "-o", program], check=True, timeout=300)
    result = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "cuda ok" in result.stdout, result.stdout + result.stderr
