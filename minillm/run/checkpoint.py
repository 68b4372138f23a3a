"""Checkpoints that are whole or absent, in safetensors and JSON: nothing that could run code is ever read.

    checkpoints/step-N/   model.safetensors       the weights that are trained (adapter.safetensors under LoRA)
                          optimizer.safetensors   the optimiser's state by parameter name
                          random.safetensors      torch's random state of each process
                          memory.safetensors      rollouts still in use
                          progress.json           stage, step, counters, and the configuration of the run
                          config.json             of the model: from_pretrained loads the directory
                          shard-*.safetensors     of a sharded student instead: each process's part of weights and
                                                  moments (torch.distributed.checkpoint)
                          manifest.json           size and CRC-32 of every file above
                          DONE

A save writes to a hidden directory beside, flushes it to the disk, DONE last, and renames: whatever interrupts, the
checkpoint before stays. Before one is used, its files are compared with the manifest, and its tensors with the student
that they are for. Other names in the folder, such as step-5.bak, are nobody's business here. The position in the data
is the step's number (minillm/train).
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError
from minillm.files import flatten, flush, partial_of, remove, whole_or_absent
from minillm.parallel.whole import copy_into, whole_on_first
from minillm.run import shards
from minillm.run.optimizer_state import fill_state, plain_state
from minillm.run.verify import (
    CheckpointError,
    check_alike,
    check_finite,
    check_moments,
    check_progress,
    check_random,
    crc32_of,
    verified_files,
    write_manifest,
)
from minillm.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = re.compile(r"step-(0|[1-9]\d*)")


@dataclass
class Progress:
    """How far a run has come; plain numbers and text."""

    stage: str
    step: int = 0
    """Optimiser steps of the stage that are done."""
    first_step: int = 0
    """Optimiser steps of the stages before."""
    num_tokens: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    """Seconds, in all and per phase."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the steps since the last log line."""
    best: dict[str, float] = field(default_factory=dict)
    """The best validation: its step and score."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the stages before amounted to."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of the loss, in float16."""

    @property
    def global_step(self) -> int:
        return self.first_step + self.step


class Checkpoint(NamedTuple):
    """One that is whole."""

    path: Path
    progress: Progress
    groups: dict[str, dict[str, Tensor]]
    """Of tensors in shards, names, shapes and types alone (on the device `meta`): `shards.fill` reads them."""


def save(
    folder: Path,
    recipe: Recipe,
    progress: Progress,
    groups: dict[str, dict[str, Tensor]],
    model: "PreTrainedModel",
    keep: int,
) -> Path:
    """Write folder/step-N of the tensors in `groups`, then delete all but the newest `keep`. Every process must call
    it where some of them are shards; the first one writes the rest.

    Raises CheckpointError when it cannot be written, FloatingPointError for weights or moments that are not finite;
    then the checkpoints before are untouched.
    """
    target = folder / f"step-{progress.global_step}"
    before = latest(folder.parent)
    whole = f"The one before, {before}, is whole" if before else "There is none before it"
    plain, parts = shards.split(groups)
    try:
        _check_finite(plain)
        shards.check_finite_everywhere(parts)
    except CheckpointError as error:
        raise FloatingPointError(
            f"{progress.stage}, step {progress.step}: {error} after the update, and no checkpoint is written of that: "
            f"lower optim.lr. {whole}"
        ) from error
    try:
        written = shards.write(parts, folder)
        if not PartialState().is_main_process:
            return target
        with whole_or_absent(target) as partial:
            if written:
                os.replace(written, partial)
            else:
                partial.mkdir()
            for name, tensors in plain.items():
                if tensors:
                    save_file(_plain(tensors), partial / f"{name}.safetensors", metadata={"format": "pt"})
            model.config.save_pretrained(partial)
            state = {"progress": dataclasses.asdict(progress), "config": recipe.to_dict()}
            (partial / "progress.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_manifest(partial)
            (partial / "DONE").touch()
            for path in (*partial.iterdir(), partial):
                flush(path)
        flush(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"no checkpoint could be written at step {progress.global_step}: {error}. {whole}"
        ) from error
    for old in list(_whole(folder))[:-keep]:
        os.replace(old, partial_of(old))  # half deleted, it must not pass for whole
        shutil.rmtree(partial_of(old))
    return target


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run directory."""
    found = list(_whole(run / "checkpoints"))
    return found[-1] if found else None


def best_steps(run: Path, stage: str) -> set[float]:
    """The steps of the best validations that the whole checkpoints of a stage know of."""
    known = set()
    for path in _whole(run / "checkpoints"):
        try:
            progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))["progress"]
            if progress["stage"] == stage and progress["best"]:
                known.add(progress["best"]["step"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged meanwhile: nothing will be resumed from it
            continue
    return known


def newest_usable(run: Path, recipe: Recipe, student: nn.Module | None) -> Checkpoint | None:
    """The newest checkpoint of a run directory that `load` accepts; None where there is none at all. Newer ones that
    are damaged are set aside, with a message.

    Raises CheckpointError when all are damaged.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(list(_whole(run / "checkpoints"))):
        try:
            found = load(path, recipe, student)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for other, why in damaged.items():
            say(f"{why}. It is kept as {set_aside(other, 'damaged')}; going on from {path}")
        return found
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {run} can be used: {'; '.join(map(str, damaged.values()))}. To start anew, delete "
            f"{run / 'checkpoints'}"
        )
    return None


