"""Checkpoints that are whole or absent, in safetensors and JSON: nothing that could run code is ever read.

    checkpoints/step-N/   model.safetensors       the weights that are trained (adapter.safetensors under LoRA)
                          optimizer.safetensors   the optimiser's state by parameter name
                          random.safetensors      torch's random state of each process
                          memory.safetensors      rollouts still in use
                          progress.json           stage, step, counters, and the configuration of the run
                          config.json             of the model: from_pretrained loads the directory
                          DONE

A save writes to a hidden directory beside, flushes it to the disk, DONE last, and renames: whatever interrupts, the
checkpoint before stays. The position in the data is the step's number (minillm/train).
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError
from minillm.files import flatten, flush
from minillm.run.optimizer_state import fill_state, plain_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or taken up; the message names the one that is whole, and what to do."""


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


def save(
    folder: Path,
    recipe: Recipe,
    progress: Progress,
    groups: dict[str, dict[str, Tensor]],
    model: "PreTrainedModel",
    keep: int,
) -> Path:
    """Write folder/step-N of the tensors in `groups`, then delete all but the newest `keep`.

    Raises CheckpointError when it cannot be written; then the checkpoints before are untouched.
    """
    target = folder / f"step-{progress.global_step}"
    partial = folder / f".step-{progress.global_step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while saving
        partial.mkdir(parents=True)
        for name, tensors in groups.items():
            if tensors:
                save_file(_plain(tensors), partial / f"{name}.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial)
        state = {"progress": dataclasses.asdict(progress), "config": recipe.to_dict()}
        (partial / "progress.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        (partial / "DONE").touch()
        for path in (*partial.iterdir(), partial):
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        before = latest(folder.parent)
        whole = f"The one before, {before}, is whole" if before else "There is none before it"
        raise CheckpointError(
            f"no checkpoint could be written at step {progress.global_step}: {error}. {whole}"
        ) from error
    for old in list(_whole(folder))[:-keep]:
        (old / "DONE").unlink()  # first: half deleted, it must not pass for whole
        shutil.rmtree(old)
    return target


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run directory."""
    found = list(_whole(run / "checkpoints"))
    return found[-1] if found else None


def best_steps(run: Path, stage: str) -> set[float]:
    """The steps of the best validations that the whole checkpoints of a stage know of."""
    found = [json.loads((path / "progress.json").read_text(encoding="utf-8")) for path in _whole(run / "checkpoints")]
    kept = [state["progress"] for state in found]
    return {progress["best"]["step"] for progress in kept if progress["stage"] == stage and progress["best"]}


def load(path: Path, recipe: Recipe) -> Checkpoint:
    """Read a checkpoint, which must be whole and of this recipe.

    Raises FileNotFoundError or ConfigError.
    """
    if not (path / "DONE").exists():
        raise FileNotFoundError(
            f"no whole checkpoint at {path}: give a directory checkpoints/step-N that holds DONE, or --resume auto"
        )
    state = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    ours, theirs = (dict(flatten(tree)) for tree in (recipe.to_dict(), state["config"]))
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and not _immaterial(key)]
    if differing:
        shown = "; ".join(f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"{path} is of another run: {shown}{more}. Resume that run with its own configuration: "
            f"minillm train {path.parent.parent / 'config.yaml'} --resume {path}"
        )
    names = [file.stem for file in path.glob("*.safetensors")]
    groups = {name: load_file(path / f"{name}.safetensors") for name in names}
    return Checkpoint(path, Progress(**state["progress"]), groups)


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
def restore(model: nn.Module, optimizer: Any, accelerator: Accelerator, groups: dict[str, dict[str, Tensor]]) -> None:
    """Put back what `state_of` gave. With another number of processes, their random states start anew."""
    parameters = trained(model)
    fill_state(optimizer.optimizer, parameters, groups["optimizer"])
    restore_weights(model, groups[weights_name(model)])
    if len(groups["random"]["cpu"]) == accelerator.num_processes:
        torch.set_rng_state(groups["random"]["cpu"][accelerator.process_index].cpu())
        if accelerator.device.type == "cuda" and "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"][accelerator.process_index].cpu())


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])


def write_weights(model: nn.Module, path: Path) -> None:
    """The trained weights alone, as one file that is whole or absent. Raises CheckpointError."""
    partial = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_plain(trained(model)), partial, metadata={"format": "pt"})
        flush(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written: {error}. Make room, then --resume auto goes on from the last checkpoint"
        ) from error


def _plain(tensors: Any) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _whole(folder: Path) -> Iterator[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / "DONE").exists()]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _immaterial(key: str) -> bool:
    """Keys that change nothing of what is computed."""
    return key == "output" or key.startswith("log.")
