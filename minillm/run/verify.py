"""What must hold of a checkpoint before it is used: files as its manifest says, tensors as the student has them.

The checks refuse by CheckpointError, with what is wrong alone; the caller says of which checkpoint.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.config.recipe import Recipe
from minillm.files import checksum

if TYPE_CHECKING:
    from minillm.run.checkpoint import Progress

MANIFEST = "manifest.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's, by the names of its state."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or taken up; the message names the one that is whole, and what to do."""


def write_manifest(folder: Path) -> None:
    """Size and CRC-32 of every file that is in the folder now."""
    files = {path.name: _stamp(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def verified_files(folder: Path, compare: bool = True) -> list[str]:
    """Names of the files in the manifest, compared with it or not. Raises ValueError where one of them is not as it
    says, and what reading a file or JSON raises."""
    stamps = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, stamp in stamps.items():
        if Path(name).name != name:
            raise ValueError(f"{MANIFEST} names {name!r}, which is not in the directory")
        if compare and (found := _stamp(folder / name)) != stamp:
            raise ValueError(f"{name} has {found}, {MANIFEST} says {stamp}")
    return list(stamps)


def crc32_of(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of tensors on the CPU, in the order of their names: for a file that has no manifest."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def check_progress(progress: "Progress", recipe: Recipe) -> None:
    """Refuse a position that no run of this recipe comes to."""
    steps = {name: stage.optim.steps for name, stage in recipe.stages.items()}
    before = list(steps)[: list(steps).index(progress.stage)] if progress.stage in steps else []
    if (
        progress.stage not in steps
        or type(progress.step) is not int
        or not 0 <= progress.step <= steps[progress.stage]
        or progress.first_step != sum(steps[name] for name in before)
        or list(progress.stages) != before
    ):
        raise CheckpointError(
            f"it is at stage {progress.stage!r}, step {progress.step} after {progress.first_step}, where this recipe "
            "never is"
        )


def check_moments(moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor], step: int) -> None:
    """Refuse moments that AdamW does not have of these parameters after `step` steps."""
    left = dict(moments)
    for name, parameter in parameters.items():
        keys = {f"{name}.{key}" for key in MOMENTS}
        found = {key: left.pop(key) for key in keys & left.keys()}
        if not found:
            continue  # no gradient has reached it
        like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        check_alike(found, {f"{name}.{key}": value for key, value in like.items()})
        if not 0 <= (done := float(found[f"{name}.step"])) <= step:
            raise CheckpointError(f"{name}.step is {done:g} after {step} steps")
    check_alike(left, {})


def check_random(states: Mapping[str, Tensor]) -> None:
    """Refuse what torch cannot take as its random state on the CPU, one row a process."""
    found = states.get("cpu", torch.empty(0))
    if found.dtype != torch.uint8 or found.shape[1:] != torch.get_rng_state().shape:
        raise CheckpointError(f"its random state is {_kind(found)}")


def check_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that differ in names, shapes or dtypes."""
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (_kind(tensors.get(name)) for tensors in (expected, found))
        if ours != theirs:
            raise CheckpointError(f"{name} is {theirs} there, {ours} in this run")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities; one wait for the device."""
    some = {name: x.detach() for name, x in tensors.items() if x.numel()}
    if some:
        extremes = torch.stack([torch.stack(x.aminmax()).isfinite().all() for x in some.values()])
        for name, finite in zip(some, extremes.tolist(), strict=True):
            if not finite:
                raise CheckpointError(f"{name} is not finite")


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _stamp(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}
