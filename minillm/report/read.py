"""What a report is made from: run directories, and JSON files of evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minillm.data.sources import DataError
from minillm.evaluation.result import START, TEACHER, Evaluation
from minillm.files import read_lines


class Source(NamedTuple):
    """One run or evaluation, under the name that the report gives it."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, Evaluation]
    """What a run measured itself: at the start, after each stage, and of its teacher."""
    results: dict[str, Evaluation]
    """What `minillm evaluate` measured, by label."""


def read_sources(paths: Sequence[str]) -> list[Source]:
    """Raises FileNotFoundError for a path that is none, DataError for one that holds nothing to report."""
    names = _short_names([Path(path).resolve() for path in paths])
    return [_read(Path(path), name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: give a run directory, or a JSON file of minillm evaluate --out")
    if path.is_file():
        result = read_result(path)
        return Source(name, path, [], {}, result.about.get("environment", {}), {}, {name: result})
    files = sorted(path.glob("evaluation*.json"))
    labels = [
        name if len(files) == 1 else f"{name}, {file.stem.removeprefix('evaluation').strip('-_.')}" for file in files
    ]
    results = {label.rstrip(", "): read_result(file) for label, file in zip(labels, files, strict=True)}
    metrics, stages = _lines(path / "metrics.jsonl"), _stages(path)
    summary, environment = (_tree(path / f) for f in ("summary.json", "environment.json"))
    if not (results or metrics or summary or stages):
        raise DataError(
            f"{path} holds no metrics.jsonl, summary.json or evaluation*.json: it is no run directory, or the run has "
            "not logged a step yet"
        )
    return Source(name, path, metrics, summary, environment, stages, results)


def _stages(run: Path) -> dict[str, Evaluation]:
    """The evaluations of a run directory, in the order in which they are made."""
    config = run / "config.yaml"
    names = [
        START,
        *(yaml.safe_load(config.read_text(encoding="utf-8"))["stages"] if config.exists() else ()),
        TEACHER,
    ]
    files = {name: run / "evaluations" / f"{name}.json" for name in names}
    return {name: read_result(file) for name, file in files.items() if file.exists()}


def read_result(path: Path) -> Evaluation:
    """One evaluation. Raises DataError for another file."""
    try:
        return Evaluation.from_dict(_tree(path))
    except KeyError as missing:
        raise DataError(
            f"{path} is no evaluation (it has no {missing}): make one with minillm evaluate --out"
        ) from None


def _tree(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return tree if isinstance(tree, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError:  # a run that is going on writes this one now
            continue
    return rows


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem} ({i})" for i, path in enumerate(paths, 1)]
