"""What a report is made from: run directories, and JSON files that `minillm evaluate --out` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.data.sources import DataError
from minillm.files import read_lines

Result = dict[str, Any]
"""The JSON of `minillm evaluate`."""


class Source(NamedTuple):
    """One run or evaluation, under the name that the report gives it."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Result]


def read_sources(paths: Sequence[str]) -> list[Source]:
    """Raises FileNotFoundError for a path that is none, DataError for one that holds nothing to report."""
    names = _short_names([Path(path).resolve() for path in paths])
    return [_read(Path(path), name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: give a run directory, or a JSON file of minillm evaluate --out")
    if path.is_file():
        result = read_result(path)
        return Source(name, path, [], {}, result.get("environment", {}), {name: result})
    files = sorted(path.glob("evaluation*.json"))
    labels = [
        name if len(files) == 1 else f"{name}, {file.stem.removeprefix('evaluation').strip('-_.')}" for file in files
    ]
    results = {label.rstrip(", "): read_result(file) for label, file in zip(labels, files, strict=True)}
    metrics = _lines(path / "metrics.jsonl")
    summary, environment = (_tree(path / f) for f in ("summary.json", "environment.json"))
    if not (results or metrics or summary):
        raise DataError(
            f"{path} holds no metrics.jsonl, summary.json or evaluation*.json: it is no run directory, or the run has "
            "not logged a step yet"
        )
    return Source(name, path, metrics, summary, environment, results)


def read_result(path: Path) -> Result:
    """One evaluation. Raises DataError for another file."""
    tree = _tree(path)
    missing = [key for key in ("rouge_l", "calibration", "by_reference_length", "generation") if key not in tree]
    if missing:
        raise DataError(f"{path} is no evaluation (it has no {missing[0]!r}): make one with minillm evaluate --out")
    return tree


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
