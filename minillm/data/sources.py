"""Sources of data: a JSONL or Parquet file, a directory of `datasets`, a hub id or `package:NAME` → rows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.data import packages

HUB = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")
FILES = (".jsonl", ".json", ".parquet", ".txt", ".csv")
INSTALL = 'pip install "minillm-kernels[data]"'


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and what was expected."""


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, with where it stands ("train.jsonl, record 3").

    Raises FileNotFoundError for a source that is none, DataError for one that cannot be read.
    """
    path = locate(source)
    if path is None or path.is_dir():
        read = _dataset(source, path)
    elif path.suffix == ".parquet":
        read = _parquet(path)
    else:
        read = _jsonl(path)
    for i, row in enumerate(read, 1):
        yield f"{source if path is None else path}, record {i}", row


def locate(source: str) -> Path | None:
    """Path of the file or directory; None for a hub id."""
    if source.startswith(packages.PREFIX):
        return packages.data_file(source.removeprefix(packages.PREFIX))
    path = Path(source)
    if path.exists():
        return path
    if HUB.fullmatch(source) and not source.endswith(FILES):
        return None
    raise FileNotFoundError(
        f"no data at {source!r}: give the path of a JSONL or Parquet file or of a `datasets` directory, a hub id "
        f"(ORG/NAME or ORG/NAME:SPLIT), or package:NAME with NAME one of {', '.join(packages.DATA)}"
    )


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON ({error}): expected one object a line. To see it: sed -n "
                    f"{number}p {path}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} holds a {type(row).__name__}: expected one object a line")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: {INSTALL}") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _dataset(source: str, path: Path | None) -> Iterator[dict[str, Any]]:
    """What `save_to_disk` wrote, or what `load_dataset` finds in a directory or on the hub (it runs no code of
    theirs)."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {source} needs the package datasets: {INSTALL}") from error
    name, _, split = (source, "", "") if path else source.partition(":")
    try:
        if path and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # of many kinds: network, missing repository, unknown split, no data files
        raise DataError(f"datasets could not load {source!r}: {error}") from error
    if isinstance(data, dict):
        if len(data) > 1 and "train" not in data:
            raise DataError(f"{source} has the splits {', '.join(data)}: name one, as in ORG/NAME:SPLIT")
        data = data["train"] if "train" in data else next(iter(data.values()))
    yield from data
