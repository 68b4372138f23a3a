"""Trackers: what metrics.jsonl holds, sent to TensorBoard, Weights & Biases, trackio and others as well.

By accelerate's classes; none is imported unless `log.trackers` names it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config.check import unknown
from minillm.config.schema import ConfigError
from minillm.files import flatten

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "minillm"


def check_trackers(names: str) -> list[str]:
    """The names, which are separated by commas. Raises ConfigError for one that is unknown or not installed."""
    from accelerate.tracking import LoggerType, get_available_trackers

    found = [name.strip() for name in names.split(",") if name.strip()]
    known = [name for name in map(str, LoggerType.list()) if name != "all"]
    installed = {str(name) for name in get_available_trackers()}
    for name in found:
        if name not in known:
            raise ConfigError(unknown("value of log.trackers:", name, known))
        if name not in installed:
            raise ConfigError(f"log.trackers names {name}, which is not installed: pip install {name}")
    return found


def open_trackers(names: str, run: Path, configuration: dict[str, Any]) -> "list[GeneralTracker]":
    """Each with the configuration; those that write files write below the run directory."""
    wanted = check_trackers(names)
    if not wanted:
        return []
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(log_with=wanted, project_config=ProjectConfiguration(str(run), logging_dir=str(run)))
    called = {name: {"name": run.name} for name in ("wandb", "trackio")}
    accelerator.init_trackers(PROJECT, {key: _plain(value) for key, value in flatten(configuration)}, called)
    return accelerator.trackers


def _plain(value: Any) -> bool | str | float | int:
    """Of the types that every tracker stores."""
    return value if isinstance(value, (bool, str, float, int)) else str(value)
