"""What a card shows in a few minutes, offline: python -m benchmarks.gpu [SECTION ...] [--dry] [--out FILE]

Needs the compiled core with CUDA, or Triton; Liger is measured beside where it is installed. Every record goes at once
to the file, one JSON object a line, by default benchmarks/results/gpu/CARD.jsonl; a table is printed at the end. --dry
runs the same code on the CPU at tiny sizes.

    env        versions, backends, card             correct    every operation, type and backend against float64
    ceilings   bandwidth, matmuls                   rows       the row operations beside eager, torch.compile, Liger
    linear     losses of hidden states and heads    host       microseconds of a call, and of the device alone
    ncu        a target for NVIDIA's profiler (only when named)

Exit status 1 if a check is wrong or something failed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from .ceilings import ceilings, env
from .correct import correct
from .host import host, ncu
from .linear import linear
from .measure import RUN, attempt
from .rows import rows
from .summary import summary

SECTIONS = {f.__name__: f for f in (env, ceilings, correct, rows, linear, host, ncu)}
SECONDS = {"env": 40, "ceilings": 60, "correct": 240, "rows": 125, "linear": 80, "host": 30, "ncu": 50}
RESULTS = Path(__file__).parents[1] / "results" / "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = [name for name in SECTIONS if name != "ncu"]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument("--out", type=Path, help="where the records go")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}: expected {', '.join(SECTIONS)}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs the same code on the CPU")
    RUN.dry, RUN.out = args.dry, args.out or default_file(args.dry)
    RUN.out.parent.mkdir(parents=True, exist_ok=True)
    RUN.out.unlink(missing_ok=True)
    RUN.out.touch()
    for name in args.sections or sections:
        RUN.section, RUN.seconds, RUN.began = name, SECONDS[name], time.perf_counter()
        attempt(name, SECTIONS[name], least=0)
    summary()
    print(f"\n{RUN.out}")
    wrong = any(json.loads(line).get("ok") is False for line in RUN.out.read_text().splitlines())
    sys.exit(1 if wrong or RUN.errors else 0)


def default_file(dry: bool) -> Path:
    if dry:
        return Path(tempfile.mkdtemp()) / "dry.jsonl"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") + ".jsonl")


if __name__ == "__main__":
    main()
