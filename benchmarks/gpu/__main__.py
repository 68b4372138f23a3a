"""What a card shows in about ten minutes, offline: python -m benchmarks.gpu [SECTION ...] [--dry] [--out FILE]

Every record goes at once to the file, one JSON object a line, by default benchmarks/results/gpu/CARD.jsonl; a table is
printed at the end. What the same sections recorded there before goes; other sections' records stay. Each section runs
in processes of its own and within its own time, so that one that fails or hangs costs the others nothing. --dry runs
the same code on the CPU at tiny sizes.

    build      the core for this card, in place        ceilings   bandwidth, matmuls
    env        versions, backends, card                correct    every operation, type and backend against float64
    rows       the row operations beside eager, torch.compile, Liger
    linear     losses of hidden states and heads, beside the same and the four matmuls
    host       microseconds of a call, and of the device alone
    ncu        what NVIDIA's profiler says of the kernels, where it is installed
    pytest     the tests that need a card              trainer    rollouts and steps of models of random weights

It needs torch with CUDA and Triton, or nvcc and what builds the core. What is not installed (Liger, ncu, pytest-xdist)
is left out with a record that says so. Exit status 1 if a check is wrong or something failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .measure import DTYPES, RUN, record
from .summary import summary

# Seconds of each section, in order of value.
SECTIONS = {
    "build": 300,
    "ceilings": 60,
    "env": 40,
    "correct": 120,
    "rows": 125,
    "linear": 80,
    "host": 30,
    "ncu": 50,
    "pytest": 240,
    "trainer": 100,
}
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="of those above; by default all")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument("--out", type=Path, help="where the records go")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all sections together")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}: expected {', '.join(SECTIONS)}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs the same code on the CPU")
    RUN.dry, RUN.out = args.dry, (args.out or default_file(args.dry)).resolve()
    sections = args.sections or list(SECTIONS)
    forget(sections)
    end = time.perf_counter() + args.seconds
    for name in sections:
        most = 600 if args.dry else SECTIONS[name]  # tiny sizes take as long as the machine lets them
        run(name, min(most, end - time.perf_counter()))
    summary()
    print(f"\n{RUN.out}")
    records = [json.loads(line) for line in RUN.out.read_text().splitlines()]
    sys.exit(any(x.get("ok") is False or "error" in x for x in records))


def forget(sections: list[str]) -> None:
    """What these sections recorded before; the others' records stay."""
    RUN.out.parent.mkdir(parents=True, exist_ok=True)
    lines = RUN.out.read_text().splitlines(keepends=True) if RUN.out.exists() else []
    RUN.out.write_text("".join(line for line in lines if json.loads(line)["section"] not in sections))


def run(section: str, seconds: float) -> None:
    """In one process; the checks, of which compiling Triton's kernels is most, in one for each type and backend."""
    RUN.section = section
    print(f"== {section}", flush=True)
    if seconds < 8:
        record(name=section, skipped="no time left")
        return
    options: list[list[str]] = [[]]
    if section == "correct" and not RUN.dry:
        options = [["--backend", backend, "--dtype", dtype] for backend in ("cuda", "triton") for dtype in DTYPES]
    command = [sys.executable, "-m", "benchmarks.gpu.section", section, "--out", str(RUN.out)]
    command += ["--seconds", str(seconds - 4), *(["--dry"] if RUN.dry else [])]
    processes = [subprocess.Popen([*command, *more], cwd=ROOT) for more in options]
    end = time.perf_counter() + seconds + 5  # a section stops by itself
    for process, more in zip(processes, options, strict=True):
        try:
            status = process.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status:
            record(name=" ".join([section, *more]), error=f"the process ended with status {status}")


def default_file(dry: bool) -> Path:
    if dry:
        return Path(tempfile.mkdtemp()) / "dry.jsonl"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") + ".jsonl")


if __name__ == "__main__":
    main()
