"""setup.py: what it builds, what it skips with which message, what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
    ]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(d for d in folders if not (Path(d) / "nvcc").exists())


def test_without_compiler_the_build_succeeds_and_says_what_was_skipped(tmp_path):
    result = build(tmp_path, CXX="/nonexistent/c++", MINILLM_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "compiled core was NOT built" in result.stderr
    assert "Install a C++17 compiler" in result.stderr
    assert not list((tmp_path / "lib").rglob("_core*.so"))


def test_cuda_1_makes_a_missing_nvcc_an_error(tmp_path):
    # Only the folders that hold nvcc leave the PATH; CUDA_HOME must not bring it back.
    result = build(tmp_path, PATH=path_without_nvcc(), CUDA_HOME="", MINILLM_CUDA="1")
    assert result.returncode != 0
    assert "MINILLM_CUDA=1, but nvcc was not found" in result.stderr


def test_unknown_cuda_switch_is_an_error(tmp_path):
    result = build(tmp_path, MINILLM_CUDA="yes")
    assert result.returncode != 0
    assert "MINILLM_CUDA must be auto, 0 or 1" in result.stderr


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_architecture_that_nvcc_cannot_target_is_named(tmp_path):
    result = build(tmp_path, MINILLM_CUDA="1", MINILLM_CUDA_ARCHS="80;37")
    assert result.returncode != 0
    assert "cannot target 37" in result.stderr


def test_without_cuda_the_core_has_no_cuda_in_it(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    result = build(tmp_path, MINILLM_CUDA="0")
    assert result.returncode == 0, result.stderr
    (core,) = (tmp_path / "lib").rglob("_core*.so")
    probe = "import torch, _core; print(_core.CUDA_ARCHITECTURES == '', hasattr(_core, 'cuda'))"
    output = subprocess.run(
        [sys.executable, "-c", probe], cwd=core.parent, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["True", "False"]
