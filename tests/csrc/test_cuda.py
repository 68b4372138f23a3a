"""The CUDA half of the core without a GPU: it compiles for each architecture without spills, is in the binary, and
fails well."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
_core = pytest.importorskip("minillm_kernels._core", reason="the compiled core is missing")
needs_cuda_build = pytest.mark.skipif(_core.CUDA_ARCHITECTURES == "", reason="the core was built without nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_without_spills_or_local_memory(architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}"]
    command += ["-o", tmp_path / "row_stats.cubin", CSRC / "cuda" / "row_stats.cu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(frames) == 9, "three student types times three teacher types"
    assert set(frames) == {("0", "0", "0")}
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", result.stderr)]
    assert max(registers) <= 64, registers  # 256 threads: at least four blocks a multiprocessor


@needs_cuda_build
def test_versions_are_readable_without_a_gpu():
    driver, runtime = _core.cuda_versions()
    assert runtime >= 11000
    assert driver >= 0  # 0: no driver


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the error of a machine without a GPU")
def test_launch_error_names_kernel_and_shape():
    with pytest.raises(RuntimeError, match=r"row_stats_kernel<<<4, 256>>> on 4 x 10 logits: "):
        _core.cuda_row_stats((16, 0, 10), (0, 0, 0), 4, 10, 1.0, 0, 0, 16, 0)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("V", [1, 255, 1023, 1025, 50257])  # one column; one short of a block; around a block's stride
def test_row_stats_equals_the_reference(V):
    from minillm_kernels import reference

    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    generator = torch.Generator().manual_seed(V)
    student = torch.randn(7, V, generator=generator).cuda()
    teacher = torch.randn(7, V, generator=generator).cuda().bfloat16()
    token_ids = torch.randint(V, (7,), generator=generator).cuda()
    stats = torch.full((11, 7), float("nan"), device="cuda")
    rows = [(x.data_ptr(), codes[x.dtype], V) for x in (student, teacher)]
    stream = torch.cuda.current_stream().cuda_stream
    _core.cuda_row_stats(*rows, 7, V, 2.0, 0, token_ids.data_ptr(), stats.data_ptr(), stream)
    truth = reference.row_stats(student.double(), teacher.double(), token_ids, None, 2.0, V)
    torch.testing.assert_close(stats[4:].double(), truth[4:], rtol=1e-5, atol=1e-5)
