"""The harness itself: CUDA kernels that were broken on purpose are caught by their host build."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import pytest

pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))

# What is broken, in which file, and what the harness must say of it.
MUTATIONS = {
    "nothing": ("tiles.cuh", "", "", "^ok$"),
    "a barrier before what it guards": (
        "tiles.cuh",
        "warps.x[threadIdx.x / WARP] = x;\n    __syncthreads();",
        "warps.x[threadIdx.x / WARP] = x;",
        "wrong|differs",
    ),
    "a barrier behind what it guards": (
        "tiles.cuh",
        "    __syncthreads();  // before a next call overwrites what warp 0 reads\n",
        "",
        "wrong|differs",
    ),
    "a barrier that not all threads reach": (
        "tiles.cuh",
        "    __syncthreads();  // before a next call overwrites what warp 0 reads\n",
        "    if (threadIdx.x < 128) __syncthreads();\n",
        "deadlock",
    ),
    "a unit too many": (
        "tiles.cuh",
        "return unit_of(j) < c.units;",
        "return unit_of(j) <= c.units;",
        "reads outside|wrong",
    ),
    "a column too many": ("tiles.cuh", "return v < V ? v : -1;", "return v <= V ? v : -1;", "reads outside"),
    "rows taken for aligned": (
        "tiles.cuh",
        "else if (student.aligned() && teacher.aligned())",
        "else if (true)",
        "wrong",
    ),
    "a misaligned vector": (
        "tiles.cuh",
        "p + unit * N - behind / sizeof(E)",
        "p + unit * N",
        "misaligned access of 16",
    ),
    "the same vector twice": ("tiles.cuh", "load_first(unit + 1)", "load_first(unit)", "wrong"),
    "no single columns before the units": (
        "tiles.cuh",
        "head(min(LINE + more,",
        "head(min(more,",
        "reads outside|wrong",
    ),
    "none behind them": ("tiles.cuh", "this->V - head - WIDTH, 0", "this->V - head, 0", "reads outside"),
    "a piece without its first columns": (
        "row_stats_grad.cuh",
        "min(c.head + (i + 1) * columns_a_piece,",
        "min((i + 1) * columns_a_piece,",
        "did not wait|wrong",
    ),
    "a wrong mask": ("tiles.cuh", "ALL_LANES = ~0u", "ALL_LANES = 0x7fffffffu", "mask (does not name it|.* not name)"),
    "a lane that is missing": (
        "row_state.cuh",
        "    x = rebased(x, ms, mt, inv_T);",
        "    x = rebased(x, ms, mt, inv_T);\n    if (threadIdx.x == 5) return x;",
        "different collectives|has returned|deadlock",
    ),
    "half a warp": (
        "tiles.cuh",
        "#pragma unroll 1\n        for (int lanes = LANES / 2;",
        "#pragma unroll 1\n        for (int lanes = LANES / 4;",
        "wrong",
    ),
    "the single columns": (
        "row_stats.cuh",
        "add_single(state, single",
        "if (false) add_single(state, single",
        "wrong",
    ),
    "a copy that is not waited for": (
        "row_stats_grad.cuh",
        "wait_for_copies<PIECES - 1>();",
        "",
        "did not wait|wrong",
    ),
    "a piece too few": ("row_stats_grad.cuh", "wait_for_copies<PIECES - 1>();", "wait_for_copies<PIECES>();", "wrong"),
    "a barrier before the pieces": (
        "row_stats_grad.cuh",
        "so that the next turn waits for the next piece\n            __syncthreads();",
        "so that the next turn waits for the next piece",
        "wrong|differs",
    ),
    "a barrier behind the rows": (
        "row_stats_grad.cuh",
        "__syncthreads();  // before the next row lands",
        "// before the next row lands",
        "wrong|differs",
    ),
    "no wait for the states of the others": (
        "row_stats_grad.cuh",
        "        cluster.arrive();\n        cluster.wait();  // the states of all are there\n",
        "",
        "wrong|differs|without",
    ),
    "a block that leaves the others": (
        "row_stats_grad.cuh",
        "        cluster.wait();   // before the others' memory of this row goes\n",
        "",
        "arrives twice|without waiting",
    ),
    "a meeting less": (
        "row_stats_grad.cuh",
        "        cluster.arrive();  // has read the others' states\n",
        "",
        "without having arrived",
    ),
    "a state too few": ("row_stats_grad.cuh", "< BLOCKS_A_ROW) all =", "< BLOCKS_A_ROW - 1) all =", "wrong"),
    "a slice too far": ("row_stats_grad.cuh", "rank() * slice,", "rank() * slice + 1,", "wrong|reads outside"),
    "a carry": ("row_sample_filter.cuh", "carry = before + low < before;", "carry = 0;", "a wide sum is wrong"),
    "an origin": ("row_state.cuh", "(b(i) - mt) * k", "(b(i) - ms) * k", "wrong"),
}


def verdict(mutation: tuple[str, str, str, str], folder: Path, harness: list[Path]) -> str:
    """What check_kernel prints of kernels with that text replaced."""
    file, old, new, _ = mutation
    csrc = folder / "csrc"
    for part in ("rowmath", "cuda"):
        shutil.copytree(host_build.ROOT / "csrc" / part, csrc / part)
    shutil.copy(host_build.ROOT / "csrc" / "args.h", csrc)
    kernel = csrc / "cuda" / file
    text = kernel.read_text()
    assert old in text, f"{old!r} is no longer in {file}"
    kernel.write_text(text.replace(old, new, 1))
    program = folder / "check_kernel"
    source = host_build.HARNESS / "check_kernel.cpp"
    subprocess.run(
        ["g++", *host_build.flags(csrc), "-w", "-O1", source, *harness, "-o", program], check=True, timeout=300
    )
    return subprocess.run([program], capture_output=True, text=True, timeout=300).stdout.strip()


def test_broken_kernels_are_caught(tmp_path):
    harness = host_build.compile_all(tmp_path, host_build.harness(), "-O1")

    def one(name: str) -> str:
        return verdict(MUTATIONS[name], tmp_path / str(list(MUTATIONS).index(name)), harness)

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(MUTATIONS, pool.map(one, MUTATIONS), strict=True))
    for name, said in verdicts.items():
        assert re.search(MUTATIONS[name][3], said), f"{name}: {said!r}"
