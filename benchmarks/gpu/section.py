"""One section of `python -m benchmarks.gpu`, in a process of its own: python -m benchmarks.gpu.section NAME --out F"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path

from .measure import DTYPES, RUN, attempt

# The module of each, imported when it is run: the build comes before anything that loads the core.
MODULES = {
    "build": "commands",
    "ceilings": "ceilings",
    "env": "ceilings",
    "correct": "correct",
    "rows": "rows",
    "linear": "linear",
    "host": "host",
    "ncu": "profiler",
    "pytest": "commands",
    "trainer": "trainer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--backend", default="", help="only this one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the checks, by default all")
    args = parser.parse_args()
    RUN.out, RUN.dry, RUN.section, RUN.seconds = args.out, args.dry, args.name, args.seconds
    RUN.backend, RUN.began = args.backend, time.perf_counter()
    RUN.dtypes = (args.dtype,) if args.dtype else DTYPES
    section = getattr(import_module(f".{MODULES[args.name]}", __package__), args.name)
    attempt(args.name, section, least=0)


if __name__ == "__main__":
    main()
