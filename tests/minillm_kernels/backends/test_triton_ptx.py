"""The compiled PTX of the Triton kernels, executed on the CPU by ptxjit, which lies outside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from minillm_kernels import available_backends

PTXJIT = Path(os.environ.get("MINILLM_PTXJIT", ROOT.parent / "shared" / "tools" / "ptxjit"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_compiled_kernels(architecture):
    if available_backends()["triton"] != "ok":
        pytest.skip(available_backends()["triton"])
    if not (PTXJIT / "ptxjit.py").exists():
        pytest.skip(f"no ptxjit at {PTXJIT}: set MINILLM_PTXJIT to its folder")
    command = [sys.executable, str(ROOT / "tests" / "tools" / "triton_ptx.py"), str(architecture)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{PTXJIT}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 kernels executed" in result.stdout
