"""What the CUDA kernels cost, from their disassembly: python -m benchmarks.gpu_static.cuda_kernels

Needs nvcc and the Triton wheel (its cuobjdump and nvdisasm), no GPU. Writes "cuda" in
benchmarks/results/gpu-static.json.

The main loops of csrc/cuda hold paths that are rarely taken: chunks with a column outside the support, rows that are
not aligned. What is counted is the hot path: from the loop's head to its branch back, the shortest path with a load or
store of 16 bytes for every 16 bytes of the chunk. Instructions that a predicate switches off are counted: they are
issued.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from . import sass

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu-static.json"
ARCHITECTURES = (80, 90, 100)


class Kernel(NamedTuple):
    """A kernel, and what a column of it must read and write, in bytes."""

    name: str
    file: str
    template: str  # its arguments, hence its mangled name
    parameters: str
    read: int
    written: int = 0

    @property
    def columns(self) -> int:
        """That a thread takes at a time: CHUNK of csrc/cuda/rows.cuh, or half."""
        return 8 if self.file == "row_divergence" else 16


_BF16, _FP32 = "__nv_bfloat16", "float"
_TYPES = {"bf16": (_BF16, 2), "fp32": (_FP32, 4)}


def kernels() -> list[Kernel]:
    found = []
    for label, (element, size) in _TYPES.items():
        pair, one = f"{element}, {element}", f"{element}, NoTeacher"
        stats, grad = "StatsArgs, int, RowState<float>*", "GradArgs, int"
        found += [
            Kernel(f"row_stats {label}", "row_stats", f"row_stats_kernel<{pair}>", stats, 2 * size),
            Kernel(f"row_stats {label}, one model", "row_stats", f"row_stats_kernel<{one}>", stats, size),
            Kernel(f"row_grad {label}", "row_grad", f"row_grad_kernel<{pair}>", grad, 2 * size, size),
            Kernel(f"row_grad {label}, one model", "row_grad", f"row_grad_kernel<{one}>", grad, size, size),
        ]
        for kind in ("jsd", "tvd") if label == "bf16" else ():
            template = f"Divergence::{kind}, {pair}"
            value, gradient = "DivergenceArgs, int, DivergenceSums*", "DivergenceGradArgs, int"
            found += [
                Kernel(f"{kind} {label}", "row_divergence", f"row_divergence_kernel<{template}>", value, 2 * size),
                Kernel(
                    f"{kind} gradient {label}",
                    "row_divergence",
                    f"row_divergence_grad_kernel<{template}>",
                    gradient,
                    2 * size,
                    size,
                ),
            ]
    return found


def source(kernel: Kernel) -> str:
    """One instantiation, alone in a file."""
    return (
        f'#include "{ROOT}/csrc/cuda/{kernel.file}.cuh"\n'
        f"namespace minillm::cuda {{ template __global__ void {kernel.template}({kernel.parameters}); }}\n"
    )


def compile_one(kernel: Kernel, architecture: int, output: str = "cubin") -> bytes:
    """As csrc/CMakeLists.txt compiles it. output: "cubin" or "ptx"."""
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "kernel.cu", Path(folder) / "kernel"
        path.write_text(source(kernel))
        command = [shutil.which("nvcc") or "nvcc", "-std=c++17", "-O3", f"-{output}", f"-arch=sm_{architecture}"]
        subprocess.run([*command, path, "-o", target], check=True)
        return target.read_bytes()


def name_in(cubin: bytes, kernel: Kernel) -> str:
    """The mangled name."""
    function = kernel.template.split("<")[0]
    text = sass._run("cuobjdump", "--dump-resource-usage", cubin)
    (name,) = re.findall(rf"Function (\w*\d{function}I\w+):", text)
    return name


def hot_path(code: list[sass.Instruction], labels: dict[str, int], loads: int, stores: int) -> list[sass.Instruction]:
    """See the module's text; loads, stores: how many of 16 bytes an iteration has."""
    back = [(labels[target[0]], i) for i, x in enumerate(code) if (target := _target(x)) and labels[target[0]] < i]
    holding = []
    for start, end in back:
        found = Counter(map(_vector, code[start:end]))
        if found["global load"] >= loads and found["global store"] >= stores:
            holding.append((start, end))
    start, end = min(holding, key=lambda span: span[1] - span[0])
    # Backwards: from each instruction to the branch back with so many loads and stores, (its length, the next one).
    best: dict[int, dict[tuple[int, int], tuple[int, int]]] = {end: {(0, 0): (1, end)}}
    for i in range(end - 1, start - 1, -1):
        target = _target(code[i])
        successors = [labels[target[0]]] if target else []
        if not target or _conditional(code[i]):
            successors.append(i + 1)
        best[i] = {}
        for j in successors:
            for vectors, (length, _) in best.get(j, {}).items() if j > i else ():
                more = _plus(vectors, code[i], 1)
                best[i][more] = min(best[i].get(more, (1 << 30, 0)), (length + 1, j))
    path, i, left = [], start, (loads, stores)
    while i != end:
        path.append(code[i])
        i, left = best[i][left][1], _plus(left, code[i], -1)
    return [*path, code[end]]


def _vector(x: sass.Instruction) -> str:
    """Which kind of access of 16 bytes it is, or ""."""
    return x.kind if "128" in x.opcode.split(".") and x.kind in ("global load", "global store") else ""


def _plus(vectors: tuple[int, int], x: sass.Instruction, sign: int) -> tuple[int, int]:
    kind = _vector(x)
    return vectors[0] + sign * (kind == "global load"), vectors[1] + sign * (kind == "global store")


def _target(x: sass.Instruction):
    return re.search(r"\.L_\w+", x.operands) if x.opcode.startswith("BRA") else None


def _conditional(x: sass.Instruction) -> bool:
    return bool(x.predicate) or re.match(r"!?U?P\d", x.operands) is not None


def measure(kernel: Kernel, architecture: int) -> dict:
    cubin = compile_one(kernel, architecture)
    name = name_in(cubin, kernel)
    used = sass.resources(cubin, name)
    columns = kernel.columns
    path = hot_path(
        *sass.instructions(cubin, name), loads=columns * kernel.read // 16, stores=columns * kernel.written // 16
    )
    per_column = {kind: round(n / columns, 3) for kind, n in sorted(Counter(x.kind for x in path).items())}
    bound = {}
    if gpu := sass.GPUS.get(architecture):
        ratio, pipe = sass.headroom(per_column, kernel.read + kernel.written, gpu)
        bound = {"gpu": gpu.name, "headroom": round(ratio, 3), "bound_by": pipe}
    return {
        "kernel": kernel.name,
        "architecture": architecture,
        "registers": used.registers,
        "stack_bytes": used.stack,
        "shared_bytes": used.shared,
        "columns_per_iteration": columns,
        "instructions_per_column": round(len(path) / columns, 2),
        "per_column": per_column,
        "loads_by_bytes": dict(sorted(Counter(str(x.load_bytes) for x in path if x.load_bytes).items())),
        **bound,
    }


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["cuda"] = [measure(kernel, architecture) for kernel in kernels() for architecture in ARCHITECTURES]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for x in results["cuda"]:
        bound = f"{x['headroom']:.2f} of {x['gpu']}, {x['bound_by']}" if "gpu" in x else ""
        instructions = f"{x['instructions_per_column']:6.2f} instructions"
        print(f"{x['kernel']:24} sm_{x['architecture']:<4}{x['registers']:4} registers {instructions} {bound}")


if __name__ == "__main__":
    main()
