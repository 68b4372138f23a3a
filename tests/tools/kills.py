"""Runs that are killed at one file operation each and then resumed, in forks of this process, which is started with
kill_at.c preloaded: python kills.py LIBRARY RECIPE FOLDER COUNT. Prints one JSON object a line.

The first line counts the operations of a run that nothing happens to, in FOLDER/whole; then come COUNT kills, spread
over them, every other one in the middle of the operation: FOLDER/NUMBER is the run as it was resumed.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from pathlib import Path

import torch

from minillm.config.recipe import load_recipe
from minillm.distillation import run_recipe


def in_a_fork(work) -> int:
    """The exit status of a child that does the work, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    library, recipe, folder, count = ctypes.CDLL(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)  # before a fork nothing may have run in parallel
    tell = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def run(name: str, number: int, middle: bool, resume: str = "") -> int:
        def work() -> None:
            output = folder / name
            library.kill_at(str(output).encode(), ctypes.c_long(number), int(middle))
            run_recipe(load_recipe(recipe, [f"--output={output}"]), resume=resume)
            (folder / f"{name}.operations").write_text(str(library.operations()))

        return in_a_fork(work)

    run_recipe(load_recipe(recipe, [f"--output={folder / 'first'}"]))  # what is imported once, and not in every fork
    assert run("whole", -1, False) == 0
    operations = int((folder / "whole.operations").read_text())
    print(json.dumps({"operations": operations}), file=tell, flush=True)
    numbers = random.Random(0)
    for i in range(count):
        number = 1 + (i * operations + numbers.randrange(operations)) // count
        killed = run(str(i), number, bool(i % 2))
        resumed = run(str(i), -1, False, "auto")
        print(json.dumps({"run": i, "number": number, "killed": killed, "resumed": resumed}), file=tell, flush=True)


if __name__ == "__main__":
    main()
