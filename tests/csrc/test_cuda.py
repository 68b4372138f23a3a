"""The CUDA half of the core without a GPU: it compiles for each architecture without spills and with 16-byte loads, is
in the binary, and fails well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
_core = pytest.importorskip("minillm_kernels._core", reason="the compiled core is missing")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_cuda_build = pytest.mark.skipif(_core.CUDA_ARCHITECTURES == "", reason="the core was built without nvcc")

# The kernels of each file: pairs of types (3 x 3, with "no teacher" 3 x 4) times divergences; those without types.
KERNELS = {"row_stats": 12 + 1, "row_grad": 12, "row_divergence": 2 * 4 * 9 + 1, "row_sample": 3 * 12 + 1}
REGISTERS = 128  # two blocks of 256 threads a multiprocessor


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "86", "89", "90", "100", "120"])
def test_kernels_compile_without_spills_or_local_memory(architecture, tmp_path):
    def compile_one(operation: str) -> subprocess.CompletedProcess:
        command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}"]
        command += ["-o", tmp_path / operation, CSRC / "cuda" / f"{operation}.cu"]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, KERNELS))
    for operation, result in zip(KERNELS, results, strict=True):
        log = result.stderr
        assert result.returncode == 0 and "warning" not in log, log
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert len(frames) == KERNELS[operation]
        assert set(frames) == {("0", "0", "0")}, operation
        registers = [int(x) for x in re.findall(r"Used (\d+) registers", log)]
        assert max(registers) <= REGISTERS, (operation, registers)


@needs_nvcc
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_main_loops_read_16_bytes_at_a_time_within_the_budget_of_instructions(architecture):
    """128 lane-instructions a clock, 14.5 bytes a clock and multiprocessor on an H100: 35 a bf16 pair."""
    pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with the Triton wheel")
    from benchmarks.gpu_static import cuda_kernels

    for kernel in cuda_kernels.kernels():
        x = cuda_kernels.measure(kernel, architecture)  # fails where the loop has no path of 16-byte accesses alone
        moved = kernel.read + kernel.written
        assert set(x["loads_by_bytes"]) == {"16"}, (kernel.name, x["loads_by_bytes"])
        assert x["instructions_per_column"] <= 35 * moved / 4, kernel.name
        assert x["registers"] <= REGISTERS and x["stack_bytes"] == 0, kernel.name


@needs_cuda_build
def test_versions_are_readable_without_a_gpu():
    driver, runtime = _core.cuda_versions()
    assert runtime >= 11000
    assert driver >= 0  # 0: no driver


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the error of a machine without a GPU")
def test_launch_error_names_kernel_and_shape():
    rows = _core.Rows(16, 0, 4, 0, 10)
    with pytest.raises(RuntimeError, match=r"row_stats_kernel<<<4, 256, 0>>> on 4 x 10 logits: "):
        _core.cuda_row_stats(16, 0, rows, None, 4, 10, 1.0, 0, 0, 16)


def test_too_long_a_row_is_an_error(host_cuda_kernels):
    rows = host_cuda_kernels.Rows(16, 0, 4, 0, 10)
    with pytest.raises(RuntimeError, match=r"row_stats_kernel: 2147483648 columns, at most 2\^30"):
        host_cuda_kernels.cuda_row_stats(16, 0, rows, None, 1, 2**31, 1.0, 0, 0, 16)


def test_the_host_build_reports_memory_that_a_kernel_was_not_given(host_cuda_kernels):
    x, workspace = torch.zeros(4, 10), torch.zeros(1000)
    rows = host_cuda_kernels.Rows(x.data_ptr(), 0, 4, 0, 10)
    host_cuda_kernels.allow(x.data_ptr(), 9 * 4)
    try:
        with pytest.raises(
            RuntimeError, match=r"<<<4, 256, 0>>> on 4 x 10 logits: thread \d+ of block 0: reads outside"
        ):
            host_cuda_kernels.cuda_row_stats(workspace.data_ptr(), 0, rows, None, 4, 10, 1.0, 0, 0, 16)
    finally:
        host_cuda_kernels.allow_everything()
