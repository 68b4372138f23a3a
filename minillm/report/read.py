"""What a report is made from: run directories, and JSON files of evaluations."""

import json
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from minillm.config.parse import parse
from minillm.config.recipe import STAGE_NAME
from minillm.data.sources import DataError
from minillm.evaluation.result import START, TEACHER, Evaluation
from minillm.files import read_lines
from minillm.foreign import foreign, reason

LARGEST = 10**100
"""Of numbers that a figure can be drawn of."""


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
    tree = parse(config.read_bytes(), str(config)) if config.exists() else {}
    stages = tree.get("stages") if isinstance(tree, dict) else None
    named = [name for name in stages if STAGE_NAME.fullmatch(str(name))] if isinstance(stages, dict) else []
    names = [START, *map(str, named), TEACHER]
    files = {name: run / "evaluations" / f"{name}.json" for name in names}
    return {name: read_result(file) for name, file in files.items() if file.exists()}


def read_result(path: Path) -> Evaluation:
    """One evaluation. Raises DataError for another file."""
    tree = _tree(path)
    with foreign(f"{path} is no evaluation; make one with minillm evaluate --out", DataError):
        result = Evaluation.from_dict(tree)
        if not fits(result, Evaluation):
            raise DataError(f"{path} is no evaluation: some of its values are of another kind than minillm writes")
    if why := _incomplete(result):
        raise DataError(f"{path} is no whole evaluation: {why}")
    return result


def _incomplete(result: Evaluation) -> str:
    bias = result.exposure_bias
    seeds = [mean.seeds for mean in result.means.values() if mean.seeds] + list(result.distinct.values())
    problems = {
        "a response has no reference": not all(each.references for each in result.responses),
        "sampled scores have no seed, or an infinite one": not all(each.by_seed for each in seeds)
        or any(math.isinf(score) for each in seeds for score in each.by_seed),
        "a calibration has no predictions": not all(c.bins and c.count > 0 for c in result.calibration.values()),
        "its curves of exposure bias differ in length": bias is not None
        and len({len(curve) for curve in (bias.length, bias.exaccerr, bias.standard_error)}) > 1,
    }
    return next((problem for problem, found in problems.items() if found), "")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as far down as the type says."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (Any, Tensor):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, origin) and all(fits(each, inner[0]) for each in value)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = get_type_hints(kind).items()
        return isinstance(value, kind) and all(fits(getattr(value, name), each) for name, each in hints)
    if kind in (int, float):
        whole = type(value) is int or (kind is float and isinstance(value, float))
        return whole and not LARGEST <= abs(value) < math.inf
    return type(value) is kind


def _tree(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {reason(error)}") from error
    return tree if isinstance(tree, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a run that is going on writes this one now
            continue
        numbers = {**row, "stage": 0} if isinstance(row, dict) and isinstance(row.get("stage"), str) else None
        if not fits(numbers, dict[str, float]) or "step" not in row:
            raise DataError(
                f"{path}, record {number} is no line of a run's log: expected an object of `stage`, `step` and numbers"
            )
        rows.append(row)
    return rows


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem} ({i})" for i, path in enumerate(paths, 1)]
