"""A plain model directory out of a run's checkpoint: for a run that was stopped, or a step that was not its last."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.model.adapters import merge_adapters, save_adapters
from minillm.model.load import load_student, load_teacher, load_tokenizer
from minillm.run import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """What `AutoModelForCausalLM.from_pretrained` loads, replacing what was there once it is whole; adapters merged,
    and alone in adapter/."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    merged = merge_adapters(model)
    merged.save_pretrained(partial)
    if merged is not model:
        save_adapters(model, partial / "adapter")
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def export(run: Path, source: Path | None, output: Path) -> Path:
    """Write a student of the run to `output`: of the checkpoint `source`, by default of the run's end (its model/) or,
    if it never came there, of its newest checkpoint. Returns where it was taken from.

    Raises FileNotFoundError or ConfigError.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty: give another --output, or delete it")
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run directory: it holds no config.yaml")
    if source is None and (run / "summary.json").exists():
        shutil.copytree(run / "model", output, dirs_exist_ok=True)
        return run / "model"
    source = source or checkpoint.latest(run)
    if source is None:
        raise FileNotFoundError(f"{run} has not ended and holds no checkpoint yet (log.checkpoint_every)")
    recipe = load_recipe(run / "config.yaml")
    found, settings = checkpoint.load(source, recipe), recipe.run.model
    student = load_student(recipe.run, load_teacher(recipe.run) if settings.drop_layers is not None else None)
    checkpoint.restore_weights(student, found.groups[checkpoint.weights_name(student)])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_model(student, load_tokenizer(settings.student or settings.teacher), output)
    return source
