"""csrc/cuda compiled by g++ with tests/csrc/host_cuda.h: the CUDA kernels and launchers as a Python module that runs
on the CPU. Needs g++, pybind11, and CUDA's headers: of a toolkit, or those that the Triton wheel brings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from minillm_kernels.backends import compiled
from minillm_kernels.rows import Pair

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "tests" / "csrc"


def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h."""
    candidates = []
    if nvcc := shutil.which("nvcc"):
        listing = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        candidates += [Path(line.split("=", 1)[1]) / "include" for line in listing.splitlines() if "TOP=" in line]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    if spec := importlib.util.find_spec("triton"):
        candidates.append(Path(str(spec.origin)).parent / "backends" / "nvidia" / "include")
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    if cuda_headers() is None:
        return "needs CUDA's headers: a toolkit, or `pip install triton`"
    return None


def flags(csrc: Path = ROOT / "csrc") -> list[str]:
    """For the kernels in that folder."""
    # Rows of 16-bit numbers are read as words; the device compiler knows no type-based aliasing.
    return [
        *("-std=c++17", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
        *("-isystem", str(cuda_headers()), "-include", str(HARNESS / "host_cuda.h"), f"-I{csrc}"),
    ]


def compile_all(folder: Path, sources: list[Path], *extra: str) -> list[Path]:
    """Objects of the sources, compiled side by side."""

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}{source.suffix.replace('.', '_')}.o"
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run(
            ["g++", *flags(), f"-I{HARNESS}", *extra, *language, "-c", source, "-o", target], check=True, timeout=600
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def sources() -> list[Path]:
    """Of the launchers, and the harness."""
    return [*sorted((ROOT / "csrc" / "cuda").glob("row_*.cu")), *harness()]


def harness() -> list[Path]:
    return [HARNESS / "host_cuda.cpp", HARNESS / "host_memory.cpp"]


def module() -> ModuleType:
    """host_cuda_kernels; built once for each state of the sources, in build/."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    state = hashlib.sha256(suffix.encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *HARNESS.glob("host_*"), Path(__file__)]):
        if path.is_file():
            state.update(path.read_bytes())
    folder = ROOT / "build" / "host-cuda"
    library = folder / f"host_cuda_kernels-{state.hexdigest()[:16]}{suffix}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for older in folder.glob("*.so"):
            older.unlink(missing_ok=True)
        includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        bindings = [ROOT / "csrc" / "python" / "cuda.cpp", HARNESS / "host_module.cpp"]
        with tempfile.TemporaryDirectory(dir=folder) as own:  # two processes may build at once
            objects = compile_all(Path(own), [*bindings, *sources()], "-O1", "-fvisibility=hidden", *includes)
            linked = Path(own) / library.name
            subprocess.run(["g++", "-shared", *objects, "-o", linked], check=True, timeout=600)
            linked.rename(library)
    spec = importlib.util.spec_from_file_location("host_cuda_kernels", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def launch(pair: Pair) -> Iterator[tuple[Callable[[int], int], int]]:
    """As cuda.launch, on CPU tensors and without a stream."""
    workspaces = []

    def allocate(size: int) -> int:
        workspaces.append(pair.student.new_empty(size, dtype=torch.uint8))
        return workspaces[-1].data_ptr()

    yield allocate, 0


def backend(operations: ModuleType, launch: Callable = launch) -> compiled.Compiled:
    """The backend "cuda" on CPU tensors, its operations those of a host build."""
    return compiled.Compiled("cpu", operations, lambda: None, launch, holds_rows, lambda x: x.new_empty(x.shape))


def holds_rows(operations: ModuleType, pair: Pair) -> bool:
    teacher = pair.teacher
    code = compiled.DTYPES[pair.student.dtype]
    same = teacher is not None and teacher.dtype == pair.student.dtype
    return same and operations.holds_rows(pair.n_rows, pair.vocab_size, code)
