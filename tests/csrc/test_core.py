"""The CPU row operations without Python in between: under sanitizers here, and on another architecture."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def build(compiler: str, folder: Path, sets: dict[str, list[str]], programs: list[str], *flags: str) -> list[Path]:
    """Those programs of this folder, for the given instruction sets, as csrc/CMakeLists.txt compiles them."""
    common = [compiler, *FLAGS, *flags]
    objects = []
    jobs = []
    for name, extra in sets.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("row_*.cpp")):
            objects.append(folder / f"{source.stem}_{name}.o")
            jobs.append([*common, *extra, f"-DMINILLM_ISA={name}", "-c", source, "-o", objects[-1]])
    defines = ["-DMINILLM_X86"] if len(sets) > 1 else []
    objects.append(folder / "dispatch.o")
    jobs.append([*common, *defines, "-c", ROOT / "csrc" / "cpu" / "dispatch.cpp", "-o", objects[-1]])
    for name in programs:
        jobs.append([*common, "-c", Path(__file__).parent / f"{name}.cpp", "-o", folder / f"{name}.o"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True, timeout=300), jobs))
    for name in programs:
        link = [*common, folder / f"{name}.o", *objects, "-o", folder / name]
        subprocess.run(link, check=True, timeout=300)
    return [folder / name for name in programs]


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_operations_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if x86 else {"baseline": []}
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
    check, fuzz = build("g++", tmp_path, sets, ["check_core", "fuzz_core"], *sanitizers)
    assert "baseline ok" in run(check)
    assert "baseline: 4000 cases" in run(fuzz, "4000", "0")  # by hand: more of them, from another seed


CROSS = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"needs {CROSS} (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_operations_on_aarch64(tmp_path):
    (program,) = build(CROSS, tmp_path, {"baseline": []}, ["check_core"], "-O3", "-Werror", "-static")
    assert "baseline ok" in run("qemu-aarch64", program)
