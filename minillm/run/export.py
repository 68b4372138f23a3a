"""A plain model directory out of a run's checkpoint: for a run that was stopped, or a step that was not its last."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.files import flush, whole_or_absent
from minillm.model.adapters import merge_adapters, save_adapters
from minillm.model.head import VOCABULARY
from minillm.model.load import load_student, load_teacher, load_tokenizer, skeleton
from minillm.run import checkpoint, shards
from minillm.run.verify import CheckpointError, check_alike, check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """What `AutoModelForCausalLM.from_pretrained` loads, replacing what was there once it is whole; adapters merged,
    and alone in adapter/. Of a student whose head is larger than its teacher's, config.json says under
    `common_vocab_size` which columns were learnt.

    Raises FloatingPointError for weights that are not finite, CheckpointError when it cannot be written.
    """
    try:
        check_finite(dict(model.named_parameters()))
    except CheckpointError as error:
        raise FloatingPointError(f"{error}, so {target} is not written: lower optim.lr") from error
    with _written(target) as partial:
        merged = merge_adapters(model)
        merged.save_pretrained(partial)
        if merged is not model:
            save_adapters(model, partial / "adapter")
        tokenizer.save_pretrained(partial)


def check_export(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a model that could not be written at the end, or read again: tried on a copy without storage, of which
    all is written but the weights, and of these the names and shapes are compared.

    Raises ConfigError.
    """
    tensors: dict[int, Tensor] = {id(x): x.to("meta") for x in model.buffers()}
    tensors |= {id(x): nn.Parameter(x.to("meta"), x.requires_grad) for x in model.parameters()}
    try:
        with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
            merged = merge_adapters(copy.deepcopy(model, tensors))
            merged.config.save_pretrained(folder)
            if merged.generation_config is not None:
                merged.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            again = skeleton(folder, "checkpoint")
        check_alike(_shapes(again), _shapes(merged))
    except OSError:
        raise
    except Exception as error:  # whatever a family's configuration or modules, or peft, object to
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{type(model).__name__} could be trained, but not written at the end and read again "
            f"({type(error).__name__}: {why}). Choose another student, or other lora.targets"
        ) from error


def export(run: Path, source: Path | None, output: Path) -> Path:
    """Write a student of the run to `output`: of the checkpoint `source`, by default of the run's end (its model/) or,
    if it never came there, of its newest checkpoint. Returns where it was taken from.

    Raises FileNotFoundError, ConfigError, or CheckpointError when it cannot be read or written.
    """
    output = output.resolve()
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty: give another --output, or delete it")
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run directory: it holds no config.yaml")
    if source is None and (run / "summary.json").exists():
        with _written(output) as partial:
            shutil.copytree(run / "model", partial)
        return run / "model"
    source = source or checkpoint.latest(run)
    if source is None:
        raise FileNotFoundError(f"{run} has not ended and holds no checkpoint yet (log.checkpoint_every)")
    recipe = load_recipe(run / "config.yaml")
    settings = recipe.run.model
    student = load_student(recipe.run, load_teacher(recipe.run) if settings.drop_layers is not None else None)
    try:
        found = checkpoint.load(source, recipe, student)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Name another one by --checkpoint") from error
    saved = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if VOCABULARY in saved:  # of the pair: the teacher is not here to tell
        setattr(student.config, VOCABULARY, saved[VOCABULARY])
    checkpoint.restore_weights(student, found.groups[checkpoint.weights_name(student)])
    shards.fill(source, {checkpoint.weights_name(student): checkpoint.trained(student)}, found.groups)
    write_model(student, load_tokenizer(settings.student or settings.teacher), output)
    return source


def _shapes(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Its tensors without their storage, in one dtype: a model is read in any."""
    return {name: torch.empty_like(x, dtype=torch.float32, device="meta") for name, x in model.state_dict().items()}


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A directory that is whole or absent, and on the disk. tokenizers has no exception of its own for a full one."""
    try:
        with whole_or_absent(target) as partial:
            yield partial
            for path in partial.rglob("*"):
                flush(path)
    except Exception as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. Make room there, or write to another directory"
        ) from error
