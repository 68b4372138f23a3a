"""A run directory: everything a run leaves behind, and the line it prints per log step.

config.yaml        everything resolved            environment.json  versions, backends, hardware
metrics.jsonl      one object per log step        samples.jsonl     prompts with responses, of each evaluation
evaluations/       one JSON per stage             stages/NAME/      best weights, teacher's answers
checkpoints/step-N/  minillm/run/checkpoint.py        model/            what from_pretrained loads, with tokenizer
run.lock           held while a run writes here (minillm/run/claim.py)

Under several processes the first one writes, and all know the path.
"""

import json
import math
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config.recipe import Recipe, save
from minillm.config.schema import ConfigError
from minillm.files import read_lines, write_atomically
from minillm.run import checkpoint
from minillm.run.checkpoint import Checkpoint, Progress
from minillm.run.claim import Claim, claim
from minillm.run.clock import duration
from minillm.run.export import write_model
from minillm.run.trackers import open_trackers
from minillm.terminal import say

if TYPE_CHECKING:
    from torch import Tensor, nn
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
    """Writer of one run directory: a new one, or the one of the run that is resumed. As a context it ends with the
    lock given back."""

    def __init__(
        self, recipe: Recipe, resume: str = "", command: str = "", student: "nn.Module | None" = None, space: int = 0
    ) -> None:
        """`resume` is empty, "auto" (the newest checkpoint of this recipe's last run, if there is one) or a path.
        `student` is what a checkpoint must fit, `space` the bytes that will be written.

        Raises ConfigError, FileNotFoundError, CheckpointError or OSError when there is nothing to write to or to
        resume from.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        self.recipe, self.command, self.main = recipe, command, state.is_main_process
        self.claim: Claim | None = None
        found: list[Any] = [None, None, None]
        if self.main:
            try:
                self.claim = claim(recipe, resume, student, space)
                resumed = self.claim.resumed
                found = [self.claim.path, resumed.path if resumed else None, None]
            except (ConfigError, checkpoint.CheckpointError, OSError) as error:
                found[2] = error
        if state.num_processes > 1:
            broadcast_object_list(found)
        self.path, newest, failed = found
        if failed:
            raise failed
        self.resumed: Checkpoint | None = None
        if newest:
            self.resumed = self.claim.resumed if self.claim else checkpoint.load(newest, recipe, student)
        self.stages: dict[str, dict[str, Any]] = dict(self.resumed.progress.stages) if self.resumed else {}
        self.environment = environment()
        try:
            self.trackers = open_trackers(recipe.run.log.trackers, self.path, recipe.to_dict())
            if self.main:
                if self.resumed is None:
                    save(recipe, self.path / "config.yaml")
                self._forget_what_came_later()
            self.write("environment.json", self.environment)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        if self.claim:
            self.claim.release()

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

    def write(self, name: str, value: Any) -> None:
        """A file of the run: text as it is, anything else as JSON, a list in a .jsonl as a line each."""
        if not self.main:
            return
        if name.endswith(".jsonl"):
            value = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path / name, text)

    def read(self, name: str) -> Any:
        """What `write` wrote as JSON; None where there is no such file, or a damaged one."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def checkpoint(
        self,
        progress: Progress,
        groups: "dict[str, dict[str, Tensor]]",
        model: "PreTrainedModel",
        keep: int,
    ) -> None:
        """Write checkpoints/step-N; every process must call it. Raises CheckpointError, which says how to go on from
        the one before, and FloatingPointError."""
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

    def export(self, model: "PreTrainedModel | None", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write model/, or replace the one of the stage before; adapters merged, and alone in model/adapter/. The
        first process has the model."""
        if self.main and model is not None:
            try:
                write_model(model, tokenizer, self.path / "model")
            except checkpoint.CheckpointError as error:
                raise checkpoint.CheckpointError(f"{error}. {self.how_to_resume()}") from error

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.main:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _forget_what_came_later(self) -> None:
        """Metrics of steps and evaluations of stages that will be run again, or of a run that left no checkpoint; and
        that it had ended. samples.jsonl is written anew from the evaluations."""
        (self.path / "summary.json").unlink(missing_ok=True)
        done, ended = 0, set(self.stages)
        if self.resumed:
            progress = self.resumed.progress
            done = progress.global_step
            if progress.step == self.recipe.stages[progress.stage].optim.steps:
                ended.add(progress.stage)
        for name in self.recipe.stages.keys() - ended:
            (self.path / "evaluations" / f"{name}.json").unlink(missing_ok=True)
        path = self.path / "metrics.jsonl"
        if path.exists():
            write_atomically(path, "".join(line + "\n" for line in read_lines(path) if _step(line) <= done))


def _step(line: str) -> float:
    """Of a line of metrics; of one that was cut when the process was killed, infinite."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


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
