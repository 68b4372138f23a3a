"""What the CUDA kernels cost, counted without a GPU: python -m benchmarks.gpu_static.cuda_kernels

Needs nvcc, g++ and the Triton wheel (its cuobjdump and nvdisasm). Writes into benchmarks/results/gpu-static.json
"cuda": registers and main loop of each kernel, from its disassembly; "cuda_sampling": loads and atomics of top-k,
top-p and the draw; and "cuda_traffic": the bytes and 32-byte sectors that a row moves, counted by the host build of
the kernels (tests/tools/host_build.py).

The main loops of csrc/cuda hold paths that are rarely taken: chunks with a column outside the support, rows that are
not aligned. What is counted is the hot path: from the loop's head to its branch back, the shortest path with an access
of 16 bytes for every 16 bytes of the chunk. Instructions that a predicate switches off are counted: they are issued.
Rows that are not aligned have two accesses for each of their vectors: that path is counted as well.
row_stats_grad has three such loops, which copy to shared memory, sum, and write the gradient: they are added. Its form
for clusters is empty before sm_90.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from minillm_kernels.rows import MIXTURE_DIVERGENCES

from . import sass

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu-static.json"
ARCHITECTURES = (80, 90, 100)


class Loop(NamedTuple):
    """What an iteration holds of a thread: columns, and accesses of 16 bytes of each kind. The compiler may unroll a
    loop of one access."""

    columns: int
    accesses: dict[str, int]
    times: int = 1  # such loops, one a model


class Kernel(NamedTuple):
    """A kernel, and what a column of it must read and write, in bytes. Labels are those of triton_kernels.py."""

    label: str
    file: str
    template: str  # with its arguments
    parameters: str
    read: int
    written: int
    loops: tuple[Loop, ...]
    since: int = 80  # architecture


_ELEMENTS = {"bf16": ("__nv_bfloat16", 2), "fp32": ("float", 4)}


def kernels() -> list[Kernel]:
    found = []
    for label, (element, size) in _ELEMENTS.items():
        pair, one = f"{element}, {element}", f"{element}, NoTeacher"

        def add(name, file, template, parameters, read, written=0, columns=16, label=label, loops=None, since=80):
            accesses = {"global load": columns * read // 16, "global store": columns * written // 16}
            loops = loops or (Loop(columns, accesses),)
            found.append(Kernel(f"{name} {label}", file, template, parameters, read, written, loops, since))

        stats, grad = "StatsArgs, int, RowState<float>*", "GradArgs, int"
        add("row_stats", "row_stats", f"row_stats_kernel<{pair}>", stats, 2 * size)
        alone = 64 // size  # columns of a thread at a time
        add("row_stats, one model", "row_stats", f"row_stats_kernel<{one}>", stats, size, columns=alone)
        add("row_grad", "row_grad", f"row_grad_kernel<{pair}>", grad, 2 * size, size)
        add("row_grad, one model", "row_grad", f"row_grad_kernel<{one}>", grad, size, size, alone)
        vectors = 2 * size  # of a chunk and model pair
        loops = (
            Loop(16 // size, {"copy": 1}, 2),
            Loop(16, {"shared load": vectors}),
            Loop(16, {"shared load": vectors, "global store": size}),
        )
        for name, blocks, since in (("row_stats_grad", 1, 80), ("row_stats_grad, cluster", 2, 90)):
            at_once = ("row_stats_grad", f"row_stats_grad_kernel<{pair}, {blocks}>", "StatsGradArgs")
            add(name, *at_once, 2 * size, size, loops=loops, since=since)
        for kind in MIXTURE_DIVERGENCES:
            template, divergence = f"<Divergence::{kind}, {pair}>", "DivergenceArgs, int, DivergenceSums*"
            args = ("row_divergence", f"row_divergence_kernel{template}", divergence, 2 * size, 0, 8)
            add(kind, *args)
            args = ("row_divergence", f"row_divergence_grad_kernel{template}", "DivergenceGradArgs, int", 2 * size)
            add(f"{kind} gradient", *args, size, 8)
        mass = ("row_sample", f"row_sample_mass_kernel<{one}>", "SampleArgs, SampleBuffers", size, 0, 32)
        add("mixed_sample, one model", *mass)
    return found


def compiled(file: str, wanted: Iterable[Kernel], architecture: int) -> bytes:
    """The cubin of some instantiations of csrc/cuda/<file>.cuh, compiled as csrc/CMakeLists.txt does."""
    text = f'#include "{ROOT}/csrc/cuda/{file}.cuh"\nnamespace minillm::cuda {{\n'
    text += "".join(f"template __global__ void {x.template}({x.parameters});\n" for x in wanted) + "}\n"
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        path.write_text(text)
        command = [shutil.which("nvcc") or "nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}"]
        subprocess.run([*command, path, "-o", target], check=True)
        return target.read_bytes()


def names_in(cubin: bytes) -> dict[str, str]:
    """{demangled: mangled}, the demangled without namespaces and parameters."""
    mangled = re.findall(r"Function (\w+):", sass._run("cuobjdump", "--dump-resource-usage", cubin))
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {_plain(line): name for line, name in zip(text.splitlines(), mangled, strict=True)}


def _plain(signature: str) -> str:
    signature = re.sub(
        r"\(minillm::Divergence\)(\d)", lambda m: f"Divergence::{MIXTURE_DIVERGENCES[int(m[1])]}", signature
    )
    return signature.replace("minillm::", "").replace("cuda::", "").removeprefix("void ").split("(")[0]


def hot_path(
    code: list[sass.Instruction], labels: dict[str, int], accesses: dict[str, int]
) -> tuple[list[sass.Instruction], int]:
    """See the module's text. Of the loops that hold these accesses of 16 bytes at least, and store only if they do,
    the shortest; and how often it was unrolled."""
    kinds = sorted(accesses)
    back = [(labels[target[0]], i) for i, x in enumerate(code) if (target := _target(x)) and labels[target[0]] < i]
    holding = []
    for start, end in back:
        found = Counter(map(_vector, code[start:end]))
        stores = found["global store"] > 0
        if all(found[k] >= n for k, n in accesses.items()) and stores == (accesses.get("global store", 0) > 0):
            holding.append((end - start, start, end, found["copy"] if kinds == ["copy"] else 1))
    _, start, end, unrolled = min(holding)
    wanted = tuple(accesses[k] * unrolled for k in kinds)
    # Backwards: from each instruction to the branch back with so many accesses, (its length, the next one).
    best: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {end: {(0,) * len(kinds): (1, end)}}
    for i in range(end - 1, start - 1, -1):
        target = _target(code[i])
        successors = [labels[target[0]]] if target else []
        if not target or _conditional(code[i]):
            successors.append(i + 1)
        best[i] = {}
        for j in successors:
            for vectors, (length, _) in best.get(j, {}).items() if j > i else ():
                more = _plus(vectors, kinds, code[i], 1)
                best[i][more] = min(best[i].get(more, (1 << 30, 0)), (length + 1, j))
    if wanted not in best[start]:
        raise LookupError(f"no path with {wanted} accesses")
    path, i, left = [], start, wanted
    while i != end:
        path.append(code[i])
        i, left = best[i][left][1], _plus(left, kinds, code[i], -1)
    return [*path, code[end]], unrolled


def _vector(x: sass.Instruction) -> str:
    """Which kind of access of 16 bytes it is, or ""."""
    name, *modifiers = x.opcode.split(".")
    if "128" not in modifiers:
        return ""
    kinds = {"LDGSTS": "copy", "LDS": "shared load", "LDG": "global load", "STG": "global store"}
    return kinds.get(name, "")


def _plus(vectors: tuple[int, ...], kinds: list[str], x: sass.Instruction, sign: int) -> tuple[int, ...]:
    return tuple(n + sign * (_vector(x) == kind) for n, kind in zip(vectors, kinds, strict=True))


def _target(x: sass.Instruction):
    return re.search(r"\.L_\w+", x.operands) if x.opcode.startswith("BRA") else None


def _conditional(x: sass.Instruction) -> bool:
    return bool(x.predicate) or ".DIV" in x.opcode or re.match(r"!?U?P\d", x.operands) is not None


def loads_at_once(path: list[sass.Instruction]) -> int:
    """How many of the path's loads of 16 bytes are under way before what one of them brings is used."""
    brought: set[str] = set()
    n = 0
    for x in path:
        registers = re.findall(r"\bR(\d+)", x.operands)
        if _vector(x) == "global load":
            brought.update(str(int(registers[0]) + i) for i in range(4))
            n += 1
            continue
        written = registers[:1] if x.operands.startswith("R") else []
        if brought.intersection(registers[len(written) :]):
            return n
        brought.difference_update(written)
    return n


