"""Sections that are commands of the project: the build of the core, and the tests that need a card."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from .measure import RUN, record

ROOT = Path(__file__).parents[2]
# Those that need a card, but for the one that times: others take long to collect, and what they import may be missing.
TESTS = ["tests/minillm_kernels/test_gpu.py", "tests/minillm/model/test_static.py"]


def build() -> None:
    """In place, as CONTRIBUTING.md has it. Without nvcc, Triton alone is measured."""
    nvcc = shutil.which(
        "nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin") if "CUDA_HOME" in os.environ else None
    )
    if RUN.dry or nvcc is None:
        reason = "this is --dry" if RUN.dry else "nvcc is not on PATH, and CUDA_HOME is not set"
        record(name="build", skipped=f"{reason}: the core stays as it is")
        return
    jobs = os.cpu_count() or 1
    environment = {**os.environ, "MINILLM_CUDA": "1", "MAX_JOBS": str(jobs)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    began = time.perf_counter()
    result = run(command, environment)
    seconds = round(time.perf_counter() - began, 1)
    record(
        name="build", seconds=seconds, rc=result.returncode, jobs=jobs, ok=result.returncode == 0, tail=tail(result)
    )


def pytest() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    if RUN.dry:
        result = run([*command, "--collect-only"])
        collected = sum("::" in line for line in result.stdout.splitlines())
        record(name="pytest", rc=result.returncode, collected=collected, ok=result.returncode == 0 and collected > 0)
        return
    if find_spec("xdist"):
        command += ["-n", "8"]
    with tempfile.TemporaryDirectory() as own:
        report = Path(own) / "report.xml"
        result = run([*command, "--maxfail=20", f"--junitxml={report}"])
        found = counted(report.read_text()) if report.exists() else {}
    record(name="pytest", rc=result.returncode, ok=result.returncode == 0, **found, tail=tail(result))


def counted(junit: str) -> dict[str, object]:
    """What pytest's report says: how many tests there were, how long they took, and which were wrong."""
    suites = list(ElementTree.fromstring(junit).iter("testsuite"))
    numbers = {key: sum(int(x.get(key, 0)) for x in suites) for key in ("tests", "failures", "errors", "skipped")}
    wrong = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**numbers, "seconds": sum(float(x.get("time", 0)) for x in suites), "wrong": wrong[:50]}


def run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN.left())


def tail(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stdout + result.stderr)[-2000:]