def later_than(path: Path) -> list[Path]:
    """The whole checkpoints beside one that are of later steps."""
    found = list(_whole(path.parent))
    return found[found.index(path) + 1 :] if path in found else []


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to step-N.WHY, which no run reads, replaces or deletes."""
    target = path.with_name(f"{path.name}.{why}")
    remove(target)
    os.replace(path, target)
    return target


def check_whole(path: Path) -> None:
    """Raises FileNotFoundError where no save has ended."""
    if not (path / "DONE").exists():
        raise FileNotFoundError(
            f"no whole checkpoint at {path}: give a directory checkpoints/step-N that holds DONE, or --resume auto"
        )


def load(path: Path, recipe: Recipe, student: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint, which must be whole, undamaged and of this recipe; with `student`, of weights and moments
    that fit it.

    Raises FileNotFoundError, ConfigError for one of another recipe, CheckpointError for a damaged one.
    """
    check_whole(path)
    try:
        names = verified_files(path)
        state = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        progress, theirs = Progress(**state["progress"]), dict(flatten(state["config"]))
        files = [name for name in names if name.endswith(".safetensors") and not shards.is_file(name)]
        groups = shards.described(path, names)
        for name in files:
            groups.setdefault(Path(name).stem, {}).update(load_file(path / name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    ours = dict(flatten(recipe.to_dict()))
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and not _immaterial(key)]
    if differing:
        shown = "; ".join(f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"{path} is of another run: {shown}{more}. Resume that run with its own configuration: "
            f"minillm train {path.parent.parent / 'config.yaml'} --resume {path}"
        )
    try:
        _check_finite({name: shards.with_values(tensors) for name, tensors in groups.items()})
        if student is not None:
            parameters = trained(student)
            check_progress(progress, recipe)
            check_alike(groups.get(weights_name(student), {}), parameters)
            if recipe.stages[progress.stage].optim.optimizer == "adamw":  # others are compared when they are filled
                check_moments(groups.get("optimizer", {}), parameters, progress.step)
            check_random(groups.get("random", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used ({error})") from error
    return Checkpoint(path, progress, groups)


# ---- what a training consists of


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_name(model: nn.Module) -> str:
    return "model" if all(parameter.requires_grad for parameter in model.parameters()) else "adapter"


def state_of(model: nn.Module, optimizer: Any, accelerator: Accelerator) -> dict[str, dict[str, Tensor]]:
    """Weights, optimiser and random state. Every process must call it."""
    parameters = trained(model)
    moments = plain_state(optimizer.optimizer, parameters)
    random = {"cpu": accelerator.gather(torch.get_rng_state().to(accelerator.device)[None])}
    if accelerator.device.type == "cuda":
        random["cuda"] = accelerator.gather(torch.cuda.get_rng_state().to(accelerator.device)[None])
    return {weights_name(model): dict(parameters), "optimizer": moments, "random": random}


@torch.no_grad()
def restore(model: nn.Module, optimizer: Any, accelerator: Accelerator, found: Checkpoint) -> None:
    """Put back what `state_of` gave, into a student that is sharded or not. With another number of processes, their
    random states start anew. Every process must call it."""
    parameters, groups = trained(model), found.groups
    fill_state(optimizer.optimizer, parameters, groups["optimizer"])
    moments = plain_state(optimizer.optimizer, parameters)
    restore_weights(model, groups[weights_name(model)])
    shards.fill(found.path, {weights_name(model): parameters, "optimizer": moments}, groups)
    if len(groups["random"]["cpu"]) == accelerator.num_processes:
        torch.set_rng_state(groups["random"]["cpu"][accelerator.process_index].cpu())
        if accelerator.device.type == "cuda" and "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"][accelerator.process_index].cpu())


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises CheckpointError for weights of another model. Those without values are left as they are."""
    parameters = trained(model)
    check_alike(weights, parameters)
    for name, parameter in parameters.items():
        if not weights[name].is_meta:
            copy_into(parameter, weights[name])


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """What `write_weights` wrote of this model. Raises CheckpointError for a file that is gone, damaged or of another
    model."""
    try:
        weights = load_file(path)
        with safe_open(path, "pt") as file:
            if crc32_of(weights) != file.metadata().get("crc32"):
                raise CheckpointError("its checksum differs")
        check_alike(weights, trained(model))
        check_finite(weights)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return weights


def write_weights(model: nn.Module, path: Path) -> None:
    """The trained weights alone, as one file that is whole or absent, by the first process; every process must call
    it. Raises CheckpointError."""
    weights = _plain(whole_on_first(trained(model)))
    if not PartialState().is_main_process:
        return
    try:
        with whole_or_absent(path) as partial:
            save_file(weights, partial, metadata={"format": "pt", "crc32": crc32_of(weights)})
            flush(partial)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. Make room, then --resume auto goes on from the last checkpoint"
        ) from error


def _check_finite(groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Of the weights and the moments; a method's memory may hold infinities."""
    for name in ("model", "adapter", "optimizer"):
        check_finite(groups.get(name, {}))


def _plain(tensors: Any) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _whole(folder: Path) -> Iterator[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name) and (path / "DONE").exists()]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _immaterial(key: str) -> bool:
    """Keys that change nothing of what is computed."""
    return key == "output" or key.startswith(("log.", "parallel."))