def _bound(count: Counter[str], kernel: Kernel, architecture: int) -> dict:
    per_column = {kind: round(n, 3) for kind, n in sorted(count.items())}
    found = {"instructions_per_column": round(sum(count.values()), 2), "per_column": per_column}
    if gpu := sass.GPUS.get(architecture):
        ratio, pipe = sass.headroom(per_column, kernel.read + kernel.written, gpu)
        found |= {"gpu": gpu.name, "headroom": round(ratio, 3), "bound_by": pipe}
    return found


def not_aligned(kernel: Kernel, code: list[sass.Instruction], labels: dict[str, int], architecture: int) -> dict:
    """The same of rows that are not aligned, and how many loads from memory are under way at once, for each that a
    chunk of aligned rows has; None where a chunk is read from shared memory.

    Raises LookupError where there is no such path.
    """
    count: Counter[str] = Counter()
    at_once = []
    for loop in kernel.loops:
        one = {k: n for k, n in loop.accesses.items() if k.endswith("load")}
        try:
            path, unrolled = hot_path(code, labels, loop.accesses | {k: 2 * n for k, n in one.items()})
        except LookupError:  # the loads of the aligned path are on the way as well, switched off by a predicate
            path, unrolled = hot_path(code, labels, loop.accesses | {k: 3 * n for k, n in one.items()})
        for x in path:
            count[x.kind] += loop.times / loop.columns / unrolled
        if n := one.get("global load"):
            at_once.append(loads_at_once(path) / n)
    return {"loads_at_once": min(at_once, default=None), **_bound(count, kernel, architecture)}


