"""The PTX that nvcc makes of the CUDA kernels, executed by ptxjit, a translator of PTX to C++ that is no part of this
repository: MINILLM_PTXJIT names its folder. The launchers are those of the host build, so grids and parameters are
those of a real launch."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import oracle
import pytest
import torch

from minillm_kernels.backends import cuda, reference
from minillm_kernels.rows import Pair

BF16, FP32 = torch.bfloat16, torch.float32
PTXJIT = Path(os.environ.get("MINILLM_PTXJIT", host_build.ROOT.parent / "shared" / "tools" / "ptxjit"))
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(not (PTXJIT / "ptxjit.py").exists(), reason=f"needs ptxjit (MINILLM_PTXJIT), not in {PTXJIT}"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
    pytest.mark.slow,
]


# What is executed: fp32 pairs on sm_80, bf16 pairs on sm_90; kernels without types are there anyway.
TYPES = {80: (FP32, "float", "ff?"), 90: (BF16, "__nv_bfloat16", r"13__nv_bfloat16(S\d_)?")}
_DIVERGENCE = ("DivergenceArgs, int, DivergenceSums*", "DivergenceGradArgs, int")
INSTANTIATIONS = {
    "row_stats": ["row_stats_kernel<{0}, {0}>(StatsArgs, int, RowState<float>*)"],
    "row_grad": ["row_grad_kernel<{0}, {0}>(GradArgs, int)"],
    "row_scale": ["row_scale_kernel<{0}>(ScaleArgs)"],
    "row_stats_grad": ["row_stats_grad_kernel<{0}, {0}, 1>(StatsGradArgs)"],
    "row_divergence": [
        f"{name}<Divergence::{kind}, {{0}}, {{0}}>({parameters})"
        for kind in ("jsd", "tvd")
        for name, parameters in zip(("row_divergence_kernel", "row_divergence_grad_kernel"), _DIVERGENCE, strict=True)
    ],
    "row_sample_filter": [
        f"row_sample_{name}_kernel<{{0}}, {{0}}>(SampleArgs, SampleBuffers)" for name in ("mass", "filter", "argmax")
    ],
}


class Executor:
    """Runs the launches of the host build as PTX."""

    def __init__(self, architecture: int, folder: Path) -> None:
        sys.path.insert(0, str(PTXJIT))
        from ptxjit import Module

        self.dtype, element, self.mangled = TYPES[architecture]

        def compiled(operation: str) -> str:
            source, target = folder / f"{operation}.cu", folder / f"{operation}.ptx"
            wanted = [x.format(element) for x in INSTANTIATIONS[operation]]
            text = f'#include "{host_build.ROOT}/csrc/cuda/{operation}.cuh"\nnamespace minillm::cuda {{\n'
            source.write_text(text + "".join(f"template __global__ void {x};\n" for x in wanted) + "}\n")
            command = [NVCC, "-std=c++17", "-O3", "-ptx", f"-arch=sm_{architecture}", source, "-o", target]
            subprocess.run(command, check=True)
            return target.read_text()

        with ThreadPoolExecutor(2) as pool:
            self.modules = [Module(text) for text in pool.map(compiled, INSTANTIATIONS)]
        self.order = 0
        self.buffers: list[torch.Tensor] = []
        self.launched: dict[str, dict] = {}  # kernel -> ptxjit's counters of its last launch

    def __call__(self, name, blocks, threads, dynamic_shared, parameters) -> str:
        pattern = rf"\d{name}(E|I(LNS_\d+DivergenceE{self.divergence}E)?{self.mangled}(Li1E)?EE)"
        found = [(m, k) for m in self.modules for k in m.kernels() if re.search(pattern, k)]
        assert len(found) == 1, (name, pattern, found)
        module, kernel = found[0]
        buffers = [x for x in self.buffers if x.numel()]
        result = module.launch(
            kernel,
            blocks,
            threads,
            parameters,
            smem=dynamic_shared,
            order=self.order,
            buffers=buffers,
            raise_err=False,
        )
        self.launched[name] = result.stats
        return result.msg


@pytest.fixture(scope="module", params=TYPES)
def ptx(request, tmp_path_factory):
    return Executor(request.param, tmp_path_factory.mktemp("ptx"))


@pytest.fixture
def executor(ptx, cuda_on_host, monkeypatch):
    """The launches of backends.cuda go to the executor, which knows every tensor that is made meanwhile."""
    made = torch.Tensor.new_empty

    def remembered(self, *args, **kwargs):
        x = made(self, *args, **kwargs)
        ptx.buffers.append(x)
        return x

    monkeypatch.setattr(torch.Tensor, "new_empty", remembered)
    cuda_on_host.execute_by(ptx)
    yield ptx
    cuda_on_host.execute_by(None)


def storage(N: int, V: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Rows that start `offset` elements behind an aligned address."""
    memory = torch.empty(N * V + offset + 64, dtype=dtype)
    start = -(memory.data_ptr() // memory.element_size()) % (64 // memory.element_size())
    return memory[start + offset :][: N * V].view(N, V)


def run(executor: Executor, s: torch.Tensor, t: torch.Tensor, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    N, V = s.shape
    coefficients, scale = torch.randn(5, N), torch.ones(N)
    uniforms = torch.rand(N, 2, dtype=torch.float64)
    executor.buffers = [s, t, token_ids, coefficients, scale, uniforms]
    executor.divergence = 0
    out = {"stats": cuda.backend.row_stats(Pair(s, t, 1.0, V), token_ids, None)}
    executor.buffers.append(out["stats"])
    out["grad"] = cuda.backend.row_grad(Pair(s, t, 1.0, V), token_ids, out["stats"], coefficients)
    simple = coefficients * (torch.arange(5) < 1)[:, None]
    executor.buffers.append(simple)
    out["rkl grad"] = cuda.backend.row_grad(Pair(s, t, 1.0, V), None, out["stats"], simple)
    factors = torch.tensor([1.0, -2.0])
    executor.buffers.append(factors)
    again = out["grad"].new_empty(out["grad"].shape).copy_(out["grad"])
    for factor in factors:  # 1: nothing is done; another: as if the coefficients were multiplied, exactly for -2
        cuda.backend.row_grad(Pair(s, t, 1.0, V), token_ids, out["stats"], coefficients, out=again, factor=factor)
        cuda.backend.row_scale(out["rkl grad"], factor)
        assert torch.equal(again, factor.to(again.dtype) * out["grad"])
    in_one_launch = dataclasses.replace(cuda.backend, holds_rows=lambda operations, pair: True)
    at_once = in_one_launch.row_stats_grad(Pair(s, t, 1.0, V), token_ids, coefficients)
    if V <= 8192:  # one part
        assert torch.equal(at_once[0], out["stats"]) and torch.equal(at_once[1], out["grad"])
    torch.testing.assert_close(
        oracle.of_any_origin(at_once[0]), oracle.of_any_origin(out["stats"]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(at_once[1], out["grad"], rtol=2**-8 if s.dtype == BF16 else 1e-5, atol=1e-6)
    for executor.divergence, name in ((0, "jsd"), (3, "tvd")):
        values = cuda.backend.row_divergence(Pair(s, t, 1.0, V), None, out["stats"], name, 0.3)
        out[name] = values
        out[f"{name} grad"] = cuda.backend.row_divergence_grad(
            Pair(s, t, 1.0, V), out["stats"], values, scale, name, 0.3
        )
    for label, (temperature, *filters) in {
        "plain": (1.0, 0, 1.0),
        "filtered": (0.7, 20, 0.8),
        "greedy": (0.0, 0, 1.0),
    }.items():
        pair = Pair(s, t, temperature, V)
        sample = cuda.backend.row_sample(pair, uniforms, 0.4, *filters)
        out |= {f"{label} token": sample[0], f"{label} logprobs": sample[1]}
        right = reference.backend.row_sample(pair, uniforms, 0.4, *filters)
        assert torch.equal(sample[0], right[0]), label
        torch.testing.assert_close(sample[1], right[1].float(), rtol=3e-6, atol=3e-6)
    return out


@pytest.mark.parametrize("shape", [(2, 517, 0, 0), (2, 8300, 3, 5)], ids=["small", "misaligned"])
def test_compiled_kernels_give_the_definitions_in_any_order(executor, shape):
    """Part of a chunk; several chunks, rows in two parts, neither model aligned."""
    N, V, *offsets = shape
    s, t = (storage(N, V, executor.dtype, offset) for offset in offsets)
    s.copy_(3 * torch.randn(N, V))
    t.copy_(s + torch.randn(N, V))
    s[0, V // 2], t[1, 7] = -torch.inf, -torch.inf
    ids = torch.tensor([3, V - 1])
    results = []
    for executor.order in range(4):
        torch.manual_seed(1)
        results.append(run(executor, s, t, ids))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name
    ours, truth = results[0], oracle.statistics(s.double(), t, ids)
    for i, name in enumerate(
        ("reverse_kl", "forward_kl", "student_logprobs", "teacher_logprobs", "student_entropy"), start=4
    ):
        torch.testing.assert_close(ours["stats"][i].double(), truth[name], rtol=3e-6, atol=3e-6, msg=name)
    torch.manual_seed(1)
    coefficients = torch.randn(5, N)
    stats = ours["stats"].double()
    grad = reference.backend.row_grad(Pair(s.double(), t.double(), 1.0, V), ids, stats, coefficients)
    tolerance = {BF16: 2**-8, FP32: 2e-5}[executor.dtype]
    torch.testing.assert_close(ours["grad"].double(), grad, rtol=tolerance, atol=1e-6)
    for name in ("jsd", "tvd"):
        truth_of = oracle.divergence(s.double(), t, name, 0.3)
        torch.testing.assert_close(ours[name][0].double(), truth_of, rtol=3e-6, atol=3e-6)


def test_compiled_kernels_move_each_row_once(executor):
    """Of aligned rows, in sectors of 32 bytes as the warps ask for them."""
    N, V = 2, 12288
    executor.order = 0
    s, t = storage(N, V, executor.dtype, 0), storage(N, V, executor.dtype, 0)
    s.copy_(torch.randn(N, V))
    t.copy_(torch.randn(N, V))
    run(executor, s, t, torch.tensor([1, 2]))
    sectors = s.nbytes // 32
    for name, read, written in (
        ("row_stats_kernel", 2, 0),
        ("row_grad_kernel", 2, 1),
        ("row_divergence_kernel", 2, 0),
        ("row_divergence_grad_kernel", 2, 1),
        ("row_sample_mass_kernel", 2, 0),
    ):
        counted = executor.launched[name]
        # A row's own statistics and coefficients, read by each warp, come on top, and 96 numbers of the tiles' masses.
        assert read * sectors <= counted["gld_sec"] <= 1.2 * read * sectors, (name, counted)
        assert written * sectors <= counted["gst_sec"] <= 1.05 * written * sectors + 96, (name, counted)
    at_once = executor.launched["row_stats_grad_kernel"]
    assert at_once["cpasync_bytes"] == s.nbytes + t.nbytes and sectors <= at_once["gst_sec"] <= 1.05 * sectors
