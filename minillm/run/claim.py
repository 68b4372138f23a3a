"""Which directory a run writes to, for as long as it writes there: one run holds it, by a lock file.

The lock is the operating system's and ends with the process, however that ends; run.lock.json says who holds it.
"""

import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from minillm.config.recipe import Recipe, load_recipe
from minillm.config.schema import ConfigError
from minillm.files import remove_partials, size_of, write_atomically
from minillm.run import checkpoint
from minillm.run.checkpoint import Checkpoint, CheckpointError
from minillm.terminal import say

LOCK, HOLDER = "run.lock", "run.lock.json"


@dataclass
class Claim:
    """A directory that this process alone writes to, until it is released."""

    path: Path
    lock: FileLock
    resumed: Checkpoint | None = None
    """What the run goes on from."""

    def release(self) -> None:
        (self.path / HOLDER).unlink(missing_ok=True)
        self.lock.release()


def claim(recipe: Recipe, resume: str, student: nn.Module | None, space: int) -> Claim:
    """The directory to write to, and the checkpoint to go on from. A directory to go on in is cleared of what killed
    processes left half-written, and of checkpoints that cannot be used or are of later steps: they are renamed.

    Args:
        recipe: whose run it is.
        resume: as of RunDirectory.
        student: what a checkpoint must fit; None: that is not checked.
        space: bytes that the run will write. What it has written before counts as room.

    Raises ConfigError for a directory that is another's, in use or on a disk without that room; FileNotFoundError for
    no checkpoint at `resume`; CheckpointError for one that cannot be used; OSError.
    """
    found: Path | None
    if resume and resume != "auto":
        checkpoint.check_whole(Path(resume))  # before anything is touched
        found = Path(resume).resolve().parent.parent
    else:
        found = _last_run(recipe) if resume else None
    held = hold(found) if found else _new_directory(recipe, resume)
    try:
        if found:
            _tidy(found)
            held.resumed = _resumed(found, resume, recipe, student)
        _check_space(held.path, space)
    except BaseException:
        held.release()
        if not found:
            _forget(held.path)
        raise
    return held


def hold(path: Path) -> Claim:
    """Lock a directory. Raises ConfigError, naming the holder, when another run has it."""
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{path} is in use by {_holder(path)}: wait for that run or stop it, or give another --output"
        ) from None
    held = Claim(path, lock)
    try:
        write_atomically(path / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
    except BaseException:
        held.release()
        raise
    return held


def _holder(path: Path) -> str:
    try:
        found = json.loads((path / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to say so, or has just ended
        return "another process"


def _new_directory(recipe: Recipe, resume: str) -> Claim:
    """The directory asked for, which must be new; otherwise the next one of runs/NAME, runs/NAME-2, …"""
    if recipe.run.output:
        path = Path(recipe.run.output)
        _check_new(path, resume)
        path.mkdir(parents=True, exist_ok=True)
        held = hold(path)
        try:
            _check_new(path, resume)  # another run may have come and gone
        except ConfigError:
            held.release()
            raise
        remove_partials(path)
        return held
    number = max(_numbered(recipe), default=0) + 1
    while True:
        path = _path(recipe, number)
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run was first
            number += 1
            continue
        return hold(path)


def _check_new(path: Path, resume: str) -> None:
    """Refuse a directory that holds anything but what a run leaves that was killed before it wrote its config.yaml."""
    ours = re.compile(rf"{LOCK}|{re.escape(HOLDER)}|\.({re.escape(HOLDER)}|config\.yaml)\.\d+")
    if path.exists() and not all(ours.fullmatch(each.name) for each in path.iterdir()):
        go_on = "its config.yaml is not of this recipe" if resume else "--resume auto goes on with the run in it"
        raise ConfigError(f"{path} is not empty: give another --output, or delete it; {go_on}")


def _forget(path: Path) -> None:
    """Delete a directory that nothing was written to."""
    (path / LOCK).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _last_run(recipe: Recipe) -> Path | None:
    """The newest directory in which this very recipe has run."""
    given = Path(recipe.run.output)
    candidates = [given] if recipe.run.output else [_path(recipe, number) for number in sorted(_numbered(recipe))]
    for path in reversed(candidates):
        try:
            if load_recipe(path / "config.yaml").digest() == recipe.digest():
                return path
        except (ConfigError, FileNotFoundError):  # of another version, or none at all
            continue
    return None


def _path(recipe: Recipe, number: int) -> Path:
    return Path("runs") / (recipe.name if number == 1 else f"{recipe.name}-{number}")


def _numbered(recipe: Recipe) -> list[int]:
    """The numbers of runs/NAME (1), runs/NAME-2, … that exist."""
    numbers = (re.fullmatch(r"(?:-([2-9]|[1-9]\d+))?", path.name.removeprefix(recipe.name))
               for path in Path("runs").glob("*") if path.name.startswith(recipe.name))  # fmt: skip
    return [int(match[1] or 1) for match in numbers if match]


def _tidy(run: Path) -> None:
    """Delete what killed processes left half-written."""
    for folder in (run, *(run / name for name in ("checkpoints", "evaluations", "model")), *run.glob("stages/*")):
        remove_partials(folder)


def _resumed(run: Path, resume: str, recipe: Recipe, student: nn.Module | None) -> Checkpoint | None:
    if resume == "auto":
        return checkpoint.newest_usable(run, recipe, student)
    try:
        found = checkpoint.load(Path(resume), recipe, student)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. --resume auto goes on from the newest that can be used") from error
    for later in checkpoint.later_than(found.path):
        say(f"{later} is of a later step: it is kept as {checkpoint.set_aside(later, 'later')}")
    return found


def _check_space(path: Path, needed: int) -> None:
    """Refuse a disk that will be full before the run has ended."""
    free, there = shutil.disk_usage(path).free, size_of(path)
    if needed > free + there:
        raise ConfigError(
            f"checkpoints and the student will take {needed / 2**20:,.1f} MiB, but there is room for "
            f"{(free + there) / 2**20:,.1f} MiB at {path}: make room, give another --output, or lower "
            "log.checkpoints_kept"
        )
