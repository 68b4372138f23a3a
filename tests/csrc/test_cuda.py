"""The CUDA half of the core without a GPU: it compiles for each architecture without spills and with 16-byte loads, is
in the binary, and fails well."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import host_build
import pytest
import torch

from minillm_kernels.backends import compiled, cuda
from minillm_kernels.rows import Pair

pytest.importorskip(  # an older nvdisasm does not read what nvcc 13 writes
    "triton", minversion="3.7", reason="cuobjdump and nvdisasm come with the Triton wheel, from 3.7 on"
)
from benchmarks.gpu_static import cuda_kernels, sass

NVCC = shutil.which("nvcc")
_core = pytest.importorskip("minillm_kernels._core", reason="the compiled core is missing")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_cuda_build = pytest.mark.skipif(_core.CUDA_ARCHITECTURES == "", reason="the core was built without nvcc")

# Pairs of types (3 x 3, with "no teacher" 3 x 4, equal ones 3) times divergences; and kernels without types.
KERNELS = {
    **{"row_stats": 12 + 1, "row_grad": 12, "row_stats_grad": 2 * 3, "row_scale": 3},
    **{"row_divergence": 2 * 4 * 9 + 1, "row_sample": 37},
}
REGISTERS = 128  # two blocks of 256 threads a multiprocessor


@needs_cuda_build
def test_no_kernel_in_the_binary_spills_or_has_a_stack():
    """Every instantiation, for every architecture that the core was built for."""
    text = sass._run("cuobjdump", "--dump-resource-usage", Path(_core.__file__).read_bytes())
    found = Counter()
    for code in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\w+)", code)[1]
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code
        ):
            assert (stack, local) == ("0", "0") and int(registers) <= REGISTERS, (architecture, name, registers)
            found[architecture] += 1
    assert len(found) == len(_core.CUDA_ARCHITECTURES.split(","))
    assert set(found.values()) == {sum(KERNELS.values())}


@pytest.fixture(scope="module")
def kernels():
    """What benchmarks/results/gpu-static.json counts, and its bf16 kernels on three more architectures."""
    bf16 = [x for x in cuda_kernels.kernels() if x.label.endswith("bf16")]
    return cuda_kernels.static(), cuda_kernels.static((86, 89, 120), bf16)


@needs_nvcc
def test_compiled_kernels_keep_within_their_budget(kernels):
    """No spill, no stack, 16-byte loads alone in the hot path of the main loop (measure() finds none where there is
    another), and instructions that allow the bandwidth: 128 lanes a clock, 14.5 bytes a clock and multiprocessor on an
    H100, that is 35 for a bf16 pair."""
    counted, more = kernels
    assert {x["architecture"] for x in counted + more} == {80, 86, 89, 90, 100, 120}
    assert {x["architecture"] for x in counted + more if "cluster" in x["kernel"]} == {90, 100, 120}
    moved = {x.label: x.read + x.written for x in cuda_kernels.kernels()}
    for x in counted + more:
        assert x["registers"] <= REGISTERS and x["stack_bytes"] == x["local_bytes"] == 0, x
        assert set(x["loads_by_bytes"]) == {"16"} or "mixed_sample" in x["kernel"], x  # it looks for a cut-off
        assert x["instructions_per_column"] <= 35 * moved[x["kernel"]] / 4, x
        assert x.get("headroom", 1.0) >= 1.0, x
        # Rows that are not aligned have two loads for one: as many are under way, and memory is the limit there too.
        assert x["not_aligned"]["loads_at_once"] is None or x["not_aligned"]["loads_at_once"] >= 1, x
        assert x["not_aligned"].get("headroom", 1.0) >= 1.0, x


@needs_nvcc
def test_the_committed_counts_are_these(kernels):
    """Where the same nvcc compiles them."""
    committed = json.loads(cuda_kernels.RESULTS.read_text())
    if committed["nvcc_version"] != cuda_kernels.nvcc_version():
        pytest.skip(f"counted with nvcc {committed['nvcc_version']}, here is {cuda_kernels.nvcc_version()}")
    assert committed["cuda"] == kernels[0]


@needs_nvcc
def test_sampling_reads_vectors_and_adds_without_compare_and_swap():
    """An addition of 64 bits in shared memory is a loop of compare and swap: the threads of one bucket go through it
    one after the other, and bf16 logits share few buckets."""
    found = cuda_kernels.sampling()
    for x in found:
        assert x["stack_bytes"] == x["local_bytes"] == 0 and x["registers"] <= REGISTERS, x
        assert "LDG.E.128" in x["opcodes"] and not any("CAS" in name for name in x["opcodes"]), x
    committed = json.loads(cuda_kernels.RESULTS.read_text())
    if committed["nvcc_version"] == cuda_kernels.nvcc_version():
        assert found == committed["cuda_sampling"]


def test_the_whole_cuda_part_compiles_in_three_minutes_without_a_warning_or_a_stack():
    """On two cores, as `python -m benchmarks.gpu_static.cuda_build` recorded it."""
    build = json.loads(cuda_kernels.RESULTS.read_text())["cuda_build"]
    assert build["processor_seconds"] < 2 * 180 and build["warnings"] == 0
    assert [x["architecture"] for x in build["kernels"]] == [80, 86, 89, 90, 100, 120]
    for x in build["kernels"]:
        assert x["kernels"] == sum(KERNELS.values())
        assert x["registers"] <= REGISTERS and x["stack_bytes"] == x["local_bytes"] == 0


def test_each_row_moves_what_it_must():
    """Within 1 %, the workspace of split rows included; every sector of 32 bytes once."""
    committed = json.loads(cuda_kernels.RESULTS.read_text())
    assert len(committed["cuda_traffic"]) == len(cuda_kernels.kernels())
    for x in committed["cuda_traffic"]:
        assert 1 <= x["of_minimum"] <= 1.01, x
        assert 32 * x["sectors_per_row"] <= 1.01 * x["least"], x


@needs_cuda_build
def test_versions_are_readable_without_a_gpu():
    driver, runtime = _core.cuda.versions()
    assert runtime >= 11000
    assert driver >= 0  # 0: no driver


def _without_gpu() -> compiled.Compiled:
    """The compiled launchers on CPU tensors: they get as far as a launch does where there is no GPU."""
    return dataclasses.replace(cuda.backend, launch=host_build.launch, holds_rows=lambda operations, pair: True)


_STATS, _ROWS = torch.zeros(11, 4), torch.zeros(4, 10)
LAUNCHES = {
    "row_stats_kernel<<<4, 256, 0>>>": lambda run: run.row_stats(Pair(_ROWS, None, 1.0, 10), None, None),
    "row_grad_kernel<<<4, 256, 0>>>": lambda run: run.row_grad(Pair(_ROWS, None, 1.0, 10), None, _STATS, _STATS[:5]),
    "row_stats_grad_kernel<<<4, 256, 128>>>": lambda run: run.row_stats_grad(
        Pair(_ROWS, _ROWS, 1.0, 10), None, _STATS[:5]
    ),
    "row_divergence_kernel<<<4, 256, 0>>>": lambda run: run.row_divergence(
        Pair(_ROWS, _ROWS, 1.0, 10), None, _STATS, "jsd", 0.5
    ),
    "row_divergence_grad_kernel<<<4, 256, 0>>>": lambda run: run.row_divergence_grad(
        Pair(_ROWS, _ROWS, 1.0, 10), _STATS, _STATS[:2], _STATS[0], "jsd", 0.5
    ),
    "row_sample_mass_kernel<<<1, 256, 0>>>": lambda run: run.row_sample(
        Pair(_ROWS, None, 1.0, 10), torch.zeros(4, 2).double(), 0.0, 0, 1.0
    ),
}


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the errors of a machine without a GPU")
@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_error_names_the_kernel_and_its_launch(launch):
    with pytest.raises(RuntimeError, match=rf"^{re.escape(launch)} on 4 x 10 logits: \w+"):
        LAUNCHES[launch](_without_gpu())


def test_too_long_a_row_is_an_error(host_cuda_kernels):
    rows = (16, 0, 4, 0, 10)
    with pytest.raises(RuntimeError, match=r"row_stats_kernel: 2147483648 columns, at most 2\^30"):
        host_cuda_kernels.row_stats((lambda size: 16, 0), (rows, None, 1, 2**31, 1.0), 0, 0, 16)


def test_the_host_build_reports_memory_that_a_kernel_was_not_given(host_cuda_kernels):
    x, workspace = torch.zeros(4, 10), torch.zeros(1000)
    rows, how = (x.data_ptr(), 0, 4, 0, 10), (lambda size: workspace.data_ptr(), 0)
    host_cuda_kernels.allow(x.data_ptr(), 9 * 4)
    try:
        with pytest.raises(
            RuntimeError, match=r"<<<4, 256, 0>>> on 4 x 10 logits: thread \d+ of block 0: reads outside"
        ):
            host_cuda_kernels.row_stats(how, (rows, None, 4, 10, 1.0), 0, 0, 16)
    finally:
        host_cuda_kernels.allow_everything()
