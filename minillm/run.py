"""A run directory: everything a run leaves behind, and the line it prints per log step.

config.yaml        everything resolved            environment.json  versions, backends, hardware
metrics.jsonl      one object per log step        samples.jsonl     prompts with answers, at each evaluation
checkpoints/step-N/  written whole: DONE is last  model/            what from_pretrained loads, with tokenizer
"""

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config import ConfigError, Recipe, save

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "rouge-score", "minillm-kernels")
SHOWN = {
    "loss": "loss {:.3f}",
    "kl/reverse": "kl {:.3f}",
    "reward/mean": "reward {:.2f}",
    "loss/pt": "pt {:.2f}",
    "grad_norm": "grad {:.2f}",
    "step_time": "{:.1f} s",
    "tokens_per_second": "{:.0f} tok/s",
}


class Run:
    """Writer of one run directory, which must not hold another run."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = output_directory(recipe)
        self.path.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        save(recipe, self.path / "config.yaml")
        self.environment = environment()
        self.write("environment.json", self.environment)

    def log(self, stage: str, step: int, steps: int, global_step: int, metrics: dict[str, float], left: float) -> None:
        """Append to metrics.jsonl and print one line. `step` of `steps` counts within the stage, `left` is seconds."""
        self._append("metrics.jsonl", {"stage": stage, "step": global_step, **metrics})
        shown = "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)
        print(f"{stage}  {step}/{steps}  {shown}  {duration(left)} left", flush=True)

    def sample(self, row: dict[str, Any]) -> None:
        self._append("samples.jsonl", row)

    def write(self, name: str, value: Any) -> None:
        """A file of the run: text as it is, anything else as JSON."""
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (self.path / name).write_text(text)

    def checkpoint(self, accelerator: "Accelerator", step: int) -> None:
        """Weights, optimiser and random state under checkpoints/step-N; a directory without DONE does not count."""
        target = self.path / "checkpoints" / f"step-{step}"
        partial = target.with_name(f".{target.name}")
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "DONE").touch()
            os.replace(partial, target)

    def export(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Write model/, or replace the one of the stage before."""
        target = self.path / "model"
        partial = target.with_name(".model")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def output_directory(recipe: Recipe) -> Path:
    """The directory asked for, which must be new; otherwise the first free one of runs/NAME, runs/NAME-2, …"""
    if recipe.first.output:
        path = Path(recipe.first.output)
        if path.exists() and any(path.iterdir()):
            raise ConfigError(f"{path} is not empty: give another --output, or delete it")
        return path
    path, number = Path("runs") / recipe.name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{recipe.name}-{number}"
    return path


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


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
