"""A run directory: everything a run leaves behind, and the line it prints per log step.

config.yaml        everything resolved            environment.json  versions, backends, hardware
metrics.jsonl      one object per log step        samples.jsonl     prompts with responses, at each evaluation
evaluations/       one JSON per stage             stages/NAME/      best weights, teacher's answers
checkpoints/step-N/  minillm/run/checkpoint.py        model/            what from_pretrained loads, with tokenizer

Under several processes the first one writes, and all know the path.
"""

import json
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config.recipe import Recipe, load_recipe, save
from minillm.config.schema import ConfigError
from minillm.files import read_lines, write_atomically
from minillm.run import checkpoint
from minillm.run.checkpoint import Checkpoint, Progress
from minillm.run.clock import duration
from minillm.run.export import write_model
from minillm.run.trackers import open_trackers
from minillm.terminal import say

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "rouge-score", "minillm-kernels")
SHOWN = {
    "loss": "loss {:.3f}",
    "kl/reverse": "kl {:.3f}",
    "reward/mean": "reward {:.2f}",
    "loss/pt": "pt {:.2f}",
    "validation/loss": "validation loss {:.3f}",
    "validation/rouge_l": "validation ROUGE-L {:.2f}",
    "grad_norm": "grad {:.2f}",
    "step_time": "{:.1f} s",
    "tokens_per_second": "{:.0f} tok/s",
}


class RunDirectory:
    """Writer of one run directory: a new one, or the one of the run that is resumed."""

    def __init__(self, recipe: Recipe, resume: str = "", command: str = "") -> None:
        """`resume` is empty, "auto" (the newest checkpoint of this recipe's last run, if there is one) or a path.

        Raises ConfigError or FileNotFoundError when there is nothing to write to or to resume from.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        self.recipe, self.command, self.main = recipe, command, state.is_main_process
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = _directory(recipe, resume)
            except (ConfigError, FileNotFoundError) as error:
                found[1] = error
        if state.num_processes > 1:
            broadcast_object_list(found)
        if found[1]:
            raise found[1]
        self.path, newest = found[0]
        self.resumed: Checkpoint | None = checkpoint.load(newest, recipe) if newest else None
        self.stages: dict[str, dict[str, Any]] = dict(self.resumed.progress.stages) if self.resumed else {}
        self.environment = environment()
        self.trackers = open_trackers(recipe.run.log.trackers, self.path, recipe.to_dict())
        if self.main:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.resumed is None:
                save(recipe, self.path / "config.yaml")
            self._forget_what_came_later()
        self.write("environment.json", self.environment)

    def log(self, stage: str, step: int, steps: int, global_step: int, metrics: dict[str, float], left: float) -> None:
        """Append to metrics.jsonl and print one line. `step` of `steps` counts within the stage, `left` is seconds."""
        self._append("metrics.jsonl", {"stage": stage, "step": global_step, **metrics})
        for tracker in self.trackers:
            tracker.log(metrics, step=global_step)
        shown = "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)
        say(f"{stage}  {step}/{steps}  {shown}  {duration(left)} left")

    def finish(self) -> None:
        """Nothing more will be logged."""
        for tracker in self.trackers:
            tracker.finish()

    def sample(self, row: dict[str, Any]) -> None:
        self._append("samples.jsonl", row)

    def write(self, name: str, value: Any) -> None:
        """A file of the run: text as it is, anything else as JSON."""
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        if self.main:
            write_atomically(self.path / name, text)

    def read(self, name: str) -> Any:
        """What `write` wrote as JSON; None where there is no such file."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def checkpoint(
        self,
        progress: Progress,
        groups: "dict[str, dict[str, Tensor]]",
        model: "PreTrainedModel",
        keep: int,
    ) -> None:
        """Write checkpoints/step-N. Raises CheckpointError, which says how to go on from the one before."""
        try:
            checkpoint.save(self.path / "checkpoints", self.recipe, progress, groups, model, keep)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}. Make room, then: {self.how_to_resume()}") from error

    def how_to_resume(self) -> str:
        """The command that goes on from the last checkpoint, in words."""
        newest = checkpoint.latest(self.path)
        if newest is None:
            return "There is no checkpoint yet (log.checkpoint_every): the run starts anew"
        command = self.command or f"minillm train {self.path / 'config.yaml'}"
        return f"Resume with: {command} --resume {shlex.quote(str(newest))}"

    def export(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write model/, or replace the one of the stage before; adapters merged, and alone in model/adapter/."""
        if self.main:
            write_model(model, tokenizer, self.path / "model")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.main:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _forget_what_came_later(self) -> None:
        """Metrics of steps that will be run again, or of a run that left no checkpoint; and that it had ended."""
        (self.path / "summary.json").unlink(missing_ok=True)
        done = self.resumed.progress.global_step if self.resumed else 0
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in read_lines(path):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote this one
                    continue
                if row["step"] <= done:
                    kept.append(line + "\n")
            write_atomically(path, "".join(kept))


def _directory(recipe: Recipe, resume: str) -> tuple[Path, Path | None]:
    """The directory to write to, and the checkpoint to go on from."""
    if resume and resume != "auto":
        path = Path(resume)
        checkpoint.load(path, recipe)
        return path.resolve().parent.parent, path
    if resume == "auto":
        before = _last_run(recipe)
        if before is not None:
            return before, checkpoint.latest(before)
    return output_directory(recipe), None


def _last_run(recipe: Recipe) -> Path | None:
    """The newest directory in which this very recipe has run."""
    given = Path(recipe.run.output)
    candidates = [given] if recipe.run.output else _numbered(recipe)
    for path in reversed(candidates):
        config = path / "config.yaml"
        if config.is_file() and load_recipe(config).digest() == recipe.digest():
            return path
    return None


def output_directory(recipe: Recipe) -> Path:
    """The directory asked for, which must be new; otherwise the first free one of runs/NAME, runs/NAME-2, …"""
    if recipe.run.output:
        path = Path(recipe.run.output)
        if path.exists() and any(path.iterdir()):
            raise ConfigError(f"{path} is not empty: give another --output, delete it, or --resume auto")
        return path
    taken = _numbered(recipe)
    name = recipe.name if not taken else f"{recipe.name}-{len(taken) + 1}"
    return Path("runs") / name


def _numbered(recipe: Recipe) -> list[Path]:
    """runs/NAME, runs/NAME-2, … as far as they exist."""
    paths: list[Path] = []
    while True:
        number = len(paths) + 1
        path = Path("runs") / (recipe.name if number == 1 else f"{recipe.name}-{number}")
        if not path.exists():
            return paths
        paths.append(path)


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on beside its configuration."""
    import torch

    from minillm_kernels import available_backends

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernel_backends": available_backends(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
