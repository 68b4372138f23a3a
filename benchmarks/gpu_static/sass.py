"""Reads a cubin: resources, the main loop, its instructions by class, and the bandwidth that they allow.

    report(cubin, "row_stats_kernel", 90, read_bytes=4)

for a kernel compiled for sm_90 that reads 4 bytes a column (a bf16 row pair). The main loop is the innermost loop with
the widest global loads, that is the unmasked one with 16-byte loads. How many columns an iteration handles follows
from the bytes that it loads, so unrolling by the compiler does not matter. A kernel whose loads are not a row's (a
matmul) passes `columns`, the columns an iteration and thread handles.

The model: a multiprocessor issues 128 lane-instructions a clock, and each class has a pipe of its own width. Columns a
clock are limited by the busiest pipe; times the bytes that a column moves, over the bytes a clock that memory
delivers: that ratio is `headroom`. It knows no latency: 1 or more says that instructions are not what bounds the
kernel.

cuobjdump and nvdisasm are those of the Triton wheel, for cubins of any compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Gpu(NamedTuple):
    """Lanes a clock and multiprocessor of each pipe: CUDA programming guide, arithmetic instruction throughput."""

    name: str
    multiprocessors: int
    ghz: float
    gb_s: float
    lanes: dict[str, int]

    def bytes_per_clock(self) -> float:
        return self.gb_s / self.ghz / self.multiprocessors


GPUS = {
    80: Gpu("A100", 108, 1.41, 2039, {"issue": 128, "fma": 64, "imad": 64, "alu": 64, "mufu": 16, "fp64": 32}),
    90: Gpu("H100", 132, 1.755, 3350, {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "mufu": 16, "fp64": 64}),
}
_CLASSES = {
    "fma": r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2",
    "imad": r"IMAD|IDP",
    "mufu": r"MUFU|I2F|F2I|F2F|I2I|POPC|FLO",
    "fp64": r"D(ADD|MUL|FMA|SETP)",
    "tensor": r"HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA",
    "global load": r"LDG|LDGSTS|LD$|UBLKCP|UTMALDG",
    "global store": r"STG|ST$|RED|ATOMG?",
    "shared": r"LDS|LDSM|STS|STSM|SHFL|ATOMS|MATCH|REDUX|CREDUX",
    "local": r"LDL|STL",
    "barrier": r"BAR|DEPBAR|WARPSYNC|SYNCS|WARPGROUP|MEMBAR|FENCE|LDGDEPBAR|B2R|VOTE",
    "control": r"BRA|BRX|JMP|EXIT|BSSY|BSYNC|BREAK|CALL|RET|NOP|YIELD|NANOSLEEP|ERRBAR|CCTL",
    "uniform": r"U[A-Z]|R2UR|S2UR|S2R|CS2R|LDC|REDUX",
}


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicate: str = ""  # @P0, @!UP1: it is issued, but does nothing, where that is false

    @property
    def kind(self) -> str:
        name = self.opcode.split(".")[0]
        return next((k for k, pattern in _CLASSES.items() if re.match(pattern, name)), "alu")

    @property
    def load_bytes(self) -> int:
        """Bytes a thread of a global load."""
        if self.kind != "global load":
            return 0
        for modifier in self.opcode.split(".")[1:]:
            if modifier in ("128", "64", "256"):
                return int(modifier) // 8
            if modifier in ("U8", "S8", "U16", "S16"):
                return int(modifier[1:]) // 8
        return 4


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int
    local: int


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([_tool(tool), option, f.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes, kernel: str) -> Resources:
    """Static shared memory only: Triton's is dynamic, in its metadata."""
    text = _run("cuobjdump", "--dump-resource-usage", cubin)
    line = re.search(rf"Function {re.escape(kernel)}:\s*\n(.*)", text)
    if line is None:
        raise KeyError(f"no kernel {kernel} in the cubin: {re.findall(r'Function (.*):', text)}")
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line[1])}
    return Resources(found["REG"], found["STACK"], found["SHARED"], found["LOCAL"])


def instructions(cubin: bytes, kernel: str) -> tuple[list[Instruction], dict[str, int]]:
    """The kernel's instructions in order, and the position of each label."""
    body = _run("nvdisasm", "-c", cubin).split(f"\n.text.{kernel}:")
    if len(body) != 2:
        raise KeyError(f"no kernel {kernel} in the disassembly")
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body[1].splitlines():
        if line.startswith((".text.", "//---")):  # the next section
            break
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            found.append(Instruction(code[2], code[3].strip(), (code[1] or "").strip()))
    return found, labels


def loops(code: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    """The bodies between a label and a branch back to it that hold no other such pair."""
    spans = []
    for i, instruction in enumerate(code):
        if instruction.opcode.startswith("BRA") and (target := re.search(r"\.L_\w+", instruction.operands)):
            start = labels[target[0]]
            if start < i:  # the branch to itself that ends every kernel is no loop
                spans.append((start, i + 1))
    innermost = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[start:end] for start, end in innermost]


def main_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """Of the innermost loops, the one whose global loads are widest; of several, the one that loads most."""

    def width(body: list[Instruction]) -> tuple[int, int]:
        sizes = [x.load_bytes for x in body if x.load_bytes]
        return (max(sizes, default=0), sum(sizes))

    found = loops(code, labels)
    if not found:
        raise ValueError("the kernel has no loop")
    return max(found, key=width)


def headroom(per_column: dict[str, float], moved_bytes: float, gpu: Gpu) -> tuple[float, str]:
    """The bandwidth that the instructions of a column allow, over the GPU's; and the pipe that bounds them."""
    clocks = {pipe: per_column.get(pipe, 0.0) / lanes for pipe, lanes in gpu.lanes.items()}
    clocks["issue"] = sum(per_column.values()) / gpu.lanes["issue"]
    clocks["fma"] += per_column.get("imad", 0.0) / gpu.lanes["fma"]  # the same pipe
    pipe = max(clocks, key=lambda p: clocks[p])
    return moved_bytes / clocks[pipe] / gpu.bytes_per_clock(), pipe


def report(
    cubin: bytes,
    kernel: str,
    architecture: int,
    *,
    read_bytes: float,
    written_bytes: float = 0.0,
    columns: float | None = None,
    dynamic_shared: int = 0,
) -> dict:
    """Of one kernel of a cubin, ready for JSON. read_bytes, written_bytes: what a column must move."""
    code, labels = instructions(cubin, kernel)
    body = main_loop(code, labels)
    used = resources(cubin, kernel)
    loads = Counter(x.load_bytes for x in body if x.load_bytes)
    if columns is None:
        columns = sum(n * size for size, n in loads.items()) / read_bytes
    per_column = {kind: round(n / columns, 3) for kind, n in sorted(Counter(x.kind for x in body).items())}
    bound = {}
    if gpu := GPUS.get(architecture):
        ratio, pipe = headroom(per_column, read_bytes + written_bytes, gpu)
        bound = {"gpu": gpu.name, "headroom": round(ratio, 3), "bound_by": pipe}
    return {
        "architecture": architecture,
        "registers": used.registers,
        "stack_bytes": used.stack,
        "local_bytes": used.local,
        "shared_bytes": used.shared + dynamic_shared,
        "spills": sum(x.kind == "local" for x in code),
        "loop_instructions": len(body),
        "columns_per_iteration": columns,
        "instructions_per_column": round(len(body) / columns, 2),
        "per_column": per_column,
        "loads_by_bytes": {str(size): n for size, n in sorted(loads.items())},
        "tensor_instructions": sum(x.kind == "tensor" for x in code),
        **bound,
    }
