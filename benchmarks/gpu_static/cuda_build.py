"""The whole CUDA part, compiled: python -m benchmarks.gpu_static.cuda_build.

Writes "cuda_build" in benchmarks/results/gpu-static.json: the processor time that csrc/cuda takes for 80;90;100, which
does not depend on what else the machine does, warnings, and for
six architectures the number of kernels and their most registers, stack and local memory.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from . import sass
from .cuda_kernels import RESULTS, ROOT, nvcc_version

TIMED, OTHERS = ("80", "90", "100"), ("86", "89", "120")


def build(architectures: tuple[str, ...], folder: str) -> tuple[float, str]:
    """Seconds of a processor, and what the compiler said."""
    import pybind11

    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", folder, "-DMINILLM_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{x}-real' for x in architectures)}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run(configure, check=True, capture_output=True)
    start = _processor_seconds()
    result = subprocess.run(
        ["ninja", "-C", folder, "cuda_operations"], check=True, capture_output=True, text=True, timeout=3600
    )
    return _processor_seconds() - start, result.stdout + result.stderr


def _processor_seconds() -> float:
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resources(folder: str) -> dict[str, list[tuple[int, int, int]]]:
    """{architecture: [(registers, stack, local) of each kernel]}."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for path in Path(folder).rglob("*.cu.o"):
        text = sass._run("cuobjdump", "--dump-resource-usage", path.read_bytes())
        for code in text.split("Fatbin elf code:")[1:]:
            architecture = re.findall(r"arch = sm_(\w+)", code)[0]
            used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
            found.setdefault(architecture, []).extend((int(r), int(s), int(m)) for r, s, m in used)
    return found


def main() -> None:
    found: dict[str, list[tuple[int, int, int]]] = {}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        seconds, said = build(TIMED, first)
        said += build(OTHERS, second)[1]
        found |= resources(first) | resources(second)
    results = json.loads(RESULTS.read_text())
    results["cuda_build"] = {
        "timed": ";".join(TIMED),
        "processor_seconds": round(seconds, 1),
        "nvcc_version": nvcc_version(),
        "warnings": len(re.findall("warning", said)),
        "kernels": [
            {
                "architecture": int(architecture),
                "kernels": len(used),
                "registers": max(r for r, _, _ in used),
                "stack_bytes": max(s for _, s, _ in used),
                "local_bytes": max(m for _, _, m in used),
            }
            for architecture, used in sorted(found.items(), key=lambda x: int(x[0]))
        ],
    }
    RESULTS.write_text(json.dumps({k: results[k] for k in sorted(results)}, indent=1) + "\n")
    print(json.dumps(results["cuda_build"], indent=1))


if __name__ == "__main__":
    main()