def measure(kernel: Kernel, cubin: bytes, name: str, architecture: int) -> dict:
    used = sass.resources(cubin, name)
    code, labels = sass.instructions(cubin, name)
    count: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    for loop in kernel.loops:
        path, unrolled = hot_path(code, labels, loop.accesses)
        for x in path:
            count[x.kind] += loop.times / loop.columns / unrolled
            loads[str(x.load_bytes)] += x.load_bytes > 0
    return {
        "kernel": kernel.label,
        "architecture": architecture,
        "registers": used.registers,
        "stack_bytes": used.stack,
        "local_bytes": used.local,
        "shared_bytes": used.shared,
        "loads_by_bytes": {k: n for k, n in sorted(loads.items()) if n},
        **_bound(count, kernel, architecture),
        "not_aligned": not_aligned(kernel, code, labels, architecture),
    }


def sampling() -> list[dict]:
    """Of the kernels that find the cut-off of top-k and top-p, which a column passes through at most once a level, and
    draw a token: their loads from global memory and atomics in shared memory, by opcode, for sm_90."""
    kernel = "row_sample_filter_kernel"
    wanted = {f"{kernel}<{element}, NoTeacher>": f"top-k, top-p {label}" for label, (element, _) in _ELEMENTS.items()}
    every = [Kernel("", "", template, "SampleArgs, SampleBuffers", 0, 0, ()) for template in wanted]
    wanted["row_sample_draw_kernel"] = "draw"
    cubin = compiled("row_sample_filter", every, 90)
    names = names_in(cubin)
    found = []
    for template, label in wanted.items():
        code, _ = sass.instructions(cubin, names[template])
        opcodes = Counter(x.opcode for x in code if x.opcode.startswith(("ATOMS", "LDG")))
        used = sass.resources(cubin, names[template])
        counts = {"registers": used.registers, "stack_bytes": used.stack, "local_bytes": used.local}
        found.append({"kernel": label, **counts, "opcodes": dict(sorted(opcodes.items()))})
    return found


def nvcc_version() -> str:
    text = subprocess.run([shutil.which("nvcc") or "nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V([\d.]+)", text.stdout)[1]


def static(architectures: Iterable[int] = ARCHITECTURES, every: list[Kernel] | None = None) -> list[dict]:
    every = kernels() if every is None else every

    def of_file(job: tuple[str, int]) -> list[dict]:
        file, architecture = job
        wanted = [x for x in every if x.file == file and x.since <= architecture]
        cubin = compiled(file, wanted, architecture)
        names = names_in(cubin)
        return [measure(x, cubin, names[x.template], architecture) for x in wanted]

    files = dict.fromkeys(x.file for x in every)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of_file, ((file, a) for file in files for a in architectures)))
    order = [x.label for x in every]
    return sorted((x for part in found for x in part), key=lambda x: (order.index(x["kernel"]), x["architecture"]))


def main() -> None:
    from . import cuda_traffic

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["cuda"] = static()
    results["cuda_sampling"] = sampling()
    results["cuda_traffic"] = cuda_traffic.traffic()
    results["nvcc_version"] = nvcc_version()
    results = {k: results[k] for k in sorted(results)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for x in results["cuda"]:
        bound = f"{x['headroom']:.2f} of {x['gpu']}, {x['bound_by']}" if "gpu" in x else ""
        instructions = f"{x['instructions_per_column']:6.2f} instructions"
        print(f"{x['kernel']:30} sm_{x['architecture']:<4}{x['registers']:4} registers {instructions} {bound}")
    for x in results["cuda_traffic"]:
        print(
            f"{x['kernel']:30} {x['bytes_per_row']} bytes, {x['sectors_per_row']} sectors a row, {x['of_minimum']:.4f}"
        )


if __name__ == "__main__":
    main()
